package mono_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// Tests that need a process to kill, or a server that shares no memory with
// them, run the test binary again, with TestChildProcess alone.
const (
	childMode = "MONO_TEST_CHILD" // what the child does
	childArg  = "MONO_TEST_CHILD_ARG"
)

// A childProcess is the test binary run again. It ends with the test, and by
// itself when the test's process is gone: it watches its standard input.
type childProcess struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	lines  chan string // standard output; closed at its end
	waited chan struct{}
	err    error // of the process; set when waited is closed
}

func startChild(t testing.TB, mode, arg string) *childProcess {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := &childProcess{
		cmd:    exec.CommandContext(context.Background(), exe, "-test.run=^TestChildProcess$", "-test.v=false", "-test.count=1", "-test.timeout=10m"),
		lines:  make(chan string, 1<<16),
		waited: make(chan struct{}),
	}
	// nats-server has races of its own; they are not what these tests look for.
	c.cmd.Env = append(os.Environ(), childMode+"="+mode, childArg+"="+arg, "GORACE=exitcode=0 atexit_sleep_ms=0 log_path="+os.DevNull)
	if c.stdin, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		sc := bufio.NewScanner(out)
		for sc.Scan() {
			c.lines <- sc.Text()
		}
		close(c.lines)
		c.err = c.cmd.Wait()
		close(c.waited)
	}()
	t.Cleanup(func() {
		c.kill()
		c.wait(t)
	})
	return c
}

// kill is kill -9.
func (c *childProcess) kill() { _ = c.cmd.Process.Kill() } // it has ended then

// wait waits until the process has ended and returns its last lines.
func (c *childProcess) wait(t testing.TB) []string {
	t.Helper()
	var rest []string
	for {
		select {
		case line, ok := <-c.lines:
			if ok {
				rest = append(rest, line)
				continue
			}
			<-c.waited
			return rest
		case <-time.After(patience):
			c.kill()
			t.Fatal("child process does not end")
		}
	}
}

// line returns what the child prints next after prefix.
func (c *childProcess) line(t testing.TB, prefix string) string {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case line, ok := <-c.lines:
			if !ok {
				t.Fatalf("child process ended before it printed %q", prefix)
			}
			if s, ok := strings.CutPrefix(line, prefix); ok {
				return s
			}
		case <-deadline:
			t.Fatalf("child process does not print %q", prefix)
		}
	}
}

// serverProcess starts a NATS server in a process of its own and returns its
// address with credentials.
func serverProcess(t testing.TB) string {
	t.Helper()
	return startChild(t, "server", t.TempDir()).line(t, "url ")
}

// TestChildProcess is the body of the child processes; in the test's own process
// it does nothing.
func TestChildProcess(_ *testing.T) { //nolint:paralleltest // it is alone in its process
	mode, arg := os.Getenv(childMode), os.Getenv(childArg)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if mode != "" && mode != "run" {
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin) // its end is what counts
			cancel()
		}()
	}
	var err error
	switch mode {
	case "":
	case "server":
		err = childServer(ctx, arg)
	case "worker":
		err = childWorker(ctx, arg)
	case "run":
		err = childRun(ctx, cancel, arg)
	case "chaos":
		err = childChaos(ctx, arg)
	case "poison":
		err = childPoison(ctx, arg)
	case "frozen":
		url, how, _ := strings.Cut(arg, "|")
		err = childFrozen(ctx, url, how)
	default:
		err = fmt.Errorf("unknown mode %q", mode)
	}
	if mode == "" {
		return
	}
	// Not through TestMain: a goroutine of this test reads standard input still.
	if err != nil {
		say("error %v", err)
		os.Exit(1) //nolint:revive,gocritic // this process is the child
	}
	os.Exit(0) //nolint:revive // this process is the child
}

// say prints one line for the parent, in one write.
func say(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stdout, format+"\n", args...) // the parent is gone then
}

func childServer(ctx context.Context, dir string) error {
	s, err := embedded.Start(ctx, embedded.Config{
		StoreDir: dir, Listen: "127.0.0.1:0", Users: []embedded.User{{Name: "test", Password: "secret"}},
	})
	if err != nil {
		return err
	}
	say("url %s", strings.Replace(s.URL(), "://", "://test:secret@", 1))
	<-ctx.Done()
	return s.Stop(context.WithoutCancel(ctx))
}

