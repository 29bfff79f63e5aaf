package telemetry

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/contrib/propagators/autoprop"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

// ErrInvalidConfig reports an option or an environment variable that cannot work.
var ErrInvalidConfig = errors.New("invalid configuration")

// An Option configures [Setup]. Options only record what was asked for; Setup
// checks the result as a whole, so their order never matters.
type Option interface{ apply(*config) }

type option func(*config)

func (f option) apply(c *config) { f(c) }

type config struct {
	serviceName      string
	serviceVersion   string
	ratio            float64
	exporter         *sdktrace.SpanExporter // nil: the environment's
	queueSize        int
	nativeHistograms bool
	registry         *prometheus.Registry
	logger           func() *slog.Logger
	globals          bool

	// Made by validate, of the above and the environment.
	sampler    sdktrace.Sampler
	propagator propagation.TextMapPropagator
	batchSize  int
}

const (
	// 16 384 spans are a second of 5 000 messages with three spans each.
	defaultQueueSize = 16_384
	minQueueSize     = 1
	maxQueueSize     = 1 << 20
	defaultBatchSize = 512
)

func defaultConfig() config {
	return config{
		serviceName: strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe"),
		ratio:       1,
		queueSize:   defaultQueueSize,
		registry:    prometheus.NewRegistry(),
		logger:      slog.Default, // as it is when something is to be said
		globals:     true,
	}
}

// WithServiceName sets the program's name in traces and logs, unless
// OTEL_SERVICE_NAME or OTEL_RESOURCE_ATTRIBUTES does. The default is the name of
// the executable.
func WithServiceName(name string) Option {
	return option(func(c *config) { c.serviceName = name })
}

// WithServiceVersion sets the program's version, unless OTEL_RESOURCE_ATTRIBUTES
// does. By default there is none.
func WithServiceVersion(version string) Option {
	return option(func(c *config) { c.serviceVersion = version })
}

// WithSampleRatio sets the part of traces that are recorded, from 0 to 1; the
// default is 1. [NewSampler] says which traces are recorded besides.
// OTEL_TRACES_SAMPLER and OTEL_TRACES_SAMPLER_ARG win: whoever runs the program
// decides.
func WithSampleRatio(ratio float64) Option {
	return option(func(c *config) { c.ratio = ratio })
}

// WithSpanExporter sends spans to e instead of where the environment says; nil
// sends none. Shutdown shuts it down.
func WithSpanExporter(e sdktrace.SpanExporter) Option {
	return option(func(c *config) { c.exporter = &e })
}

// WithSpanQueueSize sets how many ended spans may wait to be exported, from 1 to
// 1 048 576; beyond it they are dropped and counted. The default is 16 384.
// OTEL_BSP_MAX_QUEUE_SIZE wins.
func WithSpanQueueSize(n int) Option {
	return option(func(c *config) { c.queueSize = n })
}

// WithNativeHistograms records histograms as Prometheus's native ones, with a
// resolution of their own instead of fixed buckets. Prometheus has to scrape
// protobuf for them, with its feature native-histograms. Dashboards that read
// fixed buckets find none.
func WithNativeHistograms() Option {
	return option(func(c *config) { c.nativeHistograms = true })
}

// WithRegistry registers the metrics with r, which then serves the program's own
// collectors, too. The default is a registry that holds nothing else. A registry
// is for one Telemetry at a time: two would report the same series.
func WithRegistry(r *prometheus.Registry) Option {
	return option(func(c *config) { c.registry = r })
}

// WithLogger sets where it is reported that spans cannot be exported or metrics
// not collected, in one line a minute at most, and what else OpenTelemetry has to
// complain about, in another one, unless [WithoutGlobals] leaves that to others.
// The default is [slog.Default].
func WithLogger(l *slog.Logger) Option {
	return option(func(c *config) { c.logger = func() *slog.Logger { return l } })
}

