package triage

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"cel.dev/cel-go/interpreter"

	"github.com/monotel/monotel/dlq"
)

// MarkStarted makes an operation what it is after its process was killed.
func MarkStarted(t *testing.T, d *Desk, id string) {
	t.Helper()
	_, err := d.change(t.Context(), id, func(s *stored) error {
		s.Status, s.Started, s.Runner = StatusRunning, time.Now(), "dead"
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// Variables lists what a query may look at.
func Variables() []string { return slices.Sorted(maps.Keys(variables)) }

// QueryCost is what the evaluation of a query may cost, in steps of the evaluator.
const QueryCost = queryCost

// CostOf evaluates a query and returns what that has cost.
func CostOf(q *Query, e *dlq.Entry) (cost uint64) {
	_, details, _ := q.program.Eval(&activation{e: e, fingerprint: Fingerprint})
	if details == nil || details.ActualCost() == nil {
		return 0
	}
	return *details.ActualCost()
}

// CutOff reports whether a query was ended at its cost limit.
func CutOff(err error) bool {
	cancelled, ok := errors.AsType[interpreter.EvalCancelledError](err)
	return ok && cancelled.Cause == interpreter.CostLimitExceeded
}

// GroupAll groups the same entry n times.
func GroupAll(fingerprint func(*dlq.Entry) string, n int, e *dlq.Entry) []Group {
	g := newGrouper(fingerprint)
	for range n {
		g.add(e)
	}
	return g.result()
}

// TakeOver makes another run of the same actor, in a process of the same number,
// the runner of an operation.
func TakeOver(t *testing.T, d *Desk, id string) {
	t.Helper()
	_, err := d.change(t.Context(), id, func(s *stored) error {
		s.Runner = runnerName(d.cfg.Actor)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// DeadAtOnce reports whether a runner that has been silent for so long, by the
// server's clock, counts as dead without being watched.
func DeadAtOnce(silent time.Duration) bool {
	return new(watch).dead(&stored{revision: 1, silent: silent})
}

// Acquire makes a new run the runner of an operation, and returns how many messages
// it has sent for that. A desk with no other work must be used.
func Acquire(t *testing.T, d *Desk, id string) (messages uint64) {
	t.Helper()
	before := d.nc.Stats().OutMsgs
	if _, err := d.acquire(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	return d.nc.Stats().OutMsgs - before
}

// Lease is how long a runner is watched.
const Lease = lease

// MergeDiff is what is kept of an edit.
func MergeDiff(before, after []byte) []byte { return mergeDiff(before, after) }

// MatchUntil evaluates a query until ctx ends.
func MatchUntil(ctx context.Context, q *Query, e *dlq.Entry) (bool, error) {
	return q.match(ctx, e, Fingerprint)
}

// ResolveTwice asks for a variable, calls between, and asks again.
func ResolveTwice(e *dlq.Entry, name string, between func()) (first, second any) {
	a := &activation{e: e, fingerprint: Fingerprint}
	first, _ = a.ResolveName(name)
	between()
	second, _ = a.ResolveName(name)
	return first, second
}
