package mono_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// The benchmarks come in pairs: impl=raw is nats.go used as its documentation
// shows, impl=monotel the same work through an App. Both sides have a server of
// their own, configured alike, in this process and reached without a port; they
// send the same payload, and store it in streams and read it through consumers
// of equal configuration. docs/performance.md is made from them.

const (
	perfPayloadSize = 256
	perfStream      = "perf"
	perfWindow      = 4096  // asynchronous publishes in flight, monotel's default
	perfBacklog     = 20000 // messages that one round of consuming takes
	perfTimeout     = 2 * time.Minute
)

var (
	perfPayload = []byte(strings.Repeat("x", perfPayloadSize))
	perfEvent   = mono.BaseEventDefinition{ModuleName: "perf", Name: "OrderPlaced", Version: "v1", Subject: "events.perf.v1.order-placed"}
	perfTyped   = helper.EventDefinition[perfOrder]("perf", "OrderPlaced", "v1")
	perfValue   = newPerfOrder()
)

// A perfOrder is the payload of the typed pairs.
type perfOrder struct {
	ID       string    `json:"id"`
	Customer string    `json:"customer"`
	Items    int       `json:"items"`
	Cents    int64     `json:"cents"`
	Placed   time.Time `json:"placed"`
	Note     string    `json:"note"`
}

// newPerfOrder returns a value that is perfPayloadSize bytes of JSON.
func newPerfOrder() perfOrder {
	o := perfOrder{
		ID: "ord-000017", Customer: "cus-004711", Items: 3, Cents: 12_95,
		Placed: time.Date(2026, time.March, 1, 12, 0, 0, 0, time.UTC),
	}
	data, err := json.Marshal(o)
	if err != nil {
		panic(err)
	}
	o.Note = strings.Repeat("x", perfPayloadSize-len(data))
	return o
}

// With msg=new an App is given a Msg of its own for each event, as by most
// programs. nats.go's Publish takes subject and data and needs none, so this
// compares one allocation, too; and garbage is collected most often in a process
// that holds as little as this one. With msg=reused both sides send what was
// made before.
func BenchmarkCorePublish(b *testing.B) {
	for _, msg := range []string{"new", "reused"} {
		b.Run("msg="+msg, func(b *testing.B) {
			b.Run("impl=raw", func(b *testing.B) {
				nc := perfConn(b, perfServer(b))
				b.ReportAllocs()
				for b.Loop() {
					if err := nc.Publish(perfEvent.Subject, perfPayload); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("impl=monotel", func(b *testing.B) {
				bus, ctx := perfApp(b, perfServer(b), nil).bus, b.Context()
				m := &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}
				b.ReportAllocs()
				for b.Loop() {
					if msg == "new" {
						m = &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}
					}
					if err := bus.Publish(ctx, m); err != nil {
						b.Fatal(err)
					}
				}
			})
		})
	}
}

// One publisher, one subscriber, and the time until the last message is
// handled.
func BenchmarkCorePubSub(b *testing.B) {
	b.Run("impl=raw", func(b *testing.B) {
		nc, flow := perfConn(b, perfServer(b)), newPerfFlow()
		perfSubscribe(b, nc, func(*nats.Msg) { flow.handled() })
		flow.run(b, func() error { return nc.Publish(perfEvent.Subject, perfPayload) })
	})
	b.Run("impl=monotel", func(b *testing.B) {
		flow := newPerfFlow()
		app := perfApp(b, perfServer(b), func(r mono.EventRegistry, m mono.Module) error {
			return r.RegisterEventConsumer(perfEvent, func(context.Context, *mono.Msg) error {
				flow.handled()
				return nil
			}, m)
		})
		bus, ctx := app.bus, b.Context()
		flow.run(b, func() error {
			return bus.Publish(ctx, &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload})
		})
	})
}

