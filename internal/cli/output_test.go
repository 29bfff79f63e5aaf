package cli

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// hostile is what somebody may put into an error.
const hostile = "boom \x1b]0;owned\a\x1b[2J \u202etxt\r\nsecond line"

// entries are of every kind that a list has.
func entries() []*dlq.Entry {
	open := dlq.NewEntry(record(1), 11, nil)

	bad := record(2)
	bad.ID, bad.Error, bad.Consumer, bad.Data, bad.Reason, bad.Traceparent = "hostile\x1b[31m", hostile, "bill\u202eing", []byte{0xff, 0, 1}, dlq.ReasonPanic, "00-\x1b[2J"
	bad.Stack = []string{"goroutine 1", "\x1b[31mmain.go:12"}

	again := record(3)
	failure := record(3)
	failure.Error, failure.Failed, failure.Reason = "charge order 3: card refused", now.Add(-time.Minute), dlq.ReasonPermanentError
	history := []*dlq.Change{
		{Kind: dlq.ChangeEdited, From: dlq.StateOpen, Time: now.Add(-30 * time.Minute), Actor: "ada@desk", Reason: "wrong amount", Revision: 1, Diff: json.RawMessage(`{"amount":4}`), Sequence: 13},
		{Kind: dlq.ChangeReplaying, From: dlq.StateOpen, Time: now.Add(-20 * time.Minute), Actor: "ada@desk", Operation: "op-1", Target: "consumer", Sequence: 14},
		{Kind: dlq.ChangeFailedAgain, From: dlq.StateReplaying, Time: now.Add(-time.Minute), Actor: "shop", Operation: "op-1", Failure: failure, Sequence: 15},
	}
	return []*dlq.Entry{open, dlq.NewEntry(bad, 12, nil), dlq.NewEntry(again, 10, history)}
}

// list is entries with what cannot be read.
func listed() iter.Seq2[*dlq.Entry, error] {
	all := entries()
	return func(yield func(*dlq.Entry, error) bool) {
		_ = yield(all[0], nil) && yield(nil, fmt.Errorf("message 9: %w", dlq.ErrNotARecord)) &&
			yield(all[1], errors.New("header Dlq-Failed is \"\x1b\": want a time")) && yield(all[2], nil)
	}
}

func groupsOf() []triage.Group {
	return []triage.Group{
		{
			ID: "3f2a9c", Title: "charge order #: gateway timeout", Consumer: "billing", Stream: "ORDERS", ErrorType: "*billing.TimeoutError", Count: 1234,
			First: now.Add(-2 * time.Hour), Last: now.Add(-3 * time.Minute), PerHour: 617.25, Samples: []string{"a", "b"},
		},
		{ID: "77aa01", Title: hostile, Consumer: "mail", Stream: "ORDERS", Count: 1, First: now, Last: now, Regressed: true},
	}
}

func planOf() *triage.Plan {
	return &triage.Plan{
		ID: "20260102-150405-abcde", Created: now, Actor: "ada@desk",
		Options: triage.Options{Target: triage.TargetConsumer, Rate: 100, MaxInFlight: 50, Canary: []int{1, 5, 20}, StopIfFailing: 0.1, MaxReplays: 5, Reason: "billing is back", Patch: json.RawMessage(`{"amount":null}`)},
		Query:   `consumer == "billing"`, Upto: 99, Selected: 1235, Bytes: 40_000, Oldest: now.Add(-2 * time.Hour), Newest: now.Add(-time.Minute),
		Duration: 12350 * time.Millisecond, Groups: groupsOf(),
		Consumers: []triage.PlanConsumer{{Stream: "ORDERS", Consumer: "billing", Count: 1234, Waiting: 2}, {Stream: "ORDERS", Consumer: "mail", Count: 1, Paused: true, Pending: 12}},
		LeftOut:   map[string]int{"replayed 5 times or more already": 3, "discarded": 1},
		Warnings:  []string{"nobody fetches for consumer \"mail\x1b[2J\""}, Samples: entries(),
		Diffs: []triage.Diff{{ID: "abc", Before: "{\n  \"amount\": 3,\n  \"order\": \"\x1b[2J\"\n}", After: "{\n  \"order\": \"\x1b[2J\"\n}"}},
	}
}

func operationOf() *triage.Operation {
	return &triage.Operation{
		Plan: *planOf(), Status: triage.StatusStopped, Why: "12 of 100 outcomes are that it failed again", Started: now.Add(-time.Minute),
		Claimed: 120, Resolved: 88, FailedAgain: 12, Released: 1, Skipped: map[string]int{"discarded meanwhile": 2}, Remaining: 1113, NewSince: 7,
	}
}

