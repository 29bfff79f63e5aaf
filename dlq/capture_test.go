package dlq_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

var created = time.Date(2026, 11, 2, 8, 30, 0, 123456789, time.UTC)

// record returns a dead letter; seq makes it one of its own.
func record(seq uint64) *dlq.Record {
	return &dlq.Record{
		ID:     dlq.ID("orders", created, "billing", seq),
		Reason: dlq.ReasonAttemptsExhausted, ReasonText: "gave up after 5 attempts",
		Subject: "orders.created.v1", Header: nats.Header{"Tenant": {"blue", "grün"}}, Data: []byte(`{"order":7}`),
		Event: "orders/created/v1", Stream: "orders", StreamCreated: created, StreamSequence: seq,
		Consumer: "billing", ConsumerSequence: seq + 4, Deliveries: 5,
		Stored: created.Add(time.Duration(seq) * time.Second), FirstFailed: created.Add(time.Hour), Failed: created.Add(2 * time.Hour),
		Error: "card declined\nby the bank", ErrorType: "declined", ErrorTypes: []string{"*errors.errorString"},
		Traceparent: "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
		App:         "shop", AppVersion: "1.4.2", Module: "billing", Host: "node-3",
	}
}

// noise is text that no compression makes smaller, the same each time.
func noise(seed uint64, size int) []byte {
	r := rand.New(rand.NewPCG(seed, seed))
	b := make([]byte, size)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// stack returns size bytes of a stack.
func stack(size int) []string {
	var lines []string
	for n := 0; n < size; {
		line := fmt.Sprintf("\t/src/shop/billing/a_file_with_a_long_name.go:%d +0x1f", len(lines))
		line = line[:min(len(line), size-n)]
		lines, n = append(lines, line), n+len(line)
	}
	return lines
}

// capture captures r, which has to be new.
func capture(t *testing.T, s *dlq.Store, r *dlq.Record) {
	t.Helper()
	captured, err := s.Capture(t.Context(), r, nil)
	if err != nil || !captured {
		t.Fatalf("Capture() = %v, %v, want true, nil", captured, err)
	}
}

// stored returns the messages of the dead-letter stream, in their order.
func (b *bundle) stored(t *testing.T) []*jetstream.RawStreamMsg {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	var all []*jetstream.RawStreamMsg
	for seq := uint64(1); ; {
		m, err := stream.GetMsg(t.Context(), seq, jetstream.WithGetMsgSubject("monotel.dlq.>"))
		if errors.Is(err, jetstream.ErrMsgNotFound) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all, seq = append(all, m), m.Sequence+1
	}
}

// load returns the only record in the dead-letter stream.
func (b *bundle) load(t *testing.T, s *dlq.Store) *dlq.Record {
	t.Helper()
	all := b.stored(t)
	if len(all) != 1 {
		t.Fatalf("%d messages are stored, want 1", len(all))
	}
	r, err := s.Load(t.Context(), all[0].Header, all[0].Data)
	if err != nil {
		t.Fatal(err)
	}
	if want := s.Subject(r.Stream, r.Consumer, r.ID); all[0].Subject != want {
		t.Errorf("stored on subject %q, want %q", all[0].Subject, want)
	}
	return r
}

// check compares a record that was read with what was captured, but for where
// its parts are.
func check(t *testing.T, want, got *dlq.Record) {
	t.Helper()
	ignore := cmpopts.IgnoreFields(dlq.Record{}, "Body", "BodyObject", "BodySize", "HeadersObject", "Data")
	if diff := cmp.Diff(want, got, ignore, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("(-want +got):\n%.3000s", diff)
	}
	if !bytes.Equal(want.Data, got.Data) {
		t.Errorf("the body has %d bytes, want the %d that were captured", len(got.Data), len(want.Data))
	}
	if got.BodySize != len(want.Data) {
		t.Errorf("BodySize is %d, want %d", got.BodySize, len(want.Data))
	}
}

func TestCapture_once(t *testing.T) {
	t.Parallel()

	for _, size := range []int{0, 100, 1 << 20} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			give := func() *dlq.Record {
				r := record(1)
				r.Data = noise(1, size)
				return r
			}
			capture(t, s, give())
			for range 2 {
				captured, err := s.Capture(t.Context(), give(), nil)
				if captured || err != nil {
					t.Errorf("once more: Capture() = %v, %v, want false, nil", captured, err)
				}
			}
			// The same message, as another attempt saw it.
			again := give()
			again.Error, again.Deliveries, again.Failed = "timeout", 6, created.Add(24*time.Hour)
			if captured, err := s.Capture(t.Context(), again, nil); captured || err != nil {
				t.Errorf("another attempt: Capture() = %v, %v, want false, nil", captured, err)
			}
			check(t, give(), b.load(t, s))
		})
	}
}

