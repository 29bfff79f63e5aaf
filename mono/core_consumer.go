package mono

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
)

// A coreConsumer runs one core NATS subscription. Handling is sequential, on
// the subscription's own goroutine, as with nats.go.
type coreConsumer struct {
	rt      *run
	info    Consumer
	handle  HandleFunc // nil without middleware
	handler EventConsumerHandler
	limiter logLimiter

	sub     *nats.Subscription
	drained chan struct{}
}

func newCoreConsumer(rt *run, r *coreRegistration, mw []Middleware) *coreConsumer {
	c := &coreConsumer{rt: rt, info: r.info, handler: r.handler, drained: make(chan struct{})}
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
	sub, err := c.rt.nc.QueueSubscribe(c.info.Event.Subject, c.info.Queue, c.receive)
	if err != nil {
		return fmt.Errorf("subscribe to %q: %w", c.info.Event.Subject, err)
	}
	sub.SetClosedHandler(func(string) { close(c.drained) })
	c.sub = sub
	return nil
}

func (c *coreConsumer) receive(nm *nats.Msg) {
	select {
	case <-c.rt.ready:
	case <-c.rt.work.Done():
		return
	}
	m := &Msg{Subject: nm.Subject, Data: nm.Data, Header: nm.Header, ctx: c.rt.work}
	if err := c.call(m); err != nil {
		c.report(err)
	}
}

func (c *coreConsumer) call(m *Msg) (err error) {
	defer recoverPanic(&err)
	if c.handle != nil {
		return c.handle(m.ctx, []*Msg{m})
	}
	return c.handler(m.ctx, m)
}

func (c *coreConsumer) report(err error) {
	left, ok := c.limiter.allow(slog.LevelWarn, time.Now())
	if !ok {
		return
	}
	c.rt.log.LogAttrs(c.rt.base, slog.LevelWarn, "handler failed; a core event is not delivered again",
		append(consumerAttrs(c.info), errorAttrs(err, left)...)...)
}

// stop handles what has arrived and returns, or returns with soft.
func (c *coreConsumer) stop(soft context.Context) {
	endIntake(soft, c.rt.nc, c.sub, c.drained)
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
