// Package telemetry sets up OpenTelemetry for a program in one call: traces over
// OTLP, metrics for Prometheus to scrape, log records with trace IDs, and one
// Shutdown. It follows the standard OTEL_* environment variables.
//
// It is independent of package mono: an App takes any TracerProvider and
// MeterProvider, and this set-up serves any program.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// Telemetry is a program's set-up. Its methods are safe for concurrent use.
type Telemetry struct {
	tracers    *tracerProvider // nil unless spans are exported
	queue      *spanQueue      // nil as well, then
	meters     *sdkmetric.MeterProvider
	logs       *sdklog.LoggerProvider // nil unless log records are exported
	propagator propagation.TextMapPropagator
	registry   *prometheus.Registry
	problems   *problems

	once     sync.Once
	shutdown chan struct{} // closed when everything is shut down
	err      error
}

// Setup starts what the environment and the options ask for, and makes it
// OpenTelemetry's global set-up, unless [WithoutGlobals] says otherwise. It opens
// no port and waits for nobody: a collector that is not there costs spans, which
// are counted, and nothing else.
//
// The environment variables are OpenTelemetry's own. Traces:
// OTEL_TRACES_EXPORTER (otlp, console, none; by default otlp),
// OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_EXPORTER_OTLP_PROTOCOL (http/protobuf, grpc)
// and their relatives, OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG,
// OTEL_BSP_*. Metrics are for [Telemetry.MetricsHandler]; they are also pushed
// where OTEL_METRICS_EXPORTER is otlp or console. Log records are exported where
// OTEL_LOGS_EXPORTER is set. OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES and
// OTEL_PROPAGATORS as everywhere. OTEL_SDK_DISABLED=true records nothing but the
// metrics that are scraped. Where no spans are exported, trace context passes
// through as it came.
//
// The error names every option and variable that cannot work, also where
// OpenTelemetry's specification would have it ignored with a warning: a program
// that records nothing because of a typing error is found at night. Nothing is
// left running then. ctx bounds the set-up.
func Setup(ctx context.Context, opts ...Option) (*Telemetry, error) {
	cfg := defaultConfig()
	for _, o := range opts {
		if o != nil {
			o.apply(&cfg)
		}
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("set up telemetry: %w", err)
	}
	t := &Telemetry{
		registry: cfg.registry, propagator: cfg.propagator, problems: &problems{log: cfg.logger}, shutdown: make(chan struct{}),
	}
	if err := t.start(ctx, &cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("set up telemetry: %w", err), t.Shutdown(ctx))
	}
	if cfg.globals {
		otel.SetTracerProvider(t.TracerProvider())
		otel.SetMeterProvider(t.meters)
		otel.SetTextMapPropagator(t.propagator)
		otel.SetErrorHandler(&problems{log: cfg.logger})
	}
	return t, nil
}

func (t *Telemetry) start(ctx context.Context, cfg *config) error {
	ex, err := newExporters(ctx, cfg)
	if err != nil {
		return err
	}
	res, err := t.newResource(ctx, cfg)
	if err != nil {
		return errors.Join(err, ex.shutdown(ctx))
	}
	// Metrics come first: what happens to spans is counted.
	if err := t.startMetrics(cfg, res, ex.metrics); err != nil {
		return errors.Join(err, ex.shutdown(ctx))
	}
	t.startLogs(res, ex.logs)
	return t.startTraces(cfg, res, ex.spans)
}

// exporters are what the environment and the options ask for; those that they do
// not are nil.
type exporters struct {
	spans   sdktrace.SpanExporter
	metrics sdkmetric.Reader // in addition to being scraped
	logs    sdklog.Exporter
}

func newExporters(ctx context.Context, cfg *config) (ex exporters, err error) {
	if disabled() {
		return ex, nil
	}
	const also = ", OTEL_EXPORTER_OTLP_PROTOCOL and its relatives"
	var errs []error
	if cfg.exporter != nil {
		ex.spans = *cfg.exporter
	} else if e, err := autoexport.NewSpanExporter(ctx); err != nil {
		errs = append(errs, fmt.Errorf("OTEL_TRACES_EXPORTER%s: %w", also, err))
	} else if !autoexport.IsNoneSpanExporter(e) {
		ex.spans = e
	}
	// Not the environment's Prometheus exporter: it opens a port of its own.
	if v := os.Getenv("OTEL_METRICS_EXPORTER"); v != "" && v != "none" && v != "prometheus" {
		if r, err := autoexport.NewMetricReader(ctx); err != nil {
			errs = append(errs, fmt.Errorf("OTEL_METRICS_EXPORTER%s: %w", also, err))
		} else {
			ex.metrics = r
		}
	}
	if v := os.Getenv("OTEL_LOGS_EXPORTER"); v != "" && v != "none" {
		if e, err := autoexport.NewLogExporter(ctx); err != nil {
			errs = append(errs, fmt.Errorf("OTEL_LOGS_EXPORTER%s: %w", also, err))
		} else {
			ex.logs = e
		}
	}
	if err := errors.Join(errs...); err != nil {
		return exporters{}, errors.Join(err, ex.shutdown(ctx))
	}
	return ex, nil
}

