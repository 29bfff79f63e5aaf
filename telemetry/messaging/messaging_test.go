package messaging

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

func TestPublish_withoutProviderMakesNoHeader(t *testing.T) {
	t.Parallel()
	p := newTelemetry(t, Config{}).Publisher("a")
	_, o := p.Start(t.Context())
	if h, _ := o.Inject("a", nil, 0, true); h != nil {
		t.Errorf("a header is made: %v", h)
	}
	own := nats.Header{"k": {"v"}}
	if h, _ := o.Inject("a", own, 0, true); len(h) != 1 {
		t.Errorf("the header is %v", h)
	}
	o.End(nil)

	// A trace that comes by is handed on.
	ctx := trace.ContextWithRemoteSpanContext(t.Context(), parentContext(t))
	_, o = p.Start(ctx)
	if h, _ := o.Inject("a", own, 0, false); h.Get("traceparent") != testParent {
		t.Errorf("the header is %v", h)
	}
	o.End(nil)
}

func parentContext(t *testing.T) trace.SpanContext {
	t.Helper()
	ctx := propagation.TraceContext{}.Extract(t.Context(), propagation.MapCarrier{"traceparent": testParent})
	return trace.SpanContextFromContext(ctx)
}

func TestSettings_OmitUnsampledCore(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		omit, sampled, core bool
		want                bool
	}{
		{false, false, true, true},
		{true, false, true, false},
		{true, true, true, true},
		{true, false, false, true},
	} {
		sampler := sdktrace.NeverSample()
		if tt.sampled {
			sampler = sdktrace.AlwaysSample()
		}
		_, tp := recorded(t, sdktrace.WithSampler(sampler))
		p := newTelemetry(t, Config{TracerProvider: tp, Settings: Settings{OmitUnsampledCore: tt.omit}}).Publisher("a")
		_, o := p.Start(t.Context())
		h, injected := o.Inject("a", nil, 0, tt.core)
		if got := len(h) > 0; got != tt.want || injected != tt.want {
			t.Errorf("%+v: a header is made: %v, %v", tt, got, injected)
		}
		o.End(nil)
	}
}

func TestSettings_Baggage(t *testing.T) {
	t.Parallel()
	both := propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})
	bag := func(s string) baggage.Baggage {
		b, err := baggage.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	for _, tt := range []struct {
		name       string
		propagator propagation.TextMapPropagator
		allow      []string
		give, want string
	}{
		{name: "off", give: "tenant=7,secret=x"},
		{name: "off, whatever the propagator", propagator: both, give: "tenant=7,secret=x"},
		{name: "allowed", allow: []string{"tenant"}, give: "tenant=7,secret=x", want: "tenant=7"},
		{name: "allowed, with its propagator", propagator: both, allow: []string{"tenant"}, give: "tenant=7,secret=x", want: "tenant=7"},
		{name: "too much", allow: []string{"tenant"}, give: "tenant=" + strings.Repeat("7", maxBaggage)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tel := newTelemetry(t, Config{TracerProvider: sampledTracers(t), Propagator: tt.propagator, Settings: Settings{Baggage: tt.allow}})
			ctx := baggage.ContextWithBaggage(t.Context(), bag(tt.give))
			_, o := tel.Publisher("a").Start(ctx)
			h, _ := o.Inject("a", nil, 0, false)
			o.End(nil)
			if got := Carrier(h).Get("baggage"); got != tt.want {
				t.Errorf("sent: %.100q, want %q", got, tt.want)
			}
			// The other way: what a peer sends.
			var d Delivery
			c := tel.Consumer(Route{Template: "a", Group: "g"})
			in := c.Start(t.Context(), &d, &Message{Header: nats.Header{"Baggage": {tt.give}}}, time.Now())
			if got := baggage.FromContext(in).String(); got != tt.want {
				t.Errorf("received: %.100q, want %q", got, tt.want)
			}
			c.Return(in, &d, nil)
		})
	}
}

