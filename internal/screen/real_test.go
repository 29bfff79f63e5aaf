package screen

import (
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

type orderPlaced struct {
	ID     string `json:"id"`
	Amount int    `json:"amount"`
}

var orderPlacedEvent = helper.EventDefinition[orderPlaced]("shop", "OrderPlaced", "v1")

// A shop charges orders. What it refuses becomes a dead letter.
type shop struct {
	gateway atomic.Bool // it is there

	mu      sync.Mutex
	charged []orderPlaced
}

func (*shop) Name() string                { return "billing" }
func (*shop) Start(context.Context) error { return nil }
func (*shop) Stop(context.Context) error  { return nil }
func (*shop) SetEventBus(mono.EventBus)   {}

func (*shop) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{orderPlacedEvent.ToBase()}
}

func (s *shop) RegisterEventConsumers(registry mono.EventRegistry) error {
	return helper.RegisterTypedEventStreamConsumer(registry, orderPlacedEvent, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders"},
		Consumer: mono.ConsumerConfig{Durable: "billing", AckWait: time.Minute},
		Fetch:    mono.FetchConfig{BatchSize: 1},
		AutoAck:  true,
	}, s.charge, s)
}

func (s *shop) charge(_ context.Context, orders []orderPlaced, _ []*mono.Msg) error {
	for _, o := range orders {
		switch {
		case strings.HasPrefix(o.ID, "test"):
			return mono.Permanent(errors.New("this is no customer"))
		case o.Amount < 0:
			return mono.Permanent(errors.New("the amount is negative"))
		case !s.gateway.Load():
			return mono.Permanent(errors.New("gateway timeout"))
		}
		s.mu.Lock()
		s.charged = append(s.charged, o)
		s.mu.Unlock()
	}
	return nil
}

// got are the orders that were charged, by ID.
func (s *shop) got() []orderPlaced {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.SortedFunc(slices.Values(s.charged), func(a, b orderPlaced) int { return strings.Compare(a.ID, b.ID) })
}

// openShop starts an App on a server, has it fail on some orders, and opens the
// screen on what it has captured.
func openShop(t *testing.T, orders ...orderPlaced) (*shop, *triage.Desk, *bench) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	s := &shop{}
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithLogger(slog.New(slog.DiscardHandler))}, s)
	for _, o := range orders {
		if _, err := orderPlacedEvent.EventStreamPublish(ctx, app.Bus(), o, nil); err != nil {
			t.Fatal(err)
		}
	}
	desk, err := triage.Open(ctx, app.Conn(), triage.Config{Actor: "ann@ops"})
	if err != nil {
		t.Fatal(err)
	}
	look := time.NewTicker(5 * time.Millisecond)
	defer look.Stop()
	for {
		stats, err := desk.Stats(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if stats.States[dlq.StateOpen] == len(orders) {
			break
		}
		<-look.C
	}
	b := benchOn(t, desk, time.Now, 120, 40)
	b.settle()
	return s, desk, b
}

// has compares how many dead letters have each state.
func has(t *testing.T, desk *triage.Desk, want map[dlq.State]int) {
	t.Helper()
	stats, err := desk.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range dlq.States() {
		if stats.States[s] != want[s] {
			t.Errorf("%d dead letters are %s, want %d", stats.States[s], s, want[s])
		}
	}
}

