package mono_test

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// openOld prepares a consumer for replays as tools of earlier versions do: by a subject
// and a second filter.
func (r *replayer) openOld(t *testing.T, stream, durable string) {
	t.Helper()
	subject := dlq.OldReplaySubjects(stream, durable)
	s := mustStream(t, r.js, stream)
	cfg := s.CachedInfo().Config
	if !slices.Contains(cfg.Subjects, subject) {
		cfg.Subjects = append(slices.Clone(cfg.Subjects), subject)
		if _, err := r.js.UpdateStream(within(t), cfg); err != nil {
			t.Fatal(err)
		}
	}
	c, err := s.Consumer(within(t), durable)
	if err != nil {
		t.Fatal(err)
	}
	has := c.CachedInfo().Config
	if has.FilterSubject == "" {
		return
	}
	has.FilterSubjects, has.FilterSubject = []string{has.FilterSubject, subject}, ""
	if _, err := s.UpdateConsumer(within(t), has); err != nil {
		t.Fatal(err)
	}
}

// oldMessage is what a tool of an earlier version sends.
func (r *replayer) oldMessage(e *dlq.Entry, operation string) *nats.Msg {
	m := r.message(e, operation, nil)
	m.Subject = dlq.OldReplaySubject(e.Stream, e.Consumer, e.ID, operation)
	return m
}

// consumers lists the names of the consumers of a stream.
func (r *replayer) consumers(t *testing.T, stream string) []string {
	t.Helper()
	var names []string
	list := mustStream(t, r.js, stream).ConsumerNames(within(t))
	for name := range list.Name() {
		names = append(names, name)
	}
	if err := list.Err(); err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

// A migrationCase is a stream of one kind with consumer "billing".
type migrationCase struct {
	retention jetstream.RetentionPolicy
	sourced   bool // the event comes from another stream
}

func migrationCases() []migrationCase {
	var all []migrationCase
	for _, retention := range retentions() {
		all = append(all, migrationCase{retention, false}, migrationCase{retention, true})
	}
	return all
}

func (c migrationCase) String() string { return fmt.Sprintf("%s, sourced %v", c.retention, c.sourced) }

// modules are those of an App. Where the event is to come from another stream, that one
// has a consumer as well.
func (c migrationCase) modules(t *testing.T, h mono.EventStreamConsumerHandler) []mono.Module {
	t.Helper()
	all := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", c.retention, h)}
	if c.sourced {
		all = append(all, ordersWith(t, mono.StreamConsumerConfig{
			Stream: mono.StreamConfig{Name: "all"}, Consumer: mono.ConsumerConfig{Durable: "audit", AckWait: time.Minute},
		}, ackAll))
	}
	return all
}

// A replay to a consumer leaves its own durable as it is, and makes one beside it with
// one filter. A durable with two filters, one of them over the subjects of many replays,
// made the server walk through its stream for each event: after 10 000 replays 20 000
// events took more than 60 s instead of 0.34 s.
func TestReplay_durableOfItsOwn(t *testing.T) {
	t.Parallel()
	for _, c := range migrationCases() {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			var billing fixable
			app := startApp(t, c.modules(t, billing.handle)...)
			r := newReplayer(t, jetStream(t, app))
			publishStored(t, app, nil)
			r.await(t, 1, dlq.StateOpen)
			settled(t, app, "orders", "billing")
			if got := r.consumers(t, "orders"); !slices.Equal(got, []string{"billing"}) {
				t.Fatalf("before the first replay the stream has the consumers %q", got)
			}
			before := consumerInfo(t, app, "orders", "billing").Config
			billing.fixed.Store(true)
			desk, err := triage.Open(within(t), app.Conn(), triage.Config{Actor: "ann@ops"})
			if err != nil {
				t.Fatal(err)
			}
			p, err := desk.Plan(within(t), triage.Selection{}, triage.Options{})
			if err != nil {
				t.Fatal(err)
			}
			op, err := desk.Run(within(t), p.ID, nil)
			if err != nil || op.Resolved != 1 {
				t.Fatalf("operation %+v, %v", op, err)
			}
			if diff := gocmp.Diff(before, consumerInfo(t, app, "orders", "billing").Config); diff != "" {
				t.Errorf("the consumer's own durable (-before +after):\n%s", diff)
			}
			wantOneFilterEach(t, app, "orders", "billing")
			if got := r.consumers(t, "orders"); !slices.Equal(got, []string{"billing", "billing_replay"}) {
				t.Errorf("the stream has the consumers %q", got)
			}
			publishStored(t, app, nil)
			eventually(t, func() bool { return len(billing.all()) == 3 }, "events come as before")
			settled(t, app, "orders", "billing")
			if c.retention != mono.LimitsPolicy { // what is handled is gone, from sources as well
				eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the stream is empty")
			}
		})
	}
}

