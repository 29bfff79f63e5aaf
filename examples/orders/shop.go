package main

import (
	"context"
	"math/rand/v2"
	"time"

	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

// The customers whose orders get into trouble. Everybody else's do not.
const (
	felix = "felix" // the ledger is busy at the first attempt
	greta = "greta" // ... and at the second
	hugo  = "hugo"  // the ledger never answers
	ivan  = "ivan"  // has no account
)

// nobody stands for a message that is no order.
const nobody = ""

// customers come to the shop in this order, over and over, so that a short run
// shows everything, too.
var customers = []string{"anna", felix, "ben", hugo, "carla", nobody, "david", ivan, greta, "emma"}

// A shop is the world outside: people who order, and a program that sends
// something else.
type shop struct {
	tracking *tracking.Module
	bus      mono.EventBus
	witness  witness
	tracer   trace.Tracer
}

// A witness sees what is published.
type witness interface {
	// garbage is called before something is sent that is no order.
	garbage()
	// published is called when an order of the customer is stored, or could not be;
	// of nobody when it was no order.
	published(customer string, err error)
}

// open lets customers in, perSecond of them, until ctx ends.
func (s *shop) open(ctx context.Context, perSecond float64) {
	tick := time.NewTicker(time.Duration(float64(time.Second) / perSecond))
	defer tick.Stop()
	// Who is being served when the shop closes is served.
	serve := context.WithoutCancel(ctx)
	for i := 0; ctx.Err() == nil; i++ {
		s.serve(serve, customers[i%len(customers)])
		select {
		case <-ctx.Done():
		case <-tick.C:
		}
	}
}

func (s *shop) serve(ctx context.Context, customer string) {
	if customer == nobody {
		s.witness.garbage()
		// Half an order, past the typed definition, as another program may send
		// it.
		_, err := s.bus.PublishStream(ctx, &mono.Msg{
			Subject: tracking.OrderCreatedV1.ToBase().Subject,
			Data:    []byte(`{"order_id": "7", "amount": `),
		})
		s.witness.published(nobody, err)
		return
	}
	// As the span of an HTTP request would be. What happens to the order is below
	// it, in whatever process.
	ctx, span := s.tracer.Start(ctx, "take order", trace.WithAttributes(keyCustomer.String(customer)))
	defer span.End()
	amount := float64(1+rand.IntN(100_00)) / 100 //nolint:gosec // nobody gains by guessing it
	if id, err := s.take(ctx, customer, amount); err == nil {
		span.SetAttributes(keyOrder.String(id))
	}
}

// take takes an order, and returns its ID.
func (s *shop) take(ctx context.Context, customer string, amount float64) (string, error) {
	id, err := s.tracking.CreateOrder(ctx, customer, amount)
	s.witness.published(customer, err)
	return id, err
}
