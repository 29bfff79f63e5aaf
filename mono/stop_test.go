package mono_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// A ledger notes which messages were handled, and which of them were acked in
// an earlier life of the App.
type ledger struct {
	mu        sync.Mutex
	handled   map[string]bool
	acked     map[uint64]bool // stream sequences whose Ack returned nil
	before    map[uint64]bool // those of earlier lives
	again     []uint64        // of before, and delivered all the same
	delivered map[uint64]int
}

func newLedger() *ledger {
	return &ledger{handled: map[string]bool{}, acked: map[uint64]bool{}, before: map[uint64]bool{}, delivered: map[uint64]int{}}
}

// handle acks message by message, with work of different lengths.
func (l *ledger) handle(ctx context.Context, msgs []*mono.Msg) error {
	for _, m := range msgs {
		seq := m.Metadata().Sequence.Stream
		l.mu.Lock()
		l.handled[string(m.Data)] = true
		l.delivered[seq]++
		if l.before[seq] {
			l.again = append(l.again, seq)
		}
		l.mu.Unlock()
		if seq%7 == 0 {
			pauseFor(ctx, time.Duration(seq%3)*time.Millisecond)
		}
		if err := m.Ack(); err != nil {
			return err
		}
		l.mu.Lock()
		l.acked[seq] = true
		l.mu.Unlock()
	}
	return nil
}

// nextLife is called while the App is stopped.
func (l *ledger) nextLife() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for seq := range l.acked {
		l.before[seq] = true
	}
}

func (l *ledger) missing(want []string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(slices.Clone(want), func(p string) bool { return l.handled[p] })
}

func (l *ledger) check(t *testing.T, want []string) {
	t.Helper()
	if !pollFor(2*patience, func() bool { return len(l.missing(want)) == 0 }) {
		m := l.missing(want)
		t.Fatalf("%d of %d events were not handled, such as %q", len(m), len(want), m[:min(len(m), 10)])
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.again) > 0 {
		t.Errorf("%d messages were acked before a Stop and delivered after it: %v", len(l.again), l.again[:min(len(l.again), 10)])
	}
	twice := 0
	for _, n := range l.delivered {
		twice += n - 1
	}
	t.Logf("%d events, %d deliveries more than that", len(want), twice)
}

// The App is stopped and started while events are published and handled. Each is
// handled at least once, and what was acked does not come again.
func TestStop_underLoad(t *testing.T) {
	t.Parallel()
	const rounds = 8
	config := func(retention jetstream.RetentionPolicy) mono.StreamConsumerConfig {
		cfg := autoAck("S", retention)
		cfg.AutoAck = false
		cfg.Concurrency = 4
		cfg.Consumer.AckWait = 2 * time.Second
		return cfg
	}
	for _, retention := range []jetstream.RetentionPolicy{mono.LimitsPolicy, mono.WorkQueuePolicy} {
		t.Run("server apart, "+retention.String(), func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Created")
			srv := monotest.Server(t)
			l := newLedger()
			app := runApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("a", e, config(retention), l.handle))
			emit := runApp(t, onServer(srv), emitter("shop", e))
			pubs := []*stubbornPublisher{
				publishStubbornly(t, emit.Bus(), e, "x"), publishStubbornly(t, emit.Bus(), e, "y"), publishStubbornly(t, emit.Bus(), e, "z"),
			}
			for range rounds {
				pubs[0].more(t, 50)
				mustStop(t, app)
				l.nextLife()
				pubs[1].more(t, 50) // so that there is a backlog
				mustStart(t, app)
			}
			l.check(t, slices.Concat(pubs[0].end(), pubs[1].end(), pubs[2].end()))
		})
		t.Run("embedded server, "+retention.String(), func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Created")
			l := newLedger()
			app := runApp(t, inFolder(t.TempDir()), emitter("shop", e), durableModule("a", e, config(retention), l.handle))
			pubs := []*stubbornPublisher{publishStubbornly(t, app.Bus(), e, "x"), publishStubbornly(t, app.Bus(), e, "y")}
			for range rounds {
				pubs[0].more(t, 50)
				mustStop(t, app)
				l.nextLife()
				mustStart(t, app)
			}
			l.check(t, slices.Concat(pubs[0].end(), pubs[1].end()))
		})
	}
}

