package cli

import (
	"bytes"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// An overheard is what a server logs of the subjects that this command publishes
// to, as they were before the server mapped them.
type overheard struct {
	mu       sync.Mutex
	subjects []string
}

var published = regexp.MustCompile(`:monotel".*<<- \[H?PUB (\S+)`)

func (o *overheard) Tracef(format string, args ...any) {
	if m := published.FindStringSubmatch(fmt.Sprintf(format, args...)); m != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.subjects = append(o.subjects, m[1])
	}
}

func (*overheard) Noticef(string, ...any) {}
func (*overheard) Warnf(string, ...any)   {}
func (*overheard) Errorf(string, ...any)  {}
func (*overheard) Fatalf(string, ...any)  {}
func (*overheard) Debugf(string, ...any)  {}

// asked checks that the API was asked for below a prefix, and nowhere else.
func (o *overheard) asked(t *testing.T, prefix string) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	n := 0
	for _, s := range o.subjects {
		switch {
		case strings.HasPrefix(s, prefix):
			n++
		case strings.HasPrefix(s, "$JS.API."), strings.HasPrefix(s, "$KV."), strings.HasPrefix(s, "$O."):
			t.Errorf("published to %s, want it below %s", s, prefix)
		}
	}
	if n == 0 {
		t.Errorf("nothing is published below %s, but to %q", prefix, o.subjects)
	}
}

// domainServer starts a server of JetStream domain "hub", whose API can be asked for
// below hub.api, too.
func domainServer(t *testing.T) (s *server.Server, address string, heard *overheard) {
	t.Helper()
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoSigs: true, JetStream: true, JetStreamDomain: "hub", StoreDir: t.TempDir(),
		LeafNode: server.LeafNodeOpts{Host: "127.0.0.1", Port: -1}, Trace: true, MaxTracedMsgLen: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	heard = &overheard{}
	s.SetLoggerV2(heard, false, true, false)
	address = withoutUser(started(t, s, "x"))
	for _, of := range []string{"STREAM.>", "CONSUMER.>", "DIRECT.>", "INFO"} {
		if err := s.GlobalAccount().AddMapping("hub.api."+of, "$JS.API."+of); err != nil {
			t.Fatal(err)
		}
	}
	for _, of := range []string{"$KV.>", "$O.>"} {
		if err := s.GlobalAccount().AddMapping("hub.api."+of, of); err != nil {
			t.Fatal(err)
		}
	}
	return s, address, heard
}

// leafServer starts a server with a JetStream domain of its own, that is a leaf of
// hub.
func leafServer(t *testing.T, hub *server.Server) string {
	t.Helper()
	vars, err := hub.Varz(nil)
	if err != nil {
		t.Fatal(err)
	}
	remote := &url.URL{Scheme: "nats-leaf", Host: fmt.Sprintf("127.0.0.1:%d", vars.LeafNode.Port)}
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, JetStreamDomain: "leaf", StoreDir: t.TempDir(),
		LeafNode: server.LeafNodeOpts{Remotes: []*server.RemoteLeafOpts{{URLs: []*url.URL{remote}}}, ReconnectInterval: 100 * time.Millisecond},
	})
	if err != nil {
		t.Fatal(err)
	}
	address := withoutUser(started(t, s, "x"))
	deadline, look := time.NewTimer(patience), time.NewTicker(5*time.Millisecond)
	defer deadline.Stop()
	defer look.Stop()
	for hub.NumLeafNodes() == 0 {
		select {
		case <-look.C:
		case <-deadline.C:
			t.Fatal("the leaf does not connect")
		}
	}
	return address
}

// natsContext writes a context of the NATS CLI, and returns where it is.
func natsContext(t *testing.T, name, content string) string {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "nats", "context", name+".json")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

