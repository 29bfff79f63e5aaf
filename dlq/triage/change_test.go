package triage_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// An edit is what is replayed, and the original stays.
func TestEdit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	e := b.get(t, id)
	must(t, b.desk.Edit(within(t), e, triage.Revision{Data: []byte(`{"order":1,"amount":2}`), Reason: "wrong amount"}))
	if e.Revision != 1 || e.State != dlq.StateOpen {
		t.Errorf("after the edit the entry is %+v", e)
	}
	h := nats.Header{"Tenant": {"green"}, "Nats-Msg-Id": e.Header["Nats-Msg-Id"], "traceparent": e.Header["traceparent"]}
	must(t, b.desk.Edit(within(t), e, triage.Revision{Data: []byte(`{"order":1,"amount":3}`), Header: h}))
	now := b.get(t, id)
	if string(now.Data) != `{"order":1,"amount":1.5}` || now.Revision != 2 || len(now.History) != 2 {
		t.Errorf("the entry is %+v with payload %s", now, now.Data)
	}
	if c := now.History[0]; c.Reason != "wrong amount" || c.Actor != "ann@ops" || string(c.Diff) != `{"amount":2}` {
		t.Errorf("the edit is %+v with diff %s", c, c.Diff)
	}
	billed := b.consume(t, billing, nil)
	b.run(t, b.plan(t, triage.Selection{}, triage.Options{}).ID)
	if m := billed.seen[0]; string(m.Data()) != `{"order":1,"amount":3}` || m.Headers().Get("Tenant") != "green" {
		t.Errorf("replayed is %s with %v", m.Data(), m.Headers())
	}
}

// Of two who edit the same entry one is told, and nothing is lost.
func TestEdit_conflict(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	mine, his := b.get(t, id), b.get(t, id)
	must(t, bob.Edit(within(t), his, triage.Revision{Data: []byte(`{"by":"bob"}`)}))
	err := b.desk.Edit(within(t), mine, triage.Revision{Data: []byte(`{"by":"ann"}`)})
	var entryErr *triage.EntryError
	if !errors.Is(err, triage.ErrChanged) || !errors.As(err, &entryErr) || entryErr.Actor != "bob@ops" {
		t.Errorf("the second edit: %v, want ErrChanged by bob", err)
	}
	current, err := b.desk.Current(within(t), b.get(t, id))
	must(t, err)
	if string(current.Data) != `{"by":"bob"}` {
		t.Errorf("the payload is %s", current.Data)
	}
}

// Headers that say what a message is are not to be edited.
func TestEdit_lockedHeaders(t *testing.T) {
	t.Parallel()
	b := setup(t)
	e := b.get(t, b.capture(t, 1)[0])
	for _, key := range []string{"Nats-Msg-Id", "nats-rollup", "Dlq-Replay-Of"} {
		h := nats.Header{"Nats-Msg-Id": e.Header["Nats-Msg-Id"]}
		h[key] = []string{"another"}
		if err := b.desk.Edit(within(t), e, triage.Revision{Data: e.Data, Header: h}); !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("edit header %s: %v, want ErrInvalid", key, err)
		}
	}
	if e := b.get(t, e.ID); e.Revision != 0 {
		t.Errorf("it was edited: %+v", e)
	}
}

// A payload that is too large for a message is edited all the same.
func TestEdit_large(t *testing.T) {
	t.Parallel()
	b := setup(t)
	e := b.get(t, b.capture(t, 1)[0])
	large := bytes.Repeat([]byte("x"), 1<<20)
	must(t, b.desk.Edit(within(t), e, triage.Revision{Data: large}))
	current, err := b.desk.Current(within(t), b.get(t, e.ID))
	must(t, err)
	if !bytes.Equal(current.Data, large) {
		t.Errorf("%d bytes came back, want %d", len(current.Data), len(large))
	}
	must(t, b.desk.Discard(within(t), e, ""))
	bucket, err := b.js.ObjectStore(within(t), "DLQ_LARGE")
	must(t, err)
	if left, err := bucket.List(within(t)); !errors.Is(err, jetstream.ErrNoObjectsFound) {
		t.Errorf("its objects after it was discarded: %v, %v", left, err)
	}
}

