package main

import (
	"context"
	"errors"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// eventually polls until ok returns true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), killTimeout)
	defer cancel()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	for !ok() {
		if wait(ctx, poll.C) != nil {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}

// startJob starts the modules on a server of their own, and publishes the first
// line by hand.
func startJob(t *testing.T, l *ledger) (*job, jetstream.JetStream) {
	t.Helper()
	j := newJob(&options{}, openTestInput(t, events), t.Output(), t.Output())
	j.ledger, j.audit.ledger, j.typed.ledger = l, l, l
	app := monotest.App(t, j.source, j.audit, j.typed)
	js, err := jetstream.New(app.Conn())
	if err != nil {
		t.Fatal(err)
	}
	first := &j.in.lines[0]
	payload, err := j.in.payload(first)
	if err != nil {
		t.Fatal(err)
	}
	_, err = app.Bus().PublishStream(t.Context(), &mono.Msg{
		Subject: newFamilies([]string{first.family})[0].event.Subject,
		Data:    payload,
		Header:  mono.Header{inputHeader: {j.in.id}, lineHeader: {"1"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return j, js
}

// What is not recorded is not acked: it is delivered again.
func TestLedger_noRecordNoAck(t *testing.T) {
	t.Parallel()
	l := newLedger()
	l.err = errors.New("no ledger in this test")
	close(l.opened)
	j, _ := startJob(t, l)
	eventually(t, "both modules get the message again", func() bool {
		return j.audit.handled.Load() > 1 && j.typed.handled.Load() > 1
	})
}

// Handlers that run before the ledger is open wait for it: the first delivery
// is recorded.
func TestLedger_waits(t *testing.T) {
	t.Parallel()
	l := newLedger()
	j, js := startJob(t, l)
	deliveries := func(consumer string) uint64 {
		c, err := js.Consumer(t.Context(), streamName, consumer+"_ping")
		if err != nil {
			t.Fatal(err)
		}
		return c.CachedInfo().Delivered.Consumer
	}
	eventually(t, "the message is delivered to both modules", func() bool {
		return deliveries(auditName) > 0 && deliveries(typedName) > 0
	})
	if err := l.open(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	eventually(t, "both modules handle the message", func() bool {
		return j.audit.handled.Load() == 1 && j.typed.handled.Load() == 1
	})
	for _, consumer := range []string{auditName, typedName} {
		got, err := l.read(t.Context(), consumer, j.in.id)
		if err != nil {
			t.Fatal(err)
		}
		if seqs := slices.Collect(maps.Keys(got)); !slices.Equal(seqs, []uint64{1}) || got[1].Line != 1 || got[1].Family != "ping" {
			t.Errorf("%s has recorded %v, want line 1 as message 1", consumer, got)
		}
		if n := deliveries(consumer); n != 1 {
			t.Errorf("%s took %d deliveries, want 1", consumer, n)
		}
		if none, err := l.read(t.Context(), consumer, "other"); err != nil || len(none) != 0 {
			t.Errorf("%s has recorded %v of another input: %v", consumer, none, err)
		}
	}
}

// A message that is handled twice is recorded once, as it was the first time,
// and the second time is no error: the message can be acked.
func TestLedger_once(t *testing.T) {
	t.Parallel()
	js, err := jetstream.New(monotest.Server(t).Conn())
	if err != nil {
		t.Fatal(err)
	}
	l := newLedger()
	if err := l.open(t.Context(), js); err != nil {
		t.Fatal(err)
	}
	// A message without our header is nobody's line, and recorded all the same.
	for _, family := range []string{"first", "second"} {
		if err := l.write(t.Context(), auditName, &mono.Msg{}, record{Family: family}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := l.read(t.Context(), auditName, "other")
	if err != nil {
		t.Fatal(err)
	}
	if want := map[uint64]record{0: {Family: "first"}}; !maps.Equal(got, want) || l.repeated.Load() != 1 {
		t.Errorf("recorded %v, and %d times again; want %v and 1", got, l.repeated.Load(), want)
	}
}
