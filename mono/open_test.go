package mono_test

import (
	"context"
	"net/url"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono"
)

// openGauges are the gauges of a consumer's open dead letters.
func openGauges(t *testing.T, s scraper, stream, group string) (open, age float64, ok bool) {
	t.Helper()
	label := `messaging_nats_stream="` + stream + `"`
	for name := range s.text(t) {
		ok = ok || strings.HasPrefix(name, "mono_dead_letters_open")
	}
	return s.sumOf(t, "mono_dead_letters_open", label, `messaging_consumer_group_name="`+group+`"`),
		s.sumOf(t, "mono_dead_letters_oldest_age_seconds", label, `messaging_consumer_group_name="`+group+`"`), ok
}

// The gauges follow what is captured, resolved and discarded.
func TestOpen_gauges(t *testing.T) {
	t.Parallel()
	h, scrape := &fixable{}, newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", monotestEvent(t)), orders(t, "billing", mono.LimitsPolicy, h.handle))
	// Nothing is open, which is known and said, once somebody collects.
	eventually(t, func() bool {
		_, _, ok := openGauges(t, scrape, "DLQ", "billing")
		return ok
	}, "the gauges are there")
	if open, age, _ := openGauges(t, scrape, "DLQ", "billing"); open != 0 || age != 0 {
		t.Errorf("%v are open, the oldest for %v s; want 0 and 0", open, age)
	}
	for range 3 {
		publishStored(t, app, nil)
	}
	r := newReplayer(t, jetStream(t, app))
	all := r.await(t, 3, dlq.StateOpen)
	check := func(want float64) {
		t.Helper()
		mono.PollDeadLetters(within(t), app)
		open, age, _ := openGauges(t, scrape, "DLQ", "billing")
		if open != want || (age > 0) != (want > 0) || age > patience.Seconds() {
			t.Errorf("%v are open, the oldest for %v s; want %v", open, age, want)
		}
	}
	check(3)
	h.fixed.Store(true)
	r.claim(t, all[2], "op")
	check(3) // until it is handled
	r.open(t, "orders", "billing")
	r.send(t, r.message(all[2], "op", nil))
	eventually(t, func() bool { return r.entries(t)[2].State == dlq.StateResolved }, "it is resolved")
	check(2)
	for i, want := range []float64{1, 0} {
		if err := r.store.Change(within(t), all[i], dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil {
			t.Fatal(err)
		}
		check(want)
	}
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	if _, _, ok := openGauges(t, scrape, "DLQ", "billing"); ok {
		t.Error("they are reported after Stop")
	}
}

// An App that captures only what others give up reports it, by whatever name its
// stream has.
func TestOpen_external(t *testing.T) {
	t.Parallel()
	scrape := newScraper(t)
	cfg := dlq.Config{External: true, Stream: jetstream.StreamConfig{Name: "LOST"}}
	app := startAppWith(t, []mono.Option{scrape.option, mono.WithDeadLetters(cfg)}, emitter("shop", monotestEvent(t)))
	eventually(t, func() bool {
		_, _, ok := openGauges(t, scrape, "LOST", dlq.OpenExternal)
		return ok
	}, "the gauges are there")
	store, err := dlq.NewStore(app.Conn(), jetStream(t, app), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Capture(within(t), &dlq.Record{ID: "a", Stream: "theirs", Consumer: "python"}, nil); err != nil {
		t.Fatal(err)
	}
	mono.PollDeadLetters(within(t), app)
	if open, _, _ := openGauges(t, scrape, "LOST", dlq.OpenExternal); open != 1 {
		t.Errorf("%v are open, want 1", open)
	}
}

// A user who may not keep the count has no gauges, one warning, and everything
// else.
func TestOpen_noPermission(t *testing.T) {
	t.Parallel()
	account := server.NewAccount("APPS")
	srv, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Accounts: []*server.Account{account},
		Users: []*server.User{{Username: "guest", Password: "pw", Account: account, Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: []string{"$JS.API.STREAM.*.KV_DLQ_STATE"}},
		}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(patience) {
		t.Fatal("the server does not start")
	}
	if account, err = srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	if err := account.EnableJetStream(map[string]server.JetStreamAccountLimits{"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}}, nil); err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword("guest", "pw")
	logs, scrape := &logBuffer{}, newScraper(t)
	app := runApp(t, append(onURL(u.String()), mono.WithLogger(logs.logger()), scrape.option), emitter("shop", monotestEvent(t)),
		orders(t, "billing", mono.LimitsPolicy, func(context.Context, []*mono.Msg) error { return mono.Permanent(errBrokenPipe) }))
	publishStored(t, app, nil)
	awaitRecords(t, app, 1)
	for want := 1; want <= 3; want++ {
		mono.PollDeadLetters(within(t), app)
		if failed := mono.ForgetFailures(app); failed != want {
			t.Errorf("%d looks have failed, want %d", failed, want)
		}
	}
	mono.PollDeadLetters(within(t), app)
	mono.PollDeadLetters(within(t), app) // it has just failed
	if failed := mono.ForgetFailures(app); failed != 4 {
		t.Errorf("%d looks have failed, want 4", failed)
	}
	if n := strings.Count(logs.String(), "open dead letters cannot be counted"); n != 1 {
		t.Errorf("%d warnings, want 1:\n%s", n, logs.String())
	}
	if _, _, ok := openGauges(t, scrape, "DLQ", "billing"); ok {
		t.Error("there are gauges")
	}
}
