package scale

import (
	"fmt"
	"strings"
	"time"
)

// Works are the groups of cells; each is a table and a chart.
const (
	workPublish    = "publish"    // 1 to 8 processes
	workWindow     = "window"     // asynchronous publishes in flight
	workConsume    = "consume"    // 1 to 8 processes, a handler that does nothing
	workHandler    = "handler"    // 1 to 8 processes, a handler that waits
	workAckPending = "ackpending" // a handler that waits, and MaxAckPending
	workFar        = "far"        // clients connected to a node that does not lead
	workStreams    = "streams"    // a subject split over several streams
	workDurables   = "durables"   // several durables of one stream, each with a subject
	workFanOut     = "fanout"     // several durables that get every message
	workMixed      = "mixed"      // publishing and consuming at once
)

// Clients say which nodes the workers connect to.
const (
	clientsNear   = "near"   // the leader
	clientsFar    = "far"    // a follower
	clientsSpread = "spread" // all nodes in turn
)

// A cell is one measurement. What is zero is not part of it.
type cell struct {
	Work          string        `json:"work,omitempty"`
	Replicas      int           `json:"replicas,omitempty"`
	Clients       string        `json:"clients,omitempty"`
	Streams       int           `json:"streams,omitempty"`    // each has its share of the messages
	Subjects      int           `json:"subjects,omitempty"`   // of each stream, with a durable consumer each
	FanOut        int           `json:"fan_out,omitempty"`    // durable consumers of each subject
	Publishers    int           `json:"publishers,omitempty"` // processes
	Sync          bool          `json:"sync,omitempty"`
	Window        int           `json:"window,omitempty"`
	Rate          int           `json:"rate,omitempty"`      // messages a second that are published; 0: as many as it goes
	Consumers     int           `json:"consumers,omitempty"` // processes
	Concurrency   int           `json:"concurrency,omitempty"`
	Batch         int           `json:"batch,omitempty"`
	Handler       time.Duration `json:"handler,omitempty"`
	MaxAckPending int           `json:"max_ack_pending,omitempty"`
	Messages      int           `json:"messages,omitempty"` // 0: as many as are published in a spell
}

const (
	spell       = 1500 * time.Millisecond
	quickSpell  = 150 * time.Millisecond
	handlerTime = 2 * time.Millisecond
	batchSize   = 10 // the default
	window      = 4096
	backlogSize = 40_000 // a multiple of what it is divided by
	quickSize   = 1600
	someWorkers = 2
	someSlots   = 16
)

