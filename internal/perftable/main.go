// Command perftable writes the tables of docs/performance.md. It reads the output
// of the paired benchmarks, several rounds of it, and puts the tables into the
// file it is given, or on standard output when it is given none:
//
//	go test -run='^$' -bench=. ./mono ./telemetry/messaging | go run ./internal/perftable docs/performance.md
//
// With -million it writes the table of BenchmarkMillion instead.
package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/monotel/monotel/internal/docpage"
)

// Sides of a pair, in the names of benchmarks: BenchmarkX/impl=raw.
const (
	implRaw     = "raw"
	implMonotel = "monotel"
	implOff     = "off"  // monotel without telemetry, or without dead letters
	implOn      = "on"   // monotel with dead letters
	implBare    = "bare" // one call of OpenTelemetry's SDK
)

const (
	unitTime   = "ns/op"
	unitP99    = "p99-ns/op"
	unitAllocs = "allocs/op"
)

// A pair is a row of the table.
type pair struct {
	name   string // of the benchmark, without impl
	title  string
	unit   string  // what is compared
	ratio  float64 // the second side may take so many times what the first takes
	allocs float64 // and make so many allocations more; 0 is no target
	first  string  // the sides; without them nats.go and monotel
	second string
}

func (p pair) sides() (first, second string) {
	if p.first == "" {
		return implRaw, implMonotel
	}
	return p.first, p.second
}

// pairs are the rows, and the targets of this project. A pair that was not
// measured is an error, so that no row is lost without notice.
var pairs = []pair{
	{name: "CorePublish/msg=new", title: "core publish", unit: unitTime, ratio: 1.3},
	{name: "CorePublish/msg=reused", title: "core publish, the same `Msg` each time", unit: unitTime, ratio: 1.3},
	{name: "CorePubSub", title: "core publish to handler", unit: unitTime, ratio: 1.3},
	{name: "TypedPubSub", title: "the same, JSON values", unit: unitTime},
	{name: "DurablePublishSync", title: "durable publish", unit: unitTime, ratio: 1.15},
	{name: "DurablePublishAsync", title: "durable publish, asynchronous", unit: unitTime, ratio: 1.15},
	{name: "ConsumeAck/batch=10", title: "consume and ack, `BatchSize` 10 (the default)", unit: unitTime, ratio: 1.25, allocs: 4},
	{name: "ConsumeAck/batch=100", title: "consume and ack, `BatchSize` 100", unit: unitTime, ratio: 1.25, allocs: 4},
	{name: "TypedConsumeAck", title: "consume and ack, JSON values", unit: unitTime},
	{name: "LoneDurableEvent", title: "a lone durable event, publish to handler, 99th percentile", unit: unitP99, ratio: 3},
}

// telemetryPairs compare monotel with itself. A throughput that is a quarter less
// takes 1.33 times as long for a message.
var telemetryPairs = slices.Concat(
	telemetryRows("TelemetryCorePublish", "core publish", [4]float64{}),
	telemetryRows("TelemetryDurablePublish", "durable publish", [4]float64{}),
	telemetryRows("TelemetryConsumeAck", "consume and ack, empty handler", [4]float64{0, 0, 1.33, 2}),
	telemetryRows("TelemetryHandler", "consume and ack, 0.5 ms handler", [4]float64{0, 0, 1.02, 0}),
)

func telemetryRows(name, title string, targets [4]float64) []pair {
	rows := make([]pair, 0, len(targets))
	for i, side := range []struct{ impl, title string }{
		{"metrics", "metrics"},
		{"unsampled", "metrics, 0 % sampled"},
		{"sampled1", "metrics, 1 % sampled"},
		{"sampled100", "metrics, 100 % sampled"},
	} {
		rows = append(rows, pair{
			name: name, title: title + ": " + side.title, unit: unitTime, ratio: targets[i], first: implOff, second: side.impl,
		})
	}
	return rows
}

