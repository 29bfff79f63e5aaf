package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/ThreeDotsLabs/watermill"
	wmnats "github.com/ThreeDotsLabs/watermill-nats/v2/pkg/nats"
	"github.com/ThreeDotsLabs/watermill/components/metrics"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/nats-io/nats.go"
	client "github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// startWatermill runs a router with watermill-nats's package nats, which its
// documentation recommends over its beta package jetstream, and the marshaler that
// uses NATS's headers. Metrics are those of Watermill's own components/metrics,
// traces those of the middleware below, one in a hundred sampled. asyncAck does not
// wait for the server to confirm each ack; waiting is the default.
func startWatermill(asyncAck bool) func(context.Context, target, program) (*running, error) {
	return func(ctx context.Context, t target, p program) (*running, error) {
		tp := tracerProvider(telemetry1.ratio)
		w := &watermillService{
			program: p, target: t, asyncAck: asyncAck,
			subjects: p.subjects(),
			tracing:  &watermillTracing{tp.Tracer("watermill"), propagation.TraceContext{}},
			metrics:  metrics.NewPrometheusMetricsBuilder(client.NewRegistry(), "", ""),
		}
		pub, err := w.publisher(p.stream)
		if err != nil {
			return nil, err
		}
		stop, err := w.run(ctx)
		if err != nil {
			return nil, err
		}
		publish := func(event int, data []byte) error {
			return pub.Publish(w.subjects[event], message.NewMessage(watermill.NewUUID(), data))
		}
		r := &running{
			message: w.message,
			stop:    func() error { return errors.Join(stop(), pub.Close(), tp.Shutdown(ctx)) },
		}
		if p.stream {
			r.publishSync = publish
		} else {
			r.publish = publish
		}
		return r, nil
	}
}

type watermillService struct {
	program
	target

	asyncAck bool
	subjects []string
	tracing  *watermillTracing
	metrics  metrics.PrometheusMetricsBuilder
}

