package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/monotel/monotel/telemetry/messaging"
)

// A message that is decided and whose dead letter, or outcome of a replay, cannot be
// stored is held: the consumer keeps its lease and the verdict, so that no handler
// gets it, here or in another instance. It does not keep the payload, which is read
// from the stream when there is room to store it.
//
// The verdict ends with the process, with Stop, or with the lease. Then a handler
// decides again.

const (
	leastHold = time.Second // until the next try
	mostHold  = 10 * time.Second
)

// A heldMessages holds messages, and tries again to store what is decided of them.
type heldMessages struct {
	c *streamConsumer

	n    atomic.Int64
	full atomic.Bool // the server delivers nothing else: all it may have unacknowledged is held

	mu      sync.Mutex
	all     map[uint64]*heldMessage // by stream sequence
	running bool
	ended   bool
	runner  sync.WaitGroup
}

type heldMessage struct {
	*Msg // without payload and headers

	verdict verdict
}

func newHeldMessage(c *streamConsumer, m *Msg, ctx context.Context, v verdict) *heldMessage { //nolint:revive // of the message
	both := &struct {
		msg Msg
		del delivery
	}{
		msg: Msg{Subject: m.Subject, ctx: ctx},
		del: delivery{consumer: c, reply: m.reply, consumerSequence: m.consumerSequence, replay: m.replay},
	}
	both.del.sized.Store(sized(m.bytes()))
	h := &heldMessage{Msg: &both.msg, verdict: v}
	h.delivery = &both.del
	h.state.Store(stateSettling)
	return h
}

// hold keeps a message whose dead letter or outcome could not be stored because of err.
func (c *streamConsumer) hold(m *Msg, v verdict, err error) error {
	c.reportHeld(m, &v, err)
	h := newHeldMessage(c, m, m.ctx, v)
	m.tel.Keep(&h.tel)
	h.lease.at.Store(m.lease.at.Load())
	if !c.held.add(h) { // Stop is over with what is held
		return c.nak(m, handBackDelay, v.cause)
	}
	m.state.Store(stateHeld)
	c.tel.Abandon(m.Context(), &m.tel, v.cause)
	return nil
}

// reportHeld says that a message is held because of err.
func (c *streamConsumer) reportHeld(m *Msg, v *verdict, err error) {
	text := "dead letter not captured, the message is held, will retry"
	attrs := []slog.Attr{slog.Int64("held", c.held.n.Load())}
	if m.replay != nil {
		text = "outcome of a replay not stored, the message is held, will retry"
		attrs = append(attrs, slog.String("dead_letter", m.replay.ID))
	}
	if !v.resolved {
		attrs = append(attrs, slog.String("reason", string(v.reason)))
	}
	c.report(slog.LevelError, text, m, err, attrs...)
}

// add holds a message, unless the consumer is stopping.
func (h *heldMessages) add(m *heldMessage) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ended {
		return false
	}
	if h.all == nil {
		h.all = make(map[uint64]*heldMessage)
	}
	h.all[m.sequence()] = m
	h.n.Store(int64(len(h.all)))
	if !h.running {
		h.running = true
		h.runner.Go(h.run)
	}
	return true
}

// remove reports whether the message was still held.
func (h *heldMessages) remove(m *heldMessage) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.all[m.sequence()] != m {
		return false
	}
	delete(h.all, m.sequence())
	h.n.Store(int64(len(h.all)))
	return true
}

// delivered reports whether a delivery is of a message that is held: it renews the
// lease. If another instance had the message in between, the verdict has ended.
func (h *heldMessages) delivered(m *Msg, now time.Duration, trusted bool) bool {
	if h.n.Load() == 0 {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	old := h.all[m.sequence()]
	if old == nil {
		return false
	}
	if old.tel.Stored == m.tel.Stored && m.attempt() == old.attempt()+1 {
		again := newHeldMessage(h.c, m, old.ctx, old.verdict)
		old.tel.Keep(&again.tel)
		again.tel.Attempt = m.tel.Attempt
		again.lease.begin(now, trusted)
		h.all[m.sequence()] = again // the runner may be at work with old
		return true
	}
	delete(h.all, m.sequence())
	h.n.Store(int64(len(h.all)))
	return false
}

// leases appends the deliveries whose leases are due.
func (h *heldMessages) leases(due []*delivery, now, age time.Duration) []*delivery {
	if h.n.Load() == 0 {
		return due
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.all {
		if m.lease.untouched(now) >= age {
			due = append(due, m.delivery)
		}
	}
	return due
}

// endLeases trusts no lease any more of what is held and came through p.
func (h *heldMessages) endLeases(p *puller) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, m := range h.all {
		if h.c.pullerOf(m.delivery) == p {
			m.lease.end()
		}
	}
}

// forget lets go of everything: the stream is gone.
func (h *heldMessages) forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.all)
	h.n.Store(0)
}

// snapshot lists what is held, oldest first.
func (h *heldMessages) snapshot() []*heldMessage {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := make([]*heldMessage, 0, len(h.all))
	for _, m := range h.all {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b *heldMessage) int {
		if a.sequence() < b.sequence() {
			return -1
		}
		return 1
	})
	return all
}

