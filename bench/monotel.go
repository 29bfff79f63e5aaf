package main

import (
	"context"
	"errors"
	"log/slog"

	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/telemetry"
)

// A recording is what a program records.
type recording struct {
	metrics bool
	ratio   float64 // of traces that are sampled; less than 0: no tracing
}

var (
	telemetryOff     = recording{ratio: -1}
	telemetryMetrics = recording{metrics: true, ratio: -1}
	telemetry1       = recording{metrics: true, ratio: 0.01}
	telemetry100     = recording{metrics: true, ratio: 1}
)

// startMonotel runs an App with one module. Everything that the program does not
// set has its default, the dead-letter stream included.
func startMonotel(t recording) func(context.Context, target, program) (*running, error) {
	return func(ctx context.Context, srv target, p program) (*running, error) {
		opts, shutdown, err := t.options(ctx)
		if err != nil {
			return nil, err
		}
		m := &monotelModule{program: p}
		for i := range p.events {
			m.events = append(m.events, mono.BaseEventDefinition{
				ModuleName: moduleName, Name: eventName(i), Version: "v1", Subject: subject(i),
			})
		}
		app, err := mono.New(append(opts,
			mono.WithNATS(srv.url, srv.opts...),
			mono.WithPublishWindow(window),
			mono.WithLogger(slog.New(slog.DiscardHandler)))...)
		if err != nil {
			return nil, err
		}
		if err := app.Register(m); err != nil {
			return nil, err
		}
		if err := app.Start(ctx); err != nil {
			return nil, err
		}
		async := &monotelAsync{futures: make([]*mono.PubAckFuture, window)}
		return &running{
			publish: func(event int, data []byte) error {
				return m.bus.Publish(ctx, &mono.Msg{Subject: m.events[event].Subject, Data: data})
			},
			publishSync: func(event int, data []byte) error {
				_, err := m.bus.PublishStream(ctx, &mono.Msg{Subject: m.events[event].Subject, Data: data})
				return err
			},
			publishAsync: func(event int, data []byte) error {
				f, err := m.bus.PublishStreamAsync(ctx, &mono.Msg{Subject: m.events[event].Subject, Data: data})
				async.add(f)
				return err
			},
			wait: func() error { return async.wait(ctx) },
			stop: func() error { return errors.Join(app.Stop(ctx), shutdown(ctx)) },
		}, nil
	}
}

// options turns telemetry on as a program does, with an exporter that throws spans
// away.
func (t recording) options(ctx context.Context) (opts []mono.Option, shutdown func(context.Context) error, err error) {
	if !t.metrics {
		return []mono.Option{mono.WithMeterProvider(nil), mono.WithTracerProvider(nil)}, func(context.Context) error { return nil }, nil
	}
	exporter, ratio := telemetry.WithSpanExporter(nil), 0.0
	if t.ratio >= 0 {
		exporter, ratio = telemetry.WithSpanExporter(discard{}), t.ratio
	}
	tel, err := telemetry.Setup(ctx, exporter, telemetry.WithSampleRatio(ratio), telemetry.WithoutGlobals(),
		telemetry.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return nil, nil, err
	}
	return []mono.Option{
		mono.WithMeterProvider(tel.MeterProvider()), mono.WithTracerProvider(tel.TracerProvider()), mono.WithPropagator(tel.Propagator()),
	}, tel.Shutdown, nil
}

// tracerProvider is what users of the other libraries set up: the SDK with a batch
// processor.
func tracerProvider(ratio float64) *sdktrace.TracerProvider {
	return sdktrace.NewTracerProvider(
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithBatcher(discard{}))
}

// discard throws spans away, so that it is not an exporter that is measured.
type discard struct{}

func (discard) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error { return nil }
func (discard) Shutdown(context.Context) error                             { return nil }

// errBroken is what the handler of a broken program returns.
var errBroken = mono.Permanent(errors.New("column total does not exist"))

type monotelModule struct {
	program

	events []mono.BaseEventDefinition
	bus    mono.EventBus
}

func (*monotelModule) Name() string                             { return moduleName }
func (*monotelModule) Start(context.Context) error              { return nil }
func (*monotelModule) Stop(context.Context) error               { return nil }
func (m *monotelModule) SetEventBus(bus mono.EventBus)          { m.bus = bus }
func (m *monotelModule) EmitEvents() []mono.BaseEventDefinition { return m.events }

func (m *monotelModule) RegisterEventConsumers(r mono.EventRegistry) error {
	for i := range m.core {
		err := r.RegisterEventConsumer(m.events[i%len(m.events)], func(_ context.Context, msg *mono.Msg) error {
			m.handle(i, msg.Data)
			return nil
		}, m, durableName(i))
		if err != nil {
			return err
		}
	}
	for i := range m.durable {
		cfg := mono.StreamConsumerConfig{
			Stream:      mono.StreamConfig{Name: streamName},
			Consumer:    mono.ConsumerConfig{Durable: durableName(i)},
			Fetch:       mono.FetchConfig{BatchSize: m.batch},
			Concurrency: m.concurrency,
		}
		err := r.RegisterEventStreamConsumer(m.events[i%len(m.events)], cfg, func(_ context.Context, msgs []*mono.Msg) error {
			if m.broken != nil && m.broken.Load() {
				return errBroken
			}
			for _, msg := range msgs {
				m.handle(i, msg.Data)
				if err := msg.Ack(); err != nil {
					return err
				}
				m.settled()
			}
			return nil
		}, m)
		if err != nil {
			return err
		}
	}
	return nil
}

// monotelAsync keeps the futures of the last window: the ones before are done.
type monotelAsync struct {
	futures []*mono.PubAckFuture
	next    int
}

func (a *monotelAsync) add(f *mono.PubAckFuture) {
	a.futures[a.next%len(a.futures)] = f
	a.next++
}

func (a *monotelAsync) wait(ctx context.Context) error {
	for _, f := range a.futures {
		if f == nil { // fewer than a window were sent
			continue
		}
		if _, err := f.Wait(ctx); err != nil {
			return err
		}
	}
	return nil
}
