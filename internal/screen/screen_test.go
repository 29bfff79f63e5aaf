package screen

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// sgr is what a style is made of: it changes how text looks, and nothing else.
var sgr = regexp.MustCompile("\x1b\\[[0-9;]*m")

// TestView keeps what each screen looks like.
func TestView(t *testing.T) {
	t.Parallel()
	operation := func(status triage.Status) *triage.Operation {
		return &triage.Operation{
			Plan: triage.Plan{ID: "01JPLAN", Selected: 12}, Status: status, Claimed: 8, Resolved: 5, FailedAgain: 1, Remaining: 3,
			Skipped: map[string]int{"changed meanwhile": 1}, NewSince: 4, Why: "paused by bob@ops",
		}
	}
	for _, tt := range []struct {
		name string
		show func(b *bench)
	}{
		{"groups", func(*bench) {}},
		{"groups-none", func(b *bench) { b.press("tab") }},
		{"entries", func(b *bench) { b.press("enter", "space") }},
		{"entries-all", func(b *bench) { b.press("tab", "tab", "tab", "tab", "enter") }},
		{"detail", func(b *bench) { b.press("enter", "enter") }},
		{"detail-end", func(b *bench) { b.press("enter", "enter", "end") }},
		{"detail-hidden", func(b *bench) { b.press("enter", "enter", "p", "end") }},
		{"help", func(b *bench) { b.press("?") }},
		{"filter-bad", func(b *bench) {
			b.press("/")
			b.write(`payload.x > amonut && consumer == "billing" && error.contains("timeout")`)
			b.press("enter")
		}},
		{"replay-asked", func(b *bench) { b.press("r") }},
		{"replay-plan", func(b *bench) {
			b.press("r")
			b.write("the gateway is back")
			b.press("enter")
		}},
		{"replay-problem", func(b *bench) {
			b.desk.plan.Problems = []string{`consumer "billing" of stream "ORDERS" is gone: start its App`}
			b.press("enter", "space", "space", "r", "enter")
		}},
		{"replay-paused", func(b *bench) {
			b.desk.run = func(context.Context, string, func(*triage.Operation)) (*triage.Operation, error) {
				return operation(triage.StatusPaused), nil
			}
			b.press("r", "enter", "enter")
		}},
		{"discard", func(b *bench) { b.press("enter", "d") }},
		{"discard-group", func(b *bench) { b.press("d") }},
		{"edit", func(b *bench) { b.press("enter", "enter", "e") }},
	} {
		for _, size := range [][2]int{{80, 24}, {40, 12}} {
			name := fmt.Sprintf("%s-%dx%d", tt.name, size[0], size[1])
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				b := newBench(t, newFakeDesk(), size[0], size[1])
				b.settle()
				tt.show(b)
				b.golden(name)
			})
		}
	}
}

func TestReplay_group(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	next := make(chan *triage.Operation)
	desk.run = func(_ context.Context, _ string, progress func(*triage.Operation)) (*triage.Operation, error) {
		last := &triage.Operation{}
		for op := range next {
			progress(op)
			last = op
		}
		return last, nil
	}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("r")
	b.sees("Replay the group?", "Nothing is sent before you have seen it", "ORDERS/billing")
	b.write("back")
	b.press("enter")
	b.sees("12 dead letters will be sent", "12 to ORDERS/billing", "warning: nobody fetches", "left out: 2, replayed 5 times", "reason: back")
	b.did()
	sel := b.lastSelection()
	if !slices.Equal(sel.Groups, []string{"g1"}) || !slices.Equal(sel.States, []dlq.State{dlq.StateOpen}) {
		t.Errorf("planned %+v, want the open ones of g1", sel)
	}

	b.tap("enter")
	b.sees("Replay of 12 dead letters begins")
	next <- &triage.Operation{Status: triage.StatusRunning, Claimed: 6, Resolved: 3, FailedAgain: 1, Remaining: 6}
	b.until("progress", func() bool { return b.m.replay.op != nil })
	b.sees("running: 6 of 12 tried", "sent 6 · resolved 3 · failed again 1 · in flight 2")
	b.tap("esc") // it goes on
	b.tap("d")
	b.sees("Something is going on already")
	next <- &triage.Operation{Status: triage.StatusDone, Claimed: 12, Resolved: 11, FailedAgain: 1}
	close(next)
	b.settle()
	b.sees("Replay done: 12 of 12 sent, 11 resolved, 1 failed again, 0 in flight.")
	b.did("store 01JPLAN", "run 01JPLAN")
}

