package mono_test

import (
	"context"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/permissions"
	"github.com/monotel/monotel/mono"
)

const permissionsPage = "../docs/permissions.md"

// A restricted is a server with a user for an App who may do what docs/permissions.md
// says, and no more, and an admin.
type restricted struct {
	t     *testing.T
	srv   *server.Server
	heard *permissions.Heard
	js    jetstream.JetStream // the admin's
	log   *logBuffer
}

func onlyThose(list *permissions.List) *server.Permissions {
	return &server.Permissions{
		Publish: &server.SubjectPermission{Allow: list.Publish()}, Subscribe: &server.SubjectPermission{Allow: list.Subscribe()},
	}
}

func newRestricted(t *testing.T, list *permissions.List) *restricted {
	t.Helper()
	r := &restricted{t: t, heard: &permissions.Heard{}, log: &logBuffer{}}
	account := server.NewAccount("APPS")
	var err error
	r.srv, err = server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Trace: true, MaxTracedMsgLen: 1,
		Accounts: []*server.Account{account},
		Users: []*server.User{
			{Username: "admin", Password: "pw", Account: account},
			{Username: "app", Password: "pw", Account: account, Permissions: onlyThose(list)},
			{Username: "settled", Password: "pw", Account: account, Permissions: onlyThose(list.Without("Create").WithInbox("_INBOX_settled"))},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.srv.SetLoggerV2(r.heard, false, true, false)
	r.srv.Start()
	t.Cleanup(func() {
		r.srv.Shutdown()
		r.srv.WaitForShutdown()
	})
	if !r.srv.ReadyForConnections(patience) {
		t.Fatal("the server does not start")
	}
	if account, err = r.srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	limits := map[string]server.JetStreamAccountLimits{"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}}
	if err := account.EnableJetStream(limits, nil); err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(r.url("admin"), nats.Name("admin"), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	r.js = jetStreamOf(t, nc)
	return r
}

func (r *restricted) url(user string) string {
	u, err := url.Parse(r.srv.ClientURL())
	if err != nil {
		r.t.Fatal(err)
	}
	u.User = url.UserPassword(user, "pw")
	return u.String()
}

// app starts an App as a user: "app", or "settled", who may make and change nothing, nor
// see the answers to others.
func (r *restricted) app(user string, opts []mono.Option, modules ...mono.Module) *mono.App {
	r.t.Helper()
	connection := []nats.Option{nats.Name(user), nats.Timeout(patience)}
	if user == "settled" {
		connection = append(connection, nats.CustomInboxPrefix("_INBOX_settled"))
	}
	return runApp(r.t, append([]mono.Option{
		mono.WithNATS(r.url(user), connection...), mono.WithLogger(r.log.logger()), mono.WithName("shop"),
	}, opts...), modules...)
}

// check fails the test if an App was refused anything, or one of the lists of the page
// has an entry that nothing was allowed by.
func (r *restricted) check(lists ...string) {
	t := r.t
	t.Helper()
	eventually(t, func() bool { // the server has read what it was sent
		conns, err := r.srv.Connz(nil)
		return err == nil && conns.NumConns == 1
	}, "only the admin is connected")
	for _, refused := range r.heard.Refused() {
		t.Errorf("the lists lack something: %s", refused)
	}
	for _, name := range lists {
		for _, e := range permissionsOf(t, name).Unused(r.heard.By("app", "settled")) {
			t.Errorf("the App does not need %q of section %s", e.Subject, e.Section)
		}
	}
	if t.Failed() {
		t.Log(r.log)
	}
}

func permissionsOf(t *testing.T, names ...string) *permissions.List {
	t.Helper()
	lists, err := permissions.Read(permissionsPage)
	if err != nil {
		t.Fatal(err)
	}
	all := &permissions.List{}
	for _, name := range names {
		if lists[name] == nil {
			t.Fatalf("%s has no list %q", permissionsPage, name)
		}
		all.Entries = append(all.Entries, lists[name].Entries...)
	}
	return all
}

// A clerk handles orders by how they begin.
type clerk struct {
	fixed   atomic.Bool
	core    atomic.Int64
	began   chan struct{} // a handler waits
	release chan struct{}
}

func newClerk() *clerk {
	return &clerk{began: make(chan struct{}, 100), release: make(chan struct{})}
}

func (c *clerk) handle(_ context.Context, msgs []*mono.Msg) error {
	m := msgs[0]
	switch string(m.Data[:min(len(m.Data), 4)]) {
	case "once":
		if m.Metadata().NumDelivered == 1 {
			return errBrokenPipe
		}
	case "fail":
		if !c.fixed.Load() {
			return mono.Permanent(errBrokenPipe)
		}
	case "wait":
		c.began <- struct{}{}
		<-c.release
	}
	return nil
}

func (c *clerk) modules(t *testing.T, stream mono.StreamConfig) []mono.Module {
	t.Helper()
	return []mono.Module{
		emitter("shop", monotestEvent(t)),
		ordersWith(t, mono.StreamConsumerConfig{
			Stream: stream, Consumer: mono.ConsumerConfig{Durable: "billing"}, Fetch: mono.FetchConfig{BatchSize: 1},
			Retry: mono.RetryPolicy{MaxAttempts: 2, Backoff: []time.Duration{time.Millisecond}},
		}, c.handle),
		consumer("mail", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(monotestEvent(t), func(context.Context, *mono.Msg) error {
				c.core.Add(1)
				return nil
			}, self)
		}),
	}
}

// TestPermissions_app has an App do all that the list is for. It makes its streams and
// consumers, and changes them; messages are retried, given up, held, handed back and
// replayed. Then the same is done by an App that may make and change nothing.
func TestPermissions_app(t *testing.T) {
	t.Parallel()
	r := newRestricted(t, permissionsOf(t, "app"))
	mustStop(t, r.app("app", nil, newClerk().modules(t, mono.StreamConfig{Name: "ORDERS"})...))
	r.wear()
	r.tamper()
	r.work("app", "op1")
	r.check("app")

	r.wear()
	r.work("settled", "op2")
	r.check()
}

// wear has a message delivered so often that its attempts are used up.
func (r *restricted) wear() {
	t := r.t
	t.Helper()
	if _, err := r.js.Publish(within(t), traceSubject, []byte("worn")); err != nil {
		t.Fatal(err)
	}
	c, err := r.js.Consumer(within(t), "ORDERS", "billing")
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		m, err := c.Next(jetstream.FetchMaxWait(patience))
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Nak(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.js.Conn().FlushWithContext(within(t)); err != nil {
		t.Fatal(err)
	}
}

// tamper has somebody change what the App has made, and begin to replay to it.
func (r *restricted) tamper() {
	t := r.t
	t.Helper()
	cfg := mustStream(t, r.js, "ORDERS").CachedInfo().Config
	cfg.Subjects = []string{"legacy", dlq.ReplaySubjects("ORDERS", "billing")}
	r.update(cfg)
	cfg = mustStream(t, r.js, "DLQ").CachedInfo().Config
	cfg.AllowDirect = false
	r.update(cfg)
}

func (r *restricted) update(cfg jetstream.StreamConfig) {
	r.t.Helper()
	if _, err := r.js.UpdateStream(within(r.t), cfg); err != nil {
		r.t.Fatal(err)
	}
}

// work runs an App from its start to its stop.
func (r *restricted) work(user, operation string) {
	t := r.t
	t.Helper()
	desk, c := newReplayer(t, r.js), newClerk()
	app := r.app(user, []mono.Option{newScraper(t).option}, c.modules(t, mono.StreamConfig{Name: "ORDERS"})...)
	before := len(desk.entries(t))
	dead := func(n int, what string) {
		t.Helper()
		eventually(t, func() bool { return len(desk.entries(t)) == before+n }, what)
	}
	publish := func(payloads ...string) {
		t.Helper()
		publishAll(t, app.Bus(), monotestEvent(t), payloads)
	}
	settled(t, app, "ORDERS", "billing")
	large := strings.Repeat("x", 1<<20-200)
	publish("good", "once", "fail", "fail"+large)
	dead(2, "two are given up")
	mono.PollDeadLetters(within(t), app)

	full := mustStream(t, r.js, "DLQ").CachedInfo()
	cfg := full.Config
	cfg.MaxMsgs = int64(full.State.Msgs)
	r.update(cfg)
	was := strings.Count(r.log.String(), "the message is held")
	publish("fail again" + large)
	eventually(t, func() bool { return strings.Count(r.log.String(), "the message is held") > was }, "one is held")
	cfg.MaxMsgs = -1
	r.update(cfg)
	dead(3, "what was held is given up")

	c.fixed.Store(true)
	entry := desk.entries(t)[before]
	desk.replay(t, entry, operation)
	eventually(t, func() bool { return desk.entries(t)[before].State == dlq.StateResolved }, "it is resolved")
	mono.PollDeadLetters(within(t), app)
	if err := mono.Sweep(within(t), app); err != nil {
		t.Error(err)
	}
	if c.core.Load() == 0 {
		t.Error("nothing has come over core NATS")
	}

	publish(payloads("quick", 0, 100)...) // so that many are asked for in advance
	settled(t, app, "ORDERS", "billing")
	publish("wait")
	receive(t, c.began, "a handler runs")
	publish(payloads("wait", 0, 20)...)
	cons, err := r.js.Consumer(within(t), "ORDERS", "billing")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		info, err := cons.Info(within(t))
		return err == nil && info.NumAckPending > 10
	}, "others wait")
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(within(t)) }()
	m, err := cons.Next(jetstream.FetchMaxWait(patience)) // that is handed back
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Nak(); err != nil {
		t.Fatal(err)
	}
	close(c.release)
	if err := receive(t, stopped, "Stop returns"); err != nil {
		t.Fatal(err)
	}
	stream := mustStream(t, r.js, "ORDERS")
	if err := stream.Purge(within(t), jetstream.WithPurgeSubject(traceSubject)); err != nil {
		t.Fatal(err)
	}
}

