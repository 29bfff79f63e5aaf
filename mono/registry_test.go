package mono_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// newApp is an App that is not started.
func newApp(t *testing.T, modules ...mono.Module) *mono.App {
	t.Helper()
	app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet())
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(modules...); err != nil {
		t.Fatal(err)
	}
	return app
}

// startFails starts an App that must not start.
func startFails(t *testing.T, modules ...mono.Module) error {
	t.Helper()
	app := newApp(t, modules...)
	err := app.Start(within(t))
	if err == nil {
		t.Error("the App started")
		if err := app.Stop(within(t)); err != nil {
			t.Error(err)
		}
	}
	return err
}

func handleNothing(context.Context, *mono.Msg) error   { return nil }
func handleNoBatch(context.Context, []*mono.Msg) error { return nil }
func onStream(name string) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: name}}
}

func durable(stream, name string) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: stream}, Consumer: mono.ConsumerConfig{Durable: name}}
}

func TestApp_Register_refuses(t *testing.T) {
	t.Parallel()
	app := newApp(t, emitter("order"))
	var typedNil *testModule
	err := app.Register(
		emitter("fine"), nil, typedNil, emitter("no dots.please"), emitter("order"), emitter("twice"), emitter("twice"), emitter(""),
	)
	wantError(t, err, mono.ErrInvalidConfig, "module number 2", "module number 3", "it is nil")
	wantError(t, err, mono.ErrInvalidName, `"no dots.please"`, "*mono_test.testModule", `""`)
	wantError(t, err, mono.ErrDuplicate, `module "order"`, `module "twice"`, "unique")

	// Nothing of it was taken.
	if err := app.Register(emitter("fine"), emitter("twice")); err != nil {
		t.Errorf("register what was fine: %v", err)
	}
}