// costPairs compare what is recorded for a message with one bare call of
// OpenTelemetry's SDK. The targets are the budgets of the design, over what a bare
// call took on the machine where they were set: 45 ns without a provider, 173 ns
// for an unsampled span, 675 ns for a sampled one, 181 ns for a value recorded.
var costPairs = costRows([]pair{
	{name: "publish_off", title: "publish, no provider (a span)", ratio: 60. / 45},
	{name: "consume_off", title: "process and ack, no provider (a span)", ratio: 2 * 60. / 45}, // two operations
	{name: "metrics", title: "publish, process and ack: metrics alone (a value)", ratio: 1000. / 181},
	{name: "publish_unsampled", title: "publish, unsampled (a span)", ratio: 800. / 173},
	{name: "consume_unsampled", title: "process and ack, unsampled (a span)", ratio: 1400. / 173},
	{name: "message_unsampled", title: "publish, process and ack: metrics, unsampled (a span)"},
	{name: "message_sampled", title: "publish, process and ack: metrics, sampled (a span)", ratio: 8000. / 675},
})

func costRows(rows []pair) []pair {
	for i := range rows {
		rows[i].name, rows[i].unit = "Cost/"+rows[i].name, unitTime
		rows[i].first, rows[i].second = implBare, implMonotel
	}
	return rows
}

// deadLetterPairs compare monotel with itself, too: what is not given up must not
// pay for what might be. The ratio is what rounds differ by, and no budget.
var deadLetterPairs = []pair{
	{
		name: "DeadLetterHealthyPath", title: "consume and ack, nothing is given up", unit: unitTime, ratio: 1.03,
		first: implOff, second: implOn,
	},
}

// A comparison is a table of the page.
type comparison struct {
	name          string // on the page
	first, second string // of the columns
	rows          []pair
}

var tables = []comparison{
	{"nats.go", "nats.go", "monotel", pairs},
	{"telemetry", "telemetry off", "on", telemetryPairs},
	{"cost", "bare call", "recording", costPairs},
	{"dead letters", "dead letters off", "on", deadLetterPairs},
}

func main() {
	if err := run(os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "perftable:", err)
		os.Exit(1)
	}
}

func run(args []string, in io.Reader, out io.Writer) error {
	million := len(args) > 0 && args[0] == "-million"
	if million {
		args = args[1:]
	}
	if len(args) > 1 {
		return fmt.Errorf("%d arguments given, want the file to write, or none", len(args))
	}
	res, err := parse(in)
	if err != nil {
		return fmt.Errorf("read benchmarks: %w", err)
	}
	var sections []docpage.Section
	var errs []error
	if million {
		s, err := millionSection(res)
		sections, errs = append(sections, s), append(errs, err)
	} else {
		for _, t := range tables {
			rows, err := table(res, t)
			errs = append(errs, err)
			sections = append(sections, docpage.Section{Name: t.name, Target: "performance", Text: rows})
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	if len(args) == 1 {
		return docpage.Update(args[0], sections...)
	}
	for i, s := range sections {
		if i > 0 {
			s.Text = "\n" + s.Text
		}
		if _, err := io.WriteString(out, s.Text); err != nil {
			return err
		}
	}
	return nil
}

// results are what the benchmarks printed.
type results struct {
	goos, goarch, procs string
	values              map[key][]float64 // in the order of the rounds
}

type key struct{ name, impl, unit string }

// parse reads the text that package testing writes. Benchmarks that are not one
// of a pair are left out.
func parse(in io.Reader) (results, error) {
	res := results{values: make(map[key][]float64)}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := lines.Text()
		if strings.HasPrefix(line, "FAIL") || strings.HasPrefix(line, "--- FAIL") || strings.HasPrefix(line, "panic:") {
			return res, fmt.Errorf("a benchmark failed: %q", line)
		}
		for name, to := range map[string]*string{"goos: ": &res.goos, "goarch: ": &res.goarch} {
			if v, ok := strings.CutPrefix(line, name); ok {
				*to = strings.TrimSpace(v)
			}
		}
		if err := res.add(strings.Fields(line)); err != nil {
			return res, fmt.Errorf("%q: %w", line, err)
		}
	}
	return res, lines.Err()
}

// add takes a line such as
//
//	BenchmarkX/impl=raw-2   100   365.6 ns/op   41 B/op   1 allocs/op
func (r *results) add(fields []string) error {
	const nameAndRuns = 2
	if len(fields) <= nameAndRuns || len(fields)%2 != 0 {
		return nil
	}
	name, ok := strings.CutPrefix(fields[0], "Benchmark")
	if !ok {
		return nil
	}
	name, impl, ok := strings.Cut(name, "/impl=")
	if !ok {
		return nil
	}
	impl, procs, ok := strings.Cut(impl, "-")
	if !ok {
		procs = "1" // testing leaves it out
	}
	if name == "" || impl == "" {
		return nil
	}
	r.procs = procs
	for i := nameAndRuns; i < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return err
		}
		if !(v >= 0 && v <= math.MaxFloat64) { // NaN neither
			return fmt.Errorf("%s is no measurement", fields[i])
		}
		k := key{name, impl, fields[i+1]}
		r.values[k] = append(r.values[k], v)
	}
	return nil
}

