package main

import (
	"context"
	"maps"
	"slices"
)

// A work is what each library is given to do.
type work struct {
	name    string
	title   string
	params  [][]param // sets of them; none is one without
	sizes   []int     // of payloads; none is both
	measure func(context.Context, *bench) (result, error)
	// without says why a library, all others aside, is not measured.
	without map[string]string
}

const (
	smallSize = 256
	largeSize = 4096
	minSize   = 16 // a number and a time
)

// Reasons for a library not to be measured.
const (
	noAsync    = "it has no asynchronous durable publish"
	noBatches  = "it has no batches: see batch 10"
	noWorkers  = "it handles one batch at a time"
	noAcks     = "nothing is acked here: see Watermill"
	onlyInside = "it always runs its server in its own process"
	inBetween  = "measured only with telemetry off and with 1 %"
	likeRaw    = "see the works before"
)

var works = []work{
	{
		name: "CorePublish", title: "core publish",
		measure: measurePublish(func(r *running) (func(int, []byte) error, func() error) { return r.publish, nil }, false),
		without: map[string]string{watermillAsync: noAcks},
	},
	{
		name: "CorePubSub", title: "core publish to handler",
		measure: measurePubSub,
		without: map[string]string{watermillAsync: noAcks},
	},
	{
		name: "DurablePublishSync", title: "durable publish, one after the other",
		measure: measurePublish(func(r *running) (func(int, []byte) error, func() error) { return r.publishSync, nil }, true),
		without: map[string]string{watermillAsync: noAcks},
	},
	{
		name: "DurablePublishAsync", title: "durable publish, asynchronous",
		measure: measurePublish(func(r *running) (func(int, []byte) error, func() error) { return r.publishAsync, r.wait }, true),
		without: map[string]string{watermillSync: noAsync, watermillAsync: noAsync, goMonolith: noAsync},
	},
	{
		name: "ConsumeAck", title: "consume and ack",
		params:  grid([]string{"batch", "concurrency"}, []int{1, 10, 200}, []int{1, 16}),
		measure: measureConsume,
	},
	{
		name: "SlowHandler", title: "consume and ack, 2 ms handler",
		params:  grid([]string{"concurrency"}, []int{1, 64}),
		sizes:   []int{smallSize},
		measure: measureConsume,
		without: fewer(nil),
	},
	{
		name: "Latency", title: "durable publish to handler, at a fixed rate",
		params:  grid([]string{"rate"}, []int{2000}),
		measure: measureLatency,
	},
	{
		name: "LoneEvent", title: "a lone durable event, publish to handler",
		sizes:   []int{smallSize},
		measure: measureLatency,
		without: fewer(nil),
	},
	{
		name: "CoreFanOut", title: "core publish to every one of several handlers",
		params:  grid([]string{"consumers"}, []int{1, 10, 100}),
		sizes:   []int{smallSize},
		measure: measurePubSub,
		without: fewer(map[string]string{watermillAsync: noAcks}),
	},
	{
		name: "DurableFanOut", title: "consume and ack by several durable consumers of one event",
		params:  grid([]string{"consumers"}, []int{1, 10, 100}),
		sizes:   []int{smallSize},
		measure: measureConsume,
		without: fewer(nil),
	},
	{
		name: "EventTypes", title: "core publish to handler, several types of events",
		params:  grid([]string{"types"}, []int{1, 100, 1000}),
		sizes:   []int{smallSize},
		measure: measurePubSub,
		without: fewer(map[string]string{watermillAsync: noAcks}),
	},
	{
		name: "Registrations", title: "start, idle and stop with 1 000 durable consumers of as many types",
		params:  grid([]string{"consumers"}, []int{1000}),
		sizes:   []int{smallSize},
		measure: measureRegistrations,
		without: fewer(map[string]string{watermillAsync: noAcks}),
	},
}

// fewer leaves out what can be told from the neighbours.
func fewer(without map[string]string) map[string]string {
	all := map[string]string{monotelMetrics: inBetween, monotelAll: inBetween, rawTraced: likeRaw}
	maps.Copy(all, without)
	return all
}

// grid returns every combination.
func grid(keys []string, values ...[]int) [][]param {
	sets := [][]param{nil}
	for i, key := range keys {
		var longer [][]param
		for _, set := range sets {
			for _, v := range values[i] {
				longer = append(longer, append(slices.Clone(set), param{key, v}))
			}
		}
		sets = longer
	}
	return sets
}

// absent says why a library is not measured in a cell, and is empty where it is.
func (w work) absent(c cell) string {
	lib, err := findLibrary(c.lib)
	switch {
	case err != nil:
		return err.Error()
	case w.without[c.lib] != "":
		return w.without[c.lib]
	case lib.ownServer && c.transport == loopback:
		return onlyInside
	case lib.ownServer && c.param("concurrency") > 1:
		return noWorkers
	case (c.lib == watermillSync || c.lib == watermillAsync) && c.param("batch") > 0 && c.param("batch") != 10:
		return noBatches
	}
	return ""
}

// first tells whether a cell is the one that stands for its work: with small
// payloads and the first parameters.
func (c cell) first() bool {
	i := slices.IndexFunc(works, func(w work) bool { return w.name == c.work })
	return c.size == smallSize && (len(works[i].params) == 0 || slices.Equal(c.params, works[i].params[0]))
}

// groups returns the cells, those that are compared with each other together.
func groups() [][]cell {
	var all [][]cell
	for _, w := range works {
		sets, sizes := w.params, w.sizes
		if sets == nil {
			sets = [][]param{nil}
		}
		if sizes == nil {
			sizes = []int{smallSize, largeSize}
		}
		for _, set := range sets {
			for _, transport := range []string{inProcess, loopback} {
				for _, size := range sizes {
					var group []cell
					for _, l := range libraries {
						c := cell{work: w.name, params: set, transport: transport, size: size, lib: l.name}
						if w.absent(c) == "" {
							group = append(group, c)
						}
					}
					all = append(all, group)
				}
			}
		}
	}
	return all
}
