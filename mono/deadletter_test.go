package mono_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/codes"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// records returns what is in the dead-letter stream, oldest first.
func records(t *testing.T, js jetstream.JetStream) []*dlq.Record {
	t.Helper()
	stream, err := js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(js.Conn(), js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	var out []*dlq.Record
	for seq := stream.CachedInfo().State.FirstSeq; seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(within(t), seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		r, err := store.Load(within(t), m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

func awaitRecords(t *testing.T, app *mono.App, n int) []*dlq.Record {
	t.Helper()
	js := jetStream(t, app)
	eventually(t, func() bool {
		s, err := js.Stream(within(t), "DLQ")
		return err == nil && s.CachedInfo().State.Msgs >= uint64(n)
	}, fmt.Sprintf("%d dead letters", n))
	rs := records(t, js)
	if len(rs) != n {
		t.Fatalf("%d dead letters, want %d", len(rs), n)
	}
	return rs
}

type customError struct{ code int }

func (e *customError) Error() string   { return fmt.Sprintf("code %d,\nsecond line", e.code) }
func (*customError) ErrorType() string { return "custom" }

// Whatever a consumer gives up is in the dead-letter stream, with what is known of
// it, and nowhere else.
func TestDeadLetter_reasons(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name     string
		attempts int
		handle   func(m *mono.Msg) error
		want     dlq.Record
		stack    bool
	}{
		{name: "term", handle: func(m *mono.Msg) error { return m.Term() }, want: dlq.Record{Reason: dlq.ReasonTerminated, Deliveries: 1}},
		{
			name: "term with a reason", handle: func(m *mono.Msg) error { return m.TermWithReason("the customer\nis gone") },
			want: dlq.Record{Reason: dlq.ReasonTerminated, ReasonText: "the customer\nis gone", Deliveries: 1},
		},
		{
			name: "permanent", handle: func(*mono.Msg) error { return mono.Permanent(fmt.Errorf("bill: %w", &customError{7})) },
			want: dlq.Record{
				Reason: dlq.ReasonPermanentError, Error: "bill: code 7,\nsecond line", ErrorType: "custom", Deliveries: 1,
				ErrorTypes: []string{"*mono.permanentError", "*fmt.wrapError", "*mono_test.customError"},
			},
		},
		{
			name: "fail one", handle: func(m *mono.Msg) error { return m.Fail(mono.Permanent(errBrokenPipe)) },
			want: dlq.Record{
				Reason: dlq.ReasonPermanentError, Error: "broken pipe", ErrorType: "*errors.errorString", Deliveries: 1,
				ErrorTypes: []string{"*mono.permanentError", "*errors.errorString"},
			},
		},
		{
			name: "attempts", attempts: 2, handle: func(*mono.Msg) error { return errBrokenPipe },
			want: dlq.Record{
				Reason: dlq.ReasonAttemptsExhausted, Error: "broken pipe", ErrorType: "*errors.errorString", Deliveries: 2,
				ErrorTypes: []string{"*errors.errorString"},
			},
		},
		{
			name: "nak on the last", attempts: 2, handle: func(m *mono.Msg) error { return m.Nak() },
			want: dlq.Record{Reason: dlq.ReasonAttemptsExhausted, ReasonText: "nak on the last attempt", Deliveries: 2},
		},
		{
			name: "panic", attempts: 1, handle: func(*mono.Msg) error { panic("as ordered") }, stack: true,
			want: dlq.Record{Reason: dlq.ReasonPanic, Error: "panic: as ordered", ErrorType: "panic", ErrorTypes: []string{"*mono.PanicError"}, Deliveries: 1},
		},
	} {
		for _, retention := range []jetstream.RetentionPolicy{mono.LimitsPolicy, mono.InterestPolicy, mono.WorkQueuePolicy} {
			t.Run(tt.name+" "+retention.String(), func(t *testing.T) {
				t.Parallel()
				tr := newTracing()
				app := startAppWith(t, []mono.Option{mono.WithName("shop-app"), tr.option()}, emitter("shop", monotestEvent(t)),
					consumer("billing", func(r mono.EventRegistry, self mono.Module) error {
						return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
							Stream:   mono.StreamConfig{Name: "orders", Retention: retention},
							Consumer: mono.ConsumerConfig{Durable: "billing"},
							Retry:    mono.RetryPolicy{MaxAttempts: tt.attempts, Backoff: []time.Duration{time.Millisecond}},
						}, func(_ context.Context, msgs []*mono.Msg) error { return tt.handle(msgs[0]) }, self)
					}))
				before := time.Now()
				header := mono.Header{"k": {"v", "w"}, "Nats-Msg-Id": {"order-1"}}
				if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("payload"), Header: header}); err != nil {
					t.Fatal(err)
				}
				got := awaitRecords(t, app, 1)[0]
				settled(t, app, "orders", "billing")
				if retention != mono.LimitsPolicy {
					eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the message is gone from its stream")
				}
				if string(got.Data) != "payload" || got.Subject != traceSubject || !slices.Equal(got.Header["k"], header["k"]) ||
					got.Header.Get("Nats-Msg-Id") != "order-1" {
					t.Errorf("the record has %q on %q with %v", got.Data, got.Subject, got.Header)
				}
				if got.Reason != tt.want.Reason || got.ReasonText != tt.want.ReasonText || got.Error != tt.want.Error ||
					got.ErrorType != tt.want.ErrorType || !slices.Equal(got.ErrorTypes, tt.want.ErrorTypes) || got.Deliveries != tt.want.Deliveries {
					t.Errorf("the record says %+v, want %+v", *got, tt.want)
				}
				if (len(got.Stack) > 0) != tt.stack || tt.stack && !strings.Contains(strings.Join(got.Stack, "\n"), "TestDeadLetter_reasons") {
					t.Errorf("the stack is %q", got.Stack)
				}
				if got.Stream != "orders" || got.Consumer != "billing" || got.StreamSequence != 1 || got.Module != "billing" ||
					got.App != "shop-app" || got.Event != "shop/OrderPlaced/v1" || got.Host == "" || got.ConsumerSequence != got.Deliveries {
					t.Errorf("the record is of %+v", *got)
				}
				if got.Stored.Before(before.Add(-time.Second)) || got.Failed.Before(got.Stored) || got.StreamCreated.IsZero() {
					t.Errorf("stored %v, failed %v, stream made %v", got.Stored, got.Failed, got.StreamCreated)
				}
				if (got.Deliveries > 1 && got.Error != "") != !got.FirstFailed.IsZero() {
					t.Errorf("first failed %v after %d deliveries", got.FirstFailed, got.Deliveries)
				}

				publish, capture := tr.one(t, publishSpan), tr.one(t, "dead_letter DLQ")
				attempts := tr.ended(t, processSpan, int(got.Deliveries))
				last := attempts[len(attempts)-1]
				wantChild(t, capture, last)
				wantLinks(t, capture, publish.SpanContext())
				wantAttrs(t, capture, map[string]string{
					"messaging.operation.name": "dead_letter", "messaging.nats.dead_letter.reason": string(got.Reason),
					"messaging.consumer.group.name": "billing", "messaging.nats.stream": "orders", "messaging.nats.stream_sequence": "1",
				})
				if capture.Status().Code != codes.Unset {
					t.Errorf("the capture has status %v", capture.Status())
				}
				for _, link := range []struct{ name, got, want string }{
					{"attempt", got.Traceparent, last.SpanContext().SpanID().String()},
					{"origin", got.OriginTraceparent, publish.SpanContext().SpanID().String()},
				} {
					if !strings.Contains(link.got, link.want) {
						t.Errorf("traceparent of the %s is %q, want one with %s", link.name, link.got, link.want)
					}
				}
				raw := rawRecord(t, app)
				if !strings.Contains(raw.Header.Get("traceparent"), capture.SpanContext().SpanID().String()) {
					t.Errorf("the record's own traceparent is %q", raw.Header.Get("traceparent"))
				}
			})
		}
	}
}