// After many replays events are consumed about as quickly as before. Before and after are
// compared within one run, each by the best of some rounds, with much room: the server's
// walk took hundreds of times as long.
func TestReplay_eventsAsQuickAsBefore(t *testing.T) {
	t.Parallel()
	const replays, events, rounds, room = 1000, 4000, 3, 10
	m := newReplayMeasure(t)
	before := m.best(t, rounds, events)
	m.replay(t, replays)
	after := m.best(t, rounds, events)
	t.Logf("%d events: %v, after %d replays %v", events, before, replays, after)
	if after > room*before {
		t.Errorf("%d events took %v, after %d replays %v", events, before, replays, after)
	}
}

// BenchmarkReplay_eventsAfter measures how quickly events are published and consumed
// after 10 000 replays, as a part of how quickly they were before: ratio is 1 when
// replays cost nothing.
func BenchmarkReplay_eventsAfter(b *testing.B) {
	const replays, events, rounds = 10_000, 20_000, 5
	var before, after time.Duration
	for b.Loop() {
		m := newReplayMeasure(b)
		before += m.best(b, rounds, events)
		m.replay(b, replays)
		after += m.best(b, rounds, events)
	}
	n := float64(b.N)
	b.ReportMetric(n*events/before.Seconds(), "before-msgs/s")
	b.ReportMetric(n*events/after.Seconds(), "after-msgs/s")
	b.ReportMetric(before.Seconds()/after.Seconds(), "ratio")
}

// A replayMeasure is an App with one consumer of a limits stream.
type replayMeasure struct {
	app     *mono.App
	js      jetstream.JetStream
	gate    sync.RWMutex // the handler waits while it is locked
	handled atomic.Int64
}

func newReplayMeasure(t testing.TB) *replayMeasure {
	t.Helper()
	m := &replayMeasure{}
	e := defineEvent(t, "OrderPlaced")
	cfg := mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders"},
		Consumer: mono.ConsumerConfig{Durable: "billing"},
		Fetch:    mono.FetchConfig{BatchSize: 100},
		AutoAck:  true,
	}
	srv := monotest.Server(t)
	m.app = makeApp(t, onServer(srv), emitter("shop", e), durableModule("billing", e, cfg, func(_ context.Context, msgs []*mono.Msg) error {
		m.gate.RLock()
		defer m.gate.RUnlock()
		m.handled.Add(int64(len(msgs)))
		return nil
	}))
	if err := m.app.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(m.app.Conn())
	if err != nil {
		t.Fatal(err)
	}
	m.js = js
	return m
}

// publish stores n messages, and measures how long it takes to handle them. The server
// walked when many were stored that were not delivered yet, so they are handled when all
// are stored.
func (m *replayMeasure) publish(t testing.TB, n int, subject func(i int) string) time.Duration {
	t.Helper()
	want := m.handled.Load() + int64(n)
	m.gate.Lock()
	for i := range n {
		if _, err := m.js.PublishAsync(subject(i), []byte("0123456789abcdef"), jetstream.WithStallWait(patience)); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-m.js.PublishAsyncComplete():
	case <-time.After(4 * patience):
		t.Fatal("the messages are not stored")
	}
	begin := time.Now()
	m.gate.Unlock()
	if !pollFor(4*patience, func() bool { return m.handled.Load() >= want }) {
		t.Fatalf("%d of %d messages were not handled", want-m.handled.Load(), n)
	}
	return time.Since(begin) //nolint:forbidigo // compared with another within one run
}

func (m *replayMeasure) best(t testing.TB, rounds, events int) time.Duration {
	t.Helper()
	best := time.Duration(0)
	for range rounds {
		took := m.publish(t, events, func(int) string { return traceSubject })
		best = cmp.Or(min(cmp.Or(best, took), took), 1)
	}
	return best
}