// Dead letters of another domain, or of an API with another prefix, can be worked
// on like any other. Every command is run, as each asks the server for something of
// its own.
func TestConnect_domain(t *testing.T) {
	t.Parallel()
	const domain, prefix = "$JS.hub.API.", "hub.api."
	for _, tt := range []struct {
		name    string
		leaf    bool
		context string // of the NATS CLI
		args    []string
		want    string
	}{
		{name: "context", context: `{"jetstream_domain":"hub"}`, want: domain},
		{name: "prefix", context: `{"jetstream_api_prefix":"hub.api."}`, want: prefix},
		{name: "flag before the context", context: `{"jetstream_domain":"other"}`, args: []string{"--js-api-prefix", "hub.api"}, want: prefix},
		{name: "from a leaf node", leaf: true, args: []string{"--js-domain", "hub"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			hub, address, heard := domainServer(t)
			nc, err := nats.Connect(address)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			b := bare(t)
			b.js, b.store = openStore(t, nc)
			b.env["NATS_URL"] = address
			if tt.leaf {
				b.env["NATS_URL"] = leafServer(t, hub)
				b.fails(exitFailed, []string{"no dead-letter stream"}, "dlq", "ls") // there is none in its own domain
			}
			args := tt.args
			if tt.context != "" {
				b.env["XDG_CONFIG_HOME"] = natsContext(t, "ours", tt.context)
				args = append(args, "--context", "ours", "--server", b.env["NATS_URL"])
			}
			b.everyCommand(args)
			if !tt.leaf {
				heard.asked(t, tt.want)
			}
		})
	}
}

// everyCommand works on five dead letters, one of them large, with further flags.
func (b *bundle) everyCommand(flags []string) {
	b.t.Helper()
	to := b.billing(never)
	ids := b.captureMany(4)
	large := record(5)
	large.Data = bytes.Repeat([]byte("x"), 3<<20)
	large.BodySize = len(large.Data)
	ids = append(ids, b.capture(large)...)
	has := func(part string, args ...string) string {
		b.t.Helper()
		out, errs := b.ok(append(args, flags...)...)
		if !strings.Contains(out+errs, part) {
			b.t.Errorf("monotel %s: its output lacks %q:\n%s%s", strings.Join(args, " "), part, out, errs)
		}
		return out
	}
	has("5 dead letters", "dlq", "ls")
	has("5 dead letters in 1 group", "dlq", "groups")
	has("ORDERS/billing", "dlq", "stats")
	has(ids[0], "dlq", "show", ids[0][:len(ids[0])-1])
	has("3.0 MiB", "dlq", "show", ids[4])
	has("captured", "dlq", "tail", "--from", "1", "--limit", "1")
	has("5 dead letters exported", "dlq", "export")
	has("", "dlq", "doctor", "--fail-on", "never")

	b.in = `{"order":1,"amount":2}`
	has("revision 1", "dlq", "edit", ids[0], "--data", "-", "--yes")
	has("1 dead letter archived", "dlq", "archive", ids[1], "--yes")
	has("1 dead letter restored", "dlq", "restore", ids[1], "--yes")
	has("1 dead letter discarded", "dlq", "discard", ids[2], "--yes")

	plan := planID.FindString(has("Nothing was sent", "dlq", "replay", ids[0], ids[1], "--dry-run"))
	has("planned", "dlq", "ops")
	has("resolved", "dlq", "replay", "--plan", plan, "--yes")
	has("done", "dlq", "ops", "show", plan)
	to.mu.Lock()
	defer to.mu.Unlock()
	if got := to.payload[ids[0]]; len(to.payload) != 2 || got != b.in {
		b.t.Errorf("billing got %d messages, of %s %q; want 2 and what the edit made of it", len(to.payload), ids[0], got)
	}
}

func TestConnect_badDomain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.fails(exitUsage, []string{"--js-domain and --js-api-prefix: want one of them"}, "dlq", "ls", "--js-domain", "hub", "--js-api-prefix", "x")
	b.fails(exitUsage, []string{`JetStream domain "h.ub"`}, "dlq", "ls", "--js-domain", "h.ub")
	b.fails(exitUsage, []string{`JetStream API prefix "x.*"`}, "dlq", "ls", "--js-api-prefix", "x.*")
	b.fails(exitFailed, []string{`no JetStream of domain "nowhere" at ` + withoutUser(b.url)}, "dlq", "ls", "--js-domain", "nowhere")
	b.fails(exitFailed, []string{`no JetStream API with prefix "no.where" at ` + withoutUser(b.url)}, "dlq", "ls", "--js-api-prefix", "no.where")
	b.env["XDG_CONFIG_HOME"] = natsContext(t, "both", `{"url":"`+b.url+`","jetstream_domain":"hub","jetstream_api_prefix":"x"}`)
	b.fails(exitUsage, []string{"a JetStream domain and an API prefix, want one of them"}, "dlq", "ls", "--context", "both")
}
