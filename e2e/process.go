package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// processes is the stack as local processes: the binaries that `make images` builds
// for the images, with the demo's configuration, on ports of loopback.
type processes struct {
	dir      string              // of all that this run makes
	binaries map[string]string   // of what is not of this checkout
	programs map[string]*program // by service
	addr     map[string]string   // by what the configuration calls them
	env      []string            // of the services and of the command monotel

	mu sync.Mutex
}

// A program is a service.
type program struct {
	path string
	args []string
	env  []string
	log  string // file

	cmd   *exec.Cmd // nil while it does not run
	ended chan struct{}
}

// What the configuration files call the services, by host name and port: that is how
// they find each other in the network of the containers.
var hosts = []string{
	"nats:4222", "nats:8222", "jaeger:4317", "jaeger:4318", "jaeger:16685", "jaeger:16686", "jaeger:13133", "prometheus:9090",
	"emitter:8080", "consumers:8080",
}

func newProcesses(work string) (*processes, error) {
	binaries, err := readEnv(filepath.Join(root(), "e2e", "images", "out", "binaries.env"))
	if err != nil {
		return nil, fmt.Errorf("%w; %s", err, buildBinaries)
	}
	return &processes{dir: work, binaries: binaries, addr: make(map[string]string), programs: make(map[string]*program)}, nil
}

const buildBinaries = "'make images E2E_RUNTIME=process' builds what is needed"

// prepare says how each program is started.
func (p *processes) prepare(ctx context.Context) error {
	if err := buildPrograms(ctx, p.dir, runtime.GOOS); err != nil {
		return err
	}
	ports, err := freePorts(len(hosts)) // only now: they are taken at once
	if err != nil {
		return err
	}
	for i, h := range hosts {
		p.addr[h] = "127.0.0.1:" + strconv.Itoa(ports[i])
	}
	configs := map[string]string{}
	for name, file := range map[string]string{
		"nats.conf": "deploy/nats.conf", "jaeger.yml": "deploy/jaeger.yml", "prometheus.yml": "deploy/prometheus.yml",
	} {
		if configs[name], err = p.config(name, filepath.Join(root(), file)); err != nil {
			return err
		}
	}
	const password = "of-this-run-only"
	nats := "nats://" + p.addr["nats:4222"]
	user := []string{"NATS_USER=orders", "NATS_PASSWORD=" + password}
	otel := []string{"OTEL_EXPORTER_OTLP_ENDPOINT=http://" + p.addr["jaeger:4318"], "OTEL_BSP_SCHEDULE_DELAY=1000", exportTimeout}
	p.env = append(append([]string{"NATS_URL=" + nats}, user...), otel...)
	p.programs = map[string]*program{
		serviceNATS: {path: p.binaries["NATS_SERVER_BIN"], args: []string{"-c", configs["nats.conf"]}, env: user},
		serviceJaeger: {
			path: p.binaries["JAEGER_BIN"], args: []string{"--config", configs["jaeger.yml"]},
			env: []string{"JAEGER_LISTEN_HOST=127.0.0.1"},
		},
		servicePrometheus: {path: p.binaries["PROMETHEUS_BIN"], args: []string{
			"--config.file=" + configs["prometheus.yml"], "--storage.tsdb.path=" + filepath.Join(p.dir, "prometheus"),
			"--web.listen-address=" + p.addr["prometheus:9090"], "--enable-feature=exemplar-storage",
		}},
		serviceEmitter: {
			path: filepath.Join(p.dir, "orders"), args: []string{"-role", "emitter", "-http", p.addr["emitter:8080"]}, env: p.env,
		},
		serviceConsumers: {
			path: filepath.Join(p.dir, "orders"), args: []string{"-role", "consumers", "-http", p.addr["consumers:8080"]}, env: p.env,
		},
	}
	for name, prog := range p.programs {
		if prog.path == "" {
			return fmt.Errorf("e2e/images/out/binaries.env does not name the program of %s; %s", name, buildBinaries)
		}
		prog.log = filepath.Join(p.dir, name+".log")
	}
	return nil
}

// config copies a configuration file of the demo, with the addresses that this run
// has in place of those in the network of the containers.
func (p *processes) config(name, file string) (string, error) {
	data, err := os.ReadFile(file) //nolint:gosec // the repository's own
	if err != nil {
		return "", err
	}
	text := string(data)
	for host, addr := range p.addr {
		_, port, _ := strings.Cut(addr, ":")
		service, own, _ := strings.Cut(host, ":")
		text = strings.ReplaceAll(text, host, addr)
		switch {
		case name == "jaeger.yml" && service == serviceJaeger:
			text = strings.ReplaceAll(text, "}:"+own+"\n", "}:"+port+"\n")
		case name == "nats.conf" && service == serviceNATS:
			text = strings.ReplaceAll(text, "0.0.0.0:"+own, addr)
		}
	}
	switch name {
	case "nats.conf":
		text = strings.ReplaceAll(text, "store_dir: /data", "store_dir: "+filepath.Join(p.dir, "nats"))
	case "prometheus.yml":
		text = strings.ReplaceAll(text, "- rules/", "- "+filepath.Join(root(), "dashboards", "rules")+"/")
		text = strings.ReplaceAll(text, "localhost:9090", p.addr["prometheus:9090"])
	}
	to := filepath.Join(p.dir, name)
	const private = 0o600
	return to, os.WriteFile(to, []byte(text), private) //nolint:gosec // a folder of this run
}

