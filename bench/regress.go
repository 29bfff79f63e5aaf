package main

import (
	"bytes"
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// A regression compares the library of this tree with that of another commit.
type regression struct {
	base   string // revision
	work   string // regular expression
	rounds int
	quick  bool
	json   string // file
}

const (
	fewestRounds = 2 // for an interval
	regressTries = 3 // of a measurement that a busy machine has spoilt
)

func regressCommand() *cobra.Command {
	var g regression
	cmd := &cobra.Command{
		Use:   "regress --base REVISION",
		Short: "Compare this tree with another commit, and fail if it is slower",
		Long: `Build this program twice, with the library of this tree and with that of the base
commit, and measure both alternately. The measuring code is that of this tree in
both programs.

A round measures each cell with one program and right after that with the other;
the order changes with each pair. The ratio new/base is taken within a pair. Of the
logarithms of all pairs the mean and its 95 % interval by Student's t distribution
are computed. A figure fails if the whole interval is beyond 3 % worse, and again in
as many rounds more. Allocations and goroutines are counts, and fail if there is one
more.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.run(cmd.Context(), cmd.OutOrStdout(), cmd.PrintErrf)
		},
	}
	f := cmd.Flags()
	f.StringVar(&g.base, "base", "", "the commit to compare with, such as main")
	f.StringVar(&g.work, "work", "", "only the cells that this regular expression finds, such as ^ConsumeAck")
	f.IntVar(&g.rounds, "rounds", 10, "how often to measure both")
	f.BoolVar(&g.quick, "quick", false, "few messages, to see whether it works; the figures mean nothing")
	f.StringVar(&g.json, "json", "", "write the figures to this file, too")
	if err := cmd.MarkFlagRequired("base"); err != nil {
		panic(err)
	}
	return cmd
}

// regressCells returns what is measured. The processor time of a client is measured
// with the server in another process, where the server's work does not dilute it.
// A replay is the work of both, so it is measured together with the server.
func regressCells() []cell {
	cells := make([]cell, 0, 16)
	add := func(work, transport string, size int, libs []string, params ...param) {
		for _, lib := range libs {
			cells = append(cells, cell{work: work, params: params, transport: transport, size: size, lib: lib})
		}
	}
	off, both := []string{monotelOff}, []string{monotelOff, monotelPercent}
	for _, batch := range []int{10, 100} {
		add("ConsumeAck", loopback, smallSize, both, param{"batch", batch}, param{"concurrency", 1}, param{paramEvents, 100_000})
	}
	add("DurablePublishSync", loopback, smallSize, both, param{paramEvents, 10_000})
	add("DurablePublishAsync", loopback, smallSize, both, param{paramEvents, 100_000})
	add("CorePublish", loopback, smallSize, both, param{paramEvents, 1_000_000})
	add(workReplay, inProcess, smallSize, off, param{paramReplays, 2000})
	add("Registrations", loopback, smallSize, off, param{"consumers", 1000})
	// Small events, so that live ones and replays are in one block of the stream.
	add(workLive, inProcess, minSize, off, param{paramReplays, 10_000}, param{paramEvents, 20_000})
	return cells
}

func (g *regression) run(ctx context.Context, stdout io.Writer, tell func(string, ...any)) (err error) {
	if g.rounds < fewestRounds {
		return fmt.Errorf("--rounds %d: want %d or more", g.rounds, fewestRounds)
	}
	match, err := regexp.Compile(g.work)
	if err != nil {
		return fmt.Errorf("--work: %w", err)
	}
	cells := slices.DeleteFunc(regressCells(), func(c cell) bool { return !match.MatchString(c.String()) })
	if len(cells) == 0 {
		return errors.New("nothing to measure: --work matches no cell")
	}
	dir, err := os.MkdirTemp("", "monotel-regress-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	tell("building the program of %s and that of this tree\n", g.base)
	pair, err := buildPair(ctx, dir, g.base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pair.remove()) }()
	all, err := g.measure(ctx, pair, cells, tell)
	if err != nil {
		return err
	}
	rep := judge(cells, all)
	if doubtful := rep.doubtful(cells); len(doubtful) > 0 && !g.quick {
		tell("slower at first: measuring %d cells again\n", len(doubtful))
		again, err := g.measure(ctx, pair, doubtful, tell)
		if err != nil {
			return err
		}
		rep.confirm(judge(doubtful, again))
	}
	rep.Base, rep.New, rep.Rounds, rep.Dependencies = pair.base, pair.current, g.rounds, pair.differences
	if g.json != "" {
		if err := rep.save(g.json); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(stdout, rep.table()); err != nil {
		return err
	}
	if failed := rep.failed(); len(failed) > 0 && !g.quick {
		return fmt.Errorf("worse than %s: %s", pair.base, strings.Join(failed, "; "))
	}
	return nil
}

// samples are the values of both programs, in the order of the rounds.
type samples map[sample]*[2][]float64

type sample struct {
	cell string
	unit string
}

const (
	baseSide = iota
	newSide
)

// pairs is how many pairs of measurements a round has: more where one takes little.
func (c cell) pairs() int {
	const few, some = 2, 3
	switch c.work {
	case "ConsumeAck":
		return few
	case "DurablePublishSync", "DurablePublishAsync", "CorePublish":
		return some
	}
	return 1
}

func (g *regression) measure(ctx context.Context, pair pair, cells []cell, tell func(string, ...any)) (samples, error) {
	all, r := make(samples), &runner{quick: g.quick}
	total, done, begin := len(cells)*g.rounds, 0, time.Now()
	for round := range g.rounds {
		for _, c := range cells {
			tell("\r\033[K%d/%d %s round %d %s", done+1, total, remaining(begin, done, total), round+1, c)
			for n := range len(pair.exe) * c.pairs() {
				side := (n + n/len(pair.exe) + round) % len(pair.exe) // the other way round each time
				if side == baseSide && c.work == workLive {
					continue // compared within one run, so the base has no part in it
				}
				line, err := g.try(ctx, r, pair.exe[side], c, tell)
				if err != nil {
					return nil, err
				}
				if err := all.add(line, side); err != nil {
					return nil, err
				}
			}
			done++
		}
	}
	tell("\r\033[K%d cells measured in %v\n", total, time.Since(begin).Round(time.Second))
	return all, nil
}

// try measures again where the server delivered something twice, as it does if a
// busy machine keeps a process from running for long: such numbers mean nothing.
func (g *regression) try(ctx context.Context, r *runner, exe string, c cell, tell func(string, ...any)) (line []byte, err error) {
	for range regressTries {
		if line, err = r.measure(ctx, exe, c); err == nil || ctx.Err() != nil {
			break
		}
		tell("\r\033[Kagain, because %v\n", err)
	}
	return line, err
}

func (s samples) add(line []byte, side int) error {
	res, err := parseResults(bytes.NewReader(line))
	if err != nil {
		return err
	}
	if len(res.values) == 0 {
		return fmt.Errorf("no values in %q", line)
	}
	for k, vs := range res.values {
		key := sample{k.pair + "/lib=" + k.lib, k.unit}
		if s[key] == nil {
			s[key] = new([2][]float64)
		}
		s[key][side] = append(s[key][side], vs...)
	}
	return nil
}

// A pair is this program with the library of the base commit, and with that of this
// tree.
type pair struct {
	exe           [2]string
	base, current string   // what the libraries are
	differences   []string // of the modules that both programs are built with
	remove        func() error
}

// buildPair checks the base commit out into a worktree below dir, puts the measuring
// code of this tree into it, and builds both programs.
func buildPair(ctx context.Context, dir, base string) (p pair, err error) {
	root, err := output(ctx, ".", "git", "rev-parse", "--show-toplevel")
	if err != nil {
		return p, err
	}
	if p.base, err = output(ctx, root, "git", "rev-parse", "--short", "--verify", base+"^{commit}"); err != nil {
		return p, err
	}
	if p.current, err = output(ctx, root, "git", "describe", "--always", "--dirty"); err != nil {
		return p, err
	}
	old := filepath.Join(dir, "base")
	if _, err := output(ctx, root, "git", "worktree", "add", "--quiet", "--detach", old, p.base); err != nil {
		return p, err
	}
	p.remove = func() error {
		_, err := output(context.WithoutCancel(ctx), root, "git", "worktree", "remove", "--force", old)
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.remove())
		}
	}()
	if err := transplant(root, old); err != nil {
		return p, err
	}
	for side, tree := range []string{old, root} {
		p.exe[side] = filepath.Join(dir, fmt.Sprintf("bench-%d", side))
		args := []string{"build", "-trimpath", "-buildvcs=false", "-o", p.exe[side], "."}
		if side == baseSide {
			args = slices.Insert(args, 1, "-mod=mod") // its library may need other modules
		}
		if _, err := output(ctx, filepath.Join(tree, "bench"), "go", args...); err != nil {
			return p, fmt.Errorf("build with the library of %s: %w", []string{p.base, p.current}[side], err)
		}
	}
	p.differences, err = differences(p.exe)
	return p, err
}

// measuring are the folders whose code measures and reports.
var measuring = []string{"bench", filepath.Join("internal", "docpage")}

// transplant replaces the measuring code of the worktree old with that of root.
func transplant(root, old string) error {
	sums, err := os.ReadFile(filepath.Join(old, "go.sum")) //nolint:gosec // a file of the worktree
	if err != nil {
		return err
	}
	for _, name := range measuring {
		to := filepath.Join(old, name)
		if err := os.RemoveAll(to); err != nil {
			return err
		}
		if err := os.CopyFS(to, os.DirFS(filepath.Join(root, name))); err != nil {
			return err
		}
	}
	// The old library may need modules that the new one does not.
	f, err := os.OpenFile(filepath.Join(old, "bench", "go.sum"), os.O_APPEND|os.O_WRONLY, 0) //nolint:gosec // see above
	if err != nil {
		return err
	}
	_, err = f.Write(sums)
	return errors.Join(err, f.Close())
}

// differences lists the modules that the two programs have in different versions:
// what is measured is then not the library alone.
func differences(exe [2]string) ([]string, error) {
	var versions [2]map[string]string
	for side := range exe {
		info, err := buildinfo.ReadFile(exe[side])
		if err != nil {
			return nil, err
		}
		versions[side] = make(map[string]string)
		for _, m := range info.Deps {
			if m.Replace == nil { // monotel itself
				versions[side][m.Path] = m.Version
			}
		}
	}
	var all []string
	for path, v := range versions[newSide] {
		if was := versions[baseSide][path]; was != v && was != "" {
			all = append(all, fmt.Sprintf("%s %s, was %s", path, v, was))
		}
	}
	slices.Sort(all)
	return all, nil
}

// output runs a command and returns its standard output without the line's end.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // git and go
	cmd.Dir = dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, stderr.Bytes())
	}
	return strings.TrimSpace(string(out)), nil
}

func (r regressReport) save(file string) error {
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	const everybodyReads = 0o644
	return os.WriteFile(file, append(data, '\n'), everybodyReads)
}
