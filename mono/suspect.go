package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/monotel/monotel/dlq"
)

// One message of a batch can fail the whole batch, or bring the process down. Only
// that one should be given up for it. So messages that were delivered before are
// handed over in smaller batches, and alone from the last attempt on.
//
// The number of deliveries says nothing about crashes: a message may have been handed
// back, or its policy changed. So a message whose attempts are used up still gets to
// its handler: alone, while no other handler of its consumer runs, and with a mark that
// is stored before and removed after. Marks that are left count the times that the
// process ended meanwhile.

const (
	mostMarks    = 3 // then the message is taken to bring its process down
	markTimeout  = 5 * time.Second
	marksPause   = 30 * time.Second // after a mark that could not be stored nobody tries
	aloneTimeout = 10 * time.Second // to wait for handlers that run
)

var errMarksPaused = errors.New("marks could not be stored a moment ago")

// batchLimit is how many messages may be handled together with one at an attempt,
// itself included.
func (c *streamConsumer) batchLimit(attempt uint64) int {
	if c.cfg.Retry.last(attempt) {
		return 1
	}
	const most = 30
	return max(c.cfg.Fetch.BatchSize>>min(attempt-1, most), 1)
}

// usedUp reports whether a message has had all of its attempts.
func (c *streamConsumer) usedUp(m *Msg) bool {
	attempt := c.attemptOf(m)
	return c.rt.dead != nil && attempt > 1 && c.cfg.Retry.last(attempt-1)
}

// handleMarked hands over a message whose attempts are used up.
func (c *streamConsumer) handleMarked(m *Msg) {
	limit := time.NewTimer(aloneTimeout)
	defer limit.Stop()
	select {
	case c.rt.lane <- struct{}{}: // one at a time in this process
		defer func() { <-c.rt.lane }()
	case <-limit.C: // unless one hangs
	case <-c.ending:
		c.handBack([]*Msg{m})
		return
	}
	if !c.gate.enterAlone(c.ending) {
		c.handBack([]*Msg{m})
		return
	}
	defer c.gate.leaveAlone()
	id := c.recordID(m)
	marks, err := c.mark(id)
	switch {
	case err != nil:
		c.report(slog.LevelWarn, "crash mark not stored; the message is handled without one", m, err)
	case marks >= mostMarks:
		_ = c.finish(m, settlement{kind: settleDead, verdict: verdict{
			reason: dlq.ReasonCrashed,
			text:   fmt.Sprintf("handed over alone %d times, and each time the process ended before there was an outcome", marks),
		}})
		if m.state.Load() == stateSettled {
			c.unmark(m, id)
		}
		return
	}
	defer c.unmark(m, id) // also one that was stored without an answer
	if own := c.take([]*Msg{m}); len(own) > 0 {
		c.call(own)
	}
}

// mark stores that a message is handed over, and returns how often it was before. When
// that is too often nothing is stored.
func (c *streamConsumer) mark(id string) (marks int, err error) {
	if uptime() < time.Duration(c.marksPaused.Load()) {
		return 0, errMarksPaused
	}
	defer func() {
		if err != nil {
			c.marksPaused.Store(int64(uptime() + marksPause))
		}
	}()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), markTimeout)
	defer cancel()
	was, err := c.rt.dead.store.Mark(ctx, id)
	if err != nil || was.Count >= mostMarks {
		return was.Count, err
	}
	return was.Count, c.rt.dead.store.AddMark(ctx, id, was)
}

func (c *streamConsumer) unmark(m *Msg, id string) {
	if uptime() < time.Duration(c.marksPaused.Load()) {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), markTimeout)
	defer cancel()
	if err := c.rt.dead.store.RemoveMark(ctx, id); err != nil {
		c.report(slog.LevelWarn, "mark of a message not removed; if it comes again, that counts as a crash", m, err)
	}
}

// flush waits until the server has read what was sent, so that a crash with the next
// message does not undo what is settled.
func (c *streamConsumer) flush() {
	if !c.rt.nc.IsConnected() {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), markTimeout)
	defer cancel()
	_ = c.rt.nc.FlushWithContext(ctx) // or the connection is gone, which is reported elsewhere
}

// A gate lets one message be handled while no other is. It is like an RWMutex, with two
// differences: neither side waits for longer than aloneTimeout, and both give up when
// the consumer stops. One worker needs none: a nil gate is open to it.
type gate struct {
	mu      sync.Mutex
	changed chan struct{} // closed, and made again, when alone or running changes
	running int
	alone   bool
	since   time.Time // when alone became true
}

func newGate(workers int) *gate {
	if workers == 1 {
		return nil
	}
	return &gate{changed: make(chan struct{})}
}

// enter waits while a message is handled alone, up to aloneTimeout. It returns false if
// the consumer stops.
func (g *gate) enter(ending <-chan struct{}) bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.alone {
		limit := time.NewTimer(max(aloneTimeout-time.Since(g.since), 0))
		defer limit.Stop()
		for waits := true; g.alone && waits; {
			waits = g.wait(ending, limit.C)
		}
		select {
		case <-ending:
			return false
		default:
		}
	}
	g.running++
	return true
}

func (g *gate) leave() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.running--
	if g.running == 0 && g.alone {
		g.signal()
	}
}

// enterAlone keeps others from entering, and waits for those that have: up to
// aloneTimeout, as one of them may hang.
func (g *gate) enterAlone(ending <-chan struct{}) bool {
	if g == nil {
		return true
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.alone {
		if !g.wait(ending, nil) {
			return false
		}
	}
	g.alone, g.since = true, time.Now()
	limit := time.NewTimer(aloneTimeout)
	defer limit.Stop()
	for g.running > 0 {
		if !g.wait(ending, limit.C) {
			select {
			case <-ending:
				g.alone = false
				g.signal()
				return false
			default:
				g.since = time.Now()
				return true // one hangs
			}
		}
	}
	g.since = time.Now()
	return true
}

func (g *gate) leaveAlone() {
	if g == nil {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.alone = false
	g.signal()
}

// signal wakes those that wait. g.mu is held.
func (g *gate) signal() {
	close(g.changed)
	g.changed = make(chan struct{})
}

// wait waits for a change. It returns false if the consumer stops, or at the limit. g.mu
// is held before and after.
func (g *gate) wait(ending <-chan struct{}, limit <-chan time.Time) bool {
	changed := g.changed
	g.mu.Unlock()
	defer g.mu.Lock()
	select {
	case <-changed:
		return true
	case <-ending:
		return false
	case <-limit:
		return false
	}
}