// Where every state is listed, what is resolved is not sent again.
func TestReplay_groupOfAllStates(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("tab", "tab", "tab", "tab", "r", "enter")
	if got := b.lastSelection().States; !slices.Equal(got, []dlq.State{dlq.StateOpen}) {
		t.Errorf("planned %v, want what is open", got)
	}
}

func TestReplay_declined(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("r", "esc")
	b.seesNot("Replay the group")
	b.press("r", "enter", "esc")
	b.seesNot("the plan")
	b.did()
}

func TestReplay_marked(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "space", "space", "r", "enter")
	if got, want := b.lastSelection().IDs, []string{b.desk.entries[0].ID, b.desk.entries[1].ID}; !slices.Equal(got, want) {
		t.Errorf("planned %v, want the marked %v", got, want)
	}
}

// A plan that has problems cannot be run, whatever is pressed.
func TestReplay_problems(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.plan.Problems = []string{"the consumer is gone"}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("r", "enter", "enter", "enter")
	b.sees("problem: the consumer is gone")
	b.did()
}

func TestReplay_pauseResumeCancel(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.run = func(ctx context.Context, _ string, _ func(*triage.Operation)) (*triage.Operation, error) {
		op := &triage.Operation{Plan: triage.Plan{ID: "01JPLAN"}, Remaining: 5, Claimed: 7}
		select {
		case what := <-desk.paused:
			op.Status = map[string]triage.Status{"pause": triage.StatusPaused, "cancel": triage.StatusCancelled}[what]
			return op, nil
		case <-ctx.Done():
			return op, context.Cause(ctx)
		}
	}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("r", "enter")
	b.tap("enter")
	b.calls(2)
	b.press("p")
	b.sees("paused: 7 of 12 tried", "monotel dlq ops resume 01JPLAN")
	b.tap("r")
	b.calls(4)
	b.tap("c")
	b.sees("Cancel the replay for good?")
	b.tap("esc")
	if !b.m.replay.running {
		t.Fatal("declined, and cancelled")
	}
	b.tap("c")
	b.press("enter")
	b.sees("cancelled: 7 of 12 tried")
	b.did("store 01JPLAN", "run 01JPLAN", "pause 01JPLAN", "run 01JPLAN", "cancel 01JPLAN")
}

// Cancelling what nobody runs is an end, too.
func TestReplay_cancelPaused(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.run = func(context.Context, string, func(*triage.Operation)) (*triage.Operation, error) {
		return &triage.Operation{Status: triage.StatusPaused, Claimed: 7, Remaining: 5}, nil
	}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("r", "enter", "enter", "c", "enter")
	b.sees("Replay cancelled", "cancelled: 7 of 12 tried")
	if !b.m.replay.ended() {
		t.Error("it could be resumed")
	}
}

func TestReplay_error(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.run = func(context.Context, string, func(*triage.Operation)) (*triage.Operation, error) {
		return nil, fmt.Errorf("operation 01JPLAN is run by eve@ops/7: %w", triage.ErrClaimed)
	}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("r", "enter", "enter", "esc")
	b.sees("is run by eve@ops/7: being replayed")
}

