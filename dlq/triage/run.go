package triage

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
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
	"github.com/monotel/monotel/internal/shell"
	"github.com/monotel/monotel/telemetry/messaging"
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

// send hands the entries to the senders, as fast as it may. They work until work
// ends.
func (r *runner) send(work context.Context) {
	o := &r.s.Plan.Options
	limiter := rate.NewLimiter(rate.Inf, 0)
	if o.Rate > 0 {
		limiter = rate.NewLimiter(rate.Limit(o.Rate), max(int(o.Rate/rateSlack), 1))
		limiter.AllowN(time.Now(), limiter.Burst()) // it begins empty
	}
	average := int(min(r.s.Plan.Bytes/int64(max(r.s.Plan.Selected, 1)), mostBytes))
	queue := make(chan *job, together)
	var all sync.WaitGroup
	r.mu.Lock()
	from := r.s.Cursor
	r.mu.Unlock()
	for range min(senders, max(len(r.items)-from, 1)) {
		all.Go(func() {
			for j := range queue {
				r.handle(work, take(j, queue), &all)
			}
		})
	}
	// The next records are read while those before are sent.
	type stretch struct {
		records map[uint64]*message
		end     int
	}
	stretches := make(chan stretch)
	all.Go(func() {
		defer close(stretches)
		for i := from; i < len(r.items); {
			records, end := r.readAhead(r.ended, i)
			select {
			case stretches <- stretch{records, end}:
			case <-r.ended.Done():
				return
			}
			i = end
		}
	})
	s := stretch{end: from}
	for i := from; i < len(r.items); i++ {
		if i == s.end {
			s = <-stretches // none when it is to end, which the gate knows
		}
		j := &job{index: i, m: s.records[r.items[i].sequence], size: average}
		if j.m != nil {
			j.size = j.m.payloadSize()
		}
		if r.items[i].edit != 0 {
			j.size = max(j.size, average)
		}
		if limiter.Wait(r.ended) != nil || !r.gate(i, j.size) {
			break
		}
		queue <- j
	}
	close(queue)
	all.Wait()
}

// A job is an entry that a sender has.
type job struct {
	publishing

	index   int
	m       *message // its record, or nil
	size    int      // about what it takes
	claimed bool     // by this run

	e      *dlq.Entry
	change dlq.Change
	end    func(error) // of the span
}

// take adds to a job what else there is to do.
func take(j *job, queue <-chan *job) []*job {
	jobs := append(make([]*job, 0, together), j)
	for len(jobs) < together {
		select {
		case j, ok := <-queue:
			if !ok {
				return jobs
			}
			jobs = append(jobs, j)
		default:
			return jobs
		}
	}
	return jobs
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
	rd, err := r.d.readOnce(ctx, lo, hi, false, fetchWait, stallWait)
	if err != nil {
		return nil, next
	}
	for next > i+1 && r.items[next-1].sequence > rd.upto { // they did not fit
		next--
	}
	records = make(map[uint64]*message, len(rd.messages))
	for i := range rd.messages {
		records[rd.messages[i].sequence] = &rd.messages[i]
	}
	return records, next
}

