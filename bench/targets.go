package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/monotel/monotel/internal/docpage"
)

// A goal is a target of this project: a ratio of one library's number to another's
// in the same round, with 256 bytes. Of several others the best counts.
type goal struct {
	title   string
	work    string // with parameters
	unit    string
	lib     string
	base    []string
	baseFor string  // parameters of the other, if they are not the same
	atLeast float64 // of throughput
	atMost  float64 // of what should be small
	alone   bool    // the number itself is the target, not a ratio
	client  bool    // and the server's share is none of it, so it has to be in another process
}

var goals = []goal{
	{
		title: "core publish to handler, telemetry off, to nats.go",
		work:  "CorePubSub", lib: monotelOff, base: []string{raw}, atLeast: 0.9,
	},
	{
		title: "durable publish, metrics and 1 % sampled, to nats.go",
		work:  "DurablePublishSync", lib: monotelPercent, base: []string{raw}, atLeast: 0.9,
	},
	{
		title: "asynchronous durable publish, metrics and 1 % sampled, to nats.go's PublishAsync",
		work:  "DurablePublishAsync", lib: monotelPercent, base: []string{raw}, atLeast: 1.2,
	},
	{
		title: "consume and ack, telemetry off, to nats.go",
		work:  consumeDefault, lib: monotelOff, base: []string{raw}, atLeast: 0.9,
	},
	{
		title: "consume and ack, metrics and 1 % sampled, to nats.go",
		work:  consumeDefault, lib: monotelPercent, base: []string{raw}, atLeast: 0.75,
	},
	{
		title: "consume and ack, metrics and 100 % sampled, to nats.go",
		work:  consumeDefault, lib: monotelAll, base: []string{raw}, atLeast: 0.5,
	},
	{
		title: "consume and ack, metrics and 1 % sampled, to Watermill with the same, its better ack mode",
		work:  consumeDefault, lib: monotelPercent, base: []string{watermillSync, watermillAsync}, atLeast: 1.5,
	},
	{
		title: "consume and ack, telemetry off, batch 200, to go-monolith",
		work:  "ConsumeAck/batch=200/concurrency=1", lib: monotelOff, base: []string{goMonolith}, atLeast: 1.1,
	},
	{
		title: "2 ms handler, telemetry off, concurrency 64 to 1",
		work:  "SlowHandler/concurrency=64", lib: monotelOff, base: []string{monotelOff},
		baseFor: "SlowHandler/concurrency=1", atLeast: 50,
	},
	{
		title: "a lone event's latency, 99th percentile, default configuration, to nats.go",
		work:  "LoneEvent", unit: unitP99, lib: monotelOff, base: []string{raw}, atMost: 1.5,
	},
	{
		title: "1 000 idle durable consumers, memory, to nats.go",
		work:  "Registrations/consumers=1000", unit: unitMemory, lib: monotelOff, base: []string{raw}, atMost: 1.5, client: true,
	},
	{
		title: "1 000 idle durable consumers, goroutines for each",
		work:  "Registrations/consumers=1000", unit: unitGoroutines, lib: monotelOff, alone: true, atMost: 3, client: true,
	},
}

// consumeDefault is consuming with monotel's defaults.
const consumeDefault = "ConsumeAck/batch=10/concurrency=1"

// telling reports whether a target rests on the cell.
func (c cell) telling() bool {
	return c.size == smallSize && slices.ContainsFunc(goals, func(g goal) bool {
		return strings.HasPrefix(c.pair(), g.work+"/transport=")
	})
}

func targetTable(res results) string {
	var b strings.Builder
	b.WriteString("| | target | in process | loopback |\n|---|--:|--:|--:|\n")
	for _, g := range goals {
		want := fmt.Sprintf("≥ %.4g", g.atLeast)
		if g.atMost > 0 {
			want = fmt.Sprintf("≤ %.4g", g.atMost)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", g.title, want, g.measured(res, inProcess), g.measured(res, loopback))
	}
	b.WriteString("\nBold: misses its target.\n")
	return b.String()
}

// measured shows the middle of all rounds, and the middle half of them in brackets.
func (g goal) measured(res results, transport string) string {
	vs := g.values(res, transport)
	if len(vs) == 0 || g.client && transport != loopback {
		return "–"
	}
	mid := docpage.Quantile(vs, 0.5)
	text := fmt.Sprintf("%.2f (%.2f–%.2f)", mid, docpage.Quantile(vs, 0.25), docpage.Quantile(vs, 0.75))
	if g.alone { // the program has a few of its own
		mid = math.Round(mid*10) / 10
		text = fmt.Sprintf("%.1f", mid)
	}
	if mid < g.atLeast || g.atMost > 0 && mid > g.atMost {
		return "**" + text + "**"
	}
	return text
}

func (g goal) values(res results, transport string) []float64 {
	unit := g.unit
	if unit == "" {
		unit = unitTime
	}
	at := func(work, lib string) key {
		return key{fmt.Sprintf("%s/transport=%s/size=%d", work, transport, smallSize), lib, unit}
	}
	own := at(g.work, g.lib)
	if g.alone {
		return res.values[own]
	}
	work := g.work
	if g.baseFor != "" {
		work = g.baseFor
	}
	var worst []float64 // against the best of the others, in each round
	for _, base := range g.base {
		ratios := res.ratios(at(work, base), own) // times: less is more
		if g.atMost > 0 {
			ratios = res.ratios(own, at(work, base))
		}
		if worst == nil {
			worst = ratios
			continue
		}
		for i := range min(len(worst), len(ratios)) {
			worst[i] = min(worst[i], ratios[i])
		}
	}
	return worst
}
