package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// An action is something that is done to each of many dead letters.
type action struct {
	name, done  string // "discard", "discarded"
	short, long string
	states      []dlq.State // that are meant by default
	do          func(*triage.Desk, context.Context, *dlq.Entry, string) error
}

func (c *cli) discard() *cobra.Command {
	return c.change(action{
		name: "discard", done: "discarded", short: "Throw dead letters away",
		long: "Throw dead letters away. That cannot be undone: what is left is that there was\n" +
			"one, who has discarded it, when and why. 'archive' puts aside what may be wanted.",
		states: []dlq.State{dlq.StateOpen}, do: (*triage.Desk).Discard,
	})
}

func (c *cli) archive() *cobra.Command {
	return c.change(action{
		name: "archive", done: "archived", short: "Put dead letters aside",
		long:   "Put dead letters aside. 'restore' takes them back.",
		states: []dlq.State{dlq.StateOpen}, do: (*triage.Desk).Archive,
	})
}

func (c *cli) restore() *cobra.Command {
	return c.change(action{
		name: "restore", done: "restored", short: "Open dead letters again that are archived, resolved or sent",
		long:   "Open dead letters again that are archived, resolved or sent.",
		states: []dlq.State{dlq.StateArchived}, do: (*triage.Desk).Restore,
	})
}

func (c *cli) change(a action) *cobra.Command {
	cmd := &cobra.Command{
		Use: a.name + " [ID...]", Short: a.short, Long: a.long,
		Example: "  monotel dlq " + a.name + " 5d3kq7 --reason 'a test of ours'\n" +
			"  monotel dlq " + a.name + " --group 3f2a --dry-run\n" +
			"  monotel dlq " + a.name + " --where 'age > duration(\"720h\")' --yes",
		ValidArgsFunction: c.completeArgs(c.deadLetterIDs, 0),
	}
	s := selection{usual: a.states}
	s.register(cmd, c, true)
	var h hand
	h.register(cmd, c)
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		if err := s.check(args); err != nil {
			return err
		}
		if err := h.check(c); err != nil {
			return err
		}
		sel, err := s.parse(c, args)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			all, err := collect(ctx, c, desk, sel, false)
			if err != nil {
				return err
			}
			if h.dryRun {
				return c.listEntries(inMemory(all), false, "")
			}
			question := fmt.Sprintf("%s%s %s?", strings.ToUpper(a.name[:1]), a.name[1:], plural(len(all), "dead letter"))
			if err := c.confirmMany(ctx, desk, all, h.yes, question); err != nil {
				return err
			}
			return c.each(ctx, all, a.done, func(ctx context.Context, e *dlq.Entry) error {
				return a.do(desk, ctx, e, h.reason)
			})
		})
	})
	return cmd
}

func inMemory(all []*dlq.Entry) func(yield func(*dlq.Entry, error) bool) {
	return func(yield func(*dlq.Entry, error) bool) {
		for _, e := range all {
			if !yield(e, nil) {
				return
			}
		}
	}
}

// A hand is the flags of what changes many dead letters.
type hand struct {
	reason      string
	yes, dryRun bool
}

func (h *hand) register(cmd *cobra.Command, c *cli) {
	f := cmd.Flags()
	f.StringVar(&h.reason, "reason", "", "`TEXT` for the history: why")
	f.BoolVarP(&h.yes, "yes", "y", false, "do not ask")
	f.BoolVar(&h.dryRun, "dry-run", false, "only say which, or what would be done")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "yes")
	c.complete(cmd, "reason", nil)
}

// check finds, before anything is done, whether there is somebody to ask.
func (h *hand) check(c *cli) error {
	if h.dryRun {
		return nil
	}
	if err := c.mayChange(); err != nil {
		return err
	}
	return c.mayAsk(h.yes)
}

