package triage_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// halfDiscard leaves a dead letter as a process does that ends when it has stored the
// trace: that of a discard in another dead-letter stream.
func (b *bundle) halfDiscard(t *testing.T, id string) {
	t.Helper()
	cfg := dlq.Config{Stream: jetstream.StreamConfig{Name: "ELSEWHERE"}}
	elsewhere, err := dlq.NewStore(b.nc, b.js, cfg)
	must(t, err)
	must(t, elsewhere.Provision(within(t)))
	e := b.get(t, id)
	r := *e.Record
	r.Body, r.BodyObject, r.HeadersObject = dlq.BodyInline, "", ""
	captured, err := elsewhere.Capture(within(t), &r, nil)
	must(t, err)
	if !captured {
		t.Fatal("it is there already")
	}
	desk := b.open(t, triage.Config{Stream: "ELSEWHERE", Actor: "ann@ops"})
	there, err := desk.Get(within(t), id)
	must(t, err)
	must(t, desk.Discard(within(t), there, "spam"))
	s, err := b.js.Stream(within(t), "ELSEWHERE")
	must(t, err)
	m, err := s.GetLastMsgForSubject(within(t), elsewhere.SubjectOf(e.Record))
	must(t, err)
	for key := range m.Header {
		if strings.HasPrefix(key, "Nats-") {
			delete(m.Header, key)
		}
	}
	b.publishOn(t, b.store.SubjectOf(e.Record), m.Header, e.Last)
}

func (b *bundle) publishOn(t *testing.T, subject string, h nats.Header, last uint64) {
	t.Helper()
	_, err := b.js.PublishMsg(within(t), &nats.Msg{Subject: subject, Header: h}, jetstream.WithExpectLastSequencePerSubject(last))
	must(t, err)
}