// childWorker is a program that publishes numbered events and handles them in
// two work queues. It prints each number that was acknowledged, and each number
// that a queue has handled. arg is the store folder and the first number.
func childWorker(ctx context.Context, arg string) error {
	dir, first, _ := strings.Cut(arg, "|")
	n, err := strconv.Atoi(first)
	if err != nil {
		return err
	}
	e, err := mono.NewEvent("shop", "Numbered", "v1")
	if err != nil {
		return err
	}
	handler := func(queue string) mono.EventStreamConsumerHandler {
		return func(_ context.Context, msgs []*mono.Msg) error {
			for _, m := range msgs {
				say("%s %s %d", queue, m.Data, m.Metadata().Sequence.Stream) // before the ack: what is acked was handled
			}
			return nil
		}
	}
	app, err := mono.New(mono.WithStoreDir(dir), mono.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	if err := app.Register(emitter("shop", e),
		durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), handler("a")),
		durableModule("b", e, autoAck("QB", mono.WorkQueuePolicy), handler("b"))); err != nil {
		return err
	}
	if err := app.Start(ctx); err != nil {
		return err
	}
	say("started")
	var wg sync.WaitGroup
	var next atomic.Int64
	next.Store(int64(n))
	for i := range 4 {
		wg.Go(func() {
			for ctx.Err() == nil && n >= 0 {
				no := next.Add(1) - 1
				msg := &mono.Msg{Subject: e.Subject, Data: strconv.AppendInt(nil, no, 10)}
				if i%2 == 0 {
					if _, err := app.Bus().PublishStream(ctx, msg); err == nil {
						say("acked %d", no)
					}
					continue
				}
				if f, err := app.Bus().PublishStreamAsync(ctx, msg); err == nil {
					if _, err := f.Wait(ctx); err == nil {
						say("acked %d", no)
					}
				}
			}
		})
	}
	wg.Wait()
	<-ctx.Done()
	return app.Stop(context.WithoutCancel(ctx))
}

// The process with the App and its embedded server is killed at random moments,
// and started again on the same folder. Every event whose acknowledgement the
// publisher saw is handled by both queues in the end.
//
// Only the process dies, not the machine: what the server wrote is with the
// operating system.
func TestKill_nothingAcknowledgedIsLost(t *testing.T) {
	t.Parallel()
	const rounds = 10
	dir := t.TempDir()
	var acked []string
	handled := map[string]map[string]map[string]int{"a": {}, "b": {}} // queue, number, stream sequence: deliveries
	note := func(line string) {
		what, rest, _ := strings.Cut(line, " ")
		if what == "acked" {
			acked = append(acked, rest)
		} else if h := handled[what]; h != nil {
			no, seq, _ := strings.Cut(rest, " ")
			if h[no] == nil {
				h[no] = make(map[string]int)
			}
			h[no][seq]++
		}
	}
	first := 0
	for range rounds {
		c := startChild(t, "worker", dir+"|"+strconv.Itoa(first))
		c.line(t, "started")
		moment := time.After(time.Duration(20+rand.IntN(600)) * time.Millisecond)
	running:
		for {
			select {
			case line, ok := <-c.lines:
				if !ok {
					t.Fatal("child process ended by itself")
				}
				note(line)
			case <-moment:
				break running
			}
		}
		c.kill()
		for _, line := range c.wait(t) {
			note(line)
		}
		first += 1_000_000 // numbers of this round are not used again
	}
	if len(acked) == 0 {
		t.Fatal("nothing was published")
	}
	c := startChild(t, "worker", dir+"|-1") // publishes nothing
	c.line(t, "started")
	missing := func() []string {
		var m []string
		for _, no := range acked {
			for q, h := range handled {
				if len(h[no]) == 0 {
					m = append(m, q+" "+no)
				}
			}
		}
		return m
	}
	deadline := time.After(2 * patience)
	for len(missing()) > 0 {
		select {
		case line, ok := <-c.lines:
			if !ok {
				t.Fatal("child process ended by itself")
			}
			note(line)
			for more := true; more; {
				select {
				case line := <-c.lines:
					note(line)
				default:
					more = false
				}
			}
		case <-deadline:
			m := missing()
			t.Fatalf("%d of %d acknowledged events were not handled, such as %q", len(m), len(acked), m[:min(len(m), 20)])
		}
	}
	again, twice := 0, 0
	for _, h := range handled {
		for _, seqs := range h {
			for _, n := range seqs {
				again += n - 1
			}
			twice += len(seqs) - 1
		}
	}
	t.Logf("%d events acknowledged in %d lives, each handled in both queues, %d delivered again, %d copied again from the fan-out stream",
		len(acked), rounds, again, twice)
	c.stdin.Close()
	c.wait(t)
	if c.err != nil {
		t.Errorf("the last life ended with %v", c.err)
	}
}

