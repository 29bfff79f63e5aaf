package messaging

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

const (
	testTraceID = "0af7651916cd43dd8448eb211c80319c"
	testSpanID  = "b7ad6b7169203331"
	testParent  = "00-" + testTraceID + "-" + testSpanID + "-01"
	otherParent = "00-" + testTraceID + "-00f067aa0ba902b7-01"
)

// Headers as clients in other languages, proxies and older servers write them.
func TestCarrier_Get(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", maxHeaderValue+1)
	for _, tt := range []struct {
		name string
		give nats.Header
		key  string
		want string
	}{
		{name: "nothing"},
		{name: "as the W3C writes it", give: nats.Header{"traceparent": {testParent}}, want: testParent},
		{name: "as nats.go's Set and Go's HTTP write it", give: nats.Header{"Traceparent": {testParent}}, want: testParent},
		{name: "in upper case", give: nats.Header{"TRACEPARENT": {testParent}}, want: testParent},
		{name: "renamed by a server that traces", give: nats.Header{"Xraceparent": {testParent}}, want: testParent},
		{name: "lower case wins", give: nats.Header{"traceparent": {testParent}, "Traceparent": {otherParent}, "TRACEPARENT": {otherParent}}, want: testParent},
		{name: "canonical comes next", give: nats.Header{"Traceparent": {testParent}, "TRACEPARENT": {otherParent}}, want: testParent},
		{name: "others in a fixed order", give: nats.Header{"TRACEPARENT": {testParent}, "traceParent": {otherParent}, "tracepARENT": {otherParent}}, want: testParent},
		{name: "renamed comes last", give: nats.Header{"TRACEPARENT": {testParent}, "Xraceparent": {otherParent}}, want: testParent},
		{name: "an empty list is not there", give: nats.Header{"traceparent": {}, "Traceparent": {testParent}}, want: testParent},
		{name: "the same twice", give: nats.Header{"traceparent": {testParent, testParent}}, want: testParent},
		{name: "two that differ", give: nats.Header{"traceparent": {testParent, otherParent}}, want: testParent + "," + otherParent},
		{name: "too long", give: nats.Header{"traceparent": {long}}, want: unreadable},
		{name: "too long, twice", give: nats.Header{"traceparent": {long, long}}, want: unreadable},
		{name: "too long together", give: nats.Header{"traceparent": {long[1:], "y"}}, want: unreadable},
		{name: "tracestate over several values", key: "tracestate", give: nats.Header{"tracestate": {"a=1", "b=2"}}, want: "a=1,b=2"},
		{name: "Xracestate is nobody's", key: "tracestate", give: nats.Header{"Xracestate": {"a=1"}}},
		{name: "any other key", key: "X-B3-TraceId", give: nats.Header{"X-B3-Traceid": {"1"}}, want: "1"},

		// An empty key is no other key's, however that is written.
		{name: "empty key, missing", key: "tracestate", give: nats.Header{"": {"x"}}},
		{name: "empty key, no traceparent", give: nats.Header{"": {"x"}}},
		{name: "empty key, not canonical", key: "x-B3-tRaceId", give: nats.Header{"": {"x"}}},
		{name: "empty key, upper case", key: "BAGGAGE", give: nats.Header{"": {"x"}}},
		{name: "empty key, no values of the key", key: "tracestate", give: nats.Header{"": {"x"}, "tracestate": {}}},
		{name: "empty key, others there", key: "b3", give: nats.Header{"": {"x"}, "b3x": {"1"}, "b": {"2"}}},
		{name: "empty key, the renamed one", give: nats.Header{"": {"x"}, "XRACEPARENT": {testParent}}},
		{name: "not UTF-8", key: "\xff", give: nats.Header{"": {"x"}}},
		{name: "letters that fold to ASCII", key: "tra\u017Fte", give: nats.Header{"": {"x"}}},
		{name: "nil header", key: "tracestate"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			key := tt.key
			if key == "" {
				key = "traceparent"
			}
			for range 20 { // a map has no order
				if got := Carrier(tt.give).Get(key); got != tt.want {
					t.Fatalf("Get(%q) = %.100q, want %.100q", key, got, tt.want)
				}
			}
		})
	}
}

func TestCarrier_Set(t *testing.T) {
	t.Parallel()
	c := Carrier{"Traceparent": {"1"}, "TRACEPARENT": {"2"}, "Xraceparent": {"3"}, "other": {"4"}}
	c.Set("TraceParent", testParent)
	if diff := cmp.Diff(Carrier{"traceparent": {testParent}, "other": {"4"}}, c); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"other", "traceparent"}, c.Keys()); diff != "" {
		t.Errorf("keys (-want +got):\n%s", diff)
	}
}

