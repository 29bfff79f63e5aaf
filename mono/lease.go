package mono

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// A message is this consumer's for AckWait from the moment at which the server has
// last heard of it. That is its lease. Leases of messages that are here are extended,
// and the server confirms it: a link that is dead takes what is written to it and
// carries nothing. When a lease may have ended, another instance may have the message:
// nothing but an ack is sent for it, and nothing captured.

// A lease is when the server has last heard of a message for sure, as uptime. It is
// negative if the lease may have ended since.
type lease struct{ at atomic.Int64 }

// begin says that the message was delivered now. If that cannot be trusted, the lease
// may have ended already.
func (l *lease) begin(now time.Duration, trusted bool) {
	at := int64(now)
	if !trusted {
		at = -at
	}
	l.at.Store(at)
}

// end says that the lease may have ended.
func (l *lease) end() {
	if was := l.at.Load(); was > 0 {
		l.at.CompareAndSwap(was, -was) // or it was delivered again
	}
}

// untouched is how long the lease has lasted.
func (l *lease) untouched(now time.Duration) time.Duration {
	at := l.at.Load()
	return now - time.Duration(max(at, -at))
}

// ended reports whether the lease may have ended.
func (l *lease) ended(now, ackWait time.Duration) bool {
	return l.at.Load() < 0 || l.untouched(now) > ackWait
}

// extend extends the lease: the server has heard of the message at some moment from
// sent to confirmed. A later extension may have been confirmed before.
func (l *lease) extend(sent, confirmed, ackWait time.Duration) {
	was := l.at.Load()
	at := max(int64(sent), was)
	if was < 0 || confirmed-time.Duration(was) > ackWait {
		at = -at
	}
	l.at.CompareAndSwap(was, at) // or it has ended, or was delivered again
}

// heard notes that something came from the server, and reports whether what comes is
// new. After a silence, in which this process was stopped or the link stalled, what
// comes first may have been under way for as long, and belong to another instance by
// now. So nothing is trusted until the consumer's leader has answered and all that came
// before the answer is through. While something is asked for, the server sends heartbeats.
func (p *puller) heard(now time.Duration) (trusted bool) {
	before := time.Duration(p.alive.Swap(int64(now)))
	if before != 0 && now-before > p.silence() || p.stoodStill(now) {
		p.distrust()
	}
	after := p.trustAfter.Load()
	if after == 0 {
		return true
	}
	if n, err := p.sub.Delivered(); err == nil && n > after {
		return p.trustAfter.CompareAndSwap(after, 0) // or there was another silence
	}
	return false
}

// silence is how long nothing may come while something is asked for.
func (p *puller) silence() time.Duration {
	return max(p.c.cfg.Consumer.AckWait/leaseTicks, 2*p.heartbeat) //nolint:mnd // two heartbeats
}

// stoodStill reports whether this process was stopped for a while, until now: run looks
// after leases each third of AckWait.
func (p *puller) stoodStill(now time.Duration) bool {
	ticked := time.Duration(p.ticked.Load())
	return ticked != 0 && now-ticked > p.c.cfg.Consumer.AckWait/leaseTicks+p.silence()
}

// What trustAfter is while nothing is trusted.
const (
	trustAsked = math.MaxInt64     // the consumer's leader is being asked
	trustNone  = math.MaxInt64 - 1 // the consumer does not exist; reset asks when it does
)

// distrust trusts no message until the consumer's leader has answered.
func (p *puller) distrust() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.silences++
	if p.trustAfter.Swap(trustAsked) == trustAsked {
		return // somebody asks already, and asks again
	}
	if !p.ended { // it may be after a reconnect during Stop
		p.extensions.Go(p.askForAnswer)
	}
}

