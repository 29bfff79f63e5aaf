package mono_test

import (
	"context"
	"crypto/rand"
	"errors"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono"
)

// A cluster is three servers in this process, each with its folder and its
// ports, which it keeps when it is stopped and started again. monotest has
// single servers only, since an App cannot embed a cluster.
type cluster struct {
	nodes          []*clusterNode
	user, password string
}

const clusterSize = 3

type clusterNode struct {
	name, store      string
	port, routesPort int
	srv              *server.Server // nil while it is down
}

// startCluster returns when every server can take the lead.
func startCluster(t *testing.T) *cluster {
	t.Helper()
	c := &cluster{user: "test", password: rand.Text()}
	for i := range clusterSize {
		c.nodes = append(c.nodes, &clusterNode{
			name: "node" + strconv.Itoa(i+1), store: t.TempDir(), port: server.RANDOM_PORT, routesPort: server.RANDOM_PORT,
		})
	}
	t.Cleanup(func() {
		for _, n := range c.nodes {
			n.stop()
		}
	})
	for _, n := range c.nodes {
		c.start(t, n)
	}
	c.awaitMembers(t)
	return c
}

func (c *cluster) start(t *testing.T, n *clusterNode) {
	t.Helper()
	srv, err := server.NewServer(c.options(n))
	if err != nil {
		t.Fatal(err)
	}
	n.srv = srv
	srv.Start()
	if !srv.ReadyForConnections(patience) {
		t.Fatalf("%s does not start", n.name)
	}
	addr, ok := srv.Addr().(*net.TCPAddr)
	if !ok {
		t.Fatalf("%s listens on %v", n.name, srv.Addr())
	}
	n.port, n.routesPort = addr.Port, srv.ClusterAddr().Port
}

// stop returns when nothing of the server is left.
func (n *clusterNode) stop() {
	if n.srv == nil {
		return
	}
	n.srv.Shutdown()
	n.srv.WaitForShutdown()
	n.srv = nil
}

func (c *cluster) options(n *clusterNode) *server.Options {
	o := &server.Options{
		ServerName: n.name, Host: "127.0.0.1", Port: n.port, NoLog: true, NoSigs: true,
		Users:     []*server.User{{Username: c.user, Password: c.password}},
		JetStream: true, StoreDir: n.store, JetStreamMaxStore: 1 << 30, JetStreamMaxMemory: 64 << 20,
		Cluster: server.ClusterOpts{
			Name: "test", Host: "127.0.0.1", Port: n.routesPort, Username: c.user, Password: c.password,
		},
	}
	// The number of routes is what a new cluster waits for, so each server names
	// all of them. Of one that has no port yet, any port that nobody listens on
	// will do: it is the later server that connects.
	for _, other := range c.nodes {
		port := 1
		if other.routesPort > 0 {
			port = other.routesPort
		}
		o.Routes = append(o.Routes, &url.URL{
			Scheme: "nats-route", User: url.UserPassword(c.user, c.password), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(port)),
		})
	}
	return o
}

// url lists every server.
func (c *cluster) url() string {
	var all []string
	for _, n := range c.nodes {
		u := url.URL{
			Scheme: "nats", User: url.UserPassword(c.user, c.password), Host: net.JoinHostPort("127.0.0.1", strconv.Itoa(n.port)),
		}
		all = append(all, u.String())
	}
	return strings.Join(all, ",")
}

func (c *cluster) node(t *testing.T, name string) *clusterNode {
	t.Helper()
	i := slices.IndexFunc(c.nodes, func(n *clusterNode) bool { return n.name == name })
	if i < 0 {
		t.Fatalf("no server is named %q", name)
	}
	return c.nodes[i]
}

// awaitMembers waits until the cluster has a leader that hears from everyone, and
// everyone has caught up with it.
func (c *cluster) awaitMembers(t *testing.T) {
	t.Helper()
	eventually(t, func() bool {
		led := false
		for _, n := range c.nodes {
			if !n.srv.JetStreamIsCurrent() {
				return false
			}
			led = led || n.srv.JetStreamIsLeader() && len(n.srv.JetStreamClusterPeers()) == clusterSize
		}
		return led
	}, "the cluster is complete")
}

// A replicated stream or consumer, as its leader sees it.
type replicated func(ctx context.Context) (*jetstream.ClusterInfo, error)

func replicatedStream(js jetstream.JetStream, stream string) replicated {
	return func(ctx context.Context) (*jetstream.ClusterInfo, error) {
		s, err := js.Stream(ctx, stream)
		if err != nil {
			return nil, err
		}
		return s.CachedInfo().Cluster, nil
	}
}

func replicatedConsumer(js jetstream.JetStream, stream, durable string) replicated {
	return func(ctx context.Context) (*jetstream.ClusterInfo, error) {
		c, err := js.Consumer(ctx, stream, durable)
		if err != nil {
			return nil, err
		}
		return c.CachedInfo().Cluster, nil
	}
}

