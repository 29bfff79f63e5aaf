package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

func (c *cli) ls() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "ls",
		Short: "List dead letters, newest first",
		Long:  "List dead letters, newest first. Payloads and header values are left out.",
		Example: "  monotel dlq ls --where 'consumer == \"billing\"' --limit 20\n" +
			"  monotel dlq ls --state all --output ndjson\n" +
			"  monotel dlq ls --group 3f2a --payload --output json",
		Args: noArgs,
	}
	var s selection
	s.register(cmd, c, false)
	payload := cmd.Flags().Bool("payload", false, "with payloads, in JSON and NDJSON")
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		if *payload && c.output == outputTable {
			return usagef("--payload is for --output json or ndjson; 'monotel dlq show ID' prints one")
		}
		sel, err := s.parse(c, nil)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			return c.listEntries(desk.Entries(ctx, sel, *payload), *payload, s.whichState())
		})
	})
	return cmd
}

func stateStyle(s dlq.State) lipgloss.Style {
	switch s {
	case dlq.StateOpen:
		return styleBad
	case dlq.StateReplaying:
		return styleWarn
	case dlq.StateResolved:
		return styleGood
	case dlq.StateSent, dlq.StateArchived, dlq.StateDiscarded:
		return styleDim
	}
	return lipgloss.NewStyle()
}

// listEntries writes entries as they come. none is said if there is none.
func (c *cli) listEntries(entries iter.Seq2[*dlq.Entry, error], payload bool, none string) error {
	t := c.table(c.out, "ID", "STATE", "FAILED", "CONSUMER", "REASON", "DELIVERIES", "REPLAYS", "ERROR")
	l := &list{c: c}
	n := 0
	var unreadable, incomplete problems
	for e, err := range entries {
		switch {
		case e == nil && errors.Is(err, dlq.ErrNotARecord):
			unreadable.add(err)
			continue
		case e == nil:
			return errors.Join(c.closeList(t, l), err)
		case err != nil:
			incomplete.add(err)
		}
		n++
		if err := c.listEntry(t, l, e, err, payload); err != nil {
			return err
		}
	}
	if err := c.closeList(t, l); err != nil {
		return err
	}
	if unreadable.n > 0 {
		c.warn("%s of the stream cannot be read as dead letters; the first: %v", plural(unreadable.n, "message"), unreadable.first)
	}
	if incomplete.n > 0 {
		c.warn("%s cannot be read whole; the first: %v", plural(incomplete.n, "dead letter"), incomplete.first)
	}
	if c.output == outputTable {
		if n > 0 {
			none = ""
		}
		c.remark("%s%s", plural(n, "dead letter"), none)
	}
	return nil
}

// problems are many of a kind, of which one is told.
type problems struct {
	n     int
	first error
}

func (p *problems) add(err error) {
	p.n++
	if p.first == nil {
		p.first = err
	}
}

// closeList ends what was begun, so that the output is whole JSON even when the
// list ended early.
func (c *cli) closeList(t *table, l *list) error {
	if c.output == outputTable {
		return t.flush()
	}
	return l.close()
}

func (c *cli) listEntry(t *table, l *list, e *dlq.Entry, problem error, payload bool) error {
	if c.output == outputTable {
		f := latest(e)
		return t.row(plain(e.ID), styled(stateStyle(e.State), string(e.State)), plain(c.age(f.Failed)), plain(e.Stream+"/"+e.Consumer),
			plain(string(f.Reason)), number(e.Deliveries), number(e.Replays), plain(firstLine(f)))
	}
	v := viewEntry(e, problem)
	if payload {
		v.setPayload(e.Data, e.Body)
	}
	return l.add(v)
}

// firstLine is the error as a list shows it.
func firstLine(f *dlq.Record) string {
	text := cmp.Or(f.Error, f.ReasonText)
	line, _, more := strings.Cut(strings.TrimSpace(text), "\n")
	if more {
		return strings.TrimRight(line, "\r ") + " …"
	}
	return line
}

