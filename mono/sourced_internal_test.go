package mono

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestParseSource(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name, give string
		want       sourceRef
		ok         bool
	}{
		{"as the server writes it", "O 11 > > o.x HHUchNxH", sourceRef{"O", "> >", "HHUchNxH", 11}, true},
		{"of another domain", "O:Ab3 7 o.x > o.x id", sourceRef{"O:Ab3", "o.x >", "id", 7}, true},
		{"two filters", "O 7 a\fb >\fc a id", sourceRef{"O", "a\fb >\fc", "id", 7}, true},
		{"largest sequence", "O 18446744073709551615 > > o id", sourceRef{"O", "> >", "id", 1<<64 - 1}, true},
		{name: "no identity, before 2.15", give: "O 11 > > o.x"},
		{name: "of 2.9", give: "$JS.ACK.O.c.1.2.3.4.5"},
		{name: "a token more", give: "O 11 > > o.x id more"},
		{name: "no sequence", give: "O x > > o.x id"},
		{name: "sequence 0", give: "O 0 > > o.x id"},
		{name: "too large", give: "O 18446744073709551616 > > o.x id"},
		{name: "no stream", give: " 1 > > o.x id"},
		{name: "empty identity", give: "O 1 > > o.x "},
		{name: "empty"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, ok := parseSource(tt.give)
			if ok != tt.ok || ok && got != tt.want {
				t.Errorf("parseSource(%q) = %+v, %v, want %+v, %v", tt.give, got, ok, tt.want, tt.ok)
			}
		})
	}
}

func FuzzParseSource(f *testing.F) {
	f.Add("O 11 > > o.x HHUchNxH")
	f.Add("O 11 > > o.x")
	f.Add("   ")
	f.Fuzz(func(t *testing.T, header string) {
		ref, ok := parseSource(header)
		if ok && (ref.stream == "" || ref.identity == "" || ref.sequence == 0) {
			t.Errorf("parseSource(%q) = %+v", header, ref)
		}
	})
}

// A repeat is what was finished before, in an earlier place. Everything else is not.
func TestSourceNote_has(t *testing.T) {
	t.Parallel()
	const sum, other = 7, 8
	var n sourceNote
	n.add(1030, 50, sum)
	for _, tt := range []struct {
		name             string
		sequence, stored uint64
		sum              uint32
		want             bool
	}{
		{"a repeat", 1030, 51, sum, true},
		{"a late repeat", 1030, 1 << 40, sum, true},
		{"a redelivery", 1030, 50, sum, false},
		{"before it in the stream", 1030, 49, sum, false},
		{"another message with its sequence", 1030, 51, other, false},
		{"its neighbour", 1031, 51, sum, false},
	} {
		if got := n.has(tt.sequence, tt.stored, tt.sum); got != tt.want {
			t.Errorf("%s: has = %v", tt.name, got)
		}
	}
	n.add(1030, 60, sum) // both copies were in work at once
	if !n.has(1030, 55, sum) {
		t.Error("finishing a second copy hides that the first one was finished")
	}
	n.add(1030, 70, other)
	if n.has(1030, 80, sum) || !n.has(1030, 80, other) {
		t.Error("a sequence that the origin gave away twice is not that of the last message")
	}
}

func TestSourceNote_merge(t *testing.T) {
	t.Parallel()
	var a, b sourceNote
	a.add(1, 10, 100)
	b.add(1, 10, 999)
	b.add(2, 20, 200)
	b.add(1023, 30, 300)
	a.merge(&b)
	for _, tt := range []struct {
		sequence, stored uint64
		sum              uint32
		want             bool
	}{
		{1, 21, 100, true},
		{1, 21, 999, false},
		{2, 21, 200, true},
		{2, 20, 200, false},
		{1023, 31, 300, true},
		{3, 100, 0, false},
	} {
		if got := a.has(tt.sequence, tt.stored, tt.sum); got != tt.want {
			t.Errorf("after the merge has(%d, %d, %d) = %v, want %v", tt.sequence, tt.stored, tt.sum, got, tt.want)
		}
	}
}

