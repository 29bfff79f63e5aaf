// Package scale measures how event-driven Apps grow on a cluster of three NATS
// servers: what each message costs in each role, and what saturates first. The
// results are docs/scaling.md.
package scale

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"github.com/spf13/cobra"
)

// Command is "bench scale". It runs its executable again as nodes and workers, so it
// must be a direct child of the root command.
func Command() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use:   "scale",
		Short: "Measure a cluster of three nodes with 1 to 8 processes, and write docs/scaling.md",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := o.run(cmd.Context(), func(format string, args ...any) { cmd.PrintErrf(format+"\n", args...) }); err != nil {
				return err
			}
			return o.write()
		},
	}
	f := cmd.PersistentFlags()
	f.StringVar(&o.dir, "out", "../docs/scaling", "folder for results.ndjson and the charts")
	f.StringVar(&o.page, "page", "../docs/scaling.md", "page that gets the tables; empty: none")
	cmd.Flags().BoolVar(&o.quick, "quick", false, "few cells with few messages, to see whether it works")
	cmd.Flags().IntVar(&o.rounds, "rounds", 1, "how often to measure each cell; the page has the medians")
	cmd.AddCommand(nodeCommand(), workerCommand(), &cobra.Command{
		Use: "page", Short: "Write charts and tables again from results.ndjson", Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return o.write() },
	})
	return cmd
}

type options struct {
	dir, page string
	quick     bool
	rounds    int
}

const resultsFile = "results.ndjson"

// A record is a line of the results: one of its fields.
type record struct {
	Machine *machine `json:"machine,omitempty"`
	Memory  *memory  `json:"memory,omitempty"`
	Cell    *result  `json:"cell,omitempty"`
}

type machine struct {
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
	CPUs    int    `json:"cp_us"`
	Payload int    `json:"payload"` // bytes
	Rounds  int    `json:"rounds"`
}

// run measures everything and writes the records.
func (o options) run(ctx context.Context, say func(string, ...any)) (err error) {
	dir, err := os.MkdirTemp("", "monotel-scale-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	begin := time.Now()
	c, err := startCluster(ctx, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.stop()) }()
	l := &lab{cluster: c, spell: spell, backlogs: backlogSize}
	if o.quick {
		l.spell, l.backlogs = quickSpell, quickSize
	}
	records := []record{{Machine: &machine{runtime.Version(), runtime.GOOS, runtime.GOARCH, runtime.NumCPU(), payloadSize, o.rounds}}}
	m, err := l.memory(ctx, o.quick)
	if err != nil {
		return fmt.Errorf("memory: %w", err)
	}
	records = append(records, record{Memory: &m})
	all := cells(o.quick)
	for round := range o.rounds {
		for i, cell := range all {
			r, err := l.retry(ctx, cell, say)
			if err != nil {
				return err
			}
			r.Round = round + 1
			records = append(records, record{Cell: &r})
			say("%4.0fs %d/%d %s: %.0f messages/s, %.1f µs each", time.Since(begin).Seconds(), i+1, len(all), cell, r.rate(), r.sumCPU())
		}
	}
	return o.save(records)
}

// retry measures a cell again when not every message was acked exactly once, since
// such numbers are worth nothing. A machine that stands still for a while can do that.
func (l *lab) retry(ctx context.Context, c cell, say func(string, ...any)) (r result, err error) {
	const tries = 3
	for range tries {
		if r, err = l.measure(ctx, c); err == nil {
			return r, nil
		}
		err = fmt.Errorf("%s: %w", c, err)
		if ctx.Err() != nil {
			break
		}
		say("again, because %v", err)
	}
	return r, err
}

func (o options) save(records []record) (err error) {
	if err := os.MkdirAll(o.dir, 0o750); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(o.dir, resultsFile))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	enc := json.NewEncoder(f)
	for _, r := range records {
		if err := enc.Encode(r); err != nil {
			return err
		}
	}
	return nil
}