// TestPermissions_appFanOut has an App with an event that two streams store.
func TestPermissions_appFanOut(t *testing.T) {
	t.Parallel()
	list := permissionsOf(t, "app", "app-fanout")
	list.Repeat("ORDERS", "AUDIT", "billing", "audit")
	r := newRestricted(t, list)
	for _, user := range []string{"app", "settled"} {
		c := newClerk()
		modules := append(c.modules(t, mono.StreamConfig{Name: "ORDERS", Retention: mono.WorkQueuePolicy}),
			ordersWith(t, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "AUDIT", Retention: mono.WorkQueuePolicy}, Consumer: mono.ConsumerConfig{Durable: "audit"},
			}, c.handle))
		app := r.app(user, nil, modules...)
		for n, text := range []string{"a", "b"} {
			publishAll(t, app.Bus(), monotestEvent(t), payloads(user+text, 0, 10))
			for _, of := range [][2]string{{"ORDERS", "billing"}, {"AUDIT", "audit"}} {
				settled(t, app, of[0], of[1])
				want := 10 * (n + 1)
				if user == "settled" {
					want += 20
				}
				eventually(t, func() bool {
					have, err := mono.NotedAsFinished(within(t), r.js, of[0], of[1])
					return err == nil && have == want
				}, "it is noted what is finished")
			}
		}
		if err := mono.Sweep(within(t), app); err != nil {
			t.Error(err)
		}
		mustStop(t, app)
	}
	r.check("app-fanout")
}