// What is on the wire outlives releases.
func TestSourceNote_wire(t *testing.T) {
	t.Parallel()
	var n sourceNote
	n.add(0, 3, 0x01020304)
	n.add(65, 5, 0xaabbccdd)
	b := n.encode()
	want := "01" + "0100000000000000" + "0200000000000000"
	if got := hex.EncodeToString(b[:17]); got != want {
		t.Errorf("a note begins with %s, want %s", got, want)
	}
	if got, want := hex.EncodeToString(b[noteHead:]), "04030201"+"ddccbbaa"; got != want {
		t.Errorf("a note ends with %s, want %s", got, want)
	}
	back, err := decodeNote(b)
	if err != nil || back != n {
		t.Errorf("decoded: %v, equal %v", err, back == n)
	}
	for _, bad := range [][]byte{nil, b[:len(b)-1], append([]byte{2}, b[1:]...), append(slices.Clip(b), 0)} {
		if _, err := decodeNote(bad); err == nil {
			t.Errorf("a note of %d bytes that is none is accepted", len(bad))
		}
	}
	token := noteToken("S", "d", time.Unix(1, 2), sourceRef{stream: "O", filter: "> >", identity: "id", sequence: 9})
	if want := "HIEf4_ijt1bFEQBK"; token != want {
		t.Errorf("the token is %q, want %q", token, want)
	}
}

// offline is a consumer that finds no server to ask.
func offline() *streamConsumer {
	c := &streamConsumer{streamRegistration: &streamRegistration{info: Consumer{Stream: "S", Durable: "d"}}}
	c.created.Store(&time.Time{})
	c.repeats.pause = 1 << 62
	c.repeats.stopped = true
	return c
}

func sourced(sequence, stored uint64) *Msg {
	m := &Msg{delivery: &delivery{}, Subject: "s", Data: []byte("payload"), Header: Header{
		jetstream.MsgIDHeader: {"0123456789abcdef"}, "traceparent": {"x"}, sourceHeader: {fmt.Sprintf("O %d > > s id", sequence)},
	}}
	m.tel.Sequence = stored
	return m
}

// A message costs no allocation, whether it was sourced or not.
//
//nolint:paralleltest // AllocsPerRun may not run beside other tests
func TestRepeats_doNotAllocate(t *testing.T) {
	for name, m := range map[string]*Msg{
		"plain":     {delivery: &delivery{}, Subject: "s", Header: Header{jetstream.MsgIDHeader: {"x"}}},
		"no header": {delivery: &delivery{}, Subject: "s"},
		"sourced":   sourced(7, 8),
	} {
		c, batch := offline(), []*Msg{m}
		if n := testing.AllocsPerRun(100, func() {
			c.withoutRepeats(batch)
			c.finished(m)
		}); n != 0 {
			t.Errorf("%s: a message makes %v allocations, want 0", name, n)
		}
	}
}

func BenchmarkRepeats(b *testing.B) {
	for name, m := range map[string]*Msg{
		"source=no":  {delivery: &delivery{}, Subject: "s", Header: Header{jetstream.MsgIDHeader: {"x"}, "traceparent": {"x"}}},
		"source=yes": sourced(7, 8),
	} {
		b.Run(name, func(b *testing.B) {
			c, batch := offline(), []*Msg{m}
			b.ReportAllocs()
			for b.Loop() {
				c.withoutRepeats(batch)
				c.finished(m)
			}
		})
	}
}

// What is kept is bounded, whatever comes.
func TestRepeats_bounded(t *testing.T) {
	t.Parallel()
	c := offline()
	for i := range uint64(3 * maxTracked) {
		m := sourced(1+i*noteSize, i+1)
		m.Header[sourceHeader][0] = fmt.Sprintf("O%d %d > > s id", i%(2*maxOrigins), 1+i*noteSize)
		c.withoutRepeats([]*Msg{m})
	}
	r := &c.repeats
	notes := 0
	for _, o := range r.origins {
		notes += len(o.notes)
	}
	if len(r.origins) > maxOrigins || notes > maxNotes || notes != r.notes || len(r.inWork) > maxTracked {
		t.Errorf("%d origins, %d notes, counted as %d, and %d messages in work are kept", len(r.origins), notes, r.notes, len(r.inWork))
	}
}

