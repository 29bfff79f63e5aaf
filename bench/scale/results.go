package scale

import (
	"bufio"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// Results are what the page is made of.
type results struct {
	machine

	memory memory
	cells  []result // one for each cell
}

// load reads the records, and takes of each cell the round whose rate is the median.
func (o options) load() (rs results, err error) {
	f, err := os.Open(filepath.Join(o.dir, resultsFile))
	if err != nil {
		return rs, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	rounds := make(map[cell][]result)
	var order []cell
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		var r record
		if err := json.Unmarshal(lines.Bytes(), &r); err != nil {
			return rs, fmt.Errorf("%s: %w", resultsFile, err)
		}
		switch {
		case r.Machine != nil:
			rs.machine = *r.Machine
		case r.Memory != nil:
			rs.memory = *r.Memory
		case r.Cell != nil:
			if rounds[r.Cell.Cell] == nil {
				order = append(order, r.Cell.Cell)
			}
			rounds[r.Cell.Cell] = append(rounds[r.Cell.Cell], *r.Cell)
		}
	}
	for _, c := range order {
		all := rounds[c]
		slices.SortFunc(all, func(a, b result) int { return cmp.Compare(a.rate(), b.rate()) })
		rs.cells = append(rs.cells, all[len(all)/2])
	}
	return rs, lines.Err()
}

// where selects cells, in the order they were measured.
func (rs results) where(ok func(cell) bool) []result {
	var some []result
	for _, r := range rs.cells {
		if ok(r.Cell) {
			some = append(some, r)
		}
	}
	return some
}

func (rs results) work(name string) []result {
	return rs.where(func(c cell) bool { return c.Work == name })
}

// Costs are what one message takes in each role, by cells in which nothing else
// happens.
type costs struct {
	publishSync, publish [2]result // with one replica, and with three
	consume              [2]result
	publishFar           result
	consumeFar           result
}

func (rs results) costs() (c costs, err error) {
	take := func(to *result, what string, ok func(cell) bool) {
		some := rs.where(ok)
		if len(some) == 0 {
			err = errors.Join(err, fmt.Errorf("%s: nothing was measured of %s", resultsFile, what))
			return
		}
		*to = some[0]
	}
	for i, replicas := range []int{1, nodes} {
		take(&c.publishSync[i], "publishing one by one", func(c cell) bool {
			return c.Work == workPublish && c.Replicas == replicas && c.Publishers == someWorkers && c.Sync
		})
		take(&c.publish[i], "publishing asynchronously", func(c cell) bool {
			return c.Work == workPublish && c.Replicas == replicas && c.Publishers == someWorkers && !c.Sync
		})
		take(&c.consume[i], "consuming", func(c cell) bool {
			return c.Work == workConsume && c.Replicas == replicas && c.Consumers == someWorkers && c.Concurrency == someSlots
		})
	}
	take(&c.publishFar, "publishing through a follower", func(c cell) bool { return c.Work == workFar && c.Publishers > 0 })
	take(&c.consumeFar, "consuming through a follower", func(c cell) bool { return c.Work == workFar && c.Consumers > 0 })
	return c, err
}

const replicated = 1 // index of costs with three replicas

// predict calculates what a message of a mixed cell takes together, from the costs of
// publishing alone and consuming alone.
func (c costs) predict(m cell) float64 {
	i := 0
	if m.Replicas > 1 {
		i = replicated
	}
	sum := c.publish[i].sumCPU() + float64(m.FanOut)*c.consume[i].sumCPU()
	if m.Clients == clientsSpread {
		sum += c.hops(m.FanOut)
	}
	return sum
}

// hops is what it costs that two of three connections are to a node that does not
// lead. A difference so small may come out less than nothing.
func (c costs) hops(fanOut int) float64 {
	publish := c.publishFar.sumCPU() - c.publish[replicated].sumCPU()
	consume := c.consumeFar.sumCPU() - c.consume[replicated].sumCPU()
	return (max(publish, 0) + float64(fanOut)*max(consume, 0)) * (nodes - 1) / nodes
}

// paper is how many messages a second handlers finish that only wait, when nothing
// else holds them up. A batch is handled by one of them; those that MaxAckPending
// allows make so many batches, and each process has one at least.
func (c cell) paper() float64 {
	busy := min(c.Consumers*c.Concurrency, max(c.Consumers, c.MaxAckPending/c.Batch))
	return float64(busy) / c.Handler.Seconds()
}

// An order is a task for which the page calculates a cluster.
type order struct {
	rate    float64 // messages a second
	handler time.Duration
}

// A plan is the answer. Loads are in CPUs.
type plan struct {
	busy, slots          int // handlers at work, and handlers with room for bursts
	processes            int
	concurrency          int // of each
	publishers, consumer float64
	leader, follower     float64
	hops                 float64 // on all nodes together
	streams              int
	ackPending           int
	network              float64 // bytes a second, all links together
	disk                 float64 // bytes an hour on each node
}

// full is how much of its capacity a part should use on average.
const full = 0.7

func (rs results) plan(o order) (p plan, err error) {
	c, err := rs.costs()
	if err != nil {
		return p, err
	}
	const million = 1e6
	up := func(v float64) int { return int(v + 0.999) }
	publish, consume := c.publish[replicated], c.consume[replicated]
	p.busy = up(o.rate * o.handler.Seconds())
	p.slots = up(float64(p.busy) / full)
	p.publishers = o.rate * publish.PublisherCPU / million
	p.consumer = o.rate * consume.ConsumerCPU / million
	p.leader = o.rate * (publish.leaderCPU() + consume.leaderCPU()) / million
	p.follower = o.rate * (publish.followerCPU() + consume.followerCPU()) / million
	p.hops = o.rate * c.hops(1) / million
	p.processes = max(2, up(p.consumer/full))
	p.concurrency = up(float64(p.slots) / float64(p.processes))
	p.streams = max(1, up(p.leader/full))
	p.ackPending = max(10_000, 20*p.concurrency*batchSize)
	p.network = o.rate * (publish.ClientBytes + publish.RouteBytes + consume.ClientBytes + consume.RouteBytes)
	p.disk = o.rate * rs.memory.Disk * time.Hour.Seconds()
	return p, nil
}