// Many messages are acked right before Stop. The server puts acks into a queue of
// its own, and an embedded one that ends before it has read that queue would
// deliver them again.
func TestStop_lastAcksCount(t *testing.T) {
	t.Parallel()
	const n = 3000
	for _, retention := range []jetstream.RetentionPolicy{mono.LimitsPolicy, mono.WorkQueuePolicy, mono.InterestPolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Created")
			var mu sync.Mutex
			var got []*mono.Msg
			cfg := autoAck("S", retention)
			cfg.AutoAck = false
			cfg.Consumer.AckWait = patience // what is acked late is not delivered again before that
			app := runApp(t, inFolder(t.TempDir()), emitter("shop", e), durableModule("m", e, cfg, func(_ context.Context, msgs []*mono.Msg) error {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, msgs...)
				return nil
			}))
			want := payloads("n", 0, n)
			publishAll(t, app.Bus(), e, want)
			eventually(t, func() bool {
				mu.Lock()
				defer mu.Unlock()
				return len(got) == n
			}, "everything is delivered")
			for _, m := range got {
				if err := m.Ack(); err != nil {
					t.Fatal(err)
				}
			}
			mustStop(t, app)
			mustStart(t, app)
			info := consumerInfo(t, app, "S", "m_shop_created_v1")
			if info.NumAckPending > 0 || info.NumPending > 0 {
				t.Errorf("%d of %d acked messages are to be acked, and %d to be delivered, after a restart", info.NumAckPending, n, info.NumPending)
			}
		})
	}
}

// A handler that publishes what follows from an event can do so while the App
// stops: for every event that was acked there is what follows.
func TestStop_handlersPublishToTheEnd(t *testing.T) {
	t.Parallel()
	e, next := defineEvent(t, "Created"), defineEvent(t, "Followed")
	var bus mono.EventBus
	followed := newTally()
	cfg := autoAckPlain("S")
	cfg.Concurrency = 4
	app := makeApp(t, inFolder(t.TempDir()), emitter("shop", e, next),
		durableModule("a", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
			for _, m := range msgs {
				if _, err := bus.PublishStream(ctx, &mono.Msg{Subject: next.Subject, Data: m.Data}); err != nil {
					return err
				}
			}
			return nil
		}),
		durableModule("b", next, autoAckPlain("N"), followed.handle))
	bus = app.Bus()
	var want []string
	for round := range 5 {
		mustStart(t, app)
		ps := payloads(fmt.Sprintf("%d-", round), 0, 200)
		publishAll(t, app.Bus(), e, ps)
		want = append(want, ps...)
		mustStop(t, app)
	}
	mustStart(t, app)
	followed.waitFor(t, want)
}

// A handler that does not look at its context: Stop gives up on it at its
// deadline and says who it is. The App can be started again at once, and the
// message comes back. The late ack of the old handler reaches nobody.
func TestStop_handlerIgnoresContext(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	release := make(chan struct{})
	entered := make(chan *mono.Msg, 10)
	cause := make(chan error, 1)
	lateAck := make(chan error, 1)
	var life atomic.Int32
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = 2 * time.Second
	m := durableModule("deaf", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		entered <- msgs[0]
		if life.Load() > 0 {
			return nil
		}
		context.AfterFunc(ctx, func() { cause <- context.Cause(ctx) })
		<-release
		lateAck <- msgs[0].Ack()
		return nil
	})
	m.emits = []mono.BaseEventDefinition{e}
	var d diary
	app := makeApp(t, inFolder(t.TempDir()), m, d.noted("other"))
	mustStart(t, app)
	publishAll(t, app.Bus(), e, []string{"x"})
	receive(t, entered, "the handler")

	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(ctx) }() // returns although the handler does not
	err := receive(t, stopped, "Stop")
	wantError(t, err, mono.ErrStopTimeout, `"deaf"`, e.String())
	wantError(t, err, context.DeadlineExceeded)
	wantError(t, receive(t, cause, "the end of the handler's context"), mono.ErrStopped)
	if got := d.take(); !slices.Equal(got, []string{"start other", "stop other"}) {
		t.Errorf("the other module did %q", got)
	}
	mustStop(t, app)

	life.Store(1)
	mustStart(t, app) // while the old handler runs
	again := receive(t, entered, "the message again")
	if string(again.Data) != "x" {
		t.Errorf("got message %q", again.Data)
	}
	close(release)
	if err := receive(t, lateAck, "the late ack"); err == nil {
		t.Error("an ack after the end of its App returned nil")
	}
	settled(t, app, "S", "deaf_shop_created_v1")
}