func rawRecord(t *testing.T, app *mono.App) *jetstream.RawStreamMsg {
	t.Helper()
	s, err := jetStream(t, app).Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.GetMsg(within(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// A payload that does not decode is captured alone.
func TestDeadLetter_undecodable(t *testing.T) {
	t.Parallel()
	typed := helper.EventDefinition[int]("shop", "Counted", "v1")
	handled := make(chan int, 10)
	app := startApp(t, emitter("shop", typed.ToBase()), consumer("counts", func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventStreamConsumer(r, typed, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "counts"}, AutoAck: true},
			func(_ context.Context, counts []int, _ []*mono.Msg) error {
				for _, c := range counts {
					handled <- c
				}
				return nil
			}, self)
	}))
	for _, data := range []string{"1", "not a number", "2"} {
		if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: typed.ToBase().Subject, Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
	}
	if got := receive(t, handled, "the first") + receive(t, handled, "the second"); got != 3 {
		t.Errorf("handled %d", got)
	}
	r := awaitRecords(t, app, 1)[0]
	if r.Reason != dlq.ReasonUndecodable || string(r.Data) != "not a number" || r.ErrorType != "undecodable" {
		t.Errorf("the record is %+v", *r)
	}
}

// A message was delivered more often than it has attempts, and nobody knows why: it
// was held before a restart, or its policy was changed. Its handler gets it alone. Only
// when that has ended three times without an outcome is it captured as crashed.
//
// Before, the deliveries were counted: after four the handler was not called, and the
// record said that the process had crashed.
func TestDeadLetter_crashed(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		marks   int // that are left
		err     error
		handled int64
		want    dlq.Reason
	}{
		{name: "only delivered often, handled", handled: 1},
		{name: "only delivered often, fails", err: errBrokenPipe, handled: 1, want: dlq.ReasonAttemptsExhausted},
		{name: "crashed twice, handled", marks: 2, handled: 1},
		{name: "crashed twice, fails", marks: 2, err: errBrokenPipe, handled: 1, want: dlq.ReasonAttemptsExhausted},
		{name: "crashed three times", marks: 3, want: dlq.ReasonCrashed},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var handled atomic.Int64
			module := func() *testModule {
				return consumer("billing", func(r mono.EventRegistry, self mono.Module) error {
					return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
						Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
						Retry: mono.RetryPolicy{MaxAttempts: 2}, AutoAck: true,
					}, func(_ context.Context, msgs []*mono.Msg) error {
						handled.Add(int64(len(msgs)))
						return tt.err
					}, self)
				})
			}
			first := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
			mustStop(t, first)
			nc := srv.Conn()
			js := jetStreamOf(t, nc)
			if _, err := js.Publish(within(t), traceSubject, []byte("deadly")); err != nil {
				t.Fatal(err)
			}
			// As an instance that gets it and hands it back, eleven times.
			c, err := js.Consumer(within(t), "orders", "billing")
			if err != nil {
				t.Fatal(err)
			}
			for range 11 {
				m, err := c.Next(jetstream.FetchMaxWait(patience))
				if err != nil {
					t.Fatal(err)
				}
				if err := m.Nak(); err != nil {
					t.Fatal(err)
				}
			}
			if err := nc.Flush(); err != nil {
				t.Fatal(err)
			}
			stream, err := js.Stream(within(t), "orders")
			if err != nil {
				t.Fatal(err)
			}
			store, err := dlq.NewStore(nc, js, dlq.Config{})
			if err != nil {
				t.Fatal(err)
			}
			id := dlq.ID("orders", stream.CachedInfo().Created, "billing", 1)
			for range tt.marks {
				mark, err := store.Mark(within(t), id)
				if err == nil {
					err = store.AddMark(within(t), id, mark)
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			tr, scrape := newTracing(), newScraper(t)
			app := runApp(t, append(onServer(srv), tr.option(), scrape.option, mono.WithEvents(monotestEvent(t))), module())
			settled(t, app, "orders", "billing")
			if handled.Load() != tt.handled {
				t.Errorf("handled %d times, want %d", handled.Load(), tt.handled)
			}
			eventually(t, func() bool {
				mark, err := store.Mark(within(t), id)
				return err == nil && mark == dlq.Mark{}
			}, "the mark is removed")
			if tt.want == "" {
				if n := streamMsgs(t, app, "DLQ"); n != 0 {
					t.Errorf("%d dead letters, want none", n)
				}
				return
			}
			r := awaitRecords(t, app, 1)[0]
			if r.Reason != tt.want || r.Deliveries != 12 || string(r.Data) != "deadly" {
				t.Errorf("the record is %+v", *r)
			}
			if tt.err != nil {
				if r.Error != tt.err.Error() {
					t.Errorf("the record says %q, want the handler's error", r.Error)
				}
				return
			}
			if !strings.Contains(r.ReasonText, "3 times") {
				t.Errorf("the record says %q", r.ReasonText)
			}
			wantRoot(t, tr.one(t, "dead_letter DLQ"))
			if got := scrape.text(t)[`mono_dead_letters_captured_total{reason=crashed}`]; got != 1 {
				t.Errorf("%v captures are counted", got)
			}
		})
	}
}

