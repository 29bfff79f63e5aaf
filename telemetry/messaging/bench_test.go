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

// sides are what is compared, in the order of cost.
var sides = []struct {
	name    string
	metrics bool
	ratio   float64 // less than 0: no tracing
}{
	{"off", false, -1},
	{"metrics", true, -1},
	{"0%", true, 0},
	{"1%", true, 0.01},
	{"100%", true, 1},
}

func benchTelemetry(tb testing.TB, metrics bool, ratio float64) *Telemetry {
	tb.Helper()
	var mp metric.MeterProvider = mnoop.NewMeterProvider()
	if metrics {
		mp = sdkmetric.NewMeterProvider(sdkmetric.WithReader(sdkmetric.NewManualReader()))
	}
	var tp trace.TracerProvider = noop.NewTracerProvider()
	if ratio >= 0 {
		sdk := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(ratio))),
			sdktrace.WithBatcher(discard{}, sdktrace.WithMaxQueueSize(1<<14)))
		tb.Cleanup(func() {
			if err := sdk.Shutdown(context.Background()); err != nil {
				tb.Error(err)
			}
		})
		tp = sdk
	}
	return newTelemetry(tb, Config{TracerProvider: tp, MeterProvider: mp})
}

// A message's way, in two steps. What is made for a message besides telemetry is
// made once.
type benchMessage struct {
	p *Publisher
	c *Consumer
	h nats.Header
	m Message
}

func newBenchMessage(t *Telemetry) *benchMessage {
	const template = "events.shop.v1.order-placed"
	b := &benchMessage{p: t.Publisher(template), c: t.Consumer(Route{Template: template, Group: "billing", Stream: "orders"})}
	b.m = Message{Subject: template, Size: 256, Stored: time.Now(), Attempt: 1, StreamSequence: 17, ConsumerSequence: 17}
	return b
}

func (b *benchMessage) publish(ctx context.Context) {
	_, o := b.p.Start(ctx)
	b.h = o.Inject(b.m.Subject, nil, b.m.Size, false)
	o.Stored("orders", b.m.StreamSequence, false)
	o.End(nil)
}

func (b *benchMessage) consume(ctx context.Context, d *Delivery) {
	*d = Delivery{}
	b.m.Header = b.h
	b.c.Start(ctx, d, &b.m, time.Now())
	s := b.c.Settle(d, Ack)
	s.End(nil, false, nil)
}

func BenchmarkPublish(b *testing.B) {
	for _, side := range sides {
		b.Run("telemetry="+side.name, func(b *testing.B) {
			m, ctx := newBenchMessage(benchTelemetry(b, side.metrics, side.ratio)), b.Context()
			b.ReportAllocs()
			for b.Loop() {
				m.publish(ctx)
			}
		})
	}
}

func BenchmarkConsume(b *testing.B) {
	for _, side := range sides {
		b.Run("telemetry="+side.name, func(b *testing.B) {
			m, ctx := newBenchMessage(benchTelemetry(b, side.metrics, side.ratio)), b.Context()
			m.publish(ctx)
			var d Delivery // part of the message, in an App
			b.ReportAllocs()
			for b.Loop() {
				m.consume(ctx, &d)
			}
		})
	}
}

func BenchmarkMessage(b *testing.B) {
	for _, side := range sides {
		b.Run("telemetry="+side.name, func(b *testing.B) {
			m, ctx := newBenchMessage(benchTelemetry(b, side.metrics, side.ratio)), b.Context()
			var d Delivery
			b.ReportAllocs()
			for b.Loop() {
				m.publish(ctx)
				m.consume(ctx, &d)
			}
		})
	}
}

// The benchmarks show the cost; this keeps it.
func TestAlloc_budgets(t *testing.T) { //nolint:paralleltest // counts the allocations of the process
	if raceEnabled {
		t.Skip("NOT CHECKED: the race detector allocates by itself; run `go test -run Alloc ./telemetry/messaging` without -race")
	}
	for _, tt := range []struct {
		side                       string
		publish, consume, complete float64 // at most
	}{
		{side: "off", publish: 0, consume: 0, complete: 0},
		{side: "metrics", publish: 0, consume: 0, complete: 0},
		{side: "0%", publish: 7, consume: 12, complete: 19},
		{side: "100%", publish: 11, consume: 18, complete: 29}, // 18 of them the SDK's
	} {
		for _, side := range sides {
			if side.name != tt.side {
				continue
			}
			m, ctx := newBenchMessage(benchTelemetry(t, side.metrics, side.ratio)), t.Context()
			var d Delivery
			m.publish(ctx)
			const runs = 2000
			for what, n := range map[string][2]float64{
				"publish":  {testing.AllocsPerRun(runs, func() { m.publish(ctx) }), tt.publish},
				"consume":  {testing.AllocsPerRun(runs, func() { m.consume(ctx, &d) }), tt.consume},
				"complete": {testing.AllocsPerRun(runs, func() { m.publish(ctx); m.consume(ctx, &d) }), tt.complete},
			} {
				t.Logf("%s, %s: %v allocations", tt.side, what, n[0])
				if n[0] > n[1] {
					t.Errorf("%s, %s: %v allocations, want at most %v", tt.side, what, n[0], n[1])
				}
			}
		}
	}
}
