package mono_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.uber.org/goleak"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

// serverLeftover is a goroutine of nats-server that waits for the answer about a
// source for up to 30 s, also when the server has been shut down.
func serverLeftover() goleak.Option {
	return goleak.IgnoreTopFunction("github.com/nats-io/nats-server/v2/server.(*stream).trySetupSourceConsumer.func3")
}

// Neither New, Register nor the accessors start, dial or write anything, so an
// App that is never started needs no Stop.
func TestNew_startsNothing(t *testing.T) { // it counts goroutines and changes the working directory
	t.Chdir(t.TempDir())
	before := goleak.IgnoreCurrent()
	e := defineEvent(t, "Created")
	for _, opts := range [][]mono.Option{
		nil, // the default: an embedded server in data/nats
		{mono.WithStoreDir("here")},
		{mono.WithNATS("nats://127.0.0.1:1")},
		{mono.WithEmbedded(embedded.Config{Listen: "127.0.0.1:0", Users: []embedded.User{{Name: "a", Password: "b"}}})},
	} {
		app, err := mono.New(opts...)
		if err != nil {
			t.Fatal(err)
		}
		called := false
		m := durableModule("a", e, autoAckPlain("S"), newTally().handle)
		m.start = func(context.Context) error { called = true; return nil }
		if err := app.Register(m); err != nil {
			t.Fatal(err)
		}
		if app.Conn() != nil {
			t.Error("there is a connection before Start")
		}
		if h := app.Health(t.Context()); h.Healthy || !errors.Is(h.Err(), mono.ErrNotStarted) {
			t.Errorf("health before Start is %+v, want ErrNotStarted", h)
		}
		wantError(t, app.Bus().Publish(t.Context(), &mono.Msg{Subject: "x"}), mono.ErrNotStarted)
		if n := len(app.Registry().GetAllEvents()); n > 0 {
			t.Errorf("%d events before Start", n)
		}
		if called {
			t.Error("the module was started")
		}
	}
	files, err := os.ReadDir(".")
	if err != nil || len(files) > 0 {
		t.Errorf("files %v, error %v: want neither", files, err)
	}
	goleak.VerifyNone(t, before)
}

// A diary notes in which order things happen.
type diary struct {
	mu      sync.Mutex
	entries []string
}

func (d *diary) note(format string, args ...any) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.entries = append(d.entries, fmt.Sprintf(format, args...))
}

func (d *diary) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	e := d.entries
	d.entries = nil
	return e
}

// noted is a module that notes its start and stop.
func (d *diary) noted(name string) *testModule {
	return &testModule{
		name:  name,
		start: func(context.Context) error { d.note("start %s", name); return nil },
		stop:  func(context.Context) error { d.note("stop %s", name); return nil },
	}
}

var errBroken = errors.New("broken")