// askForAnswer waits until the consumer's leader answers, notes the last sequence that
// the leader has delivered, and asks for messages. A ping would not do: a server between
// the leader and this process, once stopped, answers a ping before it passes on older
// messages.
func (p *puller) askForAnswer() {
	for {
		p.mu.Lock()
		silences := p.silences
		p.mu.Unlock()
		ctx, cancel := context.WithTimeout(p.running, lookUpTimeout)
		missing := p.missing.Load()
		consumer, err := p.c.rt.js.Consumer(ctx, p.c.info.Stream, p.durable)
		cancel()
		if p.running.Err() != nil || p.c.rt.nc.IsClosed() {
			return
		}
		after := int64(trustNone)
		switch gone := errors.Is(err, jetstream.ErrConsumerNotFound) || errors.Is(err, jetstream.ErrStreamNotFound); {
		case err == nil:
			p.deliveredBefore.Store(consumer.CachedInfo().Delivered.Consumer)
			p.alive.Store(int64(uptime()))
			waiting, _, _ := p.sub.Pending() // before Delivered: a message in between is counted twice, not missed
			delivered, _ := p.sub.Delivered()
			after = max(delivered+int64(waiting), 1)
		case gone && !missing:
			notify(p.gone)
		case !gone:
			select {
			case <-p.running.Done():
				return
			case <-time.After(lookUpPause):
			}
			continue
		}
		p.mu.Lock()
		over := p.silences == silences
		if over {
			p.trustAfter.Store(after)
		}
		p.mu.Unlock()
		if over {
			p.pull()
			return
		}
	}
}

// asksFirst reports whether the consumer's leader must answer before messages are asked
// for.
func (p *puller) asksFirst() bool { return p.trustAfter.Load() >= trustNone }

// leaseEnded reports whether another instance may have the message.
func (c *streamConsumer) leaseEnded(m *Msg) bool {
	return m.lease.ended(uptime(), c.cfg.Consumer.AckWait)
}

// ownBatch returns the messages of a batch that are surely still this consumer's. No
// handler begins with the others: they are delivered again, here or elsewhere.
func (c *streamConsumer) ownBatch(batch []*Msg) []*Msg {
	if !slices.ContainsFunc(batch, c.leaseEnded) {
		return batch
	}
	own := make([]*Msg, 0, len(batch))
	for _, m := range batch {
		if !c.leaseEnded(m) {
			own = append(own, m)
			continue
		}
		m.state.Store(stateReturned)
		c.report(slog.LevelWarn, "lease ended before a handler began; the message is delivered again", m, nil)
	}
	return own
}

// take returns the messages of a batch that a handler gets: those that are surely this
// consumer's, and that no later delivery has replaced.
func (c *streamConsumer) take(batch []*Msg) []*Msg { return markBegun(c.ownBatch(batch)) }

// markBegun marks the messages of a batch as begun and leaves out those that were replaced.
func markBegun(batch []*Msg) []*Msg {
	replaced := false
	for _, m := range batch {
		if !m.leaveWaiting(phaseBegun) {
			m.state.Store(stateReturned)
			replaced = true
		}
	}
	if !replaced {
		return batch
	}
	return slices.DeleteFunc(slices.Clone(batch), func(m *Msg) bool { return m.isReplaced() })
}

// lapse takes the place of a settlement whose message may be another instance's by now.
// If it comes back here, the verdict, if there is one, still holds.
func (c *streamConsumer) lapse(m *Msg, v *verdict, cause error) error {
	c.history.note(m, func(k *remembered) {
		k.sure = false
		if v != nil {
			k.verdict = v
		}
	})
	m.state.Store(stateReturned)
	c.tel.Abandon(m.Context(), &m.tel, cause)
	c.report(slog.LevelWarn, "lease ended before the outcome; nothing is sent, the message is delivered again", m, cause)
	return nil
}

// expectEchoes is called when leases may have ended unseen. The server may then have
// redeliveries in line of messages that are still being handled here. It sends them with
// the next request, even if the messages are settled by then.
func (p *puller) expectEchoes() {
	const atLeast = time.Minute
	p.mu.Lock()
	defer p.mu.Unlock()
	p.echoes = maps.Clone(p.inHand)
	p.echoesUntil = uptime() + max(atLeast, 2*p.c.cfg.Consumer.AckWait)
}

