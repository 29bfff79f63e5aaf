package main

import (
	"context"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq/triage"
)

// ownWorks are measured by the command regress alone: other libraries have no dead
// letters.
var ownWorks = []work{
	{name: workReplay, title: "replay dead letters to their consumer", measure: measureReplay},
	{name: workLive, title: "live events after replays, compared with before", measure: measureLive},
}

const (
	workReplay = "Replay"
	workLive   = "LiveAfterReplays"

	paramReplays = "replays"

	unitBefore  = "before-ns/op"
	unitAfter   = "after-ns/op"
	unitLive    = "after/before" // throughput
	unitLiveCPU = "cpu-after/before"

	liveSegments = 3
	liveSlowest  = 10 // a segment ends when it has taken so many times as long as one before
)

// A replayer is a program with one durable consumer and its dead letters.
type replayer struct {
	*running

	broken atomic.Bool
	count  atomic.Int64
	want   atomic.Int64
	done   chan struct{} // gets a value when want events are handled
	desk   *triage.Desk
	js     jetstream.JetStream
}

func startReplayer(ctx context.Context, b *bench, backlog int, broken bool) (r *replayer, err error) {
	r = &replayer{done: make(chan struct{}, 1)}
	r.broken.Store(broken)
	r.want.Store(-1)
	r.running, err = b.start(ctx, program{
		events: 1, stream: true, durable: 1, concurrency: 1, broken: &r.broken,
		handle: func(int, []byte) {},
		settled: func() {
			if r.count.Add(1) == r.want.Load() {
				r.done <- struct{}{}
			}
		},
	}, backlog)
	if err != nil {
		return nil, err
	}
	if r.js, err = jetstream.New(r.conn); err != nil {
		return nil, err
	}
	r.desk, err = triage.Open(ctx, r.conn, triage.Config{})
	return r, err
}

// captured waits until the consumer has given up on n events.
func (r *replayer) captured(ctx context.Context, n int) error {
	want := uint64(n) //nolint:gosec // a count
	dead, err := r.js.Stream(ctx, r.desk.Stream())
	if err != nil {
		return err
	}
	return until(func() (bool, error) {
		info, err := dead.Info(ctx)
		if err != nil || info.State.Msgs < want {
			return false, err
		}
		c, err := r.js.Consumer(ctx, streamName, durableName(0))
		if err != nil {
			return false, err
		}
		return c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0, nil
	})
}

// replay has every dead letter handled again, and returns when all are resolved.
func (r *replayer) replay(ctx context.Context, plan *triage.Plan, n int) error {
	op, err := r.desk.Run(ctx, plan.ID, nil)
	if err != nil {
		return err
	}
	if op.Resolved != n {
		return fmt.Errorf("%d of %d replays are resolved: %s", op.Resolved, n, op.Why)
	}
	return nil
}

func (r *replayer) plan(ctx context.Context, n int) (*triage.Plan, error) {
	plan, err := r.desk.Plan(ctx, triage.Selection{}, triage.Options{})
	if err != nil {
		return nil, err
	}
	if plan.Selected != n || len(plan.Problems) > 0 {
		return nil, fmt.Errorf("the plan selects %d of %d dead letters, with problems %q", plan.Selected, n, plan.Problems)
	}
	return plan, nil
}

// measureReplay measures from the start of the replay until every dead letter is
// resolved. An operation is one dead letter.
func measureReplay(ctx context.Context, b *bench) (result, error) {
	n := b.count(b.param(paramReplays))
	r, err := startReplayer(ctx, b, n, true)
	if err != nil {
		return result{}, err
	}
	if err := r.captured(ctx, n); err != nil {
		return result{}, err
	}
	r.broken.Store(false)
	plan, err := r.plan(ctx, n)
	if err != nil {
		return result{}, err
	}
	if err := b.on(); err != nil {
		return result{}, err
	}
	if err := r.replay(ctx, plan, n); err != nil {
		return result{}, err
	}
	res := b.off(n)
	if handled := r.count.Load(); handled != int64(n) {
		return result{}, fmt.Errorf("%d of %d replays were handled", handled, n)
	}
	return res, r.stop()
}

// measureLive measures how many live events a consumer takes before and after dead
// letters were replayed to it, each from the first publish to the last ack.
func measureLive(ctx context.Context, b *bench) (result, error) {
	n, replays := b.count(b.param(paramEvents)), b.count(b.param(paramReplays))
	r, err := startReplayer(ctx, b, 0, false)
	if err != nil {
		return result{}, err
	}
	publish, wait, err := b.publisher(r.conn, r.running)
	if err != nil {
		return result{}, err
	}
	send := func(n int) error {
		for i := range n {
			if err := publish(0, b.payload(i)); err != nil {
				return err
			}
		}
		return wait()
	}
	before, err := r.segments(ctx, n, patience, send)
	if err != nil {
		return result{}, err
	}
	r.broken.Store(true)
	if err := send(replays); err != nil {
		return result{}, err
	}
	if err := r.captured(ctx, replays); err != nil {
		return result{}, err
	}
	r.broken.Store(false)
	r.want.Store(-1)
	plan, err := r.plan(ctx, replays)
	if err != nil {
		return result{}, err
	}
	if err := r.replay(ctx, plan, replays); err != nil {
		return result{}, err
	}
	after, err := r.segments(ctx, n, max(liveSlowest*before.time/liveSegments, time.Second), send)
	if err != nil {
		return result{}, err
	}
	perEvent := func(d time.Duration) float64 { return float64(d) / float64(n*liveSegments) }
	res := result{n, []metric{
		{perEvent(before.time), unitBefore},
		{perEvent(after.time), unitAfter},
		{float64(before.time) / float64(after.time), unitLive},
		{float64(before.busy) / float64(after.busy), unitLiveCPU},
	}}
	if after.cutShort {
		return res, nil // do not wait for what is left
	}
	return res, r.stop()
}

// A segment is the time and the processor time of some events.
type segment struct {
	time, busy time.Duration
	cutShort   bool // not all events were handled; the times are extrapolated
}

// segments measures n events several times and returns the sums. The server's work
// for a message depends on what else is in the same block of the stream's file, so
// a slow segment between quick ones counts.
func (r *replayer) segments(ctx context.Context, n int, limit time.Duration, send func(int) error) (segment, error) {
	var sum segment
	for range liveSegments {
		s, err := r.segment(ctx, n, limit, send)
		if err != nil {
			return s, err
		}
		if s.cutShort {
			return segment{s.time * liveSegments, s.busy * liveSegments, true}, nil
		}
		sum.time, sum.busy = sum.time+s.time, sum.busy+s.busy
	}
	return sum, nil
}

// segment measures n events, or as many of them as are handled within limit.
func (r *replayer) segment(ctx context.Context, n int, limit time.Duration, send func(int) error) (segment, error) {
	runtime.GC()
	first := r.count.Load()
	r.want.Store(first + int64(n))
	begin, busy := time.Now(), processorTime()
	sent := make(chan error, 1)
	go func() { sent <- send(n) }()
	timeout := time.After(limit)
	var s segment
	select {
	case <-r.done:
	case <-timeout:
		s.cutShort = true
	case <-ctx.Done():
		return s, context.Cause(ctx)
	}
	s.time, s.busy = time.Since(begin), processorTime()-busy
	if s.cutShort {
		part := float64(n) / float64(max(r.count.Load()-first, 1))
		s.time, s.busy = time.Duration(float64(s.time)*part), time.Duration(float64(s.busy)*part)
		return s, nil
	}
	return s, <-sent
}