// run tries to settle what is held until nothing is left, or the consumer stops.
func (h *heldMessages) run() {
	delay := leastHold
	for {
		select {
		case <-h.c.ending:
			return
		case <-time.After(delay + rand.N(delay/4)): //nolint:gosec,mnd // instances should not try together
		}
		if h.settleAll() {
			delay = leastHold
		} else {
			delay = min(2*delay, mostHold) //nolint:mnd // doubled
			h.look()
		}
		h.mu.Lock()
		if len(h.all) == 0 {
			h.running = false
			h.mu.Unlock()
			if h.full.Swap(false) {
				h.c.rt.log.LogAttrs(h.c.rt.base, slog.LevelWarn, "consumer no longer held", consumerAttrs(h.c.info)...)
			}
			return
		}
		h.mu.Unlock()
	}
}

// settleAll tries each message, and reports whether every one was settled. It stops where
// no other would fare better.
func (h *heldMessages) settleAll() bool {
	all := true
	for _, m := range h.snapshot() {
		select {
		case <-h.c.ending:
			return false
		default:
		}
		if h.c.leaseEnded(m.Msg) {
			if h.remove(m) {
				_ = h.c.lapse(m.Msg, &m.verdict, m.verdict.cause)
			}
			continue
		}
		if err := h.c.settleHeld(m); err != nil {
			if concernsAll(err) {
				return false
			}
			all = false
		}
	}
	return all
}

// settleHeld stores what is decided of a held message and settles it. An error says
// that it is still held.
func (c *streamConsumer) settleHeld(h *heldMessage) (err error) {
	if h.verdict.resolved {
		if err = c.resolve(h.Msg); err == nil {
			c.held.remove(h)
			c.history.forget(h.Msg)
			_ = c.send(h.Msg, messaging.Ack, wireAck, nil)
			return nil
		}
		c.reportHeld(h.Msg, &h.verdict, err)
		return err
	}
	if !c.rt.isResumed() { // the answer would come when the lease may have ended
		return ErrDisconnected
	}
	v := h.verdict
	m, gone, err := c.read(h)
	if err == nil {
		v.gone = gone
		err = c.captureAndTerm(m, &v)
	}
	if unstored, ok := errors.AsType[*unstoredError](err); ok {
		c.reportHeld(h.Msg, &v, unstored.err)
		return err
	}
	if errors.Is(err, errAnotherMessage) {
		c.held.remove(h)
		return nil
	}
	if err == nil || m != nil { // not terminated, but captured: it comes again and is found to be
		c.held.remove(h)
		return nil
	}
	c.report(slog.LevelError, "held message cannot be read from its stream, will retry", h.Msg, err)
	return err
}

// errAnotherMessage reports that the stream was made again: its sequences are those of
// other messages.
var errAnotherMessage = errors.New("the sequence is another message's")

// read fetches a held message's headers and payload from its stream, from the leader,
// as the delivery brought them. A message that is gone from its stream has neither.
func (c *streamConsumer) read(h *heldMessage) (m *Msg, gone bool, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), captureTimeout)
	defer cancel()
	stored, err := c.rt.api.Get(ctx, c.info.Stream, h.sequence())
	m = &Msg{delivery: h.delivery, Subject: h.Subject, ctx: h.ctx}
	switch {
	case err != nil:
		return nil, false, fmt.Errorf("message %d of stream %q: %w", h.sequence(), c.info.Stream, err)
	case stored == nil:
		return m, true, nil
	case stored.Time.UnixNano() != h.tel.Stored:
		return nil, false, errAnotherMessage
	}
	m.Data, m.Subject = stored.Data, stored.Subject
	if m.Header, err = stored.Header(); err != nil {
		m.Header = nil
	}
	if m.Subject != c.info.Event.Subject {
		c.unwrap(m)
	}
	return m, false, nil
}

// look finds out whether the consumer stands still: everything that the server may
// have unacknowledged is held, here or in other instances.
func (h *heldMessages) look() {
	limit := h.c.cfg.Consumer.MaxAckPending
	if limit <= 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(h.c.work), lookUpTimeout)
	defer cancel()
	consumer, err := h.c.rt.js.Consumer(ctx, h.c.info.Stream, h.c.info.Durable)
	if err != nil {
		return
	}
	full := consumer.CachedInfo().NumAckPending >= limit
	if h.full.Swap(full) != full && full {
		h.c.rt.log.LogAttrs(h.c.rt.base, slog.LevelError,
			"consumer held: as many messages as MaxAckPending wait to be captured, nothing else is delivered; make room in the dead-letter stream",
			append(consumerAttrs(h.c.info), slog.Int64("held", h.n.Load()), slog.Int("max_ack_pending", limit),
				slog.String("dead_letter_stream", h.c.rt.dead.stream))...)
	}
}

// ErrHeld reports a consumer that gets no messages because as many as its
// MaxAckPending are held: they were given up, and the dead-letter stream does not take
// them. It is an error of [App.Health].
var ErrHeld = errors.New("held")

func (h *heldMessages) health() error {
	if !h.full.Load() {
		return nil
	}
	return fmt.Errorf("stream %q: %w: %d messages wait to be captured in stream %q; make room there",
		h.c.info.Stream, ErrHeld, h.n.Load(), h.c.rt.dead.stream)
}

// stop hands back what is held: the verdicts end here.
func (h *heldMessages) stop() {
	h.mu.Lock()
	h.ended = true
	h.mu.Unlock()
	h.runner.Wait()
	for _, m := range h.snapshot() {
		if h.remove(m) {
			_ = h.c.nak(m.Msg, handBackDelay, m.verdict.cause)
		}
	}
}
