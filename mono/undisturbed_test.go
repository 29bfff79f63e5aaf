package mono_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/metric"
	mnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	tnoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/telemetry"
)

// Hooks that panic wherever telemetry calls the user's code.
type (
	panickyProcessor  struct{}
	panickySampler    struct{}
	panickyPropagator struct{}
	panickyTracers    struct {
		tnoop.TracerProvider
	}
	panickyTracer struct{ tnoop.Tracer }
	nilTracers    struct {
		tnoop.TracerProvider
	}
	nilTracer     struct{ tnoop.Tracer }
	panickyMeters struct{ mnoop.MeterProvider }
	panickyMeter  struct{ mnoop.Meter }
	panickyHist   struct{ mnoop.Float64Histogram }
)

func (panickyProcessor) OnStart(context.Context, sdktrace.ReadWriteSpan) { panic("OnStart") }
func (panickyProcessor) OnEnd(sdktrace.ReadOnlySpan)                     { panic("OnEnd") }
func (panickyProcessor) Shutdown(context.Context) error                  { return nil }
func (panickyProcessor) ForceFlush(context.Context) error                { return nil }

func (panickySampler) ShouldSample(sdktrace.SamplingParameters) sdktrace.SamplingResult {
	panic("ShouldSample")
}
func (panickySampler) Description() string { return "panicky" }

func (panickyPropagator) Inject(context.Context, propagation.TextMapCarrier) { panic("Inject") }

func (panickyPropagator) Extract(context.Context, propagation.TextMapCarrier) context.Context {
	panic("Extract")
}
func (panickyPropagator) Fields() []string { return []string{"traceparent"} }

func (panickyTracers) Tracer(string, ...trace.TracerOption) trace.Tracer { return panickyTracer{} }

func (panickyTracer) Start(context.Context, string, ...trace.SpanStartOption) (context.Context, trace.Span) {
	panic("Start")
}

func (nilTracers) Tracer(string, ...trace.TracerOption) trace.Tracer { return nilTracer{} }

func (nilTracer) Start(context.Context, string, ...trace.SpanStartOption) (context.Context, trace.Span) {
	return nil, nil
}

func (panickyMeters) Meter(string, ...metric.MeterOption) metric.Meter { return panickyMeter{} }

func (panickyMeter) Float64Histogram(string, ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return panickyHist{}, nil
}

func (panickyHist) Record(context.Context, float64, ...metric.RecordOption) { panic("Record") }

// An oddError panics when it is looked at.
type oddError struct{}

func (*oddError) Error() string     { return "odd" }
func (*oddError) ErrorType() string { panic("ErrorType") }

func always(sampler sdktrace.Sampler, ps ...sdktrace.SpanProcessor) mono.Option {
	opts := []sdktrace.TracerProviderOption{sdktrace.WithSampler(sampler)}
	for _, p := range ps {
		opts = append(opts, sdktrace.WithSpanProcessor(p))
	}
	return mono.WithTracerProvider(sdktrace.NewTracerProvider(opts...))
}

type exporterFunc func(ctx context.Context, spans []sdktrace.ReadOnlySpan) error

func (f exporterFunc) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	return f(ctx, spans)
}
func (exporterFunc) Shutdown(context.Context) error { return nil }

