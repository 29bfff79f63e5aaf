package embedded_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/nats-io/nkeys"

	"github.com/monotel/monotel/mono/embedded"
)

// patience bounds every wait of a test.
const patience = 3 * time.Minute

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// start starts a server that is stopped when the test ends.
func start(t *testing.T, cfg embedded.Config) *embedded.Server {
	t.Helper()
	if cfg.StoreDir == "" {
		cfg.StoreDir = t.TempDir()
	}
	s, err := embedded.Start(within(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := s.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
	return s
}

// inProcess connects without a port.
func inProcess(t *testing.T, s *embedded.Server) *nats.Conn {
	t.Helper()
	nc, err := nats.Connect("", s.ConnectOptions()...)
	if err != nil {
		t.Fatalf("connect in process: %v", err)
	}
	t.Cleanup(nc.Close)
	return nc
}

// wantError checks that err is what callers test for, and that its text says
// what is wrong and where. Any error will do when want is nil.
func wantError(t *testing.T, err, want error, parts ...string) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("got error %v, want one that is %v", err, want)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}

var alice = []embedded.User{{Name: "alice", Password: "open sesame"}}

func TestConfig_Validate(t *testing.T) {
	t.Parallel()
	key := userKey(t)
	public, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name string
		give embedded.Config
		want error // nil: valid, when say is nil as well
		say  []string
	}{
		{name: "zero value", give: embedded.Config{}},
		{name: "limits", give: embedded.Config{MaxStore: 1, MaxMemory: 1, MaxPayload: 8 << 20, SyncAlways: true}},
		{name: "users", give: embedded.Config{Listen: "127.0.0.1:0", Users: alice}},
		{name: "nkeys", give: embedded.Config{Listen: "[::1]:4222", NKeys: []string{public}}},
		{name: "every interface", give: embedded.Config{Listen: "0.0.0.0:65535", Users: alice, TLS: &tls.Config{MinVersion: tls.VersionTLS13}}},
		{name: "negative store", give: embedded.Config{MaxStore: -1}, say: []string{"MaxStore is -1"}},
		{name: "negative memory", give: embedded.Config{MaxMemory: -1}, say: []string{"MaxMemory is -1"}},
		{name: "negative payload", give: embedded.Config{MaxPayload: -1}, say: []string{"MaxPayload is -1", "8388608"}},
		{name: "large payload", give: embedded.Config{MaxPayload: 8<<20 + 1}, say: []string{"MaxPayload is 8388609", "at most 8388608"}},
		{
			name: "listening without authentication", give: embedded.Config{Listen: "127.0.0.1:0"},
			want: embedded.ErrNoAuthentication, say: []string{`Listen is "127.0.0.1:0"`, "set Users or NKeys"},
		},
		{
			name: "TLS is no authentication", give: embedded.Config{Listen: "127.0.0.1:0", TLS: &tls.Config{MinVersion: tls.VersionTLS13}},
			want: embedded.ErrNoAuthentication, say: []string{"Listen"},
		},
		{name: "no port", give: embedded.Config{Listen: "127.0.0.1", Users: alice}, say: []string{"Listen", `"127.0.0.1"`, "want host:port"}},
		{name: "no host", give: embedded.Config{Listen: ":4222", Users: alice}, say: []string{`":4222"`, "name the host", "0.0.0.0"}},
		{name: "port that is no number", give: embedded.Config{Listen: "a:b", Users: alice}, say: []string{`"a:b"`, "0 to 65535"}},
		{name: "port too large", give: embedded.Config{Listen: "a:65536", Users: alice}, say: []string{`"a:65536"`, "0 to 65535"}},
		{name: "negative port", give: embedded.Config{Listen: "a:-1", Users: alice}, say: []string{`"a:-1"`}},
		{name: "users without Listen", give: embedded.Config{Users: alice}, say: []string{"set Listen"}},
		{name: "nkeys without Listen", give: embedded.Config{NKeys: []string{public}}, say: []string{"set Listen"}},
		{name: "TLS without Listen", give: embedded.Config{TLS: &tls.Config{MinVersion: tls.VersionTLS13}}, say: []string{"set Listen"}},
		{
			name: "user without a name", give: embedded.Config{Listen: "a:1", Users: []embedded.User{{Password: "s3cret"}}},
			want: embedded.ErrNoAuthentication, say: []string{"Users[0]", "must not be empty"},
		},
		{
			name: "user without a password", give: embedded.Config{Listen: "a:1", Users: []embedded.User{alice[0], {Name: "bob"}}},
			want: embedded.ErrNoAuthentication, say: []string{"Users[1]"},
		},
		{
			name: "user twice", give: embedded.Config{Listen: "a:1", Users: []embedded.User{alice[0], {Name: "alice", Password: "s3cret"}}},
			say: []string{"Users[1]", `"alice"`, "twice"},
		},
		{name: "no nkey", give: embedded.Config{Listen: "a:1", NKeys: []string{public, "UABC"}}, say: []string{"NKeys[1]", "public user key"}},
		{name: "private nkey", give: embedded.Config{Listen: "a:1", NKeys: []string{seed(t, key)}}, say: []string{"NKeys[0]"}},
		{
			name: "everything at once",
			give: embedded.Config{
				MaxStore: -1, MaxMemory: -1, MaxPayload: -1, Listen: "x", Users: []embedded.User{{}}, NKeys: []string{"y"},
			},
			want: embedded.ErrNoAuthentication, say: []string{"MaxStore", "MaxMemory", "MaxPayload", "Listen", "Users[0]", "NKeys[0]"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := tt.give.Validate()
			if tt.want == nil && tt.say == nil {
				if err != nil {
					t.Errorf("Validate = %v, want nil", err)
				}
				return
			}
			wantError(t, err, tt.want, tt.say...)
			if err != nil && (strings.Contains(err.Error(), "s3cret") || strings.Contains(err.Error(), seed(t, key))) {
				t.Errorf("error %q tells a secret", err)
			}
			// Start refuses it before it does anything.
			dir := filepath.Join(t.TempDir(), "store")
			cfg := tt.give
			cfg.StoreDir = dir
			_, startErr := embedded.Start(within(t), cfg)
			wantError(t, startErr, tt.want, append(tt.say, "start embedded NATS")...)
			if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the folder was made all the same: %v", err)
			}
		})
	}
}

