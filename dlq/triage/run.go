package triage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

const (
	// senders are how many entries are worked on at a time. Each takes a few round
	// trips.
	senders = 128

	// lease is how long a runner that has said nothing counts as alive, heartbeat
	// how often it says something: then it also writes down how far it has come.
	lease     = 3 * time.Second
	heartbeat = lease / 6

	// drainTime is what entries that are being worked on get when the run is to
	// end.
	drainTime = 5 * time.Second

	rateSlack = 50 // a burst is what the rate allows in 1/50 s

	// window is how far senders may be ahead of the first entry that is not done
	// with. What is beyond it after an interruption was not taken in hand.
	window = 8 * senders
)

var errNoStream = errors.New("no stream takes the subject")

// errNotVisible is of a change that the server knows and does not show yet: it is
// being stored, or a replica answers that does not have it.
var errNotVisible = errors.New("a change that was made meanwhile is not to be seen yet")

var errStopped = errors.New("the operation is to end")

// Run executes a plan, or goes on with an operation that was paused, stopped
// itself or was interrupted. It returns when everything was tried and has its
// outcome, when the operation has stopped itself or somebody has paused or
// cancelled it, or when ctx ends: then it is paused, and can be resumed by
// calling Run again, also from another process.
//
// progress, if not nil, is called about twice a second and at the end, by one
// goroutine at a time.
//
// An entry is claimed, sent and done with on its own: whatever happens in
// between, the next Run finds out how far it got. An operation that another
// process runs is an [ErrClaimed]; if that process is dead, Run takes over when
// its lease has ended, after a few seconds.
func (d *Desk) Run(ctx context.Context, id string, progress func(*Operation)) (*Operation, error) {
	s, err := d.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	if s.Status == StatusCancelled {
		return s.operation(s.Counted), joined(fmt.Errorf("operation %s is cancelled: %w", id, ErrState), d.releaseUnsent(ctx, s))
	}
	r := &runner{d: d, id: id, s: s, progress: progress, done: make(map[int]string), unseen: make(map[uint64]struct{})}
	r.cond = sync.NewCond(&r.mu)
	r.ended, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer r.stop()
	err = r.run(ctx)
	return r.operation(), err
}

// acquire makes this process the runner of an operation.
func (d *Desk) acquire(ctx context.Context, id string) (*stored, error) {
	// A process that has renewed its lease twice meanwhile is alive. Once, it may
	// have done so with its last breath.
	const alive = 2
	var waited string // for which lease
	for renewals := 0; ; {
		var holder string
		s, err := d.change(ctx, id, func(s *stored) error {
			switch {
			case len(s.Plan.Problems) > 0:
				return fmt.Errorf("operation %s: %w: %s", id, ErrInvalid, strings.Join(s.Plan.Problems, "; "))
			case s.Status == StatusCancelled:
				return fmt.Errorf("operation %s is cancelled: %w", id, ErrState)
			case s.held():
				holder = fmt.Sprint(s.Runner, s.RunnerUntil)
				return errHeld
			case s.Want == StatusCancelled && s.Status == StatusRunning: // its runner has not lived to do it
				s.Status, s.Why, s.Ended = StatusCancelled, "cancelled by "+s.WantBy, time.Now()
				s.Runner, s.RunnerUntil, s.Want, s.WantBy = "", time.Time{}, "", ""
				return nil
			}
			if s.Started.IsZero() {
				s.Started = time.Now()
			}
			if s.Status != StatusDone {
				s.Status, s.Why, s.Ended = StatusRunning, "", time.Time{}
			}
			s.Want, s.WantBy = "", ""
			s.Runner, s.RunnerUntil = runnerName(d.cfg.Actor), time.Now().Add(lease)
			return nil
		})
		if !errors.Is(err, errHeld) {
			return s, err
		}
		if waited != "" && waited != holder {
			renewals++
		}
		if renewals == alive {
			return nil, fmt.Errorf("operation %s is run by %s: %w", id, s.Runner, ErrClaimed)
		}
		waited = holder
		if err := pause(ctx, min(time.Until(s.RunnerUntil), lease)+time.Millisecond); err != nil {
			return nil, err
		}
	}
}

var errHeld = errors.New("another process runs it")

func runnerName(actor string) string { return fmt.Sprintf("%s/%d", actor, os.Getpid()) }

