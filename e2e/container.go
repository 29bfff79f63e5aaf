package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// containers is the stack of docker-compose.yml.
type containers struct {
	work    string
	project string
	compose []string // docker compose, or docker-compose
	env     []string
	image   string            // of this run: the shop as it is in this checkout
	ports   map[string]int    // by service, on loopback
	ids     map[string]string // of the containers, by service; docker is a second faster than compose
}

// portVariables of docker-compose.yml, for the ports that it publishes.
var portVariables = map[string]string{
	serviceNATS: "NATS_PORT", serviceJaeger: "JAEGER_PORT", servicePrometheus: "PROMETHEUS_PORT",
	serviceEmitter: "EMITTER_PORT", serviceConsumers: "CONSUMERS_PORT",
}

const composeLabel = "com.docker.compose."

// composeCommand is the compose that is there, or why there can be no containers.
func composeCommand(ctx context.Context) ([]string, error) {
	if _, _, err := output(ctx, nil, "docker", "info", "--format", "{{.ServerVersion}}"); err != nil {
		return nil, fmt.Errorf("no Docker engine answers: %w", err)
	}
	for _, compose := range [][]string{{"docker", "compose"}, {"docker-compose"}} {
		if _, _, err := output(ctx, nil, compose[0], append(compose[1:], "version")...); err == nil {
			return compose, nil
		}
	}
	return nil, errors.New("a Docker engine answers, but there is neither 'docker compose' nor docker-compose")
}

func newContainers(work string, compose []string) (*containers, error) {
	images, err := readEnv(filepath.Join(root(), "e2e", "images", "out", "images.env"))
	if err != nil {
		return nil, fmt.Errorf("%w; 'make images' builds what is needed", err)
	}
	run := strconv.FormatInt(time.Now().UnixMilli(), 36)
	c := &containers{
		work: work, project: "monotel-e2e-" + run, compose: compose, image: "monotel-e2e/orders:" + run,
		ports: make(map[string]int), ids: make(map[string]string),
	}
	c.env = append(c.env, "ORDERS_IMAGE="+c.image, "ORDERS_RATE=0", // no customers but those of the tests
		"HEALTH_INTERVAL=1s", exportTimeout)
	for k, v := range images {
		c.env = append(c.env, k+"="+v)
	}
	return c, nil
}

// buildImage makes the image of the shop, without the base images of the Dockerfile:
// there may be no registry.
func (c *containers) buildImage(ctx context.Context, dir string) error {
	const private = 0o700
	if err := os.MkdirAll(dir, private); err != nil {
		return err
	}
	if err := buildPrograms(ctx, dir, "linux"); err != nil {
		return err
	}
	_, _, err := output(ctx, nil, "docker", "build", "--quiet", "--tag", c.image,
		"--file", filepath.Join(root(), "deploy", "Dockerfile.binary"), dir)
	return err
}

// do runs a command of compose.
func (c *containers) do(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	all := slices.Concat(c.compose[1:], []string{"--project-name", c.project, "--file", filepath.Join(root(), "docker-compose.yml")}, args)
	return output(ctx, c.env, c.compose[0], all...)
}

func (c *containers) up(ctx context.Context) error {
	if err := c.buildImage(ctx, filepath.Join(c.work, "image")); err != nil {
		return err
	}
	ports, err := freePorts(len(portVariables)) // only now: they are taken at once
	if err != nil {
		return err
	}
	for i, service := range slices.Sorted(maps.Keys(portVariables)) {
		c.ports[service] = ports[i]
		c.env = append(c.env, portVariables[service]+"="+strconv.Itoa(ports[i]))
	}
	if _, _, err := c.do(ctx, append([]string{"up", "--detach", "--no-build"}, services...)...); err != nil {
		return err
	}
	all, err := c.list(ctx)
	if err != nil {
		return err
	}
	for id, service := range all {
		c.ids[service] = id
	}
	return poll(ctx, c.healthy)
}

// list is the service of each container, by its ID. args are further ones of docker ps.
func (c *containers) list(ctx context.Context, args ...string) (map[string]string, error) {
	out, _, err := output(ctx, nil, "docker", append([]string{
		"ps", "--all", "--filter", "label=" + composeLabel + "project=" + c.project,
		"--format", `{{.ID}} {{.Label "` + composeLabel + `service"}}`,
	}, args...)...)
	found := make(map[string]string)
	for line := range strings.Lines(out) {
		id, service, _ := strings.Cut(strings.TrimSpace(line), " ")
		found[id] = service
	}
	return found, err
}

