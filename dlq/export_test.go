package dlq

import (
	"context"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/time/rate"
)

// What the tests of package dlq_test share with those in here.
var (
	Update     = update
	FullRecord = fullRecord
	OverWire   = overWire
)

// SetRequestTimeout sets how long a request to the JetStream API may take.
func (s *Store) SetRequestTimeout(d time.Duration) { s.api.Timeout = d }

// WireHeader is what a change has on the wire.
func (c *Change) WireHeader(id string) nats.Header { return c.header(id) }

// DiscardHalf is a discard of which nothing but the trace is stored.
func (s *Store) DiscardHalf(ctx context.Context, e *Entry) error {
	s.denied.Store(true)
	defer s.denied.Store(false)
	return s.Change(ctx, e, Change{Kind: ChangeDiscarded, Actor: "ann"}, nil)
}

// LimitBridge has a bridge handle n advisories, and no more for an hour.
func LimitBridge(b *Bridge, n int) { b.limiter = rate.NewLimiter(rate.Every(time.Hour), n) }
