package scale

import (
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/monotel/monotel/internal/docpage"
)

// write makes the charts and the tables from the records.
func (o options) write() error {
	rs, err := o.load()
	if err != nil {
		return err
	}
	if err := rs.charts(o.dir); err != nil {
		return err
	}
	sections, err := rs.sections()
	if err != nil || o.page == "" {
		return err
	}
	return docpage.Update(o.page, sections...)
}

func (rs results) sections() ([]docpage.Section, error) {
	c, err := rs.costs()
	if err != nil {
		return nil, err
	}
	example, err := rs.exampleTable(order{rate: 20_000, handler: 5 * time.Millisecond})
	if err != nil {
		return nil, err
	}
	var sections []docpage.Section
	for _, s := range []struct{ name, text string }{
		{"machine", rs.machineText()},
		{"costs", c.table()},
		{"saturation", rs.saturationTable()},
		{"publish", rs.publishTable()},
		{"window", rs.windowTable()},
		{"consume", rs.processTable(workConsume)},
		{"handler", rs.processTable(workHandler)},
		{"ack pending", rs.ackPendingTable()},
		{"parts", rs.partsTable()},
		{"fan-out", rs.fanOutTable()},
		{"size", rs.sizeTable(c)},
		{"check", rs.checkTable(c)},
		{"example", example},
	} {
		sections = append(sections, docpage.Section{Name: s.name, Target: "scale", Text: s.text})
	}
	return sections, nil
}

func (rs results) machineText() string {
	again := 0
	for _, r := range rs.cells {
		again += r.Again
	}
	return fmt.Sprintf("%d CPUs, %s, %s/%s, payloads of %d bytes, %s of %d cells; %d of their deliveries were repeated.\n",
		rs.CPUs, rs.Go, rs.OS, rs.Arch, rs.Payload, counted(rs.Rounds, "round"), len(rs.cells), again)
}

// A table has a first column of text and others of numbers.
type table struct{ strings.Builder }

func newTable(head ...string) *table {
	t := &table{}
	t.row(head...)
	t.WriteString("|---" + strings.Repeat("|--:", len(head)-1) + "|\n")
	return t
}

func (t *table) row(cells ...string) { t.WriteString("| " + strings.Join(cells, " | ") + " |\n") }

func (c costs) table() string {
	t := newTable("µs of CPU a message", "client", "leader", "each other node", "all", "all, R3 to R1",
		"messages/s a CPU of the client", "of the leader")
	row := func(name string, r result, one *result) {
		client, ratio := r.PublisherCPU+r.ConsumerCPU, ""
		if one != nil {
			ratio = fmt.Sprintf("%.1f", r.sumCPU()/one.sumCPU())
		}
		t.row(name, micros(client), micros(r.leaderCPU()), micros(r.followerCPU()), micros(r.sumCPU()), ratio,
			whole(1e6/client), whole(1e6/r.leaderCPU()))
	}
	row("publish one by one, R1", c.publishSync[0], nil)
	row("publish one by one, R3", c.publishSync[replicated], &c.publishSync[0])
	row("publish asynchronously, R1", c.publish[0], nil)
	row("publish asynchronously, R3", c.publish[replicated], &c.publish[0])
	row("the same, connected to a follower", c.publishFar, &c.publish[0])
	row("consume and ack, R1", c.consume[0], nil)
	row("consume and ack, R3", c.consume[replicated], &c.consume[0])
	row("the same, connected to a follower", c.consumeFar, &c.consume[0])
	return t.String()
}

