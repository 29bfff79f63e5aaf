package telemetry

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/contrib/bridges/otelslog"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/trace"
)

func (t *Telemetry) startLogs(ctx context.Context, res *resource.Resource) error {
	if v := os.Getenv("OTEL_LOGS_EXPORTER"); v == "" || v == "none" || disabled() {
		return nil
	}
	exporter, err := autoexport.NewLogExporter(ctx)
	if err != nil {
		return fmt.Errorf("OTEL_LOGS_EXPORTER: %w", err)
	}
	t.logs = sdklog.NewLoggerProvider(sdklog.WithResource(res), sdklog.WithProcessor(sdklog.NewBatchProcessor(exporter)))
	return nil
}

// Handler returns a handler for package slog that adds trace_id and span_id to
// the records that are logged with a context that has a span, and hands them to
// next. Where OTEL_LOGS_EXPORTER is set they are exported, too.
func (t *Telemetry) Handler(next slog.Handler) slog.Handler {
	h := slog.Handler(&correlated{base: next, next: next})
	if t.logs != nil {
		// The bridge takes the IDs from the context by itself.
		h = slog.NewMultiHandler(h, otelslog.NewHandler(scopeName, otelslog.WithLoggerProvider(t.logs)))
	}
	return h
}

// correlated adds IDs at the top level, whatever groups are open: that is where
// backends look for them. What was said by With is said again for that.
type correlated struct {
	base slog.Handler                      // as it was given
	next slog.Handler                      // with what was said since
	said []func(slog.Handler) slog.Handler // since base
	open bool                              // a group is
}

func (h *correlated) Enabled(ctx context.Context, l slog.Level) bool { return h.next.Enabled(ctx, l) }

func (h *correlated) Handle(ctx context.Context, r slog.Record) error {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() {
		return h.next.Handle(ctx, r)
	}
	ids := []slog.Attr{slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String())}
	if !h.open {
		r = r.Clone()
		r.AddAttrs(ids...)
		return h.next.Handle(ctx, r)
	}
	next := h.base.WithAttrs(ids)
	for _, say := range h.said {
		next = say(next)
	}
	return next.Handle(ctx, r)
}

func (h *correlated) WithAttrs(as []slog.Attr) slog.Handler {
	if len(as) == 0 {
		return h
	}
	return h.with(func(n slog.Handler) slog.Handler { return n.WithAttrs(as) }, false)
}

func (h *correlated) WithGroup(name string) slog.Handler {
	if name == "" {
		return h
	}
	return h.with(func(n slog.Handler) slog.Handler { return n.WithGroup(name) }, true)
}

func (h *correlated) with(say func(slog.Handler) slog.Handler, group bool) *correlated {
	return &correlated{base: h.base, next: say(h.next), said: append(slices.Clip(h.said), say), open: h.open || group}
}

// errorInterval is how often failures of the export are reported.
const errorInterval = time.Minute

// An errorHandler reports what OpenTelemetry has to complain about, one line a
// minute, so that a collector that is away does not fill the disk.
type errorHandler struct {
	log  *slog.Logger
	next atomic.Int64 // Unix nanoseconds
	left atomic.Uint64
}

func (h *errorHandler) Handle(err error) {
	if err == nil {
		return
	}
	now := time.Now()
	next := h.next.Load()
	if now.UnixNano() < next || !h.next.CompareAndSwap(next, now.Add(errorInterval).UnixNano()) {
		h.left.Add(1)
		return
	}
	attrs := []slog.Attr{slog.String("error", err.Error())}
	if left := h.left.Swap(0); left > 0 {
		attrs = append(attrs, slog.Uint64("similar_left_out", left))
	}
	h.log.LogAttrs(context.Background(), slog.LevelWarn, "telemetry is not exported, the program goes on", attrs...) //nolint:forbidigo // there is no other
}