// A runner runs one operation.
type runner struct {
	d        *Desk
	id       string
	progress func(*Operation)
	items    []item

	mu        sync.Mutex
	cond      *sync.Cond
	s         *stored
	counted   counted
	base      counted             // what was counted before this run: a stop is judged by what came since
	inHand    int                 // entries that senders have, and have not claimed
	unseen    map[uint64]struct{} // sequences of claims that are not counted yet
	done      map[int]string      // entries after the cursor that are done with, and why they were skipped
	step      int                 // of the canary
	ended     context.Context     //nolint:containedctx // ends with ending
	stop      context.CancelFunc
	ending    error // why no more are to be sent
	endStatus Status
	failure   error // what an entry could not be replayed for
}

func (r *runner) operation() *Operation {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.s.operation(r.counted)
}

// run works through the selection.
func (r *runner) run(ctx context.Context) (err error) {
	o := &r.s.Plan.Options
	defer func() { err = r.finish(ctx, err) }()
	if r.items, err = r.d.selection(ctx, &r.s.Plan); err != nil {
		return err
	}
	if o.tracked() {
		for _, c := range r.s.Plan.Consumers {
			if err := r.d.openTo(ctx, c.Stream, c.Consumer); err != nil {
				return err
			}
		}
	}
	// What was done before, by whoever ran it, is known from the stream.
	r.counted = r.s.Counted
	if err := r.d.count(ctx, &r.counted, r.id); err != nil {
		return err
	}
	r.base = r.counted
	if o.tracked() && r.inFlight() > 0 && (o.MaxInFlight > 0 || len(o.Canary) > 0) {
		if err := r.resume(ctx); err != nil {
			return err
		}
	}

	var background sync.WaitGroup
	watch, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer background.Wait()
	defer cancel()
	background.Go(func() { r.follow(watch) })
	background.Go(func() { r.report(watch) })
	stop := context.AfterFunc(ctx, func() { r.end(StatusPaused, fmt.Errorf("interrupted: %w", context.Cause(ctx))) })
	defer stop()

	r.send(ctx)
	return r.awaitOutcomes(ctx)
}

// send hands the entries to the senders, as fast as it may.
func (r *runner) send(ctx context.Context) {
	// What has begun is brought to its end when ctx ends, if that takes no longer
	// than a while.
	work, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	drain := context.AfterFunc(r.ended, func() { time.AfterFunc(drainTime, cancel) })
	defer drain()

	o := &r.s.Plan.Options
	limiter := rate.NewLimiter(rate.Inf, 0)
	if o.Rate > 0 {
		limiter = rate.NewLimiter(rate.Limit(o.Rate), max(int(o.Rate/rateSlack), 1))
		limiter.AllowN(time.Now(), limiter.Burst()) // it begins empty
	}
	type job struct {
		index int
		m     *message // its record, or nil
	}
	queue := make(chan job)
	var all sync.WaitGroup
	for range min(senders, max(len(r.items)-r.s.Cursor, 1)) {
		all.Go(func() {
			for j := range queue {
				r.handle(work, j.index, j.m)
			}
		})
	}
	r.mu.Lock()
	from := r.s.Cursor
	r.mu.Unlock()
	var records map[uint64]*message
	ahead := from
	for i := from; i < len(r.items); i++ {
		if i == ahead {
			records, ahead = r.readAhead(ctx, i)
		}
		if !r.gate(i) || limiter.Wait(ctx) != nil {
			break
		}
		queue <- job{i, records[r.items[i].sequence]}
	}
	close(queue)
	all.Wait()
}

// tried is how many entries were taken in hand, in this run and before. r.mu is
// held.
func (r *runner) tried() int {
	return r.counted.Claimed - r.counted.Released + len(r.unseen) + r.inHand
}

// inFlight is how many of them have no outcome. r.mu is held.
func (r *runner) inFlight() int {
	n := &r.counted
	return n.Claimed - n.Released - n.Resolved - n.FailedAgain - n.Sent + len(r.unseen) + r.inHand
}

// readAhead reads the records of the next entries together, if they are close to
// each other: that is several times as fast as one by one. It returns how far it
// has come. What it cannot read is read by itself.
func (r *runner) readAhead(ctx context.Context, i int) (records map[uint64]*message, next int) {
	const most, sparse = 512, 4
	next = min(i+most, len(r.items))
	lo, hi := r.items[i].sequence, r.items[next-1].sequence
	if hi-lo >= uint64(sparse*(next-i)) { //nolint:gosec // a few hundred
		return nil, next
	}
	messages, err := r.d.tryRange(ctx, lo, hi, false)
	if err != nil {
		return nil, next
	}
	records = make(map[uint64]*message, len(messages))
	for i := range messages {
		records[messages[i].sequence] = &messages[i]
	}
	return records, next
}

