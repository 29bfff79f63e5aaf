package mono_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// Two modules name different streams for one event. Each gets every event once,
// whatever the retention of the streams, also when the App and its server are
// stopped and started in between and while events are published.
func TestTopology_everyStreamGetsEverything(t *testing.T) {
	t.Parallel()
	work, interest := autoAck("Q", mono.WorkQueuePolicy), autoAck("I", mono.InterestPolicy)
	limits, dropping := autoAck("L", mono.LimitsPolicy), autoAck("D", mono.LimitsPolicy)
	limits.Stream.MaxBytes = 0    // so it refuses when it is full
	dropping.Stream.MaxMsgs = 1e6 // and drops the oldest then
	second := work
	second.Stream.Name = "Q2"

	tests := []struct {
		name string
		a, b mono.StreamConsumerConfig
	}{
		{name: "two work queues", a: work, b: second},
		{name: "limits and work queue", a: limits, b: work},
		{name: "work queue and interest", a: work, b: interest},
		{name: "dropping limits and work queue", a: dropping, b: work},
		{name: "dropping limits and interest", a: dropping, b: interest},
		{name: "limits and dropping limits", a: limits, b: dropping},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			e := defineEvent(t, "Created")
			a, b := newTally(), newTally()
			srv := monotest.Server(t)
			// One process publishes all the time, the other one consumes and is
			// restarted.
			emit := runApp(t, onServer(srv), emitter("shop", e))
			app := makeApp(t, append(onServer(srv), mono.WithEvents(e)),
				durableModule("a", e, tt.a, a.handle), durableModule("b", e, tt.b, b.handle))
			mustStart(t, app)

			want := payloads("before-", 0, 150)
			publishAll(t, emit.Bus(), e, want)
			a.waitFor(t, want)
			b.waitFor(t, want)

			pub := publishStubbornly(t, emit.Bus(), e, "during-")
			pub.more(t, 60)
			mustStop(t, app)
			pub.more(t, 60)
			mustStart(t, app)
			pub.more(t, 60)
			srv.Stop()
			srv.Start()
			pub.more(t, 60)
			mustStop(t, app)
			srv.Stop()
			srv.Start()
			mustStart(t, app)
			pub.more(t, 60)
			want = append(want, pub.end()...)

			after := payloads("after-", 0, 100)
			publishAll(t, emit.Bus(), e, after)
			want = append(want, after...)
			for name, c := range map[string]*tally{"a": a, "b": b} {
				c.waitFor(t, want)
				if twice := c.storedTwice(); len(twice) > 0 {
					t.Errorf("module %s got %d of %d events twice: %q", name, len(twice), len(want), twice[:min(len(twice), 20)])
				}
			}
		})
	}
}

// The same in one process with an embedded server: a restart of the App is a
// restart of the server.
func TestTopology_embeddedRestarts(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	a, b, c := newTally(), newTally(), newTally()
	app := makeApp(t, inFolder(t.TempDir()), emitter("shop", e),
		durableModule("a", e, autoAck("QA", mono.WorkQueuePolicy), a.handle),
		durableModule("b", e, autoAck("QB", mono.WorkQueuePolicy), b.handle),
		durableModule("c", e, autoAck("IC", mono.InterestPolicy), c.handle))
	var want []string
	for round := range 5 {
		mustStart(t, app)
		ps := payloads(fmt.Sprintf("%d-", round), 0, 100)
		want = append(want, ps...)
		publishAll(t, app.Bus(), e, ps)
		mustStop(t, app) // with most of them still to be handled
	}
	mustStart(t, app)
	for name, c := range map[string]*tally{"a": a, "b": b, "c": c} {
		c.waitFor(t, want)
		if twice := c.deliveredTwice(); len(twice) > 0 {
			t.Errorf("module %s got %d of %d events twice: %q", name, len(twice), len(want), twice[:min(len(twice), 20)])
		}
	}
}

