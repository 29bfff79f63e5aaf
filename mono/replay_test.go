package mono_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A replayer does by hand what replays dead letters.
type replayer struct {
	js    jetstream.JetStream
	store *dlq.Store
}

func newReplayer(t *testing.T, js jetstream.JetStream) *replayer {
	t.Helper()
	store, err := dlq.NewStore(js.Conn(), js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return &replayer{js, store}
}

// entries returns the dead letters, in the order of their capture.
func (r *replayer) entries(t *testing.T) []*dlq.Entry {
	t.Helper()
	s, err := r.js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	var order []string
	records, sequences, history := make(map[string]*dlq.Record), make(map[string]uint64), make(map[string][]*dlq.Change)
	for seq := uint64(1); ; seq++ {
		m, err := s.GetMsg(within(t), seq, jetstream.WithGetMsgSubject("monotel.dlq.>"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seq = m.Sequence
		if dlq.IsChange(m.Header) {
			c, err := dlq.DecodeChange(m.Header, m.Data)
			if err != nil {
				t.Fatal(err)
			}
			c.Sequence = seq
			history[m.Subject] = append(history[m.Subject], c)
			continue
		}
		rec, err := r.store.Load(within(t), m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		order, records[m.Subject], sequences[m.Subject] = append(order, m.Subject), rec, seq
	}
	all := make([]*dlq.Entry, 0, len(order))
	for _, subject := range order {
		all = append(all, dlq.NewEntry(records[subject], sequences[subject], history[subject]))
	}
	return all
}

// await waits for n dead letters that are in a state.
func (r *replayer) await(t *testing.T, n int, state dlq.State) []*dlq.Entry {
	t.Helper()
	var all []*dlq.Entry
	in := func(e *dlq.Entry) bool { return e.State == state }
	eventually(t, func() bool {
		all = r.entries(t)
		return len(all) == n && !slices.ContainsFunc(all, func(e *dlq.Entry) bool { return !in(e) })
	}, fmt.Sprintf("%d dead letters that are %s", n, state))
	return all
}

// claim says that an operation sends the dead letter.
func (r *replayer) claim(t *testing.T, e *dlq.Entry, operation string) {
	t.Helper()
	c := dlq.Change{Kind: dlq.ChangeReplaying, Actor: "anna@desk", Operation: operation, Target: "consumer"}
	if err := r.store.Change(within(t), e, c, nil); err != nil {
		t.Fatal(err)
	}
}

// addSubject is the first step of what the first replay does.
func (r *replayer) addSubject(t *testing.T, stream, durable string) {
	t.Helper()
	s, err := r.js.Stream(within(t), stream)
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	if slices.Contains(cfg.Subjects, dlq.ReplaySubjects(stream, durable)) {
		return
	}
	cfg.Subjects = dlq.WithReplaySubjects(cfg, durable)
	if _, err := r.js.UpdateStream(within(t), cfg); err != nil {
		t.Fatal(err)
	}
}

// addDurable is the second step.
func (r *replayer) addDurable(t *testing.T, stream, durable string) {
	t.Helper()
	s := mustStream(t, r.js, stream)
	c, err := s.Consumer(within(t), durable)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := dlq.EnsureReplayConsumer(within(t), s, c.CachedInfo().Config); err != nil {
		t.Fatal(err)
	}
}

// wake is the third step.
func (r *replayer) wake(t *testing.T, stream, durable string) {
	t.Helper()
	if err := r.js.Conn().Publish(dlq.WakeSubject(stream, durable), nil); err != nil {
		t.Fatal(err)
	}
}

// open does all three.
func (r *replayer) open(t *testing.T, stream, durable string) {
	t.Helper()
	r.addSubject(t, stream, durable)
	r.addDurable(t, stream, durable)
	r.wake(t, stream, durable)
}

// message is what is sent for a dead letter that is claimed.
func (r *replayer) message(e *dlq.Entry, operation string, more mono.Header) *nats.Msg {
	h := mono.Header{}
	for k, v := range e.Header {
		if !strings.HasPrefix(k, "Nats-") && !slices.Contains([]string{"traceparent", "tracestate", "baggage"}, k) {
			h[k] = v
		}
	}
	for k, v := range map[string]string{
		dlq.HeaderReplayOf: e.ID, dlq.HeaderReplayOperation: operation, dlq.HeaderReplayCount: strconv.Itoa(e.Replays),
		dlq.HeaderReplaySubject: e.Subject, dlq.HeaderReplayClaim: strconv.FormatUint(e.Last, 10), dlq.HeaderReplayStream: "DLQ",
		dlq.HeaderReplayLinks: e.Traceparent + " " + e.OriginTraceparent,
		"Nats-Msg-Id":         operation + "." + e.ID, "Nats-Expected-Last-Subject-Sequence": "0",
	} {
		h[k] = []string{v}
	}
	maps.Copy(h, more)
	return &nats.Msg{Subject: dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, operation), Header: h, Data: e.Data}
}

func (r *replayer) send(t *testing.T, msg *nats.Msg) {
	t.Helper()
	ack, err := r.js.PublishMsg(within(t), msg)
	if err != nil || ack.Duplicate {
		t.Fatalf("%+v, %v", ack, err)
	}
}

// replay does all of it.
func (r *replayer) replay(t *testing.T, e *dlq.Entry, operation string) {
	t.Helper()
	r.claim(t, e, operation)
	r.open(t, e.Stream, e.Consumer)
	r.send(t, r.message(e, operation, nil))
}

// A fixable handler gives up every message until it is fixed.
type fixable struct {
	fixed atomic.Bool
	mu    sync.Mutex
	seen  []*mono.Msg
}

func (f *fixable) handle(_ context.Context, msgs []*mono.Msg) error {
	f.mu.Lock()
	f.seen = append(f.seen, msgs...)
	f.mu.Unlock()
	if f.fixed.Load() {
		return nil
	}
	return mono.Permanent(errBrokenPipe)
}

func (f *fixable) all() []*mono.Msg {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Clone(f.seen)
}

// orders is a consumer of OrderPlaced in stream "orders".
func orders(t *testing.T, durable string, retention jetstream.RetentionPolicy, h mono.EventStreamConsumerHandler) *testModule {
	t.Helper()
	return ordersWith(t, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders", Retention: retention},
		Consumer: mono.ConsumerConfig{Durable: durable, AckWait: time.Minute},
	}, h)
}

func ordersWith(t *testing.T, cfg mono.StreamConsumerConfig, h mono.EventStreamConsumerHandler) *testModule {
	t.Helper()
	cfg.AutoAck = true
	return durableModule(cfg.Consumer.Durable, monotestEvent(t), cfg, h)
}

func retentions() []jetstream.RetentionPolicy {
	return []jetstream.RetentionPolicy{mono.LimitsPolicy, mono.InterestPolicy, mono.WorkQueuePolicy}
}

// A dead letter is replayed to the consumer that failed, and to no other; it fails
// again, is replayed again, and is resolved when it is handled.
func TestReplay_outcomes(t *testing.T) {
	t.Parallel()
	for _, retention := range retentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			var billing, audit fixable
			audit.fixed.Store(true)
			scrape := newScraper(t)
			modules := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", retention, billing.handle)}
			others := retention != mono.WorkQueuePolicy // which has one consumer of an event
			if others {
				modules = append(modules, orders(t, "audit", retention, audit.handle))
			}
			app := startAppWith(t, []mono.Option{mono.WithName("shop-app"), scrape.option}, modules...)
			r := newReplayer(t, jetStream(t, app))
			header := mono.Header{"k": {"v", "w"}, "Nats-Msg-Id": {"order-1"}}
			if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("payload"), Header: header}); err != nil {
				t.Fatal(err)
			}
			e := r.await(t, 1, dlq.StateOpen)[0]
			settled(t, app, "orders", "billing")

			r.replay(t, e, "op1")
			eventually(t, func() bool { return r.entries(t)[0].Failures == 1 }, "it fails again")
			e = r.await(t, 1, dlq.StateOpen)[0]
			if f := e.Failure; f.Reason != dlq.ReasonPermanentError || f.Error != errBrokenPipe.Error() || f.App != "shop-app" || f.Consumer != "billing" ||
				f.StreamSequence != 2 || f.Deliveries != 1 || len(f.Header) > 0 || len(f.Data) > 0 {
				t.Errorf("the failure is %+v", *f)
			}
			settled(t, app, "orders", "billing")

			billing.fixed.Store(true)
			r.replay(t, e, "op2")
			e = r.await(t, 1, dlq.StateResolved)[0]
			settled(t, app, "orders", "billing")
			if e.Actor != "shop-app" || e.Operation != "op2" || e.Replays != 2 || e.Failures != 1 || len(e.History) != 4 {
				t.Errorf("the dead letter is %+v", *e)
			}
			for i, m := range billing.all() {
				h := maps.Clone(m.Header)
				maps.DeleteFunc(h, func(k string, _ []string) bool {
					return strings.HasPrefix(k, dlq.ReplayHeaderPrefix) || k == "Nats-Msg-Id"
				})
				if m.Subject != traceSubject || string(m.Data) != "payload" || m.Metadata().NumDelivered != 1 {
					t.Errorf("delivery %d of %q on %q: %+v", i, m.Data, m.Subject, m.Metadata())
				}
				if diff := cmp.Diff(mono.Header{"k": {"v", "w"}}, h); diff != "" {
					t.Errorf("header of delivery %d (-want +got):\n%s", i, diff)
				}
			}
			if n := len(billing.all()); n != 3 {
				t.Errorf("the handler was called %d times", n)
			}
			left := map[jetstream.RetentionPolicy]uint64{mono.LimitsPolicy: 3}[retention]
			eventually(t, func() bool { return streamMsgs(t, app, "orders") == left }, "the messages are gone from their stream")
			if others {
				settled(t, app, "orders", "audit")
				if n := len(audit.all()); n != 1 {
					t.Errorf("the other consumer got it %d times", n)
				}
				if c := consumerInfo(t, app, "orders", "audit"); c.Config.FilterSubject != traceSubject || c.Delivered.Consumer != 1 {
					t.Errorf("the other consumer is %+v", c)
				}
			}
			series := scrape.text(t)
			for name, want := range map[string]float64{
				"mono_dead_letters_replayed_total{outcome=resolved}": 1, "mono_dead_letters_replayed_total{outcome=failed_again}": 1,
				"mono_dead_letters_captured_total{reason=permanent_error}": 1, "mono_dead_letters_capture_failures_total{}": 0,
			} {
				if got, ok := series[name]; got != want || !ok && !others {
					t.Errorf("%s is %v, want %v", name, got, want)
				}
			}
		})
	}
}

