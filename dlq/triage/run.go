package triage

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

const (
	// senders are how many work at a time. Each takes what there is to do, up to
	// together entries, and publishes for all of them before it waits for an answer:
	// few large writes cost client and server far less than many small ones.
	senders  = 8
	together = 64
	inWork   = senders * together

	// lease is how long a runner that has said nothing counts as alive, heartbeat
	// how often it says something: then it also writes down how far it has come.
	// Who wants to take over watches for a lease. After a longSilence by the
	// server's clock that is not needed: no two servers of a cluster differ so much.
	lease       = 3 * time.Second
	heartbeat   = lease / 6
	longSilence = time.Minute

	// answerTime is what the server has for an answer to one request.
	answerTime = 5 * time.Second

	// drainTime is what entries that are being worked on get when the run is to
	// end, releaseTime what a run that is cancelled has to give entries back.
	drainTime   = 5 * time.Second
	releaseTime = 30 * time.Second

	rateSlack = 20 // a burst is what the rate allows in 1/20 s: what a busy machine has missed is made up for

	// window is how far senders may be ahead of the first entry that is not done
	// with.
	window = 4 * inWork

	// mostBytes is how much of payloads is in hand at a time, unless one alone is
	// larger. Each is there several times over while it is sent.
	mostBytes = 16 << 20

	// Why entries are given back that may be sent later. The second is for targets
	// that are not asked what they have got.
	whyCancelled = "cancelled"
	whyUnknown   = whyCancelled + "; it may have been sent before"
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
// goroutine at a time. It may take its time.
//
// An entry is claimed, sent and done with on its own: whatever happens in
// between, the next Run finds out how far it got. An operation that another
// process runs is an [ErrClaimed]; if that process is dead, Run takes over when it
// was not heard of for a few seconds.
func (d *Desk) Run(ctx context.Context, id string, progress func(*Operation)) (*Operation, error) {
	js, err := d.cfg.JetStream(d.nc)
	if err != nil {
		return nil, err
	}
	defer js.CleanupPublisher() // of this run alone: that ends every publish in flight
	s, err := d.acquire(ctx, id)
	if err != nil {
		return nil, err
	}
	if s.Status == StatusCancelled {
		err := joined(fmt.Errorf("operation %s is cancelled: %w", id, ErrState), d.giveBack(ctx, s))
		return s.operation(s.Counted), err
	}
	_ = d.FinishDiscards(ctx) // or the next change does
	r := &runner{
		d: d, js: js, id: id, s: s, progress: progress, slots: make(chan struct{}, inWork),
		counted: s.Counted.clone(), renewed: time.Now().Round(0),
		done: make(map[int]string), unseen: make(map[uint64]struct{}), owners: newOwners(d),
	}
	r.cond = sync.NewCond(&r.mu)
	r.ended, r.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer r.stop()
	err = r.run(ctx)
	return r.operation(), err
}

// acquire makes this run the runner of an operation.
func (d *Desk) acquire(ctx context.Context, id string) (*stored, error) {
	// A runner that has been heard of twice meanwhile is alive. Once, it may have
	// been with its last breath.
	const alive = 2
	name, runner := runnerName(d.cfg.Actor), watch{}
	for {
		s, err := d.change(ctx, id, func(s *stored) error {
			switch {
			case len(s.Plan.Problems) > 0:
				return fmt.Errorf("operation %s: %w: %s", id, ErrInvalid, strings.Join(s.Plan.Problems, "; "))
			case s.Status == StatusCancelled:
				return fmt.Errorf("operation %s is cancelled: %w", id, ErrState)
			case s.Status == StatusRunning && !runner.dead(s):
				return errHeld
			case s.Status == StatusRunning && s.Want == StatusCancelled: // its runner has not lived to do it
				s.cancel(s.WantBy)
				return nil
			}
			if s.Started.IsZero() {
				s.Started = time.Now()
			}
			if s.Status != StatusDone {
				s.Status, s.Why, s.Ended = StatusRunning, "", time.Time{}
			}
			s.Runner, s.Want, s.WantBy = name, "", ""
			return nil
		})
		if !errors.Is(err, errHeld) {
			return s, err
		}
		if runner.heard >= alive {
			return nil, fmt.Errorf("operation %s is run by %s: %w", id, s.Runner, ErrClaimed)
		}
		if err := pause(ctx, heartbeat); err != nil {
			return nil, fmt.Errorf("operation %s is run by %s, or was until a moment ago: %w", id, s.Runner, err)
		}
	}
}

var errHeld = errors.New("another process runs it")

// runnerName is of one run alone: in containers processes of one name and number
// are common.
func runnerName(actor string) string {
	return fmt.Sprintf("%s/%d-%s", actor, os.Getpid(), strings.ToLower(rand.Text()[:8]))
}

// A runner runs one operation.
type runner struct {
	d        *Desk
	js       jetstream.JetStream // for asynchronous publishes
	slots    chan struct{}       // for entries that are worked on by themselves
	id       string
	progress func(*Operation)
	items    []item
	owners   *owners            // of original subjects
	owner    string             // of the subject that was asked for
	planned  map[[2]string]bool // streams and consumers

	mu        sync.Mutex
	cond      *sync.Cond
	s         *stored
	renewed   time.Time // when it was heard of last, by the wall clock, which goes on while the machine sleeps
	counted   counted
	base      counted             // what was counted before this run: a stop is judged by what came since
	inHand    int                 // entries that senders have, and have not claimed
	bytes     int                 // of the payloads that senders have, about
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
	defer func() { err = r.finish(ctx, err) }()
	var background, told sync.WaitGroup
	watch, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer background.Wait()
	defer cancel()
	tell, cancelTell := context.WithCancel(watch)
	defer told.Wait() // the lease is renewed until then
	defer cancelTell()
	// What progress calls may take long, and must not keep the lease from being renewed.
	background.Go(func() { every(watch, heartbeat, func() { r.checkpoint(watch) }) })
	if r.progress != nil {
		told.Go(func() { every(tell, heartbeat, func() { r.progress(r.operation()) }) })
	}
	stop := context.AfterFunc(ctx, func() { r.end(StatusPaused, fmt.Errorf("interrupted: %w", context.Cause(ctx))) })
	defer stop()
	// What has begun is brought to its end when the run is to end, if that takes no
	// longer than a while.
	work, cancelWork := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelWork()
	drain := context.AfterFunc(r.ended, func() { time.AfterFunc(drainTime, cancelWork) })
	defer drain()

	if err := r.prepare(ctx, work); err != nil {
		return err
	}
	background.Go(func() { r.follow(watch) })
	r.send(work)
	r.wakeAgain()
	return r.awaitOutcomes(ctx)
}

// wakeAgain wakes the consumers once more when all is sent: an App may have connected
// again meanwhile.
func (r *runner) wakeAgain() {
	if !r.s.Plan.Options.tracked() {
		return
	}
	for _, c := range r.s.Plan.Consumers {
		r.d.wake(c.Stream, c.Consumer)
	}
}

// every calls f again and again.
func every(ctx context.Context, how time.Duration, f func()) {
	tick := time.NewTicker(how)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f()
		}
	}
}