// BenchmarkCorePubSub with values instead of bytes: the raw side calls
// encoding/json itself.
func BenchmarkTypedPubSub(b *testing.B) {
	b.Run("impl=raw", func(b *testing.B) {
		nc, flow := perfConn(b, perfServer(b)), newPerfFlow()
		perfSubscribe(b, nc, func(m *nats.Msg) {
			var o perfOrder
			if err := json.Unmarshal(m.Data, &o); err != nil {
				b.Error(err)
			}
			flow.handled()
		})
		flow.run(b, func() error {
			data, err := json.Marshal(perfValue)
			if err != nil {
				return err
			}
			return nc.Publish(perfEvent.Subject, data)
		})
	})
	b.Run("impl=monotel", func(b *testing.B) {
		flow := newPerfFlow()
		app := perfApp(b, perfServer(b), func(r mono.EventRegistry, m mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, perfTyped, func(context.Context, perfOrder, *mono.Msg) error {
				flow.handled()
				return nil
			}, m)
		})
		bus, ctx := app.bus, b.Context()
		flow.run(b, func() error { return perfTyped.PublishContext(ctx, bus, perfValue, nil) })
	})
}

func BenchmarkDurablePublishSync(b *testing.B) {
	b.Run("impl=raw", func(b *testing.B) {
		js, ctx := perfJetStream(b, perfConn(b, perfServer(b))), b.Context()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := js.Publish(ctx, perfEvent.Subject, perfPayload); err != nil {
				b.Fatal(err)
			}
		}
		perfStored(b, js, b.N)
	})
	b.Run("impl=monotel", func(b *testing.B) {
		app, ctx := perfApp(b, perfServer(b), nil), b.Context()
		js, bus := perfJetStream(b, app.Conn()), app.bus
		b.ReportAllocs()
		for b.Loop() {
			if _, err := bus.PublishStream(ctx, &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}); err != nil {
				b.Fatal(err)
			}
		}
		perfStored(b, js, b.N)
	})
}

// The time until the last acknowledgement is here, with equal windows.
func BenchmarkDurablePublishAsync(b *testing.B) {
	b.Run("impl=raw", func(b *testing.B) {
		js, publish, wait := perfRawAsync(b, perfConn(b, perfServer(b)))
		perfToTheEnd(b, publish, wait)
		perfStored(b, js, b.N)
	})
	b.Run("impl=monotel", func(b *testing.B) {
		app := perfApp(b, perfServer(b), nil)
		js := perfJetStream(b, app.Conn())
		publish, wait := perfMonotelAsync(b.Context(), app.bus)
		perfToTheEnd(b, publish, wait)
		perfStored(b, js, b.N)
	})
}

// impl=monotel of BenchmarkDurablePublishAsync with telemetry; its impl=raw is what
// to compare with.
func BenchmarkTelemetryDurablePublishAsync(b *testing.B) {
	benchTelemetry(b, func(b *testing.B, opts ...mono.Option) {
		b.Helper()
		app, stop := perfStartApp(b, perfServer(b), nil, opts...)
		b.Cleanup(stop)
		js := perfJetStream(b, app.Conn())
		publish, wait := perfMonotelAsync(b.Context(), app.bus)
		perfToTheEnd(b, publish, wait)
		perfStored(b, js, b.N)
	})
}

// A backlog is read by a new durable consumer that acks each message by itself.
// What is measured runs from the first ack to the last.
func BenchmarkConsumeAck(b *testing.B) {
	for _, batch := range []int{10, 100} { // 10 is monotel's default; nats.go's Consume has no batches
		b.Run(fmt.Sprintf("batch=%d", batch), func(b *testing.B) {
			b.Run("impl=raw", func(b *testing.B) { perfRounds(b, perfPayload, perfConsumeRaw(nil)) })
			b.Run("impl=monotel", func(b *testing.B) { perfRounds(b, perfPayload, perfConsumeMonotel(batch)) })
		})
	}
}

