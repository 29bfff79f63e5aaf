package monotest_test //nolint:testableexamples // it needs a test; Test runs it

import (
	"context"
	"testing"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

type OrderPlaced struct{ ID string }

var orderPlaced = helper.EventDefinition[OrderPlaced]("shop", "OrderPlaced", "v1")

// shop is the module under test: it emits an event and consumes it.
type shop struct {
	bus    mono.EventBus
	placed chan string
}

func (s *shop) Name() string                  { return "shop" }
func (s *shop) Start(context.Context) error   { return nil }
func (s *shop) Stop(context.Context) error    { return nil }
func (s *shop) SetEventBus(bus mono.EventBus) { s.bus = bus }
func (s *shop) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{orderPlaced.ToBase()}
}

func (s *shop) RegisterEventConsumers(r mono.EventRegistry) error {
	config := mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "ORDERS"}, AutoAck: true}
	return helper.RegisterTypedEventStreamConsumer(r, orderPlaced, config, s.handle, s)
}

func (s *shop) handle(_ context.Context, orders []OrderPlaced, _ []*mono.Msg) error {
	for _, order := range orders {
		s.placed <- order.ID
	}
	return nil
}

func testShop(t *testing.T) { // TestShop in your test file
	t.Helper()
	s := &shop{placed: make(chan string, 1)}
	monotest.App(t, s)
	if _, err := orderPlaced.EventStreamPublish(t.Context(), s.bus, OrderPlaced{ID: "A-17"}, nil); err != nil {
		t.Fatal(err)
	}
	if got := <-s.placed; got != "A-17" {
		t.Errorf("placed %q, want A-17", got)
	}
}

// A test of a module, on a server of its own that ends with the test.
func Example() {
	var t *testing.T
	testShop(t)
}