// Exporters refuse a whole batch of spans for one text that is not UTF-8.
func TestSpans_textFromTheWire(t *testing.T) {
	t.Parallel()
	r, tp := recorded(t)
	tel := newTelemetry(t, Config{TracerProvider: tp, Settings: Settings{BodySize: true}})
	odd := "a\xff\xfe" + strings.Repeat("é", 2000)
	header := nats.Header{"Nats-Msg-Id": {odd}}
	_, o := tel.Publisher(TemplateUnmatched).Start(t.Context())
	o.Inject(odd, header, 17, false)
	o.Stored(odd, 1, false)
	o.End(nil)
	check := func() {
		t.Helper()
		s := last(t, r)
		for _, a := range s.Attributes() {
			if v := a.Value.String(); !utf8.ValidString(v) || len(v) > maxAttribute {
				t.Errorf("%s of %q has %d bytes, valid UTF-8 is %v", a.Key, s.Name(), len(v), utf8.ValidString(v))
			}
		}
		if attr(s, "messaging.message.id") == "" || attr(s, "messaging.message.body.size") != "17" {
			t.Errorf("attributes of %q: %v", s.Name(), s.Attributes())
		}
	}
	check()
	d := Delivery{Attempt: 1}
	c := tel.Consumer(Route{Template: "a", Group: odd, Stream: "s"})
	c.Return(c.Start(t.Context(), &d, &Message{Subject: odd, Header: header, Size: 17}, time.Now()), &d, nil)
	check()
}

func TestErrorTypes(t *testing.T) {
	t.Parallel()
	sentinel := errors.New("full")
	types := newErrorTypes([]Sentinel{{sentinel, "store_full"}})
	for _, tt := range []struct {
		give error
		want string
	}{
		{typedError("mine"), "mine"},
		{fmt.Errorf("around: %w", typedError("mine")), "mine"},
		{typedError(""), "messaging.typedError"},
		{typedError("panic"), errorTypeOther},
		{typedError(strings.Repeat("x", 100) + "\xff"), strings.Repeat("x", maxErrorTypeLen)},
		{sentinel, "store_full"},
		{fmt.Errorf("publish: %w", sentinel), "store_full"},
		{context.DeadlineExceeded, "timeout"},
		{fmt.Errorf("wait: %w", context.Canceled), "canceled"},
		{errors.New("plain"), "*errors.errorString"},
		{fmt.Errorf("a: %w", fmt.Errorf("b: %w", &plainError{})), "*messaging.plainError"},
		{errors.Join(&plainError{}, errors.New("other")), "*messaging.plainError"},
		{markedError{&plainError{}}, "*messaging.plainError"},
		{nilError(), "*messaging.plainError"},
	} {
		if got, _ := types.of(tt.give); got != tt.want {
			t.Errorf("%T is %q, want %q", tt.give, got, tt.want)
		}
	}
}

type typedError string

func (e typedError) Error() string { return string(e) }

func (e typedError) ErrorType() string {
	if e == "panic" {
		panic("as ordered")
	}
	return string(e)
}

type plainError struct{ text string }

func (e *plainError) Error() string { return e.text }

// nilError is an error that panics when its text is asked for.
func nilError() error {
	var e *plainError
	return e
}

// A markedError adds nothing but itself.
type markedError struct{ err error }

func (e markedError) Error() string { return e.err.Error() }
func (e markedError) Unwrap() error { return e.err }

// Texts that programs make up do not become series.
func TestErrorTypes_areFew(t *testing.T) {
	t.Parallel()
	m := newMeter()
	tel := newTelemetry(t, Config{MeterProvider: m})
	p := tel.Publisher("a")
	var all sync.WaitGroup
	for w := range 4 {
		all.Go(func() {
			for i := range 500 {
				_, o := p.Start(t.Context())
				o.End(typedError(fmt.Sprintf("kind-%d-%d", w, i)))
			}
		})
	}
	all.Wait()
	sum, ok := m.collect(t)["messaging.client.sent.messages"].Data.(metricdata.Sum[int64])
	if !ok || len(sum.DataPoints) != maxErrorTypes+1 {
		t.Fatalf("%d series, want %d", len(sum.DataPoints), maxErrorTypes+1)
	}
	total := int64(0)
	for _, dp := range sum.DataPoints {
		total += dp.Value
	}
	if total != 2000 {
		t.Errorf("%d failures are counted, want 2000", total)
	}
}

