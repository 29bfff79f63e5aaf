package mono_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A tracing records the spans of one process.
type tracing struct {
	*tracetest.SpanRecorder

	provider *sdktrace.TracerProvider
}

func newTracing() *tracing {
	r := tracetest.NewSpanRecorder()
	return &tracing{r, sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(r))}
}

func (tr *tracing) option() mono.Option { return mono.WithTracerProvider(tr.provider) }

// ended waits for n spans of that name to have ended and returns them in the
// order they began.
func (tr *tracing) ended(t *testing.T, name string, n int) []sdktrace.ReadOnlySpan {
	t.Helper()
	find := func() []sdktrace.ReadOnlySpan {
		return slices.DeleteFunc(slices.Clone(tr.Ended()), func(s sdktrace.ReadOnlySpan) bool { return s.Name() != name })
	}
	eventually(t, func() bool { return len(find()) >= n }, fmt.Sprintf("%d spans %q; there are %q", n, name, tr.names()))
	spans := find()
	if len(spans) != n {
		t.Fatalf("%d spans %q, want %d", len(spans), name, n)
	}
	slices.SortStableFunc(spans, func(a, b sdktrace.ReadOnlySpan) int { return a.StartTime().Compare(b.StartTime()) })
	return spans
}

func (tr *tracing) one(t *testing.T, name string) sdktrace.ReadOnlySpan {
	t.Helper()
	return tr.ended(t, name, 1)[0]
}

func (tr *tracing) names() []string {
	var names []string
	for _, s := range tr.Ended() {
		names = append(names, s.Name())
	}
	return names
}

func attrOf(s sdktrace.ReadOnlySpan, key string) string {
	for _, a := range s.Attributes() {
		if string(a.Key) == key {
			return a.Value.String()
		}
	}
	return ""
}

func wantAttrs(t *testing.T, s sdktrace.ReadOnlySpan, want map[string]string) {
	t.Helper()
	for k, v := range want {
		if got := attrOf(s, k); got != v {
			t.Errorf("span %q: %s is %q, want %q", s.Name(), k, got, v)
		}
	}
}

func wantKind(t *testing.T, s sdktrace.ReadOnlySpan, want trace.SpanKind) {
	t.Helper()
	if s.SpanKind() != want {
		t.Errorf("span %q is a %v, want %v", s.Name(), s.SpanKind(), want)
	}
}

func wantChild(t *testing.T, s, parent sdktrace.ReadOnlySpan) {
	t.Helper()
	if s.Parent().SpanID() != parent.SpanContext().SpanID() || s.SpanContext().TraceID() != parent.SpanContext().TraceID() {
		t.Errorf("span %q is not a child of %q: parent %v in trace %v, want %v in %v", s.Name(), parent.Name(),
			s.Parent().SpanID(), s.SpanContext().TraceID(), parent.SpanContext().SpanID(), parent.SpanContext().TraceID())
	}
}

// wantRoot checks that a span begins a trace of its own, which none of the
// others is in.
func wantRoot(t *testing.T, s sdktrace.ReadOnlySpan, others ...sdktrace.ReadOnlySpan) {
	t.Helper()
	if s.Parent().IsValid() {
		t.Errorf("span %q has a parent", s.Name())
	}
	for _, o := range others {
		if s.SpanContext().TraceID() == o.SpanContext().TraceID() {
			t.Errorf("span %q is in the trace of %q", s.Name(), o.Name())
		}
	}
}

// wantLinks compares the links with spans, in their order.
func wantLinks(t *testing.T, s sdktrace.ReadOnlySpan, to ...trace.SpanContext) {
	t.Helper()
	ids := func(scs []trace.SpanContext) []string {
		out := make([]string, len(scs))
		for i, sc := range scs {
			out[i] = sc.TraceID().String() + "/" + sc.SpanID().String()
		}
		return out
	}
	got := make([]trace.SpanContext, 0, len(s.Links()))
	for _, l := range s.Links() {
		got = append(got, l.SpanContext)
	}
	if diff := cmp.Diff(ids(to), ids(got)); diff != "" {
		t.Errorf("links of span %q (-want +got):\n%s", s.Name(), diff)
	}
}

const (
	traceSubject = "events.shop.v1.order-placed"
	publishSpan  = "publish " + traceSubject
	processSpan  = "process " + traceSubject
	batchSpan    = "batch " + traceSubject
	ackSpan      = "ack " + traceSubject
	nakSpan      = "nak " + traceSubject
	termSpan     = "term " + traceSubject
)

// A tracedConsumer consumes OrderPlaced through a stream.
func tracedConsumer(t *testing.T, batch int, handle mono.EventStreamConsumerHandler) *testModule {
	t.Helper()
	return tracedConsumerFor(t, batch, time.Minute, handle)
}

func tracedConsumerFor(t *testing.T, batch int, ackWait time.Duration, handle mono.EventStreamConsumerHandler) *testModule {
	t.Helper()
	return consumer("billing", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "orders"},
			Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: ackWait},
			Fetch:    mono.FetchConfig{BatchSize: batch},
			Retry:    mono.RetryPolicy{Backoff: []time.Duration{time.Millisecond}},
		}, handle, self)
	})
}