func (c *cli) groups() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "groups",
		Short: "Group dead letters by what went wrong",
		Long: "Group dead letters by what went wrong, the largest group first: 2,000 failures are\n" +
			"three errors.",
		Example: "  monotel dlq groups\n" +
			"  monotel dlq groups --where 'age < duration(\"1h\")' --output json",
		Args: noArgs,
	}
	var s selection
	s.register(cmd, c, false)
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		sel, err := s.parse(c, nil)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			groups, err := desk.Groups(ctx, sel)
			if err != nil {
				return err
			}
			return c.listGroups(groups, s.whichState())
		})
	})
	return cmd
}

func (c *cli) listGroups(groups []triage.Group, none string) error {
	if c.output != outputTable {
		views := make([]groupView, 0, len(groups))
		for _, g := range groups {
			views = append(views, viewGroup(g))
		}
		return writeList(c, views)
	}
	if err := c.groupTable(groups).flush(); err != nil {
		return err
	}
	n := 0
	for _, g := range groups {
		n += g.Count
	}
	if n > 0 {
		none = ""
	}
	c.remark("%s in %s%s", plural(n, "dead letter"), plural(len(groups), "group"), none)
	return nil
}

func (c *cli) groupTable(groups []triage.Group) *table {
	t := c.table(c.out, "GROUP", "COUNT", "PER HOUR", "FIRST", "LAST", "CONSUMER", "ERROR TYPE", "ERROR")
	for _, g := range groups {
		title := plain(g.Title)
		if g.Regressed {
			title = styled(styleBad, "[regressed] "+g.Title)
		}
		_ = t.row(plain(g.ID), number(g.Count), plain(fmt.Sprintf("%.3g", g.PerHour)), plain(c.age(g.First)), plain(c.age(g.Last)),
			plain(g.Stream+"/"+g.Consumer), plain(g.ErrorType), title)
	}
	return t
}

func (c *cli) stats() *cobra.Command {
	return &cobra.Command{
		Use:     "stats",
		Short:   "Count dead letters by state, reason and consumer",
		Long:    "Count dead letters by state, reason and consumer, and say how full their stream is.",
		Example: "  monotel dlq stats\n  monotel dlq stats --output json",
		Args:    noArgs,
		RunE: c.runs(func(ctx context.Context, _ []string) error {
			return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
				s, err := desk.Stats(ctx)
				if err != nil {
					return err
				}
				return c.printStats(s)
			})
		}),
	}
}

func (c *cli) printStats(s *triage.Stats) error {
	if c.output != outputTable {
		return c.writeJSON(viewStats(s))
	}
	t := c.table(c.out, "STREAM "+s.Stream, "")
	for _, state := range dlq.States() {
		_ = t.row(styled(stateStyle(state), string(state)), number(s.States[state]))
	}
	usage := size(int64(s.Bytes)) //nolint:gosec // no stream is that large
	if s.MaxBytes > 0 {
		usage += fmt.Sprintf(" of %s, %.1f%%", size(s.MaxBytes), 100*float64(s.Bytes)/float64(s.MaxBytes))
	}
	_ = t.row(plain("size"), plain(usage))
	if s.Oldest != nil && s.Newest != nil {
		_ = t.row(plain("oldest open"), plain(s.Oldest.ID+", "+c.age(s.Oldest.Failed)))
		_ = t.row(plain("newest open"), plain(s.Newest.ID+", "+c.age(s.Newest.Failed)))
	}
	if s.Unreadable > 0 {
		_ = t.row(styled(styleWarn, "no dead letters"), number(s.Unreadable))
	}
	if err := t.flush(); err != nil {
		return err
	}
	if err := countTable(c, "OPEN BY REASON", s.Reasons, s.OtherReasons); err != nil {
		return err
	}
	return countTable(c, "OPEN BY CONSUMER", s.Consumers, s.OtherConsumers)
}

