package messaging

import (
	"slices"

	"go.opentelemetry.io/otel/attribute"
)

// ScopeName is the instrumentation scope of every span and metric.
const ScopeName = "github.com/monotel/monotel"

// Every name that leaves the process is in this file: OpenTelemetry's messaging
// conventions are in development, and plan to rename some of them.

// Attributes of OpenTelemetry's messaging conventions, v1.43.
const (
	keySystem        = attribute.Key("messaging.system")
	keyOperationName = attribute.Key("messaging.operation.name")
	keyOperationType = attribute.Key("messaging.operation.type")
	keyTemplate      = attribute.Key("messaging.destination.template")
	keyDestination   = attribute.Key("messaging.destination.name")
	keyConsumerGroup = attribute.Key("messaging.consumer.group.name")
	keyMessageID     = attribute.Key("messaging.message.id")
	keyBodySize      = attribute.Key("messaging.message.body.size")
	keyBatchCount    = attribute.Key("messaging.batch.message_count")
	keyErrorType     = attribute.Key("error.type")
	keyServerAddress = attribute.Key("server.address")
	keyServerPort    = attribute.Key("server.port")
)

// Attributes that the conventions have no names for.
const (
	keyStream           = attribute.Key("messaging.nats.stream")
	keyStreamSequence   = attribute.Key("messaging.nats.stream_sequence")
	keyConsumerSequence = attribute.Key("messaging.nats.consumer_sequence")
	keyDuplicate        = attribute.Key("messaging.nats.duplicate")
	keySettlement       = attribute.Key("messaging.nats.settlement")
	keyReason           = attribute.Key("messaging.nats.dead_letter.reason")

	// KeyDeliveryCount counts the deliveries of a message, this one included.
	// A span has it when it starts if it is 2 or more, so that a sampler can
	// prefer retries.
	KeyDeliveryCount = attribute.Key("messaging.nats.delivery_count")
)

// Attributes of our metrics.
const (
	keyMetricSettlement = attribute.Key("settlement")
	keyMetricOutcome    = attribute.Key("outcome")
	keyMetricState      = attribute.Key("state")
	keyMetricReason     = attribute.Key("reason")
)

// Values of messaging.system and messaging.operation.type.
const (
	systemNATS  = "nats"
	typeSend    = "send"
	typeProcess = "process"
	typeSettle  = "settle"
)

// Values of messaging.operation.name, which also begin the names of spans.
const (
	opPublish = "publish"
	opProcess = "process"
	opBatch   = "batch"
	opAck     = "ack"
	opNak     = "nak"
	opTerm    = "term"

	opDeadLetter = "dead_letter"
	opReplay     = "replay"
)

// Values of outcome.
const (
	outcomeOK    = "ok"
	outcomeError = "error"

	outcomeSent        = "sent"         // a replay, by whoever sends it
	outcomeResolved    = "resolved"     // a replay was handled
	outcomeFailedAgain = "failed_again" // a replay was given up
)

// Stand-ins for destinations that are not declared: what comes from the wire
// never becomes an attribute of a metric or the name of a span.
const (
	TemplateUnmatched = "_unmatched" // a subject that no event declares
	TemplateInbox     = "_inbox"     // the reply subject of a request
	GroupExternal     = "_external"  // a consumer that is not the App's
	groupOther        = "_OTHER"     // one more consumer than are told apart
)

const errorTypeOther = "_OTHER"

// A Metric describes one instrument.
type Metric struct {
	Name        string
	Kind        MetricKind
	Unit        string // in UCUM, such as "s" and "{message}"
	Description string
	Attributes  []attribute.Key
	Buckets     []float64 // upper bounds, of a histogram
}

// A MetricKind is the kind of an instrument.
type MetricKind string

// The kinds of instruments.
const (
	Counter       MetricKind = "counter"
	UpDownCounter MetricKind = "up-down counter"
	Histogram     MetricKind = "histogram"
	Gauge         MetricKind = "gauge"
)

const unitMessage = "{message}"

// The bounds that the conventions ask for, in seconds.
var conventionBuckets = []float64{0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10}

// Messages may wait for hours.
var waitBuckets = []float64{0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600, 21600}

var attemptBuckets = []float64{1, 2, 3, 4, 5, 7, 10, 15, 20, 50}

