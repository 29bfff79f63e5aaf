package triage_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// openOld prepares consumer billing for replays as tools of earlier versions do.
func (b *bundle) openOld(t *testing.T) {
	t.Helper()
	s, err := b.js.Stream(t.Context(), ordersStream)
	must(t, err)
	cfg := s.CachedInfo().Config
	cfg.Subjects = append(cfg.Subjects, dlq.OldReplaySubjects(ordersStream, billing))
	_, err = b.js.UpdateStream(t.Context(), cfg)
	must(t, err)
	c, err := s.Consumer(t.Context(), billing)
	must(t, err)
	has := c.CachedInfo().Config
	has.FilterSubjects, has.FilterSubject = []string{ordersSubject, dlq.OldReplaySubjects(ordersStream, billing)}, ""
	_, err = s.UpdateConsumer(t.Context(), has)
	must(t, err)
}

// sent lists the subjects on which stream "orders" ever took replays.
func (b *bundle) sent(t *testing.T) []string {
	t.Helper()
	s, err := b.js.Stream(t.Context(), ordersStream)
	must(t, err)
	info, err := s.Info(t.Context(), jetstream.WithSubjectFilter("monotel.>"))
	must(t, err)
	var all []string
	for subject := range info.State.Subjects {
		all = append(all, subject)
	}
	slices.Sort(all)
	return all
}

