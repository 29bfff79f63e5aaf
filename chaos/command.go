package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

type options struct {
	seed     uint64
	seeds    int
	lasts    time.Duration
	rounds   int
	messages int
	rate     int
	nodes    int
	profile  string
	out      string
	reruns   int
	reduce   time.Duration
	quiet    bool
	bin      binaries // what is set is not built
}

func runCommand() *cobra.Command {
	var o options
	cmd := &cobra.Command{
		Use: "run", Short: "Run rounds that follow from a seed", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.seed == 0 {
				o.seed = uint64(rand.Uint32()) //nolint:gosec // it is printed
			}
			return o.run(cmd.Context(), func(format string, args ...any) { cmd.Printf(format+"\n", args...) })
		},
	}
	f := cmd.Flags()
	f.Uint64Var(&o.seed, "seed", 0, "what the rounds follow from; 0: one by chance")
	f.IntVar(&o.seeds, "seeds", 1, "rounds of this many seeds by turns: the given one and those that follow it")
	f.DurationVar(&o.lasts, "for", 10*time.Minute, "begin no round after this time")
	f.IntVar(&o.rounds, "rounds", 0, "this many rounds at most; 0: any number")
	f.IntVar(&o.messages, "messages", 400, "messages of each event in a round")
	f.IntVar(&o.rate, "rate", 0, "publishes a second of each publisher; 0: as the seed says")
	f.IntVar(&o.nodes, "nodes", 0, "servers: 1 or 3; 0: as the seed says")
	f.StringVar(&o.profile, "profile", "", "what the rounds are about: mixed, full, poison, upgrade, servers or stops; empty: one after another")
	o.flags(cmd, 5, 15*time.Minute)
	return cmd
}

func (o *options) flags(cmd *cobra.Command, reruns int, least time.Duration) {
	f := cmd.Flags()
	f.StringVar(&o.out, "out", "out", "folder for journals, logs and schedules of rounds that fail")
	f.IntVar(&o.reruns, "reruns", reruns, "how often a round that fails runs again")
	f.DurationVar(&o.reduce, "reduce-for", least, "how long to look for fewer faults that fail, too; 0: do not")
	f.StringVar(&o.bin.server, "nats-server", "", "the program nats-server; empty: built from the module that go.mod pins")
	f.StringVar(&o.bin.monotel, "monotel", "", "the program monotel; empty: built from this checkout")
	f.BoolVar(&o.quiet, "quiet", false, "say nothing of single faults")
}

func replayCommand() *cobra.Command {
	var o options
	var times int
	cmd := &cobra.Command{
		Use: "replay SCHEDULE", Short: "Run one schedule from its file", Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			s, err := readSchedule(args[0])
			if err != nil {
				return err
			}
			return o.runAll(cmd.Context(), func(format string, args ...any) { cmd.Printf(format+"\n", args...) }, func(n int) *schedule {
				if n > times {
					return nil
				}
				return s
			})
		},
	}
	cmd.Flags().IntVar(&times, "times", 1, "how often")
	o.flags(cmd, 0, 0)
	return cmd
}

// errFindings is the error of a run that has found something.
var errFindings = errors.New("there are findings")

func (o *options) run(ctx context.Context, say func(string, ...any)) error {
	begin := time.Now()
	say("seed %d", o.seed)
	return o.runAll(ctx, say, func(n int) *schedule {
		if n > 1 && time.Since(begin) > o.lasts || o.rounds > 0 && n > o.rounds {
			return nil
		}
		seeds := max(o.seeds, 1)
		return newSchedule(o.seed+uint64((n-1)%seeds), 1+(n-1)/seeds, *o) //nolint:gosec // from 0
	})
}