// A program with one work queue gets a second one in its next version. The
// events that were published before stay with the first, and both get every
// event from then on. The consumer of the first keeps its position.
func TestTopology_secondWorkQueueLater(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{mono.WorkQueuePolicy, mono.InterestPolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			e, other := defineEvent(t, "Created"), defineEvent(t, "Other")
			srv := monotest.Server(t)
			emit := runApp(t, onServer(srv), emitter("shop", e, other))
			first, second, rest := newTally(), newTally(), newTally()
			opts := append(onServer(srv), mono.WithEvents(e, other))
			// The first stream has a second event, so a subject of its own stays.
			keep := durableModule("keep", other, autoAck("Q1", retention), rest.handle)

			v1 := runApp(t, opts, durableModule("a", e, autoAck("Q1", retention), first.handle), keep)
			handled := payloads("handled-", 0, 50)
			publishAll(t, emit.Bus(), e, handled)
			first.waitFor(t, handled)
			mustStop(t, v1)
			waiting := payloads("waiting-", 0, 70)
			publishAll(t, emit.Bus(), e, waiting)
			pub := publishStubbornly(t, emit.Bus(), e, "during-")
			pub.more(t, 10)

			runApp(t, opts, durableModule("a", e, autoAck("Q1", retention), first.handle), keep,
				durableModule("b", e, autoAck("Q2", retention), second.handle))
			pub.more(t, 30)
			during := pub.end()
			later := payloads("later-", 0, 100)
			publishAll(t, emit.Bus(), e, later)
			others := payloads("other-", 0, 10)
			publishAll(t, emit.Bus(), other, others)

			first.waitFor(t, slices.Concat(handled, waiting, during, later))
			second.waitFor(t, slices.Concat(during[len(during)-20:], later))
			rest.waitFor(t, others)
			for name, c := range map[string]*tally{"first": first, "second": second, "rest": rest} {
				if twice := c.deliveredTwice(); len(twice) > 0 {
					t.Errorf("%s: handled twice: %q", name, twice)
				}
			}
			if second.has("handled-0") || second.has("waiting-0") {
				t.Error("the new stream got events of before; its owner is new as well, so how?")
			}
		})
	}
}

// A stream that gives up its subject gets the events from their new owner: all
// of them, although it stores other events after them before it begins to read.
// A server left to itself begins at the time of the stream's last message.
func TestTopology_nothingIsSkippedWhenASubjectMoves(t *testing.T) {
	t.Parallel()
	e, other := defineEvent(t, "Created"), defineEvent(t, "Other")
	first, rest, second := newTally(), newTally(), newTally()
	srv := monotest.Server(t)
	opts := append(onServer(srv), mono.WithEvents(e, other))
	a := durableModule("a", e, autoAck("Q1", mono.WorkQueuePolicy), first.handle)
	keep := durableModule("keep", other, autoAck("Q1", mono.WorkQueuePolicy), rest.handle)
	v1 := runApp(t, opts, a, keep)
	before := payloads("before-", 0, 20)
	publishAll(t, v1.Bus(), e, before) // handled, so that the stream is empty and has a past
	first.waitFor(t, before)
	mustStop(t, v1)

	v2 := runApp(t, opts, a, keep, durableModule("b", e, autoAck("Q2", mono.WorkQueuePolicy), second.handle))
	want := payloads("moved-", 0, 50)
	publishAll(t, v2.Bus(), e, want)
	publishAll(t, v2.Bus(), other, []string{"x"}) // the last message of Q1 is younger than those
	rest.waitFor(t, []string{"x"})
	second.waitFor(t, want)
	first.waitFor(t, want)
}

// Another process adds a stream for an event that this one consumes already,
// while it runs. Both get every event from then on, and neither is disturbed
// when the other one is started again.
func TestTopology_secondProcess(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	first, second := newTally(), newTally()
	one := runApp(t, onServer(srv), emitter("shop", e), durableModule("a", e, autoAck("Q1", mono.WorkQueuePolicy), first.handle))
	want := payloads("alone-", 0, 50)
	publishAll(t, one.Bus(), e, want)
	pub := publishStubbornly(t, one.Bus(), e, "p-")
	pub.more(t, 20)

	two := makeApp(t, append(onServer(srv), mono.WithEvents(e)),
		durableModule("b", e, autoAck("Q2", mono.WorkQueuePolicy), second.handle))
	mustStart(t, two)
	since := pub.count() + 1 // one may be on its way
	pub.more(t, 50)
	state := serverState(t, srv.Conn())
	for range 3 {
		mustStop(t, two)
		pub.more(t, 20)
		mustStart(t, two)
	}
	acked := pub.end()
	mustStop(t, one)
	mustStart(t, one)
	after := payloads("after-", 0, 50)
	publishAll(t, one.Bus(), e, after)

	first.waitFor(t, slices.Concat(want, acked, after))
	second.waitFor(t, slices.Concat(acked[since:], after))
	for name, c := range map[string]*tally{"first": first, "second": second} {
		if twice := c.deliveredTwice(); len(twice) > 0 {
			t.Errorf("%s: handled twice: %q", name, twice)
		}
	}
	if now := serverState(t, srv.Conn()); now != state {
		t.Errorf("starting again changed the server from\n%s\nto\n%s", state, now)
	}
}

