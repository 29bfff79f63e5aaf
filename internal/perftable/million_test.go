package main

import (
	"fmt"
	"strings"
	"testing"
)

// millionInput is what BenchmarkMillion prints, with a value replaced.
func millionInput(replace ...string) string {
	var b strings.Builder
	b.WriteString("goos: linux\ngoarch: amd64\n")
	for _, line := range []string{
		"read 1 1000000 entries 4.000 s",
		"groups 1 120.0 MiB 8.000 s",
		"ls50 1 50.0 MiB 0.0900 s",
		"where 1 120.0 MiB 9.000 s",
		"stats 1 120.0 MiB 8.000 s",
		"replay 1 120.0 MiB 10 s 12000 msg/s",
		"replay100 1 120.0 MiB 10 s 96.0 msg/s",
		"replay1000 1 120.0 MiB 10 s 1000 msg/s",
		"replay5000 1 120.0 MiB 10 s 5249 msg/s",
		"discard 1 60.0 MiB 2.000 s",
	} {
		name, rest, _ := strings.Cut(line, " ")
		fmt.Fprintf(&b, "BenchmarkMillion/impl=%s-2 %s\n", name, rest)
	}
	return strings.NewReplacer(replace...).Replace(b.String())
}

func TestMillion(t *testing.T) {
	t.Parallel()
	s, err := millionSection(parsed(t, millionInput()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"| nats.go reads the stream, headers only | 4.00 s |  |  |  |  |  |  |\n",
		"| `groups` | 8.00 s | ≤ 10 s | 2.00 |  |  | 120 MiB | ≤ 200 MiB |\n",
		"| `replay`, a tenth of them, unlimited |  |  |  | 12000 | ≥ 10000 | 120 MiB | ≤ 200 MiB |\n",
		"| `replay --rate 5000/s` |  |  |  | 5249 | 5000 ± 5 % | 120 MiB | ≤ 200 MiB |\n",
		"| `discard`, 10 000 of them | 2.00 s |  | 0.50 |  |  | 60 MiB | ≤ 200 MiB |\n",
		"\n1000000 dead letters, linux/amd64, GOMAXPROCS=2.\n",
	} {
		if !strings.Contains(s.Text, want) {
			t.Errorf("no %q in:\n%s", want, s.Text)
		}
	}
}

func TestMillion_marksMissed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ old, with, want string }{
		{"8.000 s", "10.10 s", "**10.1 s**"},
		{"120.0 MiB", "201.0 MiB", "**201 MiB**"},
		{"12000 msg/s", "9999 msg/s", "**9999**"},
		{"96.0 msg/s", "94.0 msg/s", "**94**"},
		{"5249 msg/s", "5251 msg/s", "**5251**"},
	} {
		s, err := millionSection(parsed(t, millionInput(tt.old, tt.with)))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(s.Text, tt.want) || !strings.HasSuffix(s.Text, "Bold: misses its target.\n") {
			t.Errorf("%s: no %q in:\n%s", tt.with, tt.want, s.Text)
		}
	}
}

func TestMillion_missingRow(t *testing.T) {
	t.Parallel()
	_, err := millionSection(parsed(t, millionInput("impl=where", "impl=elsewhere")))
	if err == nil || !strings.Contains(err.Error(), "impl=where") {
		t.Errorf("a row that was not measured is the error %v", err)
	}
}