func (p *processes) up(ctx context.Context) error {
	if err := p.prepare(ctx); err != nil {
		return err
	}
	for _, s := range services {
		if err := p.start(ctx, s); err != nil {
			return err
		}
		if s != serviceNATS {
			continue
		}
		if err := poll(ctx, func(ctx context.Context) error { return p.monitor(ctx, "/healthz", nil) }); err != nil {
			return fmt.Errorf("wait for the NATS server: %w", err)
		}
	}
	return nil
}

func (p *processes) start(_ context.Context, service string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	prog := p.programs[service]
	if prog.cmd != nil {
		return fmt.Errorf("%s runs", service)
	}
	const private = 0o600
	out, err := os.OpenFile(prog.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, private)
	if err != nil {
		return err
	}
	defer func() { _ = out.Close() }()           // the process has its own
	cmd := exec.Command(prog.path, prog.args...) //nolint:gosec,noctx // the test ends it by itself, in an orderly way
	cmd.Env = append(os.Environ(), prog.env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = diesWithParent()
	started, ended := make(chan error, 1), make(chan struct{})
	go func() {
		// What Linux calls the parent is this thread: it stays as long as its child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it has ended is in its log
			close(ended)
		}
	}()
	if err := <-started; err != nil {
		return err
	}
	prog.cmd, prog.ended = cmd, ended
	return nil
}

func (p *processes) stop(ctx context.Context, service string) error {
	return p.end(ctx, service, syscall.SIGTERM)
}

func (p *processes) freeze(_ context.Context, service string) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.programs[service].cmd.Process.Signal(syscall.SIGSTOP)
}

func (p *processes) kill(ctx context.Context, service string) error {
	return p.end(ctx, service, syscall.SIGKILL)
}

func (p *processes) end(ctx context.Context, service string, how syscall.Signal) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	prog := p.programs[service]
	if prog == nil || prog.cmd == nil { // perhaps never started
		return nil
	}
	_ = prog.cmd.Process.Signal(how) // or it has ended by itself
	const grace = 40 * time.Second
	timeout := time.NewTimer(grace)
	defer timeout.Stop()
	defer func() { prog.cmd = nil }()
	select {
	case <-prog.ended:
		return nil
	case <-ctx.Done():
	case <-timeout.C:
	}
	err := prog.cmd.Process.Kill()
	<-prog.ended
	return errors.Join(fmt.Errorf("%s did not end by %v", service, how), err)
}

func (p *processes) url(service string) string {
	ports := map[string]string{
		serviceNATS: "8222", serviceJaeger: "16686", servicePrometheus: "9090", serviceEmitter: "8080", serviceConsumers: "8080",
	}
	return "http://" + p.addr[service+":"+ports[service]]
}

func (p *processes) monitor(ctx context.Context, page string, into any) error {
	return getJSON(ctx, p.url(serviceNATS)+page, into)
}

func (p *processes) monotel(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	return output(ctx, p.env, filepath.Join(p.dir, "monotel"), args...)
}

func (p *processes) logs(_ context.Context, dir string) error {
	errs := make([]error, 0, 2*len(p.programs)) //nolint:mnd // reading and writing
	for name, prog := range p.programs {
		data, err := os.ReadFile(prog.log)
		const private = 0o600
		errs = append(errs, err, os.WriteFile(filepath.Join(dir, name+".log"), data, private)) //nolint:gosec // as asked
	}
	return errors.Join(errs...)
}

func (p *processes) down(ctx context.Context) error {
	errs := make([]error, 0, len(services))
	for i := range services {
		errs = append(errs, p.stop(ctx, services[len(services)-1-i]))
	}
	return errors.Join(errs...)
}

// buildPrograms builds the shop and the command monotel as they are in this checkout.
func buildPrograms(ctx context.Context, dir, system string) error {
	env := []string{"CGO_ENABLED=0", "GOOS=" + system}
	_, _, err := output(ctx, env, "go", "-C", root(), "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w",
		"-o", dir+string(filepath.Separator), "./examples/orders", "./cmd/monotel")
	return err
}

// output runs a program.
func output(ctx context.Context, env []string, name string, args ...string) (stdout, stderr string, err error) {
	cmd := exec.CommandContext(ctx, name, args...) //nolint:gosec // the test's own
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	cmd.Env = append(os.Environ(), env...)
	if err := cmd.Run(); err != nil {
		return out.String(), errOut.String(), fmt.Errorf("%s %s: %w: %s", filepath.Base(name), strings.Join(args, " "), err,
			strings.TrimSpace(errOut.String()))
	}
	return out.String(), errOut.String(), nil
}