// gate waits until another entry, of so many bytes, may be taken in hand. It returns
// false if none may.
func (r *runner) gate(i, size int) bool {
	o := &r.s.Plan.Options
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		r.judge()
		switch {
		case r.ending != nil:
			return false
		case i-r.s.Cursor >= window:
		case r.bytes > 0 && r.bytes+size > mostBytes:
		case o.MaxInFlight > 0 && r.inFlight() >= o.MaxInFlight:
		case r.step < len(o.Canary) && r.tried() >= r.boundary(r.step):
			if r.inFlight() == 0 {
				r.step++
				continue
			}
		default:
			r.inHand++
			r.bytes += size
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

// end has no more entries taken in hand. The first reason stands, unless another has
// the operation now. What somebody wants of it is looked at when the run is stored.
func (r *runner) end(status Status, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked(status, why)
}

func (r *runner) endLocked(status Status, why error) {
	if r.ending == nil || status == statusLost {
		r.ending, r.endStatus = why, status
	}
	r.stop()
	r.cond.Broadcast()
}

// statusLost is that of a run whose operation belongs to another.
const statusLost Status = ""

func (r *runner) isLost() bool { return r.ending != nil && r.endStatus == statusLost }

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

// checkpoint renews the lease, writes down how far the operation has come, and
// takes over what somebody else has stored: a wish to pause or cancel.
func (r *runner) checkpoint(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lease/2) //nolint:mnd // then there is time for another
	defer cancel()
	r.mu.Lock()
	s := *r.s
	s.Skipped = maps.Clone(r.s.Skipped)
	s.Counted = r.counted.clone()
	r.mu.Unlock()
	now := time.Now().Round(0)
	err := r.d.update(ctx, &s)
	if isConflict(err) {
		other, loadErr := r.d.load(ctx, r.id)
		if loadErr != nil {
			return // the next time
		}
		switch {
		case other.Runner != s.Runner:
			r.end(statusLost, other.lost())
			return
		case other.Want != "":
			r.end(other.Want, fmt.Errorf("%s by %s", other.Want, other.WantBy))
		}
		s.revision, s.Want, s.WantBy = other.revision, other.Want, other.WantBy
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.revision, r.s.Want, r.s.WantBy = s.revision, s.Want, s.WantBy
	if err == nil {
		r.renewed = now
	}
}

// late reports whether another may have taken the operation over: the machine has
// slept, or had no connection.
func (r *runner) late() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Round(0).Sub(r.renewed).Abs() >= lease-heartbeat
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

// handle does what is to be done with some entries, and notes it. Most are as they
// were selected, and are claimed and then sent together. Whatever is different or
// goes wrong with one is dealt with by itself, with what may have come of the first
// try in mind; nobody waits for that but all, who wait for everything: a target that
// takes nothing must not hold up another.
func (r *runner) handle(ctx context.Context, jobs []*job, all *sync.WaitGroup) {
	if r.ended.Err() != nil { // nothing more is to be claimed
		for _, j := range jobs {
			r.note(j, "", errStopped)
		}
		return
	}
	alone := func(work func()) {
		all.Go(func() {
			r.slots <- struct{}{}
			defer func() { <-r.slots }()
			work()
		})
	}
	claims := make([]*job, 0, len(jobs))
	for _, j := range jobs {
		if r.isPlain(j) {
			claims = append(claims, j)
			continue
		}
		alone(func() {
			why, err := r.replay(ctx, j)
			r.note(j, why, err)
		})
	}
	for _, j := range claims {
		j.change = r.claim()
		j.msg, j.opts = r.d.store.ChangeMessage(j.e, &j.change)
	}
	r.publish(ctx, claims)
	sends := make([]*job, 0, len(claims))
	for _, j := range claims {
		if j.err == nil {
			j.change.Sequence = j.ack.Sequence
			j.e.Apply(&j.change)
			r.isClaimed(j, j.e.Last)
			j.msg, j.opts = r.message(j.e, j.e.Record, j.e.Last, j.e.Stream)
			j.end = r.trace(ctx, j.e, j.msg)
			sends = append(sends, j)
			continue
		}
		alone(func() {
			why, err := r.replay(ctx, j)
			r.note(j, why, err)
		})
	}
	tried := !r.late()
	if tried {
		r.publish(ctx, sends)
	}
	for _, j := range sends {
		if tried && j.err == nil {
			j.end(nil)
			r.note(j, "", nil)
			continue
		}
		alone(func() { r.note(j, "", r.deliver(ctx, j.e, j.e.Last, j.msg, j.opts, j.end, tried)) })
	}
}

// isPlain reports whether an entry is to be sent to its consumer as it was
// captured, and all of it is in its record. Then it reads that.
func (r *runner) isPlain(j *job) bool {
	o, it := &r.s.Plan.Options, r.items[j.index]
	if j.m == nil || it.last != it.sequence || !o.tracked() || len(o.Patch) > 0 {
		return false
	}
	rec, err := dlq.Decode(j.m.header, j.m.data)
	if err != nil || rec.Body == dlq.BodyObject || rec.HeadersObject != "" || r.d.placed(rec, j.m.subject) != nil || r.notPlanned(rec) != "" {
		return false
	}
	j.e = dlq.NewEntry(rec, j.m.sequence, nil)
	return true
}

// A publishing is a message that is published with others.
type publishing struct {
	msg  *nats.Msg
	opts []jetstream.PublishOpt
	ack  *jetstream.PubAck
	err  error
}

// publish publishes messages, once, and then waits for what comes of them.
func (r *runner) publish(ctx context.Context, jobs []*job) {
	futures := make([]jetstream.PubAckFuture, len(jobs))
	for i, j := range jobs {
		if j.err = nats.ErrDisconnected; !r.d.nc.IsReconnecting() { // else it would be kept, and sent later
			futures[i], j.err = r.js.PublishMsgAsync(j.msg, j.opts...)
		}
	}
	for i, j := range jobs {
		if j.err != nil {
			continue
		}
		select {
		case j.ack = <-futures[i].Ok():
		case j.err = <-futures[i].Err():
		case <-ctx.Done():
			j.err = context.Cause(ctx)
		}
	}
}

// isClaimed notes that this run has claimed an entry, with the sequence of the
// claim.
func (r *runner) isClaimed(j *job, sequence uint64) {
	j.claimed = true
	r.mu.Lock()
	defer r.mu.Unlock()
	r.inHand--
	r.cond.Broadcast()
	if sequence > r.counted.Upto {
		r.unseen[sequence] = struct{}{}
	}
}

// note notes that an entry is done with, and why it was skipped. An error leaves it
// for the next run.
func (r *runner) note(j *job, why string, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes -= j.size
	if !j.claimed {
		r.inHand--
	}
	r.cond.Broadcast()
	if err != nil {
		if r.failure == nil && !errors.Is(err, errStopped) {
			r.failure = err
		}
		r.endLocked(StatusPaused, err)
		return
	}
	r.done[j.index] = why
	for {
		why, ok := r.done[r.s.Cursor]
		if !ok {
			return
		}
		delete(r.done, r.s.Cursor)
		r.s.Cursor++
		if why != "" {
			if r.s.Skipped == nil {
				r.s.Skipped = make(map[string]int)
			}
			r.s.Skipped[why]++
		}
	}
}

// replay claims and sends one entry. why says why it was skipped instead; one that
// is claimed and cannot be sent is released, which says it.
func (r *runner) replay(ctx context.Context, j *job) (why string, err error) {
	it, claimed := r.items[j.index], func(sequence uint64) { r.isClaimed(j, sequence) }
	e, why, err := r.read(ctx, it, j.m)
	if e == nil {
		return why, err
	}
	if e.Last != it.last {
		return r.again(ctx, e, it.last, claimed)
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
			there, err := r.d.has(ctx, r.d.cfg.Stream, messageGet{Sequence: it.sequence})
			if err == nil && there {
				return errNotVisible
			}
			why = "discarded meanwhile"
			return err
		case err != nil:
			return err
		case it.last != it.sequence:
			e, err = r.d.getAt(ctx, m.subject)
			switch {
			case errors.Is(err, ErrNotFound):
				e, why, err = nil, "discarded meanwhile", nil
			case errors.Is(err, errMisplaced):
				e, why, err = nil, errMisplaced.Error(), nil
			}
			return err
		}
		rec, err := dlq.Decode(m.header, m.data)
		if rec == nil {
			why = "it cannot be read"
			return nil
		}
		if r.d.placed(rec, m.subject) != nil {
			why = errMisplaced.Error()
			return nil //nolint:nilerr // it is skipped, as one that cannot be read
		}
		e = dlq.NewEntry(rec, m.sequence, nil)
		return err
	})
	return e, why, err
}

