package messaging

import (
	"context"
	"slices"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"
)

// A Route is what a consumer consumes, and as who.
type Route struct {
	Template string // the declared subject of the event
	Group    string // the durable name, or the queue group
	Stream   string // "" for core NATS
}

// A Settlement is what a consumer says to the server about a message.
type Settlement uint8

// The settlements.
const (
	Ack Settlement = iota
	Nak
	NakDelay
	Term
	settlements = iota
)

var settlementNames = [settlements]string{opAck, opNak, "nak_delay", opTerm}

const inProgress = "in_progress"

func (s Settlement) String() string { return settlementNames[s] }

// operation is the name of the operation: a nak is one with and without delay.
func (s Settlement) operation() string {
	switch s {
	case Ack:
		return opAck
	case Nak, NakDelay:
		return opNak
	default:
		return opTerm
	}
}

// settleAttrs are those of a settlement's span, whichever the consumer. The first is
// of the processing, too, where the rest is, one click away.
var settleAttrs = each(settlementNames, func(s int, name string) []attribute.KeyValue {
	return []attribute.KeyValue{
		keySettlement.String(name), keySystem.String(systemNATS),
		keyOperationName.String(Settlement(s).operation()), keyOperationType.String(typeSettle),
	}
})

// What is of a series alone, whichever the consumer.
var (
	settledAttrs = each(settlementNames, func(_ int, name string) []attribute.KeyValue {
		return settlementAttrs(name, outcomeOK)
	})
	notSettledAttrs = each(settlementNames, func(_ int, name string) []attribute.KeyValue {
		return settlementAttrs(name, outcomeError)
	})
	contextAttrs     = eachContextState()
	extendedAttrs    = settlementAttrs(inProgress, outcomeOK)
	notExtendedAttrs = settlementAttrs(inProgress, outcomeError)
	resolvedAttrs    = []attribute.KeyValue{keyMetricOutcome.String(outcomeResolved)}
	failedAgainAttrs = []attribute.KeyValue{keyMetricOutcome.String(outcomeFailedAgain)}
)

func each(names [settlements]string, attrs func(int, string) []attribute.KeyValue) (all [settlements][]attribute.KeyValue) {
	for i, name := range names {
		all[i] = attrs(i, name)
	}
	return all
}

func eachContextState() (all [contextStates][]attribute.KeyValue) {
	for i, name := range contextStateNames {
		all[i] = []attribute.KeyValue{keyMetricState.String(name)}
	}
	return all
}

func settlementAttrs(name, outcome string) []attribute.KeyValue {
	return []attribute.KeyValue{keyMetricSettlement.String(name), keyMetricOutcome.String(outcome)}
}

// A Consumer records what one consumer does. It is safe for concurrent use.
type Consumer struct {
	t     *Telemetry
	route Route

	spanName   string
	spanStart  []trace.SpanStartOption // the kind, and what samplers may look at
	batchName  string
	batchStart []trace.SpanStartOption
	fixed      []attribute.KeyValue // of all spans, those that they start with first
	settleName [settlements]string
	template   attribute.KeyValue

	consumed, redeliveries, late, unsettled, active count
	contexts                                        [contextStates]count
	settled, notSettled                             [settlements]count
	extended, notExtended, captureFailures          count
	resolved, failedAgain                           count // replays
	repeats                                         count
	captured                                        atomic.Pointer[[]captureCount]

	own         histogramOptions     // of our histograms
	measured    []attribute.KeyValue // of the conventions' metrics
	processed   histogramOptions
	processErrs perError[[]metric.RecordOption]

	state      atomic.Pointer[ConsumerState]
	stateAttrs []metric.ObserveOption
}

// startAttrs is how many attributes the span of a message starts with, those that
// samplers may look at.
const startAttrs = 3

