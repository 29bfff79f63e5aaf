package messaging

import (
	"cmp"
	"context"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// A Capture is one dead letter that is being captured.
type Capture struct {
	c      *Consumer
	reason string
	span   trace.Span // nil: there is none

	// Header is to be sent with the record: the trace context of the capture.
	Header nats.Header
	// Attempt and Origin are the traceparents of the attempt that failed and of
	// the publish, "" if there is none.
	Attempt, Origin string
}

// CaptureDeadLetters has the consumer report captures for these reasons, from the
// start, failures, and the outcomes of replays. Call it before the first message.
func (c *Consumer) CaptureDeadLetters(reasons []string) {
	captured := make([]captureCount, len(reasons))
	for i, r := range reasons {
		captured[i].reason = c.t.reasonAttrs(r)
	}
	c.captured.Store(&captured)
}

// A captureCount counts captures for one reason.
type captureCount struct {
	count

	reason []attribute.KeyValue
}

// reasonAttrs are the same for all consumers.
func (t *Telemetry) reasonAttrs(reason string) []attribute.KeyValue {
	t.mu.Lock()
	defer t.mu.Unlock()
	attrs := t.reasons[reason]
	if attrs == nil {
		attrs = []attribute.KeyValue{keyMetricReason.String(reason)}
		t.reasons[reason] = attrs
	}
	return attrs
}

func (c *Consumer) observeCaptures(o metric.Observer) {
	captured := c.captured.Load()
	if captured == nil {
		return
	}
	i, own := &c.t.instruments, c.own.attrs
	for k := range *captured {
		n := &(*captured)[k]
		n.observe(o, i.captured, true, own, n.reason...)
	}
	c.captureFailures.observe(o, i.captureFailures, true, own)
	durable := c.route.Stream != ""
	c.resolved.observe(o, i.replayed, durable, own, resolvedAttrs...)
	c.failedAgain.observe(o, i.replayed, durable, own, failedAgainAttrs...)
}

// Capture begins the capture of a message into a dead-letter stream: in the trace of
// the attempt that failed, or, where no handler has seen it, in one of its own. It
// is linked to the publish. ctx is what Start returned for the attempt.
func (c *Consumer) Capture(ctx context.Context, d *Delivery, m *Message, stream, reason string) (o Capture) {
	o = Capture{c: c, reason: reason}
	defer contain()
	_, origin, _ := c.t.extract(Bare(ctx), m.Header)
	o.Origin = traceparentOf(origin)
	parent := Bare(ctx)
	if d.begin != 0 {
		parent = ctx
		o.Attempt = traceparentOf(trace.SpanContextFromContext(ctx))
	}
	tracer := c.t.tracers.get()
	if tracer == nil {
		return o
	}
	opts := []trace.SpanStartOption{
		trace.WithSpanKind(trace.SpanKindProducer),
		// A sampler sees to it that this is recorded by the name of the operation.
		trace.WithAttributes(keyOperationName.String(opDeadLetter), keyOperationType.String(typeSend),
			keyTemplate.String(stream), keyReason.String(reason)),
	}
	if origin.IsValid() {
		opts = append(opts, trace.WithLinks(trace.Link{SpanContext: origin}))
	}
	started, span := tracer.Start(parent, opDeadLetter+" "+stream, opts...)
	if started == nil || span == nil {
		return o
	}
	o.span = span
	if span.IsRecording() {
		span.SetAttributes(keySystem.String(systemNATS), keyConsumerGroup.String(clean(cmp.Or(m.Consumer, c.route.Group), maxAttribute)),
			keyDestination.String(clean(m.Subject, maxAttribute)), keyStream.String(clean(cmp.Or(m.Stream, c.route.Stream), maxAttribute)),
			sequenceAttr(keyStreamSequence, d.Sequence), attemptAttr(d))
	}
	if span.SpanContext().IsValid() {
		o.Header = c.t.inject(trace.ContextWithSpanContext(Bare(ctx), span.SpanContext()), nil)
	}
	return o
}

// End ends the capture: stored, stored before, or not because of err.
func (o *Capture) End(captured bool, err error) {
	defer end(o.span)
	defer contain()
	if err != nil {
		o.c.captureFailures.n.Add(1)
		name, _ := o.c.t.errors.of(err)
		fail(o.span, name)
		return
	}
	if !captured {
		if o.span != nil {
			o.span.SetAttributes(keyDuplicate.Bool(true))
		}
		return
	}
	if all := o.c.captured.Load(); all != nil {
		for i := range *all {
			if n := &(*all)[i]; n.reason[0].Value.AsString() == o.reason {
				n.n.Add(1)
			}
		}
	}
}

// ErrorType is the value of error.type for an error.
func (t *Telemetry) ErrorType(err error) string {
	name, _ := t.errors.of(err)
	return name
}

// traceparentOf is the W3C's form of a trace context.
func traceparentOf(sc trace.SpanContext) string {
	if !sc.IsValid() {
		return ""
	}
	return formatTraceparent(sc)
}
