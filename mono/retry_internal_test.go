package mono

import (
	"errors"
	"math"
	"strings"
	"testing"
	"time"
)

func TestRetryPolicy_delay(t *testing.T) {
	t.Parallel()
	fixed := RetryPolicy{Backoff: []time.Duration{time.Second, 3 * time.Second, 0, 7 * time.Second}, NoJitter: true}
	listed := RetryPolicy{Backoff: []time.Duration{time.Second, 0}}
	tests := []struct {
		name     string
		policy   RetryPolicy
		attempt  uint64
		from, to time.Duration
	}{
		{"first of a list", fixed, 1, time.Second, time.Second},
		{"second of a list", fixed, 2, 3 * time.Second, 3 * time.Second},
		{"no delay in a list", fixed, 3, 0, 0},
		{"last of a list", fixed, 4, 7 * time.Second, 7 * time.Second},
		{"beyond a list", fixed, 5, 7 * time.Second, 7 * time.Second},
		{"far beyond a list", fixed, math.MaxUint64, 7 * time.Second, 7 * time.Second},
		{"attempts count from 1", fixed, 0, time.Second, time.Second},
		{"jitter, first of a list", listed, 1, 800 * time.Millisecond, 1200 * time.Millisecond},
		{"jitter, no delay in a list", listed, 2, 0, 0},
		{"jitter, longest", RetryPolicy{Backoff: []time.Duration{math.MaxInt64}}, 1, math.MaxInt64 / 10 * 8, math.MaxInt64},
		{"no jitter, default", RetryPolicy{NoJitter: true}, 2, 5 * time.Second, 5 * time.Second},
		{"default, first", RetryPolicy{}, 1, 800 * time.Millisecond, 1200 * time.Millisecond},
		{"default, second", RetryPolicy{}, 2, 4 * time.Second, 6 * time.Second},
		{"default, third", RetryPolicy{}, 3, 20 * time.Second, 30 * time.Second},
		{"default, fourth", RetryPolicy{}, 4, 100 * time.Second, 150 * time.Second},
		{"default, fifth", RetryPolicy{}, 5, 8 * time.Minute, 12 * time.Minute},
		{"default, far", RetryPolicy{}, math.MaxUint64, 8 * time.Minute, 12 * time.Minute},
		{"default, none", RetryPolicy{}, 0, 800 * time.Millisecond, 1200 * time.Millisecond},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seen := make(map[time.Duration]bool)
			for range 200 {
				d := tt.policy.delay(tt.attempt)
				if d < tt.from || d > tt.to {
					t.Fatalf("delay(%d) = %v, want %v to %v", tt.attempt, d, tt.from, tt.to)
				}
				seen[d] = true
			}
			if spread := tt.from != tt.to; spread != (len(seen) > 1) {
				t.Errorf("delay(%d) takes %d values, want them spread: %v", tt.attempt, len(seen), spread)
			}
		})
	}
}

func TestRetryPolicy_last(t *testing.T) {
	t.Parallel()
	tests := []struct {
		maxAttempts int
		attempt     uint64
		want        bool
	}{
		{1, 1, true}, {3, 2, false}, {3, 3, true}, {3, 4, true}, {-1, 1, false}, {-1, math.MaxUint64, false},
	}
	for _, tt := range tests {
		if got := (RetryPolicy{MaxAttempts: tt.maxAttempts}).last(tt.attempt); got != tt.want {
			t.Errorf("last(%d) with MaxAttempts %d = %v, want %v", tt.attempt, tt.maxAttempts, got, tt.want)
		}
	}
	if got := (RetryPolicy{}).withDefaults().MaxAttempts; got != 5 {
		t.Errorf("MaxAttempts defaults to %d, want 5", got)
	}
}

func TestRetryPolicy_validate(t *testing.T) {
	t.Parallel()
	for _, good := range []RetryPolicy{{}, {MaxAttempts: -1}, {MaxAttempts: 1}, {Backoff: []time.Duration{0, time.Hour}}} {
		if err := good.validate(); err != nil {
			t.Errorf("validate of %+v = %v, want nil", good, err)
		}
	}
	err := RetryPolicy{MaxAttempts: -2, Backoff: []time.Duration{0, -time.Second, -time.Minute}}.validate()
	if !errors.Is(err, ErrInvalidConfig) {
		t.Fatalf("validate = %v, want ErrInvalidConfig", err)
	}
	for _, part := range []string{"Retry.MaxAttempts is -2", "Retry.Backoff[1] is -1s", "Retry.Backoff[2] is -1m0s"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}
