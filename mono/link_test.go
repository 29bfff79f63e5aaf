package mono_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// A wire is a TCP relay before a server that can go dead without a reset: the
// connections stay open, and nothing passes. New ones work.
type wire struct {
	listener net.Listener
	server   string
	accepted atomic.Int64

	mu    sync.Mutex
	pairs []*wirePair
	born  wireState // of new connections
	done  sync.WaitGroup
}

type wireState int

const (
	alive wireState = iota
	lossy           // bytes are accepted and vanish
	full            // nothing is accepted any more, so that the sender's buffer fills
)

type wirePair struct {
	client, server net.Conn
	mu             sync.Mutex
	changed        sync.Cond
	state          wireState
	closed         bool
}

func newWire(t *testing.T, srv *monotest.TestServer) *wire {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, addr, _ := strings.Cut(srv.URL(), "@")
	w := &wire{listener: l, server: addr}
	w.done.Go(w.accept)
	t.Cleanup(func() {
		_ = l.Close()
		w.mu.Lock()
		for _, p := range w.pairs {
			p.close()
		}
		w.mu.Unlock()
		w.done.Wait()
	})
	return w
}

// url is the server's address by way of the wire.
func (w *wire) url(srv *monotest.TestServer) string {
	return strings.Replace(srv.URL(), w.server, w.listener.Addr().String(), 1)
}

func (w *wire) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", w.server) //nolint:noctx // to this machine
		if err != nil {
			_ = client.Close()
			continue
		}
		p := &wirePair{client: client, server: server}
		p.changed.L = &p.mu
		w.mu.Lock()
		p.state = w.born
		w.pairs = append(w.pairs, p)
		w.mu.Unlock()
		w.accepted.Add(1)
		w.done.Go(func() { p.relay(server, client) })
		w.done.Go(func() { p.relay(client, server) })
	}
}

// now puts the connections that there are into a state.
func (w *wire) now(s wireState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, p := range w.pairs {
		p.mu.Lock()
		p.state = s
		p.mu.Unlock()
		p.changed.Broadcast()
	}
}

// later puts those into a state that are made from now on.
func (w *wire) later(s wireState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.born = s
}

// relay never closes a dead connection: the peer is not to be told.
func (p *wirePair) relay(to, from net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		p.mu.Lock()
		for p.state == full && !p.closed {
			p.changed.Wait()
		}
		p.mu.Unlock()
		n, err := from.Read(buf)
		p.mu.Lock()
		for p.state == full && !p.closed {
			p.changed.Wait()
		}
		passes := p.state == alive
		p.mu.Unlock()
		if passes && n > 0 {
			_, writeErr := to.Write(buf[:n])
			err = errors.Join(err, writeErr)
		}
		if err != nil {
			if passes {
				p.close()
			}
			return
		}
	}
}

func (p *wirePair) close() {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	p.changed.Broadcast()
	_ = p.client.Close()
	_ = p.server.Close()
}

// quickPing notices a dead link soon. It is given as an option, so that a test
// that waits for the notice fails if the option is ignored.
const quickPing = 500 * time.Millisecond

// The times are those that the option's comment promises, as the connection has
// them. nats.go's own are 2 min and 2 pings, which notice nothing for 6 minutes.
func TestWithPingInterval(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	start := func(opts ...mono.Option) *nats.Options {
		app := monotest.AppWith(t, append(opts, quiet()))
		return &app.Conn().Opts
	}
	url := srv.URL()
	o := start(mono.WithNATS(url))
	if got := time.Duration(o.MaxPingsOut+1) * o.PingInterval; o.PingInterval <= 0 || o.MaxPingsOut < 1 || got > 30*time.Second {
		t.Errorf("a dead link is noticed after %d pings, %v apart, want 30 s at most", o.MaxPingsOut+1, o.PingInterval)
	}
	if o := start(mono.WithNATS(url), mono.WithPingInterval(time.Second)); o.PingInterval != time.Second {
		t.Errorf("PingInterval is %v, want 1 s", o.PingInterval)
	}
	o = start(mono.WithNATS(url, nats.PingInterval(time.Hour), nats.MaxPingsOutstanding(7), nats.FlusherTimeout(time.Minute)),
		mono.WithPingInterval(time.Second))
	if o.PingInterval != time.Hour || o.MaxPingsOut != 7 || o.FlusherTimeout != time.Minute {
		t.Errorf("pings are %v apart, %d may be open and FlusherTimeout is %v: the user's options should win",
			o.PingInterval, o.MaxPingsOut, o.FlusherTimeout)
	}
}

