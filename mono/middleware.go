package mono

import (
	"context"
	"slices"
)

// A Consumer describes one registration: who consumes what, and how.
type Consumer struct {
	Module string // the consuming module
	Event  BaseEventDefinition

	Queue string // the queue group of a core consumer, else ""

	Stream  string // the stream of a durable consumer, else ""
	Durable string // the durable name of a durable consumer, else ""
}

// HandleFunc handles messages of one consumer: a batch of a durable consumer,
// or a single message of a core consumer. The slice belongs to the callee.
type HandleFunc func(ctx context.Context, msgs []*Msg) error

// PublishFunc publishes a message: to core NATS, or to a stream, in which case
// nil means stored, or sent when the publish is asynchronous.
type PublishFunc func(ctx context.Context, msg *Msg) error

// Middleware wraps handling, publishing, or both; a nil field leaves that side
// alone. Publish runs once, when the App is made, and Handle once for each
// consumer when it starts, so set-up belongs in their bodies and per-message
// work in what they return.
//
// What it returns must be safe for concurrent use. A Handle that does not call
// next decides about the messages by settling them or by its error, as a
// handler would. A Publish that does not call next must return an error. It may
// change msg.Subject, msg.Data and msg.Header: msg
// and its header map are copies.
type Middleware struct {
	Handle  func(c Consumer, next HandleFunc) HandleFunc
	Publish func(next PublishFunc) PublishFunc
}

func chainHandle(mw []Middleware, c Consumer, h HandleFunc) HandleFunc {
	for _, m := range slices.Backward(mw) {
		if m.Handle != nil {
			h = m.Handle(c, h)
		}
	}
	return h
}

// chainPublish returns nil when no middleware wraps publishing, so that the
// common case costs nothing.
func chainPublish(mw []Middleware, innermost PublishFunc) PublishFunc {
	p, wrapped := innermost, false
	for _, m := range slices.Backward(mw) {
		if m.Publish != nil {
			p, wrapped = m.Publish(p), true
		}
	}
	if !wrapped {
		return nil
	}
	return p
}
