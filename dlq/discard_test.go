package dlq_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// subjects returns how many messages the dead-letter stream has on each subject.
func (b *bundle) subjects(t *testing.T) map[string]uint64 {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	info, err := stream.Info(t.Context(), jetstream.WithSubjectFilter(">"))
	if err != nil {
		t.Fatal(err)
	}
	return info.State.Subjects
}

// objects lists what the object store has.
func (b *bundle) objects(t *testing.T) (names []string) {
	t.Helper()
	bucket, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE")
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	all, err := bucket.List(t.Context())
	if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
		t.Fatal(err)
	}
	for _, o := range all {
		names = append(names, o.Name)
	}
	return names
}

// kept captures a dead letter and does something about it.
func (b *bundle) kept(t *testing.T, s *dlq.Store, seq uint64, size int, changes ...dlq.Change) *dlq.Entry {
	t.Helper()
	r := record(seq)
	r.Data = noise(seq, size)
	e := b.captureEntry(t, s, r)
	for _, c := range changes {
		if c.Edit != nil {
			if err := s.PutRevision(t.Context(), e.ID, &c); err != nil {
				t.Fatal(err)
			}
		}
		change(t, s, e, c)
	}
	return e
}

// cut connects so that the connection ends at the n-th request: before the server has
// got that, or after. left is what remains of n.
func (b *bundle) cut(t *testing.T, n int, after bool) (s *dlq.Store, left *atomic.Int64, closeAll func()) {
	t.Helper()
	left = &atomic.Int64{}
	left.Store(int64(n))
	nc, err := nats.Connect(b.server.URL(), nats.NoReconnect(), nats.SetCustomDialer(cutDialer{left, after}),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // the default prints
	if err != nil {
		t.Fatal(err)
	}
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(bridgePatience))
	if err != nil {
		t.Fatal(err)
	}
	if s, err = dlq.NewStore(nc, js, dlq.Config{}); err != nil {
		t.Fatal(err)
	}
	return s, left, nc.Close
}

func edit(revision, size int) dlq.Change {
	return dlq.Change{Kind: dlq.ChangeEdited, Revision: revision, Edit: &dlq.Record{Data: noise(uint64(revision), size), BodySize: size}}
}

// TestChange_discard_killed ends the process that discards at each of its steps, with
// the server having got the last one or not. Each time the record is there or its trace
// is, all agree on which of them counts, and who comes next finishes it.
func TestChange_discard_killed(t *testing.T) {
	t.Parallel()
	const large = 2 << 20
	for _, tt := range []struct {
		name    string
		size    int
		changes []dlq.Change
		steps   int // no fewer
	}{
		{name: "record", size: 100, steps: 2},
		{name: "record in the object store", size: large, steps: 4},
		{name: "changes", size: 100, changes: []dlq.Change{{Kind: dlq.ChangeArchived}, {Kind: dlq.ChangeRestored}}, steps: 4},
		{name: "edits", size: 100, changes: []dlq.Change{edit(1, 100), edit(2, large)}, steps: 5},
		{
			name: "a replay that failed", size: large, changes: []dlq.Change{
				{Kind: dlq.ChangeReplaying, Operation: "op"}, {Kind: dlq.ChangeFailedAgain, Operation: "op", Failure: record(1)},
			}, steps: 6,
		},
	} {
		for _, after := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, after the server has got it: %t", tt.name, after), func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				s := b.provisioned(t, dlq.Config{})
				tally := dlq.NewTallyWith(s, dlq.TallyLimits{})
				for n := 1; ; n++ {
					e := b.kept(t, s, uint64(n), tt.size, tt.changes...)
					killed, left, closeAll := b.cut(t, n, after)
					err := killed.Change(t.Context(), e, dlq.Change{Kind: dlq.ChangeDiscarded}, nil)
					closeAll()
					discarded := b.letter(t, s, e)
					if err == nil && !discarded {
						t.Fatalf("step %d: it is not discarded, and there is no error", n)
					}
					if captured, err := s.Capture(t.Context(), record(uint64(n)), nil); captured || err != nil {
						t.Fatalf("step %d: it is captured again: %v, %v", n, captured, err)
					}
					if set, err := s.CapturedOf(t.Context(), e.Stream, e.Consumer); err != nil || !set.Has(e.ID) {
						t.Fatalf("step %d: it is not among those that were captured: %v", n, err)
					}
					if holds, err := s.Holds(t.Context(), record(uint64(n))); err != nil || !holds {
						t.Fatalf("step %d: the store does not hold it: %v", n, err)
					}
					if left.Load() > 0 { // it was not killed
						if n < tt.steps {
							t.Errorf("it took %d requests only: this tests nothing", n)
						}
						break
					}
					b.agrees(t, tally) // which finishes it
					b.agrees(t, dlq.NewTallyWith(s, dlq.TallyLimits{}))
					if !discarded { // the server may get the last request only now
						again := b.entryOf(t, s, e)
						if again.State != dlq.StateDiscarded {
							change(t, s, again, dlq.Change{Kind: dlq.ChangeDiscarded})
						}
					}
					if _, err := s.FinishDiscard(t.Context(), s.SubjectOf(e.Record)); err != nil {
						t.Fatal(err)
					}
					if left := b.subjects(t)[s.SubjectOf(e.Record)]; left != 1 || !b.letter(t, s, e) {
						t.Fatalf("step %d: %d messages are left, want the trace", n, left)
					}
				}
				b.agrees(t, tally)
				for subject, n := range b.subjects(t) {
					if n != 1 {
						t.Errorf("%d messages are left on %s, want the trace", n, subject)
					}
				}
				if left := b.objects(t); len(left) > 0 {
					t.Errorf("objects are left: %v", left)
				}
			})
		}
	}
}

