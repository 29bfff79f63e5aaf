// Package tracking takes orders. It emits OrderCreated and does not know who
// listens.
package tracking

import (
	"context"
	"crypto/rand"
	"fmt"
	"sync/atomic"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// OrderCreatedV1 says that an order was taken. Whoever wants to hear of it
// registers a consumer for this definition.
var OrderCreatedV1 = helper.EventDefinition[OrderCreatedEvent]("tracking", "OrderCreated", "v1")

// OrderCreatedEvent is the payload of [OrderCreatedV1].
type OrderCreatedEvent struct {
	OrderID    string  `json:"order_id"`
	CustomerID string  `json:"customer_id"`
	Amount     float64 `json:"amount"`
}

// Module takes orders.
type Module struct {
	save  func(OrderCreatedEvent)
	bus   mono.EventBus
	run   string // makes the order IDs of two runs differ
	count atomic.Uint64
}

var _ mono.EventEmitterModule = (*Module)(nil)

// New returns a module that keeps its orders with save.
func New(save func(OrderCreatedEvent)) *Module {
	const length = 4
	return &Module{save: save, run: rand.Text()[:length]}
}

// Name is the module's name in logs and on the server.
func (m *Module) Name() string { return "tracking" }

// Start has nothing to do.
func (m *Module) Start(context.Context) error { return nil }

// Stop has nothing to do.
func (m *Module) Stop(context.Context) error { return nil }

// SetEventBus gives the module what it publishes with.
func (m *Module) SetEventBus(bus mono.EventBus) { m.bus = bus }

// EmitEvents declares what the module publishes.
func (m *Module) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{OrderCreatedV1.ToBase()}
}

// CreateOrder takes an order and returns its ID. A nil error means that the
// event is stored: whoever has to hear of the order will.
func (m *Module) CreateOrder(ctx context.Context, customerID string, amount float64) (string, error) {
	order := OrderCreatedEvent{
		OrderID:    fmt.Sprintf("%s-%d", m.run, m.count.Add(1)),
		CustomerID: customerID,
		Amount:     amount,
	}
	m.save(order)

	// EventStreamPublish waits for the server's word. Where an event may get
	// lost, OrderCreatedV1.Publish is enough and does not wait.
	if _, err := OrderCreatedV1.EventStreamPublish(ctx, m.bus, order, nil); err != nil {
		return "", fmt.Errorf("create order %s: %w", order.OrderID, err)
	}
	return order.OrderID, nil
}
