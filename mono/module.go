package mono

import "context"

// A Module is one part of an application. What else it can do it says by
// implementing further interfaces: [EventEmitterModule],
// [EventConsumerModule], [EventBusAwareModule], [HealthCheckableModule].
//
// An App calls a module's methods from one goroutine at a time, except Health.
type Module interface {
	// Name identifies the module. It becomes part of the names of its durable
	// consumers, so renaming a module starts them afresh. 1 to 64 ASCII
	// letters, digits, "_" or "-".
	Name() string

	// Start makes the module ready to handle events. Its ctx ends with the
	// App's start-up, so what outlives Start needs its own. The event bus works
	// already; events wait until every module has started.
	Start(ctx context.Context) error

	// Stop releases what Start acquired. It is called when no handler runs any
	// more; publishing still works.
	Stop(ctx context.Context) error
}

// An EventBusAwareModule wants to publish.
type EventBusAwareModule interface {
	Module

	// SetEventBus is called before any Start. The bus may be kept for as long
	// as the App lives.
	SetEventBus(bus EventBus)
}

// An EventEmitterModule declares the events that it publishes, so that others
// can find them in the [EventRegistry].
type EventEmitterModule interface {
	EventBusAwareModule

	// EmitEvents returns the module's events. Each may be declared once in an
	// App.
	EmitEvents() []BaseEventDefinition
}

// An EventConsumerModule consumes events.
type EventConsumerModule interface {
	Module

	// RegisterEventConsumers is called once every event is declared and before
	// any Start. Use the registry only inside: registrations made later are
	// refused.
	RegisterEventConsumers(registry EventRegistry) error
}

// A HealthCheckableModule takes part in [App.Health].
type HealthCheckableModule interface {
	Module

	// Health returns nil while the module works, and otherwise what is wrong.
	// It may be called at any time after Start, by several goroutines, and
	// should return quickly.
	Health(ctx context.Context) error
}
