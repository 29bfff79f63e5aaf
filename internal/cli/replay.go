package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq/triage"
)

const replayHelp = `Have dead letters handled again. It deletes nothing: a dead letter is replaying,
then resolved, or open again if it failed again.

--dry-run says what would be done, and stores that as a plan; --plan executes a
plan, exactly. Without either, the plan is shown, and you are asked.

--to says who gets the messages:
  consumer     the consumer that failed, alone (default). It says what comes of them
  everyone     the original subject: every consumer of it gets them again, also
               those that have handled them
  subject=S    subject S

Interrupted once (Ctrl-C), it pauses; twice, it ends at once. Both can be resumed
by 'monotel dlq ops resume ID'.

Exit codes: 0 all were sent and none is known to have failed again, 1 it failed,
2 wrong usage, and nothing was changed, 3 some failed again, were skipped or are
not sent yet.`

// replayFlags say how to replay, as text.
type replayFlags struct {
	rate, canary, stop, to, patch, reason string
	inFlight, maxReplays                  int
	force                                 bool
}

func (r *replayFlags) register(cmd *cobra.Command, c *cli) {
	f := cmd.Flags()
	f.StringVar(&r.rate, "rate", "", "send no more than `RATE`: 100/s, 6000/m or 5000/h (default: no limit)")
	f.IntVar(&r.inFlight, "max-in-flight", 0, "no more than `N` sent and without an outcome (default: no limit)")
	f.StringVar(&r.canary, "canary", "", "first `N`, then N, each time waiting for the outcomes, then the rest: 1,5,20")
	f.StringVar(&r.stop, "stop-if-failing", "", "stop when more than this `PART` failed again: 10%, or never (default 10% with --canary, else never)")
	f.StringVar(&r.to, "to", triage.TargetConsumer, "`WHOM`: consumer, everyone or subject=S, see above")
	f.StringVar(&r.patch, "patch", "", "`FILE` with a JSON merge patch for every payload; - is standard input")
	f.StringVar(&r.reason, "reason", "", "`TEXT` for the history: why")
	f.IntVar(&r.maxReplays, "max-replays", 0, "leave out what was replayed `N` times before (default 5)")
	f.BoolVar(&r.force, "force", false, "also what was replayed more often, or is being replayed: it may be handled twice")
	c.complete(cmd, "to", func(context.Context, string) []string {
		return []string{triage.TargetConsumer, triage.TargetEveryone, triage.TargetSubject}
	})
	for _, name := range []string{"rate", "max-in-flight", "canary", "stop-if-failing", "reason", "max-replays"} {
		c.complete(cmd, name, nil)
	}
}

// planFlags are those that mean nothing with --plan, where all is decided.
var planFlags = []string{
	"rate", "max-in-flight", "canary", "stop-if-failing", "to", "patch", "reason", "max-replays", "force",
	"where", "group", "id", "state", "limit", "all", "dry-run", "show-diffs",
}