func (ex exporters) shutdown(ctx context.Context) error {
	var errs []error
	if ex.spans != nil {
		errs = append(errs, contained("shut down traces", func() error { return ex.spans.Shutdown(ctx) }))
	}
	if ex.metrics != nil {
		errs = append(errs, contained("shut down metrics", func() error { return ex.metrics.Shutdown(ctx) }))
	}
	if ex.logs != nil {
		errs = append(errs, contained("shut down logs", func() error { return ex.logs.Shutdown(ctx) }))
	}
	return errors.Join(errs...)
}

// newResource describes the program. The command line is left out: it may hold
// secrets.
func (t *Telemetry) newResource(ctx context.Context, cfg *config) (*resource.Resource, error) {
	attrs := []resource.Option{
		resource.WithTelemetrySDK(), resource.WithHost(), resource.WithOS(), resource.WithContainer(),
		resource.WithProcessPID(), resource.WithProcessExecutableName(), resource.WithProcessRuntimeName(),
		resource.WithProcessRuntimeVersion(), resource.WithAttributes(semconv.ServiceName(cfg.serviceName)),
	}
	if cfg.serviceVersion != "" {
		attrs = append(attrs, resource.WithAttributes(semconv.ServiceVersion(cfg.serviceVersion)))
	}
	attrs = append(attrs, resource.WithFromEnv()) // the last one wins
	res, err := resource.New(ctx, attrs...)
	switch {
	case errors.Is(err, resource.ErrPartialResource): // such as without a host name
		t.problems.Handle(err)
	case err != nil:
		return nil, fmt.Errorf("describe the program: %w", err)
	}
	return res, nil
}

// TracerProvider returns where spans go. Where they are not exported it is one
// that makes none, and passes on the trace context that it finds.
func (t *Telemetry) TracerProvider() trace.TracerProvider {
	if t.tracers == nil {
		return noop.NewTracerProvider()
	}
	return t.tracers
}

// MeterProvider returns where metrics go.
func (t *Telemetry) MeterProvider() metric.MeterProvider { return t.meters }

// Propagator returns what OTEL_PROPAGATORS names; by default the W3C's trace
// context and baggage.
func (t *Telemetry) Propagator() propagation.TextMapPropagator { return t.propagator }

// MetricsHandler returns what Prometheus scrapes: the metrics of the program, of
// the Go runtime and the process. It speaks OpenMetrics, with exemplars that lead
// to traces, to clients that ask for it. It has no authentication: serve it on
// loopback, or behind what you protect other internal pages with.
func (t *Telemetry) MetricsHandler() http.Handler {
	return promhttp.InstrumentMetricHandler(t.registry, promhttp.HandlerFor(t.registry, promhttp.HandlerOpts{
		EnableOpenMetrics: true, // or every exemplar is dropped
		Registry:          t.registry,
		ErrorLog:          t.problems,
		ErrorHandling:     promhttp.ContinueOnError, // one bad collector does not hide the rest
	}))
}

// Shutdown sends what is still to be sent and stops everything, within ctx: if an
// exporter does not answer, Shutdown returns ctx's error when ctx ends. Spans that
// could not be sent are an error, too. A second call waits for the first and
// returns the same.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	t.once.Do(func() {
		go func() {
			defer close(t.shutdown)
			t.err = t.stop(ctx)
		}()
	})
	select {
	case <-t.shutdown:
		return t.err
	case <-ctx.Done():
	}
	select {
	case <-t.shutdown:
		return t.err
	default:
		return fmt.Errorf("shut down telemetry: an exporter is still at it: %w", context.Cause(ctx))
	}
}

// stop ends traces and logs together, and then metrics, which count what became of
// the spans. Whoever does not answer leaves metrics a part of the time.
func (t *Telemetry) stop(ctx context.Context) error {
	early, cancel := ctx, context.CancelFunc(func() {})
	if deadline, ok := ctx.Deadline(); ok {
		const left = 4 // a quarter
		early, cancel = context.WithDeadline(ctx, deadline.Add(-time.Until(deadline)/left))
	}
	defer cancel()
	var (
		all                    sync.WaitGroup
		traces, logs, measures error
	)
	if t.queue != nil {
		all.Go(func() {
			traces = contained("shut down traces", func() error {
				// The provider does not even begin when its context has ended.
				return errors.Join(t.queue.Shutdown(early), t.tracers.Shutdown(early))
			})
		})
	}
	if t.logs != nil {
		all.Go(func() { logs = contained("shut down logs", func() error { return t.logs.Shutdown(early) }) })
	}
	all.Wait()
	if t.meters != nil {
		measures = contained("shut down metrics", func() error { return t.meters.Shutdown(ctx) })
	}
	return errors.Join(traces, logs, measures)
}

// contained turns a panic into an error, and says what failed.
func contained(what string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("%s: panic: %v", what, v)
		} else if err != nil {
			err = fmt.Errorf("%s: %w", what, err)
		}
	}()
	return f()
}

func disabled() bool {
	return strings.EqualFold(strings.TrimSpace(os.Getenv("OTEL_SDK_DISABLED")), "true")
}
