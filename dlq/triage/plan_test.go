package triage_test

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// A plan is what it says, and nothing happens by it.
func TestPlan(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 7)
	gone := b.capture(t, 1, func(r *dlq.Record) { r.Body, r.Data = dlq.BodyGone, nil })
	foreign := b.capture(t, 1, func(r *dlq.Record) { r.Event, r.Consumer = "", "legacy" })
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 2})
	if p.Selected != 7 || p.Duration.Seconds() != 3.5 || p.Bytes == 0 || len(p.Samples) != 5 || len(p.Consumers) != 1 || p.Consumers[0].Count != 7 {
		t.Errorf("the plan is %+v", p)
	}
	if len(p.LeftOut) != 2 {
		t.Errorf("left out are %v", p.LeftOut)
	}
	for _, s := range p.Samples {
		if len(s.Data) > 0 {
			t.Error("a sample has a payload")
		}
	}
	if !slices.ContainsFunc(p.Warnings, func(w string) bool { return strings.Contains(w, "nobody fetches") }) {
		t.Errorf("it warns of %q, want that nobody fetches", p.Warnings)
	}
	for _, id := range slices.Concat(ids, gone, foreign) {
		if e := b.get(t, id); e.State != dlq.StateOpen || len(e.History) > 0 {
			t.Errorf("after the plan dead letter %s is %+v", id, e)
		}
	}
	if _, err := b.js.Stream(within(t), ordersStream); err != nil {
		t.Error(err)
	}
	s, err := b.js.Stream(within(t), ordersStream)
	must(t, err)
	if subjects := s.CachedInfo().Config.Subjects; !slices.Equal(subjects, []string{ordersSubject}) {
		t.Errorf("after the plan the stream has subjects %v", subjects)
	}
}

// What is run is what was planned: what comes later is not part of it.
func TestPlan_frozen(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 3)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	later := b.capture(t, 2)
	must(t, b.desk.Archive(within(t), b.get(t, ids[0]), ""))
	must(t, b.desk.Discard(within(t), b.get(t, ids[1]), ""))
	b.consume(t, billing, nil)
	op := b.run(t, p.ID)
	if op.Claimed != 1 || op.Resolved != 1 || op.NewSince != 2 || op.Skipped["archived meanwhile by ann@ops"] != 1 || op.Skipped["discarded meanwhile"] != 1 || op.Remaining != 0 {
		t.Errorf("operation %+v", op)
	}
	for _, id := range later {
		b.wantState(t, id, dlq.StateOpen)
	}
}

// A target that is gone is a problem, and nothing is changed.
func TestPlan_problems(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1, func(r *dlq.Record) { r.Consumer = "gone" })[0]
	other := b.capture(t, 1, func(r *dlq.Record) { r.Stream = "nowhere" })[0]
	notJSON := b.capture(t, 1, func(r *dlq.Record) { r.Data = []byte("not JSON") })[0]
	for name, tt := range map[string]struct {
		sel triage.Selection
		o   triage.Options
	}{
		"no consumer":        {triage.Selection{IDs: []string{id}}, triage.Options{}},
		"no stream":          {triage.Selection{IDs: []string{other}}, triage.Options{}},
		"nobody stores it":   {triage.Selection{IDs: []string{id}}, triage.Options{Target: "subject=nobody.stores.it"}},
		"patch of no object": {triage.Selection{IDs: []string{notJSON}}, triage.Options{Patch: []byte(`{"a":1}`)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := b.desk.Plan(within(t), tt.sel, tt.o)
			must(t, err)
			if len(p.Problems) != 1 {
				t.Errorf("the problems are %q", p.Problems)
			}
			if _, err := b.desk.Run(within(t), p.ID, nil); err == nil {
				t.Error("it was run")
			}
			for _, id := range tt.sel.IDs {
				b.wantState(t, id, dlq.StateOpen)
			}
		})
	}
}