// entryOf reads an entry again.
func (b *bundle) entryOf(t *testing.T, s *dlq.Store, e *dlq.Entry) *dlq.Entry {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	var now *dlq.Entry
	for from := uint64(1); ; {
		m, err := stream.GetMsg(t.Context(), from, jetstream.WithGetMsgSubject(s.SubjectOf(e.Record)))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return now
		}
		if err != nil {
			t.Fatal(err)
		}
		from = m.Sequence + 1
		c, err := dlq.DecodeChange(m.Header, m.Data)
		if now == nil {
			r, _ := dlq.Decode(m.Header, m.Data)
			now = dlq.NewEntry(r, m.Sequence, nil)
		}
		if err == nil {
			c.Sequence = m.Sequence
			now.Apply(c)
		}
	}
}

// A user who may not delete discards all the same. Whoever may, finishes it.
func TestChange_discard_mayNotDelete(t *testing.T) {
	t.Parallel()
	g := setupGuarded(t, dlq.Config{}, 0, "$JS.API.STREAM.MSG.DELETE.DLQ")
	var all []*dlq.Entry
	for seq := range uint64(5) {
		if _, err := g.store.Capture(doctorContext(t), record(seq+1), nil); err != nil {
			t.Fatal(err)
		}
		e := dlq.NewEntry(record(seq+1), g.dlqInfo(t).State.LastSeq, nil)
		if seq == 3 {
			if err := g.guest.Change(doctorContext(t), e, dlq.Change{Kind: dlq.ChangeArchived}, nil); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, e)
	}
	for _, e := range all {
		if err := g.guest.Change(doctorContext(t), e, dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil {
			t.Errorf("discard: %v", err)
		}
		if n, err := g.guest.FinishDiscard(doctorContext(t), g.guest.SubjectOf(e.Record)); n != 0 || err != nil {
			t.Errorf("FinishDiscard() = %d, %v: it was refused before", n, err)
		}
	}
	if n := g.dlqInfo(t).State.Msgs; n != 11 {
		t.Errorf("there are %d messages, want 5 records, 1 change and 5 traces", n)
	}
	if n, err := g.store.FinishDiscard(doctorContext(t), g.store.SubjectOf(all[3].Record)); n != 2 || err != nil {
		t.Errorf("FinishDiscard() = %d, %v, want the record and the change", n, err)
	}
	counts, err := dlq.NewTally(g.store).Update(doctorContext(t))
	if err != nil || len(open(counts)) != 0 {
		t.Errorf("open are %v, %v", counts, err)
	}
	if n := g.dlqInfo(t).State.Msgs; n != 5 {
		t.Errorf("after an App has counted there are %d messages, want 5 traces", n)
	}
}

// What comes between a trace and the deletion of what is before it: the trace counts.
func TestChange_discard_half(t *testing.T) {
	t.Parallel()
	replay := dlq.Replay{Stream: "DLQ", Operation: "op"}
	for _, tt := range []struct {
		name string
		do   func(t *testing.T, b *bundle, s *dlq.Store, e, before *dlq.Entry)
	}{
		{"another discard", func(t *testing.T, _ *bundle, s *dlq.Store, _, before *dlq.Entry) {
			t.Helper()
			if err := s.Change(t.Context(), before, dlq.Change{Kind: dlq.ChangeDiscarded}, nil); !errors.Is(err, dlq.ErrEntryChanged) {
				t.Errorf("discard: %v, want ErrEntryChanged", err)
			}
		}},
		{"a claim", func(t *testing.T, _ *bundle, s *dlq.Store, _, before *dlq.Entry) {
			t.Helper()
			if err := s.Change(t.Context(), before, dlq.Change{Kind: dlq.ChangeReplaying}, nil); !errors.Is(err, dlq.ErrEntryChanged) {
				t.Errorf("claim: %v, want ErrEntryChanged", err)
			}
		}},
		{"an outcome", func(t *testing.T, _ *bundle, s *dlq.Store, e, _ *dlq.Entry) {
			t.Helper()
			r := replay
			r.Subject, r.ID = s.SubjectOf(e.Record), e.ID
			for _, failure := range []*dlq.Record{nil, record(1)} {
				if written, err := s.Outcome(t.Context(), r, "shop", failure, nil); written || !errors.Is(err, dlq.ErrNoEntry) {
					t.Errorf("Outcome() = %v, %v, want ErrNoEntry: it is captured as another dead letter", written, err)
				}
			}
		}},
		{"an outcome that an App of an earlier version notes", func(t *testing.T, b *bundle, s *dlq.Store, e, _ *dlq.Entry) {
			t.Helper()
			c := dlq.Change{Kind: dlq.ChangeFailedAgain, From: dlq.StateReplaying, Operation: "op", Failure: record(1)}
			b.publishTo(t, s.SubjectOf(e.Record), c.WireHeader(e.ID), e.Last)
		}},
		{"a change by somebody who knows nothing of traces", func(t *testing.T, b *bundle, s *dlq.Store, e, _ *dlq.Entry) {
			t.Helper()
			c := dlq.Change{Kind: dlq.ChangeRestored, From: dlq.StateDiscarded}
			b.publishTo(t, s.SubjectOf(e.Record), c.WireHeader(e.ID), e.Last)
		}},
		{"a capture", func(t *testing.T, _ *bundle, s *dlq.Store, e, _ *dlq.Entry) {
			t.Helper()
			if captured, err := s.Capture(t.Context(), record(e.StreamSequence), nil); captured || err != nil {
				t.Errorf("Capture() = %v, %v, want false", captured, err)
			}
		}},
		{"what is no change", func(t *testing.T, b *bundle, s *dlq.Store, e, _ *dlq.Entry) {
			t.Helper()
			b.publishTo(t, s.SubjectOf(e.Record), nil, e.Last)
		}},
	} {
		for _, counted := range []bool{false, true} { // by a tally, before it is discarded
			t.Run(fmt.Sprintf("%s, counted before: %t", tt.name, counted), func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				s := b.provisioned(t, dlq.Config{})
				tally := dlq.NewTallyWith(s, dlq.TallyLimits{})
				capture(t, s, record(1))
				e := b.kept(t, s, 2, 100, dlq.Change{Kind: dlq.ChangeReplaying, Operation: "op"}, dlq.Change{Kind: dlq.ChangeReleased, Operation: "op"})
				if counted {
					b.agrees(t, tally)
				}
				before := *e
				if err := s.DiscardHalf(t.Context(), e); err != nil {
					t.Fatal(err)
				}
				tt.do(t, b, s, e, &before)
				if now := b.entryOf(t, s, e); now.State != dlq.StateDiscarded {
					t.Errorf("it is %s", now.State)
				}
				b.agrees(t, tally)
				if !b.letter(t, s, e) {
					t.Error("there is no trace")
				}
				if n := b.subjects(t)[s.SubjectOf(e.Record)]; n > 2 {
					t.Errorf("%d messages are on its subject after an App has counted", n)
				}
				for range 5 {
					b.agrees(t, tally)
				}
				// Its first count takes two writes. Of what it has read and deleted since it
				// writes twice, and does not read the stream from the start again.
				if n := b.info(t, "KV_DLQ_STATE").State.LastSeq; n > 4 {
					t.Errorf("the tally has written %d times", n)
				}
				b.agrees(t, dlq.NewTallyWith(s, dlq.TallyLimits{}))
			})
		}
	}
}