// Two streams that hand one event each to the other: neither is there first.
func TestTopology_streamsThatSourceFromEachOther(t *testing.T) {
	t.Parallel()
	created, paid := defineEvent(t, "Created"), defineEvent(t, "Paid")
	srv := monotest.Server(t)
	opts := append(onServer(srv), mono.WithEvents(created, paid))
	plain := autoAckPlain
	all := map[string]*tally{}
	mod := func(name string, e mono.BaseEventDefinition, stream string) *testModule {
		all[name] = newTally()
		return durableModule(name, e, plain(stream), all[name].handle)
	}
	runApp(t, opts, mod("x", created, "Z"))
	runApp(t, opts, mod("y", paid, "A"))
	app := runApp(t, opts, mod("xa", created, "A"), mod("ya", paid, "Z"))
	want := payloads("n-", 0, 50)
	publishAll(t, app.Bus(), created, want)
	publishAll(t, app.Bus(), paid, want)
	for name, c := range all {
		c.waitFor(t, want)
		if twice := c.deliveredTwice(); len(twice) > 0 {
			t.Errorf("%s: handled twice: %q", name, twice)
		}
	}
}

func autoAckPlain(name string) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: name}, AutoAck: true}
}

// What cannot be arranged is refused at Start, in words that name the stream,
// the field and both values, and nothing on the server has changed then.
func TestTopology_refusedBeforeAnythingChanges(t *testing.T) {
	t.Parallel()
	e, other := defineEvent(t, "Created"), defineEvent(t, "Other")
	tests := []struct {
		name    string
		foreign []jetstream.StreamConfig
		modules func(h mono.EventStreamConsumerHandler) []mono.Module
		opts    []mono.Option
		want    []string
	}{
		{
			name:    "another value of a setting",
			foreign: []jetstream.StreamConfig{{Name: "S", Subjects: []string{e.Subject}, MaxMsgs: 5}},
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				cfg := autoAckPlain("S")
				cfg.Stream.MaxMsgs = 7
				return []mono.Module{durableModule("billing", e, cfg, h)}
			},
			want: []string{`"S"`, `"billing"`, "MaxMsgs", "5", "7"},
		},
		{
			name:    "another retention",
			foreign: []jetstream.StreamConfig{{Name: "S", Subjects: []string{e.Subject}, Retention: jetstream.WorkQueuePolicy}},
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				return []mono.Module{durableModule("billing", e, autoAckPlain("S"), h)}
			},
			want: []string{`"S"`, `"billing"`, "Retention", "WorkQueue", "Limits"},
		},
		{
			name:    "another stream's work queue has the subject",
			foreign: []jetstream.StreamConfig{{Name: "FOREIGN", Subjects: []string{"events.shop.>"}, Retention: jetstream.WorkQueuePolicy}},
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				return []mono.Module{durableModule("billing", e, autoAckPlain("S"), h)}
			},
			want: []string{`"S"`, `"FOREIGN"`, e.Subject},
		},
		{
			name: "two consumers of one event in a work queue",
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				return []mono.Module{
					durableModule("billing", e, autoAck("Q", mono.WorkQueuePolicy), h),
					durableModule("audit", e, autoAck("Q", mono.WorkQueuePolicy), h),
				}
			},
			want: []string{`"Q"`, `"billing"`, `"audit"`},
		},
		{
			name: "a good stream beside a bad one is not made",
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				one, two := autoAckPlain("B"), autoAckPlain("B")
				one.Stream.MaxAge, two.Stream.MaxAge = time.Hour, 2*time.Hour
				return []mono.Module{
					durableModule("good", other, autoAckPlain("A"), h),
					durableModule("billing", e, one, h),
					durableModule("audit", other, two, h),
				}
			},
			want: []string{`"B"`, `"billing"`, `"audit"`, "MaxAge"},
		},
		{
			name:    "a wildcard that overlaps with a foreign stream",
			foreign: []jetstream.StreamConfig{{Name: "FOREIGN", Subjects: []string{other.Subject}}},
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				wide := autoAckPlain("WIDE")
				wide.Stream.Subjects = []string{"events.shop.>"}
				return []mono.Module{durableModule("billing", e, wide, h), durableModule("good", e, autoAckPlain("A"), h)}
			},
			want: []string{`"WIDE"`, `"FOREIGN"`},
		},
		{
			name:    "what the server never changes, although updates are allowed",
			foreign: []jetstream.StreamConfig{{Name: "S", Subjects: []string{e.Subject}, Retention: jetstream.WorkQueuePolicy}},
			modules: func(h mono.EventStreamConsumerHandler) []mono.Module {
				return []mono.Module{
					durableModule("good", other, autoAckPlain("A"), h),
					durableModule("billing", e, autoAckPlain("S"), h),
				}
			},
			opts: []mono.Option{mono.WithStreamUpdates()},
			want: []string{`"S"`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			nc := srv.Conn()
			js := jetStreamOf(t, nc)
			for _, s := range tt.foreign {
				if _, err := js.CreateStream(t.Context(), s); err != nil {
					t.Fatal(err)
				}
			}
			before := serverState(t, nc)
			opts := append(onServer(srv), mono.WithEvents(e, other))
			app := makeApp(t, append(opts, tt.opts...), tt.modules(newTally().handle)...)
			err := app.Start(within(t))
			wantError(t, err, mono.ErrStreamConflict, tt.want...)
			if after := serverState(t, nc); after != before {
				t.Errorf("the refused start changed the server from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// An existing durable consumer's filter or kind is not changed behind its back.
func TestTopology_consumerConflicts(t *testing.T) {
	t.Parallel()
	e, other := defineEvent(t, "Created"), defineEvent(t, "Other")
	tests := []struct {
		name string
		have jetstream.ConsumerConfig
		want []string
	}{
		{
			name: "another filter",
			have: jetstream.ConsumerConfig{Durable: "mine", AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: other.Subject},
			want: []string{`"mine"`, `"S"`, e.Subject, other.Subject},
		},
		{
			name: "several filters",
			have: jetstream.ConsumerConfig{
				Durable: "mine", AckPolicy: jetstream.AckExplicitPolicy,
				FilterSubjects: []string{other.Subject, e.Subject},
			},
			want: []string{`"mine"`, `"S"`, e.Subject},
		},
		{
			name: "a push consumer",
			have: jetstream.ConsumerConfig{Durable: "mine", AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: e.Subject, DeliverSubject: "x"},
			want: []string{`"mine"`, `"S"`, "push"},
		},
		{
			name: "another ack policy",
			have: jetstream.ConsumerConfig{Durable: "mine", AckPolicy: jetstream.AckNonePolicy, FilterSubject: e.Subject},
			want: []string{`"mine"`, `"S"`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			srv := monotest.Server(t)
			nc := srv.Conn()
			js := jetStreamOf(t, nc)
			if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{e.Subject, other.Subject}}); err != nil {
				t.Fatal(err)
			}
			create := js.CreateConsumer
			if tt.have.DeliverSubject != "" {
				if _, err := js.CreatePushConsumer(t.Context(), "S", tt.have); err != nil {
					t.Fatal(err)
				}
			} else if _, err := create(t.Context(), "S", tt.have); err != nil {
				t.Fatal(err)
			}
			before := serverState(t, nc)
			cfg := autoAckPlain("S")
			cfg.Consumer.Durable = "mine"
			app := makeApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("billing", e, cfg, newTally().handle))
			wantError(t, app.Start(within(t)), mono.ErrStreamConflict, tt.want...)
			if after := serverState(t, nc); after != before {
				t.Errorf("the refused start changed the server from\n%s\nto\n%s", before, after)
			}
		})
	}
}

// A second process may name a work queue that has a consumer for the event. It
// cannot know who that is, but is told what to do.
func TestTopology_workQueueOfAnotherProcess(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	runApp(t, onServer(srv), emitter("shop", e), durableModule("a", e, autoAck("Q", mono.WorkQueuePolicy), newTally().handle))
	two := makeApp(t, append(onServer(srv), mono.WithEvents(e)), durableModule("b", e, autoAck("Q", mono.WorkQueuePolicy), newTally().handle))
	wantError(t, two.Start(within(t)), mono.ErrStreamConflict, `"Q"`, `"b"`)
}

func TestTopology_streamUpdates(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	js := jetStreamOf(t, srv.Conn())
	have := jetstream.StreamConfig{
		Name: "S", Subjects: []string{e.Subject, "by.hand"}, MaxMsgs: 5, Description: "by hand", MaxAge: time.Hour,
		Metadata: map[string]string{"team": "x"},
	}
	if _, err := js.CreateStream(t.Context(), have); err != nil {
		t.Fatal(err)
	}
	cfg := autoAckPlain("S")
	cfg.Stream.MaxMsgs = 7
	app := runApp(t, append(onServer(srv), mono.WithEvents(e), mono.WithStreamUpdates()), durableModule("billing", e, cfg, newTally().handle))
	got := streamInfo(t, app, "S").Config
	if got.MaxMsgs != 7 {
		t.Errorf("MaxMsgs is %d, want 7", got.MaxMsgs)
	}
	if got.MaxAge != time.Hour || got.Description != "by hand" || !slices.Equal(got.Subjects, have.Subjects) || got.Metadata["team"] != "x" {
		t.Errorf("what nobody asked for was changed: %+v", got)
	}
}

// Instances of one program start at the same moment, on an empty server. They
// make the same streams, share the work, and each event is handled once.
func TestTopology_instancesStartTogether(t *testing.T) {
	t.Parallel()
	url := serverProcess(t)
	for round := range 10 {
		e, err := mono.NewEvent("shop", fmt.Sprintf("Round%d", round), "v1")
		if err != nil {
			t.Fatal(err)
		}
		first, second := newTally(), newTally()
		name := func(s string) string { return fmt.Sprintf("%s%d", s, round) }
		opts := append(onURL(url), mono.WithEvents(e))
		instance := func() *mono.App {
			return makeApp(t, opts,
				durableModule("a", e, autoAck(name("QA"), mono.WorkQueuePolicy), first.handle),
				durableModule("b", e, autoAck(name("QB"), mono.WorkQueuePolicy), second.handle))
		}
		apps := []*mono.App{instance(), instance(), instance()}
		startTogether(t, apps)
		want := payloads(name("r")+"-", 0, 60)
		publishAll(t, apps[round%3].Bus(), e, want)
		for name, c := range map[string]*tally{"a": first, "b": second} {
			c.waitFor(t, want)
			if twice := c.deliveredTwice(); len(twice) > 0 {
				t.Errorf("round %d: module %s handled %d events twice", round, name, len(twice))
			}
		}
		for _, app := range apps {
			mustStop(t, app)
		}
	}
}

func startTogether(t *testing.T, apps []*mono.App) {
	t.Helper()
	ctx := within(t)
	var wg sync.WaitGroup
	begin := make(chan struct{})
	errs := make([]error, len(apps))
	for i, app := range apps {
		wg.Go(func() {
			<-begin
			errs[i] = app.Start(ctx)
		})
	}
	close(begin)
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// Instances of the next version start at the same moment, and each finds the
// work queue that has to give up its subject. Nothing is lost or doubled.
func TestTopology_instancesRearrangeTogether(t *testing.T) {
	t.Parallel()
	url := serverProcess(t)
	for round := range 10 {
		e, err := mono.NewEvent("shop", fmt.Sprintf("Move%d", round), "v1")
		if err != nil {
			t.Fatal(err)
		}
		first, second := newTally(), newTally()
		name := func(s string) string { return fmt.Sprintf("%s%d", s, round) }
		opts := append(onURL(url), mono.WithEvents(e))
		a := func() mono.Module {
			return durableModule("a", e, autoAck(name("MA"), mono.WorkQueuePolicy), first.handle)
		}
		b := func() mono.Module {
			return durableModule("b", e, autoAck(name("MB"), mono.WorkQueuePolicy), second.handle)
		}
		old := runApp(t, opts, a())
		pub := publishStubbornly(t, old.Bus(), e, "p-")
		pub.more(t, 20)
		apps := []*mono.App{makeApp(t, opts, a(), b()), makeApp(t, opts, a(), b()), makeApp(t, opts, b(), a())}
		startTogether(t, apps)
		since := pub.count() + 1
		pub.more(t, 50)
		acked := pub.end()
		for name, c := range map[string]*tally{"a": first, "b": second} {
			want := acked
			if name == "b" {
				want = acked[since:]
			}
			c.waitFor(t, want)
			if twice := c.storedTwice(); len(twice) > 0 {
				t.Errorf("round %d: module %s got %d of %d events twice", round, name, len(twice), len(acked))
			}
		}
		for _, app := range append(apps, old) {
			mustStop(t, app)
		}
	}
}

// Different programs share a stream that exists, and add their events to it at
// the same moment. Neither takes away what the other one added.
func TestTopology_programsShareAStream(t *testing.T) {
	t.Parallel()
	url := serverProcess(t)
	for round := range 10 {
		name := fmt.Sprintf("SHARED%d", round)
		var apps []*mono.App
		var events []mono.BaseEventDefinition
		var tallies []*tally
		cfg := autoAckPlain(name)
		cfg.Stream.MaxBytes = 16 << 20
		for i := range 4 {
			e, err := mono.NewEvent("shop", fmt.Sprintf("Shared%dEvent%d", round, i), "v1")
			if err != nil {
				t.Fatal(err)
			}
			c := newTally()
			module := fmt.Sprintf("m%d", i)
			app := makeApp(t, onURL(url), emitter("e"+module, e), durableModule(module, e, cfg, c.handle))
			if i == 0 {
				mustStart(t, app) // it makes the stream
			} else {
				apps = append(apps, app)
			}
			events, tallies = append(events, e), append(tallies, c)
		}
		startTogether(t, apps)
		for i, e := range events {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			_, err := apps[0].Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte("x")})
			cancel()
			if err != nil {
				t.Errorf("round %d: the event of program %d: %v", round, i, err)
				continue
			}
			tallies[i].waitFor(t, []string{"x"})
		}
		if t.Failed() {
			return
		}
	}
}