// again deals with an entry that is not as it was selected: this operation was
// interrupted while it had it in hand, or somebody else has done something. known is
// the last message on its subject that was known before.
func (r *runner) again(ctx context.Context, e *dlq.Entry, known uint64, claimed func(uint64)) (why string, err error) {
	var mine, last *dlq.Change
	for _, c := range e.History {
		last = c
		if c.Operation == r.id {
			mine = c
		}
	}
	switch {
	case e.State == dlq.StateDiscarded:
		return "discarded meanwhile", nil
	case mine != nil && mine.Kind == dlq.ChangeEdited && last == mine:
		return r.claimAndSend(ctx, e, claimed)
	case mine != nil && mine.Kind == dlq.ChangeReplaying && last == mine:
		return "", r.resend(ctx, e, mine.Sequence)
	case mine != nil && mine.Kind != dlq.ChangeEdited:
		return "", nil // it has its outcome, or was released
	case e.State == dlq.StateReplaying:
		return fmt.Sprintf("being replayed by %s, operation %s", e.Actor, e.Operation), nil
	case last == nil || last.Sequence <= known: // what came is no change
		return r.claimAndSend(ctx, e, claimed)
	}
	return fmt.Sprintf("%s meanwhile by %s", last.Kind, e.Actor), nil
}