// The memory of attempts against a slow one that is right.
func TestAttempts(t *testing.T) {
	t.Parallel()
	const keys = maxAttempts * 2
	sc := func(i uint64) trace.SpanContext {
		return trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{0: 1, 1: byte(i), 2: byte(i >> 8), 3: byte(i >> 16)}})
	}
	var a attempts
	c := &Consumer{}
	want := make(map[uint64]trace.SpanContext)
	rnd := rand.New(rand.NewPCG(1, 2))
	// As long as there is room nothing is forgotten.
	for range maxAttempts / 2 {
		k := rnd.Uint64N(keys)
		if rnd.IntN(3) == 0 {
			got, ok := a.take(attemptKey{c, k})
			model, modelOK := want[k]
			if ok != modelOK || !got.Equal(model) {
				t.Fatalf("take(%d) = %v, %v, want %v, %v", k, got, ok, model, modelOK)
			}
			delete(want, k)
			continue
		}
		a.remember(attemptKey{c, k}, sc(k+1))
		want[k] = sc(k + 1)
	}
	// Beyond that the newest are there, and their number is bounded.
	for i := range uint64(keys) {
		a.remember(attemptKey{c, keys + i}, sc(i))
		if len(a.spans) > maxAttempts {
			t.Fatalf("%d are remembered", len(a.spans))
		}
	}
	for i := uint64(keys - maxAttempts); i < keys; i++ {
		if got, ok := a.take(attemptKey{c, keys + i}); !ok || !got.Equal(sc(i)) {
			t.Fatalf("take(%d) = %v, %v", i, got, ok)
		}
	}
	if len(a.spans) != 0 {
		t.Errorf("%d are left", len(a.spans))
	}
	a.remember(attemptKey{c, 1}, trace.SpanContext{})
	if _, ok := a.take(attemptKey{c, 1}); ok {
		t.Error("a span that is none is remembered")
	}
}

func TestBatch_links(t *testing.T) {
	t.Parallel()
	const n = 300
	r, tp := recorded(t, sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.AlwaysSample())), sdktrace.WithRawSpanLimits(sdktrace.SpanLimits{
		AttributeCountLimit: -1, LinkCountLimit: -1, EventCountLimit: -1, AttributeValueLengthLimit: -1,
	}))
	c := newTelemetry(t, Config{TracerProvider: tp}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
	ds := make([]Delivery, n)
	for i := range ds {
		ds[i] = Delivery{Attempt: 1, Sequence: uint64(i)}
		c.Start(t.Context(), &ds[i], &Message{Header: nats.Header{
			"traceparent": {fmt.Sprintf("00-%s-%016x-%02x", testTraceID, i+1, i%2)},
		}}, time.Now())
	}
	_, b := c.StartBatch(t.Context(), n, func(i int) *Delivery { return &ds[i] })
	b.End(nil)
	s := last(t, r)
	if len(s.Links()) != maxBatchLinks {
		t.Errorf("%d links, want %d", len(s.Links()), maxBatchLinks)
	}
	for _, l := range s.Links() {
		if !l.SpanContext.IsSampled() {
			t.Error("a link leads to a span that is not sampled")
		}
	}
	for i := range ds {
		c.Return(t.Context(), &ds[i], nil)
	}
}

// A parentFollower records nothing below a span that is not sampled, and says so.
type parentFollower struct{ trace.TracerProvider }

func (parentFollower) FollowsParent() bool { return true }