// TestCapture_concurrent has the instances of a program capture the same message
// at once: exactly one of them has.
func TestCapture_concurrent(t *testing.T) {
	t.Parallel()

	for _, size := range []int{100, 1 << 20} {
		t.Run(fmt.Sprintf("%d bytes", size), func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			first := b.provisioned(t, dlq.Config{})
			stores := []*dlq.Store{first}
			for i := range 3 { // other processes, with other limits
				nc, js := b.connect(t)
				s, err := dlq.NewStore(nc, js, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: int64(i+1) << 28}})
				if err != nil {
					t.Fatal(err)
				}
				stores = append(stores, s)
			}
			var captured atomic.Int32
			inParallel(16, func(i int) {
				r := record(1)
				r.Data = noise(1, size)
				ok, err := stores[i%len(stores)].Capture(t.Context(), r, nil)
				if err != nil {
					t.Error(err)
				}
				if ok {
					captured.Add(1)
				}
			})
			if n := captured.Load(); n != 1 {
				t.Errorf("captured %d times, want once", n)
			}
			want := record(1)
			want.Data = noise(1, size)
			check(t, want, b.load(t, first))
		})
	}
}

// TestCapture_inFlight has the server answer what it does in a cluster while
// another write to the same subject is not committed, and may never be: that is
// not "captured before".
func TestCapture_inFlight(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		give string
	}{
		{"in flight", `{"error":{"code":400,"err_code":10164,"description":"wrong last sequence"},"stream":"DLQ","seq":0}`},
		{"no leader", `{"error":{"code":503,"err_code":10008,"description":"JetStream system temporarily unavailable"},"stream":"DLQ","seq":0}`},
		{"no JSON", `-ERR`},
		{"nothing", ``},
		{"no stream", `{}`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			_, err := b.nc.Subscribe("monotel.dlq.DLQ.>", func(m *nats.Msg) { _ = m.Respond([]byte(tt.give)) })
			if err != nil {
				t.Fatal(err)
			}
			captured, err := b.store(t, dlq.Config{}).Capture(t.Context(), record(1), nil)
			if captured || err == nil {
				t.Errorf("Capture() = %v, %v, want false and an error", captured, err)
			}
		})
	}
}

