package messaging

import (
	"cmp"
	"context"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
)

// A DeadLetter is one that is to be replayed, as telemetry sees it.
type DeadLetter struct {
	// Template is the declared subject of its event. The default is
	// [TemplateUnmatched]: a subject that the dead letter names may be any.
	Template string

	Subject  string // where it is sent
	Stream   string // that stores it there; "" if that is not known
	Consumer string // durable name of the consumer that failed

	Traceparent string // of the dead letter itself, "" if there is none
	Origin      string // of the publish that it comes from, "" if there is none
}

// A Replay is one dead letter that is being sent again.
type Replay struct {
	t     *Telemetry
	route Route
	span  trace.Span // nil: there is none

	// Header is to be sent with the message: the trace context of the replay. It is
	// nil if there is none.
	Header nats.Header
}

// Replay begins to send a dead letter again, in a trace of its own: that of who
// sends thousands would have no end. It is linked to the dead letter, to the
// origin, and to the span in ctx.
func (t *Telemetry) Replay(ctx context.Context, d *DeadLetter) (o Replay) {
	o = Replay{t: t, route: Route{Template: cmp.Or(d.Template, TemplateUnmatched), Group: d.Consumer}}
	defer contain()
	tracer := t.tracers.get()
	if tracer == nil {
		return o
	}
	opts := []trace.SpanStartOption{
		trace.WithSpanKind(trace.SpanKindProducer), trace.WithNewRoot(),
		// A sampler sees to it that this is recorded by the name of the operation.
		trace.WithAttributes(keyOperationName.String(opReplay), keyOperationType.String(typeSend), keyTemplate.String(o.route.Template)),
	}
	links := replayLinks([]string{d.Traceparent, d.Origin})
	if sc := trace.SpanContextFromContext(ctx); sc.IsValid() {
		links = append(links, trace.Link{SpanContext: sc})
	}
	if len(links) > 0 {
		opts = append(opts, trace.WithLinks(links...))
	}
	started, span := tracer.Start(Bare(ctx), opReplay+" "+o.route.Template, opts...)
	if started == nil || span == nil {
		return o
	}
	o.span = span
	if span.IsRecording() {
		attrs := []attribute.KeyValue{
			keySystem.String(systemNATS), keyConsumerGroup.String(clean(d.Consumer, maxAttribute)),
			keyDestination.String(clean(d.Subject, maxAttribute)),
		}
		if d.Stream != "" {
			attrs = append(attrs, keyStream.String(clean(d.Stream, maxAttribute)))
		}
		span.SetAttributes(t.withServer(attrs)...)
	}
	if span.SpanContext().IsValid() {
		o.Header = t.inject(trace.ContextWithSpanContext(Bare(ctx), span.SpanContext()), nil)
	}
	return o
}

// End ends the replay: sent, or not because of err.
func (o *Replay) End(err error) {
	defer end(o.span)
	defer contain()
	if err != nil {
		name, _ := o.t.errors.of(err)
		fail(o.span, name)
		return
	}
	o.t.sent(o.route).n.Add(1)
}

// sent counts the replays to a consumer. Who is named in dead letters is bounded by
// nothing, and series are.
func (t *Telemetry) sent(r Route) *replayCount {
	const most = 1000
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.replays[r]
	if n == nil && len(t.replays) >= most {
		r = Route{Template: TemplateUnmatched, Group: groupOther}
		n = t.replays[r]
	}
	if n == nil {
		n = &replayCount{attrs: []attribute.KeyValue{
			keyTemplate.String(r.Template), keyConsumerGroup.String(clean(r.Group, maxAttribute)), keyMetricOutcome.String(outcomeSent),
		}}
		t.replays[r] = n
	}
	return n
}

// A replayCount counts the replays to one consumer.
type replayCount struct {
	count

	attrs []attribute.KeyValue
}

// maxReplayLinks bounds the links that a message asks for.
const maxReplayLinks = 2

// replayLinks reads traceparents and leaves out what is none, or there already, as
// where the attempt was not recorded.
func replayLinks(values []string) []trace.Link {
	const longest = 256 // of what is worth a look
	var links []trace.Link
	for _, v := range values {
		if len(v) > longest {
			continue
		}
		for p := range strings.FieldsSeq(v) {
			ctx := propagation.TraceContext{}.Extract(context.Background(), //nolint:forbidigo // it only carries the result
				propagation.MapCarrier{traceparent: p})
			sc := trace.SpanContextFromContext(ctx)
			known := slices.ContainsFunc(links, func(l trace.Link) bool { return l.SpanContext.Equal(sc) })
			if sc.IsValid() && !known && len(links) < maxReplayLinks {
				links = append(links, trace.Link{SpanContext: sc})
			}
		}
	}
	return links
}

// An Outcome is what has come of a replay, as it is being written down.
type Outcome struct {
	c *Consumer

	// Header is to be sent with it: the trace context of the attempt that it comes
	// of. It is nil if there is none.
	Header nats.Header
	// Attempt and Origin are the traceparents of that attempt and of the replay, ""
	// if there is none.
	Attempt, Origin string
}

// Outcome begins to write down what has come of a replay.
func (c *Consumer) Outcome(ctx context.Context, d *Delivery, m *Message) (o Outcome) {
	o = Outcome{c: c}
	defer contain()
	_, origin, _ := c.t.extract(Bare(ctx), m.Header)
	o.Origin = traceparentOf(origin)
	if d.span != nil && d.span.SpanContext().IsValid() {
		o.Attempt = traceparentOf(d.span.SpanContext())
		o.Header = c.t.inject(trace.ContextWithSpanContext(Bare(ctx), d.span.SpanContext()), nil)
	}
	return o
}

// End says that the outcome is stored, or not because of err. written is false if
// it was stored before.
func (o *Outcome) End(failed, written bool, err error) {
	switch {
	case err != nil:
		o.c.captureFailures.n.Add(1)
	case written && failed:
		o.c.failedAgain.n.Add(1)
	case written:
		o.c.resolved.n.Add(1)
	}
}
