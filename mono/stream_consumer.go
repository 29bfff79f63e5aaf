package mono

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/telemetry/messaging"
)

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
