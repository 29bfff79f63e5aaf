package dlq_test

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// A guarded is a server whose user "guest" may not do everything. Its doctorSetup
// is the other user's, who may.
type guarded struct {
	doctorSetup
	guest *dlq.Store
}

// setupGuarded starts a server whose guest may not publish to what is denied. If
// maxStore is more than 0, the account may store so many bytes.
func setupGuarded(t *testing.T, cfg dlq.Config, maxStore int64, denied ...string) *guarded {
	t.Helper()
	account := server.NewAccount("APPS")
	opts := &server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Accounts: []*server.Account{account},
		Users: []*server.User{
			{Username: "admin", Password: "pw", Account: account},
			{Username: "guest", Password: "pw", Account: account, Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Deny: denied},
			}},
		},
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(doctorPatience) {
		t.Fatal("the server does not start")
	}
	if account, err = srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	limits := server.JetStreamAccountLimits{MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}
	if maxStore > 0 {
		limits.MaxStore = maxStore
	}
	if err := account.EnableJetStream(map[string]server.JetStreamAccountLimits{"": limits}, nil); err != nil {
		t.Fatal(err)
	}
	g := &guarded{}
	g.nc, g.js, g.store = connectAs(t, srv, cfg, "admin")
	if err := g.store.Provision(doctorContext(t)); err != nil {
		t.Fatal(err)
	}
	_, _, g.guest = connectAs(t, srv, cfg, "guest")
	// A request that is refused gets no answer. If one is waited for, the context of
	// the test ends first.
	g.guest.SetRequestTimeout(time.Hour)
	return g
}

func connectAs(t *testing.T, srv *server.Server, cfg dlq.Config, user string) (*nats.Conn, jetstream.JetStream, *dlq.Store) {
	t.Helper()
	u, err := url.Parse(srv.ClientURL())
	if err != nil {
		t.Fatal(err)
	}
	u.User = url.UserPassword(user, "pw")
	quiet := nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}) // the default prints
	nc, err := nats.Connect(u.String(), quiet, nats.Timeout(doctorPatience))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(doctorPatience))
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(nc, js, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js, store
}

