package mono

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/monotel/monotel/dlq"
)

// A stream that another process has deleted and made again has dead letters of the
// same sequences. An App that does not know of it finds the ID taken by another
// message, and looks: taking that for its own would lose the message.
func TestDeadLetter_idTaken(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithTimeout(t.Context(), internalPatience)
	defer cancel()
	event, err := NewEvent("shop", "OrderPlaced", "v1")
	if err != nil {
		t.Fatal(err)
	}
	app, err := New(WithStoreDir(t.TempDir()), WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	m := &plainModule{
		name: "terminator", emits: []BaseEventDefinition{event}, event: event,
		cfg:  StreamConsumerConfig{Stream: StreamConfig{Name: "orders"}, Consumer: ConsumerConfig{Durable: "billing"}},
		h:    func(_ context.Context, msgs []*Msg) error { return msgs[0].Term() },
		seen: make(map[string]int),
	}
	if err := app.Register(m); err != nil {
		t.Fatal(err)
	}
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := app.Stop(ctx); err != nil {
			t.Error(err)
		}
	}()
	r := app.run
	before := time.Now().Add(-time.Hour)
	r.streams[0].created.Store(&before)
	old := &dlq.Record{
		ID: dlq.ID("orders", before, "billing", 1), Reason: dlq.ReasonTerminated, Stream: "orders", Consumer: "billing", Stored: before, Data: []byte("old"),
	}
	if captured, err := r.dead.store.Capture(ctx, old, nil); err != nil || !captured {
		t.Fatal(captured, err)
	}
	if _, err := app.Bus().PublishStream(ctx, &Msg{Subject: event.Subject, Data: []byte("new")}); err != nil {
		t.Fatal(err)
	}
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for {
		s, err := r.js.Stream(ctx, "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		if s.CachedInfo().State.Msgs == 2 {
			msg, err := s.GetMsg(ctx, 2)
			if err != nil {
				t.Fatal(err)
			}
			if string(msg.Data) != "new" {
				t.Errorf("captured: %q", msg.Data)
			}
			return
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			t.Fatal("the message is not captured")
		}
	}
}

type wrapper struct{ wraps []error }

func (*wrapper) Error() string     { return "wrapper" }
func (w *wrapper) Unwrap() []error { return w.wraps }

type trap struct{}

func (*trap) Error() string { return "trap" }
func (*trap) Unwrap() error { panic("as ordered") }

func TestTypeChain(t *testing.T) {
	t.Parallel()
	leaf := errors.New("leaf")
	for _, tt := range []struct {
		give error
		want []string
	}{
		{leaf, []string{"*errors.errorString"}},
		{Permanent(leaf), []string{"*mono.permanentError", "*errors.errorString"}},
		{errors.Join(Permanent(leaf), &trap{}), []string{"*errors.joinError", "*mono.permanentError", "*mono.trap", "*errors.errorString"}},
		{&wrapper{[]error{nil, leaf}}, []string{"*mono.wrapper", "*errors.errorString"}},
		{&wrapper{slices.Repeat([]error{leaf}, 100)}, slices.Concat([]string{"*mono.wrapper"}, slices.Repeat([]string{"*errors.errorString"}, 15))},
	} {
		if diff := cmp.Diff(tt.want, typeChain(tt.give)); diff != "" {
			t.Errorf("%v (-want +got):\n%s", tt.give, diff)
		}
	}
}
