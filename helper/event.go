// Package helper adds types to the events of package mono: definitions that
// know their payload's Go type, publishing of values, and handlers that get
// decoded values.
package helper

import (
	"context"
	"fmt"

	"github.com/monotel/monotel/mono"
)

// An Event is the definition of an event whose payload is a T. Copy it freely;
// its methods are safe for concurrent use.
type Event[T any] struct {
	base  mono.BaseEventDefinition
	codec Codec
}

// EventDefinition defines an event. Its subject is
// events.<module>.<version>.<name in kebab-case>, such as
// events.order.v1.order-created for OrderCreated, unless subject gives another
// one, without wildcards.
//
// It is meant for package variables and panics if a name or the subject is
// invalid, with a message that says what is allowed.
func EventDefinition[T any](module, name, version string, subject ...string) Event[T] {
	base, err := mono.NewEvent(module, name, version, subject...)
	if err != nil {
		panic(fmt.Sprintf("helper.EventDefinition: %v", err))
	}
	return Event[T]{base: base, codec: JSON}
}

// WithCodec returns the same event with another codec. Emitters and consumers
// must use the same one. It panics if c is nil.
func (e Event[T]) WithCodec(c Codec) Event[T] {
	if c == nil {
		panic("helper: WithCodec(nil) for event " + e.base.String())
	}
	e.codec = c
	return e
}

// ToBase returns the definition without its type, as modules declare it.
func (e Event[T]) ToBase() mono.BaseEventDefinition { return e.base }

// Publish is [Event.PublishContext] without a context.
func (e Event[T]) Publish(bus mono.EventBus, event T, header mono.Header) error {
	ctx := context.Background() //nolint:forbidigo // the caller has none to give
	return e.PublishContext(ctx, bus, event, header)
}

// PublishContext publishes event to whoever listens now; see Publish of
// [mono.EventBus]. header may be nil.
func (e Event[T]) PublishContext(ctx context.Context, bus mono.EventBus, event T, header mono.Header) error {
	msg, err := e.message(bus, event, header)
	if err != nil {
		return err
	}
	return bus.Publish(ctx, msg)
}

// EventStreamPublish stores event in the stream of its subject and returns when
// the server has acknowledged that; see PublishStream of [mono.EventBus].
// header may be nil.
func (e Event[T]) EventStreamPublish(ctx context.Context, bus mono.EventBus, event T, header mono.Header) (*mono.PubAck, error) {
	msg, err := e.message(bus, event, header)
	if err != nil {
		return nil, err
	}
	return bus.PublishStream(ctx, msg)
}

// EventStreamPublishAsync sends event like EventStreamPublish without waiting
// for the acknowledgement; see PublishStreamAsync of [mono.EventBus]. header
// may be nil and must not be changed until the future is done.
func (e Event[T]) EventStreamPublishAsync(ctx context.Context, bus mono.EventBus, event T, header mono.Header) (*mono.PubAckFuture, error) {
	msg, err := e.message(bus, event, header)
	if err != nil {
		return nil, err
	}
	return bus.PublishStreamAsync(ctx, msg)
}

func (e Event[T]) message(bus mono.EventBus, event T, header mono.Header) (*mono.Msg, error) {
	if e.codec == nil {
		return nil, fmt.Errorf("publish: %w: the event is not defined; make it with EventDefinition", mono.ErrInvalidConfig)
	}
	if bus == nil {
		return nil, fmt.Errorf("publish event %s: %w: the event bus is nil; SetEventBus is called by App.Start", e.base, mono.ErrNotStarted)
	}
	data, err := e.codec.Marshal(event)
	if err != nil {
		return nil, fmt.Errorf("publish event %s: encode %T: %w", e.base, event, err)
	}
	return &mono.Msg{Subject: e.base.Subject, Data: data, Header: header}, nil
}

// Unmarshal decodes msg's payload. The error is a [mono.DecodeError].
func (e Event[T]) Unmarshal(msg *mono.Msg) (T, error) {
	var event T
	if err := e.codec.Unmarshal(msg.Data, &event); err != nil {
		var zero T
		return zero, &mono.DecodeError{Event: e.base.String(), Err: err}
	}
	return event, nil
}
