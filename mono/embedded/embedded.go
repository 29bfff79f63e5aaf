// Package embedded runs a NATS server with JetStream inside the process.
//
// An App of package mono starts one by itself unless it is given a server's
// URL; use this package directly only to configure that server, through
// mono.WithEmbedded, or to run one without an App. It is the one package that
// imports nats-server.
package embedded

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/gofrs/flock"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"
)

// ErrStoreInUse reports a store folder that another process, or another server
// of this process, is using. Two servers on one folder would destroy it.
var ErrStoreInUse = errors.New("store folder is in use")

// ErrNoAuthentication reports a server that was asked to listen on a port
// without users or nkeys.
var ErrNoAuthentication = errors.New("listening needs authentication")

// A User may connect to the listening port with a name and a password, and may
// do everything there.
type User struct {
	Name     string
	Password string // plain, or a bcrypt hash as "nats server passwd" makes it
}

// Config configures a server. The zero value, with a StoreDir, is a server
// without a port that keeps its streams in that folder.
type Config struct {
	// Name is the server's name. The default is "monotel".
	Name string

	// StoreDir is the folder for streams, made when it is missing. It is
	// required here; an App's default is "data/nats".
	StoreDir string

	// MaxStore and MaxMemory bound what file and memory streams may hold
	// together, in bytes. The defaults are the server's: the free space of the
	// disk, and three quarters of the memory.
	MaxStore  int64
	MaxMemory int64

	// MaxPayload is the largest message in bytes. The default is 1 MiB.
	MaxPayload int32

	// SyncAlways syncs every write to the disk before it is acknowledged, at
	// about half a millisecond a message. Without it an acknowledged message
	// survives the end of the process at once, and the loss of power after at
	// most two minutes, when the server syncs by itself.
	SyncAlways bool

	// Listen is the address for other processes, such as "127.0.0.1:4222"; port
	// 0 takes a free one. The default is no port at all. It needs Users or NKeys.
	Listen string

	// Users and NKeys, public user keys such as "UB…", may connect to Listen.
	Users []User
	NKeys []string

	// TLS encrypts Listen. Use it on every address but loopback: without it there
	// is a warning.
	TLS *tls.Config

	// Logger receives the server's warnings and errors. The default is none.
	Logger *slog.Logger
}

// Validate reports every problem at once. StoreDir is not checked, since an App
// gives it a default.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if c.MaxStore < 0 {
		bad("MaxStore is %d, want 0 for the default or a size in bytes", c.MaxStore)
	}
	if c.MaxMemory < 0 {
		bad("MaxMemory is %d, want 0 for the default or a size in bytes", c.MaxMemory)
	}
	if c.MaxPayload < 0 || c.MaxPayload > server.MAX_PAYLOAD_MAX_SIZE {
		bad("MaxPayload is %d, want at most %d bytes", c.MaxPayload, server.MAX_PAYLOAD_MAX_SIZE)
	}
	if c.Listen == "" {
		if len(c.Users) > 0 || len(c.NKeys) > 0 || c.TLS != nil {
			bad("Users, NKeys and TLS are for a listening server: set Listen")
		}
	} else {
		if _, _, err := splitAddress(c.Listen); err != nil {
			bad("Listen: %w", err)
		}
		if len(c.Users) == 0 && len(c.NKeys) == 0 {
			bad("Listen is %q: %w: set Users or NKeys", c.Listen, ErrNoAuthentication)
		}
	}
	seen := make(map[string]bool)
	for i, u := range c.Users {
		switch {
		case u.Name == "" || u.Password == "":
			bad("Users[%d]: %w: name and password must not be empty", i, ErrNoAuthentication)
		case seen[u.Name]:
			bad("Users[%d]: %q is given twice", i, u.Name)
		}
		seen[u.Name] = true
	}
	for i, k := range c.NKeys {
		if !nkeys.IsValidPublicUserKey(k) {
			bad("NKeys[%d]: not a public user key (they start with \"U\")", i)
		}
	}
	return errors.Join(errs...)
}

