package triage_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

func TestRun_resolved(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.InterestPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{Retention: retention})
			ids := b.capture(t, 300)
			billed := b.consume(t, billing, nil)
			var reported *target
			if retention != jetstream.WorkQueuePolicy {
				reported = b.consume(t, reports, nil)
			}
			p := b.plan(t, triage.Selection{}, triage.Options{Reason: "fixed"})
			if p.Selected != 300 {
				t.Fatalf("%d are selected, want 300", p.Selected)
			}
			op := b.run(t, p.ID)
			if op.Status != triage.StatusDone || op.Claimed != 300 || op.Resolved != 300 || op.FailedAgain != 0 || op.Remaining != 0 || op.InFlight() != 0 {
				t.Errorf("operation %+v", op)
			}
			if n, most := billed.total(); n != 300 || most != 1 {
				t.Errorf("the consumer got %d messages, one of them %d times", n, most)
			}
			if reported != nil {
				if n, _ := reported.total(); n != 0 {
					t.Errorf("another consumer got %d of them", n)
				}
			}
			for _, id := range ids[:3] {
				b.wantState(t, id, dlq.StateResolved)
			}
			if open := b.list(t, triage.Selection{}); len(open) != 0 {
				t.Errorf("%d are open still", len(open))
			}
		})
	}
}

// What is replayed is the original, but for headers that steer the server or
// continue its trace, and says what it is.
func TestRun_message(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1)[0]
	billed := b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	b.run(t, p.ID)
	e := b.get(t, id)
	m := billed.seen[0]
	want := nats.Header{
		"Tenant": {"blue"}, dlq.HeaderReplayOf: {id}, dlq.HeaderReplayOperation: {p.ID}, dlq.HeaderReplayCount: {"1"},
		dlq.HeaderReplaySubject: {ordersSubject}, dlq.HeaderReplayStream: {"DLQ"}, dlq.HeaderReplayLinks: {traceOfFailure + " " + traceOfPublish},
	}
	got := nats.Header{}
	for k, v := range m.Headers() {
		if !strings.HasPrefix(k, "Nats-") && k != dlq.HeaderReplayClaim {
			got[k] = v
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if string(m.Data()) != `{"order":1,"amount":1.5}` {
		t.Errorf("the payload is %s", m.Data())
	}
	kinds := []dlq.ChangeKind{}
	for _, c := range e.History {
		kinds = append(kinds, c.Kind)
	}
	if want := []dlq.ChangeKind{dlq.ChangeReplaying, dlq.ChangeResolved}; !slices.Equal(kinds, want) {
		t.Errorf("its history is %v, want %v", kinds, want)
	}
}

// What fails again is the same entry, open, with the new failure.
func TestRun_failedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 10)
	b.consume(t, billing, func(id string) bool { return id == ids[3] })
	op := b.run(t, b.plan(t, triage.Selection{}, triage.Options{}).ID)
	if op.Resolved != 9 || op.FailedAgain != 1 || op.Status != triage.StatusDone {
		t.Errorf("operation %+v", op)
	}
	if open := b.list(t, triage.Selection{}); !slices.Equal(open, ids[3:4]) {
		t.Errorf("open are %v, want %s", open, ids[3])
	}
	e := b.get(t, ids[3])
	if e.State != dlq.StateOpen || e.Failures != 1 || e.Replays != 1 || e.Failure.Error != "still broken" || e.Error == e.Failure.Error {
		t.Errorf("the entry is %+v, its failure %+v", e, e.Failure)
	}
}

// A canary with a bad fix stops by itself.
func TestRun_canary(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 50)
	b.consume(t, billing, func(string) bool { return true })
	p := b.plan(t, triage.Selection{}, triage.Options{Canary: []int{1, 5, 20}})
	op := b.run(t, p.ID)
	if op.Status != triage.StatusStopped || op.Claimed != 1 || op.FailedAgain != 1 || op.Remaining != 49 {
		t.Errorf("operation %+v, want it stopped after one", op)
	}
	tried, remaining, err := b.desk.Tried(within(t), p.ID)
	must(t, err)
	if !slices.Equal(tried, ids[:1]) || !slices.Equal(remaining, ids[1:]) {
		t.Errorf("tried are %v, %d remain", tried, len(remaining))
	}
	// Resumed, it goes on with its next step.
	op = b.run(t, p.ID)
	if op.Status != triage.StatusStopped || op.Claimed != 6 {
		t.Errorf("resumed: %+v, want it stopped after six", op)
	}
}

func TestRun_canaryGood(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 50)
	b.consume(t, billing, nil)
	var steps []int
	p := b.plan(t, triage.Selection{}, triage.Options{Canary: []int{1, 5, 20}, MaxInFlight: 7})
	op, err := b.desk.Run(within(t), p.ID, func(o *triage.Operation) { steps = append(steps, o.Claimed) })
	must(t, err)
	if op.Status != triage.StatusDone || op.Resolved != 50 {
		t.Errorf("operation %+v", op)
	}
	if len(steps) == 0 || steps[len(steps)-1] != 50 {
		t.Errorf("progress said %v", steps)
	}
}