// TestOutput pins what is printed: the names of fields are for scripts, and stay.
func TestOutput(t *testing.T) {
	t.Parallel()

	all := entries()
	current := *all[2].Record
	current.Data = []byte(`{"order":3,"amount":4}`)
	binary := *all[1].Record
	binary.Header = nats.Header{"X-\u202eOdd": {"\x1b[2J"}}
	events := []triage.Event{
		{ID: all[0].ID, Sequence: 11, Record: all[0].Record},
		{ID: all[2].ID, Sequence: 15, Change: all[2].History[2]},
		{ID: "hostile\x1b", Sequence: 16, Change: &dlq.Change{Kind: "new\x1b[2J", Actor: hostile, Time: now, Reason: hostile}},
	}
	const template = "http://localhost:16686/trace/{trace_id}"
	tests := map[string]func(c *cli) error{
		"ls":     func(c *cli) error { return c.listEntries(listed(), false, "") },
		"groups": func(c *cli) error { return c.listGroups(groupsOf(), "") },
		"show":   func(c *cli) error { return c.printThis(all[2], &current, nil, template, false) },
		"show_binary": func(c *cli) error {
			return c.printThis(all[1], &binary, errors.New("it is cut\x1b[2J"), template, false)
		},
		"show_no_payload": func(c *cli) error { return c.printThis(all[2], nil, nil, "", false) },
		"stats": func(c *cli) error {
			return c.printStats(&triage.Stats{
				Stream: "DLQ", States: map[dlq.State]int{dlq.StateOpen: 1234, dlq.StateResolved: 2}, Reasons: map[dlq.Reason]int{dlq.ReasonPanic: 234, dlq.ReasonCrashed: 1000},
				Consumers: map[string]int{"ORDERS/billing": 1233, "ORDERS/ma\x1bil": 1}, Oldest: all[2], Newest: all[0], Bytes: 12 << 20, MaxBytes: 1 << 30, Unreadable: 1,
			})
		},
		"stats_many": func(c *cli) error {
			return c.printStats(&triage.Stats{
				Stream: "DLQ", States: map[dlq.State]int{dlq.StateOpen: 121_233}, Reasons: map[dlq.Reason]int{dlq.ReasonPanic: 121_233},
				Consumers: map[string]int{"ORDERS/billing": 1233}, OtherConsumers: triage.Others{Count: 99_900, Open: 120_000}, MaxBytes: -1,
			})
		},
		"tail": func(c *cli) error {
			for _, ev := range events {
				if err := c.printEvent(ev); err != nil {
					return err
				}
			}
			return nil
		},
		"plan":       func(c *cli) error { return c.printDryRun(planOf(), "monotel dlq replay --plan "+planOf().ID, false) },
		"plan_diffs": func(c *cli) error { return c.printDryRun(planOf(), "monotel dlq replay --plan "+planOf().ID, true) },
		"plan_empty": func(c *cli) error {
			return c.printDryRun(&triage.Plan{ID: "x", LeftOut: map[string]int{"discarded": 1}}, "", false)
		},
		"plan_problem": func(c *cli) error {
			p := planOf()
			p.Problems = []string{`consumer "billing" of stream "ORDERS" is gone`}
			return c.printDryRun(p, "", false)
		},
		"operation": func(c *cli) error { return c.printOperation(operationOf()) },
		"outcome":   func(c *cli) error { return c.printOutcome(operationOf()) },
		"ops":       func(c *cli) error { return c.listOperations([]*triage.Operation{operationOf()}) },
		"doctor": func(c *cli) error {
			return c.printFindings([]dlq.Finding{
				{Severity: dlq.SeverityCritical, Check: "zombies", Stream: "ORDERS", Consumer: "billing", Count: 1200, Detail: "1200 messages are past\x1b[2J MaxDeliver", Remedy: "Capture them."},
				{Severity: dlq.SeverityNotice, Check: "paused", Stream: "ORDERS", Detail: "it is paused", Remedy: "Resume it."},
			})
		},
	}
	for name, write := range tests {
		for _, output := range outputs {
			t.Run(name+"/"+output, func(t *testing.T) {
				t.Parallel()
				var out, errs bytes.Buffer
				b := bare(t)
				b.now = func() time.Time { return now }
				c := &cli{process: b.process(&out, &errs), output: output}
				c.conn.changed = func(string) bool { return false }
				if err := write(c); err != nil {
					t.Fatal(err)
				}
				checkSafe(t, out.String())
				checkSafe(t, errs.String())
				got := out.String()
				if errs.Len() > 0 {
					got += "\n--- stderr\n" + errs.String()
				}
				for _, e := range all { // how failures are told apart is not decided here
					if id := triage.Fingerprint(e); id != "" {
						got = strings.ReplaceAll(got, id, strings.Repeat("g", len(id)))
					}
				}
				golden(t, name+"."+output, got)
				if output != outputTable {
					checkJSON(t, out.Bytes(), output)
				}
			})
		}
	}
}

// printThis is what show does with a dead letter.
func (c *cli) printThis(e *dlq.Entry, current *dlq.Record, problem error, template string, full bool) error {
	if c.output != outputTable {
		return c.writeJSON(viewWhole(e, current, problem, template))
	}
	return c.printWhole(e, current, problem, template, full)
}

