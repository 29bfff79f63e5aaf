package triage_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

func TestOpen_noStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	if _, err := triage.Open(within(t), b.nc, triage.Config{Stream: "OTHER"}); !errors.Is(err, triage.ErrNoDeadLetters) {
		t.Errorf("open: %v, want ErrNoDeadLetters", err)
	}
}

// The list is newest first, over several chunks, with the state that the changes
// since have made.
func TestEntries(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 5000)
	for i := 0; i < len(ids); i += 1000 {
		must(t, b.desk.Archive(within(t), b.get(t, ids[i]), ""))
	}
	open := b.list(t, triage.Selection{})
	want := newestFirst(slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		return slices.Index(ids, id)%1000 == 0
	}))
	if !slices.Equal(open, want) {
		t.Errorf("%d are open, want %d, newest first", len(open), len(want))
	}
	if got := b.list(t, triage.Selection{Limit: 3}); !slices.Equal(got, want[:3]) {
		t.Errorf("the three newest are %v", got)
	}
	archived := b.list(t, triage.Selection{States: []dlq.State{dlq.StateArchived}})
	if want := []string{ids[4000], ids[3000], ids[2000], ids[1000], ids[0]}; !slices.Equal(archived, want) {
		t.Errorf("archived are %v", archived)
	}
	if all := b.list(t, triage.Selection{States: dlq.States()}); !slices.Equal(all, newestFirst(ids)) {
		t.Errorf("there are %d in all", len(all))
	}
	upto := b.get(t, ids[99]).Sequence
	if got := b.list(t, triage.Selection{Upto: upto, States: dlq.States()}); !slices.Equal(got, newestFirst(ids[:100])) {
		t.Errorf("up to %d there are %d", upto, len(got))
	}
	if got := b.list(t, triage.Selection{IDs: ids[7:9]}); !slices.Equal(got, ids[7:9]) {
		t.Errorf("by their IDs there are %v", got)
	}
}

// A list is metadata: no payload, but its size.
func TestEntries_payload(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	for _, payload := range []bool{false, true} {
		for e, err := range b.desk.Entries(within(t), triage.Selection{}, payload) {
			must(t, err)
			if e.BodySize != 24 || (len(e.Data) > 0) != payload {
				t.Errorf("with payload %v the size is %d and there are %d bytes", payload, e.BodySize, len(e.Data))
			}
		}
	}
}

// What is no dead letter, or cannot be read whole, hides no other.
func TestEntries_unreadable(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 2)
	publish := func(subject string, h nats.Header) {
		if _, err := b.js.PublishMsg(within(t), &nats.Msg{Subject: "monotel.dlq.DLQ." + subject, Header: h}); err != nil {
			t.Fatal(err)
		}
	}
	publish("a.b.c", nats.Header{"Some": {"thing"}})
	publish("orders.billing.broken", nats.Header{dlq.HeaderVersion: {"1"}, dlq.HeaderID: {"broken"}, dlq.HeaderFailed: {"yesterday"}})
	publish("orders.billing.stray", nats.Header{dlq.HeaderChange: {"archived"}})
	var got []string
	errs := 0
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		if e != nil {
			got = append(got, e.ID)
		}
		if err != nil {
			errs++
		}
	}
	if want := append([]string{"broken"}, newestFirst(ids)...); !slices.Equal(got, want) || errs != 2 {
		t.Errorf("listed are %v with %d errors, want %v with 2", got, errs, want)
	}
	s, err := b.desk.Stats(within(t))
	must(t, err)
	if s.States[dlq.StateOpen] != 3 || s.Unreadable != 1 {
		t.Errorf("stats are %+v", s)
	}
}

// Breaking off a list leaves nothing behind, nor does a context that ends.
func TestEntries_brokenOff(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 10)
	for _, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		must(t, err)
		break
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for e, err := range b.desk.Entries(ctx, triage.Selection{}, false) {
		if e != nil || !errors.Is(err, context.Canceled) {
			t.Errorf("with a context that has ended: %v, %v", e, err)
		}
	}
	s, err := b.js.Stream(within(t), "DLQ")
	must(t, err)
	for deadline := time.Now().Add(longestWait); ; {
		info, err := s.Info(within(t))
		must(t, err)
		if info.State.Consumers == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d consumers are left", info.State.Consumers)
		}
	}
}

// A lost connection, and a server that starts again, do not end a list.
func TestEntries_reconnect(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 5000)
	var got []string
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		must(t, err)
		if len(got) == 100 {
			b.server.Stop()
			b.server.Start()
		}
		got = append(got, e.ID)
	}
	if !slices.Equal(got, newestFirst(ids)) {
		t.Errorf("%d were listed, want %d", len(got), len(ids))
	}
}

func TestGet(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 20)
	if e := b.get(t, ids[4][:10]); e.ID != ids[4] {
		t.Errorf("by its beginning it is %s, want %s", e.ID, ids[4])
	}
	mistyped := ids[4][:5] + "z" + ids[4][6:]
	if mistyped == ids[4] {
		mistyped = ids[4][:5] + "y" + ids[4][6:]
	}
	for _, id := range []string{mistyped, "zzzzzzzz9", "", "*", ">", "a.b", "../x"} {
		_, err := b.desk.Get(within(t), id)
		var notFound *triage.NotFoundError
		if !errors.Is(err, triage.ErrNotFound) || !errors.As(err, &notFound) {
			t.Errorf("get %q: %v, want ErrNotFound", id, err)
			continue
		}
		if id == mistyped && !slices.Contains(notFound.Near, ids[4]) {
			t.Errorf("near %s are %v, want %s", id, notFound.Near, ids[4])
		}
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 2)
	must(t, b.desk.Archive(within(t), b.get(t, ids[0]), ""))
	var got []string
	for ev, err := range b.desk.Tail(within(t), 1) {
		must(t, err)
		what := "new"
		if ev.Change != nil {
			what = string(ev.Change.Kind)
		} else if len(ev.Record.Data) > 0 {
			t.Error("it has a payload")
		}
		got = append(got, fmt.Sprint(ev.Sequence, ev.ID, what))
		if len(got) == 3 {
			break
		}
	}
	want := []string{fmt.Sprint(1, ids[0], "new"), fmt.Sprint(2, ids[1], "new"), fmt.Sprint(3, ids[0], "archived")}
	if !slices.Equal(got, want) {
		t.Errorf("the tail is %v, want %v", got, want)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range b.desk.Tail(ctx, 0) {
		if !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
}

// A dead-letter stream of another name is as good.
func TestOpen_otherStream(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{Stream: jetstream.StreamConfig{Name: "FAILED"}}, jetstream.StreamConfig{})
	ids := b.capture(t, 2)
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	if op := b.run(t, p.ID); op.Resolved != 2 {
		t.Errorf("operation %+v", op)
	}
	b.wantState(t, ids[0], dlq.StateResolved)
}
