package main

import (
	"context"
	"fmt"
	"slices"
	"sync/atomic"

	"github.com/nats-io/nats.go"
)

// A library is one way to write the program that is measured. Its adapter is in
// the file of its name.
type library struct {
	name  string // in results: lib=name
	title string // on the page
	start func(context.Context, target, program) (*running, error)

	// ownServer says that it starts the NATS server by itself, in its own process,
	// and takes no other.
	ownServer bool
	// marshals says that what it publishes has headers of its own, so that a backlog
	// for it has to come from itself.
	marshals bool
}

// Names of libraries, and of monotel by what it records. A name that ended in a dash
// and a number would tell benchstat about GOMAXPROCS.
const (
	raw            = "raw"
	watermillSync  = "watermill"
	watermillAsync = "watermill-async"
	goMonolith     = "monolith"
	monotelOff     = "monotel-off"
	rawTraced      = "raw-traced"
	monotelMetrics = "monotel-metrics"
	monotelPercent = "monotel-1pct"
	monotelAll     = "monotel-100pct"
)

var libraries = []library{
	{name: raw, title: "nats.go", start: startRaw(false)},
	{name: rawTraced, title: "nats.go, with a traceparent", start: startRaw(true), marshals: true},
	{name: watermillSync, title: "Watermill", start: startWatermill(false), marshals: true},
	{name: watermillAsync, title: "Watermill, async ack", start: startWatermill(true), marshals: true},
	{name: goMonolith, title: "go-monolith", start: startMonolith, ownServer: true},
	{name: monotelOff, title: "monotel, off", start: startMonotel(telemetryOff)},
	{name: monotelMetrics, title: "monotel, metrics", start: startMonotel(telemetryMetrics), marshals: true},
	{name: monotelPercent, title: "monotel, 1 %", start: startMonotel(telemetry1), marshals: true},
	{name: monotelAll, title: "monotel, 100 %", start: startMonotel(telemetry100), marshals: true},
}

func findLibrary(name string) (library, error) {
	i := slices.IndexFunc(libraries, func(l library) bool { return l.name == name })
	if i < 0 {
		return library{}, fmt.Errorf("no library %q", name)
	}
	return libraries[i], nil
}

// A target is the NATS server to connect to.
type target struct {
	url  string
	opts []nats.Option
	dir  string // of its streams, for a library with a server of its own
}

func (t target) connect() (*nats.Conn, error) { return nats.Connect(t.url, t.opts...) }

// A program is what is written with each library: a service that publishes and
// consumes events.
type program struct {
	events  int  // kinds of events, each with a subject of its own
	stream  bool // there is one, and it stores them all
	core    int  // consumers over core NATS; number i gets the events of kind i % events
	durable int  // durable consumers of the stream, likewise

	batch       int // 0 is the library's default
	concurrency int

	handle  func(consumer int, data []byte) // an event
	settled func()                          // called once the event is acked

	// broken, if not nil, makes the durable consumers give up on everything while it
	// is true. Only monotel has dead letters.
	broken *atomic.Bool
}

const (
	streamName = "bench"
	moduleName = "bench"
)

func subject(event int) string        { return fmt.Sprintf("events.bench.v1.type-%d", event) }
func eventName(event int) string      { return fmt.Sprintf("Type%d", event) }
func durableName(consumer int) string { return fmt.Sprintf("c%d", consumer) }

func (p program) subjects() []string {
	all := make([]string, p.events)
	for i := range all {
		all[i] = subject(i)
	}
	return all
}

// running is a program that runs. What the library cannot do is nil.
type running struct {
	publish      func(event int, data []byte) error // over core NATS
	publishSync  func(event int, data []byte) error // into the stream, and wait for the server
	publishAsync func(event int, data []byte) error // into the stream, do not wait
	wait         func() error                       // until every asynchronous publish is acknowledged

	// message is what a publish would send, of a library that cannot publish
	// asynchronously.
	message func(event int, data []byte) (*nats.Msg, error)

	durable func(consumer int) (stream, name string) // on the server; nil: streamName and durableName
	conn    *nats.Conn                               // of a library with a server of its own
	stop    func() error
}
