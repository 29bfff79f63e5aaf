package main

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/otlptranslator"
	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/telemetry"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A brokenExporter takes one batch of spans, keeps the next until it is let go, and
// refuses that.
type brokenExporter struct {
	calls          int
	taken, blocked chan struct{}
	release        chan struct{}
}

func (e *brokenExporter) ExportSpans(context.Context, []sdktrace.ReadOnlySpan) error {
	e.calls++
	if e.calls == 1 {
		close(e.taken)
		return nil
	}
	if e.calls == 2 {
		close(e.blocked)
		<-e.release
	}
	return errors.New("the collector is away")
}

func (*brokenExporter) Shutdown(context.Context) error { return nil }

// exported is what a program exports in which everything has happened once: the
// values of each label, by Prometheus's names.
func exported(t *testing.T) map[string]map[string][]string {
	t.Helper()
	registry := prometheus.NewRegistry()
	exporter := &brokenExporter{taken: make(chan struct{}), blocked: make(chan struct{}), release: make(chan struct{})}
	tel, err := telemetry.Setup(t.Context(), telemetry.WithoutGlobals(), telemetry.WithRegistry(registry),
		telemetry.WithSpanExporter(exporter), telemetry.WithSpanQueueSize(1))
	if err != nil {
		t.Fatal(err)
	}
	// The queue has room for one span, so each is a batch.
	span := func() {
		_, s := tel.TracerProvider().Tracer("test").Start(t.Context(), "test")
		s.End()
	}
	span()
	<-exporter.taken
	span()
	<-exporter.blocked
	span() // waits
	span() // is dropped
	close(exporter.release)

	app, err := messaging.New(messaging.Config{TracerProvider: tel.TracerProvider(), MeterProvider: tel.MeterProvider()})
	if err != nil {
		t.Fatal(err)
	}
	everything(t, app)

	// More series than an instrument may have.
	many, err := tel.MeterProvider().Meter("test").Int64Counter("many")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 20_001 {
		many.Add(t.Context(), 1, metric.WithAttributes(attribute.Int("n", i)))
	}
	// Spans that fail are counted once they have been tried.
	flusher, ok := tel.TracerProvider().(interface{ ForceFlush(context.Context) error })
	if !ok {
		t.Fatalf("%T cannot be flushed", tel.TracerProvider())
	}
	if err := flusher.ForceFlush(t.Context()); err != nil {
		t.Fatal(err)
	}
	found := gathered(t, registry)
	_ = tel.Shutdown(t.Context())
	return found
}

// everything that happens to messages.
func everything(t *testing.T, app *messaging.Telemetry) {
	t.Helper()
	now := time.Now()
	fail := errors.New("no")
	p := app.Publisher("events.shop.v1.order-placed")
	for _, err := range []error{nil, fail} {
		_, o := p.Start(t.Context())
		o.Inject("events.shop.v1.order-placed", nats.Header{"traceparent": {"bad"}}, 1, false)
		o.Drop()
		o.End(err)
	}
	c := app.Consumer(messaging.Route{Template: "events.shop.v1.order-placed", Group: "billing", Stream: "orders"})
	c.CaptureDeadLetters([]string{"panic"})
	c.SetState(&messaging.ConsumerState{Pending: 1, AckPending: 1, Limit: 1, Waiting: 1, Oldest: now})
	app.SetOpenDeadLetters("DLQ", []messaging.OpenDeadLetters{{Consumer: "billing", Count: 1, Oldest: now}})
	for attempt := uint32(1); attempt <= 2; attempt++ {
		for _, kind := range []messaging.Settlement{messaging.Ack, messaging.Nak, messaging.NakDelay, messaging.Term} {
			d := &messaging.Delivery{Attempt: attempt, Stored: now.UnixNano()}
			ctx := c.Start(t.Context(), d, &messaging.Message{}, now)
			failed := c.Settle(ctx, d, kind)
			failed.End(fail, now, false, nil)
			sent := c.Settle(ctx, d, kind)
			sent.End(nil, now, true, fail)
		}
	}
	left := &messaging.Delivery{Attempt: 1, Stored: now.UnixNano()}
	ctx := c.Start(t.Context(), left, &messaging.Message{}, now)
	c.Return(ctx, left, nil)
	c.Extended(nil)
	for _, err := range []error{nil, fail} {
		o := c.Capture(ctx, left, &messaging.Message{}, "DLQ", "panic")
		o.End(true, err)
	}
	for _, failed := range []bool{true, false} {
		o := c.Outcome(t.Context(), left, &messaging.Message{})
		o.End(failed, true, nil)
	}
}