// A start that fails at module k stops the modules before it in reverse, leaves
// nothing behind, and works the second time.
func TestStart_undoneAtEveryModule(t *testing.T) {
	t.Parallel()
	const n = 4
	ways := map[string]func() error{
		"error":  func() error { return errBroken },
		"panic":  func() error { panic(errBroken) },
		"goexit": func() error { runtime.Goexit(); return nil },
	}
	for name, way := range ways {
		for k := range n {
			t.Run(fmt.Sprintf("%s in module %d", name, k), func(t *testing.T) {
				t.Parallel()
				e := defineEvent(t, "Created")
				var d diary
				handled := newTally()
				var modules []mono.Module
				broken := true
				for i := range n {
					m := d.noted(fmt.Sprintf("m%d", i))
					start := m.start
					m.start = func(ctx context.Context) error {
						if err := start(ctx); err != nil || i != k || !broken {
							return err
						}
						return way()
					}
					modules = append(modules, m)
				}
				modules = append(modules, emitter("shop", e), durableModule("consumer", e, autoAckPlain("S"), handled.handle))
				dir := t.TempDir()
				app := makeApp(t, inFolder(dir), modules...)
				err := app.Start(within(t))
				if name == "goexit" {
					wantError(t, err, nil, fmt.Sprintf("start module %q", fmt.Sprintf("m%d", k)))
				} else {
					wantError(t, err, errBroken, fmt.Sprintf("start module %q", fmt.Sprintf("m%d", k)))
				}
				if _, panicked := errors.AsType[*mono.PanicError](err); panicked != (name == "panic") {
					t.Errorf("error %v: is a PanicError: %v", err, panicked)
				}
				var want []string
				for i := range k + 1 {
					want = append(want, fmt.Sprintf("start m%d", i))
				}
				for i := k - 1; i >= 0; i-- {
					want = append(want, fmt.Sprintf("stop m%d", i))
				}
				if got := d.take(); !slices.Equal(got, want) {
					t.Errorf("the failed start did %q, want %q", got, want)
				}
				if app.Conn() != nil {
					t.Error("the connection is still there")
				}
				wantError(t, app.Bus().Publish(t.Context(), &mono.Msg{Subject: "x"}), mono.ErrNotStarted)
				wantError(t, app.Health(t.Context()).Err(), mono.ErrNotStarted)
				mustStop(t, app)
				if got := d.take(); len(got) > 0 {
					t.Errorf("Stop after the failed start did %q", got)
				}

				broken = false
				mustStart(t, app)
				publishAll(t, app.Bus(), e, []string{"x"})
				handled.waitFor(t, []string{"x"})
				mustStop(t, app)
				want = []string{"start m0", "start m1", "start m2", "start m3", "stop m3", "stop m2", "stop m1", "stop m0"}
				if got := d.take(); !slices.Equal(got, want) {
					t.Errorf("the second start and its stop did %q, want %q", got, want)
				}
			})
		}
	}
}

// What fails before the modules start is undone as well, and can be tried again.
func TestStart_undoneBeforeModules(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	tests := []struct {
		name string
		// breaks makes Start of m fail and returns what repairs it.
		breaks func(m *testModule) (repair func())
		want   error
		text   string
	}{
		{
			name: "RegisterEventConsumers returns an error",
			breaks: func(m *testModule) func() {
				good := m.register
				m.register = func(mono.EventRegistry, mono.Module) error { return errBroken }
				return func() { m.register = good }
			},
			want: errBroken, text: `module "m"`,
		},
		{
			name: "RegisterEventConsumers panics",
			breaks: func(m *testModule) func() {
				good := m.register
				m.register = func(mono.EventRegistry, mono.Module) error { panic(errBroken) }
				return func() { m.register = good }
			},
			want: errBroken, text: `module "m"`,
		},
		{
			name: "an event is declared twice",
			breaks: func(m *testModule) func() {
				good := m.emits
				m.emits = append(slices.Clone(good), good...)
				return func() { m.emits = good }
			},
			want: mono.ErrDuplicate, text: `module "m"`,
		},
		{
			name: "the event is unknown",
			breaks: func(m *testModule) func() {
				good := m.emits
				m.emits = nil
				return func() { m.emits = good }
			},
			want: mono.ErrUnknownEvent, text: `module "m"`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			handled := newTally()
			m := durableModule("m", e, autoAckPlain("S"), handled.handle)
			m.emits = []mono.BaseEventDefinition{e}
			started, stopped := 0, 0
			m.start = func(context.Context) error { started++; return nil }
			m.stop = func(context.Context) error { stopped++; return nil }
			app := makeApp(t, inFolder(t.TempDir()), m)
			repair := tt.breaks(m)
			for range 2 {
				wantError(t, app.Start(within(t)), tt.want, tt.text)
				if started+stopped > 0 {
					t.Fatalf("the module was started %d times and stopped %d times", started, stopped)
				}
			}
			repair()
			mustStart(t, app)
			publishAll(t, app.Bus(), e, []string{"x"})
			handled.waitFor(t, []string{"x"})
		})
	}
}

// panicky is a module with a method that panics.
type panicky struct {
	*testModule
	where string
}

func (m *panicky) EmitEvents() []mono.BaseEventDefinition {
	if m.where == "EmitEvents" {
		panic(errBroken)
	}
	return m.testModule.EmitEvents()
}