// The stream was made again: what was finished in the old one counts for nothing.
func TestRepeats_follow(t *testing.T) {
	t.Parallel()
	c := offline()
	c.withoutRepeats([]*Msg{sourced(7, 8)})
	c.finished(sourced(7, 8))
	known := func() bool {
		r := &c.repeats
		return len(r.origins) == 1 && r.origins[0].notes[0] != nil && r.origins[0].notes[0].has(7, 9, checksum(sourced(7, 9)))
	}
	if !known() {
		t.Fatal("a finished message is not known")
	}
	again := time.Unix(1, 0)
	c.created.Store(&again)
	c.withoutRepeats([]*Msg{sourced(7, 9)})
	if known() {
		t.Error("a message that was finished in another stream is known")
	}
}

// A known repeat that the server does not confirm is no new message when the consumer
// stops.
func TestRepeats_stop(t *testing.T) {
	t.Parallel()
	_, js := startServer(t)
	c := offline()
	c.rt = &run{nc: js.Conn()}
	c.ending = make(chan struct{})
	close(c.ending)
	for _, tt := range []struct {
		name string
		m    *Msg
		want bool
	}{
		{"a repeat", sourced(7, 9), true},
		{"another message", sourced(70, 10), false},
		{"the finished one itself", sourced(7, 8), false},
	} {
		c.withoutRepeats([]*Msg{sourced(7, 8)})
		c.finished(sourced(7, 8))
		ref, _ := sourceOf(tt.m)
		repeat, stops := c.isRepeatAtLast(tt.m, ref, uptime())
		if repeat || stops != tt.want {
			t.Errorf("%s: a repeat for sure %v, handed back %v, want false and %v", tt.name, repeat, stops, tt.want)
		}
	}
}

func FuzzDecodeNote(f *testing.F) {
	var n sourceNote
	n.add(5, 6, 7)
	f.Add(n.encode())
	f.Add([]byte{1})
	f.Fuzz(func(t *testing.T, b []byte) {
		if n, err := decodeNote(b); err == nil && !bytes.Equal(n.encode(), b) {
			t.Errorf("decoded and encoded again %x is %x", b, n.encode())
		}
	})
}

// The text is told apart from the payload, and each counts.
func TestChecksum(t *testing.T) {
	t.Parallel()
	seen := make(map[uint32]int)
	for i, m := range []*Msg{
		{},
		{Subject: "a"},
		{Data: []byte("a")},
		{Header: Header{"Nats-Msg-Id": {"a"}}},
		{Subject: "a", Data: []byte("a")},
		{Subject: "b", Data: []byte("a")},
		{Subject: "a", Data: []byte("b")},
		{Subject: "a", Data: []byte("a"), Header: Header{"Nats-Msg-Id": {"a"}}},
		{Subject: "aa"},
	} {
		sum := checksum(m)
		if before, ok := seen[sum]; ok {
			t.Errorf("messages %d and %d have one checksum", before, i)
		}
		seen[sum] = i
	}
	same := checksum(&Msg{Subject: "a", Data: []byte("a"), Header: Header{"Traceparent": {"x"}}})
	if same != checksum(&Msg{Subject: "a", Data: []byte("a")}) {
		t.Error("a header that is no part of the message changes the checksum")
	}
}

// Only servers that refuse a forged header are believed.
func TestSourcesTrusted(t *testing.T) {
	t.Parallel()
	for version, want := range map[string]bool{
		"2.15.0": true, "2.15.2": true, "2.15.0-RC.1": true, "3.0.0": true, "2.14.10": false, "2.9.1": false, "": false, "x": false,
	} {
		if got := sourcesTrusted(version); got != want {
			t.Errorf("sourcesTrusted(%q) = %v", version, got)
		}
	}
}