// A discard of which only the trace is stored counts as discarded everywhere, and the
// next change finishes it.
func TestDiscard_half(t *testing.T) {
	t.Parallel()
	large := func(r *dlq.Record) { r.Data = bytes.Repeat([]byte("x"), 2<<20) }
	for _, tt := range []struct {
		name   string
		record func(*dlq.Record)
		before func(t *testing.T, b *bundle, id string)
	}{
		{name: "record"},
		{name: "large", record: large},
		{name: "archived", before: func(t *testing.T, b *bundle, id string) {
			t.Helper()
			must(t, b.desk.Archive(within(t), b.get(t, id), ""))
		}},
		{name: "edited", before: func(t *testing.T, b *bundle, id string) {
			t.Helper()
			must(t, b.desk.Edit(within(t), b.get(t, id), triage.Revision{Data: bytes.Repeat([]byte("y"), 2<<20)}))
		}},
		{name: "changed often", before: func(t *testing.T, b *bundle, id string) {
			t.Helper()
			for range 130 { // more than a batch
				must(t, b.desk.Archive(within(t), b.get(t, id), ""))
				must(t, b.desk.Restore(within(t), b.get(t, id), ""))
			}
		}},
		{name: "resolved", before: func(t *testing.T, b *bundle, id string) {
			t.Helper()
			tg := b.consume(t, billing, nil)
			b.run(t, b.plan(t, triage.Selection{IDs: []string{id}}, triage.Options{}).ID)
			tg.stop()
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			var ids []string
			for range 3 {
				if tt.record != nil {
					ids = append(ids, b.capture(t, 1, tt.record)...)
				} else {
					ids = append(ids, b.capture(t, 1)...)
				}
			}
			id := ids[1]
			if tt.before != nil {
				tt.before(t, b, id)
			}
			plan := b.plan(t, triage.Selection{IDs: []string{ids[0]}}, triage.Options{NoWait: true})
			b.halfDiscard(t, id)

			e := b.get(t, id)
			if e.State != dlq.StateDiscarded || len(e.History) != 1 || e.History[0].Reason != "spam" || len(e.Data) > 0 || e.Error != "" {
				t.Errorf("the entry is %+v", e)
			}
			if open := b.list(t, triage.Selection{}); !slices.Equal(open, []string{ids[2], ids[0]}) {
				t.Errorf("open are %v", open)
			}
			if all := b.list(t, triage.Selection{States: dlq.States()}); len(all) != 3 || all[0] != id {
				t.Errorf("listed are %v", all)
			}
			s, err := b.desk.Stats(within(t))
			must(t, err)
			if s.States[dlq.StateDiscarded] != 1 || s.States[dlq.StateOpen] != 2 || len(s.States) != 2 {
				t.Errorf("stats are %v", s.States)
			}
			if p, err := b.desk.Plan(within(t), triage.Selection{IDs: []string{id}}, triage.Options{}); err != nil || p.Selected != 0 || p.LeftOut["discarded"] != 1 {
				t.Errorf("a plan of it: %+v, %v", p, err)
			}
			var file bytes.Buffer
			if n, err := b.desk.Export(within(t), triage.Selection{States: dlq.States()}, &file); n != 3 || err != nil {
				t.Errorf("export: %d, %v", n, err)
			}
			for _, err := range []error{
				b.desk.Archive(within(t), e, ""), b.desk.Restore(within(t), e, ""),
				b.desk.Edit(within(t), e, triage.Revision{Data: []byte("{}")}),
			} {
				if !errors.Is(err, triage.ErrState) {
					t.Errorf("change it: %v, want ErrState", err)
				}
			}
			subject := b.store.SubjectOf(e.Record)
			if n, err := triage.MessagesOf(within(t), b.desk, subject); err != nil || n < 2 {
				t.Errorf("there are %d messages, %v: what only reads must not delete", n, err)
			}

			// In another stream it is what it is here.
			other, err := dlq.NewStore(b.nc, b.js, dlq.Config{Stream: jetstream.StreamConfig{Name: "COPY"}})
			must(t, err)
			must(t, other.Provision(within(t)))
			copied := b.open(t, triage.Config{Stream: "COPY"})
			in, err := copied.Import(within(t), &file)
			must(t, err)
			there, err := copied.Get(within(t), id)
			must(t, err)
			if in.Imported != 3 || there.State != dlq.StateDiscarded || len(there.History) != 1 {
				t.Errorf("imported are %+v, and it is %+v", in, there)
			}
			if n, err := triage.MessagesOf(within(t), copied, other.SubjectOf(e.Record)); err != nil || n != 1 {
				t.Errorf("%d messages of it are imported, %v", n, err)
			}

			// A change of another one finishes it, and so does a run.
			desk := b.open(t, triage.Config{Actor: "bob@ops"})
			for _, err := range desk.Entries(within(t), triage.Selection{}, false) {
				must(t, err)
			}
			if tt.name == "record" {
				_, err = b.desk.Run(within(t), plan.ID, nil)
			} else {
				err = desk.Archive(within(t), b.get(t, ids[2]), "")
			}
			must(t, err)
			if n, err := triage.MessagesOf(within(t), b.desk, subject); err != nil || n != 1 {
				t.Errorf("%d messages are left, %v, want the trace", n, err)
			}
			b.wantState(t, id, dlq.StateDiscarded)
			if bucket, err := b.js.ObjectStore(within(t), "DLQ_LARGE"); err == nil {
				left, err := bucket.List(within(t))
				if err != nil && !errors.Is(err, jetstream.ErrNoObjectsFound) {
					t.Fatal(err)
				}
				for _, o := range left {
					if strings.HasPrefix(o.Name, id) {
						t.Errorf("object %s is left", o.Name)
					}
				}
			}
		})
	}
}