func userKey(t *testing.T) nkeys.KeyPair {
	t.Helper()
	key, err := nkeys.CreateUser()
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func seed(t *testing.T, key nkeys.KeyPair) string {
	t.Helper()
	s, err := key.Seed()
	if err != nil {
		t.Fatal(err)
	}
	return string(s)
}

func TestStart_needsFolder(t *testing.T) {
	t.Parallel()
	_, err := embedded.Start(within(t), embedded.Config{})
	wantError(t, err, nil, "start embedded NATS", "StoreDir is empty")
}

// The plain server: no port, no authentication, JetStream in its folder.
func TestStart(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "deep", "store")
	s := start(t, embedded.Config{StoreDir: dir})
	if got := s.URL(); got != "" {
		t.Errorf("a server without a port has the URL %q", got)
	}
	if err := s.Health(); err != nil {
		t.Errorf("Health = %v", err)
	}
	nc := inProcess(t, s)
	if got := nc.ConnectedServerName(); got != "monotel" {
		t.Errorf("the server's name is %q, want monotel", got)
	}
	store(t, nc, "events", 3)
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if mode := info.Mode().Perm(); mode&0o077 != 0 {
		t.Errorf("the folder's mode is %v: others may look into it", mode)
	}
	if _, err := os.Stat(filepath.Join(dir, "jetstream")); err != nil {
		t.Error(err)
	}
}

