package triage_test

import (
	"context"
	"errors"
	"reflect"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

func entryOf(data string) *dlq.Entry {
	e := sampleEntry()
	e.Data = []byte(data)
	return e
}

func lines(n int) string {
	return `{"currency":"EUR","lines":[` + strings.Repeat(`{"currency":"EUR","amount":1},`, n) + `{"currency":"EUR","amount":1}]}`
}

// A loop over the payload once took 13 s: the payload was decoded in each step.
func TestQuery_largePayload(t *testing.T) {
	t.Parallel()
	const n = 50_000
	e := entryOf(lines(n))
	for text, want := range map[string]bool{
		`payload.lines.exists(l, l.currency != payload.currency)`: false,
		`payload.lines.all(l, l.currency == payload.currency)`:    true,
		`payload.lines.exists(l, l.amount > 1)`:                   false,
		`payload.lines.all(l, has(payload.currency))`:             true,
		`payload.lines.size() == 50001`:                           true,
		`payload.lines.all(l, "currency" in payload)`:             true,
		`payload == payload`:                                      true,
	} {
		q, err := triage.Compile(text)
		must(t, err)
		if got, err := q.Match(e); err != nil || got != want {
			t.Errorf("%s is %v, %v, want %v", text, got, err, want)
		}
	}
}

// What costs something to make is made once for a dead letter.
func TestQuery_once(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"payload", "headers", "stack", "group"} {
		e := entryOf(`{"a":1}`)
		first, second := triage.ResolveTwice(e, name, func() {
			e.Data, e.Header, e.Failure.Stack = []byte(`{"a":2}`), nats.Header{"b": {"1"}}, []string{"other"}
			e.Failure.Error, e.Consumer = "something else", "other"
		})
		if !reflect.DeepEqual(first, second) {
			t.Errorf("%s is %v, and then %v", name, first, second)
		}
	}
}

// Whatever a query does with a large payload is counted.
func TestQuery_cutOff(t *testing.T) {
	t.Parallel()
	large := entryOf(lines(20_000))
	deep := entryOf(`{"l":[` + strings.Repeat(`[[1,2,3],{"a":[1]}],`, 2000) + `0]}`)
	huge := entryOf(`{"a":"` + strings.Repeat("x", 40<<20) + `"}`)
	for _, tt := range []struct {
		text string
		e    *dlq.Entry
	}{
		{`payload.lines.all(l, payload.lines.all(m, l == m))`, large},
		{`payload.lines.all(l, payload == payload)`, large},
		{`payload.lines.all(l, payload.lines == payload.lines)`, large},
		{`payload.lines.all(l, !(payload.lines != payload.lines))`, large},
		{`payload.lines.all(l, l in payload.lines && payload.lines[0] in payload.lines)`, large},
		{`payload.lines.all(l, !(1 in payload.lines))`, large},
		{`payload.lines.all(l, [payload, payload] == [payload, payload])`, large},
		{`payload.lines.all(l, {"a": payload} == {"a": payload})`, large},
		{`payload.l.all(a, payload.l.all(b, a != [] || b != []))`, deep},
		{`payload.l.map(a, payload.l.map(b, a == b)).size() > 0`, deep},
		{`payload.a != ""`, huge},
		{`has(payload.b)`, huge},
	} {
		q, err := triage.Compile(tt.text)
		must(t, err)
		if ok, err := q.Match(tt.e); ok || !triage.CutOff(err) {
			t.Errorf("%s is %v, %v, want it cut off", tt.text, ok, err)
		}
	}
}

// A query ends when its context does, and so does the list that it is for.
func TestQuery_cancelled(t *testing.T) {
	t.Parallel()
	e := entryOf(lines(1000))
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(stopped)
	for _, text := range []string{
		`payload.lines.exists(l, l.currency != payload.currency)`,
		`payload.lines.all(l, l.amount == 1)`,
		`payload.lines.exists_one(l, l.amount == 2)`,
		`payload.lines.map(l, l.amount).size() > 1`,
		`payload.lines.filter(l, l.amount > 1).size() == 0`,
		`[1, 2].all(x, payload.lines.all(l, l.amount > 0))`,
		`payload.lines.all(l, payload.lines.all(m, l == m))`,
	} {
		q, err := triage.Compile(text)
		must(t, err)
		if ok, err := triage.MatchUntil(ctx, q, e); ok || !errors.Is(err, stopped) {
			t.Errorf("%s is %v, %v, want it stopped", text, ok, err)
		}
	}
}

// The list ends with the reason, and not as if nothing had matched.
func TestEntries_cancelledQuery(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 3, func(r *dlq.Record) { r.Data = []byte(lines(1000)) })
	q, err := triage.Compile(`payload.lines.all(l, l.amount == 1) && group != ""`)
	must(t, err)
	for name, sel := range map[string]triage.Selection{"all": {Where: q}, "by ID": {Where: q, IDs: ids}} {
		ctx, cancel := context.WithCancel(within(t))
		desk := b.open(t, triage.Config{Fingerprint: func(*dlq.Entry) string {
			cancel()
			return ""
		}})
		var last error
		for e, err := range desk.Entries(ctx, sel, false) {
			if e != nil {
				t.Errorf("%s: dead letter %s is listed", name, e.ID)
			}
			last = err
		}
		if !errors.Is(last, context.Canceled) {
			t.Errorf("%s: the list has ended with %v, want that it was cancelled", name, last)
		}
	}
}
