package triage_test

import (
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

func sampleEntry() *dlq.Entry {
	r := &dlq.Record{
		ID: "abc", Reason: dlq.ReasonAttemptsExhausted, Subject: "orders.created.v1", Event: "orders/created/v1", Stream: "orders", Consumer: "billing",
		Header: nats.Header{"Tenant": {"blue", "green"}, "X-Empty": {}},
		Data:   []byte(`{"amount":250,"id":9007199254740993,"ratio":0.5,"customer":{"name":"Ada"},"tags":["a","b"]}`), BodySize: 90,
		Error: "connect: timeout", ErrorType: "net.OpError", ErrorTypes: []string{"*net.OpError", "*os.SyscallError"},
		Stack: []string{"goroutine 1:", "main.main()"}, Deliveries: 5, StreamSequence: 7,
		Failed: time.Now().Add(-time.Hour), Stored: time.Now().Add(-2 * time.Hour), App: "shop", Module: "billing", Host: "n1",
	}
	return dlq.NewEntry(r, 12, nil)
}

func TestQuery(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]bool{
		`consumer == "billing" && error.contains("timeout") && payload.amount > 100 && age < duration("2h")`: true,
		`payload.amount > 100.5`:                                   true,
		`payload.amount == 250.0`:                                  true,
		`payload.ratio < 1`:                                        true,
		`payload.id == 9007199254740993`:                           true,
		`payload.id == 9007199254740992`:                           false,
		`payload.customer.name == "Ada"`:                           true,
		`"b" in payload.tags`:                                      true,
		`has(payload.customer)`:                                    true,
		`has(payload.nobody)`:                                      false,
		`headers["tenant"] == "blue"`:                              true,
		`"tenant" in headers && !("other" in headers)`:             true,
		`reason == "attempts_exhausted" || reason == "panic"`:      true,
		`state == "open" && replays == 0 && revision == 0`:         true,
		`error_types.exists(t, t.endsWith("SyscallError"))`:        true,
		`error.matches("^connect: [a-z]+$")`:                       true,
		`failed > timestamp("2020-01-01T00:00:00Z")`:               true,
		`stream_sequence == 7 && sequence == 12 && size == 90`:     true,
		`stack.contains("main.main")`:                              true,
		`group == "` + triage.Fingerprint(sampleEntry()) + `"`:     true,
		`deliveries >= 5 && app == "shop" && host.startsWith("n")`: true,
	} {
		q, err := triage.Compile(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got, err := q.Match(sampleEntry()); err != nil || got != want {
			t.Errorf("%s is %v, %v; want %v", text, got, err, want)
		}
		if want := strings.Contains(text, "payload"); q.UsesPayload() != want {
			t.Errorf("%s looks at the payload: %v, want %v", text, q.UsesPayload(), want)
		}
	}
}

// What cannot be told is no match, and says why.
func TestQuery_cannotBeTold(t *testing.T) {
	t.Parallel()
	for _, text := range []string{
		`payload.missing > 1`, `payload.amount > "1"`, `headers["none"] == "x"`, `payload`, `error.matches(payload.customer.name + "(")`,
	} {
		q, err := triage.Compile(text)
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if ok, err := q.Match(sampleEntry()); ok || err == nil {
			t.Errorf("%s: %v, %v; want no match and why", text, ok, err)
		}
	}
	e := sampleEntry()
	e.Data = []byte("not JSON")
	q, err := triage.Compile(`payload.contains("not")`)
	must(t, err)
	if ok, err := q.Match(e); err != nil || !ok {
		t.Errorf("a payload that is text: %v, %v", ok, err)
	}
}

// A query that does not compile is shown, with a caret under the place.
func TestCompile_errors(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		`consumr == "billing"`:         "query: there is no \"consumr\"; did you mean consumer?\nconsumr == \"billing\"\n^",
		`error == 1`:                   "error == 1\n      ^",
		`"漢字" == erorr`:                "\"漢字\" == erorr\n          ^",
		"state == \"open\" &&\n\tnope": "\n\tnope\n\t^",
		`age <`:                        "age <\n     ^",
		`deliveries`:                   "it is a int; want a condition",
		`zzz == 1`:                     "there are actor, age, app",
		``:                             "it is empty",
	} {
		_, err := triage.Compile(text)
		if !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("%q: %v, want ErrInvalid", text, err)
			continue
		}
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q says\n%v\nwant\n%s", text, err, want)
		}
	}
	for _, text := range []string{strings.Repeat("(", 5000), "\xff", strings.Repeat("[", 200) + strings.Repeat("]", 200) + " == []"} {
		if _, err := triage.Compile(text); !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("%.20q…: %v, want ErrInvalid", text, err)
		}
	}
}

// A query that would take for ever is cut off.
func TestQuery_cost(t *testing.T) {
	t.Parallel()
	e := sampleEntry()
	e.Data = []byte(`{"l":[` + strings.Repeat("1,", 2000) + `1]}`)
	q, err := triage.Compile(`payload.l.all(a, payload.l.all(b, payload.l.all(c, a + b + c > 0)))`)
	must(t, err)
	if ok, err := q.Match(e); ok || !triage.CutOff(err) {
		t.Errorf("it is %v, %v, want it cut off", ok, err)
	}
	const most = triage.QueryCost + triage.QueryCost/100 // the last step may be larger than what is left
	if cost := triage.CostOf(q, e); cost < triage.QueryCost || cost > most {
		t.Errorf("it was evaluated for %d, want it cut off at %d", cost, triage.QueryCost)
	}
}

// Each query of the page compiles.
func TestCompile_page(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../../docs/queries.md")
	must(t, err)
	blocks := regexp.MustCompile("(?s)```cel\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	const least = 10
	n := 0
	for _, b := range blocks {
		for text := range strings.SplitSeq(strings.TrimSpace(b[1]), "\n") {
			n++
			if _, err := triage.Compile(text); err != nil {
				t.Error(err)
			}
		}
	}
	if n < least {
		t.Errorf("the page has %d queries, want %d", n, least)
	}
	for _, name := range triage.Variables() {
		if !strings.Contains(string(page), "| `"+name+"` |") {
			t.Errorf("the page does not tell of variable %s", name)
		}
	}
}

func FuzzCompile(f *testing.F) {
	for _, text := range []string{`consumer == "billing"`, `payload.a.b[0] > 1`, `age < duration("2h")`, `error_types.exists(t, t == "x")`, "\t漢 &&"} {
		f.Add(text, []byte(`{"a":{"b":[2]}}`))
	}
	f.Fuzz(func(_ *testing.T, text string, data []byte) {
		q, err := triage.Compile(text)
		if err != nil {
			_ = err.Error()
			return
		}
		e := sampleEntry()
		e.Data = data
		_, _ = q.Match(e)
	})
}

func BenchmarkQuery(b *testing.B) {
	q, err := triage.Compile(`consumer == "billing" && error.contains("timeout") && age < duration("2h")`)
	must(b, err)
	e := sampleEntry()
	b.ReportAllocs()
	for b.Loop() {
		if ok, err := q.Match(e); err != nil || !ok {
			b.Fatal(ok, err)
		}
	}
}
