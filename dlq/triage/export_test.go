package triage

import (
	"maps"
	"slices"
	"testing"
	"time"

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

// Lease is how long a runner is watched.
const Lease = lease