func TestCapture_roundTrip(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name       string
		give       func(r *dlq.Record)
		wantBody   dlq.BodyPlace
		wantObject bool // for the headers
	}{
		{name: "small", give: func(*dlq.Record) {}},
		{name: "no body", give: func(r *dlq.Record) { r.Data = nil }},
		{name: "no headers", give: func(r *dlq.Record) { r.Header = nil }},
		{name: "nothing known", give: func(r *dlq.Record) { *r = dlq.Record{ID: r.ID} }},
		{name: "binary headers", give: func(r *dlq.Record) {
			r.Header = nats.Header{"\xff\xfe": {"\x00\xff", "", "x"}, "": {"\r\nNats-TTL: 1s\r\n"}, "a: b\r\n": {" spaces "}}
		}},
		{name: "with a stack", give: func(r *dlq.Record) { r.Stack = stack(10 << 10) }},
		{name: "largest body", give: func(r *dlq.Record) { r.Data = noise(1, 1<<20) }, wantBody: dlq.BodyObject},
		{name: "largest body and stack", give: func(r *dlq.Record) {
			r.Data, r.Stack = noise(1, 1<<20), stack(10<<10)
		}, wantBody: dlq.BodyObject},
		{name: "one large header", give: func(r *dlq.Record) {
			r.Header = nats.Header{"Large": {strings.Repeat("x", 64<<10-100)}}
		}, wantBody: dlq.BodyObject, wantObject: true},
		{name: "large headers and no body", give: func(r *dlq.Record) {
			r.Header, r.Data = nats.Header{"Large": {strings.Repeat("x", 64<<10-100)}}, nil
		}, wantBody: dlq.BodyObject, wantObject: true},
		{name: "many headers, binary", give: func(r *dlq.Record) {
			for i := range 3000 {
				r.Header.Add("X", string(noise(uint64(i), 15)))
			}
			r.Data, r.Stack = noise(1, 1<<20-64<<10), stack(10<<10)
		}, wantBody: dlq.BodyObject, wantObject: true},
		{name: "headers that fit alone", give: func(r *dlq.Record) {
			r.Header, r.Data = nats.Header{"Large": {strings.Repeat("x", 15<<10)}}, noise(1, 1<<20-15<<10)
		}, wantBody: dlq.BodyObject},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			give, want := record(1), record(1)
			tt.give(give)
			tt.give(want)
			capture(t, s, give)
			got := b.load(t, s)
			check(t, want, got)
			if got.Body != tt.wantBody || (got.HeadersObject != "") != tt.wantObject {
				t.Errorf("the body is %q, the headers are object %q; want %q, %v", got.Body, got.HeadersObject, tt.wantBody, tt.wantObject)
			}
			if _, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE"); (err == nil) != (tt.wantBody == dlq.BodyObject) {
				t.Errorf("object store: %v; it is to be made when it is needed", err)
			}
		})
	}
}

// TestCapture_diagnostics has less and less room beside the body, and checks what
// is given up for it.
func TestCapture_diagnostics(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	limit := int(b.nc.MaxPayload())
	longError := strings.Repeat("é", 2<<10) // 4 KiB
	seen := make(map[string]bool)
	seq := uint64(0)
	for room := 28 << 10; room >= 0; room -= 1 << 10 {
		seq++
		give := record(seq)
		give.Data, give.Stack, give.Error = noise(1, limit-room), stack(15<<10), longError
		capture(t, s, give)
		all := b.stored(t)
		m := all[len(all)-1]
		got, err := s.Load(t.Context(), m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		lines, want := len(got.Stack), stack(15<<10)
		if diff := cmp.Diff(want[:lines], got.Stack, cmpopts.EquateEmpty()); diff != "" {
			t.Fatalf("the stack does not begin as it was: %s", diff)
		}
		whole, wholeError := lines == len(want), got.Error == longError
		switch {
		case got.Body == dlq.BodyObject:
			seen["object"] = true
			if !whole || !wholeError {
				t.Errorf("room %d: the body is elsewhere, and diagnostics were shortened", room)
			}
		case whole && wholeError:
			seen["whole"] = true
		case lines > 0 && wholeError:
			seen["shorter stack"] = true
		case lines > 0:
			seen["shorter text"] = true
		default:
			seen["no stack"] = true
		}
		if !wholeError {
			if whole {
				t.Errorf("room %d: the error was shortened, and the stack was not", room)
			}
			if !strings.HasSuffix(got.Error, "é…") || !strings.HasPrefix(longError, strings.TrimSuffix(got.Error, "…")) {
				t.Errorf("room %d: the error is %q, want the beginning and an ellipsis", room, got.Error)
			}
		}
		if !bytes.Equal(got.Data, give.Data) && got.Body == dlq.BodyInline {
			t.Errorf("room %d: the body was changed", room)
		}
		got.Stack, got.Error = nil, ""
		rest := record(seq)
		rest.Data, rest.Error = noise(1, limit-room), ""
		check(t, rest, got)
	}
	for _, want := range []string{"whole", "shorter stack", "shorter text", "no stack", "object"} {
		if !seen[want] {
			t.Errorf("no room gave %q", want)
		}
	}
}

// TestCapture_hugeDiagnostics has diagnostics that do not fit with any body.
func TestCapture_hugeDiagnostics(t *testing.T) {
	t.Parallel()

	many := make([]string, 50_000)
	tests := []struct {
		name string
		give func(r *dlq.Record)
	}{
		{"stack", func(r *dlq.Record) { r.Stack = stack(1 << 20) }},
		{"stack of empty lines", func(r *dlq.Record) { r.Stack = many }},
		{"stack of one line", func(r *dlq.Record) { r.Stack = []string{strings.Repeat("x", 1<<20)} }},
		{"stack that JSON makes longer", func(r *dlq.Record) { r.Stack = []string{strings.Repeat("\x01", 16<<10)} }},
		{"error", func(r *dlq.Record) { r.Error = strings.Repeat("x", 2<<20) }},
		{"error that JSON makes longer", func(r *dlq.Record) { r.Error = strings.Repeat("\x01", 2<<20) }},
		{"reason", func(r *dlq.Record) { r.ReasonText = strings.Repeat("\xff", 2<<20) }},
		{"error types", func(r *dlq.Record) { r.ErrorTypes = many }},
		{"error types with names", func(r *dlq.Record) {
			for range 5000 {
				r.ErrorTypes = append(r.ErrorTypes, "*fmt.wrapErrors")
			}
		}},
		{"error type", func(r *dlq.Record) { r.ErrorType = strings.Repeat("x", 1<<20) }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			give, want := record(1), record(1)
			tt.give(give)
			capture(t, s, give)
			got := b.load(t, s)
			if got.Body != dlq.BodyInline {
				t.Error("the body went elsewhere, which does not help")
			}
			want.Stack, want.Error, want.ReasonText, want.ErrorTypes, want.ErrorType = got.Stack, got.Error, got.ReasonText, got.ErrorTypes, got.ErrorType
			check(t, want, got)
		})
	}
}