func (m *panicky) SetEventBus(bus mono.EventBus) {
	if m.where == "SetEventBus" {
		panic(errBroken)
	}
	m.testModule.SetEventBus(bus)
}

func TestStart_panicsOfOtherMethods(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"EmitEvents", "SetEventBus"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			m := &panicky{testModule: &testModule{name: "m"}, where: where}
			app := makeApp(t, inFolder(t.TempDir()), m)
			wantError(t, app.Start(within(t)), errBroken)
			m.where = ""
			mustStart(t, app)
		})
	}
}

// Everything that is wrong with the registrations is reported by one Start.
func TestStart_reportsEveryBadRegistration(t *testing.T) {
	t.Parallel()
	e, unknown := defineEvent(t, "Created"), defineEvent(t, "Unknown")
	h := newTally().handle
	bad := func(name string, event mono.BaseEventDefinition, change func(*mono.StreamConsumerConfig)) mono.Module {
		cfg := autoAckPlain("S")
		change(&cfg)
		return durableModule(name, event, cfg, h)
	}
	app := makeApp(t, inFolder(t.TempDir()),
		emitter("shop", e),
		emitter("shop2", e),
		bad("m1", e, func(c *mono.StreamConsumerConfig) { c.Concurrency = -1; c.Fetch.BatchSize = -1 }),
		bad("m2", e, func(c *mono.StreamConsumerConfig) { c.Stream.Name = "" }),
		bad("m3", unknown, func(*mono.StreamConsumerConfig) {}),
		durableModule("m4", e, autoAckPlain("S"), nil),
		consumer("m5", func(mono.EventRegistry, mono.Module) error { return errBroken }),
	)
	err := app.Start(within(t))
	for _, want := range []error{mono.ErrInvalidConfig, mono.ErrUnknownEvent, mono.ErrDuplicate, errBroken} {
		wantError(t, err, want)
	}
	wantError(t, err, nil, `"shop2"`, `"m1"`, "Concurrency", "BatchSize", `"m2"`, "Stream.Name", `"m3"`, "Unknown", `"m4"`, "handler", `"m5"`)
}

// A server that is not there, or does not answer, or does not let us in, fails
// the start within its context and is named as the cause.
func TestStart_serverUnreachable(t *testing.T) {
	t.Parallel()
	var lc net.ListenConfig
	silent, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = silent.Close() })
	// The near end of a connection has a port that nobody listens on, and nobody will.
	nowhere, err := new(net.Dialer).DialContext(t.Context(), "tcp", silent.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = nowhere.Close() })
	srv := monotest.Server(t)
	noPassword := "nats://" + strings.SplitAfter(srv.URL(), "@")[1]

	tests := []struct {
		name string
		url  string
		opts []nats.Option
		ctx  func() (context.Context, context.CancelFunc)
		want error
	}{
		{
			name: "nobody listens", url: "nats://" + nowhere.LocalAddr().String(), want: nats.ErrNoServers,
			ctx: func() (context.Context, context.CancelFunc) { return context.WithTimeout(t.Context(), patience) },
		},
		{
			name: "nobody listens, and retrying is asked for", url: "nats://" + nowhere.LocalAddr().String(), want: nats.ErrNoServers,
			opts: []nats.Option{nats.RetryOnFailedConnect(true)},
			ctx:  func() (context.Context, context.CancelFunc) { return context.WithTimeout(t.Context(), patience) },
		},
		{
			name: "nobody answers", url: "nats://" + silent.Addr().String(), want: context.DeadlineExceeded,
			opts: []nats.Option{nats.Timeout(time.Hour)},
			ctx: func() (context.Context, context.CancelFunc) {
				return context.WithTimeout(t.Context(), 200*time.Millisecond)
			},
		},
		{
			name: "nobody answers, and the context has a cause", url: "nats://" + silent.Addr().String(), want: errBroken,
			opts: []nats.Option{nats.Timeout(time.Hour)},
			ctx: func() (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancelCause(t.Context())
				time.AfterFunc(100*time.Millisecond, func() { cancel(errBroken) })
				return ctx, func() { cancel(nil) }
			},
		},
		{
			name: "the context has ended before", url: srv.URL(), want: context.Canceled,
			ctx: func() (context.Context, context.CancelFunc) {
				ctx, cancel := context.WithCancel(t.Context())
				cancel()
				return ctx, cancel
			},
		},
		{
			name: "without a password", url: noPassword, want: nats.ErrAuthorization,
			ctx: func() (context.Context, context.CancelFunc) { return context.WithTimeout(t.Context(), patience) },
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			app := makeApp(t, []mono.Option{mono.WithNATS(tt.url, tt.opts...)}, &testModule{name: "m"})
			ctx, cancel := tt.ctx()
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- app.Start(ctx) }()
			wantError(t, receive(t, done, "Start"), tt.want)
			mustStop(t, app)
		})
	}
}

