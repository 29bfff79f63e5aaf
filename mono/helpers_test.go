package mono_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// patience bounds every wait of a test. It is not a measure of anything: the
// machine may be busy, and a test that waits this long has failed.
const patience = 3 * time.Minute

// quiet keeps the failures that a test provokes out of its output.
func quiet() mono.Option { return mono.WithLogger(slog.New(slog.DiscardHandler)) }

// A testModule is a module made of functions. A nil one does nothing.
type testModule struct {
	name     string
	emits    []mono.BaseEventDefinition
	register func(r mono.EventRegistry, self mono.Module) error
	start    func(ctx context.Context) error
	stop     func(ctx context.Context) error
	health   func(ctx context.Context) error

	bus mono.EventBus // set by the App
}

var (
	_ mono.EventEmitterModule    = (*testModule)(nil)
	_ mono.EventConsumerModule   = (*testModule)(nil)
	_ mono.HealthCheckableModule = (*testModule)(nil)
)

func (m *testModule) Name() string                           { return m.name }
func (m *testModule) SetEventBus(bus mono.EventBus)          { m.bus = bus }
func (m *testModule) EmitEvents() []mono.BaseEventDefinition { return m.emits }

func (m *testModule) RegisterEventConsumers(r mono.EventRegistry) error {
	if m.register == nil {
		return nil
	}
	return m.register(r, m)
}

func (m *testModule) Start(ctx context.Context) error { return call(ctx, m.start) }
func (m *testModule) Stop(ctx context.Context) error  { return call(ctx, m.stop) }
func (m *testModule) Health(ctx context.Context) error {
	return call(ctx, m.health)
}

func call(ctx context.Context, f func(context.Context) error) error {
	if f == nil {
		return nil
	}
	return f(ctx)
}

// emitter is a module that emits events.
func emitter(name string, events ...mono.BaseEventDefinition) *testModule {
	return &testModule{name: name, emits: events}
}

// consumer is a module that registers consumers.
func consumer(name string, register func(r mono.EventRegistry, self mono.Module) error) *testModule {
	return &testModule{name: name, register: register}
}

// startApp starts a silent App in a folder of its own. It ends with the test.
func startApp(t *testing.T, modules ...mono.Module) *mono.App {
	t.Helper()
	return monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), quiet()}, modules...)
}

// within is a context that ends when the test's patience does.
func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls until cond holds.
func eventually(t *testing.T, cond func() bool, what string) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited %v in vain: %s", patience, what)
		}
	}
}

// receive returns the next value of ch.
func receive[T any](t *testing.T, ch <-chan T, what string) T {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	select {
	case v := <-ch:
		return v
	case <-deadline.C:
		t.Fatalf("waited %v in vain: %s", patience, what)
		panic("unreachable")
	}
}

// wantError checks that err is what callers test for, and that its text says
// what is wrong and where. Any error will do when want is nil.
func wantError(t *testing.T, err, want error, parts ...string) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("got error %.300v, want one that is %v", err, want)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %.500q does not say %q", err, part)
		}
	}
}

// A terminatedMsg is the server's advisory about a message that was given up.
type terminatedMsg struct {
	Stream     string `json:"stream"`
	Consumer   string `json:"consumer"`
	StreamSeq  uint64 `json:"stream_seq"`
	Deliveries uint64 `json:"deliveries"`
	Reason     string `json:"reason"`
}

// watchTerminated subscribes to the server's advisories.
func watchTerminated(t *testing.T, app *mono.App) <-chan terminatedMsg {
	t.Helper()
	advisories := make(chan terminatedMsg, 100)
	_, err := app.Conn().Subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>", func(msg *nats.Msg) {
		var a terminatedMsg
		if err := json.Unmarshal(msg.Data, &a); err != nil {
			t.Errorf("advisory: %v", err)
		}
		advisories <- a
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	return advisories
}

func jetStream(t *testing.T, app *mono.App) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(app.Conn())
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func streamInfo(t *testing.T, app *mono.App, name string) *jetstream.StreamInfo {
	t.Helper()
	s, err := jetStream(t, app).Stream(within(t), name)
	if err != nil {
		t.Fatalf("stream %q: %v", name, err)
	}
	return s.CachedInfo()
}

func streamMsgs(t *testing.T, app *mono.App, name string) uint64 {
	t.Helper()
	return streamInfo(t, app, name).State.Msgs
}

func consumerInfo(t *testing.T, app *mono.App, stream, durable string) *jetstream.ConsumerInfo {
	t.Helper()
	c, err := jetStream(t, app).Consumer(within(t), stream, durable)
	if err != nil {
		t.Fatalf("consumer %q of stream %q: %v", durable, stream, err)
	}
	return c.CachedInfo()
}

// settled waits until nothing is left to be done for a consumer, replays included. The
// server learns a little later than the publisher that a message is pending, so the last
// one stored must have been delivered as well.
func settled(t *testing.T, app *mono.App, stream, durable string) {
	t.Helper()
	js := jetStream(t, app)
	s, err := js.Stream(within(t), stream)
	if err != nil {
		t.Fatalf("stream %q: %v", stream, err)
	}
	done := func(info *jetstream.ConsumerInfo) bool {
		if info.NumPending != 0 || info.NumAckPending != 0 {
			return false
		}
		for _, subject := range append(info.Config.FilterSubjects, info.Config.FilterSubject) {
			if subject == "" {
				continue
			}
			if last, err := s.GetLastMsgForSubject(within(t), subject); err == nil && last.Sequence > info.Delivered.Stream {
				return false
			}
		}
		return true
	}
	eventually(t, func() bool {
		replays, err := js.Consumer(within(t), stream, durable+"_replay")
		return done(consumerInfo(t, app, stream, durable)) && (err != nil || done(replays.CachedInfo()))
	}, fmt.Sprintf("consumer %q settles everything", durable))
}

// A logBuffer collects log lines. It is safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func (b *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(b, &slog.HandlerOptions{Level: slog.LevelDebug}))
}
