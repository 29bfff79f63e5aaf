package dlq_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// goldenChanges are made one after the other, each with a file of its own.
func goldenChanges() []struct {
	golden string
	change dlq.Change
} {
	at := func(hours int) time.Time { return created.Add(time.Duration(hours) * time.Hour) }
	failure := dlq.FullRecord()
	failure.Reason, failure.ReasonText = dlq.ReasonPermanentError, ""
	failure.Error, failure.ErrorType, failure.ErrorTypes = "no price for \"order\"\n7", "*billing.PriceError", []string{"*billing.PriceError"}
	failure.StreamSequence, failure.ConsumerSequence, failure.Deliveries, failure.Stack = 4801, 5230, 1, nil
	failure.Stored, failure.FirstFailed, failure.Failed = at(24), time.Time{}, at(25)
	return []struct {
		golden string
		change dlq.Change
	}{
		{"testdata/change_replaying.golden", dlq.Change{
			Kind: dlq.ChangeReplaying, Time: at(24), Actor: "ann@ops", Reason: "prices are back", Operation: "op7", Target: "consumer",
		}},
		{"testdata/change_failed_again.golden", dlq.Change{
			Kind: dlq.ChangeFailedAgain, Time: at(25), Actor: "shop", Operation: "op7", Failure: failure,
		}},
		{"testdata/change_edited.golden", dlq.Change{
			Kind: dlq.ChangeEdited, Time: at(26), Actor: "bob@ops", Reason: "the amount was \"99,5\"\nof course", Revision: 1,
			Diff: json.RawMessage(`{"amount":100}`),
			Edit: &dlq.Record{Header: nats.Header{"Content-Type": {"application/json"}}, Data: []byte(`{"order":7,"amount":100}`), BodySize: 24},
		}},
		{"testdata/change_discarded.golden", dlq.Change{
			Kind: dlq.ChangeDiscarded, Time: at(27), Actor: "ann@ops", Reason: "a test order",
		}},
	}
}

// lastStored is the newest message of the dead-letter stream.
func (b *bundle) lastStored(t *testing.T) *jetstream.RawStreamMsg {
	t.Helper()
	all := b.stored(t)
	if len(all) == 0 {
		t.Fatal("nothing is stored")
	}
	return all[len(all)-1]
}

// captureEntry captures a record, which has to be new.
func (b *bundle) captureEntry(t *testing.T, s *dlq.Store, r *dlq.Record) *dlq.Entry {
	t.Helper()
	capture(t, s, r)
	return dlq.NewEntry(r, b.lastStored(t).Sequence, nil)
}

// change makes a change that has to succeed.
func change(t *testing.T, s *dlq.Store, e *dlq.Entry, c dlq.Change) {
	t.Helper()
	if err := s.Change(t.Context(), e, c, nil); err != nil {
		t.Fatal(err)
	}
}

// wireText is a stored message without the condition it was published on, and
// without what a direct get adds.
func wireText(m *jetstream.RawStreamMsg) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Subject: %s\n\n", m.Subject)
	for _, key := range slices.Sorted(maps.Keys(m.Header)) {
		for _, v := range m.Header[key] {
			if !strings.HasPrefix(key, "Nats-") || key == jetstream.MsgRollup {
				fmt.Fprintf(&b, "%s: %s\n", key, v)
			}
		}
	}
	fmt.Fprintf(&b, "\n%s\n", m.Data)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// TestChange_golden pins the format of changes, as [TestRecord_golden] does that