// healthy is an error unless the health check of every service says that it is.
func (c *containers) healthy(ctx context.Context) error {
	well, err := c.list(ctx, "--filter", "health=healthy")
	if err == nil && len(well) != len(services) {
		err = fmt.Errorf("of %d services only %v are healthy", len(services), slices.Sorted(maps.Values(well)))
	}
	return err
}

// docker runs a command of docker whose last argument is the container of a service.
func (c *containers) docker(ctx context.Context, service string, args ...string) (stdout string, err error) {
	stdout, _, err = output(ctx, nil, "docker", append(args, c.ids[service])...)
	return strings.TrimSpace(stdout), err
}

func (c *containers) stop(ctx context.Context, service string) error {
	_, err := c.docker(ctx, service, "stop", "-t", "45") // the longest stop_grace_period
	return err
}

func (c *containers) freeze(ctx context.Context, service string) error {
	_, err := c.docker(ctx, service, "kill", "--signal=STOP")
	return err
}

func (c *containers) kill(ctx context.Context, service string) error {
	_, err := c.docker(ctx, service, "kill")
	return err
}

func (c *containers) start(ctx context.Context, service string) error {
	_, err := c.docker(ctx, service, "start")
	return err
}

var errElsewhere = errors.New("the engine's processes are not on this machine")

// crash ends the process of a service behind Docker's back. Docker does not start again
// what it was asked to kill.
func (c *containers) crash(ctx context.Context, service string) error {
	text, err := c.docker(ctx, service, "inspect", "--format", "{{.State.Pid}}")
	if err != nil {
		return err
	}
	// The number is that of another process if the engine runs in a virtual machine.
	group, err := os.ReadFile("/proc/" + text + "/cgroup") //nolint:gosec // a number of Docker's
	if err != nil || !strings.Contains(string(group), c.ids[service]) {
		return errElsewhere
	}
	pid, err := strconv.Atoi(text)
	if err != nil {
		return err
	}
	process, err := os.FindProcess(pid)
	if err != nil {
		return err
	}
	return process.Kill()
}

// restarts is how often Docker has started a service again.
func (c *containers) restarts(ctx context.Context, service string) (string, error) {
	return c.docker(ctx, service, "inspect", "--format", "{{.RestartCount}}")
}

func (c *containers) url(service string) string {
	return "http://127.0.0.1:" + strconv.Itoa(c.ports[service])
}

func (c *containers) monotel(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	return output(ctx, nil, "docker", append([]string{"exec", c.ids[serviceConsumers], "/monotel"}, args...)...)
}

func (c *containers) monitor(ctx context.Context, page string, into any) error {
	out, _, err := output(ctx, nil, "docker", "exec", c.ids[serviceNATS], "wget", "-qO-", "http://127.0.0.1:8222"+page)
	if err != nil {
		return err
	}
	return json.Unmarshal([]byte(out), into)
}

func (c *containers) logs(ctx context.Context, dir string) error {
	errs := make([]error, 0, 2*len(services)) //nolint:mnd // reading and writing
	for _, service := range services {
		out, _, err := c.do(ctx, "logs", "--no-color", "--timestamps", service)
		const private = 0o600
		errs = append(errs, err, os.WriteFile(filepath.Join(dir, service+".log"), []byte(out), private))
	}
	return errors.Join(errs...)
}

// down makes sure that nothing is left.
func (c *containers) down(ctx context.Context) error {
	_, _, err := c.do(ctx, "down", "--volumes", "--remove-orphans", "--timeout", "20")
	errs := []error{err}
	_, _, err = output(ctx, nil, "docker", "image", "rm", "--force", c.image)
	errs = append(errs, err)
	label := "label=" + composeLabel + "project=" + c.project
	for _, list := range [][]string{{"ps", "--all"}, {"volume", "ls"}, {"network", "ls"}} {
		out, _, err := output(ctx, nil, "docker", append(list, "--quiet", "--filter", label)...)
		errs = append(errs, err)
		if left := strings.Fields(out); len(left) > 0 {
			errs = append(errs, fmt.Errorf("docker %s: left behind: %v", strings.Join(list, " "), left))
		}
	}
	return errors.Join(errs...)
}