// table renders rows. The two sides of a round ran one after the other, so they
// are compared with each other, and the middle of all rounds is shown: another
// process that is busy for a while slows both.
func table(res results, t comparison) (string, error) {
	var b strings.Builder
	fmt.Fprintf(&b, "| | %s | %s | ratio | target | allocations | target |\n", t.first, t.second)
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|\n")
	var errs []error
	fewest, missed := 0, false
	for _, p := range t.rows {
		first, second := p.sides()
		raw, monotel := res.values[key{p.name, first, p.unit}], res.values[key{p.name, second, p.unit}]
		if slices.Contains(raw, 0) {
			errs = append(errs, fmt.Errorf("%s: a run of impl=%s has 0 %s, with which nothing can be compared", p.name, first, p.unit))
			continue
		}
		if len(raw) == 0 || len(raw) != len(monotel) {
			errs = append(errs, fmt.Errorf("%s: %d runs of impl=%s and %d of impl=%s have %s; want as many of each, and one at least",
				p.name, len(raw), first, len(monotel), second, p.unit))
			continue
		}
		if fewest == 0 || len(raw) < fewest {
			fewest = len(raw)
		}
		ratios := make([]float64, len(raw))
		for i := range raw {
			ratios[i] = monotel[i] / raw[i]
		}
		ratio := fmt.Sprintf("%.2f (%.2f–%.2f)",
			docpage.Quantile(ratios, 0.5), docpage.Quantile(ratios, 0.25), docpage.Quantile(ratios, 0.75))
		if p.ratio > 0 && docpage.Quantile(ratios, 0.5) > p.ratio {
			ratio, missed = "**"+ratio+"**", true
		}
		allocs, over := allocations(res, p)
		missed = missed || over
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s |\n",
			p.title, docpage.Duration(docpage.Quantile(raw, 0.5)), docpage.Duration(docpage.Quantile(monotel, 0.5)),
			ratio, target("≤ %.4g", p.ratio), allocs, target("≤ +%.4g", p.allocs))
	}
	if len(errs) > 0 {
		return "", errors.Join(errs...)
	}
	fmt.Fprintf(&b, "\n%d rounds, %s, %s/%s, GOMAXPROCS=%s.", fewest, runtime.Version(), res.goos, res.goarch, res.procs)
	if missed {
		b.WriteString(" Bold: misses its target.")
	}
	b.WriteString("\n")
	return b.String(), nil
}

// allocations shows both sides' and the difference.
func allocations(res results, p pair) (text string, over bool) {
	first, second := p.sides()
	raw, monotel := res.values[key{p.name, first, unitAllocs}], res.values[key{p.name, second, unitAllocs}]
	if len(raw) == 0 || len(monotel) == 0 {
		return "", false
	}
	r, m := docpage.Quantile(raw, 0.5), docpage.Quantile(monotel, 0.5)
	text = fmt.Sprintf("%.0f → %.0f", r, m)
	if p.allocs > 0 && m-r > p.allocs {
		return "**" + text + "**", true
	}
	return text, false
}

func target(format string, v float64) string {
	if v == 0 {
		return ""
	}
	return fmt.Sprintf(format, v)
}
