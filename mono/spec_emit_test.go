package mono_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// The spec_ files hold the reference text of event-driven communication as
// tests: each shape of code that it shows has to compile and to do what it says.

var (
	OrderCreatedV1 = helper.EventDefinition[OrderCreatedEvent](
		"order",
		"OrderCreated",
		"v1",
	)
	OrderShippedV1   = helper.EventDefinition[OrderShippedEvent]("order", "OrderShipped", "v1")
	OrderCancelledV1 = helper.EventDefinition[OrderCancelledEvent]("order", "OrderCancelled", "v1")
)

type OrderCreatedEvent struct {
	OrderID    string    `json:"order_id"`
	CustomerID string    `json:"customer_id"`
	Amount     float64   `json:"amount"`
	Currency   string    `json:"currency"`
	CreatedAt  time.Time `json:"created_at"`
}

type OrderShippedEvent struct {
	OrderID     string `json:"order_id"`
	TrackingNum string `json:"tracking_num"`
}

type OrderCancelledEvent struct {
	OrderID string `json:"order_id"`
	Reason  string `json:"reason"`
}

type Order struct {
	ID, CustomerID, Currency string
	Total                    float64
}

// OrderModule emits: it is an EventEmitterModule, without saying so.
type OrderModule struct {
	eventBus mono.EventBus
}

func (m *OrderModule) Name() string                { return "order" }
func (m *OrderModule) Start(context.Context) error { return nil }
func (m *OrderModule) Stop(context.Context) error  { return nil }

func (m *OrderModule) SetEventBus(bus mono.EventBus) {
	m.eventBus = bus
}

func (m *OrderModule) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{
		OrderCreatedV1.ToBase(),
		OrderShippedV1.ToBase(),
		OrderCancelledV1.ToBase(),
	}
}

// createOrder publishes fire and forget: the order stands, whatever becomes of
// the event.
func (m *OrderModule) createOrder(_ context.Context, order *Order) error {
	err := OrderCreatedV1.Publish(m.eventBus, OrderCreatedEvent{
		OrderID:    order.ID,
		CustomerID: order.CustomerID,
		Amount:     order.Total,
		Currency:   order.Currency,
		CreatedAt:  time.Now(),
	}, nil)
	if err != nil {
		return fmt.Errorf("publish event: %w", err)
	}
	return nil
}

// createOrderDurably returns when the event is stored.
func (m *OrderModule) createOrderDurably(ctx context.Context, order *Order) (stream string, sequence uint64, err error) {
	ack, err := OrderCreatedV1.EventStreamPublish(ctx, m.eventBus, OrderCreatedEvent{
		OrderID:    order.ID,
		CustomerID: order.CustomerID,
		Amount:     order.Total,
	}, nil)
	if err != nil {
		return "", 0, fmt.Errorf("publish event: %w", err)
	}
	return ack.Stream(), ack.Sequence(), nil
}

func TestSpec_fireAndForget(t *testing.T) {
	t.Parallel()
	got := make(chan OrderCreatedEvent, 1)
	order := &OrderModule{}
	startApp(t, order, consumer("ui", func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventConsumer(r, OrderCreatedV1,
			func(_ context.Context, event OrderCreatedEvent, _ *mono.Msg) error {
				got <- event
				return nil
			}, self)
	}))

	before := time.Now()
	if err := order.createOrder(t.Context(), &Order{ID: "o-1", CustomerID: "c-1", Currency: "EUR", Total: 12.5}); err != nil {
		t.Fatal(err)
	}

	event := receive(t, got, "the event")
	if event.CreatedAt.Before(before.Add(-time.Second)) {
		t.Errorf("CreatedAt is %v, want the time of publishing", event.CreatedAt)
	}
	event.CreatedAt = time.Time{}
	if want := (OrderCreatedEvent{OrderID: "o-1", CustomerID: "c-1", Currency: "EUR", Amount: 12.5}); event != want {
		t.Errorf("got %+v, want %+v", event, want)
	}
}

// Fire and forget needs nobody who listens: emitters do not know consumers.
func TestSpec_fireAndForgetWithoutConsumer(t *testing.T) {
	t.Parallel()
	order := &OrderModule{}
	startApp(t, order)
	if err := order.createOrder(t.Context(), &Order{ID: "o-1"}); err != nil {
		t.Errorf("publish for nobody: %v", err)
	}
}

func TestSpec_durablePublish(t *testing.T) {
	t.Parallel()
	got := make(chan uint64, 2)
	order := &OrderModule{}
	startApp(t, order, consumer("audit", func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventStreamConsumer(r, OrderCreatedV1,
			mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "orders"}},
			func(_ context.Context, _ []OrderCreatedEvent, msgs []*mono.Msg) error {
				var errs []error
				for _, msg := range msgs {
					errs = append(errs, msg.Ack())
					got <- msg.Metadata().Sequence.Stream
				}
				return errors.Join(errs...)
			}, self)
	}))

	for i := range uint64(2) {
		stream, sequence, err := order.createOrderDurably(within(t), &Order{ID: "o-1"})
		if err != nil {
			t.Fatal(err)
		}
		if want := i + 1; stream != "orders" || sequence != want {
			t.Errorf("stored as %d in %q, want %d in orders", sequence, stream, want)
		}
		if delivered := receive(t, got, "the event"); delivered != sequence {
			t.Errorf("delivered with sequence %d, acknowledged with %d", delivered, sequence)
		}
	}
}

// Several versions of one event.

