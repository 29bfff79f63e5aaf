package triage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/jsontext"
)

const samples = 5

// Plan is [Desk.DryRun], and stores the plan if it can be run, see [Desk.StorePlan].
func (d *Desk) Plan(ctx context.Context, sel Selection, o Options) (*Plan, error) {
	p, err := d.DryRun(ctx, sel, o)
	if err != nil || p.Selected == 0 || len(p.Problems) > 0 {
		return p, err
	}
	return p, d.StorePlan(ctx, p)
}

// DryRun freezes a selection and says what a replay would do with it. It sends and
// stores nothing, and needs the permission to read only.
//
// Options that make no sense are an [ErrInvalid]. What keeps the plan from being
// run, such as a consumer that is gone, is in its Problems.
func (d *Desk) DryRun(ctx context.Context, sel Selection, o Options) (*Plan, error) {
	if err := o.withDefaults(); err != nil {
		return nil, err
	}
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	if sel.Upto == 0 {
		sel.Upto = info.State.LastSeq
	}
	p := &Plan{
		Created: time.Now(), Actor: d.cfg.Actor, Options: o, Group: strings.Join(sel.Groups, ","), Upto: sel.Upto,
		LeftOut: make(map[string]int),
	}
	p.ID = newID(p.Created)
	if sel.Where != nil {
		p.Query = sel.Where.Text()
	}
	pl := &planner{
		d: d, p: p, consumers: make(map[[2]string]*PlanConsumer), groups: newGrouper(d.cfg.Fingerprint), owners: newOwners(d),
	}
	for e, err := range d.Entries(ctx, sel, len(o.Patch) > 0) {
		switch {
		case e == nil && isNotARecord(err):
			continue
		case e == nil:
			return nil, err
		case errors.Is(err, errMisplaced):
			pl.leave(errMisplaced.Error())
			continue
		case err != nil:
			pl.leave("it cannot be read whole")
			continue
		}
		if err := pl.add(ctx, e); err != nil {
			return nil, err
		}
	}
	if err := pl.finish(ctx); err != nil {
		return nil, err
	}
	// Oldest first. The order of IDs is anybody's.
	slices.SortFunc(pl.items, func(a, b item) int { return cmp.Compare(a.sequence, b.sequence) })
	p.items = pl.items
	return p, nil
}

// StorePlan stores a plan of [Desk.DryRun], so that [Desk.Run] can run it by its ID, in
// another process too, within a day. A plan that selects nothing, that has problems, or
// that comes from elsewhere is an [ErrInvalid]. To store a plan again does nothing.
func (d *Desk) StorePlan(ctx context.Context, p *Plan) error {
	switch {
	case p.stored:
		return nil
	case len(p.Problems) > 0:
		return fmt.Errorf("%w: plan %s cannot be run: %s", ErrInvalid, p.ID, strings.Join(p.Problems, "; "))
	case len(p.items) == 0 || len(p.items) != p.Selected:
		return fmt.Errorf("%w: plan %s selects nothing", ErrInvalid, p.ID)
	}
	if err := d.changes(); err != nil {
		return err
	}
	if err := d.save(ctx, p, p.items); err != nil {
		return err
	}
	p.stored = true
	return d.tidy(ctx)
}

// A planner makes a plan of entries.
type planner struct {
	d         *Desk
	p         *Plan
	items     []item
	consumers map[[2]string]*PlanConsumer
	groups    *grouper
	unpatched []string // IDs of entries that the patch does not apply to
	replaying int      // taken although they are on their way
	owners    *owners
	newest    []*dlq.Entry // to be compared with their messages
}

// leave counts an entry that is left out. Records choose some of the reasons, so there
// is a limit to how many are told apart.
func (pl *planner) leave(why string) {
	const most = 100
	if _, ok := pl.p.LeftOut[why]; !ok && len(pl.p.LeftOut) >= most {
		why = "other reasons"
	}
	pl.p.LeftOut[why]++
}