func TestPlan_badOptions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	for name, o := range map[string]triage.Options{
		"target":          {Target: "nobody"},
		"subject":         {Target: "subject=a.*"},
		"no subject":      {Target: "subject="},
		"rate":            {Rate: -1},
		"rate NaN":        {Rate: math.NaN()},
		"in flight":       {MaxInFlight: -1},
		"canary":          {Canary: []int{1, 0}},
		"canary everyone": {Canary: []int{1}, Target: triage.TargetEveryone},
		"stop":            {StopIfFailing: 1.5},
		"stop NaN":        {StopIfFailing: math.NaN()},
		"patch":           {Patch: []byte(`{"a":`)},
		"patch array":     {Patch: []byte(`[1]`)},
		"replays":         {MaxReplays: -1},
	} {
		if _, err := b.desk.Plan(within(t), triage.Selection{}, o); !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	all, err := b.desk.Operations(within(t))
	must(t, err)
	if len(all) != 0 {
		t.Errorf("there are %d operations", len(all))
	}
}

// Whoever else gets what is replayed is named, and gets it indeed.
func TestPlan_bystanders(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	for name, filters := range map[string][]string{
		"audit": nil, "copies": {">"}, "monotels": {ordersSubject, "monotel.>"}, "exact": {dlq.ReplaySubjects(ordersStream, billing)},
		"narrow": {ordersSubject}, "foreign": {dlq.ReplaySubjects(ordersStream, reports)},
	} {
		b.consumer(t, ordersStream, name, filters...)
	}
	p := b.plan(t, triage.Selection{}, triage.Options{NoWait: true})
	const too = `so it gets the replayed messages, too: give it the subjects that it is for as its filters`
	want := []string{
		`consumer "audit" of stream "orders" has no filter, ` + too,
		`consumer "copies" of stream "orders" has filter ">", ` + too,
		`consumer "exact" of stream "orders" has filter "monotel.replays.orders.billing.>", ` + too,
		`consumer "monotels" of stream "orders" has filter "monotel.>", ` + too,
	}
	if got := aboutOthers(p); !slices.Equal(got, want) {
		t.Errorf("it warns of\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	b.run(t, p.ID)
	for name, want := range map[string]uint64{"audit": 1, "copies": 1, "monotels": 1, "exact": 1, "narrow": 0, "foreign": 0, reports: 0, billing: 0, "billing_replay": 1} {
		c, err := b.js.Consumer(within(t), ordersStream, name)
		must(t, err)
		if got := c.CachedInfo().NumPending; got != want {
			t.Errorf("consumer %q gets %d of it, want %d", name, got, want)
		}
	}
}

// A target is a bystander of another one, and all who get it are counted, however
// many consumers there are.
func TestPlan_bystandersOfMany(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	b.capture(t, 1, func(r *dlq.Record) { r.Consumer = "zz" })
	const narrow = 300 // more than a page
	for i := range narrow {
		b.consumer(t, ordersStream, fmt.Sprint("narrow-", i), ordersSubject)
	}
	b.consumer(t, ordersStream, "zz")
	p := b.plan(t, triage.Selection{}, triage.Options{})
	if got := aboutOthers(p); len(got) != 1 || !strings.HasPrefix(got[0], `consumer "zz" of stream "orders" has no filter`) {
		t.Errorf("it warns of %q", got)
	}
	for i := range 6 {
		b.consumer(t, ordersStream, fmt.Sprint("wide-", i))
	}
	p = b.plan(t, triage.Selection{}, triage.Options{})
	if got := aboutOthers(p); len(got) != 6 || got[5] != `2 more consumers of stream "orders" get the replayed messages, too` {
		t.Errorf("it warns of %q", got)
	}
	p = b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone})
	if got := aboutOthers(p); len(got) != 0 {
		t.Errorf("replayed to everyone, it warns of %q", got)
	}
}