// Everything that can be wrong with a registration, at one registry.
func TestRegistry_refuses(t *testing.T) {
	t.Parallel()
	unknown := mustEvent("shop", "Unknown", "v1")
	moved := ping
	moved.Subject = "elsewhere"
	stranger := emitter("stranger")
	var typedNil *testModule
	typed := func(context.Context, pingPayload, *mono.Msg) error { return nil }
	typedBatch := func(context.Context, []pingPayload, []*mono.Msg) error { return nil }
	who := []string{`module "refused"`, "event net/Ping/v1"}

	tests := []struct {
		name     string
		register func(r mono.EventRegistry, self mono.Module) error
		want     error
		say      []string
	}{
		{"nil handler", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, nil, self)
		}, mono.ErrInvalidConfig, append(who, "handler is nil")},
		{"nil stream handler", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(ping, onStream("s"), nil, self)
		}, mono.ErrInvalidConfig, append(who, "handler is nil")},
		{"nil typed handler", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, typedPing, nil, self)
		}, mono.ErrInvalidConfig, append(who, "handler is nil")},
		{"nil typed stream handler", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(r, typedPing, onStream("s"), nil, self)
		}, mono.ErrInvalidConfig, append(who, "handler is nil")},
		{"nil module", func(r mono.EventRegistry, _ mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, nil)
		}, mono.ErrInvalidConfig, []string{"event net/Ping/v1", "module is nil"}},
		{"nil module of a stream consumer", func(r mono.EventRegistry, _ mono.Module) error {
			return r.RegisterEventStreamConsumer(ping, onStream("s"), handleNoBatch, nil)
		}, mono.ErrInvalidConfig, []string{"event net/Ping/v1", "module is nil"}},
		{"typed nil module", func(r mono.EventRegistry, _ mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, typedNil)
		}, mono.ErrInvalidConfig, []string{"module is nil"}},
		{"module that is not registered", func(r mono.EventRegistry, _ mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, stranger)
		}, mono.ErrInvalidConfig, []string{`module "stranger"`, "not registered with this App"}},
		{"unknown event", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(unknown, handleNothing, self)
		}, mono.ErrUnknownEvent, []string{`module "refused"`, "event shop/Unknown/v1", "WithEvents"}},
		{"unknown event of a stream consumer", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(unknown, onStream("s"), handleNoBatch, self)
		}, mono.ErrUnknownEvent, []string{"event shop/Unknown/v1", "no registered module emits it"}},
		{"zero event", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(mono.BaseEventDefinition{}, handleNothing, self)
		}, mono.ErrUnknownEvent, nil},
		{"event with another subject", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(moved, handleNothing, self)
		}, mono.ErrUnknownEvent, []string{`declared by module "net"`, ping.Subject, `not "elsewhere"`}},
		{"everything at once", func(r mono.EventRegistry, _ mono.Module) error {
			return r.RegisterEventStreamConsumer(unknown, onStream("s"), nil, stranger)
		}, mono.ErrUnknownEvent, []string{"handler is nil", "not registered with this App", "no registered module emits it"}},
		{"empty queue group", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, self, "")
		}, mono.ErrInvalidConfig, append(who, `queue group ""`)},
		{"queue group with a space", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, typedPing, typed, self, "my workers")
		}, mono.ErrInvalidConfig, append(who, `queue group "my workers"`, "without spaces")},
		{"queue group with a line break", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, self, "a\r\nb")
		}, mono.ErrInvalidConfig, append(who, `"a\r\nb"`)},
		{"two queue groups", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, handleNothing, self, "a", "b")
		}, mono.ErrInvalidConfig, append(who, "2 queue groups", "at most one")},
		{"the same core consumer twice", func(r mono.EventRegistry, self mono.Module) error {
			if err := r.RegisterEventConsumer(ping, handleNothing, self); err != nil {
				return err
			}
			return r.RegisterEventConsumer(ping, handleNothing, self)
		}, mono.ErrDuplicate, append(who, "give each a queue group")},
		{"the same durable consumer twice", func(r mono.EventRegistry, self mono.Module) error {
			if err := r.RegisterEventStreamConsumer(ping, onStream("s"), handleNoBatch, self); err != nil {
				return err
			}
			return helper.RegisterTypedEventStreamConsumer(r, typedPing, onStream("s"), typedBatch, self)
		}, mono.ErrDuplicate, append(who, `"refused_net_ping_v1"`, `stream "s"`, "set Consumer.Durable")},
		{"a durable name that is taken", func(r mono.EventRegistry, self mono.Module) error {
			if err := r.RegisterEventStreamConsumer(ping, durable("t", "mine"), handleNoBatch, self); err != nil {
				return err
			}
			return r.RegisterEventStreamConsumer(ping, durable("t", "mine"), handleNoBatch, self)
		}, mono.ErrDuplicate, append(who, `"mine"`, `stream "t"`, `belongs to module "refused"`)},
		{"undefined typed event", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(r, helper.Event[pingPayload]{}, typed, self)
		}, mono.ErrInvalidConfig, []string{"EventDefinition"}},
		{"undefined typed event of a stream consumer", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(r, helper.Event[pingPayload]{}, onStream("s"), typedBatch, self)
		}, mono.ErrInvalidConfig, []string{"EventDefinition"}},
		{"nil registry", func(_ mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventConsumer(nil, typedPing, typed, self)
		}, mono.ErrInvalidConfig, []string{"registry is nil", "net/Ping/v1"}},
		{"nil registry of a stream consumer", func(_ mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(nil, typedPing, onStream("s"), typedBatch, self)
		}, mono.ErrInvalidConfig, []string{"registry is nil", "net/Ping/v1"}},
	}
	errs := make([]error, len(tests))
	startApp(t, emitter("net", ping), consumer("refused", func(r mono.EventRegistry, self mono.Module) error {
		for i, tt := range tests {
			errs[i] = tt.register(r, self)
		}
		return nil
	}))
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wantError(t, errs[i], tt.want, tt.say...)
		})
	}
}

// What is allowed beside it.
func TestRegistry_accepts(t *testing.T) {
	t.Parallel()
	startApp(t, emitter("net", ping, mustEvent("net", "Pong", "v1")), consumer("accepted", func(r mono.EventRegistry, self mono.Module) error {
		pong, _ := r.GetEventByName("Pong", "v1", "net")
		return errors.Join(
			// Workers of one group may be in one module.
			r.RegisterEventConsumer(ping, handleNothing, self),
			r.RegisterEventConsumer(ping, handleNothing, self, "workers"),
			r.RegisterEventConsumer(ping, handleNothing, self, "workers"),
			// One stream for several events, with several consumers.
			r.RegisterEventStreamConsumer(ping, onStream("s"), handleNoBatch, self),
			r.RegisterEventStreamConsumer(pong, onStream("s"), handleNoBatch, self),
			r.RegisterEventStreamConsumer(ping, durable("s", "second"), handleNoBatch, self),
			// A durable name belongs to its stream.
			r.RegisterEventStreamConsumer(ping, durable("t", "second"), handleNoBatch, self),
		)
	}))
}

