package mono

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/telemetry/messaging"
)

// A coreConsumer runs one core NATS subscription. Handling is sequential, on
// the subscription's own goroutine, as with nats.go.
type coreConsumer struct {
	rt      *run
	info    Consumer
	handle  HandleFunc // nil without middleware
	handler EventConsumerHandler
	tel     *messaging.Consumer
	work    context.Context //nolint:containedctx // without a span
	limiter logLimiter
	busy    sync.Mutex // held while the handler runs

	mu      sync.Mutex
	sub     *nats.Subscription
	drained chan struct{} // closed when sub has handed over its last message
	close   func()        // closes drained, once
	stopped bool
}

func newCoreConsumer(rt *run, r *coreRegistration, mw []Middleware) *coreConsumer {
	c := &coreConsumer{
		rt: rt, info: r.info, handler: r.handler, work: messaging.Bare(rt.work),
		tel: rt.tel.Consumer(messaging.Route{Template: r.info.Event.Subject, Group: r.info.Queue}),
	}
	for _, m := range mw {
		if m.Handle != nil {
			c.handle = chainHandle(mw, r.info, func(ctx context.Context, msgs []*Msg) error {
				for _, m := range msgs { // one, unless middleware made more of it
					if err := c.handler(ctx, m); err != nil {
						return err
					}
				}
				return nil
			})
			break
		}
	}
	return c
}

func (c *coreConsumer) start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.subscribe()
}

// subscribe makes the subscription. c.mu is held.
func (c *coreConsumer) subscribe() error {
	sub, err := c.rt.nc.QueueSubscribe(c.info.Event.Subject, c.info.Queue, c.receive)
	if err != nil {
		return fmt.Errorf("subscribe to %q: %w", c.info.Event.Subject, err)
	}
	drained := make(chan struct{})
	c.sub, c.drained, c.close = sub, drained, sync.OnceFunc(func() { close(drained) })
	end := c.close
	sub.SetClosedHandler(func(string) { end() })
	return nil
}

func (c *coreConsumer) receive(nm *nats.Msg) {
	select {
	case <-c.rt.ready: // for all but the first messages
	default:
		select {
		case <-c.rt.ready:
		case <-c.rt.work.Done():
		}
	}
	if c.rt.work.Err() != nil {
		return
	}
	err, returned := errGoexit, false
	m := &Msg{Subject: nm.Subject, Data: nm.Data, Header: nm.Header}
	var d messaging.Delivery
	c.busy.Lock()
	defer func() {
		c.tel.Return(m.Context(), &d, err)
		c.busy.Unlock()
		if err != nil {
			c.report(m.ctx, err)
		}
		if !returned {
			c.replace()
		}
	}()
	var now time.Time
	if c.tel.Timed(c.work) {
		now = time.Now()
	}
	m.ctx = c.tel.Start(c.work, &d, &messaging.Message{Subject: nm.Subject, Header: nm.Header, Size: len(nm.Data)}, now)
	err = c.call(m)
	returned = true
}

// replace subscribes anew after a handler has ended the subscription's
// goroutine, which nats.go does not notice.
func (c *coreConsumer) replace() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.close() // nobody else will
	if err := c.sub.Unsubscribe(); err != nil || c.stopped {
		return
	}
	if err := c.subscribe(); err != nil {
		c.report(c.rt.base, err)
	}
}

func (c *coreConsumer) call(m *Msg) (err error) {
	defer recoverPanic(&err)
	if c.handle != nil {
		err = c.handle(m.ctx, []*Msg{m})
	} else {
		err = c.handler(m.ctx, m)
	}
	return checkedError(err)
}

func (c *coreConsumer) report(ctx context.Context, err error) {
	left, ok := c.limiter.allow(slog.LevelWarn, time.Now())
	if !ok {
		return
	}
	c.rt.log.LogAttrs(ctx, slog.LevelWarn, "handler failed; a core event is not delivered again",
		append(consumerAttrs(c.info), errorAttrs(err, left)...)...)
}

// stop handles what has arrived until soft ends, and waits for the handler.
func (c *coreConsumer) stop(soft context.Context) {
	c.mu.Lock()
	c.stopped = true
	sub, drained := c.sub, c.drained
	c.mu.Unlock()
	endIntake(soft, c.rt.nc, sub, drained)
	c.busy.Lock()   // waits for the handler
	c.busy.Unlock() //nolint:gocritic,staticcheck // the lock is all there is to do
}

// endIntake lets a subscription hand over what the server has sent already, and
// no more. It returns when that is done, or with ctx.
func endIntake(ctx context.Context, nc *nats.Conn, sub *nats.Subscription, drained <-chan struct{}) {
	end := sub.Drain
	if !nc.IsConnected() {
		end = sub.Unsubscribe // a drain would wait for the server's answer
	}
	if end() != nil { // the connection is closed
		return
	}
	select {
	case <-drained:
	case <-ctx.Done():
	}
}
