package mono_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// What is held, captured or resolved is never handled again.

// fillDeadLetters leaves no room in the dead-letter stream, and returns what makes room.
func fillDeadLetters(t *testing.T, js jetstream.JetStream) (empty func()) {
	t.Helper()
	limit := func(most int64) {
		s, err := js.Stream(within(t), "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		cfg := s.CachedInfo().Config
		cfg.MaxMsgs = most
		if _, err := js.UpdateStream(within(t), cfg); err != nil {
			t.Fatal(err)
		}
	}
	s, err := js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	msgs := int64(s.CachedInfo().State.Msgs)
	if msgs == 0 { // a limit of 0 is none
		if _, err := js.Publish(within(t), "monotel.dlq.DLQ.filler", nil); err != nil {
			t.Fatal(err)
		}
		msgs++
	}
	limit(msgs)
	return func() { limit(-1) }
}

// Two instances, and a dead-letter stream that is full for several times AckWait. Each
// message is handled once: no other instance gets what is held, and neither does the
// one that holds it.
//
// Before, a held message was handed back, and the other instance handled it: 18 of 20
// messages, and 20 of 20 replays.
func TestHeld_noOtherInstance(t *testing.T) {
	t.Parallel()
	const n = 20
	for _, retention := range retentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			seen, scrape := newTally(), newScraper(t)
			var apps []*mono.App
			for range 2 {
				apps = append(apps, runApp(t, append(onServer(srv), scrape.option), emitter("shop", monotestEvent(t)),
					ordersWith(t, mono.StreamConsumerConfig{
						Stream:   mono.StreamConfig{Name: "orders", Retention: retention},
						Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: 3 * time.Second},
						Fetch:    mono.FetchConfig{BatchSize: 2},
					}, func(_ context.Context, msgs []*mono.Msg) error {
						seen.add(msgs...)
						return mono.Permanent(errBrokenPipe)
					})))
			}
			js := jetStreamOf(t, srv.Conn())
			empty := fillDeadLetters(t, js)
			publishAll(t, apps[0].Bus(), monotestEvent(t), payloads("p", 0, n))
			// Each lease is extended after a third of AckWait.
			eventually(t, func() bool {
				return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=in_progress}"] >= 5*n || seen.total() > n
			}, "messages are held for more than AckWait")
			empty()
			eventually(t, func() bool { return streamMsgs(t, apps[0], "DLQ") > n }, "all are captured")
			settled(t, apps[0], "orders", "billing")
			if got := seen.total(); got != n {
				t.Errorf("handlers got %d messages, want each once: %d; twice: %q", got, n, seen.deliveredTwice())
			}
			if got := streamMsgs(t, apps[0], "DLQ"); got != n+1 { // and the filler
				t.Errorf("%d dead letters, want %d", got-1, n)
			}
			if err := apps[0].Health(within(t)).Err(); err != nil {
				t.Errorf("not healthy in the end: %v", err)
			}
		})
	}
}

// As many messages as the server may have unacknowledged are held: nothing else is
// delivered, and health says so until there is room.
func TestHeld_consumerIsHeld(t *testing.T) {
	t.Parallel()
	var logs logBuffer
	app := startAppWith(t, []mono.Option{mono.WithLogger(logs.logger())}, emitter("shop", monotestEvent(t)),
		ordersWith(t, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "orders"},
			Consumer: mono.ConsumerConfig{Durable: "billing", MaxAckPending: 3},
		}, func(_ context.Context, msgs []*mono.Msg) error {
			if strings.HasPrefix(string(msgs[0].Data), "bad") {
				return mono.Permanent(errBrokenPipe)
			}
			return nil
		}))
	empty := fillDeadLetters(t, jetStream(t, app))
	publishAll(t, app.Bus(), monotestEvent(t), slices.Concat(payloads("bad", 0, 3), payloads("good", 0, 3)))
	eventually(t, func() bool { return errors.Is(app.Health(within(t)).Err(), mono.ErrHeld) }, "health says that the consumer is held")
	eventually(t, func() bool { return strings.Contains(logs.String(), "consumer held") }, "the log says so")
	empty()
	settled(t, app, "orders", "billing")
	eventually(t, func() bool { return app.Health(within(t)).Err() == nil }, "health says that it goes on")
	if got := streamMsgs(t, app, "DLQ"); got != 4 {
		t.Errorf("%d dead letters, want 3 and the filler", got)
	}
}

// A held message whose stream has lost it is recorded without its payload: nothing is
// given up in silence.
func TestHeld_goneFromItsStream(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, func(context.Context, []*mono.Msg) error {
		return mono.Permanent(errBrokenPipe)
	}))
	js := jetStream(t, app)
	empty := fillDeadLetters(t, js)
	publishStored(t, app, nil)
	eventually(t, func() bool { return consumerInfo(t, app, "orders", "billing").NumAckPending == 1 }, "it is delivered")
	s, err := js.Stream(within(t), "orders")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteMsg(within(t), 1); err != nil {
		t.Fatal(err)
	}
	empty()
	eventually(t, func() bool { return streamMsgs(t, app, "DLQ") == 2 }, "it is captured")
	dead, err := js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	raw, err := dead.GetMsg(within(t), 2)
	if err != nil {
		t.Fatal(err)
	}
	r, err := dlq.Decode(raw.Header, raw.Data)
	if err != nil {
		t.Fatal(err)
	}
	if r.Reason != dlq.ReasonPermanentError || r.Error != errBrokenPipe.Error() || r.Body != dlq.BodyInline && r.Body != dlq.BodyGone {
		t.Errorf("the record is %+v", *r)
	}
}