// The durable for a consumer's replays is made while the consumer is at work. Nothing
// is lost, and nothing comes twice.
func TestReplay_durableMadeWhileRunning(t *testing.T) {
	t.Parallel()
	for _, retention := range retentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			e := defineEvent(t, "Created")
			handled := newTally()
			app := runApp(t, onServer(srv), emitter("shop", e), durableModule("m", e, autoAck("Q", retention), handled.handle))
			r := newReplayer(t, jetStreamOf(t, srv.Conn()))
			pub := publishStubbornly(t, app.Bus(), e, "x-")
			pub.more(t, 100)
			r.addSubject(t, "Q", "m_shop_created_v1")
			pub.more(t, 100)
			r.addDurable(t, "Q", "m_shop_created_v1")
			r.wake(t, "Q", "m_shop_created_v1")
			pub.more(t, 100)
			handled.waitFor(t, pub.end())
			settled(t, app, "Q", "m_shop_created_v1")
			if twice := handled.deliveredTwice(); len(twice) > 0 {
				t.Errorf("handled twice: %q", twice)
			}
			m := &nats.Msg{Subject: dlq.ReplaySubject("Q", "m_shop_created_v1", "id", "op"), Data: []byte("replayed")}
			r.send(t, m)
			handled.waitFor(t, []string{"replayed"})
		})
	}
}

