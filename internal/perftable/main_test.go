package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/monotel/monotel/internal/docpage"
)

var testPairs = []pair{
	{name: "Send", title: "send", unit: unitTime, ratio: 1.3},
	{name: "Take/batch=10", title: "take", unit: unitTime, ratio: 1.25, allocs: 4},
}

var testTable = comparison{first: "nats.go", second: "monotel", rows: testPairs}

const testInput = `goos: linux
goarch: amd64
pkg: example.org/p
cpu: Some Processor
BenchmarkSend/impl=raw-2                 1000   100.0 ns/op   41 B/op   1 allocs/op
BenchmarkSend/impl=monotel-2             1000   110.0 ns/op   99 B/op   2 allocs/op
BenchmarkTake/batch=10/impl=raw-2           3   2000 ns/op   500000 msg/s   9 B/op   20 allocs/op
BenchmarkTake/batch=10/impl=monotel-2       3   3000 ns/op   333333 msg/s   9 B/op   25 allocs/op
BenchmarkAlone-2                            3   1 ns/op
PASS
goos: linux
goarch: amd64
pkg: example.org/p
cpu: Some Processor
BenchmarkSend/impl=raw-2                 1000   400.0 ns/op   41 B/op   1 allocs/op
BenchmarkSend/impl=monotel-2             1000   520.0 ns/op   99 B/op   2 allocs/op
BenchmarkTake/batch=10/impl=raw-2           3   2000 ns/op   500000 msg/s   9 B/op   20 allocs/op
BenchmarkTake/batch=10/impl=monotel-2       3   2000 ns/op   500000 msg/s   9 B/op   25 allocs/op
PASS
ok  	example.org/p	1.0s
`

func parsed(t *testing.T, text string) results {
	t.Helper()
	res, err := parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestTable(t *testing.T) {
	t.Parallel()
	got, err := table(parsed(t, testInput), testTable)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		// Rounds are compared one by one: 1.1 and 1.3, not 630/500.
		"| send | 250 ns | 315 ns | 1.20 (1.15–1.25) | ≤ 1.3 | 1 → 2 |  |\n",
		// The middle of 1.5 and 1 is in the target, the allocations are not.
		"| take | 2.00 µs | 2.50 µs | 1.25 (1.12–1.38) | ≤ 1.25 | **20 → 25** | ≤ +4 |\n",
		"\n2 rounds, go1.",
		", linux/amd64, GOMAXPROCS=2. Bold: misses its target.\n",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
}

func TestTable_marksMissedRatio(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		monotel string
		bold    bool
	}{{"130", false}, {"131", true}} {
		res := parsed(t, "BenchmarkSend/impl=raw 1 100 ns/op\nBenchmarkSend/impl=monotel 1 "+tt.monotel+" ns/op\n")
		got, err := table(res, comparison{first: "nats.go", second: "monotel", rows: testPairs[:1]})
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(got, "| **1.3") != tt.bold || strings.Contains(got, "Bold:") != tt.bold {
			t.Errorf("%s to 100 ns/op: bold is not %v in:\n%s", tt.monotel, tt.bold, got)
		}
		if !strings.Contains(got, ", GOMAXPROCS=1.") {
			t.Errorf("without a suffix it is 1:\n%s", got)
		}
	}
}

func TestTable_namesMissingPairs(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, give, want string }{
		{name: "nothing", give: "", want: "Send"},
		{name: "one side", give: strings.Replace(testInput, "BenchmarkTake/batch=10/impl=raw-2", "BenchmarkOther-2", 1), want: "Take/batch=10"},
		{name: "other unit", give: strings.ReplaceAll(testInput, "ns/op", "MB/s"), want: "Take/batch=10"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if _, err := table(parsed(t, tt.give), testTable); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("table() = %v, want an error that names %q", err, tt.want)
			}
		})
	}
}

