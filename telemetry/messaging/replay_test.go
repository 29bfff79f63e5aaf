package messaging

import (
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

const (
	testAttempt = "00-11111111111111111111111111111111-2222222222222222-01"
	testOrigin  = "00-33333333333333333333333333333333-4444444444444444-00"
)

// linksOf lists the traceparents that a span links to.
func linksOf(s sdktrace.ReadOnlySpan) []string {
	all := make([]string, 0, len(s.Links()))
	for _, l := range s.Links() {
		all = append(all, traceparentOf(l.SpanContext))
	}
	return all
}

// replays returns what is counted, by template, group and outcome.
func (m meter) replays(t *testing.T) map[string]int64 {
	t.Helper()
	all := make(map[string]int64)
	sum, _ := m.collect(t)["mono.dead_letters.replayed"].Data.(metricdata.Sum[int64])
	for _, p := range sum.DataPoints {
		var labels []string
		for _, k := range []attribute.Key{keyTemplate, keyConsumerGroup, keyMetricOutcome} {
			v, _ := p.Attributes.Value(k)
			labels = append(labels, v.AsString())
		}
		all[strings.Join(labels, " ")] = p.Value
	}
	return all
}

// Each replay has a trace of its own, however many are sent in one of the
// operator's.
func TestReplay(t *testing.T) {
	t.Parallel()
	r, tp := recorded(t)
	m := newMeter()
	tel := newTelemetry(t, Config{TracerProvider: tp, MeterProvider: m, Settings: Settings{Baggage: []string{"k"}}})
	bag, err := baggage.Parse("k=v")
	if err != nil {
		t.Fatal(err)
	}
	ctx := trace.ContextWithRemoteSpanContext(baggage.ContextWithBaggage(t.Context(), bag), parentContext(t))
	for _, tt := range []struct {
		name  string
		give  DeadLetter
		err   error
		span  string
		links []string
	}{
		{
			name:  "all is known",
			give:  DeadLetter{Template: "orders.*", Subject: "orders.7", Stream: "orders", Consumer: "billing", Traceparent: testAttempt, Origin: testOrigin},
			span:  "replay orders.*",
			links: []string{testAttempt, testOrigin, testParent},
		},
		{
			name:  "the subject is of nobody's event",
			give:  DeadLetter{Subject: "who.knows", Consumer: "billing", Traceparent: "00-nonsense", Origin: testOrigin},
			span:  "replay _unmatched",
			links: []string{testOrigin, testParent},
		},
		{
			name: "not sent", give: DeadLetter{Consumer: "billing"}, err: errors.New("down"),
			span: "replay _unmatched", links: []string{testParent},
		},
	} {
		op := tel.Replay(ctx, &tt.give)
		op.End(tt.err)
		s := last(t, r)
		if s.Name() != tt.span || s.SpanKind() != trace.SpanKindProducer || s.Parent().IsValid() || s.SpanContext().TraceID() == parentContext(t).TraceID() {
			t.Errorf("%s: a %v %q with parent %v", tt.name, s.SpanKind(), s.Name(), s.Parent())
		}
		if diff := cmp.Diff(tt.links, linksOf(s)); diff != "" {
			t.Errorf("%s: links (-want +got):\n%s", tt.name, diff)
		}
		want := nats.Header{"traceparent": {traceparentOf(s.SpanContext())}} // and no baggage
		if diff := cmp.Diff(want, op.Header); diff != "" {
			t.Errorf("%s: header (-want +got):\n%s", tt.name, diff)
		}
		for k, v := range map[string]string{
			"messaging.operation.name": "replay", "messaging.operation.type": "send", "messaging.consumer.group.name": "billing",
			"messaging.destination.name": tt.give.Subject, "messaging.nats.stream": tt.give.Stream, "messaging.system": "nats",
		} {
			if got := attr(s, k); got != v {
				t.Errorf("%s: %s is %q, want %q", tt.name, k, got, v)
			}
		}
		if failed := s.Status().Code == codes.Error; failed != (tt.err != nil) || failed != (attr(s, "error.type") != "") {
			t.Errorf("%s: status %v, error.type %q", tt.name, s.Status(), attr(s, "error.type"))
		}
	}
	want := map[string]int64{"orders.* billing sent": 1, "_unmatched billing sent": 1}
	if diff := cmp.Diff(want, m.replays(t)); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
}

// Without tracing nothing is injected, and what is sent is counted all the same.
func TestReplay_withoutProvider(t *testing.T) {
	t.Parallel()
	m := newMeter()
	op := newTelemetry(t, Config{MeterProvider: m}).Replay(t.Context(), &DeadLetter{Consumer: "billing", Traceparent: testAttempt})
	op.End(nil)
	if op.Header != nil {
		t.Errorf("the header is %v", op.Header)
	}
	if diff := cmp.Diff(map[string]int64{"_unmatched billing sent": 1}, m.replays(t)); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
}

// The processing of a replay goes on in the replay's trace, or begins one, and
// links to what it is a replay of. What the wire says of that may be anything.
func TestConsumer_replayLinks(t *testing.T) {
	t.Parallel()
	long := strings.Repeat(testAttempt+" ", 100)
	for _, tt := range []struct {
		name    string
		links   []string
		traced  bool
		attempt uint32
		want    []string // the trace of the replay is the first if there is one
	}{
		{name: "no links", traced: true, attempt: 1, want: []string{testParent}},
		{name: "traced", links: []string{testAttempt + " " + testOrigin}, traced: true, attempt: 1, want: []string{testParent, testAttempt, testOrigin}},
		{name: "not traced", links: []string{testAttempt + " " + testOrigin}, attempt: 1, want: []string{testAttempt, testOrigin}},
		{name: "second attempt", links: []string{testAttempt + " " + testOrigin}, traced: true, attempt: 2, want: []string{testParent, testAttempt, testOrigin}},
		{name: "several values", links: []string{testAttempt, testOrigin}, attempt: 1, want: []string{testAttempt, testOrigin}},
		{name: "more than two", links: []string{testAttempt + " " + testOrigin + " " + testParent}, attempt: 1, want: []string{testAttempt, testOrigin}},
		{name: "malformed", links: []string{"00-zz", "", " ", "\x00", testOrigin}, attempt: 1, want: []string{testOrigin}},
		{name: "too long", links: []string{long, testOrigin}, attempt: 1, want: []string{testOrigin}},
	} {
		r, tp := recorded(t)
		c := newTelemetry(t, Config{TracerProvider: tp}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
		now := time.Now()
		m := &Message{Links: tt.links}
		if tt.traced {
			m.Header = nats.Header{"traceparent": {testParent}}
		}
		d := Delivery{Attempt: tt.attempt, Stored: now.UnixNano()}
		c.Return(c.Start(t.Context(), &d, m, now), &d, nil)
		s := last(t, r)
		if continued := s.SpanContext().TraceID() == parentContext(t).TraceID(); continued != (tt.traced && tt.attempt == 1) {
			t.Errorf("%s: the trace is continued: %v", tt.name, continued)
		}
		if diff := cmp.Diff(tt.want, linksOf(s)); diff != "" {
			t.Errorf("%s: links (-want +got):\n%s", tt.name, diff)
		}
	}
}

// An outcome that was stored before is counted by whoever stored it.
func TestConsumer_outcomes(t *testing.T) {
	t.Parallel()
	r, tp := recorded(t)
	m := newMeter()
	c := newTelemetry(t, Config{TracerProvider: tp, MeterProvider: m}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
	c.CaptureDeadLetters(nil)
	if diff := cmp.Diff(map[string]int64{"a g resolved": 0, "a g failed_again": 0}, m.replays(t)); diff != "" {
		t.Errorf("at the start (-want +got):\n%s", diff)
	}
	d := Delivery{Attempt: 1, Stored: time.Now().UnixNano()}
	msg := &Message{Header: nats.Header{"traceparent": {testParent}}}
	ctx := c.Start(t.Context(), &d, msg, time.Now())
	for _, tt := range []struct {
		failed, written bool
		err             error
	}{{written: true}, {failed: true, written: true}, {failed: true, written: true}, {}, {failed: true}, {err: errors.New("down")}, {failed: true, err: errors.New("down")}} {
		op := c.Outcome(t.Context(), &d, msg)
		if op.Origin != testParent || op.Attempt != op.Header.Get("traceparent") || op.Attempt == "" {
			t.Errorf("the outcome is %+v", op)
		}
		op.End(tt.failed, tt.written, tt.err)
	}
	c.Return(ctx, &d, nil)
	if got := traceparentOf(last(t, r).SpanContext()); got != c.Outcome(t.Context(), &d, msg).Attempt {
		t.Errorf("the attempt is not %s", got)
	}
	if diff := cmp.Diff(map[string]int64{"a g resolved": 1, "a g failed_again": 2}, m.replays(t)); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
	failures, _ := m.collect(t)["mono.dead_letters.capture_failures"].Data.(metricdata.Sum[int64])
	if len(failures.DataPoints) != 1 || failures.DataPoints[0].Value != 2 {
		t.Errorf("failures are %+v, want 2", failures.DataPoints)
	}
	// No handler has seen it: there is no attempt.
	if op := c.Outcome(t.Context(), &Delivery{}, &Message{}); op.Header != nil || op.Attempt != "" || op.Origin != "" {
		t.Errorf("the outcome is %+v", op)
	}
}

// Dead letters may name any number of consumers.
func TestReplay_manyConsumers(t *testing.T) {
	t.Parallel()
	m := newMeter()
	tel := newTelemetry(t, Config{MeterProvider: m})
	const n = 1500
	for i := range n {
		op := tel.Replay(t.Context(), &DeadLetter{Template: "orders.created", Subject: "orders.created", Consumer: "consumer-" + strconv.Itoa(i)})
		op.End(nil)
	}
	counts := m.replays(t)
	if other := counts["_unmatched _OTHER sent"]; len(counts) != 1001 || other != n-1000 {
		t.Errorf("there are %d series, and %d replays beyond them", len(counts), other)
	}
}
