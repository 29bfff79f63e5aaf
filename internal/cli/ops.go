package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

func (c *cli) ops() *cobra.Command {
	list := c.runs(func(ctx context.Context, _ []string) error {
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			all, err := desk.Operations(ctx)
			if err != nil && !errors.Is(err, triage.ErrUnreadable) {
				return err
			}
			return errors.Join(c.listOperations(all), err)
		})
	})
	cmd := &cobra.Command{
		Use:     "ops",
		Short:   "List and control replays",
		Long:    "List replays, newest first, and plans that were not run. Subcommands control one.",
		Example: "  monotel dlq ops\n  monotel dlq ops show 20260102-150405-abcde",
		Args:    noCommand,
		RunE:    list,
	}
	ls := &cobra.Command{
		Use: "ls", Short: "List replays, newest first", Example: "  monotel dlq ops ls --output json", Args: noArgs, RunE: list,
	}
	cmd.AddCommand(ls, c.opsShow(), c.opsResume(),
		c.opsControl("pause", "Have a replay stop sending",
			"Have the process that runs a replay stop sending, wherever it is.\nWhat is sent goes on to its consumer.",
			"is to pause; go on with '%s'", (*triage.Desk).Pause),
		c.opsControl("cancel", "End a replay, or a plan, for good",
			"End a replay, or a plan, for good. What is sent goes on to its consumer; the rest\nis open as before.",
			"is cancelled", (*triage.Desk).Cancel))
	return cmd
}

func statusStyle(s triage.Status) lipgloss.Style {
	switch s {
	case triage.StatusRunning, triage.StatusPaused:
		return styleWarn
	case triage.StatusStopped:
		return styleBad
	case triage.StatusDone:
		return styleGood
	case triage.StatusPlanned, triage.StatusCancelled:
		return styleDim
	}
	return lipgloss.NewStyle()
}

// status is what an operation is doing, as far as that can be known.
func status(o *triage.Operation) string {
	if o.Interrupted() {
		return "interrupted"
	}
	return string(o.Status)
}

func (c *cli) listOperations(all []*triage.Operation) error {
	if c.output != outputTable {
		views := make([]operationView, 0, len(all))
		for _, o := range all {
			views = append(views, viewOperation(o))
		}
		return writeList(c, views)
	}
	t := c.table(c.out, "OPERATION", "STATUS", "CREATED", "BY", "TO", "SELECTED", "RESOLVED", "FAILED AGAIN", "IN FLIGHT",
		"REMAINING", "REASON")
	for _, o := range all {
		_ = t.row(plain(o.ID), styled(statusStyle(o.Status), status(o)), plain(c.age(o.Created)), plain(o.Actor), plain(o.Options.Target),
			number(o.Selected), number(o.Resolved), number(o.FailedAgain), number(o.InFlight()), number(o.Remaining),
			plain(cmp.Or(o.Why, o.Options.Reason)))
	}
	if err := t.flush(); err != nil {
		return err
	}
	c.remark("%s", plural(len(all), "operation"))
	return nil
}

func (c *cli) opsShow() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show how far a replay has come",
		Example: "  monotel dlq ops show 20260102-150405-abcde\n" +
			"  monotel dlq ops show 20260102-150405-abcde --remaining | monotel dlq archive --id - --yes",
		Long:              "Show a plan, or how far a replay has come. --tried and --remaining list IDs alone.",
		Args:              oneArg("ID of a replay or plan", fromOperations),
		ValidArgsFunction: c.completeArgs(c.operationIDs, 1),
	}
	tried := cmd.Flags().Bool("tried", false, "list the IDs of the dead letters that it has tried, and nothing else")
	remaining := cmd.Flags().Bool("remaining", false, "list the IDs of those that it has not")
	cmd.MarkFlagsMutuallyExclusive("tried", "remaining")
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if *tried || *remaining {
				done, left, err := desk.Tried(ctx, args[0])
				if err != nil {
					return err
				}
				return c.printIDs(map[bool][]string{true: done, false: left}[*tried])
			}
			o, err := desk.Operation(ctx, args[0])
			if err != nil {
				return err
			}
			return c.printOperation(o)
		})
	})
	return cmd
}