// saturationTable tells what limits some of the cells.
func (rs results) saturationTable() string {
	t := newTable("", "messages/s", "CPUs busy, of "+strconv.Itoa(rs.CPUs), "clients", "leader", "other nodes", "limit")
	row := func(name, limit string, r result, found bool) {
		if !found {
			return
		}
		// Handlers that do what they can on paper are the limit, however busy the CPU is.
		const saturated = 0.8
		asOnPaper := r.Cell.Handler > 0 && r.rate() >= saturated*r.Cell.paper()
		if r.busy() >= saturated*float64(rs.CPUs) && !asOnPaper {
			limit = "CPU"
		}
		share := func(v float64) string { return fmt.Sprintf("%.0f %%", 100*v/r.sumCPU()) }
		t.row(name, whole(r.rate()), fmt.Sprintf("%.1f", r.busy()),
			share(r.PublisherCPU+r.ConsumerCPU), share(r.leaderCPU()), share(r.serverCPU()-r.leaderCPU()), limit)
	}
	first := func(rs []result) (result, bool) {
		if len(rs) == 0 {
			return result{}, false
		}
		return rs[0], true
	}
	last := func(rs []result) (result, bool) {
		if len(rs) == 0 {
			return result{}, false
		}
		return rs[len(rs)-1], true
	}
	named := func(name, limit string, pick func([]result) (result, bool), ok func(cell) bool) {
		r, found := pick(rs.where(ok))
		workers := max(r.Cell.Publishers, r.Cell.Consumers)
		row(fmt.Sprintf(name, counted(workers, "process")), limit, r, found)
	}
	named("publish one by one, R3, %s", "round trips", first, publishing(nodes, true))
	named("publish one by one, R3, %s", "round trips", last, publishing(nodes, true))
	named("publish asynchronously, R3, %s", "waiting", first, publishing(nodes, false))
	named("publish asynchronously, R3, %s", "waiting", last, publishing(nodes, false))
	consume := func(work string, slots func(int) bool) func(cell) bool {
		return func(c cell) bool { return c.Work == work && c.Replicas == nodes && slots(c.Concurrency) }
	}
	one := func(n int) bool { return n == 1 }
	many := func(n int) bool { return n > 1 }
	named("consume, empty handler, %s", "waiting", first, consume(workConsume, many))
	named("consume, empty handler, %s", "waiting", last, consume(workConsume, many))
	named("2 ms handler, `Concurrency` 1, %s", "handlers", first, consume(workHandler, one))
	named("2 ms handler, `Concurrency` 1, %s", "handlers", last, consume(workHandler, one))
	named("2 ms handler, the most of them, %s", "handlers", last, consume(workHandler, many))
	named("2 ms handler, `MaxAckPending` 16, %s", "`MaxAckPending`", first, ofWork(workAckPending))
	return t.String()
}

func (rs results) publishTable() string {
	t := newTable("publishers (processes)", "one by one, R1", "R3", "R3 to R1", "asynchronous, R1", "R3", "R3 to R1")
	for _, r := range rs.where(publishing(1, true)) {
		n := r.Cell.Publishers
		cells := append(make([]string, 0, 7), strconv.Itoa(n))
		for _, sync := range []bool{true, false} {
			var rate [2]float64
			for i, replicas := range []int{1, nodes} {
				for _, r := range rs.where(publishing(replicas, sync)) {
					if r.Cell.Publishers == n {
						rate[i] = r.rate()
					}
				}
				cells = append(cells, whole(rate[i])+"/s")
			}
			cells = append(cells, fmt.Sprintf("%.2f", rate[1]/rate[0]))
		}
		t.row(cells...)
	}
	return t.String()
}

func (rs results) windowTable() string {
	t := newTable("`WithPublishWindow`", "messages/s", "all CPU, µs a message", "the publisher's")
	for _, r := range rs.work(workWindow) {
		t.row(strconv.Itoa(r.Cell.Window), whole(r.rate()), micros(r.sumCPU()), micros(r.PublisherCPU))
	}
	return t.String()
}