// runAll runs schedules until next returns nil.
func (o *options) runAll(ctx context.Context, say func(string, ...any), next func(int) *schedule) (err error) {
	work, err := os.MkdirTemp("", "monotel-chaos-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()
	bin, err := build(ctx, work, o.bin)
	if err != nil {
		return err
	}
	var all []*result
	failed, examined := 0, make(map[string]bool)
	defer func() { // also after an interrupt
		say("\n%d of %d rounds have findings", failed, len(all))
		var b strings.Builder
		table(&b, all...)
		say("%s", b.String())
	}()
	for n := 1; ctx.Err() == nil; n++ {
		s := next(n)
		if s == nil {
			break
		}
		res, err := o.one(ctx, s, bin, filepath.Join(work, strconv.Itoa(n)), say)
		if err != nil {
			return err
		}
		all = append(all, res)
		if len(res.Findings) == 0 {
			continue
		}
		failed++
		// Once for each class: what fails in every round would take the time of all.
		fresh := slices.DeleteFunc(res.classes(), func(class string) bool { return examined[class] })
		if o.reruns == 0 && o.reduce == 0 || len(fresh) == 0 {
			continue
		}
		for _, class := range fresh {
			examined[class] = true
		}
		if err := o.examine(ctx, res, fresh, bin, work, say); err != nil {
			return err
		}
	}
	if failed > 0 {
		return errFindings
	}
	return context.Cause(ctx)
}

// one runs a round, and keeps its folder if there are findings.
func (o *options) one(ctx context.Context, s *schedule, bin binaries, dir string, say func(string, ...any)) (*result, error) {
	say("\nround %d of seed %d: %s, %d server(s), %d messages of %d events", s.Round, s.Seed, s.Profile, s.Nodes, s.published(), len(s.events()))
	for i, f := range s.Faults {
		say("  fault %d: %s", i+1, f)
	}
	tell := say
	if o.quiet {
		tell = func(string, ...any) {}
	}
	begin := time.Now()
	res, err := runRound(ctx, s, bin, dir, func(format string, args ...any) {
		tell("%6.1fs "+format, append([]any{time.Since(begin).Seconds()}, args...)...)
	})
	if err != nil {
		return nil, fmt.Errorf("round %d of seed %d, in %s: %w", s.Round, s.Seed, dir, err)
	}
	var b strings.Builder
	table(&b, res)
	say("took %v\n%s", res.Took.Round(time.Second), b.String())
	const shown = 3 // of a class; the others are in the file
	seen := make(map[string]int)
	for i := range res.Findings {
		f := &res.Findings[i]
		seen[f.Class]++
		if seen[f.Class] <= shown {
			say("  %s: %s %s seq %d, kind %s: %s\n      %s", f.Class, f.Durable, f.ID, f.Seq, f.Kind, f.Detail, strings.Join(f.Proof, "\n      "))
		}
	}
	if err := res.write(); err != nil {
		return nil, err
	}
	if len(res.Findings) == 0 {
		return res, os.RemoveAll(dir)
	}
	kept := filepath.Join(o.out, fmt.Sprintf("seed-%d-round-%d-%s", s.Seed, s.Round, time.Now().Format("150405.000")))
	if err := keep(dir, kept); err != nil {
		return nil, err
	}
	res.Dir = kept
	say("journals, logs and result.json are in %s", kept)
	return res, os.RemoveAll(dir)
}

// keep copies what proves a finding.
func keep(from, to string) error {
	if err := os.MkdirAll(filepath.Join(to, "journal"), 0o700); err != nil {
		return err
	}
	for _, pattern := range []string{"*.log", "*.json", "journal/*.jsonl"} {
		files, err := filepath.Glob(filepath.Join(from, pattern))
		if err != nil {
			return err
		}
		for _, file := range files {
			b, err := os.ReadFile(file) //nolint:gosec // of this run
			if err != nil {
				return err
			}
			name, err := filepath.Rel(from, file)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(to, name), b, 0o600); err != nil { //nolint:gosec // as asked
				return err
			}
		}
	}
	return nil
}

// examine runs a schedule that has failed again, and looks for one with fewer faults.
func (o *options) examine(
	ctx context.Context, res *result, classes []string, bin binaries, work string, say func(string, ...any),
) error {
	n := 0
	fails := func(s *schedule) (bool, error) {
		n++
		quiet := *o
		quiet.quiet = true
		again, err := quiet.one(ctx, s, bin, filepath.Join(work, fmt.Sprintf("again-%d", n)), say)
		if err != nil {
			return false, err
		}
		return slices.ContainsFunc(again.classes(), func(c string) bool { return slices.Contains(classes, c) }), nil
	}
	s := res.Schedule
	failed := 0
	for range o.reruns {
		again, err := fails(s)
		if err != nil {
			return err
		}
		if again {
			failed++
		}
	}
	say("%d of %d reruns fail with one of %s", failed, o.reruns, strings.Join(classes, ", "))
	if failed > 0 && o.reduce > 0 {
		begin := time.Now()
		faults, err := reduce(s.Faults, func(faults []fault) (bool, error) {
			if time.Since(begin) > o.reduce {
				return false, nil
			}
			for range 2 { // it may fail at times only
				if again, err := fails(s.with(faults)); again || err != nil {
					return again, err
				}
			}
			return false, nil
		})
		if err != nil {
			return err
		}
		s = s.with(faults)
		say("reduced from %d faults to %d", len(res.Schedule.Faults), len(faults))
	}
	s.Fails, s.OfRun = classes, fmt.Sprintf("%d of %d", failed, o.reruns)
	file := filepath.Join(o.out, fmt.Sprintf("schedule-seed-%d-round-%d.json", s.Seed, s.Round))
	say("the schedule is in %s: go run . replay %s", file, file)
	return s.write(file)
}

// reduce drops parts of a list as long as what is left fails: halves first.
func reduce[T any](all []T, fails func([]T) (bool, error)) ([]T, error) {
	for part := (len(all) + 1) / 2; part > 0 && len(all) > 0; {
		dropped := false
		for from := 0; from < len(all); {
			rest := slices.Concat(all[:from], all[min(from+part, len(all)):])
			again, err := fails(rest)
			if err != nil {
				return all, err
			}
			if again {
				all, dropped = rest, true
				continue
			}
			from += part
		}
		if !dropped || part > len(all) {
			part /= 2
		}
	}
	return all, nil
}

// build builds what the processes of a run are.
func build(ctx context.Context, dir string, bin binaries) (_ binaries, err error) {
	if bin.self, err = os.Executable(); err != nil {
		return bin, err
	}
	for _, program := range []struct {
		path *string
		name string
		args []string
	}{
		{&bin.server, "nats-server", []string{"build", "github.com/nats-io/nats-server/v2"}},
		{&bin.monotel, "monotel", []string{"-C", "..", "build", "./cmd/monotel"}},
	} {
		if *program.path != "" {
			continue
		}
		*program.path = filepath.Join(dir, program.name)
		args := slices.Insert(slices.Clone(program.args), len(program.args)-1, "-o", *program.path)
		cmd := exec.CommandContext(ctx, "go", args...) //nolint:gosec // no input
		if out, err := cmd.CombinedOutput(); err != nil {
			return bin, fmt.Errorf("go %s: %w: %s; run it in the folder chaos of the repository", strings.Join(args, " "), err, out)
		}
	}
	return bin, nil
}
