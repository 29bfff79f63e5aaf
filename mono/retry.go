package mono

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"time"
)

// A RetryPolicy says how often and how soon a durable consumer tries again
// after a failure: an error or panic of the handler, or a nak.
type RetryPolicy struct {
	// MaxAttempts is how many deliveries may fail before the message is
	// dead-lettered. 0 means 5; -1 means there is no limit. On its last attempt a
	// message is handed over alone, so that it is not given up for another one of its
	// batch: with 1, every batch has one message.
	MaxAttempts int

	// Backoff holds the delay after the first failed attempt, after the second,
	// and so on; the last one repeats. The default is 1 s, 5 s, 25 s, 125 s and so
	// on up to 10 min. Each delay is up to 20 % longer or shorter by chance, so that
	// messages that failed together do not come back together.
	Backoff []time.Duration

	// NoJitter makes every delay exactly that of Backoff, or of the default.
	NoJitter bool
}

const (
	defaultMaxAttempts = 5
	backoffBase        = time.Second
	backoffFactor      = 5
	backoffMax         = 10 * time.Minute
	backoffJitter      = 0.2
)

func (p RetryPolicy) withDefaults() RetryPolicy {
	if p.MaxAttempts == 0 {
		p.MaxAttempts = defaultMaxAttempts
	}
	return p
}

func (p RetryPolicy) validate() error {
	var errs []error
	if p.MaxAttempts < -1 {
		errs = append(errs, fmt.Errorf("%w: Retry.MaxAttempts is %d, want 1 or more, 0 for %d, or -1 for no limit",
			ErrInvalidConfig, p.MaxAttempts, defaultMaxAttempts))
	}
	for i, d := range p.Backoff {
		if d < 0 {
			errs = append(errs, fmt.Errorf("%w: Retry.Backoff[%d] is %v, want 0 or more", ErrInvalidConfig, i, d))
		}
	}
	return errors.Join(errs...)
}

// last reports whether the attempt, counted from 1, is the last one.
func (p RetryPolicy) last(attempt uint64) bool {
	return p.MaxAttempts > 0 && attempt >= uint64(p.MaxAttempts)
}

// delay is how long to wait after the attempt, counted from 1, has failed.
func (p RetryPolicy) delay(attempt uint64) time.Duration {
	attempt = max(attempt, 1)
	d := backoffBase
	if n := uint64(len(p.Backoff)); n > 0 {
		d = p.Backoff[min(attempt, n)-1]
	} else {
		for range attempt - 1 {
			if d *= backoffFactor; d >= backoffMax {
				d = backoffMax
				break
			}
		}
	}
	if p.NoJitter {
		return d
	}
	jitter := 1 - backoffJitter + 2*backoffJitter*rand.Float64() //nolint:gosec // nobody gains by guessing it
	if longer := float64(d) * jitter; longer < math.MaxInt64 {
		return time.Duration(longer)
	}
	return d
}
