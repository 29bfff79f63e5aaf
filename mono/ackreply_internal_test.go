package mono

import (
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/nats-io/nats.go"
)

func TestParseAckReply(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give string
		want Metadata
		ok   bool
	}{
		{
			name: "old form", give: "$JS.ACK.orders.audit.2.30.41.1700000000123456789.5", ok: true,
			want: metadata("", "orders", "audit", 2, 30, 41, 1700000000123456789, 5),
		},
		{
			name: "new form", give: "$JS.ACK._.Acc0unt.orders.audit.2.30.41.1700000000123456789.5.r4nd", ok: true,
			want: metadata("", "orders", "audit", 2, 30, 41, 1700000000123456789, 5),
		},
		{
			name: "new form with a domain", give: "$JS.ACK.leaf.Acc0unt.orders.audit.1.1.1.1.0.r4nd", ok: true,
			want: metadata("leaf", "orders", "audit", 1, 1, 1, 1, 0),
		},
		{
			name: "new form without the last token", give: "$JS.ACK._.Acc0unt.orders.audit.1.1.1.1.0", ok: true,
			want: metadata("", "orders", "audit", 1, 1, 1, 1, 0),
		},
		{
			name: "tokens of the future", give: "$JS.ACK._.Acc0unt.orders.audit.1.1.1.1.0.r4nd.more.and.more", ok: true,
			want: metadata("", "orders", "audit", 1, 1, 1, 1, 0),
		},
		{name: "empty", give: ""},
		{name: "an inbox", give: "_INBOX.abc.def"},
		{name: "prefix alone", give: "$JS.ACK."},
		{name: "too short", give: "$JS.ACK.orders.audit.2.30.41.1700000000123456789"},
		{name: "between the forms", give: "$JS.ACK.x.orders.audit.2.30.41.1700000000123456789.5"},
		{name: "letters for a number", give: "$JS.ACK.orders.audit.2.x.41.1700000000123456789.5"},
		{name: "empty number", give: "$JS.ACK.orders.audit..30.41.1700000000123456789.5"},
		{name: "negative number", give: "$JS.ACK.orders.audit.-2.30.41.1700000000123456789.5"},
		{name: "number that overflows", give: "$JS.ACK.orders.audit.99999999999999999999.30.41.1700000000123456789.5"},
		{name: "no stream", give: "$JS.ACK..audit.2.30.41.1700000000123456789.5"},
		{name: "no consumer", give: "$JS.ACK.orders..2.30.41.1700000000123456789.5"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var got Metadata
			if ok := parseAckReply(tt.give, &got); ok != tt.ok {
				t.Fatalf("parseAckReply(%q) = %v, want %v", tt.give, ok, tt.ok)
			}
			if tt.ok && got != tt.want {
				t.Errorf("parseAckReply(%q) finds %+v, want %+v", tt.give, got, tt.want)
			}
			checkAckReply(t, tt.give, &got, tt.ok)
		})
	}
}

func metadata(domain, stream, consumer string, delivered, sseq, cseq uint64, stored int64, pending uint64) Metadata {
	m := Metadata{
		Domain: domain, Stream: stream, Consumer: consumer, NumDelivered: delivered, NumPending: pending,
		Timestamp: time.Unix(0, stored),
	}
	m.Sequence.Stream, m.Sequence.Consumer = sseq, cseq
	return m
}

// AllocsPerRun may not run in parallel with other tests.
//
//nolint:paralleltest // see above
func TestParseAckReply_doesNotAllocate(t *testing.T) {
	var m Metadata
	const reply = "$JS.ACK._.Acc0unt.orders.audit.2.30.41.1700000000123456789.5.r4nd"
	if n := testing.AllocsPerRun(100, func() { parseAckReply(reply, &m) }); n != 0 {
		t.Errorf("reading a delivery's facts makes %v allocations, want 0", n)
	}
}