// BenchmarkConsumeAck with values instead of bytes: the raw side calls
// encoding/json itself.
func BenchmarkTypedConsumeAck(b *testing.B) {
	payload, err := json.Marshal(perfValue)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("impl=raw", func(b *testing.B) {
		perfRounds(b, payload, perfConsumeRaw(func(data []byte) error {
			var o perfOrder
			return json.Unmarshal(data, &o)
		}))
	})
	b.Run("impl=monotel", func(b *testing.B) {
		perfRounds(b, payload, perfConsumeWith(func(r mono.EventRegistry, m mono.Module, cfg mono.StreamConsumerConfig, done func()) error {
			return helper.RegisterTypedEventStreamConsumer(r, perfTyped, cfg,
				func(_ context.Context, _ []perfOrder, msgs []*mono.Msg) error {
					for _, msg := range msgs {
						if err := msg.Ack(); err != nil {
							return err
						}
						done()
					}
					return nil
				}, m)
		}))
	})
}

// perfServer starts a server as an App does by itself.
func perfServer(tb testing.TB) *embedded.Server {
	tb.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), perfTimeout)
	defer cancel()
	s, err := embedded.Start(ctx, embedded.Config{StoreDir: tb.TempDir()})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), perfTimeout)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			tb.Error(err)
		}
	})
	return s
}

func perfConn(tb testing.TB, s *embedded.Server) *nats.Conn {
	tb.Helper()
	nc, err := nats.Connect("", s.ConnectOptions()...)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(nc.Close)
	return nc
}

// perfJetStream makes the stream of both sides.
func perfJetStream(tb testing.TB, nc *nats.Conn, opts ...jetstream.JetStreamOpt) jetstream.JetStream {
	tb.Helper()
	js, err := jetstream.New(nc, opts...)
	if err != nil {
		tb.Fatal(err)
	}
	_, err = js.CreateStream(tb.Context(), jetstream.StreamConfig{
		Name:      perfStream,
		Subjects:  []string{perfEvent.Subject},
		Retention: jetstream.LimitsPolicy,
		Storage:   jetstream.FileStorage,
		MaxBytes:  1 << 30,
		Discard:   jetstream.DiscardOld, // a long run must not fill the disk
	})
	if err != nil {
		tb.Fatal(err)
	}
	return js
}

// perfStored checks that the last of n publishes is in the stream.
func perfStored(tb testing.TB, js jetstream.JetStream, n int) {
	tb.Helper()
	s, err := js.Stream(tb.Context(), perfStream)
	if err != nil {
		tb.Fatal(err)
	}
	if last := s.CachedInfo().State.LastSeq; last != uint64(n) {
		tb.Fatalf("stream is at sequence %d after %d publishes", last, n)
	}
}

func perfSubscribe(tb testing.TB, nc *nats.Conn, handle nats.MsgHandler) {
	tb.Helper()
	if _, err := nc.QueueSubscribe(perfEvent.Subject, "perf", handle); err != nil {
		tb.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		tb.Fatal(err)
	}
}

// A perfModule consumes perfEvent, and has the bus as modules get it: through
// the interface, so that the compiler cannot look into it.
type perfModule struct {
	register func(mono.EventRegistry, mono.Module) error
	bus      mono.EventBus
}

func (*perfModule) Name() string                    { return "perf" }
func (*perfModule) Start(context.Context) error     { return nil }
func (*perfModule) Stop(context.Context) error      { return nil }
func (m *perfModule) SetEventBus(bus mono.EventBus) { m.bus = bus }

func (m *perfModule) RegisterEventConsumers(r mono.EventRegistry) error {
	if m.register == nil {
		return nil
	}
	return m.register(r, m)
}

// A perfRun is an App that runs.
type perfRun struct {
	*mono.App

	bus mono.EventBus
}

// perfApp starts an App on s and stops it when the test ends.
func perfApp(tb testing.TB, s *embedded.Server, register func(mono.EventRegistry, mono.Module) error) perfRun {
	tb.Helper()
	app, stop := perfStartApp(tb, s, register)
	tb.Cleanup(stop)
	return app
}