// Several kills at the same place: a process that dies while it starts, before
// it has made all of its streams, is no obstacle to the next one.
func TestKill_whileStarting(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for range 10 {
		c := startChild(t, "worker", dir+"|-1")
		select {
		case <-time.After(time.Duration(10+rand.IntN(250)) * time.Millisecond):
		case <-c.waited:
			t.Fatalf("child process ended by itself: %v", c.err)
		}
		c.kill()
		c.wait(t)
	}
	e, err := mono.NewEvent("shop", "Numbered", "v1")
	if err != nil {
		t.Fatal(err)
	}
	a, b := newTally(), newTally()
	app := runApp(t, inFolder(dir), emitter("shop", e),
		durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), a.handle),
		durableModule("b", e, autoAck("QB", mono.WorkQueuePolicy), b.handle))
	want := payloads("n", 0, 50)
	publishAll(t, app.Bus(), e, want)
	a.waitFor(t, want)
	b.waitFor(t, want)
}

// childRun is a program that ends on a signal. It prints what happens. Its
// handler ends when the parent sends a byte.
func childRun(ctx context.Context, cancel context.CancelFunc, dir string) error {
	app, err := mono.New(mono.WithStoreDir(dir), mono.WithLogger(slog.New(slog.DiscardHandler)), mono.WithShutdownTimeout(patience))
	if err != nil {
		return err
	}
	e, err := mono.NewEvent("shop", "Numbered", "v1")
	if err != nil {
		return err
	}
	release := make(chan struct{})
	m := durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), func(_ context.Context, msgs []*mono.Msg) error {
		say("handling")
		<-release
		for range msgs {
			say("handled")
		}
		return nil
	})
	m.emits = []mono.BaseEventDefinition{e}
	m.start = func(ctx context.Context) error {
		say("started")
		_, err := m.bus.PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte("x")})
		return err
	}
	m.stop = func(context.Context) error {
		say("module stopped")
		return nil
	}
	if err := app.Register(m); err != nil {
		return err
	}
	go func() {
		b := make([]byte, 1)
		_, _ = os.Stdin.Read(b) // the parent says when, or is gone
		close(release)
		_, _ = io.Copy(io.Discard, os.Stdin) // its end is what counts
		cancel()
	}()
	err = app.Run(ctx)
	say("run returned %v", err)
	return err
}

// SIGTERM stops the App in order: the handler that runs ends, then the modules
// stop, then Run returns nil and the process ends with success.
func TestRun_endsOnSIGTERM(t *testing.T) {
	t.Parallel()
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			c := startChild(t, "run", t.TempDir())
			c.line(t, "handling")
			if err := c.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if _, err := c.stdin.Write([]byte("x")); err != nil {
				t.Fatal(err)
			}
			got := c.wait(t)
			want := []string{"handled", "module stopped", "run returned <nil>"}
			got = slices.DeleteFunc(got, func(s string) bool { return !slices.Contains(want, s) })
			if !slices.Equal(got, want) {
				t.Errorf("after the signal the process says %q, want %q", got, want)
			}
			if c.err != nil {
				t.Errorf("the process ended with %v", c.err)
			}
		})
	}
}

// A second signal ends a process whose handler does not end.
func TestRun_secondSignalEndsAtOnce(t *testing.T) {
	t.Parallel()
	c := startChild(t, "run", t.TempDir())
	c.line(t, "handling")
	if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	// The first one has to be taken before the second counts as such.
	if !pollFor(patience, func() bool {
		_ = c.cmd.Process.Signal(syscall.SIGTERM) // it has ended then
		select {
		case <-c.waited:
			return true
		default:
			return false
		}
	}) {
		t.Fatal("the process goes on after many signals")
	}
	c.wait(t)
	exit, ok := errors.AsType[*exec.ExitError](c.err)
	if !ok {
		t.Fatalf("the process ended with %v, want a signal", c.err)
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGTERM {
		t.Errorf("the process ended with %v, want SIGTERM", c.err)
	}
}

// What a killed process had fetched comes back. Its number of deliveries may
// start again: the server writes that down a moment later.
func TestKill_fetchedMessagesComeBack(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	c := startChild(t, "run", dir)
	c.line(t, "handling")
	c.kill()
	c.wait(t)
	e, err := mono.NewEvent("shop", "Numbered", "v1")
	if err != nil {
		t.Fatal(err)
	}
	got := newTally()
	m := durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), got.handle)
	m.emits = []mono.BaseEventDefinition{e}
	runApp(t, inFolder(dir), m)
	got.waitFor(t, []string{"x"})
}