// An earlier version discards by a rollup, as long as the stream allows that. Where it
// does not, nothing happens.
func TestDiscard_byEarlierVersion(t *testing.T) {
	t.Parallel()
	for _, allowed := range []bool{true, false} {
		t.Run(fmt.Sprintf("allowed: %t", allowed), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			ids := b.capture(t, 2)
			must(t, b.desk.Archive(within(t), b.get(t, ids[0]), ""))
			e := b.get(t, ids[0])
			cfg := b.info(t).Config
			cfg.AllowRollup = allowed
			_, err := b.js.UpdateStream(within(t), cfg)
			must(t, err)
			before := b.info(t).State
			h := nats.Header{
				dlq.HeaderVersion: {"1"}, dlq.HeaderID: {e.ID}, dlq.HeaderChange: {"discarded"}, dlq.HeaderStream: {e.Stream},
				dlq.HeaderConsumer: {e.Consumer}, jetstream.MsgRollup: {jetstream.MsgRollupSubject},
			}
			_, err = b.js.PublishMsg(within(t), &nats.Msg{Subject: b.store.SubjectOf(e.Record), Header: h}, jetstream.WithExpectLastSequencePerSubject(e.Last))
			want, left := dlq.StateDiscarded, 2
			if !allowed {
				var api *jetstream.APIError
				if !errors.As(err, &api) || api.Description != "rollup not permitted" || b.info(t).State.LastSeq != before.LastSeq {
					t.Errorf("the discard: %v", err)
				}
				want, left = dlq.StateArchived, 3
			} else {
				must(t, err)
			}
			b.wantState(t, ids[0], want)
			s, err := b.desk.Stats(within(t))
			must(t, err)
			if s.States[want] != 1 || s.States[dlq.StateOpen] != 1 || len(s.States) != 2 || b.info(t).State.Msgs != uint64(left) {
				t.Errorf("stats are %v, with %d messages", s.States, b.info(t).State.Msgs)
			}
			must(t, b.desk.FinishDiscards(within(t)))
			must(t, b.desk.Discard(within(t), b.get(t, ids[1]), ""))
		})
	}
}

// TestDiscard_again finishes a discard by another of the same dead letter.
func TestDiscard_again(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	b.halfDiscard(t, id)
	e := b.get(t, id)
	if err := b.desk.Discard(within(t), e, ""); !errors.Is(err, triage.ErrState) {
		t.Errorf("discard: %v, want ErrState", err)
	}
	if n, err := triage.MessagesOf(within(t), b.desk, b.store.SubjectOf(e.Record)); err != nil || n != 1 {
		t.Errorf("%d messages are left, %v", n, err)
	}
}

// An export of an earlier version may have the record beside the trace.
func TestImport_halfDiscarded(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	e := b.get(t, id)
	var file bytes.Buffer
	_, err := b.desk.Export(within(t), triage.Selection{}, &file)
	must(t, err)
	b.halfDiscard(t, id)
	var trace bytes.Buffer
	_, err = b.desk.Export(within(t), triage.Selection{States: dlq.States()}, &trace)
	must(t, err)
	lines := strings.SplitAfter(file.String(), "\n")
	var first, second map[string]any
	must(t, json.Unmarshal([]byte(lines[1]), &first))
	must(t, json.Unmarshal([]byte(strings.Split(trace.String(), "\n")[1]), &second))
	first["messages"] = append(first["messages"].([]any), second["messages"].([]any)...)
	line, err := json.Marshal(first)
	must(t, err)
	both := lines[0] + string(line) + "\n" + lines[2]
	other, err := dlq.NewStore(b.nc, b.js, dlq.Config{Stream: jetstream.StreamConfig{Name: "COPY"}})
	must(t, err)
	must(t, other.Provision(within(t)))
	desk := b.open(t, triage.Config{Stream: "COPY"})
	in, err := desk.Import(within(t), strings.NewReader(both))
	must(t, err)
	now, err := desk.Get(within(t), id)
	must(t, err)
	if n, err := triage.MessagesOf(within(t), desk, other.SubjectOf(e.Record)); err != nil || n != 1 || in.Imported != 1 || now.State != dlq.StateDiscarded {
		t.Errorf("%d messages are imported, %v, of %+v, and it is %s", n, err, in, now.State)
	}
}

