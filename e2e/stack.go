// Package e2e starts the demo of docker-compose.yml, without Grafana, drives it, and
// looks at it from outside: through Jaeger's and Prometheus's APIs.
//
//	make e2e
//
// Where a Docker engine answers, the stack is containers; elsewhere, or with
// E2E_RUNTIME=process, it is the same programs as local processes.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Services of the stack, as docker-compose.yml names them.
const (
	serviceNATS       = "nats"
	serviceJaeger     = "jaeger"
	servicePrometheus = "prometheus"
	serviceEmitter    = "emitter"
	serviceConsumers  = "consumers"
)

// The two halves of the shop in traces and metrics.
const (
	emitterName   = "orders-emitter"
	consumersName = "orders-consumers"
)

// services in the order in which they are started.
var services = []string{serviceNATS, serviceJaeger, servicePrometheus, serviceEmitter, serviceConsumers}

// A stack is the running demo.
type stack interface {
	// up builds what is of this checkout, starts every service, and returns when they
	// are healthy, as far as the runtime knows.
	up(ctx context.Context) error
	// stop ends a service in an orderly way, kill does not, start starts it again. freeze
	// leaves it there, and lets it do nothing more; only kill ends that.
	stop(ctx context.Context, service string) error
	freeze(ctx context.Context, service string) error
	kill(ctx context.Context, service string) error
	start(ctx context.Context, service string) error
	// url is where a service answers HTTP on this machine.
	url(service string) string
	// monitor reads a page of the NATS server's monitoring, whose port is not published.
	monitor(ctx context.Context, page string, into any) error
	// monotel runs the command and returns what it prints, and what it reports.
	monotel(ctx context.Context, args ...string) (stdout, stderr string, err error)
	// logs writes a file for each service.
	logs(ctx context.Context, dir string) error
	// down removes everything, volumes too.
	down(ctx context.Context) error
}

// exportTimeout, in ms, is how soon spans count as lost that Jaeger does not take.
const exportTimeout = "OTEL_BSP_EXPORT_TIMEOUT=3000"

// Runtimes, in E2E_RUNTIME.
const (
	runtimeEnv     = "E2E_RUNTIME"
	runtimeDocker  = "docker"
	runtimeProcess = "process"
)

// root is the folder of the repository.
func root() string {
	dir, err := filepath.Abs("..")
	if err != nil {
		panic(err) // the working directory is gone
	}
	return dir
}

// freePorts returns ports of loopback that nobody had a moment ago.
func freePorts(n int) ([]int, error) {
	ports := make([]int, 0, n)
	for range n {
		lis, err := (&net.ListenConfig{}).Listen(context.Background(), "tcp", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer func() { _ = lis.Close() }() //nolint:revive,gocritic // all are held until there are enough, so that they differ
		addr, ok := lis.Addr().(*net.TCPAddr)
		if !ok {
			return nil, fmt.Errorf("listening at %v", lis.Addr())
		}
		ports = append(ports, addr.Port)
	}
	return ports, nil
}

// readEnv reads lines KEY=VALUE.
func readEnv(file string) (map[string]string, error) {
	data, err := os.ReadFile(file) //nolint:gosec // the test's own
	if err != nil {
		return nil, err
	}
	env := make(map[string]string)
	for line := range strings.Lines(string(data)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			env[k] = v
		}
	}
	if len(env) == 0 {
		return nil, errors.New(file + " has no lines KEY=VALUE")
	}
	return env, nil
}

var errPatience = errors.New("did not come true in time")

// poll asks until the answer is nil or ctx ends. It returns the last answer.
func poll(ctx context.Context, ask func(context.Context) error) error {
	const pause = 200 * time.Millisecond
	tick := time.NewTicker(pause)
	defer tick.Stop()
	var last error
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // and not that of an attempt that was cut off
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", errPatience, last)
		case <-tick.C:
		}
	}
}
