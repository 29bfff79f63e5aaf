package scale

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

const (
	streamBytes = 512 << 20
	cellTimeout = 2 * time.Minute
	atOnce      = 8 // requests to the cluster
)

// A result is what one cell measured. CPU is in microseconds a message, all
// processes of the role together; bytes are those of messages, without the protocol
// around them.
type result struct {
	Cell    cell    `json:"cell"`
	Round   int     `json:"round"`
	Stored  int     `json:"stored"` // messages, by publishers of the cell
	Acked   int     `json:"acked"`  // messages, each exactly once
	Again   int     `json:"again"`  // deliveries that repeated one
	Seconds float64 `json:"seconds"`

	PublisherCPU float64        `json:"publisher_cpu"`
	ConsumerCPU  float64        `json:"consumer_cpu"`
	NodeCPU      [nodes]float64 `json:"node_cpu"`
	Leader       int            `json:"leader"` // the node that leads the first stream and its consumers

	ClientBytes float64      `json:"client_bytes"` // a message, between clients and nodes
	RouteBytes  float64      `json:"route_bytes"`  // a message, between nodes
	NodeMemory  [nodes]int64 `json:"node_memory"`
	Worker      int64        `json:"worker"` // memory of the largest one
}

// messages is what costs are divided by: what was stored, or what was acked where the
// cell published nothing.
func (r result) messages() int {
	if r.Stored > 0 {
		return r.Stored
	}
	return r.Acked
}

// rate is in messages a second.
func (r result) rate() float64 { return float64(r.messages()) / r.Seconds }

func (r result) leaderCPU() float64 { return r.NodeCPU[r.Leader] }

// followerCPU is that of one follower, on average.
func (r result) followerCPU() float64 {
	return (r.serverCPU() - r.leaderCPU()) / (nodes - 1)
}

func (r result) serverCPU() (sum float64) {
	for _, cpu := range r.NodeCPU {
		sum += cpu
	}
	return sum
}

func (r result) sumCPU() float64 { return r.PublisherCPU + r.ConsumerCPU + r.serverCPU() }

// busy is how many CPUs all processes used.
func (r result) busy() float64 { return r.sumCPU() * r.rate() / 1e6 }

// busiest is the CPU of the node that has most to do.
func (r result) busiest() float64 { return max(r.NodeCPU[0], r.NodeCPU[1], r.NodeCPU[2]) }

// A lab measures cells on a cluster.
type lab struct {
	*cluster

	spell    time.Duration
	backlogs int // messages

	ready backlog // what is in the streams; zero: there are none
	runs  int
}

// A trial is one cell while it is measured.
type trial struct {
	*lab
	cell

	name       string // a part of the names of durables
	leader     int
	publishers []*child
	consumers  []*child
	consume    []consumeSpec
}

func (l *lab) measure(ctx context.Context, c cell) (res result, err error) {
	ctx, cancel := context.WithTimeout(ctx, cellTimeout)
	defer cancel()
	l.runs++
	t := &trial{lab: l, cell: c, name: "c" + strconv.Itoa(l.runs)}
	defer func() { err = errors.Join(err, t.end(context.WithoutCancel(ctx))) }()
	if err := t.prepare(ctx); err != nil {
		return result{}, err
	}
	if err := t.startWorkers(ctx); err != nil {
		return result{}, err
	}
	return t.run(ctx)
}

