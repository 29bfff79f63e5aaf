package mono_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

func TestNew_refuses(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		opts []mono.Option
		say  []string
	}{
		{"empty name", []mono.Option{mono.WithName("")}, []string{`WithName("")`}},
		{"name with a space", []mono.Option{mono.WithName("my app")}, []string{`WithName("my app")`, "without spaces"}},
		{"name with a line break", []mono.Option{mono.WithName("a\nb")}, []string{`WithName("a\nb")`}},
		{"empty URL", []mono.Option{mono.WithNATS("")}, []string{"WithNATS", "empty URL", "nats://localhost:4222"}},
		{"blank URL", []mono.Option{mono.WithNATS(" ")}, []string{"WithNATS", "empty URL"}},
		{"malformed URL", []mono.Option{mono.WithNATS("nats://a:4222,nats://u:s3cret@b:x")}, []string{"WithNATS", "URL 2 of the list is malformed"}},
		{"URL without a host", []mono.Option{mono.WithNATS("nats://")}, []string{"WithNATS", "URL 1 of the list"}},
		{"server and folder", []mono.Option{mono.WithNATS("localhost"), mono.WithStoreDir("x")}, []string{"WithStoreDir", "remove it or WithNATS"}},
		{
			"server and embedded server",
			[]mono.Option{mono.WithEmbedded(embedded.Config{}), mono.WithNATS("localhost")},
			[]string{"WithEmbedded", "remove it or WithNATS"},
		},
		{"empty folder", []mono.Option{mono.WithStoreDir("")}, []string{`WithStoreDir("")`, `"data/nats"`}},
		{
			"two folders",
			[]mono.Option{mono.WithStoreDir("x"), mono.WithEmbedded(embedded.Config{StoreDir: "x"})},
			[]string{"WithStoreDir and WithEmbedded", "keep one"},
		},
		{
			"bad embedded server",
			[]mono.Option{mono.WithEmbedded(embedded.Config{MaxStore: -1, MaxMemory: -1})},
			[]string{"WithEmbedded", "MaxStore is -1", "MaxMemory is -1"},
		},
		{
			"listening without users",
			[]mono.Option{mono.WithEmbedded(embedded.Config{Listen: "127.0.0.1:0"})},
			[]string{"WithEmbedded", "listening needs authentication", "set Users or NKeys"},
		},
		{"nil logger", []mono.Option{mono.WithLogger(nil)}, []string{"WithLogger(nil)", "slog.DiscardHandler"}},
		{"no shutdown timeout", []mono.Option{mono.WithShutdownTimeout(0)}, []string{"WithShutdownTimeout(0s)", "more than 0"}},
		{"negative shutdown timeout", []mono.Option{mono.WithShutdownTimeout(-time.Second)}, []string{"WithShutdownTimeout(-1s)"}},
		{"no ping interval", []mono.Option{mono.WithPingInterval(0)}, []string{"WithPingInterval(0s)", "10ms or more"}},
		{"no window", []mono.Option{mono.WithPublishWindow(0)}, []string{"WithPublishWindow(0)", "1 to 65536"}},
		{"large window", []mono.Option{mono.WithPublishWindow(65537)}, []string{"WithPublishWindow(65537)"}},
		{
			"empty middleware",
			[]mono.Option{mono.WithMiddleware(mono.Middleware{Publish: func(n mono.PublishFunc) mono.PublishFunc { return n }}, mono.Middleware{})},
			[]string{"WithMiddleware", "number 2", "neither Handle nor Publish"},
		},
		{
			"bad events",
			[]mono.Option{mono.WithEvents(ping, mono.BaseEventDefinition{ModuleName: "a b", Name: "A", Version: "v1", Subject: "a"})},
			[]string{"WithEvents", `"a b/A/v1"`, `"a b"`},
		},
		{
			"everything at once",
			[]mono.Option{
				mono.WithName(""), mono.WithStoreDir(""), mono.WithEmbedded(embedded.Config{MaxPayload: -1}), mono.WithLogger(nil),
				mono.WithShutdownTimeout(0), mono.WithPublishWindow(0), mono.WithMiddleware(mono.Middleware{}), mono.WithEvents(mono.BaseEventDefinition{}),
			},
			[]string{
				"new app", "WithName", "WithStoreDir", "WithEmbedded", "WithLogger", "WithShutdownTimeout", "WithPublishWindow",
				"WithMiddleware", "WithEvents",
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			app, err := mono.New(tt.opts...)
			wantError(t, err, mono.ErrInvalidConfig, tt.say...)
			if app != nil {
				t.Error("New returns an App beside its error")
			}
			if err != nil && strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %q tells the password", err)
			}
		})
	}
	_, err := mono.New(mono.WithEmbedded(embedded.Config{Listen: "127.0.0.1:0"}))
	wantError(t, err, embedded.ErrNoAuthentication)
}