// checkAckReply compares ackReply.read with parseAckReply, which found want.
func checkAckReply(t *testing.T, reply string, want *Metadata, ok bool) {
	t.Helper()
	names := want.Stream + "." + want.Consumer + "."
	if !ok {
		names = "orders.audit."
	}
	var got ackReply
	if got.read(reply, names) != ok {
		t.Fatalf("ackReply.read(%q, %q) = %v, want %v", reply, names, !ok, ok)
	}
	if !ok {
		return
	}
	facts := ackReply{
		deliveries: want.NumDelivered, sequence: want.Sequence.Stream, consumerSequence: want.Sequence.Consumer,
		stored: want.Timestamp.UnixNano(),
	}
	if got != facts {
		t.Errorf("ackReply.read(%q) finds %+v, want %+v", reply, got, facts)
	}
	if got.read(reply, want.Stream+"2."+want.Consumer+".") || got.read(reply, want.Stream+"."+want.Consumer+"2.") {
		t.Errorf("ackReply.read(%q) takes the delivery of another consumer for its own", reply)
	}
}

func TestDelivery_size(t *testing.T) {
	t.Parallel()
	const most = 192 // a size class of Go's
	if n := unsafe.Sizeof(Msg{}) + unsafe.Sizeof(delivery{}); n > most {
		t.Errorf("a message that is delivered takes %d bytes, want at most %d", n, most)
	}
}

func BenchmarkAckReply(b *testing.B) {
	for _, reply := range []string{
		"$JS.ACK.orders.audit.2.30.41.1700000000123456789.5", "$JS.ACK._.Acc0unt.orders.audit.2.30.41.1700000000123456789.5.r4nd",
	} {
		b.Run("all", func(b *testing.B) {
			var m Metadata
			for b.Loop() {
				parseAckReply(reply, &m)
			}
		})
		b.Run("read", func(b *testing.B) {
			var a ackReply
			for b.Loop() {
				a.read(reply, "orders.audit.")
			}
		})
	}
}

// FuzzParseAckReply compares with nats.go, which takes more: where it reads a
// zero from what is no number, parseAckReply refuses.
func FuzzParseAckReply(f *testing.F) {
	for _, s := range []string{
		"$JS.ACK.orders.audit.2.30.41.1700000000123456789.5",
		"$JS.ACK._.Acc0unt.orders.audit.2.30.41.1700000000123456789.5.r4nd",
		"$JS.ACK.leaf.Acc0unt.orders.audit.2.30.41.1700000000123456789.5",
		"$JS.ACK.x.orders.audit.2.30.41.1700000000123456789.5",
		"$JS.ACK..audit.2.30.41.1.5",
		"$JS.ACK.........",
		"$JS.ACK.............",
		"$JS.ACK.orders.audit.-1.30.41.99999999999999999999.5",
		"",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, reply string) {
		var got Metadata
		ok := parseAckReply(reply, &got)
		checkAckReply(t, reply, &got, ok)
		want, err := (&nats.Msg{Reply: reply, Sub: new(nats.Subscription)}).Metadata()
		if err != nil {
			if ok {
				t.Fatalf("parseAckReply(%q) finds %+v, nats.go: %v", reply, got, err)
			}
			return
		}
		if !ok {
			if wellFormed(reply) {
				t.Errorf("parseAckReply(%q) finds nothing, nats.go %+v", reply, want)
			}
			return
		}
		theirs := Metadata{
			NumDelivered: want.NumDelivered, NumPending: want.NumPending, Timestamp: want.Timestamp,
			Stream: want.Stream, Consumer: want.Consumer, Domain: want.Domain,
		}
		theirs.Sequence.Stream, theirs.Sequence.Consumer = want.Sequence.Stream, want.Sequence.Consumer
		if got != theirs {
			t.Errorf("parseAckReply(%q) finds %+v, nats.go %+v", reply, got, theirs)
		}
	})
}

// wellFormed reports whether a server could have written the reply subject.
func wellFormed(reply string) bool {
	t := strings.Split(reply, ".")[2:]
	if len(t) >= 9 {
		t = t[2:9]
	}
	for _, n := range t[2:] {
		if n == "" || len(n) > 19 || strings.Trim(n, "0123456789") != "" {
			return false
		}
	}
	return t[0] != "" && t[1] != ""
}
