package triage_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/mono/monotest"
)

const (
	ordersStream   = "orders"
	ordersSubject  = "orders.created.v1"
	billing        = "billing"
	reports        = "reports"
	longestWait    = 3 * time.Minute
	traceOfFailure = "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"
	traceOfPublish = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
)

// A bundle is what a test needs: a server of its own with a stream and two
// consumers, a dead-letter stream, and a desk.
type bundle struct {
	server *monotest.TestServer
	nc     *nats.Conn
	js     jetstream.JetStream
	store  *dlq.Store
	desk   *triage.Desk
	begin  time.Time
	next   uint64
}

func setup(t testing.TB) *bundle {
	t.Helper()
	return setupWith(t, dlq.Config{}, jetstream.StreamConfig{})
}

func setupWith(t testing.TB, cfg dlq.Config, orders jetstream.StreamConfig) *bundle {
	t.Helper()
	b := &bundle{server: monotest.Server(t), begin: time.Now().Add(-time.Hour).UTC().Truncate(time.Second)}
	b.nc = b.server.Conn(nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	js, err := jetstream.New(b.nc, jetstream.WithDefaultTimeout(longestWait))
	must(t, err)
	b.js = js
	b.store, err = dlq.NewStore(b.nc, b.js, cfg)
	must(t, err)
	must(t, b.store.Provision(within(t)))
	orders.Name, orders.Subjects = ordersStream, []string{ordersSubject}
	_, err = b.js.CreateStream(within(t), orders)
	must(t, err)
	names := []string{billing, reports}
	if orders.Retention == jetstream.WorkQueuePolicy {
		names = names[:1]
	}
	for _, name := range names {
		_, err = b.js.CreateConsumer(within(t), ordersStream, jetstream.ConsumerConfig{
			Durable: name, FilterSubject: ordersSubject, AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: 20_000,
		})
		must(t, err)
	}
	b.desk = b.open(t, triage.Config{Stream: cfg.StreamName(), Actor: "ann@ops"})
	return b
}

func (b *bundle) open(t testing.TB, cfg triage.Config) *triage.Desk {
	t.Helper()
	d, err := triage.Open(within(t), b.nc, cfg)
	must(t, err)
	return d
}

// record makes the next record: of consumer billing, with JSON as its payload.
func (b *bundle) record(change ...func(*dlq.Record)) *dlq.Record {
	b.next++
	n := b.next
	r := &dlq.Record{
		Reason: dlq.ReasonAttemptsExhausted, Subject: ordersSubject,
		Header: nats.Header{"Tenant": {"blue"}, "Nats-Msg-Id": {fmt.Sprint("order-", n)}, "traceparent": {traceOfPublish}},
		Data:   fmt.Appendf(nil, `{"order":%d,"amount":%d.5}`, n, n), Event: "orders/created/v1", Stream: ordersStream,
		StreamCreated: b.begin, StreamSequence: n, Consumer: billing, Deliveries: 5,
		Stored: b.begin.Add(time.Duration(n) * time.Second), Failed: b.begin.Add(time.Duration(n)*time.Second + time.Minute),
		Error: fmt.Sprintf("charge order %d: connection refused", n), ErrorType: "net.OpError", ErrorTypes: []string{"*net.OpError"},
		Traceparent: traceOfFailure, OriginTraceparent: traceOfPublish, App: "shop", Module: "billing",
	}
	for _, f := range change {
		f(r)
	}
	r.ID = dlq.ID(r.Stream, r.StreamCreated, r.Consumer, r.StreamSequence)
	return r
}

// capture stores n dead letters and returns their IDs, oldest first.
func (b *bundle) capture(t testing.TB, n int, change ...func(*dlq.Record)) []string {
	t.Helper()
	ids := make([]string, n)
	for i := range n {
		r := b.record(change...)
		ids[i] = r.ID
		captured, err := b.store.Capture(within(t), r, nil)
		must(t, err)
		if !captured {
			t.Fatalf("dead letter %s was captured before", r.ID)
		}
	}
	return ids
}

func (b *bundle) get(t testing.TB, id string) *dlq.Entry {
	t.Helper()
	e, err := b.desk.Get(within(t), id)
	must(t, err)
	return e
}

func (b *bundle) wantState(t testing.TB, id string, want dlq.State) {
	t.Helper()
	if got := b.get(t, id).State; got != want {
		t.Errorf("dead letter %s is %s, want %s", id, got, want)
	}
}

func (b *bundle) list(t testing.TB, sel triage.Selection) []string {
	t.Helper()
	var ids []string
	for e, err := range b.desk.Entries(within(t), sel, false) {
		must(t, err)
		ids = append(ids, e.ID)
	}
	return ids
}

// A target handles what is replayed to a consumer, as an App would: the outcome is
// stored before the message is settled.
type target struct {
	mu      sync.Mutex
	handled map[string]int // by ID
	order   []string
	seen    []jetstream.Msg
	stop    func()
}

// consume begins to handle what consumer billing gets, as an App does: from its own
// durable and from the one for its replays. fails says what fails.
func (b *bundle) consume(t testing.TB, durable string, fails func(id string) bool) *target {
	t.Helper()
	s, err := b.js.Stream(within(t), ordersStream)
	must(t, err)
	main, err := s.Consumer(within(t), durable)
	must(t, err)
	_, err = dlq.EnsureReplayConsumer(within(t), s, main.CachedInfo().Config)
	must(t, err)
	tg := &target{handled: make(map[string]int)}
	if fails == nil {
		fails = func(string) bool { return false }
	}
	work := make(chan jetstream.Msg)
	var workers sync.WaitGroup
	const most = 16
	for range most {
		workers.Go(func() {
			for m := range work {
				b.handle(t, tg, durable, m, fails)
			}
		})
	}
	var all []jetstream.ConsumeContext
	for _, name := range []string{durable, dlq.ReplayConsumer(durable)} {
		cons, err := s.Consumer(t.Context(), name)
		must(t, err)
		cc, err := cons.Consume(func(m jetstream.Msg) { work <- m })
		must(t, err)
		all = append(all, cc)
	}
	tg.stop = sync.OnceFunc(func() {
		for _, cc := range all {
			cc.Stop()
			<-cc.Closed()
		}
		close(work)
		workers.Wait()
	})
	t.Cleanup(tg.stop)
	return tg
}

// handle handles one message.
func (b *bundle) handle(t testing.TB, tg *target, durable string, m jetstream.Msg, fails func(id string) bool) {
	t.Helper()
	replay, ok := dlq.ParseReplay(ordersStream, durable, m.Subject(), m.Headers())
	if !ok {
		_ = m.Ack()
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), longestWait)
	defer cancel()
	if meta, err := m.Metadata(); err == nil && meta.NumDelivered > 1 {
		if was, err := b.store.Settled(ctx, replay); err != nil || was != "" {
			_ = m.Ack()
			return
		}
	}
	tg.mu.Lock()
	tg.handled[replay.ID]++
	tg.order = append(tg.order, replay.ID)
	tg.seen = append(tg.seen, m)
	tg.mu.Unlock()
	var failure *dlq.Record
	if fails(replay.ID) {
		failure = &dlq.Record{
			Reason: dlq.ReasonPermanentError, Error: "still broken", ErrorType: "shop.Broken", Failed: time.Now(), Traceparent: traceOfFailure,
		}
	}
	if _, err := b.store.Outcome(ctx, replay, "shop", failure, nil); err != nil {
		t.Errorf("outcome of %s: %v", replay.ID, err)
	}
	_ = m.Ack()
}

func (tg *target) total() (messages, most int) {
	tg.mu.Lock()
	defer tg.mu.Unlock()
	for _, n := range tg.handled {
		messages += n
		most = max(most, n)
	}
	return messages, most
}

// plan plans a replay that can be run.
func (b *bundle) plan(t testing.TB, sel triage.Selection, o triage.Options) *triage.Plan {
	t.Helper()
	p, err := b.desk.Plan(within(t), sel, o)
	must(t, err)
	if len(p.Problems) > 0 {
		t.Fatalf("the plan has problems: %v", p.Problems)
	}
	return p
}

func (b *bundle) run(t testing.TB, id string) *triage.Operation {
	t.Helper()
	op, err := b.desk.Run(within(t), id, nil)
	must(t, err)
	return op
}

func within(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), longestWait)
	t.Cleanup(cancel)
	return ctx
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func newestFirst(ids []string) []string {
	ids = slices.Clone(ids)
	slices.Reverse(ids)
	return ids
}