// confirmMany shows the groups of what is to be changed, and samples, and asks.
func (c *cli) confirmMany(ctx context.Context, desk *triage.Desk, all []*dlq.Entry, yes bool, question string) error {
	const samples = 5
	if yes || len(all) == 0 {
		return nil
	}
	if err := c.printGroups(c.err, desk.GroupsOf(all)); err != nil {
		return err
	}
	if err := c.printSamples(c.err, all[:min(len(all), samples)]); err != nil {
		return err
	}
	fmt.Fprintln(c.err)
	return c.confirm(ctx, yes, question)
}

type changedView struct {
	Changed int          `json:"changed"`
	Failed  []failedView `json:"failed"`
	Left    int          `json:"left"` // not tried, as it was interrupted
}

type failedView struct {
	ID    string `json:"id"`
	Error string `json:"error"`
}

// errUnchanged is for what need not be done to an entry.
var errUnchanged = errors.New("nothing to change")

// eachAtOnce is how many entries are changed at a time.
const eachAtOnce = 8

// each does it to every entry, to several at a time. One that fails does not keep it from
// the others.
func (c *cli) each(ctx context.Context, all []*dlq.Entry, done string, do func(context.Context, *dlq.Entry) error) error {
	if len(all) == 0 {
		c.remark("There are none.")
		return c.summary(changedView{Failed: []failedView{}}, done, 0)
	}
	v := changedView{Failed: []failedView{}}
	var only error
	unchanged := 0
	errs := c.eachError(ctx, all, do)
	v.Left = len(all) - len(errs)
	for i, err := range errs {
		switch {
		case errors.Is(err, errUnchanged):
			unchanged++
		case err != nil:
			only = err
			v.Failed = append(v.Failed, failedView{ID: all[i].ID, Error: err.Error()})
		default:
			v.Changed++
		}
	}
	if v.Changed == 0 && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err := c.summary(v, done, unchanged); err != nil {
		return err
	}
	switch failed := len(v.Failed); {
	case v.Left > 0:
		return partlyf("interrupted: %s %s, %s not tried", count(v.Changed), done, count(v.Left))
	case failed == 0:
		return nil
	case failed == len(all) && failed == 1:
		return only
	case failed == len(all):
		return fmt.Errorf("none of %s was %s", plural(failed, "dead letter"), done)
	}
	return partlyf("%s could not be %s", plural(len(v.Failed), "dead letter"), done)
}

// eachError does it to every entry, and returns the errors of those that were tried before
// ctx ended, which are the first ones.
func (c *cli) eachError(ctx context.Context, all []*dlq.Entry, do func(context.Context, *dlq.Entry) error) []error {
	errs := make([]error, len(all))
	var mu sync.Mutex
	begun, done := 0, 0
	bar := c.progress("dead letters")
	defer bar.end()
	next := func() (i int, ok bool) {
		mu.Lock()
		defer mu.Unlock()
		if ctx.Err() != nil || begun == len(all) {
			return 0, false
		}
		begun++
		return begun - 1, true
	}
	var workers sync.WaitGroup
	for range min(eachAtOnce, len(all)) {
		workers.Go(func() {
			for i, ok := next(); ok; i, ok = next() {
				errs[i] = do(ctx, all[i])
				mu.Lock()
				done++
				bar.set(done, len(all), "")
				mu.Unlock()
			}
		})
	}
	workers.Wait()
	return errs[:begun]
}

// summary says which could not be changed. One alone is the error of the command.
func (c *cli) summary(v changedView, done string, unchanged int) error {
	if c.output != outputTable {
		return c.writeJSON(v)
	}
	if v.Changed+unchanged+v.Left > 0 || len(v.Failed) > 1 {
		for _, f := range v.Failed {
			fmt.Fprintf(c.err, "%s\n", safe.Line(f.Error))
		}
	}
	if v.Changed > 0 {
		c.remark("%s %s", plural(v.Changed, "dead letter"), done)
	}
	if unchanged > 0 {
		c.remark("%s as before", plural(unchanged, "dead letter"))
	}
	return nil
}