func TestParse_refuses(t *testing.T) {
	t.Parallel()
	for _, give := range []string{
		"--- FAIL: BenchmarkSend/impl=raw",
		"FAIL	example.org/p	1.0s",
		"panic: runtime error",
		"BenchmarkSend/impl=raw-2 1 many ns/op",
		"BenchmarkSend/impl=raw-2 1 NaN ns/op",
		"BenchmarkSend/impl=raw-2 1 -Inf ns/op",
		"BenchmarkSend/impl=raw-2 1 1e999 ns/op",
		"BenchmarkSend/impl=raw-2 1 -1 ns/op",
	} {
		if _, err := parse(strings.NewReader(testInput + give + "\n")); err == nil {
			t.Errorf("%q is taken", give)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add(testInput)
	f.Add("Benchmark/impl=- 1 2 x\n")
	f.Add(strings.ReplaceAll(testInput, "1", "0"))
	f.Add(strings.ReplaceAll(testInput, "1", "NaN"))
	f.Fuzz(func(t *testing.T, text string) {
		res, err := parse(strings.NewReader(text))
		if err != nil {
			return
		}
		for k, vs := range res.values {
			if k.name == "" && k.impl == "" || len(vs) == 0 {
				t.Errorf("%q has %d values", k, len(vs))
			}
		}
		if s, err := table(res, testTable); err == nil && (!strings.HasPrefix(s, "| |") || strings.Contains(s, "NaN")) {
			t.Errorf("not a table: %q", s)
		}
	})
}

func TestDuration(t *testing.T) {
	t.Parallel()
	for ns, want := range map[float64]string{
		0.5: "0.50 ns", 12.34: "12.3 ns", 456.7: "457 ns", 1000: "1.00 µs", 31_415: "31.4 µs", 2.5e6: "2.50 ms", 3e9: "3.00 s", 9e12: "9000 s",
	} {
		if got := docpage.Duration(ns); got != want {
			t.Errorf("docpage.Duration(%v) = %q, want %q", ns, got, want)
		}
	}
}

func TestQuantile(t *testing.T) {
	t.Parallel()
	vs := []float64{4, 1, 3, 2}
	for q, want := range map[float64]float64{0: 1, 0.25: 1.75, 0.5: 2.5, 1: 4} {
		if got := docpage.Quantile(vs, q); got != want {
			t.Errorf("docpage.Quantile(%v) = %v, want %v", q, got, want)
		}
	}
	if vs[0] != 4 {
		t.Error("the rounds are out of order now")
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	input := allPairs()

	t.Run("to standard output", func(t *testing.T) {
		t.Parallel()
		var out strings.Builder
		if err := run(nil, strings.NewReader(input), &out); err != nil {
			t.Fatal(err)
		}
		// Each table but the first has its heading counted as well.
		if got, want := strings.Count(out.String(), "\n| ")-(len(tables)-1), len(allRows()); got != want {
			t.Errorf("%d rows for %d pairs:\n%s", got, want, &out)
		}
	})

	t.Run("into a file", func(t *testing.T) {
		t.Parallel()
		var before strings.Builder
		for _, c := range tables {
			before.WriteString(docpage.Section{Name: c.name, Target: "performance"}.Begin() + "old\n" + docpage.End)
		}
		file := filepath.Join(t.TempDir(), "doc.md")
		if err := os.WriteFile(file, []byte(before.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := run([]string{file}, strings.NewReader(input), nil); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if s := string(got); strings.Contains(s, "old") || strings.Count(s, "\n|---") != len(tables) {
			t.Errorf("file is now:\n%s", s)
		}
	})

	t.Run("refuses", func(t *testing.T) {
		t.Parallel()
		if err := run([]string{"a", "b"}, strings.NewReader(input), nil); err == nil {
			t.Error("two files: no error")
		}
		if err := run([]string{filepath.Join(t.TempDir(), "none")}, strings.NewReader(input), nil); err == nil {
			t.Error("missing file: no error")
		}
		if err := run(nil, strings.NewReader("FAIL\n"), nil); err == nil {
			t.Error("failed benchmarks: no error")
		}
	})
}

// The page has the markers that the next run needs.
func TestPerformancePage(t *testing.T) {
	t.Parallel()
	doc, err := os.ReadFile(filepath.Join("..", "..", "docs", "performance.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range tables {
		if begin := (docpage.Section{Name: c.name, Target: "performance"}).Begin(); !strings.Contains(string(doc), begin) {
			t.Errorf("no line %q", begin)
		}
	}
	for _, p := range allRows() {
		if !strings.Contains(string(doc), "| "+p.title+" |") {
			t.Errorf("no row %q: run make performance", p.title)
		}
	}
}

func allRows() []pair {
	var all []pair
	for _, c := range tables {
		all = append(all, c.rows...)
	}
	return all
}

// allPairs is the output of a round with every pair in it.
func allPairs() string {
	var b strings.Builder
	for _, p := range allRows() {
		first, second := p.sides()
		for _, impl := range []string{first, second} {
			if strings.Contains(b.String(), "Benchmark"+p.name+"/impl="+impl+"-2 ") {
				continue // the first side of several
			}
			fmt.Fprintf(&b, "Benchmark%s/impl=%s-2 10 100 %s 3 allocs/op\n", p.name, impl, p.unit)
		}
	}
	return b.String()
}
