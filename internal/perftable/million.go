package main

import (
	"errors"
	"fmt"
	"strings"

	"github.com/monotel/monotel/internal/docpage"
)

const (
	benchMillion = "Million"
	implRead     = "read" // nats.go alone reads the stream

	unitSeconds = "s"
	unitMemory  = "MiB"
	unitRate    = "msg/s"
	unitEntries = "entries"
)

// A figure is a row of the table of the command with many dead letters. Its targets
// are absolute: they are about an operator who waits.
type figure struct {
	impl    string
	title   string
	seconds float64 // it may take so long
	rate    float64 // it must reach that many messages a second...
	asked   float64 // ... or keep within a twentieth of this
}

const (
	mostMemory   = 200.0 // MiB
	rateAccuracy = 0.05
)

var figures = []figure{
	{impl: implRead, title: "nats.go reads the stream, headers only"},
	{impl: "groups", title: "`groups`", seconds: 10},
	{impl: "ls50", title: "`ls --limit 50`", seconds: 1},
	{impl: "where", title: "`ls --where …` over all", seconds: 15},
	{impl: "stats", title: "`stats`"},
	{impl: "replay", title: "`replay`, a tenth of them, unlimited", rate: 10_000},
	{impl: "replay100", title: "`replay --rate 100/s`", asked: 100},
	{impl: "replay1000", title: "`replay --rate 1000/s`", asked: 1000},
	{impl: "replay5000", title: "`replay --rate 5000/s`", asked: 5000},
	{impl: "discard", title: "`discard`, 10 000 of them"},
}

// millionSection renders the figures.
func millionSection(res results) (docpage.Section, error) {
	var b strings.Builder
	b.WriteString("| | time | target | times nats.go's | messages a second | target | most memory | target |\n")
	b.WriteString("|---|--:|--:|--:|--:|--:|--:|--:|\n")
	var errs []error
	missed := false
	mark := func(text string, miss bool) string {
		if !miss {
			return text
		}
		missed = true
		return "**" + text + "**"
	}
	value := func(impl, unit string) float64 {
		vs := res.values[key{benchMillion, impl, unit}]
		if len(vs) == 0 {
			errs = append(errs, fmt.Errorf("%s/impl=%s: no run has %s", benchMillion, impl, unit))
			return 0
		}
		return docpage.Quantile(vs, 0.5)
	}
	read := value(implRead, unitSeconds)
	for _, f := range figures {
		var took, times, rate, rateTarget, memory, memoryTarget string
		if f.rate == 0 && f.asked == 0 {
			s := value(f.impl, unitSeconds)
			took = mark(docpage.Digits(s)+" s", f.seconds > 0 && s > f.seconds)
			if f.impl != implRead {
				times = fmt.Sprintf("%.2f", s/read)
			}
		} else {
			r := value(f.impl, unitRate)
			off := f.asked > 0 && (r < f.asked*(1-rateAccuracy) || r > f.asked*(1+rateAccuracy))
			rate, rateTarget = mark(fmt.Sprintf("%.0f", r), off || r < f.rate), target("≥ %.5g", f.rate)
			if f.asked > 0 {
				rateTarget = fmt.Sprintf("%.4g ± %.0f %%", f.asked, rateAccuracy*100) //nolint:mnd // percent
			}
		}
		if f.impl != implRead {
			m := value(f.impl, unitMemory)
			memory, memoryTarget = mark(fmt.Sprintf("%.0f MiB", m), m > mostMemory), target("≤ %.0f MiB", mostMemory)
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s | %s | %s | %s |\n",
			f.title, took, target("≤ %.3g s", f.seconds), times, rate, rateTarget, memory, memoryTarget)
	}
	entries := value(implRead, unitEntries)
	if len(errs) > 0 {
		return docpage.Section{}, errors.Join(errs...)
	}
	fmt.Fprintf(&b, "\n%.0f dead letters, %s/%s, GOMAXPROCS=%s.", entries, res.goos, res.goarch, res.procs)
	if missed {
		b.WriteString(" Bold: misses its target.")
	}
	b.WriteString("\n")
	return docpage.Section{Name: "a million", Target: "million", Text: b.String()}, nil
}