// TestCapture_smallMessages has a stream that takes less than the server does,
// which only the server's own configuration may say.
func TestCapture_smallMessages(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgSize: 4 << 10}})
	give, want := record(1), record(1)
	give.Data, want.Data = noise(1, 8<<10), noise(1, 8<<10)
	give.Stack = stack(16 << 10)
	capture(t, s, give)
	got := b.load(t, s)
	want.Stack = got.Stack
	check(t, want, got)
}

// TestCapture_controlHeaders has a stream on which they could act.
func TestCapture_controlHeaders(t *testing.T) {
	t.Parallel()

	control := nats.Header{
		"Nats-Msg-Id": {"order-7"}, "Nats-TTL": {"1s"}, "Nats-Expected-Stream": {"elsewhere"}, "Nats-Expected-Last-Sequence": {"17"},
		"Nats-Expected-Last-Subject-Sequence": {"17"}, "Nats-Expected-Last-Subject-Sequence-Subject": {"a.b"}, "Nats-Expected-Last-Msg-Id": {"order-6"},
		"Nats-Rollup": {"all"}, "Nats-Marker-Reason": {"MaxAge"}, "Nats-Schedule": {"@every 1s"}, "Nats-Schedule-Target": {"monotel.dlq.DLQ.target"},
		"Nats-Schedule-Source": {"monotel.dlq.DLQ.source"}, "Nats-Schedule-TTL": {"1s"}, "Nats-Schedule-Time-Zone": {"Europe/Vienna"},
		"Nats-Schedule-Rollup": {"sub"}, "Nats-Scheduler": {"a.b"}, "Nats-Schedule-Next": {"purge"}, "Nats-Batch-Id": {"b"}, "Nats-Batch-Sequence": {"1"},
		"Nats-Batch-Commit": {"1"}, "Nats-Incr": {"+1"}, "Nats-Counter-Sources": {"{}"}, "Nats-Stream-Source": {"elsewhere 1"},
		"Nats-Trace-Dest": {"traced"}, "Nats-Trace-Only": {"true"}, "Nats-Required-Api-Level": {"99"}, "Nats-Request-Info": {"{}"},
		"Nats-Stream": {"elsewhere"}, "Nats-Subject": {"a.b"}, "Nats-Sequence": {"17"}, "Nats-Time-Stamp": {"2026-01-02T03:04:05Z"}, "Status": {"503"},
	}
	b := setup(t)
	traced, err := b.nc.SubscribeSync("traced")
	if err != nil {
		t.Fatal(err)
	}
	b.createStream(t, jetstream.StreamConfig{
		Name: "DLQ", Subjects: []string{"monotel.dlq.DLQ.>"}, Discard: jetstream.DiscardNew,
		AllowMsgTTL: true, AllowAtomicPublish: true, AllowBatchPublish: true, AllowRollup: true,
	})
	s := b.provisioned(t, dlq.Config{})
	var want []*dlq.Record
	give := []nats.Header{{}, control}
	for key, values := range control {
		give = append(give, nats.Header{key: values})
	}
	for _, h := range give {
		r := record(uint64(len(want) + 1))
		r.Header = h
		want = append(want, r)
		sent := *r
		sent.Header = maps.Clone(h)
		capture(t, s, &sent)
	}
	all := b.stored(t)
	if len(all) != len(want) {
		t.Fatalf("%d records are stored, want %d", len(all), len(want))
	}
	for i, m := range all {
		got, err := s.Load(t.Context(), m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		check(t, want[i], got)
		for key := range m.Header {
			switch key {
			case "Nats-Expected-Stream", "Nats-Expected-Last-Subject-Sequence": // the capture's own, which the server keeps
			case "Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp": // of a direct get
			default:
				if !strings.HasPrefix(key, "Dlq-") {
					t.Errorf("the record has header %s", key)
				}
			}
		}
		if got := m.Header.Get("Nats-Expected-Last-Subject-Sequence"); got != "0" {
			t.Errorf("Nats-Expected-Last-Subject-Sequence is %q", got)
		}
	}
	if n, _, err := traced.Pending(); n != 0 || err != nil {
		t.Errorf("%d traces were sent, %v", n, err)
	}
}

// TestCapture_more has the record's own trace context beside its headers.
func TestCapture_more(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	more := nats.Header{"traceparent": {"00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01"}}
	if captured, err := s.Capture(t.Context(), record(1), more); !captured || err != nil {
		t.Fatalf("Capture() = %v, %v", captured, err)
	}
	if got := b.stored(t)[0].Header.Get("traceparent"); got != more.Get("traceparent") {
		t.Errorf("traceparent is %q", got)
	}
	if len(more) != 1 {
		t.Errorf("the caller's header has become %v", more)
	}
	check(t, record(1), b.load(t, s))
}

// eventually captures until there is no error.
func eventually(t *testing.T, s *dlq.Store, r *dlq.Record) (captured bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bridgePatience)
	defer cancel()
	again := time.NewTicker(10 * time.Millisecond)
	defer again.Stop()
	for {
		once, stop := context.WithTimeout(ctx, 5*time.Second)
		captured, err := s.Capture(once, r, nil)
		stop()
		if err == nil {
			return captured
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("not captured in time: %v", err)
		}
	}
}

