package mono_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// A cable is a TCP relay before a server that can be cut, and silenced.
type cable struct {
	listener net.Listener
	server   string

	mu    sync.Mutex
	conns []net.Conn
	mute  bool // nothing from the server gets through
	done  sync.WaitGroup
}

func newCable(t *testing.T, srv *monotest.TestServer) *cable {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, addr, _ := strings.Cut(srv.URL(), "@")
	c := &cable{listener: l, server: addr}
	c.done.Go(c.accept)
	t.Cleanup(func() {
		_ = l.Close()
		c.cut()
		c.done.Wait()
	})
	return c
}

// url is the server's address by way of the cable.
func (c *cable) url(srv *monotest.TestServer) string {
	return strings.Replace(srv.URL(), c.server, c.listener.Addr().String(), 1)
}

func (c *cable) accept() {
	for {
		client, err := c.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", c.server) //nolint:noctx // to this machine
		if err != nil {
			_ = client.Close()
			continue
		}
		c.mu.Lock()
		c.conns = append(c.conns, client, server)
		c.mu.Unlock()
		c.done.Go(func() { c.relay(server, client, false) })
		c.done.Go(func() { c.relay(client, server, true) })
	}
}

func (c *cable) relay(to, from net.Conn, fromServer bool) {
	defer func() { _ = to.Close() }()
	defer func() { _ = from.Close() }()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		c.mu.Lock()
		mute := c.mute && fromServer
		c.mu.Unlock()
		if !mute && n > 0 {
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// silence swallows what the server sends from now on, until the next cut.
func (c *cable) silence() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mute = true
}

// cut ends every connection; new ones work.
func (c *cable) cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mute = false
	for _, conn := range c.conns {
		_ = conn.Close()
	}
	c.conns = nil
}

// awaitDisconnect waits until the App knows that its server is gone.
func awaitDisconnect(t *testing.T, app *mono.App) {
	t.Helper()
	eventually(t, func() bool { return !app.Conn().IsConnected() }, "the App notices that the server is gone")
}

// A list of servers was taken for the address of one.
func TestWithNATS_severalServers(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	e := defineEvent(t, "Created")
	handled := newTally()
	app := runApp(t, []mono.Option{mono.WithNATS("nats://127.0.0.1:1, " + srv.URL())}, emitter("shop", e),
		durableModule("m", e, autoAckPlain("S"), handled.handle))
	publishAll(t, app.Bus(), e, []string{"x"})
	handled.waitFor(t, []string{"x"})
}

// What is published while the server is away fails in words that say so, or
// waits if its context has the time.
func TestReconnect_publish(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	handled := newTally()
	app := runApp(t, onServer(srv), emitter("shop", e), durableModule("m", e, autoAckPlain("S"), handled.handle))
	srv.Stop()
	awaitDisconnect(t, app)

	short, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err := app.Bus().PublishStream(short, &mono.Msg{Subject: e.Subject, Data: []byte("short")})
	wantError(t, err, mono.ErrDisconnected, e.Subject)
	wantError(t, err, context.DeadlineExceeded)
	cancelled, end := context.WithCancelCause(t.Context())
	time.AfterFunc(100*time.Millisecond, func() { end(errBroken) })
	_, err = app.Bus().PublishStream(cancelled, &mono.Msg{Subject: e.Subject, Data: []byte("cancelled")})
	wantError(t, err, nil, e.Subject)
	if !errors.Is(err, context.Canceled) && !errors.Is(err, errBroken) {
		t.Errorf("got %v, want the context's error", err)
	}

	results := make(chan error, 2)
	publish := func(what string) {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		_, err := app.Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte(what)})
		results <- err
	}
	go publish("patient")
	go func() {
		f, err := app.Bus().PublishStreamAsync(t.Context(), &mono.Msg{Subject: e.Subject, Data: []byte("later")})
		if err == nil {
			_, err = f.Wait(t.Context())
		}
		results <- err
	}()
	select {
	case err := <-results:
		t.Errorf("a publish without a server returned %v", err)
	case <-time.After(100 * time.Millisecond):
	}
	srv.Start()
	for range 2 {
		if err := receive(t, results, "the waiting publishes"); err != nil {
			t.Error(err)
		}
	}
	handled.waitFor(t, []string{"patient", "later"})
	if twice := handled.storedTwice(); len(twice) > 0 {
		t.Errorf("stored twice: %q", twice)
	}
}

