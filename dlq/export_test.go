package dlq

import (
	"time"

	"github.com/nats-io/nats.go"
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