// processTable has a row for each number of processes, and columns for Concurrency.
func (rs results) processTable(work string) string {
	slots := rs.concurrencies(work)
	head := []string{"processes"}
	for _, n := range slots {
		head = append(head, fmt.Sprintf("`Concurrency` %d", n))
		if work == workHandler {
			head = append(head, "of what is possible on paper")
		}
	}
	t := newTable(append(head, "consumer, µs a message", "leader", "each other node")...)
	for _, first := range rs.where(func(c cell) bool {
		return c.Work == work && c.Replicas == nodes && c.Concurrency == slots[0]
	}) {
		n := first.Cell.Consumers
		cells := []string{strconv.Itoa(n)}
		var last result
		for _, r := range rs.where(func(c cell) bool { return c.Work == work && c.Replicas == nodes && c.Consumers == n }) {
			cells = append(cells, whole(r.rate())+"/s")
			if work == workHandler {
				cells = append(cells, fmt.Sprintf("%.0f %%", 100*r.rate()/r.Cell.paper()))
			}
			last = r
		}
		t.row(append(cells, micros(last.ConsumerCPU), micros(last.leaderCPU()), micros(last.followerCPU()))...)
	}
	return t.String()
}

func (rs results) ackPendingTable() string {
	t := newTable("`MaxAckPending`", "messages/s", "on paper", "CPU, µs a message", "delivered again")
	for _, r := range rs.work(workAckPending) {
		t.row(strconv.Itoa(r.Cell.MaxAckPending), whole(r.rate()), whole(r.Cell.paper()), micros(r.sumCPU()), strconv.Itoa(r.Again))
	}
	return t.String()
}

func (rs results) partsTable() string {
	t := newTable("", "parts", "messages/s", "all CPU, µs a message", "busiest node", "its share of the nodes'")
	row := func(name string, ok func(cell) bool) {
		for _, r := range rs.where(ok) {
			t.row(name, strconv.Itoa(r.Cell.partitions()), whole(r.rate()), micros(r.sumCPU()), micros(r.busiest()),
				fmt.Sprintf("%.0f %%", 100*r.busiest()/r.serverCPU()))
		}
	}
	row("publish, streams", func(c cell) bool { return c.Work == workStreams && c.Publishers > 0 })
	row("consume, streams", func(c cell) bool { return c.Work == workStreams && c.Consumers > 0 })
	row("consume, durables of one stream", ofWork(workDurables))
	return t.String()
}

func (rs results) fanOutTable() string {
	t := newTable("durables", "messages/s", "deliveries/s", "CPU, µs a delivery", "of that the nodes'", "CPU, µs a message")
	for _, r := range rs.work(workFanOut) {
		n := float64(r.Cell.FanOut)
		t.row(strconv.Itoa(r.Cell.FanOut), whole(r.rate()/n), whole(r.rate()),
			micros(r.sumCPU()), micros(r.serverCPU()), micros(r.sumCPU()*n))
	}
	return t.String()
}

func (rs results) sizeTable(c costs) string {
	t := newTable("", "bytes")
	for _, row := range []struct {
		name  string
		value float64
	}{
		{"memory of a node for a durable consumer, R3", rs.memory.Durable},
		{"memory of a node for a delivered message that is not acked", rs.memory.Pending},
		{"files of a node for a message, R3", rs.memory.Disk},
		{"publish, R1: between publisher and node", c.publish[0].ClientBytes},
		{"publish, R3: between nodes", c.publish[replicated].RouteBytes},
		{"publish, R3, connected to a follower: between nodes", c.publishFar.RouteBytes},
		{"consume and ack, R1: between consumer and node", c.consume[0].ClientBytes},
		{"consume and ack, R3: between nodes", c.consume[replicated].RouteBytes},
		{"consume and ack, R3, connected to a follower: between nodes", c.consumeFar.RouteBytes},
	} {
		t.row(row.name, whole(row.value))
	}
	var worker, node int64
	for _, r := range rs.cells {
		worker = max(worker, r.Worker)
		node = max(node, r.NodeMemory[0], r.NodeMemory[1], r.NodeMemory[2])
	}
	t.row("memory of a process at most, resident", mebibytes(worker))
	t.row("memory of a node at most, resident", mebibytes(node))
	return t.String()
}

