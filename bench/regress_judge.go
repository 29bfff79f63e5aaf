package main

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/monotel/monotel/internal/docpage"
)

const (
	margin    = 0.03 // a figure fails if its whole interval is worse by more
	liveLeast = 0.95 // of the throughput before the replays

	// A count is the lowest of all rounds, since what else happens in a process only
	// adds to it. The lowest of ten rounds repeats within 0.01 for a message. An
	// allocation for each batch of ten messages is beyond the slack.
	countSlack = 0.05
)

type verdict string

const (
	passed      verdict = "ok"
	failing     verdict = "FAIL"
	unconfirmed verdict = "not confirmed" // slower at first, and not when measured again
)

// A regressReport is what a comparison has found.
type regressReport struct {
	Base         string   `json:"base"` // commit
	New          string   `json:"new"`
	Rounds       int      `json:"rounds"`
	Dependencies []string `json:"dependencies,omitempty"` // in different versions
	Figures      []figure `json:"figures"`
}

// A figure compares one unit of one cell. Less is better, but for the figures
// without a base: they compare two parts of one run, and more is better.
type figure struct {
	Cell    string    `json:"cell"`
	Unit    string    `json:"unit"`
	Base    float64   `json:"base,omitempty"` // median, or lowest of a count
	New     float64   `json:"new"`
	Ratio   float64   `json:"ratio,omitempty"` // geometric mean of the pairs
	Low     float64   `json:"low,omitempty"`   // of the 95 % interval
	High    float64   `json:"high,omitempty"`
	Verdict verdict   `json:"verdict"`
	Bases   []float64 `json:"bases,omitempty"` // of each measurement
	News    []float64 `json:"news"`
	Again   *figure   `json:"again,omitempty"` // measured again, since it was slower at first
}

// judged are the units of a cell that are judged, in the order of the table.
func (c cell) judged() []string {
	switch c.work {
	case "Registrations":
		return []string{unitMemory, unitGoroutines}
	case workLive:
		return []string{unitLive, unitLiveCPU}
	}
	return []string{unitProcessor, unitTime, unitAllocs}
}

// counted reports whether a unit is a count that each run of the cell repeats. A
// replay asks for outcomes as long as it takes, so its allocations are none.
func (c cell) counted(unit string) bool {
	return unit == unitGoroutines || unit == unitAllocs && c.work != workReplay
}

func judge(cells []cell, all samples) regressReport {
	var rep regressReport
	for _, c := range cells {
		for _, unit := range c.judged() {
			vs := all[sample{c.String(), unit}]
			if vs == nil {
				continue
			}
			f := figure{Cell: c.String(), Unit: unit, Bases: vs[baseSide], News: vs[newSide]}
			switch {
			case c.work == workLive:
				f.within()
			case c.counted(unit):
				f.counts()
			default:
				f.ratios()
			}
			rep.Figures = append(rep.Figures, f)
		}
	}
	return rep
}

// counts fails if there is more of what can be counted.
func (f *figure) counts() {
	f.Base, f.New, f.Verdict = slices.Min(f.Bases), slices.Min(f.News), passed
	if f.New-f.Base > countSlack {
		f.Verdict = failing
	}
}

// ratios fails if the whole interval is worse than the margin.
func (f *figure) ratios() {
	f.Base, f.New, f.Verdict = docpage.Quantile(f.Bases, 0.5), docpage.Quantile(f.News, 0.5), passed
	logs := make([]float64, len(f.News))
	for i := range logs {
		logs[i] = math.Log(f.News[i] / f.Bases[i])
	}
	f.interval(logs)
	if f.Low > 1+margin {
		f.Verdict = failing
	}
}

// within fails if the whole interval is below what must be left.
func (f *figure) within() {
	f.New, f.Verdict = docpage.Quantile(f.News, 0.5), passed
	logs := make([]float64, len(f.News))
	for i := range logs {
		logs[i] = math.Log(f.News[i])
	}
	f.interval(logs)
	if f.High < liveLeast {
		f.Verdict = failing
	}
}