// resend sends what was claimed before, unless that was done already.
func (r *runner) resend(ctx context.Context, e *dlq.Entry, claim uint64) error {
	sent := false
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		sent, err = r.sent(ctx, e, claim)
		return err
	})
	if sent || err != nil {
		return err
	}
	return r.sendEntry(ctx, e, claim)
}

// sent reports whether what was claimed is sent. A message that is gone from its
// stream has left its outcome first: so when neither is there it is not, unless it
// is on its way this moment. Of others than the consumer that failed that is not
// known: the message ID has it stored once within the stream's duplicate window.
func (r *runner) sent(ctx context.Context, e *dlq.Entry, claim uint64) (bool, error) {
	if !r.s.Plan.Options.tracked() {
		return false, nil
	}
	subject := r.d.store.SubjectOf(e.Record)
	there, err := r.isThere(ctx, e)
	if there || err != nil {
		return there, err
	}
	// To find that nothing has come after the claim is quick, to read a history is not.
	changed, err := r.d.has(ctx, r.d.cfg.Stream, messageGet{Sequence: claim + 1, Next: subject})
	if !changed || err != nil {
		return false, err
	}
	outcome, err := r.d.store.Settled(ctx, dlq.Replay{Stream: r.d.cfg.Stream, Subject: subject, ID: e.ID, Operation: r.id})
	return outcome != "", err
}

// isThere reports whether what is sent for an entry is in its stream. The operation may
// have been begun by a tool of an earlier version, which sends on another subject.
func (r *runner) isThere(ctx context.Context, e *dlq.Entry) (bool, error) {
	there, err := r.d.has(ctx, e.Stream, messageGet{Last: dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id)})
	if there || err != nil {
		return there, err
	}
	return r.d.has(ctx, e.Stream, messageGet{Last: dlq.OldReplaySubject(e.Stream, e.Consumer, e.ID, r.id)})
}

// A messageGet asks for one message of a stream.
type messageGet struct {
	Sequence uint64 `json:"seq,omitempty"`
	Next     string `json:"next_by_subj,omitempty"` // from Sequence on
	Last     string `json:"last_by_subj,omitempty"`
}

// has reports whether a stream has a message.
func (d *Desk) has(ctx context.Context, stream string, get messageGet) (bool, error) {
	sequence, err := d.ask(ctx, stream, get)
	return sequence != 0, err
}

// ask returns the sequence of a message, 0 if the stream does not have it. It asks
// the stream's leader: a replica, which may answer to other ways of asking, may not
// have it yet.
func (d *Desk) ask(ctx context.Context, stream string, get messageGet) (sequence uint64, err error) {
	request, err := json.Marshal(get)
	if err != nil {
		return 0, err
	}
	m, err := d.nc.RequestWithContext(ctx, d.apiSubject("STREAM.MSG.GET."+stream), request)
	if err != nil {
		return 0, fmt.Errorf("look for a message of stream %q: %w", stream, err)
	}
	var answer struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Sequence uint64 `json:"seq"`
		} `json:"message"`
	}
	switch err := json.Unmarshal(m.Data, &answer); {
	case err != nil:
		return 0, fmt.Errorf("look for a message of stream %q: %w", stream, err)
	case answer.Error == nil:
		return answer.Message.Sequence, nil
	case answer.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound, answer.Error.ErrorCode == jetstream.JSErrCodeStreamNotFound:
		return 0, nil
	}
	return 0, fmt.Errorf("look for a message of stream %q: %w", stream, answer.Error)
}

// claim is the change that claims an entry.
func (r *runner) claim() dlq.Change {
	o := &r.s.Plan.Options
	return dlq.Change{Kind: dlq.ChangeReplaying, Actor: r.d.cfg.Actor, Reason: o.Reason, Operation: r.id, Target: o.Target}
}

