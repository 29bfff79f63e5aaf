package mono_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// A confirmation is what the notification modules below send.
type confirmation struct{ by, customer, order string }

// RawNotificationModule finds its event at run time (pattern B: no import of
// the emitter) and decodes by itself.
type RawNotificationModule struct{ sent chan confirmation }

var _ mono.EventConsumerModule = (*RawNotificationModule)(nil)

func (m *RawNotificationModule) Name() string                { return "raw-notification" }
func (m *RawNotificationModule) Start(context.Context) error { return nil }
func (m *RawNotificationModule) Stop(context.Context) error  { return nil }

func (m *RawNotificationModule) RegisterEventConsumers(
	registry mono.EventRegistry,
) error {
	eventDef, ok := registry.GetEventByName("OrderCreated", "v1", "order")
	if !ok {
		return errors.New("event OrderCreated.v1 not found")
	}
	return registry.RegisterEventConsumer(
		eventDef,
		m.handleOrderCreated,
		m,
	)
}

func (m *RawNotificationModule) handleOrderCreated(
	_ context.Context, msg *mono.Msg,
) error {
	var event OrderCreatedEvent
	if err := json.Unmarshal(msg.Data, &event); err != nil {
		return fmt.Errorf("unmarshal failed: %w", err)
	}
	m.sent <- confirmation{m.Name(), event.CustomerID, event.OrderID}
	return nil
}

// TypedNotificationModule imports the event (pattern A) and gets it decoded.
type TypedNotificationModule struct{ sent chan confirmation }

func (m *TypedNotificationModule) Name() string                { return "typed-notification" }
func (m *TypedNotificationModule) Start(context.Context) error { return nil }
func (m *TypedNotificationModule) Stop(context.Context) error  { return nil }

func (m *TypedNotificationModule) RegisterEventConsumers(
	registry mono.EventRegistry,
) error {
	return helper.RegisterTypedEventConsumer(
		registry,
		OrderCreatedV1,
		m.handleOrderCreated,
		m,
	)
}

func (m *TypedNotificationModule) handleOrderCreated(
	_ context.Context,
	event OrderCreatedEvent,
	msg *mono.Msg,
) error {
	if msg.Subject != OrderCreatedV1.ToBase().Subject {
		return fmt.Errorf("the message is of %q", msg.Subject)
	}
	m.sent <- confirmation{m.Name(), event.CustomerID, event.OrderID}
	return nil
}

// Raw and typed handlers are different modules, so each gets every event.
func TestSpec_coreHandlers(t *testing.T) {
	t.Parallel()
	sent := make(chan confirmation, 10)
	order := &OrderModule{}
	startApp(t, &RawNotificationModule{sent}, &TypedNotificationModule{sent}, order)

	want := make(map[confirmation]bool)
	for _, id := range []string{"o-1", "o-2"} {
		if err := order.createOrder(t.Context(), &Order{ID: id, CustomerID: "c-" + id}); err != nil {
			t.Fatal(err)
		}
		want[confirmation{"raw-notification", "c-" + id, id}] = true
		want[confirmation{"typed-notification", "c-" + id, id}] = true
	}
	got := make(map[confirmation]bool)
	for range want {
		got[receive(t, sent, "a confirmation")] = true
	}
	if !maps.Equal(got, want) {
		t.Errorf("sent %v, want %v", got, want)
	}
}

// A registration for an event that is not found is the module's error, and the
// App does not start.
func TestSpec_eventNotFound(t *testing.T) {
	t.Parallel()
	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(&RawNotificationModule{}); err != nil {
		t.Fatal(err)
	}
	wantError(t, app.Start(within(t)), nil, `module "raw-notification": event OrderCreated.v1 not found`)
}

// In a queue group each message reaches one member; another group gets all of
// them. It holds for raw and for typed consumers, and for members in one module.
func TestSpec_queueGroups(t *testing.T) {
	t.Parallel()
	const events = 200
	type receipt struct {
		by    string
		order string
	}
	got := make(chan receipt, 4*events)
	raw := func(by string) mono.EventConsumerHandler {
		return func(_ context.Context, msg *mono.Msg) error {
			var event OrderCreatedEvent
			if err := json.Unmarshal(msg.Data, &event); err != nil {
				return err
			}
			got <- receipt{by, event.OrderID}
			return nil
		}
	}
	typed := func(by string) func(context.Context, OrderCreatedEvent, *mono.Msg) error {
		return func(_ context.Context, event OrderCreatedEvent, _ *mono.Msg) error {
			got <- receipt{by, event.OrderID}
			return nil
		}
	}
	order := &OrderModule{}
	startApp(t, order,
		consumer("worker-1", func(r mono.EventRegistry, self mono.Module) error {
			eventDef, _ := r.GetEventByName("OrderCreated", "v1", "order")
			return r.RegisterEventConsumer(
				eventDef,
				raw("worker 1"),
				self,
				"notification-workers",
			)
		}),
		consumer("worker-2", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, OrderCreatedV1, typed("worker 2"), self, "notification-workers")
		}),
		consumer("audit", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, OrderCreatedV1, typed("audit"), self, "audit-workers")
		}),
		consumer("metrics", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(OrderCreatedV1.ToBase(), raw("metrics"), self)
		}),
	)

	want := make([]string, events)
	for i := range want {
		want[i] = fmt.Sprintf("o-%03d", i)
		if err := order.createOrder(t.Context(), &Order{ID: want[i]}); err != nil {
			t.Fatal(err)
		}
	}
	by := make(map[string][]string)
	for range 3 * events { // one group of two, and two of one
		r := receive(t, got, "an event")
		by[r.by] = append(by[r.by], r.order)
	}
	if len(got) != 0 {
		t.Errorf("%d events were delivered too often", len(got))
	}
	shared := slices.Concat(by["worker 1"], by["worker 2"])
	for name, ids := range map[string][]string{"the workers": shared, "audit": by["audit"], "metrics": by["metrics"]} {
		slices.Sort(ids)
		if !slices.Equal(ids, want) {
			t.Errorf("%s got %d events, want each of the %d once", name, len(ids), events)
		}
	}
	if len(by["worker 1"]) == 0 || len(by["worker 2"]) == 0 {
		t.Errorf("the workers got %d and %d events, want both to work", len(by["worker 1"]), len(by["worker 2"]))
	}
}