// publishTo publishes on a dead letter's subject.
func (b *bundle) publishTo(t *testing.T, subject string, h nats.Header, last uint64) uint64 {
	t.Helper()
	ack, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: h}, jetstream.WithExpectLastSequencePerSubject(last))
	if err != nil {
		t.Fatal(err)
	}
	return ack.Sequence
}

// Of those who discard, claim and archive a dead letter at the same time one wins, and
// it is there or its trace is, all the time.
func TestChange_discard_race(t *testing.T) {
	t.Parallel()
	const letters = 60
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	all := b.entries(t, s, letters, 300)
	changes := []dlq.Change{
		{Kind: dlq.ChangeDiscarded, Actor: "ann"},
		{Kind: dlq.ChangeDiscarded, Actor: "bob"},
		{Kind: dlq.ChangeReplaying, Operation: "op"},
		{Kind: dlq.ChangeArchived},
	}
	won := make([][letters]bool, len(changes))
	done := make(chan struct{})
	looked := make(chan error, 1)
	go func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				looked <- nil
				return
			default:
			}
			e := all[i%letters]
			if captured, err := s.Capture(context.WithoutCancel(t.Context()), record(e.StreamSequence), nil); captured || err != nil {
				looked <- fmt.Errorf("dead letter %s is captured again: %v, %w", e.ID, captured, err)
				return
			}
		}
	}()
	inParallel(len(changes), func(i int) {
		for k, e := range all {
			mine := *e
			err := s.Change(t.Context(), &mine, changes[i], nil)
			if won[i][k] = err == nil; err != nil && !errors.Is(err, dlq.ErrEntryChanged) {
				t.Error(err)
			}
			if _, err := s.FinishDiscard(t.Context(), s.SubjectOf(e.Record)); err != nil {
				t.Error(err)
			}
		}
	})
	close(done)
	if err := <-looked; err != nil {
		t.Error(err)
	}
	for k, e := range all {
		winners := 0
		for i := range changes {
			if won[i][k] {
				winners++
			}
		}
		discarded := won[0][k] || won[1][k]
		if winners != 1 || b.letter(t, s, e) != discarded {
			t.Errorf("dead letter %d: %d have changed it, and it is discarded: %v", k, winners, !discarded)
		}
		if n := b.subjects(t)[s.SubjectOf(e.Record)]; discarded && n != 1 || !discarded && n != 2 {
			t.Errorf("dead letter %d has %d messages, and is discarded: %v", k, n, discarded)
		}
	}
}