func ackAll(_ context.Context, msgs []*mono.Msg) error {
	var errs []error
	for _, m := range msgs {
		errs = append(errs, m.Ack())
	}
	return errors.Join(errs...)
}

func publishStored(t *testing.T, app *mono.App, header mono.Header) *mono.PubAck {
	t.Helper()
	ack, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("x"), Header: header})
	if err != nil {
		t.Fatal(err)
	}
	return ack
}

func TestTrace_core(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	typed := helper.EventDefinition[int]("shop", "Counted", "v1")
	got := make(chan trace.SpanContext, 1)
	app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t), typed.ToBase()),
		consumer("raw", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(monotestEvent(t), func(ctx context.Context, m *mono.Msg) error {
				if !trace.SpanContextFromContext(ctx).Equal(trace.SpanContextFromContext(m.Context())) {
					t.Error("the handler's context has another span than the message's")
				}
				got <- trace.SpanContextFromContext(ctx)
				return nil
			}, self)
		}),
		consumer("typed", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, typed, func(context.Context, int, *mono.Msg) error {
				return fmt.Errorf("count: %w", errBrokenPipe)
			}, self)
		}))
	ctx, root := tr.provider.Tracer("test").Start(t.Context(), "request")
	if err := app.Bus().Publish(ctx, &mono.Msg{Subject: traceSubject, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if err := typed.PublishContext(ctx, app.Bus(), 3, nil); err != nil {
		t.Fatal(err)
	}
	root.End()

	publish, process := tr.one(t, publishSpan), tr.one(t, processSpan)
	wantChild(t, publish, tr.one(t, "request"))
	wantChild(t, process, publish)
	wantKind(t, publish, trace.SpanKindProducer)
	wantKind(t, process, trace.SpanKindConsumer)
	wantLinks(t, process)
	if sc := receive(t, got, "the event"); !sc.Equal(process.SpanContext()) {
		t.Errorf("the handler has span %v, want %v", sc, process.SpanContext())
	}
	wantAttrs(t, publish, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "publish", "messaging.operation.type": "send",
		"messaging.destination.template": traceSubject, "messaging.destination.name": traceSubject,
	})
	wantAttrs(t, process, map[string]string{
		"messaging.system": "nats", "messaging.operation.name": "process", "messaging.operation.type": "process",
		"messaging.destination.template": traceSubject, "messaging.destination.name": traceSubject,
		"messaging.consumer.group.name": "raw", "messaging.nats.stream": "",
	})
	if publish.Status().Code != codes.Unset || process.Status().Code != codes.Unset {
		t.Error("a success has a status")
	}
	failed := tr.one(t, "process events.shop.v1.counted")
	wantChild(t, failed, tr.one(t, "publish events.shop.v1.counted"))
	wantAttrs(t, failed, map[string]string{"error.type": "*errors.errorString"})
	if failed.Status().Code != codes.Error || len(failed.Events()) > 0 {
		t.Errorf("the failed one has status %v and %d events", failed.Status(), len(failed.Events()))
	}
}

func TestTrace_durable(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll))
	ack := publishStored(t, app, mono.Header{"Nats-Msg-Id": {"order-1"}})
	publish, process, settle := tr.one(t, publishSpan), tr.one(t, processSpan), tr.one(t, ackSpan)
	wantRoot(t, publish)
	wantChild(t, process, publish)
	wantLinks(t, process, publish.SpanContext())
	wantChild(t, settle, process)
	wantKind(t, settle, trace.SpanKindClient)
	seq := fmt.Sprint(ack.Sequence())
	wantAttrs(t, publish, map[string]string{
		"messaging.nats.stream": "orders", "messaging.nats.stream_sequence": seq, "messaging.message.id": "order-1", "messaging.nats.duplicate": "",
	})
	wantAttrs(t, process, map[string]string{
		"messaging.nats.stream": "orders", "messaging.nats.stream_sequence": seq, "messaging.nats.consumer_sequence": "1",
		"messaging.nats.delivery_count": "1", "messaging.nats.settlement": "ack", "messaging.message.id": "order-1",
		"messaging.consumer.group.name": "billing", "messaging.message.body.size": "",
	})
	wantAttrs(t, settle, map[string]string{
		"messaging.operation.name": "ack", "messaging.operation.type": "settle", "messaging.nats.settlement": "ack", "messaging.system": "nats",
	})

	publishStored(t, app, mono.Header{"Nats-Msg-Id": {"order-1"}})
	second := tr.ended(t, publishSpan, 2)[1]
	wantAttrs(t, second, map[string]string{"messaging.nats.duplicate": "true", "messaging.nats.stream_sequence": seq})

	f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	last, err := f.Wait(within(t))
	if err != nil {
		t.Fatal(err)
	}
	async := tr.ended(t, publishSpan, 3)[2] // it has ended when Wait returns
	wantAttrs(t, async, map[string]string{"messaging.nats.stream_sequence": fmt.Sprint(last.Sequence())})
	wantChild(t, tr.ended(t, processSpan, 2)[1], async)
}

