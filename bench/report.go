package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/internal/docpage"
)

// sectionName and makeTarget are in the marker of the page.
const (
	sectionName = "comparison"
	makeTarget  = "comparison"
)

func reportCommand() *cobra.Command {
	var page, stat string
	cmd := &cobra.Command{
		Use:   "report RESULTS",
		Short: "Make tables of results, and write them into a page",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return err
			}
			defer func() { _ = f.Close() }()
			res, err := parseResults(f)
			if err != nil {
				return err
			}
			if stat != "" {
				if err := benchstat(cmd.Context(), args[0], stat); err != nil {
					return err
				}
			}
			text := report(res)
			if page != "" {
				return docpage.Update(page, docpage.Section{Name: sectionName, Target: makeTarget, Text: text})
			}
			_, err = io.WriteString(cmd.OutOrStdout(), text)
			return err
		},
	}
	cmd.Flags().StringVar(&page, "write", "", "put the tables between the markers of this page; without it they go to standard output")
	cmd.Flags().StringVar(&stat, "benchstat", "", "write what benchstat makes of the results to this file")
	return cmd
}

// benchstat runs the tool, which is pinned in ../tools.
func benchstat(ctx context.Context, results, to string) error {
	cmd := exec.CommandContext(ctx, "go", //nolint:gosec // who runs it names the file
		"tool", "-modfile=../tools/go.mod", "benchstat", "-col", "/lib", results)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return errors.Join(fmt.Errorf("benchstat: %w", err), errors.New(stderr.String()))
	}
	const everybodyReads = 0o644
	return os.WriteFile(to, out, everybodyReads)
}

func report(res results) string {
	var b strings.Builder
	b.WriteString(targetTable(res))
	b.WriteString(machine(res))
	for _, w := range works {
		b.WriteString(w.table(res))
	}
	return b.String()
}

func machine(res results) string {
	c := res.config
	return fmt.Sprintf("\nRounds: %d. %s. %s, GOMAXPROCS=%s, %s/%s, kernel %s, %s. %s. Command: %#q.\n",
		res.rounds(), c[keyDate], c[keyCPU], c[keyProcs], c["goos"], c["goarch"], c[keyKernel], c[keyGo], c[keyVersions], c[keyCommand])
}

// table shows one work: a row for each set of parameters, a column for each
// library. Below a time is how many times as much as nats.go the library gets done.
func (w work) table(res results) string {
	var pairs []string
	for _, group := range groups() {
		if c := group[0]; c.work == w.name && slices.ContainsFunc(group, res.has) {
			pairs = append(pairs, c.pair())
		}
	}
	if len(pairs) == 0 {
		return ""
	}
	var b strings.Builder
	notes := &footnotes{}
	for i, unit := range w.units() {
		if i == 0 {
			fmt.Fprintf(&b, "\n#### %s\n", capital(w.title))
		}
		fmt.Fprintf(&b, "\n%s:\n\n|", capital(unitTitles[unit]))
		for _, l := range libraries {
			fmt.Fprintf(&b, " | %s", l.title)
		}
		b.WriteString(" |\n|---" + strings.Repeat("|--:", len(libraries)) + "|\n")
		for _, pair := range pairs {
			w.row(&b, res, pair, unit, notes)
		}
	}
	b.WriteString(notes.String())
	return b.String()
}

func (r results) has(c cell) bool {
	for k := range r.values {
		if k.pair == c.pair() && k.lib == c.lib {
			return true
		}
	}
	return false
}

func (w work) row(b *strings.Builder, res results, pair, unit string, notes *footnotes) {
	c, err := parseCell(pair)
	if err != nil {
		fmt.Fprintf(b, "| %v |\n", err)
		return
	}
	fmt.Fprintf(b, "| %s", strings.TrimPrefix(c.title()+", "+transportTitles[c.transport]+", "+sizeTitle(c.size), ", "))
	for _, l := range libraries {
		c.lib = l.name
		k := key{pair, l.name, unit}
		v, ok := res.median(k)
		if !ok {
			fmt.Fprintf(b, " | –%s", notes.mark(w.absent(c)))
			continue
		}
		fmt.Fprintf(b, " | %s", show(v, unit))
		if base := (key{pair, raw, unit}); l.name != raw {
			if ratios := res.ratios(base, k); len(ratios) > 0 && throughput(unit) {
				fmt.Fprintf(b, " (%.2f)", docpage.Quantile(ratios, 0.5))
			}
		}
	}
	b.WriteString(" |\n")
}

var transportTitles = map[string]string{inProcess: "in process", loopback: "loopback"}

func sizeTitle(size int) string {
	if size == largeSize {
		return "4 KB"
	}
	return strconv.Itoa(size) + " B"
}

func capital(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// units are the tables of a work.
func (w work) units() []string {
	switch w.name {
	case "Latency", "LoneEvent":
		return []string{unitP50, unitP99}
	case "Registrations":
		return []string{unitStart, unitStop, unitMemory, unitResident, unitGoroutines}
	}
	return []string{unitTime, unitProcessor, unitAllocs}
}

var unitTitles = map[string]string{
	unitTime:       "time for an event, and in brackets the events a second as a multiple of nats.go's",
	unitProcessor:  "processor time for an event, of the whole process",
	unitAllocs:     "allocations for an event, of the whole process",
	unitP50:        "median",
	unitP99:        "99th percentile",
	unitStart:      "time to start",
	unitStop:       "time to stop",
	unitMemory:     "memory while idle, heap and stacks, without what was there before the start",
	unitResident:   "resident memory of the process while idle",
	unitGoroutines: "goroutines for a consumer",
}

func throughput(unit string) bool { return unit == unitTime }

func show(v float64, unit string) string {
	switch unit {
	case unitAllocs:
		return fmt.Sprintf("%.0f", v)
	case unitGoroutines:
		return fmt.Sprintf("%.1f", v)
	case unitMemory, unitResident:
		return docpage.Digits(v/(1<<20)) + " MiB"
	}
	return docpage.Duration(v)
}

// footnotes says why there is no number.
type footnotes struct{ reasons []string }

func (f *footnotes) mark(reason string) string {
	if reason == "" { // left out by the flags of the run
		return ""
	}
	i := slices.Index(f.reasons, reason)
	if i < 0 {
		i = len(f.reasons)
		f.reasons = append(f.reasons, reason)
	}
	return fmt.Sprintf("<sup>%d</sup>", i+1)
}

func (f *footnotes) String() string {
	if len(f.reasons) == 0 {
		return ""
	}
	parts := make([]string, len(f.reasons))
	for i, r := range f.reasons {
		parts[i] = fmt.Sprintf("<sup>%d</sup> %s", i+1, r)
	}
	return "\n" + strings.Join(parts, "; ") + ".\n"
}