// The link dies without a reset while messages are in work and others wait on the
// server. It is noticed, the health says so, before and after, the new connection is
// made with the user's dialer, and consumption goes on. Nothing is handled twice.
func TestLink_dies(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	w := newWire(t, srv)
	entered, release := make(chan struct{}, 100), make(chan struct{})
	handled := newTally()
	dialer := &countingDialer{}
	disconnected, reconnected := make(chan error, 10), make(chan struct{}, 10)
	log := &logBuffer{}
	cfg := autoAckPlain("S")
	cfg.Fetch.BatchSize = 5
	cfg.Consumer.AckWait = time.Second // what the server sends over the dead link comes again after that
	app := runApp(t, []mono.Option{
		mono.WithEvents(e), mono.WithPingInterval(quickPing), mono.WithLogger(log.logger()),
		mono.WithNATS(w.url(srv), nats.ReconnectWait(10*time.Millisecond), nats.SetCustomDialer(dialer),
			nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { disconnected <- err }),
			nats.ReconnectHandler(func(*nats.Conn) { reconnected <- struct{}{} })),
	}, durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		entered <- struct{}{}
		<-release
		return handled.handle(ctx, msgs)
	}))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	publishAll(t, emit.Bus(), e, payloads("before", 0, 20))
	receive(t, entered, "the handler")

	w.later(lossy) // no reconnect succeeds yet
	w.now(lossy)
	// A health check with a deadline does not wait for the notice.
	ctx, cancel := context.WithTimeout(t.Context(), quickPing/2)
	defer cancel()
	err := app.Health(ctx).Err()
	if !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, mono.ErrDisconnected) {
		t.Errorf("health over a dead link is %v, want the context's error", err)
	}
	if err := receive(t, disconnected, "the notice"); !errors.Is(err, nats.ErrStaleConnection) {
		t.Errorf("the connection was lost with %v, want %v", err, nats.ErrStaleConnection)
	}
	wantError(t, app.Health(within(t)).Err(), mono.ErrDisconnected, "connection")
	publishAll(t, emit.Bus(), e, payloads("while", 0, 30))
	w.later(alive)
	receive(t, reconnected, "the new connection")
	if n := dialer.dials.Load(); n < 2 || n < w.accepted.Load() {
		t.Errorf("the user's dialer was asked %d times for %d connections", n, w.accepted.Load())
	}
	close(release)
	want := append(payloads("before", 0, 20), payloads("while", 0, 30)...)
	handled.waitFor(t, want)
	settled(t, app, "S", "m_shop_created_v1")
	if twice := handled.deliveredTwice(); len(twice) > 0 {
		t.Errorf("handled more than once: %q", twice)
	}
	if err := app.Health(within(t)).Err(); err != nil {
		t.Errorf("health after the reconnect: %v", err)
	}
	if !strings.Contains(log.String(), "connection to NATS lost") {
		t.Errorf("the log does not tell of the lost connection:\n%s", log)
	}
}

type countingDialer struct{ dials atomic.Int64 }

func (d *countingDialer) Dial(network, address string) (net.Conn, error) {
	d.dials.Add(1)
	return net.Dial(network, address) //nolint:noctx // to this machine
}