func TestNew_accepts(t *testing.T) {
	t.Parallel()
	for name, opts := range map[string][]mono.Option{
		"nothing":                {},
		"a nil option":           {nil},
		"a host":                 {mono.WithNATS("localhost")},
		"a list":                 {mono.WithNATS("nats://a:4222, tls://b:4222,c:4222,ws://d,[::1]:4222")},
		"credentials in the URL": {mono.WithNATS("nats://u:p@a:4222")},
		"the smallest window":    {mono.WithPublishWindow(1)},
		"the largest window":     {mono.WithPublishWindow(65536)},
		"a folder twice":         {mono.WithStoreDir("a"), mono.WithStoreDir("b")},
		"a folder and limits":    {mono.WithStoreDir("a"), mono.WithEmbedded(embedded.Config{MaxStore: 1})},
	} {
		if _, err := mono.New(opts...); err != nil {
			t.Errorf("%s: New = %v", name, err)
		}
	}
}

// New starts nothing and touches no disk.
func TestNew_touchesNothing(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "store")
	app, err := mono.New(mono.WithStoreDir(dir), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder exists after New: %v", err)
	}
	if app.Conn() != nil {
		t.Error("there is a connection before Start")
	}
}

// From here on: one test for each option, which fails if the option is ignored.

func TestWithName(t *testing.T) {
	t.Parallel()
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), quiet(), mono.WithName("front-desk")})
	if got := app.Conn().Opts.Name; got != "front-desk" {
		t.Errorf("the connection's name is %q", got)
	}
	if got := app.Conn().ConnectedServerName(); got != "front-desk" {
		t.Errorf("the embedded server's name is %q", got)
	}
	wantError(t, app.Start(within(t)), mono.ErrAlreadyStarted)

	unnamed := startApp(t)
	if got, want := unnamed.Conn().Opts.Name, strings.TrimSuffix(filepath.Base(os.Args[0]), ".exe"); got != want {
		t.Errorf("the name defaults to %q, want the executable's, %q", got, want)
	}
}

func TestWithNATS(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	got := make(chan string, 1)
	app := monotest.AppWith(t, []mono.Option{quiet(), mono.WithName("app"), mono.WithNATS(srv.URL(), nats.Name("mine"), nil)},
		emitter("net", ping), consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, func(_ context.Context, msg *mono.Msg) error {
				got <- string(msg.Data)
				return nil
			}, self)
		}))
	if name := app.Conn().Opts.Name; name != "mine" {
		t.Errorf("the connection's name is %q: the user's options should win", name)
	}
	// It is that server: another connection to it reaches the App.
	other := srv.Conn()
	if err := errors.Join(other.Publish(ping.Subject, []byte("hello")), other.Flush()); err != nil {
		t.Fatal(err)
	}
	if data := receive(t, got, "the event"); data != "hello" {
		t.Errorf("got %q", data)
	}
	if _, err := os.Stat("data"); err == nil {
		t.Error("an App with WithNATS made a store folder")
	}
}

// A nats.Option with an error is the error of the start.
func TestWithNATS_badOption(t *testing.T) {
	t.Parallel()
	app, err := mono.New(quiet(), mono.WithNATS("localhost", nats.RootCAs(filepath.Join(t.TempDir(), "missing.pem"))))
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, app.Start(within(t)), os.ErrNotExist, "connect to NATS", "NATS option", "missing.pem")
}

func TestWithStoreDir(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "deep", "store")
	monotest.AppWith(t, []mono.Option{quiet(), mono.WithStoreDir(dir)}, emitter("net", ping), keeps(mono.StreamConfig{}))
	if _, err := os.Stat(filepath.Join(dir, "jetstream")); err != nil {
		t.Errorf("the streams are elsewhere: %v", err)
	}
	// One at a time.
	second, err := mono.New(quiet(), mono.WithStoreDir(dir))
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, second.Start(within(t)), embedded.ErrStoreInUse, dir)
}

func TestWithEmbedded(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	app := monotest.AppWith(t, []mono.Option{quiet(), mono.WithEmbedded(embedded.Config{StoreDir: dir, Name: "hq", MaxPayload: 12345})})
	if got := app.Conn().MaxPayload(); got != 12345 {
		t.Errorf("max_payload is %d, want 12345", got)
	}
	if got := app.Conn().ConnectedServerName(); got != "hq" {
		t.Errorf("the server's name is %q, want hq", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "jetstream")); err != nil {
		t.Errorf("the streams are elsewhere: %v", err)
	}
}

func TestWithLogger(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithName("chatty"), mono.WithLogger(log.logger())},
		emitter("net", ping), pinger(retries(1), func(context.Context, []*mono.Msg) error { return errors.New("no luck") }))
	terminated := watchTerminated(t, app)
	msg := pingMsg("s3cret payload")
	msg.Header = mono.Header{"Authorization": {"s3cret header"}}
	if _, err := app.Bus().PublishStream(within(t), msg); err != nil {
		t.Fatal(err)
	}
	receive(t, terminated, "the end of the message")
	eventually(t, func() bool { return strings.Contains(log.String(), "message dead-lettered") }, "the log tells of the dead letter")
	for _, part := range []string{
		"msg=started app=chatty", "level=INFO", "level=ERROR", "module=pinger", "event=net/Ping/v1", "stream=pings",
		"consumer=" + pingDurable, "stream_sequence=1", "attempt=1", "no luck", "attempts_exhausted",
	} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log does not say %q:\n%s", part, log)
		}
	}
	if strings.Contains(log.String(), "s3cret") {
		t.Errorf("the log tells a payload or a header's value:\n%s", log)
	}
}