func splitAddress(addr string) (host string, port int, err error) {
	host, p, err := net.SplitHostPort(addr)
	if err != nil {
		return "", 0, fmt.Errorf("%q: want host:port, such as \"127.0.0.1:4222\"", addr)
	}
	if host == "" {
		return "", 0, fmt.Errorf("%q: name the host to listen on; \"0.0.0.0\" is every interface", addr)
	}
	port, err = strconv.Atoi(p)
	if err != nil || port < 0 || port > 65535 {
		return "", 0, fmt.Errorf("%q: port must be 0 to 65535", addr)
	}
	return host, port, nil
}

// A Server is a running NATS server. Its methods are safe for concurrent use.
type Server struct {
	srv      *server.Server
	lock     *flock.Flock
	internal *server.User // how this process logs in; nil without authentication
	stop     sync.Once
	stopErr  error
	stopped  chan struct{}
}

// Start starts a server and waits until it accepts connections, or until ctx
// ends. It returns [ErrStoreInUse] when another server uses the folder and goes
// on doing so for 2 s.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("start embedded NATS: %w", err)
	}
	if cfg.StoreDir == "" {
		return nil, errors.New("start embedded NATS: StoreDir is empty: name the folder for streams")
	}
	s, err := start(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("start embedded NATS in %q: %w", cfg.StoreDir, err)
	}
	return s, nil
}

func start(ctx context.Context, cfg Config) (*Server, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	s := &Server{stopped: make(chan struct{})}
	opts, err := s.options(cfg)
	if err != nil {
		return nil, err
	}
	if s.lock, err = lockDir(ctx, cfg.StoreDir); err != nil {
		return nil, err
	}
	if s.srv, err = server.NewServer(opts); err != nil {
		return nil, errors.Join(err, s.lock.Unlock())
	}
	log := &logger{log: cfg.Logger, fatal: make(chan error, 1)}
	if log.log == nil {
		log.log = slog.New(slog.DiscardHandler)
	}
	s.srv.SetLoggerV2(log, false, false, false)
	ready := make(chan error, 1)
	go func() { ready <- s.becomeReady(log.fatal) }()
	select {
	case err = <-ready:
	case <-ctx.Done():
		// Restoring large streams takes its time and cannot be cut short. The
		// folder stays locked until that is over.
		go func() {
			if <-ready == nil {
				s.shutDown()
			}
			_ = s.lock.Unlock() // nobody is left to tell
		}()
		return nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, s.lock.Unlock())
	}
	if cfg.Listen != "" && cfg.TLS == nil && !isLoopback(s.srv.Addr()) {
		log.log.WarnContext(ctx, "embedded NATS server listens without TLS: set TLS, or listen on a loopback address; "+
			"passwords and messages can be read on the network", slog.String("listen", cfg.Listen))
	}
	return s, nil
}

// isLoopback reports whether only this machine reaches an address.
func isLoopback(addr net.Addr) bool {
	tcp, ok := addr.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}

// becomeReady starts the server and waits until it can be used. When it cannot,
// it is shut down.
func (s *Server) becomeReady(fatal <-chan error) error {
	const poll = 10 * time.Millisecond
	s.srv.Start()
	for {
		ready := s.srv.ReadyForConnections(poll)
		select {
		case err := <-fatal: // also a store that cannot be read, while the port is ready
			s.shutDown()
			return err
		default:
		}
		if ready {
			return nil
		}
	}
}

func (s *Server) shutDown() {
	s.srv.Shutdown()
	s.srv.WaitForShutdown()
}