// gate waits until another entry may be taken in hand. It returns false if none
// may.
func (r *runner) gate(i int) bool {
	o := &r.s.Plan.Options
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		r.judge()
		switch {
		case r.ending != nil:
			return false
		case i-r.s.Cursor >= window:
		case o.MaxInFlight > 0 && r.inFlight() >= o.MaxInFlight:
		case r.step < len(o.Canary) && r.tried() >= r.boundary(r.step):
			if r.inFlight() == 0 {
				r.step++
				continue
			}
		default:
			r.inHand++
			return true
		}
		r.cond.Wait()
	}
}

// boundary is how many the canary has sent after a step.
func (r *runner) boundary(step int) int {
	n := 0
	for _, k := range r.s.Plan.Options.Canary[:step+1] {
		n += k
	}
	return n
}

// judge ends the operation if too many have failed again. r.mu is held.
func (r *runner) judge() {
	o := &r.s.Plan.Options
	if o.StopIfFailing <= 0 || r.ending != nil {
		return
	}
	failed := r.counted.FailedAgain - r.base.FailedAgain
	all := failed + r.counted.Resolved - r.base.Resolved
	complete := r.step < len(o.Canary) && r.inFlight() == 0 && all > 0
	if (complete || all >= outcomesToStop) && float64(failed) > o.StopIfFailing*float64(all) {
		r.endLocked(StatusStopped, fmt.Errorf("%d of %d outcomes are that it failed again, more than %.3g %%", failed, all, 100*o.StopIfFailing)) //nolint:mnd // percent
	}
}

// end has no more entries taken in hand. The first reason stands.
func (r *runner) end(status Status, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked(status, why)
}

func (r *runner) endLocked(status Status, why error) {
	if r.ending == nil {
		r.ending, r.endStatus = why, status
		r.stop()
	}
	r.cond.Broadcast()
}

// follow counts what the dead-letter stream says, as it comes.
func (r *runner) follow(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		from := r.counted.Upto + 1
		r.mu.Unlock()
		for m, err := range r.d.follow(ctx, from) {
			if err != nil {
				break
			}
			r.mu.Lock()
			delete(r.unseen, m.sequence)
			before := r.inFlight()
			r.counted.add(m, r.id)
			if r.inFlight() < before {
				r.cond.Broadcast()
			}
			r.mu.Unlock()
		}
		if pause(ctx, time.Second/4) != nil { //nolint:mnd // then it tries again
			return
		}
	}
}

// report writes down how far the operation has come, and finds out what others
// want of it.
func (r *runner) report(ctx context.Context) {
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		r.checkpoint(ctx)
		if r.progress != nil {
			r.progress(r.operation())
		}
	}
}

// checkpoint stores the state, and takes over what somebody else has stored: a
// wish to pause or cancel.
func (r *runner) checkpoint(ctx context.Context) {
	r.mu.Lock()
	s := *r.s
	s.Skipped = maps.Clone(r.s.Skipped)
	s.Counted = r.counted
	r.mu.Unlock()
	s.RunnerUntil = time.Now().Add(lease)
	err := r.d.update(ctx, &s)
	if isConflict(err) {
		now, loadErr := r.d.load(ctx, r.id)
		if loadErr != nil {
			return // the next time
		}
		switch {
		case now.Runner != s.Runner:
			r.end("", fmt.Errorf("operation %s was taken over by %s: %w", r.id, now.Runner, ErrClaimed))
		case now.Want != "":
			r.end(now.Want, fmt.Errorf("%s by %s", now.Want, now.WantBy))
		}
		s.revision = now.revision
	}
	r.mu.Lock()
	r.s.revision, r.s.RunnerUntil = s.revision, s.RunnerUntil
	r.mu.Unlock()
}

