// Package audit writes every order into a ledger. No order may get lost here,
// so it listens through a durable consumer: each order is stored and comes
// again until it is written or given up.
package audit

import (
	"context"
	"errors"
	"time"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// Stream is the name of the stream that stores orders until they are audited.
const Stream = "orders-audit"

// Retry says how often and how soon an order that could not be written is tried
// again. The delays are short for a program that is watched; without Backoff
// they begin with a second and grow to minutes.
var Retry = mono.RetryPolicy{
	MaxAttempts: 4,
	Backoff:     []time.Duration{500 * time.Millisecond, time.Second, 2 * time.Second},
}

// ackWait is how soon an order comes again that a process had when it was killed. A
// handler may take longer.
const ackWait = 10 * time.Second

// A Result is what became of one attempt to write an order.
type Result struct {
	Order    tracking.OrderCreatedEvent
	Sequence uint64 // of the order in the stream
	Attempt  uint64 // 1 for the first
	Replay   bool   // of an order that was given up before
	Err      error  // nil when the order is written
}

// Module audits orders.
type Module struct {
	write  func(ctx context.Context, order tracking.OrderCreatedEvent) error
	report func(Result)
}

var _ mono.EventConsumerModule = (*Module)(nil)

// New returns a module that audits orders with write, and tells report what
// became of each attempt. write must take an order that it has already without
// complaint: a message may come twice. An error made by [mono.Permanent] is not
// tried again.
func New(write func(ctx context.Context, order tracking.OrderCreatedEvent) error, report func(Result)) *Module {
	return &Module{write: write, report: report}
}

// Name is the module's name in logs and on the server.
func (m *Module) Name() string { return "audit" }

// Start has nothing to do.
func (m *Module) Start(context.Context) error { return nil }

// Stop has nothing to do.
func (m *Module) Stop(context.Context) error { return nil }

// RegisterEventConsumers asks for every order, stored in a stream that is made
// when it is missing.
func (m *Module) RegisterEventConsumers(registry mono.EventRegistry) error {
	config := mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{
			Name:      Stream,
			Retention: mono.WorkQueuePolicy, // an order leaves the stream when it is dealt with
			MaxBytes:  16 << 20,
		},
		Consumer: mono.ConsumerConfig{AckWait: ackWait},
		Fetch:    mono.FetchConfig{BatchSize: 10},
		Retry:    Retry,
	}
	return helper.RegisterTypedEventStreamConsumer(registry, tracking.OrderCreatedV1, config, m.handleOrders, m)
}

// handleOrders gets up to ten orders, decoded: orders[i] came as msgs[i]. What
// does not decode never gets here. Each message is settled by itself, so that
// one bad order does not hold up the others.
func (m *Module) handleOrders(_ context.Context, orders []tracking.OrderCreatedEvent, msgs []*mono.Msg) error {
	var unsettled error
	for i, order := range orders {
		msg := msgs[i]
		// The message's own context: what is done for an order is in the order's
		// trace, not in that of the batch.
		writeErr := m.write(msg.Context(), order)

		var err error
		if writeErr == nil {
			err = msg.Ack() // done
		} else {
			err = msg.Fail(writeErr) // again later, as Retry says, or never
		}
		if err != nil { // not settled: the order comes again
			unsettled = errors.Join(unsettled, err)
			continue
		}
		meta := msg.Metadata()
		m.report(Result{Order: order, Sequence: meta.Sequence.Stream, Attempt: meta.NumDelivered, Replay: IsReplay(msg), Err: writeErr})
	}
	return unsettled
}

// IsReplay reports whether a message was given up before, and somebody has it
// handled again.
func IsReplay(msg *mono.Msg) bool { return msg.Header.Get(dlq.HeaderReplayOf) != "" }
