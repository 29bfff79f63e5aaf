package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	unitTime      = "ns/op"
	unitProcessor = "cpu-ns/op"
	unitBytes     = "B/op"
	unitAllocs    = "allocs/op"
)

// repeat calls one for a while and returns how often.
func repeat(d time.Duration, one func() error) (int, error) {
	const between = 64 // looks at the clock
	begin := time.Now()
	for n := 0; ; n++ {
		if n%between == 0 && n > 0 && time.Since(begin) >= d {
			return n, nil
		}
		if err := one(); err != nil {
			return n, err
		}
	}
}

func (b *bench) spell() time.Duration {
	if b.quick {
		return quickSpell
	}
	return spell
}

// paramEvents sets the number of events of a cell, which otherwise follows from the
// work: the same number each time makes allocations comparable exactly.
const paramEvents = "events"

// repeat calls one for a spell, or as often as the cell says, divided by part.
func (b *bench) repeat(part int, one func() error) (int, error) {
	events := b.param(paramEvents)
	if events == 0 {
		return repeat(b.spell()/time.Duration(part), one)
	}
	n := max(b.count(events)/part, 1)
	for i := range n {
		if err := one(); err != nil {
			return i, err
		}
	}
	return n, nil
}

// measurePublish measures one goroutine that publishes, until the last
// acknowledgement is here.
func measurePublish(pick func(*running) (publish func(int, []byte) error, wait func() error), stream bool,
) func(context.Context, *bench) (result, error) {
	return func(ctx context.Context, b *bench) (result, error) {
		r, err := b.start(ctx, program{events: 1, stream: stream}, 0)
		if err != nil {
			return result{}, err
		}
		publish, wait := pick(r)
		if wait == nil {
			wait = func() error { return nil }
		}
		data := b.payload(0)
		one := func() error { return publish(0, data) }
		warm, err := b.repeat(4, one)
		if err := errors.Join(err, wait()); err != nil {
			return result{}, err
		}
		if err := b.on(); err != nil {
			return result{}, err
		}
		n, err := b.repeat(1, one)
		if err := errors.Join(err, wait()); err != nil {
			return result{}, err
		}
		res := b.off(n)
		if stream {
			if err := stored(ctx, r.conn, warm+n); err != nil {
				return result{}, err
			}
		}
		return res, r.stop()
	}
}

// measurePubSub measures from the first publish until the last handler has got the
// last event. An operation is one event in one handler.
func measurePubSub(ctx context.Context, b *bench) (result, error) {
	types, fan := max(b.param("types"), 1), max(b.param("consumers"), 1)
	f := newFlow(fan)
	r, err := b.start(ctx, program{
		events: types, core: types * fan, handle: func(int, []byte) { f.handled() },
	}, 0)
	if err != nil {
		return result{}, err
	}
	data, event := b.payload(0), 0
	one := func() error {
		event = (event + 1) % types
		return r.publish(event, data)
	}
	if _, err := f.run(b.spell()/4, one); err != nil {
		return result{}, err
	}
	if err := b.on(); err != nil {
		return result{}, err
	}
	n, err := f.run(b.spell(), one)
	if err != nil {
		return result{}, err
	}
	res := b.off(n * fan)
	if err := r.stop(); err != nil {
		return result{}, err
	}
	return res, f.check()
}

// A flow lets a publisher run ahead of its subscribers by a few thousand messages
// and not more, since core NATS drops what a slow subscriber cannot take. It costs
// both sides a channel operation in some hundred messages.
type flow struct {
	fan    int64         // handlers of each message
	stride int64         // messages for a token
	ahead  chan struct{} // tokens on the way
	sent   int64
	count  atomic.Int64
	total  atomic.Int64 // known at the end
	done   chan struct{}
}

func newFlow(fan int) *flow {
	const messages, fewest, tokens = 512, 32, 8
	return &flow{
		fan: int64(fan), stride: int64(max(messages/fan, fewest)),
		ahead: make(chan struct{}, tokens), done: make(chan struct{}, 1),
	}
}

// handled is called for each message that arrived.
func (f *flow) handled() {
	n := f.count.Add(1)
	if n%(f.stride*f.fan) == 0 {
		<-f.ahead
	}
	if n == f.total.Load() {
		f.done <- struct{}{}
	}
}

func (f *flow) run(d time.Duration, publish func() error) (n int, err error) {
	f.total.Store(-1)
	n, err = repeat(d, func() error {
		f.sent++
		if f.sent%f.stride == 0 {
			select {
			case f.ahead <- struct{}{}:
			default:
				if err := f.room(); err != nil {
					return err
				}
			}
		}
		return publish()
	})
	if err != nil {
		return n, err
	}
	f.total.Store(f.sent * f.fan)
	timeout := time.After(patience)
	for f.count.Load() < f.sent*f.fan {
		select {
		case <-f.done:
		case <-timeout:
			return n, f.check()
		}
	}
	select { // the last handler may have said so as well
	case <-f.done:
	default:
	}
	return n, nil
}

func (f *flow) room() error {
	select {
	case f.ahead <- struct{}{}:
		return nil
	case <-time.After(patience):
		return f.check()
	}
}

// check tells whether each message was handled as often as there are handlers.
func (f *flow) check() error {
	if got, want := f.count.Load(), f.sent*f.fan; got != want {
		return fmt.Errorf("%d of %d messages were handled", got, want)
	}
	return nil
}