// While the outcome cannot be stored the message is held, no handler sees it
// again, and it is settled when the outcome is.
func TestReplay_outcomeIsHeld(t *testing.T) {
	t.Parallel()
	for _, fixed := range []bool{true, false} {
		for _, broken := range []string{"away", "full"} {
			t.Run(fmt.Sprintf("%s, fixed %v", broken, fixed), func(t *testing.T) {
				t.Parallel()
				var billing fixable
				scrape, logs := newScraper(t), &logBuffer{}
				app := startAppWith(t, []mono.Option{scrape.option, mono.WithLogger(logs.logger())}, emitter("shop", monotestEvent(t)),
					orders(t, "billing", mono.WorkQueuePolicy, billing.handle))
				r := newReplayer(t, jetStream(t, app))
				publishStored(t, app, nil)
				e := r.await(t, 1, dlq.StateOpen)[0]
				billing.fixed.Store(fixed)
				r.claim(t, e, "op1")
				s, err := r.js.Stream(within(t), "DLQ")
				if err != nil {
					t.Fatal(err)
				}
				whole := s.CachedInfo().Config
				damaged := whole
				if broken == "away" {
					damaged.Subjects = []string{"elsewhere"}
				} else {
					damaged.MaxMsgs = 2
				}
				if _, err := r.js.UpdateStream(within(t), damaged); err != nil {
					t.Fatal(err)
				}
				r.open(t, "orders", "billing")
				r.send(t, r.message(e, "op1", nil))
				failures := func() float64 { return scrape.text(t)["mono_dead_letters_capture_failures_total{}"] }
				eventually(t, func() bool { return failures() >= 2 }, "the outcome is tried again")
				if n := streamMsgs(t, app, "orders"); n != 1 {
					t.Errorf("%d messages are left in their stream, want 1", n)
				}
				if _, err := r.js.UpdateStream(within(t), whole); err != nil {
					t.Fatal(err)
				}
				want := dlq.StateOpen
				if fixed {
					want = dlq.StateResolved
				}
				e = r.await(t, 1, want)[0]
				settled(t, app, "orders", "billing")
				if len(e.History) != 2 || (e.Failures == 1) == fixed {
					t.Errorf("the dead letter is %+v", *e)
				}
				if !fixed && (e.Failure.Reason != dlq.ReasonPermanentError || e.Failure.Error != errBrokenPipe.Error()) {
					t.Errorf("the failure is %+v", *e.Failure)
				}
				if n := len(billing.all()); n != 2 {
					t.Errorf("the handler was called %d times, want 2", n)
				}
				if n := streamMsgs(t, app, "orders"); n != 0 {
					t.Errorf("%d messages are left in their stream", n)
				}
				if !strings.Contains(logs.String(), "outcome of a replay not stored, the message is held") {
					t.Error("no log line says so")
				}
			})
		}
	}
}