// Stop ends the verdict: the next App's handler decides again, and its success is not a
// dead letter. Before, the deliveries of a message that was held for long were counted
// as crashes.
func TestHeld_stopEndsTheVerdict(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var first, second fixable
	second.fixed.Store(true)
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy, first.handle))
	empty := fillDeadLetters(t, jetStreamOf(t, srv.Conn()))
	publishAll(t, app.Bus(), monotestEvent(t), payloads("p", 0, 10))
	eventually(t, func() bool { return len(first.all()) == 10 }, "all are decided")
	mustStop(t, app)
	empty()
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy, second.handle))
	settled(t, app, "orders", "billing")
	if got := len(second.all()); got != 10 {
		t.Errorf("the second App handled %d, want 10", got)
	}
	if got := streamMsgs(t, app, "DLQ"); got != 1 {
		t.Errorf("%d dead letters, want none beside the filler", got-1)
	}
}

// Something else is stored where a message's record should be. The message is not lost:
// its record goes beside it.
//
// Before, a record that did not say when its message was stored counted as that
// message's, which was terminated, and stored nowhere.
func TestDeadLetter_notItsRecord(t *testing.T) {
	t.Parallel()
	for name, forge := range map[string]func(r *dlq.Record) *nats.Msg{
		"no time":       func(*dlq.Record) *nats.Msg { return record(map[string]string{}) },
		"no valid time": func(*dlq.Record) *nats.Msg { return record(map[string]string{dlq.HeaderStored: "yesterday"}) },
		"another time": func(*dlq.Record) *nats.Msg {
			return record(map[string]string{dlq.HeaderStored: "2001-02-03T04:05:06Z"})
		},
		"another consumer": func(r *dlq.Record) *nats.Msg {
			return record(map[string]string{dlq.HeaderStored: r.Stored.Format(time.RFC3339Nano), dlq.HeaderConsumer: "audit"})
		},
		"another stream": func(r *dlq.Record) *nats.Msg {
			return record(map[string]string{dlq.HeaderStored: r.Stored.Format(time.RFC3339Nano), dlq.HeaderStream: "payments"})
		},
		"another sequence": func(r *dlq.Record) *nats.Msg {
			return record(map[string]string{dlq.HeaderStored: r.Stored.Format(time.RFC3339Nano), dlq.HeaderStreamSequence: "2"})
		},
		"no record": func(*dlq.Record) *nats.Msg { return &nats.Msg{Data: []byte("hello")} },
		"a change": func(*dlq.Record) *nats.Msg {
			return &nats.Msg{Header: nats.Header{dlq.HeaderID: {"x"}, dlq.HeaderChange: {"archived"}}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			enter := make(chan struct{})
			app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy,
				func(context.Context, []*mono.Msg) error {
					<-enter
					return mono.Permanent(errBrokenPipe)
				}))
			js := jetStreamOf(t, srv.Conn())
			publishStored(t, app, nil)
			s, err := js.Stream(within(t), "orders")
			if err != nil {
				t.Fatal(err)
			}
			m, err := s.GetMsg(within(t), 1)
			if err != nil {
				t.Fatal(err)
			}
			id := dlq.ID("orders", s.CachedInfo().Created, "billing", 1)
			forged := forge(&dlq.Record{Stored: m.Time})
			forged.Subject = "monotel.dlq.DLQ.orders.billing." + id
			if _, err := js.PublishMsg(within(t), forged); err != nil {
				t.Fatal(err)
			}
			close(enter)
			settled(t, app, "orders", "billing")
			dead, err := js.Stream(within(t), "DLQ")
			if err != nil {
				t.Fatal(err)
			}
			raw, err := dead.GetMsg(within(t), 2)
			if err != nil {
				t.Fatalf("the message is terminated and stored nowhere: %v", err)
			}
			r, err := dlq.Decode(raw.Header, raw.Data)
			if err != nil || string(r.Data) != "x" || r.ID == id || r.Error != errBrokenPipe.Error() || !strings.HasSuffix(raw.Subject, r.ID) {
				t.Errorf("stored on %q: %+v, %v", raw.Subject, r, err)
			}
		})
	}
}

// record is a message that looks like the record of the first message of "orders".
func record(headers map[string]string) *nats.Msg {
	h := map[string]string{
		dlq.HeaderVersion: "1", dlq.HeaderID: "forged", dlq.HeaderReason: "terminated", dlq.HeaderStream: "orders",
		dlq.HeaderConsumer: "billing", dlq.HeaderStreamSequence: "1",
	}
	maps.Copy(h, headers)
	msg := &nats.Msg{Header: make(nats.Header)}
	for k, v := range h {
		msg.Header[k] = []string{v}
	}
	return msg
}

