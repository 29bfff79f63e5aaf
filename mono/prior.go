package mono

import (
	"context"
	"log/slog"
	"math"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/monotel/monotel/dlq"
)

// Before a handler gets a message, the consumer asks whether that message was decided
// before: captured, or, of a replay, given an outcome. This happens when the process that
// decided ended before the server had recorded the settlement, and when the server has
// lost what it knew.
//
// A message that is delivered again is looked up, unless its last attempt ended here.
// One that is delivered for the first time is looked up if the server may have lost
// its state since: it was stored before this connection was made, or before a change
// of the consumer's leader. For those a list of the consumer's dead letters is read
// once, so that a long backlog costs no request for each message.

const (
	lookUpTimeout  = 5 * time.Second        // for one look
	lookUpPause    = 250 * time.Millisecond // between two
	lookUpPatience = 15 * time.Second       // then handlers get messages that could not be looked up
)

// leftReserve is how many deliveries more than it has attempts a message may have whose
// handler returns nil and leaves it.
const leftReserve = 3

// unknown is an end of the messages to look up that is not known yet.
const unknown = math.MaxUint64

// A priorState knows which first deliveries may be repeats.
type priorState struct {
	// Sequences of the last message that may have been decided before: of events, 0 if
	// there are no dead letters, and of replays.
	events, replays atomic.Uint64

	mu       sync.Mutex
	resets   atomic.Uint32
	captured atomic.Pointer[dlq.CapturedSet]

	failing atomic.Int64 // since when nothing can be looked up, as uptime; 0: it can
	paused  atomic.Int64 // until when nobody tries, as uptime
}

// reset says that the server may have lost its state.
func (p *priorState) reset() {
	p.mu.Lock()
	p.resets.Add(1)
	p.captured.Store(nil)
	p.events.Store(unknown)
	p.replays.Store(unknown)
	p.mu.Unlock()
}

// isKnown reports whether what was decided was read since the last reset.
func (p *priorState) isKnown() bool { return p.replays.Load() != unknown }

// mayBeDecided reports whether a message must be looked up, or what was decided be read
// first.
func (c *streamConsumer) mayBeDecided(m *Msg) bool {
	p := &c.prior
	switch {
	case m.attempt() > 1:
		return true
	case m.replay != nil:
		return m.sequence() <= p.replays.Load() || c.maybeSettled(m)
	case m.sequence() > p.events.Load():
		return false
	}
	return !p.isKnown() || p.captured.Load().Has(c.recordID(m))
}

// readPrior reads what was decided until now, unless that was done since the last reset.
func (c *streamConsumer) readPrior(ctx context.Context) error {
	p := &c.prior
	resets := p.resets.Load()
	if p.isKnown() {
		return nil
	}
	stream, err := c.rt.js.Stream(ctx, c.info.Stream)
	if err != nil {
		return err
	}
	captured, err := c.rt.dead.store.CapturedOf(ctx, c.info.Stream, c.info.Durable)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.resets.Load() != resets {
		return nil // and it is read again
	}
	last := stream.CachedInfo().State.LastSeq
	p.captured.Store(captured)
	p.replays.Store(last)
	if captured == nil {
		last = 0
	}
	p.events.Store(last)
	return nil
}

// sift settles the messages of a batch that no handler is to see, and returns the
// others.
func (c *streamConsumer) sift(batch []*Msg) []*Msg {
	if c.rt.dead == nil {
		return batch
	}
	if !slices.ContainsFunc(batch, c.mayBeDecided) {
		return batch
	}
	rest := make([]*Msg, 0, len(batch))
	var back []*Msg
	for _, m := range batch {
		switch s := c.decidedBefore(m); {
		case s == nil:
			rest = append(rest, m)
		case s.kind == settleBack:
			back = append(back, m)
		default:
			_ = c.finish(m, *s)
		}
	}
	c.handBack(back)
	return rest
}

// loseState is called when the server may have lost its state of the durable: other
// instances may have what is here of it. It says nothing of the consumer's other durable,
// whose messages stay: the durable for replays has no leader while it is being made.
func (p *puller) loseState() {
	p.c.prior.reset()
	p.endLeases()
	p.c.held.endLeases(p)
}

// decidedBefore returns what is to be done with a message that has just arrived
// without its handler, or nil.
func (c *streamConsumer) decidedBefore(m *Msg) *settlement {
	var known *remembered
	endedHere := false // the attempt before this one
	if m.attempt() > 1 {
		known = c.history.of(m)
		endedHere = known != nil && known.attempt+1 == m.attempt() && known.resets == c.prior.resets.Load()
	}
	switch {
	case known != nil && known.verdict != nil && (endedHere || known.verdict.resolved):
		return new(known.verdict.settlement())
	case endedHere && known.left && c.attemptOf(m) > leftReserve && c.cfg.Retry.last(c.attemptOf(m)-leftReserve):
		return &settlement{kind: settleDead, verdict: verdict{
			reason: dlq.ReasonAttemptsExhausted, text: "the handler returned nil and left the message unsettled",
		}}
	case endedHere && known.sure, !c.mayBeDecided(m):
		return nil
	}
	if m.attempt() > 1 {
		c.readHandedBack()
	}
	return c.lookUp(m)
}

// lookUp asks the dead-letter stream. While that does not answer the message waits
// here, its lease kept: a handler might repeat what is decided. After lookUpPatience it
// gets the message all the same.
func (c *streamConsumer) lookUp(m *Msg) *settlement {
	p := &c.prior
	for {
		if uptime() >= time.Duration(p.paused.Load()) { // others wait for the one that asks
			v, err := c.lookOnce(m)
			if err == nil {
				p.failing.Store(0)
				if v == nil {
					return nil
				}
				return new(v.settlement())
			}
			now := uptime()
			p.failing.CompareAndSwap(0, int64(now))
			p.paused.Store(int64(now + capturePause))
			c.report(slog.LevelWarn, "dead letters cannot be looked up; a message that may be decided already waits", m, err)
		}
		if since := time.Duration(p.failing.Load()); since != 0 && uptime()-since > lookUpPatience {
			c.report(slog.LevelWarn, "dead letters cannot be looked up; the handler gets a message that may be decided already", m, nil)
			return nil
		}
		select {
		case <-c.ending:
			return &settlement{kind: settleBack}
		case <-time.After(lookUpPause):
		}
	}
}

func (c *streamConsumer) lookOnce(m *Msg) (*verdict, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), lookUpTimeout)
	defer cancel()
	if m.attempt() == 1 {
		if err := c.readPrior(ctx); err != nil {
			return nil, err
		}
		if c.prior.isKnown() && !c.mayBeDecided(m) {
			return nil, nil //nolint:nilnil // it is not decided, which is no error
		}
	}
	store := c.rt.dead.store
	if m.replay != nil {
		switch outcome, err := store.Settled(ctx, *m.replay); {
		case err != nil:
			return nil, err
		case outcome == dlq.ChangeResolved:
			return &verdict{resolved: true}, nil
		case outcome == dlq.ChangeFailedAgain:
			return &verdict{reason: dlq.ReasonTerminated, text: "failed again before, and not terminated then"}, nil
		}
	}
	holds, err := store.Holds(ctx, &dlq.Record{
		ID: c.recordID(m), Stream: c.info.Stream, Consumer: c.info.Durable, StreamSequence: m.sequence(), Stored: m.stored(),
	})
	if err != nil || !holds {
		return nil, err
	}
	return &verdict{reason: dlq.ReasonTerminated, text: "captured before, and not terminated then"}, nil
}
