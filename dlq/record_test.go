package dlq

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"maps"
	"net/textproto"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go"
)

var update = flag.Bool("update", false, "write the golden files, and the parts of docs/dead-letter-format.md that quote them")

var created = time.Date(2026, 11, 2, 8, 30, 0, 123456789, time.UTC)

// fullRecord is a small message whose last attempt panicked.
func fullRecord() *Record {
	return &Record{
		ID:         ID("orders", created, "billing_orders_created_v1", 4711),
		Reason:     ReasonPanic,
		ReasonText: "gave up after 5 attempts",

		Subject: "orders.created.v1",
		Header: nats.Header{
			"Content-Type": {"application/json"},
			"Nats-Msg-Id":  {"order-7"},
			"Tenant":       {"blue", "grün"},
			"X-Signature":  {"\xff\x00\x01"},
			"traceparent":  {"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"},
		},
		Data:     []byte(`{"order":7,"amount":99.5}`),
		BodySize: 25,

		Event:            "orders/created/v1",
		Stream:           "orders",
		StreamCreated:    created,
		StreamSequence:   4711,
		Consumer:         "billing_orders_created_v1",
		ConsumerSequence: 5120,
		Deliveries:       5,
		Stored:           created.Add(time.Hour),
		FirstFailed:      created.Add(time.Hour + 20*time.Millisecond),
		Failed:           created.Add(time.Hour + 31*time.Second),

		Error:      "panic: runtime error: index out of range [3] with length 3\nwhile pricing <order 7>",
		ErrorType:  "mono.PanicError",
		ErrorTypes: []string{"*mono.PanicError", "runtime.boundsError"},
		Stack: []string{
			"goroutine 42 [running]:",
			"example.com/shop/billing.(*Prices).Of(...)",
			"\t/src/shop/billing/prices.go:88",
		},

		Traceparent:       "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
		OriginTraceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",

		App: "shop", AppVersion: "1.4.2", Module: "billing", Host: "node-3",
	}
}

// largeRecord is a large message of a consumer that is not ours.
func largeRecord() *Record {
	id := ID("orders", created, "reports", 4712)
	return &Record{
		ID:            id,
		Reason:        ReasonExternalMaxDeliver,
		Subject:       "orders.created.v1",
		HeadersObject: id + ".headers",
		Body:          BodyObject,
		BodyObject:    id,
		BodySize:      1 << 20,

		Stream:         "orders",
		StreamCreated:  created,
		StreamSequence: 4712,
		Consumer:       "reports",
		Deliveries:     10,
		Stored:         created.Add(time.Hour),
		Failed:         created.Add(2 * time.Hour),
	}
}

func marshal(t *testing.T, r *Record) string {
	t.Helper()
	s := &Store{}
	var b strings.Builder
	fmt.Fprintf(&b, "Subject: %s\n\n", s.Subject(r.Stream, r.Consumer, r.ID))
	h := r.header()
	for _, key := range slices.Sorted(maps.Keys(h)) {
		for _, v := range h[key] {
			fmt.Fprintf(&b, "%s: %s\n", key, v)
		}
	}
	fmt.Fprintf(&b, "\n%s\n", r.Data)
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// overWire returns what a reader gets when a writer sends a header, which nats.go
// sends without line ends and without space around the values.
func overWire(tb testing.TB, h nats.Header) nats.Header {
	tb.Helper()
	var b strings.Builder
	b.WriteString("NATS/1.0\r\n")
	oneLine := strings.NewReplacer("\r", " ", "\n", " ")
	for key, values := range h {
		for _, v := range values {
			b.WriteString(key + ": " + oneLine.Replace(textproto.TrimString(v)) + "\r\n")
		}
	}
	b.WriteString("\r\n")
	got, err := nats.DecodeHeadersMsg([]byte(b.String()))
	if err != nil {
		tb.Fatalf("%v in header %q", err, b.String())
	}
	return got
}

// headerNames are the values of the package's Header constants.
func headerNames(t *testing.T) []string {
	t.Helper()
	file, err := parser.ParseFile(gotoken.NewFileSet(), "record.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, "Header") || len(spec.Values) != 1 {
			return true
		}
		name, err := strconv.Unquote(spec.Values[0].(*ast.BasicLit).Value)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
		return true
	})
	if len(names) < 20 {
		t.Fatalf("found only %d header names", len(names))
	}
	return names
}

func goldenFiles() map[string]*Record {
	return map[string]*Record{"testdata/record.golden": fullRecord(), "testdata/large.golden": largeRecord()}
}