// A start that is waiting for a silent server is not in the way of a Stop, which
// keeps to its own context.
func TestStop_duringStart(t *testing.T) {
	t.Parallel()
	begun, goOn := make(chan struct{}), make(chan struct{})
	m := &testModule{name: "m", start: func(ctx context.Context) error {
		close(begun)
		select {
		case <-goOn:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}}
	stopped := make(chan struct{})
	m.stop = func(context.Context) error { close(stopped); return nil }
	app := makeApp(t, inFolder(t.TempDir()), m)
	started := make(chan error, 1)
	go func() { started <- app.Start(within(t)) }()
	receive(t, begun, "Start of the module")

	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	wantError(t, app.Stop(short), context.DeadlineExceeded)
	again, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	wantError(t, app.Start(again), context.DeadlineExceeded)

	stopDone := make(chan error, 1)
	go func() { stopDone <- app.Stop(within(t)) }()
	close(goOn)
	if err := receive(t, started, "Start"); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, stopDone, "Stop"); err != nil {
		t.Fatal(err)
	}
	receive(t, stopped, "Stop of the module")
}

// A module whose Start ignores its context does not hold up App.Start for longer
// than that.
func TestStart_moduleIgnoresContext(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	defer close(release)
	app := makeApp(t, inFolder(t.TempDir()), &testModule{name: "deaf", start: func(context.Context) error {
		<-release
		return nil
	}})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- app.Start(ctx) }()
	wantError(t, receive(t, done, "Start"), context.DeadlineExceeded, `"deaf"`)
}

// Two Apps on one folder would destroy it.
func TestStart_folderInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := runApp(t, inFolder(dir), &testModule{name: "m"})
	second := makeApp(t, inFolder(dir), &testModule{name: "m"})
	wantError(t, second.Start(within(t)), embedded.ErrStoreInUse, dir)
	publish := func(app *mono.App) error { return app.Bus().Publish(t.Context(), &mono.Msg{Subject: "x"}) }
	if err := publish(first); err != nil {
		t.Errorf("the first App was disturbed: %v", err)
	}
	mustStop(t, first)
	mustStart(t, second)
	wantError(t, first.Start(within(t)), embedded.ErrStoreInUse)
}

// The context of Start bounds the start and nothing else; its values are there
// in handlers.
func TestStart_contextMayEndAfterwards(t *testing.T) {
	t.Parallel()
	type key struct{}
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	got := make(chan any, 10)
	m := durableModule("m", e, autoAckPlain("S"), func(ctx context.Context, _ []*mono.Msg) error {
		if ctx.Err() != nil {
			got <- ctx.Err()
		}
		got <- ctx.Value(key{})
		return nil
	})
	m.emits = []mono.BaseEventDefinition{e}
	app := makeApp(t, onServer(srv), m)
	ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
	cancel()
	publishAll(t, app.Bus(), e, []string{"x"})
	if v := receive(t, got, "the handler"); v != "value" {
		t.Errorf("the handler's context says %v", v)
	}
	// A reconnect is later than Start, too.
	srv.Stop()
	awaitDisconnect(t, app)
	srv.Start()
	publishAll(t, app.Bus(), e, []string{"y"})
	if v := receive(t, got, "the handler after a reconnect"); v != "value" {
		t.Errorf("the handler's context says %v", v)
	}
}