func TestQuit_pausesReplay(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.run = func(ctx context.Context, id string, _ func(*triage.Operation)) (*triage.Operation, error) {
		<-ctx.Done()
		return &triage.Operation{Plan: triage.Plan{ID: id}, Status: triage.StatusPaused}, context.Cause(ctx)
	}
	b := newBench(t, desk, 80, 24)
	var out bytes.Buffer
	b.m.opt.Output = &out
	b.settle()
	b.press("r", "enter")
	b.tap("enter", "esc", "q")
	b.sees("Quit?", "Replay 01JPLAN is running", "Quitting pauses it", "monotel dlq ops resume 01JPLAN")
	b.tap("esc")
	if !b.m.replay.running || b.quit {
		t.Fatal("declined, and it quits")
	}
	b.tap("q", "enter")
	b.until("quit", func() bool { return b.quit })
	if b.m.replay.running {
		t.Error("quit before the replay was paused")
	}
	if err := b.m.leave(nil); err != nil {
		t.Error(err)
	}
	if want := "Replay 01JPLAN is paused. To go on: monotel dlq ops resume 01JPLAN\n"; out.String() != want {
		t.Errorf("leaves %q, want %q", out.String(), want)
	}
}

// ctrl+c declines what is asked, and leaves.
func TestQuit_interrupt(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "d", "ctrl+c")
	if !b.quit {
		t.Error("it does not quit")
	}
	b.did()
}

func TestDiscard(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "d")
	b.sees("Discard 1 dead letter?", "The payload is gone for good")
	b.press("esc")
	b.did()
	b.press("d")
	b.write("junk d/a/q")
	b.press("enter")
	b.sees("1 dead letter discarded.")
	b.did("discard " + b.desk.entries[0].ID + ": junk d/a/q")
}

// What fails after a group was counted is not meant.
func TestDiscard_group(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("d")
	b.sees("Discard 3 dead letters?", "All of this group that are open", "ORDERS/billing")
	b.desk.mu.Lock()
	later := *b.desk.entries[0]
	later.Sequence = 99
	b.desk.entries = slices.Insert(b.desk.entries, 0, &later)
	b.desk.mu.Unlock()
	b.press("enter")
	b.sees("3 dead letters discarded.")
	if n := len(b.desk.calls); n != 3 {
		t.Errorf("%d were discarded, want 3", n)
	}
}

func TestArchive_changedMeanwhile(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	b := newBench(t, desk, 80, 24)
	b.settle()
	desk.err = &triage.EntryError{ID: "abc", Err: triage.ErrChanged, State: dlq.StateArchived, Actor: "ann@ops", Changed: now}
	b.press("enter", "space", "space", "a", "enter")
	b.sees("0 of 2 archived, 2 not. The first: dead letter abc: changed meanwhile (archived, by ann@ops")
	if n := len(desk.calls); n != 2 {
		t.Errorf("%d were tried, want both", n)
	}
}

// An error that is not about one entry ends it: the others would fail, too.
func TestArchive_full(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	b := newBench(t, desk, 80, 24)
	b.settle()
	desk.err = fmt.Errorf("%w: raise its limit", triage.ErrFull)
	b.press("enter", "space", "space", "a", "enter")
	b.sees("0 of 2 archived, 1 not", "the dead-letter stream is full")
	if n := len(desk.calls); n != 1 {
		t.Errorf("%d were tried, want 1", n)
	}
}

func TestRestore(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("enter", "u")
	b.sees("Cannot restore what is open.")
	desk.entries[1].State = dlq.StateArchived
	b.press("tab", "tab", "tab")
	b.press("u", "enter")
	b.sees("1 dead letter restored.")
	b.did("restore " + desk.entries[1].ID + ": ")
}

func TestEdit(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "enter", "e")
	b.sees(`- "amount": 120,`, `+ "amount": 130,`, "Revision 1")
	path := b.m.draft.path
	if info, err := os.Stat(path); err != nil || os.PathSeparator == '/' && info.Mode().Perm() != 0o600 {
		t.Errorf("the file: %v, %v; want one that only its owner may read", info, err)
	}
	b.write("typo")
	b.press("enter")
	b.sees("Stored as revision 1")
	b.did("edit " + b.desk.entries[0].ID + ` {"order":17,"amount":130,"note":"two` + "\u2028" + `lines"}: typo`)
	gone(t, path)
}

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