// Asynchronous publishes that were sent and not answered when the connection was
// lost fail at once, and whoever waits for room in the window goes on.
func TestReconnect_asyncPublishes(t *testing.T) {
	t.Parallel()
	const window = 50
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	c := newCable(t, srv)
	app := runApp(t, append(onURL(c.url(srv)), mono.WithPublishWindow(window)), emitter("shop", e),
		durableModule("m", e, autoAckPlain("S"), newTally().handle))
	c.silence()
	var futures []*mono.PubAckFuture
	for i := range window {
		f, err := app.Bus().PublishStreamAsync(t.Context(), &mono.Msg{Subject: e.Subject, Data: fmt.Appendf(nil, "n%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}
	full, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := app.Bus().PublishStreamAsync(full, &mono.Msg{Subject: e.Subject})
	wantError(t, err, context.DeadlineExceeded, "50")
	blocked := make(chan error, 1)
	go func() {
		f, err := app.Bus().PublishStreamAsync(t.Context(), &mono.Msg{Subject: e.Subject, Data: []byte("blocked")})
		if err == nil {
			_, err = f.Wait(t.Context())
		}
		blocked <- err
	}()
	sync1 := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		_, err := app.Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte("sync")})
		sync1 <- err
	}()
	if err := receive(t, sync1, "a publish that the server does not answer"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want the context's error", err)
	}
	c.cut()
	for _, f := range futures {
		receive(t, f.Done(), "a future after the connection is lost")
		_, err := f.Wait(t.Context())
		wantError(t, err, mono.ErrDisconnected, e.Subject, "Nats-Msg-Id")
	}
	if err := receive(t, blocked, "the publish that waited for room"); err != nil && !errors.Is(err, mono.ErrDisconnected) {
		t.Errorf("the publish that waited for room: %v", err)
	}
	publishAll(t, app.Bus(), e, []string{"after"})
}

// The server is stopped and started again and again, and the connection cut, while
// events are published, consumed in a limits stream and in two work queues. Every
// acknowledged event is handled by each consumer, and none is stored twice.
func TestReconnect_nothingIsLost(t *testing.T) {
	t.Parallel()
	const rounds = 20
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	c := newCable(t, srv)
	tallies := map[string]*tally{"limits": newTally(), "queue 1": newTally(), "queue 2": newTally()}
	slow := func(c *tally) mono.EventStreamConsumerHandler {
		return func(ctx context.Context, msgs []*mono.Msg) error {
			pauseFor(ctx, time.Duration(rand.IntN(3))*time.Millisecond)
			return c.handle(ctx, msgs)
		}
	}
	config := func(name string, retention jetstream.RetentionPolicy) mono.StreamConsumerConfig {
		cfg := autoAck(name, retention)
		cfg.Consumer.AckWait = 2 * time.Second
		cfg.Concurrency = 2
		return cfg
	}
	limits := config("L", mono.LimitsPolicy)
	limits.Stream.MaxBytes = 0
	runApp(t, append(onURL(c.url(srv)), mono.WithEvents(e)),
		durableModule("l", e, limits, slow(tallies["limits"])),
		durableModule("q1", e, config("Q1", mono.WorkQueuePolicy), slow(tallies["queue 1"])),
		durableModule("q2", e, config("Q2", mono.WorkQueuePolicy), slow(tallies["queue 2"])))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	pubs := []*stubbornPublisher{publishStubbornly(t, emit.Bus(), e, "x"), publishStubbornly(t, emit.Bus(), e, "y")}
	for range rounds {
		pubs[0].more(t, 1+rand.IntN(40))
		switch rand.IntN(3) {
		case 0:
			c.cut()
		case 1:
			srv.Stop()
			pauseFor(t.Context(), time.Duration(rand.IntN(100))*time.Millisecond)
			srv.Start()
		default:
			srv.Stop()
			srv.Start()
		}
	}
	pubs[0].more(t, 20)
	want := slices.Concat(pubs[0].end(), pubs[1].end())
	for name, c := range tallies {
		c.waitFor(t, want)
		if twice := c.storedTwice(); len(twice) > 0 {
			t.Errorf("%s: %d of %d events stored twice: %q", name, len(twice), len(want), twice[:min(10, len(twice))])
		}
		t.Logf("%s: %d events, %d deliveries", name, c.distinct(), c.total())
	}
}

// The server is away for longer than AckWait while a handler works. It runs
// once, and its ack counts.
func TestReconnect_slowHandlerRunsOnce(t *testing.T) {
	t.Parallel()
	const ackWait = time.Second
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	entered, release := make(chan struct{}, 10), make(chan struct{})
	handled := newTally()
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = ackWait
	cfg.Fetch.BatchSize = 4
	app := runApp(t, onServer(srv), emitter("shop", e), durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		entered <- struct{}{}
		<-release
		return handled.handle(ctx, msgs)
	}))
	want := payloads("n", 0, 20) // one batch in work, the rest waits here
	publishAll(t, app.Bus(), e, want)
	receive(t, entered, "the handler")
	srv.Stop()
	awaitDisconnect(t, app)
	pauseFor(t.Context(), 2*ackWait)
	srv.Start()
	eventually(t, func() bool { return app.Conn().IsConnected() }, "the App is connected again")
	pauseFor(t.Context(), 2*ackWait)
	close(release)
	handled.waitFor(t, want)
	settled(t, app, "S", "m_shop_created_v1")
	if twice := handled.deliveredTwice(); len(twice) > 0 {
		t.Errorf("handled more than once: %q", twice)
	}
}

