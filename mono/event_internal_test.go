package mono

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
)

// The names below are on servers and in other programs: a change of any line
// is a change of the wire contract.

func TestWireNames_subjects(t *testing.T) {
	t.Parallel()
	golden := []struct{ name, want string }{
		{"OrderCreated", "events.order.v1.order-created"},
		{"HTTPServerUp", "events.order.v1.http-server-up"},
		{"OrderCreatedV2", "events.order.v1.order-created-v2"},
		{"ServerHTTP", "events.order.v1.server-http"},
		{"HTTP", "events.order.v1.http"},
		{"A", "events.order.v1.a"},
		{"a", "events.order.v1.a"},
		{"AB", "events.order.v1.ab"},
		{"Ab", "events.order.v1.ab"},
		{"aB", "events.order.v1.a-b"},
		{"ABc", "events.order.v1.a-bc"},
		{"AaBb", "events.order.v1.aa-bb"},
		{"order", "events.order.v1.order"},
		{"orderCreated", "events.order.v1.order-created"},
		{"order_created", "events.order.v1.order-created"},
		{"order-created", "events.order.v1.order-created"},
		{"Order_Created", "events.order.v1.order-created"},
		{"Order-Created", "events.order.v1.order-created"},
		{"ORDER_CREATED", "events.order.v1.order-created"},
		{"Order__Created", "events.order.v1.order--created"},
		{"Order_", "events.order.v1.order-"},
		{"X509Expired", "events.order.v1.x509-expired"},
		{"Sha256Sum", "events.order.v1.sha256-sum"},
		{"SHA256Sum", "events.order.v1.sha256-sum"},
		{"Sha256sum", "events.order.v1.sha256sum"},
		{"OAuth2Token", "events.order.v1.o-auth2-token"},
		{"IPv6Up", "events.order.v1.i-pv6-up"},
		{"2FAEnabled", "events.order.v1.2-fa-enabled"},
		{"404", "events.order.v1.404"},
		{"UserID", "events.order.v1.user-id"},
		{"UserIDs", "events.order.v1.user-i-ds"},
	}
	for _, g := range golden {
		e, err := NewEvent("order", g.name, "v1")
		if err != nil || e.Subject != g.want {
			t.Errorf("subject of %s is %q (%v), want %q", g.name, e.Subject, err, g.want)
		}
	}
}

func TestWireNames_durables(t *testing.T) {
	t.Parallel()
	event := func(module, name, version string, subject ...string) BaseEventDefinition {
		e, err := NewEvent(module, name, version, subject...)
		if err != nil {
			t.Fatal(err)
		}
		return e
	}
	golden := []struct {
		module string
		event  BaseEventDefinition
		want   string
	}{
		{"audit", event("order", "OrderCreated", "v1"), "audit_order_order-created_v1"},
		{"audit", event("order", "OrderCreated", "v2"), "audit_order_order-created_v2"},
		{"audit", event("order", "HTTPServerUp", "v1"), "audit_order_http-server-up_v1"},
		// An event's own subject is not part of it: it may move.
		{"audit", event("order", "OrderCreated", "v1", "shop.new"), "audit_order_order-created_v1"},
		{"order", event("order", "OrderCreated", "v1"), "order_order_order-created_v1"},
		{"Front-Desk_2", event("order", "Paid", "2024-05"), "Front-Desk_2_order_paid_2024-05"},
	}
	for _, g := range golden {
		got := durableName(g.module, g.event)
		if got != g.want {
			t.Errorf("durable name of module %s for %s is %q, want %q", g.module, g.event, got, g.want)
		}
		if err := checkStreamName(got); err != nil {
			t.Errorf("the server does not take it: %v", err)
		}
	}
}

func TestWireNames_fanOutStream(t *testing.T) {
	t.Parallel()
	event, err := NewEvent("order", "OrderCreated", "v1")
	if err != nil {
		t.Fatal(err)
	}
	queue := func(module, stream string) *streamRegistration {
		return &streamRegistration{
			info: Consumer{Module: module, Event: event, Stream: stream, Durable: durableName(module, event)},
			cfg:  StreamConsumerConfig{Stream: StreamConfig{Name: stream, Retention: WorkQueuePolicy}},
		}
	}
	plan, err := planTopology([]BaseEventDefinition{event}, []*streamRegistration{queue("a", "A"), queue("b", "B")}, nil, false)
	if err != nil {
		t.Fatal(err)
	}
	const want = "fanout_order_order-created_v1"
	if len(plan.fanOuts) != 1 || plan.fanOuts[0] != want {
		t.Errorf("fan-out streams are %q, want %q", plan.fanOuts, want)
	}
	for _, c := range plan.changes {
		role := streamRoleEvents
		if c.cfg.Name == want {
			role = streamRoleFanOut
		}
		if got := c.cfg.Metadata["monotel.role"]; got != role {
			t.Errorf("stream %q has monotel.role %q, want %q", c.cfg.Name, got, role)
		}
	}
	if streamRoleEvents != "events" || streamRoleFanOut != "fanout" {
		t.Errorf("roles are %q and %q", streamRoleEvents, streamRoleFanOut)
	}
}

