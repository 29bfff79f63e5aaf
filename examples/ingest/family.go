package main

import (
	"context"
	"time"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

const (
	owner      = "github" // the module that owns the events
	version    = "v1"
	streamName = "github-events"
)

// A family is one kind of event. Its Go type is known to newFamily only: what
// needs it is made there.
type family struct {
	name  string
	event mono.BaseEventDefinition

	// registerTyped and registerPrinter register consumers that get values of
	// the family's type.
	registerTyped   func(mono.EventRegistry, *typed) error
	registerPrinter func(mono.EventRegistry, *printer) error
}

func newFamily[T shape](name string) family {
	event := helper.EventDefinition[T](owner, name, version)
	f := family{name: name, event: event.ToBase()}
	f.registerTyped = func(r mono.EventRegistry, m *typed) error {
		return helper.RegisterTypedEventStreamConsumer(r, event, f.consumerConfig(typedName),
			func(ctx context.Context, events []T, msgs []*mono.Msg) error {
				for i, e := range events {
					m.handle(ctx, f, e, msgs[i])
				}
				return nil
			}, m)
	}
	f.registerPrinter = func(r mono.EventRegistry, m *printer) error {
		return helper.RegisterTypedEventConsumer(r, event, func(_ context.Context, e T, msg *mono.Msg) error {
			return m.print(f, e, msg)
		}, m)
	}
	return f
}

func newFamilies(names []string) []family {
	all := make([]family, len(names))
	for i, name := range names {
		if shaped, ok := shapes[name]; ok {
			all[i] = shaped(name)
		} else {
			all[i] = newFamily[basicEvent](name)
		}
	}
	return all
}

// durable names the durable consumer of a module, which drain has to know.
func (f family) durable(module string) string { return module + "_" + f.name }

// consumerConfig is the same for both durable consumers of the family, but for
// the name.
func (f family) consumerConfig(module string) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: streamName, Description: "Webhooks, as they were received"},
		Consumer: mono.ConsumerConfig{
			Durable: f.durable(module),
			// After a kill, what had been delivered and not acked comes back when
			// this is over. Handlers that take longer are safe all the same.
			AckWait: 5 * time.Second,
		},
		Fetch: mono.FetchConfig{BatchSize: 50},
		// Only the ledger can fail, and that is not the message's fault: it is
		// tried until it works.
		Retry: mono.RetryPolicy{MaxAttempts: -1, Backoff: []time.Duration{time.Second, 5 * time.Second}},
	}
}