// TestStore_Doctor_permissions has a doctor who may not look at everything: what
// may be looked at is, and what is refused is named, at once.
func TestStore_Doctor_permissions(t *testing.T) {
	t.Parallel()
	of := func(severity dlq.Severity, check, stream, consumer string, n uint64) dlq.Finding {
		return dlq.Finding{Severity: severity, Check: check, Stream: stream, Consumer: consumer, Count: n}
	}
	denied := func(stream, consumer string) dlq.Finding {
		return of(dlq.SeverityWarning, "not_permitted", stream, consumer, 0)
	}
	everything := []dlq.Finding{
		of(dlq.SeverityCritical, "zombies", "WORK", "c", 2),
		of(dlq.SeverityWarning, "dlq_max_age", "DLQ", "", 0),
		of(dlq.SeverityWarning, "stream_without_max_bytes", "LOG", "", 0),
		of(dlq.SeverityWarning, "max_deliver", "LOG", "c", 0),
		of(dlq.SeverityWarning, "advisory_stream_missing", "MONOTEL_ADVISORIES", "", 2),
		of(dlq.SeverityWarning, "max_deliver", "WORK", "c", 0),
	}
	without := func(checks ...string) []dlq.Finding {
		return slices.DeleteFunc(slices.Clone(everything), func(f dlq.Finding) bool {
			return slices.Contains(checks, f.Check) || slices.Contains(checks, f.Check+" "+f.Stream) || slices.Contains(checks, f.Stream)
		})
	}
	tests := []struct {
		name   string
		denied []string
		found  []dlq.Finding // beside what is not permitted
		want   []dlq.Finding // what is not
	}{
		{name: "nothing denied", found: everything},
		{name: "what it does not need", denied: []string{"$JS.API.STREAM.LIST", "$JS.API.STREAM.UPDATE.>", "$JS.API.CONSUMER.NAMES.*"}, found: everything},
		{
			name: "the consumers of all", denied: []string{"$JS.API.CONSUMER.LIST.*"},
			found: without("zombies", "max_deliver", "advisory_stream_missing"), want: []dlq.Finding{denied("LOG", ""), denied("WORK", "")},
		},
		{
			name: "the consumers of one", denied: []string{"$JS.API.CONSUMER.LIST.LOG"},
			found: append(without("max_deliver LOG", "advisory_stream_missing"),
				of(dlq.SeverityWarning, "advisory_stream_missing", "MONOTEL_ADVISORIES", "", 1)),
			want: []dlq.Finding{denied("LOG", "")},
		},
		{
			name: "one stream", denied: []string{"$JS.API.STREAM.INFO.LOG"},
			found: append(without("LOG", "advisory_stream_missing"), of(dlq.SeverityWarning, "advisory_stream_missing", "MONOTEL_ADVISORIES", "", 1)),
			want:  []dlq.Finding{denied("LOG", "")},
		},
		{
			name: "the dead-letter stream", denied: []string{"$JS.API.STREAM.INFO.DLQ"},
			found: without("DLQ"), want: []dlq.Finding{denied("DLQ", "")},
		},
		{
			name: "the names of the streams", denied: []string{"$JS.API.STREAM.NAMES"},
			found: []dlq.Finding{of(dlq.SeverityWarning, "dlq_max_age", "DLQ", "", 0)}, want: []dlq.Finding{denied("", "")},
		},
		{
			name: "one consumer", denied: []string{"$JS.API.CONSUMER.INFO.WORK.c"},
			found: without("zombies"), want: []dlq.Finding{denied("WORK", "c")},
		},
		{
			name: "messages", denied: []string{"$JS.API.STREAM.MSG.GET.*"},
			found: without("zombies"), want: []dlq.Finding{denied("WORK", "c")},
		},
		{
			name: "everything", denied: []string{"$JS.API.>"},
			want: []dlq.Finding{denied("", ""), denied("DLQ", ""), denied("MONOTEL_ADVISORIES", ""), denied("OBJ_DLQ_LARGE", "")},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := setupGuarded(t, dlq.Config{Stream: jetstream.StreamConfig{MaxAge: time.Hour}}, 0, tt.denied...)
			g.stream(t, jetstream.StreamConfig{Name: "LOG", MaxBytes: -1})
			g.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
			g.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 3})
			c := g.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 2})
			g.publish(t, "work.a", 2)
			doctorExhaust(t, c, 0)

			got, err := g.guest.Doctor(doctorContext(t))
			if err != nil {
				t.Fatal(err)
			}
			var found, refused []dlq.Finding
			for _, f := range got {
				if f.Incomplete() {
					refused = append(refused, f)
				} else {
					found = append(found, f)
				}
			}
			byStream := func(a, b dlq.Finding) int { return strings.Compare(a.Stream+a.Check, b.Stream+b.Check) }
			slices.SortFunc(found, byStream)
			slices.SortFunc(tt.found, byStream)
			doctorWant(t, found, tt.found...)
			doctorWant(t, refused, tt.want...)
			for _, f := range refused {
				_, subject, _ := strings.Cut(f.Remedy, "publish to ")
				subject, _, _ = strings.Cut(subject, ",")
				if !strings.HasPrefix(subject, "$JS.API.") || !strings.Contains(f.Detail, subject) || !strings.Contains(f.Detail, "Not checked: ") {
					t.Errorf("it does not say what was refused and not checked: %+v", f)
				}
			}
		})
	}
}

// What others on the same connection are refused says nothing of a request.
func TestStore_Doctor_refusedBefore(t *testing.T) {
	t.Parallel()
	g := setupGuarded(t, dlq.Config{}, 0, "$JS.API.CONSUMER.LIST.LOG", "other")
	g.stream(t, jetstream.StreamConfig{Name: "LOG"})
	g.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	g.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "c"})
	for range 2 { // the second time the refusal is an old one
		got, err := g.guest.Doctor(doctorContext(t))
		if err != nil {
			t.Fatal(err)
		}
		doctorWant(t, got, dlq.Finding{Severity: dlq.SeverityWarning, Check: "not_permitted", Stream: "LOG"})
	}
}