// Each bad field of a StreamConsumerConfig is refused where it is given.
func TestStreamConsumerConfig_refuses(t *testing.T) {
	t.Parallel()
	type config = mono.StreamConsumerConfig
	tests := []struct {
		name  string
		spoil func(c *config)
		say   []string
	}{
		{"no stream name", func(c *config) { c.Stream.Name = "" }, []string{"Stream.Name", "empty"}},
		{"stream name with a dot", func(c *config) { c.Stream.Name = "a.b" }, []string{"Stream.Name", `"a.b"`}},
		{"stream name with a wildcard", func(c *config) { c.Stream.Name = "a*" }, []string{"Stream.Name", `"a*"`}},
		{"stream name with a slash", func(c *config) { c.Stream.Name = "../a" }, []string{"Stream.Name"}},
		{"stream name with a space", func(c *config) { c.Stream.Name = "a b" }, []string{"Stream.Name"}},
		{"stream name that is long", func(c *config) { c.Stream.Name = strings.Repeat("a", 256) }, []string{"Stream.Name", "at most 255"}},
		{"subjects of the server", func(c *config) { c.Stream.Subjects = []string{"ok", "$JS.>"} }, []string{"Stream.Subjects", `"$JS.>"`, "belong to the server"}},
		{"subjects of the inboxes", func(c *config) { c.Stream.Subjects = []string{"_INBOX.>"} }, []string{"Stream.Subjects", `"_INBOX.>"`}},
		{"mirror", func(c *config) { c.Stream.Mirror = &jetstream.StreamSource{Name: "other"} }, []string{"Stream.Mirror"}},
		{"no ack", func(c *config) { c.Stream.NoAck = true }, []string{"Stream.NoAck"}},
		{"sealed", func(c *config) { c.Stream.Sealed = true }, []string{"Stream.Sealed"}},
		{"two consumer names", func(c *config) { c.Consumer.Name, c.Consumer.Durable = "a", "b" }, []string{"Consumer.Name", `"a"`, `"b"`, "set Durable alone"}},
		{"durable with a dot", func(c *config) { c.Consumer.Durable = "a.b" }, []string{"Consumer.Durable", `"a.b"`}},
		{"durable with a wildcard", func(c *config) { c.Consumer.Durable = ">" }, []string{"Consumer.Durable", `">"`}},
		{"filter", func(c *config) { c.Consumer.FilterSubject = "a" }, []string{"Consumer.FilterSubject"}},
		{"filters", func(c *config) { c.Consumer.FilterSubjects = []string{"a"} }, []string{"FilterSubjects"}},
		{"ack policy none", func(c *config) { c.Consumer.AckPolicy = jetstream.AckNonePolicy }, []string{"Consumer.AckPolicy"}},
		{"ack policy all", func(c *config) { c.Consumer.AckPolicy = jetstream.AckAllPolicy }, []string{"Consumer.AckPolicy"}},
		{"server backoff", func(c *config) { c.Consumer.BackOff = []time.Duration{1} }, []string{"Consumer.BackOff", "Retry.Backoff"}},
		{"priority groups", func(c *config) { c.Consumer.PriorityGroups = []string{"a"} }, []string{"PriorityGroups"}},
		{"priority policy", func(c *config) { c.Consumer.PriorityPolicy = jetstream.PriorityPolicyOverflow }, []string{"PriorityPolicy"}},
		{"deliver subject", func(c *config) { c.Consumer.DeliverSubject = "a" }, []string{"DeliverSubject", "push"}},
		{"deliver group", func(c *config) { c.Consumer.DeliverGroup = "a" }, []string{"DeliverGroup"}},
		{"flow control", func(c *config) { c.Consumer.FlowControl = true }, []string{"FlowControl"}},
		{"idle heartbeat", func(c *config) { c.Consumer.IdleHeartbeat = time.Second }, []string{"IdleHeartbeat"}},
		{"rate limit", func(c *config) { c.Consumer.RateLimit = 1 }, []string{"RateLimit"}},
		{"ack wait too short", func(c *config) { c.Consumer.AckWait = 99 * time.Millisecond }, []string{"Consumer.AckWait is 99ms", "100ms or more"}},
		{"ack wait below zero", func(c *config) { c.Consumer.AckWait = -1 }, []string{"Consumer.AckWait"}},
		{"ack pending below zero", func(c *config) { c.Consumer.MaxAckPending = -2 }, []string{"Consumer.MaxAckPending is -2"}},
		{"max deliver below attempts", func(c *config) { c.Consumer.MaxDeliver = 5 }, []string{"Consumer.MaxDeliver is 5", "more than Retry.MaxAttempts (5)"}},
		{
			"max deliver with unlimited attempts",
			func(c *config) { c.Consumer.MaxDeliver, c.Retry.MaxAttempts = 100, -1 },
			[]string{"Consumer.MaxDeliver is 100", "leave it out"},
		},
		{"batch below one", func(c *config) { c.Fetch.BatchSize = -1 }, []string{"Fetch.BatchSize is -1", "1 to 10000"}},
		{"batch too large", func(c *config) { c.Fetch.BatchSize = 10_001 }, []string{"Fetch.BatchSize is 10001"}},
		{"idle timeout too short", func(c *config) { c.Fetch.IdleTimeout = 999 * time.Millisecond }, []string{"Fetch.IdleTimeout is 999ms", "1s to 1m0s"}},
		{"idle timeout too long", func(c *config) { c.Fetch.IdleTimeout = 61 * time.Second }, []string{"Fetch.IdleTimeout is 1m1s"}},
		{"concurrency below one", func(c *config) { c.Concurrency = -1 }, []string{"Concurrency is -1", "1 to 4096"}},
		{"concurrency too large", func(c *config) { c.Concurrency = 4097 }, []string{"Concurrency is 4097"}},
		{"attempts", func(c *config) { c.Retry.MaxAttempts = -2 }, []string{"Retry.MaxAttempts is -2"}},
		{"backoff", func(c *config) { c.Retry.Backoff = []time.Duration{0, -1} }, []string{"Retry.Backoff[1]"}},
		{
			"everything at once",
			func(c *config) {
				*c = config{
					Consumer: mono.ConsumerConfig{AckWait: 1, FilterSubject: "a"}, Fetch: mono.FetchConfig{BatchSize: -1, IdleTimeout: 1},
					Concurrency: -1, Retry: mono.RetryPolicy{MaxAttempts: -2},
				}
			},
			[]string{"Stream.Name", "AckWait", "FilterSubject", "BatchSize", "IdleTimeout", "Concurrency", "MaxAttempts"},
		},
	}
	errs := make([]error, len(tests))
	startApp(t, emitter("net", ping), consumer("refused", func(r mono.EventRegistry, self mono.Module) error {
		for i, tt := range tests {
			c := onStream("s")
			tt.spoil(&c)
			errs[i] = r.RegisterEventStreamConsumer(ping, c, handleNoBatch, self)
		}
		return nil
	}))
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			wantError(t, errs[i], mono.ErrInvalidConfig, append(tt.say, `module "refused"`, "event net/Ping/v1")...)
		})
	}
}

