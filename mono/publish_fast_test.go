package mono_test

import (
	"errors"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono/monotest"
)

// What keeps PublishStreamAsync from fast batches, and what would let it have them:
// see docs/decisions/0018. When one of these fails with a new server, read that page
// again.
func TestFastBatch_tellsTooLittle(t *testing.T) {
	t.Parallel()

	t.Run("another publisher's message is between", func(t *testing.T) {
		t.Parallel()
		b := newFastBatch(t, jetstream.StreamConfig{AllowBatchPublish: true})
		b.send(fastStart, nil)
		b.want(`{"type":"ack","seq":0,"msgs":1}`)
		b.want(`{"type":"ack","seq":1,"msgs":1}`) // of the batch; not of the stream
		other, err := b.js.Publish(t.Context(), b.subject, nil)
		if err != nil {
			t.Fatal(err)
		}
		if other.Sequence != 2 {
			t.Fatalf("the other message is number %d, want 2", other.Sequence)
		}
		b.send(fastAppend, nil)
		b.want(`{"type":"ack","seq":2,"msgs":1}`)
		b.send(fastCommit, nil)
		// Messages 1, 3 and 4 of the stream, of which only the last is told.
		b.want(`{"stream":"fast","seq":4,"batch":"b","count":3}`)
	})

	t.Run("a duplicate is counted as stored", func(t *testing.T) {
		t.Parallel()
		b := newFastBatch(t, jetstream.StreamConfig{AllowBatchPublish: true})
		first, err := b.js.Publish(t.Context(), b.subject, nil, jetstream.WithMsgID("one"))
		if err != nil {
			t.Fatal(err)
		}
		b.send(fastStart, nil)
		b.want(`{"type":"ack","seq":0,"msgs":1}`)
		b.want(`{"type":"ack","seq":1,"msgs":1}`)
		b.send(fastAppend, nats.Header{jetstream.MsgIDHeader: {"one"}})
		b.want(`{"type":"ack","seq":2,"msgs":1}`)
		b.send(fastCommit, nil)
		b.want(`{"stream":"fast","seq":3,"batch":"b","count":3}`)
		if b.stored() != 3 || first.Sequence != 1 {
			t.Errorf("%d messages are stored, want 3: the first, and two of the batch", b.stored())
		}
	})

	t.Run("what follows a refused message is thrown away", func(t *testing.T) {
		t.Parallel()
		b := newFastBatch(t, jetstream.StreamConfig{AllowBatchPublish: true})
		b.send(fastStart, nil)
		b.want(`{"type":"ack","seq":0,"msgs":1}`)
		b.want(`{"type":"ack","seq":1,"msgs":1}`)
		b.send(fastAppend, nats.Header{jetstream.ExpectedLastSeqHeader: {"77"}})
		b.want(`{"type":"err","seq":2,`)
		b.want(`{"stream":"fast","seq":1,"batch":"b","count":1}`)
		b.send(fastAppend, nil)
		b.want(`"err_code":10208`) // the batch is unknown
		b.send(fastCommit, nil)
		b.want(`"err_code":10208`) // the batch is unknown
		if n := b.stored(); n != 1 {
			t.Errorf("%d messages are stored, want 1", n)
		}
	})

	t.Run("a stream has to be made for it", func(t *testing.T) {
		t.Parallel()
		b := newFastBatch(t, jetstream.StreamConfig{})
		b.send(fastStart, nil)
		b.want(`"err_code":10205`) // disabled
		if n := b.stored(); n != 0 {
			t.Errorf("%d messages are stored, want none", n)
		}
		cfg := b.cfg
		cfg.AllowBatchPublish = true
		if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatalf("the stream that exists cannot be changed: %v", err)
		}
		b.n = 0
		b.send(fastStart, nil)
		b.want(`{"type":"ack","seq":0,"msgs":1}`)
	})
}

// Operations of the server's fast batches.
const (
	fastStart = iota
	fastAppend
	fastCommit
)

// A fastBatch is one batch that ends with the first message that is missing or
// refused, and asks for an answer to each.
type fastBatch struct {
	t       *testing.T
	nc      *nats.Conn
	js      jetstream.JetStream
	cfg     jetstream.StreamConfig
	subject string
	inbox   string
	answers chan *nats.Msg
	n       int
}

func newFastBatch(t *testing.T, cfg jetstream.StreamConfig) *fastBatch {
	t.Helper()
	nc := monotest.Server(t).Conn()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Name, cfg.Subjects = "fast", []string{"fast.>"}
	if _, err := js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	b := &fastBatch{
		t: t, nc: nc, js: js, cfg: cfg,
		subject: "fast.a", inbox: nc.NewInbox(), answers: make(chan *nats.Msg, 64),
	}
	if _, err := nc.ChanSubscribe(b.inbox+".>", b.answers); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *fastBatch) send(op int, h nats.Header) {
	b.t.Helper()
	b.n++
	reply := strings.Join([]string{b.inbox, "b", "1", "fail", strconv.Itoa(b.n), strconv.Itoa(op), "$FI"}, ".")
	if err := b.nc.PublishMsg(&nats.Msg{Subject: b.subject, Reply: reply, Header: h, Data: []byte("x")}); err != nil {
		b.t.Fatal(err)
	}
}

// want takes the next answer, which has this in it.
func (b *fastBatch) want(part string) {
	b.t.Helper()
	if m := receive(b.t, b.answers, part); !strings.Contains(string(m.Data), part) {
		b.t.Fatalf("the answer is %s, want %s", m.Data, part)
	}
}

func (b *fastBatch) stored() uint64 {
	b.t.Helper()
	s, err := b.js.Stream(b.t.Context(), "fast")
	info, err2 := s.Info(b.t.Context())
	if err = errors.Join(err, err2); err != nil {
		b.t.Fatal(err)
	}
	return info.State.Msgs
}