// kept checks that what was written is where the screen says, and removes it.
func kept(t *testing.T, b *bench, path, part string) {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(content), part) {
		t.Errorf("kept %q, %v; want %q in it", content, err, part)
	}
	b.sees("What you wrote is kept in", filepath.Base(path))
	_ = os.Remove(path)
}

func TestEdit_declined(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "e")
	path := b.m.draft.path
	b.press("esc")
	b.sees("Not stored.")
	b.did()
	gone(t, path)
}

func TestEdit_unchanged(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.m.opt.Environ = append(b.m.opt.Environ, "SCREEN_TEST_REPLACE=\n", "SCREEN_TEST_BY=\n\n") // spaces are no change
	b.settle()
	b.press("enter", "e")
	b.sees("Nothing was changed.")
	b.did()
	if b.m.draft != nil {
		t.Error("the draft is kept")
	}
}

func TestEdit_changedMeanwhile(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.err = &triage.EntryError{ID: "abc", Err: triage.ErrChanged, State: dlq.StateOpen, Actor: "ann@ops", Changed: now}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("enter", "e")
	path := b.m.draft.path
	b.press("enter")
	b.sees("changed meanwhile (open, by ann@ops")
	kept(t, b, path, "130")
}

func TestEdit_notJSON(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	environ := b.m.opt.Environ
	b.m.opt.Environ = append(slices.Clone(environ), "SCREEN_TEST_REPLACE=120", "SCREEN_TEST_BY=twelve")
	b.settle()
	b.press("enter", "e")
	b.sees("Not JSON any more", "line 3, column 14")
	path := b.m.draft.path
	b.m.opt.Environ = append(slices.Clone(environ), "SCREEN_TEST_REPLACE=twelve", "SCREEN_TEST_BY=12")
	b.press("enter") // edit again
	b.sees(`+ "amount": 12,`)
	if b.m.draft.path != path {
		t.Errorf("it is edited in %s, want %s again", b.m.draft.path, path)
	}
	b.press("esc")
	gone(t, path)

	b.m.opt.Environ = append(slices.Clone(environ), "SCREEN_TEST_REPLACE=120", "SCREEN_TEST_BY=twelve")
	b.press("e")
	path = b.m.draft.path
	b.press("esc")
	kept(t, b, path, "twelve")
	b.did()
}

func TestEdit_refused(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, want string
		give       func(e *dlq.Entry)
	}{
		{"state", "Cannot edit what is replaying.", func(e *dlq.Entry) { e.State = dlq.StateReplaying }},
		{"binary", "its payload is no text", func(e *dlq.Entry) { e.Data = []byte{0xff, 0} }},
		{"gone", "its payload was not kept, or was gone", func(e *dlq.Entry) { e.Body = dlq.BodyGone }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			desk := newFakeDesk()
			tt.give(desk.entries[0])
			b := newBench(t, desk, 80, 24)
			b.settle()
			b.press("tab", "tab", "tab", "tab", "enter", "e")
			b.sees(tt.want)
		})
	}
}

func TestEdit_editorFails(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.m.opt.Environ = append(b.m.opt.Environ, "SCREEN_TEST_REPLACE=crash")
	b.settle()
	b.press("enter", "e")
	b.sees("exit status 1")
	b.seesNot("is kept in") // nothing was written
	if b.m.draft != nil {
		t.Error("the draft is kept")
	}
}

