package main

import (
	"context"
	"fmt"
	"slices"
	"sync"

	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

// A ledgerError is one of few things that go wrong. Its ErrorType is the
// attribute error.type of spans and metrics, so that they can be told apart.
type ledgerError struct{ kind, text string }

func (e *ledgerError) Error() string     { return e.text }
func (e *ledgerError) ErrorType() string { return e.kind }

var (
	errBusy     = &ledgerError{"ledger_busy", "the ledger is busy"}
	errNoAnswer = &ledgerError{"ledger_no_answer", "the ledger does not answer"}
	errClosed   = &ledgerError{"ledger_closed", "the ledger is closed"}
)

// A mode is how a ledger treats those who write into it.
type mode string

const (
	flaky    mode = "flaky"    // as the customers have it; so it begins
	repaired mode = "repaired" // it answers everybody
	busy     mode = "busy"     // it refuses everybody, who may come again
	closed   mode = "closed"   // it refuses everybody, for good
)

// A ledger is where audited orders are written, with the troubles of real ones.
type ledger struct {
	tracer trace.Tracer

	mu       sync.Mutex
	mode     mode
	written  map[string]bool // what it remembers of the orders in it: the last ones,
	before   map[string]bool // and those before them
	attempts map[string]int  // at orders that are not written yet
	count    ledgerCounts
	most     int // orders in each of written, before and attempts
}

// ledgerCounts is what a ledger has done since it was made.
type ledgerCounts struct {
	Written  int `json:"written"`  // orders, each once
	Attempts int `json:"attempts"` // to write one
	Refused  int `json:"refused"`  // of the attempts
}

func newLedger(tracer trace.Tracer) *ledger {
	const most = 100_000
	return &ledger{tracer: tracer, mode: flaky, most: most, written: make(map[string]bool), attempts: make(map[string]int)}
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

// set begins and ends troubles of the ledger. Those of its customers stay.
func (l *ledger) set(m mode) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.mode = m
}

// state is how the ledger is, and what it has done.
func (l *ledger) state() (mode, ledgerCounts) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mode, l.count
}

// missing returns those of some orders that the ledger does not have, or has forgotten.
func (l *ledger) missing(ids []string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.DeleteFunc(append([]string{}, ids...), l.has)
}

// has reports whether an order is written. l.mu is held.
func (l *ledger) has(id string) bool { return l.written[id] || l.before[id] }

func (l *ledger) try(order tracking.OrderCreatedEvent) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.count.Attempts++
	if l.has(order.OrderID) {
		return nil // it came twice
	}
	l.attempts[order.OrderID]++
	if err := l.trouble(order.CustomerID, l.attempts[order.OrderID]); err != nil {
		l.count.Refused++
		return err
	}
	l.count.Written++
	l.remember(order.OrderID)
	return nil
}

// trouble is why the n-th attempt at an order is refused. l.mu is held.
func (l *ledger) trouble(customer string, n int) error {
	switch {
	case l.mode == closed:
		return mono.Permanent(errClosed)
	case l.mode == busy:
		return errBusy
	case customer == ivan:
		return mono.Permanent(fmt.Errorf("%s has no account", customer))
	case l.mode == repaired:
		return nil
	case customer == felix && n <= 1, customer == greta && n <= 2:
		return errBusy
	case customer == hugo:
		return errNoAnswer
	}
	return nil
}

// remember keeps the ledger from growing without end: one that runs for long
// forgets its oldest orders. One in a database would have a unique key instead.
// l.mu is held.
func (l *ledger) remember(id string) {
	delete(l.attempts, id)
	if len(l.attempts) >= l.most { // most of them were given up
		clear(l.attempts)
	}
	if len(l.written) >= l.most {
		l.before, l.written = l.written, make(map[string]bool)
	}
	l.written[id] = true
}