// Consumer returns the consumer of a route. Call it once for each and keep it.
func (t *Telemetry) Consumer(r Route) *Consumer {
	t.mu.Lock()
	defer t.mu.Unlock()
	if c := t.consumers[r]; c != nil {
		return c
	}
	c := &Consumer{t: t, route: r, spanName: opProcess + " " + r.Template, batchName: opBatch + " " + r.Template}
	template, group := keyTemplate.String(r.Template), keyConsumerGroup.String(clean(r.Group, maxAttribute))
	c.template = template
	c.fixed = []attribute.KeyValue{
		keyOperationName.String(opProcess), keyOperationType.String(typeProcess), template, keySystem.String(systemNATS), group,
	}
	c.spanStart = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindConsumer), trace.WithAttributes(c.fixed[:startAttrs]...)}
	c.batchStart = []trace.SpanStartOption{
		trace.WithSpanKind(trace.SpanKindConsumer), trace.WithNewRoot(),
		trace.WithAttributes(keySystem.String(systemNATS), keyOperationName.String(opBatch), keyOperationType.String(typeProcess),
			template, group),
	}
	c.measured = []attribute.KeyValue{keySystem.String(systemNATS), keyOperationName.String(opProcess), template, group}
	c.processed.attrs = c.measured
	c.own.attrs = c.measured[len(c.measured)-2:] // template and group
	for s := range Settlement(settlements) {
		c.settleName[s] = s.operation() + " " + r.Template
	}
	c.stateAttrs = observeOptions(keyStream.String(r.Stream), group)
	t.consumers[r] = c
	return c
}

func (c *Consumer) observe(o metric.Observer) {
	i, own := &c.t.instruments, c.own.attrs
	durable := c.route.Stream != ""
	c.consumed.observe(o, i.consumed, false, c.measured)
	c.active.observe(o, i.active, true, own)
	for s := range c.contexts {
		c.contexts[s].observe(o, i.traceContext, false, own, contextAttrs[s]...)
	}
	// What people are alerted by is there from the start: the first increase of a
	// series that was not there before is not seen by Prometheus.
	c.redeliveries.observe(o, i.redeliveries, durable, own)
	c.late.observe(o, i.late, durable, own)
	c.unsettled.observe(o, i.unsettled, durable, own)
	for s := range Settlement(settlements) {
		c.settled[s].observe(o, i.settlements, durable, own, settledAttrs[s]...)
		c.notSettled[s].observe(o, i.settlements, false, own, notSettledAttrs[s]...)
	}
	c.extended.observe(o, i.settlements, false, own, extendedAttrs...)
	c.notExtended.observe(o, i.settlements, false, own, notExtendedAttrs...)
	c.repeats.observe(o, i.repeats, false, own)
	c.observeCaptures(o)
	c.observeState(o)
}

// A Message is what a delivery brings.
type Message struct {
	Subject          string
	Header           nats.Header
	Size             int
	ConsumerSequence uint64

	// Of a consumer that is not the App's: where it consumes, and as who.
	Stream, Consumer string

	// Of a replay: the traceparents of the dead letter and of its origin, in any
	// number of values, with spaces between them. More than two are not linked to.
	Links []string
}

// A Delivery is one message in the hands of a handler. It is meant to be part of
// a larger struct, and there is one for each message, so it is small. What is done
// with it is safe for concurrent use once Start has returned; of the zero value
// nothing is recorded but settlements.
type Delivery struct {
	// What the server says of the delivery, to be set before Start; zero for core
	// NATS.
	Sequence uint64 // in the stream
	Stored   int64  // when the stream stored it, as Unix time in nanoseconds
	Attempt  uint32 // counted from 1

	flags atomic.Uint32
	begin time.Duration         // since epoch; 0: it has not begun
	span  trace.Span            // nil: there is none
	attrs *[]attribute.KeyValue // of the span, set when it ends; nil if it does not record
}

// The flags of a Delivery.
const (
	flagEnded uint32 = 1 << iota
	flagLeft         // the handler has returned
)

// epoch is where times begin that only differences are made of, by a clock that
// nobody sets.
var epoch = time.Now()

// Start begins the processing of a message, in a trace of its own or in that of
// its publish, and returns the context to handle it with. The other methods want
// that context, too. ctx has no span, see Bare. now is the time, so that a batch
// reads the clock once; for core NATS it may be zero if nobody wants to know, see
// Timed.
func (c *Consumer) Start(ctx context.Context, d *Delivery, m *Message, now time.Time) (out context.Context) {
	d.begin = max(now.Sub(epoch), 1)
	out = ctx //nolint:wastedassign // what is returned when a hook panics
	c.consumed.n.Add(1)
	c.active.n.Add(1)
	if d.Attempt > 1 {
		c.redeliveries.n.Add(1)
	}
	defer contain()
	parent, sc, state := c.t.extract(ctx, m.Header)
	fresh := d.Attempt <= 1 && (d.Stored == 0 || c.t.freshFor > 0 && time.Duration(now.UnixNano()-d.Stored) < c.t.freshFor)
	if state == stateContinued && !fresh {
		state = stateLinked
	}
	c.contexts[state].n.Add(1)
	if state == stateLinked {
		parent = trace.ContextWithSpan(parent, noSpan) // baggage stays
	}
	out = parent
	if tracer := c.t.tracers.get(); tracer != nil {
		out = c.startSpan(out, tracer, d, m, sc, state)
	}
	if d.Attempt == 1 && c.t.instruments.queueDuration.Enabled(out) { // after the span, which exemplars lead to
		c.t.instruments.queueDuration.Record(out, seconds(now.UnixNano()-d.Stored), *c.own.options()...)
	}
	return out
}

