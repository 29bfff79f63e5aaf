package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// What the demo calls things.
const (
	subject     = "events.tracking.v1.order-created"
	stream      = "orders-audit"
	auditor     = "audit_tracking_order-created_v1" // the durable consumer
	deadLetters = "DLQ"
)

// Customers whose orders get into trouble, unless the ledger is repaired.
const (
	felix = "felix" // it is busy at the first attempt
	greta = "greta" // ... and at the second
	ivan  = "ivan"  // no account: given up at once
)

// An order is what the emitter has answered.
type order struct {
	OrderID string `json:"order_id"`
	TraceID string `json:"trace_id"`
}

func postOrder(ctx context.Context, customer string) (o order, err error) {
	request := map[string]any{"customer": customer, "amount": 12.5}
	err = postJSON(ctx, sys.url(serviceEmitter)+"/orders", request, &o)
	return o, err
}

func mustOrder(t *testing.T, customer string) order {
	t.Helper()
	o, err := postOrder(t.Context(), customer)
	if err != nil {
		t.Fatal(err)
	}
	if o.OrderID == "" || o.TraceID == "" {
		t.Fatalf("the emitter answers %+v", o)
	}
	return o
}

// postMany posts orders, several at a time, and returns those that were taken.
func postMany(t *testing.T, customer string, n int) (taken []order) {
	t.Helper()
	var mu sync.Mutex
	var wg sync.WaitGroup
	slots := make(chan struct{}, 20)
	for range n {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			o, err := postOrder(t.Context(), customer)
			if err != nil {
				t.Errorf("an order of %s: %v", customer, err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			taken = append(taken, o)
		})
	}
	wg.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return taken
}

// What the consumers say that they have done since they were started.
type settled struct {
	Acked   int `json:"acked"`
	Nacked  int `json:"nacked"`
	GivenUp int `json:"given_up"`
}

type ledger struct {
	settled

	Mode        string             `json:"mode"`
	Written     int                `json:"written"`
	Undecodable int                `json:"undecodable"`
	Resolved    int                `json:"resolved"`
	FailedAgain int                `json:"failed_again"`
	Confirmed   int                `json:"confirmed"`
	Customers   map[string]settled `json:"customers"`
}

func askLedger(ctx context.Context) (l ledger, err error) {
	err = getJSON(ctx, sys.url(serviceConsumers)+"/ledger", &l)
	return l, err
}

// unwritten returns those of some orders that the consumers have not written since they
// were started.
func unwritten(ctx context.Context, ids []string) ([]string, error) {
	var answer struct {
		Missing []string `json:"missing"`
	}
	err := postJSON(ctx, sys.url(serviceConsumers)+"/ledger/written", map[string][]string{"order_ids": ids}, &answer)
	return answer.Missing, err
}

// awaitWritten waits until all of some orders are written.
func awaitWritten(t *testing.T, ids []string) {
	t.Helper()
	until(t, "every order is written", func(ctx context.Context) error {
		missing, err := unwritten(ctx, ids)
		if err == nil && len(missing) > 0 {
			err = fmt.Errorf("%d of %d are not, one is %s", len(missing), len(ids), missing[0])
		}
		return err
	})
}

// setLedger breaks or repairs the ledger: flaky, busy, closed or repaired.
func setLedger(t *testing.T, mode string) {
	t.Helper()
	path := "/ledger/break?mode=" + mode
	if mode == "repaired" {
		path = "/ledger/repair"
	}
	var l ledger
	if err := postJSON(t.Context(), sys.url(serviceConsumers)+path, nil, &l); err != nil {
		t.Fatal(err)
	}
	if l.Mode != mode {
		t.Fatalf("the ledger is %s, want %s", l.Mode, mode)
	}
}

// An entry is what `monotel dlq ls --output ndjson` says of a dead letter.
type entry struct {
	ID       string `json:"id"`
	State    string `json:"state"`
	Reason   string `json:"reason"`
	Consumer string `json:"consumer"`
	Sequence uint64 `json:"stream_sequence"`
	Payload  struct {
		OrderID string `json:"order_id"`
	} `json:"payload"`
}

