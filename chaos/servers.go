package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	loopback = "127.0.0.1"
	user     = "chaos"
)

// servers are one NATS server, or a cluster, each in a process of its own.
type servers struct {
	binary   string
	dir      string
	password string
	nodes    []*node
	routes   []*link // between the nodes
	disk     *disk   // nil: there is none

	nc *nats.Conn // past all links
	js jetstream.JetStream

	mu sync.Mutex // one fault of servers at a time
}

type node struct {
	name         string
	port, routes int
	config, log  string
	process      *process // nil while it is down
	links        []*link  // of its routes, both ways
}

// freePorts are free now, and were not given before.
func freePorts(ctx context.Context, n int) ([]int, error) {
	ports := make([]int, n)
	var all []net.Listener
	defer func() { // at once, so that they differ
		for _, l := range all {
			_ = l.Close() // it has told its port
		}
	}()
	for i := range ports {
		var lc net.ListenConfig
		l, err := lc.Listen(ctx, "tcp", loopback+":0")
		if err != nil {
			return nil, err
		}
		all = append(all, l)
		addr, ok := l.Addr().(*net.TCPAddr)
		if !ok {
			return nil, fmt.Errorf("listens on %v", l.Addr())
		}
		ports[i] = addr.Port
	}
	return ports, nil
}

func startServers(ctx context.Context, binary, dir string, n int, store *disk) (s *servers, err error) {
	s = &servers{binary: binary, dir: dir, password: rand.Text(), disk: store}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	ports, err := freePorts(ctx, 2*n)
	if err != nil {
		return s, err
	}
	for i := range n {
		name := "node" + strconv.Itoa(i+1)
		s.nodes = append(s.nodes, &node{
			name: name, port: ports[2*i], routes: ports[2*i+1],
			config: filepath.Join(dir, name+".conf"), log: filepath.Join(dir, name+".log"),
		})
	}
	for i, nd := range s.nodes {
		if err := s.configure(ctx, i, nd); err != nil {
			return s, err
		}
	}
	for _, nd := range s.nodes {
		if err := s.start(nd); err != nil {
			return s, err
		}
	}
	err = s.connect(ctx)
	return s, err
}

// configure writes the configuration of a node. Each pair of nodes has a link of its
// own in both directions; addresses that nodes tell of each other lead nowhere.
func (s *servers) configure(ctx context.Context, i int, nd *node) error {
	store := filepath.Join(s.dir, nd.name)
	if s.disk != nil {
		store = s.disk.dir
	}
	var b strings.Builder
	fmt.Fprintf(&b, "server_name: %s\nlisten: \"%s:%d\"\n", nd.name, loopback, nd.port)
	fmt.Fprintf(&b, "authorization { user: %s, password: %q }\n", user, s.password)
	fmt.Fprintf(&b, "jetstream { store_dir: %q, max_file_store: 16GB, max_memory_store: 256MB }\n", store)
	if len(s.nodes) > 1 {
		fmt.Fprintf(&b, "cluster {\n name: chaos\n listen: \"%s:%d\"\n advertise: \"%s:1\"\n no_advertise: true\n", loopback, nd.routes, loopback)
		fmt.Fprintf(&b, " authorization { user: %s, password: %q }\n routes: [\n", user, s.password)
		for j, other := range s.nodes {
			if i == j {
				continue
			}
			k, err := newLink(ctx, net.JoinHostPort(loopback, strconv.Itoa(other.routes)))
			if err != nil {
				return err
			}
			s.routes = append(s.routes, k)
			nd.links, other.links = append(nd.links, k), append(other.links, k)
			u := url.URL{Scheme: "nats-route", User: url.UserPassword(user, s.password), Host: k.addr()}
			fmt.Fprintf(&b, "  %q\n", u.String())
		}
		b.WriteString(" ]\n}\n")
	}
	return os.WriteFile(nd.config, []byte(b.String()), 0o600)
}

func (s *servers) start(nd *node) (err error) {
	nd.process, err = startProcess(nd.log, s.binary, nil, "-c", nd.config)
	return err
}

func (s *servers) node(name string) *node {
	i := max(slices.IndexFunc(s.nodes, func(n *node) bool { return n.name == name }), 0)
	return s.nodes[i]
}

func (s *servers) url(addrs ...string) string {
	all := make([]string, len(addrs))
	for i, a := range addrs {
		all[i] = (&url.URL{Scheme: "nats", User: url.UserPassword(user, s.password), Host: a}).String()
	}
	return strings.Join(all, ",")
}

func (n *node) addr() string { return net.JoinHostPort(loopback, strconv.Itoa(n.port)) }

// connect returns when streams can be made.
func (s *servers) connect(ctx context.Context) error {
	addrs := make([]string, len(s.nodes))
	for i, nd := range s.nodes {
		addrs[i] = nd.addr()
	}
	err := until(ctx, time.Minute, func(context.Context) (err error) {
		s.nc, err = nats.Connect(s.url(addrs...), nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond),
			nats.IgnoreDiscoveredServers())
		return err
	})
	if err != nil {
		return err
	}
	if s.js, err = jetstream.New(s.nc); err != nil {
		return err
	}
	const probe = "PROBE"
	err = until(ctx, time.Minute, func(ctx context.Context) error {
		_, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: probe, Subjects: []string{"probe"}, Replicas: len(s.nodes), MaxBytes: 1 << 20,
		})
		return err
	})
	if err != nil {
		return fmt.Errorf("the servers make no streams: %w", err)
	}
	return s.js.DeleteStream(ctx, probe)
}

// ready waits until a node that was started answers.
func (s *servers) ready(ctx context.Context, nd *node) error {
	return until(ctx, time.Minute, func(context.Context) error {
		select {
		case <-nd.process.ended: // its port may be in use for a moment
			if err := s.start(nd); err != nil {
				return err
			}
		default:
		}
		nc, err := nats.Connect(s.url(nd.addr()), nats.Timeout(time.Second), nats.NoReconnect())
		if err != nil {
			return err
		}
		defer nc.Close()
		js, err := jetstream.New(nc)
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		_, err = js.AccountInfo(ctx)
		return err
	})
}

func (s *servers) stop() error {
	if s.nc != nil {
		s.nc.Close()
	}
	var errs []error
	for _, nd := range s.nodes {
		if nd.process != nil {
			nd.process.signal(syscall.SIGCONT)
			nd.process.signal(syscall.SIGTERM)
		}
	}
	for _, nd := range s.nodes {
		if nd.process != nil {
			errs = append(errs, nd.process.end(syscall.SIGTERM, 20*time.Second))
		}
	}
	for _, k := range s.routes {
		k.close()
	}
	return errors.Join(errs...)
}

// until repeats f until it succeeds, and returns its last error when time is up.
func until(ctx context.Context, patience time.Duration, f func(context.Context) error) error {
	const every, each = 50 * time.Millisecond, 5 * time.Second
	deadline := time.Now().Add(patience)
	for {
		attempt, cancel := context.WithTimeout(ctx, each)
		err := f(attempt)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return errors.Join(context.Cause(ctx), err)
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %v: %w", patience, err)
		}
		wait(ctx, every)
	}
}
