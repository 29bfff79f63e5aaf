package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"
)

const deadLettersOpen = "MonotelDeadLettersOpen"

// The alert for dead letters fires after a burst of failures, and ends when they have
// been replayed with success. It waits for a minute before it fires: the other tests
// run meanwhile.
func TestAlert_deadLetters(t *testing.T) {
	const (
		burst  = 30
		ofIvan = `payload.customer_id == "ivan"`
		limit  = 4 * time.Minute // scrapes and polls come to the minute, and restarts of Prometheus
	)
	customer := fresh("alert")
	setLedger(t, "closed")
	orders := postMany(t, customer, burst)
	awaitDead(t, customer, burst)
	setLedger(t, "flaky")
	t.Parallel() // waits until all tests have ended that do not call it
	untilFor(t, limit, "the alert fires", func(ctx context.Context) error { return alertIs(ctx, "firing") })
	setLedger(t, "repaired")
	// What other tests have left open is open, too.
	_, _, err := sys.monotel(t.Context(), "dlq", "replay", "--all", "--yes", "--reason", "the ledger is repaired", "--quiet")
	if code := exitCode(err); code != exitDone && code != exitPartly {
		t.Fatal(err)
	}
	ids := make([]string, 0, burst)
	for _, o := range orders {
		ids = append(ids, o.OrderID)
	}
	awaitWritten(t, ids)
	// Who has no account has none in a replay, either: those cannot be repaired.
	if out, _, err := sys.monotel(t.Context(), "dlq", "ls", "--where", ofIvan, "--output", "ndjson"); err != nil {
		t.Fatal(err)
	} else if out != "" {
		if _, _, err := sys.monotel(t.Context(), "dlq", "discard", "--where", ofIvan, "--yes", "--reason", "no account"); err != nil {
			t.Fatal(err)
		}
	}
	until(t, "no dead letter is open", func(ctx context.Context) error {
		open, err := prom.value(ctx, fmt.Sprintf("max(mono_dead_letters_open{job=%q})", consumersName))
		if err == nil && open != 0 {
			err = fmt.Errorf("%v are", open)
		}
		return err
	})
	until(t, "the alert has ended", func(ctx context.Context) error { return alertIs(ctx, "") })
}

func alertIs(ctx context.Context, want string) error {
	states, err := prom.alert(ctx, deadLettersOpen)
	if err != nil {
		return err
	}
	if slices.Contains(states, want) || want == "" && len(states) == 0 {
		return nil
	}
	return fmt.Errorf("%s is %q", deadLettersOpen, states)
}