// The connection breaks a few times while handlers that are slower than AckWait
// have their hands full. Requests that the server kept from before do not bring
// more messages than there is room for, and so none is handled twice.
func TestReconnect_slowHandlersRunOnceAfterCuts(t *testing.T) {
	t.Parallel()
	const ackWait = time.Second
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	c := newCable(t, srv)
	release := make(chan struct{})
	handled := newTally()
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = ackWait
	cfg.Fetch.BatchSize = 2
	app := runApp(t, append(onURL(c.url(srv)), mono.WithEvents(e)),
		durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
			<-release
			return handled.handle(ctx, msgs)
		}))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	for range 5 {
		before := app.Conn().Statistics.Reconnects
		c.cut()
		eventually(t, func() bool { return app.Conn().IsConnected() && app.Conn().Stats().Reconnects > before }, "the App is connected again")
	}
	want := payloads("n", 0, 300)
	publishAll(t, emit.Bus(), e, want)
	pauseFor(t.Context(), 3*ackWait)
	close(release)
	handled.waitFor(t, want)
	settled(t, app, "S", "m_shop_created_v1")
	if twice := handled.deliveredTwice(); len(twice) > 0 {
		t.Errorf("%d events handled more than once: %q", len(twice), twice[:min(10, len(twice))])
	}
}

// A connection over which nothing comes any more is noticed, and consumption goes
// on over a new one.
func TestReconnect_silentConnection(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	c := newCable(t, srv)
	handled := newTally()
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = time.Second
	cfg.Fetch.IdleTimeout = time.Second
	opts := []mono.Option{mono.WithNATS(c.url(srv), nats.ReconnectWait(20*time.Millisecond), nats.PingInterval(200*time.Millisecond), nats.MaxPingsOutstanding(2))}
	runApp(t, append(opts, mono.WithEvents(e)), durableModule("m", e, cfg, handled.handle))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	publishAll(t, emit.Bus(), e, payloads("a", 0, 10))
	handled.waitFor(t, payloads("a", 0, 10))
	c.silence()
	publishAll(t, emit.Bus(), e, payloads("b", 0, 50))
	pauseFor(t.Context(), 100*time.Millisecond)
	c.mu.Lock()
	c.mute = false // for the connection that comes next; what was swallowed is gone
	c.mu.Unlock()
	handled.waitFor(t, payloads("b", 0, 50))
}

// A connection that is closed for good: everything says so and nothing hangs.
func TestReconnect_closedForGood(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	app := runApp(t, []mono.Option{mono.WithNATS(srv.URL(), nats.NoReconnect())}, emitter("shop", e),
		durableModule("m", e, autoAckPlain("S"), newTally().handle))
	srv.Stop()
	eventually(t, func() bool { return app.Conn().IsClosed() }, "the connection is closed")
	msg := &mono.Msg{Subject: e.Subject, Data: []byte("x")}
	_, err := app.Bus().PublishStream(within(t), msg)
	wantError(t, err, nats.ErrConnectionClosed)
	_, err = app.Bus().PublishStreamAsync(within(t), msg)
	wantError(t, err, nats.ErrConnectionClosed)
	wantError(t, app.Bus().Publish(within(t), msg), nats.ErrConnectionClosed)
	wantError(t, app.Health(within(t)).Err(), mono.ErrDisconnected)
	mustStop(t, app)
	srv.Start()
	mustStart(t, app)
	publishAll(t, app.Bus(), e, []string{"x"})
}

