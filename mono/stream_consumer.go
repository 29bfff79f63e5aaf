package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/telemetry/messaging"
)

// A StreamConsumerConfig configures a durable consumer: the stream that stores
// its event, the consumer on the server, and how messages are fetched and
// handled here. Only Stream.Name is required.
type StreamConsumerConfig struct {
	// Stream is the stream that stores the event, made when it is missing. The
	// event's subject is added to it. Several consumers may name the same
	// stream; the fields each of them sets must agree.
	//
	// A stream without MaxBytes gets 1 GiB (256 MiB in memory) and refuses new
	// messages when it is full. Work queue and interest streams always refuse,
	// since all they hold is still to be handled. A limits stream with limits
	// of your own follows your Discard, whose zero value drops the oldest
	// message, handled or not.
	Stream StreamConfig

	// Consumer configures the consumer on the server. Durable defaults to
	// <module>_<event's module>_<event in kebab-case>_<version>. AckWait
	// defaults to 30 s; handlers may take longer, see [EventRegistry].
	// MaxAckPending defaults to 10 000 or 20 × Concurrency × BatchSize, whichever
	// is more: messages that wait for their next attempt count as well.
	// With a small one a single batch may take it all, and handlers beside it get
	// nothing: keep it above Concurrency × BatchSize. MaxDeliver stays unlimited,
	// because attempts are counted by Retry.
	//
	// FilterSubject, AckPolicy and BackOff are the framework's, and the fields
	// of push consumers and priority groups are not supported.
	Consumer ConsumerConfig

	Fetch FetchConfig
	Retry RetryPolicy

	// Concurrency is how many batches are handled at a time, 1 to 4096. The
	// default is 1. Concurrency × BatchSize may be 100 000 at most.
	Concurrency int

	// AutoAck acks what the handler left unsettled when it returns nil. Without
	// it such a message is delivered again after AckWait.
	AutoAck bool
}

// A FetchConfig says how a durable consumer asks for messages.
type FetchConfig struct {
	// BatchSize is the most messages that one call of the handler gets, 1 to
	// 10 000. The default is 10. A batch is what has arrived: no message waits
	// for its batch to fill.
	BatchSize int

	// IdleTimeout is how long a pull request stays open at the server when
	// there are no messages, from 1 s to 1 min; then it is renewed. It delays no
	// message. The default is 5 s.
	IdleTimeout time.Duration

	// MaxBytes bounds the messages that this consumer holds and has asked for, with
	// their headers, from 64 KiB to 1 GiB. The default is 16 MiB. One message of the
	// server's max_payload is always allowed, so that none is too large. With messages
	// that large, raise it to keep every worker busy.
	MaxBytes int
}

const (
	defaultBatchSize   = 10
	maxBatchSize       = 10_000
	defaultIdleTimeout = 5 * time.Second
	minIdleTimeout     = time.Second
	maxIdleTimeout     = time.Minute
	defaultFetchBytes  = 16 << 20
	minFetchBytes      = 64 << 10
	maxFetchBytes      = 1 << 30
	maxConcurrency     = 4096
	maxInWork          = 100_000 // Concurrency × BatchSize
	defaultAckWait     = 30 * time.Second
	minAckWait         = 100 * time.Millisecond
	minMaxAckPending   = 10_000
	ackPendingPerSlot  = 20
)

// withDefaults fills in what can be known without the event.
func (c StreamConsumerConfig) withDefaults() StreamConsumerConfig {
	if c.Fetch.BatchSize == 0 {
		c.Fetch.BatchSize = defaultBatchSize
	}
	if c.Fetch.IdleTimeout == 0 {
		c.Fetch.IdleTimeout = defaultIdleTimeout
	}
	if c.Fetch.MaxBytes == 0 {
		c.Fetch.MaxBytes = defaultFetchBytes
	}
	if c.Concurrency == 0 {
		c.Concurrency = 1
	}
	c.Retry = c.Retry.withDefaults()
	if c.Consumer.Durable == "" {
		c.Consumer.Durable = c.Consumer.Name
	}
	if c.Consumer.AckWait == 0 {
		c.Consumer.AckWait = defaultAckWait
	}
	if c.Consumer.MaxDeliver == 0 {
		c.Consumer.MaxDeliver = -1
	}
	if c.Consumer.MaxAckPending == 0 {
		c.Consumer.MaxAckPending = max(minMaxAckPending, ackPendingPerSlot*c.Concurrency*c.Fetch.BatchSize)
	}
	return c
}