// claimAndSend takes an entry in hand and sends it.
func (r *runner) claimAndSend(ctx context.Context, e *dlq.Entry, claimed func(uint64)) (why string, err error) {
	o := &r.s.Plan.Options
	if _, why, err := r.destination(ctx, e.Record); why != "" || err != nil {
		return why, err
	}
	if len(o.Patch) > 0 && !(len(e.History) > 0 && e.History[len(e.History)-1].Operation == r.id) {
		if why, err := r.patch(ctx, e); why != "" || err != nil {
			return why, err
		}
	}
	err = r.retry(ctx, func(ctx context.Context) error {
		return r.d.store.Change(ctx, e, r.claim(), nil)
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
		return r.again(ctx, now, e.Last, claimed)
	case errors.Is(err, dlq.ErrStreamFull):
		return "", fmt.Errorf("%w: raise its limit, such as with `%s`",
			ErrFull, shell.Command("nats stream edit", []string{r.d.cfg.Stream}, "--max-bytes 2GiB"))
	case err != nil:
		return "", err
	}
	claimed(e.Last)
	return "", r.sendEntry(ctx, e, e.Last)
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
	if isGone(err) {
		return payloadGone, nil
	}
	if err != nil {
		return "", err
	}
	after, err := Patch(current.Data, o.Patch)
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

const payloadGone = "its payload is gone"

// isGone reports whether a payload will not be there later either.
func isGone(err error) bool {
	return isOneOf(err, jetstream.ErrObjectNotFound, jetstream.ErrBucketNotFound, jetstream.ErrMsgNotFound, dlq.ErrObject)
}

// sendEntry sends what is claimed. If that cannot be done, the entry is released.
func (r *runner) sendEntry(ctx context.Context, e *dlq.Entry, claim uint64) error {
	var current *dlq.Record
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		current, err = r.d.Current(ctx, e)
		return err
	})
	if isGone(err) {
		return r.release(ctx, e, payloadGone)
	}
	if err != nil {
		return err
	}
	owner, why, err := r.destination(ctx, e.Record)
	if why != "" {
		return r.release(ctx, e, why)
	}
	if err != nil {
		return err
	}
	msg, opts := r.message(e, current, claim, owner)
	return r.deliver(ctx, e, claim, msg, opts, r.trace(ctx, e, msg), false)
}

