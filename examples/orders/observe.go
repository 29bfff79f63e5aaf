package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/telemetry"
)

// An observation is what a run shows of itself to others: metrics to who scrapes
// them, traces to a collector or to the terminal.
type observation struct {
	tel     *telemetry.Telemetry // nil when nobody asked
	book    *traceBook           // nil unless a trace is to be printed
	page    *webServer           // nil unless metrics are served by themselves
	metrics string               // URL of the page
}

// observe starts what the flags and the environment ask for.
func observe(ctx context.Context, o options, more ...telemetry.Option) (*observation, error) {
	ob := &observation{}
	toCollector := os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" ||
		os.Getenv("OTEL_TRACES_EXPORTER") != ""
	if !toCollector && o.metrics == "" && !o.printTrace && o.http == "" {
		return ob, nil
	}
	// In a program of its own the global set-up would do, and nothing would have to
	// be passed on. The tests run several shops in one process.
	opts := append([]telemetry.Option{telemetry.WithServiceName(o.name()), telemetry.WithoutGlobals()}, more...)
	switch {
	case o.printTrace:
		ob.book = &traceBook{}
		opts = append(opts, telemetry.WithSpanExporter(ob.book))
	case !toCollector:
		opts = append(opts, telemetry.WithSpanExporter(nil))
	}
	tel, err := telemetry.Setup(ctx, opts...)
	if err != nil {
		return nil, err
	}
	ob.tel = tel
	if o.metrics != "" {
		if err := ob.serve(ctx, o.metrics); err != nil {
			return nil, errors.Join(err, ob.stop(ctx))
		}
	}
	return ob, nil
}

// serve answers scrapes.
func (ob *observation) serve(ctx context.Context, address string) error {
	page, err := listenHTTP(ctx, address)
	if err != nil {
		return fmt.Errorf("-metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", ob.tel.MetricsHandler())
	page.serve(mux, func(error) {}) // stop returns it
	ob.page, ob.metrics = page, page.url()+"/metrics"
	return nil
}

// options hand the App what it reports to.
func (ob *observation) options() []mono.Option {
	if ob.tel == nil {
		return nil
	}
	return []mono.Option{
		mono.WithTracerProvider(ob.tel.TracerProvider()), mono.WithMeterProvider(ob.tel.MeterProvider()),
		mono.WithPropagator(ob.tel.Propagator()),
	}
}

// tracer is for the shop's own spans.
func (ob *observation) tracer() trace.Tracer {
	const name = "github.com/monotel/monotel/examples/orders"
	if ob.tel == nil {
		return noop.NewTracerProvider().Tracer(name)
	}
	return ob.tel.TracerProvider().Tracer(name)
}

// propagator reads the trace context of requests.
func (ob *observation) propagator() propagation.TextMapPropagator {
	if ob.tel == nil {
		return propagation.TraceContext{} // as an App does
	}
	return ob.tel.Propagator()
}

// logs adds trace IDs to what is logged.
func (ob *observation) logs(h slog.Handler) slog.Handler {
	if ob.tel == nil {
		return h
	}
	return ob.tel.Handler(h)
}

// stop ends the page, sends the last spans, and ends.
func (ob *observation) stop(ctx context.Context) error {
	const (
		forScrape    = time.Second     // for one that is under way
		forCollector = 5 * time.Second // for one that does not answer
	)
	var errs []error
	if ob.page != nil {
		errs = append(errs, ob.page.stop(ctx, forScrape))
	}
	if ob.tel != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), forCollector)
		defer cancel()
		errs = append(errs, ob.tel.Shutdown(ctx))
	}
	return errors.Join(errs...)
}