// What would not be recorded is not made, and the trace goes on past it.
func TestParentFollower(t *testing.T) {
	t.Parallel()
	const sampled, unsampled = "00-" + testTraceID + "-00f067aa0ba902b7-01", "00-" + testTraceID + "-00f067aa0ba902b7-00"
	for _, tt := range []struct {
		name        string
		traceparent string
		attempt     uint32
		age         time.Duration
		links       []string
		follows     bool
		made        bool
	}{
		{"unsampled", unsampled, 1, 0, nil, true, false},
		{"unsampled, of core NATS", unsampled, 0, 0, nil, true, false},
		{"unsampled, of a provider that says nothing", unsampled, 1, 0, nil, false, true},
		{"sampled", sampled, 1, 0, nil, true, true},
		{"without a trace", "", 1, 0, nil, true, true},
		{"delivered again", unsampled, 2, 0, nil, true, true},
		{"old", unsampled, 1, time.Hour, nil, true, true},
		{"a replay", unsampled, 1, 0, []string{sampled}, true, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			r, tp := recorded(t, sdktrace.WithSampler(sdktrace.AlwaysSample())) // so that whatever is made is seen
			if tt.follows {
				tp = parentFollower{tp}
			}
			m := newMeter()
			tel := newTelemetry(t, Config{TracerProvider: tp, MeterProvider: m})
			c, d := tel.Consumer(Route{Template: "a", Group: "g", Stream: "s"}), &Delivery{Attempt: tt.attempt}
			if d.Attempt > 0 {
				d.Stored = time.Now().Add(-tt.age).UnixNano()
			}
			var h nats.Header
			if tt.traceparent != "" {
				h = nats.Header{"traceparent": {tt.traceparent}}
			}
			ctx := c.Start(t.Context(), d, &Message{Header: h, Links: tt.links}, time.Now())
			if got := len(r.Started()) == 1; got != tt.made {
				t.Errorf("a span is made: %v, want %v", got, tt.made)
			}
			_, o := tel.Publisher("b").Start(ctx)
			sent, _ := o.Inject("b", nil, 0, false)
			switch traceparent := sent["traceparent"]; {
			case len(traceparent) != 1:
				t.Errorf("the handler's publish has the header %v", sent)
			case (traceparent[0] == tt.traceparent) == tt.made:
				t.Errorf("the handler's publish carries %s, the message %s", traceparent[0], tt.traceparent)
			}
			o.End(nil)
			if got := len(r.Started()); got != 2 && tt.made || got != 0 && !tt.made {
				t.Errorf("%d spans with the handler's publish", got)
			}
			s := c.Settle(ctx, d, Ack)
			s.End(nil, time.Now(), false, nil)
			if len(r.Started()) != len(r.Ended()) {
				t.Errorf("%d of %d spans have ended", len(r.Ended()), len(r.Started()))
			}
			all := m.collect(t)
			for _, name := range []string{"messaging.client.consumed.messages", "messaging.process.duration", "messaging.client.sent.messages"} {
				if _, ok := all[name]; !ok {
					t.Errorf("%s is not measured", name)
				}
			}
		})
	}
}

// A span has the same attributes in the end, whenever it gets them.
func TestParentFollower_attributes(t *testing.T) {
	t.Parallel()
	spans := func(follows bool) map[string]string {
		r, tp := recorded(t)
		if follows {
			tp = parentFollower{tp}
		}
		tel := newTelemetry(t, Config{TracerProvider: tp, Settings: Settings{BodySize: true}})
		tel.SetServer("nats.example:4222", nil)
		ctx, o := tel.Publisher("a.*").Start(t.Context())
		h, _ := o.Inject("a.b", nats.Header{nats.MsgIdHdr: {"id"}}, 7, false)
		o.Stored("s", 17, true)
		c := tel.Consumer(Route{Template: "a.*", Group: "g", Stream: "s"})
		for attempt := range uint32(2) {
			d := Delivery{Attempt: attempt + 1, Sequence: 17, Stored: time.Now().UnixNano()}
			in := c.Start(Bare(ctx), &d, &Message{Subject: "a.b", Header: h, Size: 7, ConsumerSequence: 18}, time.Now())
			s := c.Settle(in, &d, Ack)
			s.End(nil, time.Now(), false, nil)
		}
		o.End(nil)
		all := make(map[string]string)
		for i, s := range r.Ended() {
			var attrs []string
			for _, a := range s.Attributes() {
				attrs = append(attrs, string(a.Key)+"="+a.Value.String())
			}
			slices.Sort(attrs)
			all[fmt.Sprint(i, " ", s.Name())] = strings.Join(attrs, " ")
		}
		return all
	}
	want, got := spans(false), spans(true)
	if len(want) != 5 {
		t.Errorf("there are %d spans, want 5", len(want))
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-without +with a ParentFollower):\n%s", diff)
	}
}