// The order in which modules are registered decides nothing on the server.
func TestTopology_orderOfRegistration(t *testing.T) {
	t.Parallel()
	created, paid := defineEvent(t, "Created"), defineEvent(t, "Paid")
	h := newTally().handle
	modules := []mono.Module{
		durableModule("a", created, autoAck("QA", mono.WorkQueuePolicy), h),
		durableModule("b", created, autoAck("QB", mono.WorkQueuePolicy), h),
		durableModule("c", paid, autoAck("QA", mono.WorkQueuePolicy), h),
		durableModule("d", paid, autoAckPlain("L"), h),
	}
	var states []string
	for _, order := range [][]int{{0, 1, 2, 3}, {3, 2, 1, 0}, {2, 0, 3, 1}} {
		srv := monotest.Server(t)
		var ms []mono.Module
		for _, i := range order {
			ms = append(ms, modules[i])
		}
		runApp(t, append(onServer(srv), mono.WithEvents(created, paid)), ms...)
		var lines []string
		for line := range strings.Lines(serverState(t, srv.Conn())) {
			line, _, _ = strings.Cut(line, " created ")
			lines = append(lines, line)
		}
		states = append(states, strings.Join(lines, "\n"))
	}
	for _, s := range states[1:] {
		if s != states[0] {
			t.Errorf("one order makes\n%s\n\nanother one\n%s", states[0], s)
		}
	}
}