// WithoutGlobals leaves OpenTelemetry's global set-up alone: pass the providers
// to who is to use them.
func WithoutGlobals() Option {
	return option(func(c *config) { c.globals = false })
}

// validate reports every problem at once, each naming the option to change.
func (c *config) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidConfig}, args...)...))
	}
	if c.serviceName == "" {
		bad("WithServiceName(\"\"): want a name")
	}
	if !(c.ratio >= 0 && c.ratio <= 1) { // also what is not a number
		bad("WithSampleRatio(%v): want 0 to 1", c.ratio)
	}
	if c.queueSize < minQueueSize || c.queueSize > maxQueueSize {
		bad("WithSpanQueueSize(%d): want %d to %d", c.queueSize, minQueueSize, maxQueueSize)
	}
	if c.registry == nil {
		bad("WithRegistry(nil): want a registry")
	}
	if c.logger() == nil {
		bad("WithLogger(nil): use slog.New(slog.DiscardHandler) for silence")
	}
	return errors.Join(append(errs, c.readEnv())...)
}

// readEnv reads what OpenTelemetry's exporters do not read by themselves.
func (c *config) readEnv() error {
	var errs []error
	number := func(name string, most int, to *int) {
		v := os.Getenv(name)
		if v == "" {
			return
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < 1 || n > most {
			errs = append(errs, fmt.Errorf("%w: %s is %q, want 1 to %d", ErrInvalidConfig, name, v, most))
			return
		}
		*to = n
	}
	c.batchSize = defaultBatchSize
	if !disabled() {
		number("OTEL_BSP_MAX_QUEUE_SIZE", maxQueueSize, &c.queueSize)
		number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", maxQueueSize, &c.batchSize)
		var err error
		c.sampler, err = samplerFromEnv(c.ratio)
		errs = append(errs, err)
	}
	// A batch is sent when it is full, or after a while: it must fit.
	const part = 2
	c.batchSize = min(c.batchSize, max(c.queueSize/part, 1))

	errs = append(errs, checkOTLP())

	names := []string{"tracecontext", "baggage"}
	if v := os.Getenv("OTEL_PROPAGATORS"); v != "" {
		names = strings.Split(v, ",")
		for i := range names {
			names[i] = strings.TrimSpace(names[i])
		}
	}
	p, err := autoprop.TextMapPropagator(names...)
	if err != nil {
		errs = append(errs, fmt.Errorf("%w: OTEL_PROPAGATORS: %w", ErrInvalidConfig, err))
	}
	c.propagator = p
	return errors.Join(errs...)
}

// checkOTLP looks at the variables that may have a password in them before
// OpenTelemetry does: it prints what it cannot parse.
func checkOTLP() error {
	if disabled() {
		return nil
	}
	var errs []error
	bad := func(name, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: %s: "+format, append([]any{ErrInvalidConfig, name}, args...)...))
	}
	for _, signal := range []string{"", "TRACES_", "METRICS_", "LOGS_"} {
		name := "OTEL_EXPORTER_OTLP_" + signal + "ENDPOINT"
		u, err := url.Parse(strings.TrimSpace(os.Getenv(name)))
		if err != nil || strings.Contains(u.Opaque+u.Path+u.RawQuery+u.Fragment, "@") {
			bad(name, "malformed URL, want one such as http://host:4318; special characters of a password are written as %%XX")
		}
		name = "OTEL_EXPORTER_OTLP_" + signal + "HEADERS"
		for i, header := range strings.Split(os.Getenv(name), ",") {
			if strings.TrimSpace(header) == "" {
				continue
			}
			key, value, ok := strings.Cut(header, "=")
			if _, err := url.PathUnescape(value); err != nil || !ok || !headerName.MatchString(strings.TrimSpace(key)) {
				bad(name, "entry %d is no key=value; special characters are written as %%XX", i+1)
			}
		}
	}
	return errors.Join(errs...)
}

var headerName = regexp.MustCompile("^[a-zA-Z0-9!#$%&'*+.^_`|~-]+$")