// A dead letter of an attempt that is not recorded is found in the publish's trace.
func TestParentFollower_deadLetter(t *testing.T) {
	t.Parallel()
	r, tp := recorded(t, sdktrace.WithSampler(sdktrace.AlwaysSample()))
	c := newTelemetry(t, Config{TracerProvider: parentFollower{tp}}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
	const unsampled = "00-" + testTraceID + "-00f067aa0ba902b7-00"
	d := Delivery{Attempt: 1, Sequence: 17, Stored: time.Now().UnixNano()}
	m := Message{Subject: "a", Header: nats.Header{"traceparent": {unsampled}}}
	ctx := c.Start(t.Context(), &d, &m, time.Now())
	o := c.Capture(ctx, &d, &m, "DLQ", "permanent_error")
	o.End(true, nil)
	if s := last(t, r); s.Name() != "dead_letter DLQ" || s.SpanContext().TraceID().String() != testTraceID {
		t.Errorf("%q is in trace %s, want %s", s.Name(), s.SpanContext().TraceID(), testTraceID)
	}
	if o.Attempt != unsampled || o.Origin != unsampled {
		t.Errorf("the attempt is %q, its origin %q, want %q", o.Attempt, o.Origin, unsampled)
	}
	if links := replayLinks([]string{o.Attempt, o.Origin}); len(links) != 1 {
		t.Errorf("a replay links to it %d times", len(links))
	}
	c.Return(ctx, &d, nil)
}

// Whoever comes first, the settlement or the handler's return, ends the
// processing, and only once.
func TestDelivery_endsOnce(t *testing.T) {
	t.Parallel()
	m := newMeter()
	r, tp := recorded(t)
	c := newTelemetry(t, Config{TracerProvider: tp, MeterProvider: m}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
	const n = 100
	for i := range n {
		d := Delivery{Attempt: 1, Sequence: uint64(i), Stored: time.Now().UnixNano()}
		ctx := c.Start(t.Context(), &d, &Message{}, time.Now())
		var all sync.WaitGroup
		all.Go(func() { c.Return(ctx, &d, nil) })
		all.Go(func() { c.Abandon(ctx, &d, nil) })
		all.Go(func() {
			s := c.Settle(ctx, &d, Ack)
			s.End(nil, time.Now(), false, nil)
		})
		all.Wait()
	}
	data := m.collect(t)
	durations, ok := data["messaging.process.duration"].Data.(metricdata.Histogram[float64])
	if !ok || durations.DataPoints[0].Count != n {
		t.Errorf("process.duration: %+v", durations)
	}
	if active, ok := data["mono.handlers.active"].Data.(metricdata.Sum[int64]); !ok || active.DataPoints[0].Value != 0 {
		t.Errorf("handlers.active: %+v", active)
	}
	spans := slices.DeleteFunc(r.Ended(), func(s sdktrace.ReadOnlySpan) bool { return !strings.HasPrefix(s.Name(), "process") })
	if len(spans) != n {
		t.Errorf("%d process spans", len(spans))
	}
}

// What the catalogue says is what a reader of the metrics gets: no other
// metric, attribute or bucket.
func TestMetrics_areAsDocumented(t *testing.T) {
	t.Parallel()
	m := newMeter()
	tel := newTelemetry(t, Config{MeterProvider: m, TracerProvider: sampledTracers(t)})
	p := tel.Publisher("a")
	c := tel.Consumer(Route{Template: "a", Group: "g", Stream: "s"})
	c.CaptureDeadLetters([]string{"terminated"})
	for _, err := range []error{nil, errors.New("down")} {
		_, o := p.Start(t.Context())
		o.Inject("a", nats.Header{"traceparent": {"nonsense"}}, 1, false)
		o.Pending()
		o.End(err)
		for _, kind := range []Settlement{Ack, Nak, NakDelay, Term} {
			d := Delivery{Attempt: 1, Stored: time.Now().UnixNano()}
			ctx := c.Start(t.Context(), &d, &Message{Header: nats.Header{"traceparent": {testParent}}}, time.Now())
			s := c.Settle(ctx, &d, kind)
			s.End(err, time.Now(), true, errors.New("cause"))
			c.Return(ctx, &d, err)
		}
		c.Extended(err)
		c.Repeated()
	}
	d := Delivery{Attempt: 2, Stored: time.Now().UnixNano()}
	c.Return(c.Start(t.Context(), &d, &Message{}, time.Now()), &d, nil)
	c.SetState(&ConsumerState{Pending: 1, AckPending: 2, Limit: 3, Waiting: 4, Oldest: time.Now()})
	tel.SetOpenDeadLetters("DLQ", []OpenDeadLetters{{Consumer: "billing", Count: 1, Oldest: time.Now()}})
	got := m.collect(t)
	select {
	case <-tel.Collected():
	default:
		t.Error("nobody was told of the collection")
	}
	for _, want := range Metrics() {
		x, ok := got[want.Name]
		if !ok {
			t.Errorf("%s is not there", want.Name)
			continue
		}
		delete(got, want.Name)
		kind, keys, bounds := describe(t, x)
		if x.Unit != want.Unit || x.Description != want.Description || kind != want.Kind {
			t.Errorf("%s is a %s in %s, want a %s in %s", want.Name, kind, x.Unit, want.Kind, want.Unit)
		}
		if diff := cmp.Diff(want.Buckets, bounds); diff != "" {
			t.Errorf("buckets of %s (-want +got):\n%s", want.Name, diff)
		}
		slices.Sort(keys)
		wantKeys := slices.Sorted(slices.Values(want.Attributes))
		if diff := cmp.Diff(wantKeys, keys); diff != "" {
			t.Errorf("attributes of %s (-want +got):\n%s", want.Name, diff)
		}
	}
	for name := range got {
		t.Errorf("%s is not documented", name)
	}
	c.SetState(nil)
	tel.SetOpenDeadLetters("DLQ", nil)
	got = m.collect(t)
	for _, name := range []string{"mono.consumer.pending", "mono.dead_letters.open", "mono.dead_letters.oldest_age"} {
		if _, ok := got[name]; ok {
			t.Errorf("%s is reported although nobody asks", name)
		}
	}
}

func describe(t *testing.T, m metricdata.Metrics) (kind MetricKind, keys []attribute.Key, bounds []float64) {
	t.Helper()
	add := func(set attribute.Set) {
		for _, a := range set.ToSlice() {
			if !slices.Contains(keys, a.Key) {
				keys = append(keys, a.Key)
			}
		}
	}
	switch d := m.Data.(type) {
	case metricdata.Sum[int64]:
		for _, dp := range d.DataPoints {
			add(dp.Attributes)
		}
		if d.IsMonotonic {
			return Counter, keys, nil
		}
		return UpDownCounter, keys, nil
	case metricdata.Gauge[int64]:
		for _, dp := range d.DataPoints {
			add(dp.Attributes)
		}
		return Gauge, keys, nil
	case metricdata.Gauge[float64]:
		for _, dp := range d.DataPoints {
			add(dp.Attributes)
		}
		return Gauge, keys, nil
	case metricdata.Histogram[float64]:
		for _, dp := range d.DataPoints {
			add(dp.Attributes)
		}
		return Histogram, keys, d.DataPoints[0].Bounds
	case metricdata.Histogram[int64]:
		for _, dp := range d.DataPoints {
			add(dp.Attributes)
		}
		return Histogram, keys, d.DataPoints[0].Bounds
	}
	t.Fatalf("%s is a %T", m.Name, m.Data)
	return "", nil, nil
}

// The bounds are part of the contract: dashboards and alerts count on them.
func TestMetrics_buckets(t *testing.T) {
	t.Parallel()
	want := map[string][]float64{
		"messaging.client.operation.duration": {0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10},
		"messaging.process.duration":          {0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10},
		"mono.delivery.attempts":              {1, 2, 3, 4, 5, 7, 10, 15, 20, 50},
		"mono.queue.duration":                 {0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21600},
		"mono.end_to_end.duration":            {0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21600},
	}
	for _, m := range Metrics() {
		if diff := cmp.Diff(want[m.Name], m.Buckets); diff != "" {
			t.Errorf("%s (-want +got):\n%s", m.Name, diff)
		}
	}
}

// A provider that is set later is used from then on.
func TestTracers_placeholder(t *testing.T) { //nolint:paralleltest // changes OpenTelemetry's globals
	tel, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	p := tel.Publisher("a")
	publish := func() {
		_, o := p.Start(t.Context())
		o.End(nil)
	}
	publish()
	if tel.tracers.get() != nil {
		t.Fatal("there is a tracer although nobody has set a provider")
	}
	r, tp := recorded(t)
	otel.SetTracerProvider(tp)
	publish()
	if len(r.Ended()) != 1 {
		t.Errorf("%d spans, want the second one", len(r.Ended()))
	}
}

// A message goes on in the trace of its publish for five minutes, and no longer.
// One from the future, by another clock, is fresh.
func TestConsumer_freshness(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		freshFor, age time.Duration
		core, want    bool
	}{
		{0, 4*time.Minute + 59*time.Second, false, true},
		{0, 5*time.Minute + time.Second, false, false},
		{0, -time.Hour, false, true},
		{time.Second, 2 * time.Second, false, false},
		{-1, -time.Second, false, false},
		{-1, 0, true, true},
	} {
		r, tp := recorded(t)
		c := newTelemetry(t, Config{TracerProvider: tp, Settings: Settings{FreshFor: tt.freshFor}}).Consumer(Route{Template: "a", Group: "g", Stream: "s"})
		now := time.Now()
		m := &Message{Header: nats.Header{"traceparent": {testParent}}}
		var d Delivery
		if !tt.core {
			d.Attempt, d.Stored = 1, now.Add(-tt.age).UnixNano()
		}
		c.Return(c.Start(t.Context(), &d, m, now), &d, nil)
		if got := last(t, r).Parent().IsValid(); got != tt.want {
			t.Errorf("%+v: continued is %v", tt, got)
		}
	}
}

// A header is used again when its publish has ended, and not before.
func TestInject_headerIsItsOwn(t *testing.T) {
	t.Parallel()
	p := newTelemetry(t, Config{TracerProvider: sampledTracers(t)}).Publisher("a")
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 200 {
				ctx, o := p.Start(t.Context())
				want := formatTraceparent(trace.SpanContextFromContext(ctx))
				h, _ := o.Inject("a", nil, 0, false)
				again, _ := o.Inject("a", nil, 0, false) // as after a failure
				_, other := p.Start(t.Context())
				other.Inject("a", nil, 0, false)
				other.End(nil)
				if h.Get(traceparent) != want || again.Get(traceparent) != want || len(h) != 1 {
					t.Errorf("the header is %v and %v, want %s", h, again, want)
				}
				o.End(nil)
			}
		})
	}
	all.Wait()
}

