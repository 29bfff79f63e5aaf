package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	backlog    = 20_000
	tellingBy  = 5 // so many times as much where a target rests on it: 20 000 take a tenth of a second
	slowWork   = 2 * time.Millisecond
	slowEvents = 200 // for each handler that runs at a time
	minFanOut  = 200
)

// measureConsume measures consuming from the first ack to the last. A backlog waits
// for one consumer, while several get what is published once they all run; else the
// first would be done before the last has started.
func measureConsume(ctx context.Context, b *bench) (result, error) {
	fan := b.param("consumers")
	p := program{
		events: 1, stream: true, durable: max(fan, 1),
		batch: b.param("batch"), concurrency: max(b.param("concurrency"), 1),
	}
	n := b.count(backlog)
	if b.telling() {
		n = b.count(tellingBy * backlog)
	}
	if events := b.param(paramEvents); events > 0 {
		n = b.count(events)
	}
	switch b.work {
	case "SlowHandler":
		p.batch = 1
		n = b.count(slowEvents * p.concurrency)
	case "DurableFanOut":
		n = max(n/fan, minFanOut)
	}
	m := newMeter(b, p.durable, n)
	p.settled = m.settled
	p.handle = m.handle
	if b.work == "SlowHandler" {
		p.handle = func(consumer int, data []byte) {
			time.Sleep(slowWork) //nolint:forbidigo // the handler waits for something else, as slow ones do
			m.handle(consumer, data)
		}
	}
	inStore := n
	if fan > 0 {
		inStore = 0
	}
	r, err := b.start(ctx, p, inStore)
	if err != nil {
		return result{}, err
	}
	if fan > 0 {
		if err := m.publish(r, n); err != nil {
			return result{}, err
		}
	}
	res, err := m.wait()
	if err != nil {
		return result{}, err
	}
	if err := acked(ctx, r, p, n); err != nil {
		return result{}, err
	}
	return res, errors.Join(r.stop(), m.err())
}

// A meter counts events, each once for each consumer, and measures from the first
// ack to the last.
type meter struct {
	b     *bench
	n     int           // events
	seen  []atomic.Bool // by consumer and event
	twice atomic.Int64

	count atomic.Int64
	want  int64
	began chan struct{} // closed
	done  chan struct{} // closed, with res
	onErr error
	res   result
}

func newMeter(b *bench, consumers, n int) *meter {
	return &meter{
		b: b, n: n, seen: make([]atomic.Bool, consumers*n), want: int64(consumers * n),
		began: make(chan struct{}), done: make(chan struct{}),
	}
}

func (m *meter) handle(consumer int, data []byte) {
	if m.seen[consumer*m.n+number(data)].Swap(true) {
		m.twice.Add(1)
	}
}

func (m *meter) settled() {
	switch m.count.Add(1) {
	case 1:
		m.begin()
	case m.want:
		<-m.began
		m.res = m.b.off(int(m.want) - 1) // the first starts the clock
		close(m.done)
	}
}

func (m *meter) begin() {
	m.onErr = m.b.on()
	close(m.began)
}

// publish publishes n events, as the library sends them.
func (m *meter) publish(r *running, n int) error {
	publish, wait, err := m.b.publisher(r.conn, r)
	if err != nil {
		return err
	}
	for i := range n {
		if err := publish(0, m.b.payload(i)); err != nil {
			return err
		}
	}
	return wait()
}

func (m *meter) wait() (result, error) {
	select {
	case <-m.done:
		return m.res, m.err()
	case <-time.After(patience):
		return result{}, fmt.Errorf("%d of %d acks after %v", m.count.Load(), m.want, patience)
	}
}

// err tells whether every event was handled once by each consumer.
func (m *meter) err() error {
	if m.onErr != nil {
		return m.onErr
	}
	missed := 0
	for i := range m.seen {
		if !m.seen[i].Load() {
			missed++
		}
	}
	if twice := m.twice.Load(); twice > 0 || missed > 0 {
		return fmt.Errorf("of %d events %d were handled twice and %d never", m.want, twice, missed)
	}
	return nil
}

// acked waits until the server has every ack of every consumer, and looks whether
// it delivered anything twice.
func acked(ctx context.Context, r *running, p program, n int) error {
	js, err := r.conn.JetStream() // jetstream.New's refuses to look at push consumers, which Watermill uses
	if err != nil {
		return err
	}
	want := uint64(n) //nolint:gosec // a count
	for i := range p.durable {
		stream, name := streamName, durableName(i)
		if r.durable != nil {
			stream, name = r.durable(i)
		}
		if err := until(func() (bool, error) {
			info, err := js.ConsumerInfo(stream, name, nats.Context(ctx))
			if err != nil {
				return false, err
			}
			if info.NumRedelivered > 0 || info.Delivered.Consumer > want {
				return false, fmt.Errorf("%d deliveries of %d events to consumer %s", info.Delivered.Consumer, n, name)
			}
			return info.AckFloor.Stream == want && info.NumAckPending == 0, nil
		}); err != nil {
			return err
		}
	}
	return nil
}

// until waits for what the server does by itself.
func until(ok func() (bool, error)) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(patience); ; {
		done, err := ok()
		switch {
		case done || err != nil:
			return err
		case time.Now().After(deadline):
			return errors.New("the server does not have every ack")
		}
		<-tick.C
	}
}

// publisher returns how the library sends events into the stream, quickly. A
// library whose events are nothing but their payload leaves that to nats.go.
func (b *bench) publisher(nc *nats.Conn, r *running) (publish func(int, []byte) error, wait func() error, err error) {
	if b.lib.marshals && r.publishAsync != nil {
		return r.publishAsync, r.wait, nil
	}
	failed := make(chan error, 1)
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(window),
		jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, _ *nats.Msg, err error) {
			select {
			case failed <- err:
			default:
			}
		}))
	if err != nil {
		return nil, nil, err
	}
	return func(event int, data []byte) error {
		m := &nats.Msg{Subject: subject(event), Data: data}
		if b.lib.marshals {
			if m, err = r.message(event, data); err != nil {
				return err
			}
		}
		return rawAsync(js, m)
	}, func() error { return rawWait(js, failed) }, nil
}