func (c *cli) replay() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "replay [ID...]",
		Short: "Have dead letters handled again",
		Long:  replayHelp,
		Example: "  monotel dlq replay --group 3f2a --canary 1,5,20 --rate 100/s --dry-run\n" +
			"  monotel dlq replay --plan 20260102-150405-abcde\n" +
			"  monotel dlq replay --id 5d3kq7 --reason 'billing is back' --yes\n" +
			"  monotel dlq replay --where 'reason == \"undecodable\"' --patch fix.json --dry-run --show-diffs",
		ValidArgsFunction: c.completeArgs(c.deadLetterIDs, 0),
	}
	var s selection
	s.register(cmd, c, true)
	var r replayFlags
	r.register(cmd, c)
	f := cmd.Flags()
	dryRun := f.Bool("dry-run", false, "only say what would be done")
	showDiffs := f.Bool("show-diffs", false, "show what --patch does to samples, which prints parts of payloads")
	plan := f.String("plan", "", "execute the plan with this `ID`")
	noWait := f.Bool("no-wait", false, "end when everything is sent, without the outcomes")
	yes := f.BoolP("yes", "y", false, "do not ask")
	c.complete(cmd, "plan", c.operationIDs)
	for _, name := range planFlags {
		cmd.MarkFlagsMutuallyExclusive("plan", name)
	}
	cmd.MarkFlagsMutuallyExclusive("dry-run", "yes")
	cmd.MarkFlagsMutuallyExclusive("dry-run", "no-wait")
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		if !*dryRun {
			if err := c.mayChange(); err != nil {
				return err
			}
		}
		if *plan != "" {
			if len(args) > 0 {
				return usagef("--plan has its dead letters already: leave out the IDs")
			}
			if err := c.mayAsk(*yes); err != nil {
				return err
			}
			return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
				o, err := desk.Operation(ctx, *plan)
				if err != nil {
					return err
				}
				return c.execute(ctx, desk, &o.Plan, true, *yes, *noWait)
			})
		}
		if err := s.check(args); err != nil {
			return err
		}
		if !*dryRun {
			if err := c.mayAsk(*yes); err != nil {
				return err
			}
		}
		sel, err := s.parse(c, args)
		if err != nil {
			return err
		}
		o, err := r.options(c)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			p, err := desk.DryRun(ctx, sel, o)
			if err != nil {
				return err
			}
			if *dryRun {
				return c.dryRun(ctx, desk, p, *showDiffs)
			}
			return c.execute(ctx, desk, p, false, *yes, *noWait)
		})
	})
	return cmd
}