// Streams that copy all of the target's are named, if somebody consumes them.
func TestPlan_copies(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	from := func(filter string) *jetstream.StreamSource {
		return &jetstream.StreamSource{Name: ordersStream, FilterSubject: filter}
	}
	for _, c := range []jetstream.StreamConfig{
		{Name: "backup", Mirror: from("")},
		{Name: "mirrored", Mirror: from("")},
		{Name: "sourced", Sources: []*jetstream.StreamSource{from("")}},
		{Name: "narrow", Sources: []*jetstream.StreamSource{from(ordersSubject)}},
		{Name: "transformed", Sources: []*jetstream.StreamSource{{
			Name: ordersStream, SubjectTransforms: []jetstream.SubjectTransformConfig{{Source: ordersSubject, Destination: "copied"}},
		}}},
		{Name: "foreign", Subjects: []string{"foreign"}},
	} {
		_, err := b.js.CreateStream(within(t), c)
		must(t, err)
		if c.Name != "backup" {
			b.consumer(t, c.Name, "reader")
		}
	}
	p := b.plan(t, triage.Selection{}, triage.Options{})
	got := aboutOthers(p)
	if len(got) != 2 || !strings.HasPrefix(got[0], `stream "mirrored" copies what stream "orders" has`) || !strings.HasPrefix(got[1], `stream "sourced" `) {
		t.Errorf("it warns of %q", got)
	}
}

// Who may not list consumers and streams can plan, and learns what is not known.
func TestPlan_bystandersUnknown(t *testing.T) {
	t.Parallel()
	b := setupGuest(t, "$JS.API.CONSUMER.LIST.>", "$JS.API.STREAM.LIST")
	p := b.plan(t, triage.Selection{}, triage.Options{})
	got := aboutOthers(p)
	if len(got) != 2 || !strings.HasSuffix(got[0], "no permission to publish to $JS.API.CONSUMER.LIST.orders") ||
		!strings.HasSuffix(got[1], "no permission to publish to $JS.API.STREAM.LIST") {
		t.Errorf("it warns of %q", got)
	}
}

// Who may not read the messages of a stream can plan, and learns that nothing is
// compared.
func TestPlan_cannotCompare(t *testing.T) {
	t.Parallel()
	b := setupGuest(t, "$JS.API.STREAM.MSG.GET.orders")
	p := b.plan(t, triage.Selection{}, triage.Options{})
	if n := len(slices.DeleteFunc(p.Warnings, func(w string) bool { return !strings.Contains(w, "cannot be compared") })); n != 1 {
		t.Errorf("it warns %d times of what cannot be compared, want once", n)
	}
}

// setupGuest starts a server with a few dead letters, whose desk is that of a user who
// may not publish to what is denied.
func setupGuest(t *testing.T, deny ...string) *bundle {
	t.Helper()
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, JetStream: true, StoreDir: t.TempDir(), NoLog: true, NoSigs: true,
		Users: []*server.User{{Username: "admin", Password: "pw"}, {Username: "guest", Password: "pw", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: deny},
		}}},
	})
	must(t, err)
	s.Start()
	t.Cleanup(s.WaitForShutdown)
	t.Cleanup(s.Shutdown)
	if !s.ReadyForConnections(longestWait) {
		t.Fatal("the server has not started")
	}
	connect := func(name string) *nats.Conn {
		nc, err := nats.Connect(s.ClientURL(), nats.UserInfo(name, "pw"), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
		must(t, err)
		t.Cleanup(nc.Close)
		return nc
	}
	b := &bundle{nc: connect("admin")}
	b.js, err = jetstream.New(b.nc, jetstream.WithDefaultTimeout(longestWait))
	must(t, err)
	b.store, err = dlq.NewStore(b.nc, b.js, dlq.Config{})
	must(t, err)
	must(t, b.store.Provision(within(t)))
	orders, err := b.js.CreateStream(within(t), jetstream.StreamConfig{Name: ordersStream, Subjects: []string{ordersSubject}})
	must(t, err)
	b.begin = orders.CachedInfo().Created
	b.consumer(t, ordersStream, billing, ordersSubject)
	b.capture(t, 12)
	b.nc = connect("guest")
	b.desk = b.open(t, triage.Config{})
	return b
}

