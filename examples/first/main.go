// Command first is a whole program: a module that publishes an event when it
// starts, consumes it from a stream, and ends.
package main

import (
	"context"
	"fmt"
	"log"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

type OrderPlaced struct {
	ID string `json:"id"`
}

var orderPlaced = helper.EventDefinition[OrderPlaced]("shop", "OrderPlaced", "v1")

type shop struct {
	bus  mono.EventBus
	done context.CancelFunc
}

func (s *shop) Name() string                  { return "shop" }
func (s *shop) SetEventBus(bus mono.EventBus) { s.bus = bus }
func (s *shop) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{orderPlaced.ToBase()}
}

func (s *shop) RegisterEventConsumers(registry mono.EventRegistry) error {
	config := mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "orders"}, AutoAck: true}
	return helper.RegisterTypedEventStreamConsumer(registry, orderPlaced, config, s.sendReceipts, s)
}

func (s *shop) sendReceipts(_ context.Context, orders []OrderPlaced, _ []*mono.Msg) error {
	for _, order := range orders {
		fmt.Println("receipt for order", order.ID)
	}
	s.done()
	return nil // nil acks them; an error, and they come again
}

func (s *shop) Start(ctx context.Context) error {
	_, err := orderPlaced.EventStreamPublish(ctx, s.bus, OrderPlaced{ID: "A-1"}, nil)
	return err // nil means that the event is stored
}

func (s *shop) Stop(context.Context) error { return nil }

func main() {
	ctx, done := context.WithCancel(context.Background())
	app, err := mono.New()
	if err != nil {
		log.Fatal(err)
	}
	if err := app.Register(&shop{done: done}); err != nil {
		log.Fatal(err)
	}
	if err := app.Run(ctx); err != nil { // until done, or Ctrl-C
		log.Fatal(err)
	}
}
