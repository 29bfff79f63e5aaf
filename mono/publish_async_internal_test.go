package mono

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
)

func TestScanPubAck(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give string
		want jetstream.PubAck // zero: left to encoding/json
	}{
		{"stored", `{"stream":"ORDERS","seq":17}`, jetstream.PubAck{Stream: "ORDERS", Sequence: 17}},
		{"the largest", `{"stream":"a b","seq":9999999999999999999}`, jetstream.PubAck{Stream: "a b", Sequence: 9999999999999999999}},
		{"too large", `{"stream":"a","seq":99999999999999999999}`, jetstream.PubAck{}},
		{"a duplicate", `{"stream":"a","seq":17,"duplicate": true}`, jetstream.PubAck{}},
		{"a domain", `{"stream":"a","domain":"hub","seq":17}`, jetstream.PubAck{}},
		{"refused", `{"error":{"code":400,"err_code":10077,"description":"no"},"stream":"a","seq":0}`, jetstream.PubAck{}},
		{"refused, last", `{"stream":"a","seq":1,"error":{}}`, jetstream.PubAck{}},
		{"escaped", `{"stream":"a\u0020b","seq":17}`, jetstream.PubAck{}},
		{"not ASCII", `{"stream":"ä","seq":17}`, jetstream.PubAck{}},
		{"no name", `{"stream":"","seq":17}`, jetstream.PubAck{}},
		{"no sequence", `{"stream":"a","seq":}`, jetstream.PubAck{}},
		{"sequence 0", `{"stream":"a","seq":0}`, jetstream.PubAck{}},
		{"negative", `{"stream":"a","seq":-1}`, jetstream.PubAck{}},
		{"cut short", `{"stream":"a","seq":17`, jetstream.PubAck{}},
		{"cut in the name", `{"stream":"a`, jetstream.PubAck{}},
		{"more after it", `{"stream":"a","seq":17}}`, jetstream.PubAck{}},
		{"nothing", ``, jetstream.PubAck{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, ok := scanPubAck([]byte(tt.give), "ORDERS")
			if want := tt.want != (jetstream.PubAck{}); ok != want || ok && got != tt.want {
				t.Errorf("scanPubAck(%s) = %+v, %v, want %+v, %v", tt.give, got, ok, tt.want, want)
			}
		})
	}
}

// What is scanned is what encoding/json would have read.
func FuzzScanPubAck(f *testing.F) {
	for _, seed := range []string{
		`{"stream":"ORDERS","seq":17}`, `{"stream":"a","seq":17,"duplicate": true}`,
		`{"stream":"a\u0020b","seq":9999999999999999999}`, `{"stream":"a","seq":017}`, `{"stream":"a"`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		got, ok := scanPubAck(data, "ORDERS")
		if !ok {
			return
		}
		var want jetstream.PubAck
		if err := json.Unmarshal(data, &want); err != nil || got != want {
			t.Errorf("scanPubAck(%q) = %+v, want %+v, %v", data, got, want, err)
		}
	})
}

// A lost connection ends publishes while they are being written. Each message has
// the trace of its own publish nevertheless.
func TestAsyncPublisher_endedWhileWriting(t *testing.T) {
	t.Parallel()
	url, js := startServer(t)
	tp := sdktrace.NewTracerProvider()
	app, err := New(WithNATS(url), WithLogger(slog.New(slog.DiscardHandler)), WithTracerProvider(tp), WithMeterProvider(nil))
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEvent("shop", "Placed", "v1")
	if err != nil {
		t.Fatal(err)
	}
	stream := StreamConfig{Name: "orders", Subjects: []string{e.Subject}}
	if _, err := js.CreateStream(t.Context(), stream); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), internalPatience)
	defer cancel()
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
	p := app.bus.run.Load().async
	// The connection is lost some times for each publish, and not as often as the
	// machine can: the publishers would wait for the lock most of the time.
	const each, losses = 2000, 16
	begun := make(chan struct{}, 1)
	var publishers, lost sync.WaitGroup
	lost.Go(func() {
		for range begun {
			for range losses {
				p.failAll(ErrDisconnected, time.Now().Add(time.Hour))
			}
		}
	})
	for range 3 {
		publishers.Go(func() {
			for range each {
				select {
				case begun <- struct{}{}:
				default:
				}
				ctx, span := tp.Tracer("test").Start(ctx, "request")
				trace := span.SpanContext().TraceID().String()
				if _, err := app.Bus().PublishStreamAsync(ctx, &Msg{Subject: e.Subject, Data: []byte(trace)}); err != nil &&
					!errors.Is(err, ErrDisconnected) {
					t.Error(err)
				}
				span.End()
			}
		})
	}
	publishers.Wait()
	close(begun)
	lost.Wait()
	if err := app.Stop(ctx); err != nil {
		t.Error(err)
	}
	s, err := js.Stream(ctx, "orders")
	if err != nil {
		t.Fatal(err)
	}
	last := s.CachedInfo().State.LastSeq
	if last == 0 {
		t.Fatal("nothing is stored")
	}
	for seq := uint64(1); seq <= last; seq++ {
		m, err := s.GetMsg(ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		if v := m.Header.Get("traceparent"); !strings.Contains(v, string(m.Data)) {
			t.Fatalf("message %d of trace %s has the traceparent %q", seq, m.Data, v)
		}
	}
}

// An acknowledgement by the stream that acknowledged before costs no allocation.
//
//nolint:paralleltest // counts the allocations of the process
func TestAlloc_decodePubAck(t *testing.T) {
	m, last := &nats.Msg{Data: []byte(`{"stream":"ORDERS","seq":17}`)}, "ORDERS"
	if n := testing.AllocsPerRun(100, func() {
		if _, err := decodePubAck(m, last); err != nil {
			t.Fatal(err)
		}
	}); n != 0 {
		t.Errorf("an acknowledgement makes %v allocations, want 0", n)
	}
}