// A server that is killed loses what it knew of deliveries, and delivers captured
// messages as if for the first time. A consumer that is made again gets the same to see.
//
// Before, 49 of 50 succeeded then, and stayed open dead letters.
func TestCaptured_deliveryStateLost(t *testing.T) {
	t.Parallel()
	const n = 50
	for _, tt := range []struct {
		name    string
		running bool // while the App runs
	}{{"while it is stopped", false}, {"while it runs", true}} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var h fixable
			module := func() *testModule { return orders(t, "billing", mono.LimitsPolicy, h.handle) }
			app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
			publishAll(t, app.Bus(), monotestEvent(t), payloads("p", 0, n))
			awaitRecords(t, app, n)
			settled(t, app, "orders", "billing")
			h.fixed.Store(true)
			if !tt.running {
				mustStop(t, app)
			}
			js := jetStreamOf(t, srv.Conn())
			if err := js.DeleteConsumer(within(t), "orders", "billing"); err != nil {
				t.Fatal(err)
			}
			if !tt.running {
				app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
			}
			publishAll(t, app.Bus(), monotestEvent(t), []string{"new"})
			eventually(t, func() bool { return h.has("new") }, "the new one is handled")
			settled(t, app, "orders", "billing")
			if got := len(h.all()); got != n+1 {
				t.Errorf("handlers got %d messages, want each once: %d", got, n+1)
			}
			awaitRecords(t, app, n)
		})
	}
}

func (f *fixable) has(payload string) bool {
	return slices.ContainsFunc(f.all(), func(m *mono.Msg) bool { return string(m.Data) == payload })
}

// The same with replays that were resolved. Before, 49 of 50 ran again.
func TestReplay_deliveryStateLost(t *testing.T) {
	t.Parallel()
	const n = 20
	srv := monotest.Server(t)
	var h fixable
	module := func() *testModule { return orders(t, "billing", mono.LimitsPolicy, h.handle) }
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishAll(t, app.Bus(), monotestEvent(t), payloads("p", 0, n))
	entries := r.await(t, n, dlq.StateOpen)
	settled(t, app, "orders", "billing")
	h.fixed.Store(true)
	for _, e := range entries {
		r.replay(t, e, "op1")
	}
	r.await(t, n, dlq.StateResolved)
	settled(t, app, "orders", "billing")
	mustStop(t, app)
	s, err := r.js.Stream(within(t), "orders")
	if err != nil {
		t.Fatal(err)
	}
	for name := range s.ConsumerNames(within(t)).Name() {
		if err := s.DeleteConsumer(within(t), name); err != nil {
			t.Fatal(err)
		}
	}
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module())
	publishAll(t, app.Bus(), monotestEvent(t), []string{"new"})
	eventually(t, func() bool { return h.has("new") }, "the new one is handled")
	for name := range s.ConsumerNames(within(t)).Name() {
		settled(t, app, "orders", name)
	}
	if got := len(h.all()); got != 2*n+1 {
		t.Errorf("handlers got %d messages, want %d, each message and each replay once", got, 2*n+1)
	}
}

// An instance has nakked a message, which another has captured since, and comes back to
// the first. It must not rely on what it knew: somebody else had the message in between.
func TestCaptured_byAnotherSince(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	inHand, release := make(chan struct{}), make(chan struct{})
	var handled sync.Map
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders"},
		Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		Fetch:    mono.FetchConfig{BatchSize: 1},
		Retry:    mono.RetryPolicy{MaxAttempts: -1, Backoff: []time.Duration{500 * time.Millisecond}, NoJitter: true},
	}, func(ctx context.Context, msgs []*mono.Msg) error {
		m := msgs[0]
		handled.Store(fmt.Sprintf("%s at %d", m.Data, m.Metadata().NumDelivered), true)
		if string(m.Data) == "blocks" {
			close(inHand)
			<-release
			return nil
		}
		if m.Metadata().NumDelivered == 1 {
			pauseFor(ctx, 300*time.Millisecond) // a slow handler gets nothing in advance
			return errBrokenPipe
		}
		return nil
	}))
	publishAll(t, app.Bus(), monotestEvent(t), []string{"m", "blocks"})
	receive(t, inHand, "the worker is busy, so nothing is asked for")
	js := jetStreamOf(t, srv.Conn())
	c, err := js.Consumer(within(t), "orders", "billing")
	if err != nil {
		t.Fatal(err)
	}
	m, err := c.Next(jetstream.FetchMaxWait(patience)) // as another instance
	if err != nil {
		t.Fatal(err)
	}
	meta, err := m.Metadata()
	if err != nil || meta.NumDelivered != 2 {
		t.Fatal(meta, err)
	}
	s, err := js.Stream(within(t), "orders")
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(js.Conn(), js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Capture(within(t), &dlq.Record{
		ID:     dlq.ID("orders", s.CachedInfo().Created, "billing", meta.Sequence.Stream),
		Reason: dlq.ReasonTerminated, Stream: "orders", Consumer: "billing", StreamSequence: meta.Sequence.Stream, Stored: meta.Timestamp,
	}, nil); err != nil {
		t.Fatal(err)
	}
	if err := m.Nak(); err != nil { // as it would end, and its lease with it
		t.Fatal(err)
	}
	if err := js.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	close(release)
	settled(t, app, "orders", "billing")
	if _, again := handled.Load("m at 3"); again {
		t.Error("the captured message was handled")
	}
}