// The settings of a StreamConsumerConfig reach the server, and what is left out
// gets its default.
func TestStreamConsumerConfig_reachesServer(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), consumer("pinger", func(r mono.EventRegistry, self mono.Module) error {
		return errors.Join(
			r.RegisterEventStreamConsumer(ping, onStream("s"), handleNoBatch, self),
			r.RegisterEventStreamConsumer(ping, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{
					Name: "t", Description: "for tests", Retention: mono.InterestPolicy, Storage: mono.MemoryStorage,
					MaxMsgs: 1000, MaxBytes: 1 << 20, MaxAge: time.Hour, Duplicates: time.Minute, Metadata: map[string]string{"team": "a"},
				},
				Consumer: mono.ConsumerConfig{
					Durable: "custom", Description: "mine", AckWait: 7 * time.Second, MaxAckPending: 70, MaxDeliver: 77,
					Metadata: map[string]string{"team": "b"},
				},
			}, handleNoBatch, self),
			r.RegisterEventStreamConsumer(ping, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "s"}, Consumer: mono.ConsumerConfig{Name: "named"},
				Fetch: mono.FetchConfig{BatchSize: 1000}, Concurrency: 2,
			}, handleNoBatch, self),
		)
	}))

	s := streamInfo(t, app, "s").Config
	if s.Retention != mono.LimitsPolicy || s.Storage != mono.FileStorage || s.MaxBytes != 1<<30 || s.Discard != jetstream.DiscardNew {
		t.Errorf("a stream with defaults is %+v", s)
	}
	d := consumerInfo(t, app, "s", "pinger_net_ping_v1").Config
	if d.AckPolicy != jetstream.AckExplicitPolicy || d.AckWait != 30*time.Second || d.MaxAckPending != 10_000 || d.MaxDeliver != -1 ||
		d.FilterSubject != ping.Subject || d.DeliverPolicy != jetstream.DeliverAllPolicy || d.Durable != "pinger_net_ping_v1" {
		t.Errorf("a consumer with defaults is %+v", d)
	}
	if n := consumerInfo(t, app, "s", "named").Config.MaxAckPending; n != 40_000 {
		t.Errorf("MaxAckPending of 2 batches of 1000 is %d, want 40000", n)
	}

	u := streamInfo(t, app, "t").Config
	if u.Description != "for tests" || u.Retention != mono.InterestPolicy || u.Storage != mono.MemoryStorage || u.MaxMsgs != 1000 ||
		u.MaxBytes != 1<<20 || u.MaxAge != time.Hour || u.Duplicates != time.Minute || u.Metadata["team"] != "a" {
		t.Errorf("the stream is %+v", u)
	}
	c := consumerInfo(t, app, "t", "custom").Config
	if c.Description != "mine" || c.AckWait != 7*time.Second || c.MaxAckPending != 70 || c.MaxDeliver != 77 || c.Metadata["team"] != "b" {
		t.Errorf("the consumer is %+v", c)
	}
}

