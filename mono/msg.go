package mono

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

// Types borrowed from nats.go, so that no field can go missing.
type (
	// Header holds a message's headers.
	Header = nats.Header

	// Metadata is what JetStream knows about a delivery.
	Metadata = jetstream.MsgMetadata

	// StreamConfig configures a stream.
	StreamConfig = jetstream.StreamConfig

	// ConsumerConfig configures a durable consumer.
	ConsumerConfig = jetstream.ConsumerConfig
)

// Values of StreamConfig.Retention and StreamConfig.Storage.
const (
	LimitsPolicy    = jetstream.LimitsPolicy
	InterestPolicy  = jetstream.InterestPolicy
	WorkQueuePolicy = jetstream.WorkQueuePolicy

	FileStorage   = jetstream.FileStorage
	MemoryStorage = jetstream.MemoryStorage
)

// A Msg is a message to publish, or one that was delivered to a handler.
//
// Each delivery of a durable consumer is settled once, by [Msg.Ack],
// [Msg.Nak], [Msg.NakWithDelay], [Msg.Term], [Msg.TermWithReason] or
// [Msg.Fail]; a later one returns [ErrAlreadySettled]. The methods return
// [ErrNotDurable] for a message of a core consumer and for one that was never
// delivered. When one fails for another reason, such as a closed connection,
// the message is unsettled still and the server delivers it again after the
// consumer's AckWait.
//
// The settling methods and Context are safe for concurrent use. The fields
// belong to whoever holds the message.
type Msg struct {
	*delivery // nil unless delivered by a durable consumer

	Subject string
	Data    []byte
	Header  Header

	ctx context.Context //nolint:containedctx // the delivery's own context, as http.Request has one
}

// A delivery is what a durable consumer knows about a message. It is apart so
// that a Msg made to be published is small.
//
// There is one for each message, and what it takes is collected soon: together with
// the Msg it fits into 192 bytes. So of the metadata it keeps what messages are
// handled by, and the rest is read when somebody asks.
type delivery struct {
	consumer         *streamConsumer
	reply            string             // where settlements go
	tel              messaging.Delivery // and what is kept of the metadata
	consumerSequence uint64
	replay           *dlq.Replay // nil: it is no replay
	lease            lease
	sized            atomic.Uint32 // how many bytes, as the server counts them, and the phase
	state            atomic.Uint32
	final            *[]byte // what was sent for stateSettled
}

func (d *delivery) sequence() uint64  { return d.tel.Sequence }
func (d *delivery) attempt() uint64   { return uint64(d.tel.Attempt) }
func (d *delivery) stored() time.Time { return time.Unix(0, d.tel.Stored) }

// epoch is where uptime begins.
var epoch = time.Now()

// uptime is monotonic time: only differences are meaningful. Reading it takes half the
// time of time.Now.
func uptime() time.Duration { return time.Since(epoch) }

// The phases of a delivery, above its size.
const (
	phaseWaiting  uint32 = iota
	phaseBegun           // a handler has it
	phaseReplaced        // no handler gets it, but a later delivery
)

const sizeBits = 30 // no message has 1 GiB

func sized(size int) uint32 { return uint32(min(size, 1<<sizeBits-1)) } //nolint:gosec // it is not negative

func (d *delivery) bytes() int { return int(d.sized.Load() & (1<<sizeBits - 1)) }

// leaveWaiting ends the phase in which the delivery waits, and reports whether that was it.
func (d *delivery) leaveWaiting(phase uint32) bool {
	was := d.sized.Load() // nothing but the phase changes, and that once
	return was>>sizeBits == phaseWaiting && d.sized.CompareAndSwap(was, was|phase<<sizeBits)
}

func (d *delivery) isReplaced() bool { return d.sized.Load()>>sizeBits == phaseReplaced }

// The states of a delivery. Only stateOpen may be settled.
const (
	stateOpen     uint32 = iota
	stateSettling        // a settlement is being sent
	stateReturned        // nakked, or its lease has ended: the server delivers it again
	stateSettled         // acked or given up: the server does not
	stateHeld            // decided; held until that can be stored
	stateGone            // its stream is not there any more
)

