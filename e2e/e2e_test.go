package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"
)

// The stack that the tests share. They run one after another: some of them stop
// services.
var (
	sys  stack
	jae  jaeger
	prom prometheus
)

const (
	upTimeout   = 10 * time.Minute // programs and an image are built
	downTimeout = 2 * time.Minute
	// patience is what a test gives the stack for one thing to come true. It is much
	// more than it takes: the machine may be busy with other things.
	patience = 3 * time.Minute
)

func TestMain(m *testing.M) {
	flag.Parse()
	if testing.Short() {
		fmt.Println("e2e: left out with -short")
		return
	}
	os.Exit(run(m))
}

func run(m *testing.M) (code int) {
	fail := func(what string, err error) int {
		fmt.Fprintf(os.Stderr, "e2e: %s: %v\n", what, err)
		return 1
	}
	// Ctrl-C, the end of the CI job and that of go test's patience take the stack down, too.
	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer release()
	if limit := flag.Lookup("test.timeout").Value.(flag.Getter).Get().(time.Duration); limit > 0 {
		if limit <= downTimeout {
			return fail("look at the time", fmt.Errorf("-timeout is %v, of which the end alone may take %v", limit, downTimeout))
		}
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, limit-downTimeout, fmt.Errorf("-timeout %v has ended, but for what the end takes", limit))
		defer cancel()
	}
	work, err := os.MkdirTemp("", "monotel-e2e-")
	if err != nil {
		return fail("make a folder", err)
	}
	defer func() { _ = os.RemoveAll(work) }() // the system clears it up otherwise
	if sys, err = newStack(ctx, work); err != nil {
		return fail("prepare the stack", err)
	}
	var once sync.Once // whoever comes second waits for the first
	takeDown := func(failed bool) (err error) {
		once.Do(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), downTimeout)
			defer cancel()
			if failed {
				keepLogs(ctx)
			}
			err = sys.down(ctx)
		})
		return err
	}
	defer func() {
		if err := takeDown(code != 0); err != nil {
			code = fail("take the stack down", err)
		}
	}()
	stop := context.AfterFunc(ctx, func() { // the tests do not know of it, and would go on
		fail("interrupted", context.Cause(ctx))
		if err := takeDown(true); err != nil {
			fail("take the stack down", err)
		}
		const interrupted = 130
		os.Exit(interrupted) //nolint:revive // a test binary has no other end
	})
	defer stop()
	up, cancel := context.WithTimeout(ctx, upTimeout)
	defer cancel()
	began := time.Now()
	if err := sys.up(up); err != nil {
		return fail("start the stack", err)
	}
	jae, prom = jaeger{sys.url(serviceJaeger)}, prometheus{sys.url(servicePrometheus)}
	for _, page := range []string{
		jae.url + "/api/services", prom.url + "/-/ready", sys.url(serviceEmitter) + "/healthz", sys.url(serviceConsumers) + "/healthz",
	} {
		err := poll(up, func(ctx context.Context) error { return getJSON(ctx, page, nil) })
		if err != nil {
			return fail("wait for "+page, err)
		}
	}
	fmt.Printf("e2e: the stack was up after %v\n", time.Since(began).Round(time.Second/10)) //nolint:forbidigo // it is only told
	return m.Run()
}

// newStack chooses the runtime.
func newStack(ctx context.Context, work string) (stack, error) {
	kind := os.Getenv(runtimeEnv)
	switch kind {
	case "", runtimeDocker:
		compose, err := composeCommand(ctx)
		if err == nil {
			fmt.Println("e2e: the stack runs as containers, of docker-compose.yml")
			return newContainers(work, compose)
		}
		if kind == runtimeDocker {
			return nil, err
		}
		fmt.Printf("e2e: %v\n", err)
	case runtimeProcess:
	default:
		return nil, fmt.Errorf("%s is %q, want %s or %s", runtimeEnv, kind, runtimeDocker, runtimeProcess)
	}
	fmt.Println("e2e: the stack runs as local processes; images, networks, health checks and restart policies are not tested")
	return newProcesses(work)
}

// keepLogs saves what the services have logged.
func keepLogs(ctx context.Context) {
	dir := filepath.Join("out", "logs", time.Now().Format("20060102-150405"))
	err := os.MkdirAll(dir, 0o750)
	if err == nil {
		err = sys.logs(ctx, dir)
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "e2e: keep the logs: %v\n", err)
	}
	fmt.Fprintf(os.Stderr, "e2e: what the services have logged is in e2e/%s\n", dir)
}

// until fails the test unless the answer becomes nil.
func until(t *testing.T, what string, ask func(context.Context) error) {
	t.Helper()
	untilFor(t, patience, what, ask)
}

func untilFor(t *testing.T, limit time.Duration, what string, ask func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if err := poll(ctx, ask); err != nil {
		t.Fatalf("%s: %v", what, err)
	}
}