// prepare makes streams and durables, unless the last cell left the same backlog.
func (t *trial) prepare(ctx context.Context) error {
	if t.Publishers > 0 || t.ready != t.backlog() {
		if err := t.clear(ctx); err != nil {
			return err
		}
		for i := range t.Streams {
			err := t.createStream(ctx, jetstream.StreamConfig{
				Name: streamName(i), Subjects: []string{streamName(i) + ".>"}, Replicas: t.Replicas, MaxBytes: streamBytes,
			}, i%nodes)
			if err != nil {
				return err
			}
		}
		if t.Publishers == 0 {
			if err := t.fill(ctx); err != nil {
				return fmt.Errorf("backlog: %w", err)
			}
		}
	}
	var err error
	if t.leader, err = t.streamLeader(ctx, streamName(0)); err != nil {
		return err
	}
	if t.Consumers == 0 {
		return nil
	}
	share := t.backlogs / t.Streams // messages of a stream
	for i := range t.partitions() {
		for range t.FanOut {
			c := consumeSpec{
				Stream: streamName(i / t.Subjects), Durable: fmt.Sprintf("%s_%d", t.name, len(t.consume)), Event: i,
			}
			if t.Publishers == 0 {
				c.Start = uint64(share - t.Messages/t.Streams + 1) //nolint:gosec // small
			}
			t.consume = append(t.consume, c)
		}
	}
	return t.createConsumers(ctx)
}

// createConsumers makes durables that wait, so that all workers are there when the
// first message comes. An App takes a durable as it is where it asks for nothing else.
func (t *trial) createConsumers(ctx context.Context) error {
	const many = 10 // to ask each for another leader
	subjects := t.subjects()
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i, c := range t.consume {
		cfg := c.config(t.MaxAckPending)
		cfg.FilterSubject, cfg.AckPolicy, cfg.MaxDeliver = subjects[c.Event], jetstream.AckExplicitPolicy, -1
		if t.Publishers == 0 {
			later := time.Now().Add(time.Hour)
			cfg.PauseUntil = &later
		}
		leader := (t.leader + i%max(t.partitions(), 1)) % nodes
		if len(t.consume) > many || t.Replicas == 1 {
			leader = anyNode
		}
		g.Go(func() error { return t.createConsumer(ctx, c.Stream, cfg, leader) })
	}
	return g.Wait()
}

func streamName(i int) string { return "S" + strconv.Itoa(i) }

func (t *trial) subjects() []string {
	all := make([]string, 0, t.partitions())
	for i := range t.Streams {
		for j := range t.Subjects {
			all = append(all, fmt.Sprintf("%s.e%d", streamName(i), j))
		}
	}
	return all
}