// A process that ends between the acknowledgement of a record and the term leaves a
// message that comes again and is a dead letter already. No handler sees it, who
// might succeed.
func TestDeadLetter_capturedBefore(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var handled atomic.Int64
	module := func() *testModule {
		return tracedConsumer(t, 1, func(ctx context.Context, msgs []*mono.Msg) error {
			handled.Add(1)
			return ackAll(ctx, msgs)
		})
	}
	first := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
	if err := first.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(srv.Conn())
	if err != nil {
		t.Fatal(err)
	}
	for _, data := range []string{"captured", "only delivered"} {
		if _, err := js.Publish(within(t), traceSubject, []byte(data)); err != nil {
			t.Fatal(err)
		}
	}
	// As another process that gets both, captures the first, and ends.
	c, err := js.Consumer(within(t), "orders", "billing")
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(within(t), "orders")
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(js.Conn(), js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 {
		m, err := c.Next(jetstream.FetchMaxWait(patience))
		if err != nil {
			t.Fatal(err)
		}
		meta, err := m.Metadata()
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			created := stream.CachedInfo().Created
			r := &dlq.Record{
				ID: dlq.ID("orders", created, "billing", meta.Sequence.Stream), Reason: dlq.ReasonTerminated,
				Stream: "orders", Consumer: "billing", Stored: meta.Timestamp, Data: m.Data(),
			}
			if captured, err := store.Capture(within(t), r, nil); err != nil || !captured {
				t.Fatal(captured, err)
			}
		}
		if err := m.Nak(); err != nil {
			t.Fatal(err)
		}
	}
	if err := js.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	app := runApp(t, append(onServer(srv), mono.WithEvents(monotestEvent(t))), module())
	settled(t, app, "orders", "billing")
	eventually(t, func() bool { return handled.Load() == 1 }, "the other message is handled")
	if rs := awaitRecords(t, app, 1); string(rs[0].Data) != "captured" {
		t.Errorf("captured: %q", rs[0].Data)
	}
}