// awaitOutcomes waits for what is sent, unless the operation is to end.
func (r *runner) awaitOutcomes(ctx context.Context) error {
	o := &r.s.Plan.Options
	stop := context.AfterFunc(ctx, func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.cond.Broadcast()
	})
	defer stop()
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.s.Cursor >= len(r.items) && r.s.Status == StatusRunning {
		// The last are sent: what ended it in the meantime has come too late.
		r.s.Status, r.s.Ended = StatusDone, time.Now()
		if r.endStatus != StatusStopped && r.endStatus != "" {
			r.ending = nil
		}
	}
	for o.tracked() && !o.NoWait && r.inFlight() > 0 && r.ending == nil && ctx.Err() == nil {
		r.cond.Wait()
	}
	return nil
}

// finish stores how the run has ended.
func (r *runner) finish(ctx context.Context, err error) error {
	// Its numbers are for whoever looks next; they are found out anew if need be.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainTime)
	defer cancel()
	r.mu.Lock()
	ending, status := r.ending, r.endStatus
	err = cmp.Or(err, r.failure)
	r.mu.Unlock()
	switch {
	case err != nil:
		status, ending = StatusPaused, err
	case errors.Is(ending, ErrClaimed) && status == "":
		return ending // it belongs to another
	}
	s, storeErr := r.d.change(ctx, r.id, func(s *stored) error {
		if s.Runner != r.s.Runner {
			return ErrClaimed
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		s.Cursor, s.Skipped, s.Counted, s.Ended = r.s.Cursor, maps.Clone(r.s.Skipped), r.counted, r.s.Ended
		if s.Want != "" && status != StatusStopped { // it came last
			status, ending = s.Want, fmt.Errorf("%s by %s", s.Want, s.WantBy)
		}
		switch {
		case r.s.Status == StatusDone && status != StatusStopped:
			s.Status, s.Why = StatusDone, ""
		case status != "":
			s.Status, s.Why = status, ending.Error()
			if status == StatusCancelled {
				s.Ended = time.Now()
			}
		}
		s.Runner, s.RunnerUntil, s.Want, s.WantBy = "", time.Time{}, "", ""
		return nil
	})
	if s != nil && storeErr == nil {
		n := s.Counted
		if countErr := r.d.count(ctx, &n, r.id); countErr == nil {
			r.mu.Lock()
			r.s, r.counted = s, n
			r.mu.Unlock()
		}
		if s.Status == StatusCancelled {
			storeErr = r.d.releaseUnsent(ctx, s)
		}
	}
	if r.progress != nil {
		r.progress(r.operation())
	}
	return joined(err, storeErr)
}

// handle does what is to be done with one entry, and notes it.
func (r *runner) handle(ctx context.Context, i int, m *message) {
	claimed := false
	why, err := r.replay(ctx, r.items[i], m, func(sequence uint64) {
		claimed = true
		r.mu.Lock()
		defer r.mu.Unlock()
		r.inHand--
		if sequence > r.counted.Upto {
			r.unseen[sequence] = struct{}{}
		}
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	if !claimed {
		r.inHand--
		r.cond.Broadcast()
	}
	if err != nil {
		if r.failure == nil && !errors.Is(err, errStopped) {
			r.failure = err
		}
		r.endLocked(StatusPaused, err)
		return
	}
	r.done[i] = why
	for {
		why, ok := r.done[r.s.Cursor]
		if !ok {
			return
		}
		delete(r.done, r.s.Cursor)
		r.s.Cursor++
		if r.s.Cursor%senders == 0 {
			r.cond.Broadcast()
		}
		if why != "" {
			if r.s.Skipped == nil {
				r.s.Skipped = make(map[string]int)
			}
			r.s.Skipped[why]++
		}
	}
}

// replay claims and sends one entry. why says why it was skipped. claimed is
// called with the sequence of the claim, if this call makes one. An error leaves
// the entry for the next run.
func (r *runner) replay(ctx context.Context, it item, m *message, claimed func(uint64)) (why string, err error) {
	e, why, err := r.read(ctx, it, m)
	if e == nil {
		return why, err
	}
	if e.Last != it.last {
		return r.again(ctx, e, claimed)
	}
	return r.claimAndSend(ctx, e, claimed)
}

// read reads an entry as it was when it was selected, or as it is now if it has a
// history.
func (r *runner) read(ctx context.Context, it item, m *message) (e *dlq.Entry, why string, err error) {
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		if m == nil {
			m, err = r.d.message(ctx, it.sequence)
		}
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			why = "discarded meanwhile"
			return nil
		case err != nil:
			return err
		case it.last != it.sequence:
			e, err = r.d.getAt(ctx, m.subject)
			if errors.Is(err, ErrNotFound) {
				e, why, err = nil, "discarded meanwhile", nil
			}
			return err
		}
		rec, err := dlq.Decode(m.header, m.data)
		if rec == nil {
			why = "it cannot be read"
			return nil
		}
		e = dlq.NewEntry(rec, m.sequence, nil)
		return err
	})
	return e, why, err
}