var (
	metricOperationDuration = Metric{
		Name: "messaging.client.operation.duration", Kind: Histogram, Unit: "s", Buckets: conventionBuckets,
		Description: "Time that a publish took: a durable one until its acknowledgement, a core one until it was handed to the connection. " +
			"Settlements are not waited for, so they have none.",
		Attributes: []attribute.Key{keySystem, keyOperationName, keyOperationType, keyTemplate, keyErrorType},
	}
	metricProcessDuration = Metric{
		Name: "messaging.process.duration", Kind: Histogram, Unit: "s", Buckets: conventionBuckets,
		Description: "Time from when the handler got a message until it was settled, or the handler returned if that came first. " +
			"All messages of a batch start together.",
		Attributes: []attribute.Key{keySystem, keyOperationName, keyTemplate, keyConsumerGroup, keyErrorType},
	}
	metricSent = Metric{
		Name: "messaging.client.sent.messages", Kind: Counter, Unit: unitMessage,
		Description: "Messages published, and those that could not be, with an error.type.",
		Attributes:  []attribute.Key{keySystem, keyOperationName, keyTemplate, keyErrorType},
	}
	metricConsumed = Metric{
		Name: "messaging.client.consumed.messages", Kind: Counter, Unit: unitMessage,
		Description: "Messages given to a handler, once for each delivery.",
		Attributes:  []attribute.Key{keySystem, keyOperationName, keyTemplate, keyConsumerGroup},
	}
	metricSettlements = Metric{
		Name: "mono.settlements", Kind: Counter, Unit: unitMessage,
		Description: "Settlements sent to the server: ack, nak, nak_delay, term, in_progress. The outcome is error when one could not " +
			"be sent, in which case the message comes back after its AckWait. One that is sent again because the server missed it counts once. A nak that the retry policy delays is a nak_delay; " +
			"in_progress includes the leases that are extended while a handler runs.",
		Attributes: []attribute.Key{keyTemplate, keyConsumerGroup, keyMetricSettlement, keyMetricOutcome},
	}
	metricRedeliveries = Metric{
		Name: "mono.redeliveries", Kind: Counter, Unit: unitMessage,
		Description: "Deliveries after the first that were given to a handler.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricAttempts = Metric{
		Name: "mono.delivery.attempts", Kind: Histogram, Unit: "{attempt}", Buckets: attemptBuckets,
		Description: "Deliveries that a message took until its ack or term.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricQueueDuration = Metric{
		Name: "mono.queue.duration", Kind: Histogram, Unit: "s", Buckets: waitBuckets,
		Description: "Time from when a message was stored until its handler got it, at its first delivery. It compares the server's clock with this process's.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricEndToEnd = Metric{
		Name: "mono.end_to_end.duration", Kind: Histogram, Unit: "s", Buckets: waitBuckets,
		Description: "Time from when a message was stored until its ack. It compares the server's clock with this process's.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricActive = Metric{
		Name: "mono.handlers.active", Kind: UpDownCounter, Unit: unitMessage,
		Description: "Messages that handlers have now and have not settled.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricLate = Metric{
		Name: "mono.settlements.late", Kind: Counter, Unit: unitMessage,
		Description: "Messages settled after their lease had ended: the server may have delivered them again meanwhile.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricUnsettled = Metric{
		Name: "mono.unsettled", Kind: Counter, Unit: unitMessage,
		Description: "Messages that a handler left unsettled when it returned nil. They come back after their AckWait.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricRepeats = Metric{
		Name: "mono.repeats", Kind: Counter, Unit: unitMessage,
		Description: "Messages that were not handled, since the server had sourced them a second time and the consumer had finished the first. " +
			"They are acked, and counted as such, too.",
		Attributes: []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricPublishPending = Metric{
		Name: "mono.publish.pending", Kind: UpDownCounter, Unit: unitMessage,
		Description: "Asynchronous durable publishes that wait for their acknowledgement.",
		Attributes:  []attribute.Key{keyTemplate},
	}
	metricTraceContext = Metric{
		Name: "mono.trace_context", Kind: Counter, Unit: unitMessage,
		Description: "Trace context of the messages that handlers got: continued, linked (the message was not fresh), absent, or malformed. " +
			"Malformed also counts publishes with a malformed header, which is replaced. Dropped counts publishes that would have been " +
			"too large with it.",
		Attributes: []attribute.Key{keyTemplate, keyConsumerGroup, keyMetricState},
	}
	metricCaptured = Metric{
		Name: "mono.dead_letters.captured", Kind: Counter, Unit: unitMessage,
		Description: "Messages captured into the dead-letter stream, once for each.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup, keyMetricReason},
	}
	metricCaptureFailures = Metric{
		Name: "mono.dead_letters.capture_failures", Kind: Counter, Unit: unitMessage,
		Description: "Captures that failed, and outcomes of replays that could not be stored. The message is held and comes again.",
		Attributes:  []attribute.Key{keyTemplate, keyConsumerGroup},
	}
	metricReplayed = Metric{
		Name: "mono.dead_letters.replayed", Kind: Counter, Unit: unitMessage,
		Description: "Replays of dead letters: sent, counted by whoever sends them; resolved or failed_again, counted by the consumer " +
			"when that is stored on the dead letter, once for each.",
		Attributes: []attribute.Key{keyTemplate, keyConsumerGroup, keyMetricOutcome},
	}
	metricDeadLettersOpen = Metric{
		Name: "mono.dead_letters.open", Kind: Gauge, Unit: unitMessage,
		Description: "Dead letters that are still to be dealt with: those that are open, those that failed again, and those that are being replayed, " +
			"as long as their consumer has not handled them; not those that are resolved, sent to others, archived or discarded. " +
			"By the dead-letter stream, and the consumer that gave up: _external for all that are not an App's, _OTHER for those after the first hundred. " +
			"Every instance of every App with this stream reports the same numbers: take the max of them, not the sum. " +
			"Absent while they are not known, as when a large stream is read for the first time.",
		Attributes: []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricDeadLettersOldestAge = Metric{
		Name: "mono.dead_letters.oldest_age", Kind: Gauge, Unit: "s",
		Description: "Time since the oldest of those dead letters was given up, in whole seconds; 0 when none is open. " +
			"It compares the clock of the process that gave it up with this one's. Take the max, too.",
		Attributes: []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricConsumerPending = Metric{
		Name: "mono.consumer.pending", Kind: Gauge, Unit: unitMessage,
		Description: "Messages that the durable consumer has yet to deliver for the first time.",
		Attributes:  []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricAckPending = Metric{
		Name: "mono.consumer.ack_pending", Kind: Gauge, Unit: unitMessage,
		Description: "Messages delivered and not settled, those that wait for their next attempt included.",
		Attributes:  []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricAckPendingLimit = Metric{
		Name: "mono.consumer.ack_pending.limit", Kind: Gauge, Unit: unitMessage,
		Description: "The consumer's MaxAckPending: at this number the server stops delivering. Absent when there is no limit.",
		Attributes:  []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricWaiting = Metric{
		Name: "mono.consumer.waiting", Kind: Gauge, Unit: "{request}",
		Description: "Pull requests of all instances that wait at the server. With messages pending and none waiting, nobody fetches.",
		Attributes:  []attribute.Key{keyStream, keyConsumerGroup},
	}
	metricOldestAge = Metric{
		Name: "mono.consumer.oldest_unprocessed.age", Kind: Gauge, Unit: "s",
		Description: "Age of the oldest message that the consumer has not acked, 0 when there is none.",
		Attributes:  []attribute.Key{keyStream, keyConsumerGroup},
	}
)

// Metrics lists every metric that an App records, in the order of the
// documentation.
func Metrics() []Metric {
	return slices.Clone([]Metric{
		metricOperationDuration, metricProcessDuration, metricSent, metricConsumed,
		metricSettlements, metricRedeliveries, metricAttempts, metricQueueDuration, metricEndToEnd,
		metricActive, metricLate, metricUnsettled, metricRepeats, metricPublishPending, metricTraceContext,
		metricCaptured, metricCaptureFailures, metricReplayed, metricDeadLettersOpen, metricDeadLettersOldestAge,
		metricConsumerPending, metricAckPending, metricAckPendingLimit, metricWaiting, metricOldestAge,
	})
}