// One message of a batch brings the process down. It alone is given up.
//
// Before, the nine others of its batch were dead as crashed, also those that the
// handler had acked.
func TestSuspect_processEnds(t *testing.T) {
	t.Parallel()
	for _, mode := range []string{"AutoAck", "Ack"} {
		t.Run(mode, func(t *testing.T) {
			t.Parallel()
			const n = 10
			srv := monotest.Server(t)
			m, err := poisonModule(mode, nil)
			if err != nil {
				t.Fatal(err)
			}
			app := runApp(t, onServer(srv), m) // makes the stream
			mustStop(t, app)
			js := jetStreamOf(t, srv.Conn())
			for i := range n {
				data := fmt.Sprint("good ", i)
				if i == n-1 {
					data = "poison"
				}
				if _, err := js.Publish(within(t), m.emits[0].Subject, []byte(data)); err != nil {
					t.Fatal(err)
				}
			}
			handled := make(map[string]bool)
			lives := 0
			for done := false; !done; lives++ {
				if lives == 30 {
					t.Fatal("the process ends again and again")
				}
				child := startChild(t, "poison", srv.URL()+"|"+mode)
				for ended := false; !ended && !done; {
					select {
					case line, ok := <-child.lines:
						ended = !ok
						if payload, found := strings.CutPrefix(line, "handled "); found {
							handled[payload] = true
						}
					case <-time.After(50 * time.Millisecond):
						c, err := js.Consumer(within(t), "W", "poison")
						if err != nil {
							t.Fatal(err)
						}
						done = c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
					}
				}
				if done {
					_ = child.stdin.Close()
					child.wait(t)
				}
			}
			if len(handled) != n-1 {
				t.Errorf("handled are %v, want all but the poison", handled)
			}
			rs := records(t, js)
			if len(rs) != 1 || string(rs[0].Data) != "poison" || rs[0].Reason != dlq.ReasonCrashed {
				for _, r := range rs {
					t.Errorf("dead: %q, %s %s", r.Data, r.Reason, r.ReasonText)
				}
				t.Errorf("%d dead letters, want the poison alone", len(rs))
			}
		})
	}
}

// poisonModule consumes batches in the child, and in the parent makes the stream.
func poisonModule(mode string, end func()) (*testModule, error) {
	e, err := mono.NewEvent("shop", "Poison", "v1")
	if err != nil {
		return nil, err
	}
	m := durableModule("shop", e, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "W", Retention: mono.WorkQueuePolicy, MaxBytes: 64 << 20},
		Consumer: mono.ConsumerConfig{Durable: "poison", AckWait: 500 * time.Millisecond},
		Retry:    mono.RetryPolicy{MaxAttempts: 2, Backoff: []time.Duration{time.Millisecond}},
		AutoAck:  mode == "AutoAck",
	}, func(_ context.Context, msgs []*mono.Msg) error {
		for _, msg := range msgs {
			if string(msg.Data) == "poison" {
				end()
			}
			say("handled %s", msg.Data)
			if mode == "Ack" {
				if err := msg.Ack(); err != nil {
					return err
				}
			}
		}
		return nil
	})
	m.emits = []mono.BaseEventDefinition{e}
	return m, nil
}

// childPoison ends the process when it meets the poison.
func childPoison(ctx context.Context, arg string) error {
	url, mode, _ := strings.Cut(arg, "|")
	m, err := poisonModule(mode, func() { os.Exit(3) }) //nolint:revive // this process is the child
	if err != nil {
		return err
	}
	return childModule(ctx, url, m)
}

// childModule runs a module until the parent closes standard input.
func childModule(ctx context.Context, url string, m *testModule) error {
	app, err := mono.New(append(onURL(url), quiet())...)
	if err != nil {
		return err
	}
	if err := app.Register(m); err != nil {
		return err
	}
	if err := app.Start(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	<-ctx.Done()
	return app.Stop(context.WithoutCancel(ctx))
}

// A handler that returns at the first message that it cannot handle, or panics, fails
// its whole batch. Only the bad ones are given up.
//
// Before, 600 messages with 30 bad ones gave 150 dead letters.
func TestSuspect_batchFails(t *testing.T) {
	t.Parallel()
	const n, every = 600, 20
	for _, attempts := range []int{1, 3, 5} {
		for _, how := range []string{"error", "panic"} {
			t.Run(fmt.Sprintf("%s, %d attempts", how, attempts), func(t *testing.T) {
				t.Parallel()
				app := startApp(t, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
					Stream:      mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
					Consumer:    mono.ConsumerConfig{Durable: "billing"},
					Retry:       mono.RetryPolicy{MaxAttempts: attempts, Backoff: []time.Duration{20 * time.Millisecond}},
					Concurrency: 2,
				}, func(_ context.Context, msgs []*mono.Msg) error {
					for _, m := range msgs {
						if !strings.HasPrefix(string(m.Data), "bad") {
							continue
						}
						if how == "panic" {
							panic("a bad one")
						}
						return errBrokenPipe
					}
					return nil
				}))
				var all []string
				for i := range n {
					kind := "good"
					if i%every == every-1 {
						kind = "bad"
					}
					all = append(all, fmt.Sprint(kind, i))
				}
				publishAll(t, app.Bus(), monotestEvent(t), all)
				settled(t, app, "orders", "billing")
				innocent := 0
				rs := records(t, jetStream(t, app))
				for _, r := range rs {
					if strings.HasPrefix(string(r.Data), "good") {
						innocent++
					}
				}
				if len(rs) != n/every || innocent > 0 {
					t.Errorf("%d dead letters, %d of them innocent; want %d and none", len(rs), innocent, n/every)
				}
			})
		}
	}
}