// validate reports every problem at once, each naming the field to change. It
// expects defaults to be filled in.
func (c StreamConsumerConfig) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidConfig}, args...)...))
	}
	if err := checkStreamName(c.Stream.Name); err != nil {
		bad("Stream.Name: %w", err)
	}
	for _, s := range c.Stream.Subjects {
		if reservedSubject(s) {
			bad("Stream.Subjects: %q: subjects that start with \"$\" or \"_INBOX.\" belong to the server", s)
		}
	}
	if c.Stream.Mirror != nil {
		bad("Stream.Mirror: a mirror cannot store an event itself; leave it out")
	}
	if c.Stream.NoAck {
		bad("Stream.NoAck: durable publishes wait for the acknowledgement; leave it out")
	}
	if c.Stream.Sealed {
		bad("Stream.Sealed: a sealed stream takes no events; leave it out")
	}

	k := c.Consumer
	if k.Name != "" && k.Name != k.Durable {
		bad("Consumer.Name is %q and Consumer.Durable %q: set Durable alone", k.Name, k.Durable)
	}
	if k.Durable != "" {
		if err := checkStreamName(k.Durable); err != nil {
			bad("Consumer.Durable: %w", err)
		}
	}
	if k.FilterSubject != "" || len(k.FilterSubjects) > 0 {
		bad("Consumer.FilterSubject and FilterSubjects: the consumer filters its event by itself; leave them out")
	}
	if k.AckPolicy != jetstream.AckExplicitPolicy {
		bad("Consumer.AckPolicy is %v: each message is settled by itself; leave it out", k.AckPolicy)
	}
	if len(k.BackOff) > 0 {
		bad("Consumer.BackOff replaces AckWait on the server; set Retry.Backoff")
	}
	if k.PriorityPolicy != jetstream.PriorityPolicyNone || len(k.PriorityGroups) > 0 {
		bad("Consumer.PriorityPolicy and PriorityGroups are not supported")
	}
	if k.DeliverSubject != "" || k.DeliverGroup != "" || k.FlowControl || k.IdleHeartbeat != 0 || k.RateLimit != 0 {
		bad("Consumer: DeliverSubject, DeliverGroup, FlowControl, IdleHeartbeat and RateLimit are for push consumers; leave them out")
	}
	if k.AckWait < minAckWait {
		bad("Consumer.AckWait is %v, want %v or more", k.AckWait, minAckWait)
	}
	if k.MaxAckPending < -1 {
		bad("Consumer.MaxAckPending is %d, want 1 or more, or -1 for no limit", k.MaxAckPending)
	}
	if k.MaxDeliver > 0 && (c.Retry.MaxAttempts < 0 || k.MaxDeliver <= c.Retry.MaxAttempts) {
		bad("Consumer.MaxDeliver is %d, want more than Retry.MaxAttempts (%d): the server would stop delivering before the framework gives up; leave it out",
			k.MaxDeliver, c.Retry.MaxAttempts)
	}
	if c.Fetch.BatchSize < 1 || c.Fetch.BatchSize > maxBatchSize {
		bad("Fetch.BatchSize is %d, want 1 to %d", c.Fetch.BatchSize, maxBatchSize)
	}
	if c.Fetch.IdleTimeout < minIdleTimeout || c.Fetch.IdleTimeout > maxIdleTimeout {
		bad("Fetch.IdleTimeout is %v, want %v to %v", c.Fetch.IdleTimeout, minIdleTimeout, maxIdleTimeout)
	}
	if c.Fetch.MaxBytes < minFetchBytes || c.Fetch.MaxBytes > maxFetchBytes {
		bad("Fetch.MaxBytes is %d, want %d to %d", c.Fetch.MaxBytes, minFetchBytes, maxFetchBytes)
	}
	if c.Concurrency < 1 || c.Concurrency > maxConcurrency {
		bad("Concurrency is %d, want 1 to %d", c.Concurrency, maxConcurrency)
	}
	if n := int64(c.Concurrency) * int64(c.Fetch.BatchSize); n > maxInWork {
		bad("Concurrency × Fetch.BatchSize is %d, want at most %d messages in work at a time", n, maxInWork)
	}
	if err := c.Retry.validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// A streamConsumer runs one durable consumer. The pull half is in pull.go, the