// A forged trace deletes nothing that its writer did not know, and nothing of others.
func TestStore_FinishDiscard_forged(t *testing.T) {
	t.Parallel()
	trace := func(r *dlq.Record) nats.Header {
		return nats.Header{
			dlq.HeaderVersion: {"1"}, dlq.HeaderID: {r.ID}, dlq.HeaderChange: {"discarded"}, dlq.HeaderStream: {r.Stream}, dlq.HeaderConsumer: {r.Consumer},
		}
	}
	const large = 2 << 20
	for _, tt := range []struct {
		name  string
		forge func(t *testing.T, b *bundle, s *dlq.Store, mine, other *dlq.Entry) (subject string)
		left  uint64 // on that subject
	}{
		{"without a condition", func(t *testing.T, b *bundle, s *dlq.Store, mine, _ *dlq.Entry) string {
			t.Helper()
			subject := s.SubjectOf(mine.Record)
			if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: trace(mine.Record)}); err != nil {
				t.Fatal(err)
			}
			return subject
		}, 2},
		{"with the condition of another subject", func(t *testing.T, b *bundle, s *dlq.Store, mine, other *dlq.Entry) string {
			t.Helper()
			subject := s.SubjectOf(mine.Record)
			_, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: trace(mine.Record)},
				jetstream.WithExpectLastSequenceForSubject(other.Last, s.SubjectOf(other.Record)))
			if err != nil {
				t.Fatal(err)
			}
			return subject
		}, 2},
		{"with a condition that is no number", func(t *testing.T, b *bundle, s *dlq.Store, mine, _ *dlq.Entry) string {
			t.Helper()
			h := trace(mine.Record)
			h["nats-expected-last-subject-sequence"] = []string{"99999"} // in a case that the server does not read
			if _, err := b.js.PublishMsg(t.Context(), &nats.Msg{Subject: s.SubjectOf(mine.Record), Header: h}); err != nil {
				t.Fatal(err)
			}
			return s.SubjectOf(mine.Record)
		}, 2},
		{"without the ID", func(t *testing.T, b *bundle, s *dlq.Store, mine, _ *dlq.Entry) string {
			t.Helper()
			h := trace(mine.Record)
			delete(h, dlq.HeaderID)
			b.publishTo(t, s.SubjectOf(mine.Record), h, mine.Last)
			return s.SubjectOf(mine.Record)
		}, 2},
		{"of another kind", func(t *testing.T, b *bundle, s *dlq.Store, mine, _ *dlq.Entry) string {
			t.Helper()
			h := trace(mine.Record)
			h[dlq.HeaderChange] = []string{"archived"}
			b.publishTo(t, s.SubjectOf(mine.Record), h, mine.Last)
			return s.SubjectOf(mine.Record)
		}, 2},
		{"on a subject with another's ID", func(t *testing.T, b *bundle, s *dlq.Store, _, other *dlq.Entry) string {
			t.Helper()
			forged := *other.Record
			forged.Stream, forged.Consumer = "x", "y"
			subject := s.SubjectOf(&forged)
			h := trace(&forged)
			delete(h, dlq.HeaderChange)
			h[dlq.HeaderBody], h[dlq.HeaderBodyObject] = []string{"object"}, []string{other.ID}
			b.publishTo(t, subject, trace(&forged), b.publishTo(t, subject, h, 0))
			return subject
		}, 1},
		{"of another's ID, on its own subject", func(t *testing.T, b *bundle, s *dlq.Store, mine, other *dlq.Entry) string {
			t.Helper()
			b.publishTo(t, s.SubjectOf(mine.Record), trace(other.Record), mine.Last)
			return s.SubjectOf(mine.Record)
		}, 1}, // who may publish there, and has read it, may discard it
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			mine, other := b.kept(t, s, 1, 100), b.kept(t, s, 2, large, dlq.Change{Kind: dlq.ChangeArchived}, dlq.Change{Kind: dlq.ChangeRestored})
			before := b.objects(t)
			subject := tt.forge(t, b, s, mine, other)
			if _, err := s.FinishDiscard(t.Context(), subject); err != nil {
				t.Fatal(err)
			}
			_ = update(t, dlq.NewTallyWith(s, dlq.TallyLimits{}))
			all := b.subjects(t)
			if all[subject] != tt.left || all[s.SubjectOf(other.Record)] != 3 {
				t.Errorf("messages are left: %v, want %d on %s, and 3 of the other", all, tt.left, subject)
			}
			if after := b.objects(t); !slices.Equal(before, after) {
				t.Errorf("the objects are %v, were %v", after, before)
			}
		})
	}
}