// seconds are those of a duration in nanoseconds between two clocks, which may
// disagree.
func seconds(ns int64) float64 { return max(time.Duration(ns).Seconds(), 0) }

// startSpan begins the span of a message whose trace context sc is.
func (c *Consumer) startSpan(parent context.Context, tr *tracer, d *Delivery, m *Message, sc trace.SpanContext, state contextState) (
	out context.Context,
) {
	out = parent
	defer contain()
	opts, later := c.spanStart, c.fixed[startAttrs:]
	linked := d.Attempt > 1 || state == stateLinked || len(m.Links) > 0
	switch {
	case linked:
		opts = c.startOptions(d, m, sc)
	case tr.drops(sc):
		return out
	case tr.follows:
		opts, later = opts[:1:1], c.fixed
	}
	started, span := tr.Start(parent, c.spanName, opts...)
	if started == nil || span == nil {
		return out
	}
	d.span, out = span, started
	if span.IsRecording() {
		c.describe(d, m, later)
		if state == stateContinued && d.Attempt > 0 && !linked {
			span.AddLink(trace.Link{SpanContext: sc})
		}
	}
	return out
}

// startOptions are those of a span that begins a trace although there was one
// before, or of a replay. A sampler sees its links.
func (c *Consumer) startOptions(d *Delivery, m *Message, sc trace.SpanContext) []trace.SpanStartOption {
	const more = 3
	opts := append(make([]trace.SpanStartOption, 0, len(c.spanStart)+more), c.spanStart...)
	links := make([]trace.Link, 0, 2+maxReplayLinks) //nolint:mnd // the publish, and the attempt before
	if sc.IsValid() {
		links = append(links, trace.Link{SpanContext: sc})
	}
	if d.Attempt > 1 {
		opts = append(opts, trace.WithAttributes(attemptAttr(d)))
		if last, ok := c.t.attempts.take(attemptKey{c, d.Sequence}); ok {
			links = append(links, trace.Link{SpanContext: last})
		}
	}
	links = append(links, replayLinks(m.Links)...)
	if len(links) > 0 {
		opts = append(opts, trace.WithLinks(links...))
	}
	return opts
}

// describe collects what the span did not start with: the given attributes, and
// those of the message.
func (c *Consumer) describe(d *Delivery, m *Message, attrs []attribute.KeyValue) {
	d.attrs = takeAttrs()
	attrs = append(*d.attrs, attrs...)
	attrs = append(attrs, keyDestination.String(clean(m.Subject, maxAttribute)))
	if id := m.Header.Get(msgIDHeader); id != "" {
		attrs = append(attrs, keyMessageID.String(clean(id, maxAttribute)))
	}
	if c.t.settings.BodySize {
		attrs = append(attrs, keyBodySize.Int(m.Size))
	}
	if c.route.Stream != "" {
		attrs = append(attrs, keyStream.String(c.route.Stream),
			sequenceAttr(keyStreamSequence, d.Sequence), sequenceAttr(keyConsumerSequence, m.ConsumerSequence))
		if d.Attempt == 1 { // the others began with it
			attrs = append(attrs, attemptAttr(d))
		}
	}
	*d.attrs = c.t.withServer(attrs)
}

// unsettled takes the place of a Settlement where there was none.
const unsettled = -1

func attemptAttr(d *Delivery) attribute.KeyValue { return KeyDeliveryCount.Int64(int64(d.Attempt)) }

// open reports whether the processing has begun, and not ended.
func (d *Delivery) open() bool { return d.begin != 0 && d.flags.Load()&flagEnded == 0 }

