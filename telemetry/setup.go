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
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/propagators/autoprop"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	sdklog "go.opentelemetry.io/otel/sdk/log"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// Telemetry is a program's set-up. Its methods are safe for concurrent use.
type Telemetry struct {
	tracers    *sdktrace.TracerProvider // nil unless spans are exported
	queue      *spanQueue               // nil as well, then
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
	const otlp = ", OTEL_EXPORTER_OTLP_PROTOCOL"
	var errs [3]error
	if cfg.exporter != nil {
		ex.spans = *cfg.exporter
	} else if ex.spans, errs[0] = autoexport.NewSpanExporter(ctx); errs[0] != nil {
		errs[0] = fmt.Errorf("OTEL_TRACES_EXPORTER%s: %w", otlp, errs[0])
	} else if autoexport.IsNoneSpanExporter(ex.spans) {
		ex.spans = nil
	}
	// Not the environment's Prometheus exporter: it opens a port of its own.
	if v := os.Getenv("OTEL_METRICS_EXPORTER"); v != "" && v != "none" && v != "prometheus" {
		if ex.metrics, errs[1] = autoexport.NewMetricReader(ctx); errs[1] != nil {
			errs[1] = fmt.Errorf("OTEL_METRICS_EXPORTER%s: %w", otlp, errs[1])
		}
	}
	if v := os.Getenv("OTEL_LOGS_EXPORTER"); v != "" && v != "none" {
		if ex.logs, errs[2] = autoexport.NewLogExporter(ctx); errs[2] != nil {
			errs[2] = fmt.Errorf("OTEL_LOGS_EXPORTER%s: %w", otlp, errs[2])
		}
	}
	for i, ok := range []bool{errs[0] == nil, errs[1] == nil, errs[2] == nil} {
		if !ok { // what is half made is nothing
			switch i {
			case 0:
				ex.spans = nil
			case 1:
				ex.metrics = nil
			default:
				ex.logs = nil
			}
		}
	}
	if err := errors.Join(errs[:]...); err != nil {
		return exporters{}, errors.Join(err, ex.shutdown(ctx))
	}
	return ex, nil
}

func (ex exporters) shutdown(ctx context.Context) error {
	var errs []error
	if ex.spans != nil {
		errs = append(errs, contained("traces", func() error { return ex.spans.Shutdown(ctx) }))
	}
	if ex.metrics != nil {
		errs = append(errs, contained("metrics", func() error { return ex.metrics.Shutdown(ctx) }))
	}
	if ex.logs != nil {
		errs = append(errs, contained("logs", func() error { return ex.logs.Shutdown(ctx) }))
	}
	return errors.Join(errs...)
}

// newResource describes the program. The command line is left out: it may hold
// secrets.
func newResource(ctx context.Context, cfg *config) (*resource.Resource, error) {
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
	if err != nil && !errors.Is(err, resource.ErrPartialResource) {
		return nil, fmt.Errorf("describe the program: %w", err)
	}
	return res, nil
}

// TracerProvider returns where spans go.
func (t *Telemetry) TracerProvider() trace.TracerProvider { return t.tracers }

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
		ErrorHandling:     promhttp.ContinueOnError, // one bad collector does not hide the rest
	}))
}

// Shutdown sends what is still to be sent and stops everything, within ctx: if an
// exporter does not answer, Shutdown returns ctx's error when ctx ends. A second
// call waits for the first and returns the same.
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

// stop goes from traces to metrics, which count what became of the spans.
func (t *Telemetry) stop(ctx context.Context) error {
	var errs []error
	if t.queue != nil {
		// The provider does not even begin when ctx has ended.
		errs = append(errs, contained("traces", func() error { return t.queue.Shutdown(ctx) }))
	}
	if t.tracers != nil {
		errs = append(errs, contained("traces", func() error { return t.tracers.Shutdown(ctx) }))
	}
	if t.logs != nil {
		errs = append(errs, contained("logs", func() error { return t.logs.Shutdown(ctx) }))
	}
	if t.meters != nil {
		errs = append(errs, contained("metrics", func() error { return t.meters.Shutdown(ctx) }))
	}
	return errors.Join(errs...)
}

// contained turns a panic of what is shut down into an error.
func contained(what string, f func() error) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("shut down %s: panic: %v", what, v)
		} else if err != nil {
			err = fmt.Errorf("shut down %s: %w", what, err)
		}
	}()
	return f()
}

func disabled() bool { return os.Getenv("OTEL_SDK_DISABLED") == "true" }