// TestChange_discardFromFull_refused has a full stream whose limit cannot be
// raised: nothing is discarded, and the error says what to do.
func TestChange_discardFromFull_refused(t *testing.T) {
	t.Parallel()
	const maxBytes = 64 << 10
	tests := []struct {
		name     string
		cfg      jetstream.StreamConfig
		maxStore int64
		reserved int64 // by another stream
		denied   []string
		want     []string
	}{
		{
			name: "no permission", cfg: jetstream.StreamConfig{MaxBytes: maxBytes}, denied: []string{"$JS.API.STREAM.UPDATE.>"},
			want: []string{"no permission to publish to $JS.API.STREAM.UPDATE.DLQ", "`nats stream edit DLQ --max-bytes ", "nats stream rmm DLQ 1"},
		},
		{
			name: "all of the account is reserved", cfg: jetstream.StreamConfig{MaxBytes: maxBytes}, maxStore: 2 * maxBytes, reserved: maxBytes,
			want: []string{"raise what the account may store, or lower the limit of another stream by ", "nats stream rmm DLQ 1"},
		},
		{
			name: "all of the account is used", cfg: jetstream.StreamConfig{MaxBytes: -1}, maxStore: maxBytes,
			want: []string{"no room in the account", "nats stream rmm DLQ 1"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := setupGuarded(t, dlq.Config{Stream: tt.cfg}, tt.maxStore, tt.denied...)
			if tt.reserved > 0 {
				if _, err := g.js.CreateStream(doctorContext(t), jetstream.StreamConfig{Name: "OTHER", MaxBytes: tt.reserved}); err != nil {
					t.Fatal(err)
				}
			}
			var entries []*dlq.Entry
			for seq := uint64(1); ; seq++ {
				r := record(seq)
				r.Data = noise(seq, 4000)
				if seq > 1 { // to the last byte, or nearly
					r.Data = nil
				}
				if _, err := g.store.Capture(doctorContext(t), r, nil); dlq.IsFull(err) {
					break
				} else if err != nil {
					t.Fatal(err)
				}
				entries = append(entries, dlq.NewEntry(r, seq, nil))
			}
			before := g.dlqInfo(t)
			for before.Config.MaxBytes > 0 { // a trace is smaller than a record
				room := before.Config.MaxBytes - int64(before.State.Bytes) - 64
				if room < 0 {
					break
				}
				if _, err := g.js.Publish(doctorContext(t), "monotel.dlq.DLQ.stuff", make([]byte, room)); err != nil {
					t.Fatal(err)
				}
				before = g.dlqInfo(t)
			}
			if before.Config.MaxBytes <= 0 {
				for size := 1000; size > 0; size /= 2 {
					_, _ = g.js.Publish(doctorContext(t), "monotel.dlq.DLQ.stuff", make([]byte, size))
				}
				before = g.dlqInfo(t)
			}
			err := g.guest.Change(doctorContext(t), entries[0], dlq.Change{Kind: dlq.ChangeDiscarded}, nil)
			if !errors.Is(err, dlq.ErrStreamFull) {
				t.Fatalf("discard: %v, want ErrStreamFull", err)
			}
			for _, want := range append(tt.want, "nothing was discarded") {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not say %q: %v", want, err)
				}
			}
			after := g.dlqInfo(t)
			if diff := cmp.Diff(before.Config, after.Config); diff != "" || after.State.Msgs != before.State.Msgs {
				t.Errorf("something has changed: %d messages, had %d\n%s", after.State.Msgs, before.State.Msgs, diff)
			}

			// What the error says can be done makes room.
			stream, err := g.js.Stream(doctorContext(t), "DLQ")
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.DeleteMsg(doctorContext(t), entries[0].Sequence); err != nil {
				t.Fatal(err)
			}
			if err := g.guest.Change(doctorContext(t), entries[1], dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil {
				t.Errorf("discard when there is room: %v", err)
			}
		})
	}
}

func (g *guarded) dlqInfo(t *testing.T) *jetstream.StreamInfo {
	t.Helper()
	stream, err := g.js.Stream(doctorContext(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	return stream.CachedInfo()
}

// TestChange_discardFromFull_editedMeanwhile has an operator change the limit that
// was raised, and a process that was killed before: neither is undone.
func TestChange_discardFromFull_editedMeanwhile(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	all := b.entries(t, s, 3, 300)
	bytes := int64(b.info(t, "DLQ").State.Bytes)
	note := fmt.Sprintf(`{"from":{"max_bytes":%d,"max_msgs":-1},"to":{"max_bytes":%d,"max_msgs":-1}}`, bytes-500, bytes-400)
	b.full(t, 10, func(c *jetstream.StreamConfig, _ jetstream.StreamState) {
		c.Metadata["monotel.dlq.raised"] = note // from and to what it is not any more
	})
	change(t, s, all[0], dlq.Change{Kind: dlq.ChangeDiscarded})
	got := b.info(t, "DLQ").Config
	if _, noted := got.Metadata["monotel.dlq.raised"]; noted || got.MaxBytes != bytes+10 {
		t.Errorf("the limit is %d, want the operator's %d; metadata %v", got.MaxBytes, bytes+10, got.Metadata)
	}
}