// Without dead letters a message that is given up is terminated, counted, and
// gone.
func TestWithoutDeadLetters(t *testing.T) {
	t.Parallel()
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{mono.WithoutDeadLetters(), scrape.option}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error { return msgs[0].Term() }))
	publishStored(t, app, nil)
	settled(t, app, "orders", "billing")
	eventually(t, func() bool { return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=term}"] == 1 }, "the term is counted")
	if _, err := jetStream(t, app).Stream(within(t), "DLQ"); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("stream DLQ: %v", err)
	}
	for name := range scrape.text(t) {
		if strings.HasPrefix(name, "mono_dead_letters") {
			t.Errorf("%s is reported", name)
		}
	}
}

// While the dead-letter stream takes nothing, every message is held, no handler
// sees it again, and all are captured for the right reason when it does.
func TestDeadLetter_heldWhileItCannotBeStored(t *testing.T) {
	t.Parallel()
	const n = 20
	for _, tt := range []struct {
		name   string
		cfg    dlq.Config
		broken func(t *testing.T, js jetstream.JetStream)
		mend   func(t *testing.T, js jetstream.JetStream)
	}{
		{
			name: "full", cfg: dlq.Config{Stream: jetstream.StreamConfig{MaxMsgs: 3}},
			broken: func(*testing.T, jetstream.JetStream) {},
			mend: func(t *testing.T, js jetstream.JetStream) {
				t.Helper()
				s, err := js.Stream(within(t), "DLQ")
				if err != nil {
					t.Fatal(err)
				}
				cfg := s.CachedInfo().Config
				cfg.MaxMsgs = -1
				if _, err := js.UpdateStream(within(t), cfg); err != nil {
					t.Fatal(err)
				}
			},
		},
		{
			// Its subject is taken, so that it cannot be made again either.
			name: "missing",
			broken: func(t *testing.T, js jetstream.JetStream) {
				t.Helper()
				if err := js.DeleteStream(within(t), "DLQ"); err != nil {
					t.Fatal(err)
				}
				if _, err := js.CreateStream(within(t), jetstream.StreamConfig{
					Name: "OTHER", Subjects: []string{"monotel.dlq.>"}, MaxMsgs: 1, Discard: jetstream.DiscardNew, MaxMsgSize: 1,
				}); err != nil {
					t.Fatal(err)
				}
			},
			mend: func(t *testing.T, js jetstream.JetStream) {
				t.Helper()
				if err := js.DeleteStream(within(t), "OTHER"); err != nil {
					t.Fatal(err)
				}
			},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var handled atomic.Int64
			scrape := newScraper(t)
			app := startAppWith(t, []mono.Option{mono.WithDeadLetters(tt.cfg), scrape.option}, emitter("shop", monotestEvent(t)),
				consumer("billing", func(r mono.EventRegistry, self mono.Module) error {
					return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
						Stream:   mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
						Consumer: mono.ConsumerConfig{Durable: "billing"},
						Retry:    mono.RetryPolicy{MaxAttempts: 1},
					}, func(_ context.Context, msgs []*mono.Msg) error {
						handled.Add(int64(len(msgs)))
						for _, m := range msgs {
							if m.Metadata().Sequence.Stream%2 == 0 {
								if err := m.TermWithReason("even"); err != nil {
									return err
								}
							}
						}
						return errBrokenPipe // on the last attempt
					}, self)
				}))
			js := jetStream(t, app)
			tt.broken(t, js)
			for range n {
				publishStored(t, app, nil)
			}
			failures := func() float64 { return scrape.text(t)["mono_dead_letters_capture_failures_total{}"] }
			eventually(t, func() bool { return handled.Load() == n && failures() >= 5 }, "captures fail")
			tt.mend(t, js)
			got := awaitRecords(t, app, n)
			settled(t, app, "orders", "billing")
			seen := make(map[uint64]dlq.Reason)
			for _, r := range got {
				seen[r.StreamSequence] = r.Reason
			}
			for seq := uint64(1); seq <= n; seq++ {
				want := dlq.ReasonAttemptsExhausted
				if seq%2 == 0 {
					want = dlq.ReasonTerminated
				}
				if seen[seq] != want {
					t.Errorf("message %d was captured as %q, want %q", seq, seen[seq], want)
				}
			}
			if handled.Load() != n {
				t.Errorf("%d messages were handled, want each once: %d", handled.Load(), n)
			}
			if streamMsgs(t, app, "orders") != 0 {
				t.Error("messages are left")
			}
		})
	}
}

