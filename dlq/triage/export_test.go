package triage

import (
	"testing"
	"time"
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
