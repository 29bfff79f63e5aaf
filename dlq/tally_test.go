package dlq_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// counted returns what a full scan of the dead-letter stream finds, by consumer:
// each entry as its own messages make it. Consumers of which none is open are left
// out.
func (b *bundle) counted(t *testing.T) map[string]dlq.OpenCount {
	t.Helper()
	entries := make(map[string]*dlq.Entry)
	for m := range b.messages(t) {
		c, err := dlq.DecodeChange(m.Headers(), m.Data())
		e := entries[m.Subject()]
		switch {
		case err != nil && e == nil:
			if r, _ := dlq.Decode(m.Headers(), m.Data()); r != nil {
				entries[m.Subject()] = dlq.NewEntry(r, 1, nil)
			}
		case err == nil && e != nil:
			e.Apply(c)
		}
	}
	counts := make(map[string]dlq.OpenCount)
	for subject, e := range entries {
		if e.State != dlq.StateOpen && e.State != dlq.StateReplaying {
			continue
		}
		name := dlq.OpenExternal
		if e.Event != "" {
			parts := strings.Split(subject, ".")
			name = parts[len(parts)-2]
		}
		n := counts[name]
		n.Consumer = name
		if failed := e.Record.Failed.Truncate(time.Second); n.Count == 0 || failed.Before(n.Oldest) {
			n.Oldest = failed
		}
		n.Count++
		counts[name] = n
	}
	return counts
}

