package triage_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

func TestNormalize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]string{
		"charge card of order 8f14e45f-ceea-467f-9e6e-0c7d1b1a2b3c: dial tcp 10.0.3.17:5432: connect: connection refused": "charge card of order <id>: dial tcp <addr>: connect: connection refused",
		`customer "Müller GmbH" has no address (id=cus_9f8G7h)`:                                                           "customer <text> has no address (id=<value>)",
		"decode: json: cannot unmarshal string into Go struct field Order.amount of type int64 near offset 1234":          "decode: json: cannot unmarshal string into Go struct field Order.amount of type int# near offset #",
		"timeout after 12ms, 3.5s or 1h2m3.5s":                                                                            "timeout after #, # or #",
		"read 1,234,567 of 99% of 3.5MiB at 0xDEADBEEF and -5 and 1e-7":                                                   "read # of # of # at # and # and #",
		"no user ada@example.com at https://x.example/u/7?q=1":                                                            "no user <email> at <url>",
		"dial [2001:db8::1]:443 and fe80::1%eth0":                                                                         "dial [<addr>]:# and <addr>",
		"since 2026-11-25T18:35:07.123Z":                                                                                  "since <time>",
		"order7 and order1234 are the same, cus_9f8G7h and cus_aB3dE9 too":                                                "order# and order# are the same, cus_<id> and cus_<id> too",
		"OrderPlaced by HTTPServer of orderService":                                                                       "OrderPlaced by HTTPServer of orderService",
		"don't blank what isn't quoted":                                                                                   "don't blank what isn't quoted",
		"panic: runtime error: index out of range [3] with length 3":                                                      "panic: runtime error: index out of range [#] with length #",
		"  two\n\tlines  ": "two lines",
		"":                 "",
	} {
		got := triage.Normalize(text)
		if got != want {
			t.Errorf("%s\n is %s\nwant %s", text, got, want)
		}
		if again := triage.Normalize(got); again != got {
			t.Errorf("%s\nnormalised again is %s", got, again)
		}
	}
}

func FuzzNormalize(f *testing.F) {
	f.Add("charge order 7: \"x\" at 10.0.0.1:80")
	f.Add(`'"` + "`\xff\x00=1")
	f.Fuzz(func(t *testing.T, text string) {
		got := triage.Normalize(text)
		if len(got) > 3*1024 || strings.ContainsAny(got, "\n\x00") {
			t.Errorf("%q is %q", text, got)
		}
	})
}

// 2 000 failures of three causes are three groups.
func TestGroups_threeCauses(t *testing.T) {
	t.Parallel()
	b := setup(t)
	random := rand.New(rand.NewPCG(1, 2))
	letters := "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	id := func(n int) string {
		var s strings.Builder
		for range n {
			s.WriteByte(letters[random.IntN(len(letters))])
		}
		return s.String()
	}
	uuid := func() string {
		return fmt.Sprintf("%08x-%04x-%04x-%04x-%012x", random.Uint32(), random.IntN(1<<16), random.IntN(1<<16), random.IntN(1<<16), random.Int64N(1<<48))
	}
	names := []string{"Müller GmbH", "O\\\"Neil", "Ada", "株式会社", "a@b.example", ""}
	causes := [3]int{}
	b.capture(t, 2000, func(r *dlq.Record) {
		k := random.IntN(3)
		causes[k]++
		switch k {
		case 0:
			r.Error = fmt.Sprintf("charge card of order %s: dial tcp %d.%d.%d.%d:%d: connect: connection refused after %dms", uuid(),
				1+random.IntN(255), random.IntN(256), random.IntN(256), random.IntN(256), random.IntN(65536), random.IntN(100_000))
			r.ErrorType, r.ErrorTypes = "net.OpError", []string{"*fmt.wrapError", "*net.OpError"}
		case 1:
			r.Error = fmt.Sprintf("decode: json: cannot unmarshal string into Go struct field Order.amount of type int64 near offset %d", random.IntN(1_000_000))
			r.Reason, r.ErrorType, r.ErrorTypes = dlq.ReasonUndecodable, "json.UnmarshalTypeError", []string{"*json.UnmarshalTypeError"}
		default:
			r.Error = fmt.Sprintf("customer %q has no address (id=cus_%s) in %.2f s at %s", names[random.IntN(len(names))], id(6), random.Float64()*100,
				time.Unix(random.Int64N(1<<31), 0).UTC().Format(time.RFC3339))
			r.ErrorType, r.ErrorTypes = "errors.errorString", []string{"*errors.errorString"}
		}
	})
	groups, err := b.desk.Groups(within(t), triage.Selection{})
	must(t, err)
	if len(groups) != 3 {
		for _, g := range groups {
			t.Logf("%5d %s", g.Count, g.Title)
		}
		t.Fatalf("there are %d groups, want 3", len(groups))
	}
	slices.Sort(causes[:])
	for i, g := range groups {
		if g.Count != causes[2-i] || len(g.Samples) != 5 || g.Consumer != billing || g.First.After(g.Last) {
			t.Errorf("group %+v, want %d", g, causes[2-i])
		}
		if n := len(b.list(t, triage.Selection{Groups: []string{g.ID}})); n != g.Count {
			t.Errorf("group %s lists %d, want %d", g.ID, n, g.Count)
		}
	}
}

