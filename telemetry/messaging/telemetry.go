package messaging

import (
	"context"
	"errors"
	"fmt"
	"net"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// SettleSpans says which settlements get a span of their own, below that of the
// message. Metrics count all of them whatever it is.
type SettleSpans uint8

const (
	// SettleSpansAll makes a span for each ack, nak and term.
	SettleSpansAll SettleSpans = iota
	// SettleSpansFailures makes one for each nak and term.
	SettleSpansFailures
	// SettleSpansNone makes none.
	SettleSpansNone
)

// Settings tune what is recorded. The zero value is the default.
type Settings struct {
	// FreshFor is how old a message may be, since it was stored, for its first
	// delivery to go on in the trace of its publish. An older one begins a trace
	// of its own, with a link: a trace that lasts for hours is of no use. 0 means
	// 5 min; a negative value continues none. Core messages are always fresh.
	FreshFor time.Duration

	// SettleSpans is which settlements get a span; by default all. They cost
	// nothing in a trace that is not sampled.
	SettleSpans SettleSpans

	// Baggage lists the keys of baggage members that messages carry. Without it
	// they carry none, whatever the propagator: baggage often holds what is not
	// meant for every reader of a stream. Above 1 KiB none is sent.
	Baggage []string

	// OmitUnsampledCore leaves the trace context of unsampled traces out of core
	// messages. A core message without any header is several times cheaper, and
	// what it causes then begins a trace of its own, which is sampled by itself.
	OmitUnsampledCore bool

	// BodySize adds messaging.message.body.size, in bytes, to the spans of
	// publishing and processing.
	BodySize bool
}

const (
	defaultFreshFor = 5 * time.Minute
	maxBaggage      = 1 << 10 // bytes
)

// Validate reports every problem at once, each naming the field to change.
func (s Settings) Validate() error {
	var errs []error
	if s.SettleSpans > SettleSpansNone {
		errs = append(errs, fmt.Errorf("field SettleSpans is %d, want one of the constants", s.SettleSpans))
	}
	for _, k := range s.Baggage {
		if k == "" || strings.ContainsAny(k, " ,;=\t\r\n") {
			errs = append(errs, fmt.Errorf("field Baggage: %q is not a key", k))
		}
	}
	return errors.Join(errs...)
}

// A Config says where spans and metrics go.
type Config struct {
	TracerProvider trace.TracerProvider          // nil: OpenTelemetry's global one
	MeterProvider  metric.MeterProvider          // nil: OpenTelemetry's global one
	Propagator     propagation.TextMapPropagator // nil: OpenTelemetry's global one; while that is not set, the W3C's trace context
	Settings       Settings
	Version        string     // of the instrumentation
	Sentinels      []Sentinel // error types of errors to be found with errors.Is
}

// Telemetry records spans and metrics of one App. It is safe for concurrent use.
type Telemetry struct {
	tracers     tracers
	propagator  propagation.TextMapPropagator
	w3c         bool     // it is isW3C
	fields      []string // the header keys of the propagator that say that there is a trace
	written     []string // and all that it may write
	settings    Settings
	freshFor    time.Duration
	instruments instruments
	errors      *errorTypes
	attempts    attempts
	server      atomic.Pointer[server]
	collected   chan struct{}
	deadLetters atomic.Pointer[[]openDeadLetters]

	mu         sync.RWMutex
	publishers map[string]*Publisher
	consumers  map[Route]*Consumer
	replays    map[Route]*replayCount // that were sent
	reasons    map[string][]attribute.KeyValue
}

// New returns Telemetry. Its error is that of the MeterProvider, which could not
// make an instrument.
func New(cfg Config) (t *Telemetry, err error) {
	defer func() {
		if v := recover(); v != nil {
			t, err = nil, fmt.Errorf("set up telemetry: a provider panicked: %v", v)
		}
	}()
	t = &Telemetry{
		propagator: cfg.Propagator,
		settings:   cfg.Settings,
		freshFor:   cfg.Settings.FreshFor,
		errors:     newErrorTypes(cfg.Sentinels),
		collected:  make(chan struct{}, 1),
		publishers: make(map[string]*Publisher),
		consumers:  make(map[Route]*Consumer),
		replays:    make(map[Route]*replayCount),
		reasons:    make(map[string][]attribute.KeyValue),
	}
	if t.freshFor == 0 {
		t.freshFor = defaultFreshFor
	}
	if t.propagator == nil {
		t.propagator = otel.GetTextMapPropagator()
		if len(t.propagator.Fields()) == 0 { // nobody has set it
			t.propagator = propagation.TraceContext{}
		}
	}
	t.w3c = isW3C(t.propagator)
	t.written = slices.DeleteFunc(slices.Clone(t.propagator.Fields()), func(f string) bool { return f == baggageKey })
	t.fields = slices.DeleteFunc(slices.Clone(t.written), func(f string) bool { return f == tracestate })
	t.tracers.init(cfg.TracerProvider, cfg.Version)
	mp := cfg.MeterProvider
	if mp == nil {
		mp = otel.GetMeterProvider()
	}
	if err := t.instruments.make(mp.Meter(ScopeName, metric.WithInstrumentationVersion(cfg.Version)), t.observe); err != nil {
		return nil, fmt.Errorf("set up telemetry: %w", err)
	}
	return t, nil
}

// tracers finds the tracer, or that there is none.
type tracers struct {
	version     string
	fixed       *tracer                // nil: there is none, or not yet
	placeholder trace.TracerProvider   // the global provider, while nobody has set one
	late        atomic.Pointer[tracer] // of the global provider that was set after New
}

type tracer struct {
	trace.Tracer

	copies  bool // its spans copy the attributes they are given, as those of the SDK do
	follows bool // it is of a ParentFollower
}

// A ParentFollower is a TracerProvider that records nothing below a span that is
// not sampled, except deliveries after the first, dead letters and replays, which it
// knows by the attributes that they begin with.
//
// Spans that it would not record are not made: what is published and handled below
// an unsampled span has that one's context. The others, but for the exceptions, get
// their attributes when they end. The provider of package telemetry is one.
type ParentFollower interface {
	trace.TracerProvider

	// FollowsParent reports whether the provider, as it is set up, does that. It
	// is asked once.
	FollowsParent() bool
}

// drops reports whether the tracer records nothing below parent.
func (t *tracer) drops(parent trace.SpanContext) bool {
	return t.follows && parent.IsValid() && !parent.IsSampled()
}

// isOf reports whether v's type is of an OpenTelemetry package.
func isOf(v any, pkg string) bool {
	t := reflect.TypeOf(v)
	return t != nil && t.Kind() == reflect.Pointer && t.Elem().PkgPath() == pkg
}

func (ts *tracers) init(tp trace.TracerProvider, version string) {
	ts.version = version
	if tp == nil {
		tp = otel.GetTracerProvider()
		if isOf(tp, "go.opentelemetry.io/otel/internal/global") {
			// It hands on what it gets once a provider is set, at twice the cost of
			// doing nothing.
			ts.placeholder = tp
			return
		}
	}
	if _, off := tp.(noop.TracerProvider); !off {
		ts.fixed = ts.of(tp)
	}
}

func (ts *tracers) of(tp trace.TracerProvider) *tracer {
	t := tp.Tracer(ScopeName, trace.WithInstrumentationVersion(ts.version))
	f, ok := tp.(ParentFollower)
	return &tracer{Tracer: t, copies: isOf(t, "go.opentelemetry.io/otel/sdk/trace"), follows: ok && f.FollowsParent()}
}

// get returns the tracer, or nil if spans go nowhere.
func (ts *tracers) get() *tracer {
	if ts.placeholder == nil {
		return ts.fixed
	}
	if late := ts.late.Load(); late != nil {
		return late
	}
	tp := otel.GetTracerProvider()
	if tp == ts.placeholder {
		return nil
	}
	late := ts.of(tp)
	ts.late.Store(late)
	return late
}

// contain is deferred around every call of a provider, a propagator and what
// hangs on them: a panic there costs a span or a count, and nothing else.
func contain() {
	if v := recover(); v != nil {
		defer func() { _ = recover() }() // the error handler may be at fault itself
		otel.Handle(fmt.Errorf("messaging telemetry: a hook panicked: %v", v))
	}
}

// noSpan takes the place of a span that could not be made.
var noSpan trace.Span = noop.Span{}

// Bare returns ctx without span and baggage. What is handled later does not
// belong to whatever was going on when ctx was made.
func Bare(ctx context.Context) context.Context {
	if trace.SpanContextFromContext(ctx).IsValid() || trace.SpanFromContext(ctx).IsRecording() {
		ctx = trace.ContextWithSpan(ctx, noSpan)
	}
	if baggage.FromContext(ctx).Len() > 0 {
		ctx = baggage.ContextWithoutBaggage(ctx)
	}
	return ctx
}

// Limits are what the server that a connection leads to takes. A *nats.Conn has
// them.
type Limits interface {
	MaxPayload() int64 // of header and body together, in bytes
	HeadersSupported() bool
}

// A server is what is known of where the connection leads to.
type server struct {
	attrs  []attribute.KeyValue
	limits Limits
}

// SetServer says which server the connection leads to, as host:port, and what it
// takes. What is no such address, as of an in-process connection, counts as none.
// Without limits everything is taken.
func (t *Telemetry) SetServer(address string, limits Limits) {
	s := &server{limits: limits}
	if host, port, err := net.SplitHostPort(address); err == nil {
		s.attrs = append(s.attrs, keyServerAddress.String(clean(host, maxAttribute)))
		if n, err := strconv.Atoi(port); err == nil {
			s.attrs = append(s.attrs, keyServerPort.Int(n))
		}
	}
	t.server.Store(s)
}

// takes reports whether the server takes a message with this header.
func (t *Telemetry) takes(h nats.Header, size int) bool {
	s := t.server.Load()
	if s == nil || s.limits == nil {
		return true
	}
	if !s.limits.HeadersSupported() {
		return false
	}
	for k, vs := range h { // as nats.go writes it
		for _, v := range vs {
			size += len(k) + len(": ") + len(v) + len("\r\n")
		}
	}
	return int64(size+len("NATS/1.0\r\n\r\n")) <= s.limits.MaxPayload()
}

// maxAttribute bounds attribute values from the wire, in bytes.
const maxAttribute = 1024

// withServer adds the server's attributes.
func (t *Telemetry) withServer(attrs []attribute.KeyValue) []attribute.KeyValue {
	if s := t.server.Load(); s != nil {
		attrs = append(attrs, s.attrs...)
	}
	return attrs
}

// Attributes are collected in slices that are used again where spans copy them.
var attrSlices = sync.Pool{New: func() any {
	const most = 16
	s := make([]attribute.KeyValue, 0, most)
	return &s
}}

func takeAttrs() *[]attribute.KeyValue { return attrSlices.Get().(*[]attribute.KeyValue) } //nolint:forcetypeassert // see New

func (t *Telemetry) giveAttrs(s *[]attribute.KeyValue) {
	if tracer := t.tracers.get(); tracer == nil || !tracer.copies {
		return
	}
	clear(*s)
	*s = (*s)[:0]
	attrSlices.Put(s)
}

// inject returns a copy of h with ctx's trace context, or h itself if there is
// nothing to add.
func (t *Telemetry) inject(ctx context.Context, h nats.Header) nats.Header {
	if t.w3c && len(h) == 0 {
		if v, ok := newTraceparent(ctx); ok {
			return nats.Header{traceparent: {v}}
		}
	}
	const keys = 2
	c := Carrier(h).clone(keys)
	for _, k := range t.written { // such as a tracestate beside a traceparent that is malformed
		c.Delete(k)
	}
	if b := baggage.FromContext(ctx); b.Len() > 0 {
		ctx = baggage.ContextWithoutBaggage(ctx)
		if b = t.allowed(b); b.Len() > 0 {
			c.Set(baggageKey, b.String())
		}
	}
	t.propagator.Inject(ctx, c)
	return nats.Header(c)
}

// allowed returns the members of b that may travel.
func (t *Telemetry) allowed(b baggage.Baggage) baggage.Baggage {
	var out baggage.Baggage
	for _, k := range t.settings.Baggage {
		if m := b.Member(k); m.Key() != "" {
			if next, err := out.SetMember(m); err == nil {
				out = next
			}
		}
	}
	if len(out.String()) > maxBaggage {
		return baggage.Baggage{}
	}
	return out
}

// extract reads the trace context of a message.
func (t *Telemetry) extract(ctx context.Context, h nats.Header) (out context.Context, sc trace.SpanContext, state contextState) {
	if len(h) == 0 {
		return ctx, sc, stateAbsent
	}
	if t.w3c {
		if sc, ok := onlyTraceparent(h); ok {
			return trace.ContextWithRemoteSpanContext(ctx, sc), sc, stateContinued
		}
	}
	traced := Carrier(h).has(t.fields)
	if !traced && (len(t.settings.Baggage) == 0 || len(Carrier(h).Values(baggageKey)) == 0) {
		return ctx, sc, stateAbsent
	}
	out = t.propagator.Extract(ctx, withoutBaggage{Carrier(h)})
	if out == nil {
		out = ctx
	}
	out = t.extractBaggage(out, h)
	sc = trace.SpanContextFromContext(out)
	switch {
	case sc.IsValid():
		return out, sc, stateContinued
	case traced:
		return out, sc, stateMalformed
	}
	return out, sc, stateAbsent
}

// extractBaggage reads the allowed members. The propagator's own way would log
// what it cannot read, and whoever may publish decides what that is.
func (t *Telemetry) extractBaggage(ctx context.Context, h nats.Header) context.Context {
	if baggage.FromContext(ctx).Len() > 0 { // of a propagator with keys of its own for it
		ctx = baggage.ContextWithBaggage(ctx, t.allowed(baggage.FromContext(ctx)))
	}
	if len(t.settings.Baggage) == 0 {
		return ctx
	}
	raw := Carrier(h).Get(baggageKey)
	if raw == "" || len(raw) > maxBaggage {
		return ctx
	}
	b, err := baggage.Parse(raw)
	if err != nil {
		return ctx
	}
	if b = t.allowed(b); b.Len() > 0 {
		ctx = baggage.ContextWithBaggage(ctx, b)
	}
	return ctx
}

// A contextState is what is known of a message's trace context.
type contextState uint8

const (
	stateContinued contextState = iota
	stateLinked
	stateAbsent
	stateMalformed
	stateDropped  // of a publish
	contextStates = iota
)

var contextStateNames = [contextStates]string{"continued", "linked", "absent", "malformed", "dropped"}