// options checks the flags, every one.
func (r *replayFlags) options(c *cli) (o triage.Options, err error) {
	var errs []error
	o = triage.Options{Target: r.to, MaxInFlight: r.inFlight, Reason: r.reason, MaxReplays: r.maxReplays, Force: r.force}
	if o.Rate, err = parseRate(r.rate); err != nil {
		errs = append(errs, err)
	}
	if o.Canary, err = parseCanary(r.canary); err != nil {
		errs = append(errs, err)
	}
	if o.StopIfFailing, err = parsePart(r.stop); err != nil {
		errs = append(errs, err)
	}
	subject, toSubject := strings.CutPrefix(r.to, triage.TargetSubject)
	if r.to != triage.TargetConsumer && r.to != triage.TargetEveryone && !(toSubject && subject != "") {
		errs = append(errs, fmt.Errorf("--to %s: want consumer, everyone or subject=S", r.to))
	}
	if r.inFlight < 0 {
		errs = append(errs, fmt.Errorf("--max-in-flight %d: want 1 or more", r.inFlight))
	}
	if r.maxReplays < 0 {
		errs = append(errs, fmt.Errorf("--max-replays %d: want 1 or more", r.maxReplays))
	}
	if r.patch != "" {
		if o.Patch, err = c.readPatch(r.patch); err != nil {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return o, usageError{err}
	}
	return o, nil
}

// parseRate reads messages a second.
func parseRate(s string) (float64, error) {
	if s == "" {
		return 0, nil
	}
	text, unit, _ := strings.Cut(s, "/")
	seconds, ok := map[string]float64{"": 1, "s": 1, "m": 60, "h": 3600}[unit]
	n, err := strconv.ParseFloat(text, 64)
	const least = 1. / (24 * 60 * 60) // one a day; much less would be no limit, as 0 is
	if err != nil || !ok || !(n/seconds >= least) || math.IsInf(n, 0) || strings.HasSuffix(s, "/") {
		return 0, fmt.Errorf("--rate %s: want a number of messages a second, minute or hour, such as 100/s, 6000/m or 5000/h", s)
	}
	return n / seconds, nil
}

func parseCanary(s string) ([]int, error) {
	if s == "" {
		return nil, nil
	}
	var steps []int
	for text := range strings.SplitSeq(s, ",") {
		n, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil || n < 1 {
			return nil, fmt.Errorf("--canary %s: want numbers of messages, such as 1,5,20", s)
		}
		steps = append(steps, n)
	}
	return steps, nil
}

// parsePart reads "10%" or "0.1".
func parsePart(s string) (float64, error) {
	switch s {
	case "":
		return 0, nil
	case "never":
		return -1, nil
	}
	text, percent := strings.CutSuffix(s, "%")
	n, err := strconv.ParseFloat(text, 64)
	if percent {
		n /= 100
	}
	if err != nil || !(n > 0 && n <= 1) {
		return 0, fmt.Errorf("--stop-if-failing %s: want more than 0%% and at most 100%%, such as 10%%, or never", s)
	}
	return n, nil
}

// readPatch reads a JSON merge patch.
func (c *cli) readPatch(name string) (json.RawMessage, error) {
	b, err := c.readFile(name)
	if err != nil {
		return nil, fmt.Errorf("--patch: %w", err)
	}
	var object map[string]json.RawMessage
	if err := json.Unmarshal(b, &object); err != nil || object == nil {
		return nil, fmt.Errorf("--patch %s: want a JSON object, see RFC 7396", name)
	}
	return b, nil
}

// readFile reads a file, or the standard input for "-".
func (c *cli) readFile(name string) ([]byte, error) {
	if name == "-" {
		return io.ReadAll(c.in)
	}
	return os.ReadFile(name) //nolint:gosec // it is the user's
}

// execute asks, and runs a plan or goes on with an operation.
// A plan that is not stored yet is stored when the answer is yes.
func (c *cli) execute(ctx context.Context, desk *triage.Desk, p *triage.Plan, stored, yes, noWait bool) error {
	if p.Selected == 0 {
		if c.output != outputTable {
			return c.writeJSON(viewPlan(p, false))
		}
		return c.printPlan(c.err, p, false)
	}
	if !c.quiet || !yes {
		if err := c.printPlan(c.err, p, false); err != nil {
			return err
		}
		fmt.Fprintln(c.err)
	}
	if len(p.Problems) > 0 {
		return fmt.Errorf("plan %s cannot be run: %s", p.ID, strings.Join(p.Problems, "; "))
	}
	if err := c.confirm(ctx, yes, "Replay "+plural(p.Selected, "dead letter")+" "+destination(p)+"?"); err != nil {
		return err
	}
	if !stored {
		if err := desk.StorePlan(ctx, p); err != nil {
			return err
		}
	}
	return c.runOperation(ctx, desk, p.ID, noWait)
}

// destination says who gets the messages.
func destination(p *triage.Plan) string {
	switch subject, toSubject := strings.CutPrefix(p.Options.Target, triage.TargetSubject); {
	case toSubject:
		return "to every consumer of subject " + subject
	case p.Options.Target == triage.TargetEveryone:
		return "to every consumer of the original subjects"
	case len(p.Consumers) == 1:
		return fmt.Sprintf("to consumer %s of stream %s", p.Consumers[0].Consumer, p.Consumers[0].Stream)
	}
	return fmt.Sprintf("to the %d consumers that failed, each its own", len(p.Consumers))
}

// runOperation runs it and says what has come of it.
func (c *cli) runOperation(ctx context.Context, desk *triage.Desk, id string, noWait bool) error {
	running, enough := context.WithCancel(ctx)
	defer enough()
	bar := c.progress("messages")
	o, err := desk.Run(running, id, func(o *triage.Operation) {
		bar.set(o.Selected-o.Remaining, o.Selected, progressText(o))
		if noWait && o.Status == triage.StatusDone {
			enough()
		}
	})
	bar.end()
	if o == nil {
		return err
	}
	if err := c.printOutcome(o); err != nil {
		return err
	}
	return c.judge(ctx, o, err)
}

func progressText(o *triage.Operation) string {
	parts := []string{}
	add := func(n int, what string) {
		if n > 0 {
			parts = append(parts, count(n)+" "+what)
		}
	}
	add(o.Resolved, "resolved")
	add(o.FailedAgain, "failed again")
	add(o.Sent, "sent")
	add(o.InFlight(), "in flight")
	return strings.Join(parts, ", ")
}

// judge says how the operation has ended, by the exit code too.
func (c *cli) judge(ctx context.Context, o *triage.Operation, err error) error {
	resume := c.commandLine("dlq", "ops", "resume", o.ID)
	why := cmp.Or(o.Why, "it was interrupted")
	switch {
	case o.Status != triage.StatusDone && o.Claimed == 0 && errors.Is(context.Cause(ctx), errRefused):
		return errRefused
	case o.Status != triage.StatusDone && o.Claimed == 0 && err != nil && ctx.Err() == nil:
		return err
	case o.Status == triage.StatusStopped:
		return partlyf("operation %s has stopped itself: %s; %s not tried.\nSee which with '%s', or --remaining; "+
			"go on in spite of it with '%s'", o.ID, why, plural(o.Remaining, "dead letter"),
			c.commandLine("dlq", "ops", "show", o.ID, "--tried"), resume)
	case o.Status == triage.StatusCancelled:
		return partlyf("operation %s is cancelled: %s; %s not tried", o.ID, why, plural(o.Remaining, "dead letter"))
	case o.Status != triage.StatusDone:
		return partlyf("operation %s is paused: %s; %s not tried.\nGo on with '%s'", o.ID, why, plural(o.Remaining, "dead letter"), resume)
	case err != nil && !errors.Is(err, context.Canceled):
		return partlyError{err}
	case o.FailedAgain > 0:
		return partlyf("%s failed again; 'monotel dlq groups' says why", plural(o.FailedAgain, "dead letter"))
	case skipped(o) > 0:
		return partlyf("%s skipped", plural(skipped(o), "dead letter"))
	}
	return nil
}

func skipped(o *triage.Operation) int {
	n := 0
	for _, k := range o.Skipped {
		n += k
	}
	return n
}

// printOutcome is what a replay prints at its end.
func (c *cli) printOutcome(o *triage.Operation) error {
	if c.output != outputTable {
		return c.writeJSON(viewOperation(o))
	}
	t := c.table(c.out, "OPERATION "+o.ID, string(o.Status))
	for _, r := range c.numbers(o) {
		_ = t.row(r...)
	}
	if o.InFlight() > 0 {
		_ = t.row(plain("outcomes"), plain(c.commandLine("dlq", "ops", "show", o.ID)))
	}
	return t.flush()
}

func (c *cli) numbers(o *triage.Operation) [][]cell {
	rows := [][]cell{{plain("selected"), number(o.Selected)}, {plain("sent"), number(o.Claimed - o.Released)}}
	add := func(name string, n int, always bool) {
		if n > 0 || always {
			rows = append(rows, []cell{plain(name), number(n)})
		}
	}
	tracked := o.Options.Target == triage.TargetConsumer
	add("resolved", o.Resolved, tracked)
	add("failed again", o.FailedAgain, tracked)
	add("in flight", o.InFlight(), tracked)
	add("given back", o.Released, false)
	for _, why := range byCount(o.Skipped) {
		rows = append(rows, []cell{plain("skipped"), plain(count(o.Skipped[why]) + ": " + why)})
	}
	add("remaining", o.Remaining, true)
	add("new since", o.NewSince, false)
	return rows
}

// Views for scripts.

type operationView struct {
	Operation   string         `json:"operation"`
	Status      triage.Status  `json:"status"`
	Interrupted bool           `json:"interrupted"`
	Why         string         `json:"why,omitempty"`
	Runner      string         `json:"runner,omitempty"`
	StartedAt   time.Time      `json:"started_at,omitzero"`
	EndedAt     time.Time      `json:"ended_at,omitzero"`
	Sent        int            `json:"sent"`
	Resolved    int            `json:"resolved"`
	FailedAgain int            `json:"failed_again"`
	InFlight    int            `json:"in_flight"`
	Released    int            `json:"released"`
	Skipped     map[string]int `json:"skipped"`
	Remaining   int            `json:"remaining"`
	NewSince    int            `json:"new_since"`
	Plan        planView       `json:"plan"`
}

func viewOperation(o *triage.Operation) operationView {
	return operationView{
		Operation: o.ID, Status: o.Status, Interrupted: o.Interrupted(), Why: o.Why, Runner: o.Runner,
		StartedAt: o.Started, EndedAt: o.Ended,
		Sent: o.Claimed - o.Released, Resolved: o.Resolved, FailedAgain: o.FailedAgain, InFlight: o.InFlight(), Released: o.Released,
		Skipped: orEmptyMap(o.Skipped), Remaining: o.Remaining, NewSince: o.NewSince, Plan: viewPlan(&o.Plan, false),
	}
}
