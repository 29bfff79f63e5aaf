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

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
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

// dryRun prints a plan, and stores it if it can be run, so that the plan can be executed
// exactly. Where nothing may be changed it is only printed.
func (c *cli) dryRun(ctx context.Context, desk *triage.Desk, p *triage.Plan, diffs bool) error {
	runs := p.Selected > 0 && len(p.Problems) == 0
	command := ""
	if runs && !c.readOnly {
		err := desk.StorePlan(ctx, p)
		if err != nil && !errors.Is(context.Cause(ctx), errRefused) {
			return err
		}
		if err == nil {
			command = c.commandLine("dlq", "replay", "--plan", p.ID)
		}
	}
	if err := c.printDryRun(p, command, diffs); err != nil {
		return err
	}
	if p.Selected > 0 && len(p.Problems) > 0 {
		return errors.New("it cannot be run like this: " + strings.Join(p.Problems, "; "))
	}
	return nil
}

// printDryRun prints a plan and the command that executes it, "" if it is not stored.
func (c *cli) printDryRun(p *triage.Plan, command string, diffs bool) error {
	if c.output != outputTable {
		v := viewPlan(p, diffs)
		v.Command = command
		return c.writeJSON(v)
	}
	if err := c.printPlan(c.out, p, diffs); err != nil {
		return err
	}
	switch {
	case p.Selected == 0 || len(p.Problems) > 0:
	case command == "":
		fmt.Fprintln(c.out, "\nNothing was sent. The plan is not stored: that needs the permission to write, and no --read-only.")
	default:
		fmt.Fprintf(c.out, "\nNothing was sent. To execute this, exactly:\n\n  %s\n", safe.Line(command))
	}
	return nil
}

