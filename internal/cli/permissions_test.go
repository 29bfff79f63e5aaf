package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/permissions"
)

const (
	permissionsPage = "../../docs/permissions.md"
	pageEvent       = "events.shop.v1.order-placed" // that the page has
)

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

// A restricted is a server with users who may do what lists of docs/permissions.md say,
// and no more. Its bundle is the admin's.
type restricted struct {
	*bundle
	srv   *server.Server
	heard *permissions.Heard
	to    *target
}

func setupRestricted(t *testing.T, users map[string]*permissions.List) *restricted {
	t.Helper()
	r := &restricted{bundle: bare(t), heard: &permissions.Heard{}}
	account := server.NewAccount("APPS")
	opts := &server.Options{
		Host: "127.0.0.1", Port: -1, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Trace: true, MaxTracedMsgLen: 1,
		Accounts: []*server.Account{account}, Users: []*server.User{{Username: "admin", Password: "pw", Account: account}},
	}
	only := func(subjects []string) *server.SubjectPermission {
		if len(subjects) == 0 { // which would be taken for everything
			return &server.SubjectPermission{Deny: []string{">"}}
		}
		return &server.SubjectPermission{Allow: subjects}
	}
	for name, list := range users {
		opts.Users = append(opts.Users, &server.User{Username: name, Password: "pw", Account: account, Permissions: &server.Permissions{
			Publish: only(list.Publish()), Subscribe: only(list.Subscribe()),
		}})
	}
	var err error
	if r.srv, err = server.NewServer(opts); err != nil {
		t.Fatal(err)
	}
	r.srv.SetLoggerV2(r.heard, false, true, false)
	r.env["NATS_URL"] = started(t, r.srv, "admin")
	if account, err = r.srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	limits := map[string]server.JetStreamAccountLimits{"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}}
	if err := account.EnableJetStream(limits, nil); err != nil {
		t.Fatal(err)
	}
	r.nc, err = nats.Connect(r.env["NATS_URL"], nats.Name("admin"), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.nc.Close)
	r.js, r.store = openStore(t, r.nc)
	r.to = r.billing(nil)
	cfg := r.stream("ORDERS").CachedInfo().Config
	cfg.Subjects = append(cfg.Subjects, pageEvent)
	if _, err := r.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	return r
}

// as is the world of another user.
func (r *restricted) as(user string) *bundle {
	r.t.Helper()
	b := bare(r.t)
	b.env["NATS_URL"] = withUser(r.srv.ClientURL(), user, "pw")
	return b
}

func (r *restricted) stream(name string) jetstream.Stream {
	r.t.Helper()
	s, err := r.js.Stream(r.t.Context(), name)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// handle has what is replayed to consumer billing handled.
func (r *restricted) handle() {
	r.t.Helper()
	s := r.stream("ORDERS")
	if _, err := dlq.EnsureReplayConsumer(r.t.Context(), s, r.to.cons.CachedInfo().Config); err != nil {
		r.t.Fatal(err)
	}
	cons, err := s.Consumer(r.t.Context(), dlq.ReplayConsumer("billing"))
	if err != nil {
		r.t.Fatal(err)
	}
	r.to.fail = never
	handling, err := cons.Consume(r.to.handle)
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		handling.Stop()
		<-handling.Closed()
	})
}

// letters stores dead letters with these numbers.
func (r *restricted) letters(numbers ...int) []string {
	r.t.Helper()
	var records []*dlq.Record
	for _, n := range numbers {
		rec := record(n)
		rec.Subject = pageEvent
		records = append(records, rec)
	}
	return r.capture(records...)
}

// large stores a dead letter whose payload and headers are too large for a message.
func (r *restricted) large(n int) string {
	r.t.Helper()
	rec := record(n)
	rec.Data, rec.Header = bytes.Repeat([]byte("x"), 1<<20+1), nats.Header{"Large": {strings.Repeat("x", 40<<10)}}
	rec.BodySize = len(rec.Data)
	return r.capture(rec)[0]
}

// breakObject removes a part of a large payload.
func (r *restricted) breakObject(id string) {
	r.t.Helper()
	bucket, err := r.js.ObjectStore(r.t.Context(), "DLQ_LARGE")
	if err != nil {
		r.t.Fatal(err)
	}
	info, err := bucket.GetInfo(r.t.Context(), id)
	if err != nil {
		r.t.Fatal(err)
	}
	stream := r.stream("OBJ_DLQ_LARGE")
	m, err := stream.GetLastMsgForSubject(r.t.Context(), "$O.DLQ_LARGE.C."+info.NUID)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := stream.DeleteMsg(r.t.Context(), m.Sequence); err != nil {
		r.t.Fatal(err)
	}
}