// Without a logger, what fails is told to slog.Default and what goes well is not.
//
//nolint:paralleltest // it replaces slog.Default
func TestWithLogger_default(t *testing.T) {
	log := &logBuffer{}
	before := slog.Default()
	slog.SetDefault(log.logger())
	app, err := mono.New(mono.WithStoreDir(t.TempDir()))
	slog.SetDefault(before)
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(emitter("net", ping), pinger(retries(1), func(context.Context, []*mono.Msg) error { return errors.New("no luck") })); err != nil {
		t.Fatal(err)
	}
	if err := app.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	terminated := watchTerminated(t, app)
	publishPings(t, app, "x")
	receive(t, terminated, "the end of the message")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "message dead-lettered") {
		t.Errorf("the default logger says nothing about a dead letter:\n%s", log)
	}
	if strings.Contains(log.String(), "level=INFO") || strings.Contains(log.String(), "level=DEBUG") {
		t.Errorf("the default logger talks too much:\n%s", log)
	}
}

// Run stops within the timeout, though a handler does not listen to its context.
func TestWithShutdownTimeout(t *testing.T) {
	t.Parallel()
	const timeout = 500 * time.Millisecond
	running, release := make(chan struct{}), make(chan struct{})
	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet(), mono.WithShutdownTimeout(timeout))
	if err != nil {
		t.Fatal(err)
	}
	net := emitter("net", ping)
	net.start = func(ctx context.Context) error {
		_, err := net.bus.PublishStream(ctx, pingMsg("x"))
		return err
	}
	left := make(chan time.Duration, 1)
	net.stop = func(ctx context.Context) error {
		deadline, _ := ctx.Deadline()
		left <- time.Until(deadline)
		return nil
	}
	if err := app.Register(net, pinger(retries(5), func(context.Context, []*mono.Msg) error {
		close(running)
		<-release
		return nil
	})); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { result <- app.Run(ctx) }()
	receive(t, running, "the handler")
	cancel()
	err = receive(t, result, "the end of Run")
	close(release)
	wantError(t, err, mono.ErrStopTimeout, `module "pinger" for event net/Ping/v1`, "delivered again")
	if left := receive(t, left, "Stop of a module"); left > timeout {
		t.Errorf("modules had %v to stop, want at most %v: the default is 30 s", left, timeout)
	}
}

func TestWithEvents(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	got := make(chan string, 1)
	listener := func() mono.Module {
		return consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(ping, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "pings"}, AutoAck: true},
				func(_ context.Context, msgs []*mono.Msg) error {
					got <- string(msgs[0].Data)
					return nil
				}, self)
		})
	}
	wantError(t, startFails(t, listener()), mono.ErrUnknownEvent, "WithEvents")

	consuming := monotest.AppWith(t, []mono.Option{quiet(), mono.WithNATS(srv.URL()), mono.WithEvents(ping)}, listener())
	if e, ok := consuming.Registry().GetEventByName("Ping", "v1", "net"); !ok || e != ping {
		t.Errorf("the registry finds %+v, %v", e, ok)
	}
	emitting := monotest.AppWith(t, []mono.Option{quiet(), mono.WithNATS(srv.URL())}, emitter("net", ping))
	publishPings(t, emitting, "from afar")
	if data := receive(t, got, "the event"); data != "from afar" {
		t.Errorf("got %q", data)
	}

	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet(), mono.WithEvents(ping))
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(emitter("net", ping)); err != nil {
		t.Fatal(err)
	}
	wantError(t, app.Start(within(t)), mono.ErrDuplicate, `module "net": event net/Ping/v1`, "WithEvents declares it too")
}

func TestWithStreamUpdates(t *testing.T) {
	t.Parallel()
	srv := monotest.Server(t)
	start := func(maxMsgs int64, opts ...mono.Option) error {
		app, err := mono.New(append(opts, mono.WithNATS(srv.URL()), quiet())...)
		if err != nil {
			return err
		}
		if err := app.Register(emitter("net", ping), keeps(mono.StreamConfig{MaxMsgs: maxMsgs})); err != nil {
			return err
		}
		if err := app.Start(within(t)); err != nil {
			return err
		}
		if got := streamInfo(t, app, "pings").Config.MaxMsgs; got != maxMsgs {
			t.Errorf("MaxMsgs is %d, want %d", got, maxMsgs)
		}
		return app.Stop(within(t))
	}
	if err := start(10); err != nil {
		t.Fatal(err)
	}
	wantError(t, start(20), mono.ErrStreamConflict, `stream "pings"`, "MaxMsgs 10", `module "keeper" asks for 20`, "WithStreamUpdates")
	if err := start(10); err != nil {
		t.Errorf("the refused change left its mark: %v", err)
	}
	if err := start(20, mono.WithStreamUpdates()); err != nil {
		t.Error(err)
	}
}