func TestStop_idempotent(t *testing.T) {
	t.Parallel()
	var d diary
	app := makeApp(t, inFolder(t.TempDir()), d.noted("a"), d.noted("b"))
	mustStop(t, app) // before Start
	mustStop(t, app)
	for range 2 {
		mustStart(t, app)
		wantError(t, app.Start(within(t)), mono.ErrAlreadyStarted)
		wantError(t, app.Register(&testModule{name: "late"}), mono.ErrAlreadyStarted)
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if err := app.Stop(within(t)); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		mustStop(t, app)
		if got := d.take(); !slices.Equal(got, []string{"start a", "start b", "stop b", "stop a"}) {
			t.Errorf("starting once and stopping nine times did %q", got)
		}
		if app.Conn() != nil {
			t.Error("there is a connection after Stop")
		}
		wantError(t, app.Bus().Publish(t.Context(), &mono.Msg{Subject: "x"}), mono.ErrNotStarted)
	}
	if err := app.Register(d.noted("c")); err != nil {
		t.Errorf("register after Stop: %v", err)
	}
	mustStart(t, app)
	mustStop(t, app)
	if got := d.take(); !slices.Contains(got, "start c") {
		t.Errorf("the new module was not started: %q", got)
	}
}

// Starts, stops and everything else at once: nothing hangs, and the diary stays
// in order.
func TestLifecycle_concurrentCalls(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	var d diary
	a := d.noted("a")
	a.emits = []mono.BaseEventDefinition{e}
	app := makeApp(t, inFolder(t.TempDir()), a, d.noted("b"), durableModule("c", e, autoAckPlain("S"), newTally().handle))
	ctx := within(t)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 4 {
				switch i % 4 {
				case 0, 1:
					if err := app.Start(ctx); err != nil && !errors.Is(err, mono.ErrAlreadyStarted) {
						t.Error(err)
					}
				case 2:
					if err := app.Stop(ctx); err != nil {
						t.Error(err)
					}
				default:
					app.Health(ctx)
					app.Conn()
					_ = app.Register() // it may run
					_, err := app.Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte("x")})
					if err != nil && !errors.Is(err, mono.ErrNotStarted) && !errors.Is(err, nats.ErrConnectionClosed) && !errors.Is(err, mono.ErrNoStream) {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	mustStop(t, app)
	got := d.take()
	round := []string{"start a", "start b", "stop b", "stop a"}
	for i, entry := range got {
		if entry != round[i%len(round)] {
			t.Fatalf("out of order at %d: %q", i, got)
		}
	}
}

// A module's error or panic on stop does not keep the others from being stopped,
// and everything is free afterwards.
func TestStop_goesOnAfterErrors(t *testing.T) {
	t.Parallel()
	errOther := errors.New("other")
	var d diary
	a, b, c := d.noted("a"), d.noted("b"), d.noted("c")
	b.stop = func(context.Context) error { d.note("stop b"); panic(errBroken) }
	c.stop = func(context.Context) error { d.note("stop c"); return errOther }
	app := makeApp(t, inFolder(t.TempDir()), a, b, c)
	for range 2 {
		mustStart(t, app)
		err := app.Stop(within(t))
		wantError(t, err, errBroken, `stop module "b"`)
		wantError(t, err, errOther, `stop module "c"`)
		want := []string{"start a", "start b", "start c", "stop c", "stop b", "stop a"}
		if got := d.take(); !slices.Equal(got, want) {
			t.Errorf("got %q, want %q", got, want)
		}
		mustStop(t, app)
	}
}

// A module may publish, durably too, while it starts and while it stops.
func TestLifecycle_modulesPublish(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	handled := newTally()
	m := emitter("shop", e)
	publish := func(what string) func(context.Context) error {
		return func(ctx context.Context) error {
			_, err := m.bus.PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte(what)})
			return err
		}
	}
	m.start, m.stop = publish("starting"), publish("stopping")
	app := runApp(t, inFolder(t.TempDir()), m, durableModule("c", e, autoAckPlain("S"), handled.handle))
	handled.waitFor(t, []string{"starting"})
	mustStop(t, app)
	mustStart(t, app)
	handled.waitFor(t, []string{"starting", "stopping"})
}