// A broken traceparent of the caller's takes its tracestate with it.
func TestInject_replacesMalformed(t *testing.T) {
	t.Parallel()
	p := newTelemetry(t, Config{TracerProvider: sampledTracers(t)}).Publisher("a")
	_, o := p.Start(t.Context())
	h, injected := o.Inject("a", nats.Header{"Traceparent": {"nonsense"}, "Tracestate": {"a=1"}, "k": {"v"}}, 1, false)
	o.End(nil)
	if !injected || len(h) != 2 || len(h["traceparent"]) != 1 {
		t.Errorf("sent: %v", h)
	}
}

type testLimits struct {
	most    int64
	headers bool
}

func (l testLimits) MaxPayload() int64      { return l.most }
func (l testLimits) HeadersSupported() bool { return l.headers }

// A header is only added if the server takes the message with it.
func TestInject_limits(t *testing.T) {
	t.Parallel()
	const header = len("NATS/1.0\r\ntraceparent: ") + len(testParent) + len("\r\n\r\n")
	for _, tt := range []struct {
		limits Limits
		size   int
		want   bool
	}{
		{nil, 1 << 30, true},
		{testLimits{1000, true}, 1000 - header, true},
		{testLimits{1000, true}, 1000 - header + 1, false},
		{testLimits{1000, false}, 1, false},
	} {
		m := newMeter()
		tel := newTelemetry(t, Config{TracerProvider: sampledTracers(t), MeterProvider: m})
		tel.SetServer("", tt.limits)
		_, o := tel.Publisher("a").Start(t.Context())
		h, got := o.Inject("a", nil, tt.size, false)
		o.End(nil)
		if got != tt.want || got != (len(h) > 0) {
			t.Errorf("%+v: injected is %v, %v", tt, got, h)
		}
		if _, dropped := m.collect(t)["mono.trace_context"]; dropped == tt.want {
			t.Errorf("%+v: dropped is counted: %v", tt, dropped)
		}
	}
}

