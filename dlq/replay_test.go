package dlq_test

import (
	"errors"
	"math"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

func TestParseReplay(t *testing.T) {
	t.Parallel()

	const good, old = "monotel.replays.orders.billing.abc.op1", "monotel.replay.orders.billing.abc.op1"
	header := nats.Header{
		dlq.HeaderReplayStream: {"DLQ"}, dlq.HeaderReplayClaim: {"17"}, dlq.HeaderReplayCount: {"2"},
		dlq.HeaderReplayOf: {"other"}, dlq.HeaderReplayOperation: {"other"}, // the subject decides
	}
	want := dlq.Replay{Stream: "DLQ", Subject: "monotel.dlq.DLQ.orders.billing.abc", ID: "abc", Operation: "op1", Claim: 17, Count: 2}
	tests := []struct {
		name    string
		subject string
		header  nats.Header
		want    dlq.Replay // zero: it is none
	}{
		{name: "good", subject: good, header: header, want: want},
		{name: "of an earlier version", subject: old, header: header, want: dlq.Replay{
			Stream: "DLQ", Subject: want.Subject, ID: "abc", Operation: "op1", Claim: 17, Count: 2, Old: true,
		}},
		{name: "of a later version", subject: "monotel.replays2.orders.billing.abc.op1", header: header},
		{name: "without headers", subject: good, want: dlq.Replay{Subject: "monotel.dlq..orders.billing.abc", ID: "abc", Operation: "op1"}},
		{name: "headers that are none", subject: good, header: nats.Header{
			dlq.HeaderReplayStream: {"DLQ"}, dlq.HeaderReplayClaim: {"99999999999999999999"}, dlq.HeaderReplayCount: {"-1"},
		}, want: dlq.Replay{Stream: "DLQ", Subject: want.Subject, ID: "abc", Operation: "op1"}},
		{name: "headers without values", subject: good, header: nats.Header{dlq.HeaderReplayStream: {}, dlq.HeaderReplayClaim: nil}, want: dlq.Replay{
			Subject: "monotel.dlq..orders.billing.abc", ID: "abc", Operation: "op1",
		}},
		{name: "control characters in a header", subject: good, header: nats.Header{dlq.HeaderReplayStream: {"D\r\nLQ"}}, want: dlq.Replay{
			Stream: "D  LQ", Subject: "monotel.dlq.D  LQ.orders.billing.abc", ID: "abc", Operation: "op1",
		}},
		{name: "an event's subject", subject: "orders.created.v1", header: header},
		{name: "another stream", subject: "monotel.replays.orders2.billing.abc.op1", header: header},
		{name: "another consumer", subject: "monotel.replays.orders.billing2.abc.op1", header: header},
		{name: "no operation", subject: "monotel.replays.orders.billing.abc", header: header},
		{name: "empty operation", subject: "monotel.replays.orders.billing.abc.", header: header},
		{name: "empty ID", subject: "monotel.replays.orders.billing..op1", header: header},
		{name: "nothing of it", subject: "monotel.replays.orders.billing.", header: header},
		{name: "more tokens", subject: good + ".more", header: header},
		{name: "wildcard for an ID", subject: "monotel.replays.orders.billing.*.op1", header: header},
		{name: "wildcard for an operation", subject: "monotel.replays.orders.billing.abc.>", header: header},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, ok := dlq.ParseReplay("orders", "billing", tt.subject, tt.header)
			if diff := cmp.Diff(tt.want, got); diff != "" || ok != (tt.want != dlq.Replay{}) {
				t.Errorf("ok is %v (-want +got):\n%s", ok, diff)
			}
		})
	}
	t.Run("what is made is parsed", func(t *testing.T) {
		t.Parallel()
		subject := dlq.ReplaySubject("a.b", "c d", "abc", "op1")
		if !dlq.IsReplaySubject(subject) || !strings.HasPrefix(subject, strings.TrimSuffix(dlq.ReplaySubjects("a.b", "c d"), ">")) {
			t.Errorf("%q is not one of %q", subject, dlq.ReplaySubjects("a.b", "c d"))
		}
		got, ok := dlq.ParseReplay("a.b", "c d", subject, header)
		if !ok || got.Subject != "monotel.dlq.DLQ.a_b.c_d.abc" || got.ID != "abc" || got.Operation != "op1" {
			t.Errorf("ParseReplay(%q) = %+v, %v", subject, got, ok)
		}
	})
}