// What is asked for and held is bounded in bytes: no request asks for more, the sum of
// what is here stays below it, and the server's own notices for it are no refusals.
//
// Before, requests had no bound: 3 000 messages of 1 MB made the server cut the
// connection 20 times.
func TestFetch_maxBytes(t *testing.T) {
	t.Parallel()
	const (
		n    = 200
		size = 100 << 10
	)
	for _, tt := range []struct {
		name       string
		maxBytes   int // 0: the default
		maxRequest int // of the consumer on the server
		want       int // most that a request asks for
	}{
		{name: "default", want: 16 << 20},
		{name: "option", maxBytes: 2 << 20, want: 2 << 20},
		{name: "consumer's limit", maxRequest: 512 << 10, want: 512 << 10},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var mu sync.Mutex
			var problems []string
			requests := 0
			if _, err := srv.Conn().Subscribe("$JS.API.CONSUMER.MSG.NEXT.orders.billing", func(msg *nats.Msg) {
				var r struct {
					MaxBytes int `json:"max_bytes"`
				}
				mu.Lock()
				defer mu.Unlock()
				requests++
				if err := json.Unmarshal(msg.Data, &r); err != nil || r.MaxBytes <= 0 || r.MaxBytes > tt.want {
					problems = append(problems, string(msg.Data))
				}
			}); err != nil {
				t.Fatal(err)
			}
			if err := srv.Conn().Flush(); err != nil {
				t.Fatal(err)
			}
			var logs logBuffer
			seen := newTally()
			event := monotestEvent(t)
			m := ordersWith(t, mono.StreamConsumerConfig{
				Stream:   mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
				Consumer: mono.ConsumerConfig{Durable: "billing", MaxRequestMaxBytes: tt.maxRequest},
				Fetch:    mono.FetchConfig{MaxBytes: tt.maxBytes},
			}, seen.handle)
			app := runApp(t, append(onServer(srv), mono.WithLogger(logs.logger())), emitter("shop", event), m)
			var all []string
			for i := range n {
				all = append(all, fmt.Sprintf("%06d%s", i, strings.Repeat("x", size)))
			}
			publishAll(t, app.Bus(), event, all)
			seen.waitFor(t, all)
			settled(t, app, "orders", "billing")
			if got := seen.total(); got != n {
				t.Errorf("%d deliveries of %d messages", got, n)
			}
			mu.Lock()
			defer mu.Unlock()
			if len(problems) > 0 || requests == 0 {
				t.Errorf("%d requests, of which %d ask for more than %d bytes, or any number: %q", requests, len(problems), tt.want, problems[:min(len(problems), 3)])
			}
			if strings.Contains(logs.String(), "level=WARN") {
				t.Errorf("warnings: %s", logs.String())
			}
		})
	}
}

// A process is stopped in its handler for longer than AckWait. Another instance handles
// the message. When the first goes on and gives the message up, that changes nothing.
//
// Before, there was a dead letter of a message that was handled.
func TestLease_stoppedProcess(t *testing.T) {
	t.Parallel()
	for _, how := range []string{"permanent", "error"} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			child := startChild(t, "frozen", srv.URL()+"|"+how)
			child.line(t, "started")
			js := jetStreamOf(t, srv.Conn())
			if _, err := js.Publish(within(t), "events.shop.v1.frozen", []byte("m")); err != nil {
				t.Fatal(err)
			}
			child.line(t, "began")
			if err := child.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			handled := make(chan uint64, 10)
			m, err := frozenModule(func(_ context.Context, msgs []*mono.Msg) error {
				handled <- msgs[0].Metadata().NumDelivered
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			app := runApp(t, onServer(srv), m)
			receive(t, handled, "this instance handles the message")
			settled(t, app, "F", "frozen")
			if err := child.cmd.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			if _, err := js.Conn().Request("go", nil, patience); err != nil { // it returns
				t.Fatal(err)
			}
			child.line(t, "returned")
			_ = child.stdin.Close() // Stop waits for what the return leads to
			child.wait(t)
			if got := streamMsgs(t, app, "DLQ"); got != 0 {
				t.Errorf("%d dead letters of a message that was handled", got)
			}
		})
	}
}

