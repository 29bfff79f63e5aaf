package messaging

import (
	"context"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/contrib/propagators/autoprop"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// Whatever is read by the short way reads the same by the propagator, and what that
// writes is written the same.
func FuzzOnlyTraceparent(f *testing.F) {
	for _, v := range []string{
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-03",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-04",
		"01-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
		"00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
		"00-00000000000000000000000000000000-00f067aa0ba902b7-01",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-0g",
		"00-4bf92f3577b34da6a3ce929d0e0e4736_00f067aa0ba902b7-01",
		"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-",
		"",
	} {
		f.Add(v)
	}
	f.Fuzz(func(t *testing.T, v string) {
		h := nats.Header{traceparent: {v}}
		want := trace.SpanContextFromContext(propagation.TraceContext{}.Extract(context.Background(), Carrier(h)))
		got, ok := onlyTraceparent(h)
		if ok != want.IsValid() && len(v) == traceparentSize && v[:2] == "00" || ok && !got.Equal(want) {
			t.Fatalf("%q is %v, %v, want %v", v, got, ok, want)
		}
		if !ok {
			return
		}
		ctx := trace.ContextWithSpanContext(context.Background(), got)
		propagated := nats.Header{}
		propagation.TraceContext{}.Inject(ctx, Carrier(propagated))
		if written, ok := newTraceparent(ctx); !ok || !cmp.Equal(nats.Header{traceparent: {written}}, propagated) {
			t.Errorf("%q is written %q, want %v", v, written, propagated)
		}
	})
}

// The propagators of nearly all programs are known; one that does more is not.
func TestIsW3C(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		p    propagation.TextMapPropagator
		want bool
	}{
		{propagation.TraceContext{}, true},
		{propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{}), true},
		{autoprop.NewTextMapPropagator(), true},
		{propagation.NewCompositeTextMapPropagator(), false},
		{propagation.Baggage{}, false},
		{struct{ propagation.TraceContext }{}, false},
	} {
		if got := isW3C(tt.p); got != tt.want {
			t.Errorf("%T %v: %v, want %v", tt.p, tt.p, got, tt.want)
		}
	}
}

// Whatever comes with a traceparent is for the propagator.
func TestOnlyTraceparent_others(t *testing.T) {
	t.Parallel()
	const v = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
	for _, h := range []nats.Header{
		nil,
		{},
		{"Traceparent": {v}},
		{traceparent: nil},
		{traceparent: {v, v}},
		{traceparent: {v}, tracestate: {"a=1"}},
		{traceparent: {v}, "Tracestate": {"a=1"}},
		{traceparent: {v}, baggageKey: {"a=1"}},
	} {
		if sc, ok := onlyTraceparent(h); ok {
			t.Errorf("%v is read as %v", h, sc)
		}
	}
	state, err := trace.ParseTraceState("a=1")
	if err != nil {
		t.Fatal(err)
	}
	sc, _ := onlyTraceparent(nats.Header{traceparent: {v}})
	if v, ok := newTraceparent(trace.ContextWithSpanContext(t.Context(), sc.WithTraceState(state))); ok {
		t.Errorf("a trace state is left out: %v", v)
	}
}