// again deals with an entry that is not as it was selected: this operation was
// interrupted while it had it in hand, or somebody else has done something.
func (r *runner) again(ctx context.Context, e *dlq.Entry, claimed func(uint64)) (why string, err error) {
	var mine *dlq.Change
	for _, c := range e.History {
		if c.Operation == r.id {
			mine = c
		}
	}
	switch {
	case e.State == dlq.StateDiscarded:
		return "discarded meanwhile", nil
	case mine != nil && mine.Kind == dlq.ChangeEdited && e.Last == mine.Sequence:
		return r.claimAndSend(ctx, e, claimed)
	case mine != nil && mine.Kind == dlq.ChangeReplaying && e.Last == mine.Sequence:
		return r.resend(ctx, e, mine.Sequence)
	case mine != nil && mine.Kind != dlq.ChangeEdited:
		return "", nil // it has its outcome
	case e.State == dlq.StateReplaying:
		return fmt.Sprintf("being replayed by %s, operation %s", e.Actor, e.Operation), nil
	}
	return fmt.Sprintf("%s meanwhile by %s", e.History[len(e.History)-1].Kind, e.Actor), nil
}

// resend sends what was claimed before, unless that was done already. A message
// that is gone from its stream has left its outcome first: so when neither is
// there it was not sent.
func (r *runner) resend(ctx context.Context, e *dlq.Entry, claim uint64) (why string, err error) {
	sent := false
	err = r.retry(ctx, func(ctx context.Context) error {
		if !r.s.Plan.Options.tracked() {
			return nil // its message ID has it stored once within the stream's duplicate window
		}
		s, err := r.d.js.Stream(ctx, e.Stream)
		if err != nil {
			return err
		}
		_, err = s.GetLastMsgForSubject(ctx, dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id))
		if !errors.Is(err, jetstream.ErrMsgNotFound) {
			sent = err == nil
			return err
		}
		outcome, err := r.d.store.Settled(ctx, dlq.Replay{
			Stream: r.d.cfg.Stream, Subject: r.d.store.SubjectOf(e.Record), ID: e.ID, Operation: r.id,
		})
		sent = outcome != ""
		return err
	})
	if sent || err != nil {
		return "", err
	}
	return r.sendEntry(ctx, e, claim)
}

// claimAndSend takes an entry in hand and sends it.
func (r *runner) claimAndSend(ctx context.Context, e *dlq.Entry, claimed func(uint64)) (why string, err error) {
	o := &r.s.Plan.Options
	if len(o.Patch) > 0 && !(len(e.History) > 0 && e.History[len(e.History)-1].Operation == r.id) {
		if why, err := r.patch(ctx, e); why != "" || err != nil {
			return why, err
		}
	}
	claim := dlq.Change{Kind: dlq.ChangeReplaying, Actor: r.d.cfg.Actor, Reason: o.Reason, Operation: r.id, Target: o.Target}
	err = r.retry(ctx, func(ctx context.Context) error {
		return r.d.store.Change(ctx, e, claim, nil)
	})
	switch {
	case errors.Is(err, dlq.ErrEntryChanged):
		// Somebody else, or an earlier try whose answer was lost.
		var now *dlq.Entry
		err = r.retry(ctx, func(ctx context.Context) (err error) {
			if now, err = r.d.getAt(ctx, r.d.store.SubjectOf(e.Record)); err == nil && now.Last == e.Last {
				return errNotVisible
			}
			return err
		})
		switch {
		case errors.Is(err, ErrNotFound):
			return "discarded meanwhile", nil
		case err != nil:
			return "", err
		}
		return r.again(ctx, now, claimed)
	case errors.Is(err, dlq.ErrStreamFull):
		return "", fmt.Errorf("%w: raise its limit, such as with `nats stream edit %s --max-bytes 2GiB`", ErrFull, r.d.cfg.Stream)
	case err != nil:
		return "", err
	}
	claimed(e.Last)
	return r.sendEntry(ctx, e, e.Last)
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

// patch stores what the operation's patch makes of the payload as an edit.
func (r *runner) patch(ctx context.Context, e *dlq.Entry) (why string, err error) {
	o := &r.s.Plan.Options
	var current *dlq.Record
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		current, err = r.d.Current(ctx, e)
		return err
	})
	if err != nil {
		return "", err
	}
	after, err := mergePatch(current.Data, o.Patch)
	if err != nil {
		return "the patch does not apply", nil //nolint:nilerr // that is why it is skipped
	}
	c := dlq.Change{
		Kind: dlq.ChangeEdited, Actor: r.d.cfg.Actor, Reason: o.Reason, Operation: r.id, Revision: e.Revision + 1,
		Edit: &dlq.Record{Data: after, Header: current.Header, BodySize: len(after)}, Diff: mergeDiff(current.Data, after),
	}
	err = r.retry(ctx, func(ctx context.Context) error {
		if err := r.d.store.PutRevision(ctx, e.ID, &c); err != nil {
			return err
		}
		return r.d.store.Change(ctx, e, c, nil)
	})
	if errors.Is(err, dlq.ErrEntryChanged) {
		return "changed meanwhile", nil
	}
	return "", err
}

