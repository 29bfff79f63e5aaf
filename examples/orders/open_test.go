package main

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/examples/orders/audit"
	"github.com/monotel/monotel/mono/monotest"
)

const patience = 3 * time.Minute

// An openShop is a run with -open whose orders are taken.
type openShop struct {
	out  *output
	file string // of the URL; empty if there is none

	interrupt context.CancelFunc
	ended     chan int
	stderr    bytes.Buffer // to be read when it has ended
}

// open runs the program until its orders are taken, and ends it with the test.
func open(t *testing.T, args ...string) *openShop {
	t.Helper()
	closed := make(chan struct{})
	s := &openShop{out: &output{text: "Ctrl-C ends.", seen: func() { close(closed) }}, ended: make(chan int, 1)}
	ctx, interrupt := context.WithCancel(t.Context())
	s.interrupt = interrupt
	go func() { s.ended <- run(ctx, args, s.out, &s.stderr) }()
	t.Cleanup(func() { s.stop(t) })
	select {
	case <-closed:
	case code := <-s.ended:
		s.ended <- code
		t.Fatalf("it has ended by itself\n%s\n%s", &s.stderr, s.out)
	case <-time.After(patience):
		t.Fatalf("the shop does not close\n%s", s.out)
	}
	if m := regexp.MustCompile(`"\$\(cat '(.*)'\)"|Get-Content '(.*)'`).FindStringSubmatch(s.out.String()); m != nil {
		s.file = m[1] + m[2]
	}
	return s
}

// stop interrupts the program and waits until it has ended.
func (s *openShop) stop(t *testing.T) {
	t.Helper()
	s.interrupt()
	select {
	case code := <-s.ended:
		s.ended <- code
		if code != exitOK {
			t.Errorf("exit code %d\n%s\n%s", code, &s.stderr, s.out)
		}
	case <-time.After(patience):
		t.Fatalf("it does not end\n%s", s.out)
	}
}

// url is what NATS_URL is to be.
func (s *openShop) url(t *testing.T) *url.URL {
	t.Helper()
	text, err := os.ReadFile(s.file)
	if err != nil {
		t.Fatalf("%v\n%s", err, s.out)
	}
	u, err := url.Parse(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return u
}

func connect(t *testing.T, url string) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect(url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// Whoever may read the file gets in, to what is told to be tried there; nobody else
// does, and nothing of it is left.
func TestRun_open(t *testing.T) {
	t.Parallel()
	store := filepath.Join(t.TempDir(), "or'ders")

	tests := []struct {
		name string
		args []string
	}{
		{name: "in a temporary folder", args: []string{"-open"}},
		{name: "in a folder", args: []string{"-open=localhost:0", "-store", store}},
	}
	// As a run leaves it that was killed, with what an older umask made of it.
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(store, "nats.url"), []byte("nats://orders:old@127.0.0.1:1"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := open(t, append(tt.args, "-for", "1s", "-rate", "20", "-v")...)
			s.file = strings.NewReplacer(`'\''`, "'", `''`, "'").Replace(s.file)
			info, err := os.Stat(s.file)
			if err != nil {
				t.Fatalf("%v\n%s", err, s.out)
			}
			if mode := info.Mode().Perm(); mode != 0o600 && runtime.GOOS != "windows" {
				t.Errorf("the file's mode is %v, others may read it", mode)
			}
			u := s.url(t)
			password, _ := u.User.Password()
			if len(password) < 20 {
				t.Errorf("the password has %d letters", len(password))
			}
			if u.Hostname() != "127.0.0.1" {
				t.Errorf("it listens on %q", u.Hostname())
			}

			seen := lookUp(t, u.String(), s.out.String())
			if seen.Reason == "" {
				t.Errorf("nothing is known of the dead letter: %+v", seen)
			}
			for _, who := range []*url.Userinfo{nil, url.UserPassword(u.User.Username(), "guess")} {
				stranger := url.URL{Scheme: u.Scheme, Host: u.Host, User: who}
				nc, err := nats.Connect(stranger.String())
				if !errors.Is(err, nats.ErrAuthorization) {
					t.Errorf("a stranger gets in, or %v", err)
				}
				if nc != nil {
					nc.Close()
				}
			}

			s.stop(t)
			if _, err := os.Stat(s.file); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the file is still there, or %v", err)
			}
			if strings.Contains(s.out.String()+s.stderr.String(), password) {
				t.Error("the password is shown")
			}
			if sum := readSummary(t, s.out.String()); sum["found"]+sum["handled elsewhere"] > 0 {
				t.Errorf("the summary has what nobody did\n%s", s.out)
			}
			if _, end, _ := strings.Cut(s.out.String(), "\nSummary after "); strings.Contains(end, "go run") {
				t.Errorf("the end says what to try where nothing runs any more\n%s", end)
			}
		})
	}
}

