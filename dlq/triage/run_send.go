package triage

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"

	"github.com/monotel/monotel/dlq"
)

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
