package messaging

import (
	"context"
	"encoding/hex"
	"reflect"
	"slices"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Nearly all messages carry the W3C's traceparent and no other header of a trace. It
// is read and written here, in a fraction of the time of a propagator, which looks
// for keys in any case and copies the header. What is different in any way is for the
// propagator: these functions only do what it would.

// isW3C reports whether a propagator is the W3C's trace context, alone or with the
// W3C's baggage, which we read and write ourselves.
func isW3C(p propagation.TextMapPropagator) bool {
	tc, b := propagation.TraceContext{}, propagation.Baggage{}
	return slices.ContainsFunc([]propagation.TextMapPropagator{
		tc, propagation.NewCompositeTextMapPropagator(tc), propagation.NewCompositeTextMapPropagator(tc, b),
		propagation.NewCompositeTextMapPropagator(b, tc),
	}, func(w propagation.TextMapPropagator) bool { return reflect.DeepEqual(w, p) })
}

const (
	traceparentSize = len("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	traceIDAt       = len("00-")
	spanIDAt        = traceIDAt + 2*len(trace.TraceID{}) + 1
	flagsAt         = spanIDAt + 2*len(trace.SpanID{}) + 1
)

// onlyTraceparent returns the span context of a header that is a traceparent and
// nothing else.
func onlyTraceparent(h nats.Header) (sc trace.SpanContext, ok bool) {
	values := h[traceparent]
	if len(h) != 1 || len(values) != 1 || len(values[0]) != traceparentSize {
		return sc, false
	}
	v := values[0]
	var cfg trace.SpanContextConfig
	var flags [1]byte
	if v[:traceIDAt] != "00-" || v[spanIDAt-1] != '-' || v[flagsAt-1] != '-' ||
		!unhex(cfg.TraceID[:], v[traceIDAt:]) || !unhex(cfg.SpanID[:], v[spanIDAt:]) || !unhex(flags[:], v[flagsAt:]) ||
		flags[0]&^byte(knownFlags) != 0 {
		return sc, false
	}
	cfg.TraceFlags, cfg.Remote = trace.TraceFlags(flags[0]), true
	sc = trace.NewSpanContext(cfg)
	return sc, sc.IsValid()
}

const knownFlags = trace.FlagsSampled | trace.FlagsRandom

// unhex reads lower-case digits into all of dst.
func unhex(dst []byte, s string) bool {
	s = s[:2*len(dst)]
	bad := byte(0)
	for i := range dst {
		high, low := hexValues[s[2*i]], hexValues[s[2*i+1]]
		bad |= high | low
		dst[i] = high<<4 | low
	}
	return bad < notHex
}

const notHex = 0x10

// hexValues are those of the lower-case digits, and notHex for everything else.
var hexValues = func() (values [256]byte) {
	for c := range values {
		values[c] = notHex
		if i := strings.IndexByte("0123456789abcdef", byte(c)); i >= 0 {
			values[c] = byte(i)
		}
	}
	return values
}()

// newTraceparent returns the traceparent of a context whose trace is all that
// travels.
func newTraceparent(ctx context.Context) (v string, ok bool) {
	sc := trace.SpanContextFromContext(ctx)
	if !sc.IsValid() || sc.TraceState().Len() > 0 || baggage.FromContext(ctx).Len() > 0 {
		return "", false
	}
	return formatTraceparent(sc), true
}

// A traceHeader is a header that is a traceparent and nothing else. A publish has it
// until it has ended well, which says that the header was written; then another one
// does.
type traceHeader struct {
	header nats.Header
	value  [1]string
}

var traceHeaders = sync.Pool{New: func() any {
	h := new(traceHeader)
	h.header = nats.Header{traceparent: h.value[:]}
	return h
}}

// formatTraceparent writes a traceparent.
func formatTraceparent(sc trace.SpanContext) string {
	traceID, spanID, flags := sc.TraceID(), sc.SpanID(), [1]byte{byte(sc.TraceFlags() & knownFlags)}
	var b [traceparentSize]byte
	copy(b[:], "00-")
	hex.Encode(b[traceIDAt:], traceID[:])
	b[spanIDAt-1] = '-'
	hex.Encode(b[spanIDAt:], spanID[:])
	b[flagsAt-1] = '-'
	hex.Encode(b[flagsAt:], flags[:])
	return string(b[:])
}
