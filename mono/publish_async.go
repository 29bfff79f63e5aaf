package mono

import (
	"context"
	"encoding/json"
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
	done chan struct{}
	ack  *PubAck
	err  error

	// Guarded by asyncPublisher.mu, until it is taken.
	msg      *nats.Msg // nil once done
	sent     time.Time
	retries  int
	token    uint64
	injected bool              // msg has our trace context
	header   Header            // without it
	op       messaging.Publish // ends with the publish
}

// Done returns a channel that is closed when the outcome is known.
func (f *PubAckFuture) Done() <-chan struct{} { return f.done }

// Wait waits for the outcome: the acknowledgement, or an error as of
// PublishStream, or [ErrDisconnected], [ErrAckTimeout], [ErrStopped], or the
// cause of ctx's end, which leaves the publish going on.
func (f *PubAckFuture) Wait(ctx context.Context) (*PubAck, error) {
	select {
	case <-f.done:
		return f.ack, f.err
	default:
	}
	select {
	case <-f.done:
		return f.ack, f.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

const (
	asyncAckTimeout   = 30 * time.Second
	asyncSweep        = time.Second
	asyncRetries      = 2 // of a publish that found no stream, as nats.go does
	asyncRetryWait    = 250 * time.Millisecond
	asyncSlotBits     = 16 // of a token; maxPublishWindow fits
	asyncTokenBase    = 36
	asyncMaxTokenSize = 13 // digits of a uint64 in that base
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
	window  chan struct{} // a place for each publish in flight
	stopped chan struct{}
	sweeper sync.WaitGroup
	limiter logLimiter

	mu      sync.Mutex
	pending []*PubAckFuture // by slot
	free    []int           // slots
	count   uint64
	idle    chan struct{} // closed when nothing is pending, once somebody waits
	inUse   int
}

func newAsyncPublisher(r *run, window int) *asyncPublisher {
	p := &asyncPublisher{
		r:       r,
		window:  make(chan struct{}, window),
		stopped: make(chan struct{}),
		pending: make([]*PubAckFuture, window),
		free:    make([]int, window),
	}
	for i := range p.free {
		p.free[i] = window - 1 - i
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
	if err := p.enter(ctx, msg.Subject); err != nil {
		return nil, err
	}
	nm := &nats.Msg{Subject: msg.Subject, Data: msg.Data}
	f := &PubAckFuture{done: make(chan struct{}), msg: nm, header: msg.Header, sent: time.Now()}
	nm.Header, f.injected = op.Inject(msg.Subject, msg.Header, len(msg.Data), false)
	op.Pending()
	f.op, *op = *op, messaging.Publish{}
	p.mu.Lock()
	slot := p.free[len(p.free)-1]
	p.free = p.free[:len(p.free)-1]
	p.count++
	f.token = p.count<<asyncSlotBits | uint64(slot) //nolint:gosec // a slot is small and not negative
	p.pending[slot] = f
	p.inUse++
	p.mu.Unlock()

	buf := append(make([]byte, 0, len(p.prefix)+asyncMaxTokenSize), p.prefix...)
	nm.Reply = string(strconv.AppendUint(buf, f.token, asyncTokenBase))
	if err := p.r.nc.PublishMsg(nm); err != nil {
		err = p.r.publishError(nm.Subject, len(nm.Data), err)
		p.mu.Lock()
		taken := p.take(f)
		p.mu.Unlock()
		if taken {
			f.op.Cancel()
			*op, f.op = f.op, messaging.Publish{}
			p.finish(f, nil, err)
		}
		return nil, err
	}
	return f, nil
}

// enter waits for a place in the window.
func (p *asyncPublisher) enter(ctx context.Context, subject string) error {
	select {
	case p.window <- struct{}{}:
		return nil
	default:
	}
	select {
	case p.window <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("publish on %q: %d publishes wait for their acknowledgement: %w",
			subject, cap(p.window), context.Cause(ctx))
	case <-p.stopped:
		return fmt.Errorf("publish on %q: %w", subject, ErrStopped)
	}
}

// receive takes the server's answers.
func (p *asyncPublisher) receive(m *nats.Msg) {
	token, err := strconv.ParseUint(strings.TrimPrefix(m.Subject, p.prefix), asyncTokenBase, 64)
	if err != nil {
		return
	}
	ack, err := decodePubAck(m)
	p.mu.Lock()
	f := p.find(token)
	if f == nil {
		p.mu.Unlock()
		return
	}
	if errors.Is(err, jetstream.ErrNoStreamResponse) && f.retries < asyncRetries {
		// A stream may be changing hands or electing a leader.
		f.retries++
		p.mu.Unlock()
		time.AfterFunc(asyncRetryWait, func() { p.resend(token) })
		return
	}
	if f.injected && isTooLarge(err) { // perhaps by the trace context
		f.injected, f.msg.Header = false, f.header
		f.op.Drop()
		p.mu.Unlock()
		p.resend(token)
		return
	}
	if err != nil {
		err = p.r.publishError(f.msg.Subject, len(f.msg.Data), err)
	}
	p.take(f)
	p.mu.Unlock()
	p.finish(f, ack, err)
	p.report(err)
}

// decodePubAck reads the answer to a durable publish.
func decodePubAck(m *nats.Msg) (*PubAck, error) {
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		return nil, jetstream.ErrNoStreamResponse
	}
	var answer struct {
		jetstream.PubAck
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return nil, jetstream.ErrInvalidJSAck
	}
	if answer.Error != nil {
		return nil, answer.Error
	}
	if answer.Stream == "" {
		return nil, jetstream.ErrInvalidJSAck
	}
	return &PubAck{answer.PubAck}, nil
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
	err := p.r.nc.PublishMsg(f.msg)
	if err != nil {
		err = p.r.publishError(f.msg.Subject, len(f.msg.Data), err)
		p.take(f)
	}
	p.mu.Unlock()
	if err != nil {
		p.finish(f, nil, err)
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
func (p *asyncPublisher) finish(f *PubAckFuture, ack *PubAck, err error) {
	op := f.op
	f.ack, f.err, f.msg, f.header, f.op = ack, err, nil, nil, messaging.Publish{}
	close(f.done)
	if ack != nil {
		op.Stored(ack.Stream(), ack.Sequence(), ack.Duplicate())
	}
	op.End(err)
	p.mu.Lock()
	p.free = append(p.free, int(f.token&(1<<asyncSlotBits-1)))
	p.inUse--
	if p.inUse == 0 && p.idle != nil {
		close(p.idle)
		p.idle = nil
	}
	p.mu.Unlock()
	<-p.window
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
			"publish it again with the same Nats-Msg-Id header", len(f.msg.Data), f.msg.Subject, reason)
		p.finish(f, nil, last)
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
	n := p.inUse
	if n == 0 {
		p.mu.Unlock()
		return nil
	}
	if p.idle == nil {
		p.idle = make(chan struct{})
	}
	idle := p.idle
	p.mu.Unlock()
	select {
	case <-idle:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%d asynchronous publishes are not acknowledged: %w", n, context.Cause(ctx))
	}
}

func (p *asyncPublisher) stop() {
	close(p.stopped)
	p.sweeper.Wait()
	p.failAll(ErrStopped, time.Now().Add(time.Hour))
}
