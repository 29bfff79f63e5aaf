package cli

import (
	"encoding/json"
	"maps"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// permitted starts a server with a user "admin", who may do everything, and
// "guest", who may do what is not denied to publish. Passwords are "pw".
func permitted(t *testing.T, denied ...string) (admin, guest string) {
	t.Helper()
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(),
		Users: []*server.User{
			{Username: "admin", Password: "pw"},
			{Username: "guest", Password: "pw", Permissions: &server.Permissions{Publish: &server.SubjectPermission{Deny: denied}}},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	return started(t, s, "admin"), withUser(s.ClientURL(), "guest", "pw")
}

func started(t *testing.T, s *server.Server, user string) string {
	t.Helper()
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(patience) {
		t.Fatal("the server does not start")
	}
	return withUser(s.ClientURL(), user, "pw")
}

// nowhere is the URL of a port that nobody listens on, and nobody will: it is the
// near end of a connection.
func nowhere(t *testing.T) string {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = c.Close(), l.Close()
	})
	return "nats://" + c.LocalAddr().String()
}

func withUser(address, user, password string) string {
	u, _ := url.Parse(address)
	u.User = url.UserPassword(user, password)
	return u.String()
}

func withoutUser(address string) string {
	u, _ := url.Parse(address)
	u.User = nil
	return u.String()
}

func TestConnect_noServer(t *testing.T) {
	t.Parallel()
	b := bare(t)
	server := nowhere(t)
	b.env["NATS_URL"] = withUser(server, "ada", "s3cret")
	b.fails(exitFailed, []string{"no NATS server at " + server + " (start one, or set --server, NATS_URL or --context)"}, "dlq", "ls")
	_, _, errs := b.run("dlq", "ls")
	if strings.Contains(errs, "s3cret") || strings.Contains(errs, "ada") {
		t.Errorf("credentials are printed: %s", errs)
	}
}

func TestConnect_refusedCredentials(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.env["NATS_URL"] = withUser(b.url, "ada", "s3cret")
	b.fails(exitFailed, []string{"refused the credentials", "--creds", withoutUser(b.url)}, "dlq", "ls")
	if _, _, errs := b.run("dlq", "ls"); strings.Contains(errs, "s3cret") {
		t.Errorf("a password is printed: %s", errs)
	}
}

func TestConnect_badURL(t *testing.T) {
	t.Parallel()
	for _, server := range []string{"nats://ada:s3cret%zz@127.0.0.1", "nats://ada:s3cret@host:port", "nats://", ",", "nats://ada:s3/cret@host:4222"} {
		b := bare(t)
		b.fails(exitUsage, []string{"server"}, "dlq", "ls", "--server", server)
		if _, _, errs := b.run("dlq", "ls", "--server", server); strings.Contains(errs, "s3cret") || strings.Contains(errs, "s3") {
			t.Errorf("%s: a password is printed: %s", server, errs)
		}
	}
}