func perfStartApp(tb testing.TB, s *embedded.Server, register func(mono.EventRegistry, mono.Module) error, opts ...mono.Option,
) (run perfRun, stop func()) {
	tb.Helper()
	app, err := mono.New(append([]mono.Option{
		// The options lead into the server; the URL is never dialled.
		mono.WithNATS("nats://in-process", s.ConnectOptions()...),
		mono.WithEvents(perfEvent),
		mono.WithPublishWindow(perfWindow),
		mono.WithLogger(slog.New(slog.DiscardHandler)),
	}, opts...)...)
	if err != nil {
		tb.Fatal(err)
	}
	m := &perfModule{register: register}
	if err := app.Register(m); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), perfTimeout)
	defer cancel()
	if err := app.Start(ctx); err != nil {
		tb.Fatal(err)
	}
	return perfRun{app, m.bus}, func() {
		ctx, cancel := context.WithTimeout(context.Background(), perfTimeout)
		defer cancel()
		if err := app.Stop(ctx); err != nil {
			tb.Error(err)
		}
	}
}

// A perfFlow lets a publisher run ahead of its subscriber by a few thousand
// messages and not more, since core NATS drops what a slow subscriber cannot
// take. It costs both sides a channel operation in some hundred messages.
type perfFlow struct {
	ahead chan struct{} // one for each perfStride messages on the way
	count atomic.Int64
	total atomic.Int64 // known at the end
	done  chan struct{}
}

const (
	perfStride = 512
	perfAhead  = 8
)

func newPerfFlow() *perfFlow {
	return &perfFlow{ahead: make(chan struct{}, perfAhead), done: make(chan struct{}, 1)}
}

// handled is called for each message that arrived, by one goroutine at a time.
func (f *perfFlow) handled() {
	n := f.count.Add(1)
	if n%perfStride == 0 {
		<-f.ahead
	}
	if n == f.total.Load() {
		f.done <- struct{}{}
	}
}

func (f *perfFlow) run(b *testing.B, publish func() error) {
	b.Helper()
	var sent int64
	perfToTheEnd(b, func() error {
		sent++
		if sent%perfStride == 0 {
			f.ahead <- struct{}{}
		}
		return publish()
	}, func() error {
		f.total.Store(sent)
		if f.count.Load() == sent {
			return nil
		}
		select {
		case <-f.done:
			return nil
		case <-time.After(perfTimeout):
			return fmt.Errorf("%d of %d messages arrived", f.count.Load(), sent)
		}
	})
}

// perfToTheEnd times the calls of one, and of wait after the last, which
// b.Loop's own clock leaves out.
func perfToTheEnd(b *testing.B, one, wait func() error) {
	b.Helper()
	b.ReportAllocs()
	begin := time.Now()
	for b.Loop() {
		if err := one(); err != nil {
			b.Fatal(err)
		}
	}
	if err := wait(); err != nil {
		b.Fatal(err)
	}
	elapsed := time.Since(begin) //nolint:forbidigo // a benchmark
	b.ReportMetric(float64(elapsed.Nanoseconds())/float64(b.N), "ns/op")
	b.ReportMetric(float64(b.N)/elapsed.Seconds(), "msg/s")
}

// perfRawAsync publishes through nats.go, which tells failures to a handler.
func perfRawAsync(tb testing.TB, nc *nats.Conn) (js jetstream.JetStream, publish, wait func() error) {
	tb.Helper()
	js = perfJetStream(tb, nc, jetstream.WithPublishAsyncMaxPending(perfWindow),
		jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, _ *nats.Msg, err error) { tb.Error(err) }))
	publish = func() error {
		_, err := js.PublishAsync(perfEvent.Subject, perfPayload)
		for errors.Is(err, jetstream.ErrTooManyStalledMsgs) { // nats.go waits 200 ms for room
			_, err = js.PublishAsync(perfEvent.Subject, perfPayload)
		}
		return err
	}
	wait = func() error {
		select {
		case <-js.PublishAsyncComplete():
			return nil
		case <-time.After(perfTimeout):
			return fmt.Errorf("%d publishes are not acknowledged", js.PublishAsyncPending())
		}
	}
	return js, publish, wait
}

