package messaging

import (
	"time"

	"go.opentelemetry.io/otel/metric"
)

// A ConsumerState is what the server says of a durable consumer.
type ConsumerState struct {
	Pending    uint64    // not delivered yet
	AckPending int       // delivered and not settled
	Limit      int       // of AckPending; 0 or less: none
	Waiting    int       // pull requests
	Oldest     time.Time // when the oldest message that is not acked was stored; zero: there is none
	NoOldest   bool      // Oldest is not known
}

// SetState keeps what is reported of the consumer until the next call. Nil
// reports nothing.
func (c *Consumer) SetState(s *ConsumerState) { c.state.Store(s) }

func (c *Consumer) observeState(o metric.Observer) {
	s := c.state.Load()
	if s == nil {
		return
	}
	i := &c.t.instruments
	o.ObserveInt64(i.consumerPending, int64(s.Pending), c.stateAttrs...) //nolint:gosec // as many as a stream can hold
	o.ObserveInt64(i.ackPending, int64(s.AckPending), c.stateAttrs...)
	if s.Limit > 0 {
		o.ObserveInt64(i.ackPendingLimit, int64(s.Limit), c.stateAttrs...)
	}
	o.ObserveInt64(i.waiting, int64(s.Waiting), c.stateAttrs...)
	if s.NoOldest {
		return
	}
	age := 0.0
	if !s.Oldest.IsZero() {
		age = max(time.Since(s.Oldest).Seconds(), 0)
	}
	o.ObserveFloat64(i.oldestAge, age, c.stateAttrs...)
}