// Registrations are taken inside RegisterEventConsumers and nowhere else.
func TestRegistry_closed(t *testing.T) {
	t.Parallel()
	var kept mono.EventRegistry
	pinging := consumer("pinger", func(r mono.EventRegistry, _ mono.Module) error {
		kept = r
		return nil
	})
	var inStart error
	pinging.start = func(context.Context) error {
		inStart = kept.RegisterEventConsumer(ping, handleNothing, pinging)
		return nil
	}
	app := newApp(t, emitter("net", ping), pinging)

	if err := app.Registry().RegisterEventConsumer(ping, handleNothing, pinging); err == nil {
		t.Error("a registration before Start was taken")
	}
	if err := app.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	say := []string{"event net/Ping/v1", "inside RegisterEventConsumers"}
	wantError(t, inStart, mono.ErrAlreadyStarted, say...)
	wantError(t, kept.RegisterEventConsumer(ping, handleNothing, pinging), mono.ErrAlreadyStarted, say...)
	wantError(t, kept.RegisterEventStreamConsumer(ping, onStream("s"), handleNoBatch, pinging), mono.ErrAlreadyStarted, say...)
	wantError(t, app.Register(emitter("late")), mono.ErrAlreadyStarted, "register")
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	if err := app.Registry().RegisterEventConsumer(ping, handleNothing, pinging); err == nil {
		t.Error("a registration after Stop was taken")
	}
}

// What a caller does to a list changes nothing about the registry.
func TestRegistry_lists(t *testing.T) {
	t.Parallel()
	v1, v2 := mustEvent("b", "A", "v1"), mustEvent("b", "A", "v2")
	app := startApp(t, emitter("z", mustEvent("b", "C", "v1"), v2, mustEvent("a", "Z", "v1"), v1))
	var names []string
	for _, e := range app.Registry().GetAllEvents() {
		names = append(names, e.String())
	}
	if want := []string{"a/Z/v1", "b/A/v1", "b/A/v2", "b/C/v1"}; !slices.Equal(names, want) {
		t.Errorf("the events are %q, want %q", names, want)
	}
	clear(app.Registry().GetAllEvents())
	clear(app.Registry().GetEventsByModule("b"))
	if got := app.Registry().GetEventsByModule("b"); len(got) != 3 || got[0] != v1 || got[1] != v2 {
		t.Errorf("the events of b are %v", got)
	}
	// A module may own events under another name than its own: it is listed by
	// the event's.
	if got := app.Registry().GetEventsByModule("z"); len(got) != 0 {
		t.Errorf("the events of z are %v", got)
	}
}