func TestFilter(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("/")
	b.write("consumer == amonut")
	b.press("enter")
	b.sees("amonut\"", "where: consumer == amonut")
	lines := strings.Split(b.view(), "\n")
	at := slices.Index(lines, "consumer == amonut")
	if at < 0 || lines[at+1] != strings.Repeat(" ", len("consumer == "))+"^" {
		t.Errorf("no caret is below amonut:\n%s", b.view())
	}
	for range "amonut" {
		b.press("backspace")
	}
	b.send(tea.PasteMsg{Content: "\"bil\x1bling\"\n"})
	b.press("enter")
	b.sees(`where consumer == "billing"`)
	if q := b.lastSelection().Where; q == nil || q.Text() != `consumer == "billing"` {
		t.Errorf("asked for %v", q)
	}
	b.press("enter")
	if q := b.lastSelection().Where; q == nil {
		t.Error("the entries are not filtered")
	}
	b.press("esc", "esc")
	if q := b.lastSelection().Where; q != nil {
		t.Errorf("the filter is still there: %v", q.Text())
	}
}

// A caret that is off the screen is moved into it, below the same letter.
func TestFilter_longQuery(t *testing.T) {
	t.Parallel()
	x := strings.Repeat("x", 90)
	b := newBench(t, newFakeDesk(), 40, 12)
	b.settle()
	b.press("/")
	b.write(fmt.Sprintf("error.contains(%q) && amonut > 1 && error.contains(%q)", x, x))
	b.press("enter")
	lines := strings.Split(b.view(), "\n")
	caret := slices.IndexFunc(lines, func(l string) bool { return strings.HasSuffix(l, "^") })
	if caret < 1 {
		t.Fatalf("no caret is to be seen:\n%s", b.view())
	}
	above, at := []rune(lines[caret-1]), len([]rune(lines[caret]))-1
	if at >= len(above) || !strings.HasPrefix(string(above[at:]), "amonut") {
		t.Errorf("the caret is not below amonut:\n%s", b.view())
	}
}

func TestEntries_lazy(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	template := *desk.entries[1].Record
	desk.entries = nil
	for i := range 1200 {
		r := template
		r.ID = fmt.Sprintf("%024d", i)
		desk.entries = append(desk.entries, dlq.NewEntry(&r, uint64(1200-i), nil))
	}
	b := newBench(t, desk, 80, 24)
	b.settle()
	b.press("enter")
	b.sees("the newest 500", "m load more")
	if n := b.lastSelection().Limit; n != pageSize+1 { // to know whether there are more
		t.Errorf("asked for %d", n)
	}
	b.press("end", "m")
	b.sees("the newest 1,000", "500 of 1,000")
	b.press("m")
	b.sees("1,200 dead letters")
	b.seesNot("load more")
	if got := len(b.m.entries.list.rows); got != 1200 {
		t.Errorf("%d are listed", got)
	}
	b.press("g")
	b.sees("1,200 dead letters") // as many as before
}

func TestSkip(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "enter", "s")
	b.sees("dead letter " + b.desk.entries[1].ID)
	b.press("esc", "g")
	b.sees("2 dead letters", "1 skipped")
	b.press("esc", "d")
	b.sees("Those that you have skipped are among them: 1.")
	b.press("esc", "s")
	b.sees("1 group", "2 skipped")
	b.press("S")
	b.sees("2 groups")
}

// A mark on what is not listed any more would change what is not seen.
func TestMarks_goWithTheirEntry(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	b.press("enter", "space", "space")
	b.sees("2 marked")
	b.desk.entries[0].State = dlq.StateResolved
	b.press("g")
	b.sees("1 marked")
}

func TestResize(t *testing.T) {
	t.Parallel()
	b := newBench(t, newFakeDesk(), 80, 24)
	b.settle()
	sizes := [][2]int{{40, 10}, {200, 60}, {41, 11}, {20, 5}, {1, 1}, {80, 24}}
	for _, keys := range [][]string{nil, {"enter"}, {"enter", "end"}, {"d"}, {"esc", "?"}, {"esc", "esc", "esc", "/"}} {
		b.press(keys...)
		for _, s := range sizes {
			b.send(tea.WindowSizeMsg{Width: s[0], Height: s[1]}) // view checks that it fits
		}
	}
	b.send(tea.WindowSizeMsg{Width: 39, Height: 10})
	b.sees("A terminal of 40 columns and 10 lines is needed")
	calls := len(b.desk.sels)
	b.press("enter", "esc", "g")
	if len(b.desk.sels) != calls {
		t.Error("keys do something that cannot be seen")
	}
}