// With one in flight the order is that in which they were captured.
func TestRun_oneInFlight(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 30)
	billed := b.consume(t, billing, nil)
	b.run(t, b.plan(t, triage.Selection{}, triage.Options{MaxInFlight: 1}).ID)
	if !slices.Equal(billed.order, ids) {
		t.Errorf("handled in the order %v, want %v", billed.order, ids)
	}
}

// Of two operations on the same entries one gets each, and the other says who has
// it.
func TestRun_twoOperators(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 200)
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	p1 := b.plan(t, triage.Selection{}, triage.Options{NoWait: true})
	p2, err := bob.Plan(within(t), triage.Selection{}, triage.Options{NoWait: true})
	must(t, err)
	type result struct {
		op  *triage.Operation
		err error
	}
	second := make(chan result, 1)
	ctx := within(t)
	go func() {
		op, err := bob.Run(ctx, p2.ID, nil)
		second <- result{op, err}
	}()
	// Nobody consumes, so whoever is second finds them claimed.
	first, err := b.desk.Run(ctx, p1.ID, nil)
	must(t, err)
	other := <-second
	must(t, other.err)
	if n := first.Claimed + other.op.Claimed; n != len(ids) {
		t.Errorf("%d and %d were claimed, want %d together", first.Claimed, other.op.Claimed, len(ids))
	}
	for why := range first.Skipped {
		if !strings.Contains(why, "bob@ops") || !strings.Contains(why, p2.ID) {
			t.Errorf("skipped because %q, want it to say who has it", why)
		}
	}
	for why := range other.op.Skipped {
		if !strings.Contains(why, "ann@ops") {
			t.Errorf("skipped because %q, want it to say who has it", why)
		}
	}
	// A third is told before it begins.
	p3, err := bob.Plan(within(t), triage.Selection{IDs: ids[:1]}, triage.Options{})
	must(t, err)
	if p3.Selected != 0 || len(p3.LeftOut) != 1 {
		t.Errorf("the third selects %d and leaves out %v", p3.Selected, p3.LeftOut)
	}
	// So is who wants to change one.
	e := b.get(t, ids[0])
	if err := b.desk.Discard(within(t), e, ""); !errors.Is(err, triage.ErrClaimed) {
		t.Errorf("discard: %v, want ErrClaimed", err)
	}
}

// A run that is cut off is resumed, and nothing is sent twice.
func TestRun_interrupted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 400)
	billed := b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{MaxInFlight: 10, Rate: 200})
	ctx, cancel := context.WithCancel(within(t))
	op, err := b.desk.Run(ctx, p.ID, func(o *triage.Operation) {
		if o.Claimed > 0 {
			cancel()
		}
	})
	cancel()
	must(t, err)
	if op.Status != triage.StatusPaused || !strings.Contains(op.Why, "interrupted") {
		t.Errorf("operation %+v", op)
	}
	op = b.run(t, p.ID)
	if op.Status != triage.StatusDone || op.Resolved != 400 || op.Claimed != 400 {
		t.Errorf("resumed: %+v", op)
	}
	if n, most := billed.total(); n != 400 || most != 1 {
		t.Errorf("the consumer got %d messages, one of them %d times", n, most)
	}
}

// Others pause and cancel a run through what is stored.
func TestRun_pausedAndCancelled(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 100)
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 20})
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	asked := false
	op, err := b.desk.Run(within(t), p.ID, func(o *triage.Operation) {
		if !asked && o.Claimed > 0 {
			asked = true
			if err := bob.Pause(within(t), p.ID); err != nil {
				t.Error(err)
			}
		}
	})
	must(t, err)
	if op.Status != triage.StatusPaused || op.Why != "paused by bob@ops" || op.Remaining == 0 {
		t.Errorf("operation %+v", op)
	}
	must(t, bob.Cancel(t.Context(), p.ID))
	op, err = b.desk.Operation(within(t), p.ID)
	must(t, err)
	if op.Status != triage.StatusCancelled || op.Claimed+op.Remaining != 100 {
		t.Errorf("operation %+v", op)
	}
	if _, err := b.desk.Run(within(t), p.ID, nil); !errors.Is(err, triage.ErrState) {
		t.Errorf("run it: %v, want ErrState", err)
	}
}

// A rate is kept within 5 %.
func TestRun_rate(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 100)
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 50})
	begin := time.Now()
	b.run(t, p.ID)
	if took := time.Since(begin); took < 1900*time.Millisecond { //nolint:forbidigo // a lower bound
		t.Errorf("100 messages at 50/s took %v", took)
	}
}

// To everyone is to the original subject.
func TestRun_everyone(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 5)
	p := b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone})
	if len(p.Warnings) == 0 {
		t.Error("the plan warns of nothing")
	}
	op := b.run(t, p.ID)
	if op.Status != triage.StatusDone || op.Sent != 5 || op.InFlight() != 0 {
		t.Errorf("operation %+v", op)
	}
	for _, id := range ids {
		b.wantState(t, id, dlq.StateSent)
	}
	for _, durable := range []string{billing, reports} {
		cons, err := b.js.Consumer(within(t), ordersStream, durable)
		must(t, err)
		if n := cons.CachedInfo().NumPending; n != 5 {
			t.Errorf("consumer %s has %d messages to get, want 5", durable, n)
		}
	}
}