func (pl *planner) add(ctx context.Context, e *dlq.Entry) error {
	p := pl.p
	why := pl.leaveOut(e)
	if why == "" && p.Options.Target == TargetEveryone {
		var err error
		if _, why, err = pl.owners.of(ctx, e.Record); err != nil {
			return err
		}
	}
	if why != "" {
		pl.leave(why)
		return nil
	}
	var after []byte
	if len(p.Options.Patch) > 0 {
		var err error
		if after, err = Patch(e.Data, p.Options.Patch); err != nil {
			pl.unpatched = append(pl.unpatched, e.ID)
			return nil //nolint:nilerr // it is a problem of the plan
		}
	}
	p.Selected++
	p.Bytes += int64(e.BodySize)
	if p.Oldest.IsZero() || e.Failure.Failed.Before(p.Oldest) {
		p.Oldest = e.Failure.Failed
	}
	if e.Failure.Failed.After(p.Newest) {
		p.Newest = e.Failure.Failed
	}
	if e.State == dlq.StateReplaying {
		pl.replaying++
	}
	pl.groups.add(e)
	key := [2]string{e.Stream, e.Consumer}
	if pl.consumers[key] == nil {
		pl.consumers[key] = &PlanConsumer{Stream: e.Stream, Consumer: e.Consumer}
	}
	pl.consumers[key].Count++
	pl.items = append(pl.items, item{e.Sequence, e.Last, e.RevisionSequence})
	if len(pl.newest) < compared {
		r := *e.Record
		r.Data, r.Header = nil, nil
		pl.newest = append(pl.newest, dlq.NewEntry(&r, e.Sequence, nil))
	}
	if len(p.Samples) < samples {
		sample, r := *e, *e.Record
		if after != nil {
			p.Diffs = append(p.Diffs, Diff{ID: e.ID, Before: indented(e.Data), After: indented(after)})
		}
		r.Data = nil
		sample.Record = &r
		p.Samples = append(p.Samples, &sample)
	}
	return nil
}

// leaveOut says why an entry is not replayed, or "".
func (pl *planner) leaveOut(e *dlq.Entry) string {
	o := &pl.p.Options
	switch {
	case e.State == dlq.StateDiscarded:
		return "discarded"
	case e.State == dlq.StateReplaying && !o.Force:
		return fmt.Sprintf("being replayed by %s, operation %s", e.Actor, e.Operation)
	case e.Replays >= o.MaxReplays && !o.Force:
		return fmt.Sprintf("replayed %d times or more already", o.MaxReplays)
	case e.Revision == 0 && (e.Body == dlq.BodyOmitted || e.Body == dlq.BodyGone):
		return "its payload was not kept, or was gone"
	case o.tracked() && e.Event == "":
		return fmt.Sprintf("consumer %q is not monotel's, so it cannot be reached alone: replay to %s", e.Consumer, TargetEveryone)
	case o.tracked():
		return nameProblem(e.Stream, e.Consumer)
	case o.Target == TargetEveryone && e.Subject == "":
		return "its original subject is not known"
	}
	return ""
}

// indented is a payload for people, of at most 1 MiB.
func indented(data []byte) string {
	const most = 1 << 20
	text, left := jsontext.Indent(data, most)
	if left > 0 {
		return fmt.Sprintf("%s\n… %d bytes more, which are not compared here", text, left)
	}
	return string(text)
}

// finish completes the plan by what is known when every entry was seen.
func (pl *planner) finish(ctx context.Context) error {
	p := pl.p
	p.Groups = pl.groups.result()
	if p.Options.Rate > 0 {
		p.Duration = time.Duration(float64(p.Selected) / p.Options.Rate * float64(time.Second))
	}
	if n := len(pl.unpatched); n > 0 {
		p.Problems = append(p.Problems, fmt.Sprintf("the patch does not apply to the payload of %d dead letters, which is no JSON object: %s",
			n, strings.Join(pl.unpatched[:min(n, samples)], ", ")))
	}
	if pl.replaying > 0 {
		p.Warnings = append(p.Warnings, fmt.Sprintf("%d are on their way by another operation, and may be handled twice", pl.replaying))
	}
	for _, c := range pl.consumers {
		p.Consumers = append(p.Consumers, *c)
	}
	slices.SortFunc(p.Consumers, func(a, b PlanConsumer) int {
		return cmp.Or(strings.Compare(a.Stream, b.Stream), strings.Compare(a.Consumer, b.Consumer))
	})
	if n := len(p.Consumers); n > mostConsumers {
		p.Problems = append(p.Problems, fmt.Sprintf("it is for %d consumers, and may be for %d: select fewer", n, mostConsumers))
		p.Consumers = p.Consumers[:mostConsumers]
		return nil
	}
	if p.Options.tracked() {
		if err := pl.preflights(ctx); err != nil {
			return err
		}
	}
	p.Warnings = append(p.Warnings, pl.d.compare(ctx, pl.newest, p.Selected)...)
	if ctx.Err() != nil {
		return fmt.Errorf("compare dead letters with their messages: %w", context.Cause(ctx))
	}
	slices.Sort(p.Problems)
	switch subject, toSubject := strings.CutPrefix(p.Options.Target, TargetSubject); {
	case toSubject:
		p.Warnings = append(p.Warnings, fmt.Sprintf("every consumer of subject %q gets them, and what comes of them is not known", subject))
		return pl.storedSubject(ctx, subject)
	case p.Options.Target == TargetEveryone:
		p.Warnings = append(p.Warnings, "every consumer of the original subjects gets them again, also those that have handled them; "+
			"what comes of them is not known")
	}
	return nil
}

