package mono

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// connect dials within ctx. What happens to the connection later is logged, and
// passed on to the callbacks that the user's own options set.
func (r *run) connect(ctx context.Context, url string, opts []nats.Option) error {
	o := nats.GetDefaultOptions()
	o.Url = url
	o.Name = r.app.cfg.name
	o.MaxReconnect = -1
	for _, opt := range opts {
		if opt == nil {
			continue
		}
		if err := opt(&o); err != nil {
			return fmt.Errorf("NATS option: %w", err)
		}
	}
	dialer := &startDialer{next: o.CustomDialer, ctx: ctx, timeout: o.Timeout}
	if o.InProcessServer == nil {
		o.CustomDialer = dialer
	}
	r.observe(&o)
	nc, err := o.Connect()
	if err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
		return err
	}
	if !dialer.detach() {
		nc.Close()
		return context.Cause(ctx)
	}
	r.nc = nc
	return nil
}

// observe puts the App's callbacks before the user's.
func (r *run) observe(o *nats.Options) {
	disconnected := o.DisconnectedErrCB
	o.DisconnectedErrCB = func(nc *nats.Conn, err error) {
		if !r.closing.Load() {
			r.log.LogAttrs(r.base, slog.LevelWarn, "connection to NATS lost, reconnecting", errorAttrs(err, 0)...)
			r.async.failAll(ErrDisconnected, time.Now())
		}
		if disconnected != nil {
			disconnected(nc, err)
		}
	}
	reconnected := o.ReconnectedCB
	o.ReconnectedCB = func(nc *nats.Conn) {
		r.log.LogAttrs(r.base, slog.LevelWarn, "connection to NATS is back", slog.String("server", nc.ConnectedServerName()))
		r.resume()
		if reconnected != nil {
			reconnected(nc)
		}
	}
	asyncError := o.AsyncErrorCB
	o.AsyncErrorCB = func(nc *nats.Conn, sub *nats.Subscription, err error) {
		attrs := errorAttrs(err, 0)
		if sub != nil {
			attrs = append(attrs, slog.String("subject", sub.Subject), slog.String("queue", sub.Queue))
		}
		r.log.LogAttrs(r.base, slog.LevelWarn, "NATS reports an error", attrs...)
		if asyncError != nil {
			asyncError(nc, sub, err)
		}
	}
	closed := o.ClosedCB
	o.ClosedCB = func(nc *nats.Conn) {
		if !r.closing.Load() {
			r.log.LogAttrs(r.base, slog.LevelError, "connection to NATS closed for good; stop and start the App to connect again",
				errorAttrs(nc.LastError(), 0)...)
		}
		close(r.closed)
		if closed != nil {
			closed(nc)
		}
	}
}

// A startDialer bounds the first connection by the context of Start: the dial,
// and what the client and the server say to each other before Connect returns.
// Reconnects are later, and not bound by it.
type startDialer struct {
	next    nats.CustomDialer
	ctx     context.Context //nolint:containedctx // nats.go's Dial has no context
	timeout time.Duration
	stop    func() bool
	started atomic.Bool
}

func (d *startDialer) Dial(network, address string) (net.Conn, error) {
	if d.started.Load() {
		if d.next != nil {
			return d.next.Dial(network, address)
		}
		return (&net.Dialer{Timeout: d.timeout}).Dial(network, address)
	}
	if d.ctx.Err() != nil {
		return nil, context.Cause(d.ctx)
	}
	d.detach()
	conn, err := d.first(network, address)
	if err == nil {
		d.stop = context.AfterFunc(d.ctx, func() { _ = conn.Close() })
	}
	return conn, err
}

func (d *startDialer) first(network, address string) (net.Conn, error) {
	if d.next != nil {
		return d.next.Dial(network, address)
	}
	return (&net.Dialer{Timeout: d.timeout}).DialContext(d.ctx, network, address)
}

// detach frees the connection from the context. It returns false when the
// context has ended and the connection with it.
func (d *startDialer) detach() bool {
	ok := d.stop == nil || d.stop()
	d.stop = nil
	return ok
}

// SkipTLSHandshake hands on what the user's dialer says about itself.
func (d *startDialer) SkipTLSHandshake() bool {
	s, ok := d.next.(interface{ SkipTLSHandshake() bool })
	return ok && s.SkipTLSHandshake()
}