// endLeases trusts no lease of what is here any more.
func (p *puller) endLeases() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.inHand {
		m.lease.end()
	}
}

// extendLeases extends the leases of what is here that are half over by the next time,
// a third of AckWait later.
func (p *puller) extendLeases(now, interval time.Duration) {
	age := interval / 2 //nolint:mnd // half
	var due []*delivery
	p.mu.Lock()
	if now > p.echoesUntil {
		p.echoes = nil
	}
	for _, m := range p.inHand {
		// One that is being settled may wait for its capture.
		if state := m.state.Load(); (state == stateOpen || state == stateSettling) && m.lease.untouched(now) >= age {
			due = append(due, m.delivery)
		}
	}
	p.mu.Unlock()
	if p == &p.c.pull {
		due = p.c.held.leases(due, now, age)
	}
	// The server acts on those of one durable one after another.
	slices.SortStableFunc(due, func(a, b *delivery) int { return strings.Compare(a.durable(), b.durable()) })
	for len(due) > 0 {
		n := 1
		for n < len(due) && due[n].durable() == due[0].durable() {
			n++
		}
		p.extendAll(due[:n:n], now, interval)
		due = due[n:]
	}
}

// durable tells the two durables of a consumer apart.
func (d *delivery) durable() string {
	if d.isOfReplays() {
		return "replays"
	}
	return "events"
}

// extendAll extends leases of one durable.
func (p *puller) extendAll(due []*delivery, now, interval time.Duration) {
	last := due[len(due)-1]
	for _, d := range due[:len(due)-1] {
		err := p.c.reply(d, wireProgress)
		p.c.tel.Extended(err)
		if err != nil {
			p.c.report(slog.LevelWarn, "lease not extended", nil, err, deliveryAttrs(d)...)
			return
		}
	}
	p.extensions.Go(func() { p.confirm(last, due, now, interval) })
}

// confirm sends the last of the extensions and waits for the server's answer, which
// says that it has heard of all: it acts on them one after another.
func (p *puller) confirm(last *delivery, due []*delivery, sent, limit time.Duration) {
	ctx, cancel := context.WithTimeout(p.running, limit)
	defer cancel()
	_, err := p.c.rt.nc.RequestWithContext(ctx, last.reply, wireProgress)
	if ctx.Err() != nil && p.running.Err() != nil {
		return // Stop
	}
	p.c.tel.Extended(err)
	if err != nil {
		// Without the message's context, which its handler may just be given.
		p.c.report(slog.LevelWarn, "leases not extended", nil, err, slog.Int("messages", len(due)))
		return
	}
	confirmed := uptime()
	for _, d := range due {
		d.lease.extend(sent, confirmed, p.c.cfg.Consumer.AckWait)
	}
}

// renew extends the lease of a message and waits for the server's answer. The answer
// shows that the link works: a dead letter that is sent next does not wait in a link that
// stands still until the lease is over.
func (c *streamConsumer) renew(ctx context.Context, m *Msg) error {
	sent := uptime()
	_, err := c.rt.nc.RequestWithContext(ctx, m.reply, wireProgress)
	c.tel.Extended(err)
	if err == nil {
		m.lease.extend(sent, uptime(), c.cfg.Consumer.AckWait)
	}
	return err
}

// inProgress extends the lease for the user.
func (c *streamConsumer) inProgress(m *Msg) error {
	now := uptime()
	err := c.reply(m.delivery, wireProgress)
	c.tel.Extended(err)
	// While there is no connection it waits here, and so does the lease's end.
	if err == nil && c.rt.nc.IsConnected() {
		m.lease.extend(now, now, c.cfg.Consumer.AckWait)
	}
	return err
}