// countTable prints counts, the largest first, and what is left out.
func countTable[K ~string](c *cli, title string, counts map[K]int, others triage.Others) error {
	if len(counts) == 0 {
		return nil
	}
	if err := c.write([]byte("\n")); err != nil {
		return err
	}
	t := c.table(c.out, title, "COUNT")
	for _, k := range byCount(counts) {
		_ = t.row(plain(string(k)), number(counts[k]))
	}
	if others.Count > 0 {
		_ = t.row(plain(fmt.Sprintf("(%s more)", count(others.Count))), number(others.Open))
	}
	return t.flush()
}

func byCount[K ~string](counts map[K]int) []K {
	return slices.SortedFunc(maps.Keys(counts), func(a, b K) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
}

func (c *cli) tail() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "tail",
		Short: "Print new dead letters and changes as they come",
		Long: "Print new dead letters and changes as they come, until it is interrupted.\n" +
			"With --output json, too, each is on a line of its own.",
		Example: "  monotel dlq tail\n  monotel dlq tail --from 1 --output ndjson",
		Args:    noArgs,
	}
	from := cmd.Flags().Uint64("from", 0, "begin with message `N` of the dead-letter stream (default: what comes from now on)")
	limit := cmd.Flags().Int("limit", 0, "end after `N` of them (default: never)")
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		if *limit < 0 {
			return usagef("--limit %d: want 0 for no end, or more", *limit)
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			return c.follow(ctx, desk.Tail(ctx, *from), *limit)
		})
	})
	return cmd
}

func (c *cli) follow(ctx context.Context, events iter.Seq2[triage.Event, error], limit int) error {
	n := 0
	for ev, err := range events {
		switch {
		case ctx.Err() != nil: // see below
			continue
		case ev.Record == nil && ev.Change == nil && errors.Is(err, dlq.ErrNotARecord):
			c.warn("%v", err)
			continue
		case ev.Record == nil && ev.Change == nil:
			return err
		}
		if err := c.printEvent(ev); err != nil {
			return err
		}
		n++
		if n == limit {
			return nil
		}
	}
	if errors.Is(context.Cause(ctx), errRefused) {
		return errRefused
	}
	return nil // to be interrupted is how it is ended
}

func (c *cli) printEvent(ev triage.Event) error {
	if c.output != outputTable {
		b, err := encode(viewEvent(ev), false)
		if err != nil {
			return err
		}
		return c.write(b)
	}
	const clock = "2006-01-02T15:04:05Z"
	at, what, style, text := "", "captured", styleBad, ""
	if r := ev.Record; r != nil {
		at = r.Failed.UTC().Format(clock)
		text = fmt.Sprintf("%s/%s  %s  %s", r.Stream, r.Consumer, r.Reason, firstLine(r))
	}
	if ch := ev.Change; ch != nil {
		at, what, style = ch.Time.UTC().Format(clock), string(ch.Kind), stateStyle(ch.To())
		parts := []string{"by " + ch.Actor}
		if ch.Operation != "" {
			parts = append(parts, "operation "+ch.Operation)
		}
		if ch.Failure != nil {
			parts = append(parts, firstLine(ch.Failure))
		}
		if ch.Reason != "" {
			parts = append(parts, ch.Reason)
		}
		text = strings.Join(parts, "  ")
	}
	line := fmt.Sprintf("%s  %s  ", safe.Line(at), safe.Line(ev.ID))
	const widest = len("failed_again")
	word := fmt.Sprintf("%-*s", widest, safe.Line(what))
	text = safe.Line(text)
	if width, ok := c.tty(c.out); ok {
		text = cut(text, width-lipgloss.Width(line)-lipgloss.Width(word)-2)
	}
	return c.write([]byte(line + c.paint(c.out, style, word) + "  " + text + "\n"))
}