// Names that other versions, and operators' permissions, rely on.
func TestWireNames_replays(t *testing.T) {
	t.Parallel()
	main := jetstream.ConsumerConfig{Durable: "billing", AckWait: time.Minute, MaxAckPending: 7, Replicas: 3, MemoryStorage: true, MaxWaiting: 9}
	cfg := dlq.ReplayConsumerConfig("orders", main)
	for want, got := range map[string]string{
		"monotel.replays.orders.billing.>":            dlq.ReplaySubjects("orders", "billing"),
		"monotel.replays.orders.billing.abc.op1":      dlq.ReplaySubject("orders", "billing", "abc", "op1"),
		"monotel.replay.orders.billing.>":             dlq.OldReplaySubjects("orders", "billing"),
		"monotel.replay.orders.billing.abc.op1":       dlq.OldReplaySubject("orders", "billing", "abc", "op1"),
		"monotel.wake.orders.billing":                 dlq.WakeSubject("orders", "billing"),
		"monotel.wake.*.*":                            dlq.WakeSubjects,
		"monotel.spare.orders":                        dlq.SpareSubject("orders"),
		"billing_replay":                              cfg.Durable,
		"Replays of dead letters to consumer billing": cfg.Description,
	} {
		if got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	want := jetstream.ConsumerConfig{
		Name: "billing_replay", Durable: "billing_replay", Description: cfg.Description, FilterSubject: "monotel.replays.orders.billing.>",
		AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Minute, MaxDeliver: -1, MaxAckPending: 7, Replicas: 3, MemoryStorage: true, MaxWaiting: 9,
		Metadata: map[string]string{"monotel.replay_of": "billing"},
	}
	if diff := cmp.Diff(want, cfg); diff != "" {
		t.Errorf("the durable for replays (-want +got):\n%s", diff)
	}
	if of, ok := dlq.IsReplayConsumer("orders", cfg); of != "billing" || !ok {
		t.Errorf("it is of %q, %v", of, ok)
	}
}

func FuzzParseReplay(f *testing.F) {
	f.Add("orders", "billing", "monotel.replay.orders.billing.abc.op1", "DLQ", "17", "1")
	f.Add("orders", "billing", "monotel.replays.orders.billing.abc.op1", "DLQ", "17", "1")
	f.Add("orders", "billing", "monotel.replays.orders.billing.*.>", "*", "-1", "99999999999999999999")
	f.Add("", "a.b", "monotel.replay._.a_b.\x00.\xff", "\r\n", "", " ")
	f.Fuzz(func(t *testing.T, stream, consumer, subject, dead, claim, count string) {
		got, ok := dlq.ParseReplay(stream, consumer, subject, nats.Header{
			dlq.HeaderReplayStream: {dead}, dlq.HeaderReplayClaim: {claim}, dlq.HeaderReplayCount: {count},
		})
		if !ok {
			if got != (dlq.Replay{}) {
				t.Errorf("it is none, and %+v", got)
			}
			return
		}
		again := dlq.ReplaySubject(stream, consumer, got.ID, got.Operation)
		if got.Old {
			again = dlq.OldReplaySubject(stream, consumer, got.ID, got.Operation)
		}
		if again != subject {
			t.Errorf("%q is parsed as %q", subject, again)
		}
		for _, part := range []string{got.ID, got.Operation} {
			if part == "" || strings.ContainsAny(part, ".*> \r\n\t") {
				t.Errorf("%q of %q is not fit for a subject", part, subject)
			}
		}
		if got.Count < 0 || strings.ContainsAny(got.Stream, "\r\n\x1b") {
			t.Errorf("the headers are taken as they are: %+v", got)
		}
	})
}

// A claimedEntry is a dead letter that operation op1 has claimed, and what its
// consumer knows of the replay.
type claimedEntry struct {
	*bundle
	s      *dlq.Store
	e      *dlq.Entry
	replay dlq.Replay
}

func setupClaimed(t *testing.T, cfg dlq.Config) *claimedEntry {
	t.Helper()
	b := setup(t)
	c := &claimedEntry{bundle: b, s: b.provisioned(t, cfg)}
	c.e = b.captureEntry(t, c.s, record(1))
	change(t, c.s, c.e, dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@ops", Operation: "op1", Target: "consumer"})
	var ok bool
	c.replay, ok = dlq.ParseReplay(c.e.Stream, c.e.Consumer, dlq.ReplaySubject(c.e.Stream, c.e.Consumer, c.e.ID, "op1"), nats.Header{
		dlq.HeaderReplayStream: {"DLQ"}, dlq.HeaderReplayClaim: {strconv.FormatUint(c.e.Last, 10)}, dlq.HeaderReplayCount: {"1"},
	})
	if !ok {
		t.Fatal("it is no replay")
	}
	return c
}

// entry is the dead letter as it is stored.
func (c *claimedEntry) entry(t *testing.T) *dlq.Entry {
	t.Helper()
	var r *dlq.Record
	var first uint64
	var history []*dlq.Change
	for _, m := range c.stored(t) {
		if !dlq.IsChange(m.Header) {
			var err error
			if r, err = dlq.Decode(m.Header, m.Data); err != nil {
				t.Fatal(err)
			}
			first = m.Sequence
			continue
		}
		change, err := dlq.DecodeChange(m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		change.Sequence = m.Sequence
		history = append(history, change)
	}
	return dlq.NewEntry(r, first, history)
}

// failure is how a replay failed.
func failure() *dlq.Record {
	f := record(1)
	f.Error, f.Reason, f.StreamSequence = "still declined", dlq.ReasonPermanentError, 9
	return f
}

// outcome stores an outcome, nil for resolved, which has to be the first.
func (c *claimedEntry) outcome(t *testing.T, f *dlq.Record) {
	t.Helper()
	more := nats.Header{"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"}}
	written, err := c.s.Outcome(t.Context(), c.replay, "shop", f, more)
	if !written || err != nil {
		t.Fatalf("Outcome() = %v, %v, want true, nil", written, err)
	}
	if got := c.lastStored(t).Header.Get("traceparent"); got != more.Get("traceparent") {
		t.Errorf("the trace context is %q", got)
	}
}

// wantSettled checks what has come of the replay as far as it is stored.
func (c *claimedEntry) wantSettled(t *testing.T, want dlq.ChangeKind) {
	t.Helper()
	got, err := c.s.Settled(t.Context(), c.replay)
	if got != want || err != nil {
		t.Errorf("Settled() = %q, %v, want %q", got, err, want)
	}
}

func TestOutcome_resolved(t *testing.T) {
	t.Parallel()
	c := setupClaimed(t, dlq.Config{})
	c.wantSettled(t, "")
	c.outcome(t, nil)
	c.wantSettled(t, dlq.ChangeResolved)
	e := c.entry(t)
	if e.State != dlq.StateResolved || e.Actor != "shop" || e.Operation != "op1" || e.Failures != 0 || e.History[1].From != dlq.StateReplaying || e.Changed.IsZero() {
		t.Errorf("the dead letter is %+v, %+v", *e, *e.History[1])
	}
}

func TestOutcome_failedAgain(t *testing.T) {
	t.Parallel()
	c := setupClaimed(t, dlq.Config{Redact: func(r *dlq.Record) { r.ReasonText = "redacted" }})
	c.outcome(t, failure())
	c.wantSettled(t, dlq.ChangeFailedAgain)
	e := c.entry(t)
	if e.State != dlq.StateOpen || e.Failures != 1 || e.Operation != "op1" || e.History[1].From != dlq.StateReplaying {
		t.Errorf("the dead letter is %+v, %+v", *e, *e.History[1])
	}
	want := failure()
	want.ReasonText = "redacted"
	want.Subject, want.Header, want.Data = "", nil, nil // these are the record's
	if diff := cmp.Diff(want, e.Failure); diff != "" {
		t.Errorf("failure (-want +got):\n%s", diff)
	}
	if n := len(c.lastStored(t).Data); n != 0 {
		t.Errorf("the outcome has a body of %d bytes", n)
	}
}

// TestOutcome_hugeFailure has more to say than the stream takes.
func TestOutcome_hugeFailure(t *testing.T) {
	t.Parallel()
	c := setupClaimed(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgSize: 4 << 10}})
	f := failure()
	f.Stack, f.Error = stack(2<<20), strings.Repeat("x", 2<<20)
	c.outcome(t, f)
	if got := c.entry(t).Failure; got.Reason != f.Reason || !strings.HasSuffix(got.Error, "…") {
		t.Errorf("the failure is %.50q of reason %s, want it cut", got.Error, got.Reason)
	}
}