// zombie leaves a message in a stream that the server does not deliver any more.
func (r *restricted) zombie(stream string, retention jetstream.RetentionPolicy) {
	r.t.Helper()
	ctx := r.t.Context()
	s, err := r.js.CreateStream(ctx, jetstream.StreamConfig{Name: stream, Retention: retention, MaxBytes: 1 << 20})
	if err != nil {
		r.t.Fatal(err)
	}
	cons, err := s.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "plain", MaxDeliver: 1, AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		r.t.Fatal(err)
	}
	given, err := r.nc.SubscribeSync("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES." + stream + ".plain")
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.js.Publish(ctx, stream, []byte("{}")); err != nil {
		r.t.Fatal(err)
	}
	m, err := cons.Next()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := m.Nak(); err != nil {
		r.t.Fatal(err)
	}
	if _, err := cons.Fetch(1, jetstream.FetchMaxWait(10*time.Millisecond)); err != nil { // this is when the server finds out
		r.t.Fatal(err)
	}
	if _, err := given.NextMsg(patience); err != nil {
		r.t.Fatal(err)
	}
}

// operation changes what is stored of an operation.
func (r *restricted) operation(id string, change map[string]any) {
	r.t.Helper()
	kv, err := r.js.KeyValue(r.t.Context(), "DLQ_OPERATIONS")
	if err != nil {
		r.t.Fatal(err)
	}
	value, err := kv.Get(r.t.Context(), "op."+id)
	if err != nil {
		r.t.Fatal(err)
	}
	stored := make(map[string]any)
	if err := json.Unmarshal(value.Value(), &stored); err != nil {
		r.t.Fatal(err)
	}
	maps.Copy(stored, change)
	data, err := json.Marshal(stored)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := kv.Put(r.t.Context(), "op."+id, data); err != nil {
		r.t.Fatal(err)
	}
}

// over waits until the server has taken all that commands have sent.
func (r *restricted) over() {
	r.t.Helper()
	deadline, look := time.NewTimer(patience), time.NewTicker(time.Millisecond)
	defer deadline.Stop()
	defer look.Stop()
	for {
		z, err := r.srv.Connz(nil)
		if err != nil {
			r.t.Fatal(err)
		}
		if z.NumConns == 1 { // the admin's
			return
		}
		select {
		case <-look.C:
		case <-deadline.C:
			r.t.Fatal("a command's connection stays")
		}
	}
}

// begin forgets what was done before the user came.
func (r *restricted) begin() {
	r.t.Helper()
	r.over()
	r.heard.Forget()
}

// check fails the test if a user was refused anything, or the list has an entry that
// nothing was allowed by.
func (r *restricted) check(list *permissions.List) {
	r.t.Helper()
	r.over()
	for _, refused := range r.heard.Refused() {
		r.t.Errorf("the list lacks something: %s", refused)
	}
	for _, e := range list.Unused(r.heard.By("monotel")) {
		if e.Subject == "$JS.API.STREAM.MSG.DELETE.DLQ" {
			continue // for the discards of this version, which do without rollups
		}
		r.t.Errorf("no command needs %q of section %s", e.Subject, e.Section)
	}
}

// A look is a command that changes nothing.
type look struct {
	args []string
	code int
}

// forReader stores what a reader can look at, and returns how.
func (r *restricted) forReader() []look {
	r.t.Helper()
	r.handle()
	ids := r.letters(1, 2, 3, 4)
	large, broken := r.large(5), r.large(6)
	out, _ := r.ok("dlq", "replay", ids[0], "--yes", "--output", "json")
	operation := planID.FindString(out)
	out, _ = r.ok("dlq", "replay", ids[1], "--dry-run")
	r.operation(planID.FindString(out), map[string]any{"status": "running", "started": now})
	r.bundle.in = `"` + strings.Repeat("y", 1<<20) + `"`
	r.ok("dlq", "edit", ids[2], "--data", "-", "--yes")
	r.breakObject(broken)
	return []look{
		{args: []string{"ls", "--state", "all"}},
		{args: []string{"ls", "--where", "payload.amount > 3"}},
		{args: []string{"groups"}},
		{args: []string{"stats"}},
		{args: []string{"tail", "--from", "1", "--limit", "3"}},
		{args: []string{"show", ids[0]}},
		{args: []string{"show", ids[1][:20]}},
		{args: []string{"show", ids[2]}},
		{args: []string{"show", large}},
		{args: []string{"show", broken}},
		{args: []string{"show", "nosuch"}, code: exitUsage},
		{args: []string{"export", "--id", ids[2], "--id", large}},
		{args: []string{"ops"}},
		{args: []string{"ops", "ls", "--output", "json"}},
		{args: []string{"ops", "show", operation}},
		{args: []string{"ops", "show", operation, "--tried"}},
		{args: []string{"ops", "show", "20260102-150405-abcde"}, code: exitUsage},
	}
}

