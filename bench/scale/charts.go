package scale

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/monotel/monotel/bench/chart"
)

const (
	perSecond = "messages a second"
	paperName = "on paper"
)

// charts draws every work into the folder.
func (rs results) charts(dir string) error {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return err
	}
	c, err := rs.costs()
	if err != nil {
		return err
	}
	file := func(name string) string { return filepath.Join(dir, name+".svg") }
	publishers := func(c cell) int { return c.Publishers }
	consumers := func(c cell) int { return c.Consumers }
	var handlers []series // each beside what it would be on paper
	for _, s := range rs.byConcurrency(workHandler) {
		handlers = append(handlers, s, series{paperName, s.ok, onPaper})
	}
	return errors.Join(
		rs.lines("Publishing to one stream", "publishers (processes)", perSecond, true, publishers, []series{
			{"R1, asynchronous", publishing(1, false), result.rate},
			{"R3, asynchronous", publishing(nodes, false), result.rate},
			{"R1, one by one", publishing(1, true), result.rate},
			{"R3, one by one", publishing(nodes, true), result.rate},
		}).Write(file("publish")),
		rs.lines("One publisher, R3", "WithPublishWindow (messages)", perSecond, true, func(c cell) int { return c.Window }, []series{
			{"R3", ofWork(workWindow), result.rate},
		}).Write(file("window")),
		rs.lines("Consume and ack, R3, empty handler", "processes", perSecond, false, consumers,
			rs.byConcurrency(workConsume)).Write(file("consume")),
		rs.lines("Consume and ack, R3, 2 ms handler", "processes", perSecond, true, consumers, handlers).Write(file("handler")),
		rs.lines("MaxAckPending, 4 × 16 handlers of 2 ms", "MaxAckPending (messages)", perSecond, true,
			func(c cell) int { return c.MaxAckPending }, []series{
				{"measured", ofWork(workAckPending), result.rate},
				{paperName, ofWork(workAckPending), onPaper},
			}).Write(file("ackpending")),
		rs.lines("The busiest node, R3", "parts of the subject", "CPU µs a message", false, cell.partitions, []series{
			{"publish, streams", func(c cell) bool { return c.Work == workStreams && c.Publishers > 0 }, result.busiest},
			{"consume, streams", func(c cell) bool { return c.Work == workStreams && c.Consumers > 0 }, result.busiest},
			{"consume, durables", ofWork(workDurables), result.busiest},
		}).Write(file("parts")),
		rs.lines("Durables that get every message, R3", "durables of one stream", "CPU µs", true,
			func(c cell) int { return c.FanOut }, []series{
				{"a delivery", ofWork(workFanOut), result.sumCPU},
				{"a message", ofWork(workFanOut), func(r result) float64 { return r.sumCPU() * float64(r.Cell.FanOut) }},
			}).Write(file("fanout")),
		c.bars().Write(file("costs")),
	)
}

// A series is a line: of the cells that are ok, a value of each.
type series struct {
	name  string
	ok    func(cell) bool
	value func(result) float64
}

func onPaper(r result) float64 { return r.Cell.paper() }

func ofWork(name string) func(cell) bool { return func(c cell) bool { return c.Work == name } }

func publishing(replicas int, sync bool) func(cell) bool {
	return func(c cell) bool { return c.Work == workPublish && c.Replicas == replicas && c.Sync == sync }
}

// concurrencies lists those that a work was measured with.
func (rs results) concurrencies(work string) []int {
	some := rs.where(func(c cell) bool { return c.Work == work && c.Replicas == nodes && c.Consumers == 1 })
	all := make([]int, 0, len(some))
	for _, r := range some {
		all = append(all, r.Cell.Concurrency)
	}
	return all
}

func (rs results) byConcurrency(work string) []series {
	slots := rs.concurrencies(work)
	all := make([]series, 0, len(slots))
	for _, n := range slots {
		all = append(all, series{fmt.Sprintf("Concurrency %d", n), func(c cell) bool {
			return c.Work == work && c.Replicas == nodes && c.Concurrency == n
		}, result.rate})
	}
	return all
}

func (rs results) lines(title, x, y string, log bool, at func(cell) int, all []series) chart.Lines {
	l := chart.Lines{Title: title, X: x, Y: y, LogY: log}
	for _, s := range all {
		one := chart.Series{Name: s.name, Paper: s.name == paperName}
		for _, r := range rs.where(s.ok) {
			one.Points = append(one.Points, chart.Point{X: float64(at(r.Cell)), Y: s.value(r)})
		}
		l.Series = append(l.Series, one)
	}
	return l
}

// bars shows who works for a message.
func (c costs) bars() chart.Bars {
	b := chart.Bars{Title: "CPU for one message", Y: "µs, all processes together", Parts: []chart.Part{
		{Name: "client"}, {Name: "leader"}, {Name: "other nodes"},
	}}
	for _, g := range []struct {
		name string
		r    result
	}{
		{"publish\nR1", c.publish[0]},
		{"publish\nR3", c.publish[replicated]},
		{"consume\nR1", c.consume[0]},
		{"consume\nR3", c.consume[replicated]},
	} {
		b.Groups = append(b.Groups, g.name)
		for i, v := range []float64{g.r.PublisherCPU + g.r.ConsumerCPU, g.r.leaderCPU(), g.r.serverCPU() - g.r.leaderCPU()} {
			b.Parts[i].Values = append(b.Parts[i].Values, v)
		}
	}
	return b
}