// Context returns the context of this delivery. It carries the message's own
// span, also in a batch, so that what is done and published with it belongs to the
// message's trace; where that is not recorded, it may be the publish's. It ends when
// Stop runs out of time. For a message that was not delivered it is
// context.Background.
func (m *Msg) Context() context.Context {
	if m.ctx == nil {
		return context.Background() //nolint:forbidigo // there is no other
	}
	return m.ctx
}

// Metadata returns the stream, consumer, sequences, number of deliveries and
// store time of a delivery of a durable consumer, as the server wrote them on
// it. NumPending is as of the delivery. It is the zero value for any other
// message.
func (m *Msg) Metadata() Metadata {
	var meta Metadata
	if m.delivery != nil {
		parseAckReply(m.reply, &meta)
	}
	return meta
}

// Ack says that the message is done with. It is sent at once and not waited
// for. Of a dead letter that is replayed the outcome is stored before, which takes
// round trips; when it cannot be, the message is held, and acked when it can.
//
// Of a message that was delivered before, Ack returns when the server has read it, so
// that a crash later in the batch does not undo it.
func (m *Msg) Ack() error {
	err := m.settle(settlement{kind: settleAck})
	if err == nil && m.attempt() > 1 {
		m.consumer.flush()
	}
	return err
}

// Nak asks for another delivery: at once after the first delivery, and after
// the delay of the consumer's [RetryPolicy] from the second on, so that a
// short outage does not use up every attempt. On the last attempt the message
// is dead-lettered.
func (m *Msg) Nak() error { return m.settle(settlement{kind: settleNak}) }

// NakWithDelay asks for another delivery after d. On the last attempt the
// message is dead-lettered.
func (m *Msg) NakWithDelay(d time.Duration) error {
	return m.settle(settlement{kind: settleNakDelay, delay: max(d, 0)})
}

// Term gives up on the message: it is dead-lettered and not delivered again.
func (m *Msg) Term() error {
	return m.settle(settlement{kind: settleDead, verdict: verdict{reason: dlq.ReasonTerminated}})
}

// TermWithReason is [Msg.Term] with a reason for whoever looks at the dead
// letter. Control characters become spaces and the reason is cut at 512 bytes.
func (m *Msg) TermWithReason(reason string) error {
	return m.settle(settlement{kind: settleDead, verdict: verdict{reason: dlq.ReasonTerminated, text: reason}})
}

// Fail settles this message alone as if the handler had returned err for it:
// [Permanent] and [DecodeError] dead-letter it, [RetryAfter] and every other
// error nak it with the asked or the policy's delay, and the last attempt
// dead-letters it. A batch handler uses it to report one failure among
// successes. A nil err is an ack.
func (m *Msg) Fail(err error) error {
	if err == nil {
		return m.Ack()
	}
	err = checkedError(err)
	return m.settle(settlement{kind: settleError, err: err})
}

// InProgress tells the server that the message is still being worked on, which
// starts its AckWait anew. While a handler runs this happens by itself; it is
// for messages that are settled after their handler has returned.
func (m *Msg) InProgress() error {
	switch {
	case m.delivery == nil:
		return ErrNotDurable
	case m.state.Load() != stateOpen:
		return ErrAlreadySettled
	}
	return m.consumer.inProgress(m)
}

func (m *Msg) settle(s settlement) error {
	if m.delivery == nil {
		return ErrNotDurable
	}
	if !m.state.CompareAndSwap(stateOpen, stateSettling) {
		return fmt.Errorf("message %d of stream %q: %w", m.sequence(), m.consumer.info.Stream, ErrAlreadySettled)
	}
	if err := m.consumer.settle(m, s); err != nil {
		m.state.Store(stateOpen)
		if m.tel.Left() { // nobody else will say so
			m.consumer.tel.Return(m.Context(), &m.tel, err)
		}
		return fmt.Errorf("settle message %d of stream %q: %w", m.sequence(), m.consumer.info.Stream, err)
	}
	m.state.CompareAndSwap(stateSettling, stateSettled)
	return nil
}

// leave says that the handler has returned with err and did not see the message
// settled. Somebody else may be about to.
func (m *Msg) leave(err error) {
	m.tel.Leave()
	if m.state.Load() == stateOpen {
		m.consumer.tel.Return(m.Context(), &m.tel, err)
	}
}
