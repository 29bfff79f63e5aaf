package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
)

// A runner measures cells, each in a process of its own.
type runner struct {
	work      string
	libs      []string
	transport string
	size      int
	rounds    int
	quick     bool
	out       string
}

func runCommand() *cobra.Command {
	var r runner
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Measure, and write results that benchstat reads",
		Long: `Measure every library at every work, or what the flags choose.

A round does each work with one library after the other, beginning with another
one each time. What takes long to start does not warm up what comes after: each
measurement has a process of its own.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return r.run(cmd.Context(), cmd.OutOrStdout(), cmd.PrintErrf)
		},
	}
	f := cmd.Flags()
	f.StringVar(&r.work, "work", "", "only the works that this regular expression finds, such as ConsumeAck/batch=10")
	f.StringSliceVar(&r.libs, "lib", nil, "only these libraries")
	f.StringVar(&r.transport, "transport", "", "only inproc or loopback")
	f.IntVar(&r.size, "size", 0, "only payloads of so many bytes, 256 or 4096")
	f.IntVar(&r.rounds, "rounds", 5, "how often")
	f.BoolVar(&r.quick, "quick", false, "few messages, and each work with one size and set of parameters: to see whether everything works")
	f.StringVar(&r.out, "out", "", "write the results to this file and progress to the terminal; without it results go there")
	return cmd
}

func (r *runner) run(ctx context.Context, stdout io.Writer, tell func(string, ...any)) (err error) {
	chosen, err := r.choose()
	if err != nil {
		return err
	}
	if r.out != "" {
		f, err := os.Create(r.out)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		stdout = f
	}
	if err := header(stdout, r.command()); err != nil {
		return err
	}
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	total, done, begin := 0, 0, time.Now()
	for _, group := range chosen {
		total += len(group) * r.rounds
	}
	for round := range r.rounds {
		for _, group := range chosen {
			for i := range group {
				c := group[(i+round)%len(group)]
				tell("\r\033[K%d/%d %s round %d %s", done+1, total, remaining(begin, done, total), round+1, c)
				line, err := r.measure(ctx, exe, c)
				if err != nil {
					return err
				}
				if _, err := stdout.Write(line); err != nil {
					return err
				}
				done++
			}
		}
	}
	tell("\r\033[K%d measurements in %v\n", total, time.Since(begin).Round(time.Second))
	return nil
}

func remaining(begin time.Time, done, total int) string {
	if done == 0 {
		return ""
	}
	left := time.Since(begin) / time.Duration(done) * time.Duration(total-done)
	return left.Round(time.Second).String() + " left,"
}

func (r *runner) choose() ([][]cell, error) {
	if r.rounds < 1 {
		return nil, fmt.Errorf("--rounds %d: want 1 or more", r.rounds)
	}
	for _, l := range r.libs {
		if _, err := findLibrary(l); err != nil {
			return nil, err
		}
	}
	match, err := regexp.Compile(r.work)
	if err != nil {
		return nil, fmt.Errorf("--work: %w", err)
	}
	var chosen [][]cell
	for _, group := range groups() {
		group = slices.DeleteFunc(group, func(c cell) bool {
			return r.quick && !c.first() || !match.MatchString(c.pair()) || len(r.libs) > 0 && !slices.Contains(r.libs, c.lib) ||
				r.transport != "" && c.transport != r.transport || r.size != 0 && c.size != r.size
		})
		if len(group) > 0 {
			chosen = append(chosen, group)
		}
	}
	if len(chosen) == 0 {
		return nil, errors.New("nothing to measure: the flags leave no work")
	}
	return chosen, nil
}

func (r *runner) measure(ctx context.Context, exe string, c cell) (line []byte, err error) {
	dir, err := os.MkdirTemp("", "monotel-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	args := []string{"measure", c.String(), "--dir", dir}
	if r.quick {
		args = append(args, "--quick")
	}
	cmd := exec.CommandContext(ctx, exe, args...) //nolint:gosec // this program
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if line, err = cmd.Output(); err != nil {
		return nil, fmt.Errorf("measure %s: %w\n%s", c, err, stderr.Bytes())
	}
	return line, nil
}

// Keys of the results' first lines, beside those of package testing.
const (
	keyCPU      = "cpu"
	keyProcs    = "procs"
	keyKernel   = "kernel"
	keyGo       = "go"
	keyDate     = "date"
	keyCommand  = "command"
	keyVersions = "versions"
)

// compared are the modules whose versions matter.
var compared = []string{
	"github.com/nats-io/nats-server/v2", "github.com/nats-io/nats.go", "github.com/ThreeDotsLabs/watermill",
	"github.com/ThreeDotsLabs/watermill-nats/v2", "github.com/go-monolith/mono", "go.opentelemetry.io/otel/sdk",
}

// command is the command line that chooses the same. Where results go is of this
// machine alone.
func (r *runner) command() string {
	args := []string{"bench run"}
	if r.work != "" {
		args = append(args, "--work '"+r.work+"'")
	}
	if len(r.libs) > 0 {
		args = append(args, "--lib "+strings.Join(r.libs, ","))
	}
	if r.transport != "" {
		args = append(args, "--transport "+r.transport)
	}
	if r.size != 0 {
		args = append(args, "--size "+strconv.Itoa(r.size))
	}
	if r.quick {
		args = append(args, "--quick")
	}
	return strings.Join(append(args, "--rounds "+strconv.Itoa(r.rounds)), " ")
}

// header says where the results are from.
func header(out io.Writer, command string) error {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return errors.New("the program does not know its modules")
	}
	var versions []string
	for _, m := range info.Deps {
		if slices.Contains(compared, m.Path) {
			versions = append(versions, m.Path+" "+m.Version)
		}
	}
	for _, kv := range [][2]string{
		{"goos", runtime.GOOS},
		{"goarch", runtime.GOARCH},
		{"pkg", info.Main.Path},
		{keyCPU, fromFile("/proc/cpuinfo", "model name")},
		{keyProcs, strconv.Itoa(runtime.GOMAXPROCS(0))},
		{keyKernel, fromFile("/proc/sys/kernel/osrelease", "")},
		{keyGo, runtime.Version()},
		{keyDate, time.Now().UTC().Format(time.DateOnly)},
		{keyCommand, command},
		{keyVersions, strings.Join(versions, ", ")},
	} {
		if _, err := fmt.Fprintf(out, "%s: %s\n", kv[0], kv[1]); err != nil {
			return err
		}
	}
	return nil
}

// fromFile returns a file's first line, or what stands after key: in it. It is
// "unknown" where there is no such file.
func fromFile(name, key string) string {
	data, err := os.ReadFile(name) //nolint:gosec // what the kernel tells
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(data)) {
		if key == "" {
			return strings.TrimSpace(line)
		}
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}