// Each attempt after the first is a trace of its own, linked to the publish and
// to the attempt before.
func TestTrace_redelivery(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name       string
		fail       func(m *mono.Msg) error
		settlement string // of the attempt
		span       string // of the settlement
		errorType  string
	}{
		{name: "nak", fail: func(m *mono.Msg) error { return m.Nak() }, settlement: "nak", span: nakSpan},
		{name: "nak with delay", fail: func(m *mono.Msg) error { return m.NakWithDelay(time.Millisecond) }, settlement: "nak_delay", span: nakSpan},
		{name: "error", fail: func(*mono.Msg) error { return mono.RetryAfter(errBrokenPipe, time.Millisecond) }, settlement: "nak_delay", span: nakSpan, errorType: "*errors.errorString"},
		{name: "panic", fail: func(*mono.Msg) error { panic("as ordered") }, settlement: "nak_delay", span: nakSpan, errorType: "panic"},
		{name: "unsettled", fail: func(*mono.Msg) error { return nil }, settlement: "unsettled"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tr := newTracing()
			ackWait := time.Minute
			if tt.settlement == "unsettled" {
				ackWait = time.Second // it is waited for
			}
			app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)),
				tracedConsumerFor(t, 1, ackWait, func(_ context.Context, msgs []*mono.Msg) error {
					if msgs[0].Metadata().NumDelivered < 3 {
						return tt.fail(msgs[0])
					}
					return msgs[0].Ack()
				}))
			publishStored(t, app, nil)
			publish, attempts := tr.one(t, publishSpan), tr.ended(t, processSpan, 3)
			wantChild(t, attempts[0], publish)
			wantLinks(t, attempts[0], publish.SpanContext())
			for i := 1; i < len(attempts); i++ {
				wantRoot(t, attempts[i], publish, attempts[i-1])
				wantLinks(t, attempts[i], publish.SpanContext(), attempts[i-1].SpanContext())
				wantAttrs(t, attempts[i], map[string]string{"messaging.nats.delivery_count": fmt.Sprint(i + 1)})
			}
			first, want := attempts[0], tt.settlement
			wantAttrs(t, first, map[string]string{"messaging.nats.settlement": want, "error.type": tt.errorType})
			if isError := first.Status().Code == codes.Error; isError != (tt.errorType != "") {
				t.Errorf("the first attempt has status %v", first.Status())
			}
			wantAttrs(t, attempts[2], map[string]string{"messaging.nats.settlement": "ack", "error.type": ""})
			wantChild(t, tr.one(t, ackSpan), attempts[2])
			if tt.span != "" {
				naks := tr.ended(t, tt.span, 2)
				wantChild(t, naks[0], attempts[0])
				wantChild(t, naks[1], attempts[1])
			}
		})
	}
}

func TestTrace_term(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error {
			if msgs[0].Header.Get("how") == "error" {
				return mono.Permanent(errBrokenPipe)
			}
			return msgs[0].TermWithReason("the customer is gone")
		}))
	publishStored(t, app, nil)
	publishStored(t, app, mono.Header{"how": {"error"}})
	processes, terms := tr.ended(t, processSpan, 2), tr.ended(t, termSpan, 2)
	for i := range terms {
		wantChild(t, terms[i], processes[i])
		wantAttrs(t, processes[i], map[string]string{"messaging.nats.settlement": "term"})
	}
	if processes[0].Status().Code != codes.Unset || processes[1].Status().Code != codes.Error {
		t.Errorf("status %v of a term, %v of a permanent error", processes[0].Status(), processes[1].Status())
	}
}