// messages returns what the dead-letter stream has, in order.
func (b *bundle) messages(t *testing.T) <-chan jetstream.Msg {
	t.Helper()
	cons, err := b.js.CreateConsumer(t.Context(), "DLQ", jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: time.Minute, MemoryStorage: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	n := int(cons.CachedInfo().NumPending)
	if n == 0 {
		none := make(chan jetstream.Msg)
		close(none)
		return none
	}
	batch, err := cons.Fetch(n, jetstream.FetchMaxWait(time.Minute))
	if err != nil {
		t.Fatal(err)
	}
	return batch.Messages()
}

// open is what a tally says, as counted does.
func open(counts []dlq.OpenCount) map[string]dlq.OpenCount {
	all := make(map[string]dlq.OpenCount)
	for _, n := range counts {
		if n.Count > 0 || !n.Oldest.IsZero() {
			all[n.Consumer] = n
		}
	}
	return all
}

// update is one Update that has to succeed.
func update(t *testing.T, tally *dlq.Tally) []dlq.OpenCount {
	t.Helper()
	counts, err := tally.Update(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return counts
}

// agrees waits until a tally says what a full scan does. Nothing may change
// meanwhile.
func (b *bundle) agrees(t *testing.T, tally *dlq.Tally) {
	t.Helper()
	want, diff := b.counted(t), ""
	for deadline := time.Now().Add(bridgePatience); time.Now().Before(deadline); {
		if diff = cmp.Diff(want, open(update(t, tally))); diff == "" {
			return
		}
	}
	t.Fatalf("the tally is not what a full scan finds (-want +got):\n%s", diff)
}

// A shop makes dead letters and changes them at random.
type shop struct {
	b       *bundle
	store   *dlq.Store
	r       *rand.Rand
	next    uint64
	entries []*dlq.Entry
}

func (s *shop) record() *dlq.Record {
	s.next++
	r := record(s.next)
	r.Consumer = []string{"billing", "mail", "stock"}[s.r.IntN(3)]
	if s.r.IntN(4) == 0 {
		r.Event, r.Consumer = "", fmt.Sprintf("theirs-%d", s.r.IntN(100))
	}
	r.ID = dlq.ID(r.Stream, r.StreamCreated, r.Consumer, r.StreamSequence)
	r.Failed = created.Add(time.Duration(s.r.IntN(1_000_000)) * time.Millisecond) // in no order
	return r
}

// step does one thing.
func (s *shop) step(t *testing.T) {
	t.Helper()
	ctx := t.Context()
	n := s.r.IntN(10)
	if len(s.entries) == 0 || n < 3 {
		r := s.record()
		captured, err := s.store.Capture(ctx, r, nil)
		if err != nil || !captured {
			t.Fatal(captured, err)
		}
		last, err := s.b.js.Stream(ctx, "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		s.entries = append(s.entries, dlq.NewEntry(r, last.CachedInfo().State.LastSeq, nil))
		return
	}
	i := s.r.IntN(len(s.entries))
	e := s.entries[i]
	c := dlq.Change{Kind: kinds()[s.r.IntN(len(kinds()))], Actor: "ann", Operation: "op"}
	switch {
	case n == 3:
		s.imported(t)
		return
	case n == 4:
		c.Kind = "translated" // of a newer version
	case c.Kind == dlq.ChangeEdited:
		c.Edit = &dlq.Record{Data: []byte("new")}
	case c.Kind == dlq.ChangeFailedAgain:
		c.Failure = record(1)
	}
	if c.Kind == dlq.ChangeDiscarded && s.r.IntN(2) == 0 { // and the process ends
		if err := s.store.DiscardHalf(ctx, e); err != nil {
			t.Fatal(err)
		}
	} else if err := s.store.Change(ctx, e, c, nil); err != nil {
		t.Fatal(err)
	}
	if c.Kind == dlq.ChangeDiscarded {
		s.entries = slices.Delete(s.entries, i, i+1)
	}
}

// imported publishes what an import does: a record or a trace, and changes that
// were made elsewhere.
func (s *shop) imported(t *testing.T) {
	t.Helper()
	r := s.record()
	subject, last := s.store.SubjectOf(r), uint64(0)
	publish := func(h nats.Header) {
		ack, err := s.b.js.PublishMsg(t.Context(), &nats.Msg{Subject: subject, Header: h}, jetstream.WithExpectLastSequencePerSubject(last))
		if err != nil {
			t.Fatal(err)
		}
		last = ack.Sequence
	}
	h := nats.Header{
		dlq.HeaderVersion: {"1"}, dlq.HeaderID: {r.ID}, dlq.HeaderFailed: {r.Failed.Format(time.RFC3339Nano)},
		dlq.HeaderEvent: {r.Event}, dlq.HeaderStream: {r.Stream}, dlq.HeaderConsumer: {r.Consumer},
	}
	if s.r.IntN(3) == 0 {
		h[dlq.HeaderChange], h[dlq.HeaderChangeFrom] = []string{"discarded"}, []string{"open"}
		publish(h)
		return
	}
	publish(h)
	for range s.r.IntN(4) {
		c := dlq.Change{Kind: kinds()[s.r.IntN(len(kinds())-1)], From: dlq.StateArchived} // which may be wrong
		publish(c.WireHeader(r.ID))
	}
}

// TestTally_random compares tallies that go on from each other, are interrupted,
// and begin anew, with what a full scan finds.
func TestTally_random(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		give dlq.TallyLimits
	}{
		{"in the bucket", dlq.TallyLimits{Batch: 7, Update: 20}},
		{"in memory", dlq.TallyLimits{Batch: 7, Update: 40, Stored: 5}},
		{"in both", dlq.TallyLimits{Batch: 3, Update: 1000, Stored: 40}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			b := setup(t)
			s := &shop{b: b, store: b.provisioned(t, dlq.Config{}), r: rand.New(rand.NewPCG(seed, 1))}
			tallies := make([]*dlq.Tally, 3)
			for i := range tallies {
				tallies[i] = dlq.NewTallyWith(s.store, tt.give)
			}
			compared := 0
			for range 300 {
				s.step(t)
				i := s.r.IntN(len(tallies))
				switch s.r.IntN(12) {
				case 0:
					tallies[i] = dlq.NewTallyWith(s.store, tt.give) // its process has ended
				case 1:
					ctx, cancel := context.WithTimeout(t.Context(), time.Duration(s.r.IntN(2000))*time.Microsecond)
					_, _ = tallies[i].Update(ctx)
					cancel()
				case 2, 3:
					got := update(t, tallies[i])
					if !tallies[i].At(b.info(t, "DLQ").State.LastSeq) {
						continue // it is not through
					}
					compared++
					if diff := cmp.Diff(b.counted(t), open(got)); diff != "" {
						t.Fatalf("after %d changes (-want +got):\n%s", s.next, diff)
					}
				case 4:
					b.agrees(t, tallies[i])
				}
			}
			for _, tally := range tallies {
				b.agrees(t, tally)
			}
			t.Logf("compared %d times on the way", compared)
		})
	}
}

// TestTally_race has changes made while tallies read.
func TestTally_race(t *testing.T) {
	t.Parallel()
	b := setup(t)
	store := b.provisioned(t, dlq.Config{})
	var writers, readers sync.WaitGroup
	var done atomic.Bool
	for w := range uint64(2) {
		writers.Go(func() {
			s := &shop{b: b, store: store, r: rand.New(rand.NewPCG(w, 2)), next: w << 32}
			for range 100 {
				r := s.record()
				if _, err := store.Capture(t.Context(), r, nil); err != nil {
					t.Error(err)
					return
				}
				e := dlq.NewEntry(r, b.lastOf(t, store, r), nil)
				for range s.r.IntN(4) {
					kind := kinds()[s.r.IntN(len(kinds())-1)]
					if err := store.Change(t.Context(), e, dlq.Change{Kind: kind, Edit: &dlq.Record{}}, nil); err != nil {
						t.Error(err)
					}
				}
				if s.r.IntN(2) == 0 {
					if err := store.Change(t.Context(), e, dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	tallies := make([]*dlq.Tally, 4)
	for i := range tallies {
		tallies[i] = dlq.NewTallyWith(store, dlq.TallyLimits{Batch: 16, Stored: 1 + 1000*(i%2), Patience: time.Hour})
		readers.Go(func() {
			for !done.Load() {
				if _, err := tallies[i].Update(t.Context()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writers.Wait()
	done.Store(true)
	readers.Wait()
	last := dlq.NewTallyWith(store, dlq.TallyLimits{})
	b.agrees(t, last)
	for _, tally := range tallies {
		b.agrees(t, tally)
	}
}

// lastOf is the sequence of what is stored of a record.
func (b *bundle) lastOf(t *testing.T, s *dlq.Store, r *dlq.Record) uint64 {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Error(err)
		return 0
	}
	m, err := stream.GetLastMsgForSubject(t.Context(), s.SubjectOf(r))
	if err != nil {
		t.Error(err)
		return 0
	}
	return m.Sequence
}

// What is removed by hand is noticed, and a replaced stream.
func TestTally_removedByHand(t *testing.T) {
	t.Parallel()
	purge := func(opts ...jetstream.StreamPurgeOpt) func(t *testing.T, b *bundle, entries []*dlq.Entry) {
		return func(t *testing.T, b *bundle, _ []*dlq.Entry) {
			t.Helper()
			stream, err := b.js.Stream(t.Context(), "DLQ")
			if err == nil {
				err = stream.Purge(t.Context(), opts...)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	remove := func(sequences ...uint64) func(t *testing.T, b *bundle, entries []*dlq.Entry) {
		return func(t *testing.T, b *bundle, _ []*dlq.Entry) {
			t.Helper()
			stream, err := b.js.Stream(t.Context(), "DLQ")
			if err != nil {
				t.Fatal(err)
			}
			for _, seq := range sequences {
				if err := stream.DeleteMsg(t.Context(), seq); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, tt := range []struct {
		name   string
		remove func(t *testing.T, b *bundle, entries []*dlq.Entry)
	}{
		{"purge", purge()},
		{"purge the beginning", purge(jetstream.WithPurgeSequence(5))},
		{"purge a consumer", purge(jetstream.WithPurgeSubject("monotel.dlq.DLQ.*.billing.>"))},
		{"a record", remove(3)},
		{"a record that has changes", remove(1)},
		{"a change", remove(11)},
		{"the last message", remove(13)},
		{"the stream", func(t *testing.T, b *bundle, _ []*dlq.Entry) {
			t.Helper()
			if err := b.js.DeleteStream(t.Context(), "DLQ"); err != nil {
				t.Fatal(err)
			}
			s := b.provisioned(t, dlq.Config{})
			for seq := range uint64(20) {
				capture(t, s, record(100+seq))
			}
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			var entries []*dlq.Entry
			for seq := range uint64(10) {
				entries = append(entries, b.captureEntry(t, s, record(seq+1)))
			}
			change(t, s, entries[0], dlq.Change{Kind: dlq.ChangeArchived})
			change(t, s, entries[0], dlq.Change{Kind: dlq.ChangeRestored})
			change(t, s, entries[9], dlq.Change{Kind: dlq.ChangeReplaying})
			tally := dlq.NewTallyWith(s, dlq.TallyLimits{})
			b.agrees(t, tally)
			tt.remove(t, b, entries)
			b.agrees(t, tally)
			b.agrees(t, dlq.NewTallyWith(s, dlq.TallyLimits{}))
			capture(t, s, record(1000))
			b.agrees(t, tally)
		})
	}
}

// A stream with an age limit loses messages all the time, which is no reason to
// read it from the start all the time.
func TestTally_recountsSeldom(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	for seq := range uint64(5) {
		capture(t, s, record(seq+1))
	}
	tally := dlq.NewTallyWith(s, dlq.TallyLimits{Recount: time.Hour})
	update(t, tally)
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.DeleteMsg(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	for range 10 {
		if got := open(update(t, tally))["billing"].Count; got != 5 {
			t.Errorf("%d are open, want the 5 of before", got)
		}
	}
	capture(t, s, record(6))
	if got := open(update(t, tally))["billing"].Count; got != 6 {
		t.Errorf("%d are open, want 6: what is new counts", got)
	}
}

// Nothing is known while the stream is read for the first time, and then the
// numbers stay as they were while something is missing.
func TestTally_staleRatherThanZero(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	if got := update(t, dlq.NewTallyWith(s, dlq.TallyLimits{})); got == nil || len(got) > 0 {
		t.Errorf("an empty stream: %v, want none open, and that known", got)
	}
	if _, err := b.js.KeyValue(t.Context(), "DLQ_STATE"); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("the bucket of an empty stream: %v", err)
	}
	for seq := range uint64(25) {
		capture(t, s, record(seq+1))
	}
	small := dlq.TallyLimits{Batch: 5, Update: 10, Stored: 20, Patience: time.Hour}
	first, second := dlq.NewTallyWith(s, small), dlq.NewTallyWith(s, small)
	for i := range 2 {
		if got := update(t, first); got != nil {
			t.Errorf("after %d updates: %v, want nothing", i+1, got)
		}
		if got := update(t, second); got != nil {
			t.Errorf("the second says %v, want nothing", got)
		}
		if _, reads := second.FromStart(); reads {
			t.Error("two read the stream from the start")
		}
	}
	b.agrees(t, first)
	b.agrees(t, second)
	if !first.Keeps() || second.Keeps() {
		t.Errorf("kept in memory: %v, %v, want true, false", first.Keeps(), second.Keeps())
	}
	capture(t, s, record(100))
	if got := open(update(t, second))["billing"].Count; got != 25 {
		t.Errorf("%d are open, want the 25 of before: the first has not counted yet", got)
	}
	b.agrees(t, first)
	b.agrees(t, second)
	capture(t, s, record(101))
	third := dlq.NewTallyWith(s, dlq.TallyLimits{Stored: 20}) // without patience
	b.agrees(t, third)
	b.agrees(t, first)
	if first.Keeps() {
		t.Error("the first goes on keeping what the third has")
	}
}

// Of many who find that nobody has counted yet, one does.
func TestTally_oneReads(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	for seq := range uint64(20) {
		capture(t, s, record(seq+1))
	}
	tallies := make([]*dlq.Tally, 8)
	for i := range tallies {
		tallies[i] = dlq.NewTallyWith(s, dlq.TallyLimits{Batch: 5, Update: 10, Patience: time.Hour})
	}
	inParallel(len(tallies), func(i int) {
		if _, err := tallies[i].Update(t.Context()); err != nil {
			t.Error(err)
		}
	})
	n := 0
	for _, tally := range tallies {
		if _, reads := tally.FromStart(); reads {
			n++
		}
	}
	if n != 1 {
		t.Errorf("%d read the stream from the start, want 1", n)
	}
}

// The bucket can be deleted at any time.
func TestTally_bucketDeleted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	for _, l := range []dlq.TallyLimits{{}, {Stored: 1}} {
		tally := dlq.NewTallyWith(s, l)
		for range uint64(3) {
			capture(t, s, record(b.info(t, "DLQ").State.LastSeq+1))
		}
		b.agrees(t, tally)
		if err := b.js.DeleteKeyValue(t.Context(), "DLQ_STATE"); err != nil {
			t.Fatal(err)
		}
		capture(t, s, record(b.info(t, "DLQ").State.LastSeq+1))
		_, _ = tally.Update(t.Context()) // may find it gone
		b.agrees(t, tally)
		b.agrees(t, dlq.NewTallyWith(s, l))
	}
}

// Consumers beyond the first, and those that are none of an App's, share a name.
func TestTally_consumers(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	for i := range uint64(6) {
		r := record(i + 1)
		r.Consumer = fmt.Sprintf("c%d", i)
		r.ID = dlq.ID(r.Stream, created, r.Consumer, i)
		if i%2 == 1 {
			r.Event = ""
		}
		capture(t, s, r)
	}
	e := b.captureEntry(t, s, record(10))
	tally := dlq.NewTallyWith(s, dlq.TallyLimits{Consumers: 2})
	names := func() (all []string) {
		for _, n := range update(t, tally) {
			all = append(all, fmt.Sprintf("%s %d", n.Consumer, n.Count))
		}
		return all
	}
	if diff := cmp.Diff([]string{"c0 1", "_external 3", "c2 1", "_OTHER 2"}, names()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	change(t, s, e, dlq.Change{Kind: dlq.ChangeArchived})
	if diff := cmp.Diff([]string{"c0 1", "_external 3", "c2 1", "_OTHER 1"}, names()); diff != "" {
		t.Errorf("after one is archived (-want +got):\n%s", diff)
	}
}

// Beyond what fits into memory the number goes on, by what each change says.
func TestTally_beyond(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	tally := dlq.NewTallyWith(s, dlq.TallyLimits{Entries: 10})
	var entries []*dlq.Entry
	for seq := range uint64(30) {
		entries = append(entries, b.captureEntry(t, s, record(seq+1)))
	}
	b.agrees(t, tally)
	for _, i := range []int{29, 0, 1, 15} {
		change(t, s, entries[i], dlq.Change{Kind: dlq.ChangeReplaying})
		b.agrees(t, tally)
		change(t, s, entries[i], dlq.Change{Kind: dlq.ChangeResolved})
		b.agrees(t, tally)
		change(t, s, entries[i], dlq.Change{Kind: dlq.ChangeRestored})
		b.agrees(t, tally)
	}
	for _, e := range entries[5:] {
		change(t, s, e, dlq.Change{Kind: dlq.ChangeDiscarded})
	}
	b.agrees(t, tally)
}

// Two Apps may have dead-letter streams of their own.
func TestTally_otherStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	cfg := dlq.Config{Stream: jetstream.StreamConfig{Name: "broken"}}
	s, other := b.provisioned(t, cfg), b.provisioned(t, dlq.Config{})
	capture(t, s, record(1))
	capture(t, other, record(2))
	capture(t, other, record(3))
	if n := open(update(t, dlq.NewTally(s)))["billing"].Count; n != 1 {
		t.Errorf("%d are open, want 1", n)
	}
	if n := open(update(t, dlq.NewTally(other)))["billing"].Count; n != 2 {
		t.Errorf("%d are open, want 2", n)
	}
}

// TestTally_memory keeps the promise that a million open dead letters fit.
func TestTally_memory(t *testing.T) { //nolint:paralleltest // it measures the heap
	const n, most = 200_000, 40 // bytes for each
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	f := dlq.FillFold(n)
	runtime.GC()
	runtime.ReadMemStats(&after)
	runtime.KeepAlive(f)
	each := (float64(after.HeapAlloc) - float64(before.HeapAlloc)) / n
	t.Logf("%.1f bytes for each open dead letter", each)
	if each > most {
		t.Errorf("an open dead letter takes %.1f bytes, want at most %d", each, most)
	}
}