// While outcomes cannot be stored not every message tries it: the first failure
// holds those that come right after it, too.
func TestReplay_outcomesPause(t *testing.T) {
	t.Parallel()
	const n = 60
	var billing fixable
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders"},
		Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		Fetch:    mono.FetchConfig{BatchSize: n},
		Retry:    mono.RetryPolicy{MaxAttempts: 1},
	}, billing.handle))
	r := newReplayer(t, jetStream(t, app))
	for range n {
		publishStored(t, app, nil)
	}
	dead := r.await(t, n, dlq.StateOpen)
	settled(t, app, "orders", "billing")
	for _, e := range dead {
		r.claim(t, e, "op1")
	}
	s, err := r.js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	whole := s.CachedInfo().Config
	full := whole
	full.MaxMsgs = 2 * n
	if _, err := r.js.UpdateStream(within(t), full); err != nil {
		t.Fatal(err)
	}
	var tries atomic.Int64
	sub, err := app.Conn().Subscribe(whole.Subjects[0], func(*nats.Msg) { tries.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	billing.fixed.Store(true)
	r.open(t, "orders", "billing")
	for _, e := range dead {
		r.send(t, r.message(e, "op1", nil))
	}
	eventually(t, func() bool { return scrape.text(t)["mono_dead_letters_capture_failures_total{}"] >= n }, "every outcome has failed once")
	if got := tries.Load(); got < 1 || got > n/2 {
		t.Errorf("%d outcomes of %d were tried while the stream was full, want few", got, n)
	}
	if _, err := r.js.UpdateStream(within(t), whole); err != nil {
		t.Fatal(err)
	}
	r.await(t, n, dlq.StateResolved)
	settled(t, app, "orders", "billing")
	if got := len(billing.all()); got != 2*n {
		t.Errorf("the handler got %d messages, want %d", got, 2*n)
	}
}

// A process that ends between the outcome and the settlement leaves a message that
// comes again. No handler sees it.
func TestReplay_outcomeBeforeRestart(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		failure *dlq.Record // nil: resolved
		none    bool        // no outcome is stored
		want    dlq.State
		handled int
	}{
		{name: "resolved", want: dlq.StateResolved},
		{name: "failed again", failure: &dlq.Record{Reason: dlq.ReasonPanic}, want: dlq.StateOpen},
		{name: "nothing", none: true, want: dlq.StateResolved, handled: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var first, second fixable
			second.fixed.Store(true)
			app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy, first.handle))
			r := newReplayer(t, jetStreamOf(t, srv.Conn()))
			publishStored(t, app, nil)
			e := r.await(t, 1, dlq.StateOpen)[0]
			settled(t, app, "orders", "billing")
			if err := app.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			r.replay(t, e, "op1")
			// As another process that gets it, stores the outcome, and ends.
			c, err := r.js.Consumer(within(t), "orders", "billing_replay")
			if err != nil {
				t.Fatal(err)
			}
			m, err := c.Next(jetstream.FetchMaxWait(patience))
			if err != nil {
				t.Fatal(err)
			}
			replay, ok := dlq.ParseReplay("orders", "billing", m.Subject(), m.Headers())
			if !ok {
				t.Fatalf("%q is no replay", m.Subject())
			}
			if !tt.none {
				if written, err := r.store.Outcome(within(t), replay, "dying", tt.failure, nil); err != nil || !written {
					t.Fatal(written, err)
				}
			}
			if err := m.Nak(); err != nil {
				t.Fatal(err)
			}
			if err := r.js.Conn().Flush(); err != nil {
				t.Fatal(err)
			}
			app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy, second.handle))
			eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the message is settled")
			if e := r.await(t, 1, tt.want)[0]; len(e.History) != 2 || (e.Failures == 1) != (tt.failure != nil) {
				t.Errorf("the dead letter is %+v", *e)
			}
			if n := len(second.all()); n != tt.handled {
				t.Errorf("the handler was called %d times, want %d", n, tt.handled)
			}
		})
	}
}

// An App that starts where something was replayed leaves the subject as it is, gets
// what is replayed from the durable for it, and makes that where the subject alone is
// there: a tool may be interrupted in between. The consumer's own durable keeps its one
// filter.
func TestReplay_afterRestart(t *testing.T) {
	t.Parallel()
	for _, retention := range retentions() {
		for _, made := range []bool{true, false} {
			for _, fanOut := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, durable %v, fan-out %v", retention, made, fanOut), func(t *testing.T) {
					t.Parallel()
					srv := monotest.Server(t)
					var billing, audit fixable
					modules := func() []mono.Module {
						ms := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", retention, billing.handle)}
						if fanOut {
							ms = append(ms, ordersWith(t, mono.StreamConsumerConfig{
								Stream:   mono.StreamConfig{Name: "copies", Retention: retention},
								Consumer: mono.ConsumerConfig{Durable: "audit", AckWait: time.Minute},
							}, audit.handle))
						}
						return ms
					}
					audit.fixed.Store(true)
					app := runApp(t, onServer(srv), modules()...)
					r := newReplayer(t, jetStreamOf(t, srv.Conn()))
					publishStored(t, app, nil)
					e := r.await(t, 1, dlq.StateOpen)[0]
					settled(t, app, "orders", "billing")
					r.addSubject(t, "orders", "billing")
					if made {
						r.addDurable(t, "orders", "billing")
					}
					before := slices.Sorted(slices.Values(streamInfo(t, app, "orders").Config.Subjects))
					for range 2 {
						if err := app.Stop(within(t)); err != nil {
							t.Fatal(err)
						}
						app = runApp(t, onServer(srv), modules()...)
						if diff := cmp.Diff(before, slices.Sorted(slices.Values(streamInfo(t, app, "orders").Config.Subjects))); diff != "" {
							t.Fatalf("subjects (-before +after):\n%s", diff)
						}
						wantOneFilterEach(t, app, "orders", "billing")
					}
					billing.fixed.Store(true)
					r.replay(t, e, "op1")
					r.await(t, 1, dlq.StateResolved)
					publishStored(t, app, nil)
					eventually(t, func() bool { return len(billing.all()) == 3 }, "events come as before")
					settled(t, app, "orders", "billing")
					if fanOut {
						eventually(t, func() bool { return len(audit.all()) == 2 }, "the other stream has the events, and no replay")
						settled(t, app, "copies", "audit")
					}
					if retention == mono.WorkQueuePolicy {
						eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the stream is empty")
					}
				})
			}
		}
	}
}

// wantOneFilterEach checks the filters of a consumer that was replayed to: its own
// durable filters the event, and the durable for its replays filters those.
func wantOneFilterEach(t *testing.T, app *mono.App, stream, durable string) {
	t.Helper()
	for name, want := range map[string]string{durable: traceSubject, durable + "_replay": "monotel.replays." + stream + "." + durable + ".>"} {
		if cfg := consumerInfo(t, app, stream, name).Config; cfg.FilterSubject != want || len(cfg.FilterSubjects) > 0 {
			t.Errorf("consumer %q filters %q and %q, want %q", name, cfg.FilterSubject, cfg.FilterSubjects, want)
		}
	}
}