// While something is loading the screen can be used, and what is not waited for
// any more is cancelled.
func TestLoading_doesNotBlock(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.wait = make(chan struct{})
	b := newBench(t, desk, 80, 24)
	b.until("stats", func() bool { return b.m.stats != nil })
	b.sees("loading groups")
	b.tap("?")
	b.sees("Keys")
	b.tap("esc", "tab") // asks for others: what was begun ends, and nothing is said of it
	b.until("cancelled", func() bool { return b.pending.Load() == 1 })
	b.sees("loading groups", "[replaying 0]")
	close(desk.wait)
	b.settle()
	b.sees("There are no dead letters that are replaying.")
	b.seesNot("canceled")
}

// What comes from the wire is drawn, and not obeyed: view checks each line.
func TestHostile(t *testing.T) {
	t.Parallel()
	const evil = "\x1b[2J\x1b]0;owned\a\x9b31m\u202eabc\u2066\r\n\tx\u009b\xff\u200b\x00" + "e\u0301" + "🚀東京"
	desk := newFakeDesk()
	for i := range desk.groups {
		g := &desk.groups[i]
		g.Title, g.Consumer, g.Stream = evil, evil, evil
	}
	for _, e := range desk.entries {
		r := e.Record
		r.ID = evil + r.ID
		r.Error, r.ErrorType, r.ErrorTypes, r.Stack, r.ReasonText = evil, evil, []string{evil, evil}, []string{evil}, evil
		r.Reason, r.Subject, r.Event, r.Stream, r.Consumer = evil, evil, evil, evil, evil
		r.Traceparent, r.OriginTraceparent, r.App, r.Host = evil, evil, evil, evil
		r.Header = nats1(evil)
		r.Data = []byte(evil)
		e.Failure = r
		e.Actor = evil
		e.History = []*dlq.Change{{Kind: evil, Actor: evil, Reason: evil, Operation: evil, Target: evil, Diff: []byte(evil), Failure: r}}
	}
	desk.plan.Problems, desk.plan.Warnings, desk.plan.LeftOut = []string{evil}, []string{evil}, map[string]int{evil: 1}
	desk.plan.ID, desk.plan.Actor = evil, evil
	desk.plan.Consumers = []triage.PlanConsumer{{Stream: evil, Consumer: evil}}
	desk.planErr = nil
	b := newBench(t, desk, 80, 24)
	b.settle()
	for _, size := range [][2]int{{80, 24}, {40, 10}} {
		b.send(tea.WindowSizeMsg{Width: size[0], Height: size[1]})
		b.press("r", "enter", "esc", "d", "esc", "enter", "r", "enter", "pgdown", "esc", "a", "esc", "enter")
		for range 40 {
			b.press("down")
		}
		b.press("p", "end", "esc", "esc")
	}
	b.desk.err = errors.New(evil)
	b.press("enter", "a", "enter")
	b.sees(`\x1b[2J\x1b]0;owned\a\x9b31m\u202eabc`)
}

func nats1(s string) map[string][]string { return map[string][]string{s: {s, s}} }