// Somebody deletes the consumer. It is made again, and consumption goes on.
func TestReconnect_deletedConsumer(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	handled := newTally()
	app := runApp(t, onServer(srv), emitter("shop", e), durableModule("m", e, autoAck("Q", mono.WorkQueuePolicy), handled.handle))
	js := jetStreamOf(t, srv.Conn())
	for round := range 3 {
		want := payloads(fmt.Sprintf("%d-", round), 0, 20)
		publishAll(t, app.Bus(), e, want)
		handled.waitFor(t, want)
		settled(t, app, "Q", "m_shop_created_v1")
		if err := js.DeleteConsumer(t.Context(), "Q", "m_shop_created_v1"); err != nil {
			t.Fatal(err)
		}
		while := payloads(fmt.Sprintf("%d-while-", round), 0, 20)
		publishAll(t, app.Bus(), e, while)
		handled.waitFor(t, while)
		eventually(t, func() bool { return app.Health(t.Context()).Healthy }, "the App is healthy")
	}
	if twice := handled.deliveredTwice(); len(twice) > 0 {
		t.Errorf("handled twice: %q", twice)
	}
}

// Somebody deletes the stream, with the events in it. It is made again, with its
// subject and sources, and consumption goes on.
func TestReconnect_deletedStream(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	for _, victim := range []string{"Q1", "Q2", "fanout_shop_created_v1"} {
		t.Run(victim, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			first, second := newTally(), newTally()
			app := runApp(t, onServer(srv), emitter("shop", e),
				durableModule("a", e, autoAck("Q1", mono.WorkQueuePolicy), first.handle),
				durableModule("b", e, autoAck("Q2", mono.WorkQueuePolicy), second.handle))
			want := payloads("before-", 0, 20)
			publishAll(t, app.Bus(), e, want)
			first.waitFor(t, want)
			second.waitFor(t, want)
			js := jetStreamOf(t, srv.Conn())
			if err := js.DeleteStream(t.Context(), victim); err != nil {
				t.Fatal(err)
			}
			pub := publishStubbornly(t, app.Bus(), e, "after-")
			pub.more(t, 50)
			want = pub.end()
			first.waitFor(t, want)
			second.waitFor(t, want)
		})
	}
}

