package helper

import (
	"context"
	"errors"
	"fmt"

	"github.com/monotel/monotel/mono"
)

// RegisterTypedEventConsumer registers a core consumer whose handler gets
// decoded events; see RegisterEventConsumer of [mono.EventRegistry]. A payload
// that does not decode is reported like a handler's error, and the handler is
// not called.
func RegisterTypedEventConsumer[T any](registry mono.EventRegistry, event Event[T],
	handler func(ctx context.Context, event T, msg *mono.Msg) error, module mono.Module, queueGroup ...string,
) error {
	if err := check(registry, event); err != nil {
		return err
	}
	var h mono.EventConsumerHandler
	if handler != nil { // a nil one is for the registry to refuse
		h = func(ctx context.Context, msg *mono.Msg) error {
			value, err := event.Unmarshal(msg)
			if err != nil {
				return err
			}
			return handler(ctx, value, msg)
		}
	}
	return registry.RegisterEventConsumer(event.base, h, module, queueGroup...)
}

// RegisterTypedEventStreamConsumer registers a durable consumer whose handler
// gets decoded events: events[i] is the payload of msgs[i]. See
// RegisterEventStreamConsumer of [mono.EventRegistry].
//
// A payload that does not decode is dead-lettered alone, and the handler gets
// the rest of the batch; when nothing is left it is not called.
func RegisterTypedEventStreamConsumer[T any](registry mono.EventRegistry, event Event[T], config mono.StreamConsumerConfig,
	handler func(ctx context.Context, events []T, msgs []*mono.Msg) error, module mono.Module,
) error {
	if err := check(registry, event); err != nil {
		return err
	}
	var h mono.EventStreamConsumerHandler
	if handler != nil {
		h = func(ctx context.Context, msgs []*mono.Msg) error {
			events := make([]T, 0, len(msgs))
			good := msgs[:0]
			var unsent error
			for _, msg := range msgs {
				value, err := event.Unmarshal(msg)
				if err != nil {
					unsent = errors.Join(unsent, msg.Fail(err))
					continue
				}
				events, good = append(events, value), append(good, msg)
			}
			if len(good) == 0 {
				return unsent
			}
			return errors.Join(handler(ctx, events, good), unsent)
		}
	}
	return registry.RegisterEventStreamConsumer(event.base, config, h, module)
}

func check[T any](registry mono.EventRegistry, event Event[T]) error {
	if registry == nil {
		return fmt.Errorf("register consumer of event %s: %w: the registry is nil", event.base, mono.ErrInvalidConfig)
	}
	if event.codec == nil {
		return fmt.Errorf("register consumer: %w: the event is not defined; make it with EventDefinition", mono.ErrInvalidConfig)
	}
	return nil
}
