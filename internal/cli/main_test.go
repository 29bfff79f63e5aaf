package cli

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/rogpeppe/go-internal/diff"
	"github.com/rogpeppe/go-internal/testscript"
	"go.uber.org/goleak"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

var update = flag.Bool("update", false, "write the golden files")

// leakChecked runs the tests, and looks for goroutines that they leave behind.
type leakChecked struct{ m *testing.M }

func (l leakChecked) Run() int {
	cache, err := os.MkdirTemp("", "monotel-test-") // where payloads are edited
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(cache) //nolint:errcheck // the tests have said what matters
	_ = os.Setenv("XDG_CACHE_HOME", cache)
	code := l.m.Run()
	if err := goleak.Find(); code == 0 && err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return code
}

func TestMain(m *testing.M) {
	testscript.Main(leakChecked{m}, map[string]func(){
		"monotel": func() {
			os.Exit(Main(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
		},
	})
}

// now is when the tests are.
var now = time.Date(2026, 1, 2, 15, 4, 5, 0, time.UTC)

// golden compares with a file of testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if d := diff.Diff(path, want, "now", []byte(got)); len(d) > 0 {
		t.Errorf("output has changed; if that is meant, run go test -update:\n%s", d)
	}
}

// A bundle is a server with dead letters, and a way to run the command.
type bundle struct {
	t     *testing.T
	url   string
	nc    *nats.Conn
	js    jetstream.JetStream
	store *dlq.Store
	env   map[string]string
	in    string
	stdin io.Reader // in place of in
	width int       // of the terminal, 0 without one
	now   func() time.Time
}

func setup(t *testing.T) *bundle {
	t.Helper()
	server := monotest.Server(t)
	b := bare(t)
	b.url, b.nc = server.URL(), server.Conn()
	b.env["NATS_URL"] = b.url
	b.js, b.store = openStore(t, b.nc)
	return b
}

// bare has no server.
func bare(t *testing.T) *bundle {
	t.Helper()
	return &bundle{t: t, env: map[string]string{"XDG_CONFIG_HOME": t.TempDir()}, now: time.Now}
}

func openStore(t *testing.T, nc *nats.Conn) (jetstream.JetStream, *dlq.Store) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(nc, js, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 16 << 20}})
	if err != nil {
		t.Fatal(err)
	}
	if err := store.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return js, store
}

// record is a dead letter of consumer billing.
func record(n int) *dlq.Record {
	created := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	data := []byte(fmt.Sprintf(`{"order":%d,"amount":%d.50}`, n, n))
	return &dlq.Record{
		ID: dlq.ID("ORDERS", created, "billing", uint64(n)), Reason: dlq.ReasonAttemptsExhausted, Subject: "orders.created.v1",
		Header: nats.Header{"Tenant": {"acme"}}, Data: data, BodySize: len(data), Event: "shop/orders.created/v1", Stream: "ORDERS",
		StreamCreated: created, StreamSequence: uint64(n), Consumer: "billing", ConsumerSequence: uint64(n), Deliveries: 5,
		Stored: now.Add(-2 * time.Hour), FirstFailed: now.Add(-2 * time.Hour), Failed: now.Add(-3 * time.Minute),
		Error: fmt.Sprintf("charge order %d: gateway timeout", n), ErrorType: "*billing.TimeoutError",
		ErrorTypes:  []string{"*fmt.wrapError", "*billing.TimeoutError"},
		Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", OriginTraceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
		App: "shop", AppVersion: "1.2.3", Module: "billing", Host: "web-1",
	}
}

// capture stores dead letters.
func (b *bundle) capture(records ...*dlq.Record) []string {
	b.t.Helper()
	var ids []string
	for _, r := range records {
		if _, err := b.store.Capture(b.t.Context(), r, nil); err != nil {
			b.t.Fatal(err)
		}
		ids = append(ids, r.ID)
	}
	return ids
}

// process is the command's world.
func (b *bundle) process(out, err io.Writer) process {
	in := b.stdin
	if in == nil {
		in = strings.NewReader(b.in)
	}
	return process{
		in: in, out: out, err: err, now: b.now,
		env: func(key string) string { return b.env[key] },
		tty: func(any) (int, bool) { return b.width, b.width > 0 },
	}
}

// patience bounds what a test waits for. It measures nothing: a busy machine takes
// its time.
const patience = 3 * time.Minute

func (b *bundle) run(args ...string) (code int, stdout, stderr string) {
	b.t.Helper()
	var out, err bytes.Buffer
	ctx, cancel := context.WithTimeout(b.t.Context(), patience)
	defer cancel()
	code = run(ctx, args, b.process(&out, &err))
	return code, out.String(), err.String()
}

// ok runs a command that has to succeed.
func (b *bundle) ok(args ...string) (stdout, stderr string) {
	b.t.Helper()
	code, out, errs := b.run(args...)
	if code != exitDone {
		b.t.Fatalf("monotel %s: exit code %d\n%s%s", strings.Join(args, " "), code, out, errs)
	}
	return out, errs
}

// fails runs a command that has to end with a code, and a message with all parts.
func (b *bundle) fails(code int, parts []string, args ...string) {
	b.t.Helper()
	got, out, errs := b.run(args...)
	if got != code {
		b.t.Fatalf("monotel %s: exit code %d, want %d\n%s%s", strings.Join(args, " "), got, code, out, errs)
	}
	if n := strings.Count(errs, "monotel: "); n != 1 {
		b.t.Errorf("monotel %s: says what went wrong %d times, want once:\n%s", strings.Join(args, " "), n, errs)
	}
	for _, part := range parts {
		if !strings.Contains(errs, part) {
			b.t.Errorf("monotel %s: its error lacks %q:\n%s", strings.Join(args, " "), part, errs)
		}
	}
}

// fingerprint is all that is stored on the server.
func fingerprint(ctx context.Context, js jetstream.JetStream) (string, error) {
	streams := make(map[string]uint64)
	list := js.ListStreams(ctx)
	for info := range list.Info() {
		streams[info.Config.Name] = info.State.LastSeq
	}
	if err := list.Err(); err != nil {
		return "", err
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(streams)) {
		fmt.Fprintf(&b, "%s %d\n", name, streams[name])
	}
	return b.String(), nil
}

// unchanged fails the test if f changes anything on the server.
func (b *bundle) unchanged(f func()) {
	b.t.Helper()
	before, err := fingerprint(b.t.Context(), b.js)
	if err != nil {
		b.t.Fatal(err)
	}
	f()
	after, err := fingerprint(b.t.Context(), b.js)
	if err != nil {
		b.t.Fatal(err)
	}
	if before != after {
		b.t.Errorf("something was stored; before:\n%safter:\n%s", before, after)
	}
}