// Messages of a batch keep their traces apart, and what a handler publishes with
// a message's context is in that message's.
func TestTrace_batch(t *testing.T) {
	t.Parallel()
	const n = 5
	tr := newTracing()
	next, err := mono.NewEvent("shop", "OrderBilled", "v1")
	if err != nil {
		t.Fatal(err)
	}
	type call struct {
		span trace.SpanContext   // of the handler's context
		msgs []trace.SpanContext // of the messages'
	}
	calls := make(chan call, 1000)
	var m *testModule
	m = tracedConsumer(t, n, func(ctx context.Context, msgs []*mono.Msg) error {
		c := call{span: trace.SpanContextFromContext(ctx)}
		for _, msg := range msgs {
			c.msgs = append(c.msgs, trace.SpanContextFromContext(msg.Context()))
			if err := m.bus.Publish(msg.Context(), &mono.Msg{Subject: next.Subject, Data: msg.Data}); err != nil {
				return err
			}
		}
		slices.Reverse(msgs)
		defer func() { calls <- c }()
		return ackAll(ctx, msgs)
	})
	m.emits = []mono.BaseEventDefinition{next}
	app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)), m)

	// What has arrived is a batch, so it takes several messages at once to get one
	// of several. That happens soon.
	var all []call
	total, batches := 0, 0
	for batches == 0 {
		var futures []*mono.PubAckFuture
		for range n {
			ctx, span := tr.provider.Tracer("test").Start(within(t), fmt.Sprintf("request %d", total))
			total++
			f, err := app.Bus().PublishStreamAsync(ctx, &mono.Msg{Subject: traceSubject, Data: []byte("x")})
			span.End()
			if err != nil {
				t.Fatal(err)
			}
			futures = append(futures, f)
		}
		for _, f := range futures {
			if _, err := f.Wait(within(t)); err != nil {
				t.Fatal(err)
			}
		}
		for handled := 0; handled < n; {
			c := receive(t, calls, "a batch")
			handled += len(c.msgs)
			all = append(all, c)
			if len(c.msgs) > 1 {
				batches++
			}
		}
	}
	settled(t, app, "orders", "billing")

	bySpan := make(map[trace.SpanID]sdktrace.ReadOnlySpan)
	for _, s := range slices.Concat(tr.ended(t, publishSpan, total), tr.ended(t, processSpan, total), tr.ended(t, batchSpan, batches)) {
		bySpan[s.SpanContext().SpanID()] = s
	}
	requests := make(map[trace.SpanID]bool)
	for i := range total {
		requests[tr.one(t, fmt.Sprintf("request %d", i)).SpanContext().SpanID()] = true
	}
	traces := make(map[trace.TraceID]bool)
	for _, c := range all {
		if len(c.msgs) == 1 {
			if !c.span.Equal(c.msgs[0]) {
				t.Error("the handler of a single message has another context than the message")
			}
		} else {
			batch := bySpan[c.span.SpanID()]
			wantRoot(t, batch)
			wantLinks(t, batch, c.msgs...)
			wantAttrs(t, batch, map[string]string{"messaging.batch.message_count": fmt.Sprint(len(c.msgs))})
		}
		for _, sc := range c.msgs {
			process := bySpan[sc.SpanID()]
			publish := bySpan[process.Parent().SpanID()]
			wantChild(t, process, publish)
			if !requests[publish.Parent().SpanID()] || traces[sc.TraceID()] {
				t.Error("a message is not in the trace of its request")
			}
			traces[sc.TraceID()] = true
		}
		if traces[c.span.TraceID()] != (len(c.msgs) == 1) {
			t.Error("a batch is in the trace of one of its messages")
		}
	}
	for _, child := range slices.Concat(tr.ended(t, "publish "+next.Subject, total), tr.ended(t, ackSpan, total)) {
		wantChild(t, child, bySpan[child.Parent().SpanID()])
		if name := bySpan[child.Parent().SpanID()].Name(); name != processSpan {
			t.Errorf("span %q is a child of %q", child.Name(), name)
		}
	}
}

// Whoever goes on later with an old message does not prolong its trace.
func TestTrace_freshness(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		freshFor time.Duration
		child    bool
	}{
		{name: "the default", freshFor: 0, child: true},
		{name: "nothing is fresh", freshFor: -1},
		{name: "older than that", freshFor: time.Nanosecond},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tr := newTracing()
			app := startAppWith(t, []mono.Option{tr.option(), mono.WithTelemetry(messaging.Settings{FreshFor: tt.freshFor})},
				emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll))
			publishStored(t, app, nil)
			publish, process := tr.one(t, publishSpan), tr.one(t, processSpan)
			wantLinks(t, process, publish.SpanContext())
			if tt.child {
				wantChild(t, process, publish)
			} else {
				wantRoot(t, process, publish)
			}
		})
	}
}

// A trace goes on over a server in between, from one process to another, and
// over a restart of the consumer.
func TestTrace_acrossProcesses(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	start := func(tr *tracing, modules ...mono.Module) *mono.App {
		t.Helper()
		return monotest.AppWith(t, []mono.Option{mono.WithNATS(server.URL()), quiet(), tr.option(), mono.WithEvents(monotestEvent(t))}, modules...)
	}
	there, here, again := newTracing(), newTracing(), newTracing()
	first := start(here, tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error { return msgs[0].NakWithDelay(2 * time.Second) }))
	publishStored(t, start(there), nil)
	publish, attempt := there.one(t, publishSpan), here.one(t, processSpan)
	wantChild(t, attempt, publish)
	host, port := attrOf(publish, "server.address"), attrOf(publish, "server.port")
	if !strings.HasSuffix(server.URL(), "@"+host+":"+port) {
		t.Errorf("the server is %s:%s, which is not that of the URL", host, port)
	}
	if err := first.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	start(again, tracedConsumer(t, 1, ackAll))
	second := again.one(t, processSpan)
	wantRoot(t, second, publish)
	// The attempt before was another process's.
	wantLinks(t, second, publish.SpanContext())
	wantAttrs(t, second, map[string]string{"messaging.nats.delivery_count": "2"})
}