func TestRun_endsWithContext(t *testing.T) {
	t.Parallel()
	var d diary
	started := make(chan struct{}, 1)
	m := d.noted("m")
	last := &testModule{name: "last", start: func(context.Context) error { started <- struct{}{}; return nil }}
	app := makeApp(t, inFolder(t.TempDir()), m, last)
	for range 2 {
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- app.Run(ctx) }()
		receive(t, started, "Start")
		cancel()
		if err := receive(t, done, "Run"); err != nil {
			t.Errorf("Run returned %v", err)
		}
		if got := d.take(); !slices.Equal(got, []string{"start m", "stop m"}) {
			t.Errorf("Run did %q", got)
		}
	}
}

func TestRun_returnsErrors(t *testing.T) {
	t.Parallel()

	t.Run("of the start", func(t *testing.T) {
		t.Parallel()
		app := makeApp(t, inFolder(t.TempDir()), &testModule{name: "m", start: func(context.Context) error { return errBroken }})
		wantError(t, app.Run(within(t)), errBroken)
	})
	t.Run("of the stop", func(t *testing.T) {
		t.Parallel()
		started := make(chan struct{})
		app := makeApp(t, inFolder(t.TempDir()), &testModule{
			name:  "m",
			start: func(context.Context) error { close(started); return nil },
			stop:  func(context.Context) error { return errBroken },
		})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- app.Run(ctx) }()
		receive(t, started, "Start")
		cancel()
		wantError(t, receive(t, done, "Run"), errBroken)
	})
	t.Run("none when somebody else stops the App", func(t *testing.T) {
		t.Parallel()
		app := makeApp(t, inFolder(t.TempDir()), &testModule{name: "m"})
		done := make(chan error, 1)
		go func() { done <- app.Run(t.Context()) }()
		eventually(t, func() bool { return app.Health(t.Context()).Healthy }, "the App runs")
		mustStop(t, app)
		if err := receive(t, done, "Run"); err != nil {
			t.Errorf("Run returned %v", err)
		}
	})
	t.Run("of a connection that is closed for good", func(t *testing.T) {
		t.Parallel()
		srv := monotest.Server(t)
		app := makeApp(t, []mono.Option{mono.WithNATS(srv.URL(), nats.NoReconnect())}, &testModule{name: "m"})
		done := make(chan error, 1)
		go func() { done <- app.Run(t.Context()) }()
		eventually(t, func() bool { return app.Health(t.Context()).Healthy }, "the App runs")
		srv.Stop()
		wantError(t, receive(t, done, "Run"), nats.ErrConnectionClosed)
	})
}

func TestHealth_everyState(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	var state atomic.Pointer[func(context.Context) error]
	healthy := func(context.Context) error { return nil }
	state.Store(&healthy)
	m := durableModule("billing", e, autoAckPlain("S"), newTally().handle)
	m.emits = []mono.BaseEventDefinition{e}
	m.health = func(ctx context.Context) error { return (*state.Load())(ctx) }
	app := makeApp(t, onServer(srv), m)
	names := func(h mono.HealthReport) []string {
		var ns []string
		for _, c := range h.Checks {
			ns = append(ns, c.Name)
		}
		return ns
	}
	health := func() mono.HealthReport {
		return app.Health(within(t))
	}

	wantError(t, health().Err(), mono.ErrNotStarted)
	mustStart(t, app)
	h := health()
	if !h.Healthy || h.Err() != nil {
		t.Errorf("a running App says %v", h.Err())
	}
	want := []string{"app", "connection", `stream consumer "billing_shop_created_v1"`, `module "billing"`}
	if got := names(h); !slices.Equal(got, want) {
		t.Errorf("checks are %q, want %q", got, want)
	}

	broken := func(context.Context) error { return errBroken }
	state.Store(&broken)
	h = health()
	if h.Healthy {
		t.Error("healthy, although a module is not")
	}
	wantError(t, h.Err(), errBroken, `module "billing"`)
	panics := func(context.Context) error { panic(errBroken) }
	state.Store(&panics)
	wantError(t, health().Err(), errBroken, `module "billing"`)
	state.Store(&healthy)

	srv.Stop()
	eventually(t, func() bool { return !health().Healthy }, "the lost connection shows")
	wantError(t, health().Err(), mono.ErrDisconnected, "connection")
	srv.Start()
	eventually(t, func() bool { return health().Healthy }, "the App is healthy again")

	mustStop(t, app)
	wantError(t, health().Err(), mono.ErrNotStarted)
}