// A consumer that was deleted on the server is made again, and so is the durable for
// its replays; a stream that was, without what was replayed to it, and the next replay
// adds that.
func TestReplay_deletedOnTheServer(t *testing.T) {
	t.Parallel()
	for _, retention := range retentions() {
		for _, victim := range []string{"consumer", "replays", "both", "stream"} {
			t.Run(retention.String()+", "+victim, func(t *testing.T) {
				t.Parallel()
				srv := monotest.Server(t)
				var billing fixable
				app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
					Stream: mono.StreamConfig{Name: "orders", Retention: retention},
					// The server may lose what it sends for a consumer that was just made again.
					Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: 2 * time.Second},
				}, billing.handle))
				r := newReplayer(t, jetStreamOf(t, srv.Conn()))
				publishStored(t, app, nil)
				e := r.await(t, 1, dlq.StateOpen)[0]
				settled(t, app, "orders", "billing")
				billing.fixed.Store(true)
				r.open(t, "orders", "billing")
				has := func(durable string) bool {
					_, err := r.js.Consumer(within(t), "orders", durable)
					return err == nil
				}
				back := func() bool { return has("billing") && app.Health(t.Context()).Healthy }
				if victim == "stream" {
					// A stream that is asked for while the server deletes it may stay, and take
					// nothing: then it is deleted once more.
					eventually(t, func() bool {
						if err := r.js.DeleteStream(within(t), "orders"); err != nil {
							return false
						}
						eventually(t, back, "it is there again")
						ctx, cancel := context.WithTimeout(t.Context(), time.Second)
						defer cancel()
						_, err := r.js.Publish(ctx, traceSubject, []byte("probe"))
						return err == nil
					}, "it takes messages again")
				} else {
					if victim != "consumer" {
						eventually(t, func() bool { return consumerInfo(t, app, "orders", "billing_replay").NumWaiting > 0 }, "replays are fetched")
						if err := r.js.DeleteConsumer(within(t), "orders", "billing_replay"); err != nil {
							t.Fatal(err)
						}
					}
					if victim != "replays" {
						if err := r.js.DeleteConsumer(within(t), "orders", "billing"); err != nil {
							t.Fatal(err)
						}
					}
					eventually(t, func() bool { return back() && has("billing_replay") }, "it is there again")
					wantOneFilterEach(t, app, "orders", "billing")
				}
				r.replay(t, e, "op1")
				r.await(t, 1, dlq.StateResolved)
				settled(t, app, "orders", "billing")
			})
		}
	}
}

// A consumer that filters anything else is not ours.
func TestReplay_filtersOfOthers(t *testing.T) {
	t.Parallel()
	for _, filters := range [][]string{
		{traceSubject, "events.other"},
		{dlq.OldReplaySubjects("orders", "billing")},
		{traceSubject, dlq.OldReplaySubjects("orders", "audit")},
		{traceSubject, dlq.ReplaySubjects("orders", "billing")},
		{traceSubject, dlq.OldReplaySubjects("orders", "billing"), "events.other"},
	} {
		t.Run(strings.Join(filters, " "), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			js := jetStreamOf(t, srv.Conn())
			subjects := append([]string{traceSubject}, filters...)
			slices.Sort(subjects)
			if _, err := js.CreateStream(within(t), jetstream.StreamConfig{Name: "orders", Subjects: slices.Compact(subjects)}); err != nil {
				t.Fatal(err)
			}
			cfg := jetstream.ConsumerConfig{Durable: "billing", FilterSubjects: filters, AckPolicy: jetstream.AckExplicitPolicy}
			if _, err := js.CreateConsumer(within(t), "orders", cfg); err != nil {
				t.Fatal(err)
			}
			app := makeApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, ackAll))
			wantError(t, app.Start(within(t)), mono.ErrStreamConflict, filters[0], traceSubject)
		})
	}
}

// A replay that does not decode has failed again, and the others of its batch are
// handled.
func TestReplay_undecodable(t *testing.T) {
	t.Parallel()
	typed := helper.EventDefinition[int]("shop", "Counted", "v1")
	var fixed atomic.Bool
	var sum atomic.Int64
	app := startApp(t, emitter("shop", typed.ToBase()), consumer("counts", func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventStreamConsumer(r, typed, mono.StreamConsumerConfig{
			Stream: mono.StreamConfig{Name: "counts"}, Consumer: mono.ConsumerConfig{Durable: "counts"}, AutoAck: true,
		}, func(_ context.Context, counts []int, _ []*mono.Msg) error {
			if !fixed.Load() {
				return mono.Permanent(errBrokenPipe)
			}
			for _, c := range counts {
				sum.Add(int64(c))
			}
			return nil
		}, self)
	}))
	r := newReplayer(t, jetStream(t, app))
	for _, data := range []string{"1", "not a number"} {
		if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: typed.ToBase().Subject, Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return len(r.entries(t)) == 2 }, "two dead letters")
	fixed.Store(true)
	for _, e := range r.entries(t) {
		r.replay(t, e, "op1")
	}
	settled(t, app, "counts", "counts")
	for _, e := range r.entries(t) {
		if string(e.Data) == "1" {
			if e.State != dlq.StateResolved || sum.Load() != 1 {
				t.Errorf("what decodes is %s, and the sum %d", e.State, sum.Load())
			}
			continue
		}
		if e.State != dlq.StateOpen || e.Failures != 1 || e.Failure.Reason != dlq.ReasonUndecodable || e.Failure.ErrorType != "undecodable" {
			t.Errorf("what does not decode is %s with %+v", e.State, *e.Failure)
		}
	}
}