// TestHostilePublish has somebody publish what is no change on the subject of a dead
// letter, or who may publish only dead letters of another consumer, with the ID of this
// one. It is listed, found, changed and replayed all the same.
func TestHostilePublish(t *testing.T) {
	t.Parallel()
	forged := func(e *dlq.Entry) *dlq.Record {
		r := *e.Record
		r.Consumer = "aaa" // which sorts first
		r.ID = e.ID
		return &r
	}
	record := func(r *dlq.Record) nats.Header {
		return nats.Header{
			dlq.HeaderVersion: {"1"}, dlq.HeaderID: {r.ID}, dlq.HeaderStream: {r.Stream}, dlq.HeaderConsumer: {r.Consumer},
			dlq.HeaderStreamCreated: {r.StreamCreated.Format(time.RFC3339Nano)}, dlq.HeaderStreamSequence: {fmt.Sprint(r.StreamSequence)},
			dlq.HeaderError: {`"forged"`},
		}
	}
	kind := func(e *dlq.Entry, k dlq.ChangeKind) nats.Header {
		return nats.Header{dlq.HeaderID: {e.ID}, dlq.HeaderChange: {string(k)}, dlq.HeaderChangeActor: {"mallory"}}
	}
	for _, tt := range []struct {
		name    string
		publish func(t *testing.T, b *bundle, e *dlq.Entry)
	}{
		{"an acknowledgement", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(e.Record), nil, e.Last)
		}},
		{"a version without an ID", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(e.Record), nats.Header{dlq.HeaderVersion: {"1"}, dlq.HeaderID: {" "}}, e.Last)
		}},
		{"a change with another's ID", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(forged(e)), kind(e, dlq.ChangeArchived), 0)
		}},
		{"a discard with another's ID", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(forged(e)), kind(e, dlq.ChangeDiscarded), 0)
		}},
		{"a trace with another's ID", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			h := record(forged(e))
			h[dlq.HeaderChange] = []string{string(dlq.ChangeDiscarded)}
			b.publishOn(t, b.store.SubjectOf(forged(e)), h, 0)
		}},
		{"a record with another's ID", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(forged(e)), record(forged(e)), 0)
		}},
		{"a record that says it is the other", func(t *testing.T, b *bundle, e *dlq.Entry) {
			t.Helper()
			b.publishOn(t, b.store.SubjectOf(forged(e)), record(e.Record), 0)
		}},
	} {
		for _, when := range []string{"before the plan", "after the plan"} {
			t.Run(tt.name+", "+when, func(t *testing.T) {
				t.Parallel()
				b := setup(t)
				id := b.capture(t, 1)[0]
				e := b.get(t, id)
				mine := func(e *dlq.Entry) bool { return e.Consumer == billing && e.Error != "forged" }
				q, err := triage.Compile(`consumer == "billing" && error != "forged"`)
				must(t, err)
				sel := triage.Selection{Where: q}
				var plan *triage.Plan
				if when == "after the plan" {
					plan = b.plan(t, sel, triage.Options{})
				}
				tt.publish(t, b, e)
				if now := b.get(t, id); !mine(now) || now.State != dlq.StateOpen {
					t.Errorf("it is %+v", now)
				}
				if now, err := b.desk.Get(within(t), id[:20]); err != nil || !mine(now) {
					t.Errorf("by the beginning of its ID it is %+v, %v", now, err)
				}
				listed := 0
				for now, err := range b.desk.Entries(within(t), sel, false) {
					if err == nil && mine(now) {
						listed++
						must(t, b.desk.Archive(within(t), now, ""))
						must(t, b.desk.Restore(within(t), b.get(t, id), ""))
					}
				}
				if listed != 1 {
					t.Errorf("it is listed %d times", listed)
				}
				if plan == nil {
					billed := b.consume(t, billing, nil)
					op := b.run(t, b.plan(t, sel, triage.Options{}).ID)
					if n, _ := billed.total(); n != 1 || op.Resolved != 1 {
						t.Errorf("%d are replayed: %+v", n, op)
					}
				}
				must(t, b.desk.Discard(within(t), b.get(t, id), ""))
				if now := b.get(t, id); now.State != dlq.StateDiscarded || now.Consumer != billing {
					t.Errorf("discarded it is %+v", now)
				}
			})
		}
	}
}

// What is published on its subject between the plan and the run is no reason to skip a
// dead letter, if it is no change.
func TestRun_noChange(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 3)
	must(t, b.desk.Archive(within(t), b.get(t, ids[1]), ""))
	must(t, b.desk.Restore(within(t), b.get(t, ids[1]), ""))
	p := b.plan(t, triage.Selection{}, triage.Options{})
	for _, id := range ids {
		e := b.get(t, id)
		b.publishOn(t, b.store.SubjectOf(e.Record), nil, e.Last)
	}
	billed := b.consume(t, billing, nil)
	op := b.run(t, p.ID)
	if n, most := billed.total(); n != 3 || most != 1 || op.Resolved != 3 || len(op.Skipped) != 0 {
		t.Errorf("%d are replayed, one of them %d times: %+v", n, most, op)
	}
}