// await waits until ok. There is no answer while there is no leader, so each
// question has a short time of its own.
func (r replicated) await(t *testing.T, what string, ok func(*jetstream.ClusterInfo) bool) *jetstream.ClusterInfo {
	t.Helper()
	var info *jetstream.ClusterInfo
	eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var err error
		info, err = r(ctx)
		return err == nil && info != nil && info.Leader != "" && ok(info)
	}, what)
	return info
}

func (r replicated) leader(t *testing.T) string {
	t.Helper()
	return r.await(t, "it has a leader", func(*jetstream.ClusterInfo) bool { return true }).Leader
}

func (r replicated) awaitReplicas(t *testing.T) {
	t.Helper()
	r.await(t, "every replica is current", func(info *jetstream.ClusterInfo) bool {
		return len(info.Replicas) == clusterSize-1 &&
			!slices.ContainsFunc(info.Replicas, func(p *jetstream.PeerInfo) bool { return !p.Current || p.Offline })
	})
}

// A clusterWaste is a way to give up on a message.
type clusterWaste struct {
	reason dlq.Reason
	do     func(m *mono.Msg) error // nil: the handler panics
}

var errOdd = errors.New("it is an odd one")

var clusterWastes = []clusterWaste{
	{dlq.ReasonTerminated, (*mono.Msg).Term},
	{dlq.ReasonTerminated, func(m *mono.Msg) error { return m.TermWithReason("odd") }},
	{dlq.ReasonPermanentError, func(m *mono.Msg) error { return m.Fail(mono.Permanent(errOdd)) }},
	{dlq.ReasonUndecodable, func(m *mono.Msg) error { return m.Fail(&mono.DecodeError{Event: "odd", Err: errOdd}) }},
	{dlq.ReasonAttemptsExhausted, func(m *mono.Msg) error { return m.Fail(errOdd) }},
	{dlq.ReasonAttemptsExhausted, func(m *mono.Msg) error { return m.NakWithDelay(10 * time.Millisecond) }},
	{dlq.ReasonPanic, nil},
}

// clusterWasteOf returns how message n is to be given up, nil if it is to be acked.
func clusterWasteOf(n int) *clusterWaste {
	if n%2 == 0 {
		return nil
	}
	return &clusterWastes[n/2%len(clusterWastes)]
}

// A clusterLedger acks even messages, gives up odd ones, and notes what it got, by
// stream sequence: an event that was published again because its
// acknowledgement was lost may be stored twice, and is then two messages.
type clusterLedger struct {
	mu            sync.Mutex
	acked, wasted map[uint64]int // their numbers
}

func (l *clusterLedger) handle(_ context.Context, msgs []*mono.Msg) error {
	poisoned := false
	for _, m := range msgs {
		n, err := strconv.Atoi(string(m.Data))
		if err != nil {
			return err
		}
		// An error means that the settlement was not sent, or not confirmed: the
		// message comes back.
		switch w := clusterWasteOf(n); {
		case w == nil:
			if m.Ack() == nil {
				l.note(l.acked, m, n)
			}
		case w.do == nil:
			l.note(l.wasted, m, n)
			poisoned = true
		default:
			l.note(l.wasted, m, n)
			_ = w.do(m)
		}
	}
	if poisoned {
		panic(errOdd) // for the messages that are left
	}
	return nil
}

func (l *clusterLedger) note(in map[uint64]int, m *mono.Msg, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	in[m.Metadata().Sequence.Stream] = n
}

// publishEach publishes the numbers, each until it is acknowledged.
func publishEach(t *testing.T, bus mono.EventBus, e mono.BaseEventDefinition, from, to int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for n := from; n < to; n++ {
		for {
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			id := strconv.Itoa(n)
			_, err := bus.PublishStream(ctx, &mono.Msg{
				Subject: e.Subject, Data: []byte(id), Header: mono.Header{jetstream.MsgIDHeader: []string{id}},
			})
			cancel()
			if err == nil {
				break
			}
			if time.Now().After(deadline) || t.Context().Err() != nil {
				t.Errorf("event %d is not acknowledged in %v: %v", n, patience, err)
				return
			}
			pauseFor(t.Context(), 5*time.Millisecond)
		}
	}
}