// An interest stream says of a message that nobody wants yet that it is stored, and
// drops it. What is acknowledged while a new stream is arranged has to be handled all
// the same, by the consumer of a stream of its own and by those that share an event.
func TestTopology_interestFromTheFirst(t *testing.T) {
	t.Parallel()
	for name, retentions := range map[string][]jetstream.RetentionPolicy{
		"alone":  {mono.InterestPolicy},
		"shared": {mono.InterestPolicy, mono.WorkQueuePolicy, mono.InterestPolicy},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for range 10 {
				e := defineEvent(t, "Created")
				srv := monotest.Server(t)
				var modules []mono.Module
				tallies := make([]*tally, len(retentions))
				for i, retention := range retentions {
					tallies[i] = newTally()
					modules = append(modules, durableModule(fmt.Sprint("m", i), e, autoAck(fmt.Sprint("S", i), retention), tallies[i].handle))
				}
				pub := publishFromTheFirst(t, srv, e.Subject)
				app := runApp(t, append(onServer(srv), mono.WithEvents(e)), modules...)
				pub.more(t, 20)
				want := pub.end()
				for _, c := range tallies {
					c.waitFor(t, want)
				}
				if err := app.Stop(within(t)); err != nil {
					t.Error(err)
				}
			}
		})
	}
}

// publishFromTheFirst publishes with nats.go, without a pause, from before there is a
// stream.
func publishFromTheFirst(t testing.TB, srv *monotest.TestServer, subject string) *stubbornPublisher {
	t.Helper()
	js, err := jetstream.New(srv.Conn())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p := &stubbornPublisher{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for i := 0; ctx.Err() == nil; i++ {
			payload := fmt.Sprint(i)
			_, err := js.Publish(context.WithoutCancel(ctx), subject, []byte(payload), jetstream.WithRetryAttempts(0))
			if err != nil {
				continue
			}
			p.mu.Lock()
			p.acked = append(p.acked, payload)
			p.n++
			p.mu.Unlock()
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
	return p
}