// lookUp returns the dead letter whose ID the program has told.
func lookUp(t *testing.T, url, out string) *dlq.Record {
	t.Helper()
	m := regexp.MustCompile(`(?m)^ {2}go run ./cmd/monotel dlq show (\w+)$`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("no dead letter to be shown\n%s", out)
	}
	js, err := jetstream.New(connect(t, url))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	msg, err := stream.GetLastMsgForSubject(t.Context(), "monotel.dlq.DLQ.*.*."+m[1])
	if err != nil {
		t.Fatalf("dead letter %q: %v", m[1], err)
	}
	r, err := dlq.Decode(msg.Header, msg.Data)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// A second run on the same folder does not take the first one's file away.
func TestRun_openTwice(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	s := open(t, "-open", "-store", store, "-for", "1ms")
	before := s.url(t).String()
	var stdout, stderr bytes.Buffer
	if code := run(t.Context(), []string{"-open", "-store", store}, &stdout, &stderr); code != exitFailed {
		t.Errorf("exit code %d\n%s", code, &stdout)
	}
	if !strings.Contains(stderr.String(), "in use") {
		t.Errorf("standard error is %q", &stderr)
	}
	if s.url(t).String() != before {
		t.Error("the file is not the first run's any more")
	}
}

// A replay that nobody has handled yet is of an order that was counted before.
func TestRun_openReplayWaits(t *testing.T) {
	t.Parallel()
	s := open(t, "-open", "-for", "1ms")
	js, err := jetstream.New(connect(t, s.url(t).String()))
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.Stream(t.Context(), audit.Stream)
	if err != nil {
		t.Fatal(err)
	}
	subject := dlq.ReplaySubject(audit.Stream, "nobody", "a", "b")
	config := stream.CachedInfo().Config
	config.Subjects = append(config.Subjects, subject)
	if _, err := js.UpdateStream(t.Context(), config); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), subject, nil); err != nil {
		t.Fatal(err)
	}
	s.stop(t)
	if sum := readSummary(t, s.out.String()); sum["still waiting"]+sum["found"] > 0 {
		t.Errorf("the replay is counted as an order\n%s", s.out)
	}
}

// On a server of the user's, -open only stays.
func TestRun_openServer(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t).URL()
	s := open(t, "-open", "-server", server, "-for", "1s", "-rate", "20")
	if r := lookUp(t, server, s.out.String()); r.Reason == "" {
		t.Errorf("nothing is known of the dead letter: %+v", r)
	}
	if s.file != "" {
		t.Errorf("it has written %q", s.file)
	}
	s.stop(t)
	if strings.Contains(s.out.String(), passwordOf(t, []string{server})) {
		t.Error("the password is shown")
	}
}

func TestParse_open(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		give []string
		stay bool
		want string
	}{
		{name: "not asked for"},
		{name: "alone", give: []string{"-open"}, stay: true, want: "127.0.0.1:0"},
		{name: "refused", give: []string{"-open=false"}},
		{name: "port", give: []string{"-open=:4222"}, stay: true, want: "127.0.0.1:4222"},
		{name: "name", give: []string{"-open=localhost:0"}, stay: true, want: "127.0.0.1:0"},
		{name: "another loopback address", give: []string{"-open=127.1.2.3:4222"}, stay: true, want: "127.1.2.3:4222"},
		{name: "IPv6", give: []string{"-open=[::1]:4222"}, stay: true, want: "[::1]:4222"},
		{name: "server", give: []string{"-open", "-server", "nats://localhost"}, stay: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			o, err := parse(tt.give)
			if err != nil {
				t.Fatal(err)
			}
			if o.stay != tt.stay || o.listen != tt.want {
				t.Errorf("stay is %v and listen %q, want %v and %q", o.stay, o.listen, tt.stay, tt.want)
			}
		})
	}
}

func TestConnectLine(t *testing.T) {
	t.Parallel()
	if runtime.GOOS == "windows" {
		t.Skip("the lines are those of another shell")
	}

	tests := []struct {
		name string
		give options
		door *door
		want string
	}{
		{name: "embedded"},
		{name: "door", door: &door{file: "/tmp/or ders/nats.url"}, want: `export NATS_URL="$(cat '/tmp/or ders/nats.url')"`},
		{name: "server", give: options{server: "tls://a:4222,b"}, want: "export NATS_URL='tls://a:4222,b'"},
		{name: "server with a password", give: options{server: "nats://a,nats://u:secret@b"}, want: "set NATS_URL to the URL you gave to -server"},
		{name: "server with a token", give: options{server: "secret@a"}, want: "set NATS_URL to the URL you gave to -server"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := connectLine(tt.give, tt.door); got != tt.want {
				t.Errorf("connectLine = %q, want %q", got, tt.want)
			}
		})
	}
}