// Clients in other languages write the header in their own way.
func TestTrace_headersOfOthers(t *testing.T) {
	t.Parallel()
	const (
		id    = "0af7651916cd43dd8448eb211c80319c"
		span  = "b7ad6b7169203331"
		value = "00-" + id + "-" + span + "-01"
	)
	for _, tt := range []struct {
		key, value string
		child      bool
	}{
		{"traceparent", value, true},
		{"Traceparent", value, true},
		{"TRACEPARENT", value, true},
		{"tRaCePaReNt", value, true},
		{"Xraceparent", value, true},
		{"traceparent", "00-" + id + "-0000000000000000-01", false},
		{"traceparent", "hello", false},
		{"Other", value, false},
	} {
		t.Run(tt.key+" "+tt.value, func(t *testing.T) {
			t.Parallel()
			tr := newTracing()
			app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll))
			if err := app.Conn().PublishMsg(&nats.Msg{Subject: traceSubject, Header: nats.Header{tt.key: {tt.value}}, Data: []byte("x")}); err != nil {
				t.Fatal(err)
			}
			process := tr.one(t, processSpan)
			if !tt.child {
				wantRoot(t, process)
				wantLinks(t, process)
				return
			}
			if process.SpanContext().TraceID().String() != id || process.Parent().SpanID().String() != span {
				t.Errorf("process is in trace %v below %v", process.SpanContext().TraceID(), process.Parent().SpanID())
			}
		})
	}
}

// What the caller has written is sent as it is, and linked to. Neither the
// message nor its header is changed, whoever else publishes them.
func TestTrace_callersHeader(t *testing.T) {
	t.Parallel()
	const publishers = 16
	const value = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
	tr := newTracing()
	got := make(chan mono.Header, 2*publishers)
	app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(ctx context.Context, msgs []*mono.Msg) error {
			got <- msgs[0].Header
			return ackAll(ctx, msgs)
		}))
	publishStored(t, app, mono.Header{"Traceparent": {value}, "a": {"b"}})
	if h := receive(t, got, "the message"); h["Traceparent"][0] != value || len(h["traceparent"]) > 0 {
		t.Errorf("the header arrived as %v", h)
	}
	if links := tr.one(t, publishSpan).Links(); len(links) != 1 || links[0].SpanContext.SpanID().String() != "b7ad6b7169203331" {
		t.Errorf("the publish has the links %v", links)
	}

	shared := &mono.Msg{Subject: traceSubject, Data: []byte("x"), Header: mono.Header{"a": {"b"}}}
	var all sync.WaitGroup
	for range publishers {
		all.Go(func() {
			if _, err := app.Bus().PublishStream(within(t), shared); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if diff := cmp.Diff(mono.Header{"a": {"b"}}, shared.Header); diff != "" {
		t.Errorf("the caller's header (-want +got):\n%s", diff)
	}
	seen := make(map[string]bool)
	for range publishers {
		seen[receive(t, got, "a message")["traceparent"][0]] = true
	}
	if len(seen) != publishers {
		t.Errorf("%d trace contexts for %d messages", len(seen), publishers)
	}
}

// Middleware finds the spans in the contexts, to add what it knows.
func TestTrace_middleware(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	errRefused := errors.New("refused")
	mw := mono.Middleware{
		Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				for _, m := range msgs {
					trace.SpanFromContext(m.Context()).SetAttributes(attribute.String("handled.by", "middleware"))
				}
				return next(ctx, msgs)
			}
		},
		Publish: func(next mono.PublishFunc) mono.PublishFunc {
			return func(ctx context.Context, m *mono.Msg) error {
				trace.SpanFromContext(ctx).SetAttributes(attribute.String("published.by", "middleware"))
				if len(m.Data) == 0 {
					return errRefused
				}
				m.Header["added"] = []string{"yes"}
				return next(ctx, m)
			}
		},
	}
	app := startAppWith(t, []mono.Option{tr.option(), mono.WithMiddleware(mw)}, emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll))
	publishStored(t, app, nil)
	publish, process := tr.one(t, publishSpan), tr.one(t, processSpan)
	wantChild(t, process, publish)
	wantAttrs(t, publish, map[string]string{"published.by": "middleware", "messaging.nats.stream": "orders"})
	wantAttrs(t, process, map[string]string{"handled.by": "middleware"})

	f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("x")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Wait(within(t)); err != nil {
		t.Fatal(err)
	}
	wantAttrs(t, tr.ended(t, publishSpan, 2)[1], map[string]string{"published.by": "middleware", "messaging.nats.stream": "orders"})
	for _, publish := range []func(context.Context, *mono.Msg) error{
		app.Bus().Publish,
		func(ctx context.Context, m *mono.Msg) error { _, err := app.Bus().PublishStream(ctx, m); return err },
		func(ctx context.Context, m *mono.Msg) error {
			_, err := app.Bus().PublishStreamAsync(ctx, m)
			return err
		},
	} {
		if err := publish(within(t), &mono.Msg{Subject: traceSubject}); !errors.Is(err, errRefused) {
			t.Errorf("publish = %v", err)
		}
	}
	for _, s := range tr.ended(t, publishSpan, 5)[2:] {
		if s.Status().Code != codes.Error {
			t.Errorf("a refused publish has status %v", s.Status())
		}
	}
}