// of records, and reads them back.
func TestChange_golden(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	e := b.captureEntry(t, s, dlq.FullRecord())
	var all strings.Builder
	for _, tt := range goldenChanges() {
		change(t, s, e, tt.change)
		stored := b.lastStored(t)
		got := wireText(stored)
		all.WriteString(got)
		if *dlq.Update {
			if err := os.WriteFile(tt.golden, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(tt.golden)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("the format of %s has changed, which readers do not expect (-want +got):\n%s", tt.golden, diff)
		}
		if e.Last != stored.Sequence {
			t.Errorf("%s: the entry's last message is %d, want %d", tt.golden, e.Last, stored.Sequence)
		}
		r, err := dlq.Decode(stored.Header, stored.Data)
		if discarded := tt.change.Kind == dlq.ChangeDiscarded; discarded != (r != nil) || discarded == errors.Is(err, dlq.ErrNotARecord) {
			t.Errorf("%s: Decode() = %v, %v; only a trace is a record, too", tt.golden, r, err)
		}
	}
	if n := len(b.stored(t)); n != 1 {
		t.Errorf("%d messages are left of what was discarded, want 1", n)
	}
	if captured, err := s.Capture(t.Context(), dlq.FullRecord(), nil); captured || err != nil {
		t.Errorf("what was discarded is captured again: %v, %v", captured, err)
	}
	for _, name := range headersIn(t, "change.go") {
		if !strings.Contains(all.String(), "\n"+name+": ") {
			t.Errorf("header %s is in no golden file", name)
		}
	}
}

// headersIn are the headers that a file of the package declares.
func headersIn(t *testing.T, path string) []string {
	t.Helper()
	source, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^\tHeader\w+ += "(Dlq-[\w-]+)"`).FindAllStringSubmatch(string(source), -1) {
		names = append(names, m[1])
	}
	if len(names) < 7 {
		t.Fatalf("found only the headers %q in %s", names, path)
	}
	return names
}

func kinds() []dlq.ChangeKind {
	return []dlq.ChangeKind{
		dlq.ChangeReplaying, dlq.ChangeSent, dlq.ChangeReleased, dlq.ChangeResolved, dlq.ChangeFailedAgain,
		dlq.ChangeEdited, dlq.ChangeArchived, dlq.ChangeRestored, dlq.ChangeDiscarded,
	}
}

// TestChange_page keeps docs/dead-letter-format.md true.
func TestChange_page(t *testing.T) {
	t.Parallel()

	content, err := os.ReadFile("../docs/dead-letter-format.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(content)
	golden, err := os.ReadFile("testdata/change_failed_again.golden")
	if err != nil {
		t.Fatal(err)
	}
	if quote := "<!-- from dlq/testdata/change_failed_again.golden -->\n```text\n" + string(golden) + "```\n"; !strings.Contains(page, quote) {
		t.Errorf("the page does not have:\n%s", quote)
	}
	for _, name := range slices.Concat(headersIn(t, "change.go"), headersIn(t, "replay.go")) {
		if !strings.Contains(page, "| `"+name+"` |") {
			t.Errorf("the page does not explain %s", name)
		}
	}
	for _, kind := range kinds() {
		to := "`" + string((&dlq.Change{Kind: kind}).To()) + "`"
		if kind == dlq.ChangeEdited {
			to = "as it was"
		}
		if row := "| `" + string(kind) + "` | " + to + " |"; !strings.Contains(page, row) {
			t.Errorf("the page does not have the row %s", row)
		}
	}
}

func TestChange_roundTrip(t *testing.T) {
	t.Parallel()

	const id = "7i5gpl5kkqjmbqpryu4thu25"
	failure := func(edit func(r *dlq.Record)) *dlq.Record {
		r := dlq.FullRecord()
		edit(r)
		return r
	}
	tests := []struct {
		name string
		give dlq.Change
		want func(c *dlq.Change) // changes what was given to what is read, if that differs
	}{
		{name: "only what must be", give: dlq.Change{Kind: dlq.ChangeArchived}},
		{name: "everything", give: dlq.Change{
			Kind: dlq.ChangeReplaying, From: dlq.StateOpen, Time: created, Actor: "ann@ops", Reason: "fixed\nin \"1.4.3\" \x1b[31m",
			Operation: "op7", Target: "subject=orders.again", Revision: 3, Diff: json.RawMessage(`{"a":null}`),
		}},
		{name: "a kind of a newer version", give: dlq.Change{Kind: "translated", From: dlq.StateArchived}},
		{name: "lines in names", give: dlq.Change{
			Kind: dlq.ChangeSent, Actor: "a\r\nNats-TTL: 1s\x1b", Operation: "\xff", Target: " a\x00",
		}, want: func(c *dlq.Change) { c.Actor, c.Operation, c.Target = "a  Nats-TTL: 1s", "\ufffd", "a" }},
		{name: "time in another zone", give: dlq.Change{Kind: dlq.ChangeResolved, Time: created.In(time.FixedZone("", 3600))}},
		{name: "failure", give: dlq.Change{Kind: dlq.ChangeFailedAgain, Reason: "mine", Failure: failure(func(*dlq.Record) {})}, want: func(c *dlq.Change) {
			// The message is the record's.
			f := *c.Failure
			f.Subject, f.Header, f.Data, f.BodySize = "", nil, nil, 0
			c.Failure = &f
		}},
		{name: "failure of a large message", give: dlq.Change{
			Kind:    dlq.ChangeFailedAgain,
			Failure: &dlq.Record{ID: id, Error: "no", Body: dlq.BodyObject, BodyObject: id, BodySize: 1 << 20, HeadersObject: id + ".headers"},
		}, want: func(c *dlq.Change) { c.Failure = &dlq.Record{ID: id, Error: "no"} }},
		{name: "edit", give: dlq.Change{
			Kind: dlq.ChangeEdited, Revision: 1,
			Edit: &dlq.Record{ID: id, Header: nats.Header{"k": {"v", "\xff"}}, Data: []byte("\x00\r\n\xff"), BodySize: 4},
		}},
		{name: "large edit", give: dlq.Change{
			Kind: dlq.ChangeEdited, Revision: 2,
			Edit: &dlq.Record{ID: id, HeadersObject: id + ".h", Body: dlq.BodyObject, BodyObject: id + ".r2", BodySize: 1 << 20},
		}},
		{name: "broken diff", give: dlq.Change{Kind: dlq.ChangeArchived, Diff: json.RawMessage(`{"a":`)}, want: func(c *dlq.Change) { c.Diff = nil }},
		{name: "absurd revision", give: dlq.Change{Kind: dlq.ChangeArchived, Revision: math.MaxInt}, want: func(c *dlq.Change) { c.Revision = 0 }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var data []byte
			if tt.give.Edit != nil {
				data = tt.give.Edit.Data
			}
			h := dlq.OverWire(t, tt.give.WireHeader(id))
			if !dlq.IsChange(h) {
				t.Error("it is not taken for a change")
			}
			if r, err := dlq.Decode(h, data); !errors.Is(err, dlq.ErrNotARecord) {
				t.Errorf("Decode() = %v, %v: it is taken for a record", r, err)
			}
			got, err := dlq.DecodeChange(h, data)
			if err != nil {
				t.Fatal(err)
			}
			want := tt.give
			if tt.want != nil {
				tt.want(&want)
			}
			if diff := cmp.Diff(&want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func TestDecodeChange_notAChange(t *testing.T) {
	t.Parallel()
	for _, h := range []nats.Header{nil, {dlq.HeaderID: {"a"}}, {dlq.HeaderChange: {}}, {dlq.HeaderChange: {"\x01 "}}, {dlq.HeaderVersion: {"1"}, dlq.HeaderID: {"a"}}} {
		if c, err := dlq.DecodeChange(h, []byte("x")); c != nil || !errors.Is(err, dlq.ErrNotARecord) {
			t.Errorf("DecodeChange(%v) = %v, %v, want nil and ErrNotARecord", h, c, err)
		}
	}
}

func TestNewEntry(t *testing.T) {
	t.Parallel()

	r, second, third := record(1), &dlq.Record{Error: "second"}, &dlq.Record{Error: "third"}
	replaying := func(op string) *dlq.Change {
		return &dlq.Change{Kind: dlq.ChangeReplaying, Operation: op, Actor: "ann"}
	}
	failed := func(op string, f *dlq.Record) *dlq.Change {
		return &dlq.Change{Kind: dlq.ChangeFailedAgain, Operation: op, Actor: "shop", Failure: f}
	}
	kind := func(k dlq.ChangeKind) *dlq.Change { return &dlq.Change{Kind: k, Actor: "bob"} }
	tests := []struct {
		name    string
		history []*dlq.Change
		want    dlq.Entry
	}{
		{name: "nothing was done", want: dlq.Entry{State: dlq.StateOpen, Failure: r}},
		{
			name: "on its way", history: []*dlq.Change{replaying("op1")},
			want: dlq.Entry{State: dlq.StateReplaying, Failure: r, Operation: "op1", Actor: "ann", Replays: 1},
		},
		{
			name: "released", history: []*dlq.Change{replaying("op1"), kind(dlq.ChangeReleased)},
			want: dlq.Entry{State: dlq.StateOpen, Failure: r, Operation: "op1", Actor: "bob", Replays: 1},
		},
		{
			name: "sent to others", history: []*dlq.Change{{Kind: dlq.ChangeSent, Operation: "op1", Actor: "ann"}},
			want: dlq.Entry{State: dlq.StateSent, Failure: r, Operation: "op1", Actor: "ann"},
		},
		{
			name:    "the latest failure counts",
			history: []*dlq.Change{replaying("op1"), failed("op1", second), replaying("op2"), failed("op2", third), failed("op3", nil)},
			want:    dlq.Entry{State: dlq.StateOpen, Failure: third, Operation: "op3", Actor: "shop", Replays: 2, Failures: 3},
		},
		{
			name:    "failed again, edited, resolved",
			history: []*dlq.Change{replaying("op1"), failed("op1", second), {Kind: dlq.ChangeEdited, Revision: 1}, replaying("op2"), {Kind: dlq.ChangeResolved, Operation: "op2"}},
			want: dlq.Entry{
				State: dlq.StateResolved, Failure: second, Operation: "op2", Replays: 2, Failures: 1, Revision: 1, RevisionSequence: 13,
			},
		},
		{
			name: "an edit keeps the state, and its number goes up", history: []*dlq.Change{
				kind(dlq.ChangeArchived), {Kind: dlq.ChangeEdited, Revision: 4}, {Kind: dlq.ChangeEdited, Revision: 2}, {Kind: dlq.ChangeEdited},
			},
			want: dlq.Entry{State: dlq.StateArchived, Failure: r, Revision: 6, RevisionSequence: 14},
		},
		{
			name: "archived and restored", history: []*dlq.Change{kind(dlq.ChangeArchived), kind(dlq.ChangeRestored)},
			want: dlq.Entry{State: dlq.StateOpen, Failure: r, Actor: "bob"},
		},
		{
			name: "discarded", history: []*dlq.Change{kind(dlq.ChangeDiscarded)},
			want: dlq.Entry{State: dlq.StateDiscarded, Failure: r, Actor: "bob"},
		},
		{
			// What a change says it was before does not count.
			name: "kinds of a newer version keep the state", history: []*dlq.Change{
				kind(dlq.ChangeArchived), {Kind: "translated", From: dlq.StateReplaying, Actor: "eve"},
			},
			want: dlq.Entry{State: dlq.StateArchived, Failure: r, Actor: "eve"},
		},
		{
			name: "a discard is final", history: []*dlq.Change{
				kind(dlq.ChangeDiscarded), {Kind: dlq.ChangeRestored, Actor: "eve"}, {Kind: dlq.ChangeReplaying, Actor: "eve", Operation: "op"},
			},
			want: dlq.Entry{State: dlq.StateDiscarded, Failure: r, Actor: "bob"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			want := tt.want
			want.Record, want.Sequence, want.Last, want.History = r, 10, 10, tt.history
			for i, c := range tt.history {
				c.Sequence, c.Time = uint64(11+i), created.Add(time.Duration(i)*time.Minute)
				want.Last, want.Later = c.Sequence, append(want.Later, c.Sequence)
				if tt.name != "a discard is final" || i == 0 {
					want.Changed = c.Time
				}
			}
			if diff := cmp.Diff(&want, dlq.NewEntry(r, 10, tt.history)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}

func FuzzDecodeChange(f *testing.F) {
	for _, tt := range goldenChanges() {
		var b strings.Builder
		for key, values := range tt.change.WireHeader("a") {
			for _, v := range values {
				b.WriteString(key + ": " + v + "\r\n")
			}
		}
		f.Add(b.String(), []byte("body"))
	}
	for _, kind := range kinds() {
		f.Add("Dlq-Change: "+string(kind)+"\r\nDlq-Id: \x01\r\nDlq-Change-Revision: 9223372036854775807\r\nDlq-Change-Diff: {", []byte(nil))
		f.Add("Dlq-Change: "+string(kind)+"\r\nDlq-Version: 2\r\nDlq-Body: object\r\nDlq-Body-Size: 7\r\nDlq-Headers: [null]\r\nDlq-Change-Actor: \x1b[2J", []byte("x"))
	}
	f.Fuzz(func(t *testing.T, header string, data []byte) {
		h, err := nats.DecodeHeadersMsg([]byte("NATS/1.0\r\n" + header + "\r\n\r\n"))
		if err != nil {
			t.Skip()
		}
		c, err := dlq.DecodeChange(dlq.OverWire(t, h), data)
		if c == nil {
			if !errors.Is(err, dlq.ErrNotARecord) {
				t.Fatalf("no change and %v", err)
			}
			return
		}
		if err != nil {
			t.Fatalf("a change and %v", err)
		}
		for _, name := range []string{string(c.Kind), string(c.From), c.Actor, c.Operation, c.Target, string(c.Diff)} {
			if strings.ContainsFunc(name, func(r rune) bool { return r < ' ' || r == 0x7f }) {
				t.Errorf("%q is not fit for a terminal", name)
			}
		}
		want := c.WireHeader("a")
		again, err := dlq.DecodeChange(dlq.OverWire(t, want), data)
		if err != nil {
			t.Fatalf("what was decoded does not decode once more: %v", err)
		}
		if diff := cmp.Diff(want, again.WireHeader("a")); diff != "" {
			t.Errorf("(-first +again):\n%s", diff)
		}
		e := dlq.NewEntry(record(1), 1, []*dlq.Change{c, again})
		if e.Revision < 0 || e.Revision > 20_000 {
			t.Errorf("the revision is %d", e.Revision)
		}
	})
}