// settlements in settle.go.
type streamConsumer struct {
	*streamRegistration

	rt     *run
	tel    *messaging.Consumer
	handle HandleFunc
	work   context.Context //nolint:containedctx // ends when Stop runs out of time

	created atomic.Pointer[time.Time] // when the stream was made
	history history
	prior   priorState
	held    heldMessages
	repeats repeats

	handedBack  handedBackState
	marksPaused atomic.Int64 // until when no mark is stored, as uptime

	queue   msgQueue
	workers sync.WaitGroup
	busy    atomic.Int32 // workers that have a batch
	pace    pace
	gate    *gate         // nil: there is one worker
	ending  chan struct{} // closed when Stop begins
	limiter logLimiter
	last    atomic.Pointer[delivery] // that something was sent for

	pull    puller
	replays replayIntake
}

func newStreamConsumer(rt *run, r *streamRegistration, mw []Middleware) *streamConsumer {
	c := &streamConsumer{
		streamRegistration: r,

		rt:   rt,
		tel:  rt.tel.Consumer(messaging.Route{Template: r.info.Event.Subject, Group: r.info.Durable, Stream: r.info.Stream}),
		work: messaging.Bare(rt.work),
	}
	rt.topologyMu.Lock() // a publish may find that a stream is gone, and have it made again
	created := rt.created[r.info.Stream]
	rt.topologyMu.Unlock()
	c.created.Store(&created)
	if rt.dead != nil {
		c.tel.CaptureDeadLetters(deadLetterReasons())
	}
	c.handle = chainHandle(mw, r.info, HandleFunc(r.handler))
	c.pull.init(c, r.info.Durable)
	c.queue.init()
	c.gate = newGate(c.cfg.Concurrency)
	c.ending = make(chan struct{})
	c.held.c = c
	c.history.prior = &c.prior
	c.prior.reset()
	return c
}

// runWorker handles batches until the queue is closed and empty.
func (c *streamConsumer) runWorker() {
	done := false
	defer func() {
		if !done { // a handler ended this goroutine; see errGoexit
			c.workers.Go(c.runWorker)
		}
	}()
	batch := make([]*Msg, 0, min(c.batchLimit(1), c.pull.most))
	for {
		if batch = c.queue.take(batch[:0], c.batchLimit); len(batch) == 0 {
			break
		}
		c.busy.Add(1)
		c.handleBatch(batch)
		clear(batch)
	}
	done = true
}

// start begins to fetch. Messages wait in the queue until startWorkers.
func (c *streamConsumer) start() error {
	if err := c.pull.start(); err != nil {
		return err
	}
	c.startReplays()
	return nil
}

func (c *streamConsumer) startWorkers() {
	for range c.cfg.Concurrency {
		c.workers.Go(c.runWorker)
	}
}

// stop ends the intake, hands back what no handler has begun and what is held, and
// waits for the handlers that run. When soft ends the caller cancels c.work.
func (c *streamConsumer) stop(soft context.Context) {
	close(c.ending)
	c.queue.end()
	c.replays.stopIntake(soft) // before anything is handed back, or it would come again
	c.pull.stopIntake(soft)
	c.handBack(c.queue.rest())
	c.workers.Wait()
	c.held.stop()
	c.stopRepeats(soft)
	c.pull.stop()
	c.replays.stop()
}

// errGoexit is the error of a handler that called runtime.Goexit, as the Fatal
// of a testing.T does. It ends the worker, so another one takes its place.
var errGoexit = errors.New("handler ended its goroutine")