// A message was long under way when another instance has handled it: the link stood
// still, or a server between the consumer's leader and this process. No handler gets it.
// When the link goes on, the consumer has just asked again: that is no sign of life.
func TestLease_longUnderWay(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Late")
	srv := monotest.Server(t)
	cfg := autoAckPlain("S")
	cfg.Consumer = mono.ConsumerConfig{Durable: "late", AckWait: 2 * time.Second}
	w := newWire(t, srv)
	handled := newTally()
	app := runApp(t, append(onURL(w.url(srv)), mono.WithEvents(e)), durableModule("m", e, cfg, handled.handle))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	publishAll(t, emit.Bus(), e, payloads("before", 0, 3))
	settled(t, emit, "S", "late")

	w.now(full)
	publishAll(t, emit.Bus(), e, payloads("late", 0, 3))
	eventually(t, func() bool { return consumerInfo(t, emit, "S", "late").NumAckPending == 3 }, "they are under way")
	other := newTally()
	second := runApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("m", e, cfg, other.handle))
	other.waitFor(t, payloads("late", 0, 3))
	settled(t, second, "S", "late")
	if err := second.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	mono.AskAgain(app)
	w.now(alive)
	eventually(t, func() bool { return mono.Trusts(app) }, "the leader answers")
	publishAll(t, emit.Bus(), e, payloads("after", 0, 3))
	handled.waitFor(t, append(payloads("before", 0, 3), payloads("after", 0, 3)...))
	if n := handled.total(); n != 6 {
		t.Errorf("%d messages were handled here, want 6", n)
	}

	// What comes by another way may come after the leader's answer.
	info := consumerInfo(t, emit, "S", "late")
	late := &nats.Msg{Subject: "_INBOX.late", Header: nats.Header{}, Data: []byte("late"), Reply: fmt.Sprintf(
		"$JS.ACK.S.late.1.%d.%d.%d.0", info.Delivered.Stream, info.Delivered.Consumer, time.Now().UnixNano())}
	mono.AskAgain(app)
	eventually(t, func() bool { return mono.Trusts(app) }, "the leader answers")
	publishAll(t, emit.Bus(), e, []string{"new"})
	handled.waitFor(t, []string{"new"})
	mono.Receive(app, late)
	publishAll(t, emit.Bus(), e, payloads("last", 0, 3))
	handled.waitFor(t, append(append(payloads("before", 0, 3), payloads("after", 0, 3)...), payloads("last", 0, 3)...))
	if n := handled.total(); n != 10 {
		t.Errorf("%d messages were handled here, want 10", n)
	}
}

// The payload of a held message is asked for, and the answer comes when another instance
// has handled the message: it is no dead letter. The link stood still in between.
func TestHeld_handledWhileRead(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Held")
	srv := monotest.Server(t)
	cfg := autoAckPlain("S")
	cfg.Stream.Retention = jetstream.InterestPolicy
	cfg.Consumer = mono.ConsumerConfig{Durable: "held", AckWait: 3 * time.Second}
	w := newWire(t, srv)
	log := &logBuffer{}
	app := runApp(t, append(onURL(w.url(srv)), mono.WithEvents(e), mono.WithLogger(log.logger())),
		durableModule("m", e, cfg, func(context.Context, []*mono.Msg) error { return mono.Permanent(errBrokenPipe) }))
	emit := runApp(t, onServer(srv), emitter("shop", e))
	empty := fillDeadLetters(t, jetStreamOf(t, srv.Conn()))
	publishAll(t, emit.Bus(), e, []string{"m"})
	eventually(t, func() bool { return strings.Contains(log.String(), "the message is held") }, "it is held")

	w.now(full) // what is asked for now, a second later, is answered when it ends
	other := newTally()
	second := runApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("m", e, cfg, other.handle))
	other.waitFor(t, []string{"m"})
	settled(t, second, "S", "held")
	empty()
	w.now(alive)
	eventually(t, func() bool { return strings.Contains(log.String(), "lease ended before the outcome") }, "the verdict is given up")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := streamMsgs(t, emit, "DLQ"); got != 1 { // the filler
		t.Errorf("%d dead letters of a message that was handled", got-1)
	}
}

// A handler gives a message up while the link stands still, and another instance handles it
// before the link goes on: it is no dead letter.
func TestDeadLetter_linkStandsStill(t *testing.T) {
	t.Parallel()
	for _, retention := range retentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Stalled")
			srv := monotest.Server(t)
			cfg := autoAckPlain("S")
			cfg.Stream.Retention = retention
			cfg.Consumer = mono.ConsumerConfig{Durable: "stalled", AckWait: 3 * time.Second}
			w := newWire(t, srv)
			began, goOn, handled := make(chan struct{}, 1), make(chan struct{}), newTally()
			app := runApp(t, append(onURL(w.url(srv)), mono.WithEvents(e)),
				durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
					if string(msgs[0].Data) == "next" {
						return handled.handle(ctx, msgs)
					}
					began <- struct{}{}
					<-goOn
					return mono.Permanent(errBrokenPipe)
				}))
			emit := runApp(t, onServer(srv), emitter("shop", e))
			publishAll(t, emit.Bus(), e, []string{"m"})
			receive(t, began, "the handler")
			w.now(full)
			close(goOn) // what is sent now waits in the link
			other := newTally()
			second := runApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("m", e, cfg, other.handle))
			other.waitFor(t, []string{"m"})
			settled(t, second, "S", "stalled")
			if err := second.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			w.now(alive)
			publishAll(t, emit.Bus(), e, []string{"next"})
			handled.waitFor(t, []string{"next"})
			if err := app.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			if got := streamMsgs(t, emit, "DLQ"); got != 0 {
				t.Errorf("%d dead letters of a message that was handled", got)
			}
		})
	}
}