// TestPermissions_reader looks at everything there is with nothing but the rights of a
// reader. Without any one of them something is refused, and the command says so.
func TestPermissions_reader(t *testing.T) {
	t.Parallel()
	list := permissionsOf(t, "reader")
	users := map[string]*permissions.List{"reader": list}
	for i := range list.Entries {
		users[fmt.Sprintf("without-%d", i)] = &permissions.List{Entries: slices.Delete(slices.Clone(list.Entries), i, i+1)}
	}
	r := setupRestricted(t, users)
	looks := r.forReader()
	r.begin()
	r.unchanged(func() {
		b := r.as("reader")
		for _, l := range looks {
			if code, out, errs := b.run(append([]string{"dlq"}, l.args...)...); code != l.code {
				t.Errorf("%q: exit code %d, want %d\n%s%s", l.args, code, l.code, out, errs)
			}
		}
	})
	r.over()
	for _, refused := range r.heard.Refused() {
		t.Errorf("the list lacks something: %s", refused)
	}

	// What it has read is not changed by that; a plan is stored today.
	dry := look{args: []string{"replay", "--all", "--dry-run"}}
	for i, e := range list.Entries {
		if e.Section == "Rare" {
			continue
		}
		r.begin()
		b, said := r.as(fmt.Sprintf("without-%d", i)), false
		refused := func() bool {
			return slices.ContainsFunc(r.heard.Refused(), func(s string) bool { return !strings.Contains(s, `"$KV.`) })
		}
		for _, l := range append(looks, dry) {
			code, out, errs := b.run(append([]string{"dlq"}, l.args...)...)
			said = said || code != l.code || strings.Contains(out+errs, "permission")
			r.over()
			if refused() {
				break
			}
		}
		// Nobody waits for the deletion of a consumer.
		if !refused() || !said && !strings.Contains(e.Subject, "CONSUMER.DELETE") {
			t.Errorf("without %q of section %s: refused %v, said %v; want both", e.Subject, e.Section, refused(), said)
		}
	}
}

// TestPermissions_doctor has a doctor who may look at everything.
func TestPermissions_doctor(t *testing.T) {
	t.Parallel()
	r := setupRestricted(t, map[string]*permissions.List{"doctor": permissionsOf(t, "reader", "doctor"), "reader": permissionsOf(t, "reader")})
	r.zombie("WORK", jetstream.WorkQueuePolicy)
	r.begin()
	code, out, errs := r.as("doctor").run("dlq", "doctor", "--output", "json")
	if code != exitFailed || !strings.Contains(out, `"zombies"`) || strings.Contains(out+errs, "permi") {
		t.Errorf("exit code %d, want %d, and what is wrong with WORK, and nothing that was not looked at:\n%s%s", code, exitFailed, out, errs)
	}
	r.check(permissionsOf(t, "doctor"))

	// A reader learns what was not looked at.
	if code, out, _ := r.as("reader").run("dlq", "doctor"); code != exitPartly || !strings.Contains(out, "$JS.API.STREAM.NAMES") {
		t.Errorf("exit code %d, want %d, and what was not permitted:\n%s", code, exitPartly, out)
	}
}

// TestPermissions_operator changes everything that can be changed with the rights of a
// reader and an operator, and no others. It uses each of them.
func TestPermissions_operator(t *testing.T) {
	t.Parallel()
	r := setupRestricted(t, map[string]*permissions.List{"operator": permissionsOf(t, "reader", "operator")})
	ids := r.letters(1, 2, 3, 4, 5, 6, 7, 8)
	r.zombie("WORK", jetstream.WorkQueuePolicy)
	r.zombie("LOG", jetstream.InterestPolicy)
	r.begin()
	b := r.as("operator")
	ok := func(args ...string) string {
		t.Helper()
		out, errs := b.ok(append([]string{"dlq"}, args...)...)
		return out + errs
	}
	plan := func(args ...string) string {
		t.Helper()
		return planID.FindString(ok(append([]string{"replay", "--dry-run"}, args...)...))
	}

	// The first large payload, and the first replay to the consumer, whose App comes later.
	b.in = `"` + strings.Repeat("z", 1<<20) + `"`
	ok("edit", ids[0], "--data", "-", "--yes")
	ok("replay", ids[1], "--yes", "--no-wait")
	r.handle()

	ok("replay", ids[2], "--yes", "--canary", "1")
	ok("replay", ids[3], "--to", "everyone", "--yes")
	ok("replay", ids[4], "--to", "subject="+pageEvent, "--yes")
	ok("ops", "cancel", plan(ids[5]))
	resumed := plan(ids[5], ids[6])
	r.claim(ids[5], resumed) // as one that was interrupted
	r.operation(resumed, map[string]any{"status": "paused", "started": now})
	ok("ops", "resume", resumed)
	paused := plan(ids[7])
	r.operation(paused, map[string]any{"status": "running", "started": now})
	ok("ops", "pause", paused)
	r.operation(paused, map[string]any{"status": "paused"})
	ok("ops", "cancel", paused)

	ok("archive", ids[7], "--yes")
	ok("restore", ids[7], "--yes")
	large := r.large(20)
	exported := filepath.Join(t.TempDir(), "letters.ndjson")
	ok("export", "--id", large, "--file", exported)
	ok("discard", large, "--yes")
	ok("discard", ids[0], "--yes")
	r.full()
	ok("discard", ids[1], "--yes")
	r.empty()
	ok("import", exported)
	ok("capture", "WORK", "plain", "--yes")
	ok("capture", "LOG", "plain", "--yes")
	for _, name := range []string{"WORK", "LOG"} {
		if n := r.stream(name).CachedInfo().State.Msgs; n != 0 {
			t.Errorf("stream %s has still %d messages that were captured", name, n)
		}
	}
	r.check(permissionsOf(t, "operator"))
}

