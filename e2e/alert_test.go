package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"
)

const deadLettersOpen = "MonotelDeadLettersOpen"

// The alert for dead letters fires after a burst of failures, and ends when they have
// been replayed with success.
func TestAlert_deadLetters(t *testing.T) {
	const (
		burst = 30
		limit = 4 * time.Minute // it waits for a minute before it fires; scrapes and polls come to that
	)
	customer := fresh("alert")
	setLedger(t, "closed")
	defer setLedger(t, "flaky")
	postMany(t, customer, burst)
	awaitDead(t, customer, burst)
	untilFor(t, limit, "the alert fires", func(ctx context.Context) error { return alertIs(ctx, "firing") })
	setLedger(t, "repaired")
	// What other tests have left open is open, too.
	out, _, err := sys.monotel(t.Context(), "dlq", "replay", "--all", "--yes", "--reason", "the ledger is repaired", "--quiet")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	awaitSettled(t, customer, burst, burst)
	// Who has no account has none in a replay, either: those cannot be repaired.
	if _, _, err := sys.monotel(t.Context(), "dlq", "discard", "--where", `payload.customer_id == "ivan"`, "--yes", "--reason", "no account"); err != nil {
		t.Fatal(err)
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
	for _, s := range states {
		if s == want {
			return nil
		}
	}
	if want == "" && len(states) == 0 {
		return nil
	}
	return fmt.Errorf("%s is %q", deadLettersOpen, states)
}
