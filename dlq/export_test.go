package dlq

import "github.com/nats-io/nats.go"

// What the tests of package dlq_test share with those in here.
var (
	Update     = update
	FullRecord = fullRecord
	OverWire   = overWire
)

// WireHeader is what a change has on the wire.
func (c *Change) WireHeader(id string) nats.Header { return c.header(id) }
