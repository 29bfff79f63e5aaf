package cli

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"charm.land/lipgloss/v2"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
)

const failNever = "never"

var severities = []string{string(dlq.SeverityCritical), string(dlq.SeverityWarning), string(dlq.SeverityNotice)}

func (c *cli) doctor() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look for what may lose messages or dead letters",
		Long: "Look at every stream and consumer for what may lose messages or dead letters, or\n" +
			"already has. It only reads. The exit code is 1 if there is a finding as severe as\n" +
			"--fail-on, or more; else 3 if something could not be checked, as when the user may\n" +
			"not ask for it, unless --fail-on is never.",
		Example: "  monotel dlq doctor\n  monotel dlq doctor --fail-on warning --output json",
		Args:    noArgs,
	}
	failOn := cmd.Flags().String("fail-on", string(dlq.SeverityCritical), "`SEVERITY`: critical, warning, notice or never")
	c.complete(cmd, "fail-on", func(context.Context, string) []string { return append(slices.Clone(severities), failNever) })
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		worst := slices.Index(severities, *failOn)
		if worst < 0 && *failOn != failNever {
			return usagef("--fail-on %s: want one of %s, %s", *failOn, strings.Join(severities, ", "), failNever)
		}
		findings, err := c.findings(ctx)
		if printErr := c.printFindings(findings); printErr != nil {
			return printErr
		}
		if err != nil {
			return err
		}
		severe, incomplete := 0, 0
		for _, f := range findings {
			if i := slices.Index(severities, string(f.Severity)); i >= 0 && i <= worst {
				severe++
			}
			if f.Incomplete() {
				incomplete++
			}
		}
		switch {
		case severe > 0:
			return fmt.Errorf("%s as severe as %s, or more", plural(severe, "finding"), *failOn)
		case incomplete > 0 && *failOn != failNever:
			return partlyf("%s could not be made, or not wholly: see not_permitted and unreadable", plural(incomplete, "check"))
		}
		return nil
	})
	return cmd
}

// findings connects for one look. It opens no desk, which ends at the first
// request that the server refuses: the doctor goes on with the others.
func (c *cli) findings(ctx context.Context) (findings []dlq.Finding, err error) {
	err = c.withStore(ctx, func(store *dlq.Store) error {
		findings, err = store.Doctor(ctx)
		return err
	})
	return findings, err
}

func (c *cli) withStore(ctx context.Context, do func(*dlq.Store) error) error {
	l, err := c.connect()
	if err != nil {
		return err
	}
	defer l.nc.Close()
	js, err := l.config.JetStream(l.nc)
	if err != nil {
		return err
	}
	store, err := dlq.NewStore(l.nc, js, dlq.Config{Stream: jetstream.StreamConfig{Name: c.conn.stream}})
	if err != nil {
		return usagef("--stream: %w", err)
	}
	err = do(store)
	if ctx.Err() != nil {
		return err // and not what was refused before
	}
	return l.explain(err)
}

// capture does what the doctor says of zombies.
func (c *cli) capture() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "capture STREAM CONSUMER",
		Short: "Make dead letters of what the server does not deliver any more",
		Long: "Make dead letters of the messages that a work-queue or interest stream keeps and\n" +
			"the server does not deliver to the consumer any more: they are past its MaxDeliver,\n" +
			"or were passed over. 'doctor' finds them. Each is stored as a dead letter first and\n" +
			"then deleted from its stream, unless another consumer still needs it. What may be\n" +
			"in flight is left alone. It can be interrupted and run again: nothing is captured\n" +
			"twice. It takes a few seconds, and some milliseconds for each message.",
		Example: "  monotel dlq doctor\n  monotel dlq capture BILLING billing_orders --yes",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 2 { //nolint:mnd // a stream and a consumer
				return nil
			}
			return fmt.Errorf("want a stream and a consumer, not %s; 'monotel dlq doctor' says which", plural(len(args), "argument"))
		},
	}
	yes := cmd.Flags().BoolP("yes", "y", false, "do not ask")
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		stream, consumer := args[0], args[1]
		if err := c.mayChange(); err != nil {
			return err
		}
		if err := c.mayAsk(*yes); err != nil {
			return err
		}
		question := fmt.Sprintf("Capture what consumer %s of stream %s does not get any more, and delete it there?", consumer, stream)
		if err := c.confirm(ctx, *yes, question); err != nil {
			return err
		}
		n := 0
		err := c.withStore(ctx, func(store *dlq.Store) (err error) {
			n, err = store.CaptureZombies(ctx, stream, consumer)
			return err
		})
		if n == 0 && err != nil {
			return err
		}
		if c.output != outputTable {
			if printErr := c.writeJSON(capturedView{n}); printErr != nil {
				return printErr
			}
		} else {
			c.remark("%s captured; see 'monotel dlq ls'", plural(n, "message"))
		}
		if err != nil {
			return partlyf("%w; run it again", err)
		}
		return nil
	})
	return cmd
}

type capturedView struct {
	Captured int `json:"captured"`
}

func severityStyle(s dlq.Severity) lipgloss.Style {
	switch s {
	case dlq.SeverityCritical:
		return styleBad
	case dlq.SeverityWarning:
		return styleWarn
	case dlq.SeverityNotice:
		return styleDim
	}
	return lipgloss.NewStyle()
}

// printFindings gives each a few lines: what to do is too long for a column.
func (c *cli) printFindings(findings []dlq.Finding) error {
	if c.output != outputTable {
		views := make([]findingView, 0, len(findings))
		for _, f := range findings {
			views = append(views, viewFinding(f))
		}
		return writeList(c, views)
	}
	t := c.table(c.out, "SEVERITY", "CHECK", "STREAM", "CONSUMER", "COUNT")
	for _, f := range findings {
		n := plain("")
		if f.Count > 0 {
			n = number(f.Count)
		}
		_ = t.row(styled(severityStyle(f.Severity), string(f.Severity)), plain(f.Check), plain(f.Stream), plain(f.Consumer), n)
	}
	if err := t.flush(); err != nil {
		return err
	}
	for _, f := range findings {
		s := &sheet{c: c}
		s.heading(strings.TrimSpace(f.Check + " " + strings.TrimSpace(f.Stream+" "+f.Consumer)))
		s.text(f.Detail)
		s.text("→ " + f.Remedy)
		if err := c.write(s.b.Bytes()); err != nil {
			return err
		}
	}
	if len(findings) == 0 {
		c.remark("Nothing was found.")
	}
	return nil
}
