package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
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

const permissionsPage = "../../docs/permissions.md"

// A restricted is a server with a user who may do what a list of docs/permissions.md
// says, and no more. Its bundle is the admin's.
type restricted struct {
	*bundle
	srv   *server.Server
	list  *permissions.List
	heard *permissions.Heard
	user  *bundle
	ids   []string
}

// setupRestricted starts a server with dead letters of consumer billing of stream orders:
// one that is archived, one with an edit, and two that are large, of which the first
// stays and the other lacks a part. There are a replay that is done, one that seems to
// run, and a message that the server does not deliver any more.
func setupRestricted(t *testing.T, list string, without ...string) *restricted {
	t.Helper()
	lists, err := permissions.Read(permissionsPage)
	if err != nil {
		t.Fatal(err)
	}
	r := &restricted{heard: &permissions.Heard{}}
	if r.list = lists[list]; r.list == nil {
		t.Fatalf("%s has no list %q", permissionsPage, list)
	}
	r.list = r.list.Without(without...)
	account := server.NewAccount("APPS")
	r.srv, err = server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Trace: true, MaxTracedMsgLen: 1,
		Accounts: []*server.Account{account},
		Users: []*server.User{
			{Username: "admin", Password: "pw", Account: account},
			{Username: "user", Password: "pw", Account: account, Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Allow: r.list.Publish()}, Subscribe: &server.SubjectPermission{Allow: r.list.Subscribe()},
			}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	r.srv.SetLoggerV2(r.heard, false, true, false)
	admin := started(t, r.srv, "admin")
	if account, err = r.srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	limits := map[string]server.JetStreamAccountLimits{"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}}
	if err := account.EnableJetStream(limits, nil); err != nil {
		t.Fatal(err)
	}
	r.bundle, r.user = bare(t), bare(t)
	r.env["NATS_URL"], r.user.env["NATS_URL"] = admin, withUser(r.srv.ClientURL(), "user", "pw")
	r.bundle.nc, err = nats.Connect(admin, nats.Name("admin"), nats.Timeout(patience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.nc.Close)
	r.js, r.store = openStore(t, r.nc)
	r.fill()
	return r
}

func (r *restricted) fill() {
	t := r.t
	t.Helper()
	r.billing(never)
	large := func(n int) *dlq.Record {
		rec := record(n)
		rec.Data = bytes.Repeat([]byte{'a' + byte(n)}, 3<<20)
		rec.BodySize, rec.Header = len(rec.Data), nats.Header{"Large": {strings.Repeat("x", 40<<10)}}
		return rec
	}
	r.ids = append(r.captureMany(8), r.capture(large(20), large(21))...)
	r.ok("dlq", "replay", r.ids[0], "--yes", "--quiet")
	r.ok("dlq", "archive", r.ids[1], "--yes")
	r.bundle.in = `"`+strings.Repeat("y", 2<<20)+`"`
	r.ok("dlq", "edit", r.ids[2], "--data", "-", "--yes")
	r.breakObject(r.ids[9])
	r.zombie()
	r.over()
	r.heard.Forget()
}

// breakObject removes a part of what is too large for a record.
func (r *restricted) breakObject(id string) {
	r.t.Helper()
	ctx := r.t.Context()
	bucket, err := r.js.ObjectStore(ctx, "DLQ_LARGE")
	if err != nil {
		r.t.Fatal(err)
	}
	info, err := bucket.GetInfo(ctx, id)
	if err != nil {
		r.t.Fatal(err)
	}
	stream, err := r.js.Stream(ctx, "OBJ_DLQ_LARGE")
	if err != nil {
		r.t.Fatal(err)
	}
	m, err := stream.GetLastMsgForSubject(ctx, "$O.DLQ_LARGE.C."+info.NUID)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := stream.DeleteMsg(ctx, m.Sequence); err != nil {
		r.t.Fatal(err)
	}
}

// zombie leaves a message in work queue WORK that the server does not deliver any more.
func (r *restricted) zombie() {
	r.t.Helper()
	ctx := r.t.Context()
	s, err := r.js.CreateStream(ctx, jetstream.StreamConfig{Name: "WORK", Subjects: []string{"work.>"}, Retention: jetstream.WorkQueuePolicy})
	if err != nil {
		r.t.Fatal(err)
	}
	cons, err := s.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "plain", MaxDeliver: 1, AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		r.t.Fatal(err)
	}
	given, err := r.nc.SubscribeSync("$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.WORK.plain")
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.js.Publish(ctx, "work.a", []byte("{}")); err != nil {
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

// over waits until the server has taken all that the command has sent.
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
		if !slices.ContainsFunc(z.Conns, func(c *server.ConnInfo) bool { return c.Name == "monotel" }) {
			return
		}
		select {
		case <-look.C:
		case <-deadline.C:
			r.t.Fatal("the command's connection stays")
		}
	}
}

// check fails the test if the user was refused anything, or the list has an entry that
// nothing was allowed by.
func (r *restricted) check(tolerated func(refused string) bool) {
	r.t.Helper()
	r.over()
	for _, refused := range r.heard.Refused() {
		if tolerated == nil || !tolerated(refused) {
			r.t.Errorf("the list lacks something: %s", refused)
		}
	}
	published, subscribed := r.heard.By("monotel")
	r.t.Logf("published %s\nsubscribed %s", strings.Join(published, "\n"), strings.Join(subscribed, "\n"))
	for _, e := range r.list.Unused(published, subscribed) {
		r.t.Errorf("no command needs %q of section %s", e.Subject, e.Section)
	}
}

var _ = json.Marshal
var _ = os.WriteFile
var _ = filepath.Join
var _ = fmt.Sprint

func TestPermissions_reader(t *testing.T) {
	t.Parallel()
	r := setupRestricted(t, "reader")
	u := r.user
	u.ok("dlq", "ls", "--state", "all")
	u.ok("dlq", "ls", "--where", `payload.amount > 3`)
	u.ok("dlq", "groups")
	u.ok("dlq", "stats")
	u.ok("dlq", "show", r.ids[3])
	u.ok("dlq", "show", r.ids[2])
	u.ok("dlq", "show", r.ids[8])
	u.run("dlq", "show", r.ids[9])
	u.run("dlq", "show", "nosuch")
	u.ok("dlq", "show", r.ids[4][:20])
	u.ok("dlq", "tail", "--from", "1", "--limit", "3")
	u.ok("dlq", "export", "--id", r.ids[8])
	out, _ := u.ok("dlq", "ops")
	op := planID.FindString(out)
	u.ok("dlq", "ops", "ls")
	u.ok("dlq", "ops", "show", op)
	u.ok("dlq", "ops", "show", op, "--tried")
	u.run("dlq", "ops", "show", "20260102-150405-abcde")
	u.run("dlq", "doctor")
	u.run("dlq", "replay", "--all", "--dry-run")
	r.check(nil)
}

func TestPermissions_operator(t *testing.T) {
	t.Parallel()
	r := setupRestricted(t, "operator")
	u := r.user
	u.in = `{"order":4,"amount":2}`
	u.ok("dlq", "edit", r.ids[3], "--data", "-", "--yes")
	u.in = `"`+strings.Repeat("z", 2<<20)+`"`
	u.ok("dlq", "edit", r.ids[4], "--data", "-", "--yes")
	u.ok("dlq", "archive", r.ids[5], "--yes")
	u.ok("dlq", "restore", r.ids[5], "--yes")
	u.ok("dlq", "discard", r.ids[4], "--yes")
	u.ok("dlq", "discard", r.ids[8], "--yes")
	out, _ := u.ok("dlq", "replay", r.ids[3], r.ids[6], "--dry-run")
	plan := planID.FindString(out)
	u.ok("dlq", "replay", "--plan", plan, "--yes")
	out, _ = u.ok("dlq", "replay", r.ids[7], "--dry-run")
	u.ok("dlq", "ops", "cancel", planID.FindString(out))
	u.ok("dlq", "capture", "WORK", "plain", "--yes")
	r.check(nil)
}