func TestCapture_storeUnavailable(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name   string
		cfg    jetstream.StreamConfig
		fail   func(t *testing.T, b *bundle, s *dlq.Store)
		repair func(t *testing.T, b *bundle, s *dlq.Store)
		size   int
		code   jetstream.ErrorCode // of the server, if it answers
		late   bool                // the server may get it after the error
	}{
		{
			name: "stream missing", size: 100,
			fail: func(t *testing.T, b *bundle, _ *dlq.Store) {
				if err := b.js.DeleteStream(t.Context(), "DLQ"); err != nil {
					t.Fatal(err)
				}
			},
			repair: func(t *testing.T, _ *bundle, s *dlq.Store) {
				if err := s.Provision(t.Context()); err != nil {
					t.Fatal(err)
				}
			},
		},
		{
			name: "another stream has the subjects", size: 100, code: 10060,
			fail: func(t *testing.T, b *bundle, _ *dlq.Store) {
				if err := b.js.DeleteStream(t.Context(), "DLQ"); err != nil {
					t.Fatal(err)
				}
				b.createStream(t, jetstream.StreamConfig{Name: "everything", Subjects: []string{"monotel.>"}})
			},
			repair: func(t *testing.T, b *bundle, s *dlq.Store) {
				if err := b.js.DeleteStream(t.Context(), "everything"); err != nil {
					t.Fatal(err)
				}
				if err := s.Provision(t.Context()); err != nil {
					t.Fatal(err)
				}
			},
		},
		{
			name: "full of messages", size: 100, cfg: jetstream.StreamConfig{MaxMsgs: 1}, code: 10077,
			fail:   func(t *testing.T, _ *bundle, s *dlq.Store) { capture(t, s, record(99)) },
			repair: purge,
		},
		{
			name: "full of bytes", size: 3000, cfg: jetstream.StreamConfig{MaxBytes: 5000}, code: 10077,
			fail: func(t *testing.T, _ *bundle, s *dlq.Store) {
				r := record(99)
				r.Data = noise(2, 3000)
				capture(t, s, r)
			},
			repair: purge,
		},
		{
			name: "full, with the body stored already", size: 1 << 20, cfg: jetstream.StreamConfig{MaxMsgs: 1}, code: 10077,
			fail:   func(t *testing.T, _ *bundle, s *dlq.Store) { capture(t, s, record(99)) },
			repair: purge,
		},
		{
			name: "object store full", size: 1 << 20, cfg: jetstream.StreamConfig{MaxBytes: 3 << 19}, code: 10077,
			fail: func(t *testing.T, _ *bundle, s *dlq.Store) {
				r := record(99)
				r.Data = noise(2, 1<<20)
				capture(t, s, r)
			},
			repair: func(t *testing.T, b *bundle, s *dlq.Store) {
				purge(t, b, s)
				bucket, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE")
				if err != nil {
					t.Fatal(err)
				}
				if err := bucket.Delete(t.Context(), dlq.ID("orders", created, "billing", 99)); err != nil {
					t.Fatal(err)
				}
			},
		},
		{name: "server down", size: 100, late: true, fail: stop, repair: start},
		{name: "server down, large", size: 1 << 20, late: true, fail: stop, repair: start},
		{
			name: "server down, store was used", size: 1 << 20, late: true,
			fail: func(t *testing.T, b *bundle, s *dlq.Store) {
				r := record(99)
				r.Data = noise(2, 1<<20)
				capture(t, s, r)
				purge(t, b, s)
				b.server.Stop()
			},
			repair: start,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, dlq.Config{Stream: tt.cfg})
			tt.fail(t, b, s)

			give, want := record(1), record(1)
			give.Data, want.Data = noise(1, tt.size), noise(1, tt.size)
			limit := time.Second // nothing answers
			if tt.code != 0 {
				limit = bridgePatience
			}
			ctx, cancel := context.WithTimeout(t.Context(), limit)
			defer cancel()
			var captured bool
			var err error
			returned := make(chan struct{})
			go func() {
				defer close(returned)
				captured, err = s.Capture(ctx, give, nil)
			}()
			select {
			case <-returned:
			case <-time.After(bridgePatience):
				t.Fatal("Capture does not end with its context")
			}
			if captured || err == nil {
				t.Fatalf("Capture() = %v, %v, want false and an error", captured, err)
			}
			if tt.code != 0 {
				if api, ok := errors.AsType[*jetstream.APIError](err); !ok || api.ErrorCode != tt.code {
					t.Errorf("Capture() = %v, want error %d", err, tt.code)
				}
			}

			tt.repair(t, b, s)
			// The same record again, as it was left.
			if captured := eventually(t, s, give); !captured && !tt.late {
				t.Error("captured before, want captured now")
			}
			check(t, want, b.load(t, s))
		})
	}
}