// replay opens the consumer to replays, as the tool does for one dead letter, and
// replays many messages. They are of no dead letter, which makes them messages like any.
func (m *replayMeasure) replay(t testing.TB, n int) {
	t.Helper()
	store, err := dlq.NewStore(m.js.Conn(), m.js, dlq.Config{})
	if err != nil {
		t.Fatal(err)
	}
	rec := &dlq.Record{
		ID: "abc", Stream: "orders", Consumer: "billing", Event: "shop/OrderPlaced/v1", Reason: dlq.ReasonTerminated,
		Subject: traceSubject, Data: []byte("payload"),
	}
	if _, err := store.Capture(t.Context(), rec, nil); err != nil {
		t.Fatal(err)
	}
	desk, err := triage.Open(t.Context(), m.js.Conn(), triage.Config{Actor: "ann@ops"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := desk.Plan(t.Context(), triage.Selection{}, triage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if op, err := desk.Run(t.Context(), p.ID, nil); err != nil || op.Resolved != 1 {
		t.Fatalf("operation %+v, %v", op, err)
	}
	m.publish(t, n, func(i int) string { return dlq.ReplaySubject("orders", "billing", "id"+strconv.Itoa(i), "op") })
}

// A consumer that earlier versions gave a second filter for replays is migrated: its
// stream refuses more of them, what is there is handled, and then the filter goes.
func TestReplay_migrated(t *testing.T) {
	t.Parallel()
	for _, c := range migrationCases() {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var billing fixable
			app := runApp(t, onServer(srv), c.modules(t, billing.handle)...)
			r := newReplayer(t, jetStreamOf(t, srv.Conn()))
			const n = 3
			for range n {
				publishStored(t, app, nil)
			}
			dead := r.await(t, n, dlq.StateOpen)
			settled(t, app, "orders", "billing")
			if err := app.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			r.openOld(t, "orders", "billing")
			for _, e := range dead[:n-1] {
				r.claim(t, e, "op1")
				r.send(t, r.oldMessage(e, "op1"))
			}
			// The replays are kept in work while the App migrates.
			release, entered := make(chan struct{}), make(chan struct{}, n)
			var handled atomic.Int64
			app = runApp(t, append(onServer(srv), mono.WithReplayGrace(0)), c.modules(t, func(ctx context.Context, msgs []*mono.Msg) error {
				handled.Add(int64(len(msgs)))
				entered <- struct{}{}
				select {
				case <-release:
				case <-ctx.Done():
				}
				return nil
			})...)
			receive(t, entered, "a replay is in work")
			old := dlq.OldReplaySubjects("orders", "billing")
			if err := mono.SweepReplays(within(t), app); err != nil {
				t.Fatal(err)
			}
			if slices.Contains(streamInfo(t, app, "orders").Config.Subjects, old) {
				t.Error("the stream still takes replays of earlier versions")
			}
			if got, want := consumerInfo(t, app, "orders", "billing").Config.FilterSubjects, []string{traceSubject, old}; !slices.Equal(got, want) {
				t.Errorf("while replays wait the filters are %q, want %q", got, want)
			}
			close(release)
			r.awaitStates(t, dlq.StateResolved, dlq.StateResolved, dlq.StateOpen)
			settled(t, app, "orders", "billing")
			if err := mono.SweepReplays(within(t), app); err != nil {
				t.Fatal(err)
			}
			if cfg := consumerInfo(t, app, "orders", "billing").Config; cfg.FilterSubject != traceSubject || len(cfg.FilterSubjects) > 0 {
				t.Errorf("the filters are %q and %q", cfg.FilterSubject, cfg.FilterSubjects)
			}
			// Events and replays come as ever, and a restart changes nothing.
			r.replay(t, r.entries(t)[n-1], "op2")
			r.await(t, n, dlq.StateResolved)
			publishStored(t, app, nil)
			eventually(t, func() bool { return handled.Load() == n+1 }, "an event comes")
			settled(t, app, "orders", "billing")
			wantOneFilterEach(t, app, "orders", "billing")
			if err := app.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			app = runApp(t, append(onServer(srv), mono.WithReplayGrace(0)), c.modules(t, billing.handle)...)
			wantOneFilterEach(t, app, "orders", "billing")
			settled(t, app, "orders", "billing")
			if got := handled.Load(); got != n+1 {
				t.Errorf("the handler got %d messages, want %d", got, n+1)
			}
			if c.retention != mono.LimitsPolicy {
				eventually(t, func() bool { return streamMsgs(t, app, "orders") == 0 }, "the stream is empty")
			}
		})
	}
}

// awaitStates waits until the dead letters are in these states.
func (r *replayer) awaitStates(t *testing.T, want ...dlq.State) {
	t.Helper()
	eventually(t, func() bool {
		var got []dlq.State
		for _, e := range r.entries(t) {
			got = append(got, e.State)
		}
		return slices.Equal(got, want)
	}, fmt.Sprintf("the dead letters are %v", want))
}

// A tool of an earlier version adds its subject and filter again. While it may be
// sending they stay, and each of its replays is handled once. Then the consumer is
// migrated again.
func TestReplay_migratedAgain(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var billing fixable
	modules := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, billing.handle)}
	app := runApp(t, onServer(srv), modules...)
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	publishStored(t, app, nil)
	publishStored(t, app, nil)
	dead := r.await(t, 2, dlq.StateOpen)
	billing.fixed.Store(true)
	r.replay(t, dead[0], "op1")
	r.awaitStates(t, dlq.StateResolved, dlq.StateOpen)
	r.openOld(t, "orders", "billing")
	r.claim(t, dead[1], "op2")
	r.send(t, r.oldMessage(dead[1], "op2"))
	r.await(t, 2, dlq.StateResolved)
	settled(t, app, "orders", "billing")
	old := dlq.OldReplaySubjects("orders", "billing")
	if err := mono.SweepReplays(within(t), app); err != nil {
		t.Fatal(err)
	}
	if got := consumerInfo(t, app, "orders", "billing").Config.FilterSubjects; !slices.Contains(got, old) {
		t.Errorf("right after a replay the filters are %q", got)
	}
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	app = runApp(t, append(onServer(srv), mono.WithReplayGrace(0)), modules...)
	wantOneFilterEach(t, app, "orders", "billing")
	if slices.Contains(streamInfo(t, app, "orders").Config.Subjects, old) {
		t.Error("the stream still takes replays of earlier versions")
	}
	if n := len(billing.all()); n != 4 {
		t.Errorf("the handler got %d messages, want 4", n)
	}
}

