package mono

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/telemetry/messaging"
)

// An EventBus publishes messages. All methods are safe for concurrent use; the
// message, its data and its header are not changed and may be used again when a
// method has returned (for PublishStreamAsync: when its future is done).
//
// Errors of every method: [ErrInvalidSubject], [ErrInvalidHeader],
// [ErrPayloadTooLarge], [ErrNotStarted], those of nats.go such as
// nats.ErrConnectionClosed, and the context's.
type EventBus interface {
	// Publish sends msg over core NATS to whoever listens now. Nil means handed
	// to the connection; a message for nobody is gone.
	//
	// If a stream stores msg's subject, Publish is PublishStream without the
	// acknowledgement's details: a stream loses core messages without an error
	// when it is under load. That is known for the events declared in this App,
	// as of its start.
	Publish(ctx context.Context, msg *Msg) error

	// PublishStream stores msg in the stream that has its subject, and returns
	// when the server has acknowledged that. Without a deadline in ctx it waits
	// up to 5 s, also for a lost connection to come back.
	//
	// A Nats-Msg-Id header makes the server drop a second message with the same
	// value, by default for 2 min: set it to publish again safely after an error
	// that leaves open whether the message is stored, such as
	// context.DeadlineExceeded.
	//
	// Further errors: [ErrNoStream], [ErrStoreFull], and jetstream.APIError for
	// what else the server refuses.
	PublishStream(ctx context.Context, msg *Msg) (*PubAck, error)

	// PublishStreamAsync sends msg like PublishStream and returns without
	// waiting for the acknowledgement. At most [WithPublishWindow] of them wait
	// at a time; beyond that the call blocks until there is room or ctx ends.
	// The future tells the outcome; failures are logged too, in case nobody
	// asks.
	PublishStreamAsync(ctx context.Context, msg *Msg) (*PubAckFuture, error)
}

// A PubAck is the server's word that a message is stored.
type PubAck struct{ ack jetstream.PubAck }

// Stream returns the name of the stream that stored the message.
func (a *PubAck) Stream() string { return a.ack.Stream }

// Sequence returns the message's sequence in that stream.
func (a *PubAck) Sequence() uint64 { return a.ack.Sequence }

// Duplicate reports that a message with the same Nats-Msg-Id was stored before,
// and this one dropped. Sequence is then that of the first.
func (a *PubAck) Duplicate() bool { return a.ack.Duplicate }

// bus is the EventBus of an App. It outlives starts and stops: modules keep it.
type bus struct {
	run     atomic.Pointer[run] // nil while there is no connection
	publish PublishFunc         // nil without middleware
}

// A publishCall carries one publish through the middleware, which may call next
// more than once, and from a goroutine of its own.
type publishCall struct {
	mode publishMode

	mu     sync.Mutex
	op     messaging.Publish // the one whose span the middleware sees
	held   bool              // op is here, and not with a message that is being sent
	failed error             // of the last attempt to send it
	over   bool              // the caller has gone on
	sent   bool
	ack    *PubAck
	future *PubAckFuture
}

type publishMode uint8

const (
	publishCore publishMode = iota
	publishStream
	publishAsync
)

type publishCallKey struct{}

func newBus(mw []Middleware) *bus {
	b := &bus{}
	b.publish = chainPublish(mw, func(ctx context.Context, msg *Msg) error {
		call, _ := ctx.Value(publishCallKey{}).(*publishCall)
		if call == nil {
			return fmt.Errorf("%w: publish middleware must pass on a context made from the one it got", ErrInvalidConfig)
		}
		return b.send(ctx, msg, call)
	})
	return b
}

func (b *bus) Publish(ctx context.Context, msg *Msg) error {
	if b.publish != nil {
		_, _, err := b.through(ctx, msg, publishCore)
		return err
	}
	r, d, err := b.check(ctx, msg)
	if err != nil {
		return b.refused(ctx, msg, err)
	}
	ctx, op := d.publisher.Start(ctx)
	err = r.publishCore(ctx, d, msg, &op)
	op.End(err)
	return err
}

func (b *bus) PublishStream(ctx context.Context, msg *Msg) (*PubAck, error) {
	if b.publish != nil {
		ack, _, err := b.through(ctx, msg, publishStream)
		return ack, err
	}
	r, d, err := b.check(ctx, msg)
	if err != nil {
		return nil, b.refused(ctx, msg, err)
	}
	ctx, op := d.publisher.Start(ctx)
	ack, err := r.publishStream(ctx, d, msg, &op)
	op.End(err)
	return ack, err
}

func (b *bus) PublishStreamAsync(ctx context.Context, msg *Msg) (*PubAckFuture, error) {
	if b.publish != nil {
		_, future, err := b.through(ctx, msg, publishAsync)
		return future, err
	}
	r, d, err := b.check(ctx, msg)
	if err != nil {
		return nil, b.refused(ctx, msg, err)
	}
	ctx, op := d.publisher.Start(ctx)
	future, err := r.async.publish(ctx, msg, &op)
	if err != nil {
		op.End(err)
	}
	return future, err
}