func TestCheckName(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"a", "A", "0", "a-b", "a_b", "a-", "a_", "Order2", strings.Repeat("a", 64)} {
		if err := checkName(good); err != nil {
			t.Errorf("checkName(%q) = %v, want nil", good, err)
		}
	}
	for _, bad := range []string{
		"", "_a", "-a", "a.b", "a b", "a\x00", "a\n", "é", "a/b", `a\b`, "a*", ">", "$a", strings.Repeat("a", 65),
	} {
		if err := checkName(bad); !errors.Is(err, ErrInvalidName) {
			t.Errorf("checkName(%q) = %v, want ErrInvalidName", bad, err)
		}
	}
}

func TestCheckSubject(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give string
		want error
	}{
		{name: "one token", give: "orders"},
		{name: "versioned", give: "orders.created.v1"},
		{name: "other scripts", give: "zamówienia.新"},
		{name: "of the server", give: "$JS.API.INFO"},
		{name: "empty", give: "", want: ErrInvalidSubject},
		{name: "dot", give: ".", want: ErrInvalidSubject},
		{name: "leading dot", give: ".orders", want: ErrInvalidSubject},
		{name: "empty token", give: "orders..v1", want: ErrInvalidSubject},
		{name: "trailing dot", give: "orders.", want: ErrInvalidSubject},
		{name: "wildcard", give: "orders.*", want: ErrInvalidSubject},
		{name: "tail wildcard", give: "orders.>", want: ErrInvalidSubject},
		{name: "wildcard in a token", give: "orders.a*b", want: ErrInvalidSubject},
		{name: "space", give: "orders.new one", want: ErrInvalidSubject},
		{name: "tab", give: "orders.\t", want: ErrInvalidSubject},
		{name: "a second command", give: "a\r\nPUB b 0", want: ErrInvalidSubject},
		{name: "zero byte", give: "a\x00b", want: ErrInvalidSubject},
		{name: "delete character", give: "a\x7fb", want: ErrInvalidSubject},
		{name: "as long as may be", give: strings.Repeat("a", 1024)},
		{name: "too long", give: strings.Repeat("a", 1025), want: ErrInvalidSubject},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if err := checkSubject(tt.give); !errors.Is(err, tt.want) {
				t.Errorf("checkSubject(%q) = %v, want %v", tt.give, err, tt.want)
			}
		})
	}
}

// A good subject and good headers are checked for every publish, so that must
// cost next to nothing. AllocsPerRun may not run in parallel with other tests.
//
//nolint:paralleltest // see above
func TestChecks_doNotAllocate(t *testing.T) {
	h := Header{"Nats-Msg-Id": {"1"}}
	if n := testing.AllocsPerRun(100, func() { _, _ = checkSubject("events.order.v1.order-created"), checkHeader(h) }); n != 0 {
		t.Errorf("the checks of a publish make %v allocations, want 0", n)
	}
}

func TestCheckHeader(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give Header
		want error
		say  string
	}{
		{name: "nil", give: nil},
		{name: "plain", give: Header{"X-A": {"1", "2"}}},
		{name: "no value", give: Header{"X-A": nil}},
		{name: "empty value", give: Header{"X-A": {""}}},
		{name: "tab in a value", give: Header{"X-A": {"a\tb"}}},
		{name: "other scripts in a value", give: Header{"X-A": {"zażółć 新"}}},
		{name: "colon in a value", give: Header{"X-A": {"a: b"}}},
		{name: "empty key", give: Header{"": {"1"}}, want: ErrInvalidHeader, say: "empty key"},
		{name: "key with a space", give: Header{"X A": {"1"}}, want: ErrInvalidHeader, say: `"X A"`},
		{name: "key with a colon", give: Header{"X:A": {"1"}}, want: ErrInvalidHeader, say: `"X:A"`},
		{name: "key with a line break", give: Header{"X\r\nA": {"1"}}, want: ErrInvalidHeader, say: `"X\r\nA"`},
		{name: "key in another script", give: Header{"Ż": {"1"}}, want: ErrInvalidHeader, say: `"Ż"`},
		{name: "line feed in a value", give: Header{"X-A": {"s3cret", "s3cret\nX-B: 1"}}, want: ErrInvalidHeader, say: `value of "X-A": control character at byte 6`},
		{name: "carriage return in a value", give: Header{"X-A": {"\r"}}, want: ErrInvalidHeader, say: `"X-A"`},
		{name: "zero byte in a value", give: Header{"X-A": {"a\x00"}}, want: ErrInvalidHeader, say: `"X-A"`},
		{name: "delete character in a value", give: Header{"X-A": {"\x7f"}}, want: ErrInvalidHeader, say: `"X-A"`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := checkHeader(tt.give)
			if !errors.Is(err, tt.want) {
				t.Fatalf("checkHeader = %v, want %v", err, tt.want)
			}
			if err != nil && !strings.Contains(err.Error(), tt.say) {
				t.Errorf("error %q does not say %q", err, tt.say)
			}
			if err != nil && strings.Contains(err.Error(), "s3cret") {
				t.Errorf("error %q tells a header's value", err)
			}
		})
	}
}