// store makes a stream, or finds it, and stores n messages in it.
func store(t *testing.T, nc *nats.Conn, name string, n int) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.CreateOrUpdateStream(within(t), jetstream.StreamConfig{Name: name, Subjects: []string{name}, MaxBytes: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	for range n {
		if _, err := js.Publish(within(t), name, []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
}

func stored(t *testing.T, nc *nats.Conn, name string) uint64 {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	s, err := js.Stream(within(t), name)
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo().State.Msgs
}

// What is stored survives the server.
func TestStart_again(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for round := range 3 {
		s, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
		if err != nil {
			t.Fatal(err)
		}
		nc := inProcess(t, s)
		store(t, nc, "events", 2)
		if got, want := stored(t, nc, "events"), uint64(2*(round+1)); got != want {
			t.Errorf("%d messages after start %d, want %d", got, round+1, want)
		}
		nc.Close()
		if err := s.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestStart_limits(t *testing.T) {
	t.Parallel()
	s := start(t, embedded.Config{Name: "small", MaxStore: 10 << 20, MaxMemory: 5 << 20, MaxPayload: 2048})
	nc := inProcess(t, s)
	if got := nc.ConnectedServerName(); got != "small" {
		t.Errorf("the server's name is %q, want small", got)
	}
	if got := nc.MaxPayload(); got != 2048 {
		t.Errorf("max_payload is %d, want 2048", got)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		storage  jetstream.StorageType
		maxBytes int64
		fits     bool
	}{
		{"file that fits", jetstream.FileStorage, 10 << 20, true},
		{"file beyond MaxStore", jetstream.FileStorage, 10<<20 + 1, false},
		{"memory that fits", jetstream.MemoryStorage, 5 << 20, true},
		{"memory beyond MaxMemory", jetstream.MemoryStorage, 5<<20 + 1, false},
	} {
		_, err := js.CreateStream(within(t), jetstream.StreamConfig{Name: "limited", Subjects: []string{"limited"}, Storage: tt.storage, MaxBytes: tt.maxBytes})
		if (err == nil) != tt.fits {
			t.Errorf("a stream in %s: %v, want it to fit: %v", tt.name, err, tt.fits)
		}
		if err == nil {
			if err := js.DeleteStream(within(t), "limited"); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// One server at a time uses a folder.
func TestStart_storeInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	first := start(t, embedded.Config{StoreDir: dir})
	_, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
	wantError(t, err, embedded.ErrStoreInUse, dir, "give each its own folder")
	if err := first.Health(); err != nil {
		t.Errorf("the first server suffers: %v", err)
	}
	if err := first.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	start(t, embedded.Config{StoreDir: dir})
}

// The lock holds between processes too, and ends with a process, however that
// ends.
func TestStart_storeInUseByAnotherProcess(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	child, said := startChild(t, dir)
	if said != "running" {
		t.Fatalf("the other process says %q", said)
	}
	_, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
	wantError(t, err, embedded.ErrStoreInUse, dir)

	if err := child.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = child.Wait() // it tells that it was killed
	start(t, embedded.Config{StoreDir: dir})

	_, said = startChild(t, dir)
	if !strings.Contains(said, embedded.ErrStoreInUse.Error()) || !strings.Contains(said, dir) {
		t.Errorf("the other process says %q", said)
	}
}

// startChild runs this test binary as a process with a server on the folder,
// and returns the first line that it says.
func startChild(t *testing.T, dir string) (child *exec.Cmd, said string) {
	t.Helper()
	child = exec.CommandContext(within(t), os.Args[0])
	child.Env = append(os.Environ(), holdStore+"="+dir)
	in, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		if child.ProcessState == nil {
			_ = child.Wait()
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatalf("the other process says nothing: %v", err)
	}
	return child, strings.TrimSpace(line)
}

func TestStart_unusableFolder(t *testing.T) {
	t.Parallel()
	t.Run("a file", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := embedded.Start(within(t), embedded.Config{StoreDir: file})
		wantError(t, err, nil, "start embedded NATS in", file)
	})
	t.Run("below a file", func(t *testing.T) {
		t.Parallel()
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := embedded.Start(within(t), embedded.Config{StoreDir: filepath.Join(file, "store")})
		wantError(t, err, nil, "start embedded NATS in", file)
	})
	t.Run("one whose store cannot be made", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		obstacle := filepath.Join(dir, "jetstream")
		if err := os.WriteFile(obstacle, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
		wantError(t, err, nil, "start embedded NATS in", dir)
		// And the folder is free again, for when it is repaired.
		if err := os.Remove(obstacle); err != nil {
			t.Fatal(err)
		}
		start(t, embedded.Config{StoreDir: dir})
	})
}

func TestStart_endedContext(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	reason := errors.New("the user went home")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	s, err := embedded.Start(ctx, embedded.Config{StoreDir: dir})
	if s != nil {
		t.Error("Start returns a server beside its error")
	}
	wantError(t, err, reason, "start embedded NATS in", dir)

	// The folder is free again before long.
	deadline := time.Now().Add(patience)
	for tick := time.Tick(10 * time.Millisecond); ; <-tick {
		s, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
		if err == nil {
			if err := s.Stop(within(t)); err != nil {
				t.Error(err)
			}
			return
		}
		if !errors.Is(err, embedded.ErrStoreInUse) || time.Now().After(deadline) {
			t.Fatalf("start after one that was cut short: %v", err)
		}
	}
}

func TestStart_portInUse(t *testing.T) {
	t.Parallel()
	l, err := (&net.ListenConfig{}).Listen(within(t), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	dir := t.TempDir()
	_, err = embedded.Start(within(t), embedded.Config{StoreDir: dir, Listen: l.Addr().String(), Users: alice})
	wantError(t, err, nil, "start embedded NATS in", dir, l.Addr().String())
	start(t, embedded.Config{StoreDir: dir}) // the folder is free again
}

// login connects over the port.
func login(t *testing.T, s *embedded.Server, opts ...nats.Option) error {
	t.Helper()
	nc, err := nats.Connect(s.URL(), append(opts, nats.NoReconnect())...)
	if err != nil {
		return err
	}
	defer nc.Close()
	store(t, nc, "logins", 1)
	return nil
}

func TestListen(t *testing.T) {
	t.Parallel()
	const hash = "$2a$04$5bmkJ1yOza0yG2xwmT4xuej5XqxEqWVhjBxfmzjuuxgJ9aC.Jq7mi" // of "open sesame"
	key, stranger := userKey(t), userKey(t)
	public, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	log := &logBuffer{}
	s := start(t, embedded.Config{
		Listen: "127.0.0.1:0",
		Users:  []embedded.User{{Name: "plain", Password: "open sesame"}, {Name: "hashed", Password: hash}},
		NKeys:  []string{public},
		Logger: slog.New(slog.NewTextHandler(log, nil)),
	})
	u, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	if u.Hostname() != "127.0.0.1" || u.Port() == "" || u.Port() == "0" || u.User != nil {
		t.Errorf("the URL is %q, want host and port and nothing else", s.URL())
	}

	withKey := func(pair nkeys.KeyPair) nats.Option {
		public, err := pair.PublicKey()
		if err != nil {
			t.Fatal(err)
		}
		return nats.Nkey(public, func(nonce []byte) ([]byte, error) { return pair.Sign(nonce) })
	}
	for _, tt := range []struct {
		name string
		opts []nats.Option
		want error
	}{
		{"password", []nats.Option{nats.UserInfo("plain", "open sesame")}, nil},
		{"password with a hash", []nats.Option{nats.UserInfo("hashed", "open sesame")}, nil},
		{"nkey", []nats.Option{withKey(key)}, nil},
		{"nobody", nil, nats.ErrAuthorization},
		{"wrong password", []nats.Option{nats.UserInfo("plain", "open s3cret")}, nats.ErrAuthorization},
		{"wrong password for a hash", []nats.Option{nats.UserInfo("hashed", "open s3cret")}, nats.ErrAuthorization},
		{"the hash for a password", []nats.Option{nats.UserInfo("hashed", hash)}, nats.ErrAuthorization},
		{"empty password", []nats.Option{nats.UserInfo("plain", "")}, nats.ErrAuthorization},
		{"unknown user", []nats.Option{nats.UserInfo("mallory", "open sesame")}, nats.ErrAuthorization},
		{"a token", []nats.Option{nats.Token("open sesame")}, nats.ErrAuthorization},
		{"unknown nkey", []nats.Option{withKey(stranger)}, nats.ErrAuthorization},
	} {
		if err := login(t, s, tt.opts...); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
		}
	}
	// The process itself needs no port and no password of the user's.
	if got := stored(t, inProcess(t, s), "logins"); got != 3 {
		t.Errorf("%d of 3 logins are stored", got)
	}
	if text := log.String(); !strings.Contains(text, "authentication error") {
		t.Errorf("the log does not tell of failed logins:\n%s", text)
	}
	if text := log.String(); strings.Contains(text, "s3cret") || strings.Contains(text, "sesame") || strings.Contains(text, hash) {
		t.Errorf("the log tells a password:\n%s", text)
	}
}

func TestListen_tls(t *testing.T) {
	t.Parallel()
	cert, roots := selfSigned(t)
	s := start(t, embedded.Config{
		Listen: "127.0.0.1:0", Users: alice,
		TLS: &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13},
	})
	trusting := nats.Secure(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS13})
	wary := nats.Secure(&tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS13})
	if !strings.HasPrefix(s.URL(), "tls://") {
		t.Errorf("the URL is %q, want one that says TLS", s.URL())
	}

	if err := login(t, s, nats.UserInfo("alice", "open sesame"), trusting); err != nil {
		t.Errorf("log in over TLS: %v", err)
	}
	wantError(t, login(t, s, nats.UserInfo("alice", "wrong"), trusting), nats.ErrAuthorization)
	if _, ok := errors.AsType[*tls.CertificateVerificationError](login(t, s, nats.UserInfo("alice", "open sesame"), wary)); !ok {
		t.Error("a client that does not know the certificate got in, or failed otherwise")
	}
	plain, err := url.Parse(s.URL())
	if err != nil {
		t.Fatal(err)
	}
	plain.Scheme = "nats"
	if nc, err := nats.Connect(plain.String(), nats.UserInfo("alice", "open sesame"), nats.NoReconnect()); err == nil {
		nc.Close()
		t.Error("a client without TLS and without the certificate got in")
	}
	if got := stored(t, inProcess(t, s), "logins"); got != 1 {
		t.Errorf("%d logins are stored, want 1", got)
	}
}

// selfSigned makes a certificate for 127.0.0.1, and the pool that trusts it.
func selfSigned(t *testing.T) (tls.Certificate, *x509.CertPool) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "monotel test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(parsed)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, roots
}

func TestServer_Stop(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, err := embedded.Start(within(t), embedded.Config{StoreDir: dir})
	if err != nil {
		t.Fatal(err)
	}
	reason := errors.New("in a hurry")
	ended, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	// It may be done in time, for a server without streams.
	if err := s.Stop(ended); err != nil {
		wantError(t, err, reason, "stop embedded NATS")
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if err := s.Stop(within(t)); err != nil {
				t.Errorf("a further Stop: %v", err)
			}
		})
	}
	all.Wait()
	if err := s.Stop(within(t)); err != nil {
		t.Errorf("a late Stop: %v", err)
	}
	start(t, embedded.Config{StoreDir: dir}) // the folder is free
	if err := s.Health(); err == nil {
		t.Error("a stopped server is healthy")
	}
}