func purge(t *testing.T, b *bundle, _ *dlq.Store) {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func stop(_ *testing.T, b *bundle, _ *dlq.Store)  { b.server.Stop() }
func start(_ *testing.T, b *bundle, _ *dlq.Store) { b.server.Start() }

// TestCapture_fullAndCaptured shows that a full stream does not keep what is
// captured already from being terminated.
func TestCapture_fullAndCaptured(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgs: 1}})
	capture(t, s, record(1))
	if captured, err := s.Capture(t.Context(), record(1), nil); captured || err != nil {
		t.Errorf("Capture() = %v, %v, want false, nil", captured, err)
	}
}

// TestCapture_bucketDeleted has an operator delete the object store under a
// program that has used it.
func TestCapture_bucketDeleted(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	large := func(seq uint64) *dlq.Record {
		r := record(seq)
		r.Data = noise(seq, 1<<20)
		return r
	}
	capture(t, s, large(1))
	if err := b.js.DeleteObjectStore(t.Context(), "DLQ_LARGE"); err != nil {
		t.Fatal(err)
	}
	purge(t, b, s)
	eventually(t, s, large(2))
	check(t, large(2), b.load(t, s))
}

// TestCapture_smallServer has no room for what is reserved by default: the object
// store takes less, as the stream does.
func TestCapture_smallServer(t *testing.T) {
	t.Parallel()

	b := &bundle{server: monotest.ServerWith(t, embedded.Config{MaxStore: 100 << 20})}
	b.nc, b.js = b.connect(t)
	s := b.provisioned(t, dlq.Config{})
	give, want := record(1), record(1)
	give.Data, want.Data = noise(1, 1<<20), noise(1, 1<<20)
	capture(t, s, give)
	check(t, want, b.load(t, s))
	stream, objects := b.info(t, "DLQ").Config, b.info(t, "OBJ_DLQ_LARGE").Config
	if stream.MaxBytes != 64<<20 || objects.MaxBytes != 16<<20 {
		t.Errorf("%d and %d bytes are reserved, want 64 and 16 MiB", stream.MaxBytes, objects.MaxBytes)
	}
}