// deliver publishes what is sent for an entry. tried is that this was tried before
// and what came of it is not known; end ends its span.
func (r *runner) deliver(
	ctx context.Context, e *dlq.Entry, claim uint64, msg *nats.Msg, opts []jetstream.PublishOpt, end func(error), tried bool,
) error {
	tracked := r.s.Plan.Options.tracked()
	err := r.retry(ctx, func(ctx context.Context) error {
		// The answer to the try before may be lost, and the message handled since, and
		// gone from its stream: then that would store another.
		if tried || r.late() {
			if sent, err := r.sent(ctx, e, claim); sent || err != nil {
				return err
			}
		}
		if r.d.nc.IsReconnecting() {
			return nats.ErrDisconnected // it would be kept, and sent later, whoever may have done so by then
		}
		tried = true
		_, err := r.d.js.PublishMsg(ctx, msg, opts...)
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
	why := ""
	switch {
	case ok && api.ErrorCode == codeWrongLastSequence && tracked:
		err = nil // it is there
	case errors.Is(err, errNoStream):
		why = fmt.Sprintf("no stream takes subject %q", targetName(msg.Subject, tracked))
	case errors.Is(err, nats.ErrMaxPayload), ok && api.ErrorCode == codeTooLarge:
		why = "too large for its stream, with what a replay adds"
	case ok && api.ErrorCode == codeOtherStream:
		why = "another stream takes its subject now"
	}
	if why != "" {
		return r.release(ctx, e, why)
	}
	if err != nil || tracked {
		return err
	}
	sent := dlq.Change{Kind: dlq.ChangeSent, Actor: r.d.cfg.Actor, Operation: r.id, Target: r.s.Plan.Options.Target}
	err = r.retry(ctx, func(ctx context.Context) error { return r.d.store.Change(ctx, e, sent, nil) })
	return ignore(err, dlq.ErrEntryChanged) // somebody forced it
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
		// Who failed is an App's, which consumes declared subjects.
		dead.Subject, dead.Template, dead.Stream = e.Subject, e.Subject, e.Stream
	}
	op := r.d.cfg.Telemetry.Replay(ctx, &dead)
	maps.Copy(msg.Header, op.Header)
	return op.End
}

// targetName leaves out what is of one entry.
func targetName(subject string, tracked bool) string {
	if tracked {
		const tokens = 4 // monotel.replays.<stream>.<consumer>
		return strings.Join(strings.SplitN(subject, ".", tokens+1)[:tokens], ".") + ".>"
	}
	return subject
}

const (
	codeWrongLastSequence = 10071
	codeIDInProcess       = 10158
	codeSubjectInProcess  = 10164
	codeTooLarge          = 10054
	codeOtherStream       = 10060
)

// notPlanned says why an entry is not for a consumer of the plan, or "". What is stored
// of an operation may be changed by others, and so may what it selects.
func (r *runner) notPlanned(rec *dlq.Record) string {
	if r.planned[[2]string{rec.Stream, rec.Consumer}] {
		return ""
	}
	return cmp.Or(nameProblem(rec.Stream, rec.Consumer), "its consumer is not in the plan")
}

// destination returns the stream that takes what is sent for a record. Otherwise it
// says why nothing is sent.
func (r *runner) destination(ctx context.Context, rec *dlq.Record) (owner, why string, err error) {
	o := &r.s.Plan.Options
	switch {
	case o.tracked():
		return rec.Stream, r.notPlanned(rec), nil
	case o.Target != TargetEveryone:
		return r.owner, "", nil
	}
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		owner, why, err = r.owners.of(ctx, rec)
		return err
	})
	return owner, why, err
}

