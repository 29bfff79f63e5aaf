package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/telemetry/messaging"
)

// A PubAckFuture is the outcome of an asynchronous durable publish. Its methods
// are safe for concurrent use.
type PubAckFuture struct {
	mu    sync.Mutex
	known bool // the outcome is
	ack   PubAck
	err   error
	done  chan struct{} // made for who asks for it

	// Guarded by asyncPublisher.mu, until it is taken.
	msg     asyncMsg // empty once done
	sent    time.Time
	retries int
	token   uint64
	op      messaging.Publish // ends with the publish
}

// An asyncMsg is what may have to be sent again.
type asyncMsg struct {
	subject  string
	data     []byte
	header   Header // to send
	injected bool   // it has our trace context
	own      Header // without it
}

// Done returns a channel that is closed when the outcome is known.
func (f *PubAckFuture) Done() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.done == nil {
		f.done = make(chan struct{})
		if f.known {
			close(f.done)
		}
	}
	return f.done
}

// Wait waits for the outcome: the acknowledgement, or an error as of
// PublishStream, or [ErrDisconnected], [ErrAckTimeout], [ErrStopped], or the
// cause of ctx's end, which leaves the publish going on.
func (f *PubAckFuture) Wait(ctx context.Context) (*PubAck, error) {
	if known, ack, err := f.outcome(); known {
		return ack, err
	}
	select {
	case <-f.Done():
		_, ack, err := f.outcome()
		return ack, err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

func (f *PubAckFuture) outcome() (known bool, ack *PubAck, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.known && f.err == nil {
		ack = &f.ack
	}
	return f.known, ack, f.err
}

func (f *PubAckFuture) settle(ack jetstream.PubAck, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ack.ack, f.err, f.known = ack, err, true
	if f.done != nil {
		close(f.done)
	}
}

// A publish that finds no stream is sent again, as nats.go does: the stream may be
// changing hands or electing a leader.
const (
	noStreamRetries = 2
	noStreamWait    = 250 * time.Millisecond
)

const (
	asyncAckTimeout = 30 * time.Second
	asyncSweep      = time.Second
	asyncSlotBits   = 16 // of a token; maxPublishWindow fits
	asyncTokenBase  = 36
	maxSafeDigits   = 19 // of a decimal number that is surely a uint64
)

// asyncPublisher sends durable publishes without waiting for each. nats.go's
// own gives up after 200 ms when its window is full, and never times out.
//
// The reply subject of a publish ends in a token: the slot that its future
// waits in, and a count, so that a late answer does not settle a later publish.
type asyncPublisher struct {
	r       *run
	prefix  string
	sub     *nats.Subscription
	free    chan int // slots: the window, less what is in flight
	stopped chan struct{}
	sweeper sync.WaitGroup
	limiter logLimiter
	stream  string // that acknowledged last; receive's

	mu      sync.Mutex
	pending []*PubAckFuture // by slot
	count   uint64
	idle    chan struct{} // closed when nothing is in flight, once somebody waits
}

func newAsyncPublisher(r *run, window int) *asyncPublisher {
	p := &asyncPublisher{
		r:       r,
		free:    make(chan int, window),
		stopped: make(chan struct{}),
		pending: make([]*PubAckFuture, window),
	}
	for slot := range window {
		p.free <- slot
	}
	return p
}

func (p *asyncPublisher) start() error {
	p.prefix = p.r.nc.NewInbox() + "."
	sub, err := p.r.nc.Subscribe(p.prefix+"*", p.receive)
	if err != nil {
		return err
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil { // the window bounds them
		return errors.Join(err, sub.Unsubscribe())
	}
	p.sub = sub
	p.sweeper.Go(p.sweep)
	return nil
}

// publish sends a message and returns its future, which then has op; with an error
// op stays the caller's, unless the future has ended it.
func (p *asyncPublisher) publish(ctx context.Context, msg *Msg, op *messaging.Publish) (*PubAckFuture, error) {
	slot, err := p.enter(ctx, msg.Subject)
	if err != nil {
		return nil, err
	}
	f := &PubAckFuture{
		msg:  asyncMsg{subject: msg.Subject, data: msg.Data, own: msg.Header},
		sent: time.Now(),
	}
	f.msg.header, f.msg.injected = op.Inject(msg.Subject, msg.Header, len(msg.Data), false)
	op.Pending()
	f.op, *op = *op, messaging.Publish{}
	nm := nats.Msg{Subject: msg.Subject, Header: f.msg.header, Data: msg.Data}
	p.mu.Lock()
	p.count++
	f.token = p.count<<asyncSlotBits | uint64(slot) //nolint:gosec // a slot is small and not negative
	nm.Reply = p.reply(f.token)
	p.pending[slot] = f
	p.mu.Unlock()

	if err := p.r.nc.PublishMsg(&nm); err != nil {
		err = p.r.publishError(nm.Subject, len(nm.Data), err)
		p.mu.Lock()
		taken := p.take(f)
		p.mu.Unlock()
		if taken {
			f.op.Cancel()
			*op, f.op = f.op, messaging.Publish{}
			p.finish(f, jetstream.PubAck{}, err)
		}
		return nil, err
	}
	return f, nil
}

// enter waits for a place in the window.
func (p *asyncPublisher) enter(ctx context.Context, subject string) (slot int, err error) {
	select {
	case slot = <-p.free:
		return slot, nil
	default:
	}
	select {
	case slot = <-p.free:
		return slot, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("publish on %q: %d publishes wait for their acknowledgement: %w",
			subject, cap(p.free), context.Cause(ctx))
	case <-p.stopped:
		return 0, fmt.Errorf("publish on %q: %w", subject, ErrStopped)
	}
}

func (p *asyncPublisher) reply(token uint64) string {
	var buf [64]byte // else append makes a larger one
	return string(strconv.AppendUint(append(buf[:0], p.prefix...), token, asyncTokenBase))
}

// receive takes the server's answers.
func (p *asyncPublisher) receive(m *nats.Msg) {
	token, err := strconv.ParseUint(strings.TrimPrefix(m.Subject, p.prefix), asyncTokenBase, 64)
	if err != nil {
		return
	}
	ack, err := decodePubAck(m, p.stream)
	if err == nil {
		p.stream = ack.Stream
	}
	p.mu.Lock()
	f := p.find(token)
	if f == nil {
		p.mu.Unlock()
		return
	}
	if errors.Is(err, jetstream.ErrNoStreamResponse) && f.retries < noStreamRetries {
		f.retries++
		p.mu.Unlock()
		time.AfterFunc(noStreamWait, func() { p.resend(token) })
		return
	}
	if f.msg.injected && isTooLarge(err) { // perhaps by the trace context
		f.msg.injected, f.msg.header = false, f.msg.own
		f.op.Drop()
		p.mu.Unlock()
		p.resend(token)
		return
	}
	if err != nil {
		err = p.r.publishError(f.msg.subject, len(f.msg.data), err)
	}
	p.take(f)
	p.mu.Unlock()
	p.finish(f, ack, err)
	p.report(err)
}

// find returns the future that waits for token, or nil. p.mu is held.
func (p *asyncPublisher) find(token uint64) *PubAckFuture {
	slot := token & (1<<asyncSlotBits - 1)
	if slot >= uint64(len(p.pending)) {
		return nil
	}
	if f := p.pending[slot]; f != nil && f.token == token {
		return f
	}
	return nil
}

func (p *asyncPublisher) resend(token uint64) {
	p.mu.Lock()
	f := p.find(token)
	if f == nil {
		p.mu.Unlock()
		return
	}
	err := p.r.nc.PublishMsg(&nats.Msg{
		Subject: f.msg.subject, Reply: p.reply(token), Header: f.msg.header, Data: f.msg.data,
	})
	if err != nil {
		err = p.r.publishError(f.msg.subject, len(f.msg.data), err)
		p.take(f)
	}
	p.mu.Unlock()
	if err != nil {
		p.finish(f, jetstream.PubAck{}, err)
	}
}

// take makes f the caller's to finish, unless it is somebody else's already. p.mu
// is held.
func (p *asyncPublisher) take(f *PubAckFuture) bool {
	slot := f.token & (1<<asyncSlotBits - 1)
	if p.pending[slot] != f {
		return false
	}
	p.pending[slot] = nil
	return true
}

// finish makes the outcome known, of a future that was taken, and frees its
// place. p.mu is not held: the user's span processors run here.
func (p *asyncPublisher) finish(f *PubAckFuture, ack jetstream.PubAck, err error) {
	op := f.op
	f.msg, f.op = asyncMsg{}, messaging.Publish{}
	f.settle(ack, err)
	if err == nil {
		op.Stored(ack.Stream, ack.Sequence, ack.Duplicate)
	}
	op.End(err)
	p.free <- int(f.token & (1<<asyncSlotBits - 1))
	if len(p.free) < cap(p.free) {
		return
	}
	p.mu.Lock()
	if p.idle != nil && len(p.free) == cap(p.free) { // still
		close(p.idle)
		p.idle = nil
	}
	p.mu.Unlock()
}

// failAll ends what was sent and not answered, with the reason.
func (p *asyncPublisher) failAll(reason error, sentBefore time.Time) {
	var failed []*PubAckFuture
	p.mu.Lock()
	for _, f := range p.pending {
		if f != nil && f.sent.Before(sentBefore) && p.take(f) {
			failed = append(failed, f)
		}
	}
	p.mu.Unlock()
	var last error
	for _, f := range failed {
		last = fmt.Errorf("publish %d bytes on %q: %w: it may be stored or not; "+
			"publish it again with the same Nats-Msg-Id header", len(f.msg.data), f.msg.subject, reason)
		p.finish(f, jetstream.PubAck{}, last)
	}
	p.report(last)
}

// sweep ends publishes that the server never answered.
func (p *asyncPublisher) sweep() {
	t := time.NewTicker(asyncSweep)
	defer t.Stop()
	for {
		select {
		case now := <-t.C:
			p.failAll(ErrAckTimeout, now.Add(-asyncAckTimeout))
		case <-p.stopped:
			return
		}
	}
}

func (p *asyncPublisher) report(err error) {
	if err == nil {
		return
	}
	if left, ok := p.limiter.allow(slog.LevelError, time.Now()); ok {
		p.r.log.LogAttrs(p.r.base, slog.LevelError, "asynchronous publish failed", errorAttrs(err, left)...)
	}
}

// drain waits until every publish is answered, or for ctx.
func (p *asyncPublisher) drain(ctx context.Context) error {
	p.mu.Lock()
	if p.idle == nil {
		p.idle = make(chan struct{})
	}
	idle := p.idle
	p.mu.Unlock()
	if len(p.free) == cap(p.free) { // else who ends the last one finds idle
		return nil
	}
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d asynchronous publishes are not acknowledged: %w", cap(p.free)-len(p.free), context.Cause(ctx))
	}
}

func (p *asyncPublisher) stop() {
	close(p.stopped)
	p.sweeper.Wait()
	p.failAll(ErrStopped, time.Now().Add(time.Hour))
}
