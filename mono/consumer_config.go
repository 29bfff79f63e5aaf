package mono

import (
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// A StreamConsumerConfig configures a durable consumer: the stream that stores
// its event, the consumer on the server, and how messages are fetched and
// handled here. Only Stream.Name is required.
type StreamConsumerConfig struct {
	// Stream is the stream that stores the event, made when it is missing. The
	// event's subject is added to it. Several consumers may name the same
	// stream; the fields each of them sets must agree.
	//
	// A stream without MaxBytes gets 1 GiB (256 MiB in memory) and refuses new
	// messages when it is full. Work queue and interest streams always refuse,
	// since all they hold is still to be handled. A limits stream with limits
	// of your own follows your Discard, whose zero value drops the oldest
	// message, handled or not.
	Stream StreamConfig

	// Consumer configures the consumer on the server. Durable defaults to
	// <module>_<event's module>_<event in kebab-case>_<version>. AckWait
	// defaults to 30 s; handlers may take longer, see [EventRegistry].
	// MaxAckPending defaults to 10 000 or 20 × Concurrency × BatchSize, whichever
	// is more: messages that wait for their next attempt count as well.
	// With a small one a single batch may take it all, and handlers beside it get
	// nothing: keep it above Concurrency × BatchSize. MaxDeliver stays unlimited,
	// because attempts are counted by Retry.
	//
	// FilterSubject, AckPolicy and BackOff are the framework's, and the fields
	// of push consumers and priority groups are not supported.
	Consumer ConsumerConfig

	Fetch FetchConfig
	Retry RetryPolicy

	// Concurrency is how many batches are handled at a time, 1 to 4096. The
	// default is 1. Concurrency × BatchSize may be 100 000 at most.
	Concurrency int

	// AutoAck acks what the handler left unsettled when it returns nil. Without
	// it such a message is delivered again after AckWait.
	AutoAck bool
}

// A FetchConfig says how a durable consumer asks for messages.
type FetchConfig struct {
	// BatchSize is the most messages that one call of the handler gets, 1 to
	// 10 000. The default is 10. A batch is what has arrived: no message waits
	// for its batch to fill.
	BatchSize int

	// IdleTimeout is how long a pull request stays open at the server when
	// there are no messages, from 1 s to 1 min; then it is renewed. It delays no
	// message. The default is 5 s.
	IdleTimeout time.Duration

	// MaxBytes bounds the messages that this consumer holds and has asked for, with
	// their headers, from 64 KiB to 1 GiB. The default is 16 MiB. One message of the
	// server's max_payload is always allowed, so that none is too large. With messages
	// that large, raise it to keep every worker busy.
	MaxBytes int
}

const (
	defaultBatchSize   = 10
	maxBatchSize       = 10_000
	defaultIdleTimeout = 5 * time.Second
	minIdleTimeout     = time.Second
	maxIdleTimeout     = time.Minute
	defaultFetchBytes  = 16 << 20
	minFetchBytes      = 64 << 10
	maxFetchBytes      = 1 << 30
	maxConcurrency     = 4096
	maxInWork          = 100_000 // Concurrency × BatchSize
	defaultAckWait     = 30 * time.Second
	minAckWait         = 100 * time.Millisecond
	minMaxAckPending   = 10_000
	ackPendingPerSlot  = 20
)

// withDefaults fills in what can be known without the event.
func (c StreamConsumerConfig) withDefaults() StreamConsumerConfig {
	if c.Fetch.BatchSize == 0 {
		c.Fetch.BatchSize = defaultBatchSize
	}
	if c.Fetch.IdleTimeout == 0 {
		c.Fetch.IdleTimeout = defaultIdleTimeout
	}
	if c.Fetch.MaxBytes == 0 {
		c.Fetch.MaxBytes = defaultFetchBytes
	}
	if c.Concurrency == 0 {
		c.Concurrency = 1
	}
	c.Retry = c.Retry.withDefaults()
	if c.Consumer.Durable == "" {
		c.Consumer.Durable = c.Consumer.Name
	}
	if c.Consumer.AckWait == 0 {
		c.Consumer.AckWait = defaultAckWait
	}
	if c.Consumer.MaxDeliver == 0 {
		c.Consumer.MaxDeliver = -1
	}
	if c.Consumer.MaxAckPending == 0 {
		c.Consumer.MaxAckPending = max(minMaxAckPending, ackPendingPerSlot*c.Concurrency*c.Fetch.BatchSize)
	}
	return c
}

// validate reports every problem at once, each naming the field to change. It
// expects defaults to be filled in.
func (c StreamConsumerConfig) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidConfig}, args...)...))
	}
	if err := checkStreamName(c.Stream.Name); err != nil {
		bad("Stream.Name: %w", err)
	}
	for _, s := range c.Stream.Subjects {
		if reservedSubject(s) {
			bad("Stream.Subjects: %q: subjects that start with \"$\" or \"_INBOX.\" belong to the server", s)
		}
	}
	if c.Stream.Mirror != nil {
		bad("Stream.Mirror: a mirror cannot store an event itself; leave it out")
	}
	if c.Stream.NoAck {
		bad("Stream.NoAck: durable publishes wait for the acknowledgement; leave it out")
	}
	if c.Stream.Sealed {
		bad("Stream.Sealed: a sealed stream takes no events; leave it out")
	}

	k := c.Consumer
	if k.Name != "" && k.Name != k.Durable {
		bad("Consumer.Name is %q and Consumer.Durable %q: set Durable alone", k.Name, k.Durable)
	}
	if k.Durable != "" {
		if err := checkStreamName(k.Durable); err != nil {
			bad("Consumer.Durable: %w", err)
		}
	}
	if k.FilterSubject != "" || len(k.FilterSubjects) > 0 {
		bad("Consumer.FilterSubject and FilterSubjects: the consumer filters its event by itself; leave them out")
	}
	if k.AckPolicy != jetstream.AckExplicitPolicy {
		bad("Consumer.AckPolicy is %v: each message is settled by itself; leave it out", k.AckPolicy)
	}
	if len(k.BackOff) > 0 {
		bad("Consumer.BackOff replaces AckWait on the server; set Retry.Backoff")
	}
	if k.PriorityPolicy != jetstream.PriorityPolicyNone || len(k.PriorityGroups) > 0 {
		bad("Consumer.PriorityPolicy and PriorityGroups are not supported")
	}
	if k.DeliverSubject != "" || k.DeliverGroup != "" || k.FlowControl || k.IdleHeartbeat != 0 || k.RateLimit != 0 {
		bad("Consumer: DeliverSubject, DeliverGroup, FlowControl, IdleHeartbeat and RateLimit are for push consumers; leave them out")
	}
	if k.AckWait < minAckWait {
		bad("Consumer.AckWait is %v, want %v or more", k.AckWait, minAckWait)
	}
	if k.MaxAckPending < -1 {
		bad("Consumer.MaxAckPending is %d, want 1 or more, or -1 for no limit", k.MaxAckPending)
	}
	if k.MaxDeliver > 0 && (c.Retry.MaxAttempts < 0 || k.MaxDeliver <= c.Retry.MaxAttempts) {
		bad("Consumer.MaxDeliver is %d, want more than Retry.MaxAttempts (%d): the server would stop delivering before the framework gives up; leave it out",
			k.MaxDeliver, c.Retry.MaxAttempts)
	}
	if c.Fetch.BatchSize < 1 || c.Fetch.BatchSize > maxBatchSize {
		bad("Fetch.BatchSize is %d, want 1 to %d", c.Fetch.BatchSize, maxBatchSize)
	}
	if c.Fetch.IdleTimeout < minIdleTimeout || c.Fetch.IdleTimeout > maxIdleTimeout {
		bad("Fetch.IdleTimeout is %v, want %v to %v", c.Fetch.IdleTimeout, minIdleTimeout, maxIdleTimeout)
	}
	if c.Fetch.MaxBytes < minFetchBytes || c.Fetch.MaxBytes > maxFetchBytes {
		bad("Fetch.MaxBytes is %d, want %d to %d", c.Fetch.MaxBytes, minFetchBytes, maxFetchBytes)
	}
	if c.Concurrency < 1 || c.Concurrency > maxConcurrency {
		bad("Concurrency is %d, want 1 to %d", c.Concurrency, maxConcurrency)
	}
	if n := int64(c.Concurrency) * int64(c.Fetch.BatchSize); n > maxInWork {
		bad("Concurrency × Fetch.BatchSize is %d, want at most %d messages in work at a time", n, maxInWork)
	}
	if err := c.Retry.validate(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