// clear deletes the streams, and with them their durables.
func (l *lab) clear(ctx context.Context) error {
	l.ready = backlog{}
	for name := range l.js.StreamNames(ctx).Name() {
		if err := l.js.DeleteStream(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// fill publishes the backlog as an App does.
func (t *trial) fill(ctx context.Context) error {
	p, err := t.startWorker(ctx, t.leader, workerSpec{
		Subjects: t.subjects(), Publish: &publishSpec{Count: t.backlogs, Window: window},
	})
	if err != nil {
		return err
	}
	if err := p.call(workerQuestion{Begin: true}, &workerReport{}); err != nil {
		return errors.Join(err, p.stop())
	}
	r, err := await(ctx, []*child{p}, func(r workerReport) bool { return r.Ended })
	if err := errors.Join(err, p.stop()); err != nil {
		return err
	}
	if r.Done != t.backlogs {
		return fmt.Errorf("%d of %d messages are stored", r.Done, t.backlogs)
	}
	t.ready = t.backlog()
	return nil
}

func (t *trial) startWorker(ctx context.Context, node int, spec workerSpec) (*child, error) {
	spec.URL = t.nodeURL(node % nodes)
	return startChild(ctx, "worker", spec, &workerReport{})
}

// startWorkers starts all processes at once.
func (t *trial) startWorkers(ctx context.Context) error {
	subjects := t.subjects()
	spec := workerSpec{
		Subjects: subjects, Consume: t.consume,
		Concurrency: t.Concurrency, Batch: t.Batch, Handler: t.Handler, MaxAckPending: t.MaxAckPending,
	}
	t.publishers, t.consumers = make([]*child, t.Publishers), make([]*child, t.Consumers)
	var g errgroup.Group
	start := func(to **child, i int, spec workerSpec) {
		g.Go(func() (err error) {
			*to, err = t.startWorker(ctx, t.node(i), spec)
			return err
		})
	}
	for i := range t.publishers {
		start(&t.publishers[i], i, workerSpec{Subjects: subjects, Publish: &publishSpec{
			Sync: t.Sync, Window: t.Window, Count: t.Messages / t.Publishers, For: t.spell, Rate: t.Rate / t.Publishers,
		}})
	}
	for i := range t.consumers {
		start(&t.consumers[i], i, spec)
	}
	return g.Wait()
}

// node is where worker i connects.
func (t *trial) node(i int) int {
	switch t.Clients {
	case clientsFar:
		return t.leader + 1
	case clientsSpread:
		return i
	default:
		return t.leader
	}
}

// run measures from the moment when publishers begin and durables deliver until the
// last message is settled.
func (t *trial) run(ctx context.Context) (result, error) {
	before, err := t.look()
	if err != nil {
		return result{}, err
	}
	begin, err := t.begin(ctx)
	if err != nil {
		return result{}, err
	}
	stored, err := await(ctx, t.publishers, func(r workerReport) bool { return r.Ended })
	if err != nil {
		return result{}, fmt.Errorf("publish: %w", err)
	}
	acked := workerReport{}
	if t.Consumers > 0 {
		acked, err = await(ctx, t.consumers, func(r workerReport) bool { return r.Done >= t.deliveries() })
		if err != nil {
			return result{}, fmt.Errorf("consume: %w", err)
		}
	}
	res := result{
		Cell: t.cell, Stored: stored.Done, Acked: acked.Done, Leader: t.leader,
		Seconds: time.Unix(0, max(stored.Last, acked.Last)).Sub(begin).Seconds(),
	}
	if res.Again, err = t.check(ctx, stored.Done, acked.Done); err != nil {
		return result{}, err
	}
	after, err := t.look()
	if err != nil {
		return result{}, err
	}
	return res.spent(before, after), nil
}

// begin starts the publishers, or sets the time at which all durables deliver: the
// server wakes them up at the end of a pause, and not when it is taken back.
func (t *trial) begin(ctx context.Context) (time.Time, error) {
	begin := time.Now()
	for _, p := range t.publishers {
		if err := p.call(workerQuestion{Begin: true}, &workerReport{}); err != nil {
			return begin, err
		}
	}
	if t.Publishers > 0 {
		return begin, nil
	}
	const most, each = 300 * time.Millisecond, 10 * time.Millisecond // that it takes to set it
	begin = begin.Add(most + each*time.Duration(len(t.consume)))
	var g errgroup.Group
	g.SetLimit(atOnce)
	for _, c := range t.consume {
		g.Go(func() error {
			_, err := t.js.PauseConsumer(ctx, c.Stream, c.Durable, begin)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return begin, err
	}
	if time.Now().After(begin) {
		return begin, errors.New("the durables began one after another")
	}
	return begin, nil
}

// await asks workers until they are done together: each of publishers, the sum of
// consumers.
func await(ctx context.Context, workers []*child, done func(workerReport) bool) (sum workerReport, err error) {
	if len(workers) == 0 {
		return sum, nil
	}
	var failed error
	err = until(ctx, func() error {
		sum = workerReport{Ended: true}
		for _, w := range workers {
			var r workerReport
			failed = w.call(workerQuestion{}, &r)
			if r.Error != "" {
				failed = errors.New(r.Error)
			}
			if failed != nil {
				return nil //nolint:nilerr // it does not get better
			}
			sum.Done += r.Done
			sum.Last = max(sum.Last, r.Last)
			sum.Ended = sum.Ended && r.Ended
		}
		if !done(sum) {
			return fmt.Errorf("%d messages are done", sum.Done)
		}
		return nil
	})
	return sum, errors.Join(err, failed)
}

// check compares what the workers counted with what the server says: nothing is
// missing, and nothing was acked twice. It returns how many deliveries were repeated.
func (t *trial) check(ctx context.Context, stored, acked int) (again int, err error) {
	if t.Publishers > 0 {
		last := 0
		for i := range t.Streams {
			s, err := t.js.Stream(ctx, streamName(i))
			if err != nil {
				return 0, err
			}
			last += int(s.CachedInfo().State.LastSeq) //nolint:gosec // small
		}
		if last != stored {
			return 0, fmt.Errorf("%d messages were acknowledged to publishers and %d are stored", stored, last)
		}
	}
	if t.Consumers > 0 && acked != t.deliveries() {
		return 0, fmt.Errorf("%d messages were acked, want %d", acked, t.deliveries())
	}
	want := t.deliveries() / max(len(t.consume), 1) // of each durable
	for _, c := range t.consume {
		cons, err := t.js.Consumer(ctx, c.Stream, c.Durable)
		if err != nil {
			return 0, err
		}
		var floor, delivered int
		err = until(ctx, func() error {
			info, err := cons.Info(ctx)
			if err != nil {
				return err
			}
			if info.NumPending > 0 || info.NumAckPending > 0 || info.AckFloor.Consumer != info.Delivered.Consumer {
				return fmt.Errorf("consumer %q: %d messages are pending and %d not acked", c.Durable, info.NumPending, info.NumAckPending)
			}
			floor, delivered = int(info.AckFloor.Consumer), int(info.Delivered.Consumer) //nolint:gosec // small
			return nil
		})
		if err != nil {
			return 0, err
		}
		if floor < want {
			return 0, fmt.Errorf("consumer %q: %d messages were settled, want %d", c.Durable, floor, want)
		}
		again += delivered - want
	}
	return again, nil
}

// A moment is what everybody has used so far.
type moment struct {
	publishers, consumers []usage
	nodes                 []usage
	stats                 []nodeStats
}

func (t *trial) look() (m moment, err error) {
	for _, of := range []struct {
		children []*child
		to       *[]usage
	}{{t.nodes, &m.nodes}, {t.publishers, &m.publishers}, {t.consumers, &m.consumers}} {
		for _, c := range of.children {
			u, err := c.usage()
			if err != nil {
				return m, err
			}
			*of.to = append(*of.to, u)
		}
	}
	m.stats, err = t.stats(false)
	return m, err
}

// spent returns r with what was used between two moments.
func (r result) spent(before, after moment) result {
	messages := float64(r.messages())
	cpu := func(before, after []usage) (sum float64) {
		for i := range after {
			sum += float64((after[i].cpu - before[i].cpu).Microseconds()) / messages
			r.Worker = max(r.Worker, after[i].memory)
		}
		return sum
	}
	r.PublisherCPU = cpu(before.publishers, after.publishers)
	r.ConsumerCPU = cpu(before.consumers, after.consumers)
	for i, n := range after.nodes {
		r.NodeCPU[i] = float64((n.cpu - before.nodes[i].cpu).Microseconds()) / messages
		r.NodeMemory[i] = n.memory
		a, b := after.stats[i], before.stats[i]
		clients := a.ClientIn - b.ClientIn + a.ClientOut - b.ClientOut
		r.ClientBytes += float64(clients) / messages
		r.RouteBytes += float64(a.In-b.In-(a.ClientIn-b.ClientIn)) / messages // what one node sends another receives
	}
	return r
}

// end stops the workers, and deletes what the next cell cannot use.
func (t *trial) end(ctx context.Context) error {
	var errs []error
	for _, w := range append(t.publishers, t.consumers...) {
		if w != nil {
			errs = append(errs, w.stop())
		}
	}
	if t.Publishers > 0 {
		return errors.Join(append(errs, t.clear(ctx))...)
	}
	var g errgroup.Group
	g.SetLimit(atOnce)
	for _, c := range t.consume {
		g.Go(func() error {
			err := t.js.DeleteConsumer(ctx, c.Stream, c.Durable)
			if errors.Is(err, jetstream.ErrConsumerNotFound) {
				return nil
			}
			return err
		})
	}
	return errors.Join(append(errs, g.Wait())...)
}