// refused records a publish that was refused before it began.
func (b *bus) refused(ctx context.Context, msg *Msg, err error) error {
	if r := b.run.Load(); r != nil && msg != nil {
		d, _ := r.destination(msg.Subject)
		_, op := d.publisher.Start(ctx)
		op.End(err)
	}
	return err
}

// through sends a copy of msg through the middleware, which may change it.
func (b *bus) through(ctx context.Context, msg *Msg, mode publishMode) (ack *PubAck, future *PubAckFuture, err error) {
	if msg == nil {
		return nil, nil, errNilMsg
	}
	call := &publishCall{mode: mode}
	if r := b.run.Load(); r != nil {
		d, _ := r.destination(msg.Subject)
		ctx, call.op = d.publisher.Start(ctx)
		call.held = true
	}
	defer func() { ack, future = call.finish(err) }()
	err = errGoexit // if the middleware does that
	defer recoverPanic(&err)
	c := &Msg{Subject: msg.Subject, Data: msg.Data, Header: cloneHeader(msg.Header), ctx: msg.ctx}
	err = b.publish(context.WithValue(ctx, publishCallKey{}, call), c)
	if err == nil && !call.wasSent() {
		err = fmt.Errorf("publish on %q: %w: a middleware returned nil and did not publish; it must call next or return an error",
			msg.Subject, ErrInvalidConfig)
	}
	return nil, nil, err
}

func (b *bus) send(ctx context.Context, msg *Msg, call *publishCall) error {
	r, d, err := b.check(ctx, msg)
	if err != nil {
		return err
	}
	op, ok := call.take()
	if !ok { // the first one was sent, or is being sent
		ctx, op = d.publisher.Start(ctx)
	}
	var (
		ack    *PubAck
		future *PubAckFuture
	)
	switch call.mode {
	case publishCore:
		err = r.publishCore(ctx, d, msg, &op)
	case publishStream:
		ack, err = r.publishStream(ctx, d, msg, &op)
	case publishAsync:
		future, err = r.async.publish(ctx, msg, &op)
	}
	if err != nil {
		call.giveBack(op, err)
		return err
	}
	call.succeed(ack, future)
	if call.mode != publishAsync { // else it ends with the acknowledgement
		op.End(nil)
	}
	return nil
}

func (c *publishCall) take() (op messaging.Publish, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	op, ok = c.op, c.held
	c.held = false
	return op, ok
}

// giveBack keeps op for another attempt, if there can be one.
func (c *publishCall) giveBack(op messaging.Publish, err error) {
	c.mu.Lock()
	last := c.over || c.held || op.Over() // else the connection was lost, and that has ended it
	if !last {
		c.op, c.held, c.failed = op, true, err
	}
	c.mu.Unlock()
	if last {
		op.End(err)
	}
}

func (c *publishCall) succeed(ack *PubAck, future *PubAckFuture) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.sent, c.ack, c.future = true, ack, future
}

func (c *publishCall) wasSent() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.sent
}

// finish ends what was not sent, and returns what came of the rest.
func (c *publishCall) finish(err error) (*PubAck, *PubAckFuture) {
	c.mu.Lock()
	c.over = true
	op, held, failed := c.op, c.held, c.failed
	c.held = false // who comes later has a publish of its own
	ack, future := c.ack, c.future
	c.mu.Unlock()
	if held {
		if err == nil {
			err = failed // another attempt was sent meanwhile
		}
		op.End(err)
	}
	return ack, future
}

var errNilMsg = fmt.Errorf("publish: %w: message is nil", ErrInvalidConfig)

// check refuses what cannot be sent, and finds the run that sends and what it
// knows of the subject.
func (b *bus) check(ctx context.Context, msg *Msg) (r *run, d *destination, err error) {
	if msg == nil {
		return nil, nil, errNilMsg
	}
	declared := false
	if r = b.run.Load(); r != nil {
		d, declared = r.destination(msg.Subject)
	}
	if !declared { // else it was checked when the event was
		if err := checkSubject(msg.Subject); err != nil {
			return nil, nil, fmt.Errorf("publish: %w", err)
		}
	}
	if len(msg.Header) > 0 {
		if err := checkHeader(msg.Header); err != nil {
			return nil, nil, fmt.Errorf("publish on %q: %w", msg.Subject, err)
		}
	}
	if r == nil {
		return nil, nil, fmt.Errorf("publish on %q: %w", msg.Subject, ErrNotStarted)
	}
	if ctx.Err() != nil {
		return nil, nil, fmt.Errorf("publish on %q: %w", msg.Subject, context.Cause(ctx))
	}
	return r, d, nil
}

