package mono_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// An attempt is one delivery as a handler of these tests saw it.
type attempt struct {
	order  string // or the payload, when it does not decode
	number uint64
}

// AuditModule is the durable consumer of the text with a raw handler.
type AuditModule struct {
	attempts      chan attempt
	writeAuditLog func(ctx context.Context, event OrderCreatedEvent) error
}

func (m *AuditModule) Name() string                { return "audit" }
func (m *AuditModule) Start(context.Context) error { return nil }
func (m *AuditModule) Stop(context.Context) error  { return nil }

func (m *AuditModule) RegisterEventConsumers(
	registry mono.EventRegistry,
) error {
	eventDef, ok := registry.GetEventByName("OrderCreated", "v1", "order")
	if !ok {
		return errors.New("event not found")
	}
	config := mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{
			Name:      "audit-order-events",
			Retention: mono.WorkQueuePolicy,
		},
		Fetch: mono.FetchConfig{
			BatchSize:   10,
			IdleTimeout: 5 * time.Second,
		},
	}
	return registry.RegisterEventStreamConsumer(
		eventDef,
		config,
		m.handleOrderEvents,
		m,
	)
}

func (m *AuditModule) handleOrderEvents(
	ctx context.Context, msgs []*mono.Msg,
) error {
	for _, msg := range msgs {
		var event OrderCreatedEvent
		if err := json.Unmarshal(msg.Data, &event); err != nil {
			m.attempts <- attempt{string(msg.Data), msg.Metadata().NumDelivered}
			_ = msg.Nak()
			continue
		}
		m.attempts <- attempt{event.OrderID, msg.Metadata().NumDelivered}
		if err := m.writeAuditLog(ctx, event); err != nil {
			_ = msg.NakWithDelay(50 * time.Millisecond)
			continue
		}
		_ = msg.Ack()
	}
	return nil
}

