package triage_test

import (
	"errors"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// A plan is what it says, and nothing happens by it.
func TestPlan(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 7)
	gone := b.capture(t, 1, func(r *dlq.Record) { r.Body, r.Data = dlq.BodyGone, nil })
	foreign := b.capture(t, 1, func(r *dlq.Record) { r.Event, r.Consumer = "", "legacy" })
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 2})
	if p.Selected != 7 || p.Duration.Seconds() != 3.5 || p.Bytes == 0 || len(p.Samples) != 5 || len(p.Consumers) != 1 || p.Consumers[0].Count != 7 {
		t.Errorf("the plan is %+v", p)
	}
	if len(p.LeftOut) != 2 {
		t.Errorf("left out are %v", p.LeftOut)
	}
	for _, s := range p.Samples {
		if len(s.Data) > 0 {
			t.Error("a sample has a payload")
		}
	}
	if !slices.ContainsFunc(p.Warnings, func(w string) bool { return strings.Contains(w, "nobody fetches") }) {
		t.Errorf("it warns of %q, want that nobody fetches", p.Warnings)
	}
	for _, id := range slices.Concat(ids, gone, foreign) {
		if e := b.get(t, id); e.State != dlq.StateOpen || len(e.History) > 0 {
			t.Errorf("after the plan dead letter %s is %+v", id, e)
		}
	}
	if _, err := b.js.Stream(t.Context(), ordersStream); err != nil {
		t.Error(err)
	}
	s, err := b.js.Stream(t.Context(), ordersStream)
	must(t, err)
	if subjects := s.CachedInfo().Config.Subjects; !slices.Equal(subjects, []string{ordersSubject}) {
		t.Errorf("after the plan the stream has subjects %v", subjects)
	}
}

// What is run is what was planned: what comes later is not part of it.
func TestPlan_frozen(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 3)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	later := b.capture(t, 2)
	must(t, b.desk.Archive(t.Context(), b.get(t, ids[0]), ""))
	must(t, b.desk.Discard(t.Context(), b.get(t, ids[1]), ""))
	b.consume(t, billing, nil)
	op := b.run(t, p.ID)
	if op.Claimed != 1 || op.Resolved != 1 || op.NewSince != 2 || op.Skipped["archived meanwhile by ann@ops"] != 1 || op.Skipped["discarded meanwhile"] != 1 || op.Remaining != 0 {
		t.Errorf("operation %+v", op)
	}
	for _, id := range later {
		b.wantState(t, id, dlq.StateOpen)
	}
}

// A target that is gone is a problem, and nothing is changed.
func TestPlan_problems(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1, func(r *dlq.Record) { r.Consumer = "gone" })[0]
	other := b.capture(t, 1, func(r *dlq.Record) { r.Stream = "nowhere" })[0]
	notJSON := b.capture(t, 1, func(r *dlq.Record) { r.Data = []byte("not JSON") })[0]
	for name, tt := range map[string]struct {
		sel triage.Selection
		o   triage.Options
	}{
		"no consumer":        {triage.Selection{IDs: []string{id}}, triage.Options{}},
		"no stream":          {triage.Selection{IDs: []string{other}}, triage.Options{}},
		"nobody stores it":   {triage.Selection{IDs: []string{id}}, triage.Options{Target: "subject=nobody.stores.it"}},
		"patch of no object": {triage.Selection{IDs: []string{notJSON}}, triage.Options{Patch: []byte(`{"a":1}`)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, err := b.desk.Plan(t.Context(), tt.sel, tt.o)
			must(t, err)
			if len(p.Problems) != 1 {
				t.Errorf("the problems are %q", p.Problems)
			}
			if _, err := b.desk.Run(t.Context(), p.ID, nil); err == nil {
				t.Error("it was run")
			}
			for _, id := range tt.sel.IDs {
				b.wantState(t, id, dlq.StateOpen)
			}
		})
	}
}