// The W3C's examples of what is no trace context, and what only looks like it.
func TestExtract_malformed(t *testing.T) {
	t.Parallel()
	tel := newTelemetry(t, Config{})
	for _, tt := range []struct {
		give []string
		want contextState
	}{
		{[]string{testParent}, stateContinued},
		{[]string{"00-" + testTraceID + "-" + testSpanID + "-00"}, stateContinued},
		{[]string{"01-" + testTraceID + "-" + testSpanID + "-01-more"}, stateContinued}, // a later version may have more
		{[]string{testParent, testParent}, stateContinued},
		{[]string{testParent, otherParent}, stateMalformed},
		{[]string{""}, stateMalformed},
		{[]string{"-"}, stateMalformed},
		{[]string{"ff-" + testTraceID + "-" + testSpanID + "-01"}, stateMalformed},
		{[]string{"00-" + strings.Repeat("0", 32) + "-" + testSpanID + "-01"}, stateMalformed},
		{[]string{"00-" + testTraceID + "-0000000000000000-01"}, stateMalformed},
		{[]string{"00-" + strings.ToUpper(testTraceID) + "-" + testSpanID + "-01"}, stateMalformed},
		{[]string{testParent + "-more"}, stateMalformed},
		{[]string{testParent[:54]}, stateMalformed},
		{[]string{"00_" + testTraceID + "_" + testSpanID + "_01"}, stateMalformed},
		{[]string{" " + testParent}, stateMalformed},
		{[]string{"00-" + testTraceID[:31] + "é-" + testSpanID + "-01"}, stateMalformed},
		{[]string{"00-" + testTraceID[:31] + "\x00-" + testSpanID + "-01"}, stateMalformed},
		{[]string{strings.Repeat("0", 1<<20)}, stateMalformed},
		{nil, stateAbsent},
	} {
		h := nats.Header{"some": {"header"}}
		if tt.give != nil {
			h["traceparent"] = tt.give
		}
		_, sc, state := tel.extract(t.Context(), h)
		if state != tt.want || sc.IsValid() != (tt.want == stateContinued) {
			t.Errorf("%.80q is %s, want %s", tt.give, contextStateNames[state], contextStateNames[tt.want])
		}
	}
}

// A broken tracestate does not spoil the traceparent.
func TestExtract_tracestate(t *testing.T) {
	t.Parallel()
	tel := newTelemetry(t, Config{})
	for give, want := range map[string]string{"a=1,b=2": "a=1,b=2", "nonsense": "", strings.Repeat("a", 10_000): ""} {
		_, sc, _ := tel.extract(t.Context(), nats.Header{"traceparent": {testParent}, "Tracestate": {give}})
		if !sc.IsValid() || sc.TraceState().String() != want {
			t.Errorf("%.50q: %v with tracestate %q", give, sc.TraceID(), sc.TraceState())
		}
	}
}

func FuzzExtract(f *testing.F) {
	f.Add("traceparent", testParent, "tracestate", "a=1")
	f.Add("Xraceparent", testParent, "Traceparent", "nonsense")
	f.Add("TRACEPARENT", "00-", "baggage", "a=b;c,d=%zz")
	f.Fuzz(func(t *testing.T, key1, value1, key2, value2 string) {
		tel := newTelemetry(t, Config{Settings: Settings{Baggage: []string{"a"}}})
		h := nats.Header{key1: {value1}}
		h[key2] = append(h[key2], value2)
		before := maps.Clone(h)
		ctx, sc, state := tel.extract(t.Context(), h)
		if sc.IsValid() != (state == stateContinued) {
			t.Errorf("%v: valid is %v, state %s", h, sc.IsValid(), contextStateNames[state])
		}
		if state == stateContinued && len(sc.TraceState().String()) > maxHeaderValue {
			t.Error("the tracestate is as long as somebody wants it")
		}
		// What was read can be sent on, and read again.
		out := tel.inject(trace.ContextWithSpanContext(ctx, sc), h)
		if _, again, _ := tel.extract(t.Context(), out); sc.IsValid() && (again.TraceID() != sc.TraceID() || again.SpanID() != sc.SpanID()) {
			t.Errorf("%v becomes %v", h, out)
		}
		if diff := cmp.Diff(before, h); diff != "" {
			t.Errorf("the header was changed:\n%s", diff)
		}
	})
}

func FuzzCarrier(f *testing.F) {
	f.Add("traceparent", "Traceparent", "v")
	f.Add("X-B3-TraceId", "x-b3-traceid", "")
	f.Add("x", "", "v")
	f.Add("İ", "x", "in lower case it is two runes, which do not fold to it")
	f.Fuzz(func(t *testing.T, key, other, value string) {
		c := Carrier{other: {"before"}}
		c.Set(key, value)
		if got := c.Get(key); got != limited(value) {
			t.Errorf("Set(%q, %.50q), Get = %.50q", key, value, got)
		}
		if !slices.Contains(c.Keys(), strings.ToLower(key)) {
			t.Errorf("Keys() = %q without %q", c.Keys(), key)
		}
		c.Delete(key)
		if got := c.Get(key); got != "" {
			t.Errorf("after Delete there is %q", got)
		}
	})
}

// The header that programs use for all of their messages is read by many at a
// time, and written by nobody.
func TestInject_sharedHeader(t *testing.T) {
	t.Parallel()
	tel := newTelemetry(t, Config{TracerProvider: sampledTracers(t)})
	p := tel.Publisher("a")
	shared := nats.Header{"k": {"v"}, "Traceparent": {"nonsense"}}
	before := maps.Clone(shared)
	var all sync.WaitGroup
	for range 32 {
		all.Go(func() {
			for range 50 {
				_, o := p.Start(t.Context())
				h, _ := o.Inject("a", shared, 1, false)
				if len(h["traceparent"]) != 1 || len(h["Traceparent"]) > 0 || h["k"][0] != "v" {
					t.Errorf("sent: %v", h)
				}
				o.End(nil)
			}
		})
	}
	all.Wait()
	if diff := cmp.Diff(before, shared); diff != "" {
		t.Errorf("the shared header (-before +after):\n%s", diff)
	}
}

var _ propagation.TextMapCarrier = withoutBaggage{}