// listDead lists the dead letters of a customer's orders.
func listDead(ctx context.Context, customer string) ([]entry, error) {
	out, _, err := sys.monotel(ctx, "dlq", "ls", "--limit", "0", "--state", "all", "--payload", "--output", "ndjson",
		"--where", fmt.Sprintf("payload.customer_id == %q", customer))
	if err != nil {
		return nil, err
	}
	var all []entry
	for line := range strings.Lines(out) {
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		all = append(all, e)
	}
	return all, nil
}

// Exit codes of the command.
const (
	exitDone   = 0
	exitPartly = 3 // some failed again
)

// replay has the dead letters of a customer handled again, and waits for what comes of
// it.
func replay(t *testing.T, customer string, wantExit int) {
	t.Helper()
	_, _, err := sys.monotel(t.Context(), "dlq", "replay", "--where", fmt.Sprintf("payload.customer_id == %q", customer),
		"--yes", "--reason", "the ledger is repaired", "--quiet")
	if exitCode(err) != wantExit {
		t.Fatalf("the exit code is %d, want %d: %v", exitCode(err), wantExit, err)
	}
}

// exitCode is that of a command that has ended with err, -1 if it has not run.
func exitCode(err error) int {
	if err == nil {
		return 0
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		return exit.ExitCode()
	}
	return -1
}

// awaitDead waits until so many orders of a customer are dead letters.
func awaitDead(t *testing.T, customer string, n int) (all []entry) {
	t.Helper()
	until(t, fmt.Sprintf("%d orders of %s are dead letters", n, customer), func(ctx context.Context) (err error) {
		all, err = listDead(ctx, customer)
		if err == nil && len(all) != n {
			err = fmt.Errorf("there are %d", len(all))
		}
		return err
	})
	return all
}

// awaitSettled waits until so many orders of a customer are acked or given up.
func awaitSettled(t *testing.T, customer string, acked, givenUp int) {
	t.Helper()
	until(t, fmt.Sprintf("%d orders of %s are acked and %d given up", acked, customer, givenUp), func(ctx context.Context) error {
		l, err := askLedger(ctx)
		if err != nil {
			return err
		}
		if c := l.Customers[customer]; c.Acked != acked || c.GivenUp != givenUp {
			return fmt.Errorf("it is %+v", c)
		}
		return nil
	})
}

// awaitTrace waits until Jaeger has a trace that check accepts.
func awaitTrace(t *testing.T, id string, check func(trace) error) (found trace) {
	t.Helper()
	until(t, "trace "+id+" is in Jaeger", func(ctx context.Context) (err error) {
		found, err = jae.trace(ctx, id)
		if err != nil {
			return err
		}
		if err := check(found); err != nil {
			return fmt.Errorf("%w; it has %q", err, found.names())
		}
		return nil
	})
	return found
}

// one returns the only span of that name.
func one(t trace, name string) (span, error) {
	if found := t.named(name); len(found) != 1 {
		return span{}, fmt.Errorf("there are %d spans %q, want one", len(found), name)
	}
	return t.named(name)[0], nil
}

// has checks attributes: each has the value, or any but none where that is "*".
func (s span) has(want map[string]string) error {
	var errs []error
	for k, v := range want {
		if got := s.Attributes[k]; got != v && (v != "*" || got == "") {
			errs = append(errs, fmt.Errorf("%s: %s is %q, want %q", s.Name, k, got, v))
		}
	}
	return errors.Join(errs...)
}

func (s span) link() link { return link{s.TraceID, s.SpanID} }

// linksTo reports whether s has links to just the others.
func (s span) linksTo(others ...span) bool {
	for _, o := range others {
		if !slices.Contains(s.Links, o.link()) {
			return false
		}
	}
	return len(s.Links) == len(others)
}

// fresh makes a customer's name that no other test has used, also not in a run
// before on the same stack.
func fresh(name string) string {
	return fmt.Sprintf("%s-%d", name, time.Now().UnixNano()%1e9)
}
