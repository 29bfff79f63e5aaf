package dlq

import (
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
func (s *Store) SetRequestTimeout(d time.Duration) { s.requestTimeout = d }

// WireHeader is what a change has on the wire.
func (c *Change) WireHeader(id string) nats.Header { return c.header(id) }

// LimitBridge has a bridge handle n advisories, and no more for an hour.
func LimitBridge(b *Bridge, n int) { b.limiter = rate.NewLimiter(rate.Every(time.Hour), n) }