// TestHostilePublish has a user who may publish on the subject of one dead letter, and
// does nothing else. With no header, reply or API call does that remove or change
// another dead letter, nor keep the operator from working on it.
func TestHostilePublish(t *testing.T) {
	t.Parallel()
	const mine = "monotel.dlq.DLQ.x.y.z"
	type attack struct {
		name    string
		header  nats.Header
		reply   string
		subject string // another than mine
		refused bool   // nothing is stored
	}
	theirs := record(2)
	theirs.ID = dlq.ID(theirs.Stream, theirs.StreamCreated, theirs.Consumer, theirs.StreamSequence)
	target := "monotel.dlq.DLQ." + theirs.Stream + "." + theirs.Consumer + "." + theirs.ID
	tests := []attack{
		{name: "rollup of all", header: nats.Header{"Nats-Rollup": {"all"}}, refused: true},
		{name: "rollup of the subject", header: nats.Header{"Nats-Rollup": {"sub"}}, refused: true},
		{name: "rollup in another case", header: nats.Header{"nats-rollup": {"all"}}},
		{name: "two rollups", header: nats.Header{"Nats-Rollup": {"sub", "all"}}, refused: true},
		{name: "rollup and a condition", header: nats.Header{"Nats-Rollup": {"all"}, "Nats-Expected-Stream": {"DLQ"}}, refused: true},
		{name: "TTL", header: nats.Header{"Nats-TTL": {"1s"}}, refused: true},
		{name: "marker", header: nats.Header{"Nats-Marker-Reason": {"Purge"}}},
		{
			name:   "schedule on another subject",
			header: nats.Header{"Nats-Schedule": {"@at 2020-01-01T00:00:00Z"}, "Nats-Schedule-Target": {target}, "Nats-Schedule-Rollup": {"sub"}}, refused: true,
		},
		{name: "end of a schedule", header: nats.Header{"Nats-Scheduler": {target}, "Nats-Schedule-Next": {"purge"}}, refused: true},
		{name: "batch", header: nats.Header{"Nats-Batch-Id": {"b"}, "Nats-Batch-Sequence": {"1"}, "Nats-Batch-Commit": {"1"}}, refused: true},
		{name: "counter", header: nats.Header{"Nats-Incr": {"+1"}}, refused: true},
		{name: "message ID", header: nats.Header{"Nats-Msg-Id": {theirs.ID}}},
		{name: "condition of another subject", header: nats.Header{
			"Nats-Expected-Last-Subject-Sequence": {"2"}, "Nats-Expected-Last-Subject-Sequence-Subject": {target},
		}},
		{name: "condition that fails", header: nats.Header{"Nats-Expected-Last-Sequence": {"1"}}, refused: true},
		{name: "source", header: nats.Header{"Nats-Stream-Source": {"DLQ 1 > > " + target}}, refused: true},
		{name: "trace of the message", header: nats.Header{"Nats-Trace-Dest": {target}}, refused: true},
		{name: "a trace of another dead letter", header: nats.Header{
			dlq.HeaderVersion: {"1"}, dlq.HeaderID: {theirs.ID}, dlq.HeaderChange: {"discarded"}, dlq.HeaderStream: {theirs.Stream},
			dlq.HeaderConsumer: {theirs.Consumer}, "Nats-Expected-Last-Subject-Sequence": {"0"},
		}},
		{name: "a change of another dead letter", header: nats.Header{dlq.HeaderID: {theirs.ID}, dlq.HeaderChange: {"archived"}}},
		{name: "an acknowledgement on another subject", reply: target},
		{name: "another subject", subject: target, refused: true},
		{name: "purge", subject: "$JS.API.STREAM.PURGE.DLQ", refused: true},
		{name: "delete", subject: "$JS.API.STREAM.MSG.DELETE.DLQ", refused: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			g := setupHostile(t, mine)
			for seq := range uint64(3) {
				if _, err := g.store.Capture(doctorContext(t), record(seq+1), nil); err != nil {
					t.Fatal(err)
				}
			}
			before := g.dlqInfo(t).State
			subject := tt.subject
			if subject == "" {
				subject = mine
			}
			if err := g.hostile.PublishMsg(&nats.Msg{Subject: subject, Header: tt.header, Reply: tt.reply}); err != nil {
				t.Fatal(err)
			}
			if err := g.hostile.Flush(); err != nil {
				t.Fatal(err)
			}
			// What comes after it on the same connection has been dealt with after it.
			if err := g.hostile.PublishMsg(&nats.Msg{Subject: mine, Data: []byte("last")}); err != nil {
				t.Fatal(err)
			}
			last := uint64(2)
			if tt.refused {
				last = 1
			}
			after := g.until(t, mine, last)
			if n := after.Subjects[mine]; n != last {
				t.Errorf("%d messages are on its subject, want %d", n, last)
			}
			if after.LastSeq-before.LastSeq > last+1 { // the acknowledgement
				t.Errorf("%d messages are stored, want %d", after.LastSeq-before.LastSeq, last)
			}
			t.Logf("%v", after.Subjects)
			counts, err := dlq.NewTally(g.store).Update(doctorContext(t))
			if err != nil || open(counts)["billing"].Count != 3 {
				t.Errorf("open are %v, %v, want 3", counts, err)
			}
			for seq := range uint64(3) {
				if holds, err := g.store.Holds(doctorContext(t), record(seq+1)); err != nil || !holds {
					t.Errorf("dead letter %d: %v, %v", seq+1, holds, err)
				}
			}
		})
	}
}

