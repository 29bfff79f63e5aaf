package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	window        = 4096 // asynchronous publishes that wait for the server
	maxAckPending = 10_000
	ackWait       = 30 * time.Second
	patience      = 2 * time.Minute // then something is wrong
)

// startRaw uses nats.go as its documentation shows: one connection, Consume with
// its default buffer, and goroutines behind it where the program asks for
// concurrency. Consume has no batches. traced gives each message a traceparent, as
// whoever wants to follow it has to: what that costs the client and the server, no
// library can save.
func startRaw(traced bool) func(context.Context, target, program) (*running, error) {
	return func(ctx context.Context, t target, p program) (*running, error) { return runRaw(ctx, t, p, traced) }
}

func runRaw(ctx context.Context, t target, p program, traced bool) (*running, error) {
	nc, err := t.connect()
	if err != nil {
		return nil, err
	}
	failed := make(chan error, 1)
	fail := func(err error) {
		select {
		case failed <- err:
		default:
		}
	}
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(window),
		jetstream.WithPublishAsyncErrHandler(func(_ jetstream.JetStream, _ *nats.Msg, err error) { fail(err) }))
	if err != nil {
		return nil, err
	}
	for i := range p.core {
		if _, err := nc.QueueSubscribe(subject(i%p.events), durableName(i), func(m *nats.Msg) { p.handle(i, m.Data) }); err != nil {
			return nil, err
		}
	}
	if err := nc.Flush(); err != nil {
		return nil, err
	}
	stops := make([]func(), 0, p.durable)
	for i := range p.durable {
		stop, err := rawConsume(ctx, js, p, i, fail)
		if err != nil {
			return nil, err
		}
		stops = append(stops, stop)
	}
	subjects := p.subjects()
	message := func(event int, data []byte) *nats.Msg {
		m := &nats.Msg{Subject: subjects[event], Data: data}
		if traced {
			m.Header = nats.Header{"traceparent": {"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00"}}
		}
		return m
	}
	return &running{
		publish: func(event int, data []byte) error { return nc.PublishMsg(message(event, data)) },
		publishSync: func(event int, data []byte) error {
			_, err := js.PublishMsg(ctx, message(event, data))
			return err
		},
		publishAsync: func(event int, data []byte) error { return rawAsync(js, message(event, data)) },
		wait:         func() error { return rawWait(js, failed) },
		stop: func() error {
			for _, stop := range stops {
				stop()
			}
			if err := nc.Flush(); err != nil {
				return err
			}
			nc.Close()
			select {
			case err := <-failed:
				return err
			default:
				return nil
			}
		},
	}, nil
}

func rawConsume(ctx context.Context, js jetstream.JetStream, p program, i int, fail func(error)) (stop func(), err error) {
	c, err := js.CreateConsumer(ctx, streamName, jetstream.ConsumerConfig{
		Durable:       durableName(i),
		FilterSubject: subject(i % p.events),
		AckPolicy:     jetstream.AckExplicitPolicy,
		AckWait:       ackWait,
		MaxAckPending: maxAckPending,
	})
	if err != nil {
		return nil, err
	}
	handle := func(m jetstream.Msg) {
		p.handle(i, m.Data())
		if err := m.Ack(); err != nil {
			fail(err)
			return
		}
		p.settled()
	}
	deliver, finish := handle, func() {}
	if p.concurrency > 1 {
		deliver, finish = rawWorkers(p.concurrency, handle)
	}
	cc, err := c.Consume(deliver)
	if err != nil {
		return nil, err
	}
	return func() {
		cc.Stop()
		<-cc.Closed()
		finish()
	}, nil
}

// rawWorkers gives messages to n goroutines.
func rawWorkers(n int, handle func(jetstream.Msg)) (deliver func(jetstream.Msg), finish func()) {
	msgs := make(chan jetstream.Msg)
	var workers sync.WaitGroup
	for range n {
		workers.Go(func() {
			for m := range msgs {
				handle(m)
			}
		})
	}
	return func(m jetstream.Msg) { msgs <- m }, func() {
		close(msgs)
		workers.Wait()
	}
}

func rawAsync(js jetstream.JetStream, m *nats.Msg) error {
	_, err := js.PublishMsgAsync(m)
	for errors.Is(err, jetstream.ErrTooManyStalledMsgs) { // nats.go waits 200 ms for room
		_, err = js.PublishMsgAsync(m)
	}
	return err
}

func rawWait(js jetstream.JetStream, failed <-chan error) error {
	select {
	case <-js.PublishAsyncComplete():
	case <-time.After(patience):
		return fmt.Errorf("%d publishes are not acknowledged", js.PublishAsyncPending())
	}
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}