// What is discarded leaves a trace, and is not captured again.
func TestDiscard(t *testing.T) {
	t.Parallel()
	b := setup(t)
	r := b.record()
	captured, err := b.store.Capture(within(t), r, nil)
	if err != nil || !captured {
		t.Fatal(captured, err)
	}
	e := b.get(t, r.ID)
	must(t, b.desk.Discard(within(t), e, "spam"))
	now := b.get(t, r.ID)
	if now.State != dlq.StateDiscarded || now.Actor != "ann@ops" || now.History[0].Reason != "spam" {
		t.Errorf("the entry is %+v", now)
	}
	if len(now.Data) > 0 || now.Error != "" || len(now.Header) > 0 {
		t.Errorf("something of the message is left: %+v", now.Record)
	}
	if captured, err = b.store.Capture(within(t), r, nil); err != nil || captured {
		t.Errorf("captured again: %v, %v", captured, err)
	}
	if holds, err := b.store.Holds(within(t), r); err != nil || !holds {
		t.Errorf("the store holds it: %v, %v", holds, err)
	}
	if ids := b.list(t, triage.Selection{}); len(ids) != 0 {
		t.Errorf("open are %v", ids)
	}
	if ids := b.list(t, triage.Selection{States: []dlq.State{dlq.StateDiscarded}}); !slices.Equal(ids, []string{r.ID}) {
		t.Errorf("discarded are %v", ids)
	}
	if err := b.desk.Discard(within(t), now, ""); !errors.Is(err, triage.ErrState) {
		t.Errorf("discard it again: %v, want ErrState", err)
	}
	if err := b.desk.Restore(within(t), now, ""); !errors.Is(err, triage.ErrState) {
		t.Errorf("restore it: %v, want ErrState", err)
	}
}

// A full stream takes no edit, and loses nothing by it; discarding makes room.
func TestDiscard_fullStream(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 1 << 20}}, jetstream.StreamConfig{})
	filler := func(r *dlq.Record) { r.Data = bytes.Repeat([]byte("x"), 8<<10) }
	var ids []string
	for {
		r := b.record(filler)
		if _, err := b.store.Capture(within(t), r, nil); err != nil {
			if !dlq.IsFull(err) {
				t.Fatal(err)
			}
			break
		}
		ids = append(ids, r.ID)
	}
	e := b.get(t, ids[0])
	err := b.desk.Edit(within(t), e, triage.Revision{Data: bytes.Repeat([]byte("y"), 8<<10)})
	if !errors.Is(err, triage.ErrFull) || !strings.Contains(err.Error(), "--max-bytes") {
		t.Errorf("edit: %v, want ErrFull that says what to do", err)
	}
	if e := b.get(t, ids[0]); e.Revision != 0 || len(e.Data) != 8<<10 {
		t.Errorf("after the failed edit the entry is %+v", e)
	}
	must(t, b.desk.Discard(within(t), e, "make room"))
	b.wantState(t, ids[0], dlq.StateDiscarded)
	must(t, b.desk.Archive(within(t), b.get(t, ids[1]), ""))
}

// TestDiscard_noRoomForATrace has a stream that is full to the last bytes.
func TestDiscard_noRoomForATrace(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 3)
	s, err := b.js.Stream(within(t), "DLQ")
	must(t, err)
	cfg := s.CachedInfo().Config
	info, err := s.Info(within(t))
	must(t, err)
	cfg.MaxBytes = int64(info.State.Bytes) + 10
	_, err = b.js.UpdateStream(within(t), cfg)
	must(t, err)
	if err := b.desk.Archive(within(t), b.get(t, ids[1]), ""); !errors.Is(err, triage.ErrFull) {
		t.Fatalf("archive: %v, want ErrFull", err)
	}
	must(t, b.desk.Discard(within(t), b.get(t, ids[0]), ""))
	b.wantState(t, ids[0], dlq.StateDiscarded)
	b.wantState(t, ids[1], dlq.StateOpen)
	// A replay is refused and has lost nothing.
	p := b.plan(t, triage.Selection{IDs: ids[2:]}, triage.Options{NoWait: true})
	info, err = s.Info(within(t))
	must(t, err)
	cfg.MaxBytes = int64(info.State.Bytes) + 10
	_, err = b.js.UpdateStream(within(t), cfg)
	must(t, err)
	op, err := b.desk.Run(within(t), p.ID, nil)
	if !errors.Is(err, triage.ErrFull) || op.Status != triage.StatusPaused || op.Claimed != 0 {
		t.Errorf("replay: %v, %+v; want ErrFull, and it paused", err, op)
	}
	b.wantState(t, ids[2], dlq.StateOpen)
}

func TestArchive(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 2)
	e := b.get(t, ids[0])
	must(t, b.desk.Archive(within(t), e, "later"))
	if open := b.list(t, triage.Selection{}); !slices.Equal(open, ids[1:]) {
		t.Errorf("open are %v", open)
	}
	must(t, b.desk.Restore(within(t), e, "now"))
	if open := b.list(t, triage.Selection{}); !slices.Equal(open, newestFirst(ids)) {
		t.Errorf("open are %v", open)
	}
	kinds := []dlq.ChangeKind{b.get(t, ids[0]).History[0].Kind, b.get(t, ids[0]).History[1].Kind}
	if want := []dlq.ChangeKind{dlq.ChangeArchived, dlq.ChangeRestored}; !slices.Equal(kinds, want) {
		t.Errorf("its history is %v, want %v", kinds, want)
	}
}
