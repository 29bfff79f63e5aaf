package mono

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go/jetstream"
)

// An EventConsumerHandler handles one core event. Its error, or panic, is
// logged; core NATS delivers each message at most once.
type EventConsumerHandler func(ctx context.Context, msg *Msg) error

// An EventStreamConsumerHandler handles a batch of a durable consumer: at least
// one message, at most Fetch.BatchSize, of what has arrived.
//
// It settles each message by itself. What it leaves unsettled is settled by its
// error: [Permanent] dead-letters, [RetryAfter] and every other error ask for
// another delivery with the asked or the policy's delay, until the attempts are
// used up; a panic counts as an error. With a nil error it is acked if AutoAck
// is set, and otherwise comes back after AckWait.
//
// However long it runs, its messages are not delivered again meanwhile: their
// leases are extended. Its ctx ends when [App.Stop] runs out of time.
type EventStreamConsumerHandler func(ctx context.Context, msgs []*Msg) error

// An EventRegistry finds events and takes registrations of consumers. It is
// safe for concurrent use, but registrations are taken only inside
// RegisterEventConsumers; later ones return [ErrAlreadyStarted].
//
// It has no other implementation than an App's: methods may be added.
type EventRegistry interface {
	// GetEventByName finds an event by its identity.
	GetEventByName(name, version, moduleName string) (BaseEventDefinition, bool)

	// GetEventsByModule lists the events whose ModuleName is moduleName, sorted
	// by name and version.
	GetEventsByModule(moduleName string) []BaseEventDefinition

	// GetAllEvents lists every event, sorted by module, name and version.
	GetAllEvents() []BaseEventDefinition

	// RegisterEventConsumer consumes event over core NATS: fast, and lost when
	// nobody listens. Of each queue group one consumer gets a message; the
	// default group is the module's name, so instances of one module share the
	// work, and different modules each get everything. A handler runs for one
	// message at a time.
	//
	// Errors: [ErrUnknownEvent], [ErrDuplicate] for a second registration of a
	// module for an event without a queue group of its own, [ErrInvalidConfig].
	RegisterEventConsumer(event BaseEventDefinition, handler EventConsumerHandler, module Module, queueGroup ...string) error

	// RegisterEventStreamConsumer consumes event from a stream: stored, and
	// delivered until it is settled. See [StreamConsumerConfig].
	//
	// Errors: [ErrUnknownEvent], [ErrDuplicate] for a stream and durable name
	// that are taken, [ErrInvalidConfig] with everything that is wrong with
	// config. Streams that contradict each other or the server's are reported
	// by Start.
	RegisterEventStreamConsumer(event BaseEventDefinition, config StreamConsumerConfig,
		handler EventStreamConsumerHandler, module Module) error

	sealed()
}

type eventKey struct{ module, name, version string }

type coreRegistration struct {
	info    Consumer
	handler EventConsumerHandler
}

type streamRegistration struct {
	info    Consumer
	cfg     StreamConsumerConfig // complete: its Consumer is what the server is asked for
	handler EventStreamConsumerHandler
	woken   atomic.Bool // the janitor is to look whether the durable for replays exists
}

type registry struct {
	mu      sync.Mutex
	open    bool            // registrations are taken
	modules map[string]bool // that may register
	events  map[eventKey]declaration
	bySubj  map[string]declaration
	core    []*coreRegistration
	streams []*streamRegistration
}

type declaration struct {
	event BaseEventDefinition
	by    string // who declared it, for messages
}

// reset forgets everything: each start begins afresh.
func (r *registry) reset(modules []Module) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = true
	r.modules = make(map[string]bool, len(modules))
	for _, m := range modules {
		r.modules[m.Name()] = true
	}
	r.events = make(map[eventKey]declaration)
	r.bySubj = make(map[string]declaration)
	r.core, r.streams = nil, nil
}

// close ends the time of registration and returns what was registered.
func (r *registry) close() ([]*coreRegistration, []*streamRegistration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.open = false
	return r.core, r.streams
}

func (r *registry) declare(by string, events []BaseEventDefinition) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	var errs []error
	for _, e := range events {
		if err := e.validate(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", by, err))
			continue
		}
		key := eventKey{e.ModuleName, e.Name, e.Version}
		if d, ok := r.events[key]; ok {
			errs = append(errs, fmt.Errorf("%s: event %s: %w: %s declares it too", by, e, ErrDuplicate, d.by))
			continue
		}
		if d, ok := r.bySubj[e.Subject]; ok {
			errs = append(errs, fmt.Errorf("%s: event %s: %w: subject %q is that of event %s of %s",
				by, e, ErrDuplicate, e.Subject, d.event, d.by))
			continue
		}
		r.events[key] = declaration{e, by}
		r.bySubj[e.Subject] = declaration{e, by}
	}
	return errors.Join(errs...)
}

func (r *registry) GetEventByName(name, version, moduleName string) (BaseEventDefinition, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	d, ok := r.events[eventKey{moduleName, name, version}]
	return d.event, ok
}