// A replay whose every attempt ends without an outcome has failed again, too.
func TestReplay_crashed(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var first, second fixable
	second.fixed.Store(true)
	module := func(f *fixable) *testModule {
		return ordersWith(t, mono.StreamConsumerConfig{
			Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
			Retry: mono.RetryPolicy{MaxAttempts: 2},
		}, f.handle)
	}
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module(&first))
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishStored(t, app, nil)
	e := r.await(t, 1, dlq.StateOpen)[0]
	settled(t, app, "orders", "billing")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	r.replay(t, e, "op1")
	c, err := r.js.Consumer(within(t), "orders", "billing_replay")
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(r.js.Conn(), r.js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 5 {
		m, err := c.Next(jetstream.FetchMaxWait(patience))
		if err != nil {
			t.Fatal(err)
		}
		if i >= 2 { // as a process that hands it over alone, and dies
			meta, err := m.Metadata()
			if err != nil {
				t.Fatal(err)
			}
			id := dlq.ID("orders", e.StreamCreated, "billing", meta.Sequence.Stream)
			mark, err := store.Mark(within(t), id)
			if err == nil {
				err = store.AddMark(within(t), id, mark)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Nak(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.js.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module(&second))
	eventually(t, func() bool { return r.entries(t)[0].Failures == 1 }, "it has failed again")
	settled(t, app, "orders", "billing")
	if e := r.await(t, 1, dlq.StateOpen)[0]; e.Failure.Reason != dlq.ReasonCrashed || e.Failure.Deliveries != 6 {
		t.Errorf("the failure is %+v", *e.Failure)
	}
	if len(second.all()) != 0 {
		t.Error("a handler has seen it")
	}
}

// Replays are handled in batches with other messages, and retried as they are. Each
// has its own outcome.
func TestReplay_batches(t *testing.T) {
	t.Parallel()
	const n = 40
	var fixed atomic.Bool
	var mu sync.Mutex
	handled, mixed := make(map[string]int), false
	sent := make(chan struct{})
	app := startApp(t, emitter("shop", monotestEvent(t)), ordersWith(t, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy},
		Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		Fetch:    mono.FetchConfig{BatchSize: 2 * n},
		Retry:    mono.RetryPolicy{MaxAttempts: 3, Backoff: []time.Duration{time.Millisecond}},
	}, func(_ context.Context, msgs []*mono.Msg) error {
		if !fixed.Load() {
			return mono.Permanent(errBrokenPipe)
		}
		<-sent // so that the others wait together
		mu.Lock()
		defer mu.Unlock()
		replays := 0
		for i, m := range msgs {
			handled[string(m.Data)]++
			if m.Header.Get(dlq.HeaderReplayOf) != "" {
				replays++
			}
			seq, attempt := m.Metadata().Sequence.Stream, m.Metadata().NumDelivered
			switch {
			case i%2 == 0 && attempt < 3:
				if err := m.Fail(errBrokenPipe); err != nil {
					return err
				}
			case seq%5 == 0:
				if err := m.TermWithReason("five"); err != nil {
					return err
				}
			}
		}
		mixed = mixed || replays > 0 && replays < len(msgs)
		return nil
	}))
	r := newReplayer(t, jetStream(t, app))
	for i := range n {
		if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("dead-" + strconv.Itoa(i))}); err != nil {
			t.Fatal(err)
		}
	}
	dead := r.await(t, n, dlq.StateOpen)
	settled(t, app, "orders", "billing")
	fixed.Store(true)
	terms := 0
	for i, e := range dead {
		r.replay(t, e, "op1")
		if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("new-" + strconv.Itoa(i))}); err != nil {
			t.Fatal(err)
		}
	}
	close(sent)
	settled(t, app, "orders", "billing")
	eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the stream is empty")
	replayed := 0
	for _, e := range r.entries(t) {
		if strings.HasPrefix(string(e.Data), "new-") {
			if e.StreamSequence%5 != 0 || e.State != dlq.StateOpen || len(e.History) != 0 {
				t.Errorf("%q is %+v", e.Data, *e)
			}
			continue
		}
		replayed++
		switch {
		case len(e.History) != 2:
			t.Errorf("%q has the history %+v", e.Data, e.History)
		case e.State == dlq.StateOpen && e.Failure.ReasonText == "five" && e.Failure.StreamSequence%5 == 0:
			terms++
		case e.State != dlq.StateResolved:
			t.Errorf("%q is %s with %+v", e.Data, e.State, *e.Failure)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if replayed != n || terms == 0 || len(handled) != 2*n || !mixed {
		t.Errorf("%d were replayed, %d terminated, %d handled, batches are mixed: %v", replayed, terms, len(handled), mixed)
	}
}

// Without dead letters a replay is a message like any.
func TestReplay_withoutDeadLetters(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	js := jetStreamOf(t, srv.Conn())
	r := newReplayer(t, js)
	if err := r.store.Provision(within(t)); err != nil {
		t.Fatal(err)
	}
	var billing fixable
	app := runApp(t, append(onServer(srv), mono.WithoutDeadLetters()), emitter("shop", monotestEvent(t)),
		orders(t, "billing", mono.WorkQueuePolicy, billing.handle))
	e := dlq.NewEntry(&dlq.Record{
		ID: "abc", Stream: "orders", Consumer: "billing", Reason: dlq.ReasonTerminated, Subject: traceSubject, Data: []byte("payload"),
	}, 1, nil)
	if _, err := r.store.Capture(within(t), e.Record, nil); err != nil {
		t.Fatal(err)
	}
	for i, op := range []string{"op1", "op2"} { // given up, and handled
		r.claim(t, e, op)
		r.open(t, "orders", "billing")
		r.send(t, r.message(e, op, nil))
		eventually(t, func() bool { return len(billing.all()) == i+1 && streamMsgs(t, app, "orders") == 0 }, "it is settled")
		billing.fixed.Store(true)
	}
	for _, m := range billing.all() {
		if m.Subject != traceSubject || string(m.Data) != "payload" {
			t.Errorf("handled: %q on %q", m.Data, m.Subject)
		}
	}
	if e := r.await(t, 1, dlq.StateReplaying)[0]; len(e.History) != 2 {
		t.Errorf("the dead letter is %+v", *e)
	}
}

// What is replayed and given up while its dead letter is discarded is a dead letter
// of its own: nothing that is given up is lost. What is handled is acked.
func TestReplay_deadLetterGone(t *testing.T) {
	t.Parallel()
	for _, fixed := range []bool{true, false} {
		t.Run(fmt.Sprintf("fixed %v", fixed), func(t *testing.T) {
			t.Parallel()
			var billing fixable
			app := startApp(t, emitter("shop", monotestEvent(t)), orders(t, "billing", mono.WorkQueuePolicy, billing.handle))
			r := newReplayer(t, jetStream(t, app))
			publishStored(t, app, mono.Header{"k": {"v"}, "Nats-Msg-Id": {"order-1"}})
			e := r.await(t, 1, dlq.StateOpen)[0]
			settled(t, app, "orders", "billing")
			billing.fixed.Store(fixed)
			r.claim(t, e, "op1")
			msg := r.message(e, "op1", mono.Header{"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}})
			if err := r.store.Change(within(t), e, dlq.Change{Kind: dlq.ChangeDiscarded, Actor: "ben"}, nil); err != nil {
				t.Fatal(err)
			}
			r.open(t, "orders", "billing")
			r.send(t, msg)
			eventually(t, func() bool { return len(billing.all()) == 2 && streamMsgs(t, app, "orders") == 0 }, "it is settled")
			got := r.entries(t)
			if fixed {
				if len(got) != 0 {
					t.Errorf("a dead letter: %+v", *got[0])
				}
				return
			}
			if len(got) != 1 {
				t.Fatalf("%d dead letters, want 1", len(got))
			}
			n := got[0]
			want := nats.Header{"k": {"v"}, "traceparent": msg.Header["traceparent"]}
			if n.ID == e.ID || n.Subject != traceSubject || string(n.Data) != "x" || n.Reason != dlq.ReasonPermanentError || n.StreamSequence != 2 {
				t.Errorf("the dead letter is %+v", *n.Record)
			}
			if diff := cmp.Diff(want, n.Header); diff != "" {
				t.Errorf("its header (-want +got):\n%s", diff)
			}
		})
	}
}

// Whoever may publish into the stream can send what looks like a replay. It is a
// message like any then, and no dead letter is resolved by it.
func TestReplay_forged(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		forge func(e *dlq.Entry, m *nats.Msg)
	}{
		{name: "never claimed", forge: func(*dlq.Entry, *nats.Msg) {}},
		{name: "claim is the record", forge: func(e *dlq.Entry, m *nats.Msg) {
			m.Header.Set(dlq.HeaderReplayClaim, strconv.FormatUint(e.Sequence, 10))
		}},
		{name: "claim is nonsense", forge: func(_ *dlq.Entry, m *nats.Msg) { m.Header.Set(dlq.HeaderReplayClaim, "-1\x1b[31m") }},
		{name: "of another stream", forge: func(_ *dlq.Entry, m *nats.Msg) { m.Header.Set(dlq.HeaderReplayStream, "orders.>") }},
		{name: "no headers", forge: func(_ *dlq.Entry, m *nats.Msg) { m.Header = nil }},
		{name: "wildcard", forge: func(_ *dlq.Entry, m *nats.Msg) { m.Subject = dlq.ReplaySubject("orders", "billing", "a", "op") + ".*" }},
		{name: "links are nonsense", forge: func(_ *dlq.Entry, m *nats.Msg) {
			m.Header[dlq.HeaderReplayLinks] = []string{strings.Repeat("x", 10_000), "00-zz", " ", ""}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var billing fixable
			tr := newTracing()
			app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)),
				orders(t, "billing", mono.WorkQueuePolicy, billing.handle))
			r := newReplayer(t, jetStream(t, app))
			publishStored(t, app, nil)
			e := r.await(t, 1, dlq.StateOpen)[0]
			settled(t, app, "orders", "billing")
			r.open(t, "orders", "billing")
			billing.fixed.Store(true)
			msg := r.message(e, "op1", nil)
			tt.forge(e, msg)
			r.send(t, msg)
			eventually(t, func() bool { return len(billing.all()) == 2 && streamMsgs(t, app, "orders") == 0 }, "it is handled")
			billing.fixed.Store(false)
			msg = r.message(e, "op2", nil)
			tt.forge(e, msg)
			msg.Header = maps.Clone(msg.Header)
			maps.DeleteFunc(msg.Header, func(k string, _ []string) bool { return strings.HasPrefix(k, "Nats-") })
			r.send(t, msg)
			got := r.await(t, 2, dlq.StateOpen) // it is given up as the message that it is
			eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "it is settled")
			if len(got[0].History) != 0 || got[0].ID != e.ID || got[1].StreamSequence != 3 {
				t.Errorf("the dead letters are %+v and %+v", *got[0], *got[1])
			}
		})
	}
}