// Views may drop one histogram and keep the others.
func TestMetrics_views(t *testing.T) {
	t.Parallel()
	all := []string{
		"messaging.process.duration", "messaging.client.operation.duration", metricAttempts.Name, metricQueueDuration.Name, metricEndToEnd.Name,
	}
	for _, drop := range all {
		reader := metric.NewManualReader()
		mp := metric.NewMeterProvider(metric.WithReader(reader), metric.WithView(metric.NewView(
			metric.Instrument{Name: drop}, metric.Stream{Aggregation: metric.AggregationDrop{}})))
		tel := newTelemetry(t, Config{MeterProvider: mp})
		_, o := tel.Publisher("a").Start(t.Context())
		o.End(nil)
		c := tel.Consumer(Route{Template: "a", Group: "g"})
		d := Delivery{Attempt: 1, Stored: time.Now().UnixNano()}
		ctx := c.Start(t.Context(), &d, &Message{}, time.Now())
		if !c.Timed(ctx) {
			t.Errorf("%s is dropped, and nothing is timed", drop)
		}
		s := c.Settle(ctx, &d, Ack)
		s.End(nil, time.Now(), false, nil)
		got := meter{mp, reader}.collect(t)
		for _, name := range all {
			if _, ok := got[name]; ok == (name == drop) {
				t.Errorf("%s is dropped, and %s is there: %v", drop, name, ok)
			}
		}
	}
}