func TestSpec_rawStreamHandler(t *testing.T) {
	t.Parallel()
	failures := 1
	audit := &AuditModule{
		attempts: make(chan attempt, 20),
		writeAuditLog: func(_ context.Context, event OrderCreatedEvent) error {
			if event.OrderID == "slow" && failures > 0 {
				failures--
				return errors.New("the log is busy")
			}
			return nil
		},
	}
	order := &OrderModule{}
	app := startApp(t, order, audit)

	for _, id := range []string{"good", "slow"} {
		if _, _, err := order.createOrderDurably(within(t), &Order{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	broken := &mono.Msg{Subject: OrderCreatedV1.ToBase().Subject, Data: []byte("{")}
	if _, err := app.Bus().PublishStream(within(t), broken); err != nil {
		t.Fatal(err)
	}

	want := []attempt{{"good", 1}, {"slow", 1}, {"slow", 2}, {"{", 1}, {"{", 2}}
	got := make(map[attempt]int)
	for range want {
		got[receive(t, audit.attempts, "a delivery")]++
	}
	for _, a := range want {
		if got[a] != 1 {
			t.Errorf("delivery %d of %q was seen %d times, want once", a.number, a.order, got[a])
		}
	}
	// A work queue removes what is acked: only the broken message is left, which
	// waits for its third attempt.
	eventually(t, func() bool {
		info := consumerInfo(t, app, "audit-order-events", "audit_order_order-created_v1")
		return info.NumAckPending == 1 && streamMsgs(t, app, "audit-order-events") == 1
	}, "the acked messages are removed from the queue")
}

// TypedAuditModule gets decoded batches.
type TypedAuditModule struct {
	attempts      chan attempt
	writeAuditLog func(ctx context.Context, event OrderCreatedEvent) error
}

func (m *TypedAuditModule) Name() string                { return "typed-audit" }
func (m *TypedAuditModule) Start(context.Context) error { return nil }
func (m *TypedAuditModule) Stop(context.Context) error  { return nil }

func (m *TypedAuditModule) RegisterEventConsumers(
	registry mono.EventRegistry,
) error {
	config := mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: "audit-events"},
		Fetch:  mono.FetchConfig{BatchSize: 10},
	}
	return helper.RegisterTypedEventStreamConsumer(
		registry,
		OrderCreatedV1,
		config,
		m.handleOrderEvents,
		m,
	)
}

func (m *TypedAuditModule) handleOrderEvents(
	ctx context.Context,
	events []OrderCreatedEvent,
	msgs []*mono.Msg,
) error {
	for i, event := range events {
		m.attempts <- attempt{event.OrderID, msgs[i].Metadata().NumDelivered}
		if err := m.writeAuditLog(ctx, event); err != nil {
			_ = msgs[i].NakWithDelay(50 * time.Millisecond)
			continue
		}
		_ = msgs[i].Ack()
	}
	return nil
}

// The raw and the typed consumer of the text side by side: two streams want the
// same event, and each gets all of it.
func TestSpec_typedStreamHandler(t *testing.T) {
	t.Parallel()
	busy := map[string]bool{"o-3": true}
	typed := &TypedAuditModule{
		attempts: make(chan attempt, 20),
		writeAuditLog: func(_ context.Context, event OrderCreatedEvent) error {
			if busy[event.OrderID] {
				delete(busy, event.OrderID)
				return errors.New("the log is busy")
			}
			return nil
		},
	}
	raw := &AuditModule{
		attempts:      make(chan attempt, 20),
		writeAuditLog: func(context.Context, OrderCreatedEvent) error { return nil },
	}
	order := &OrderModule{}
	app := startApp(t, typed, raw, order)

	wantRaw := make(map[attempt]int)
	for i := range 5 {
		id := fmt.Sprintf("o-%d", i)
		wantRaw[attempt{id, 1}] = 1
		if _, _, err := order.createOrderDurably(within(t), &Order{ID: id}); err != nil {
			t.Fatal(err)
		}
	}
	wantTyped := maps.Clone(wantRaw)
	wantTyped[attempt{"o-3", 2}] = 1

	if got := collect(t, typed.attempts, len(wantTyped)); !maps.Equal(got, wantTyped) {
		t.Errorf("the typed handler saw %v, want %v", got, wantTyped)
	}
	if got := collect(t, raw.attempts, len(wantRaw)); !maps.Equal(got, wantRaw) {
		t.Errorf("the raw handler saw %v, want %v", got, wantRaw)
	}
	settled(t, app, "audit-events", "typed-audit_order_order-created_v1")
	settled(t, app, "audit-order-events", "audit_order_order-created_v1")
}

var (
	ErrTemporaryFailure = errors.New("temporary failure")
	ErrPermanentFailure = errors.New("permanent failure")
)

// CarefulModule decides by the kind of error.
type CarefulModule struct {
	attempts     chan attempt
	processEvent func(ctx context.Context, event OrderCreatedEvent, attempt uint64) error
}

func (m *CarefulModule) handleOrderEvents(
	ctx context.Context, msgs []*mono.Msg,
) error {
	for _, msg := range msgs {
		var event OrderCreatedEvent
		if err := json.Unmarshal(msg.Data, &event); err != nil {
			m.attempts <- attempt{string(msg.Data), msg.Metadata().NumDelivered}
			_ = msg.Term()
			continue
		}
		m.attempts <- attempt{event.OrderID, msg.Metadata().NumDelivered}

		err := m.processEvent(ctx, event, msg.Metadata().NumDelivered)
		switch {
		case err == nil:
			_ = msg.Ack()

		case errors.Is(err, ErrTemporaryFailure):
			_ = msg.NakWithDelay(50 * time.Millisecond)

		case errors.Is(err, ErrPermanentFailure):
			_ = msg.Term()

		default:
			_ = msg.Nak()
		}
	}
	return nil
}

func TestSpec_errorHandling(t *testing.T) {
	t.Parallel()
	m := &CarefulModule{
		attempts: make(chan attempt, 20),
		processEvent: func(_ context.Context, event OrderCreatedEvent, number uint64) error {
			switch {
			case event.OrderID == "temporary" && number == 1:
				return fmt.Errorf("write: %w", ErrTemporaryFailure)
			case event.OrderID == "permanent":
				return fmt.Errorf("write: %w", ErrPermanentFailure)
			case event.OrderID == "unknown" && number == 1:
				return errors.New("no idea")
			}
			return nil
		},
	}
	order := &OrderModule{}
	app := startApp(t, order, consumer("careful", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(OrderCreatedV1.ToBase(),
			mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "careful", Retention: mono.WorkQueuePolicy}},
			m.handleOrderEvents, self)
	}))
	terminated := watchTerminated(t, app)

	broken := &mono.Msg{Subject: OrderCreatedV1.ToBase().Subject, Data: []byte("not JSON")}
	if _, err := app.Bus().PublishStream(within(t), broken); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"fine", "temporary", "permanent", "unknown"} {
		if _, _, err := order.createOrderDurably(within(t), &Order{ID: id}); err != nil {
			t.Fatal(err)
		}
	}

	want := map[attempt]int{
		{"not JSON", 1}: 1, {"fine", 1}: 1, {"temporary", 1}: 1, {"temporary", 2}: 1,
		{"permanent", 1}: 1, {"unknown", 1}: 1, {"unknown", 2}: 1,
	}
	if got := collect(t, m.attempts, len(want)); !maps.Equal(got, want) {
		t.Errorf("the handler saw %v, want %v", got, want)
	}
	var gone []uint64
	for range 2 {
		gone = append(gone, receive(t, terminated, "a terminated message").StreamSeq)
	}
	slices.Sort(gone)
	if !slices.Equal(gone, []uint64{1, 4}) { // the broken and the permanent one
		t.Errorf("messages %v were terminated, want 1 and 4", gone)
	}
	settled(t, app, "careful", "careful_order_order-created_v1")
	if n := streamMsgs(t, app, "careful"); n != 0 {
		t.Errorf("%d messages are left in the work queue, want 0", n)
	}
}

func collect(t *testing.T, ch <-chan attempt, n int) map[attempt]int {
	t.Helper()
	got := make(map[attempt]int)
	for range n {
		got[receive(t, ch, "a delivery")]++
	}
	return got
}