// Whatever is wrong with telemetry, messages are published, handled, retried and
// settled as without it.
func TestUndisturbed(t *testing.T) {
	t.Parallel()
	on := sdktrace.AlwaysSample()
	for _, tt := range []struct {
		name string
		opts func(t *testing.T) []mono.Option
	}{
		{name: "nothing given", opts: func(*testing.T) []mono.Option { return nil }},
		{name: "nil providers", opts: func(*testing.T) []mono.Option {
			return []mono.Option{mono.WithTracerProvider(nil), mono.WithMeterProvider(nil), mono.WithPropagator(nil)}
		}},
		{name: "exporter fails", opts: func(*testing.T) []mono.Option {
			return []mono.Option{always(on, sdktrace.NewSimpleSpanProcessor(exporterFunc(func(context.Context, []sdktrace.ReadOnlySpan) error {
				return errors.New("down")
			})))}
		}},
		{name: "exporter hangs and the queue is full", opts: func(t *testing.T) []mono.Option {
			t.Helper()
			release := make(chan struct{})
			p := sdktrace.NewBatchSpanProcessor(exporterFunc(func(context.Context, []sdktrace.ReadOnlySpan) error {
				<-release
				return nil
			}), sdktrace.WithMaxQueueSize(1), sdktrace.WithMaxExportBatchSize(1))
			t.Cleanup(func() {
				close(release)
				if err := p.Shutdown(context.Background()); err != nil {
					t.Error(err)
				}
			})
			return []mono.Option{always(on, p)}
		}},
		{name: "exporter panics", opts: func(*testing.T) []mono.Option {
			return []mono.Option{always(on, sdktrace.NewSimpleSpanProcessor(exporterFunc(func(context.Context, []sdktrace.ReadOnlySpan) error {
				panic("export")
			})))}
		}},
		{name: "span processor panics", opts: func(*testing.T) []mono.Option { return []mono.Option{always(on, panickyProcessor{})} }},
		{name: "sampler panics", opts: func(*testing.T) []mono.Option { return []mono.Option{always(panickySampler{})} }},
		{name: "tracer panics", opts: func(*testing.T) []mono.Option { return []mono.Option{mono.WithTracerProvider(panickyTracers{})} }},
		{name: "tracer returns nil", opts: func(*testing.T) []mono.Option { return []mono.Option{mono.WithTracerProvider(nilTracers{})} }},
		{name: "propagator panics", opts: func(*testing.T) []mono.Option {
			return []mono.Option{always(on), mono.WithPropagator(panickyPropagator{})}
		}},
		{name: "instrument panics", opts: func(*testing.T) []mono.Option { return []mono.Option{mono.WithMeterProvider(panickyMeters{})} }},
		{name: "reader is shut down", opts: func(t *testing.T) []mono.Option {
			t.Helper()
			mp := sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
			if err := mp.Shutdown(t.Context()); err != nil {
				t.Fatal(err)
			}
			return []mono.Option{mono.WithMeterProvider(mp)}
		}},
		{name: "telemetry.Setup, collector down and the queue full", opts: func(t *testing.T) []mono.Option {
			t.Helper()
			const queue = 3 // of what one message makes
			down := exporterFunc(func(ctx context.Context, _ []sdktrace.ReadOnlySpan) error {
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", "127.0.0.1:1")
				if err == nil {
					err = errors.Join(errors.New("somebody listens on port 1"), conn.Close())
				}
				return err
			})
			return setUp(t, telemetry.WithSpanExporter(down), telemetry.WithSpanQueueSize(queue)).options(t, func(series map[string]float64) {
				lost := series["otel_sdk_exporter_span_exported_total{error_type=export_failed}"] +
					series["otel_sdk_processor_span_processed_total{error_type=queue_full}"]
				if lost == 0 || series["otel_sdk_exporter_span_exported_total{}"] != 0 {
					t.Errorf("the spans are not counted as lost: %v", only(series, "otel_sdk"))
				}
			})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			checkUndisturbed(t, tt.opts(t)...)
		})
	}
}

// A program is what telemetry.Setup makes of one.
type program struct{ *telemetry.Telemetry }