// printPlan says what a replay would do.
func (c *cli) printPlan(w io.Writer, p *triage.Plan, diffs bool) error {
	if p.Selected == 0 {
		fmt.Fprintln(w, "There is nothing to replay.")
		c.printLeftOut(w, "left out", p.LeftOut)
		return nil
	}
	t := c.table(w, "PLAN "+p.ID, "")
	_ = t.row(plain("what"), plain(plural(p.Selected, "dead letter")+", "+size(p.Bytes)))
	_ = t.row(plain("to"), plain(strings.TrimPrefix(destination(p), "to ")))
	_ = t.row(plain("query"), plain(cmp.Or(p.Query, "-")))
	_ = t.row(plain("oldest"), plain(c.when(p.Oldest)))
	_ = t.row(plain("newest"), plain(c.when(p.Newest)))
	_ = t.row(plain("rate"), plain(pace(p)))
	for _, f := range []struct{ name, value string }{
		{"canary", strings.Trim(strings.ReplaceAll(fmt.Sprint(p.Options.Canary), " ", ", "), "[]")},
		{"stops", stops(p.Options.StopIfFailing)},
		{"patch", map[bool]string{true: "every payload is changed by a JSON merge patch"}[len(p.Options.Patch) > 0]},
		{"force", map[bool]string{true: "also what is being replayed, or was too often: it may be handled twice"}[p.Options.Force]},
		{"reason", p.Options.Reason},
	} {
		if f.value != "" {
			_ = t.row(plain(f.name), plain(f.value))
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	if err := c.printConsumers(w, p.Consumers); err != nil {
		return err
	}
	if err := c.printGroups(w, p.Groups); err != nil {
		return err
	}
	if err := c.printSamples(w, p.Samples); err != nil {
		return err
	}
	if diffs {
		for _, d := range p.Diffs {
			fmt.Fprintf(w, "\n%s", c.diff(w, d.ID, []byte(d.Before), []byte(d.After)))
		}
	}
	c.printLeftOut(w, "left out", p.LeftOut)
	for _, s := range p.Warnings {
		fmt.Fprintf(w, "\n%s %s", c.paint(w, styleWarn, "warning:"), safe.Line(s))
	}
	for _, s := range p.Problems {
		fmt.Fprintf(w, "\n%s %s", c.paint(w, styleBad, "problem:"), safe.Line(s))
	}
	if len(p.Warnings)+len(p.Problems) > 0 {
		fmt.Fprintln(w)
	}
	return nil
}

func (c *cli) printGroups(w io.Writer, groups []triage.Group) error {
	if len(groups) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := c.table(w, "GROUP", "COUNT", "LAST", "CONSUMER", "ERROR")
	for _, g := range groups {
		_ = t.row(plain(g.ID), number(g.Count), plain(c.age(g.Last)), plain(g.Stream+"/"+g.Consumer), plain(g.Title))
	}
	return t.flush()
}

func (c *cli) printSamples(w io.Writer, samples []*dlq.Entry) error {
	if len(samples) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := c.table(w, "SAMPLE", "FAILED", "ERROR")
	for _, e := range samples {
		_ = t.row(plain(e.ID), plain(c.age(latest(e).Failed)), plain(firstLine(latest(e))))
	}
	return t.flush()
}

func (c *cli) printConsumers(w io.Writer, consumers []triage.PlanConsumer) error {
	fmt.Fprintln(w)
	t := c.table(w, "STREAM", "CONSUMER", "COUNT", "FETCHING", "WAITING BEFORE")
	for _, k := range consumers {
		fetching := count(k.Waiting)
		if k.Paused {
			fetching = "paused"
		}
		_ = t.row(plain(k.Stream), plain(k.Consumer), number(k.Count), plain(fetching), number(k.Pending))
	}
	return t.flush()
}

func pace(p *triage.Plan) string {
	text := "no limit"
	if r := p.Options.Rate; r > 0 {
		text = fmt.Sprintf("%.4g a second, for %s", r, span(p.Duration))
	}
	if n := p.Options.MaxInFlight; n > 0 {
		text += fmt.Sprintf(", at most %s in flight", count(n))
	}
	return text
}

func stops(part float64) string {
	if part <= 0 {
		return ""
	}
	return fmt.Sprintf("when more than %.4g%% failed again", 100*part)
}

func (c *cli) printLeftOut(w io.Writer, name string, counts map[string]int) {
	for _, why := range byCount(counts) {
		fmt.Fprintf(w, "\n%s %s: %s", name, count(counts[why]), safe.Line(why))
	}
	if len(counts) > 0 {
		fmt.Fprintln(w)
	}
}

// Views for scripts.

type planView struct {
	Plan            string         `json:"plan"`
	CreatedAt       time.Time      `json:"created_at,omitzero"`
	By              string         `json:"by"`
	Target          string         `json:"target"`
	Rate            float64        `json:"rate"` // a second, 0 without limit
	MaxInFlight     int            `json:"max_in_flight"`
	Canary          []int          `json:"canary"`
	StopIfFailing   float64        `json:"stop_if_failing"`
	Patched         bool           `json:"patched"`
	Reason          string         `json:"reason,omitempty"`
	MaxReplays      int            `json:"max_replays"`
	Force           bool           `json:"force"`
	Query           string         `json:"query,omitempty"`
	Group           string         `json:"group,omitempty"`
	Upto            uint64         `json:"upto"`
	Selected        int            `json:"selected"`
	Bytes           int64          `json:"bytes"`
	OldestAt        time.Time      `json:"oldest_at,omitzero"`
	NewestAt        time.Time      `json:"newest_at,omitzero"`
	DurationSeconds float64        `json:"duration_seconds"`
	Groups          []groupView    `json:"groups"`
	Consumers       []consumerView `json:"consumers"`
	LeftOut         map[string]int `json:"left_out"`
	Warnings        []string       `json:"warnings"`
	Problems        []string       `json:"problems"`
	Samples         []sampleView   `json:"samples"`
	Diffs           []diffView     `json:"diffs,omitempty"` // parts of payloads
	Command         string         `json:"command,omitempty"`
}

type consumerView struct {
	Stream   string `json:"stream"`
	Consumer string `json:"consumer"`
	Count    int    `json:"count"`
	Paused   bool   `json:"paused"`
	Waiting  int    `json:"waiting"`
	Pending  uint64 `json:"pending"`
}

type sampleView struct {
	ID       string    `json:"id"`
	FailedAt time.Time `json:"failed_at,omitzero"`
	Error    string    `json:"error"`
}

type diffView struct {
	ID     string `json:"id"`
	Before string `json:"before"`
	After  string `json:"after"`
}

func viewPlan(p *triage.Plan, diffs bool) planView {
	o := &p.Options
	v := planView{
		Plan: p.ID, CreatedAt: p.Created, By: p.Actor, Target: o.Target, Rate: o.Rate, MaxInFlight: o.MaxInFlight,
		Canary:        orEmpty(o.Canary),
		StopIfFailing: max(o.StopIfFailing, 0), Patched: len(o.Patch) > 0, Reason: o.Reason, MaxReplays: o.MaxReplays, Force: o.Force,
		Query: p.Query, Group: p.Group, Upto: p.Upto, Selected: p.Selected, Bytes: p.Bytes, OldestAt: p.Oldest, NewestAt: p.Newest,
		DurationSeconds: p.Duration.Seconds(), Groups: []groupView{}, Consumers: []consumerView{}, LeftOut: orEmptyMap(p.LeftOut),
		Warnings: orEmpty(p.Warnings), Problems: orEmpty(p.Problems), Samples: []sampleView{},
	}
	for _, g := range p.Groups {
		v.Groups = append(v.Groups, viewGroup(g))
	}
	for _, k := range p.Consumers {
		v.Consumers = append(v.Consumers, consumerView(k))
	}
	for _, e := range p.Samples {
		v.Samples = append(v.Samples, sampleView{ID: e.ID, FailedAt: latest(e).Failed, Error: latest(e).Error})
	}
	if diffs {
		for _, d := range p.Diffs {
			v.Diffs = append(v.Diffs, diffView(d))
		}
	}
	return v
}

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