func TestConnect_precedence(t *testing.T) {
	t.Parallel()

	good := setup(t)
	user := url.URL{}
	if u, err := url.Parse(good.url); err == nil {
		user = *u
	}
	password, _ := user.User.Password()
	plain := withoutUser(good.url)
	nowhere := nowhere(t)
	passwordFile := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(passwordFile, []byte(password+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	contexts := func(t *testing.T, selected string) string {
		t.Helper()
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "nats", "context"), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, c := range map[string]map[string]string{
			"good":    {"url": plain, "user": user.User.Username(), "password": password},
			"wrong":   {"url": plain, "user": "x", "password": "y"},
			"nowhere": {"url": nowhere, "user": user.User.Username(), "password": password},
		} {
			b, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, "nats", "context", name+".json"), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if selected != "" {
			if err := os.WriteFile(filepath.Join(dir, "nats", "context.txt"), []byte(selected), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	tests := []struct {
		name     string
		env      map[string]string
		selected string
		args     []string
		want     string // part of the error, if there is one
	}{
		{name: "NATS_URL", env: map[string]string{"NATS_URL": good.url}},
		{name: "flag before NATS_URL", env: map[string]string{"NATS_URL": nowhere}, args: []string{"--server", good.url}},
		{name: "list", args: []string{"--server", nowhere + ", " + good.url}},
		{name: "selected context", selected: "good"},
		{name: "NATS_URL before the selected context", selected: "nowhere", env: map[string]string{"NATS_URL": good.url}},
		{name: "NATS_CONTEXT before the selected one", selected: "nowhere", env: map[string]string{"NATS_CONTEXT": "good"}},
		{name: "--context before NATS_CONTEXT", env: map[string]string{"NATS_CONTEXT": "nowhere"}, args: []string{"--context", "good"}},
		{name: "--context before NATS_URL", env: map[string]string{"NATS_URL": nowhere, "NATS_USER": "x"}, args: []string{"--context", "good"}},
		{name: "--server for --context", args: []string{"--context", "nowhere", "--server", plain}},
		{name: "--server without a context", selected: "good", args: []string{"--server", plain}, want: "refused the credentials"},
		{name: "NATS_USER", env: map[string]string{"NATS_URL": plain, "NATS_USER": user.User.Username(), "NATS_PASSWORD": password}},
		{name: "--user before the URL's", args: []string{"--server", withUser(good.url, "x", "y"), "--user", user.User.Username(), "--password-file", passwordFile}},
		{name: "--user before the context's", args: []string{"--context", "wrong", "--user", user.User.Username(), "--password", password}},
		{name: "unknown context", args: []string{"--context", "other"}, want: `no NATS context "other"; there are: good, nowhere, wrong`},
		{name: "no such file", env: map[string]string{"NATS_URL": plain, "NATS_CREDS": "/no/such/file"}, want: "credentials"},
		{name: "two kinds", args: []string{"--user", "a", "--creds", "b"}, want: "want one of them"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := bare(t)
			maps.Copy(b.env, tt.env)
			b.env["XDG_CONFIG_HOME"] = contexts(t, tt.selected)
			code, _, errs := b.run(append([]string{"dlq", "ops"}, tt.args...)...)
			if tt.want == "" && code != exitDone || tt.want != "" && (code == exitDone || !strings.Contains(errs, tt.want)) {
				t.Errorf("exit code %d, want error %q:\n%s", code, tt.want, errs)
			}
			if strings.Contains(errs, password) {
				t.Errorf("a password is printed: %s", errs)
			}
		})
	}
}

// The server only says what it has refused beside the request, which would time
// out.
func TestConnect_noPermission(t *testing.T) {
	t.Parallel()
	admin, guest := permitted(t, "$JS.API.STREAM.INFO.DLQ")
	nc, err := nats.Connect(admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	openStore(t, nc)
	b := bare(t)
	b.env["NATS_URL"] = guest
	// A request that is waited for takes longer than the test has patience.
	b.fails(exitFailed, []string{"no permission to publish to $JS.API.STREAM.INFO.DLQ", withoutUser(guest)}, "dlq", "ls", "--timeout", "1h")
}

// Who may read and not write is told so, once, and not after a timeout for each.
func TestConnect_noPermissionToWrite(t *testing.T) {
	t.Parallel()
	admin, guest := permitted(t, "monotel.dlq.>")
	nc, err := nats.Connect(admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	b := bare(t)
	b.js, b.store = openStore(t, nc)
	b.billing(never)
	b.captureMany(3)
	b.env["NATS_URL"] = guest
	b.ok("dlq", "ls")
	// What ended the request is in brackets: the refusal, and not its deadline.
	refused := []string{"no permission to publish to monotel.dlq.DLQ.ORDERS.billing.", "(refused by the server)"}
	b.fails(exitFailed, refused, "dlq", "discard", "--all", "--yes")
	b.fails(exitFailed, refused, "dlq", "replay", "--all", "--yes")
}

// Who may not list consumers and streams can replay, and is told what was not looked
// at.
func TestConnect_noPermissionToList(t *testing.T) {
	t.Parallel()
	admin, guest := permitted(t, "$JS.API.CONSUMER.LIST.>", "$JS.API.STREAM.LIST")
	nc, err := nats.Connect(admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	b := bare(t)
	b.js, b.store = openStore(t, nc)
	b.billing(never)
	b.captureMany(3)
	b.env["NATS_URL"] = guest
	out, _ := b.ok("dlq", "replay", "--all", "--dry-run")
	if !strings.Contains(out, "$JS.API.CONSUMER.LIST.ORDERS") {
		t.Errorf("the plan does not say that the consumers could not be listed:\n%s", out)
	}
	b.ok("dlq", "replay", "--all", "--yes", "--no-wait")
}

func TestConnect_noJetStream(t *testing.T) {
	t.Parallel()
	s, err := server.NewServer(&server.Options{Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true})
	if err != nil {
		t.Fatal(err)
	}
	b := bare(t)
	b.env["NATS_URL"] = withoutUser(started(t, s, "x"))
	b.fails(exitFailed, []string{"no JetStream at " + b.env["NATS_URL"]}, "dlq", "ls")
}

func TestConnect_noStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.fails(exitFailed, []string{`no dead-letter stream "OTHER"`, "these look like one: DLQ"}, "dlq", "ls", "--stream", "OTHER")
}

func TestCommandLine_hasNoSecret(t *testing.T) {
	t.Parallel()
	c := &cli{process: bare(t).process(nil, nil)}
	root := c.root()
	if err := root.PersistentFlags().Parse([]string{
		"--server", "nats://ada:s3cret@one:4222,two", "--user", "ada", "--password", "s3cret", "--js-domain", "hub", "--stream", "ORDERS DLQ",
	}); err != nil {
		t.Fatal(err)
	}
	got := c.commandLine("dlq", "replay", "--plan", "x'y")
	want := `monotel dlq replay --plan 'x'\''y' --server nats://one:4222,nats://two --user ada --js-domain hub --stream 'ORDERS DLQ'`
	if got != want {
		t.Errorf("command line is\n%s, want\n%s", got, want)
	}
}