func gathered(t *testing.T, registry *prometheus.Registry) map[string]map[string][]string {
	t.Helper()
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]map[string][]string{}
	see := func(name, label, value string) {
		if out[name] == nil {
			out[name] = map[string][]string{}
		}
		if !slices.Contains(out[name][label], value) && len(out[name][label]) < 100 {
			out[name][label] = append(out[name][label], value)
		}
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			names := []string{f.GetName()}
			if h := m.GetHistogram(); h != nil {
				names = []string{f.GetName() + "_count", f.GetName() + "_sum", f.GetName() + "_bucket"}
				for _, b := range h.GetBucket() {
					see(names[2], "le", strconv.FormatFloat(b.GetUpperBound(), 'g', -1, 64))
					for _, l := range b.GetExemplar().GetLabel() {
						see("exemplars", l.GetName(), l.GetValue())
					}
				}
			}
			for _, name := range names {
				see(name, nameLabel, name)
				for _, l := range m.GetLabel() {
					see(name, l.GetName(), l.GetValue())
				}
			}
		}
	}
	return out
}

// TestQueriesFindWhatIsExported compares the queries with what a program exports:
// each metric, each label, and each value that they ask for.
func TestQueriesFindWhatIsExported(t *testing.T) {
	t.Parallel()
	found := exported(t)
	if len(found["exemplars"][otlptranslator.ExemplarTraceIDKey]) == 0 {
		t.Errorf("exemplars have the labels %v", found["exemplars"])
	}
	overflowed := false
	for _, series := range found {
		overflowed = overflowed || slices.Contains(series[overflowLabel], "true")
	}
	if !overflowed {
		t.Errorf("nothing has %s", overflowLabel)
	}
	var queries []query
	if err := json.Unmarshal(made(t)["queries.json"], &queries); err != nil {
		t.Fatal(err)
	}
	for _, q := range queries {
		if q.Tags != "" { // Jaeger's
			continue
		}
		e, err := parser.NewParser(parser.Options{}).ParseExpr(q.Expr)
		if err != nil {
			t.Fatal(err)
		}
		parser.Inspect(e, func(n parser.Node, _ []parser.Node) error {
			v, ok := n.(*parser.VectorSelector)
			if !ok || v.Name == "" || strings.Contains(v.Name, ":") || byOthers(v.Name) {
				return nil
			}
			series := found[v.Name]
			if series == nil {
				t.Errorf("%s: nothing exports %s", q.From, v.Name)
			}
			for _, m := range v.LabelMatchers {
				for want := range strings.SplitSeq(m.Value, "|") {
					skip := want == "" || want == ".*" || m.Name == nameLabel || m.Name == "job" || m.Name == "instance" || m.Type == labels.MatchNotEqual
					if !skip && !slices.Contains(series[m.Name], want) {
						t.Errorf("%s: nothing exports %s{%s=%q}, only %q", q.From, v.Name, m.Name, want, series[m.Name])
					}
				}
			}
			return nil
		})
	}
}

// byOthers tells what Prometheus makes itself.
func byOthers(name string) bool {
	return name == "up" || name == "ALERTS" || strings.HasPrefix(name, "scrape_")
}
