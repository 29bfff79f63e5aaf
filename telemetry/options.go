package telemetry

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/prometheus/client_golang/prometheus"
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
	logger           *slog.Logger
	globals          bool
}

const (
	// 16 384 spans are a second of 5 000 messages with three spans each.
	defaultQueueSize = 16_384
	minQueueSize     = 1
	maxQueueSize     = 1 << 20
)

func defaultConfig() config {
	return config{
		serviceName: strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe"),
		ratio:       1,
		queueSize:   defaultQueueSize,
		registry:    prometheus.NewRegistry(),
		logger:      slog.Default(),
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
// collectors, too. The default is a registry that holds nothing else.
func WithRegistry(r *prometheus.Registry) Option {
	return option(func(c *config) { c.registry = r })
}

// WithLogger sets where failures of the export are reported, once a minute for
// each kind. The default is [slog.Default].
func WithLogger(l *slog.Logger) Option {
	return option(func(c *config) { c.logger = l })
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
	if n := os.Getenv("OTEL_BSP_MAX_QUEUE_SIZE"); n != "" {
		size, err := strconv.Atoi(n)
		if err != nil || size < minQueueSize || size > maxQueueSize {
			bad("OTEL_BSP_MAX_QUEUE_SIZE is %q, want %d to %d", n, minQueueSize, maxQueueSize)
		} else {
			c.queueSize = size
		}
	}
	if c.queueSize < minQueueSize || c.queueSize > maxQueueSize {
		bad("WithSpanQueueSize(%d): want %d to %d", c.queueSize, minQueueSize, maxQueueSize)
	}
	if c.registry == nil {
		bad("WithRegistry(nil): want a registry")
	}
	if c.logger == nil {
		bad("WithLogger(nil): use slog.New(slog.DiscardHandler) for silence")
	}
	return errors.Join(errs...)
}
