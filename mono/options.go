package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/metric"
	mnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	tnoop "go.opentelemetry.io/otel/trace/noop"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/telemetry/messaging"
)

// An Option configures an App. Options only record what was asked for; [New]
// checks the result as a whole, so their order never matters.
type Option interface{ apply(*config) }

type option func(*config)

func (f option) apply(c *config) { f(c) }

const (
	defaultStoreDir        = "data/nats"
	defaultShutdownTimeout = 30 * time.Second
	defaultPublishWindow   = 4096
	maxPublishWindow       = 1 << 16
)

type config struct {
	name            string
	natsURL         *string
	natsOptions     []nats.Option
	storeDir        *string
	embedded        *embedded.Config
	logger          *slog.Logger
	shutdownTimeout time.Duration
	pingInterval    time.Duration
	middleware      []Middleware
	events          []BaseEventDefinition
	publishWindow   int
	updateStreams   bool
	telemetry       messaging.Config
	deadLetters     *dlq.Config   // nil: none
	replayGrace     time.Duration // see oldReplayGrace
}

func defaultConfig() config {
	name := strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe")
	return config{
		name:            name,
		logger:          slog.New(warnings{slog.Default().Handler()}),
		shutdownTimeout: defaultShutdownTimeout,
		pingInterval:    defaultPingInterval,
		publishWindow:   defaultPublishWindow,
		telemetry:       messaging.Config{Version: version(), Sentinels: errorTypes},
		deadLetters:     &dlq.Config{},
		replayGrace:     oldReplayGrace,
	}
}

// warnings is the default logger's handler: what fails is seen by everyone,
// what goes well only by those who gave a logger.
type warnings struct{ slog.Handler }

func (h warnings) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn && h.Handler.Enabled(ctx, l)
}

func (h warnings) WithAttrs(as []slog.Attr) slog.Handler { return warnings{h.Handler.WithAttrs(as)} }

func (h warnings) WithGroup(name string) slog.Handler { return warnings{h.Handler.WithGroup(name)} }

// WithName sets the App's name, which the NATS connection and the embedded
// server carry. The default is the name of the executable.
func WithName(name string) Option {
	return option(func(c *config) { c.name = name })
}

// WithNATS connects to the NATS server or cluster at url, a comma-separated
// list, instead of starting an embedded server. opts are handed to nats.go
// after the App's own, so TLS, credentials, nkeys and every other setting work
// and win. Unless told otherwise the connection reconnects for ever; a server
// that is not there when the App starts fails the start, within its context,
// also with nats.RetryOnFailedConnect.
//
// It excludes [WithStoreDir] and [WithEmbedded].
func WithNATS(url string, opts ...nats.Option) Option {
	return option(func(c *config) { c.natsURL, c.natsOptions = &url, opts })
}

// WithStoreDir sets the folder in which the embedded server keeps its streams.
// The default is "data/nats" under the working directory. One process at a time
// can use a folder.
func WithStoreDir(dir string) Option {
	return option(func(c *config) { c.storeDir = &dir })
}

// WithEmbedded configures the embedded server beyond its folder: limits, sync
// to disk, and listening on a port for other processes, which needs
// authentication. Without it the server opens no port.
func WithEmbedded(cfg embedded.Config) Option {
	return option(func(c *config) { c.embedded = &cfg })
}

// WithLogger sets where the App reports changes of state and failures: started,
// lost, recovered, a handler's error, a dead letter. Payloads, header values
// and credentials are never logged. Failures of one consumer are reported at
// most once a second, with the number left out.
//
// The default is [slog.Default] as it is when New is called, from level Warn
// up. Give a logger to see the informational lines too, or
// slog.New(slog.DiscardHandler) to see none.
func WithLogger(l *slog.Logger) Option {
	return option(func(c *config) { c.logger = l })
}

// WithShutdownTimeout bounds the Stop that [App.Run] makes. The default is 30 s.
func WithShutdownTimeout(d time.Duration) Option {
	return option(func(c *config) { c.shutdownTimeout = d })
}

// WithPingInterval sets how often the App asks its server whether it is there, at
// least 10 ms. The default is 6 s. A link that is dead without a reset, as when a
// cable is pulled, is noticed after three intervals, or after two in which the
// server takes nothing of what is being written; at worst after both, 30 s by
// default. The App then connects again. [App.Health] says so, and fails earlier if
// its context does.
//
// nats.PingInterval, nats.MaxPingsOutstanding and nats.FlusherTimeout, given to
// [WithNATS], win. The connection to an embedded server has no link that could die.
func WithPingInterval(d time.Duration) Option {
	return option(func(c *config) { c.pingInterval = d })
}

// WithMiddleware adds middleware around handling and publishing. The first
// given is the outermost. It may be used several times.
func WithMiddleware(mw ...Middleware) Option {
	return option(func(c *config) { c.middleware = append(c.middleware, mw...) })
}

// WithEvents declares events that another process emits, so that modules of
// this App can consume them. Events of the App's own modules are declared by
// their EmitEvents.
func WithEvents(events ...BaseEventDefinition) Option {
	return option(func(c *config) { c.events = append(c.events, events...) })
}

// WithPublishWindow sets how many asynchronous durable publishes may wait for
// their acknowledgement at a time, from 1 to 65536. The default is 4096. A
// publish beyond it blocks until there is room or its context ends.
func WithPublishWindow(n int) Option {
	return option(func(c *config) { c.publishWindow = n })
}

