package mono

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// connect dials within ctx. What happens to the connection later is logged, and
// passed on to the callbacks that the user's own options set.
func (r *run) connect(ctx context.Context, url string, opts []nats.Option) error {
	o := nats.GetDefaultOptions()
	for s := range strings.SplitSeq(url, ",") { // as nats.Connect does; o.Url is one server
		if s = strings.TrimSpace(s); s != "" {
			o.Servers = append(o.Servers, s)
		}
	}
	o.Name = r.app.cfg.name
	o.MaxReconnect = -1
	o.IgnoreAuthErrorAbort = true // a password that is being changed is no reason to give up
	detectDeadLinks(&o, r.app.cfg.pingInterval)
	for _, opt := range opts {
		if opt == nil {
			continue
		}
		if err := opt(&o); err != nil {
			return fmt.Errorf("NATS option: %w", err)
		}
	}
	// A server that is not there fails the start, which may be repeated.
	o.RetryOnFailedConnect = false
	r.link.init(&o)
	dialer := &startDialer{ctx: ctx, next: o.CustomDialer, net: netDialer(&o), link: &r.link}
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
	r.nc = nc
	r.connMu.Lock()
	r.serverID = nc.ConnectedServerId()
	r.connMu.Unlock()
	r.tel.SetServer(nc.ConnectedAddr(), nc)
	ok := dialer.detach()
	dialer.started.Store(true)
	if !ok {
		return context.Cause(ctx)
	}
	return nil
}

// netDialer is the dialer that nats.go would use without ours.
func netDialer(o *nats.Options) *net.Dialer {
	d := &net.Dialer{Timeout: o.Timeout}
	if o.Dialer != nil { // deprecated, but nats.Dialer still sets it
		given := *o.Dialer
		d = &given
	}
	if o.AllowMultipathTCP != nil {
		d.SetMultipathTCP(*o.AllowMultipathTCP)
	}
	return d
}

// observe puts the App's callbacks before the user's.
func (r *run) observe(o *nats.Options) {
	disconnected := o.DisconnectedErrCB
	o.DisconnectedErrCB = func(nc *nats.Conn, err error) {
		if !r.closing.Load() {
			r.log.LogAttrs(r.base, slog.LevelWarn, "connection to NATS lost, reconnecting", errorAttrs(err, 0)...)
			r.lost()
		}
		switch {
		case disconnected != nil:
			disconnected(nc, err)
		case o.DisconnectedCB != nil: // deprecated, and ours to call: nats.go calls one of the two
			o.DisconnectedCB(nc)
		}
	}
	reconnected := o.ReconnectedCB
	o.ReconnectedCB = func(nc *nats.Conn) {
		r.tel.SetServer(nc.ConnectedAddr(), nc)
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
	ctx     context.Context   //nolint:containedctx // nats.go's Dial has no context
	next    nats.CustomDialer // the user's, or nil
	net     *net.Dialer
	link    *link
	stop    func() bool // unties the connection from ctx
	started atomic.Bool
}

func (d *startDialer) Dial(network, address string) (net.Conn, error) {
	if d.started.Load() {
		return d.again(network, address)
	}
	if d.ctx.Err() != nil {
		return nil, context.Cause(d.ctx)
	}
	d.detach()
	conn, err := d.first(network, address)
	if err != nil {
		return nil, err
	}
	if conn, err = d.link.track(conn); err == nil {
		d.stop = context.AfterFunc(d.ctx, func() { _ = conn.Close() })
	}
	return conn, err
}

func (d *startDialer) again(network, address string) (conn net.Conn, err error) {
	if d.link.isEnded() {
		return nil, ErrStopped
	}
	if d.next != nil {
		conn, err = d.next.Dial(network, address)
	} else {
		conn, err = d.net.Dial(network, address)
	}
	if err != nil {
		return nil, err
	}
	return d.link.track(conn)
}

func (d *startDialer) first(network, address string) (net.Conn, error) {
	if d.next != nil {
		return d.next.Dial(network, address)
	}
	return d.net.DialContext(d.ctx, network, address)
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
