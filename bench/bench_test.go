package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestMain lets the test's program be the command, which starts itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "measure" || os.Args[1] == "server") {
		main()
		return
	}
	os.Exit(m.Run())
}

// Each library does each work once, with few messages: the command must not break
// unnoticed between two runs of it.
func TestMeasure(t *testing.T) {
	t.Parallel()
	for _, group := range groups() {
		for _, c := range group {
			if !c.first() || c.transport == loopback || c.work == "LoneEvent" && c.lib == "monolith" { // takes 5 s for an event
				continue
			}
			t.Run(c.String(), func(t *testing.T) {
				t.Parallel()
				b := &bench{cell: c, quick: true, dir: filepath.Join(t.TempDir(), "nats")}
				r, err := b.measure(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				res, err := parseResults(strings.NewReader(r.line(c)))
				if err != nil {
					t.Fatal(err)
				}
				if len(res.values) != len(r.metrics) || len(r.metrics) == 0 {
					t.Errorf("%d values in %q", len(res.values), r.line(c))
				}
			})
		}
	}
}

func TestCell(t *testing.T) {
	t.Parallel()
	for _, group := range groups() {
		for _, c := range group {
			got, err := parseCell(c.String())
			if err != nil {
				t.Fatal(err)
			}
			if got.String() != c.String() {
				t.Errorf("%s became %s", c, got)
			}
		}
	}
	for _, bad := range []string{"", "ConsumeAck", "ConsumeAck/size=256", "X/transport=radio/size=256", "X/transport=inproc/size=1", "X/size=a"} {
		if _, err := parseCell(bad); err == nil {
			t.Errorf("%q: no error", bad)
		}
	}
}

const testResults = `goos: linux
procs: 2
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=raw	9	1000 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=watermill	9	4000 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=watermill-async	9	2000 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=monotel-1pct	9	1600 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=monotel-off	9	1100 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=raw	9	2000 ns/op	10 allocs/op
BenchmarkConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=monotel-off	9	2000 ns/op	10 allocs/op
BenchmarkRegistrations/consumers=1000/transport=loopback/size=256/lib=raw	1	1000 idle-B	3 goroutines/consumer
BenchmarkRegistrations/consumers=1000/transport=loopback/size=256/lib=monotel-off	1	1400 idle-B	3.011 goroutines/consumer
`

func TestReport(t *testing.T) {
	t.Parallel()
	res, err := parseResults(strings.NewReader(testResults))
	if err != nil {
		t.Fatal(err)
	}
	got := report(res)
	for _, want := range []string{
		// Rounds are compared one by one: 0.91 and 1.
		"consume and ack, telemetry off, to nats.go | ≥ 0.9 | 0.95 (0.93–0.98) | – |\n",
		"consume and ack, metrics and 1 % sampled, to nats.go | ≥ 0.75 | **0.62 (0.62–0.62)** | – |\n",
		// Against Watermill's better mode.
		"its better ack mode | ≥ 1.5 | **1.25 (1.25–1.25)** | – |\n",
		"memory, to nats.go | ≤ 1.5 | – | 1.40 (1.40–1.40) |\n",
		"goroutines for each | ≤ 3 | – | 3.0 |\n",
		"#### Consume and ack\n",
		"| batch 10, concurrency 1, in process, 256 B | 1.50 µs | – | 4.00 µs (0.25) |",
		" GOMAXPROCS=2, linux/",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in:\n%s", want, got)
		}
	}
	if _, err := parseResults(strings.NewReader("BenchmarkX 1 2 ns/op\n")); err == nil {
		t.Error("a line of something else: no error")
	}
}

// A run measures in processes of their own, which run servers in others.
func TestRun(t *testing.T) {
	t.Parallel()
	r := runner{
		work: "^(CorePublish|ConsumeAck)", libs: []string{"raw", "monotel-1pct"}, rounds: 2, quick: true,
		out: filepath.Join(t.TempDir(), "results.txt"),
	}
	if err := r.run(t.Context(), io.Discard, t.Logf); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(r.out)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	res, err := parseResults(f)
	if err != nil {
		t.Fatal(err)
	}
	const cells, units = 8, 4
	if len(res.values) != cells*units || res.rounds() != r.rounds {
		t.Errorf("%d values in %d rounds, want %d in %d", len(res.values), res.rounds(), cells*units, r.rounds)
	}
	if !strings.Contains(res.config[keyVersions], "nats-server/v2 v2.") {
		t.Errorf("no version of the server in %q", res.config[keyVersions])
	}
}

func TestRun_refuses(t *testing.T) {
	t.Parallel()
	for _, r := range []runner{
		{rounds: 0}, {rounds: 1, work: "("}, {rounds: 1, work: "^None"}, {rounds: 1, libs: []string{"none"}},
	} {
		if _, err := r.choose(); err == nil {
			t.Errorf("%+v: no error", r)
		}
	}
}
