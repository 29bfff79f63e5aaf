package messaging

import (
	"sync"

	"go.opentelemetry.io/otel/trace"
)

// attempts remembers the span of the last attempt at messages that are to come
// again, so that the next attempt can link to it. It holds a bounded number, the
// newest, and is gone with the process. Only what fails gets here.
type attempts struct {
	mu    sync.Mutex
	spans map[attemptKey]attempt
	order []attemptKey // a ring of the keys, in the order they came
	next  int
}

type attemptKey struct {
	consumer *Consumer
	sequence uint64
}

type attempt struct {
	span trace.SpanContext
	slot int // in order
}

// maxAttempts bounds the memory, to about 3 MiB.
const maxAttempts = 16_384

func (a *attempts) remember(k attemptKey, span trace.SpanContext) {
	if !span.IsValid() {
		return
	}
	// Without the tracestate, which may come from the wire and be large.
	span = trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: span.TraceID(), SpanID: span.SpanID(), TraceFlags: span.TraceFlags(),
	})
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.spans == nil {
		a.spans = make(map[attemptKey]attempt)
	}
	if old, ok := a.spans[k]; ok {
		a.spans[k] = attempt{span, old.slot}
		return
	}
	slot := a.next
	if slot == len(a.order) {
		a.order = append(a.order, k)
	} else {
		// The slot's key may have been taken, and remembered again elsewhere.
		if old := a.order[slot]; a.spans[old].slot == slot {
			delete(a.spans, old)
		}
		a.order[slot] = k
	}
	a.spans[k] = attempt{span, slot}
	a.next = (slot + 1) % maxAttempts
}

// take returns what was remembered of the last attempt, and forgets it.
func (a *attempts) take(k attemptKey) (trace.SpanContext, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	old, ok := a.spans[k]
	delete(a.spans, k)
	return old.span, ok
}
