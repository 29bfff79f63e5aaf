package telemetry_test

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/telemetry"
	"github.com/monotel/monotel/telemetry/messaging"
)

func parentOf(sampled bool) trace.SpanContext {
	ts, err := trace.ParseTraceState("vendor=1")
	if err != nil {
		panic(err)
	}
	sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceState: ts})
	if sampled {
		sc = sc.WithTraceFlags(trace.FlagsSampled)
	}
	return sc
}

func TestNewSampler(t *testing.T) {
	t.Parallel()
	op := func(v string) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.String("messaging.operation.name", v)}
	}
	attempt := func(n int64) []attribute.KeyValue {
		return []attribute.KeyValue{attribute.Int64("messaging.nats.delivery_count", n)}
	}
	yes, no := parentOf(true), parentOf(false)
	for _, tt := range []struct {
		name   string
		ratio  float64
		parent trace.SpanContext
		links  []trace.SpanContext
		attrs  []attribute.KeyValue
		want   bool
	}{
		{name: "root at 0", ratio: 0},
		{name: "root at 1", ratio: 1, want: true},
		{name: "parent is sampled", ratio: 0, parent: yes, want: true},
		{name: "parent is not sampled", ratio: 1, parent: no},
		{name: "root with a sampled link", ratio: 0, links: []trace.SpanContext{no, yes}, want: true},
		{name: "root with an unsampled link", ratio: 0, links: []trace.SpanContext{no}},
		{name: "a link does not outvote the parent", ratio: 0, parent: no, links: []trace.SpanContext{yes}},
		{name: "first attempt", ratio: 0, attrs: attempt(1)},
		{name: "second attempt", ratio: 0, attrs: attempt(2), want: true},
		{name: "dead letter in an unsampled trace", ratio: 0, parent: no, attrs: op("dead_letter"), want: true},
		{name: "replay", ratio: 0, attrs: op("replay"), want: true},
		{name: "publish in an unsampled trace", ratio: 0, parent: no, attrs: op("publish")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			p := sdktrace.SamplingParameters{ParentContext: t.Context(), TraceID: trace.TraceID{0xff, 15: 0xff}, Attributes: tt.attrs}
			if tt.parent.IsValid() {
				p.ParentContext = trace.ContextWithSpanContext(t.Context(), tt.parent)
			}
			for _, l := range tt.links {
				p.Links = append(p.Links, trace.Link{SpanContext: l})
			}
			got := telemetry.NewSampler(tt.ratio).ShouldSample(p)
			if sampled := got.Decision == sdktrace.RecordAndSample; sampled != tt.want {
				t.Errorf("sampled is %v, want %v", sampled, tt.want)
			}
			if tt.parent.IsValid() && got.Tracestate.String() != "vendor=1" {
				t.Errorf("tracestate is %q", got.Tracestate)
			}
		})
	}
}

// Whoever runs the program decides what is sampled, and still sees what fails,
// unless tracing is off.
func TestSampler_environment(t *testing.T) {
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	for _, tt := range []struct {
		sampler, arg         string
		ratio                float64
		root                 bool
		child, orphan, retry bool // of a sampled parent, of one that is not, and a second attempt
	}{
		{"", "", 1, true, true, false, true},
		{"", "", 0, false, true, false, true},
		{"always_on", "", 0, true, true, true, true},
		{"parentbased_always_on", "", 0, true, true, false, true},
		{"always_off", "", 1, false, false, false, false},
		{"parentbased_always_off", "", 1, false, true, false, false},
		{"traceidratio", "0", 1, false, false, false, true},
		{"traceidratio", "1", 0, true, true, true, true},
		{"parentbased_traceidratio", "1", 0, true, true, false, true},
		{"parentbased_traceidratio", "0", 1, false, true, false, true},
		{"ParentBased_TraceIDRatio ", "", 0, true, true, false, true},
	} {
		t.Run(tt.sampler+" "+tt.arg, func(t *testing.T) {
			t.Setenv("OTEL_TRACES_SAMPLER", tt.sampler)
			t.Setenv("OTEL_TRACES_SAMPLER_ARG", tt.arg)
			tel := setup(t, telemetry.WithSampleRatio(tt.ratio), telemetry.WithSpanExporter(fakeExporter{}))
			follows := tt.child && !tt.orphan && tt.retry
			if p := tel.TracerProvider().(messaging.ParentFollower); p.FollowsParent() != follows {
				t.Errorf("it says that it follows the parent: %v, want %v", !follows, follows)
			}
			sampled := func(ctx context.Context, opts ...trace.SpanStartOption) bool {
				_, s := tel.TracerProvider().Tracer("test").Start(ctx, "span", opts...)
				defer s.End()
				return s.SpanContext().IsSampled()
			}
			if got := sampled(t.Context()); got != tt.root {
				t.Errorf("a root: sampled is %v", got)
			}
			if got := sampled(trace.ContextWithRemoteSpanContext(t.Context(), parentOf(true))); got != tt.child {
				t.Errorf("a child of a sampled span: sampled is %v", got)
			}
			if got := sampled(trace.ContextWithRemoteSpanContext(t.Context(), parentOf(false))); got != tt.orphan {
				t.Errorf("a child of an unsampled span: sampled is %v", got)
			}
			if got := sampled(t.Context(), trace.WithAttributes(attribute.Int("messaging.nats.delivery_count", 2))); got != tt.retry {
				t.Errorf("a retry: sampled is %v", got)
			}
		})
	}
}

func BenchmarkSampler(b *testing.B) {
	s := telemetry.NewSampler(0.01)
	p := sdktrace.SamplingParameters{
		ParentContext: b.Context(), TraceID: trace.TraceID{0xff, 15: 0xff},
		Attributes: []attribute.KeyValue{
			attribute.String("messaging.operation.name", "process"), attribute.String("messaging.operation.type", "process"),
			attribute.String("messaging.destination.template", "events.shop.v1.order-placed"),
		},
	}
	b.ReportAllocs()
	for b.Loop() {
		s.ShouldSample(p)
	}
}
