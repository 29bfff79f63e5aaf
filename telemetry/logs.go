package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/contrib/bridges/otelslog"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	"go.opentelemetry.io/otel/sdk/resource"
	"go.opentelemetry.io/otel/trace"
)

func (t *Telemetry) startLogs(res *resource.Resource, exporter sdklog.Exporter) {
	if exporter != nil {
		t.logs = sdklog.NewLoggerProvider(sdklog.WithResource(res), sdklog.WithProcessor(sdklog.NewBatchProcessor(exporter)))
	}
}

// Handler returns a handler for package slog that adds trace_id and span_id to
// the records that are logged with a context that has a span, and hands them to
// next. Where OTEL_LOGS_EXPORTER is set, records from Info up are exported, too,
// and those below that next takes.
func (t *Telemetry) Handler(next slog.Handler) slog.Handler {
	h := &correlated{base: next, next: next}
	if t.logs != nil {
		// The bridge takes the IDs from the context by itself.
		h.export = otelslog.NewHandler(scopeName, otelslog.WithLoggerProvider(t.logs))
	}
	return h
}

// correlated adds IDs at the top level, whatever groups are open: that is where
// backends look for them. What was said by With is said again for that.
type correlated struct {
	base   slog.Handler                      // as it was given
	next   slog.Handler                      // with what was said since
	export slog.Handler                      // with what was said since; nil: no export
	said   []func(slog.Handler) slog.Handler // since base
	open   bool                              // a group is
}

func (h *correlated) Enabled(ctx context.Context, l slog.Level) bool {
	return h.next.Enabled(ctx, l) || h.export != nil && l >= slog.LevelInfo
}

func (h *correlated) Handle(ctx context.Context, r slog.Record) error {
	var err error
	if h.next.Enabled(ctx, r.Level) {
		err = h.correlate(ctx, r.Clone())
	}
	if h.export != nil && h.export.Enabled(ctx, r.Level) {
		err = errors.Join(err, h.export.Handle(ctx, r.Clone()))
	}
	return err
}

func (h *correlated) correlate(ctx context.Context, r slog.Record) error {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() {
		return h.next.Handle(ctx, r)
	}
	ids := []slog.Attr{slog.String("trace_id", sc.TraceID().String()), slog.String("span_id", sc.SpanID().String())}
	if !h.open {
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
	c := &correlated{base: h.base, next: say(h.next), said: append(slices.Clip(h.said), say), open: h.open || group}
	if h.export != nil {
		c.export = say(h.export)
	}
	return c
}

// problemInterval is how often problems are reported.
const problemInterval = time.Minute

// problems reports what is wrong with telemetry, one line a minute, so that a
// collector that is away does not fill the disk.
type problems struct {
	log  func() *slog.Logger
	next atomic.Int64 // Unix nanoseconds
	left atomic.Uint64
}

// Handle makes it OpenTelemetry's error handler.
func (p *problems) Handle(err error) {
	if err == nil {
		return
	}
	now := time.Now()
	next := p.next.Load()
	if now.UnixNano() < next || !p.next.CompareAndSwap(next, now.Add(problemInterval).UnixNano()) {
		p.left.Add(1)
		return
	}
	attrs := []slog.Attr{slog.String("error", err.Error())}
	if left := p.left.Swap(0); left > 0 {
		attrs = append(attrs, slog.Uint64("left_out", left))
	}
	p.log().LogAttrs(context.Background(), slog.LevelWarn, "something is wrong with telemetry, the program goes on", attrs...) //nolint:forbidigo // there is no other
}

// Println makes it the error log of promhttp.
func (p *problems) Println(v ...any) { p.Handle(errors.New(strings.TrimSpace(fmt.Sprintln(v...)))) }
