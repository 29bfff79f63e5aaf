package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"go.opentelemetry.io/otel/codes"
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
	screen   *screen
	tracer   trace.Tracer
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
		s.screen.garbage()
		// Half an order, past the typed definition, as another program may send
		// it.
		_, err := s.bus.PublishStream(ctx, &mono.Msg{
			Subject: tracking.OrderCreatedV1.ToBase().Subject,
			Data:    []byte(`{"order_id": "7", "amount": `),
		})
		s.screen.published(true, err)
		return
	}
	// As the span of an HTTP request would be. What happens to the order is below
	// it, in whatever process.
	ctx, span := s.tracer.Start(ctx, "take order", trace.WithAttributes(keyCustomer.String(customer)))
	defer span.End()
	amount := float64(1+rand.IntN(100_00)) / 100 //nolint:gosec // nobody gains by guessing it
	id, err := s.tracking.CreateOrder(ctx, customer, amount)
	if err == nil {
		span.SetAttributes(keyOrder.String(id))
	}
	s.screen.published(false, err)
}

// A ledgerError is one of few things that go wrong. Its ErrorType is the
// attribute error.type of spans and metrics, so that they can be told apart.
type ledgerError struct{ kind, text string }

func (e *ledgerError) Error() string     { return e.text }
func (e *ledgerError) ErrorType() string { return e.kind }

var (
	errBusy     = &ledgerError{"ledger_busy", "the ledger is busy"}
	errNoAnswer = &ledgerError{"ledger_no_answer", "the ledger does not answer"}
)

// A ledger is where audited orders are written, with the troubles of real ones.
type ledger struct {
	tracer trace.Tracer

	mu       sync.Mutex
	written  map[string]bool
	attempts map[string]int // at orders that are not written yet
	repaired bool           // it answers everybody
}

func newLedger(tracer trace.Tracer) *ledger {
	return &ledger{tracer: tracer, written: make(map[string]bool), attempts: make(map[string]int)}
}

func (l *ledger) write(ctx context.Context, order tracking.OrderCreatedEvent) error {
	_, span := l.tracer.Start(ctx, "write ledger", trace.WithSpanKind(trace.SpanKindClient))
	defer span.End()
	err := l.try(order)
	if err != nil {
		span.SetStatus(codes.Error, err.Error())
	}
	return err
}

// repair ends the troubles of the ledger. Those of its customers stay.
func (l *ledger) repair() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.repaired = true
}

func (l *ledger) try(order tracking.OrderCreatedEvent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.written[order.OrderID] {
		return nil // it came twice
	}
	l.attempts[order.OrderID]++
	switch n := l.attempts[order.OrderID]; {
	case order.CustomerID == ivan:
		return mono.Permanent(fmt.Errorf("%s has no account", order.CustomerID))
	case l.repaired:
	case order.CustomerID == felix && n <= 1, order.CustomerID == greta && n <= 2:
		return errBusy
	case order.CustomerID == hugo:
		return errNoAnswer
	}
	delete(l.attempts, order.OrderID)
	l.written[order.OrderID] = true
	return nil
}