// Middleware may publish a message again after a failure, or more than once. Each
// message that is sent is traced and counted; what comes of one attempt at least
// is a success.
func TestTrace_middlewareSendsAgain(t *testing.T) {
	t.Parallel()
	send := map[string]func(bus mono.EventBus, ctx context.Context, m *mono.Msg) error{
		"core": func(bus mono.EventBus, ctx context.Context, m *mono.Msg) error { return bus.Publish(ctx, m) },
		"stream": func(bus mono.EventBus, ctx context.Context, m *mono.Msg) error {
			_, err := bus.PublishStream(ctx, m)
			return err
		},
		"async": func(bus mono.EventBus, ctx context.Context, m *mono.Msg) error {
			f, err := bus.PublishStreamAsync(ctx, m)
			if err == nil {
				_, err = f.Wait(ctx)
			}
			return err
		},
	}
	for how, publish := range send {
		for _, tt := range []struct {
			name              string
			middleware        func(next mono.PublishFunc, ctx context.Context, m *mono.Msg) error
			sent, failed      int
			published, broken int // spans, and those of them that failed
		}{
			{name: "after a failure", sent: 1, published: 1, middleware: func(next mono.PublishFunc, ctx context.Context, m *mono.Msg) error {
				data := m.Data
				m.Data = make([]byte, 2<<20)
				if err := next(ctx, m); !errors.Is(err, mono.ErrPayloadTooLarge) {
					return fmt.Errorf("the first is not too large: %w", err)
				}
				m.Data = data
				return next(ctx, m)
			}},
			{name: "twice", sent: 2, published: 2, middleware: func(next mono.PublishFunc, ctx context.Context, m *mono.Msg) error {
				return errors.Join(next(ctx, m), next(ctx, m))
			}},
			{name: "in parallel", sent: 3, published: 3, middleware: func(next mono.PublishFunc, ctx context.Context, m *mono.Msg) error {
				const n = 3
				results := make(chan error, n)
				for range n {
					c := *m
					go func() { results <- next(ctx, &c) }()
				}
				return errors.Join(<-results, <-results, <-results)
			}},
			{name: "never", failed: 1, published: 1, broken: 1, middleware: func(next mono.PublishFunc, ctx context.Context, m *mono.Msg) error {
				m.Data = make([]byte, 2<<20)
				return errors.Join(next(ctx, m), next(ctx, m))
			}},
		} {
			t.Run(how+" "+tt.name, func(t *testing.T) {
				t.Parallel()
				tr, scrape := newTracing(), newScraper(t)
				mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
					return func(ctx context.Context, m *mono.Msg) error { return tt.middleware(next, ctx, m) }
				}}
				app := startAppWith(t, []mono.Option{tr.option(), scrape.option, mono.WithMiddleware(mw)}, emitter("shop", monotestEvent(t)),
					tracedConsumer(t, 1, ackAll))
				ctx, root := tr.provider.Tracer("test").Start(within(t), "request")
				err := publish(app.Bus(), ctx, &mono.Msg{Subject: traceSubject, Data: []byte("x")})
				root.End()
				if (err != nil) != (tt.failed > 0) {
					t.Fatalf("publish = %v", err)
				}
				broken := 0
				for _, s := range tr.ended(t, publishSpan, tt.published) {
					if s.Status().Code == codes.Error {
						broken++
					}
					if s.SpanContext().TraceID() != root.SpanContext().TraceID() {
						t.Error("a publish is in a trace of its own")
					}
				}
				if broken != tt.broken {
					t.Errorf("%d of the spans have failed, want %d", broken, tt.broken)
				}
				for _, s := range tr.ended(t, processSpan, tt.sent) {
					if s.SpanContext().TraceID() != root.SpanContext().TraceID() {
						t.Error("a message is not in its trace")
					}
				}
				got := only(scrape.text(t), "messaging_client_sent", "mono_publish_pending")
				want := map[string]float64{}
				if tt.sent > 0 {
					want["messaging_client_sent_messages_total{messaging_operation_name=publish}"] = float64(tt.sent)
				}
				if tt.failed > 0 {
					want["messaging_client_sent_messages_total{error_type=payload_too_large,messaging_operation_name=publish}"] = float64(tt.failed)
				}
				if diff := cmp.Diff(want, got, cmpopts.IgnoreMapEntries(func(k string, v float64) bool { return k == "mono_publish_pending{}" && v == 0 })); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
			})
		}
	}
}

// Middleware that goes on before next has returned gets nobody into trouble.
func TestTrace_middlewareGoesOnBefore(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	var late sync.WaitGroup
	errGone := errors.New("gone on")
	mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, m *mono.Msg) error {
			late.Go(func() { _ = next(ctx, m) })
			return errGone
		}
	}}
	app := startAppWith(t, []mono.Option{tr.option(), mono.WithMiddleware(mw)}, emitter("shop", monotestEvent(t)), tracedConsumer(t, 10, ackAll))
	const n = 200
	for range n {
		if ack, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("x")}); !errors.Is(err, errGone) {
			t.Errorf("PublishStream = %v, %v", ack, err)
		}
	}
	late.Wait()
	settled(t, app, "orders", "billing")
	spans := tr.ended(t, processSpan, n)
	for _, s := range spans {
		if !s.Parent().IsValid() {
			t.Error("a message that was sent late has no trace")
		}
	}
}