func setUp(t *testing.T, opts ...telemetry.Option) program {
	t.Helper()
	tel, err := telemetry.Setup(t.Context(),
		append([]telemetry.Option{telemetry.WithoutGlobals(), telemetry.WithLogger(slog.New(slog.DiscardHandler))}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	return program{tel}
}

// options are the App's. In the end, when the App has stopped, check sees what
// was counted.
func (p program) options(t *testing.T, check func(series map[string]float64)) []mono.Option {
	t.Helper()
	scrape := serveMetrics(t, p)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if tp, ok := p.TracerProvider().(interface{ ForceFlush(context.Context) error }); ok {
			_ = tp.ForceFlush(ctx) // which says what was lost
		}
		check(scrape.text(t))
		_ = p.Shutdown(ctx)
	})
	return []mono.Option{
		mono.WithTracerProvider(p.TracerProvider()), mono.WithMeterProvider(p.MeterProvider()), mono.WithPropagator(p.Propagator()),
	}
}

// A message as large as the server or its stream takes is no larger with
// telemetry.
func TestUndisturbed_largestMessage(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	const streamLimit = 1000
	small, err := mono.NewEvent("shop", "Small", "v1")
	if err != nil {
		t.Fatal(err)
	}
	plain, err := mono.NewEvent("shop", "Plain", "v1") // in no stream
	if err != nil {
		t.Fatal(err)
	}
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{tr.option(), scrape.option}, emitter("shop", monotestEvent(t), small, plain),
		tracedConsumer(t, 1, ackAll),
		consumer("small", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(small, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "small", MaxMsgSize: streamLimit}, Consumer: mono.ConsumerConfig{Durable: "small"},
			}, ackAll, self)
		}),
		consumer("plain", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(plain, func(context.Context, *mono.Msg) error { return nil }, self)
		}))
	limit := int(app.Conn().MaxPayload())
	// In three ways, each with and without a header of the caller's.
	header := mono.Header{"k": {"v"}}
	const headerSize = len("NATS/1.0\r\nk: v\r\n\r\n")
	publishes := 0
	for _, h := range []mono.Header{nil, header} {
		size := limit
		small1 := streamLimit
		if h != nil {
			size, small1 = limit-headerSize, streamLimit-headerSize
		}
		for _, msg := range []*mono.Msg{
			{Subject: traceSubject, Data: make([]byte, size), Header: h},
			{Subject: small.Subject, Data: make([]byte, small1), Header: h},
		} {
			ctx := within(t)
			if _, err := app.Bus().PublishStream(ctx, msg); err != nil {
				t.Error(err)
			}
			f, err := app.Bus().PublishStreamAsync(ctx, msg)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.Wait(ctx); err != nil {
				t.Error(err)
			}
			publishes += 2
		}
		if err := app.Bus().Publish(within(t), &mono.Msg{Subject: plain.Subject, Data: make([]byte, size), Header: h}); err != nil {
			t.Error(err)
		}
		publishes++
	}
	settled(t, app, "orders", "billing")
	settled(t, app, "small", "small")
	eventually(t, func() bool {
		return scrape.text(t)["messaging_client_consumed_messages_total{messaging_operation_name=process}"] > 0
	}, "the core event arrives")
	dropped := 0.0
	for _, template := range []string{traceSubject, small.Subject, plain.Subject} {
		n := scrape.seriesOf(t, "mono_trace_context_total", template, `state="dropped"`)
		if n == 0 {
			t.Errorf("no trace context of %s is counted as dropped", template)
		}
		dropped += n
	}
	if dropped != float64(publishes) {
		t.Errorf("%v trace contexts are counted as dropped, want %d", dropped, publishes)
	}
	// One that is too large for its payload says so, as without telemetry.
	_, err = app.Bus().PublishStream(within(t), &mono.Msg{Subject: small.Subject, Data: make([]byte, streamLimit+1)})
	wantError(t, err, mono.ErrPayloadTooLarge, "MaxMsgSize")
	// A smaller one has its trace.
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: small.Subject, Data: make([]byte, streamLimit/2)}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		for _, s := range tr.Ended() {
			if s.Name() == "process "+small.Subject && s.Parent().IsValid() {
				return true
			}
		}
		return false
	}, "the smaller one continues its trace")
}

