package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"net/http"
	"sync"

	"github.com/monotel/monotel/examples/orders/audit"
	"github.com/monotel/monotel/examples/orders/notification"
	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

// consumers is the half of the shop that confirms orders and audits them. Its ledger
// can be broken and repaired over HTTP.
type consumers struct {
	ledger *ledger
	books  *books
}

func newConsumers(ob *observation) *consumers {
	return &consumers{ledger: newLedger(ob.tracer()), books: &books{have: results{Customers: make(map[string]settled)}}}
}

func (c *consumers) modules() []mono.Module {
	return []mono.Module{notification.New(c.books.confirm), audit.New(c.ledger.write, c.books.audited)}
}

func (c *consumers) options() []mono.Option {
	return []mono.Option{
		mono.WithEvents(tracking.OrderCreatedV1.ToBase()), // another process emits it
		mono.WithMiddleware(watchUndecodable(c.books.undecodable)),
	}
}

func (*consumers) run(ctx context.Context, _ mono.EventBus) { <-ctx.Done() }

func (c *consumers) routes(mux *http.ServeMux) {
	mux.HandleFunc("GET /ledger", func(w http.ResponseWriter, _ *http.Request) { c.answer(w) })
	mux.HandleFunc("POST /ledger/written", c.postWritten)
	mux.HandleFunc("POST /ledger/repair", func(w http.ResponseWriter, _ *http.Request) {
		c.ledger.set(repaired)
		c.answer(w)
	})
	mux.HandleFunc("POST /ledger/break", func(w http.ResponseWriter, r *http.Request) {
		const most = 16 << 10
		r.Body = http.MaxBytesReader(w, r.Body, most)
		if err := r.ParseForm(); err != nil {
			refuse(w, statusOf(err), err)
			return
		}
		switch m := mode(r.Form.Get("mode")); m {
		case "":
			c.ledger.set(closed)
		case closed, busy, flaky:
			c.ledger.set(m)
		default:
			refuse(w, http.StatusBadRequest, fmt.Errorf("mode: want %s, %s or %s", closed, busy, flaky))
			return
		}
		c.answer(w)
	})
}

// A ledgerReply is the answer of each page about the ledger. What its numbers count is
// what this process has done since it was started, as the counters of its metrics do.
type ledgerReply struct {
	ledgerCounts
	results

	Mode mode `json:"mode"`
}

func (c *consumers) answer(w http.ResponseWriter) {
	m, count := c.ledger.state()
	answer(w, http.StatusOK, ledgerReply{count, c.books.state(), m})
}

// A writtenReply is the answer of POST /ledger/written.
type writtenReply struct {
	Missing []string `json:"missing"`
}

// postWritten answers which of some orders, by their IDs, this process has not written.
func (c *consumers) postWritten(w http.ResponseWriter, r *http.Request) {
	const most = 1 << 20
	var asked struct {
		OrderIDs []string `json:"order_ids"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, most)).Decode(&asked); err != nil {
		refuse(w, statusOf(err), fmt.Errorf("read the IDs: %w", err))
		return
	}
	answer(w, http.StatusOK, writtenReply{Missing: c.ledger.missing(asked.OrderIDs)})
}

// settled is how deliveries to the audit were settled.
type settled struct {
	Acked   int `json:"acked"`
	Nacked  int `json:"nacked"` // to come again
	GivenUp int `json:"given_up"`
}

// results is what became of orders. While the dead-letter stream takes what it gets,
// the settlements are what mono.settlements counts: those given up are "term", and
// what was not decodable is one of them.
type results struct {
	settled

	Undecodable int                `json:"undecodable"`  // of those given up
	Resolved    int                `json:"resolved"`     // of those acked: by a replay
	FailedAgain int                `json:"failed_again"` // of those given up: in a replay
	Confirmed   int                `json:"confirmed"`    // by notification
	Customers   map[string]settled `json:"customers"`    // without what was not decodable
}

// books counts what the modules report.
type books struct {
	mu   sync.Mutex
	have results
}

func (b *books) confirm(context.Context, tracking.OrderCreatedEvent) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.have.Confirmed++
	return nil
}

func (b *books) audited(r audit.Result) {
	b.mu.Lock()
	defer b.mu.Unlock()
	key := oneOf(b.have.Customers, r.Order.CustomerID)
	customer := b.have.Customers[key]
	switch most := uint64(audit.Retry.MaxAttempts); { //nolint:gosec // it is 4
	case r.Err == nil:
		b.have.Acked++
		customer.Acked++
		if r.Replay {
			b.have.Resolved++
		}
	case mono.IsPermanent(r.Err) || r.Attempt >= most:
		b.have.GivenUp++
		customer.GivenUp++
		if r.Replay {
			b.have.FailedAgain++
		}
	default:
		b.have.Nacked++
		customer.Nacked++
	}
	b.have.Customers[key] = customer
}

func (b *books) undecodable(msg *mono.Msg, _ error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.have.GivenUp++
	b.have.Undecodable++
	if audit.IsReplay(msg) {
		b.have.FailedAgain++
	}
}

func (b *books) state() results {
	b.mu.Lock()
	defer b.mu.Unlock()
	have := b.have
	have.Customers = maps.Clone(have.Customers)
	return have
}