// sendEntry sends what is claimed. If that cannot be done, the entry is released.
func (r *runner) sendEntry(ctx context.Context, e *dlq.Entry, claim uint64) (why string, err error) {
	var current *dlq.Record
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		current, err = r.d.Current(ctx, e)
		return err
	})
	if isOneOf(err, jetstream.ErrObjectNotFound, jetstream.ErrBucketNotFound, jetstream.ErrMsgNotFound) {
		why = "its payload is gone"
		return why, r.release(ctx, e, why)
	}
	if err != nil {
		return "", err
	}
	msg, opts := r.message(e, current, claim)
	end := r.trace(ctx, e, msg)
	err = r.retry(ctx, func(ctx context.Context) error {
		_, err := r.d.js.PublishMsg(ctx, msg, append(opts, jetstream.WithRetryAttempts(0))...)
		if errors.Is(err, jetstream.ErrNoStreamResponse) {
			// Its leader may be away. The server that knows the streams says if there is none.
			if _, nameErr := r.d.js.StreamNameBySubject(ctx, msg.Subject); errors.Is(nameErr, jetstream.ErrStreamNotFound) {
				return errNoStream
			}
		}
		return err
	})
	end(err)
	api, ok := errors.AsType[*jetstream.APIError](err)
	switch {
	case ok && api.ErrorCode == codeWrongLastSequence && r.s.Plan.Options.tracked():
		err = nil // it is there
	case errors.Is(err, errNoStream):
		why = fmt.Sprintf("no stream takes subject %q", targetName(msg.Subject, r.s.Plan.Options.tracked()))
	case errors.Is(err, nats.ErrMaxPayload), ok && api.ErrorCode == codeTooLarge:
		why = "too large for its stream, with what a replay adds"
	case ok && api.ErrorCode == codeOtherStream:
		why = "another stream takes its subject now"
	}
	if why != "" {
		return why, r.release(ctx, e, why)
	}
	if err != nil || r.s.Plan.Options.tracked() {
		return "", err
	}
	sent := dlq.Change{Kind: dlq.ChangeSent, Actor: r.d.cfg.Actor, Operation: r.id, Target: r.s.Plan.Options.Target}
	err = r.retry(ctx, func(ctx context.Context) error { return r.d.store.Change(ctx, e, sent, nil) })
	return "", ignore(err, dlq.ErrEntryChanged) // somebody forced it
}

// trace begins the span of a replay, if there is telemetry.
func (r *runner) trace(ctx context.Context, e *dlq.Entry, msg *nats.Msg) (end func(error)) {
	if r.d.cfg.Telemetry == nil {
		return func(error) {}
	}
	dead := messaging.DeadLetter{
		Subject: msg.Subject, Consumer: e.Consumer, Traceparent: e.Failure.Traceparent, Origin: e.OriginTraceparent,
	}
	if r.s.Plan.Options.tracked() {
		dead.Subject, dead.Stream = e.Subject, e.Stream
	}
	op := r.d.cfg.Telemetry.Replay(ctx, &dead)
	maps.Copy(msg.Header, op.Header)
	return op.End
}