func TestHealth_embedded(t *testing.T) {
	t.Parallel()
	app := runApp(t, inFolder(t.TempDir()), &testModule{name: "m"})
	h := app.Health(within(t))
	if !h.Healthy {
		t.Error(h.Err())
	}
	if !slices.ContainsFunc(h.Checks, func(c mono.HealthCheck) bool { return c.Name == "embedded server" }) {
		t.Errorf("no check of the embedded server: %+v", h.Checks)
	}
}

// Fifty starts and stops, each with work to do, leave no goroutine, and no file
// outside of the store folder.
func TestLifecycle_stress(t *testing.T) { // it counts goroutines and sets the folder for temporary files
	const rounds = 50
	tmp, dir := t.TempDir(), t.TempDir()
	t.Setenv("TMPDIR", tmp)
	before := goleak.IgnoreCurrent()
	e := defineEvent(t, "Created")
	a, b := newTally(), newTally()
	app := makeApp(t, inFolder(filepath.Join(dir, "store")), emitter("shop", e),
		durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), a.handle),
		durableModule("b", e, autoAck("QB", mono.WorkQueuePolicy), b.handle),
		consumer("core", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(e, func(context.Context, *mono.Msg) error { return nil }, self)
		}))
	var want []string
	for round := range rounds {
		mustStart(t, app)
		ps := payloads(fmt.Sprintf("%d-", round), 0, 20)
		publishAll(t, app.Bus(), e, ps)
		want = append(want, ps...)
		if round%2 == 0 {
			a.waitFor(t, ps)
		}
		mustStop(t, app)
	}
	mustStart(t, app)
	a.waitFor(t, want)
	b.waitFor(t, want)
	mustStop(t, app)
	goleak.VerifyNone(t, before, serverLeftover())
	for _, d := range []string{tmp, dir} {
		files, err := os.ReadDir(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if d == tmp || f.Name() != "store" {
				t.Errorf("left over: %s", filepath.Join(d, f.Name()))
			}
		}
	}
}

// Failed starts leave no goroutine either.
func TestLifecycle_failedStartsLeaveNothing(t *testing.T) { //nolint:paralleltest // it counts goroutines
	before := goleak.IgnoreCurrent()
	e := defineEvent(t, "Created")
	dir := t.TempDir()
	fail := &testModule{name: "fail", start: func(context.Context) error { return errBroken }}
	app := makeApp(t, inFolder(dir), emitter("shop", e), durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), newTally().handle), fail)
	for range 10 {
		wantError(t, app.Start(within(t)), errBroken)
	}
	unreachable := makeApp(t, []mono.Option{mono.WithNATS("nats://127.0.0.1:1")}, &testModule{name: "m"})
	for range 10 {
		wantError(t, unreachable.Start(within(t)), nats.ErrNoServers)
	}
	goleak.VerifyNone(t, before, serverLeftover())
}