func (rs results) checkTable(c costs) string {
	t := newTable("publish and consume at once", "on paper, µs a message", "measured", "ratio",
		"on paper, messages/s", "measured", "CPUs busy, of "+strconv.Itoa(rs.CPUs))
	for _, r := range rs.work(workMixed) {
		m := r.Cell
		name := fmt.Sprintf("R%d, %d publishers, %d consumers", m.Replicas, m.Publishers, m.Consumers)
		if m.FanOut > 1 {
			name += fmt.Sprintf(", %d durables", m.FanOut)
		}
		if m.Clients == clientsSpread {
			name += ", connected to all nodes"
		}
		sum := c.predict(m)
		rate := float64(rs.CPUs) * 1e6 / sum
		if m.Rate > 0 {
			name += fmt.Sprintf(", %s messages/s", whole(float64(m.Rate)))
			rate = min(rate, float64(m.Rate))
		}
		t.row(name, micros(sum), micros(r.sumCPU()), fmt.Sprintf("%.2f", r.sumCPU()/sum),
			whole(rate), whole(r.rate()), fmt.Sprintf("%.1f", r.busy()))
	}
	return t.String()
}

func (rs results) exampleTable(o order) (string, error) {
	p, err := rs.plan(o)
	if err != nil {
		return "", err
	}
	t := &table{}
	t.row("what", "how", "result")
	t.WriteString("|---|---|---|\n")
	per := whole(o.rate) + "/s"
	cpus := func(v float64) string { return fmt.Sprintf("%.1f CPUs", v) }
	t.row("handlers at work", fmt.Sprintf("%s × %v", per, o.handler), strconv.Itoa(p.busy))
	t.row("handlers", fmt.Sprintf("%.0f %% of them at work", 100*full), strconv.Itoa(p.slots))
	t.row("CPU of the consumers, without what the handler itself computes", per+" × client's µs", cpus(p.consumer))
	t.row("consumer processes", fmt.Sprintf("a CPU each, %.0f %% used, and 2 at least", 100*full), strconv.Itoa(p.processes))
	t.row("`Concurrency` of each", "handlers ÷ processes", strconv.Itoa(p.concurrency))
	t.row("`MaxAckPending`", "the default: 20 × `Concurrency` × `BatchSize`, 10 000 at least", whole(float64(p.ackPending)))
	t.row("CPU of the publishers", per+" × client's µs, asynchronous", cpus(p.publishers))
	t.row("CPU of the leader", per+" × (publish + consume)", cpus(p.leader))
	t.row("CPU of each other node", per+" × (publish + consume)", cpus(p.follower))
	t.row("hops of those that are not connected to the leader, all nodes together", per+" × ⅔ of the difference", cpus(p.hops))
	t.row("streams", fmt.Sprintf("so that a leader uses %.0f %% of one CPU", 100*full), strconv.Itoa(p.streams))
	t.row("network, all links together", per+" × bytes a message", fmt.Sprintf("%s MB/s", whole(p.network/1e6)))
	t.row("disk of each node, an hour of messages kept", per+" × 3600 × bytes a message", fmt.Sprintf("%s GB", whole(p.disk/1e9)))
	return t.String(), nil
}

func micros(v float64) string {
	if v >= 100 {
		return whole(v)
	}
	return fmt.Sprintf("%.1f", v)
}

// whole rounds to three digits, as no more of them mean anything.
func whole(v float64) string {
	n, unit := int(v+0.5), 1
	for n/unit >= 1000 {
		unit *= 10
	}
	n = (n + unit/2) / unit * unit
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + " " + s[i:]
	}
	return s
}

func mebibytes(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }

func counted(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	if strings.HasSuffix(what, "s") {
		what += "e"
	}
	return fmt.Sprintf("%d %ss", n, what)
}