// prepare finds out what is to be done, and what was done before.
func (r *runner) prepare(ctx, work context.Context) (err error) {
	o := &r.s.Plan.Options
	if r.items, err = r.d.selection(ctx, &r.s.Plan); err != nil {
		return err
	}
	r.planned = make(map[[2]string]bool, len(r.s.Plan.Consumers))
	for _, c := range r.s.Plan.Consumers {
		r.planned[[2]string{c.Stream, c.Consumer}] = true
	}
	if subject, ok := strings.CutPrefix(o.Target, TargetSubject); ok {
		owner, why, err := r.d.ownerOf(ctx, subject)
		if err != nil {
			return err
		}
		if why != "" {
			return fmt.Errorf("operation %s: %w: %s", r.id, ErrInvalid, why)
		}
		r.owner = owner
	}
	if o.tracked() {
		for _, c := range r.s.Plan.Consumers {
			if err := r.d.openTo(ctx, c.Stream, c.Consumer); err != nil {
				return err
			}
			r.d.wake(c.Stream, c.Consumer)
		}
	}
	// What was done before, by whoever ran it, is known from the stream.
	n := r.s.Counted.clone()
	if err := r.d.count(ctx, &n, r.id); err != nil {
		return err
	}
	r.mu.Lock()
	r.counted, r.base = n, n
	unsettled := r.inFlight() > 0
	r.mu.Unlock()
	if o.tracked() && unsettled && (o.MaxInFlight > 0 || len(o.Canary) > 0) {
		return ignore(r.resume(work), errStopped)
	}
	return nil
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
		if r.endStatus != StatusStopped && !r.isLost() {
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
	ctx = context.WithoutCancel(ctx)
	store, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	r.mu.Lock()
	ending, status := r.ending, r.endStatus
	err = cmp.Or(err, r.failure)
	r.mu.Unlock()
	s, storeErr := r.d.change(store, r.id, func(s *stored) error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if s.Runner != r.s.Runner {
			r.s = s // it belongs to another, and is what they have made of it
			return s.lost()
		}
		s.Cursor, s.Skipped, s.Counted, s.Ended = r.s.Cursor, maps.Clone(r.s.Skipped), r.counted.clone(), r.s.Ended
		switch {
		case r.s.Status == StatusDone && status != StatusStopped:
			s.Status, s.Why = StatusDone, ""
		case s.Want == StatusCancelled:
			s.cancel(s.WantBy)
		case err != nil:
			s.Status, s.Why = StatusPaused, err.Error()
		case s.Want != "" && status != StatusStopped:
			s.Status, s.Why = s.Want, fmt.Sprintf("%s by %s", s.Want, s.WantBy)
		case ending != nil:
			s.Status, s.Why = status, ending.Error()
		}
		s.Runner, s.Want, s.WantBy = "", "", ""
		return nil
	})
	if s != nil && storeErr == nil {
		storeErr = r.conclude(ctx, s)
	}
	if r.progress != nil {
		r.progress(r.operation())
	}
	return joined(err, storeErr)
}