// targetName leaves out what is of one entry.
func targetName(subject string, tracked bool) string {
	if tracked {
		const tokens = 4 // monotel.replay.<stream>.<consumer>
		return strings.Join(strings.SplitN(subject, ".", tokens+1)[:tokens], ".") + ".>"
	}
	return subject
}

const (
	codeWrongLastSequence = 10071
	codeTooLarge          = 10054
	codeOtherStream       = 10060
)

// message is what is sent for an entry.
func (r *runner) message(e *dlq.Entry, current *dlq.Record, claim uint64) (*nats.Msg, []jetstream.PublishOpt) {
	o := &r.s.Plan.Options
	msg := &nats.Msg{Subject: current.Subject, Data: current.Data, Header: replayHeader(e, current, r.d.cfg.Stream, r.id, claim)}
	opts := []jetstream.PublishOpt{jetstream.WithMsgID(r.id + "." + e.ID)}
	if subject, ok := strings.CutPrefix(o.Target, TargetSubject); ok {
		msg.Subject = subject
	}
	if o.tracked() {
		msg.Subject = dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id)
		opts = append(opts, jetstream.WithExpectStream(e.Stream), jetstream.WithExpectLastSequencePerSubject(0))
	}
	return msg, opts
}

// replayHeader restores the original headers, but for those that steer the server
// and those that would continue a trace of long ago.
func replayHeader(e *dlq.Entry, current *dlq.Record, stream, operation string, claim uint64) nats.Header {
	h := make(nats.Header, len(current.Header))
	for k, vs := range current.Header {
		if hasPrefixFold(k, "Nats-") || hasPrefixFold(k, dlq.ReplayHeaderPrefix) {
			continue
		}
		switch strings.ToLower(k) {
		case "traceparent", "tracestate", "baggage":
			continue
		}
		h[k] = append([]string(nil), vs...)
	}
	set := func(key, value string) {
		if value != "" {
			h[key] = []string{value}
		}
	}
	set(dlq.HeaderReplayOf, e.ID)
	set(dlq.HeaderReplayOperation, operation)
	set(dlq.HeaderReplayCount, strconv.Itoa(e.Replays))
	set(dlq.HeaderReplaySubject, current.Subject)
	set(dlq.HeaderReplayStream, stream)
	set(dlq.HeaderReplayClaim, strconv.FormatUint(claim, 10))
	set(dlq.HeaderReplayLinks, strings.TrimSpace(e.Failure.Traceparent+" "+e.OriginTraceparent))
	return h
}

// release gives an entry back that was claimed and cannot be sent.
func (r *runner) release(ctx context.Context, e *dlq.Entry, why string) error {
	c := dlq.Change{Kind: dlq.ChangeReleased, Actor: r.d.cfg.Actor, Reason: why, Operation: r.id}
	err := r.retry(ctx, func(ctx context.Context) error { return r.d.store.Change(ctx, e, c, nil) })
	return ignore(err, dlq.ErrEntryChanged)
}

// retry calls f until it succeeds, or the error is one that does not pass. A
// server that is away, or a target that is full, is waited for until the
// operation is to end.
func (r *runner) retry(ctx context.Context, f func(context.Context) error) error {
	const first, longest, request = 100 * time.Millisecond, 2 * time.Second, 5 * time.Second
	for wait := first; ; wait = min(2*wait, longest) {
		try, cancel := context.WithTimeout(ctx, request)
		err := f(try)
		cancel()
		if err == nil || !passes(err) {
			return err
		}
		r.mu.Lock()
		ending := r.ending != nil
		r.mu.Unlock()
		if ending {
			return fmt.Errorf("%w: %w", errStopped, err)
		}
		if pauseErr := pause(ctx, wait); pauseErr != nil {
			return joined(err, pauseErr)
		}
	}
}

// passes reports whether an error is one that goes away by itself.
func passes(err error) bool {
	if errors.Is(err, dlq.ErrStreamFull) {
		return false // a claim that the dead-letter stream cannot take
	}
	api, ok := errors.AsType[*jetstream.APIError](err)
	switch {
	case dlq.IsFull(err):
		return true
	case ok:
		return api.Code == 503 //nolint:mnd // a cluster without a leader
	case errors.Is(err, nats.ErrPermissionViolation), errors.Is(err, nats.ErrConnectionClosed):
		return false
	}
	return isOneOf(err, errNotVisible, nats.ErrTimeout, context.DeadlineExceeded, nats.ErrNoResponders, jetstream.ErrNoStreamResponse,
		jetstream.ErrJetStreamNotEnabled, nats.ErrDisconnected, nats.ErrReconnectBufExceeded)
}