// What middleware sends when the publish has returned is a publish of its own.
func TestTrace_middlewareSendsLate(t *testing.T) {
	t.Parallel()
	tr, scrape := newTracing(), newScraper(t)
	var later func() error
	errGone := errors.New("gone on")
	mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, m *mono.Msg) error {
			later = func() error { return next(ctx, m) }
			return errGone
		}
	}}
	app := startAppWith(t, []mono.Option{tr.option(), scrape.option, mono.WithMiddleware(mw)}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, ackAll))
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("x")}); !errors.Is(err, errGone) {
		t.Fatalf("PublishStream = %v", err)
	}
	if err := later(); err != nil {
		t.Fatal(err)
	}
	spans := tr.ended(t, publishSpan, 2)
	if first, late := spans[0], spans[1]; first.Status().Code != codes.Error || late.Status().Code == codes.Error ||
		late.Parent().SpanID() != first.SpanContext().SpanID() {
		t.Errorf("the publish has status %v, the late one %v, below it: %v", first.Status(), late.Status(), late.Parent().SpanID())
	}
	if s := tr.one(t, processSpan); s.Parent().SpanID() != spans[1].SpanContext().SpanID() {
		t.Error("the message is not below the publish that sent it")
	}
	want := map[string]float64{
		"messaging_client_sent_messages_total{messaging_operation_name=publish}":                                1,
		"messaging_client_sent_messages_total{error_type=*errors.errorString,messaging_operation_name=publish}": 1,
	}
	if diff := cmp.Diff(want, only(scrape.text(t), "messaging_client_sent")); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// What a handler publishes, in whatever way, is below its message; so is what
// middleware opens around a publish.
func TestTrace_downstream(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	core, err := mono.NewEvent("shop", "Pinged", "v1")
	if err != nil {
		t.Fatal(err)
	}
	typed := helper.EventDefinition[int]("shop", "Counted", "v1")
	mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, m *mono.Msg) error {
			ctx, span := tr.provider.Tracer("test").Start(ctx, "around")
			defer span.End()
			return next(ctx, m)
		}
	}}
	var bus mono.EventBus
	app := startAppWith(t, []mono.Option{tr.option(), mono.WithMiddleware(mw)}, emitter("shop", monotestEvent(t), core, typed.ToBase()),
		consumer("pings", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(core, func(ctx context.Context, m *mono.Msg) error {
				_, err := bus.PublishStream(ctx, &mono.Msg{Subject: traceSubject, Data: m.Data})
				return err
			}, self)
		}),
		tracedConsumer(t, 1, func(ctx context.Context, msgs []*mono.Msg) error {
			f, err := bus.PublishStreamAsync(ctx, &mono.Msg{Subject: typed.ToBase().Subject, Data: []byte("7")})
			if err == nil {
				_, err = f.Wait(ctx)
			}
			return errors.Join(err, ackAll(ctx, msgs))
		}),
		consumer("counts", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(r, typed, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "counts"}, AutoAck: true,
			}, func(context.Context, []int, []*mono.Msg) error { return nil }, self)
		}))
	bus = app.Bus()
	if err := bus.Publish(within(t), &mono.Msg{Subject: core.Subject, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	// From the last to the first.
	subject := typed.ToBase().Subject
	chain := []string{
		"ack " + subject, "process " + subject, "publish " + subject, processSpan, publishSpan, "process " + core.Subject, "publish " + core.Subject,
	}
	for i := range len(chain) - 1 {
		wantChild(t, tr.one(t, chain[i]), tr.one(t, chain[i+1]))
	}
	wantRoot(t, tr.one(t, chain[len(chain)-1]))
	around := tr.ended(t, "around", 3)
	for i, s := range []string{"publish " + core.Subject, publishSpan, "publish " + subject} {
		wantChild(t, around[i], tr.one(t, s))
	}
}

// Typed batches keep their traces apart, what does not decode among them.
func TestTrace_typedBatch(t *testing.T) {
	t.Parallel()
	const n = 5
	tr := newTracing()
	typed := helper.EventDefinition[int]("shop", "Counted", "v1")
	subject := typed.ToBase().Subject
	var (
		mu   sync.Mutex
		seen = make(map[int]trace.SpanContext)
	)
	srv := monotest.Server(t)
	emit := runApp(t, append(onServer(srv), tr.option()), emitter("shop", typed.ToBase()),
		consumer("other", func(r mono.EventRegistry, self mono.Module) error { // has the stream made
			return helper.RegisterTypedEventStreamConsumer(r, typed, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "counts"}, AutoAck: true},
				func(context.Context, []int, []*mono.Msg) error { return nil }, self)
		}))
	requests := make(map[int]trace.SpanContext)
	for i := range n {
		ctx, span := tr.provider.Tracer("test").Start(within(t), "request")
		if _, err := typed.EventStreamPublish(ctx, emit.Bus(), i, nil); err != nil {
			t.Fatal(err)
		}
		span.End()
		requests[i] = span.SpanContext()
	}
	ctx, span := tr.provider.Tracer("test").Start(within(t), "request")
	if _, err := emit.Bus().PublishStream(ctx, &mono.Msg{Subject: subject, Data: []byte("not a number")}); err != nil {
		t.Fatal(err)
	}
	span.End()
	requests[n] = span.SpanContext()
	// All of them wait when this one starts, so they come as a batch.
	here := newTracing()
	batches := make(chan int, n)
	runApp(t, append(onServer(srv), here.option(), mono.WithEvents(typed.ToBase())), consumer("reader", func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventStreamConsumer(r, typed, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "counts"}, AutoAck: true},
			func(_ context.Context, counts []int, msgs []*mono.Msg) error {
				mu.Lock()
				defer mu.Unlock()
				for i, c := range counts {
					seen[c] = trace.SpanContextFromContext(msgs[i].Context())
				}
				batches <- len(counts)
				return nil
			}, self)
	}))
	spans := here.ended(t, "process "+subject, n+1)
	for got := 0; got < n; {
		got += receive(t, batches, "a batch")
	}
	traces := make(map[trace.TraceID]bool)
	undecodable := 0
	for _, s := range spans {
		traces[s.SpanContext().TraceID()] = true
		if attrOf(s, "error.type") == "undecodable" {
			undecodable++
			wantAttrs(t, s, map[string]string{"messaging.nats.settlement": "term"})
			if s.SpanContext().TraceID() != requests[n].TraceID() {
				t.Error("what does not decode is not in its trace")
			}
		}
	}
	if len(traces) != n+1 || undecodable != 1 {
		t.Errorf("%d traces of %d messages, %d undecodable", len(traces), n+1, undecodable)
	}
	mu.Lock()
	defer mu.Unlock()
	for i := range n {
		if seen[i].TraceID() != requests[i].TraceID() {
			t.Errorf("message %d is handled in trace %v, want %v", i, seen[i].TraceID(), requests[i].TraceID())
		}
	}
}