// An instance of an earlier version, which knows one durable and its second filter,
// works beside a new one. Each event and each replay, by tools of both versions, is
// handled once by one of them.
func TestReplay_besideAnOldInstance(t *testing.T) {
	t.Parallel()
	const n = 50
	for _, c := range migrationCases() {
		t.Run(c.String(), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var failing fixable
			app := runApp(t, onServer(srv), c.modules(t, failing.handle)...)
			r := newReplayer(t, jetStreamOf(t, srv.Conn()))
			for range n {
				publishStored(t, app, nil)
			}
			dead := r.await(t, n, dlq.StateOpen)
			settled(t, app, "orders", "billing")
			if err := app.Stop(within(t)); err != nil {
				t.Fatal(err)
			}
			var mu sync.Mutex
			handled := make(map[string]int)
			note := func(id, by string) {
				mu.Lock()
				defer mu.Unlock()
				handled[id]++
				handled[by]++
			}
			stop := startOldInstance(t, srv, r, func(id string) { note(id, "old") })
			defer stop()
			app = runApp(t, onServer(srv), c.modules(t, func(_ context.Context, msgs []*mono.Msg) error {
				for _, m := range msgs {
					note(cmp.Or(m.Header.Get(dlq.HeaderReplayOf), string(m.Data)), "new")
				}
				return nil
			})...)
			r.openOld(t, "orders", "billing")
			r.open(t, "orders", "billing")
			for i, e := range dead {
				r.claim(t, e, "op1")
				if i%2 == 0 {
					r.send(t, r.oldMessage(e, "op1"))
				} else {
					r.send(t, r.message(e, "op1", nil))
				}
				if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: traceSubject, Data: []byte("event-" + strconv.Itoa(i))}); err != nil {
					t.Fatal(err)
				}
			}
			r.await(t, n, dlq.StateResolved)
			settled(t, app, "orders", "billing")
			mu.Lock()
			defer mu.Unlock()
			for i, e := range dead {
				if handled[e.ID] != 1 || handled["event-"+strconv.Itoa(i)] != 1 {
					t.Errorf("replay %d was handled %d times, event %d %d times", i, handled[e.ID], i, handled["event-"+strconv.Itoa(i)])
				}
			}
			if handled["old"]+handled["new"] != 2*n || handled["new"] < n/2 {
				t.Errorf("the old instance handled %d, the new one %d of %d", handled["old"], handled["new"], 2*n)
			}
		})
	}
}

