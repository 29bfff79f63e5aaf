// Package monotest runs an in-process NATS server with JetStream for tests, and
// Apps on it.
package monotest

import (
	"context"
	"crypto/rand"
	"net/url"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// Timeout bounds what the helpers wait for: a server to start, an App to stop.
const Timeout = 30 * time.Second

func timeout() (context.Context, context.CancelFunc) {
	// Not the test's context: that has ended when clean-up begins.
	return context.WithTimeout(context.Background(), Timeout) //nolint:forbidigo // see above
}

// A TestServer is a NATS server with JetStream on a loopback port, behind a
// password, with its streams in a folder that ends with the test.
type TestServer struct {
	tb     testing.TB
	cfg    embedded.Config
	server *embedded.Server // nil while stopped
}

// Server starts a server that is stopped when the test ends.
func Server(tb testing.TB) *TestServer {
	tb.Helper()
	return ServerWith(tb, embedded.Config{})
}

// ServerWith is Server with limits, names and so on of your own. StoreDir,
// Listen and Users default to a temporary folder, a free port of 127.0.0.1 and
// a user with a random password.
func ServerWith(tb testing.TB, cfg embedded.Config) *TestServer {
	tb.Helper()
	if cfg.StoreDir == "" {
		cfg.StoreDir = tb.TempDir()
	}
	if cfg.Listen == "" {
		cfg.Listen = "127.0.0.1:0"
	}
	if len(cfg.Users) == 0 && len(cfg.NKeys) == 0 {
		cfg.Users = []embedded.User{{Name: "test", Password: rand.Text()}}
	}
	s := &TestServer{tb: tb, cfg: cfg}
	s.Start()
	tb.Cleanup(s.Stop)
	return s
}

// URL returns the server's address with the first user's credentials. It stays
// the same when the server is stopped and started again.
func (s *TestServer) URL() string {
	u := url.URL{Scheme: "nats", Host: s.cfg.Listen}
	if len(s.cfg.Users) > 0 {
		u.User = url.UserPassword(s.cfg.Users[0].Name, s.cfg.Users[0].Password)
	}
	return u.String()
}

// StoreDir returns the folder with the server's streams.
func (s *TestServer) StoreDir() string { return s.cfg.StoreDir }

// Start starts the server after a Stop, on the same port and folder.
func (s *TestServer) Start() {
	s.tb.Helper()
	if s.server != nil {
		return
	}
	ctx, cancel := timeout()
	defer cancel()
	server, err := embedded.Start(ctx, s.cfg)
	if err != nil {
		s.tb.Fatalf("monotest: %v", err)
	}
	s.server = server
	u, err := url.Parse(server.URL())
	if err != nil {
		s.tb.Fatalf("monotest: %v", err)
	}
	s.cfg.Listen = u.Host // the same port next time
}

// Stop shuts the server down. Its streams stay in the folder.
func (s *TestServer) Stop() {
	s.tb.Helper()
	if s.server == nil {
		return
	}
	ctx, cancel := timeout()
	defer cancel()
	if err := s.server.Stop(ctx); err != nil {
		s.tb.Errorf("monotest: %v", err)
	}
	s.server = nil
}

// Conn connects to the server until the test ends.
func (s *TestServer) Conn(opts ...nats.Option) *nats.Conn {
	s.tb.Helper()
	// The client waits for two seconds by default, and so does the server for its
	// password: on a busy machine that is too little now and then.
	const tries, patience = 10, time.Minute
	opts = append([]nats.Option{nats.Timeout(patience)}, opts...)
	nc, err := nats.Connect(s.URL(), opts...)
	for n := 1; err != nil && n < tries; n++ {
		nc, err = nats.Connect(s.URL(), opts...)
	}
	if err != nil {
		s.tb.Fatalf("monotest: connect: %v", err)
	}
	s.tb.Cleanup(nc.Close)
	return nc
}

// App starts an App with the modules, on an embedded server without a port and
// with a folder of its own, and stops it when the test ends.
func App(tb testing.TB, modules ...mono.Module) *mono.App {
	tb.Helper()
	return AppWith(tb, []mono.Option{mono.WithStoreDir(tb.TempDir())}, modules...)
}

// AppWith is App with options of your own. Without WithNATS, WithStoreDir or
// WithEmbedded among them the App would use the folder data/nats.
func AppWith(tb testing.TB, opts []mono.Option, modules ...mono.Module) *mono.App {
	tb.Helper()
	app, err := mono.New(opts...)
	if err != nil {
		tb.Fatalf("monotest: %v", err)
	}
	if err := app.Register(modules...); err != nil {
		tb.Fatalf("monotest: %v", err)
	}
	start, cancel := timeout()
	defer cancel()
	if err := app.Start(start); err != nil {
		tb.Fatalf("monotest: %v", err)
	}
	tb.Cleanup(func() {
		stop, cancel := timeout()
		defer cancel()
		if err := app.Stop(stop); err != nil {
			tb.Errorf("monotest: %v", err)
		}
	})
	return app
}