func (r *registry) GetEventsByModule(moduleName string) []BaseEventDefinition {
	return slices.DeleteFunc(r.GetAllEvents(), func(e BaseEventDefinition) bool { return e.ModuleName != moduleName })
}

func (r *registry) GetAllEvents() []BaseEventDefinition {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := make([]BaseEventDefinition, 0, len(r.events))
	for _, d := range r.events {
		all = append(all, d.event)
	}
	slices.SortFunc(all, func(a, b BaseEventDefinition) int {
		return cmp.Or(cmp.Compare(a.ModuleName, b.ModuleName), cmp.Compare(a.Name, b.Name), cmp.Compare(a.Version, b.Version))
	})
	return all
}

func (r *registry) RegisterEventConsumer(event BaseEventDefinition,
	handler EventConsumerHandler, module Module, queueGroup ...string,
) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := r.check(event, module, handler == nil)
	if err != nil {
		return fmt.Errorf("register event consumer: %w", err)
	}
	fail := func(err error) error {
		return fmt.Errorf("register event consumer of module %q for event %s: %w", info.Module, event, err)
	}
	info.Queue = info.Module
	switch len(queueGroup) {
	case 0:
		for _, o := range r.core {
			if o.info == info {
				return fail(fmt.Errorf("%w: each of the two would get half of the events; give each a queue group", ErrDuplicate))
			}
		}
	case 1:
		info.Queue = queueGroup[0]
		if info.Queue == "" || strings.ContainsAny(info.Queue, " \t\r\n") {
			return fail(fmt.Errorf("%w: queue group %q: want a name without spaces", ErrInvalidConfig, info.Queue))
		}
	default:
		return fail(fmt.Errorf("%w: %d queue groups given, want at most one", ErrInvalidConfig, len(queueGroup)))
	}
	r.core = append(r.core, &coreRegistration{info, handler})
	return nil
}

func (r *registry) RegisterEventStreamConsumer(event BaseEventDefinition, config StreamConsumerConfig,
	handler EventStreamConsumerHandler, module Module,
) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	info, err := r.check(event, module, handler == nil)
	if err != nil {
		return fmt.Errorf("register stream consumer: %w", err)
	}
	fail := func(err error) error {
		return fmt.Errorf("register stream consumer of module %q for event %s: %w", info.Module, event, err)
	}
	config = config.withDefaults()
	if config.Consumer.Durable == "" {
		config.Consumer.Durable = durableName(info.Module, event)
	}
	if err := config.validate(); err != nil {
		return fail(err)
	}
	info.Stream, info.Durable = config.Stream.Name, config.Consumer.Durable
	config.Consumer.Name = info.Durable
	config.Consumer.AckPolicy = jetstream.AckExplicitPolicy
	config.Consumer.FilterSubject = event.Subject
	for _, o := range r.streams {
		if o.info.Stream == info.Stream && o.info.Durable == info.Durable {
			return fail(fmt.Errorf("%w: durable consumer %q of stream %q belongs to module %q for event %s; set Consumer.Durable",
				ErrDuplicate, info.Durable, info.Stream, o.info.Module, o.info.Event))
		}
	}
	r.streams = append(r.streams, &streamRegistration{info: info, cfg: config, handler: handler})
	return nil
}

func (r *registry) sealed() {}

// check looks at what every registration has. r.mu is held.
func (r *registry) check(event BaseEventDefinition, module Module, noHandler bool) (Consumer, error) {
	if !r.open {
		return Consumer{}, fmt.Errorf("event %s: %w: register inside RegisterEventConsumers", event, ErrAlreadyStarted)
	}
	if isNil(module) {
		return Consumer{}, fmt.Errorf("event %s: %w: module is nil; pass the module itself", event, ErrInvalidConfig)
	}
	info := Consumer{Module: module.Name(), Event: event}
	var errs []error
	if !r.modules[info.Module] {
		errs = append(errs, fmt.Errorf("%w: the module is not registered with this App", ErrInvalidConfig))
	}
	if noHandler {
		errs = append(errs, fmt.Errorf("%w: handler is nil", ErrInvalidConfig))
	}
	switch d, ok := r.events[eventKey{event.ModuleName, event.Name, event.Version}]; {
	case !ok:
		errs = append(errs, fmt.Errorf("%w: no registered module emits it; register that module, or declare the event with WithEvents when another process emits it",
			ErrUnknownEvent))
	case d.event != event:
		errs = append(errs, fmt.Errorf("%w: it is declared by %s with subject %q, not %q", ErrUnknownEvent, d.by, d.event.Subject, event.Subject))
	}
	if len(errs) > 0 {
		return info, fmt.Errorf("module %q, event %s: %w", info.Module, event, errors.Join(errs...))
	}
	return info, nil
}

// isNil also finds the nil pointer inside an interface.
func isNil(m Module) bool {
	if m == nil {
		return true
	}
	v := reflect.ValueOf(m)
	return v.Kind() == reflect.Pointer && v.IsNil()
}
