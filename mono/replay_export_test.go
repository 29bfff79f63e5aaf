package mono

import (
	"context"
	"time"
)

// WithReplayGrace sets how long a stream keeps the subject by which earlier versions
// replay, after its last message.
func WithReplayGrace(d time.Duration) Option {
	return option(func(c *config) { c.replayGrace = d })
}

// SweepReplays does what the janitor of a running App does for replays from time to
// time.
func SweepReplays(ctx context.Context, a *App) error {
	a.mu.RLock()
	r := a.run
	a.mu.RUnlock()
	if err := (&janitor{r: r}).arrange(ctx); err != nil {
		return err
	}
	return r.sweepReplays(ctx)
}