func TestPlan_badOptions(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	for name, o := range map[string]triage.Options{
		"target":          {Target: "nobody"},
		"subject":         {Target: "subject=a.*"},
		"no subject":      {Target: "subject="},
		"rate":            {Rate: -1},
		"rate NaN":        {Rate: math.NaN()},
		"in flight":       {MaxInFlight: -1},
		"canary":          {Canary: []int{1, 0}},
		"canary everyone": {Canary: []int{1}, Target: triage.TargetEveryone},
		"stop":            {StopIfFailing: 1.5},
		"stop NaN":        {StopIfFailing: math.NaN()},
		"patch":           {Patch: []byte(`{"a":`)},
		"patch array":     {Patch: []byte(`[1]`)},
		"replays":         {MaxReplays: -1},
	} {
		if _, err := b.desk.Plan(t.Context(), triage.Selection{}, o); !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("%s: %v, want ErrInvalid", name, err)
		}
	}
	all, err := b.desk.Operations(t.Context())
	must(t, err)
	if len(all) != 0 {
		t.Errorf("there are %d operations", len(all))
	}
}

// A patch changes each payload, and is kept as an edit.
func TestPlan_patch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 20)
	billed := b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{Patch: []byte(`{"amount":0,"fixed":true}`), Reason: "currency"})
	if len(p.Diffs) != 5 || !strings.Contains(p.Diffs[0].After, `"fixed": true`) {
		t.Errorf("the diffs are %+v", p.Diffs)
	}
	op := b.run(t, p.ID)
	if op.Resolved != 20 {
		t.Errorf("operation %+v", op)
	}
	for _, m := range billed.seen {
		if !strings.Contains(string(m.Data()), `"amount":0,"fixed":true`) {
			t.Errorf("replayed is %s", m.Data())
		}
	}
	e := b.get(t, ids[0])
	if e.Revision != 1 || e.History[0].Reason != "currency" || string(e.History[0].Diff) != `{"amount":0,"fixed":true}` {
		t.Errorf("the entry is %+v, its edit %+v", e, e.History[0])
	}
}

// What was replayed too often is left out, unless it is forced.
func TestPlan_loops(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	b.consume(t, billing, func(string) bool { return true })
	for range 2 {
		b.run(t, b.plan(t, triage.Selection{}, triage.Options{MaxReplays: 2}).ID)
	}
	p, err := b.desk.Plan(t.Context(), triage.Selection{}, triage.Options{MaxReplays: 2})
	must(t, err)
	if p.Selected != 0 || len(p.LeftOut) != 1 {
		t.Errorf("selected are %d, left out %v", p.Selected, p.LeftOut)
	}
	if p := b.plan(t, triage.Selection{}, triage.Options{MaxReplays: 2, Force: true}); p.Selected != 1 {
		t.Errorf("forced, %d are selected", p.Selected)
	}
}

// An operation is cancelled although its process died in the middle of an entry:
// what it had claimed and not sent is open again.
func TestCancel_afterACrash(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy})
	ids := b.capture(t, 2)
	p := b.plan(t, triage.Selection{IDs: ids[:1]}, triage.Options{NoWait: true})
	must(t, b.desk.Cancel(t.Context(), p.ID)) // a plan, too
	p = b.plan(t, triage.Selection{}, triage.Options{NoWait: true})
	e := b.get(t, ids[0])
	must(t, b.store.Change(t.Context(), e, dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@ops", Operation: p.ID, Target: triage.TargetConsumer}, nil))
	triage.MarkStarted(t, b.desk, p.ID)
	must(t, b.desk.Cancel(t.Context(), p.ID))
	b.wantState(t, ids[0], dlq.StateOpen)
	op, err := b.desk.Operation(t.Context(), p.ID)
	must(t, err)
	if op.Status != triage.StatusCancelled || op.Claimed != 1 || op.Released != 1 || op.Remaining != 1 {
		t.Errorf("operation %+v", op)
	}
}