func TestPayloadLines(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		give dlq.Record
		want []string
	}{
		{"JSON", dlq.Record{Data: []byte(`{"a":[1]}`)}, []string{"{", `  "a": [`, "    1", "  ]", "}"}},
		{"text", dlq.Record{Data: []byte("hello\n\x1b[1mworld")}, []string{"hello", `\x1b[1mworld`}},
		{"binary", dlq.Record{Data: []byte{0, 1, 'a'}}, []string{"00000000  00 01 61                                          |..a|"}},
		{"empty", dlq.Record{}, []string{"(empty)"}},
		{"gone", dlq.Record{Body: dlq.BodyGone}, []string{"(its stream did not have it any more)"}},
		{"omitted", dlq.Record{Body: dlq.BodyOmitted, BodySize: 2048}, []string{"(not kept, 2.0 KiB)"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := payloadLines(&tt.give); !slices.Equal(got, tt.want) {
				t.Errorf("payloadLines() = %q, want %q", got, tt.want)
			}
		})
	}
	large := payloadLines(&dlq.Record{Data: bytes.Repeat([]byte("é"), 1<<20)})
	if n := len(strings.Join(large, "")); n > maxPayload+200 || !strings.Contains(large[len(large)-1], "the first 64.0 KiB of 2.0 MiB") {
		t.Errorf("of a large payload %d bytes are shown, ending with %q", n, large[len(large)-1])
	}
}

func TestDiffLines(t *testing.T) {
	t.Parallel()
	got := diffLines([]byte("a\nb\nc\nd\ne\nf\ng"), []byte("a\nB\nc\nd\ne\nf\nx\ng"))
	want := []string{"  a", "- b", "+ B", "  c", "  …", "  f", "+ x", "  g"}
	if !slices.Equal(got, want) {
		t.Errorf("diffLines() = %q, want %q", got, want)
	}
}

func TestInput(t *testing.T) {
	t.Parallel()
	in := &input{}
	in.insert("one two")
	for _, k := range []tea.KeyPressMsg{
		{Code: 'w', Mod: tea.ModCtrl},
		{Code: 'a', Mod: tea.ModCtrl},
		{Code: '>', Text: ">"},
		{Code: tea.KeyEnd},
		{Code: tea.KeyBackspace},
		{Code: tea.KeyLeft},
		{Code: tea.KeyDelete},
		{Code: 'é', Text: "é"},
	} {
		in.press(k)
	}
	if got := in.value(); got != ">oné" {
		t.Errorf("typed %q", got)
	}
	in.insert(strings.Repeat("x", 2*maxInput))
	if len(in.text) != maxInput {
		t.Errorf("it takes %d letters", len(in.text))
	}
}

// A terminal is an output that can be read while the screen writes to it.
type terminal struct {
	mu      sync.Mutex
	written bytes.Buffer
	more    chan struct{}
}

func newTerminal() *terminal { return &terminal{more: make(chan struct{}, 1)} }

func (o *terminal) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.more <- struct{}{}:
	default:
	}
	return o.written.Write(p)
}

func (o *terminal) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.written.String()
}

// patience bounds what a test waits for.
const patience = 3 * time.Minute

// await waits until something was written.
func (o *terminal) await(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(patience)
	for !strings.Contains(o.String(), text) {
		select {
		case <-o.more:
		case <-deadline:
			t.Fatalf("%q was not written, but\n%q", text, o.String())
		}
	}
}

// runScreen runs the screen on a pipe.
func runScreen(ctx context.Context, t *testing.T, desk Desk, environ ...string) (keys io.Writer, out *terminal, result <-chan error) {
	t.Helper()
	in, pipe, err := os.Pipe() // a file, which an editor can be given
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = in.Close()
		_ = pipe.Close()
	})
	written := newTerminal()
	opt := Options{Input: in, Output: written, Environ: append([]string{"TERM=xterm-256color", "TTY_FORCE=1"}, environ...)}
	done := make(chan error, 1)
	go func() { done <- Run(ctx, desk, opt) }()
	return pipe, written, done
}

func wait(t *testing.T, result <-chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(patience):
		t.Fatal("the screen does not close")
		return nil
	}
}

func TestRun(t *testing.T) {
	t.Parallel()
	keys, out, result := runScreen(t.Context(), t, newFakeDesk())
	out.await(t, "billing")
	_, _ = keys.Write([]byte("\r"))
	out.await(t, "abcdefghijkl")
	_, _ = keys.Write([]byte("q"))
	if err := wait(t, result); err != nil {
		t.Errorf("Run() = %v", err)
	}
}