// FuzzCheckSubject compares with the server. It refuses more than the server
// does: control characters, wildcards inside a token, length, and what is not UTF-8.
func FuzzCheckSubject(f *testing.F) {
	for _, s := range []string{"a", "a.b", "", ".", "a.", ".a", "a..b", "*", "a.>", "a*", "a b", "a\tb", "\f", "新.a", "\xff", "\x00", "$JS.a"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		err := checkSubject(s)
		if err != nil && !errors.Is(err, ErrInvalidSubject) {
			t.Fatalf("checkSubject(%q) = %v, which is no ErrInvalidSubject", s, err)
		}
		stricter := len(s) > maxSubjectLen || !utf8.ValidString(s) ||
			strings.ContainsFunc(s, func(r rune) bool { return r == '*' || r == '>' || r <= ' ' || r == 0x7f })
		if got, want := err == nil, server.IsValidPublishSubject(s) && !stricter; got != want {
			t.Errorf("checkSubject(%q) = %v, want good: %v", s, err, want)
		}
	})
}

// FuzzKebab looks for a name whose automatic subject or durable name is not fit
// for the server.
func FuzzKebab(f *testing.F) {
	for _, s := range []string{"OrderCreated", "HTTPServerUp", "A", "a_B", "a-B", "A__b-", "0", "X509", "É", "a.b", "ǅ", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, name string) {
		got := kebab(name)
		e, err := NewEvent("order", name, "v1")
		if err != nil {
			if checkName(name) == nil {
				t.Fatalf("NewEvent refuses the good name %q: %v", name, err)
			}
			return
		}
		if !server.IsValidPublishSubject(got) || strings.Contains(got, ".") {
			t.Errorf("kebab(%q) = %q is no subject token", name, got)
		}
		if strings.ContainsFunc(got, func(r rune) bool { return !(r == '-' || r >= 'a' && r <= 'z' || r >= '0' && r <= '9') }) {
			t.Errorf("kebab(%q) = %q holds more than lower-case letters, digits and hyphens", name, got)
		}
		if again := kebab(got); again != got {
			t.Errorf("kebab(%q) = %q, and of that %q: not stable", name, got, again)
		}
		letters := func(s string) string {
			return strings.ToLower(strings.NewReplacer("-", "", "_", "").Replace(s))
		}
		if letters(got) != letters(name) {
			t.Errorf("kebab(%q) = %q has other letters", name, got)
		}
		if err := checkStreamName(durableName("audit", e)); err != nil {
			t.Errorf("durable name: %v", err)
		}
	})
}

// FuzzHeader looks for a header that is accepted and arrives as something else.
func FuzzHeader(f *testing.F) {
	for _, kv := range [][2]string{
		{"X-A", "1"},
		{"", "1"},
		{"X A", "1"},
		{"X:A", "1"},
		{"X-A", "a\r\nX-B: b"},
		{"X-A", " padded\t"},
		{"X-A", "\x00"},
		{"a(b)", "c"},
		{"NATS/1.0", "x"},
		{"\xff", "\xff"},
		{"Ż", "ż"},
		{"k", "\u0085"},
		{"k", "\u2028"},
	} {
		f.Add(kv[0], kv[1])
	}
	f.Fuzz(func(t *testing.T, key, value string) {
		h := Header{key: {value, "second"}}
		if err := checkHeader(h); err != nil {
			if !errors.Is(err, ErrInvalidHeader) {
				t.Fatalf("checkHeader = %v, which is no ErrInvalidHeader", err)
			}
			return
		}
		got, err := nats.DecodeHeadersMsg(wireHeader(t, h))
		if err != nil {
			t.Fatalf("key %q, value %q: accepted, and not readable: %v", key, value, err)
		}
		// Space around a value does not survive the wire format.
		want := strings.Trim(value, " \t\r\n")
		if vs := got[key]; len(got) != 1 || len(vs) != 2 || vs[0] != want || vs[1] != "second" {
			t.Errorf("key %q, value %q: arrives as %q", key, value, got)
		}
	})
}

// wireHeader returns the header as nats.go sends it.
func wireHeader(t *testing.T, h Header) []byte {
	t.Helper()
	var wire bytes.Buffer
	wire.WriteString("NATS/1.0\r\n")
	for k, vs := range h {
		for _, v := range vs {
			wire.WriteString(k + ": " + strings.Trim(v, " \t\r\n") + "\r\n")
		}
	}
	wire.WriteString("\r\n")
	m := &nats.Msg{Header: h}
	if m.Size() != wire.Len() { // nats.go's own encoder is not exported
		t.Fatalf("header %q: nats.go sends %d bytes (0: it refuses), this test %d", h, m.Size(), wire.Len())
	}
	return wire.Bytes()
}