// A work queue of one event that was replayed to gets a second event from another
// stream. The server must not take the first event's consumer for one of all its
// messages: those from the source would never leave the queue.
func TestReplay_sourceLater(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	paid := defineEvent(t, "Paid")
	queue := mono.StreamConfig{Name: "orders", Retention: mono.WorkQueuePolicy}
	var billing, dunning fixable
	dunning.fixed.Store(true)
	first := orders(t, "billing", mono.WorkQueuePolicy, billing.handle)
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), first)
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishStored(t, app, nil)
	e := r.await(t, 1, dlq.StateOpen)[0]
	billing.fixed.Store(true)
	r.replay(t, e, "op1")
	r.await(t, 1, dlq.StateResolved)
	settled(t, app, "orders", "billing")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t), paid), first,
		durableModule("archive", paid, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "archive"}, AutoAck: true}, ackAll),
		durableModule("dunning", paid, mono.StreamConsumerConfig{Stream: queue, AutoAck: true}, dunning.handle))
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: paid.Subject, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return len(dunning.all()) == 1 && streamMsgs(t, app, "orders") == 0 }, "the event is handled and gone")
}

// A replay goes on in the trace in which it was sent, and links to what it is a
// replay of; what has come of it leads to its trace.
func TestTrace_replay(t *testing.T) {
	t.Parallel()
	for _, traced := range []bool{true, false} {
		t.Run(fmt.Sprintf("traced %v", traced), func(t *testing.T) {
			t.Parallel()
			var billing fixable
			tr := newTracing()
			app := startAppWith(t, []mono.Option{tr.option()}, emitter("shop", monotestEvent(t)),
				orders(t, "billing", mono.WorkQueuePolicy, billing.handle))
			r := newReplayer(t, jetStream(t, app))
			publishStored(t, app, nil)
			e := r.await(t, 1, dlq.StateOpen)[0]
			publish := tr.one(t, publishSpan)
			failed := tr.one(t, processSpan)
			tel, err := messaging.New(messaging.Config{TracerProvider: tr.provider, MeterProvider: noop.NewMeterProvider()})
			if err != nil {
				t.Fatal(err)
			}
			for i, op := range []string{"op1", "op2"} { // fails again, and is resolved
				billing.fixed.Store(i == 1)
				r.claim(t, e, op)
				r.open(t, "orders", "billing")
				var more mono.Header
				if traced {
					span := tel.Replay(t.Context(), &messaging.DeadLetter{Consumer: "billing", Traceparent: e.Traceparent, Origin: e.OriginTraceparent})
					more = span.Header
					span.End(nil)
				}
				r.send(t, r.message(e, op, more))
				eventually(t, func() bool { e = r.entries(t)[0]; return len(e.History) == 2*(i+1) }, "the outcome is stored")
				process := tr.ended(t, processSpan, 2+i)[1+i]
				links := []trace.SpanContext{failed.SpanContext(), publish.SpanContext()}
				if traced {
					sent := tr.ended(t, "replay _unmatched", 1+i)[i]
					wantRoot(t, sent, publish)
					wantLinks(t, sent, links...)
					wantChild(t, process, sent)
					links = append([]trace.SpanContext{sent.SpanContext()}, links...)
				} else {
					wantRoot(t, process, publish, failed)
				}
				wantLinks(t, process, links...)
				wantAttrs(t, process, map[string]string{
					"messaging.destination.template": traceSubject, "messaging.destination.name": traceSubject,
					"messaging.consumer.group.name": "billing",
				})
				raw, err := mustStream(t, r.js, "DLQ").GetMsg(within(t), e.Last)
				if err != nil {
					t.Fatal(err)
				}
				if id := process.SpanContext().SpanID().String(); !strings.Contains(raw.Header.Get("traceparent"), id) ||
					i == 0 && !strings.Contains(e.Failure.Traceparent, id) {
					t.Errorf("outcome %d has traceparent %q, and the failure %q", i, raw.Header.Get("traceparent"), e.Failure.Traceparent)
				}
			}
		})
	}
}

func mustStream(t *testing.T, js jetstream.JetStream, name string) jetstream.Stream {
	t.Helper()
	s, err := js.Stream(within(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Another instance that arranged the streams while somebody replayed may have
// taken the subject away again. What is there is left, and the next replay adds what is
// missing.
func TestReplay_subjectLost(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var billing fixable
	module := orders(t, "billing", mono.WorkQueuePolicy, billing.handle)
	app := runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module)
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishStored(t, app, nil)
	e := r.await(t, 1, dlq.StateOpen)[0]
	settled(t, app, "orders", "billing")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	whole := mustStream(t, r.js, "orders").CachedInfo().Config
	r.open(t, "orders", "billing")
	for _, lost := range []bool{false, true} {
		if lost {
			if _, err := r.js.UpdateStream(within(t), whole); err != nil {
				t.Fatal(err)
			}
		}
		app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module)
		wantOneFilterEach(t, app, "orders", "billing")
		if err := app.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	billing.fixed.Store(true)
	r.replay(t, e, "op1")
	app = runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), module)
	r.await(t, 1, dlq.StateResolved)
	settled(t, app, "orders", "billing")
}