// flood publishes until an asynchronous publish fails or blocks beyond ctx. It fills the
// socket's buffers, so that nats.go's next write blocks with its lock held.
func flood(ctx context.Context, bus mono.EventBus, e mono.BaseEventDefinition) error {
	payload := make([]byte, 512<<10)
	for i := 0; ctx.Err() == nil; i++ {
		if err := bus.Publish(ctx, &mono.Msg{Subject: fmt.Sprintf("%s.flood", e.Subject), Data: payload}); err != nil {
			return err
		}
	}
	return context.Cause(ctx)
}

// The buffers are full when the link dies: nats.go holds its lock in a write then,
// for a minute, and its ping timer waits for that lock.
func TestLink_diesWhileWriting(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	w := newWire(t, srv)
	disconnected, reconnected := make(chan error, 10), make(chan struct{}, 10)
	app := runApp(t, []mono.Option{
		quiet(), mono.WithEvents(e), mono.WithPingInterval(quickPing),
		mono.WithNATS(w.url(srv), nats.ReconnectWait(10*time.Millisecond),
			nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { disconnected <- err }),
			nats.ReconnectHandler(func(*nats.Conn) { reconnected <- struct{}{} })),
	})
	w.now(full)
	flooding, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- flood(flooding, app.Bus(), e) }()
	if err := receive(t, disconnected, "the notice"); !errors.Is(err, nats.ErrStaleConnection) {
		t.Errorf("the connection was lost with %v, want %v", err, nats.ErrStaleConnection)
	}
	receive(t, reconnected, "the new connection")
	stop()
	_ = receive(t, ended, "the publisher")
	if err := app.Health(within(t)).Err(); err != nil {
		t.Error(err)
	}
}

// Health and Stop keep to their contexts while a write to a dead link blocks, and
// nats.go's lock with it. The interval is so long that nothing but they ends it.
func TestLink_stopWhileWriting(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	w := newWire(t, srv)
	entered := make(chan struct{}, 100)
	app := runApp(t, []mono.Option{quiet(), mono.WithEvents(e), mono.WithPingInterval(time.Hour), mono.WithNATS(w.url(srv))},
		durableModule("m", e, autoAckPlain("S"), func(ctx context.Context, _ []*mono.Msg) error {
			entered <- struct{}{}
			<-ctx.Done()
			return ctx.Err()
		}))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	publishAll(t, emit.Bus(), e, []string{"x"})
	receive(t, entered, "the handler")
	w.now(full)
	w.later(full)
	flooding, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- flood(flooding, app.Bus(), e) }()
	// The health check fails from the moment at which the link is dead.
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	wantError(t, app.Health(ctx).Err(), context.DeadlineExceeded, "connection", "does not answer")

	stopped := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		stopped <- app.Stop(ctx)
	}()
	_ = receive(t, stopped, "Stop, within patience and not within an hour")
	stop()
	_ = receive(t, ended, "the publisher")
}

// A server that accepts the connection and says nothing, or goes silent afterwards,
// does not keep Start beyond its context.
func TestLink_deadDuringStart(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	for name, after := range map[string]int64{"from the beginning": 0, "after the handshake": 1} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			w := newWire(t, srv)
			if after == 0 {
				w.later(lossy)
			}
			first := &testModule{name: "first", register: func(mono.EventRegistry, mono.Module) error {
				w.now(lossy) // connected, and before anything is arranged
				w.later(lossy)
				return nil
			}}
			app, err := mono.New(quiet(), mono.WithEvents(e), mono.WithPingInterval(time.Hour), mono.WithNATS(w.url(srv)),
				mono.WithShutdownTimeout(time.Second))
			if err != nil {
				t.Fatal(err)
			}
			if err := app.Register(first, durableModule("m", e, autoAckPlain("S"), newTally().handle)); err != nil {
				t.Fatal(err)
			}
			result := make(chan error, 1)
			go func() {
				ctx, cancel := context.WithTimeout(t.Context(), time.Second)
				defer cancel()
				result <- app.Start(ctx)
			}()
			if err := receive(t, result, "Start"); err == nil {
				t.Error("Start succeeds over a dead link")
			}
		})
	}
}
