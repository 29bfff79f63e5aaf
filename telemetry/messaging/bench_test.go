package messaging

import (
	"context"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/metric"
	mnoop "go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// What recording costs by itself, without NATS. A sampled message is published,
// processed and acked: three spans.

type discard struct{}

func (discard) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error { return nil }
func (discard) Shutdown(context.Context) error                             { return nil }

func benchTelemetry(tb testing.TB, metrics bool, ratio float64) *Telemetry {
	tb.Helper()
	cfg := Config{MeterProvider: mnoop.NewMeterProvider(), TracerProvider: noop.NewTracerProvider()}
	if metrics {
		cfg.MeterProvider = benchMeters()
	}
	if ratio >= 0 {
		cfg.TracerProvider = benchTracers(tb, ratio)
	}
	return newTelemetry(tb, cfg)
}

func benchMeters() metric.MeterProvider {
	return sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
}

func benchTracers(tb testing.TB, ratio float64) trace.TracerProvider {
	tb.Helper()
	tp := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
		sdktrace.WithBatcher(discard{}, sdktrace.WithMaxQueueSize(1<<14)))
	tb.Cleanup(func() {
		if err := tp.Shutdown(context.Background()); err != nil {
			tb.Error(err)
		}
	})
	return parentFollower{tp} // as package telemetry's
}

// A message's way, in two steps. What is made for a message besides telemetry is
// made once.
type benchMessage struct {
	p *Publisher
	c *Consumer
	h nats.Header
	m Message
	d Delivery // part of the message, in an App
}

func newBenchMessage(t *Telemetry) *benchMessage {
	const template = "events.shop.v1.order-placed"
	b := &benchMessage{p: t.Publisher(template), c: t.Consumer(Route{Template: template, Group: "billing", Stream: "orders"})}
	b.m = Message{Subject: template, Size: 256, ConsumerSequence: 17}
	b.d = Delivery{Sequence: 17, Stored: time.Now().UnixNano(), Attempt: 1}
	return b
}

func (b *benchMessage) publish(ctx context.Context) {
	_, o := b.p.Start(ctx)
	h, _ := o.Inject(b.m.Subject, nil, b.m.Size, false)
	if v := h.Get(traceparent); b.h == nil && v != "" { // h is the publish's
		b.h = nats.Header{traceparent: {v}}
	}
	o.Stored("orders", b.d.Sequence, false)
	o.End(nil)
}

func (b *benchMessage) consume(ctx context.Context) {
	d := &b.d
	*d = Delivery{Sequence: d.Sequence, Stored: d.Stored, Attempt: d.Attempt}
	b.m.Header = b.h
	now := time.Now() // what a batch and the lease need anyway
	ctx = b.c.Start(ctx, d, &b.m, now)
	s := b.c.Settle(ctx, d, Ack)
	s.End(nil, now, false, nil)
}

// BenchmarkCost compares what we record with one bare call of the SDK that
// records it, so that the ratio holds on any machine: impl=bare is a span that is
// started and ended, or one value recorded with attributes made before.
func BenchmarkCost(b *testing.B) {
	b.Run("publish_off", func(b *testing.B) {
		benchBareSpan(b, noop.NewTracerProvider())
		benchMessages(b, false, -1, (*benchMessage).publish)
	})
	b.Run("consume_off", func(b *testing.B) {
		benchBareSpan(b, noop.NewTracerProvider())
		benchMessages(b, false, -1, (*benchMessage).consume)
	})
	b.Run("metrics", func(b *testing.B) {
		benchBareRecord(b)
		benchMessages(b, true, -1, (*benchMessage).publish, (*benchMessage).consume)
	})
	b.Run("publish_unsampled", func(b *testing.B) {
		benchBareSpan(b, benchTracers(b, 0))
		benchMessages(b, false, 0, (*benchMessage).publish)
	})
	b.Run("consume_unsampled", func(b *testing.B) {
		benchBareSpan(b, benchTracers(b, 0))
		benchMessages(b, false, 0, (*benchMessage).consume)
	})
	b.Run("message_unsampled", func(b *testing.B) {
		benchBareSpan(b, benchTracers(b, 0))
		benchMessages(b, true, 0, (*benchMessage).publish, (*benchMessage).consume)
	})
	b.Run("message_sampled", func(b *testing.B) {
		benchBareSpan(b, benchTracers(b, 1))
		benchMessages(b, true, 1, (*benchMessage).publish, (*benchMessage).consume)
	})
}

func benchBareSpan(b *testing.B, tp trace.TracerProvider) {
	b.Helper()
	b.Run("impl=bare", func(b *testing.B) {
		tracer, ctx := tp.Tracer("bare"), b.Context()
		b.ReportAllocs()
		for b.Loop() {
			_, s := tracer.Start(ctx, "bare")
			s.End()
		}
	})
}

func benchBareRecord(b *testing.B) {
	b.Helper()
	h, err := benchMeters().Meter("bare").Float64Histogram("bare", metric.WithExplicitBucketBoundaries(conventionBuckets...))
	if err != nil {
		b.Fatal(err)
	}
	opts := recordOptions(keySystem.String(systemNATS), keyOperationName.String(opProcess), keyTemplate.String("a"), keyConsumerGroup.String("b"))
	b.Run("impl=bare", func(b *testing.B) {
		ctx := b.Context()
		b.ReportAllocs()
		for b.Loop() {
			h.Record(ctx, 1, *opts...)
		}
	})
}

func benchMessages(b *testing.B, metrics bool, ratio float64, steps ...func(m *benchMessage, ctx context.Context)) {
	b.Helper()
	b.Run("impl=monotel", func(b *testing.B) {
		m, ctx := newBenchMessage(benchTelemetry(b, metrics, ratio)), b.Context()
		m.publish(ctx)
		b.ReportAllocs()
		for b.Loop() {
			for _, step := range steps {
				step(m, ctx)
			}
		}
	})
}

// The benchmarks show the cost; this keeps it.
func TestAlloc_budgets(t *testing.T) { //nolint:paralleltest // counts the allocations of the process
	if raceEnabled {
		t.Skip("NOT CHECKED: the race detector allocates by itself; run `go test -run Alloc ./telemetry/messaging` without -race")
	}
	for _, tt := range []struct {
		name             string
		metrics          bool
		ratio            float64
		publish, consume float64 // at most
	}{
		{name: "off", ratio: -1},
		{name: "metrics", metrics: true, ratio: -1},
		{name: "unsampled", metrics: true, ratio: 0, publish: 3, consume: 2},
		{name: "sampled", metrics: true, ratio: 1, publish: 5, consume: 15}, // nearly all of them the SDK's
	} {
		m, ctx := newBenchMessage(benchTelemetry(t, tt.metrics, tt.ratio)), t.Context()
		m.publish(ctx)
		const runs = 2000
		for what, n := range map[string][2]float64{
			"publish": {testing.AllocsPerRun(runs, func() { m.publish(ctx) }), tt.publish},
			"consume": {testing.AllocsPerRun(runs, func() { m.consume(ctx) }), tt.consume},
		} {
			t.Logf("%s, %s: %v allocations", tt.name, what, n[0])
			if n[0] > n[1] {
				t.Errorf("%s, %s: %v allocations, want at most %v", tt.name, what, n[0], n[1])
			}
		}
	}
}
