package main

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"
)

const (
	unitP50 = "p50-ns/op"
	unitP99 = "p99-ns/op"

	latencySpell = time.Second
	mostLone     = 1000
	fewestLone   = 2 // a library may take seconds for one
	warmUp       = 20
)

// measureLatency measures from before the publish, which waits for the server,
// until the handler is called. The consumer has the library's defaults. Events come
// at a fixed rate, far below what any library can take, or one by one.
func measureLatency(ctx context.Context, b *bench) (result, error) {
	rate := b.param("rate")
	l := &latency{took: make([]time.Duration, max(rate*int(latencySpell/time.Second), mostLone)), handled: make(chan struct{}, 1)}
	r, err := b.start(ctx, program{
		events: 1, stream: true, durable: 1, concurrency: 1, handle: l.handle, settled: func() {},
	}, 0)
	if err != nil {
		return result{}, err
	}
	if err := b.on(); err != nil {
		return result{}, err
	}
	var n int
	if rate > 0 {
		n, err = l.steady(b, r, rate)
	} else {
		n, err = l.lone(b, r)
	}
	if err != nil {
		return result{}, err
	}
	b.off(n)
	took := l.took[:n]
	if n > 2*warmUp {
		took = took[warmUp:]
	}
	slices.Sort(took)
	res := result{n, []metric{{percentile(took, 50), unitP50}, {percentile(took, 99), unitP99}}}
	return res, errors.Join(acked(ctx, r, program{durable: 1}, n), r.stop())
}

type latency struct {
	took    []time.Duration // by number
	count   atomic.Int64
	handled chan struct{}
}

func (l *latency) handle(_ int, data []byte) {
	l.took[number(data)] = time.Since(epoch) - sent(data)
	l.count.Add(1)
	select {
	case l.handled <- struct{}{}:
	default:
	}
}

// steady publishes at a rate. An event that is late because the publish before it
// took too long is timed from when it was due.
func (l *latency) steady(b *bench, r *running, rate int) (int, error) {
	n := b.count(rate * int(latencySpell/time.Second))
	begin := time.Now()
	for i := range n {
		due := begin.Add(time.Duration(i) * time.Second / time.Duration(rate))
		data := b.payload(i)
		if wait := time.Until(due); wait > 0 {
			time.Sleep(wait) //nolint:forbidigo // keeps the rate
			stamp(data, time.Now())
		} else {
			stamp(data, due)
		}
		if err := r.publishSync(0, data); err != nil {
			return i, err
		}
	}
	return n, l.wait(n)
}

// lone publishes an event when the one before is handled.
func (l *latency) lone(b *bench, r *running) (int, error) {
	most := b.count(mostLone)
	begin := time.Now()
	for i := range most {
		if i >= fewestLone && time.Since(begin) > latencySpell {
			return i, nil
		}
		if err := r.publishSync(0, b.payload(i)); err != nil {
			return i, err
		}
		if err := l.wait(i + 1); err != nil {
			return i, err
		}
	}
	return most, nil
}

// wait waits until n events are handled.
func (l *latency) wait(n int) error {
	timeout := time.After(patience)
	for l.count.Load() < int64(n) {
		select {
		case <-l.handled:
		case <-timeout:
			return errors.New("an event was not handled")
		}
	}
	return nil
}

// percentile returns the value that p percent of ds, which are sorted, do not
// exceed.
func percentile(ds []time.Duration, p int) float64 { return float64(ds[(len(ds)*p+99)/100-1]) }