// startOldInstance pulls from the consumer's own durable alone.
func startOldInstance(t *testing.T, srv *monotest.TestServer, r *replayer, handled func(id string)) (stop func()) {
	t.Helper()
	c, err := jetStreamOf(t, srv.Conn()).Consumer(within(t), "orders", "billing")
	if err != nil {
		t.Fatal(err)
	}
	cc, err := c.Consume(func(m jetstream.Msg) {
		if replay, ok := dlq.ParseReplay("orders", "billing", m.Subject(), m.Headers()); ok {
			if !replay.Old {
				t.Errorf("an old instance got a replay on %q", m.Subject())
			}
			handled(replay.ID)
			if _, err := r.store.Outcome(within(t), replay, "old", nil, nil); err != nil {
				t.Error(err)
			}
		} else {
			handled(string(m.Data()))
		}
		_ = m.Ack()
	}, jetstream.PullMaxMessages(5))
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		cc.Stop()
		<-cc.Closed()
	}
}

// Several instances share replays, and each is handled once. None of the instances was
// started after the durable for them was made.
func TestReplay_severalInstances(t *testing.T) {
	t.Parallel()
	const n, instances = 100, 3
	srv := monotest.Server(t)
	var fixed atomic.Bool
	var mu sync.Mutex
	handled, by := make(map[string]int), make(map[int]int)
	var apps []*mono.App
	for i := range instances {
		apps = append(apps, runApp(t, onServer(srv), emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy,
			func(_ context.Context, msgs []*mono.Msg) error {
				if !fixed.Load() {
					return mono.Permanent(errBrokenPipe)
				}
				mu.Lock()
				defer mu.Unlock()
				for _, m := range msgs {
					handled[m.Header.Get(dlq.HeaderReplayOf)]++
					by[i]++
				}
				return nil
			})))
	}
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	for range n {
		publishStored(t, apps[0], nil)
	}
	dead := r.await(t, n, dlq.StateOpen)
	settled(t, apps[0], "orders", "billing")
	fixed.Store(true)
	r.open(t, "orders", "billing")
	eventually(t, func() bool { return consumerInfo(t, apps[0], "orders", "billing_replay").NumWaiting >= instances }, "every instance fetches replays")
	for _, e := range dead {
		r.claim(t, e, "op1")
		r.send(t, r.message(e, "op1", nil))
	}
	r.await(t, n, dlq.StateResolved)
	settled(t, apps[0], "orders", "billing")
	mu.Lock()
	defer mu.Unlock()
	for _, e := range dead {
		if handled[e.ID] != 1 {
			t.Errorf("dead letter %s was handled %d times", e.ID, handled[e.ID])
		}
	}
	if len(by) != instances {
		t.Errorf("the instances handled %v", by)
	}
}

// The durable for replays of a limits stream is deleted and made again. It delivers all
// that was ever replayed, and no handler sees what has its outcome.
func TestReplay_resolvedNotHandledAgain(t *testing.T) {
	t.Parallel()
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %v", restart), func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			var billing fixable
			modules := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, billing.handle)}
			app := runApp(t, onServer(srv), modules...)
			r := newReplayer(t, jetStreamOf(t, srv.Conn()))
			const n = 3
			for range n {
				publishStored(t, app, nil)
			}
			dead := r.await(t, n, dlq.StateOpen)
			r.replay(t, dead[0], "op1") // fails again
			eventually(t, func() bool { return r.entries(t)[0].Failures == 1 }, "it fails again")
			billing.fixed.Store(true)
			for _, e := range r.entries(t) {
				r.replay(t, e, "op2")
			}
			r.await(t, n, dlq.StateResolved)
			settled(t, app, "orders", "billing")
			before := len(billing.all())
			if restart {
				if err := app.Stop(within(t)); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.js.DeleteConsumer(within(t), "orders", "billing_replay"); err != nil {
				t.Fatal(err)
			}
			if restart {
				app = runApp(t, onServer(srv), modules...)
			}
			eventually(t, func() bool {
				c, err := r.js.Consumer(within(t), "orders", "billing_replay")
				return err == nil && c.CachedInfo().Delivered.Consumer > n
			}, "it is made again, and delivers what was replayed")
			settled(t, app, "orders", "billing")
			if n := len(billing.all()); n != before {
				t.Errorf("the handler was called %d times more", n-before)
			}
			for _, e := range r.await(t, n, dlq.StateResolved) {
				if e.Operation != "op2" {
					t.Errorf("the dead letter is %+v", *e)
				}
			}
		})
	}
}