// message is what is sent for an entry. owner is the stream that takes it.
func (r *runner) message(e *dlq.Entry, current *dlq.Record, claim uint64, owner string) (*nats.Msg, []jetstream.PublishOpt) {
	o := &r.s.Plan.Options
	msg := &nats.Msg{Subject: current.Subject, Data: current.Data, Header: replayHeader(e, current, r.d.cfg.Stream, r.id, claim)}
	opts := []jetstream.PublishOpt{
		jetstream.WithRetryAttempts(0), jetstream.WithMsgID(r.id + "." + e.ID), jetstream.WithExpectStream(owner),
	}
	if subject, ok := strings.CutPrefix(o.Target, TargetSubject); ok {
		msg.Subject = subject
	}
	if o.tracked() {
		msg.Subject = dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id)
		opts = append(opts, jetstream.WithExpectLastSequencePerSubject(0))
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
		if isTraceHeader(k) {
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

// isTraceHeader reports whether a header continues a trace.
func isTraceHeader(key string) bool {
	switch strings.ToLower(key) {
	case "traceparent", "tracestate", "baggage":
		return true
	}
	return false
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
	const first, longest = 100 * time.Millisecond, 2 * time.Second
	for wait := first; ; wait = min(2*wait, longest) {
		try, cancel := context.WithTimeout(ctx, answerTime)
		err := f(try)
		cancel()
		if err == nil || !passes(err) && ctx.Err() == nil {
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
		// A cluster without a leader, or one that has not applied the try before yet.
		return api.Code == 503 || api.ErrorCode == codeSubjectInProcess || api.ErrorCode == codeIDInProcess //nolint:mnd // as above
	case errors.Is(err, nats.ErrPermissionViolation), errors.Is(err, nats.ErrConnectionClosed):
		return false
	}
	return isOneOf(err, errNotVisible, errStalled, nats.ErrTimeout, context.DeadlineExceeded, nats.ErrNoResponders,
		jetstream.ErrNoStreamResponse, jetstream.ErrJetStreamNotEnabled, nats.ErrDisconnected, nats.ErrReconnectBufExceeded)
}

func isOneOf(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}

// releaseUnsent gives back what a runner had in hand when it ended: claimed, and
// neither sent nor settled.
func (d *Desk) releaseUnsent(ctx context.Context, s *stored) error {
	claims, err := d.unsettled(ctx, s)
	if err != nil {
		return fmt.Errorf("operation %s: look for what it had in hand, to give it back: %w; cancel it again", s.Plan.ID, err)
	}
	r := &runner{d: d, id: s.Plan.ID, s: s}
	n, err := each(claims, func(subject string, claim uint64) error { return r.releaseIfUnsent(ctx, subject, claim) })
	if err != nil {
		return fmt.Errorf("operation %s: of %d that it had in hand it is not known whether they are to be given back: cancel it again: %w",
			s.Plan.ID, n, err)
	}
	return nil
}

// each calls f for the claims, several at a time. It returns how many have failed, and
// one of the errors.
func each(claims map[string]uint64, f func(subject string, claim uint64) error) (failed int, err error) {
	queue := make(chan string)
	errs := make(chan error, len(claims))
	var all sync.WaitGroup
	for range min(inWork, len(claims)) {
		all.Go(func() {
			for subject := range queue {
				if err := f(subject, claims[subject]); err != nil {
					errs <- err
				}
			}
		})
	}
	for subject := range claims {
		queue <- subject
	}
	close(queue)
	all.Wait()
	if failed = len(errs); failed > 0 {
		err = <-errs
	}
	return failed, err
}

// claimedEntry is what a subject and its claim say of an entry, without reading it.
func claimedEntry(subject string, claim uint64) *dlq.Entry {
	var names [6]string // monotel.dlq.<dead-letter stream>.<stream>.<consumer>.<ID>
	copy(names[:], strings.Split(subject, "."))
	e := dlq.NewEntry(&dlq.Record{Stream: names[3], Consumer: names[4], ID: names[5]}, claim, nil)
	e.State = dlq.StateReplaying
	return e
}

// releaseIfUnsent gives an entry back, unless it is sent. If anything has come after
// the claim it is not released.
func (r *runner) releaseIfUnsent(ctx context.Context, subject string, claim uint64) error {
	e := claimedEntry(subject, claim)
	if !r.s.Plan.Options.tracked() {
		return r.release(ctx, e, whyUnknown)
	}
	there := false
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		there, err = r.isThere(ctx, e)
		return err
	})
	if there || err != nil {
		return err
	}
	return r.release(ctx, e, whyCancelled)
}

// unsettled are the subjects of the entries that an operation has claimed and that
// have no outcome, with the sequences of the claims. These are all after its
// selection was frozen.
func (d *Desk) unsettled(ctx context.Context, s *stored) (map[string]uint64, error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	claims := make(map[string]uint64)
	for lo := s.Plan.Upto + 1; lo <= info.State.LastSeq; {
		rd, err := d.readSome(ctx, lo, min(lo+chunk-1, info.State.LastSeq), true)
		if err != nil {
			return nil, err
		}
		lo = rd.upto + 1
		for i := range rd.messages {
			m := &rd.messages[i]
			if m.header.Get(dlq.HeaderChangeOperation) != s.Plan.ID {
				continue
			}
			switch dlq.ChangeKind(m.header.Get(dlq.HeaderChange)) {
			case dlq.ChangeReplaying:
				claims[m.subject] = m.sequence
			case dlq.ChangeEdited:
			default:
				delete(claims, m.subject)
			}
		}
	}
	return claims, nil
}

// resume sends what an earlier run has claimed and not sent. It counts as in
// flight, and the gate would wait for it.
func (r *runner) resume(ctx context.Context) error {
	claims, err := r.d.unsettled(ctx, r.s)
	if err != nil {
		return err
	}
	_, err = each(claims, func(subject string, claim uint64) error {
		var e *dlq.Entry
		err := r.retry(ctx, func(ctx context.Context) (err error) {
			if sent, err := r.sent(ctx, claimedEntry(subject, claim), claim); sent || err != nil {
				return err
			}
			e, err = r.d.getAt(ctx, subject)
			return err
		})
		switch {
		case e == nil: // it is sent, or gone
			return ignore(err, ErrNotFound)
		case errors.Is(err, errMisplaced):
			return nil
		case len(e.History) == 0 || e.History[len(e.History)-1].Sequence != claim: // somebody has taken it by force
			return nil
		}
		return r.sendEntry(ctx, e, claim)
	})
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