func frozenModule(h mono.EventStreamConsumerHandler) (*testModule, error) {
	e, err := mono.NewEvent("shop", "Frozen", "v1")
	if err != nil {
		return nil, err
	}
	m := durableModule("shop", e, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "F", MaxBytes: 64 << 20},
		Consumer: mono.ConsumerConfig{Durable: "frozen", AckWait: time.Second},
		Retry:    mono.RetryPolicy{MaxAttempts: 1},
		AutoAck:  true,
	}, h)
	m.emits = []mono.BaseEventDefinition{e}
	return m, nil
}

// childFrozen handles one message, and returns when it is told to.
func childFrozen(ctx context.Context, url, how string) error {
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	told := make(chan struct{})
	if _, err := nc.Subscribe("go", func(m *nats.Msg) {
		close(told)
		_ = m.Respond(nil)
	}); err != nil {
		return err
	}
	if err := nc.Flush(); err != nil {
		return err
	}
	m, err := frozenModule(func(context.Context, []*mono.Msg) error {
		say("began")
		<-told
		say("returned")
		if how == "permanent" {
			return mono.Permanent(errBrokenPipe)
		}
		return errBrokenPipe // on the last attempt
	})
	if err != nil {
		return err
	}
	m.start = func(context.Context) error {
		say("started")
		return nil
	}
	return childModule(ctx, url, m)
}

// Stop hands back what no handler has begun, and takes as long as the handlers that run.
//
// Before, it handled everything that waited: 29 messages.
func TestStop_handsBackWhatWaits(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	began, release := make(chan struct{}, 100), make(chan struct{})
	var blocks atomic.Bool
	first, second := newTally(), newTally()
	module := func(c *tally, block bool) *testModule {
		return ordersWith(t, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
			Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: 9 * time.Second},
			Fetch:    mono.FetchConfig{BatchSize: 1},
			Retry:    mono.RetryPolicy{MaxAttempts: 2, Backoff: []time.Duration{time.Millisecond}},
		}, func(_ context.Context, msgs []*mono.Msg) error {
			c.add(msgs...)
			if !block && msgs[0].Metadata().NumDelivered == 2 {
				return errBrokenPipe // it was handed back once, so this is the first attempt of two
			}
			if block && blocks.Load() {
				began <- struct{}{}
				<-release
			}
			return nil
		})
	}
	scrape := newScraper(t)
	app := runApp(t, append(onServer(srv), scrape.option), emitter("shop", monotestEvent(t)), module(first, true))
	quick := payloads("quick", 0, 100)
	publishAll(t, app.Bus(), monotestEvent(t), quick) // so that many are asked for in advance
	first.waitFor(t, quick)
	settled(t, app, "orders", "billing")
	blocks.Store(true)
	slow := payloads("slow", 0, 30)
	publishAll(t, app.Bus(), monotestEvent(t), slow)
	receive(t, began, "a handler runs")
	// The server counts as delivered also what is still on its way. Leases are extended of
	// what is here.
	eventually(t, func() bool { return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=in_progress}"] >= 30 }, "the others wait here")
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(within(t)) }()
	c, err := jetStreamOf(t, srv.Conn()).Consumer(within(t), "orders", "billing")
	if err != nil {
		t.Fatal(err)
	}
	// They are handed back while the handler runs.
	m, err := c.Next(jetstream.FetchMaxWait(patience))
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Ack(); err != nil {
		t.Fatal(err)
	}
	close(release)
	if err := receive(t, stopped, "Stop returns"); err != nil {
		t.Fatal(err)
	}
	if got := first.total() - len(quick); got != 1 {
		t.Errorf("%d slow ones were handled, want only the one that had begun", got)
	}
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module(second, false))
	settled(t, app, "orders", "billing")
	if got := second.total(); got != 2*28 {
		t.Errorf("the next App's handler was called %d times, want twice for each of 28", got)
	}
	if got := streamMsgs(t, app, "DLQ"); got != 0 {
		t.Errorf("%d dead letters of messages that have had one attempt", got)
	}
}

// A slow handler leaves to others what it cannot begin with soon. Before, the first
// instance took all 30 messages.
func TestPrefetch_secondInstance(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	release := make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(release) }) }
	defer open()
	start := func(c *tally) *mono.App {
		return runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
			Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		}, func(_ context.Context, msgs []*mono.Msg) error {
			c.add(msgs...)
			<-release
			return nil
		}))
	}
	first, second := newTally(), newTally()
	app := start(first)
	publishAll(t, app.Bus(), monotestEvent(t), payloads("p", 0, 30))
	eventually(t, func() bool { return first.total() > 0 }, "the first is at work")
	start(second)
	eventually(t, func() bool { return second.total() > 0 }, "the second instance gets some")
	open()
	settled(t, app, "orders", "billing")
}

