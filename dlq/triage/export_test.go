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
		s.Status, s.Started, s.Runner, s.RunnerUntil = StatusRunning, time.Now(), "dead", time.Now()
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
