package screen

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

var _ Desk = (*triage.Desk)(nil)

var now = time.Date(2026, 3, 14, 15, 9, 26, 0, time.UTC)

// A fakeDesk is a desk in memory, for what the server does not do on demand:
// conflicts, hostile text, replays that go on for as long as a test wants.
type fakeDesk struct {
	mu      sync.Mutex
	groups  []triage.Group
	entries []*dlq.Entry // newest first
	calls   []string     // that change something
	sels    []triage.Selection
	err     error // of the next change
	plan    triage.Plan
	planErr error
	run     func(ctx context.Context, id string, progress func(*triage.Operation)) (*triage.Operation, error)
	wait    chan struct{} // Groups waits for it, if it is not nil
	paused  chan string
}

func (d *fakeDesk) called(format string, args ...any) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
	return d.err
}

func (d *fakeDesk) Stream() string { return "DLQ" }

func (d *fakeDesk) Stats(context.Context) (*triage.Stats, error) {
	s := &triage.Stats{States: make(map[dlq.State]int), Bytes: 3 << 20, MaxBytes: 4 << 20}
	for _, e := range d.entries {
		s.States[e.State]++
	}
	return s, nil
}

func (d *fakeDesk) Groups(ctx context.Context, sel triage.Selection) ([]triage.Group, error) {
	if d.wait != nil {
		select {
		case <-d.wait:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sels = append(d.sels, sel)
	if !slices.Contains(sel.States, dlq.StateOpen) {
		return nil, nil
	}
	return slices.Clone(d.groups), nil
}

func (d *fakeDesk) Entries(_ context.Context, sel triage.Selection, payload bool) iter.Seq2[*dlq.Entry, error] {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sels = append(d.sels, sel)
	entries := slices.Clone(d.entries)
	return func(yield func(*dlq.Entry, error) bool) {
		if payload {
			panic("payloads are not for lists")
		}
		n := 0
		for _, e := range entries {
			if len(sel.States) > 0 && !slices.Contains(sel.States, e.State) || sel.Upto > 0 && e.Sequence > sel.Upto {
				continue
			}
			if !yield(e, nil) {
				return
			}
			n++
			if n == sel.Limit {
				return
			}
		}
	}
}

func (d *fakeDesk) Get(_ context.Context, id string) (*dlq.Entry, error) {
	for _, e := range d.entries {
		if e.ID == id {
			copied := *e
			return &copied, nil
		}
	}
	return nil, &triage.NotFoundError{What: "dead letter", ID: id}
}

func (d *fakeDesk) Current(_ context.Context, e *dlq.Entry) (*dlq.Record, error) {
	r := *e.Record
	return &r, nil
}

func (d *fakeDesk) StorePlan(_ context.Context, p *triage.Plan) error {
	return d.called("store %s", p.ID)
}

func (d *fakeDesk) DryRun(_ context.Context, sel triage.Selection, o triage.Options) (*triage.Plan, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sels = append(d.sels, sel)
	p := d.plan
	p.Options = o
	return &p, d.planErr
}

func (d *fakeDesk) Run(ctx context.Context, id string, progress func(*triage.Operation)) (*triage.Operation, error) {
	_ = d.called("run %s", id)
	return d.run(ctx, id, progress)
}

func (d *fakeDesk) Operation(context.Context, string) (*triage.Operation, error) {
	return nil, errors.New("not asked for")
}

func (d *fakeDesk) Pause(_ context.Context, id string) error {
	d.paused <- "pause"
	return d.called("pause %s", id)
}

func (d *fakeDesk) Cancel(_ context.Context, id string) error {
	d.paused <- "cancel"
	return d.called("cancel %s", id)
}

func (d *fakeDesk) Edit(_ context.Context, e *dlq.Entry, rev triage.Revision) error {
	e.Revision++
	return d.called("edit %s %s: %s", e.ID, rev.Data, rev.Reason)
}

func (d *fakeDesk) Discard(_ context.Context, e *dlq.Entry, reason string) error {
	return d.called("discard %s: %s", e.ID, reason)
}

func (d *fakeDesk) Archive(_ context.Context, e *dlq.Entry, reason string) error {
	return d.called("archive %s: %s", e.ID, reason)
}

func (d *fakeDesk) Restore(_ context.Context, e *dlq.Entry, reason string) error {
	return d.called("restore %s: %s", e.ID, reason)
}

// newFakeDesk has two groups, and some entries.
func newFakeDesk() *fakeDesk {
	d := &fakeDesk{
		paused: make(chan string, 10),
		groups: []triage.Group{
			{
				ID: "g1", Title: "charge card <s>: gateway timeout after <n>ms", Consumer: "billing", Stream: "ORDERS",
				Count: 2000, Last: now.Add(-5 * time.Minute), PerHour: 120, Regressed: true,
			},
			{ID: "g2", Title: "no such warehouse", Consumer: "shipping-to-the-whole-wide-world", Stream: "ORDERS", Count: 3, Last: now.Add(-50 * time.Hour), PerHour: 0.2},
		},
	}
	for i := range 3 {
		r := &dlq.Record{
			ID: fmt.Sprintf("abcdefghijklmnopqrst%04d", i), Reason: dlq.ReasonAttemptsExhausted, ReasonText: "5 attempts",
			Subject: "orders.created.v1", Header: nats.Header{"Tenant": {"acme"}, "Traceparent": {"x"}},
			Data: []byte(`{"order":17,"amount":120,"note":"two` + "\u2028" + `lines"}`), Event: "orders/created/v1",
			Stream: "ORDERS", StreamSequence: uint64(100 - i), Consumer: "billing", Deliveries: 5,
			Stored: now.Add(-3 * time.Hour), FirstFailed: now.Add(-2 * time.Hour), Failed: now.Add(-time.Duration(i+1) * time.Hour),
			Error:     "charge card \"4711\": gateway timeout after 1500ms: the upstream connection was closed before the answer was complete",
			ErrorType: "timeout", ErrorTypes: []string{"*billing.ChargeError", "*url.Error"},
			Stack:       []string{"billing.(*Handler).Handle(...)", "\t/src/billing/handler.go:42"},
			Traceparent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
			App:         "shop", AppVersion: "1.2.3", Module: "billing", Host: "node-7",
		}
		r.BodySize = len(r.Data)
		e := dlq.NewEntry(r, uint64(50-i), nil)
		d.entries = append(d.entries, e)
	}
	failed := &dlq.Record{Error: "gateway timeout again", Reason: dlq.ReasonAttemptsExhausted, Failed: now.Add(-time.Minute), Deliveries: 5}
	d.entries[0] = dlq.NewEntry(d.entries[0].Record, 50, []*dlq.Change{
		{Kind: dlq.ChangeReplaying, From: dlq.StateOpen, Time: now.Add(-30 * time.Minute), Actor: "ann@ops", Operation: "01JOP", Target: "consumer", Reason: "gateway is back", Sequence: 60},
		{Kind: dlq.ChangeFailedAgain, From: dlq.StateReplaying, Time: now.Add(-time.Minute), Actor: "shop", Operation: "01JOP", Failure: failed, Sequence: 61},
	})
	d.plan = triage.Plan{
		ID: "01JPLAN", Actor: "bob@ops", Selected: 12, Bytes: 3456, Oldest: now.Add(-3 * time.Hour), Newest: now.Add(-time.Hour),
		Consumers: []triage.PlanConsumer{{Stream: "ORDERS", Consumer: "billing", Count: 12}},
		LeftOut:   map[string]int{"replayed 5 times or more already": 2}, Samples: d.entries[:2],
		Warnings: []string{`nobody fetches for consumer "billing" of stream "ORDERS": the messages will wait until its App runs`},
	}
	return d
}

// A bench runs a model without a terminal.
type bench struct {
	t       *testing.T
	m       *model
	desk    *fakeDesk // nil on a real one
	msgs    chan tea.Msg
	pending atomic.Int64 // commands whose messages have not come
	quit    bool
}

func newBench(t *testing.T, desk *fakeDesk, width, height int) *bench {
	t.Helper()
	b := benchOn(t, desk, func() time.Time { return now }, width, height)
	b.desk = desk
	return b
}

// benchOn runs a model on any desk.
func benchOn(t *testing.T, desk Desk, now func() time.Time, width, height int) *bench {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	b := &bench{t: t, msgs: make(chan tea.Msg)}
	b.m = newModel(ctx, desk, Options{
		Now: now, TraceURLTemplate: "https://traces.example/trace/{trace_id}",
		Environ: append(os.Environ(), "EDITOR="+os.Args[0], "VISUAL=", "SCREEN_TEST_REPLACE=120", "SCREEN_TEST_BY=130"),
	})
	b.m.ticking = true // for good: nothing moves by itself
	b.m.exec = func(c tea.ExecCommand, done tea.ExecCallback) tea.Cmd {
		return func() tea.Msg { return done(c.Run()) }
	}
	t.Cleanup(func() {
		cancel()
		for b.pending.Load() > 0 {
			<-b.msgs
			b.pending.Add(-1)
		}
		b.m.work.wait()
		b.m.drop()
	})
	b.send(tea.WindowSizeMsg{Width: width, Height: height})
	b.start(b.m.Init())
	return b
}

// start runs a command, or those that it is made of.
func (b *bench) start(cmd tea.Cmd) {
	if cmd == nil {
		return
	}
	b.pending.Add(1)
	go func() {
		msg := cmd()
		if batch, ok := msg.(tea.BatchMsg); ok {
			for _, c := range batch {
				b.start(c)
			}
			msg = nil
		}
		b.msgs <- msg
	}()
}

// send sends a message to the model, and looks at what it draws.
func (b *bench) send(msg tea.Msg) {
	b.t.Helper()
	switch msg.(type) {
	case nil:
		return
	case tea.QuitMsg:
		b.quit = true
		return
	}
	_, cmd := b.m.Update(msg)
	b.start(cmd)
	b.view()
}

// until takes messages until something is true.
func (b *bench) until(what string, is func() bool) {
	b.t.Helper()
	deadline, look := time.NewTimer(patience), time.NewTicker(time.Millisecond)
	defer deadline.Stop()
	defer look.Stop()
	for !is() {
		select {
		case msg := <-b.msgs:
			b.pending.Add(-1)
			b.send(msg)
		case <-look.C:
		case <-deadline.C:
			b.t.Fatalf("%s: did not happen; the screen is\n%s", what, b.view())
		}
	}
}

func (b *bench) settle() {
	b.t.Helper()
	b.until("everything has come", func() bool { return b.pending.Load() == 0 })
}

var special = map[string]rune{
	"enter": tea.KeyEnter, "esc": tea.KeyEscape, "up": tea.KeyUp, "down": tea.KeyDown, "tab": tea.KeyTab, "end": tea.KeyEnd,
	"home": tea.KeyHome, "pgdown": tea.KeyPgDown, "pgup": tea.KeyPgUp, "backspace": tea.KeyBackspace, "left": tea.KeyLeft, "right": tea.KeyRight,
}

func keyPress(name string) tea.KeyPressMsg {
	switch {
	case name == "ctrl+c":
		return tea.KeyPressMsg{Code: 'c', Mod: tea.ModCtrl}
	case name == "space":
		return tea.KeyPressMsg{Code: tea.KeySpace, Text: " "}
	case special[name] != 0:
		return tea.KeyPressMsg{Code: special[name]}
	default:
		return tea.KeyPressMsg{Code: rune(name[0]), Text: name}
	}
}

// press presses keys, and waits after each for what it leads to.
func (b *bench) press(names ...string) {
	b.t.Helper()
	for _, name := range names {
		b.send(keyPress(name))
		b.settle()
	}
}

// tap presses keys and does not wait.
func (b *bench) tap(names ...string) {
	b.t.Helper()
	for _, name := range names {
		b.send(keyPress(name))
	}
}

func (b *bench) write(text string) {
	b.t.Helper()
	for _, r := range text {
		b.send(tea.KeyPressMsg{Code: r, Text: string(r)})
	}
}

// view is what is seen. It fits the screen, and there is nothing in it that a
// terminal would obey.
func (b *bench) view() string {
	b.t.Helper()
	content := b.m.View().Content
	lines := strings.Split(content, "\n")
	if len(lines) > b.m.height || b.m.height >= minHeight && b.m.width >= minWidth && len(lines) != b.m.height {
		b.t.Errorf("%d lines on a screen of %d:\n%s", len(lines), b.m.height, content)
	}
	for i, l := range lines {
		if w := ansi.StringWidth(l); w > b.m.width {
			b.t.Errorf("line %d has %d columns on a screen of %d: %q", i, w, b.m.width, l)
		}
		if plain := sgr.ReplaceAllString(l, ""); plain != safe.Line(plain) {
			b.t.Errorf("line %d is not safe: %q", i, l)
		}
		lines[i] = strings.TrimRight(ansi.Strip(l), " ")
	}
	return strings.Join(lines, "\n") + "\n"
}

func (b *bench) sees(parts ...string) {
	b.t.Helper()
	view := b.view()
	joined := strings.Join(strings.Fields(view), " ")
	for _, p := range parts {
		if !strings.Contains(joined, p) {
			b.t.Errorf("%q is not to be seen:\n%s", p, view)
		}
	}
}

func (b *bench) seesNot(parts ...string) {
	b.t.Helper()
	view := b.view()
	for _, p := range parts {
		if strings.Contains(strings.Join(strings.Fields(view), " "), p) {
			b.t.Errorf("%q is to be seen:\n%s", p, view)
		}
	}
}

// calls waits until so many changes were begun.
func (b *bench) calls(n int) {
	b.t.Helper()
	b.until(fmt.Sprintf("change %d", n), func() bool {
		b.desk.mu.Lock()
		defer b.desk.mu.Unlock()
		return len(b.desk.calls) == n
	})
}

// did compares what was changed.
func (b *bench) did(want ...string) {
	b.t.Helper()
	b.desk.mu.Lock()
	defer b.desk.mu.Unlock()
	if diff := cmp.Diff(want, b.desk.calls); diff != "" {
		b.t.Errorf("changes (-want +got):\n%s", diff)
	}
}

func (b *bench) lastSelection() triage.Selection {
	b.desk.mu.Lock()
	defer b.desk.mu.Unlock()
	return b.desk.sels[len(b.desk.sels)-1]
}

func (b *bench) golden(name string) {
	b.t.Helper()
	path := filepath.Join("testdata", name+".txt")
	got := b.view()
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o600); err != nil {
			b.t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		b.t.Errorf("%s (-want +got), see -update:\n%s", path, diff)
	}
}