// What is replayed counts as the consumer's: it waits, is in flight, and grows old.
func TestReplay_gauges(t *testing.T) {
	t.Parallel()
	const n = 5
	srv := monotest.Server(t)
	scrape := newScraper(t)
	release := make(chan struct{})
	cfg := mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "billing", MaxAckPending: 2},
		Fetch: mono.FetchConfig{BatchSize: 1}, AutoAck: true, Concurrency: 2,
	}
	app := runApp(t, append(onServer(srv), scrape.option), emitter("shop", monotestEvent(t)), ordersWith(t, cfg, func(context.Context, []*mono.Msg) error {
		<-release
		return nil
	}))
	defer close(release)
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	r.open(t, "orders", "billing")
	for i := range n {
		r.send(t, &nats.Msg{Subject: dlq.ReplaySubject("orders", "billing", strconv.Itoa(i), "op")})
	}
	eventually(t, func() bool { return consumerInfo(t, app, "orders", "billing_replay").NumAckPending == 2 }, "two are in flight")
	const labels = "{messaging_nats_stream=orders}"
	eventually(t, func() bool {
		_, ok := scrape.text(t)["mono_consumer_pending"+labels]
		return ok
	}, "the gauges are there")
	got := scrape.text(t)
	for name, want := range map[string]float64{
		"mono_consumer_pending" + labels: n - 2, "mono_consumer_ack_pending" + labels: 2, "mono_consumer_ack_pending_limit" + labels: 2,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if age := got["mono_consumer_oldest_unprocessed_age_seconds"+labels]; age <= 0 || age > 2*patience.Seconds() {
		t.Errorf("the oldest message is %v s old", age)
	}
}

// Anybody may wake consumers, of whichever names and however often. That costs the server
// few requests, and makes nothing.
func TestReplay_wokenForNothing(t *testing.T) {
	t.Parallel()
	const n = 20_000
	app := startApp(t, emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, ackAll))
	r := newReplayer(t, jetStream(t, app))
	var looked atomic.Int64
	sub, err := app.Conn().Subscribe("$JS.API.STREAM.INFO.orders", func(*nats.Msg) { looked.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	for i := range n {
		for _, name := range []string{"billing", "nobody-" + strconv.Itoa(i), "*", "billing_replay"} {
			r.wake(t, "orders", name)
		}
	}
	eventually(t, func() bool { return looked.Load() > 0 }, "it looks")
	if got := looked.Load(); got > n/100 {
		t.Errorf("%d wake-ups made it look %d times", n, got)
	}
	if got := r.consumers(t, "orders"); !slices.Equal(got, []string{"billing"}) {
		t.Errorf("the stream has the consumers %q", got)
	}
	publishStored(t, app, nil)
	settled(t, app, "orders", "billing")
}

// A consumer that has the name of the durable for replays and is something else is left
// alone. The App starts, and handles events.
func TestReplay_nameTaken(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	var billing fixable
	billing.fixed.Store(true)
	modules := []mono.Module{emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, billing.handle)}
	app := runApp(t, onServer(srv), modules...)
	r := newReplayer(t, jetStreamOf(t, srv.Conn()))
	cfg := jetstream.ConsumerConfig{Durable: "billing_replay", FilterSubject: traceSubject, AckPolicy: jetstream.AckExplicitPolicy}
	if _, err := r.js.CreateConsumer(within(t), "orders", cfg); err != nil {
		t.Fatal(err)
	}
	r.addSubject(t, "orders", "billing")
	for range 2 {
		r.wake(t, "orders", "billing")
		publishStored(t, app, nil)
		eventually(t, func() bool {
			info := consumerInfo(t, app, "orders", "billing")
			return info.NumPending == 0 && info.NumAckPending == 0
		}, "the event is handled")
		if h := app.Health(t.Context()); !h.Healthy {
			t.Errorf("its health is %v", h.Err())
		}
		if err := app.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
		app = runApp(t, onServer(srv), modules...)
	}
	if got := consumerInfo(t, app, "orders", "billing_replay"); got.Config.FilterSubject != traceSubject || got.Delivered.Consumer != 0 {
		t.Errorf("the other consumer is %+v", got)
	}
	if n := len(billing.all()); n != 2 {
		t.Errorf("the handler got %d messages", n)
	}
}