func TestRun_contextEnds(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	desk.wait = make(chan struct{}) // it is still loading
	ctx, cancel := context.WithCancelCause(t.Context())
	_, out, result := runScreen(ctx, t, desk)
	out.await(t, "loading groups")
	why := errors.New("the process ends")
	cancel(why)
	if err := wait(t, result); !errors.Is(err, why) {
		t.Errorf("Run() = %v, want why the context has ended", err)
	}
}

// A replay is not left alone: Run returns when it is paused.
func TestRun_contextEndsDuringReplay(t *testing.T) {
	t.Parallel()
	desk := newFakeDesk()
	running, paused := make(chan struct{}), make(chan struct{})
	desk.run = func(ctx context.Context, _ string, _ func(*triage.Operation)) (*triage.Operation, error) {
		close(running)
		<-ctx.Done()
		<-time.After(100 * time.Millisecond) // what is in hand is brought to its end
		close(paused)
		return &triage.Operation{Status: triage.StatusPaused}, nil
	}
	ctx, cancel := context.WithCancel(t.Context())
	keys, out, result := runScreen(ctx, t, desk)
	out.await(t, "billing")
	_, _ = keys.Write([]byte("r"))
	out.await(t, "Nothing is sent")
	_, _ = keys.Write([]byte("\r"))
	out.await(t, "will be sent")
	_, _ = keys.Write([]byte("\r"))
	<-running
	cancel()
	if err := wait(t, result); !errors.Is(err, context.Canceled) {
		t.Errorf("Run() = %v", err)
	}
	select {
	case <-paused:
	default:
		t.Error("Run returned while the replay was running")
	}
	if !strings.HasSuffix(out.String(), "Replay 01JPLAN is paused. To go on: monotel dlq ops resume 01JPLAN\n") {
		t.Errorf("it does not say how to go on:\n%q", out.String())
	}
}

// An edit that was not stored is not lost without a word.
func TestRun_contextEndsDuringEdit(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	keys, out, result := runScreen(ctx, t, newFakeDesk(), append(os.Environ(), "EDITOR="+os.Args[0], "VISUAL=", "SCREEN_TEST_REPLACE=120", "SCREEN_TEST_BY=130")...)
	out.await(t, "billing")
	_, _ = keys.Write([]byte("\r"))
	out.await(t, "abcdefghijkl")
	_, _ = keys.Write([]byte("e"))
	out.await(t, "Revision 1")
	cancel()
	err := wait(t, result)
	if err == nil {
		t.Fatal("Run() = nil")
	}
	_, path, ok := strings.Cut(err.Error(), "it is kept in ")
	if content, readErr := os.ReadFile(path); !ok || readErr != nil || !strings.Contains(string(content), "130") {
		t.Errorf("Run() = %v, and the file has %q, %v", err, content, readErr)
	}
	_ = os.Remove(path)
}

func TestRun_noColor(t *testing.T) {
	t.Parallel()
	colour := regexp.MustCompile("\x1b\\[[0-9;]*3\\d[;m]")
	for _, tt := range []struct {
		name    string
		environ []string
		want    bool
	}{
		{"colours", nil, true},
		{"NO_COLOR=1", []string{"NO_COLOR=1"}, false},
		{"NO_COLOR of any value", []string{"NO_COLOR=please"}, false},
		{"NO_COLOR empty", []string{"NO_COLOR="}, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			keys, out, result := runScreen(t.Context(), t, newFakeDesk(), tt.environ...)
			out.await(t, "billing")
			_, _ = keys.Write([]byte("o")) // says something, in green
			out.await(t, "No replay")
			_, _ = keys.Write([]byte("q"))
			if err := wait(t, result); err != nil {
				t.Fatal(err)
			}
			if got := colour.MatchString(out.String()); got != tt.want {
				t.Errorf("colours: %t, want %t\n%q", got, tt.want, out.String())
			}
		})
	}
}