// conclude gives back what is to be given back, and finds out the last numbers,
// which are for whoever has called Run.
func (r *runner) conclude(ctx context.Context, s *stored) error {
	release, cancelRelease := context.WithTimeout(ctx, releaseTime)
	defer cancelRelease()
	err := r.d.giveBack(release, s)
	ctx, cancel := context.WithTimeout(ctx, drainTime)
	defer cancel()
	n := s.Counted.clone()
	if countErr := r.d.count(ctx, &n, r.id); countErr != nil {
		n = s.Counted
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s, r.counted = s, n
	return err
}

// Tried lists the IDs of the entries that an operation has taken in hand, and of
// those that it has not, or has given back when it was cancelled, oldest first. It
// reads each of them.
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
		mine, discarded := false, false
		err = d.messagesOf(ctx, m.subject, func(m *message) {
			discarded = discarded || dlq.IsTrace(m.header)
			c, err := dlq.DecodeChange(m.header, nil)
			if err != nil || c.Operation != id || c.Kind == dlq.ChangeEdited {
				return
			}
			mine = c.Kind != dlq.ChangeReleased || !strings.HasPrefix(c.Reason, whyCancelled)
		})
		if err != nil {
			return tried, remaining, fmt.Errorf("entries of operation %s: %w", id, err)
		}
		if discarded {
			continue
		}
		if mine {
			tried = append(tried, m.id())
		} else {
			remaining = append(remaining, m.id())
		}
	}
	return tried, remaining, nil
}