// TestPermissions_appExternal has an App, and a bridge with less patience, capture what
// consumers of plain clients give up.
func TestPermissions_appExternal(t *testing.T) {
	t.Parallel()
	r := newRestricted(t, permissionsOf(t, "app", "app-external"))
	messages := make(map[string]jetstream.Consumer)
	for stream, retention := range map[string]jetstream.RetentionPolicy{"WORK": jetstream.WorkQueuePolicy, "LOG": jetstream.InterestPolicy} {
		subject := strings.ToLower(stream)
		s, err := r.js.CreateStream(within(t), jetstream.StreamConfig{Name: stream, Subjects: []string{subject}, Retention: retention})
		if err != nil {
			t.Fatal(err)
		}
		messages[subject], err = s.CreateConsumer(within(t), jetstream.ConsumerConfig{Durable: "plain", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 1})
		if err != nil {
			t.Fatal(err)
		}
	}
	next := func(subject string) jetstream.Msg {
		t.Helper()
		if _, err := r.js.Publish(within(t), subject, []byte("{}")); err != nil {
			t.Fatal(err)
		}
		m, err := messages[subject].Next(jetstream.FetchMaxWait(patience))
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	desk := newReplayer(t, r.js)

	app := r.app("app", []mono.Option{mono.WithDeadLetters(dlq.Config{External: true})})
	for subject := range messages {
		if err := next(subject).TermWithReason("of no use"); err != nil {
			t.Fatal(err)
		}
	}
	desk.await(t, 2, dlq.StateOpen)
	mustStop(t, app)

	nc, err := nats.Connect(r.url("app"), nats.Name("app"), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	store, err := dlq.NewStore(nc, jetStreamOf(t, nc), dlq.Config{External: true})
	if err != nil {
		t.Fatal(err)
	}
	bridge, err := dlq.NewBridge(store, dlq.BridgeConfig{Grace: time.Millisecond, Log: r.log.logger()})
	if err != nil {
		t.Fatal(err)
	}
	if err := bridge.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	for subject, cons := range messages {
		if err := next(subject).Nak(); err != nil {
			t.Fatal(err)
		}
		if _, err := cons.Fetch(1, jetstream.FetchMaxWait(time.Millisecond)); err != nil { // this is when the server finds out
			t.Fatal(err)
		}
	}
	desk.await(t, 4, dlq.StateOpen)
	eventually(t, func() bool {
		return mustStream(t, r.js, "WORK").CachedInfo().State.Msgs == 0 && mustStream(t, r.js, "LOG").CachedInfo().State.Msgs == 0
	}, "the messages are settled")
	eventually(t, func() bool {
		c, err := r.js.Consumer(within(t), "MONOTEL_ADVISORIES", "bridge_DLQ")
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, "the advisories are settled")
	if err := bridge.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	nc.Close()
	r.check("app-external")
}