// All workers share what is there. Before, one of four took all of eight messages.
func TestPrefetch_allWorkers(t *testing.T) {
	t.Parallel()
	began, release := make(chan int, 100), make(chan struct{})
	var once sync.Once
	open := func() { once.Do(func() { close(release) }) }
	defer open()
	app := startApp(t, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream:      mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
		Consumer:    mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		Concurrency: 4,
	}, func(_ context.Context, msgs []*mono.Msg) error {
		began <- len(msgs)
		<-release
		return nil
	}))
	publishAll(t, app.Bus(), monotestEvent(t), payloads("p", 0, 8))
	for i := range 4 {
		receive(t, began, fmt.Sprintf("worker %d begins", i+1))
	}
	open()
	settled(t, app, "orders", "billing")
}

// One held message that cannot be stored, and never will be, keeps no other one from its
// capture. Before, the later ones were not tried.
func TestHeld_notBehindOneThatCannotBeStored(t *testing.T) {
	t.Parallel()
	const small = 5
	app := startApp(t, emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, func(context.Context, []*mono.Msg) error {
		return mono.Permanent(errBrokenPipe)
	}))
	js := jetStream(t, app)
	// The object store for large bodies cannot be made.
	if _, err := js.CreateStream(within(t), jetstream.StreamConfig{Name: "blocker", Subjects: []string{"$O.>"}}); err != nil {
		t.Fatal(err)
	}
	large := strings.Repeat("x", 1<<20-200)
	publishAll(t, app.Bus(), monotestEvent(t), []string{large})
	eventually(t, func() bool { return consumerInfo(t, app, "orders", "billing").NumAckPending == 1 }, "the large one is held")
	publishAll(t, app.Bus(), monotestEvent(t), payloads("small", 0, small))
	eventually(t, func() bool { return streamMsgs(t, app, "DLQ") == small }, "the small ones are captured")
	if err := js.DeleteStream(within(t), "blocker"); err != nil {
		t.Fatal(err)
	}
	settled(t, app, "orders", "billing")
	if got := streamMsgs(t, app, "DLQ"); got != small+1 {
		t.Errorf("%d dead letters, want %d", got, small+1)
	}
}

// Replays in flight, two instances, and a dead-letter stream that is full for several
// times AckWait: each replay is handled once. Before, 20 of 20 were handled twice.
func TestReplay_heldNoOtherInstance(t *testing.T) {
	t.Parallel()
	const n = 20
	srv := monotest.Server(t)
	scrape := newScraper(t)
	var h fixable
	var apps []*mono.App
	for range 2 {
		apps = append(apps, runApp(t, append(onServer(srv), scrape.option), emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "orders"},
			Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: 3 * time.Second},
			Fetch:    mono.FetchConfig{BatchSize: 2},
		}, h.handle)))
	}
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishAll(t, apps[0].Bus(), monotestEvent(t), payloads("p", 0, n))
	dead := r.await(t, n, dlq.StateOpen)
	settled(t, apps[0], "orders", "billing")
	h.fixed.Store(true)
	for _, e := range dead {
		r.claim(t, e, "op1")
	}
	empty := fillDeadLetters(t, r.js)
	r.open(t, "orders", "billing")
	extended := func() float64 { return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=in_progress}"] }
	before := extended()
	for _, e := range dead {
		r.send(t, r.message(e, "op1", nil))
	}
	eventually(t, func() bool { return extended() >= before+5*n || len(h.all()) > 2*n }, "replays are held for more than AckWait")
	empty()
	r.await(t, n, dlq.StateResolved)
	settled(t, apps[0], "orders", "billing")
	if got := len(h.all()); got != 2*n {
		t.Errorf("handlers got %d messages, want each and each replay once: %d", got, 2*n)
	}
}

// A message in work takes no other worker's messages away, also where the bound in bytes
// has room for one message of the largest size only.
func TestFetch_freeWorkersDoNotWait(t *testing.T) {
	t.Parallel()
	const n = 50
	begun, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	seen := newTally()
	app := startApp(t, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "billing"},
		Fetch: mono.FetchConfig{BatchSize: 1, MaxBytes: 64 << 10}, Concurrency: 4,
	}, func(_ context.Context, msgs []*mono.Msg) error {
		if string(msgs[0].Data) == "slow" {
			close(begun)
			<-release
			return nil
		}
		seen.add(msgs...)
		return nil
	}))
	publishAll(t, app.Bus(), monotestEvent(t), []string{"slow"})
	receive(t, begun, "one is in work")
	quick := payloads("quick", 0, n)
	publishAll(t, app.Bus(), monotestEvent(t), quick)
	seen.waitFor(t, quick)
}

// A server that takes small requests only is asked with as many as it takes for a batch.
func TestFetch_smallRequests(t *testing.T) {
	t.Parallel()
	seen := newTally()
	app := startApp(t, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "billing", MaxRequestBatch: 1},
	}, seen.handle))
	eventually(t, func() bool { return consumerInfo(t, app, "orders", "billing").NumWaiting >= 10 }, "ten requests of one message wait")
	all := payloads("p", 0, 100)
	publishAll(t, app.Bus(), monotestEvent(t), all)
	seen.waitFor(t, all)
}