// consumer makes one.
func (b *bundle) consumer(t testing.TB, stream, name string, filters ...string) {
	t.Helper()
	_, err := b.js.CreateConsumer(within(t), stream, jetstream.ConsumerConfig{
		Durable: name, FilterSubjects: filters, AckPolicy: jetstream.AckExplicitPolicy,
	})
	must(t, err)
}

// aboutOthers are the warnings that are not of the consumers that are to get the
// messages.
func aboutOthers(p *triage.Plan) []string {
	var found []string
	for _, w := range p.Warnings {
		if strings.Contains(w, "replayed messages") {
			found = append(found, w)
		}
	}
	return found
}

// A patch changes each payload, and is kept as an edit.
func TestPlan_patch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 20)
	billed := b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{Patch: []byte(`{"amount":0,"fixed":true}`), Reason: "currency"})
	if len(p.Diffs) != 5 || !strings.Contains(p.Diffs[0].After, `"fixed": true`) {
		t.Errorf("the diffs are %+v", p.Diffs)
	}
	op := b.run(t, p.ID)
	if op.Resolved != 20 {
		t.Errorf("operation %+v", op)
	}
	for _, m := range billed.seen {
		if !strings.Contains(string(m.Data()), `"amount":0,"fixed":true`) {
			t.Errorf("replayed is %s", m.Data())
		}
	}
	e := b.get(t, ids[0])
	if e.Revision != 1 || e.History[0].Reason != "currency" || string(e.History[0].Diff) != `{"amount":0,"fixed":true}` {
		t.Errorf("the entry is %+v, its edit %+v", e, e.History[0])
	}
}

// What was replayed too often is left out, unless it is forced.
func TestPlan_loops(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	b.consume(t, billing, func(string) bool { return true })
	for range 2 {
		b.run(t, b.plan(t, triage.Selection{}, triage.Options{MaxReplays: 2}).ID)
	}
	p, err := b.desk.Plan(within(t), triage.Selection{}, triage.Options{MaxReplays: 2})
	must(t, err)
	if p.Selected != 0 || len(p.LeftOut) != 1 {
		t.Errorf("selected are %d, left out %v", p.Selected, p.LeftOut)
	}
	if p := b.plan(t, triage.Selection{}, triage.Options{MaxReplays: 2, Force: true}); p.Selected != 1 {
		t.Errorf("forced, %d are selected", p.Selected)
	}
}

// An operation is cancelled although its process died in the middle of an entry:
// what it had claimed and not sent is open again.
func TestCancel_afterACrash(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy})
	ids := b.capture(t, 2)
	p := b.plan(t, triage.Selection{IDs: ids[:1]}, triage.Options{NoWait: true})
	must(t, b.desk.Cancel(t.Context(), p.ID)) // a plan, too
	p = b.plan(t, triage.Selection{}, triage.Options{NoWait: true})
	e := b.get(t, ids[0])
	must(t, b.store.Change(within(t), e, dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@ops", Operation: p.ID, Target: triage.TargetConsumer}, nil))
	triage.MarkStarted(t, b.desk, p.ID)
	must(t, b.desk.Cancel(t.Context(), p.ID))
	b.wantState(t, ids[0], dlq.StateOpen)
	op, err := b.desk.Operation(within(t), p.ID)
	must(t, err)
	if op.Status != triage.StatusCancelled || op.Claimed != 1 || op.Released != 1 || op.Remaining != 2 {
		t.Errorf("operation %+v", op)
	}
}

// The first update of a consumer after a restart of its server is answered with what
// the consumer was before. Its replays come all the same.
func TestRun_restartedServer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 3
	b.capture(t, n)
	b.server.Stop()
	b.server.Start()
	b.nc = b.server.Conn()
	var err error
	b.js, err = jetstream.New(b.nc, jetstream.WithDefaultTimeout(longestWait))
	must(t, err)
	b.store, err = dlq.NewStore(b.nc, b.js, dlq.Config{})
	must(t, err)
	b.desk = b.open(t, triage.Config{Actor: "ann@ops"})
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	if op := b.run(t, p.ID); op.Resolved != n {
		t.Errorf("operation %+v", op)
	}
}