// handleBatch hands a batch over, or the part of it that no handler has decided
// before.
func (c *streamConsumer) handleBatch(batch []*Msg) {
	defer func() {
		c.busy.Add(-1)
		c.release(batch)
	}()
	rest := c.ownBatch(c.sift(c.withoutRepeats(c.ownBatch(batch)))) // sift may take long
	switch {
	case len(rest) == 0:
	case c.work.Err() != nil: // there is no time left to begin
		c.handBack(rest)
	case c.usedUp(rest[0]): // and alone, see batchLimit
		c.handleMarked(rest[0])
	default:
		if c.gate.enter(c.ending) {
			defer c.gate.leave()
			if rest = c.take(rest); len(rest) > 0 {
				c.call(rest)
			}
		} else {
			c.handBack(rest)
		}
	}
	if slices.ContainsFunc(batch, func(m *Msg) bool { return m.attempt() > 1 }) {
		c.flush()
	}
}

// call runs the handler and settles what it left.
func (c *streamConsumer) call(batch []*Msg) {
	err := errGoexit
	var call messaging.Batch
	began := c.pace.begin()
	defer func() {
		c.pace.end(began)
		c.settleRest(batch, err)
		call.End(err)
	}()
	ctx := c.begin(batch, &call)
	// The handler gets a slice of its own, since it may reorder or keep it.
	err = callHandler(ctx, c.handle, slices.Clone(batch))
}

// begin opens the span of each message, and returns the handler's context: that
// of the message if there is one, else that of the call.
func (c *streamConsumer) begin(batch []*Msg, call *messaging.Batch) (ctx context.Context) {
	now := time.Now()
	for _, m := range batch {
		msg := c.message(m)
		m.ctx = c.tel.Start(c.work, &m.tel, &msg, now) //nolint:fatcontext // each message has its own
	}
	if len(batch) == 1 {
		return batch[0].ctx
	}
	ctx, *call = c.tel.StartBatch(c.work, len(batch), func(i int) *messaging.Delivery { return &batch[i].tel })
	return ctx
}

// message is what telemetry wants to know of a delivery.
func (*streamConsumer) message(m *Msg) messaging.Message {
	return messaging.Message{
		Subject: m.Subject, Header: m.Header, Size: len(m.Data), ConsumerSequence: m.consumerSequence, Links: m.links(),
	}
}

func (c *streamConsumer) settleRest(batch []*Msg, err error) {
	unsettled, open := 0, 0
	for _, m := range batch {
		switch state := m.state.Load(); {
		case state == stateGone:
			c.tel.Abandon(m.Context(), &m.tel, err)
			continue
		case state != stateOpen:
			m.leave(err)
			continue
		case err != nil:
			if c.finish(m, settlement{kind: settleError, err: err}) != nil {
				m.leave(err)
			}
		case c.cfg.AutoAck:
			if ackErr := c.finish(m, settlement{kind: settleAck}); ackErr != nil {
				m.leave(ackErr)
			}
		default:
			unsettled++
			if c.rt.dead != nil {
				c.history.note(m, func(k *remembered) { k.left = true })
			}
			m.leave(nil)
		}
		open++
	}
	if unsettled > 0 {
		c.report(slog.LevelWarn, "handler returned nil and left messages unsettled; they come back after AckWait: "+
			"call Ack, or set AutoAck", nil, nil, slog.Int("messages", unsettled))
	}
	if err != nil && open == 0 {
		c.report(slog.LevelWarn, "handler failed after every message was settled", batch[len(batch)-1], err)
	}
}

// finish settles what the handler left. A failure here means that the
// connection is gone; the message comes back after AckWait. It is reported.
func (c *streamConsumer) finish(m *Msg, s settlement) error {
	err := m.settle(s)
	if err != nil && !errors.Is(err, ErrAlreadySettled) {
		c.report(slog.LevelWarn, "settlement not sent, the message comes back after AckWait", m, err)
	}
	return err
}

func callHandler(ctx context.Context, h HandleFunc, msgs []*Msg) (err error) {
	defer recoverPanic(&err)
	return checkedError(h(ctx, msgs))
}