// A hostile is a server with a user who may publish on one subject.
type hostile struct {
	doctorSetup
	hostile *nats.Conn
}

func (g *hostile) dlqInfo(t *testing.T) *jetstream.StreamInfo {
	t.Helper()
	stream, err := g.js.Stream(doctorContext(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	info, err := stream.Info(doctorContext(t), jetstream.WithSubjectFilter(">"))
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// until waits for the last of n messages on a subject.
func (g *hostile) until(t *testing.T, subject string, n uint64) jetstream.StreamState {
	t.Helper()
	for ctx := doctorContext(t); ; {
		stream, err := g.js.Stream(ctx, "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.GetLastMsgForSubject(ctx, subject)
		if err == nil && string(m.Data) == "last" {
			return g.dlqInfo(t).State
		}
		if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
			t.Fatalf("wait for %d messages on %s: %v", n, subject, err)
		}
	}
}

func setupHostile(t *testing.T, allowed string) *hostile {
	t.Helper()
	account := server.NewAccount("APPS")
	opts := &server.Options{
		Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Accounts: []*server.Account{account},
		Users: []*server.User{
			{Username: "admin", Password: "pw", Account: account},
			{Username: "hostile", Password: "pw", Account: account, Permissions: &server.Permissions{
				Publish: &server.SubjectPermission{Allow: []string{allowed}},
			}},
		},
	}
	srv, err := server.NewServer(opts)
	if err != nil {
		t.Fatal(err)
	}
	srv.Start()
	t.Cleanup(func() {
		srv.Shutdown()
		srv.WaitForShutdown()
	})
	if !srv.ReadyForConnections(doctorPatience) {
		t.Fatal("the server does not start")
	}
	if account, err = srv.LookupAccount("APPS"); err != nil {
		t.Fatal(err)
	}
	limits := server.JetStreamAccountLimits{MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}
	if err := account.EnableJetStream(map[string]server.JetStreamAccountLimits{"": limits}, nil); err != nil {
		t.Fatal(err)
	}
	g := &hostile{}
	g.nc, g.js, g.store = connectAs(t, srv, dlq.Config{}, "admin")
	if err := g.store.Provision(doctorContext(t)); err != nil {
		t.Fatal(err)
	}
	g.hostile, _, _ = connectAs(t, srv, dlq.Config{}, "hostile")
	return g
}