// storedSubject makes sure that somebody keeps what is sent to a subject.
func (pl *planner) storedSubject(ctx context.Context, subject string) error {
	_, why, err := pl.d.ownerOf(ctx, subject)
	if why != "" {
		pl.p.Problems = append(pl.p.Problems, why)
	}
	return err
}

// preflights looks at the consumers that are to get messages, and at who else may
// get them.
func (pl *planner) preflights(ctx context.Context) error {
	var b bystanders
	for i := range pl.p.Consumers {
		c := &pl.p.Consumers[i]
		reachable, err := pl.preflight(ctx, c)
		if err != nil {
			return err
		}
		if reachable {
			b.target(c)
		}
	}
	warnings, err := b.find(ctx, pl.d)
	pl.p.Warnings = append(pl.p.Warnings, warnings...)
	return err
}

// preflight looks at a consumer that is to get messages, and reports whether there
// is such a one.
func (pl *planner) preflight(ctx context.Context, c *PlanConsumer) (reachable bool, err error) {
	p := pl.p
	problem := func(format string, args ...any) { p.Problems = append(p.Problems, fmt.Sprintf(format, args...)) }
	cons, err := pl.d.js.Consumer(ctx, c.Stream, c.Consumer)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		problem("stream %q is gone, with consumer %q: make them again, or replay to another subject", c.Stream, c.Consumer)
		return false, nil
	case errors.Is(err, jetstream.ErrConsumerNotFound):
		problem("consumer %q of stream %q is gone: start its App, or replay to %s or another subject", c.Consumer, c.Stream, TargetEveryone)
		return false, nil
	case errors.Is(err, jetstream.ErrNotPullConsumer):
		problem("consumer %q of stream %q is a push consumer, and not monotel's", c.Consumer, c.Stream)
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look at consumer %q of stream %q: %w", c.Consumer, c.Stream, err)
	}
	info := cons.CachedInfo()
	if info.Config.FilterSubject == "" && len(info.Config.FilterSubjects) == 0 { // see openTo
		pl.looksAt(c, info, info)
		return true, nil
	}
	replays, err := pl.d.replayInfo(ctx, c.Stream, c.Consumer)
	if errors.Is(err, dlq.ErrReplayConsumer) {
		problem("consumer %q of stream %q %v", dlq.ReplayConsumer(c.Consumer), c.Stream, err)
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at consumer %q of stream %q: %w", dlq.ReplayConsumer(c.Consumer), c.Stream, err)
	}
	pl.looksAt(c, info, replays)
	return true, nil
}

// looksAt warns of what keeps replays waiting. info is of the consumer, replays of the
// durable that gets what is replayed to it, nil if that is still to be made.
func (pl *planner) looksAt(c *PlanConsumer, info, replays *jetstream.ConsumerInfo) {
	p := pl.p
	warn := func(format string, args ...any) { p.Warnings = append(p.Warnings, fmt.Sprintf(format, args...)) }
	idle := func(i *jetstream.ConsumerInfo) bool { return i.NumWaiting == 0 && i.NumAckPending == 0 }
	c.Waiting = info.NumWaiting
	if replays == nil {
		if idle(info) {
			warn("nobody fetches for consumer %q of stream %q: the messages will wait until its App runs", c.Consumer, c.Stream)
		}
		return
	}
	c.Paused, c.Waiting, c.Pending = replays.Paused, replays.NumWaiting, replays.NumPending
	switch {
	case replays.Paused:
		warn("consumer %q of stream %q is paused for another %v: the messages will wait", replays.Name, c.Stream, replays.PauseRemaining.Round(time.Second))
	case idle(replays) && !idle(info):
		warn("nobody fetches for consumer %q of stream %q, though somebody does for %q: the messages will wait until an App runs that gets replays "+
			"from there, which those of earlier versions do not", replays.Name, c.Stream, c.Consumer)
	case idle(replays):
		warn("nobody fetches for consumer %q of stream %q: the messages will wait until its App runs", c.Consumer, c.Stream)
	}
	if replays.NumPending > 0 {
		warn("%d messages wait for consumer %q of stream %q before these", replays.NumPending, replays.Name, c.Stream)
	}
	if limit := replays.Config.MaxAckPending; limit > 0 && replays.NumAckPending >= limit {
		warn("consumer %q of stream %q has as much in flight as it may, %d: the messages will wait", replays.Name, c.Stream, limit)
	}
}