// Stop does not wait for clients to go.
func TestServer_Stop_withClients(t *testing.T) {
	t.Parallel()
	s := start(t, embedded.Config{Listen: "127.0.0.1:0", Users: alice})
	closed := make(chan struct{})
	nc, err := nats.Connect(s.URL(), nats.UserInfo("alice", "open sesame"), nats.NoReconnect(),
		nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	inProcess(t, s)
	if err := s.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-closed:
	case <-time.After(patience):
		t.Error("the client's connection is still open")
	}
}

// A port that others reach without TLS was opened without a word.
func TestStart_warnsWithoutTLS(t *testing.T) {
	t.Parallel()
	ips, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	type test struct {
		listen string
		tls    bool
		warns  bool
	}
	tests := []test{
		{listen: "0.0.0.0:0", warns: true},
		{listen: "[::]:0", warns: true},
		{listen: "[::ffff:0.0.0.0]:0", warns: true},
		{listen: "0.0.0.0:0", tls: true},
		{listen: "127.0.0.1:0"},
		{listen: "127.8.9.1:0"},
		{listen: "localhost:0"},
		{listen: "[::1]:0"},
		{listen: "[::ffff:127.0.0.1]:0"},
		{},
	}
	for _, a := range ips { // those of this machine
		if ip, ok := a.(*net.IPNet); ok && !ip.IP.IsLoopback() && !ip.IP.IsLinkLocalUnicast() {
			tests = append(tests, test{listen: net.JoinHostPort(ip.IP.String(), "0"), warns: true})
		}
	}
	if name, err := os.Hostname(); err == nil {
		if found, err := (&net.Resolver{}).LookupIPAddr(within(t), name); err == nil && len(found) == 1 {
			tests = append(tests, test{listen: net.JoinHostPort(name, "0"), warns: !found[0].IP.IsLoopback()})
		}
	}
	for _, tt := range tests {
		t.Run(fmt.Sprint(tt.listen, tt.tls), func(t *testing.T) {
			t.Parallel()
			if l, err := (&net.ListenConfig{}).Listen(within(t), "tcp", tt.listen); tt.listen != "" && err != nil {
				t.Skipf("NOT CHECKED: this machine cannot listen on %q, such as without IPv6: %v", tt.listen, err)
			} else if err == nil {
				_ = l.Close()
			}
			log := &logBuffer{}
			cfg := embedded.Config{Listen: tt.listen, Logger: slog.New(slog.NewTextHandler(log, &slog.HandlerOptions{Level: slog.LevelWarn}))}
			if tt.listen != "" {
				cfg.Users = []embedded.User{{Name: "alice", Password: "$2a$04$5bmkJ1yOza0yG2xwmT4xuej5XqxEqWVhjBxfmzjuuxgJ9aC.Jq7mi"}}
			}
			if tt.tls {
				cert, _ := selfSigned(t)
				cfg.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13}
			}
			start(t, cfg)
			if got := strings.Contains(log.String(), "without TLS"); got != tt.warns || got && !strings.Contains(log.String(), tt.listen) {
				t.Errorf("Listen %q: warns %t, want %t:\n%s", tt.listen, got, tt.warns, log)
			}
		})
	}
}

// A logBuffer collects log lines. It is safe for concurrent use.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}