// Causes that differ in words stay apart, and so do consumers.
func TestFingerprint_apart(t *testing.T) {
	t.Parallel()
	seen := make(map[string]string)
	add := func(name string, change func(*dlq.Record)) {
		e := sampleEntry()
		change(e.Record)
		fp := triage.Fingerprint(e)
		if other, ok := seen[fp]; ok {
			t.Errorf("%s and %s are one group", name, other)
		}
		seen[fp] = name
	}
	add("order", func(r *dlq.Record) { r.Error = "order not found" })
	add("customer", func(r *dlq.Record) { r.Error = "customer not found" })
	add("another consumer", func(r *dlq.Record) { r.Error, r.Consumer = "order not found", "reports" })
	add("another type", func(r *dlq.Record) { r.Error, r.ErrorTypes = "order not found", []string{"*shop.Error"} })
	add("no error", func(r *dlq.Record) { r.Error, r.ErrorTypes = "", nil })
	add("no error, another reason", func(r *dlq.Record) { r.Error, r.ErrorTypes, r.Reason = "", nil, dlq.ReasonCrashed })
	stack := func(function, file string) []string {
		return []string{
			"goroutine 42 [running]:", "runtime/debug.Stack()", "\t/usr/local/go/src/runtime/debug/stack.go:26 +0x5e", "panic({0x1, 0x2})",
			"\t/usr/local/go/src/runtime/panic.go:860 +0x13a", "encoding/json.Unmarshal(...)", "\t/usr/local/go/src/encoding/json/decode.go:1",
			function + "(0xc000, 0x7)", "\t" + file + ":88 +0x1a", "github.com/monotel/monotel/mono.callHandler(...)", "\t/src/mono/x.go:1",
		}
	}
	add("one frame", func(r *dlq.Record) {
		r.Stack = stack("example.com/shop/billing.(*Prices).Of", "/src/shop/billing/prices.go")
	})
	add("another frame", func(r *dlq.Record) { r.Stack = stack("main.charge", "/src/shop/main.go") })
	// The line in the frame does not matter, nor do addresses.
	a, b := sampleEntry(), sampleEntry()
	a.Stack = stack("main.charge", "/src/shop/main.go")
	b.Stack = slices.Clone(a.Stack)
	b.Stack[7], b.Stack[8] = "main.charge(0xd000, 0x8)", "\t/src/shop/main.go:89 +0x2b"
	if triage.Fingerprint(a) != triage.Fingerprint(b) {
		t.Error("another line of the same function is another group")
	}
}

// A group whose entry was resolved, and that fails again, has regressed.
func TestGroups_regressed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 1)
	b.consume(t, billing, nil)
	b.run(t, b.plan(t, triage.Selection{}, triage.Options{}).ID)
	groups, err := b.desk.Groups(within(t), triage.Selection{})
	must(t, err)
	if len(groups) != 0 {
		t.Errorf("there are %+v", groups)
	}
	b.capture(t, 2, func(r *dlq.Record) { r.Failed = time.Now() })
	b.capture(t, 1, func(r *dlq.Record) { r.Error, r.Failed = "something else", time.Now() })
	groups, err = b.desk.Groups(within(t), triage.Selection{})
	must(t, err)
	if len(groups) != 2 || groups[0].Count != 2 || !groups[0].Regressed || groups[1].Regressed {
		t.Errorf("there are %+v, want the first regressed", groups)
	}
}

// A fingerprint that is another one for each entry does not eat the memory.
func TestGroups_bounded(t *testing.T) {
	t.Parallel()
	n := 0
	groups := triage.GroupAll(func(*dlq.Entry) string {
		n++
		return fmt.Sprint(n)
	}, 20_000, sampleEntry())
	if len(groups) != 10_001 || groups[0].ID != "other" || groups[0].Count != 10_000 {
		t.Errorf("there are %d groups, the first is %+v", len(groups), groups[0])
	}
}

func BenchmarkGroups(b *testing.B) {
	e := sampleEntry()
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		e.Error = fmt.Sprintf("charge card of order %d: dial tcp 10.0.3.%d:5432: connect: connection refused", i, i%256)
		triage.GroupAll(triage.Fingerprint, 1, e)
	}
}

func BenchmarkNormalize(b *testing.B) {
	text := "charge card of order 8f14e45f-ceea-467f-9e6e-0c7d1b1a2b3c: dial tcp 10.0.3.17:5432: connect: refused"
	b.ReportAllocs()
	for b.Loop() {
		triage.Normalize(text)
	}
}