// A server that deletes a stream with many consumers says that one of them is gone
// long before it is done with the folder. What is made anew in between would take no
// messages.
func TestReconnect_streamDeletedSlowly(t *testing.T) {
	t.Parallel()
	const others = 300
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	got := newTally()
	app := runApp(t, onServer(srv), emitter("shop", e), durableModule("a", e, autoAck("Q", mono.LimitsPolicy), got.handle))
	want := payloads("before-", 0, 5)
	publishAll(t, app.Bus(), e, want)
	got.waitFor(t, want)
	js := jetStreamOf(t, srv.Conn())
	for i := range others {
		if _, err := js.CreateConsumer(t.Context(), "Q", jetstream.ConsumerConfig{Durable: fmt.Sprintf("other-%d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := js.DeleteStream(t.Context(), "Q"); err != nil {
		t.Fatal(err)
	}
	pub := publishStubbornly(t, app.Bus(), e, "after-")
	pub.more(t, 20)
	got.waitFor(t, pub.end())
}

// The stream is deleted and made again while handlers hold messages of the old
// one. Their acks do not touch the new messages, which have the same sequences.
func TestReconnect_oldAcksDoNotReachANewStream(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	for _, wipe := range []string{"stream deleted", "folder wiped"} {
		for _, retention := range []jetstream.RetentionPolicy{mono.LimitsPolicy, mono.InterestPolicy} {
			t.Run(wipe+", "+retention.String(), func(t *testing.T) {
				t.Parallel()
				srv := monotest.Server(t)
				tallies := []*tally{newTally(), newTally(), newTally()}
				release := make(chan struct{})
				var held atomic.Int32
				var modules []mono.Module
				for i, c := range tallies {
					cfg := autoAck("S", retention)
					cfg.Stream.MaxBytes = 0
					cfg.Consumer.AckWait = 3 * time.Second
					cfg.Concurrency = 2
					cfg.Fetch.BatchSize = 32 // so that 64 are here and nothing is asked for
					modules = append(modules, durableModule(fmt.Sprintf("m%d", i), e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
						c.add(msgs...)
						held.Add(1)
						if strings.HasPrefix(string(msgs[0].Data), "old") {
							select {
							case <-release:
							case <-ctx.Done():
							}
							// One worker asks for new messages while the other one
							// still holds old ones.
							if held.Load()%2 == 0 {
								pauseFor(ctx, 100*time.Millisecond)
							}
						}
						return nil
					}))
				}
				app := runApp(t, onServer(srv), append(modules, emitter("shop", e))...)
				old, fresh := payloads("old", 0, 64), payloads("new", 0, 64)
				publishAll(t, app.Bus(), e, old)
				eventually(t, func() bool { return held.Load() == 6 }, "all workers are busy")
				eventually(t, func() bool {
					return consumerInfo(t, app, "S", "m0_shop_created_v1").NumAckPending == 64
				}, "the rest waits here")

				if wipe == "stream deleted" {
					if err := jetStreamOf(t, srv.Conn()).DeleteStream(t.Context(), "S"); err != nil {
						t.Fatal(err)
					}
				} else {
					srv.Stop()
					if err := os.RemoveAll(srv.StoreDir()); err != nil {
						t.Fatal(err)
					}
					srv.Start()
				}
				// Somebody makes the stream again; the App's publish does.
				for _, p := range fresh {
					eventually(t, func() bool {
						ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
						defer cancel()
						_, err := app.Bus().PublishStream(ctx, &mono.Msg{
							Subject: e.Subject, Data: []byte(p), Header: mono.Header{jetstream.MsgIDHeader: []string{p}},
						})
						return err == nil
					}, "publish into the new stream")
				}
				close(release)
				for i, c := range tallies {
					if !pollFor(patience/2, func() bool { return len(c.missing(fresh)) == 0 }) {
						t.Errorf("module %d: %d new messages were not handled, such as %q", i, len(c.missing(fresh)), c.missing(fresh)[0])
					}
				}
			})
		}
	}
}

// The server loses its folder while it is down. The streams are made again, and
// what is published from then on is handled.
func TestReconnect_wipedServer(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	tallies := map[string]*tally{"l": newTally(), "q1": newTally(), "q2": newTally()}
	var modules []mono.Module
	for name, c := range tallies {
		retention := mono.WorkQueuePolicy
		if name == "l" {
			retention = mono.InterestPolicy
		}
		modules = append(modules, durableModule(name, e, autoAck(strings.ToUpper(name), retention), c.handle))
	}
	app := runApp(t, onServer(srv), append(modules, emitter("shop", e))...)
	for round := range 3 {
		want := payloads(fmt.Sprintf("%d-", round), 0, 20)
		publishAll(t, app.Bus(), e, want)
		for _, c := range tallies {
			c.waitFor(t, want)
		}
		srv.Stop()
		if err := os.RemoveAll(srv.StoreDir()); err != nil {
			t.Fatal(err)
		}
		srv.Start()
		pub := publishStubbornly(t, app.Bus(), e, fmt.Sprintf("wiped-%d-", round))
		pub.more(t, 30)
		want = pub.end()
		for _, c := range tallies {
			c.waitFor(t, want)
		}
		eventually(t, func() bool { return app.Health(t.Context()).Healthy }, "the App is healthy")
	}
}

// Core consumers go on after a reconnect as well.
func TestReconnect_coreConsumer(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	got := make(chan string, 1000)
	app := runApp(t, onServer(srv), emitter("shop", e), consumer("core", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventConsumer(e, func(_ context.Context, m *mono.Msg) error { got <- string(m.Data); return nil }, self)
	}))
	for i := range 3 {
		want := fmt.Sprint(i)
		if err := app.Bus().Publish(within(t), &mono.Msg{Subject: e.Subject, Data: []byte(want)}); err != nil {
			t.Fatal(err)
		}
		if s := receive(t, got, "the event"); s != want {
			t.Errorf("got %q, want %q", s, want)
		}
		srv.Stop()
		awaitDisconnect(t, app)
		srv.Start()
		eventually(t, func() bool { return app.Conn().IsConnected() }, "the App is connected again")
	}
}
