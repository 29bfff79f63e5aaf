package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// containers is the stack of docker-compose.yml.
type containers struct {
	project string
	compose []string // docker compose, or docker-compose
	env     []string
	image   string         // of this run: the shop as it is in this checkout
	ports   map[string]int // by service, on loopback
}

// portVariables of docker-compose.yml, for the ports that it publishes.
var portVariables = map[string]string{
	serviceNATS: "NATS_PORT", serviceJaeger: "JAEGER_PORT", servicePrometheus: "PROMETHEUS_PORT",
	serviceEmitter: "EMITTER_PORT", serviceConsumers: "CONSUMERS_PORT",
}

func newContainers(ctx context.Context, work string) (*containers, error) {
	images, err := readEnv(filepath.Join(root(), "e2e", "images", "out", "images.env"))
	if err != nil {
		return nil, fmt.Errorf("%w; 'make images' builds what is needed", err)
	}
	run := strconv.FormatInt(time.Now().UnixMilli(), 36)
	c := &containers{
		project: "monotel-e2e-" + run, ports: make(map[string]int), image: "monotel-e2e/orders:" + run,
		compose: []string{"docker", "compose"},
		// No customers but those of the tests.
		env: []string{"ORDERS_RATE=0", "ORDERS_IMAGE=monotel-e2e/orders:" + run},
	}
	if exec.CommandContext(ctx, "docker", "compose", "version").Run() != nil {
		c.compose = []string{"docker-compose"}
	}
	for k, v := range images {
		c.env = append(c.env, k+"="+v)
	}
	ports, err := freePorts(len(portVariables))
	if err != nil {
		return nil, err
	}
	for i, service := range slices.Sorted(maps.Keys(portVariables)) {
		c.ports[service] = ports[i]
		c.env = append(c.env, portVariables[service]+"="+strconv.Itoa(ports[i]))
	}
	if err := c.buildImage(ctx, filepath.Join(work, "image")); err != nil {
		return nil, err
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
	static := []string{"CGO_ENABLED=0", "GOOS=linux", "GOFLAGS=-buildvcs=false"}
	if err := buildPrograms(ctx, dir, static); err != nil {
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
	_, _, err := c.do(ctx, append([]string{"up", "--detach", "--no-build"}, services...)...)
	return err
}

func (c *containers) stop(ctx context.Context, service string) error {
	_, _, err := c.do(ctx, "stop", service)
	return err
}

// kill does without compose, which takes a second to begin.
func (c *containers) kill(ctx context.Context, service string) error {
	id, _, err := output(ctx, nil, "docker", "ps", "--quiet", "--filter", "label=com.docker.compose.project="+c.project,
		"--filter", "label=com.docker.compose.service="+service)
	if err != nil {
		return err
	}
	_, _, err = output(ctx, nil, "docker", "kill", strings.TrimSpace(id))
	return err
}

func (c *containers) start(ctx context.Context, service string) error {
	_, _, err := c.do(ctx, "start", service)
	return err
}

func (c *containers) url(service string) string {
	return "http://127.0.0.1:" + strconv.Itoa(c.ports[service])
}

func (c *containers) monotel(ctx context.Context, args ...string) (stdout, stderr string, err error) {
	return c.do(ctx, append([]string{"exec", "-T", serviceConsumers, "/monotel"}, args...)...)
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
	label := "label=com.docker.compose.project=" + c.project
	for _, list := range [][]string{{"ps", "--all"}, {"volume", "ls"}, {"network", "ls"}} {
		out, _, err := output(ctx, nil, "docker", append(list, "--quiet", "--filter", label)...)
		errs = append(errs, err)
		if left := strings.Fields(out); len(left) > 0 {
			errs = append(errs, fmt.Errorf("docker %s: left behind: %v", strings.Join(list, " "), left))
		}
	}
	return errors.Join(errs...)
}
