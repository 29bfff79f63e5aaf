package telemetry

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/telemetry/messaging"
)

// startTraces starts nothing where nobody gets the spans.
func (t *Telemetry) startTraces(cfg *config, res *resource.Resource, exporter sdktrace.SpanExporter) error {
	if exporter == nil {
		return nil
	}
	queue := &spanQueue{limit: int64(cfg.queueSize), problems: t.problems}
	// The SDK's own processor has room for more than ours lets in, so it never
	// drops a span that nobody counts.
	const spare = 1024
	queue.next = sdktrace.NewBatchSpanProcessor(&countedExporter{queue: queue, next: exporter},
		sdktrace.WithMaxQueueSize(cfg.queueSize+spare), sdktrace.WithMaxExportBatchSize(cfg.batchSize))
	t.queue = queue
	t.tracers = &tracerProvider{sampler: cfg.sampler, TracerProvider: sdktrace.NewTracerProvider(
		sdktrace.WithResource(res), sdktrace.WithSampler(cfg.sampler), sdktrace.WithSpanProcessor(queue))}
	return queue.instruments(t.meters.Meter(scopeName))
}

// A tracerProvider is the SDK's, and can tell what it does not record.
type tracerProvider struct {
	*sdktrace.TracerProvider

	sampler sdktrace.Sampler
}

var _ messaging.ParentFollower = (*tracerProvider)(nil)

// FollowsParent reports whether nothing is recorded below a span that is not
// sampled, but for what [NewSampler] names.
func (p *tracerProvider) FollowsParent() bool {
	s, ok := p.sampler.(sampler)
	return ok && s.parents
}

const scopeName = "github.com/monotel/monotel/telemetry"

// A spanQueue counts the spans that wait to be exported, and drops those that are
// too many. Neither costs the one whose span it is more than two atomic
// additions.
type spanQueue struct {
	next     sdktrace.SpanProcessor
	limit    int64
	problems *problems
	stopped  atomic.Bool
	lastErr  atomic.Pointer[error] // of an export

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
	if q.stopped.Load() {
		q.dropped.Add(1)
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

func (q *spanQueue) Shutdown(ctx context.Context) error {
	q.stopped.Store(true)
	return q.flushed(ctx, q.next.Shutdown)
}

func (q *spanQueue) ForceFlush(ctx context.Context) error { return q.flushed(ctx, q.next.ForceFlush) }

// flushed adds the spans that could not be exported meanwhile, which the SDK's
// processor does not always speak of.
func (q *spanQueue) flushed(ctx context.Context, flush func(context.Context) error) error {
	before := q.failed.Load()
	err := flush(ctx)
	lost, last := q.failed.Load()-before, q.lastErr.Load()
	if lost > 0 && last != nil {
		return errors.Join(err, fmt.Errorf("%d spans were not exported: %w", lost, *last))
	}
	return err
}

// A countedExporter counts what becomes of the spans that leave the queue.
type countedExporter struct {
	queue *spanQueue
	next  sdktrace.SpanExporter
}

// ExportSpans reports what goes wrong by itself, to the program's logger, and
// returns nil: the SDK would tell its global error handler, whosever that is.
func (e *countedExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	n := int64(len(spans))
	e.queue.waiting.Add(-n)
	err := contained("span exporter", func() error { return e.next.ExportSpans(ctx, spans) })
	if err == nil {
		e.queue.exported.Add(n)
		return nil
	}
	e.queue.lastErr.Store(&err)
	e.queue.failed.Add(n)
	e.queue.problems.Handle(err)
	return nil
}

func (e *countedExporter) Shutdown(ctx context.Context) error {
	return contained("shut down the span exporter", func() error { return e.next.Shutdown(ctx) })
}