// A stream that is made anew begins its sequences anew: its dead letters are others
// than those of the old one.
func TestDeadLetter_streamMadeAnew(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error { return msgs[0].Term() }))
	publishStored(t, app, nil)
	awaitRecords(t, app, 1)
	settled(t, app, "orders", "billing")
	js := jetStream(t, app)
	// Another process makes stream and consumer anew before this one has noticed.
	info := streamInfo(t, app, "orders")
	durable := consumerInfo(t, app, "orders", "billing")
	if err := js.DeleteStream(within(t), "orders"); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(within(t), info.Config); err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateOrUpdateConsumer(within(t), "orders", durable.Config); err != nil {
		t.Fatal(err)
	}
	publishStored(t, app, nil)
	rs := awaitRecords(t, app, 2)
	if rs[0].StreamSequence != 1 || rs[1].StreamSequence != 1 || rs[0].ID == rs[1].ID {
		t.Errorf("dead letters %s of message %d and %s of message %d", rs[0].ID, rs[0].StreamSequence, rs[1].ID, rs[1].StreamSequence)
	}
	settled(t, app, "orders", "billing")
}

// The largest message that there can be is captured whole.
func TestDeadLetter_largest(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(context.Context, []*mono.Msg) error {
			return mono.Permanent(errors.New(strings.Repeat("long ", 10_000)))
		}))
	data := []byte(strings.Repeat("x", int(app.Conn().MaxPayload())))
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: data}); err != nil {
		t.Fatal(err)
	}
	r := awaitRecords(t, app, 1)[0]
	settled(t, app, "orders", "billing")
	if !bytes.Equal(r.Data, data) || r.Body != dlq.BodyObject {
		t.Errorf("%d bytes of %d, %q", len(r.Data), len(data), r.Body)
	}
}

