package e2e

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
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
	upTimeout   = 3 * time.Minute
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
	// Ctrl-C and the end of the CI job take the stack down, too.
	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer release()
	fail := func(what string, err error) int {
		fmt.Fprintf(os.Stderr, "e2e: %s: %v\n", what, err)
		return 1
	}
	work, err := os.MkdirTemp("", "monotel-e2e-")
	if err != nil {
		return fail("make a folder", err)
	}
	defer func() { _ = os.RemoveAll(work) }() // the system clears it up otherwise
	if sys, err = newStack(ctx, work); err != nil {
		return fail("prepare the stack", err)
	}
	takeDown := sync.OnceFunc(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), downTimeout)
		defer cancel()
		if code != 0 {
			keepLogs(ctx)
		}
		if err := sys.down(ctx); err != nil {
			code = max(code, fail("take the stack down", err))
		}
	})
	defer takeDown()
	stop := context.AfterFunc(ctx, func() { // the tests do not know of it, and would go on
		takeDown()
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
	fmt.Printf("e2e: the stack was up after %v\n", time.Since(began).Round(time.Second/10))
	return m.Run()
}

// newStack chooses the runtime.
func newStack(ctx context.Context, work string) (stack, error) {
	kind := os.Getenv(runtimeEnv)
	if kind == "" {
		kind = runtimeDocker
		if out, err := exec.CommandContext(ctx, "docker", "info", "--format", "{{.ServerVersion}}").CombinedOutput(); err != nil {
			fmt.Printf("e2e: no Docker engine answers (%v: %.200s)\n", err, out)
			kind = runtimeProcess
		}
	}
	switch kind {
	case runtimeDocker:
		fmt.Println("e2e: the stack runs as containers, of docker-compose.yml")
		return newContainers(ctx, work)
	case runtimeProcess:
		fmt.Println("e2e: the stack runs as local processes; images, networks and restart policies are not tested")
		return newProcesses(ctx, work)
	}
	return nil, fmt.Errorf("%s is %q, want %s or %s", runtimeEnv, kind, runtimeDocker, runtimeProcess)
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
