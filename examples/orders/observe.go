package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"time"

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
	server  *http.Server         // nil unless metrics are served
	served  chan error
	metrics string // URL
}

// observe starts what the flags and the environment ask for.
func observe(ctx context.Context, o options) (*observation, error) {
	ob := &observation{}
	toCollector := os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") != "" ||
		os.Getenv("OTEL_TRACES_EXPORTER") != ""
	if !toCollector && o.metrics == "" && !o.printTrace {
		return ob, nil
	}
	// In a program of its own the global set-up would do, and nothing would have to
	// be passed on. The tests run several shops in one process.
	opts := []telemetry.Option{telemetry.WithServiceName("orders"), telemetry.WithoutGlobals()}
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

// serve answers scrapes. An address without a host is on loopback: whoever can
// reach the page can read it.
func (ob *observation) serve(ctx context.Context, address string) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("-metrics: %w", err)
	}
	if host == "" {
		host = "127.0.0.1"
	}
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return fmt.Errorf("-metrics: %w", err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", ob.tel.MetricsHandler())
	const patience = 5 * time.Second
	ob.server = &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	ob.served = make(chan error, 1)
	ob.metrics = "http://" + lis.Addr().String() + "/metrics"
	go func() { ob.served <- ob.server.Serve(lis) }()
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
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if ob.server != nil {
		ctx, cancel := context.WithTimeout(ctx, forScrape)
		defer cancel()
		if err := ob.server.Shutdown(ctx); err != nil {
			errs = append(errs, err, ob.server.Close())
		}
		if err := <-ob.served; !errors.Is(err, http.ErrServerClosed) {
			errs = append(errs, err)
		}
	}
	if ob.tel != nil {
		ctx, cancel := context.WithTimeout(ctx, forCollector)
		defer cancel()
		errs = append(errs, ob.tel.Shutdown(ctx))
	}
	return errors.Join(errs...)
}