var (
	EvolvingV1 = helper.EventDefinition[EvolvingEventV1]("order", "Evolving", "v1")
	EvolvingV2 = helper.EventDefinition[EvolvingEventV2]("order", "Evolving", "v2")
)

type EvolvingEventV1 struct {
	OrderID string  `json:"order_id"`
	Amount  float64 `json:"amount"`
}

type EvolvingEventV2 struct {
	OrderID    string  `json:"order_id"`
	CustomerID string  `json:"customer_id"`
	Amount     float64 `json:"amount"`
	Currency   string  `json:"currency"`
	Items      []Item  `json:"items"`
}

type Item struct {
	SKU string `json:"sku"`
}

func TestSpec_versionsSideBySide(t *testing.T) {
	t.Parallel()
	v1, v2 := make(chan EvolvingEventV1, 2), make(chan EvolvingEventV2, 2)
	emits := emitter("order", EvolvingV1.ToBase(), EvolvingV2.ToBase())
	startApp(t, emits, consumer("both", func(r mono.EventRegistry, self mono.Module) error {
		return errors.Join(
			helper.RegisterTypedEventConsumer(r, EvolvingV1, func(_ context.Context, e EvolvingEventV1, _ *mono.Msg) error {
				v1 <- e
				return nil
			}, self),
			// One stream may hold both; each consumer reads its own version.
			helper.RegisterTypedEventStreamConsumer(r, EvolvingV2,
				mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "evolving"}, AutoAck: true},
				func(_ context.Context, es []EvolvingEventV2, _ []*mono.Msg) error {
					for _, e := range es {
						v2 <- e
					}
					return nil
				}, self),
		)
	}))

	if err := EvolvingV1.Publish(emits.bus, EvolvingEventV1{OrderID: "old", Amount: 1}, nil); err != nil {
		t.Fatal(err)
	}
	ack, err := EvolvingV2.EventStreamPublish(within(t), emits.bus,
		EvolvingEventV2{OrderID: "new", Amount: 2, Items: []Item{{SKU: "a"}, {SKU: "b"}}}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if ack.Stream() != "evolving" || ack.Sequence() != 1 {
		t.Errorf("v2 is message %d of %q, want 1 of evolving", ack.Sequence(), ack.Stream())
	}

	if e := receive(t, v1, "the v1 event"); e.OrderID != "old" {
		t.Errorf("the v1 consumer got %+v", e)
	}
	if e := receive(t, v2, "the v2 event"); e.OrderID != "new" || len(e.Items) != 2 {
		t.Errorf("the v2 consumer got %+v", e)
	}
	if len(v1) != 0 || len(v2) != 0 {
		t.Error("a version reached the other version's consumer")
	}
}

// The registry finds events; its methods have the signatures of the text.
var _ interface {
	GetEventByName(name, version, moduleName string) (mono.BaseEventDefinition, bool)
	GetEventsByModule(moduleName string) []mono.BaseEventDefinition
	GetAllEvents() []mono.BaseEventDefinition
	RegisterEventConsumer(eventDef mono.BaseEventDefinition, handler mono.EventConsumerHandler, module mono.Module, queueGroup ...string) error
	RegisterEventStreamConsumer(eventDef mono.BaseEventDefinition, config mono.StreamConsumerConfig,
		handler mono.EventStreamConsumerHandler, module mono.Module) error
} = mono.EventRegistry(nil)

func TestSpec_discovery(t *testing.T) {
	t.Parallel()
	var found mono.BaseEventDefinition
	var foundOK, absentOK bool
	var ofOrder, ofNobody, all []mono.BaseEventDefinition
	app := startApp(t,
		// The consumer comes first: discovery does not depend on the order.
		consumer("discoverer", func(registry mono.EventRegistry, _ mono.Module) error {
			found, foundOK = registry.GetEventByName("OrderCreated", "v1", "order")
			_, absentOK = registry.GetEventByName("OrderCreated", "v2", "order")
			ofOrder = registry.GetEventsByModule("order")
			ofNobody = registry.GetEventsByModule("nobody")
			all = registry.GetAllEvents()
			return nil
		}),
		&OrderModule{},
		emitter("billing", paid.ToBase()),
	)

	if want := (mono.BaseEventDefinition{
		ModuleName: "order", Name: "OrderCreated", Version: "v1", Subject: "events.order.v1.order-created",
	}); !foundOK || found != want {
		t.Errorf("GetEventByName = %+v, %v, want %+v", found, foundOK, want)
	}
	if absentOK {
		t.Error("GetEventByName finds a version that nobody emits")
	}
	want := []mono.BaseEventDefinition{OrderCancelledV1.ToBase(), OrderCreatedV1.ToBase(), OrderShippedV1.ToBase()}
	if !slices.Equal(ofOrder, want) {
		t.Errorf("GetEventsByModule = %v, want %v", ofOrder, want)
	}
	if len(ofNobody) != 0 {
		t.Errorf("GetEventsByModule of an unknown module = %v", ofNobody)
	}
	if want := append([]mono.BaseEventDefinition{paid.ToBase()}, want...); !slices.Equal(all, want) {
		t.Errorf("GetAllEvents = %v, want %v", all, want)
	}
	if after := app.Registry().GetAllEvents(); !slices.Equal(after, all) {
		t.Errorf("App.Registry lists %v, the module saw %v", after, all)
	}
}

var paid = helper.EventDefinition[PaidEvent]("billing", "InvoicePaid", "v1")

type PaidEvent struct {
	Invoice int `json:"invoice"`
}
