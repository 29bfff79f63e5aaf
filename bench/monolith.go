package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	monolith "github.com/go-monolith/mono"
	"github.com/nats-io/nats.go"
)

// startMonolith runs an application of go-monolith/mono with one module. It starts
// the NATS server by itself, on the folder that was prepared, and connects to it
// without a port.
func startMonolith(ctx context.Context, t target, p program) (*running, error) {
	app, err := monolith.NewMonoApplication(
		monolith.WithNATSDontListen(),
		monolith.WithNATSInProcessConn(),
		monolith.WithJetStreamStorageDir(t.dir),
		monolith.WithLogLevel(monolith.LogLevelError),
		monolith.WithLogOutput(io.Discard))
	if err != nil {
		return nil, err
	}
	m := &monolithModule{program: p}
	for i := range p.events {
		m.events = append(m.events, monolith.BaseEventDefinition{
			ModuleName: moduleName, Name: eventName(i), Version: "v1", Subject: subject(i),
		})
	}
	if err := app.Register(m); err != nil {
		return nil, err
	}
	if err := app.Start(ctx); err != nil {
		return nil, err
	}
	bus, ok := m.bus.(interface{ Conn() *nats.Conn })
	if !ok {
		return nil, errors.New("the event bus does not tell its connection")
	}
	es, err := m.bus.EventStream()
	if err != nil {
		return nil, err
	}
	subjects := p.subjects()
	return &running{
		publish: func(event int, data []byte) error { return m.bus.Publish(subjects[event], data) },
		publishSync: func(event int, data []byte) error {
			_, err := es.Publish(ctx, subjects[event], data)
			return err
		},
		durable: func(consumer int) (stream, name string) { return m.stream(consumer), m.durableName(consumer) },
		conn:    bus.Conn(),
		stop:    func() error { return app.Stop(ctx) },
	}, nil
}

type monolithModule struct {
	program

	events []monolith.BaseEventDefinition
	bus    monolith.EventBus
}

func (*monolithModule) Name() string                                 { return moduleName }
func (*monolithModule) Start(context.Context) error                  { return nil }
func (*monolithModule) Stop(context.Context) error                   { return nil }
func (m *monolithModule) SetEventBus(bus monolith.EventBus)          { m.bus = bus }
func (m *monolithModule) EmitEvents() []monolith.BaseEventDefinition { return m.events }

// stream is that of a consumer. A registration sets its stream's subjects to the
// one of its event, so a second kind of event needs a second stream.
func (m *monolithModule) stream(consumer int) string {
	if len(m.events) == 1 {
		return streamName
	}
	return fmt.Sprintf("%s-%d", streamName, consumer%len(m.events))
}

// durableName is the name that the library gives a consumer. It does not make it
// durable by itself.
func (m *monolithModule) durableName(consumer int) string {
	e := m.events[consumer%len(m.events)]
	return fmt.Sprintf("%s-%s-%s-%d", e.ModuleName, e.Name, e.Version, consumer+1)
}

func (m *monolithModule) RegisterEventConsumers(r monolith.EventRegistry) error {
	for i := range m.core {
		err := r.RegisterEventConsumer(m.events[i%len(m.events)], func(_ context.Context, msg *monolith.Msg) error {
			m.handle(i, msg.Data)
			return nil
		}, m, durableName(i))
		if err != nil {
			return err
		}
	}
	for i := range m.durable {
		e := m.events[i%len(m.events)]
		cfg := monolith.StreamConsumerConfig{
			Stream: monolith.StreamConfig{Name: m.stream(i), MaxBytes: streamBytes},
			Consumer: monolith.ConsumerConfig{
				Durable:       m.durableName(i), //nolint:staticcheck // the library sets Name alone, which is not durable
				FilterSubject: e.Subject,
				AckWait:       ackWait,
				MaxAckPending: maxAckPending,
			},
			Fetch: monolith.FetchConfig{BatchSize: m.batch, Timeout: 5 * time.Second},
		}
		if len(m.events) > 1 {
			cfg.Stream.MaxBytes = streamBytes / int64(len(m.events))
		}
		err := r.RegisterEventStreamConsumer(e, cfg, func(_ context.Context, msgs []*monolith.Msg) error {
			for _, msg := range msgs {
				m.handle(i, msg.Data)
				if err := msg.Ack(); err != nil {
					return err
				}
				m.settled()
			}
			return nil
		}, m)
		if err != nil {
			return err
		}
	}
	return nil
}