// WithStreamUpdates lets Start change settings of streams that exist to those
// asked for, as far as the server allows it. By default a contradiction is an
// error, [ErrStreamConflict], and nothing is changed. Each change is logged.
func WithStreamUpdates() Option {
	return option(func(c *config) { c.updateStreams = true })
}

// WithTracerProvider sets where spans go: one for each publish, each message that
// a handler gets, and each settlement, of traces that are recorded. The default is
// OpenTelemetry's global provider; while none is set there, nothing is recorded, and
// trace context that arrives is passed on. Nil records nothing either.
func WithTracerProvider(p trace.TracerProvider) Option {
	if p == nil {
		p = tnoop.NewTracerProvider()
	}
	return option(func(c *config) { c.telemetry.TracerProvider = p })
}

// WithMeterProvider sets where metrics go; docs/metrics.md lists them. The
// default is OpenTelemetry's global provider. Nil records nothing.
func WithMeterProvider(p metric.MeterProvider) Option {
	if p == nil {
		p = mnoop.NewMeterProvider()
	}
	return option(func(c *config) { c.telemetry.MeterProvider = p })
}

// WithPropagator sets how trace context is written to and read from headers. The
// default is the W3C's: traceparent and tracestate. Baggage travels only as
// [WithTelemetry] allows, whatever the propagator. Nil is the default.
func WithPropagator(p propagation.TextMapPropagator) Option {
	return option(func(c *config) { c.telemetry.Propagator = p })
}

// WithTelemetry tunes what is recorded.
func WithTelemetry(s messaging.Settings) Option {
	return option(func(c *config) { c.telemetry.Settings = s })
}

// WithDeadLetters configures the dead-letter stream, where messages go that were
// given up. There is one by default, named "DLQ", for an App with durable
// consumers.
func WithDeadLetters(cfg dlq.Config) Option {
	return option(func(c *config) { c.deadLetters = &cfg })
}

// WithoutDeadLetters does without a dead-letter stream: messages that are given up
// are terminated in JetStream and gone, except for a line in the log and a count.
func WithoutDeadLetters() Option {
	return option(func(c *config) { c.deadLetters = nil })
}

// validate reports every problem at once, each naming the option to change.
func (c *config) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidConfig}, args...)...))
	}
	if c.name == "" || strings.ContainsAny(c.name, " \t\r\n") {
		bad("WithName(%q): want a name without spaces", c.name)
	}
	if c.natsURL != nil {
		if err := checkNATSURL(*c.natsURL); err != nil {
			bad("WithNATS: %w", err)
		}
		if c.storeDir != nil {
			bad("WithStoreDir: only the embedded server has a folder; remove it or WithNATS")
		}
		if c.embedded != nil {
			bad("WithEmbedded: no embedded server is started; remove it or WithNATS")
		}
	}
	if c.storeDir != nil && *c.storeDir == "" {
		bad("WithStoreDir(\"\"): want a folder; the default is %q", defaultStoreDir)
	}
	if c.embedded != nil {
		if c.storeDir != nil && c.embedded.StoreDir != "" {
			bad("WithStoreDir and WithEmbedded both name a folder: keep one")
		}
		if err := c.embedded.Validate(); err != nil {
			bad("WithEmbedded: %w", err)
		}
	}
	if c.logger == nil {
		bad("WithLogger(nil): use slog.New(slog.DiscardHandler) for silence")
	}
	if c.shutdownTimeout <= 0 {
		bad("WithShutdownTimeout(%v): want more than 0", c.shutdownTimeout)
	}
	if c.pingInterval < minPingInterval {
		bad("WithPingInterval(%v): want %v or more", c.pingInterval, minPingInterval)
	}
	if c.publishWindow < 1 || c.publishWindow > maxPublishWindow {
		bad("WithPublishWindow(%d): want 1 to %d", c.publishWindow, maxPublishWindow)
	}
	for i, mw := range c.middleware {
		if mw.Handle == nil && mw.Publish == nil {
			bad("WithMiddleware: number %d has neither Handle nor Publish", i+1)
		}
	}
	if err := c.telemetry.Settings.Validate(); err != nil {
		bad("WithTelemetry: %w", err)
	}
	if c.deadLetters != nil {
		if err := c.deadLetters.Validate(); err != nil {
			bad("WithDeadLetters: %w", err)
		}
	}
	for _, e := range c.events {
		if err := e.validate(); err != nil {
			bad("WithEvents: %w", err)
		}
	}
	return errors.Join(errs...)
}

func checkNATSURL(list string) error {
	if strings.TrimSpace(list) == "" {
		return errors.New("empty URL; want one such as \"nats://localhost:4222\"")
	}
	for i, s := range strings.Split(list, ",") {
		s = strings.TrimSpace(s)
		if !strings.Contains(s, "://") {
			s = "nats://" + s
		}
		// The parser's error repeats the URL, password and all. What is taken for a
		// path may be the end of one.
		u, err := url.Parse(s)
		if err != nil || u.Host == "" || strings.Contains(u.Path+u.RawQuery+u.Fragment, "@") {
			return fmt.Errorf("URL %d of the list is malformed; want one such as \"nats://localhost:4222\"", i+1)
		}
	}
	return nil
}

// embeddedConfig is the embedded server's configuration with defaults applied.
func (c *config) embeddedConfig() embedded.Config {
	var e embedded.Config
	if c.embedded != nil {
		e = *c.embedded
	}
	if c.storeDir != nil {
		e.StoreDir = *c.storeDir
	}
	if e.StoreDir == "" {
		e.StoreDir = defaultStoreDir
	}
	if e.Name == "" {
		e.Name = c.name
	}
	return e
}