func checkJSON(t *testing.T, b []byte, output string) {
	t.Helper()
	docs := [][]byte{b}
	if output == outputNDJSON {
		docs = bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n"))
	}
	if output == outputJSON && strings.Contains(t.Name(), "/tail/") {
		docs = bytes.Split(bytes.TrimSuffix(b, []byte("\n")), []byte("\n")) // it has no end
	}
	for _, doc := range docs {
		if !json.Valid(doc) {
			t.Errorf("this is no JSON:\n%s", doc)
		}
	}
}

// Payloads and header values are in no list.
func TestOutput_hasNoPayload(t *testing.T) {
	t.Parallel()
	r := record(1)
	r.Data, r.Header = []byte(`{"secret":"s3cret"}`), nats.Header{"Token": {"s3cret"}}
	e := dlq.NewEntry(r, 1, []*dlq.Change{{Kind: dlq.ChangeEdited, Diff: json.RawMessage(`{"secret":"s3cret"}`), Revision: 1}})
	p := planOf()
	p.Samples, p.Options.Patch = []*dlq.Entry{e}, json.RawMessage(`{"secret":"s3cret"}`)
	p.Diffs = []triage.Diff{{ID: r.ID, Before: "s3cret", After: "s3cret"}}
	for _, output := range outputs {
		t.Run(output, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			b := bare(t)
			c := &cli{process: b.process(&out, &out), output: output}
			c.conn.changed = func(string) bool { return false }
			for _, err := range []error{
				c.listEntries(inMemory([]*dlq.Entry{e}), false, ""), c.printThis(e, nil, nil, "", false), c.printDryRun(p, "", false),
				c.printOperation(&triage.Operation{Plan: *p}), c.printOutcome(&triage.Operation{Plan: *p}),
				c.printEvent(triage.Event{ID: r.ID, Record: r}), c.printEvent(triage.Event{ID: r.ID, Change: e.History[0]}),
			} {
				if err != nil {
					t.Fatal(err)
				}
			}
			if strings.Contains(out.String(), "s3cret") {
				t.Errorf("a payload was printed:\n%s", out.String())
			}
		})
	}
}

// A terminal has lines of its own width, and colours unless they are unwanted.
func TestTable_onTerminal(t *testing.T) {
	t.Parallel()

	list := func(t *testing.T, b *bundle) string {
		t.Helper()
		var out bytes.Buffer
		b.now = func() time.Time { return now }
		c := &cli{process: b.process(&out, &bytes.Buffer{}), output: outputTable}
		if err := c.listEntries(listed(), false, ""); err != nil {
			t.Fatal(err)
		}
		return out.String()
	}
	t.Run("width", func(t *testing.T) {
		t.Parallel()
		b := bare(t)
		b.width, b.env["NO_COLOR"] = 80, "1"
		out := list(t, b)
		checkSafe(t, out)
		for line := range strings.Lines(out) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 80 {
				t.Errorf("line has %d columns: %s", n, line)
			}
		}
		if !strings.Contains(out, "…") {
			t.Errorf("nothing is cut:\n%s", out)
		}
	})
	t.Run("colour", func(t *testing.T) {
		t.Parallel()
		b := bare(t)
		b.width = 200
		if out := list(t, b); !strings.Contains(out, "\x1b[31m") {
			t.Errorf("no colour on a terminal:\n%q", out)
		}
	})
	t.Run("no terminal", func(t *testing.T) {
		t.Parallel()
		out := list(t, bare(t))
		checkSafe(t, out)
		if !strings.Contains(out, "gateway timeout") || !strings.Contains(out, "second line") && !strings.Contains(out, "…") {
			t.Errorf("something is cut without a terminal:\n%s", out)
		}
	})
}

func TestTable_isAlignedBeyondItsFirstRows(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	c := &cli{process: bare(t).process(&out, &out)}
	tab := c.table(&out, "A", "B")
	for i := range alignRows + 10 {
		if err := tab.row(plain(fmt.Sprint(i)), plain("x")); err != nil {
			t.Fatal(err)
		}
	}
	if err := tab.flush(); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")
	if len(lines) != alignRows+11 {
		t.Fatalf("%d lines, want %d", len(lines), alignRows+11)
	}
	for _, line := range lines {
		if len(line) != len("509  x") {
			t.Errorf("not aligned: %q", line)
		}
	}
}

func TestPretty(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("ü", 20<<10)
	tests := []struct {
		name string
		give string
		full bool
		want string
		more bool
	}{
		{"JSON", `{"a":1.50,"b":[]}`, false, "{\n  \"a\": 1.50,\n  \"b\": []\n}", false},
		{"text", "hello\tworld\n", false, "hello\tworld\n", false},
		{"binary", "\x00\xff", false, "00000000  00 ff ", false},
		{"long text", long, false, "üü", true},
		{"long text whole", long, true, long, false},
		{"long binary", strings.Repeat("\xff", 1000), false, "000001f0", true},
		{"long binary whole", strings.Repeat("\xff", 1000), true, "000003e0", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, more := pretty([]byte(tt.give), tt.full)
			if !strings.Contains(got, tt.want) || (more > 0) != tt.more {
				t.Errorf("pretty = %.200q, %d more; want %.200q", got, more, tt.want)
			}
		})
	}
}
