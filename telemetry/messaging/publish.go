package messaging

import (
	"context"
	"slices"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// A Publisher records publishes to one destination. It is safe for concurrent
// use.
type Publisher struct {
	t         *Telemetry
	spanName  string
	spanStart []trace.SpanStartOption // the kind, and what samplers may look at
	base      []attribute.KeyValue

	duration           histogramOptions
	sent               count
	failed             perError[publishFailure]
	pending            count
	malformed, dropped count // trace contexts
}

// publishFailure is what is recorded of one type of error.
type publishFailure struct {
	count

	errorType attribute.KeyValue
	duration  *[]metric.RecordOption
}

// Publisher returns the publisher to a destination: the declared subject of an
// event, or one of the stand-ins. Call it once for each and keep it; there is one
// set of metrics for each.
func (t *Telemetry) Publisher(template string) *Publisher {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p := t.publishers[template]; p != nil {
		return p
	}
	// The count of messages has all but the first, what is the destination's alone the last. What a span
	// does not begin with is the second.
	p := &Publisher{t: t, spanName: opPublish + " " + template, base: []attribute.KeyValue{
		keyOperationType.String(typeSend), keySystem.String(systemNATS), keyOperationName.String(opPublish),
		keyTemplate.String(template),
	}}
	p.spanStart = []trace.SpanStartOption{
		trace.WithSpanKind(trace.SpanKindProducer),
		trace.WithAttributes(keyOperationName.String(opPublish), keyOperationType.String(typeSend), keyTemplate.String(template)),
	}
	p.duration.attrs = p.base
	t.publishers[template] = p
	return p
}

func (p *Publisher) observe(o metric.Observer) {
	i, counted, own := &p.t.instruments, p.base[1:], p.base[len(p.base)-1:] // see Publisher
	p.sent.observe(o, i.sent, false, counted)
	for f := range p.failed.all {
		f.observe(o, i.sent, false, counted, f.errorType)
	}
	p.malformed.observe(o, i.traceContext, false, own, contextAttrs[stateMalformed]...)
	p.dropped.observe(o, i.traceContext, false, own, contextAttrs[stateDropped]...)
	p.pending.observe(o, i.publishPending, p.sent.n.Load() != 0, own)
}

// A Publish is one publish that is going on. Its methods are for one goroutine
// at a time; the zero value records nothing.
type Publish struct {
	p     *Publisher
	span  trace.Span      // nil: there is none
	ctx   context.Context //nolint:containedctx // that of the span, for exemplars, else the caller's
	begin time.Time
	attrs *[]attribute.KeyValue // of the span, set when it ends; nil if it does not record
	fixed uint8                 // how many of them are those of all publishes
	async bool

	header *traceHeader // what Inject returned; nil if it is of no use to others
}

// Start begins a publish. The returned context carries its span.
func (p *Publisher) Start(ctx context.Context) (out context.Context, o Publish) {
	o, out = Publish{p: p, ctx: ctx}, ctx
	defer contain()
	if p.t.instruments.operationDuration.Enabled(ctx) {
		o.begin = time.Now()
	}
	tracer := p.t.tracers.get()
	if tracer == nil || tracer.drops(trace.SpanContextFromContext(ctx)) {
		return out, o
	}
	opts, attrs := p.spanStart, p.base[1:2] // see Publisher
	if tracer.follows {
		opts, attrs = opts[:1:1], p.base
	}
	started, span := tracer.Start(ctx, p.spanName, opts...)
	if started == nil || span == nil {
		return out, o
	}
	out, o.ctx, o.span = started, started, span
	if span.IsRecording() {
		o.attrs, o.fixed = takeAttrs(), uint8(len(attrs)) //nolint:gosec // a few
		*o.attrs = append(*o.attrs, attrs...)
	}
	return out, o
}

// Inject returns the header to send: h, or a copy of it with the trace context,
// and whether it is that. A copy is not to be changed, nor used when the publish has
// ended well. What the caller set himself is kept, and linked to. A message that the
// server would not take with a larger header, or with any, goes without. core says
// that the message is not stored.
func (o *Publish) Inject(subject string, h nats.Header, size int, core bool) (out nats.Header, injected bool) {
	out = h
	if o.p == nil {
		return out, false
	}
	defer contain()
	t := o.p.t
	if o.attrs != nil {
		o.describe(subject, h, size)
	}
	if Carrier(h).has(t.fields) {
		_, sc, state := t.extract(Bare(o.ctx), h)
		if state == stateContinued {
			if o.span != nil {
				o.span.AddLink(trace.Link{SpanContext: sc})
			}
			return out, false
		}
		o.p.malformed.n.Add(1)
	}
	sc := trace.SpanContextFromContext(o.ctx) // the caller's, where there is no span
	switch {
	case !sc.IsValid() && (len(t.settings.Baggage) == 0 || baggage.FromContext(o.ctx).Len() == 0):
		return out, false
	case core && t.settings.OmitUnsampledCore && !sc.IsSampled():
		return out, false
	}
	if with := o.inject(h); t.takes(with, size) {
		return with, true
	}
	o.Drop()
	return out, false
}

// inject is Telemetry.inject, with a header that is used again when the publish has
// ended well.
func (o *Publish) inject(h nats.Header) nats.Header {
	if o.p.t.w3c && len(h) == 0 {
		if v, ok := newTraceparent(o.ctx); ok {
			if o.header == nil { // else it is sent again
				o.header = traceHeaders.Get().(*traceHeader) //nolint:forcetypeassert // see New
			}
			o.header.value[0] = v
			return o.header.header
		}
	}
	return o.p.t.inject(o.ctx, h)
}

// Drop counts a trace context that is not sent, since the message would be
// refused with it.
func (o *Publish) Drop() {
	if o.p != nil {
		o.p.dropped.n.Add(1)
	}
}

// msgIDHeader is the header by which the server finds duplicates.
const msgIDHeader = nats.MsgIdHdr

// describe collects what samplers do not need.
func (o *Publish) describe(subject string, h nats.Header, size int) {
	attrs := (*o.attrs)[:o.fixed] // the rest is there if it is sent again
	attrs = append(attrs, keyDestination.String(clean(subject, maxAttribute)))
	if id := h.Get(msgIDHeader); id != "" {
		attrs = append(attrs, keyMessageID.String(clean(id, maxAttribute)))
	}
	if o.p.t.settings.BodySize {
		attrs = append(attrs, keyBodySize.Int(size))
	}
	*o.attrs = o.p.t.withServer(attrs)
}

// Over reports whether o is the zero value, as where somebody else has taken the
// publish and ended it.
func (o *Publish) Over() bool { return o.p == nil }

// Pending says that the publish waits for its acknowledgement while its caller
// goes on, until End.
func (o *Publish) Pending() {
	if o.p != nil {
		o.async = true
		o.p.pending.n.Add(1)
	}
}

// Cancel takes Pending back: the publish was not sent.
func (o *Publish) Cancel() {
	if o.async {
		o.async = false
		o.p.pending.n.Add(-1)
	}
}

// Stored adds what the server acknowledged.
func (o *Publish) Stored(stream string, sequence uint64, duplicate bool) {
	if o.attrs == nil {
		return
	}
	defer contain()
	*o.attrs = append(*o.attrs, keyStream.String(clean(stream, maxAttribute)), sequenceAttr(keyStreamSequence, sequence))
	if duplicate {
		*o.attrs = append(*o.attrs, keyDuplicate.Bool(true))
	}
}

func sequenceAttr(k attribute.Key, n uint64) attribute.KeyValue {
	return k.Int64(int64(n)) //nolint:gosec // sequences stay below 2^63 for longer than the sun burns
}

// End ends the publish with its outcome.
func (o *Publish) End(err error) {
	if o.p == nil {
		return
	}
	if o.header != nil {
		if err == nil { // else it may still be being sent
			traceHeaders.Put(o.header)
		}
		o.header = nil
	}
	if err == nil && o.span == nil && o.begin.IsZero() { // all that there is, in a program without telemetry
		o.Cancel()
		o.p.sent.n.Add(1)
		return
	}
	defer end(o.span)
	defer contain()
	i := &o.p.t.instruments
	o.Cancel()
	if o.attrs != nil {
		o.span.SetAttributes(*o.attrs...)
		o.p.t.giveAttrs(o.attrs)
		o.attrs = nil
	}
	opts := o.p.duration.options()
	if err == nil {
		o.p.sent.n.Add(1)
	} else {
		name, f := o.p.failure(err)
		f.n.Add(1)
		fail(o.span, name)
		opts = f.duration
	}
	if !o.begin.IsZero() {
		i.operationDuration.Record(o.ctx, time.Since(o.begin).Seconds(), *opts...)
	}
}

// failure returns what is recorded of err.
func (p *Publisher) failure(err error) (errorType string, f *publishFailure) {
	name, number := p.t.errors.of(err)
	return name, p.failed.get(number, func() *publishFailure {
		errType := keyErrorType.String(name)
		return &publishFailure{errorType: errType, duration: recordOptions(append(slices.Clip(p.base), errType)...)}
	})
}

// end ends a span, by itself: what goes wrong there, or before, stays there.
func end(span trace.Span) {
	if span == nil {
		return
	}
	defer contain()
	span.End()
}

// fail marks a span. The text of an error may hold what is not meant to be
// stored, so the type has to do.
func fail(span trace.Span, errorType string) {
	if span != nil && span.IsRecording() {
		span.SetStatus(codes.Error, errorType)
		span.SetAttributes(keyErrorType.String(errorType))
	}
}