// TestLoad_missingObject keeps the rest of a record readable, and makes no object
// store.
func TestLoad_missingObject(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	give := record(1)
	give.Data, give.Header = noise(1, 1<<20), nats.Header{"Large": {strings.Repeat("x", 60<<10)}}
	capture(t, s, give)
	m := b.stored(t)[0]

	read := func(t *testing.T, s *dlq.Store, want error) {
		t.Helper()
		got, err := s.Load(t.Context(), m.Header, m.Data)
		if got == nil || got.ID != give.ID || got.Error != give.Error || got.BodySize != 1<<20 {
			t.Fatalf("Load() = %+v, want what is in the record", got)
		}
		if !errors.Is(err, want) {
			t.Errorf("Load() = %v, want %v", err, want)
		}
	}
	bucket, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{give.ID, give.ID + ".headers"} {
		if err := bucket.Delete(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	read(t, s, jetstream.ErrObjectNotFound)
	if err := b.js.DeleteObjectStore(t.Context(), "DLQ_LARGE"); err != nil {
		t.Fatal(err)
	}
	read(t, b.store(t, dlq.Config{}), jetstream.ErrBucketNotFound)
	if _, err := b.js.ObjectStore(t.Context(), "DLQ_LARGE"); !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("reading has made an object store: %v", err)
	}
}

const secret = "hunter2-hunter2-hunter2"

// secretRecord has the secret in all that may be redacted.
func secretRecord(size int) *dlq.Record {
	r := record(1)
	r.Header = nats.Header{"Authorization": {secret}, "Tenant": {"blue"}}
	r.Data = append(noise(1, size), secret...)
	r.Error, r.ReasonText = "wrong password "+secret, secret
	return r
}

func redactAll(r *dlq.Record) {
	r.Header.Set("Authorization", "***")
	r.Data = bytes.ReplaceAll(r.Data, []byte(secret), []byte("***"))
	r.Error, r.ReasonText = strings.ReplaceAll(r.Error, secret, "***"), strings.ReplaceAll(r.ReasonText, secret, "***")
	for i, line := range r.Stack {
		r.Stack[i] = strings.ReplaceAll(line, secret, "***")
	}
}

func TestCapture_redact(t *testing.T) {
	t.Parallel()

	const large = 1<<20 - len(secret)
	tests := []struct {
		name       string
		cfg        dlq.Config
		size       int
		stack      []string
		wantFound  bool
		wantBody   dlq.BodyPlace
		wantSize   int
		wantError  string
		wantTenant string
	}{
		{name: "nothing", size: 100, wantFound: true, wantSize: 100 + len(secret), wantError: "wrong password " + secret, wantTenant: "blue"},
		{
			name: "nothing, large", size: large,
			wantFound: true, wantBody: dlq.BodyObject, wantSize: 1 << 20, wantError: "wrong password " + secret, wantTenant: "blue",
		},
		{
			name: "redacted", cfg: dlq.Config{Redact: redactAll}, size: 100, stack: []string{"a " + secret},
			wantSize: 103, wantError: "wrong password ***", wantTenant: "blue",
		},
		{
			name: "redacted, large", cfg: dlq.Config{Redact: redactAll}, size: large, stack: []string{"a " + secret},
			wantBody: dlq.BodyObject, wantSize: large + 3, wantError: "wrong password ***", wantTenant: "blue",
		},
		{name: "metadata only", cfg: dlq.Config{MetadataOnly: true}, size: 100, wantBody: dlq.BodyOmitted, wantSize: 100 + len(secret)},
		{name: "metadata only, large", cfg: dlq.Config{MetadataOnly: true}, size: large, wantBody: dlq.BodyOmitted, wantSize: 1 << 20},
		{
			name: "metadata only and redact", cfg: dlq.Config{MetadataOnly: true, Redact: redactAll}, size: 100,
			wantBody: dlq.BodyOmitted, wantSize: 100 + len(secret),
		},
		{
			name: "panics", cfg: dlq.Config{Redact: func(r *dlq.Record) { panic(r.Error) }}, size: 100, stack: []string{"a " + secret},
			wantBody: dlq.BodyOmitted, wantSize: 100 + len(secret),
		},
		{
			name: "panics half way, large", size: large, cfg: dlq.Config{Redact: func(r *dlq.Record) {
				r.Header.Set("Authorization", "***")
				panic(secret)
			}},
			wantBody: dlq.BodyOmitted, wantSize: 1 << 20,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.provisioned(t, tt.cfg)
			for i := range 3 {
				give := secretRecord(tt.size)
				give.Stack = append([]string(nil), tt.stack...)
				captured, err := s.Capture(t.Context(), give, nil)
				if captured != (i == 0) || err != nil {
					t.Fatalf("Capture() = %v, %v", captured, err)
				}
			}
			got := b.load(t, s)
			if got.Body != tt.wantBody || got.BodySize != tt.wantSize {
				t.Errorf("the body is %q of %d bytes, want %q of %d", got.Body, got.BodySize, tt.wantBody, tt.wantSize)
			}
			if got.Error != tt.wantError || got.Header.Get("Tenant") != tt.wantTenant {
				t.Errorf("the error is %q, the tenant %q; want %q, %q", got.Error, got.Header.Get("Tenant"), tt.wantError, tt.wantTenant)
			}
			if got.Reason != dlq.ReasonAttemptsExhausted || got.Consumer != "billing" || got.ErrorType != "declined" {
				t.Errorf("what failed where is lost: %+v", got)
			}
			// Whatever has ever been written is in the server's files.
			b.nc.Close()
			b.server.Stop()
			if found := onDisk(t, b.server.StoreDir(), secret); (len(found) > 0) != tt.wantFound {
				t.Errorf("the secret is in %q, want it there: %v", found, tt.wantFound)
			}
		})
	}
}

// onDisk lists the files with the text.
func onDisk(t *testing.T, dir, text string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		if bytes.Contains(content, []byte(text)) {
			found = append(found, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