// What is redacted is redacted before anything is stored.
func TestWithDeadLetters_redact(t *testing.T) {
	t.Parallel()
	cfg := dlq.Config{
		Stream: jetstream.StreamConfig{Name: "FAILED"},
		Redact: func(r *dlq.Record) {
			r.Data = []byte("redacted")
			r.Header.Del("Authorization")
			r.Error = strings.ReplaceAll(r.Error, "secret", "…")
		},
	}
	app := startAppWith(t, []mono.Option{mono.WithDeadLetters(cfg)}, emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error {
			return mono.Permanent(fmt.Errorf("no %s here", msgs[0].Data))
		}))
	msg := &mono.Msg{Subject: traceSubject, Data: []byte("secret"), Header: mono.Header{"Authorization": {"secret"}, "k": {"v"}}}
	if _, err := app.Bus().PublishStream(within(t), msg); err != nil {
		t.Fatal(err)
	}
	js := jetStream(t, app)
	var raw *jetstream.RawStreamMsg
	eventually(t, func() bool {
		s, err := js.Stream(within(t), "FAILED")
		if err != nil {
			return false
		}
		raw, err = s.GetMsg(within(t), 1)
		return err == nil
	}, "the dead letter")
	if all := fmt.Sprint(raw.Header, string(raw.Data)); strings.Contains(all, "secret") || !strings.Contains(all, "redacted") {
		t.Errorf("stored: %s", all)
	}
}

// Asked to, an App also captures what a plain client's consumer terminates, and
// counts it apart.
func TestWithDeadLetters_external(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	tr, scrape := newTracing(), newScraper(t)
	app := runApp(t, append(onServer(srv), tr.option(), scrape.option, mono.WithDeadLetters(dlq.Config{External: true})),
		emitter("shop", monotestEvent(t)),
		tracedConsumer(t, 1, func(_ context.Context, msgs []*mono.Msg) error { return msgs[0].TermWithReason("ours") }))
	js, err := jetstream.New(srv.Conn())
	if err != nil {
		t.Fatal(err)
	}
	c, err := js.CreateConsumer(within(t), "orders", jetstream.ConsumerConfig{Durable: "plain", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		t.Fatal(err)
	}
	publishStored(t, app, mono.Header{"k": {"v"}})
	m, err := c.Next(jetstream.FetchMaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.TermWithReason("theirs"); err != nil {
		t.Fatal(err)
	}
	got := awaitRecords(t, app, 2)
	if got[0].Consumer != "plain" {
		got[0], got[1] = got[1], got[0]
	}
	if r := got[0]; r.Reason != dlq.ReasonExternalTerminated || !strings.Contains(r.ReasonText, "theirs") || string(r.Data) != "x" ||
		r.Header.Get("k") != "v" || r.Stream != "orders" || r.Consumer != "plain" {
		t.Errorf("theirs: %+v", *r)
	}
	if r := got[1]; r.Reason != dlq.ReasonTerminated || r.ReasonText != "ours" || r.Consumer != "billing" {
		t.Errorf("ours: %+v", *r)
	}
	publish := tr.one(t, publishSpan)
	for _, s := range tr.ended(t, "dead_letter DLQ", 2) {
		wantLinks(t, s, publish.SpanContext())
		if attrOf(s, "messaging.consumer.group.name") == "plain" {
			wantRoot(t, s)
		}
	}
	eventually(t, func() bool {
		return scrape.seriesOfGroup(t, "mono_dead_letters_captured_total", "_external", `reason="external_terminated"`) == 1
	}, "it is counted")
}

func TestWithDeadLetters_refuses(t *testing.T) {
	t.Parallel()
	_, err := mono.New(mono.WithDeadLetters(dlq.Config{Stream: jetstream.StreamConfig{Name: "a.b", Subjects: []string{"x"}}}))
	wantError(t, err, mono.ErrInvalidConfig, "WithDeadLetters", "Stream.Name", "Stream.Subjects")

	srv := monotest.Server(t)
	js, err := jetstream.New(srv.Conn())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateStream(within(t), jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"mine.>"}}); err != nil {
		t.Fatal(err)
	}
	app := makeApp(t, onServer(srv), emitter("shop", monotestEvent(t)), tracedConsumer(t, 1, ackAll))
	wantError(t, app.Start(within(t)), dlq.ErrStreamConflict, `"DLQ"`, "discard new", "WithoutDeadLetters")
}
