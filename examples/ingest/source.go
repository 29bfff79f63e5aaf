package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
)

// Headers of each message. A message says by itself which line it is, so that
// the stream is the only place to look.
const (
	inputHeader = "Ingest-Input"
	lineHeader  = "Ingest-Line"
)

// publishWindow is how many publishes wait for their acknowledgement at a time.
// It bounds the memory: lines can have a megabyte.
const publishWindow = 256

// source is the module that publishes the lines.
type source struct {
	families []family
	bus      mono.EventBus

	sent    atomic.Int64 // stored by this run
	dropped atomic.Int64 // that the stream had already
}

func (*source) Name() string                    { return owner }
func (*source) Start(context.Context) error     { return nil }
func (*source) Stop(context.Context) error      { return nil }
func (s *source) SetEventBus(bus mono.EventBus) { s.bus = bus }
func (s *source) EmitEvents() []mono.BaseEventDefinition {
	events := make([]mono.BaseEventDefinition, len(s.families))
	for i, f := range s.families {
		events[i] = f.event
	}
	return events
}

// publish stores every line that the stream does not have, and returns what it
// has then. It trusts no memory of what was sent: it looks, sends what is
// missing, and looks again, until nothing is missing. A line that the server
// does not take, because it is too large, becomes a bad one.
func (s *source) publish(ctx context.Context, js jetstream.JetStream, in *input, have *stored, rate int, w io.Writer) (*stored, error) {
	const (
		tries = 10
		pause = 2 * time.Second
	)
	for try := 1; ; try++ {
		missing := have.missing(in.lines)
		if len(missing) == 0 {
			return have, nil
		}
		err := s.send(ctx, in, missing, rate, w)
		if err != nil && !mayPass(err) {
			return have, err
		}
		now, scanErr := readStored(ctx, js, in.id)
		if scanErr == nil {
			have = now
			if err == nil && len(have.missing(in.lines)) > 0 {
				return have, errors.New("the stream does not hold what it has acknowledged: was it purged meanwhile?")
			}
		}
		if err = errors.Join(err, scanErr); err == nil {
			continue
		}
		if try == tries || ctx.Err() != nil {
			return have, err
		}
		fmt.Fprintf(w, "Publishing is interrupted and will go on: %v\n", err)
		if err := wait(ctx, time.After(pause)); err != nil {
			return have, err
		}
	}
}

// mayPass reports whether err leaves open whether a line is stored, or may be
// over in a moment.
func mayPass(err error) bool {
	return errors.Is(err, mono.ErrDisconnected) || errors.Is(err, mono.ErrAckTimeout)
}

// send publishes lines asynchronously and waits for all of them.
func (s *source) send(ctx context.Context, in *input, lines []*line, rate int, w io.Writer) error {
	type sent struct {
		line   *line
		future *mono.PubAckFuture
	}
	var queue []sent
	rejected := make(map[int]bool)
	// settle takes the oldest publish off the queue.
	settle := func() error {
		l, future := queue[0].line, queue[0].future
		queue = queue[1:]
		ack, err := future.Wait(ctx)
		switch {
		case errors.Is(err, mono.ErrPayloadTooLarge):
			in.reject(w, l.number, err)
			rejected[l.number] = true
		case err != nil:
			return fmt.Errorf("line %d: %w", l.number, err)
		case ack.Duplicate():
			s.dropped.Add(1)
		default:
			s.sent.Add(1)
		}
		return nil
	}
	defer func() { in.remove(rejected) }()

	var tick <-chan time.Time
	if rate > 0 {
		t := time.NewTicker(time.Second / time.Duration(rate))
		defer t.Stop()
		tick = t.C
	}
	events := make(map[string]mono.BaseEventDefinition, len(s.families))
	for _, f := range s.families {
		events[f.name] = f.event
	}
	for _, l := range lines {
		if rate > 0 {
			if err := wait(ctx, tick); err != nil {
				return err
			}
		}
		if len(queue) == publishWindow {
			if err := settle(); err != nil {
				return err
			}
		}
		payload, err := in.payload(l)
		if err != nil {
			return err
		}
		number := strconv.Itoa(l.number)
		// Not helper's publish of a Go value: that would encode the payload
		// again, and what is stored is to be what was read.
		future, err := s.bus.PublishStreamAsync(ctx, &mono.Msg{
			Subject: events[l.family].Subject,
			Data:    payload,
			Header: mono.Header{
				jetstream.MsgIDHeader: {in.id + "-" + number},
				inputHeader:           {in.id},
				lineHeader:            {number},
			},
		})
		switch {
		case errors.Is(err, mono.ErrPayloadTooLarge):
			in.reject(w, l.number, err)
			rejected[l.number] = true
		case err != nil:
			return fmt.Errorf("line %d: %w", l.number, err)
		default:
			queue = append(queue, sent{l, future})
		}
	}
	for len(queue) > 0 {
		if err := settle(); err != nil {
			return err
		}
	}
	return nil
}

func wait(ctx context.Context, c <-chan time.Time) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