func (r *run) publishCore(ctx context.Context, d *destination, msg *Msg, op *messaging.Publish) error {
	if d.durable {
		_, err := r.publishStream(ctx, d, msg, op)
		return err
	}
	// The nats.Msg stays on the stack, as long as nothing else gets it.
	nm := nats.Msg{Subject: msg.Subject, Data: msg.Data}
	nm.Header, _ = op.Inject(msg.Subject, msg.Header, len(msg.Data), true)
	if err := r.nc.PublishMsg(&nm); err != nil {
		return r.publishError(msg.Subject, len(msg.Data), err)
	}
	return nil
}

func (r *run) publishStream(ctx context.Context, d *destination, msg *Msg, op *messaging.Publish) (*PubAck, error) {
	header, injected := op.Inject(msg.Subject, msg.Header, len(msg.Data), false)
	ack, err := r.store(ctx, msg, header)
	if injected && isTooLarge(err) { // perhaps by the trace context, which is not worth a message
		op.Drop()
		header = msg.Header
		ack, err = r.store(ctx, msg, header)
	}
	if errors.Is(err, jetstream.ErrNoStreamResponse) && d.durable && r.restoreFor(ctx) {
		// The stream was there when we started. It is again.
		ack, err = r.store(ctx, msg, header)
	}
	if err != nil {
		return nil, r.publishError(msg.Subject, len(msg.Data), err)
	}
	op.Stored(ack.ack.Stream, ack.ack.Sequence, ack.ack.Duplicate)
	return ack, nil
}

// restoreFor has a stream made again that a publish did not find, and reports
// whether there is something to be hoped from sending it again.
func (r *run) restoreFor(ctx context.Context) bool {
	missed := time.Now()
	if r.streamGone() && !wait(ctx, deletionTime) {
		return false
	}
	return r.restore(missed) == nil
}

// ackTimeout is how long to wait for an acknowledgement where the context has no
// deadline, as nats.go does.
const ackTimeout = 5 * time.Second

// store publishes and waits for the acknowledgement. It is what nats.go's PublishMsg
// does, but for the reading of the acknowledgement, see scanPubAck.
func (r *run) store(ctx context.Context, msg *Msg, header Header) (*PubAck, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, ackTimeout)
		defer cancel()
	}
	nm := nats.Msg{Subject: msg.Subject, Header: header, Data: msg.Data}
	for retries := 0; ; retries++ {
		answer, err := r.nc.RequestMsgWithContext(ctx, &nm)
		switch {
		case errors.Is(err, nats.ErrNoResponders) && retries < noStreamRetries && wait(ctx, noStreamWait):
			continue
		case errors.Is(err, nats.ErrNoResponders):
			return nil, jetstream.ErrNoStreamResponse
		case err != nil:
			return nil, err
		}
		ack, err := decodePubAck(answer, "")
		if err != nil {
			return nil, err
		}
		return &PubAck{ack}, nil
	}
}

// wait waits for d, and reports whether ctx has not ended before.
func wait(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// publishError says what was refused, where, and what to do about it.
func (r *run) publishError(subject string, size int, err error) error {
	what := fmt.Sprintf("publish %d bytes on %q", size, subject)
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return fmt.Errorf("%s: %w: the server takes at most %d bytes with headers; send less, put large data into an object store, or raise max_payload: %w",
			what, ErrPayloadTooLarge, r.nc.MaxPayload(), err)
	case errors.Is(err, jetstream.ErrNoStreamResponse), errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("%s: %w: register a stream consumer for the event, or create a stream with this subject: %w",
			what, ErrNoStream, jetstream.ErrNoStreamResponse)
	}
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return fmt.Errorf("%s: %w", what, refusal(api))
	}
	if errors.Is(err, context.DeadlineExceeded) && !r.nc.IsConnected() {
		return fmt.Errorf("%s: %w; the client is reconnecting: %w", what, ErrDisconnected, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// isTooLarge reports whether the stream takes no message of that size. The header
// counts.
func isTooLarge(err error) bool {
	return jsapi.Is(err, jsapi.CodeMessageTooLarge)
}

// refusal adds to the server's answer what it means for the user.
func refusal(api *jetstream.APIError) error {
	switch api.ErrorCode {
	case jsapi.CodeMessageTooLarge:
		return fmt.Errorf("%w: raise the stream's MaxMsgSize or send less: %w", ErrPayloadTooLarge, api)
	case jsapi.CodeStoreFailed:
		return fmt.Errorf("%w: the stream has reached MaxBytes, MaxMsgs or a limit of its account; "+
			"let its consumers catch up, raise the limit, or let old messages go by MaxAge: %w", ErrStoreFull, api)
	case jsapi.CodeInsufficientResources, jsapi.CodeMemoryExceeded, jsapi.CodeStorageExceeded:
		return fmt.Errorf("%w: the server's store has no room left; "+
			"lower MaxBytes of the streams, which is reserved for each, or give the server more: %w", ErrStoreFull, api)
	}
	return api
}

func cloneHeader(h Header) Header {
	c := maps.Clone(h)
	for k, v := range c {
		c[k] = append([]string(nil), v...)
	}
	if c == nil {
		c = make(Header)
	}
	return c
}