// A handler that looks at its context is told shortly before the deadline, and
// Stop returns nil then. Its message is handed back, and comes again at once.
func TestStop_handlerHonoursContext(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	got := make(chan *mono.Msg, 10)
	cause := make(chan error, 1)
	var life atomic.Int32
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = time.Hour // nothing comes back by itself
	cfg.Retry.Backoff = []time.Duration{time.Hour}
	m := durableModule("polite", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		got <- msgs[0]
		if life.Load() > 0 {
			return nil
		}
		<-ctx.Done()
		cause <- context.Cause(ctx)
		return ctx.Err()
	})
	m.emits = []mono.BaseEventDefinition{e}
	app := makeApp(t, inFolder(t.TempDir()), m)
	mustStart(t, app)
	publishAll(t, app.Bus(), e, []string{"x"})
	receive(t, got, "the handler")

	// Two seconds of these are for the handler to return: see TestBefore.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := app.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	wantError(t, receive(t, cause, "the end of the handler's context"), mono.ErrStopped)
	life.Store(1)
	mustStart(t, app)
	if again := receive(t, got, "the message again"); again.Metadata().NumDelivered != 2 {
		t.Errorf("delivery number %d, want 2", again.Metadata().NumDelivered)
	}
}

// Messages that Stop hands back are not given up, whatever the number of their
// attempts and the error of the handler that was cut short.
func TestStop_lastAttemptIsHandedBack(t *testing.T) {
	t.Parallel()
	results := map[string]func(ctx context.Context) error{
		"the context's error": func(ctx context.Context) error { return ctx.Err() },
		"its cause":           context.Cause,
		"another error":       func(context.Context) error { return errBroken },
		"a panic":             func(context.Context) error { panic(errBroken) },
	}
	for name, result := range results {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Created")
			srv := monotest.Server(t)
			advisories := make(chan string, 10)
			if _, err := srv.Conn().Subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>", func(m *nats.Msg) {
				advisories <- string(m.Data)
			}); err != nil {
				t.Fatal(err)
			}
			entered := make(chan struct{}, 100)
			handled := newTally()
			var life atomic.Int32
			cfg := autoAckPlain("S")
			cfg.Retry = mono.RetryPolicy{MaxAttempts: 1}
			cfg.Consumer.AckWait = time.Hour
			cfg.Fetch.BatchSize = 2
			m := durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
				if life.Load() > 0 {
					return handled.handle(ctx, msgs)
				}
				entered <- struct{}{}
				<-ctx.Done()
				return result(ctx)
			})
			m.emits = []mono.BaseEventDefinition{e}
			app := makeApp(t, onServer(srv), m)
			mustStart(t, app)
			want := payloads("n", 0, 20) // some of them wait behind the handler
			publishAll(t, app.Bus(), e, want)
			receive(t, entered, "the handler")
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // two of them for the handler to return
			defer cancel()
			if err := app.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			life.Store(1)
			mustStart(t, app)
			handled.waitFor(t, want)
			settled(t, app, "S", "m_shop_created_v1")
			select {
			case a := <-advisories:
				t.Errorf("a message was given up: %s", a)
			default:
			}
		})
	}
}

// Without a deadline Stop waits for as long as the handler takes.
func TestStop_withoutDeadlineWaits(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	entered, release := make(chan struct{}), make(chan struct{})
	var finished atomic.Bool
	m := durableModule("slow", e, autoAckPlain("S"), func(ctx context.Context, _ []*mono.Msg) error {
		close(entered)
		<-release
		if ctx.Err() != nil {
			t.Errorf("the handler's context has ended: %v", context.Cause(ctx))
		}
		finished.Store(true)
		return nil
	})
	m.emits = []mono.BaseEventDefinition{e}
	dir := t.TempDir()
	app := runApp(t, inFolder(dir), m)
	publishAll(t, app.Bus(), e, []string{"x"})
	receive(t, entered, "the handler")
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(context.WithoutCancel(t.Context())) }()
	select {
	case err := <-stopped:
		t.Fatalf("Stop returned %v while the handler ran", err)
	case <-time.After(200 * time.Millisecond):
	}
	close(release)
	if err := receive(t, stopped, "Stop"); err != nil {
		t.Fatal(err)
	}
	if !finished.Load() {
		t.Error("Stop returned before the handler")
	}
}