// TestRecord_golden pins the format: readers in other languages rely on it, and
// records of older versions stay for years.
func TestRecord_golden(t *testing.T) {
	t.Parallel()

	var all strings.Builder
	for path, record := range goldenFiles() {
		got := marshal(t, record)
		all.WriteString(got)
		if *update {
			if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), got); diff != "" {
			t.Errorf("the format of %s has changed, which readers do not expect (-want +got):\n%s", path, diff)
		}
	}
	for _, name := range headerNames(t) {
		if !strings.Contains(all.String(), "\n"+name+": ") {
			t.Errorf("header %s is in no golden file", name)
		}
		if !strings.HasPrefix(name, headerPrefix) || strings.HasSuffix(name, "Nats-Msg-Id") {
			t.Errorf("header %s does not begin with %s or ends in Nats-Msg-Id", name, headerPrefix)
		}
	}
}

// TestRecord_page keeps docs/dead-letter-format.md true.
func TestRecord_page(t *testing.T) {
	t.Parallel()

	const path = "../docs/dead-letter-format.md"
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	page := string(content)
	for golden, record := range goldenFiles() {
		name := strings.TrimPrefix(golden, "testdata/")
		quote := regexp.MustCompile("(?s)(<!-- from dlq/testdata/" + regexp.QuoteMeta(name) + " -->\n+```text\n)(.*?)(```)")
		m := quote.FindStringSubmatchIndex(page)
		if m == nil {
			t.Errorf("the page does not quote %s", golden)
			continue
		}
		want := marshal(t, record)
		if *update {
			page = page[:m[4]] + want + page[m[5]:]
			continue
		}
		if diff := cmp.Diff(want, page[m[4]:m[5]]); diff != "" {
			t.Errorf("the page quotes %s as it was before (-want +got); go test ./dlq -run TestRecord -update:\n%s", golden, diff)
		}
	}
	if *update && page != string(content) {
		if err := os.WriteFile(path, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	names := headerNames(t)
	for _, reason := range Reasons() {
		names = append(names, string(reason))
	}
	for _, place := range []BodyPlace{BodyObject, BodyOmitted, BodyGone} {
		names = append(names, string(place))
	}
	for _, name := range names {
		if !strings.Contains(page, "`"+name+"`") {
			t.Errorf("the page does not explain %s", name)
		}
	}
}

func TestRecord_roundTrip(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		give *Record
		want func(r *Record) // changes what was given to what is read, if that differs
	}{
		{name: "full", give: fullRecord()},
		{name: "large", give: largeRecord()},
		{name: "only what must be", give: &Record{ID: "a"}},
		{name: "empty body", give: &Record{ID: "a", Reason: ReasonTerminated, Data: []byte{}}},
		{name: "binary body", give: &Record{ID: "a", Data: []byte("\x00\r\n\xff"), BodySize: 4}},
		{name: "body omitted", give: &Record{ID: "a", Body: BodyOmitted, BodySize: 12}},
		{name: "body gone", give: &Record{ID: "a", Body: BodyGone}},
		{name: "binary header keys and values", give: &Record{ID: "a", Header: nats.Header{
			"\xff\xfe":   {"\x00\xff", "text", ""},
			"text":       {"\xc3\x28", "\r\nNats-TTL: 1s\r\n", " spaces "},
			"":           {"no key"},
			"k\x00":      {"\u2028<&>\"\\"},
			"Dlq-Id":     {"not ours"},
			"Dlq-Header": {"a dead letter's dead letter"},
		}}},
		{name: "header without values", give: &Record{ID: "a", Header: nats.Header{"A": {}, "B": {""}}}, want: func(r *Record) {
			delete(r.Header, "A")
		}},
		{name: "control headers", give: &Record{ID: "a", Header: controlHeaders()}},
		{name: "invalid UTF-8", give: &Record{
			ID: "a", Error: "bad \xff byte\nsecond\r\nline\x00\u2028", ReasonText: "\xc3", Stack: []string{"a\xffb", ""}, ErrorTypes: []string{"\xff"},
		}, want: func(r *Record) {
			r.Error, r.ReasonText = "bad \ufffd byte\nsecond\r\nline\x00\u2028", "\ufffd"
			r.Stack, r.ErrorTypes = []string{"a\ufffdb", ""}, []string{"\ufffd"}
		}},
		{name: "lines in names", give: &Record{ID: "a", App: " a\r\nNats-TTL: 1s\n", Host: "\x7f\x00h\xff"}, want: func(r *Record) {
			r.App, r.Host = "a  Nats-TTL: 1s", "h\ufffd"
		}},
		{name: "large numbers", give: &Record{ID: "a", StreamSequence: 1<<64 - 1, ConsumerSequence: 1<<64 - 1, Deliveries: 1<<64 - 1}},
		{name: "time in another zone", give: &Record{ID: "a", Failed: created.In(time.FixedZone("", 3600)), Stored: time.Unix(0, 1)}},
		{name: "unknown reason and fields", give: &Record{ID: "a", Reason: "eaten_by_dog", Unknown: nats.Header{
			"Dlq-Breed": {"beagle", "boxer"}, "Dlq-Empty": {""},
		}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			h := tt.give.header()
			for key, values := range h {
				for _, v := range values {
					if v != strings.TrimSpace(v) || strings.ContainsAny(v, "\r\n\x00") || !utf8.ValidString(v) {
						t.Errorf("%s is %q, which is not fit for a header", key, v)
					}
				}
			}
			got, err := Decode(overWire(t, h), tt.give.Data)
			if err != nil {
				t.Fatal(err)
			}
			want := *tt.give
			if tt.want != nil {
				tt.want(&want)
			}
			if diff := cmp.Diff(&want, got, cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("Decode(header()) (-want +got):\n%s", diff)
			}
		})
	}
}

// controlHeaders are those that steer the server when they are on a message.
func controlHeaders() nats.Header {
	return nats.Header{
		"Nats-Msg-Id":                                 {"order-7"},
		"Nats-TTL":                                    {"1s"},
		"Nats-Expected-Stream":                        {"elsewhere"},
		"Nats-Expected-Last-Sequence":                 {"17"},
		"Nats-Expected-Last-Subject-Sequence":         {"17"},
		"Nats-Expected-Last-Subject-Sequence-Subject": {"a.b"},
		"Nats-Expected-Last-Msg-Id":                   {"order-6"},
		"Nats-Rollup":                                 {"all"},
		"Nats-Marker-Reason":                          {"MaxAge"},
		"Nats-Schedule":                               {"@every 1s"},
		"Nats-Schedule-Target":                        {"a.b"},
		"Nats-Schedule-Source":                        {"a.c"},
		"Nats-Schedule-TTL":                           {"1s"},
		"Nats-Schedule-Time-Zone":                     {"Europe/Vienna"},
		"Nats-Schedule-Rollup":                        {"sub"},
		"Nats-Scheduler":                              {"a.b"},
		"Nats-Schedule-Next":                          {"purge"},
		"Nats-Batch-Id":                               {"b"},
		"Nats-Batch-Sequence":                         {"1"},
		"Nats-Batch-Commit":                           {"1"},
		"Nats-Incr":                                   {"+1"},
		"Nats-Counter-Sources":                        {"{}"},
		"Nats-Stream-Source":                          {"elsewhere 1"},
		"Nats-Trace-Dest":                             {"trace.to"},
		"Nats-Trace-Only":                             {"true"},
		"Nats-Required-Api-Level":                     {"99"},
		"Nats-Request-Info":                           {"{}"},
		"Nats-Stream":                                 {"elsewhere"},
		"Nats-Subject":                                {"a.b"},
		"Nats-Sequence":                               {"17"},
		"Nats-Time-Stamp":                             {"2026-01-02T03:04:05Z"},
		"Status":                                      {"503"},
	}
}

func TestDecode_brokenFields(t *testing.T) {
	t.Parallel()

	broken := map[string]struct {
		give string
		zero func(r *Record) // makes what cannot be read zero
	}{
		HeaderVersion:          {"one", func(*Record) {}},
		HeaderReasonText:       {`"half`, func(r *Record) { r.ReasonText = "" }},
		HeaderHeaders:          {`[{"k":1}]`, func(r *Record) { r.Header = nil }},
		HeaderStreamCreated:    {"yesterday", func(r *Record) { r.StreamCreated = time.Time{} }},
		HeaderStreamSequence:   {"-1", func(r *Record) { r.StreamSequence = 0 }},
		HeaderConsumerSequence: {"0x10", func(r *Record) { r.ConsumerSequence = 0 }},
		HeaderDeliveries:       {"99999999999999999999", func(r *Record) { r.Deliveries = 0 }},
		HeaderStored:           {"1700000000", func(r *Record) { r.Stored = time.Time{} }},
		HeaderFirstFailed:      {"2026-13-01T00:00:00Z", func(r *Record) { r.FirstFailed = time.Time{} }},
		HeaderFailed:           {"9999-12-31T23:59:59-01:00", func(r *Record) { r.Failed = time.Time{} }},
		HeaderError:            {`["text"]`, func(r *Record) { r.Error = "" }},
		HeaderErrorTypes:       {`["a",2]`, func(r *Record) { r.ErrorTypes = nil }},
		HeaderStack:            {`{}`, func(r *Record) { r.Stack = nil }},
	}
	check := func(t *testing.T, give map[string]string, want *Record) {
		t.Helper()
		h := fullRecord().header()
		for key, v := range give {
			h.Set(key, v)
		}
		got, err := Decode(h, want.Data)
		if errors.Is(err, ErrNotARecord) {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("(-want +got):\n%s", diff)
		}
		for key := range give {
			if err == nil || strings.Count(err.Error(), "header "+key+" ") != 1 {
				t.Errorf("the error does not name %s once: %v", key, err)
			}
		}
		if err != nil && strings.Count(err.Error(), "\n")+1 != len(give) {
			t.Errorf("want an error for each of %d headers, got %v", len(give), err)
		}
	}

	all, none := make(map[string]string), fullRecord()
	for key, tt := range broken {
		all[key] = tt.give
		tt.zero(none)
		t.Run(key, func(t *testing.T) {
			t.Parallel()
			want := fullRecord()
			tt.zero(want)
			check(t, map[string]string{key: tt.give}, want)
		})
	}
	t.Run("all at once", func(t *testing.T) {
		t.Parallel()
		check(t, all, none)
	})
	t.Run("body size", func(t *testing.T) {
		t.Parallel()
		for _, give := range []string{"-1", "99999999999999999999", "1 MiB"} {
			h := largeRecord().header()
			h.Set(HeaderBodySize, give)
			r, err := Decode(h, nil)
			if r == nil || r.BodySize != 0 || err == nil || !strings.Contains(err.Error(), HeaderBodySize) {
				t.Errorf("body size %q: Decode() = %+v, %v; want 0 and an error that names the header", give, r, err)
			}
		}
	})
	t.Run("errors are short", func(t *testing.T) {
		t.Parallel()
		h := fullRecord().header()
		for key := range broken {
			h.Set(key, strings.Repeat("9", 10_000))
		}
		if _, err := Decode(h, nil); err == nil || len(err.Error()) > 300*len(broken) {
			t.Errorf("want short errors, got %.1000s…", fmt.Sprint(err))
		}
	})
}

func TestDecode_notARecord(t *testing.T) {
	t.Parallel()

	without := func(key string) nats.Header {
		h := fullRecord().header()
		delete(h, key)
		return h
	}
	tests := []struct {
		name string
		give nats.Header
	}{
		{name: "nil"},
		{name: "another message", give: nats.Header{"Content-Type": {"text/plain"}}},
		{name: "no version", give: without(HeaderVersion)},
		{name: "no ID", give: without(HeaderID)},
		{name: "empty ID", give: nats.Header{HeaderVersion: {"1"}, HeaderID: {""}}},
		{name: "blank ID", give: nats.Header{HeaderVersion: {"1"}, HeaderID: {"\x01 \x02"}}},
		{name: "no values", give: nats.Header{HeaderVersion: {"1"}, HeaderID: {}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if r, err := Decode(tt.give, []byte("x")); r != nil || !errors.Is(err, ErrNotARecord) {
				t.Errorf("Decode() = %v, %v, want nil and ErrNotARecord", r, err)
			}
		})
	}
}

func TestDecode_newerVersion(t *testing.T) {
	t.Parallel()
	want := fullRecord()
	h := want.header()
	h.Set(HeaderVersion, "2")
	got, err := Decode(h, want.Data)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestID(t *testing.T) {
	t.Parallel()

	const want = "7i5gpl5kkqjmbqpryu4thu25"
	if got := ID("orders", created, "billing_orders_created_v1", 4711); got != want {
		t.Errorf("ID() = %s, want %s: what is captured already would be captured again", got, want)
	}
	if got := ID("orders", created.In(time.FixedZone("", 3600)), "billing_orders_created_v1", 4711); got != want {
		t.Errorf("in another time zone ID() = %s, want %s", got, want)
	}
	seen := make(map[string]string)
	for _, stream := range []string{"", "a", "ab", "abc", "a\x00", "\x00a"} {
		for _, consumer := range []string{"", "c", "bc", "abc", "\x00"} {
			for _, at := range []time.Time{{}, time.Unix(0, 0), time.Unix(0, 1), created, created.Add(time.Nanosecond)} {
				for _, seq := range []uint64{0, 1, 256, 1 << 32, 1<<64 - 1} {
					what := fmt.Sprintf("%q %q %v %d", stream, consumer, at, seq)
					id := ID(stream, at, consumer, seq)
					if other, ok := seen[id]; ok {
						t.Errorf("%s and %s are both %s", what, other, id)
					}
					seen[id] = what
					if !idPattern.MatchString(id) {
						t.Errorf("%s is %q, want 24 characters of a-z and 2-7", what, id)
					}
				}
			}
		}
	}
}

var idPattern = regexp.MustCompile("^[a-z2-7]{24}$")

func TestReasons(t *testing.T) {
	t.Parallel()
	got := Reasons()
	want := []Reason{
		"terminated", "permanent_error", "attempts_exhausted", "panic", "crashed", "undecodable",
		"external_max_deliver", "external_terminated", "expired",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("reasons are on the wire (-want +got):\n%s", diff)
	}
}

func FuzzDecode(f *testing.F) {
	add := func(h nats.Header, data []byte) {
		var b strings.Builder
		for key, values := range h {
			for _, v := range values {
				b.WriteString(key + ": " + v + "\r\n")
			}
		}
		f.Add(b.String(), data)
	}
	add(fullRecord().header(), fullRecord().Data)
	add(largeRecord().header(), nil)
	for _, line := range []string{
		"Dlq-Failed: 9999-12-31T23:59:59-01:00", "Dlq-Failed: 0000-01-01T00:00:00+01:00", "Dlq-Deliveries: 99999999999999999999",
		"Dlq-Body: object\r\nDlq-Body-Size: -7", "Dlq-Body: \x01gone", "Dlq-App: \u00a0\x01\xff", "Dlq-Headers: null", "Dlq-Headers: [null,{\"k64\":\"YQ==\",\"v64\":\"\"}]",
		"Dlq-Stack: [null]", "Dlq-Error: \"\\ud800\"", "Dlq-Error: \"\xff\"", "Dlq-New: \xff\r\nDlq-New: b", "Dlq-Version: 2", "Dlq-Subject: a\rb",
	} {
		f.Add("Dlq-Version: 1\r\nDlq-Id: a\r\n"+line+"\r\n", []byte("body"))
	}
	f.Fuzz(func(t *testing.T, header string, data []byte) {
		h, err := nats.DecodeHeadersMsg([]byte("NATS/1.0\r\n" + header + "\r\n\r\n"))
		if err != nil {
			t.Skip()
		}
		got, err := Decode(overWire(t, h), data)
		if got == nil {
			if !errors.Is(err, ErrNotARecord) {
				t.Fatalf("no record and %v", err)
			}
			return
		}
		if errors.Is(err, ErrNotARecord) {
			t.Fatalf("a record and %v", err)
		}
		again, err := Decode(overWire(t, got.header()), got.Data)
		if err != nil {
			t.Fatalf("what was decoded does not decode once more: %v", err)
		}
		if diff := cmp.Diff(got, again, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("(-first +again):\n%s", diff)
		}
	})
}

func FuzzHeaders(f *testing.F) {
	f.Add("Content-Type", "text/plain", "Content-Type", "\xff", `[{"k":"a","v":"b"}]`)
	f.Add("", "", "\xff\xfe", "\x00\r\n", `[{"k":"a","k64":"Yg==","v64":"Yg=="},{}]`)
	f.Add("a", "\u2028<&>", "A", "\ufffd", "null")
	f.Fuzz(func(t *testing.T, k1, v1, k2, v2, text string) {
		check := func(h nats.Header) {
			t.Helper()
			s := encodeHeaders(h)
			if !json.Valid([]byte(s)) || !utf8.ValidString(s) || strings.ContainsAny(s, "\r\n") {
				t.Fatalf("%q is not fit for a header", s)
			}
			got, err := decodeHeaders(s)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(h, got, cmpopts.EquateEmpty()); diff != "" {
				t.Fatalf("(-want +got):\n%s", diff)
			}
		}
		h := nats.Header{}
		h[k1] = append(h[k1], v1)
		h[k2] = append(h[k2], v2)
		check(h)
		if h, err := decodeHeaders(text); err == nil {
			check(h)
		}
	})
}
