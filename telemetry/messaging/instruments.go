package messaging

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// instruments are an App's. What is counted for each message is counted by
// atomic integers, which the observable instruments read when somebody collects:
// a count then costs 2 ns and not 150, and histograms carry the exemplars.
type instruments struct {
	operationDuration metric.Float64Histogram
	processDuration   metric.Float64Histogram
	attempts          metric.Int64Histogram
	queueDuration     metric.Float64Histogram
	endToEnd          metric.Float64Histogram

	sent           metric.Int64ObservableCounter
	consumed       metric.Int64ObservableCounter
	settlements    metric.Int64ObservableCounter
	redeliveries   metric.Int64ObservableCounter
	late           metric.Int64ObservableCounter
	unsettled      metric.Int64ObservableCounter
	repeats        metric.Int64ObservableCounter
	traceContext   metric.Int64ObservableCounter
	active         metric.Int64ObservableUpDownCounter
	publishPending metric.Int64ObservableUpDownCounter

	captured        metric.Int64ObservableCounter
	captureFailures metric.Int64ObservableCounter
	replayed        metric.Int64ObservableCounter

	deadLettersOpen      metric.Int64ObservableGauge
	deadLettersOldestAge metric.Float64ObservableGauge

	consumerPending metric.Int64ObservableGauge
	ackPending      metric.Int64ObservableGauge
	ackPendingLimit metric.Int64ObservableGauge
	waiting         metric.Int64ObservableGauge
	oldestAge       metric.Float64ObservableGauge
}

func (i *instruments) make(m metric.Meter, observe metric.Callback) error {
	var errs []error
	seconds := func(d Metric) metric.Float64Histogram {
		h, err := m.Float64Histogram(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description),
			metric.WithExplicitBucketBoundaries(d.Buckets...))
		errs = append(errs, err)
		return h
	}
	var all []metric.Observable
	counter := func(d Metric) metric.Int64ObservableCounter {
		c, err := m.Int64ObservableCounter(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description))
		errs, all = append(errs, err), append(all, c)
		return c
	}
	upDown := func(d Metric) metric.Int64ObservableUpDownCounter {
		c, err := m.Int64ObservableUpDownCounter(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description))
		errs, all = append(errs, err), append(all, c)
		return c
	}
	gauge := func(d Metric) metric.Int64ObservableGauge {
		g, err := m.Int64ObservableGauge(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description))
		errs, all = append(errs, err), append(all, g)
		return g
	}
	age := func(d Metric) metric.Float64ObservableGauge {
		g, err := m.Float64ObservableGauge(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description))
		errs, all = append(errs, err), append(all, g)
		return g
	}
	i.operationDuration = seconds(metricOperationDuration)
	i.processDuration = seconds(metricProcessDuration)
	i.queueDuration = seconds(metricQueueDuration)
	i.endToEnd = seconds(metricEndToEnd)
	d := metricAttempts
	attempts, err := m.Int64Histogram(d.Name, metric.WithUnit(d.Unit), metric.WithDescription(d.Description),
		metric.WithExplicitBucketBoundaries(d.Buckets...))
	i.attempts, errs = attempts, append(errs, err)

	i.sent = counter(metricSent)
	i.consumed = counter(metricConsumed)
	i.settlements = counter(metricSettlements)
	i.redeliveries = counter(metricRedeliveries)
	i.late = counter(metricLate)
	i.unsettled = counter(metricUnsettled)
	i.repeats = counter(metricRepeats)
	i.traceContext = counter(metricTraceContext)
	i.active = upDown(metricActive)
	i.publishPending = upDown(metricPublishPending)
	i.captured = counter(metricCaptured)
	i.captureFailures = counter(metricCaptureFailures)
	i.replayed = counter(metricReplayed)
	i.consumerPending = gauge(metricConsumerPending)
	i.ackPending = gauge(metricAckPending)
	i.ackPendingLimit = gauge(metricAckPendingLimit)
	i.waiting = gauge(metricWaiting)
	i.oldestAge = age(metricOldestAge)
	i.deadLettersOpen = gauge(metricDeadLettersOpen)
	i.deadLettersOldestAge = age(metricDeadLettersOldestAge)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// It stays registered when the App stops: what was counted last is collected
	// after that, and an App that starts again goes on counting. So a program that
	// makes many Apps with one MeterProvider keeps the counts of them all.
	_, err = m.RegisterCallback(observe, all...)
	return err
}

// now is the time, or zero if nobody wants to know how long things take.
func now(ctx context.Context, i metric.Float64Histogram) (now time.Time) {
	defer contain()
	if i.Enabled(ctx) {
		now = time.Now()
	}
	return now
}

// observe is called when somebody collects.
func (t *Telemetry) observe(_ context.Context, o metric.Observer) error {
	defer contain()
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, p := range t.publishers {
		p.observe(o)
	}
	for _, c := range t.consumers {
		c.observe(o)
	}
	for _, n := range t.replays {
		n.observe(o, t.instruments.replayed, false, n.attrs)
	}
	t.observeDeadLetters(o)
	select {
	case t.collected <- struct{}{}:
	default:
	}
	return nil
}

// Collected is signalled when metrics have been collected, so that what has to
// be asked of a server is asked only while somebody reads it.
func (t *Telemetry) Collected() <-chan struct{} { return t.collected }

// A count is one series of an observable counter. There are some thirty for each
// consumer, so their options are made when somebody collects.
type count struct {
	n       atomic.Int64
	options atomic.Pointer[[]metric.ObserveOption]
}

// observe reports the series, with attributes that are always the same; one that is
// still zero only if asked to.
func (c *count) observe(o metric.Observer, i metric.Int64Observable, zero bool, base []attribute.KeyValue, more ...attribute.KeyValue) {
	n := c.n.Load()
	if n == 0 && !zero {
		return
	}
	options := c.options.Load()
	if options == nil {
		made := observeOptions(slices.Concat(base, more)...)
		options = &made
		c.options.Store(options)
	}
	o.ObserveInt64(i, n, *options...)
}

// Options are made once for each series: making them costs several times as much
// as recording does. A set sorts what it is given.

func observeOptions(attrs ...attribute.KeyValue) []metric.ObserveOption {
	return []metric.ObserveOption{metric.WithAttributeSet(attribute.NewSet(attrs...))}
}

// histogramOptions are the options of a histogram, made when the first value is recorded.
type histogramOptions struct {
	attrs []attribute.KeyValue
	made  atomic.Pointer[[]metric.RecordOption]
}

func (r *histogramOptions) options() *[]metric.RecordOption {
	if made := r.made.Load(); made != nil {
		return made
	}
	r.made.Store(recordOptions(r.attrs...))
	return r.made.Load()
}

func recordOptions(attrs ...attribute.KeyValue) *[]metric.RecordOption {
	return &[]metric.RecordOption{metric.WithAttributeSet(attribute.NewSet(slices.Clone(attrs)...))}
}