func (w *watermillService) publisher(stream bool) (message.Publisher, error) {
	pub, err := wmnats.NewPublisher(wmnats.PublisherConfig{
		URL: w.url, NatsOptions: w.opts, JetStream: wmnats.JetStreamConfig{Disabled: !stream},
	}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	counted, err := w.metrics.DecoratePublisher(pub)
	if err != nil {
		return nil, err
	}
	return tracedPublisher{counted, w.tracing}, nil
}

// message is what the publisher sends.
func (w *watermillService) message(event int, data []byte) (*nats.Msg, error) {
	msg := message.NewMessage(watermill.NewUUID(), data)
	var m *nats.Msg
	err := w.tracing.publish(w.subjects[event], msg, func() (err error) {
		m, err = (&wmnats.NATSMarshaler{}).Marshal(w.subjects[event], msg)
		return err
	})
	return m, err
}

// run starts a router with a handler for each consumer.
func (w *watermillService) run(ctx context.Context) (stop func() error, err error) {
	if w.core+w.durable == 0 {
		return func() error { return nil }, nil
	}
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	if err != nil {
		return nil, err
	}
	w.metrics.AddPrometheusRouterMetrics(router)
	router.AddMiddleware(w.tracing.middleware)
	closed := make(chan struct{})
	nc, err := nats.Connect(w.url, append(w.opts, nats.ClosedHandler(func(*nats.Conn) { close(closed) }))...)
	if err != nil {
		return nil, err
	}
	// A subscriber names a durable consumer by its topic, so it can have one of
	// each kind of event. Subscribers share a connection.
	var sub *wmnats.Subscriber
	for i := range w.core + w.durable {
		if i%w.events == 0 {
			if sub, err = w.subscriber(nc, i); err != nil {
				return nil, err
			}
		}
		router.AddConsumerHandler(durableName(i), w.subjects[i%w.events], sub, func(msg *message.Message) error {
			w.handle(i, msg.Payload)
			if w.durable > 0 {
				w.settled() // it is acked when this returns
			}
			return nil
		})
	}
	ended := make(chan error, 1)
	go func() { ended <- router.Run(ctx) }()
	select {
	case <-router.Running():
	case err := <-ended:
		return nil, fmt.Errorf("router: %w", err)
	}
	if err := nc.Flush(); err != nil { // another connection publishes
		return nil, err
	}
	return func() error {
		err := errors.Join(router.Close(), <-ended)
		<-closed // the subscribers drain it
		return err
	}, nil
}

// subscriber returns that of the consumers from first on.
func (w *watermillService) subscriber(nc *nats.Conn, first int) (*wmnats.Subscriber, error) {
	cfg := wmnats.SubscriberSubscriptionConfig{
		SubscribersCount: max(w.concurrency, 1),
		AckWaitTimeout:   ackWait,
		QueueGroupPrefix: durableName(first), // consumers of one name share the events
		JetStream:        wmnats.JetStreamConfig{Disabled: true},
	}
	if w.durable > 0 {
		names := make(map[string]string, w.events)
		for i, s := range w.subjects {
			names[s] = durableName(first + i)
		}
		if cfg.SubscribersCount == 1 {
			cfg.QueueGroupPrefix = ""
		}
		cfg.JetStream = wmnats.JetStreamConfig{
			AckAsync:          w.asyncAck,
			DurableCalculator: func(_, topic string) string { return names[topic] },
			SubscribeOptions: []nats.SubOpt{
				nats.BindStream(streamName), nats.DeliverAll(), nats.AckExplicit(), nats.ManualAck(),
				nats.AckWait(ackWait), nats.MaxAckPending(w.maxAckPending()),
			},
		}
	}
	return wmnats.NewSubscriberWithNatsConn(nc, cfg, watermill.NopLogger{})
}

// maxAckPending is small where several subscribers share a backlog: the server
// pushes as much of it as it may to the first that is there. Four for each is
// about the best, for quick and for slow handlers.
func (w *watermillService) maxAckPending() int {
	const each = 4
	if w.concurrency > 1 {
		return each * w.concurrency
	}
	return maxAckPending
}

// watermillTracing is a span around each publish and each handler, with the trace's
// context in the message's metadata, as users add it to Watermill.
type watermillTracing struct {
	tracer     trace.Tracer
	propagator propagation.TextMapPropagator
}

// metadata carries trace context.
type metadata message.Metadata

func (m metadata) Get(key string) string { return m[key] }
func (m metadata) Set(key, value string) { m[key] = value }

func (m metadata) Keys() []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	return keys
}

func (t *watermillTracing) attributes(operation, topic string, msg *message.Message) trace.SpanStartOption {
	return trace.WithAttributes(
		attribute.String("messaging.system", "nats"),
		attribute.String("messaging.operation.name", operation),
		attribute.String("messaging.destination.name", topic),
		attribute.String("messaging.message.id", msg.UUID))
}

func (t *watermillTracing) publish(topic string, msg *message.Message, send func() error) error {
	ctx, span := t.tracer.Start(msg.Context(), "send "+topic,
		trace.WithSpanKind(trace.SpanKindProducer), t.attributes("send", topic, msg))
	defer span.End()
	t.propagator.Inject(ctx, metadata(msg.Metadata))
	return record(span, send())
}

func (t *watermillTracing) middleware(next message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		topic := message.SubscribeTopicFromCtx(msg.Context())
		ctx := t.propagator.Extract(msg.Context(), metadata(msg.Metadata))
		ctx, span := t.tracer.Start(ctx, "process "+topic,
			trace.WithSpanKind(trace.SpanKindConsumer), t.attributes("process", topic, msg))
		defer span.End()
		msg.SetContext(ctx)
		out, err := next(msg)
		return out, record(span, err)
	}
}

func record(span trace.Span, err error) error {
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	return err
}

type tracedPublisher struct {
	message.Publisher

	tracing *watermillTracing
}

func (p tracedPublisher) Publish(topic string, msgs ...*message.Message) error {
	for _, msg := range msgs {
		if err := p.tracing.publish(topic, msg, func() error { return p.Publisher.Publish(topic, msg) }); err != nil {
			return err
		}
	}
	return nil
}