// cells lists what is measured, or a small part of it. Those that read the same
// backlog follow one another.
func cells(quick bool) []cell {
	processes, slots := []int{1, 2, 4, 8}, []int{1, someSlots, 64}
	parts, fans, limits := []int{1, 2, 4, 8}, []int{1, 10, 100}, []int{16, 64, 256, 1024, 10_000}
	windows, count, pace := []int{1, 16, 256, window}, backlogSize, 2000
	if quick {
		processes, slots, parts, fans = []int{1, someWorkers}, []int{1, someSlots}, []int{1, 2}, []int{1, 10}
		limits, windows, count = []int{16, 10_000}, []int{1, window}, quickSize
	}
	var all []cell
	add := func(c cell) {
		c.Streams, c.Subjects = max(c.Streams, 1), max(c.Subjects, 1)
		if c.Clients == "" {
			c.Clients = clientsNear
		}
		if c.Publishers > 0 && !c.Sync && c.Window == 0 {
			c.Window = window
		}
		if c.Consumers > 0 {
			c.FanOut, c.Batch = max(c.FanOut, 1), batchSize
			if c.MaxAckPending == 0 { // an App's default
				c.MaxAckPending = max(10_000, 20*c.Concurrency*c.Batch)
			}
		}
		all = append(all, c)
	}

	for _, replicas := range []int{1, nodes} {
		for _, n := range processes {
			add(cell{Work: workPublish, Replicas: replicas, Publishers: n, Sync: true})
			add(cell{Work: workPublish, Replicas: replicas, Publishers: n})
		}
	}
	for _, n := range windows {
		add(cell{Work: workWindow, Replicas: nodes, Publishers: 1, Window: n})
	}
	add(cell{Work: workFar, Replicas: nodes, Publishers: someWorkers, Clients: clientsFar})
	for _, n := range parts {
		add(cell{Work: workStreams, Replicas: nodes, Streams: n, Publishers: 4, Clients: clientsSpread})
	}

	// With one replica, the backlog of the others is made anew.
	add(cell{Work: workConsume, Replicas: 1, Consumers: someWorkers, Concurrency: someSlots, Messages: count})
	for _, n := range processes {
		for _, s := range slots {
			add(cell{Work: workConsume, Replicas: nodes, Consumers: n, Concurrency: s, Messages: count})
		}
	}
	add(cell{Work: workFar, Replicas: nodes, Consumers: someWorkers, Concurrency: someSlots, Messages: count, Clients: clientsFar})
	for _, n := range fans { // a hundred durables are slow to drain
		add(cell{Work: workFanOut, Replicas: nodes, FanOut: n, Consumers: 1, Concurrency: 1, Messages: count / n / min(n, 4)})
	}
	for _, n := range processes {
		for _, s := range slots {
			add(cell{Work: workHandler, Replicas: nodes, Consumers: n, Concurrency: s, Handler: handlerTime, Messages: worth(n*s, count)})
		}
	}
	for _, n := range limits {
		add(cell{
			Work: workAckPending, Replicas: nodes, Consumers: 4, Concurrency: someSlots, Handler: handlerTime,
			MaxAckPending: n, Messages: worth(min(n, 4*someSlots), count),
		})
	}
	for _, n := range parts {
		add(cell{
			Work: workStreams, Replicas: nodes, Streams: n, Consumers: 4, Concurrency: someSlots, Messages: count, Clients: clientsSpread,
		})
	}
	for _, n := range parts {
		add(cell{
			Work: workDurables, Replicas: nodes, Subjects: n, Consumers: 4, Concurrency: someSlots, Messages: count, Clients: clientsSpread,
		})
	}

	for _, c := range []cell{
		{Replicas: 1, Publishers: someWorkers, Consumers: someWorkers},
		{Replicas: nodes, Publishers: someWorkers, Consumers: someWorkers},
		{Replicas: nodes, Publishers: someWorkers, Consumers: someWorkers, FanOut: 3},
		{Replicas: nodes, Publishers: nodes, Consumers: nodes, Clients: clientsSpread},
		{Replicas: nodes, Publishers: someWorkers, Consumers: someWorkers, Rate: pace},
	} {
		c.Work, c.Concurrency, c.Messages = workMixed, someSlots, count/2/c.Publishers*c.Publishers
		if c.Rate > 0 {
			c.Messages = min(c.Messages, 2*c.Rate)
		}
		add(c)
	}
	return all
}

// worth is how many messages so many handlers get through in a spell, if nothing
// holds them up.
func worth(handlers, most int) int {
	const least, multiple = 160, 16
	n := handlers * int(spell/handlerTime)
	return min(max(n, least), most) / multiple * multiple
}

// backlog is what a cell that only consumes finds in its streams.
type backlog struct{ replicas, streams, subjects int }

func (c cell) backlog() backlog { return backlog{c.Replicas, c.Streams, c.Subjects} }

// partitions is how many streams and subjects share the messages.
func (c cell) partitions() int { return c.Streams * c.Subjects }

// deliveries is how often messages are to be acked.
func (c cell) deliveries() int { return c.Messages * c.FanOut }

func (c cell) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s R%d %s", c.Work, c.Replicas, c.Clients)
	for _, p := range []struct {
		name  string
		value any
		shown bool
	}{
		{"publishers", c.Publishers, c.Publishers > 0},
		{"sync", c.Sync, c.Sync},
		{"window", c.Window, c.Window > 0},
		{"rate", c.Rate, c.Rate > 0},
		{"consumers", c.Consumers, c.Consumers > 0},
		{"concurrency", c.Concurrency, c.Consumers > 0},
		{"handler", c.Handler, c.Handler > 0},
		{"max-ack-pending", c.MaxAckPending, c.Work == workAckPending},
		{"streams", c.Streams, c.Streams > 1},
		{"subjects", c.Subjects, c.Subjects > 1},
		{"fan-out", c.FanOut, c.FanOut > 1},
	} {
		if p.shown {
			fmt.Fprintf(&b, " %s=%v", p.name, p.value)
		}
	}
	return b.String()
}
