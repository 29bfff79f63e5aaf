package mono

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

// Handlers are told a little before the deadline of Stop: half a second at least,
// two seconds at most, and never more than half of the time there is.
func TestBefore(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		left, want time.Duration
	}{
		{100 * time.Millisecond, 50 * time.Millisecond},
		{time.Second, 500 * time.Millisecond},
		{3 * time.Second, 600 * time.Millisecond},
		{10 * time.Second, 2 * time.Second},
		{time.Hour, 2 * time.Second},
	} {
		t.Run(tt.left.String(), func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				stop, cancel := context.WithTimeout(t.Context(), tt.left)
				defer cancel()
				for _, part := range []float64{1, 0.5} {
					ctx, cancel := before(stop, part)
					deadline, ok := ctx.Deadline()
					cancel()
					want := time.Duration(part * float64(tt.want))
					if early := tt.left - time.Until(deadline); !ok || early != want {
						t.Errorf("part %v ends %v before the deadline, want %v", part, early, want)
					}
				}
			})
		})
	}
	ctx, cancel := before(t.Context(), 1)
	t.Cleanup(cancel)
	if deadline, ok := ctx.Deadline(); ok {
		t.Errorf("without a deadline it ends at %v", deadline)
	}
}
