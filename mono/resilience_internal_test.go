package mono

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono/embedded"
)

const internalPatience = 3 * time.Minute

// plainModule emits events, and consumes one durably.
type plainModule struct {
	name  string
	emits []BaseEventDefinition
	event BaseEventDefinition
	cfg   StreamConsumerConfig
	h     EventStreamConsumerHandler // nil for none

	mu   sync.Mutex
	seen map[string]int
}

func (m *plainModule) Name() string                      { return m.name }
func (m *plainModule) Start(context.Context) error       { return nil }
func (m *plainModule) Stop(context.Context) error        { return nil }
func (m *plainModule) SetEventBus(EventBus)              {}
func (m *plainModule) EmitEvents() []BaseEventDefinition { return m.emits }

func (m *plainModule) RegisterEventConsumers(r EventRegistry) error {
	if m.cfg.Stream.Name == "" {
		return nil
	}
	return r.RegisterEventStreamConsumer(m.event, m.cfg, func(ctx context.Context, msgs []*Msg) error {
		if m.h != nil {
			if err := m.h(ctx, msgs); err != nil {
				return err
			}
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, msg := range msgs {
			m.seen[string(msg.Data)]++
		}
		return nil
	}, m)
}

func plainConsumer(name string, e BaseEventDefinition, s StreamConfig) *plainModule {
	return &plainModule{
		name: name, event: e, seen: make(map[string]int),
		cfg: StreamConsumerConfig{Stream: s, AutoAck: true, Consumer: ConsumerConfig{AckWait: 5 * time.Second}},
	}
}

// waitFor waits until each of want was handled, and checks that each was once.
func (m *plainModule) waitFor(t *testing.T, want []string) {
	t.Helper()
	missing := func() []string {
		m.mu.Lock()
		defer m.mu.Unlock()
		return slices.DeleteFunc(slices.Clone(want), func(p string) bool { return m.seen[p] > 0 })
	}
	waitUntil(t, func() bool { return len(missing()) == 0 }, func() string {
		return fmt.Sprintf("module %s handles %q", m.name, missing())
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	for p, n := range m.seen {
		if n > 1 {
			t.Errorf("module %s handled %q %d times", m.name, p, n)
		}
	}
}

func waitUntil(t *testing.T, cond func() bool, what func() string) {
	t.Helper()
	deadline := time.NewTimer(internalPatience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited in vain: %s", what())
		}
	}
}

// startPlain starts an App on the server at url; it ends with the test, or with
// the returned func.
func startPlain(t *testing.T, url string, modules ...Module) (app *App, stop func()) {
	t.Helper()
	app, err := New(WithNATS(url), WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(modules...); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), internalPatience)
	defer cancel()
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
	stop = func() {
		ctx, cancel := context.WithTimeout(context.Background(), internalPatience)
		defer cancel()
		if err := app.Stop(ctx); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(stop)
	return app, stop
}

// startServer starts a server for Apps of this package's tests, which cannot use
// monotest.
func startServer(t *testing.T) (url string, js jetstream.JetStream) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), internalPatience)
	defer cancel()
	s, err := embedded.Start(ctx, embedded.Config{
		StoreDir: t.TempDir(), Listen: "127.0.0.1:0", Users: []embedded.User{{Name: "test", Password: "secret"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), internalPatience)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	nc, err := nats.Connect(s.URL(), nats.UserInfo("test", "secret"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err = jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return "nats://test:secret@" + s.URL()[len("nats://"):], js
}

func publishPlain(t *testing.T, js jetstream.JetStream, e BaseEventDefinition, prefix string, n int) []string {
	t.Helper()
	var all []string
	for i := range n {
		p := fmt.Sprintf("%s%d", prefix, i)
		if _, err := js.Publish(t.Context(), e.Subject, []byte(p)); err != nil {
			t.Fatal(err)
		}
		all = append(all, p)
	}
	return all
}

// A process is killed in the middle of the changes: after none, one, two and so
// on of them. The next start finishes the work. Events of before, with the
// position of their consumer, and of after are handled, each once.
func TestArrange_cutShortAnywhere(t *testing.T) {
	t.Parallel()
	created, other := planEvent(t, "Created"), planEvent(t, "Other")
	queue := func(name string) StreamConfig {
		return StreamConfig{Name: name, Retention: WorkQueuePolicy, MaxBytes: 16 << 20}
	}
	limits := StreamConfig{Name: "L"}
	tests := []struct {
		name          string
		before, after func() []*plainModule
	}{
		{
			name:   "the only subject of a work queue",
			before: func() []*plainModule { return []*plainModule{plainConsumer("a", created, queue("Q1"))} },
			after: func() []*plainModule {
				return []*plainModule{plainConsumer("a", created, queue("Q1")), plainConsumer("b", created, queue("Q2"))}
			},
		},
		{
			name: "one of two subjects",
			before: func() []*plainModule {
				return []*plainModule{plainConsumer("a", created, queue("Q1")), plainConsumer("o", other, queue("Q1"))}
			},
			after: func() []*plainModule {
				return []*plainModule{
					plainConsumer("a", created, queue("Q1")), plainConsumer("o", other, queue("Q1")),
					plainConsumer("b", created, queue("Q2")), plainConsumer("c", created, queue("Q3")),
				}
			},
		},
		{
			name:   "to a limits stream",
			before: func() []*plainModule { return []*plainModule{plainConsumer("a", created, queue("Q1"))} },
			after: func() []*plainModule {
				return []*plainModule{plainConsumer("a", created, queue("Q1")), plainConsumer("l", created, limits)}
			},
		},
		{
			name:   "from nothing",
			before: func() []*plainModule { return nil },
			after: func() []*plainModule {
				return []*plainModule{plainConsumer("a", created, queue("Q1")), plainConsumer("b", created, queue("Q2")), plainConsumer("o", other, limits)}
			},
		},
	}
	emit := func() *plainModule { return &plainModule{name: "shop", emits: []BaseEventDefinition{created, other}} }
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for k := 0; ; k++ {
				url, js := startServer(t)
				var handled, waiting []string
				if before := tt.before(); len(before) > 0 {
					modules := []Module{emit()}
					for _, m := range before {
						modules = append(modules, m)
					}
					_, stop := startPlain(t, url, modules...)
					handled = publishPlain(t, js, created, "handled", 20)
					before[0].waitFor(t, handled)
					stop()
					waiting = publishPlain(t, js, created, "waiting", 15)
				}

				// What the killed process did.
				after := tt.after()
				var regs []*streamRegistration
				modules := []Module{emit()}
				for _, m := range after {
					regs = append(regs, planReg(m.name, m.event, m.cfg.Stream))
					modules = append(modules, m)
				}
				var have []StreamConfig
				list := js.ListStreams(t.Context())
				for s := range list.Info() {
					have = append(have, s.Config)
				}
				plan, err := planTopology([]BaseEventDefinition{created, other}, regs, have, false)
				if err != nil {
					t.Fatal(err)
				}
				if k > len(plan.changes) {
					return
				}
				for _, c := range plan.changes[:k] {
					act := js.UpdateStream
					if c.create {
						act = js.CreateStream
					}
					if _, err := act(t.Context(), c.cfg); err != nil {
						t.Fatalf("after %d changes: %v", k, err)
					}
				}

				_, stop := startPlain(t, url, modules...)
				fresh := publishPlain(t, js, created, "fresh", 40)
				for _, m := range after {
					switch m.name {
					case "o":
						m.waitFor(t, publishPlain(t, js, other, "other", 5))
					case "a":
						m.waitFor(t, slices.Concat(waiting, fresh))
						if m.seen["handled0"] > 0 {
							t.Errorf("after %d changes: the position of the consumer was lost", k)
						}
					default:
						m.waitFor(t, fresh)
					}
				}
				stop()
				if t.Failed() {
					t.Fatalf("after %d of %d changes:\n%s", k, len(plan.changes), planChangesText(plan.changes))
				}
			}
		})
	}
}