// What was going on when the App was started has nothing to do with what it
// handles later.
func TestTrace_startsContextIsNoParent(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet(), tr.option())
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll)); err != nil {
		t.Fatal(err)
	}
	ctx, main := tr.provider.Tracer("test").Start(within(t), "main")
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
	main.End()
	if err := app.Conn().Publish(traceSubject, []byte("x")); err != nil { // without a header
		t.Fatal(err)
	}
	wantRoot(t, tr.one(t, processSpan), tr.one(t, "main"))
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
}

func TestTrace_settleSpans(t *testing.T) {
	t.Parallel()
	for level, want := range map[messaging.SettleSpans]map[string]int{
		messaging.SettleSpansAll:      {ackSpan: 1, nakSpan: 1, termSpan: 1},
		messaging.SettleSpansFailures: {nakSpan: 1, termSpan: 1},
		messaging.SettleSpansNone:     {},
	} {
		t.Run(fmt.Sprint(level), func(t *testing.T) {
			t.Parallel()
			tr := newTracing()
			app := startAppWith(t, []mono.Option{tr.option(), mono.WithTelemetry(messaging.Settings{SettleSpans: level})},
				emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error {
					switch m := msgs[0]; {
					case m.Metadata().Sequence.Stream == 2:
						return m.Term()
					case m.Metadata().NumDelivered == 1:
						return m.Nak()
					default:
						return m.Ack()
					}
				}))
			publishStored(t, app, nil)
			publishStored(t, app, nil)
			tr.ended(t, processSpan, 3)
			got := make(map[string]int)
			for _, name := range tr.names() {
				if slices.Contains([]string{ackSpan, nakSpan, termSpan}, name) {
					got[name]++
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

// contexts keeps the contexts of log records.
type contextsOfLogs struct {
	slog.Handler

	mu    sync.Mutex
	spans map[string]trace.SpanContext // by message
}

func (h *contextsOfLogs) Handle(ctx context.Context, r slog.Record) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.spans[r.Message] = trace.SpanContextFromContext(ctx)
	return nil
}

func (h *contextsOfLogs) Enabled(context.Context, slog.Level) bool { return true }

func (h *contextsOfLogs) all() map[string]trace.SpanContext {
	h.mu.Lock()
	defer h.mu.Unlock()
	return maps.Clone(h.spans)
}

// The line that reports a failure is logged with the failed message's span.
func TestTrace_logs(t *testing.T) {
	t.Parallel()
	tr := newTracing()
	logs := &contextsOfLogs{Handler: slog.DiscardHandler, spans: make(map[string]trace.SpanContext)}
	app := startAppWith(t, []mono.Option{tr.option(), mono.WithLogger(slog.New(logs))}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error {
			if msgs[0].Metadata().NumDelivered == 1 {
				return mono.RetryAfter(errBrokenPipe, 1100*time.Millisecond) // there is a line a second
			}
			return errors.Join(msgs[0].Ack(), errBrokenPipe)
		}))
	publishStored(t, app, nil)
	attempts := tr.ended(t, processSpan, 2)
	settled(t, app, "orders", "billing")
	const late = "handler failed after every message was settled"
	eventually(t, func() bool { return logs.all()[late].IsValid() }, late)
	for text, want := range map[string]trace.SpanContext{"handler failed, will retry": attempts[0].SpanContext(), late: attempts[1].SpanContext()} {
		if got := logs.all()[text]; !got.Equal(want) {
			t.Errorf("%q is logged with span %v, want %v", text, got, want)
		}
	}
}