func (c *cli) printIDs(ids []string) error {
	if c.output != outputTable {
		return writeList(c, ids)
	}
	for _, id := range ids {
		if err := c.write([]byte(safe.Line(id) + "\n")); err != nil {
			return err
		}
	}
	return nil
}

func (c *cli) printOperation(o *triage.Operation) error {
	if c.output != outputTable {
		return c.writeJSON(viewOperation(o))
	}
	t := c.table(c.out, "OPERATION "+o.ID, status(o))
	row := func(name, value string) {
		if value != "" && value != "-" {
			_ = t.row(plain(name), plain(value))
		}
	}
	row("why", o.Why)
	row("created", c.when(o.Created)+" by "+o.Actor)
	row("started", c.when(o.Started))
	row("ended", c.when(o.Ended))
	row("run by", o.Runner)
	row("to", o.Options.Target)
	row("rate", pace(&o.Plan))
	row("stops", stops(o.Options.StopIfFailing))
	row("query", o.Query)
	row("group", o.Group)
	row("reason", o.Options.Reason)
	for _, r := range c.numbers(o) {
		_ = t.row(r...)
	}
	switch {
	case o.Status == triage.StatusPlanned:
		row("run it", c.commandLine("dlq", "replay", "--plan", o.ID))
	case o.Status == triage.StatusPaused, o.Status == triage.StatusStopped, o.Interrupted():
		row("go on", c.commandLine("dlq", "ops", "resume", o.ID))
	}
	if err := t.flush(); err != nil {
		return err
	}
	return c.printConsumers(c.out, o.Consumers)
}

func (c *cli) opsResume() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "resume ID",
		Short: "Go on with a replay that was paused, stopped itself or was interrupted",
		Long: "Go on with a replay that was paused, stopped itself or was interrupted, in this\n" +
			"process. What it had in hand it neither loses nor sends twice. Exit codes are\n" +
			"those of replay. A plan is run by 'monotel dlq replay --plan ID'.",
		Example:           "  monotel dlq ops resume 20260102-150405-abcde",
		Args:              oneArg("ID of a replay or plan", fromOperations),
		ValidArgsFunction: c.completeArgs(c.operationIDs, 1),
	}
	noWait := cmd.Flags().Bool("no-wait", false, "end when everything is sent, without the outcomes")
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		if err := c.mayChange(); err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			o, err := desk.Operation(ctx, args[0])
			if err != nil {
				return err
			}
			if o.Status == triage.StatusPlanned { // nobody has confirmed it
				return usagef("%s is a plan that was not run: '%s'", o.ID, c.commandLine("dlq", "replay", "--plan", o.ID))
			}
			return c.runOperation(ctx, desk, o.ID, *noWait)
		})
	})
	return cmd
}

func (c *cli) opsControl(name, short, long, done string, do func(*triage.Desk, context.Context, string) error) *cobra.Command {
	return &cobra.Command{
		Use: name + " ID", Short: short, Long: long, Example: "  monotel dlq ops " + name + " 20260102-150405-abcde",
		Args: oneArg("ID of a replay or plan", fromOperations), ValidArgsFunction: c.completeArgs(c.operationIDs, 1),
		RunE: c.runs(func(ctx context.Context, args []string) error {
			if err := c.mayChange(); err != nil {
				return err
			}
			return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
				if err := do(desk, ctx, args[0]); err != nil {
					return err
				}
				said := done
				if name == "pause" {
					said = fmt.Sprintf(done, c.commandLine("dlq", "ops", "resume", args[0]))
				}
				c.remark("operation %s %s", safe.Line(args[0]), said)
				return nil
			})
		}),
	}
}