// The janitor empties a fan-out stream of what every target has, and of nothing
// else: not of what a target that is full, or new, has still to copy.
func TestJanitor_purgesWhatEveryTargetHas(t *testing.T) {
	t.Parallel()
	e := planEvent(t, "Created")
	url, js := startServer(t)
	const fan = "fanout_shop_created_v1"
	release := make(chan struct{})
	still := plainConsumer("still", e, StreamConfig{Name: "SMALL", Retention: WorkQueuePolicy, MaxMsgs: 10})
	still.h = func(ctx context.Context, _ []*Msg) error {
		select {
		case <-release:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	other := plainConsumer("other", e, StreamConfig{Name: "OTHER", Retention: WorkQueuePolicy})
	app, _ := startPlain(t, url, &plainModule{name: "shop", emits: []BaseEventDefinition{e}}, still, other)
	j := &janitor{r: app.current(), targets: make(map[string]map[string]bool)}
	sweep := func() {
		t.Helper()
		if err := j.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	state := func(name string) jetstream.StreamState {
		t.Helper()
		s, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		return s.CachedInfo().State
	}
	sweep() // nothing there

	want := publishPlain(t, js, e, "n", 60)
	other.waitFor(t, want)
	waitUntil(t, func() bool { return state("SMALL").Msgs == 10 }, func() string { return "SMALL is full" })
	for range 3 {
		sweep()
		if st := state(fan); st.FirstSeq > 11 || st.LastSeq != 60 {
			t.Fatalf("the fan-out stream starts at %d, although SMALL has 10 messages only", st.FirstSeq)
		}
	}
	if st := state(fan); st.FirstSeq != 11 {
		t.Errorf("the fan-out stream starts at %d, want 11: every target has the ones before", st.FirstSeq)
	}

	// A new target has copied nothing yet.
	third := StreamConfig{Name: "THIRD", Retention: WorkQueuePolicy, Sources: []*jetstream.StreamSource{{Name: fan, FilterSubject: e.Subject, OptStartSeq: 1}}}
	if _, err := js.CreateStream(t.Context(), third); err != nil {
		t.Fatal(err)
	}
	close(release)
	sweep()
	still.waitFor(t, want)
	waitUntil(t, func() bool { return state("THIRD").Msgs >= 50 }, func() string { return "THIRD gets what the fan-out stream had when it came" })

	waitUntil(t, func() bool {
		sweep()
		return state(fan).Msgs == 0
	}, func() string { return fmt.Sprintf("the fan-out stream is emptied: %+v", state(fan)) })
	more := publishPlain(t, js, e, "more", 20)
	still.waitFor(t, more)
	other.waitFor(t, more)
}