// An operation that a tool of an earlier version has begun is gone on with: what that has
// sent, on its own subject, is not sent again.
func TestRun_begunByAnOlderTool(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 4
	ids := b.capture(t, n)
	b.openOld(t)
	p := b.plan(t, triage.Selection{}, triage.Options{NoWait: true})
	claim := func(i int) *dlq.Entry {
		e := b.get(t, ids[i])
		must(t, b.store.Change(t.Context(), e, dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@ops", Operation: p.ID, Target: triage.TargetConsumer}, nil))
		return e
	}
	send := func(e *dlq.Entry) {
		_, err := b.js.PublishMsg(t.Context(), &nats.Msg{
			Subject: dlq.OldReplaySubject(ordersStream, billing, e.ID, p.ID), Data: e.Data, Header: nats.Header{dlq.HeaderReplayStream: {"DLQ"}},
		})
		must(t, err)
	}
	send(claim(0)) // sent, and handled before the operation goes on
	claim(1)       // not sent
	waiting := claim(2)
	send(waiting)
	c, err := b.js.Consumer(t.Context(), ordersStream, billing)
	must(t, err)
	m, err := c.Next(jetstream.FetchMaxWait(longestWait))
	must(t, err)
	b.handle(t, &target{handled: make(map[string]int)}, billing, m, func(string) bool { return false })
	triage.MarkStarted(t, b.desk, p.ID)

	// Nobody fetches, so the third is found in the stream, not by its outcome.
	if op := b.run(t, p.ID); op.Claimed != n || op.Resolved != 1 {
		t.Errorf("operation %+v", op)
	}
	billed := b.consume(t, billing, nil)
	for op := b.run(t, p.ID); op.Resolved < n; {
		var err error
		op, err = b.desk.Operation(within(t), p.ID)
		must(t, err)
	}
	if messages, most := billed.total(); messages != n-1 || most != 1 {
		t.Errorf("%d were handled, one of them %d times", messages, most)
	}
	want := []string{
		dlq.OldReplaySubject(ordersStream, billing, ids[0], p.ID), dlq.OldReplaySubject(ordersStream, billing, ids[2], p.ID),
		dlq.ReplaySubject(ordersStream, billing, ids[1], p.ID), dlq.ReplaySubject(ordersStream, billing, ids[3], p.ID),
	}
	slices.Sort(want)
	if got := b.sent(t); !slices.Equal(got, want) {
		t.Errorf("sent on\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// A plan looks at the durable that gets what is replayed.
func TestPlan_durableForReplays(t *testing.T) {
	t.Parallel()
	fetch := func(t *testing.T, b *bundle, name string) {
		t.Helper()
		c, err := b.js.Consumer(t.Context(), ordersStream, name)
		must(t, err)
		cc, err := c.Consume(func(jetstream.Msg) {})
		must(t, err)
		t.Cleanup(cc.Stop)
		for {
			info, err := c.Info(within(t))
			must(t, err)
			if info.NumWaiting > 0 || info.NumAckPending > 0 {
				return
			}
		}
	}
	for _, tt := range []struct {
		name  string
		setup func(t *testing.T, b *bundle, s jetstream.Stream)
		want  []string // parts of warnings
	}{
		{"not made yet, the App runs", func(t *testing.T, b *bundle, _ jetstream.Stream) {
			t.Helper()
			fetch(t, b, billing)
		}, nil},
		{"events wait", func(t *testing.T, b *bundle, _ jetstream.Stream) {
			t.Helper()
			_, err := b.js.Publish(t.Context(), ordersSubject, nil)
			must(t, err)
		}, []string{`nobody fetches for consumer "billing" of`}},
		{"the App runs", func(t *testing.T, b *bundle, s jetstream.Stream) {
			t.Helper()
			b.ensure(t, s)
			fetch(t, b, billing)
			fetch(t, b, "billing_replay")
		}, nil},
		{"the App is of an earlier version", func(t *testing.T, b *bundle, s jetstream.Stream) {
			t.Helper()
			b.ensure(t, s)
			fetch(t, b, billing)
		}, []string{`nobody fetches for consumer "billing_replay" of stream "orders", though somebody does for "billing"`}},
		{"no App runs", func(t *testing.T, b *bundle, s jetstream.Stream) {
			t.Helper()
			b.ensure(t, s)
		}, []string{`nobody fetches for consumer "billing" of`}},
		{"paused, and replays wait", func(t *testing.T, b *bundle, s jetstream.Stream) {
			t.Helper()
			b.ensure(t, s)
			_, err := s.PauseConsumer(t.Context(), "billing_replay", time.Now().Add(time.Hour))
			must(t, err)
			cfg := s.CachedInfo().Config
			cfg.Subjects = dlq.WithReplaySubjects(cfg, billing)
			_, err = b.js.UpdateStream(t.Context(), cfg)
			must(t, err)
			_, err = b.js.Publish(t.Context(), dlq.ReplaySubject(ordersStream, billing, "a", "op"), nil)
			must(t, err)
		}, []string{`1 messages wait for consumer "billing_replay"`, `consumer "billing_replay" of stream "orders" is paused for another`}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.capture(t, 1)
			s, err := b.js.Stream(t.Context(), ordersStream)
			must(t, err)
			tt.setup(t, b, s)
			got := b.plan(t, triage.Selection{}, triage.Options{}).Warnings
			slices.Sort(got)
			if !slices.EqualFunc(got, tt.want, strings.Contains) {
				t.Errorf("it warns of %q, want %q", got, tt.want)
			}
		})
	}
}

func (b *bundle) ensure(t *testing.T, s jetstream.Stream) {
	t.Helper()
	c, err := s.Consumer(t.Context(), billing)
	must(t, err)
	_, err = dlq.EnsureReplayConsumer(t.Context(), s, c.CachedInfo().Config)
	must(t, err)
}

// A consumer that has the name and is something else is a problem, and nothing is
// claimed.
func TestPlan_nameTaken(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	b.consumer(t, ordersStream, "billing_replay", ordersSubject)
	p, err := b.desk.Plan(t.Context(), triage.Selection{}, triage.Options{})
	must(t, err)
	if len(p.Problems) != 1 || !strings.HasPrefix(p.Problems[0], `consumer "billing_replay" of stream "orders" is not a durable for replays`) {
		t.Errorf("the problems are %q", p.Problems)
	}
	if _, err := b.desk.Run(t.Context(), p.ID, nil); err == nil {
		t.Error("it was run")
	}
	b.wantState(t, id, dlq.StateOpen)
}

// The durable for replays is brought up to date with the consumer, also what an operator
// has changed that would keep replays from being handled.
func TestEnsureReplayConsumer(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := b.js.Stream(t.Context(), ordersStream)
	must(t, err)
	b.ensure(t, s)
	replays := func() jetstream.ConsumerConfig {
		c, err := s.Consumer(t.Context(), "billing_replay")
		must(t, err)
		return c.CachedInfo().Config
	}
	damaged := replays()
	damaged.AckWait, damaged.BackOff, damaged.MaxDeliver, damaged.HeadersOnly = time.Minute, []time.Duration{time.Second, time.Minute}, 3, true
	damaged.MaxAckPending = 1
	_, err = s.UpdateConsumer(t.Context(), damaged)
	must(t, err)
	c, err := s.Consumer(t.Context(), billing)
	must(t, err)
	main := c.CachedInfo().Config
	main.AckWait, main.MaxAckPending = 7*time.Second, 77
	_, err = s.UpdateConsumer(t.Context(), main)
	must(t, err)
	for range 2 {
		b.ensure(t, s)
		got := replays()
		if got.AckWait != 7*time.Second || len(got.BackOff) > 0 || got.MaxDeliver != -1 || got.HeadersOnly || got.MaxAckPending != 77 ||
			got.FilterSubject != "monotel.replays.orders.billing.>" || got.Metadata["monotel.replay_of"] != billing {
			t.Errorf("it is %+v", got)
		}
	}
}