// perfMonotelAsync looks at every outcome of the last window.
func perfMonotelAsync(ctx context.Context, bus mono.EventBus) (publish, wait func() error) {
	futures := make([]*mono.PubAckFuture, perfWindow)
	next := 0
	publish = func() error {
		f, err := bus.PublishStreamAsync(ctx, &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload})
		futures[next%perfWindow] = f
		next++
		return err
	}
	wait = func() error {
		for _, f := range futures {
			if f == nil { // fewer than a window were sent
				continue
			}
			if _, err := f.Wait(ctx); err != nil {
				return err
			}
		}
		return nil
	}
	return publish, wait
}

// A perfMeter measures from the first to the last of a number of messages that
// are counted one after the other.
type perfMeter struct {
	want, seen int
	begin      time.Time
	before     runtime.MemStats
	done       chan struct{}

	elapsed        time.Duration
	mallocs, bytes uint64
}

func newPerfMeter(want int) *perfMeter {
	return &perfMeter{want: want, done: make(chan struct{})}
}

func (m *perfMeter) count() {
	m.seen++
	switch m.seen {
	case 1:
		runtime.ReadMemStats(&m.before)
		m.begin = time.Now()
	case m.want:
		m.elapsed = time.Since(m.begin) //nolint:forbidigo // a benchmark
		var after runtime.MemStats
		runtime.ReadMemStats(&after)
		m.mallocs, m.bytes = after.Mallocs-m.before.Mallocs, after.TotalAlloc-m.before.TotalAlloc
		close(m.done)
	}
}

// A perfConsume reads the whole stream through the new consumer named durable
// and calls done after each ack.
type perfConsume func(tb testing.TB, s *embedded.Server, durable string, done func()) (stop func())

// perfRounds consumes the same backlog again and again, each time from the
// start with a new consumer and a new connection.
func perfRounds(b *testing.B, payload []byte, consume perfConsume) {
	b.Helper()
	s, js := perfFilled(b, perfBacklog, payload)
	perfRoundsOf(b, s, js, perfBacklog, consume)
}

func perfRoundsOf(b *testing.B, s *embedded.Server, js jetstream.JetStream, n int, consume perfConsume) {
	b.Helper()
	var total perfMeter
	b.ReportAllocs()
	for b.Loop() {
		m := perfRound(b, s, js, n, consume)
		total.want += m.want - 1 // the first message starts the clock
		total.elapsed += m.elapsed
		total.mallocs += m.mallocs
		total.bytes += m.bytes
	}
	msgs := float64(total.want)
	b.ReportMetric(float64(total.elapsed.Nanoseconds())/msgs, "ns/op")
	b.ReportMetric(msgs/total.elapsed.Seconds(), "msg/s")
	b.ReportMetric(float64(total.bytes)/msgs, "B/op")
	b.ReportMetric(float64(total.mallocs)/msgs, "allocs/op")
}