// A durable consumer's position belongs to its name. It is kept over restarts
// and changes of the order of registration.
func TestDurable_positionIsKept(t *testing.T) {
	t.Parallel()
	created, paid := defineEvent(t, "Created"), defineEvent(t, "Paid")
	srv := monotest.Server(t)
	emit := runApp(t, onServer(srv), emitter("shop", created, paid))
	tallies := map[string]*tally{}
	mod := func(name string, e mono.BaseEventDefinition) mono.Module {
		return durableModule(name, e, autoAckPlain("S"), func(ctx context.Context, msgs []*mono.Msg) error {
			return tallies[name+" "+e.Name].handle(ctx, msgs)
		})
	}
	modules := []mono.Module{mod("a", created), mod("b", created), mod("c", paid), mod("d", paid)}
	var state string
	for round, order := range [][]int{{0, 1, 2, 3}, {0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}} {
		for _, name := range []string{"a Created", "b Created", "c Paid", "d Paid"} {
			tallies[name] = newTally() // what this round's handlers get
		}
		var ms []mono.Module
		for _, i := range order {
			ms = append(ms, modules[i])
		}
		app := makeApp(t, append(onServer(srv), mono.WithEvents(created, paid)), ms...)
		want := payloads(fmt.Sprintf("%d-", round), 0, 30)
		if round > 0 { // waiting when the App starts
			publishAll(t, emit.Bus(), created, want)
			publishAll(t, emit.Bus(), paid, want)
		}
		mustStart(t, app)
		if round == 0 {
			publishAll(t, app.Bus(), created, want)
			publishAll(t, app.Bus(), paid, want)
		}
		for name, c := range tallies {
			c.waitFor(t, want)
			if n := c.distinct(); n != len(want) {
				t.Errorf("round %d: %s got %d events, want the %d of this round", round, name, n, len(want))
			}
		}
		mustStop(t, app)
		now := serverState(t, srv.Conn())
		if round > 0 && now != state {
			t.Errorf("round %d changed the server from\n%s\nto\n%s", round, state, now)
		}
		state = now
	}
}

// A second instance of a program shares the work of the first: every event is
// handled by one of them.
func TestDurable_instancesShareTheWork(t *testing.T) {
	t.Parallel()
	const n = 500
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	all := newTally()
	var count [2]atomic.Int64
	bothWork := make(chan struct{})
	var once sync.Once
	for i := range count {
		cfg := autoAck("Q", mono.WorkQueuePolicy)
		cfg.Fetch.BatchSize = 1
		runApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("a", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
			all.add(msgs...)
			count[i].Add(int64(len(msgs)))
			if count[0].Load() > 0 && count[1].Load() > 0 {
				once.Do(func() { close(bothWork) })
			}
			// The first does not run away with everything before the second is
			// there; what it has fetched is far less than n.
			select {
			case <-bothWork:
			case <-ctx.Done():
			}
			return nil
		}))
	}
	emit := runApp(t, onServer(srv), emitter("shop", e))
	want := payloads("n", 0, n)
	publishAll(t, emit.Bus(), e, want)
	all.waitFor(t, want)
	if twice := all.deliveredTwice(); len(twice) > 0 {
		t.Errorf("%d events were handled by both: %q", len(twice), twice[:min(len(twice), 10)])
	}
	if sum := count[0].Load() + count[1].Load(); sum != n {
		t.Errorf("%d and %d events handled, want %d together", count[0].Load(), count[1].Load(), n)
	}
}

// A consumer with a new name starts at the beginning of its stream, and the old
// one's position is not touched.
func TestDurable_renamedStartsAfresh(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	dir := t.TempDir()
	want := payloads("n", 0, 40)
	start := func(module, durable string) (*mono.App, *tally) {
		c := newTally()
		cfg := autoAckPlain("S")
		cfg.Consumer.Durable = durable
		return runApp(t, inFolder(dir), emitter("shop", e), durableModule(module, e, cfg, c.handle)), c
	}
	app, c := start("billing", "")
	publishAll(t, app.Bus(), e, want)
	c.waitFor(t, want)
	mustStop(t, app)

	app, c = start("billing", "other") // another durable
	c.waitFor(t, want)
	mustStop(t, app)
	app, c = start("invoices", "") // another module name makes another durable
	c.waitFor(t, want)
	mustStop(t, app)

	app, c = start("billing", "")
	publishAll(t, app.Bus(), e, []string{"new"})
	c.waitFor(t, []string{"new"})
	if n := c.distinct(); n != 1 {
		t.Errorf("the first durable got %d events, want the new one only", n)
	}
}