// TestOutcome_hint has messages that tell where the claim is, rightly or not.
// That costs round trips, and nothing else.
func TestOutcome_hint(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name  string
		claim uint64
		reads int
	}{
		{"right", 2, 1},
		{"unknown", 0, 3}, // the record, the claim, and that there is no more
		{"the record", 1, 4},
		{"nothing", 99, 4},
		{"the largest number", math.MaxUint64, 4},
	} {
		for _, f := range []*dlq.Record{nil, failure()} {
			name, kind := tt.name+" and resolved", dlq.ChangeResolved
			if f != nil {
				name, kind = tt.name+" and failed again", dlq.ChangeFailedAgain
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				c := setupClaimed(t, dlq.Config{})
				c.replay.Claim = tt.claim
				reads, err := c.nc.SubscribeSync("$JS.API.STREAM.MSG.GET.DLQ")
				if err != nil {
					t.Fatal(err)
				}
				written, err := c.s.Outcome(t.Context(), c.replay, "shop", f, nil)
				if !written || err != nil {
					t.Fatalf("Outcome() = %v, %v, want true, nil", written, err)
				}
				if err := c.nc.Flush(); err != nil {
					t.Fatal(err)
				}
				n, _, err := reads.Pending()
				if err != nil {
					t.Fatal(err)
				}
				if f == nil && n != tt.reads {
					t.Errorf("it has read %d times, want %d", n, tt.reads)
				}
				if err := reads.Unsubscribe(); err != nil {
					t.Fatal(err)
				}
				c.wantSettled(t, kind)
			})
		}
	}
}