// A lease that cannot be extended is reported while workers give messages their
// contexts. It was a data race, which the race detector sees only while nothing
// else keeps the two apart.
func TestUndisturbed_leasesOfWaitingMessages(t *testing.T) {
	t.Parallel()
	// Each consumer reports once a second, and each report is one chance. There is more
	// than even a slow machine lets them handle before the connection is closed.
	const consumers, msgs, work = 10, 600, 70 * time.Millisecond
	var handled atomic.Int64
	began := make(chan struct{}, consumers*msgs)
	app := startAppWith(t, []mono.Option{newTracing().option(), mono.WithLogger(slog.New(deafHandler{}))}, emitter("shop", monotestEvent(t)),
		consumer("slow", func(r mono.EventRegistry, self mono.Module) error {
			var errs []error
			for i := range consumers {
				errs = append(errs, r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
					Stream:   mono.StreamConfig{Name: "orders"},
					Consumer: mono.ConsumerConfig{Durable: fmt.Sprintf("slow%d", i), AckWait: 600 * time.Millisecond},
					Fetch:    mono.FetchConfig{BatchSize: 5}, AutoAck: true,
				}, func(_ context.Context, msgs []*mono.Msg) error {
					began <- struct{}{}
					<-time.After(work)
					handled.Add(int64(len(msgs)))
					return nil
				}, self))
			}
			return errors.Join(errs...)
		}))
	for range msgs {
		publishStored(t, app, nil)
	}
	for range consumers {
		receive(t, began, "the first batches")
	}
	app.Conn().Close()
	before := handled.Load()
	eventually(t, func() bool { return handled.Load() > before+consumers }, "what waited is handled")
}

// A deafHandler is enabled and has no lock.
type deafHandler struct{}

func (deafHandler) Enabled(context.Context, slog.Level) bool  { return true }
func (deafHandler) Handle(context.Context, slog.Record) error { return nil }
func (h deafHandler) WithAttrs([]slog.Attr) slog.Handler      { return h }
func (h deafHandler) WithGroup(string) slog.Handler           { return h }