// A span of another kind than the SDK's may keep the attributes it is given.
func TestSpans_ofOthersKeepTheirAttributes(t *testing.T) {
	t.Parallel()
	k := &keeper{}
	p := newTelemetry(t, Config{TracerProvider: k}).Publisher("a")
	for range 3 {
		_, o := p.Start(t.Context())
		o.Inject("a", nil, 1, false)
		o.Stored("s", 1, false)
		o.End(nil)
	}
	for i, attrs := range k.kept {
		if len(attrs) == 0 || attrs[0].Key != keySystem {
			t.Errorf("span %d has %v", i, attrs)
		}
	}
}

// A keeper is provider, tracer and span, and keeps the attributes' slices.
type keeper struct {
	noop.TracerProvider

	kept [][]attribute.KeyValue
}

type (
	keeperTracer struct {
		noop.Tracer

		k *keeper
	}
	keeperSpan struct {
		noop.Span

		k *keeper
	}
)

func (k *keeper) Tracer(string, ...trace.TracerOption) trace.Tracer { return keeperTracer{k: k} }

func (t keeperTracer) Start(ctx context.Context, _ string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	return ctx, keeperSpan{k: t.k}
}

func (keeperSpan) IsRecording() bool { return true }

func (s keeperSpan) SetAttributes(attrs ...attribute.KeyValue) { s.k.kept = append(s.k.kept, attrs) }

func TestSettings_Validate(t *testing.T) {
	t.Parallel()
	if err := (Settings{}).Validate(); err != nil {
		t.Errorf("the default: %v", err)
	}
	err := Settings{SettleSpans: 7, Baggage: []string{"ok", "", "a b"}}.Validate()
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range []string{"SettleSpans", `""`, `"a b"`} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not name %s", err, part)
		}
	}
}
