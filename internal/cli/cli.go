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
	"github.com/monotel/monotel/internal/draft"
	"github.com/monotel/monotel/internal/safe"
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
	conn     connection
	output   string
	quiet    bool
	readOnly bool
	started  bool // the command line was good: what goes wrong now is no usage error
}

func run(ctx context.Context, args []string, p process) int {
	c := &cli{process: p}
	root := c.root()
	root.SetArgs(args)
	root.SetIn(p.in)
	root.SetOut(p.out)
	root.SetErr(p.err)
	refuseTwice(root)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitDone
	}
	text := err.Error()
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		text = "interrupted"
	}
	fmt.Fprintln(c.err, "monotel: "+strings.TrimRight(safe.Block(text), "\n"))
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
	unchanged := errors.Is(err, triage.ErrNotFound) || errors.Is(err, triage.ErrInvalid) || errors.Is(err, triage.ErrReadOnly)
	if usage || !c.started || unchanged {
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

// The flags of the connection are as many as a screen has lines: they are listed
// once, by the command that has them.
const (
	inheritedFlags = "Global Flags:\n{{.InheritedFlags.FlagUsages | trimTrailingWhitespaces}}"
	otherFlags     = "Flags of every command, see 'monotel --help':\n" +
		"  -o, --output FORMAT (table, json, ndjson), -q, --quiet, and which server: --server, --context, …"
)

const connectionHelp = `Connection: --server, else NATS_URL, else the context that is selected with
"nats context select" or named by NATS_CONTEXT, else nats://127.0.0.1:4222.
With --context, NATS_URL, NATS_CREDS, NATS_USER and NATS_PASSWORD are not looked
at; --server then replaces the server of the context and keeps its credentials.

Exit codes: 0 done, 1 failed, 2 wrong usage, and nothing was changed, 3 partly done.`

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:     "monotel",
		Version: buildVersion().text(),
		Short:   "Look after event-driven apps on NATS JetStream",
		Long: "monotel looks after event-driven apps on NATS JetStream: it shows what could\n" +
			"not be handled, and why, and has it handled again.\n\n" + connectionHelp,
		Example:       "  monotel dlq ls\n  monotel dlq replay --group 3f2a --dry-run",
		SilenceErrors: true,
		SilenceUsage:  true,
		PersistentPreRunE: func(*cobra.Command, []string) error {
			if !slices.Contains(outputs, c.output) {
				return fmt.Errorf("--output %s: want one of %s", c.output, strings.Join(outputs, ", "))
			}
			if err := c.readOnlyBy(c.env(envReadOnly)); err != nil {
				return err
			}
			if err := draft.Clean(); err != nil {
				c.warn("what an edit that was killed has left could not be removed: %v", err)
			}
			return c.conn.validate()
		},
	}
	root.CompletionOptions.SetDefaultShellCompDirective(cobra.ShellCompDirectiveNoFileComp)
	root.SetVersionTemplate("{{.Version}}\n")
	root.SetUsageTemplate(strings.Replace(root.UsageTemplate(), inheritedFlags, otherFlags, 1))
	f := root.PersistentFlags()
	c.conn.register(root, f)
	f.StringVarP(&c.output, "output", "o", outputTable, "`FORMAT`: table, json or ndjson")
	f.BoolVarP(&c.quiet, "quiet", "q", false, "no progress, and no remarks on what went well")
	f.BoolVar(&c.readOnly, "read-only", false, "refuse every change; so does "+envReadOnly+"=1")
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
			v := buildVersion()
			if c.output != outputTable {
				return c.writeJSON(v)
			}
			return c.write([]byte(v.text() + "\n"))
		}),
	}
}

type versionView struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func buildVersion() versionView {
	v := versionView{Version: "(devel)", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	if info.Main.Version != "" {
		v.Version = info.Main.Version
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v.Revision = s.Value
		}
	}
	return v
}

func (v versionView) text() string {
	return fmt.Sprintf("monotel %s (%s, %s)", v.Version, v.Go, v.Platform)
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
		Args: noCommand,
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
	for _, g := range []struct {
		title    string
		commands []*cobra.Command
	}{
		{"Look:", []*cobra.Command{c.groups(), c.ls(), c.show(), c.stats(), c.tail()}},
		{"Decide:", []*cobra.Command{c.replay(), c.ops(), c.edit(), c.archive(), c.discard(), c.restore()}},
		{"Keep and check:", []*cobra.Command{c.export(), c.imports(), c.doctor(), c.capture()}},
	} {
		cmd.AddGroup(&cobra.Group{ID: g.title, Title: g.title})
		for _, sub := range g.commands {
			sub.GroupID = g.title
			cmd.AddCommand(sub)
		}
	}
	return cmd
}

// noCommand is for a command with others below it, that takes no arguments of its
// own.
func noCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	const misspelt = 2 // letters
	cmd.SuggestionsMinimumDistance = misspelt
	err := fmt.Errorf("unknown command %q for %q", args[0], cmd.CommandPath())
	if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
		err = fmt.Errorf("%w; did you mean %s?", err, strings.Join(near, " or "))
	}
	return err
}

// noArgs is for a command that takes flags only.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	if cmd.Flags().Lookup("id") != nil {
		return fmt.Errorf("%q: this command takes flags only; --id %s is for an ID, --where for a condition", args[0], args[0])
	}
	return fmt.Errorf("%q: this command takes flags only", args[0])
}

// oneArg is for a command that takes one argument. from says where there is one.
func oneArg(what, from string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) == 1 {
			return nil
		}
		return fmt.Errorf("want one %s, not %d; %s", what, len(args), from)
	}
}

const (
	fromList       = "'monotel dlq ls' lists them"
	fromOperations = "'monotel dlq ops' lists them"
)