func TestStart_refusesDeclarations(t *testing.T) {
	t.Parallel()
	sameSubject := mustEvent("net", "Other", "v1", ping.Subject)
	byHand := mono.BaseEventDefinition{ModuleName: "net", Name: "By Hand", Version: "v1", Subject: "a.b"}
	noSubject := mono.BaseEventDefinition{ModuleName: "net", Name: "NoSubject", Version: "v1"}
	err := startFails(t,
		emitter("first", ping),
		emitter("second", ping),
		emitter("third", sameSubject),
		emitter("fourth", byHand, noSubject, mono.BaseEventDefinition{}),
		consumer("fifth", func(mono.EventRegistry, mono.Module) error { return errors.New("no mood") }),
		consumer("sixth", func(mono.EventRegistry, mono.Module) error { panic("oh no") }),
		consumer("seventh", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(mustEvent("net", "Unknown", "v1"), handleNothing, self)
		}),
	)
	wantError(t, err, mono.ErrDuplicate, "start app",
		`module "second": event net/Ping/v1`, `module "first" declares it too`,
		`module "third": event net/Other/v1`, `subject "events.net.v1.ping" is that of event net/Ping/v1 of module "first"`)
	wantError(t, err, mono.ErrInvalidName, `module "fourth"`, `"By Hand"`)
	wantError(t, err, mono.ErrInvalidSubject, `"net/NoSubject/v1"`)
	wantError(t, err, mono.ErrUnknownEvent, `module "seventh"`, "net/Unknown/v1")
	wantError(t, err, nil, `module "fifth": no mood`, `module "sixth": panic: oh no`)
	if _, ok := errors.AsType[*mono.PanicError](err); !ok {
		t.Error("the error does not carry the panic")
	}
}

// A durable name that two modules come to is refused, naming both.
func TestStart_refusesDurableCollision(t *testing.T) {
	t.Parallel()
	register := func(e mono.BaseEventDefinition) func(r mono.EventRegistry, self mono.Module) error {
		return func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(e, onStream("s"), handleNoBatch, self)
		}
	}
	one, two := mustEvent("b_c", "D", "v1"), mustEvent("c", "D", "v1")
	err := startFails(t, emitter("emits", one, two), consumer("a", register(one)), consumer("a_b", register(two)))
	wantError(t, err, mono.ErrDuplicate, `"a_b_c_d_v1"`, `stream "s"`, `module "a"`, `module "a_b"`, "set Consumer.Durable")
}

// A module that panics where it says what it emits fails the start, as one does
// that panics elsewhere; it took the process down, with the server running.
func TestStart_panicInEmitEvents(t *testing.T) {
	t.Parallel()
	for name, m := range map[string]mono.Module{"EmitEvents": &panickyEmitter{emit: true}, "SetEventBus": &panickyEmitter{}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			app, err := mono.New(mono.WithStoreDir(dir), quiet())
			if err != nil {
				t.Fatal(err)
			}
			if err := app.Register(m); err != nil {
				t.Fatal(err)
			}
			err = func() (err error) {
				defer func() {
					if v := recover(); v != nil {
						t.Errorf("Start panicked: %v", v)
					}
				}()
				return app.Start(within(t))
			}()
			if _, ok := errors.AsType[*mono.PanicError](err); !ok {
				t.Errorf("Start = %v, want a PanicError", err)
			}
			// Whatever began is undone: the folder is free.
			monotest.AppWith(t, []mono.Option{mono.WithStoreDir(dir), quiet()})
		})
	}
}

type panickyEmitter struct {
	testModule
	emit bool
}

func (m *panickyEmitter) Name() string { return "panicky" }

func (m *panickyEmitter) SetEventBus(mono.EventBus) {
	if !m.emit {
		panic("oh no")
	}
}

func (m *panickyEmitter) EmitEvents() []mono.BaseEventDefinition { panic("oh no") }