// The handlers of core consumers are waited for, and named, like the others.
func TestStop_coreHandlers(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	setUp := func(t *testing.T, h mono.EventConsumerHandler) *mono.App {
		t.Helper()
		return runApp(t, inFolder(t.TempDir()), emitter("shop", e), consumer("core", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(e, h, self)
		}))
	}

	t.Run("what has arrived is handled", func(t *testing.T) {
		t.Parallel()
		var n atomic.Int32
		app := setUp(t, func(context.Context, *mono.Msg) error { n.Add(1); return nil })
		for range 500 {
			if err := app.Bus().Publish(t.Context(), &mono.Msg{Subject: e.Subject}); err != nil {
				t.Fatal(err)
			}
		}
		if err := app.Conn().Flush(); err != nil {
			t.Fatal(err)
		}
		mustStop(t, app)
		if n.Load() != 500 {
			t.Errorf("%d of 500 messages handled", n.Load())
		}
	})
	t.Run("a deaf one is named", func(t *testing.T) {
		t.Parallel()
		entered, release := make(chan struct{}), make(chan struct{})
		defer close(release)
		app := setUp(t, func(context.Context, *mono.Msg) error {
			close(entered)
			<-release
			return nil
		})
		if err := app.Bus().Publish(t.Context(), &mono.Msg{Subject: e.Subject}); err != nil {
			t.Fatal(err)
		}
		receive(t, entered, "the handler")
		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		stopped := make(chan error, 1)
		go func() { stopped <- app.Stop(ctx) }()
		wantError(t, receive(t, stopped, "Stop"), mono.ErrStopTimeout, `"core"`, e.String())
	})
}

// A module whose Stop does not return is named, and the others are stopped.
func TestStop_moduleIgnoresContext(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	defer close(release)
	var d diary
	deaf := &testModule{name: "deaf", stop: func(context.Context) error { <-release; return nil }}
	app := runApp(t, inFolder(t.TempDir()), d.noted("first"), deaf, d.noted("last"))
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(ctx) }()
	wantError(t, receive(t, stopped, "Stop"), mono.ErrStopTimeout, `"deaf"`)
	if got := d.take(); !slices.Equal(got, []string{"start first", "start last", "stop last", "stop first"}) {
		t.Errorf("the other modules did %q", got)
	}
}

// What was published asynchronously is stored when Stop returns.
func TestStop_waitsForAsyncPublishes(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	handled := newTally()
	app := runApp(t, inFolder(t.TempDir()), emitter("shop", e), durableModule("m", e, autoAck("S", mono.LimitsPolicy), handled.handle))
	var futures []*mono.PubAckFuture
	want := payloads("n", 0, 2000)
	for _, p := range want {
		f, err := app.Bus().PublishStreamAsync(t.Context(), &mono.Msg{Subject: e.Subject, Data: []byte(p)})
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}
	mustStop(t, app)
	for i, f := range futures {
		select {
		case <-f.Done():
		default:
			t.Fatalf("publish %d is not decided after Stop", i)
		}
		if _, err := f.Wait(t.Context()); err != nil {
			t.Fatalf("publish %d: %v", i, err)
		}
	}
	mustStart(t, app)
	handled.waitFor(t, want)
}

// While the server is away Stop does not wait for what only it could answer, and
// what was not settled comes back when both are there again.
func TestStop_whileTheServerIsAway(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	entered := make(chan struct{}, 100)
	handled := newTally()
	var life atomic.Int32
	cfg := autoAckPlain("S")
	cfg.Consumer.AckWait = 2 * time.Second
	m := durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		if life.Load() > 0 {
			return handled.handle(ctx, msgs)
		}
		entered <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	})
	m.emits = []mono.BaseEventDefinition{e}
	app := runApp(t, onServer(srv), m, consumer("core", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventConsumer(e, func(context.Context, *mono.Msg) error { return nil }, self)
	}))
	want := payloads("n", 0, 50)
	publishAll(t, app.Bus(), e, want)
	receive(t, entered, "the handler")
	srv.Stop()
	eventually(t, func() bool { return !app.Conn().IsConnected() }, "the App notices")
	f, err := app.Bus().PublishStreamAsync(t.Context(), &mono.Msg{Subject: e.Subject, Data: []byte("lost")})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // two of them for the handler to return
	defer cancel()
	err = app.Stop(ctx)
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, mono.ErrDisconnected) {
		t.Errorf("Stop returned %v", err)
	}
	if errors.Is(err, mono.ErrStopTimeout) {
		t.Errorf("Stop says that handlers run: %v", err)
	}
	select {
	case <-f.Done():
		if _, err := f.Wait(t.Context()); err == nil {
			t.Error("a publish without a server succeeded")
		}
	default:
		t.Error("a publish is not decided after Stop")
	}
	srv.Start()
	life.Store(1)
	mustStart(t, app)
	handled.waitFor(t, want)
}