// TestPermissions_ownInbox has a reader who cannot see the answers to others.
func TestPermissions_ownInbox(t *testing.T) {
	t.Parallel()
	r := setupRestricted(t, map[string]*permissions.List{"reader": permissionsOf(t, "reader").WithInbox("_INBOX_reader")})
	looks := r.forReader()
	r.begin()
	b := r.as("reader")
	b.env["XDG_CONFIG_HOME"] = natsContext(t, "ours", `{"url":"`+b.env["NATS_URL"]+`","inbox_prefix":"_INBOX_reader"}`)
	delete(b.env, "NATS_URL")
	for _, l := range looks {
		if code, out, errs := b.run(append([]string{"dlq", "--context", "ours"}, l.args...)...); code != l.code {
			t.Errorf("%q: exit code %d, want %d\n%s%s", l.args, code, l.code, out, errs)
		}
	}
	r.check(&permissions.List{})
}

// TestPermissions_blocks has a server take the blocks of the page as they stand there.
func TestPermissions_blocks(t *testing.T) {
	t.Parallel()
	lists, err := permissions.Read(permissionsPage)
	if err != nil {
		t.Fatal(err)
	}
	if len(lists) < 6 {
		t.Errorf("the page has %d lists, want 6 at least", len(lists))
	}
	for name, list := range lists {
		file := filepath.Join(t.TempDir(), "server.conf")
		text := "accounts: { APPS: { users: [ { user: u, password: pw\n" + list.Text + "} ] } }\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		opts, err := server.ProcessConfigFile(file)
		if err != nil || len(opts.Users) != 1 || opts.Users[0].Permissions == nil {
			t.Errorf("list %s is no configuration: %v\n%s", name, err, text)
			continue
		}
		got := opts.Users[0].Permissions
		if len(list.Publish()) == 0 || !slices.Equal(got.Publish.Allow, list.Publish()) {
			t.Errorf("list %s: a server reads %q, this test %q", name, got.Publish.Allow, list.Publish())
		}
		if got.Subscribe != nil && !slices.Equal(got.Subscribe.Allow, list.Subscribe()) {
			t.Errorf("list %s: a server reads %q, this test %q", name, got.Subscribe.Allow, list.Subscribe())
		}
	}
}

// claim has an operation claim a dead letter, as a process that is killed then.
func (r *restricted) claim(id, operation string) {
	r.t.Helper()
	m, err := r.stream("DLQ").GetLastMsgForSubject(r.t.Context(), "monotel.dlq.DLQ.ORDERS.billing."+id)
	if err != nil {
		r.t.Fatal(err)
	}
	rec, err := dlq.Decode(m.Header, m.Data)
	if err != nil {
		r.t.Fatal(err)
	}
	c := dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@desk", Operation: operation, Target: "consumer"}
	if err := r.store.Change(r.t.Context(), dlq.NewEntry(rec, m.Sequence, nil), c, nil); err != nil {
		r.t.Fatal(err)
	}
}

// full leaves no room in the dead-letter stream.
func (r *restricted) full() {
	r.t.Helper()
	info := r.stream("DLQ").CachedInfo()
	info.Config.MaxBytes = int64(info.State.Bytes)
	if _, err := r.js.UpdateStream(r.t.Context(), info.Config); err != nil {
		r.t.Fatal(err)
	}
}

// empty leaves nothing in it, nor a limit.
func (r *restricted) empty() {
	r.t.Helper()
	s := r.stream("DLQ")
	cfg := s.CachedInfo().Config
	cfg.MaxBytes = -1
	if _, err := r.js.UpdateStream(r.t.Context(), cfg); err != nil {
		r.t.Fatal(err)
	}
	if err := s.Purge(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}
