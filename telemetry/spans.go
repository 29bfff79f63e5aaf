package telemetry

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"

	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

func (t *Telemetry) startTraces(ctx context.Context, cfg *config, res *resource.Resource) error {
	s, err := samplerFromEnv(cfg.ratio)
	if err != nil {
		return err
	}
	opts := []sdktrace.TracerProviderOption{sdktrace.WithResource(res), sdktrace.WithSampler(s)}
	var exporter sdktrace.SpanExporter
	switch {
	case disabled():
	case cfg.exporter != nil:
		exporter = *cfg.exporter
	default:
		if exporter, err = autoexport.NewSpanExporter(ctx); err != nil {
			return fmt.Errorf("OTEL_TRACES_EXPORTER: %w", err)
		}
	}
	if exporter == nil || autoexport.IsNoneSpanExporter(exporter) {
		opts = append(opts, sdktrace.WithSampler(sdktrace.NeverSample())) // what nobody gets need not be made
		t.tracers = sdktrace.NewTracerProvider(opts...)
		return nil
	}
	queue := &spanQueue{limit: int64(cfg.queueSize)}
	if err := queue.instruments(t.meters.Meter(scopeName)); err != nil {
		return err
	}
	// The SDK's own processor has room for more than ours lets in, so it never
	// drops a span that nobody counts.
	const spare = 1024
	size := cfg.queueSize + spare
	batcher := []sdktrace.BatchSpanProcessorOption{sdktrace.WithMaxQueueSize(size)}
	if os.Getenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE") == "" {
		const batch = 512
		batcher = append(batcher, sdktrace.WithMaxExportBatchSize(min(batch, max(cfg.queueSize/2, 1)))) //nolint:mnd // half of it
	}
	queue.next = sdktrace.NewBatchSpanProcessor(&countedExporter{queue: queue, next: exporter}, batcher...)
	t.queue = queue
	t.tracers = sdktrace.NewTracerProvider(append(opts, sdktrace.WithSpanProcessor(queue))...)
	return nil
}

const scopeName = "github.com/monotel/monotel/telemetry"

// A spanQueue counts the spans that wait to be exported, and drops those that are
// too many. Neither costs the one whose span it is more than two atomic
// additions.
type spanQueue struct {
	next  sdktrace.SpanProcessor
	limit int64

	waiting  atomic.Int64
	taken    atomic.Int64
	dropped  atomic.Int64
	exported atomic.Int64
	failed   atomic.Int64
}

// instruments are named as in OpenTelemetry's conventions for SDKs.
func (q *spanQueue) instruments(m metric.Meter) error {
	processed, err1 := m.Int64ObservableCounter("otel.sdk.processor.span.processed", metric.WithUnit("{span}"),
		metric.WithDescription("Ended spans that were taken for export, or dropped because too many wait (error.type queue_full)."))
	exported, err2 := m.Int64ObservableCounter("otel.sdk.exporter.span.exported", metric.WithUnit("{span}"),
		metric.WithDescription("Spans that were exported, or not because of an error (error.type export_failed)."))
	size, err3 := m.Int64ObservableUpDownCounter("otel.sdk.processor.span.queue.size", metric.WithUnit("{span}"),
		metric.WithDescription("Ended spans that wait to be exported."))
	capacity, err4 := m.Int64ObservableUpDownCounter("otel.sdk.processor.span.queue.capacity", metric.WithUnit("{span}"),
		metric.WithDescription("Most spans that may wait to be exported."))
	if err := errors.Join(err1, err2, err3, err4); err != nil {
		return err
	}
	errorType := func(v string) metric.MeasurementOption {
		return metric.WithAttributes(attribute.String("error.type", v))
	}
	full, failed := errorType("queue_full"), errorType("export_failed")
	_, err := m.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		o.ObserveInt64(processed, q.taken.Load())
		o.ObserveInt64(processed, q.dropped.Load(), full)
		o.ObserveInt64(exported, q.exported.Load())
		o.ObserveInt64(exported, q.failed.Load(), failed)
		o.ObserveInt64(size, q.waiting.Load())
		o.ObserveInt64(capacity, q.limit)
		return nil
	}, processed, exported, size, capacity)
	return err
}

func (q *spanQueue) OnStart(ctx context.Context, s sdktrace.ReadWriteSpan) { q.next.OnStart(ctx, s) }

func (q *spanQueue) OnEnd(s sdktrace.ReadOnlySpan) {
	if !s.SpanContext().IsSampled() {
		return
	}
	if q.waiting.Add(1) > q.limit {
		q.waiting.Add(-1)
		q.dropped.Add(1)
		return
	}
	q.taken.Add(1)
	q.next.OnEnd(s)
}

func (q *spanQueue) Shutdown(ctx context.Context) error   { return q.next.Shutdown(ctx) }
func (q *spanQueue) ForceFlush(ctx context.Context) error { return q.next.ForceFlush(ctx) }

// A countedExporter counts what becomes of the spans that leave the queue.
type countedExporter struct {
	queue *spanQueue
	next  sdktrace.SpanExporter
}

func (e *countedExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) (err error) {
	n := int64(len(spans))
	e.queue.waiting.Add(-n)
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("span exporter panicked: %v", v)
		}
		if err != nil {
			e.queue.failed.Add(n)
			return
		}
		e.queue.exported.Add(n)
	}()
	return e.next.ExportSpans(ctx, spans)
}

func (e *countedExporter) Shutdown(ctx context.Context) error {
	return contained("span exporter", func() error { return e.next.Shutdown(ctx) })
}