// end closes the processing once, whoever comes first: the settlement or the
// handler's return. It reports whether it did. now is the time, zero if nobody wants
// to know how long things take.
func (c *Consumer) end(ctx context.Context, d *Delivery, settlement int, err error, now time.Time) (first bool) {
	if d.begin == 0 || d.flags.Or(flagEnded)&flagEnded != 0 {
		return false
	}
	c.active.n.Add(-1)
	if err == nil && d.span == nil && now.IsZero() { // all that there is, in a program without telemetry
		return true
	}
	defer end(d.span)
	defer contain()
	opts := c.processed.options()
	if err != nil {
		var name string
		name, opts = c.failure(err)
		fail(d.span, name)
	}
	if d.attrs != nil { // in one call, as the SDK copies what it has with each
		switch {
		case settlement >= 0:
			*d.attrs = append(*d.attrs, settleAttrs[settlement][0])
		case d.Attempt > 0:
			*d.attrs = append(*d.attrs, keySettlement.String("unsettled"))
		}
		d.span.SetAttributes(*d.attrs...)
		c.t.giveAttrs(d.attrs)
		d.attrs = nil
	}
	if !now.IsZero() {
		c.t.instruments.processDuration.Record(ctx, (now.Sub(epoch) - d.begin).Seconds(), *opts...)
	}
	return true
}

// failure returns what is recorded of a processing that failed.
func (c *Consumer) failure(err error) (string, *[]metric.RecordOption) {
	errorType, number := c.t.errors.of(err)
	return errorType, c.processErrs.get(number, func() *[]metric.RecordOption {
		return recordOptions(append(slices.Clip(c.measured), keyErrorType.String(errorType))...)
	})
}

// Return says that the handler has returned and left the message as it was. With
// a nil err, of a durable consumer, that is counted as unsettled.
func (c *Consumer) Return(ctx context.Context, d *Delivery, err error) {
	if c.abandon(ctx, d, err) && err == nil && d.Attempt > 0 {
		c.unsettled.n.Add(1)
	}
}

// Abandon says that the message is not to be settled here any more: its stream is
// gone.
func (c *Consumer) Abandon(ctx context.Context, d *Delivery, err error) { c.abandon(ctx, d, err) }

func (c *Consumer) abandon(ctx context.Context, d *Delivery, err error) bool {
	if !d.open() {
		return false
	}
	if d.Attempt > 0 {
		c.remember(d)
	}
	return c.end(ctx, d, unsettled, err, now(ctx, c.t.instruments.processDuration))
}

// Leave says that the handler has returned while a settlement is under way. If
// that comes to nothing, call Return.
func (d *Delivery) Leave() { d.flags.Or(flagLeft) }

// Keep copies to a zero Delivery what is known of one whose processing has ended, for
// a settlement that comes much later.
func (d *Delivery) Keep(to *Delivery) {
	to.Sequence, to.Stored, to.Attempt, to.begin = d.Sequence, d.Stored, d.Attempt, d.begin
	to.flags.Store(flagEnded)
}

// Left reports whether Leave was called.
func (d *Delivery) Left() bool { return d.flags.Load()&flagLeft != 0 }

// remember keeps the span for the next attempt to link to.
func (c *Consumer) remember(d *Delivery) {
	defer contain()
	if d.span != nil {
		c.t.attempts.remember(attemptKey{c, d.Sequence}, d.span.SpanContext())
	}
}

// Repeated counts a message that is not handled: the server has sourced it again.
func (c *Consumer) Repeated() { c.repeats.n.Add(1) }

// Extended counts an in-progress, sent or not because of err.
func (c *Consumer) Extended(err error) {
	if err != nil {
		c.notExtended.n.Add(1)
		return
	}
	c.extended.n.Add(1)
}

// A Settle is one settlement that is being sent.
type Settle struct {
	c    *Consumer
	d    *Delivery
	ctx  context.Context //nolint:containedctx // of the delivery, for exemplars
	kind Settlement
	span trace.Span
}

var settleOptions = []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient)}