// checkUndisturbed sends messages every way there is, to handlers that do
// everything there is to do, and looks at what the server has in the end.
func checkUndisturbed(t *testing.T, opts ...mono.Option) {
	t.Helper()
	const n = 30
	core, err := mono.NewEvent("shop", "Pinged", "v1")
	if err != nil {
		t.Fatal(err)
	}
	var handled, done atomic.Int64
	pinged := make(chan struct{}, n)
	app := startAppWith(t, opts, emitter("shop", monotestEvent(t), core),
		tracedConsumer(t, 7, func(_ context.Context, msgs []*mono.Msg) error {
			var errs []error
			for _, m := range msgs {
				handled.Add(1)
				switch first := m.Metadata().NumDelivered == 1; {
				case first && m.Data[0]%5 == 1:
					errs = append(errs, m.Nak())
					continue
				case first && m.Data[0]%5 == 2:
					errs = append(errs, m.Fail(&oddError{}))
					continue
				case m.Data[0]%5 == 3:
					errs = append(errs, m.Term())
				default:
					errs = append(errs, m.InProgress(), m.Ack())
				}
				done.Add(1)
			}
			return errors.Join(errs...)
		}),
		consumer("pings", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(core, func(context.Context, *mono.Msg) error {
				pinged <- struct{}{}
				return &oddError{}
			}, self)
		}))
	bus, ctx := app.Bus(), within(t)
	for i := range byte(n) {
		msg := &mono.Msg{Subject: traceSubject, Data: []byte{i}, Header: mono.Header{"traceparent": {"nonsense"}}}
		switch i % 3 {
		case 0:
			err = bus.Publish(ctx, msg)
		case 1:
			_, err = bus.PublishStream(ctx, msg)
		default:
			var f *mono.PubAckFuture
			if f, err = bus.PublishStreamAsync(ctx, msg); err == nil {
				_, err = f.Wait(ctx)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := bus.Publish(ctx, &mono.Msg{Subject: core.Subject, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return done.Load() == n }, "every message is settled")
	settled(t, app, "orders", "billing")
	for range n {
		receive(t, pinged, "a core event")
	}
	const again = n / 5 * 2
	if got := handled.Load(); got != n+again {
		t.Errorf("%d deliveries, want %d", got, n+again)
	}
	if info := consumerInfo(t, app, "orders", "billing"); info.Delivered.Consumer != n+again || info.NumRedelivered != 0 {
		t.Errorf("the server counts %d deliveries, and %d messages to deliver again", info.Delivered.Consumer, info.NumRedelivered)
	}
}

// Ten thousand headers that nobody would send are no reason to lose a message.
func TestUndisturbed_oddHeaders(t *testing.T) {
	t.Parallel()
	const n = 10_000
	const seed1, seed2 = 1, 2
	rnd := rand.New(rand.NewPCG(seed1, seed2))
	keys := []string{"traceparent", "Traceparent", "TRACEPARENT", "Xraceparent", "tracestate", "Tracestate", "baggage", "Nats-Msg-Idx", "x"}
	good := "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	value := func() string {
		switch rnd.IntN(4) {
		case 0:
			return good
		case 1: // nearly right
			b := []byte(good)
			b[rnd.IntN(len(b))] = byte(' ' + rnd.IntN(0xff-' '))
			return string(b)
		case 2:
			return good[:rnd.IntN(len(good))]
		default:
			b := make([]byte, rnd.IntN(600))
			for i := range b {
				b[i] = byte('!' + rnd.IntN(0xff-'!'))
			}
			return string(b)
		}
	}
	tr := newTracing()
	var handled atomic.Int64
	app := startAppWith(t, []mono.Option{
		tr.option(), mono.WithPropagator(propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})),
	}, emitter("shop", monotestEvent(t)), tracedConsumer(t, 100, func(ctx context.Context, msgs []*mono.Msg) error {
		handled.Add(int64(len(msgs)))
		return ackAll(ctx, msgs)
	}))
	for i := range n {
		m := &nats.Msg{Subject: traceSubject, Data: []byte("x"), Header: nats.Header{}}
		for range 1 + rnd.IntN(3) {
			k := keys[rnd.IntN(len(keys))]
			m.Header[k] = append(m.Header[k], value())
		}
		if i%10 == 0 { // through the bus, which reads it, too
			_, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: m.Subject, Data: m.Data, Header: m.Header})
			if err == nil {
				continue
			}
			if !errors.Is(err, mono.ErrInvalidHeader) { // the bus sends no control characters
				t.Fatal(err)
			}
		}
		if err := app.Conn().PublishMsg(m); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return handled.Load() == n }, "every message is handled")
	settled(t, app, "orders", "billing")
	if got := len(tr.ended(t, processSpan, n)); got != n {
		t.Errorf("%d process spans", got)
	}
}

// A MeterProvider that cannot make an instrument is a mistake of the set-up, and
// found when the App starts.
func TestUndisturbed_brokenMeterProviderFailsTheStart(t *testing.T) {
	t.Parallel()
	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet(), mono.WithMeterProvider(brokenMeters{}))
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, app.Start(within(t)), errNoInstrument, "telemetry")
	if err := app.Stop(within(t)); err != nil {
		t.Error(err)
	}
}

var errNoInstrument = errors.New("no instrument for you")

type (
	brokenMeters struct{ mnoop.MeterProvider }
	brokenMeter  struct{ mnoop.Meter }
)

func (brokenMeters) Meter(string, ...metric.MeterOption) metric.Meter { return brokenMeter{} }

func (brokenMeter) Float64Histogram(name string, _ ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return nil, fmt.Errorf("%s: %w", name, errNoInstrument)
}
