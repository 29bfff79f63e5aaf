package mono

import (
	"context"
	"errors"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

type settleKind uint8

const (
	settleAck settleKind = iota
	settleNak
	settleNakDelay
	settleBack // nobody has begun with it
	settleDead
	settleError
)

// handBackDelay is the delay of messages that are handed back. The server writes down
// a nak with a delay only: one without is gone when it stops, too.
const handBackDelay = time.Millisecond

// A settlement is what somebody wants done with a delivery.
type settlement struct {
	kind    settleKind
	delay   time.Duration // of settleNakDelay
	verdict verdict       // of settleDead
	err     error         // of settleError
}

var (
	wireAck      = []byte("+ACK")
	wireNak      = []byte("-NAK")
	wireProgress = []byte("+WPI")
	// wireNothing is no settlement. The embedded server answers it in its turn;
	// +WPI would restart the AckWait of a message that was just handed back.
	wireNothing = []byte("?")
)

// A nak on the last attempt requests an attempt that the policy does not allow.
var nakOnLast = verdict{reason: dlq.ReasonAttemptsExhausted, text: "nak on the last attempt"}

// settle is the one place where a delivery leaves this process: each ack, nak,
// term and dead letter goes through here and nowhere else.
func (c *streamConsumer) settle(m *Msg, s settlement) error {
	attempt := c.attemptOf(m)
	switch s.kind {
	case settleAck:
		return c.ack(m)
	case settleNak:
		if c.cfg.Retry.last(attempt) {
			return c.deadLetter(m, nakOnLast)
		}
		if attempt > 1 {
			return c.nak(m, c.cfg.Retry.delay(attempt), nil)
		}
		return c.nak(m, 0, nil)
	case settleBack:
		return c.nak(m, handBackDelay, ErrStopped)
	case settleNakDelay:
		if c.cfg.Retry.last(attempt) {
			return c.deadLetter(m, nakOnLast)
		}
		return c.nak(m, s.delay, nil)
	case settleDead:
		return c.deadLetter(m, s.verdict)
	case settleError:
		return c.settleError(m, s.err)
	}
	panic("unreachable: unknown settlement")
}

func (c *streamConsumer) ack(m *Msg) error {
	if c.rt.dead != nil {
		if m.replay != nil {
			if err := c.resolve(m); err != nil {
				return c.hold(m, verdict{resolved: true}, err)
			}
		}
		if m.attempt() > 1 {
			c.history.forget(m)
		}
	}
	return c.send(m, messaging.Ack, wireAck, nil)
}

// settleError follows a handler's error, which is an instruction.
func (c *streamConsumer) settleError(m *Msg, err error) error {
	attempt := c.attemptOf(m)
	if c.work.Err() != nil {
		// Stop cut the handler short. That says nothing about the message, so it
		// is handed back, whatever the number of its attempts.
		return c.nak(m, handBackDelay, err)
	}
	_, undecodable := errors.AsType[*DecodeError](err)
	_, panicked := errors.AsType[*PanicError](err)
	switch {
	case undecodable:
		return c.deadLetter(m, verdict{reason: dlq.ReasonUndecodable, text: err.Error(), cause: err})
	case IsPermanent(err):
		return c.deadLetter(m, verdict{reason: dlq.ReasonPermanentError, text: err.Error(), cause: err})
	case c.cfg.Retry.last(attempt) && panicked:
		return c.deadLetter(m, verdict{reason: dlq.ReasonPanic, text: err.Error(), cause: err})
	case c.cfg.Retry.last(attempt):
		return c.deadLetter(m, verdict{reason: dlq.ReasonAttemptsExhausted, text: err.Error(), cause: err})
	}
	delay := c.cfg.Retry.delay(attempt)
	if after, ok := errors.AsType[*retryAfterError](err); ok {
		delay = after.delay
	}
	c.report(slog.LevelWarn, "handler failed, will retry", m, err, slog.Duration("delay", delay))
	if c.rt.dead != nil {
		c.history.failed(m)
	}
	return c.nak(m, delay, err)
}

// send sends a settlement and records it. cause is the error that it follows, if
// any.
func (c *streamConsumer) send(m *Msg, kind messaging.Settlement, body []byte, cause error) error {
	return c.sendWith(m, kind, body, cause, func(m *Msg, body []byte) error { return c.reply(m.delivery, body) })
}

// term sends a term and waits until the server has acted on it: what is
// dead-lettered comes again unless it has.
func (c *streamConsumer) term(ctx context.Context, m *Msg, body []byte, cause error) error {
	return c.sendWith(m, messaging.Term, body, cause, func(m *Msg, body []byte) error {
		_, err := c.rt.nc.RequestWithContext(ctx, m.reply, body)
		if errors.Is(err, nats.ErrNoResponders) {
			return nil // the consumer is gone, and with it the message's place
		}
		return err
	})
}

func (c *streamConsumer) sendWith(m *Msg, kind messaging.Settlement, body []byte, cause error, send func(*Msg, []byte) error) error {
	if kind == messaging.Ack || kind == messaging.Term {
		m.final = &wireAck
		if kind == messaging.Term {
			m.final = new(body)
		}
	}
	ctx := m.Context()
	var now time.Time
	if c.tel.Timed(ctx) { // reading the clock is no small part of what is recorded
		now = time.Now()
	}
	late := c.leaseEnded(m)
	op := c.tel.Settle(ctx, &m.tel, kind)
	err := send(m, body)
	op.End(err, now, late, cause)
	if err == nil && (kind == messaging.Ack || kind == messaging.Term) {
		c.finished(m)
	}
	return err
}

// nak hands the message back. Its state says so before the server knows: the
// next delivery may be here before this call has returned.
func (c *streamConsumer) nak(m *Msg, delay time.Duration, cause error) error {
	if c.leaseEnded(m) {
		return c.lapse(m, nil, cause)
	}
	if c.rt.dead != nil {
		c.history.note(m, func(k *remembered) { k.sure = true }) // this process knows that it is not captured
	}
	m.state.Store(stateReturned)
	if delay <= 0 {
		return c.send(m, messaging.Nak, wireNak, cause)
	}
	b := append(make([]byte, 0, 40), `-NAK {"delay": `...)
	b = strconv.AppendInt(b, delay.Nanoseconds(), 10)
	return c.send(m, messaging.NakDelay, append(b, '}'), cause)
}

const maxReasonLen = 512

// oneLine makes a text fit for a protocol line and a log line.
func oneLine(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	if len(s) > maxReasonLen {
		s = strings.ToValidUTF8(s[:maxReasonLen], "")
	}
	return strings.TrimSpace(s)
}

func (c *streamConsumer) reply(d *delivery, body []byte) error {
	c.lastOf(d).Store(d)
	return c.rt.nc.Publish(d.reply, body)
}

// awaitServer waits until the server has acted on every settlement sent so far.
// It takes them one after another from a queue of its own, which is gone when an
// embedded server stops: so the last one is followed by a request.
func (c *streamConsumer) awaitServer(ctx context.Context) error {
	return errors.Join(c.awaitServerOf(ctx, c.last.Load()), c.awaitServerOf(ctx, c.replays.last.Load()))
}

func (c *streamConsumer) awaitServerOf(ctx context.Context, d *delivery) error {
	if d == nil {
		return nil
	}
	_, err := c.rt.nc.RequestWithContext(ctx, d.reply, wireNothing)
	if errors.Is(err, nats.ErrNoResponders) {
		return nil // the consumer is gone
	}
	return err
}