// Every message is acked or captured, whatever becomes of the servers: those that
// lead the dead-letter stream and the consumer are restarted under load, and then
// the one that the App is connected to.
func TestCluster_deadLettersSurviveRestarts(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it waits for elections, which take seconds")
	}
	const (
		stream, durable, dead = "ORDERS", "orders", "DEAD"
		each                  = 40 // messages before, during and after the end of a server
	)
	c := startCluster(t)
	e := defineEvent(t, "OrderPlaced")
	l := &clusterLedger{acked: make(map[uint64]int), wasted: make(map[uint64]int)}
	shop := emitter("shop", e)
	app := runApp(t, []mono.Option{
		mono.WithNATS(c.url(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0)),
		mono.WithDeadLetters(dlq.Config{Stream: jetstream.StreamConfig{Name: dead, Replicas: clusterSize, MaxBytes: 64 << 20}}),
	}, shop, durableModule("orders", e, mono.StreamConsumerConfig{
		// What is settled leaves a work queue: nothing can be read a second time.
		Stream:   mono.StreamConfig{Name: stream, Retention: mono.WorkQueuePolicy, Replicas: clusterSize, MaxBytes: 64 << 20},
		Consumer: mono.ConsumerConfig{Durable: durable, AckWait: 3 * time.Second},
		Retry:    mono.RetryPolicy{MaxAttempts: 3, Backoff: []time.Duration{50 * time.Millisecond}},
	}, l.handle))

	nc, err := nats.Connect(c.url(), nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js := jetStreamOf(t, nc)
	groups := []replicated{replicatedStream(js, stream), replicatedConsumer(js, stream, durable), replicatedStream(js, dead)}
	awaitAll := func() {
		for _, r := range groups {
			r.awaitReplicas(t)
		}
		eventually(t, func() bool {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			cons, err := js.Consumer(ctx, stream, durable)
			return err == nil && cons.CachedInfo().NumPending == 0 && cons.CachedInfo().NumAckPending == 0
		}, "everything is settled")
	}
	awaitAll()

	next := 0
	publish := func() {
		publishEach(t, shop.bus, e, next, next+each)
		next += each
	}
	for _, victim := range []struct {
		what string
		name func() string
	}{
		{"the leader of the dead-letter stream", func() string { return groups[2].leader(t) }},
		{"the leader of the consumer", func() string { return groups[1].leader(t) }},
		{"the server of the App", func() string { return app.Conn().ConnectedServerName() }},
	} {
		begin := time.Now()
		n := c.node(t, victim.name())
		publish()
		var down sync.WaitGroup
		down.Go(n.stop)
		publish()
		down.Wait()
		for _, r := range groups {
			r.await(t, "another server leads", func(info *jetstream.ClusterInfo) bool { return info.Leader != n.name })
		}
		publish()
		c.start(t, n)
		c.awaitMembers(t)
		awaitAll()
		t.Logf("%s, %s: restarted in %v", victim.what, n.name, time.Since(begin).Round(time.Millisecond)) //nolint:forbidigo // it is only told
	}
	mustStop(t, app)
	awaitAll()
	checkClusterLedger(t, js, l, stream, dead, next)
}

// checkClusterLedger compares what was stored, what the handler got, and what is in the
// dead-letter stream.
func checkClusterLedger(t *testing.T, js jetstream.JetStream, l *clusterLedger, stream, dead string, published int) {
	t.Helper()
	records := clusterRecords(t, js, dead)
	s, err := js.Stream(within(t), stream)
	if err != nil {
		t.Fatal(err)
	}
	state := s.CachedInfo().State
	if state.Msgs != 0 {
		t.Errorf("%d messages are in the work queue still", state.Msgs)
	}
	if stored := int(state.LastSeq); stored < published || stored != len(l.acked)+len(records) {
		t.Errorf("%d events were published, %d stored, %d acked and %d captured", published, stored, len(l.acked), len(records))
	}
	numbers := make(map[int]bool)
	for seq := uint64(1); seq <= state.LastSeq; seq++ {
		have := records[seq]
		if n, ok := l.acked[seq]; ok {
			numbers[n] = true
			if len(have) > 0 {
				t.Errorf("message %d was acked, and is captured as %q", seq, have[0].Reason)
			}
			continue
		}
		n, ok := l.wasted[seq]
		if !ok {
			t.Errorf("message %d was neither acked nor given up", seq)
			continue
		}
		numbers[n] = true
		if len(have) != 1 {
			t.Errorf("message %d was given up, and captured %d times", seq, len(have))
			continue
		}
		if r, want := have[0], clusterWasteOf(n).reason; r.Reason != want || string(r.Data) != strconv.Itoa(n) {
			t.Errorf("message %d, %d, is captured as %q with body %q, want %q", seq, n, r.Reason, r.Data, want)
		}
	}
	if len(numbers) != published {
		t.Errorf("%d of %d events were handled", len(numbers), published)
	}
}

// clusterRecords returns what is in the dead-letter stream, by stream sequence.
func clusterRecords(t *testing.T, js jetstream.JetStream, dead string) map[uint64][]*dlq.Record {
	t.Helper()
	ctx := within(t)
	s, err := js.Stream(ctx, dead)
	if err != nil {
		t.Fatal(err)
	}
	records := make(map[uint64][]*dlq.Record)
	for seq := uint64(1); seq <= s.CachedInfo().State.LastSeq; seq++ {
		msg, err := s.GetMsg(ctx, seq)
		if err != nil {
			t.Fatalf("dead letter %d: %v", seq, err)
		}
		r, err := dlq.Decode(msg.Header, msg.Data)
		if err != nil {
			t.Fatalf("dead letter %d: %v", seq, err)
		}
		records[r.StreamSequence] = append(records[r.StreamSequence], r)
	}
	return records
}