// checkedError returns err, or a PanicError when its text cannot be had: an
// error that is a nil pointer in disguise would otherwise bring the process
// down where it is logged.
func checkedError(err error) (checked error) {
	if err == nil {
		return nil
	}
	defer recoverPanic(&checked)
	_ = err.Error()
	return err
}

// recoverPanic is deferred around the user's code: it turns a panic into an
// error.
func recoverPanic(err *error) {
	if v := recover(); v != nil {
		*err = &PanicError{Value: v, Stack: debug.Stack()}
	}
}

// report writes at most one line a second and level for this consumer, with the
// number of lines left out, so that an outage does not fill the disk.
func (c *streamConsumer) report(level slog.Level, text string, m *Msg, err error, attrs ...slog.Attr) {
	if !c.rt.log.Enabled(c.rt.base, level) {
		return
	}
	left, ok := c.limiter.allow(level, time.Now())
	if !ok {
		return
	}
	attrs = append(attrs, consumerAttrs(c.info)...)
	ctx := c.rt.base
	if m != nil {
		ctx = m.Context() // with its span, so that the line can be found from the trace
		attrs = append(attrs, messageAttrs(m)...)
	}
	c.rt.log.LogAttrs(ctx, level, text, //nolint:sloglint // constants, a call away
		append(attrs, errorAttrs(err, left)...)...)
}

func messageAttrs(m *Msg) []slog.Attr { return deliveryAttrs(m.delivery) }

func deliveryAttrs(d *delivery) []slog.Attr {
	return []slog.Attr{slog.Uint64("stream_sequence", d.sequence()), slog.Uint64("attempt", d.attempt())}
}

func consumerAttrs(i Consumer) []slog.Attr {
	as := []slog.Attr{slog.String("module", i.Module), slog.String("event", i.Event.String())}
	if i.Durable != "" {
		return append(as, slog.String("stream", i.Stream), slog.String("consumer", i.Durable))
	}
	return append(as, slog.String("queue", i.Queue))
}

func errorAttrs(err error, left uint64) []slog.Attr {
	var as []slog.Attr
	if err != nil {
		as = append(as, slog.String("error", oneLine(err.Error())))
		if p, ok := errors.AsType[*PanicError](err); ok {
			as = append(as, slog.String("stack", string(p.Stack)))
		}
	}
	if left > 0 {
		as = append(as, slog.Uint64("similar_left_out", left))
	}
	return as
}

// A logLimiter lets one line a second pass for each level.
type logLimiter struct {
	warn, error struct {
		next atomic.Int64 // Unix nanoseconds
		left atomic.Uint64
	}
}

func (l *logLimiter) allow(level slog.Level, now time.Time) (left uint64, ok bool) {
	s := &l.warn
	if level >= slog.LevelError {
		s = &l.error
	}
	next := s.next.Load()
	if now.UnixNano() < next || !s.next.CompareAndSwap(next, now.Add(time.Second).UnixNano()) {
		s.left.Add(1)
		return 0, false
	}
	return s.left.Swap(0), true
}

// toMsg makes a delivery of what has arrived, if it is one of the puller's durable.
func (c *streamConsumer) toMsg(p *puller, nm *nats.Msg) (*Msg, bool) {
	var at ackReply
	if !at.read(nm.Reply, p.names) {
		return nil, false
	}
	both := &struct { // one allocation
		msg Msg
		del delivery
	}{
		msg: Msg{Subject: nm.Subject, Data: nm.Data, Header: nm.Header, ctx: c.work},
		del: delivery{consumer: c, reply: nm.Reply, consumerSequence: at.consumerSequence},
	}
	both.del.sized.Store(sized(nm.Size()))
	m := &both.msg
	m.delivery = &both.del
	m.tel.Sequence, m.tel.Stored = at.sequence, at.stored
	m.tel.Attempt = uint32(min(at.deliveries, math.MaxUint32))
	if nm.Subject != c.info.Event.Subject {
		c.unwrap(m)
	}
	return m, true
}