// Settle begins a settlement of d. ctx is what Start returned.
func (c *Consumer) Settle(ctx context.Context, d *Delivery, kind Settlement) (s Settle) {
	s = Settle{c: c, d: d, ctx: ctx, kind: kind}
	if d.span == nil { // it never got to a handler, or leaves no trace
		return s
	}
	if kind == Nak || kind == NakDelay {
		c.remember(d) // the next delivery may be here before this one is sent
	}
	level := c.t.settings.SettleSpans
	if level == SettleSpansNone || level == SettleSpansFailures && kind == Ack {
		return s
	}
	defer contain()
	if !d.span.SpanContext().IsSampled() {
		return s
	}
	tracer := c.t.tracers.get()
	if tracer == nil {
		return s
	}
	_, span := tracer.Start(ctx, c.settleName[kind], settleOptions...)
	if span == nil {
		return s
	}
	s.span = span
	if span.IsRecording() { // afterwards, as the parent decides what is sampled
		attrs := takeAttrs()
		*attrs = append(append(*attrs, settleAttrs[kind]...), c.template)
		span.SetAttributes(*attrs...)
		c.t.giveAttrs(attrs)
	}
	return s
}

// Timed reports whether somebody wants to know how long things take.
func (c *Consumer) Timed(ctx context.Context) (timed bool) {
	defer contain()
	i := &c.t.instruments
	return i.processDuration.Enabled(ctx) || i.endToEnd.Enabled(ctx) || i.attempts.Enabled(ctx)
}

// End ends the settlement, which began at now: sent, or not because of err. now may
// be zero if nobody wants to know, see Timed. late says that the lease had ended
// before. cause is the error that the message is settled because of, if any. A
// settlement that was sent ends the processing.
func (s *Settle) End(err error, now time.Time, late bool, cause error) {
	if err != nil {
		s.c.notSettled[s.kind].n.Add(1)
		s.fail(err)
		return
	}
	s.c.settled[s.kind].n.Add(1)
	if late {
		s.c.late.n.Add(1)
	}
	end(s.span)
	if s.d.begin == 0 {
		return
	}
	if !now.IsZero() {
		s.final(now)
	}
	s.c.end(s.ctx, s.d, int(s.kind), cause, now)
}

// fail ends the settlement's own span.
func (s *Settle) fail(err error) {
	defer end(s.span)
	defer contain()
	name, _ := s.c.t.errors.of(err)
	fail(s.span, name)
}

// final records what an ack or a term concludes.
func (s *Settle) final(now time.Time) {
	if s.kind != Ack && s.kind != Term {
		return
	}
	defer contain()
	own := *s.c.own.options()
	s.c.t.instruments.attempts.Record(s.ctx, int64(s.d.Attempt), own...)
	if s.kind == Ack {
		s.c.t.instruments.endToEnd.Record(s.ctx, seconds(now.UnixNano()-s.d.Stored), own...)
	}
}

// A Batch is one call of a handler with several messages.
type Batch struct {
	t    *Telemetry
	span trace.Span
}

// maxBatchLinks bounds the links of a batch's span; OpenTelemetry's own limit is
// the same.
const maxBatchLinks = 128

// StartBatch begins a call of the handler with several messages, whose own spans
// are in traces of their own. The returned context carries a span that links to
// those of them that are sampled.
func (c *Consumer) StartBatch(ctx context.Context, n int, delivery func(int) *Delivery) (out context.Context, b Batch) {
	out, b = ctx, Batch{t: c.t}
	defer contain()
	tracer := c.t.tracers.get()
	if tracer == nil {
		return out, b
	}
	var links []trace.Link
	for i := 0; i < n && len(links) < maxBatchLinks; i++ {
		if span := delivery(i).span; span != nil && span.SpanContext().IsSampled() {
			if links == nil {
				links = make([]trace.Link, 0, min(n-i, maxBatchLinks))
			}
			links = append(links, trace.Link{SpanContext: span.SpanContext()})
		}
	}
	opts := c.batchStart
	if len(links) > 0 {
		const more = 1
		opts = append(append(make([]trace.SpanStartOption, 0, len(opts)+more), opts...), trace.WithLinks(links...))
	}
	started, span := tracer.Start(ctx, c.batchName, opts...)
	if started == nil || span == nil {
		return out, b
	}
	if span.IsRecording() {
		span.SetAttributes(keyBatchCount.Int(n), keyStream.String(c.route.Stream))
	}
	b.span = span
	return started, b
}

// End ends the call with the handler's error.
func (b *Batch) End(err error) {
	if b.span == nil {
		return
	}
	defer end(b.span)
	defer contain()
	if err != nil {
		name, _ := b.t.errors.of(err)
		fail(b.span, name)
	}
}