func isOneOf(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}

// releaseUnsent gives back what a runner had in hand when it ended: claimed, and
// neither sent nor settled.
func (d *Desk) releaseUnsent(ctx context.Context, s *stored) error {
	subjects, err := d.unsettled(ctx, s)
	if err != nil {
		return err
	}
	r := &runner{d: d, id: s.Plan.ID, s: s}
	r.cond = sync.NewCond(&r.mu)
	for subject := range subjects {
		e, err := d.getAt(ctx, subject)
		if e == nil {
			if errors.Is(err, ErrNotFound) {
				continue
			}
			return err
		}
		if e.State != dlq.StateReplaying || e.Operation != s.Plan.ID || !s.Plan.Options.tracked() {
			continue
		}
		st, err := d.js.Stream(ctx, e.Stream)
		if err == nil {
			_, err = st.GetLastMsgForSubject(ctx, dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, s.Plan.ID))
		}
		if err == nil {
			continue // it is sent
		}
		if !errors.Is(err, jetstream.ErrMsgNotFound) && !errors.Is(err, jetstream.ErrStreamNotFound) {
			return fmt.Errorf("release what operation %s has in hand: %w", s.Plan.ID, err)
		}
		if err := r.release(ctx, e, "cancelled"); err != nil {
			return err
		}
	}
	return nil
}

// unsettled are the subjects of the entries that an operation has claimed and that have no
// outcome. Its claims are all after its selection was frozen.
func (d *Desk) unsettled(ctx context.Context, s *stored) (map[string]struct{}, error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	subjects := make(map[string]struct{})
	for lo := s.Plan.Upto + 1; lo <= info.State.LastSeq; lo += chunk {
		messages, err := d.readRange(ctx, lo, min(lo+chunk-1, info.State.LastSeq), true)
		if err != nil {
			return nil, err
		}
		for i := range messages {
			m := &messages[i]
			if m.header.Get(dlq.HeaderChangeOperation) != s.Plan.ID {
				continue
			}
			switch dlq.ChangeKind(m.header.Get(dlq.HeaderChange)) {
			case dlq.ChangeReplaying:
				subjects[m.subject] = struct{}{}
			case dlq.ChangeEdited:
			default:
				delete(subjects, m.subject)
			}
		}
	}
	return subjects, nil
}

// resume sends what an earlier run has claimed and not sent. It counts as in
// flight, and the gate would wait for it.
func (r *runner) resume(ctx context.Context) error {
	subjects, err := r.d.unsettled(ctx, r.s)
	if err != nil {
		return err
	}
	for subject := range subjects {
		e, err := r.d.getAt(ctx, subject)
		if errors.Is(err, ErrNotFound) {
			continue // discarded by force
		}
		if e == nil {
			return err
		}
		if e.State == dlq.StateReplaying && e.Operation == r.id && e.History[len(e.History)-1].Kind == dlq.ChangeReplaying {
			if _, err := r.resend(ctx, e, e.Last); err != nil {
				return err
			}
		}
	}
	return nil
}

// Tried lists the IDs of the entries that an operation has taken in hand, and of
// those that it has not, oldest first. It reads each of them.
func (d *Desk) Tried(ctx context.Context, id string) (tried, remaining []string, err error) {
	s, err := d.load(ctx, id)
	if err != nil {
		return nil, nil, err
	}
	items, err := d.selection(ctx, &s.Plan)
	if err != nil {
		return nil, nil, err
	}
	for _, it := range items {
		m, err := d.message(ctx, it.sequence)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue // discarded
		}
		if err != nil {
			return tried, remaining, fmt.Errorf("entries of operation %s: %w", id, err)
		}
		mine := false
		err = d.messagesOf(ctx, m.subject, func(m *message) {
			mine = mine || m.header.Get(dlq.HeaderChangeOperation) == id
		})
		if err != nil {
			return tried, remaining, fmt.Errorf("entries of operation %s: %w", id, err)
		}
		if mine {
			tried = append(tried, m.id())
		} else {
			remaining = append(remaining, m.id())
		}
	}
	return tried, remaining, nil
}