func (f *figure) interval(logs []float64) {
	mean, half := meanInterval(logs)
	f.Ratio, f.Low, f.High = math.Exp(mean), math.Exp(mean-half), math.Exp(mean+half)
}

// meanInterval returns the mean and half the width of its 95 % interval.
func meanInterval(vs []float64) (mean, half float64) {
	n := float64(len(vs))
	for _, v := range vs {
		mean += v / n
	}
	var squares float64
	for _, v := range vs {
		squares += (v - mean) * (v - mean)
	}
	return mean, student(len(vs)-1) * math.Sqrt(squares/(n-1)/n)
}

// student returns the 97.5 % quantile of Student's t distribution, for 1 or more
// degrees of freedom.
func student(degrees int) float64 {
	table := []float64{
		12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
		2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
	}
	if degrees <= len(table) {
		return table[degrees-1]
	}
	const normal = 1.960
	return normal + 2.4/float64(degrees) // within 0.005
}

// doubtful returns the cells with a ratio that fails. Of several dozen 95 % intervals
// of equal programs, one in forty lies above 1 by chance, and on a noisy machine far
// above. Twice in a row that happens once in 1600.
func (r regressReport) doubtful(cells []cell) []cell {
	return slices.DeleteFunc(slices.Clone(cells), func(c cell) bool {
		return !slices.ContainsFunc(r.Figures, func(f figure) bool { return f.Cell == c.String() && f.doubtful() })
	})
}

func (f *figure) doubtful() bool { return f.Verdict == failing && f.Bases != nil && f.Ratio != 0 }

// confirm keeps the failures that again has, too.
func (r regressReport) confirm(again regressReport) {
	for i := range r.Figures {
		f := &r.Figures[i]
		j := slices.IndexFunc(again.Figures, func(a figure) bool { return a.Cell == f.Cell && a.Unit == f.Unit })
		if j < 0 || !f.doubtful() {
			continue
		}
		f.Again = &again.Figures[j]
		if f.Again.Verdict != failing {
			f.Verdict = unconfirmed
		}
	}
}

func (r regressReport) failed() []string {
	var all []string
	for _, f := range r.Figures {
		if f.Verdict == failing {
			all = append(all, f.Cell+" "+f.Unit)
		}
	}
	return all
}

func (r regressReport) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "base %s, new %s, %d rounds; FAIL: the whole 95 %% interval is more than %.0f %% worse, or there is more to count\n\n",
		r.Base, r.New, r.Rounds, 100*margin)
	for _, d := range r.Dependencies {
		fmt.Fprintf(&b, "not the same in both: %s\n", d)
	}
	width := 0
	for _, f := range r.Figures {
		width = max(width, len(f.Cell))
	}
	const columns = "%-*s  %-20s %12s %12s %8s  %-15s %s\n"
	fmt.Fprintf(&b, columns, width, "cell", "figure", "base", "new", "ratio", "95 %", "verdict")
	for _, f := range r.Figures {
		base, ratio, interval := showFigure(f.Base, f.Unit), "", ""
		if f.Ratio != 0 {
			ratio, interval = fmt.Sprintf("%.3f", f.Ratio), fmt.Sprintf("%.3f–%.3f", f.Low, f.High)
		}
		if f.Bases == nil {
			base = ""
		}
		fmt.Fprintf(&b, columns, width, f.Cell, f.Unit, base, showFigure(f.New, f.Unit), ratio, interval, f.Verdict)
		if a := f.Again; a != nil {
			fmt.Fprintf(&b, columns, width, "", "measured again", showFigure(a.Base, f.Unit), showFigure(a.New, f.Unit),
				fmt.Sprintf("%.3f", a.Ratio), fmt.Sprintf("%.3f–%.3f", a.Low, a.High), a.Verdict)
		}
	}
	return b.String()
}

func showFigure(v float64, unit string) string {
	switch unit {
	case unitAllocs, unitGoroutines, unitLive, unitLiveCPU:
		return fmt.Sprintf("%.4g", v)
	}
	return show(v, unit)
}
