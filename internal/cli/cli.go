// Package cli is the command monotel: package triage for people and scripts.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/monotel/monotel/dlq/triage"
)

// The exit codes.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2 // nothing was changed
	exitPartly = 3
)

// Main runs the command and returns its exit code. When ctx ends, what goes on
// is brought to an orderly end: a replay is paused.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, env func(string) string) int {
	return run(ctx, args, process{in: stdin, out: stdout, err: stderr, env: env, tty: terminal, now: time.Now})
}

// A process is what a command sees of the world outside.
type process struct {
	in       io.Reader
	out, err io.Writer
	env      func(string) string
	tty      func(stream any) (width int, ok bool)
	now      func() time.Time
}

func terminal(stream any) (width int, ok bool) {
	f, ok := stream.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return 0, false
	}
	lipgloss.EnableLegacyWindowsANSI(f)
	width, _, err := term.GetSize(int(f.Fd()))
	if err != nil || width <= 0 {
		width = 80
	}
	return width, true
}

// A cli is one run of the command.
type cli struct {
	process
	conn    connection
	output  string
	quiet   bool
	started bool // the command line was good: what goes wrong now is no usage error
}

func run(ctx context.Context, args []string, p process) int {
	c := &cli{process: p}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(p.in)
	root.SetOut(p.out)
	root.SetErr(p.err)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	text := err.Error()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		text = "interrupted"
	}
	fmt.Fprintln(c.err, "monotel: "+strings.TrimRight(safeLines(text), "\n"))
	if !c.started {
		fmt.Fprintf(c.err, "See '%s --help'.\n", cmd.CommandPath())
	}
	return c.exitCode(err)
}

// A usageError is the user's mistake, found before anything was changed.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

func usagef(format string, args ...any) error { return usageError{fmt.Errorf(format, args...)} }

// A partlyError reports that some of it was done.
type partlyError struct{ error }

func (e partlyError) Unwrap() error { return e.error }

func partlyf(format string, args ...any) error { return partlyError{fmt.Errorf(format, args...)} }

func (c *cli) exitCode(err error) int {
	if _, ok := errors.AsType[partlyError](err); ok {
		return exitPartly
	}
	_, usage := errors.AsType[usageError](err)
	if usage || !c.started || errors.Is(err, triage.ErrNotFound) || errors.Is(err, triage.ErrInvalid) {
		return exitUsage
	}
	return exitFailed
}

// runs marks where the command line has been found good.
func (c *cli) runs(f func(ctx context.Context, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		c.started = true
		return f(cmd.Context(), args)
	}
}

const connectionHelp = `Connection: --server, else NATS_URL, else the context that is selected with
"nats context select" or named by NATS_CONTEXT, else nats://127.0.0.1:4222.
With --context, NATS_URL, NATS_CREDS, NATS_USER and NATS_PASSWORD are not looked
at; --server then replaces the server of the context and keeps its credentials.

Exit codes: 0 done, 1 failed, 2 wrong usage, and nothing was changed, 3 partly done.`

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "monotel",
		Short: "Look after event-driven apps on NATS JetStream",
		Long: "monotel looks after event-driven apps on NATS JetStream: it shows what could\n" +
			"not be handled, and why, and has it handled again.\n\n" + connectionHelp,
		Example:       "  monotel dlq ls\n  monotel dlq replay --group 3f2a --dry-run",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(outputs, c.output) {
				return fmt.Errorf("--output %s: want one of %s", c.output, strings.Join(outputs, ", "))
			}
			return c.conn.validate()
		},
	}
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	f := root.PersistentFlags()
	c.conn.register(root, f)
	f.StringVarP(&c.output, "output", "o", outputTable, "table, json or ndjson")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "no progress, and no remarks on what went well")
	c.complete(root, "output", func(context.Context, string) []string { return outputs })
	root.AddCommand(c.dlq(), c.version())
	return root
}

func (c *cli) version() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: "  monotel version",
		Args:    cobra.NoArgs,
		RunE: c.runs(func(context.Context, []string) error {
			v := versionView{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
			if info, ok := debug.ReadBuildInfo(); ok {
				if info.Main.Version != "" {
					v.Version = info.Main.Version
				}
				for _, s := range info.Settings {
					if s.Key == "vcs.revision" {
						v.Revision = s.Value
					}
				}
			}
			if c.output != outputTable {
				return c.writeJSON(v)
			}
			fmt.Fprintf(c.out, "monotel %s (%s, %s)\n", v.Version, v.Go, v.Platform)
			return nil
		}),
	}
}

type versionView struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func (c *cli) dlq() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dlq",
		Short: "Inspect, understand and replay dead letters",
		Long: "Inspect, understand and replay dead letters: messages that could not be handled.\n" +
			"Without a subcommand it opens a screen for all of that, on a terminal.\n\n" + connectionHelp,
		Example: "  monotel dlq\n" +
			"  monotel dlq groups\n" +
			"  monotel dlq ls --where 'consumer == \"billing\" && age < duration(\"2h\")'\n" +
			"  monotel dlq replay --group 3f2a --canary 1,5,20 --dry-run",
		Args: cobra.NoArgs,
	}
	var trace traceURL
	trace.register(cmd, c)
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		_, in := c.tty(c.in)
		_, out := c.tty(c.out)
		if !in || !out {
			return usagef("the triage screen needs a terminal; use 'monotel dlq ls', 'groups', 'show ID' or 'replay', see 'monotel dlq --help'")
		}
		template, err := trace.template(c)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error { return openScreen(ctx, c, desk, template) })
	})
	cmd.AddCommand(c.ls(), c.show(), c.groups(), c.stats(), c.tail(), c.replay(), c.ops(), c.edit(),
		c.discard(), c.archive(), c.restore(), c.export(), c.imports(), c.doctor())
	return cmd
}