// perfFilled returns a server whose stream holds n messages.
func perfFilled(tb testing.TB, n int, payload []byte) (*embedded.Server, jetstream.JetStream) {
	tb.Helper()
	s := perfServer(tb)
	js := perfJetStream(tb, perfConn(tb, s))
	for range n {
		if _, err := js.PublishAsync(perfEvent.Subject, payload); err != nil {
			tb.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	perfStored(tb, js, n)
	return s, js
}

func perfRound(tb testing.TB, s *embedded.Server, js jetstream.JetStream, n int, consume perfConsume) *perfMeter {
	tb.Helper()
	const durable = "perf_reader"
	m := newPerfMeter(n)
	stop := consume(tb, s, durable, m.count)
	select {
	case <-m.done:
	case <-time.After(perfTimeout):
		tb.Fatalf("messages not consumed within %v", perfTimeout)
	}
	stop()
	c, err := js.Consumer(tb.Context(), perfStream, durable)
	if err != nil {
		tb.Fatal(err)
	}
	perfUntil(tb, "every message is acked", func() (bool, error) {
		info, err := c.Info(tb.Context())
		if err != nil {
			return false, err
		}
		if info.NumRedelivered > 0 || info.Delivered.Consumer > uint64(n) {
			return false, fmt.Errorf("%d deliveries of %d messages", info.Delivered.Consumer, n)
		}
		return info.AckFloor.Stream == uint64(n) && info.NumAckPending == 0, nil
	})
	if err := js.DeleteConsumer(tb.Context(), perfStream, durable); err != nil {
		tb.Fatal(err)
	}
	return m
}

func perfUntil(tb testing.TB, what string, ok func() (bool, error)) {
	tb.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(perfTimeout)
	for {
		done, err := ok()
		if err != nil {
			tb.Fatalf("wait until %s: %v", what, err)
		}
		if done {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			tb.Fatalf("%s: not within %v", what, perfTimeout)
		}
	}
}

// perfConsumeRaw uses nats.go's Consume with its default buffer, and a consumer
// with the settings that an App gives it. decode may be nil.
func perfConsumeRaw(decode func([]byte) error) perfConsume {
	return func(tb testing.TB, s *embedded.Server, durable string, done func()) func() {
		tb.Helper()
		nc := perfConn(tb, s)
		js, err := jetstream.New(nc)
		if err != nil {
			tb.Fatal(err)
		}
		c, err := js.CreateConsumer(tb.Context(), perfStream, perfConsumerConfig(durable))
		if err != nil {
			tb.Fatal(err)
		}
		cc, err := c.Consume(func(m jetstream.Msg) {
			if decode != nil {
				if err := decode(m.Data()); err != nil {
					tb.Error(err)
				}
			}
			if err := m.Ack(); err != nil {
				tb.Error(err)
			}
			done()
		})
		if err != nil {
			tb.Fatal(err)
		}
		return func() {
			cc.Stop()
			<-cc.Closed()
			if err := nc.Flush(); err != nil {
				tb.Error(err)
			}
			nc.Close()
		}
	}
}

func perfConsumerConfig(durable string) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable:       durable,
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       30 * time.Second,
		MaxAckPending: 10_000,
		MaxDeliver:    -1,
		FilterSubject: perfEvent.Subject,
	}
}

func perfConsumeMonotel(batch int, opts ...mono.Option) perfConsume {
	return perfConsumeWith(func(r mono.EventRegistry, m mono.Module, cfg mono.StreamConsumerConfig, done func()) error {
		cfg.Fetch.BatchSize = batch
		return r.RegisterEventStreamConsumer(perfEvent, cfg, func(_ context.Context, msgs []*mono.Msg) error {
			for _, msg := range msgs {
				if err := msg.Ack(); err != nil {
					return err
				}
				done()
			}
			return nil
		}, m)
	}, opts...)
}

func perfConsumeWith(register func(r mono.EventRegistry, m mono.Module, cfg mono.StreamConsumerConfig, done func()) error,
	opts ...mono.Option,
) perfConsume {
	return func(tb testing.TB, s *embedded.Server, durable string, done func()) func() {
		tb.Helper()
		_, stop := perfStartApp(tb, s, func(r mono.EventRegistry, m mono.Module) error {
			return register(r, m, mono.StreamConsumerConfig{
				Stream:   mono.StreamConfig{Name: perfStream},
				Consumer: mono.ConsumerConfig{Durable: durable},
			}, done)
		}, opts...)
		return stop
	}
}
