package mono_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// The complete example of the text: a tracking module that emits, and a
// notification module that consumes.

var TrackingOrderCreatedV1 = helper.EventDefinition[TrackingOrderCreatedEvent](
	"tracking", "OrderCreated", "v1",
)

var TrackingOrderShippedV1 = helper.EventDefinition[TrackingOrderShippedEvent](
	"tracking", "OrderShipped", "v1",
)

type TrackingOrderCreatedEvent struct {
	OrderID    string  `json:"order_id"`
	CustomerID string  `json:"customer_id"`
	Amount     float64 `json:"amount"`
}

type TrackingOrderShippedEvent struct {
	OrderID     string `json:"order_id"`
	TrackingNum string `json:"tracking_num"`
	Carrier     string `json:"carrier"`
}

type TrackingModule struct {
	eventBus mono.EventBus
	orders   atomic.Int64
}

var _ mono.EventEmitterModule = (*TrackingModule)(nil)

func (m *TrackingModule) Name() string                  { return "tracking" }
func (m *TrackingModule) Start(_ context.Context) error { return nil }
func (m *TrackingModule) Stop(_ context.Context) error  { return nil }

func (m *TrackingModule) SetEventBus(bus mono.EventBus) {
	m.eventBus = bus
}

func (m *TrackingModule) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{
		TrackingOrderCreatedV1.ToBase(),
		TrackingOrderShippedV1.ToBase(),
	}
}

func (m *TrackingModule) CreateOrder(customerID string, amount float64) (string, error) {
	orderID := fmt.Sprintf("order-%d", m.orders.Add(1))
	err := TrackingOrderCreatedV1.Publish(m.eventBus, TrackingOrderCreatedEvent{
		OrderID:    orderID,
		CustomerID: customerID,
		Amount:     amount,
	}, nil)
	return orderID, err
}

type NotificationModule struct{ sent chan confirmation }

var _ mono.EventConsumerModule = (*NotificationModule)(nil)

func (m *NotificationModule) Name() string                  { return "notification" }
func (m *NotificationModule) Start(_ context.Context) error { return nil }
func (m *NotificationModule) Stop(_ context.Context) error  { return nil }

func (m *NotificationModule) RegisterEventConsumers(
	registry mono.EventRegistry,
) error {
	return helper.RegisterTypedEventConsumer(
		registry,
		TrackingOrderCreatedV1,
		m.handleOrderCreated,
		m,
	)
}

func (m *NotificationModule) handleOrderCreated(
	_ context.Context,
	event TrackingOrderCreatedEvent,
	_ *mono.Msg,
) error {
	m.sent <- confirmation{m.Name(), event.CustomerID, event.OrderID}
	return nil
}

func TestSpec_completeExample(t *testing.T) {
	t.Parallel()
	tracking, notification := &TrackingModule{}, &NotificationModule{sent: make(chan confirmation, 2)}
	startApp(t, tracking, notification)

	id, err := tracking.CreateOrder("c-7", 99.5)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := receive(t, notification.sent, "the confirmation"), (confirmation{"notification", "c-7", id}); got != want {
		t.Errorf("sent %+v, want %+v", got, want)
	}
}
