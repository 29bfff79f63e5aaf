package scale

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	nodes        = 3
	poll         = 5 * time.Millisecond
	patience     = time.Minute
	maxReconnect = -1
)

// A cluster is three servers, each a process of its own with a folder of its own,
// which listen on the loopback interface only.
type cluster struct {
	dir      string
	password string
	nodes    []*child
	urls     []string

	nc *nats.Conn
	js jetstream.JetStream
}

// startCluster returns when the cluster makes streams.
func startCluster(ctx context.Context, dir string) (c *cluster, err error) {
	c = &cluster{dir: dir, password: rand.Text()}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.stop())
		}
	}()
	// A new cluster waits for as many nodes as there are routes, so each names two.
	// Of a node that has not started, any port will do that nobody listens on: the
	// later one connects.
	routes := make([]int, nodes)
	for i := range routes {
		routes[i] = 1
	}
	for i := range nodes {
		spec := nodeSpec{Name: nodeName(i), Dir: c.nodeDir(i), Password: c.password}
		for j, port := range routes {
			if j != i {
				spec.Routes = append(spec.Routes, port)
			}
		}
		var ports nodePorts
		n, err := startChild(ctx, "node", spec, &ports)
		if err != nil {
			return c, err
		}
		routes[i] = ports.Routes
		c.nodes = append(c.nodes, n)
		c.urls = append(c.urls, "nats://"+net.JoinHostPort(loopback, strconv.Itoa(ports.Client)))
	}
	if c.nc, err = nats.Connect(c.urls[0], nats.UserInfo(user, c.password), nats.MaxReconnects(maxReconnect)); err != nil {
		return c, err
	}
	if c.js, err = jetstream.New(c.nc); err != nil {
		return c, err
	}
	const probe = "PROBE"
	err = until(ctx, func() error {
		_, err := c.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: probe, Subjects: []string{"probe"}, Replicas: nodes, MaxBytes: 1 << 20,
		})
		return err
	})
	if err != nil {
		return c, fmt.Errorf("the cluster makes no streams: %w", err)
	}
	return c, c.js.DeleteStream(ctx, probe)
}

func nodeName(i int) string { return "node" + strconv.Itoa(i+1) }

func (c *cluster) nodeDir(i int) string { return filepath.Join(c.dir, nodeName(i)) }

// nodeURL is for a worker: it connects to that node, and to others when it is gone.
func (c *cluster) nodeURL(i int) string {
	u, _ := url.Parse(c.urls[i])
	u.User = url.UserPassword(user, c.password)
	return u.String()
}

func (c *cluster) stop() error {
	if c.nc != nil {
		c.nc.Close()
	}
	var errs []error
	for _, n := range slices.Backward(c.nodes) {
		errs = append(errs, n.stop())
	}
	return errors.Join(errs...)
}

func (c *cluster) stats(collect bool) ([]nodeStats, error) {
	all := make([]nodeStats, len(c.nodes))
	for i, n := range c.nodes {
		if err := n.call(nodeQuestion{collect}, &all[i]); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// disk is how many bytes the nodes have in files.
func (c *cluster) disk() (sum int64, err error) {
	err = filepath.WalkDir(c.dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return ignoreGone(err)
		}
		info, err := d.Info()
		if err == nil {
			sum += info.Size()
		}
		return ignoreGone(err)
	})
	return sum, err
}

// ignoreGone passes over files that a server removed meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// createStream makes a stream that is led by a node. One without replicas stays where
// the cluster put it.
func (c *cluster) createStream(ctx context.Context, cfg jetstream.StreamConfig, leader int) error {
	if _, err := c.js.CreateStream(ctx, cfg); err != nil {
		return fmt.Errorf("stream %q: %w", cfg.Name, err)
	}
	if cfg.Replicas == 1 {
		return nil
	}
	return c.lead(ctx, "STREAM.LEADER.STEPDOWN."+cfg.Name, leader, func(ctx context.Context) (*jetstream.ClusterInfo, error) {
		return c.streamCluster(ctx, cfg.Name)
	})
}

func (c *cluster) createConsumer(ctx context.Context, stream string, cfg jetstream.ConsumerConfig, leader int) error {
	cons, err := c.js.CreateConsumer(ctx, stream, cfg)
	if err != nil {
		return fmt.Errorf("consumer %q: %w", cfg.Durable, err)
	}
	if leader == anyNode {
		return nil
	}
	request := "CONSUMER.LEADER.STEPDOWN." + stream + "." + cfg.Durable
	return c.lead(ctx, request, leader, func(ctx context.Context) (*jetstream.ClusterInfo, error) {
		info, err := cons.Info(ctx)
		if err != nil {
			return nil, err
		}
		return info.Cluster, nil
	})
}

// anyNode leaves it to the cluster who leads.
const anyNode = -1

func (c *cluster) streamCluster(ctx context.Context, stream string) (*jetstream.ClusterInfo, error) {
	s, err := c.js.Stream(ctx, stream)
	if err != nil {
		return nil, err
	}
	return s.CachedInfo().Cluster, nil
}

// streamLeader returns the number of the node that leads a stream.
func (c *cluster) streamLeader(ctx context.Context, stream string) (int, error) {
	info, err := c.streamCluster(ctx, stream)
	if err != nil {
		return 0, err
	}
	for i := range nodes {
		if nodeName(i) == info.Leader {
			return i, nil
		}
	}
	return 0, fmt.Errorf("stream %q is led by %q", stream, info.Leader)
}

// lead asks the leader of a stream or a consumer to step down for a node, until that
// leads and the others are current.
func (c *cluster) lead(
	ctx context.Context, request string, node int, look func(context.Context) (*jetstream.ClusterInfo, error),
) error {
	question, err := json.Marshal(map[string]any{"placement": map[string]string{"preferred": nodeName(node)}})
	if err != nil {
		return err
	}
	asked := time.Time{}
	err = until(ctx, func() error {
		// Nobody answers while there is no leader.
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		info, err := look(ctx)
		switch {
		case err != nil:
			return err
		case info == nil || info.Leader == "":
			return errors.New("no leader")
		case info.Leader == nodeName(node):
			if i := slices.IndexFunc(info.Replicas, func(p *jetstream.PeerInfo) bool { return !p.Current }); i >= 0 {
				return fmt.Errorf("%s is not current", info.Replicas[i].Name)
			}
			return nil
		case time.Since(asked) > time.Second: // an election takes a while, and may end otherwise
			asked = time.Now()
			if _, err := c.nc.Request("$JS.API."+request, question, time.Second); err != nil {
				return err
			}
		}
		return fmt.Errorf("%s leads", info.Leader)
	})
	if err != nil {
		return fmt.Errorf("%s for %s: %w", request, nodeName(node), err)
	}
	return nil
}

// until repeats f until it succeeds, and returns its last error when time is up.
func until(ctx context.Context, f func() error) error {
	deadline := time.Now().Add(patience)
	t := time.NewTicker(poll)
	defer t.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("after %v: %w", patience, err)
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		}
	}
}