func (s *Server) options(cfg Config) (*server.Options, error) {
	if cfg.Name == "" {
		cfg.Name = "monotel"
	}
	opts := &server.Options{
		ServerName:         cfg.Name,
		JetStream:          true,
		StoreDir:           cfg.StoreDir,
		JetStreamMaxStore:  cfg.MaxStore,
		JetStreamMaxMemory: cfg.MaxMemory,
		MaxPayload:         cfg.MaxPayload,
		SyncAlways:         cfg.SyncAlways,
		DontListen:         cfg.Listen == "",
		NoSigs:             true,
	}
	if cfg.Listen == "" {
		return opts, nil
	}
	host, port, err := splitAddress(cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if port == 0 {
		port = server.RANDOM_PORT
	}
	opts.Host, opts.Port = host, port
	if cfg.TLS != nil {
		opts.TLS, opts.TLSConfig, opts.TLSTimeout = true, cfg.TLS.Clone(), server.TLS_TIMEOUT.Seconds()
	}
	for _, u := range cfg.Users {
		opts.Users = append(opts.Users, &server.User{Username: u.Name, Password: u.Password})
	}
	for _, k := range cfg.NKeys {
		opts.Nkeys = append(opts.Nkeys, &server.NkeyUser{Nkey: k})
	}
	// With authentication on, in-process clients have to log in as well.
	s.internal = &server.User{Username: "_in_process_" + rand.Text(), Password: rand.Text()}
	opts.Users = append(opts.Users, s.internal)
	return opts, nil
}

// lockDir makes the folder and takes its lock, which ends with the process. It
// waits a moment for a predecessor that is about to end.
func lockDir(ctx context.Context, dir string) (*flock.Flock, error) {
	const private, patience, poll = 0o700, 2 * time.Second, 50 * time.Millisecond
	if err := os.MkdirAll(dir, private); err != nil {
		return nil, err
	}
	lock := flock.New(filepath.Join(dir, "monotel.lock"))
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	ok, err := lock.TryLockContext(wait, poll)
	switch {
	case ctx.Err() != nil:
		return nil, errors.Join(context.Cause(ctx), lock.Unlock())
	case err != nil && wait.Err() == nil:
		return nil, err
	case !ok:
		return nil, fmt.Errorf("%w: another process runs on it; give each its own folder, or connect both to one server", ErrStoreInUse)
	}
	return lock, nil
}

// ConnectOptions are the nats.go options with which this process connects
// without a port. The URL to connect to is then empty.
func (s *Server) ConnectOptions() []nats.Option {
	opts := []nats.Option{nats.InProcessServer(s.srv)}
	if s.internal != nil {
		opts = append(opts, nats.UserInfo(s.internal.Username, s.internal.Password))
	}
	return opts
}

// URL is the address that other processes connect to, without credentials. It
// is empty without Listen.
func (s *Server) URL() string {
	if s.internal == nil {
		return ""
	}
	return s.srv.ClientURL()
}

// Health returns nil while the server and its JetStream work. A stream that
// froze because the disk was full shows here and nowhere else.
func (s *Server) Health() error {
	h := s.srv.Healthz(&server.HealthzOptions{Details: true})
	if h.StatusCode == 0 || h.StatusCode == 200 {
		return nil
	}
	errs := []error{fmt.Errorf("embedded NATS is %s", h.Status)}
	if h.Error != "" {
		errs = append(errs, errors.New(h.Error))
	}
	for _, e := range h.Errors {
		errs = append(errs, fmt.Errorf("stream %q consumer %q: %s", e.Stream, e.Consumer, e.Error))
	}
	return errors.Join(errs...)
}

// Stop shuts the server down and frees its folder. Connections should be closed
// before. When ctx ends first Stop returns its error and the shutdown goes on;
// the folder is free when a later Stop returns nil. Stopping twice is fine.
func (s *Server) Stop(ctx context.Context) error {
	go s.stop.Do(func() {
		defer close(s.stopped)
		s.shutDown()
		s.stopErr = s.lock.Unlock()
	})
	select {
	case <-s.stopped:
		return s.stopErr
	case <-ctx.Done():
		return fmt.Errorf("stop embedded NATS: %w", context.Cause(ctx))
	}
}

// logger hands the server's log to slog. The server treats Fatalf as the end of
// the process; here it is the error of Start.
type logger struct {
	log   *slog.Logger
	fatal chan error
}

func (l *logger) emit(level slog.Level, format string, v []any) {
	ctx := context.Background() //nolint:forbidigo // the server's log calls have none
	if l.log.Enabled(ctx, level) {
		l.log.LogAttrs(ctx, level, "embedded NATS server", slog.String("says", fmt.Sprintf(format, v...)))
	}
}

func (l *logger) Noticef(format string, v ...any) { l.emit(slog.LevelDebug, format, v) }
func (l *logger) Warnf(format string, v ...any)   { l.emit(slog.LevelWarn, format, v) }
func (l *logger) Errorf(format string, v ...any)  { l.emit(slog.LevelError, format, v) }
func (l *logger) Debugf(string, ...any)           {}
func (l *logger) Tracef(string, ...any)           {}

func (l *logger) Fatalf(format string, v ...any) {
	l.emit(slog.LevelError, format, v)
	select {
	case l.fatal <- fmt.Errorf(format, v...):
	default:
	}
}