// From the groups to an entry and back, to a replay that fails again and one that
// does not.
func TestReal_replay(t *testing.T) {
	t.Parallel()
	s, desk, b := openShop(t, orderPlaced{"a", 1}, orderPlaced{"b", 2}, orderPlaced{"c", 3}, orderPlaced{"d", -4})
	b.sees("[open 4]", "2 groups · 4 dead letters", "gateway timeout", "the amount is negative")

	b.press("enter")
	b.sees("3 dead letters · billing · gateway timeout")
	b.press("end", "enter") // the oldest
	b.sees("state open", "consumer orders/billing", "event shop/OrderPlaced/v1", "error gateway timeout", "permanent_error", "1 delivery", `"id": "a"`)

	b.press("r")
	b.sees("Replay 1 dead letter?", "Nothing is sent before you have seen it")
	b.press("enter")
	b.sees("1 dead letter will be sent", "1 to orders/billing")
	b.press("esc")
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 4})
	b.press("r", "enter", "enter")
	b.sees("Replay done: 1 of 1 sent, 0 resolved, 1 failed again, 0 in flight.")
	b.press("esc", "end")
	b.sees("replaying by ann@ops", "failed_again by", "gateway timeout")

	s.gateway.Store(true)
	b.press("esc", "esc", "r")
	b.write("the gateway is back")
	b.press("enter")
	b.sees("3 dead letters will be sent", "3 to orders/billing", "reason: the gateway is back")
	b.press("enter")
	b.sees("done: 3 of 3 tried", "Replay done: 3 of 3 sent, 3 resolved, 0 failed again, 0 in flight.")
	b.press("esc")
	b.sees("[open 1]", "resolved 3", "1 group · 1 dead letter", "the amount is negative")
	b.seesNot("gateway timeout")
	if got, want := s.got(), []orderPlaced{{"a", 1}, {"b", 2}, {"c", 3}}; !slices.Equal(got, want) {
		t.Errorf("charged %v, want %v", got, want)
	}
	b.press("tab", "tab", "enter", "end", "enter", "end")
	b.sees("resolved", "the gateway is back")
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 1, dlq.StateResolved: 3})
}

// An edit is what a replay sends.
func TestReal_edit(t *testing.T) {
	t.Parallel()
	s, desk, b := openShop(t, orderPlaced{"d", -4})
	s.gateway.Store(true)
	b.m.opt.Environ = append(b.m.opt.Environ, "SCREEN_TEST_REPLACE=-4", "SCREEN_TEST_BY=4")
	b.press("enter", "enter", "e")
	b.sees("Edit dead letter", `- "amount": -4`, `+ "amount": 4`, "Revision 1")
	path := b.m.draft.path
	b.press("esc")
	b.sees("Not stored.")
	gone(t, path)
	b.press("e")
	b.write("a typo")
	b.press("enter")
	b.sees("Stored as revision 1 of dead letter", "payload, 21 bytes, as of edit 1", `"amount": 4`)
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 1})
	b.press("r", "enter", "enter")
	b.sees("Replay done: 1 of 1 sent, 1 resolved")
	b.press("esc", "end")
	b.sees("edited (revision 1) by ann@ops: a typo", "resolved by")
	if got, want := s.got(), []orderPlaced{{"d", 4}}; !slices.Equal(got, want) {
		t.Errorf("charged %v, want %v", got, want)
	}
}

// What is skipped stays, and what is discarded is gone, when that is agreed to.
func TestReal_skipAndDiscard(t *testing.T) {
	t.Parallel()
	s, desk, b := openShop(t, orderPlaced{"test-1", 1}, orderPlaced{"test-2", 1}, orderPlaced{"test-3", 1})
	b.press("enter", "s")
	b.sees("2 dead letters · 1 skipped", "Skipped: it is hidden until you quit, and otherwise as before.")
	b.press("g")
	b.sees("2 dead letters · 1 skipped")
	b.press("S")
	b.sees("3 dead letters · billing")
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 3})

	first := b.m.entries.list.rows[0].ID
	b.press("home", "d")
	b.sees("Discard 1 dead letter?", "The payload is gone for good", first[:shortID])
	b.press("esc")
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 3})
	b.press("d")
	b.write("a test of ours")
	b.press("enter")
	b.sees("1 dead letter discarded.", "2 dead letters · billing", "[open 2]", "all 3")
	has(t, desk, map[dlq.State]int{dlq.StateOpen: 2, dlq.StateDiscarded: 1})
	e, err := desk.Get(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	if last := e.History[len(e.History)-1]; e.State != dlq.StateDiscarded || e.Data != nil || last.Actor != "ann@ops" || last.Reason != "a test of ours" {
		t.Errorf("it is %s with payload %q, by %s because of %q", e.State, e.Data, last.Actor, last.Reason)
	}

	b.press("esc", "d") // the rest of the group
	b.sees("Discard 2 dead letters?", "All of this group that are open")
	b.press("enter")
	b.sees("2 dead letters discarded.", "[open 0]", "There are no dead letters that are open.")
	has(t, desk, map[dlq.State]int{dlq.StateDiscarded: 3})
	if got := s.got(); got != nil {
		t.Errorf("charged %v", got)
	}
}