// TestOutcome_twice has a message that comes again after its outcome was stored.
func TestOutcome_twice(t *testing.T) {
	t.Parallel()
	for _, first := range []*dlq.Record{nil, failure()} {
		for _, second := range []*dlq.Record{nil, failure()} {
			c := setupClaimed(t, dlq.Config{})
			c.outcome(t, first)
			want := c.lastStored(t).Sequence
			settled, err := c.s.Settled(t.Context(), c.replay)
			if err != nil || settled == "" {
				t.Fatalf("Settled() = %q, %v", settled, err)
			}
			for _, claim := range []uint64{c.replay.Claim, 0} {
				again := c.replay
				again.Claim = claim
				if written, err := c.s.Outcome(t.Context(), again, "shop", second, nil); written || err != nil {
					t.Errorf("a second outcome: %v, %v, want false, nil", written, err)
				}
			}
			if got := c.lastStored(t).Sequence; got != want {
				t.Errorf("a second outcome was stored at %d", got)
			}
			c.wantSettled(t, settled)
		}
	}
}

// TestOutcome_concurrent has two instances that have handled the same message.
func TestOutcome_concurrent(t *testing.T) {
	t.Parallel()
	c := setupClaimed(t, dlq.Config{})
	written, errs := make([]bool, 8), make([]error, 8)
	inParallel(len(written), func(i int) {
		var f *dlq.Record
		if i%2 == 1 {
			f = failure()
		}
		written[i], errs[i] = c.s.Outcome(t.Context(), c.replay, "shop", f, nil)
	})
	n := 0
	for _, w := range written {
		if w {
			n++
		}
	}
	if err := errors.Join(errs...); err != nil || n != 1 || len(c.stored(t)) != 3 {
		t.Errorf("%d were written, %d messages are stored, %v; want 1 and 3", n, len(c.stored(t)), err)
	}
}

