// Package notification confirms orders to customers. It listens over core NATS:
// at once, and only while it runs. A confirmation that is lost is no disaster.
package notification

import (
	"context"

	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// Module confirms orders.
type Module struct {
	send func(ctx context.Context, order tracking.OrderCreatedEvent) error
}

var _ mono.EventConsumerModule = (*Module)(nil)

// New returns a module that confirms orders with send.
func New(send func(ctx context.Context, order tracking.OrderCreatedEvent) error) *Module {
	return &Module{send: send}
}

// Name is the module's name in logs and on the server.
func (m *Module) Name() string { return "notification" }

// Start has nothing to do.
func (m *Module) Start(context.Context) error { return nil }

// Stop has nothing to do.
func (m *Module) Stop(context.Context) error { return nil }

// RegisterEventConsumers asks for every new order.
func (m *Module) RegisterEventConsumers(registry mono.EventRegistry) error {
	return helper.RegisterTypedEventConsumer(registry, tracking.OrderCreatedV1, m.handleOrderCreated, m)
}

// handleOrderCreated gets one order, decoded. Its error is logged and the order
// does not come again.
func (m *Module) handleOrderCreated(ctx context.Context, order tracking.OrderCreatedEvent, _ *mono.Msg) error {
	return m.send(ctx, order)
}
