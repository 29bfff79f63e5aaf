package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
)

// Attributes of the span that stands for taking an order.
const (
	keyOrder    = attribute.Key("shop.order.id")
	keyCustomer = attribute.Key("shop.customer.id")
)

// A traceBook keeps the spans of a run, to show one order's in the end. Programs
// have a tracing backend for that.
type traceBook struct {
	mu    sync.Mutex
	spans []sdktrace.ReadOnlySpan
}

// maxSpans bounds the memory of a run without an end: later orders are not kept.
const maxSpans = 50_000

func (b *traceBook) ExportSpans(_ context.Context, spans []sdktrace.ReadOnlySpan) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	room := max(maxSpans-len(b.spans), 0)
	b.spans = append(b.spans, spans[:min(room, len(spans))]...)
	return nil
}

func (*traceBook) Shutdown(context.Context) error { return nil }

// show prints what happened to one order: of the one that was tried most often
// and audited in the end, if there is one.
func (b *traceBook) show(w io.Writer, paint func(style, string) string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slices.SortStableFunc(b.spans, func(a, c sdktrace.ReadOnlySpan) int { return a.StartTime().Compare(c.StartTime()) })
	byTrace := make(map[trace.TraceID][]sdktrace.ReadOnlySpan)
	for _, s := range b.spans {
		byTrace[s.SpanContext().TraceID()] = append(byTrace[s.SpanContext().TraceID()], s)
	}
	// The attempts after the first are traces of their own, linked to the publish.
	attempts := make(map[trace.SpanID][]sdktrace.ReadOnlySpan)
	for _, s := range b.spans {
		if operation(s) != "process" || s.Parent().IsValid() {
			continue
		}
		for _, l := range s.Links() {
			attempts[l.SpanContext.SpanID()] = append(attempts[l.SpanContext.SpanID()], s)
		}
	}
	var best story
	for _, s := range b.spans {
		if _, ok := attr(s, keyOrder); ok {
			if st := follow(s, byTrace, attempts); st.better(best) {
				best = st
			}
		}
	}
	if best.order == nil {
		fmt.Fprintln(w, "\nThere is no trace of an order to show.")
		return
	}
	best.print(w, paint)
}

// A story is everything that came of one order: its own trace, and those that
// are linked to it.
type story struct {
	order  sdktrace.ReadOnlySpan
	traces [][]sdktrace.ReadOnlySpan
	names  map[trace.SpanID]string // of what is linked to
	acked  bool
}

// follow collects what came of an order.
func follow(order sdktrace.ReadOnlySpan, byTrace map[trace.TraceID][]sdktrace.ReadOnlySpan,
	attempts map[trace.SpanID][]sdktrace.ReadOnlySpan,
) story {
	own := byTrace[order.SpanContext().TraceID()]
	st := story{order: order, traces: [][]sdktrace.ReadOnlySpan{own}, names: make(map[trace.SpanID]string)}
	for _, s := range own {
		if operation(s) != "publish" {
			continue
		}
		st.names[s.SpanContext().SpanID()] = "the publish"
		for _, a := range attempts[s.SpanContext().SpanID()] {
			st.traces = append(st.traces, byTrace[a.SpanContext().TraceID()])
		}
	}
	for _, spans := range st.traces {
		for _, s := range spans {
			if n, ok := attr(s, "messaging.nats.delivery_count"); ok {
				st.names[s.SpanContext().SpanID()] = "attempt " + n.String()
			}
			st.acked = st.acked || operation(s) == "ack"
		}
	}
	return st
}

func (st story) better(than story) bool {
	if than.order == nil || st.acked != than.acked {
		return than.order == nil || st.acked
	}
	return len(st.traces) > len(than.traces)
}

func (st story) print(w io.Writer, paint func(style, string) string) {
	id, _ := attr(st.order, keyOrder)
	customer, _ := attr(st.order, keyCustomer)
	fmt.Fprintf(w, "\nOne order in traces: %s, by %s. Times count from its first span.\n", paint(bold, id.AsString()), customer.AsString())
	for _, spans := range st.traces {
		children := make(map[trace.SpanID][]sdktrace.ReadOnlySpan)
		var roots []sdktrace.ReadOnlySpan
		for _, s := range spans {
			if parent := s.Parent(); parent.IsValid() {
				children[parent.SpanID()] = append(children[parent.SpanID()], s)
			} else {
				roots = append(roots, s)
			}
		}
		fmt.Fprintf(w, "\n%s %s\n", paint(dim, "trace"), paint(dim, spans[0].SpanContext().TraceID().String()))
		for _, root := range roots {
			st.branch(w, paint, root, children, "", "")
		}
	}
}

// branch prints a span and what is below it.
func (st story) branch(w io.Writer, paint func(style, string) string, s sdktrace.ReadOnlySpan,
	children map[trace.SpanID][]sdktrace.ReadOnlySpan, first, rest string,
) {
	const nameWidth = 58
	how := plain
	if s.Status().Code == codes.Error {
		how = red
	}
	name := fmt.Sprintf("%-*s", nameWidth-len([]rune(first)), s.Name())
	fmt.Fprintln(w, strings.TrimRight(fmt.Sprintf("  %s  %s%s  %s  %s",
		paint(dim, fmt.Sprintf("%+8.1fms", milliseconds(s.StartTime().Sub(st.order.StartTime())))),
		paint(dim, first), paint(how, name),
		paint(dim, fmt.Sprintf("%7.2fms", milliseconds(s.EndTime().Sub(s.StartTime())))),
		st.facts(s)), " "))
	below := children[s.SpanContext().SpanID()]
	slices.SortStableFunc(below, func(a, b sdktrace.ReadOnlySpan) int {
		return cmp.Compare(a.StartTime().UnixNano(), b.StartTime().UnixNano())
	})
	for i, c := range below {
		if i == len(below)-1 {
			st.branch(w, paint, c, children, rest+"└─ ", rest+"   ")
		} else {
			st.branch(w, paint, c, children, rest+"├─ ", rest+"│  ")
		}
	}
}

// facts are what one wants to know of a span besides its name.
func (st story) facts(s sdktrace.ReadOnlySpan) string {
	var facts []string
	add := func(format string, k attribute.Key) {
		if v, ok := attr(s, k); ok {
			facts = append(facts, fmt.Sprintf(format, v.String()))
		}
	}
	switch operation(s) {
	case "publish":
		add("stored in %s", "messaging.nats.stream")
		add("at %s", "messaging.nats.stream_sequence")
	case "process":
		add("by %s,", "messaging.consumer.group.name")
		add("attempt %s,", "messaging.nats.delivery_count")
		add("%s", "messaging.nats.settlement")
		add("because of %s", "error.type")
	}
	for _, l := range s.Links() {
		// The first attempt is the publish's child, too.
		if to, ok := st.names[l.SpanContext.SpanID()]; ok && l.SpanContext.SpanID() != s.Parent().SpanID() {
			facts = append(facts, "→ "+to)
		}
	}
	return strings.TrimSuffix(strings.Join(facts, " "), ",")
}

func operation(s sdktrace.ReadOnlySpan) string {
	v, _ := attr(s, "messaging.operation.name")
	return v.AsString()
}

func attr(s sdktrace.ReadOnlySpan, k attribute.Key) (attribute.Value, bool) {
	for _, a := range s.Attributes() {
		if a.Key == k {
			return a.Value, true
		}
	}
	return attribute.Value{}, false
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }
