package mono_test

import (
	"context"
	"fmt"
	"os"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// OrderPlaced is an event; any type that encodes as JSON may be its payload.
type OrderPlaced struct {
	ID    string  `json:"id"`
	Total float64 `json:"total"`
}

var orderPlaced = helper.EventDefinition[OrderPlaced]("shop", "OrderPlaced", "v1")

// Shop emits the event, and does not know who consumes it.
type Shop struct{ bus mono.EventBus }

func (s *Shop) Name() string                  { return "shop" }
func (s *Shop) Start(context.Context) error   { return nil }
func (s *Shop) Stop(context.Context) error    { return nil }
func (s *Shop) SetEventBus(bus mono.EventBus) { s.bus = bus }

func (s *Shop) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{orderPlaced.ToBase()}
}

func (s *Shop) Sell(ctx context.Context, id string, total float64) error {
	_, err := orderPlaced.EventStreamPublish(ctx, s.bus, OrderPlaced{ID: id, Total: total}, nil)
	return err // nil means that the event is stored
}

// Mailer consumes the event from a stream: it gets every order, again after a
// failure, and after a restart where it had stopped.
type Mailer struct{ sent chan string }

func (m *Mailer) Name() string                { return "mailer" }
func (m *Mailer) Start(context.Context) error { return nil }
func (m *Mailer) Stop(context.Context) error  { return nil }

func (m *Mailer) RegisterEventConsumers(registry mono.EventRegistry) error {
	config := mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "orders"}}
	return helper.RegisterTypedEventStreamConsumer(registry, orderPlaced, config, m.mail, m)
}

func (m *Mailer) mail(_ context.Context, orders []OrderPlaced, msgs []*mono.Msg) error {
	for i, order := range orders {
		m.sent <- fmt.Sprintf("receipt for order %s: %.2f", order.ID, order.Total)
		if err := msgs[i].Ack(); err != nil {
			return err
		}
	}
	return nil
}

// A first program: one module emits an event, another one consumes it. A real
// one ends with app.Run, which waits for SIGINT or SIGTERM.
func Example() {
	dir, err := os.MkdirTemp("", "shop")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()

	app, err := mono.New(mono.WithStoreDir(dir))
	if err != nil {
		panic(err)
	}
	shop, mailer := &Shop{}, &Mailer{sent: make(chan string)}
	if err := app.Register(shop, mailer); err != nil {
		panic(err)
	}
	ctx := context.Background()
	if err := app.Start(ctx); err != nil {
		panic(err)
	}
	if err := shop.Sell(ctx, "A-1", 42.5); err != nil {
		panic(err)
	}
	fmt.Println(<-mailer.sent)
	if err := app.Stop(ctx); err != nil {
		panic(err)
	}

	// Output: receipt for order A-1: 42.50
}