// TestOutcome_changedMeanwhile has somebody who forced a change while the message
// was on its way. What came of it is written all the same.
func TestOutcome_changedMeanwhile(t *testing.T) {
	t.Parallel()
	for _, f := range []*dlq.Record{nil, failure()} {
		c := setupClaimed(t, dlq.Config{})
		change(t, c.s, c.e, dlq.Change{Kind: dlq.ChangeArchived, Actor: "bob@ops"})
		c.outcome(t, f)
		e := c.entry(t)
		want := dlq.StateResolved
		if f != nil {
			want = dlq.StateOpen
		}
		if e.State != want || len(e.History) != 3 || e.History[2].From != dlq.StateArchived {
			t.Errorf("the dead letter is %+v, want it %s, from %s", *e, want, dlq.StateArchived)
		}
		// Who has read it before is told.
		if err := c.s.Change(t.Context(), c.e, dlq.Change{Kind: dlq.ChangeRestored}, nil); !errors.Is(err, dlq.ErrEntryChanged) {
			t.Errorf("Change() = %v, want ErrEntryChanged", err)
		}
	}
}

func TestOutcome_noEntry(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		change func(t *testing.T, c *claimedEntry)
	}{
		{"discarded meanwhile", func(t *testing.T, c *claimedEntry) {
			t.Helper()
			change(t, c.s, c.e, dlq.Change{Kind: dlq.ChangeDiscarded, Actor: "bob@ops"})
		}},
		{"never there", func(_ *testing.T, c *claimedEntry) {
			c.replay.ID, c.replay.Subject = "abc", "monotel.dlq.DLQ.orders.billing.abc"
		}},
		{"purged", func(t *testing.T, c *claimedEntry) {
			t.Helper()
			purge(t, c.bundle, c.s)
		}},
		{"another dead-letter stream", func(_ *testing.T, c *claimedEntry) { c.replay.Stream = "DLQ2" }},
		{"an operation that has not claimed it", func(_ *testing.T, c *claimedEntry) { c.replay.Operation = "op2" }},
		{"a subject of many", func(_ *testing.T, c *claimedEntry) {
			c.replay.Stream, c.replay.Subject = "*", "monotel.dlq.*.orders.billing.abc"
		}},
	} {
		for _, f := range []*dlq.Record{nil, failure()} {
			name := tt.name + " and resolved"
			if f != nil {
				name = tt.name + " and failed again"
			}
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				c := setupClaimed(t, dlq.Config{})
				tt.change(t, c)
				before := len(c.stored(t))
				if written, err := c.s.Outcome(t.Context(), c.replay, "shop", f, nil); written || !errors.Is(err, dlq.ErrNoEntry) {
					t.Errorf("Outcome() = %v, %v, want false, ErrNoEntry", written, err)
				}
				if after := len(c.stored(t)); after != before {
					t.Errorf("%d messages are stored, want %d as before", after, before)
				}
				c.wantSettled(t, "")
			})
		}
	}
}

// A dead letter whose record has expired before its claim takes no failure: the
// payload would be gone with the message that failed.
func TestOutcome_recordGone(t *testing.T) {
	t.Parallel()
	c := setupClaimed(t, dlq.Config{})
	stream, err := c.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(t.Context(), c.e.Sequence); err != nil {
		t.Fatal(err)
	}
	if written, err := c.s.Outcome(t.Context(), c.replay, "shop", failure(), nil); written || !errors.Is(err, dlq.ErrNoEntry) {
		t.Errorf("Outcome() = %v, %v, want false, ErrNoEntry", written, err)
	}
	if n := len(c.stored(t)); n != 1 {
		t.Errorf("%d messages are stored, want the claim alone", n)
	}
}
