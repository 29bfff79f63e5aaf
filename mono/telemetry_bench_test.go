package mono_test

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/telemetry"
)

// These benchmarks compare an App with itself: impl=off records nothing, the
// others record metrics, and sample no, one in a hundred, and every trace, with
// package telemetry's set-up and an exporter that throws the spans away.

var telemetrySides = []struct {
	name    string
	metrics bool
	ratio   float64 // of traces that are sampled; less than 0: no tracing
}{
	{"off", false, -1},
	{"metrics", true, -1},
	{"unsampled", true, 0},
	{"sampled1", true, 0.01},
	{"sampled100", true, 1},
}

type discardSpans struct{}

func (discardSpans) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error { return nil }
func (discardSpans) Shutdown(context.Context) error                             { return nil }

// setupTelemetry sets telemetry up as a program does. A negative ratio makes no
// spans.
func setupTelemetry(b *testing.B, ratio float64) []mono.Option {
	b.Helper()
	exporter := telemetry.WithSpanExporter(nil)
	if ratio >= 0 {
		exporter = telemetry.WithSpanExporter(discardSpans{})
	}
	tel, err := telemetry.Setup(b.Context(), exporter, telemetry.WithSampleRatio(max(ratio, 0)), telemetry.WithoutGlobals())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := tel.Shutdown(context.Background()); err != nil {
			b.Error(err)
		}
	})
	return []mono.Option{mono.WithMeterProvider(tel.MeterProvider()), mono.WithTracerProvider(tel.TracerProvider())}
}

// benchTelemetry runs one benchmark for each side.
func benchTelemetry(b *testing.B, bench func(b *testing.B, opts ...mono.Option)) {
	b.Helper()
	for _, side := range telemetrySides {
		b.Run("impl="+side.name, func(b *testing.B) {
			opts := []mono.Option{mono.WithMeterProvider(nil), mono.WithTracerProvider(nil)}
			if side.metrics {
				opts = setupTelemetry(b, side.ratio)
			}
			bench(b, opts...)
		})
	}
}

func BenchmarkTelemetryCorePublish(b *testing.B) {
	benchTelemetry(b, func(b *testing.B, opts ...mono.Option) {
		b.Helper()
		app, stop := perfStartApp(b, perfServer(b), nil, opts...)
		b.Cleanup(stop)
		ctx := b.Context()
		b.ReportAllocs()
		for b.Loop() {
			if err := app.bus.Publish(ctx, &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkTelemetryDurablePublish(b *testing.B) {
	benchTelemetry(b, func(b *testing.B, opts ...mono.Option) {
		b.Helper()
		app, stop := perfStartApp(b, perfServer(b), nil, opts...)
		b.Cleanup(stop)
		perfJetStream(b, app.Conn())
		ctx := b.Context()
		b.ReportAllocs()
		for b.Loop() {
			if _, err := app.bus.PublishStream(ctx, &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// The backlog is published with the same telemetry, so its messages carry what
// they would carry.
func BenchmarkTelemetryConsumeAck(b *testing.B) {
	benchTelemetry(b, func(b *testing.B, opts ...mono.Option) {
		b.Helper()
		s, js := perfFilledBy(b, perfBacklog, opts...)
		perfRoundsOf(b, s, js, perfBacklog, perfConsumeMonotel(10, opts...))
	})
}

// A handler that works for half a millisecond, which is little.
func BenchmarkTelemetryHandler(b *testing.B) {
	const (
		msgs = 1000
		work = 500 * time.Microsecond
	)
	benchTelemetry(b, func(b *testing.B, opts ...mono.Option) {
		b.Helper()
		s, js := perfFilledBy(b, msgs, opts...)
		perfRoundsOf(b, s, js, msgs, perfConsumeWith(
			func(r mono.EventRegistry, m mono.Module, cfg mono.StreamConsumerConfig, done func()) error {
				return r.RegisterEventStreamConsumer(perfEvent, cfg, func(_ context.Context, batch []*mono.Msg) error {
					for _, msg := range batch {
						for begin := time.Now(); time.Since(begin) < work; { //nolint:forbidigo // a benchmark
							continue
						}
						if err := msg.Ack(); err != nil {
							return err
						}
						done()
					}
					return nil
				}, m)
			}, opts...))
	})
}

// perfFilledBy returns a server whose stream holds n messages of an App.
func perfFilledBy(b *testing.B, n int, opts ...mono.Option) (*embedded.Server, jetstream.JetStream) {
	b.Helper()
	s := perfServer(b)
	js := perfJetStream(b, perfConn(b, s))
	app, stop := perfStartApp(b, s, nil, opts...)
	for range n {
		if _, err := app.bus.PublishStreamAsync(b.Context(), &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload}); err != nil {
			b.Fatal(err)
		}
	}
	stop()
	perfStored(b, js, n)
	return s, js
}
