package dlq_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

// bridgePatience bounds every wait. A test that waits this long has failed.
const bridgePatience = 3 * time.Minute

const (
	shortGrace = 50 * time.Millisecond
	// longGrace leaves time to acknowledge late, on a busy machine as well.
	longGrace = 2 * time.Second

	testTraceparent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
)

// A bridgeSetup is a server with a dead-letter stream.
type bridgeSetup struct {
	srv   *monotest.TestServer
	nc    *nats.Conn
	js    jetstream.JetStream
	store *dlq.Store
	cfg   dlq.Config
}

func setupBridge(t *testing.T, cfg dlq.Config) *bridgeSetup {
	t.Helper()
	s := &bridgeSetup{srv: monotest.Server(t), cfg: cfg}
	s.nc, s.js, s.store = s.connect(t)
	if err := s.store.Provision(bridgeContext(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

// connect makes a connection of its own, as another process has.
func (s *bridgeSetup) connect(t *testing.T) (*nats.Conn, jetstream.JetStream, *dlq.Store) {
	t.Helper()
	nc := s.srv.Conn(nats.MaxReconnects(-1), nats.ReconnectWait(20*time.Millisecond),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // what tests provoke is not to be read
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(bridgePatience))
	if err != nil {
		t.Fatal(err)
	}
	store, err := dlq.NewStore(nc, js, s.cfg)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js, store
}

func bridgeContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bridgePatience)
	t.Cleanup(cancel)
	return ctx
}

// restart restarts the server, and waits until the connection is there again.
func (s *bridgeSetup) restart(t *testing.T) {
	t.Helper()
	before := s.nc.Stats().Reconnects
	s.srv.Stop()
	s.srv.Start()
	bridgeEventually(t, "the connection", func() bool { return s.nc.Stats().Reconnects > before && s.nc.IsConnected() })
}

// bridgeEventually polls until cond holds.
func bridgeEventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.NewTimer(bridgePatience)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited too long for %s", what)
		}
	}
}

// A bridgeProbe is a bridge, and what it has told.
type bridgeProbe struct {
	*dlq.Bridge

	mu       sync.Mutex
	captured int // new records
	again    int // records that were there
	failed   []error
	skipped  []string
}

func newBridgeProbe(t *testing.T, store *dlq.Store, cfg dlq.BridgeConfig) *bridgeProbe {
	t.Helper()
	p := &bridgeProbe{}
	if cfg.Grace == 0 {
		cfg.Grace = shortGrace
	}
	cfg.Captured = func(_ context.Context, r *dlq.Record, captured bool, err error) {
		p.mu.Lock()
		defer p.mu.Unlock()
		switch {
		case r == nil || r.ID == "":
			t.Error("Captured was called without a record")
		case err != nil:
			p.failed = append(p.failed, err)
		case captured:
			p.captured++
		default:
			p.again++
		}
	}
	cfg.Skipped = func(_ context.Context, why string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.skipped = append(p.skipped, why)
	}
	b, err := dlq.NewBridge(store, cfg)
	if err != nil {
		t.Fatal(err)
	}
	p.Bridge = b
	return p
}

// startBridge starts a bridge that stops with the test.
func startBridge(t *testing.T, store *dlq.Store, cfg dlq.BridgeConfig) *bridgeProbe {
	t.Helper()
	p := newBridgeProbe(t, store, cfg)
	p.start(t)
	return p
}

func (p *bridgeProbe) start(t *testing.T) {
	t.Helper()
	if err := p.Start(bridgeContext(t)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), bridgePatience)
		defer cancel()
		if err := p.Stop(ctx); err != nil {
			t.Error(err)
		}
	})
}

func (p *bridgeProbe) stop(t *testing.T) {
	t.Helper()
	if err := p.Stop(bridgeContext(t)); err != nil {
		t.Fatal(err)
	}
}

func (p *bridgeProbe) failures() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.failed)
}

func (p *bridgeProbe) skips() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.skipped)
}

// wantSkip waits until advisories were skipped, and checks why.
func (p *bridgeProbe) wantSkip(t *testing.T, want ...string) {
	t.Helper()
	bridgeEventually(t, "advisories to be skipped", func() bool { return len(p.skips()) >= len(want) })
	if got := p.skips(); !slices.Equal(got, want) {
		t.Errorf("skipped %q, want %q", got, want)
	}
}

func (s *bridgeSetup) stream(t *testing.T, cfg jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	if len(cfg.Subjects) == 0 {
		cfg.Subjects = []string{cfg.Name + ".>"}
	}
	stream, err := s.js.CreateStream(bridgeContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// consumer makes a consumer as plain clients do.
func (s *bridgeSetup) consumer(t *testing.T, stream string, cfg jetstream.ConsumerConfig) jetstream.Consumer {
	t.Helper()
	c, err := s.js.CreateOrUpdateConsumer(bridgeContext(t), stream, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *bridgeSetup) publish(t *testing.T, subject, data string) {
	t.Helper()
	msg := &nats.Msg{Subject: subject, Data: []byte(data), Header: nats.Header{
		"Order-Id": {"4711"}, "X-Many": {"a", "b"}, "Traceparent": {testTraceparent},
	}}
	if _, err := s.js.PublishMsg(bridgeContext(t), msg); err != nil {
		t.Fatal(err)
	}
}

func nextMessage(t *testing.T, c jetstream.Consumer) jetstream.Msg {
	t.Helper()
	m, err := c.Next(jetstream.FetchMaxWait(bridgePatience / 2))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// exhaust refuses all deliveries of as many messages, until the server has told that
// it gives up. It does so when it is asked for more.
func (s *bridgeSetup) exhaust(t *testing.T, c jetstream.Consumer, messages int) {
	t.Helper()
	told := s.info(t, dlq.AdvisoryStream).State.LastSeq
	stop := consumeWith(t, c, func(m jetstream.Msg) { _ = m.Nak() })
	s.waitAdvisories(t, told+uint64(messages))
	stop()
}

// consumeWith handles messages until the function that it returns is called.
func consumeWith(t *testing.T, c jetstream.Consumer, handle jetstream.MessageHandler) (stop func()) {
	t.Helper()
	running, err := c.Consume(handle)
	if err != nil {
		t.Fatal(err)
	}
	return func() {
		running.Stop()
		<-running.Closed()
	}
}

// letLeaseEnd lets the lease of all deliveries of a message end, until the server has
// told that it gives up, and returns the last one.
func (s *bridgeSetup) letLeaseEnd(t *testing.T, c jetstream.Consumer) jetstream.Msg {
	t.Helper()
	told := s.info(t, dlq.AdvisoryStream).State.LastSeq
	deliveries := make(chan jetstream.Msg, 100)
	stop := consumeWith(t, c, func(m jetstream.Msg) { deliveries <- m })
	s.waitAdvisories(t, told+1)
	stop()
	if got, want := len(deliveries), c.CachedInfo().Config.MaxDeliver; got != want {
		t.Fatalf("%d deliveries, want %d", got, want)
	}
	var last jetstream.Msg
	for len(deliveries) > 0 {
		last = <-deliveries
	}
	return last
}

// letters reads the dead letters.
func (s *bridgeSetup) letters(t *testing.T) []*dlq.Record {
	t.Helper()
	ctx := bridgeContext(t)
	stream, err := s.js.Stream(ctx, s.cfg.StreamName())
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	var letters []*dlq.Record
	state := stream.CachedInfo().State
	for seq := state.FirstSeq; seq <= state.LastSeq && state.Msgs > 0; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.store.Load(ctx, m.Header, m.Data)
		if err != nil {
			t.Fatal(err)
		}
		letters = append(letters, r)
	}
	return letters
}

func (s *bridgeSetup) waitLetters(t *testing.T, n int) []*dlq.Record {
	t.Helper()
	var letters []*dlq.Record
	bridgeEventually(t, fmt.Sprintf("%d dead letters", n), func() bool { letters = s.letters(t); return len(letters) >= n })
	if len(letters) != n {
		t.Errorf("%d dead letters, want %d", len(letters), n)
	}
	return letters
}

// waitSettled waits until nothing is left for the bridges to do.
func (s *bridgeSetup) waitSettled(t *testing.T) {
	t.Helper()
	bridgeEventually(t, "all advisories to be handled", func() bool {
		c, err := s.js.Consumer(bridgeContext(t), dlq.AdvisoryStream, "bridge_"+s.cfg.StreamName())
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	})
}

// waitAdvisories waits until the server has told as many.
func (s *bridgeSetup) waitAdvisories(t *testing.T, n uint64) {
	t.Helper()
	bridgeEventually(t, fmt.Sprintf("%d advisories", n), func() bool {
		return s.info(t, dlq.AdvisoryStream).State.LastSeq >= n
	})
}

func (s *bridgeSetup) info(t *testing.T, stream string) *jetstream.StreamInfo {
	t.Helper()
	h, err := s.js.Stream(bridgeContext(t), stream)
	if err != nil {
		t.Fatal(err)
	}
	return h.CachedInfo()
}

func (s *bridgeSetup) messages(t *testing.T, stream string) uint64 {
	t.Helper()
	return s.info(t, stream).State.Msgs
}

// wantLetter checks what every record of a message that is there must have.
func wantLetter(t *testing.T, r *dlq.Record, reason dlq.Reason, subject, data string) {
	t.Helper()
	if r.Reason != reason {
		t.Errorf("reason is %q, want %q", r.Reason, reason)
	}
	if r.Subject != subject || string(r.Data) != data || r.Body != dlq.BodyInline {
		t.Errorf("subject %q, body %q (%q), want %q, %q", r.Subject, r.Data, r.Body, subject, data)
	}
	if r.Header.Get("Order-Id") != "4711" || !slices.Equal(r.Header["X-Many"], []string{"a", "b"}) {
		t.Errorf("headers are %q", r.Header)
	}
	if r.OriginTraceparent != testTraceparent {
		t.Errorf("trace of the publish is %q, want %q", r.OriginTraceparent, testTraceparent)
	}
	if r.ID != dlq.ID(r.Stream, r.StreamCreated, r.Consumer, r.StreamSequence) {
		t.Errorf("ID is %q, which is not that of its message", r.ID)
	}
	if r.Stored.IsZero() || r.StreamCreated.IsZero() || r.Failed.Before(r.Stored) {
		t.Errorf("stream made %v, message stored %v, failed %v: want all of them, in this order", r.StreamCreated, r.Stored, r.Failed)
	}
}

func TestBridge_exhausted(t *testing.T) {
	t.Parallel()

	for _, tt := range []struct {
		name       string
		retention  jetstream.RetentionPolicy
		maxDeliver int
		wantLeft   uint64 // in the message's own stream
	}{
		{name: "limits", retention: jetstream.LimitsPolicy, maxDeliver: 3, wantLeft: 2},
		{name: "work queue", retention: jetstream.WorkQueuePolicy, maxDeliver: 3, wantLeft: 1},
		{name: "interest", retention: jetstream.InterestPolicy, maxDeliver: 3, wantLeft: 1},
		{name: "limits, one delivery", retention: jetstream.LimitsPolicy, maxDeliver: 1, wantLeft: 2},
		{name: "work queue, one delivery", retention: jetstream.WorkQueuePolicy, maxDeliver: 1, wantLeft: 1},
		{name: "interest, one delivery", retention: jetstream.InterestPolicy, maxDeliver: 1, wantLeft: 1},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			startBridge(t, s.store, dlq.BridgeConfig{})
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: tt.retention})
			c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: tt.maxDeliver})
			s.publish(t, "ORDERS.created", "first")
			s.exhaust(t, c, 1)
			s.publish(t, "ORDERS.created", "second") // nobody fetches it, so it stays

			r := s.waitLetters(t, 1)[0]
			wantLetter(t, r, dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
			if r.Stream != "ORDERS" || r.Consumer != "billing" || r.StreamSequence != 1 || r.Deliveries != uint64(tt.maxDeliver) {
				t.Errorf("stream %q, consumer %q, sequence %d, deliveries %d", r.Stream, r.Consumer, r.StreamSequence, r.Deliveries)
			}
			s.waitSettled(t)
			if left := s.messages(t, "ORDERS"); left != tt.wantLeft {
				t.Errorf("%d messages are left in the stream, want %d", left, tt.wantLeft)
			}
			if m := nextMessage(t, c); string(m.Data()) != "second" {
				t.Errorf("the consumer goes on with %q, want the second message", m.Data())
			}
			info, err := c.Info(bridgeContext(t))
			if err != nil || info.NumRedelivered != 0 {
				t.Errorf("the consumer is said to have %d messages delivered again, error %v", info.NumRedelivered, err)
			}
		})
	}
}

// A handler that lets its lease end, and never answers.
func TestBridge_exhaustedBySilence(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2, AckWait: 50 * time.Millisecond})
	s.publish(t, "ORDERS.created", "first")
	s.letLeaseEnd(t, c)
	r := s.waitLetters(t, 1)[0]
	wantLetter(t, r, dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
	if r.Deliveries != 2 {
		t.Errorf("%d deliveries, want 2", r.Deliveries)
	}
	bridgeEventually(t, "the message to leave its stream", func() bool { return s.messages(t, "ORDERS") == 0 })
}

func TestBridge_pushConsumer(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.InterestPolicy})
	c, err := s.js.CreatePushConsumer(bridgeContext(t), "ORDERS", jetstream.ConsumerConfig{
		Durable: "billing", MaxDeliver: 2, AckPolicy: jetstream.AckExplicitPolicy, DeliverSubject: "to.billing",
	})
	if err != nil {
		t.Fatal(err)
	}
	running, err := c.Consume(func(m jetstream.Msg) { _ = m.Nak() })
	if err != nil {
		t.Fatal(err)
	}
	defer running.Stop()
	s.publish(t, "ORDERS.created", "first")
	wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
	bridgeEventually(t, "the message to leave its stream", func() bool { return s.messages(t, "ORDERS") == 0 })
}

func TestBridge_interestOfOthers(t *testing.T) {
	t.Parallel()

	t.Run("one that has still to handle it gets it", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		startBridge(t, s.store, dlq.BridgeConfig{})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.InterestPolicy})
		billing := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		shipping := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "shipping"})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, billing, 1)
		wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
		s.waitSettled(t)
		if left := s.messages(t, "ORDERS"); left != 1 {
			t.Fatalf("%d messages are left in the stream, want the one that shipping has not had", left)
		}
		if err := nextMessage(t, shipping).DoubleAck(bridgeContext(t)); err != nil {
			t.Fatal(err)
		}
		bridgeEventually(t, "the message to leave its stream", func() bool { return s.messages(t, "ORDERS") == 0 })
	})

	// Both are past the message by their ack floors, and one is not captured yet.
	t.Run("one that gave it up, too, keeps its dead letter", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		startBridge(t, s.store, dlq.BridgeConfig{Grace: time.Second})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.InterestPolicy})
		billing := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		shipping := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "shipping", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, billing, 1)
		s.exhaust(t, shipping, 1)
		for _, r := range s.waitLetters(t, 2) {
			wantLetter(t, r, dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
		}
		bridgeEventually(t, "the message to leave its stream", func() bool { return s.messages(t, "ORDERS") == 0 })
	})
}

func TestBridge_terminated(t *testing.T) {
	t.Parallel()

	for _, tt := range []struct {
		name      string
		retention jetstream.RetentionPolicy
		other     bool // another consumer needs the message
		wantGone  bool
	}{
		{name: "limits", retention: jetstream.LimitsPolicy},
		{name: "work queue", retention: jetstream.WorkQueuePolicy, wantGone: true},
		{name: "interest", retention: jetstream.InterestPolicy, wantGone: true},
		{name: "interest of another", retention: jetstream.InterestPolicy, other: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			startBridge(t, s.store, dlq.BridgeConfig{Grace: time.Hour}) // it does not count here
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: tt.retention})
			c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
			if tt.other {
				s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "shipping"})
			}
			s.publish(t, "ORDERS.created", "first")
			if err := nextMessage(t, c).TermWithReason("no such customer: “ö”"); err != nil {
				t.Fatal(err)
			}
			r := s.waitLetters(t, 1)[0]
			if r.ReasonText != "no such customer: “ö”" {
				t.Errorf("reason's text is %q", r.ReasonText)
			}
			if r.Deliveries != 1 || r.ConsumerSequence != 1 || r.StreamSequence != 1 || r.Consumer != "billing" || r.Stream != "ORDERS" {
				t.Errorf("deliveries %d, consumer sequence %d, stream sequence %d, consumer %q, stream %q",
					r.Deliveries, r.ConsumerSequence, r.StreamSequence, r.Consumer, r.Stream)
			}
			if !tt.wantGone {
				wantLetter(t, r, dlq.ReasonExternalTerminated, "ORDERS.created", "first")
				return
			}
			if r.Reason != dlq.ReasonExternalTerminated || r.Body != dlq.BodyGone || len(r.Data) > 0 {
				t.Errorf("reason %q, body %q (%q), want %q, no body", r.Reason, r.Data, r.Body, dlq.ReasonExternalTerminated)
			}
		})
	}
}

// Whatever is done about one message of an AckAll consumer, those before it are in work.
func TestBridge_ackAll(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.InterestPolicy})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{
		Durable: "billing", MaxDeliver: 2, AckPolicy: jetstream.AckAllPolicy, AckWait: time.Hour,
	})
	s.publish(t, "ORDERS.created", "first")
	s.publish(t, "ORDERS.created", "second")
	stop := consumeWith(t, c, func(m jetstream.Msg) {
		if string(m.Data()) == "second" { // the first is in work
			_ = m.Nak()
		}
	})
	wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "second")
	s.waitSettled(t)
	stop()
	info, err := c.Info(bridgeContext(t))
	if err != nil || info.NumAckPending != 1 {
		t.Errorf("%d messages are in work, error %v, want the first", info.NumAckPending, err)
	}
	if left := s.messages(t, "ORDERS"); left != 2 {
		t.Errorf("%d messages are in the stream, want both", left)
	}
}

// What a stream drops while a consumer has it is terminated by the server.
func TestBridge_dropped(t *testing.T) {
	t.Parallel()

	t.Run("by a purge", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		startBridge(t, s.store, dlq.BridgeConfig{})
		stream := s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
		s.publish(t, "ORDERS.created", "first")
		nextMessage(t, c)
		if err := stream.DeleteMsg(bridgeContext(t), 1); err != nil {
			t.Fatal(err)
		}
		r := s.waitLetters(t, 1)[0]
		if r.Reason != dlq.ReasonExpired || r.Body != dlq.BodyGone || r.ReasonText == "" {
			t.Errorf("reason %q, %q, body %q, want %q with the server's words, no body", r.Reason, r.ReasonText, r.Body, dlq.ReasonExpired)
		}
	})

	t.Run("by a newer message of its subject", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		p := startBridge(t, s.store, dlq.BridgeConfig{})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS", MaxMsgsPerSubject: 1})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
		s.publish(t, "ORDERS.created", "first")
		nextMessage(t, c)
		s.publish(t, "ORDERS.created", "second")
		p.wantSkip(t, dlq.SkipReplaced)
		s.waitLetters(t, 0)
	})

	t.Run("after it was given up", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		startBridge(t, s.store, dlq.BridgeConfig{Grace: time.Second})
		stream := s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, c, 1)
		if err := stream.DeleteMsg(bridgeContext(t), 1); err != nil {
			t.Fatal(err)
		}
		r := s.waitLetters(t, 1)[0]
		if r.Reason != dlq.ReasonExpired || r.Body != dlq.BodyGone || r.Deliveries != 2 {
			t.Errorf("reason %q, body %q, %d deliveries, want %q, no body, 2", r.Reason, r.Body, r.Deliveries, dlq.ReasonExpired)
		}
	})
}

// The handler of the last delivery takes longer than AckWait, and acknowledges.
func TestBridge_lateAck(t *testing.T) {
	t.Parallel()

	for _, tt := range []struct {
		name      string
		retention jetstream.RetentionPolicy
		other     bool
	}{
		{name: "limits", retention: jetstream.LimitsPolicy},
		{name: "work queue", retention: jetstream.WorkQueuePolicy},
		{name: "interest", retention: jetstream.InterestPolicy},
		{name: "interest of another", retention: jetstream.InterestPolicy, other: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			p := startBridge(t, s.store, dlq.BridgeConfig{Grace: longGrace})
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: tt.retention})
			c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2, AckWait: 50 * time.Millisecond})
			if tt.other {
				s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "shipping"})
			}
			s.publish(t, "ORDERS.created", "first")
			last := s.letLeaseEnd(t, c)
			if err := last.DoubleAck(bridgeContext(t)); err != nil {
				t.Fatal(err)
			}
			p.wantSkip(t, dlq.SkipAcknowledged)
			s.waitLetters(t, 0)
			s.waitSettled(t)
		})
	}

	// The first dead letter of a consumer must not hide that later ones are none.
	t.Run("after a dead letter", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		p := startBridge(t, s.store, dlq.BridgeConfig{Grace: longGrace})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2, AckWait: 50 * time.Millisecond})
		s.publish(t, "ORDERS.created", "first")
		s.letLeaseEnd(t, c)
		s.waitLetters(t, 1)
		s.waitSettled(t)
		s.publish(t, "ORDERS.created", "second")
		last := s.letLeaseEnd(t, c)
		if err := last.DoubleAck(bridgeContext(t)); err != nil {
			t.Fatal(err)
		}
		p.wantSkip(t, dlq.SkipAcknowledged)
		s.waitLetters(t, 1)
	})
}

func TestBridge_several(t *testing.T) {
	t.Parallel()
	const messages = 30
	s := setupBridge(t, dlq.Config{})
	_, _, store := s.connect(t)
	probes := []*bridgeProbe{startBridge(t, s.store, dlq.BridgeConfig{}), startBridge(t, store, dlq.BridgeConfig{})}
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
	for i := range messages {
		s.publish(t, "ORDERS.created", fmt.Sprint(i))
	}
	s.exhaust(t, c, messages)
	s.waitLetters(t, messages)
	s.waitSettled(t)
	seen := make(map[string]bool)
	for _, r := range s.waitLetters(t, messages) {
		if seen[string(r.Data)] {
			t.Errorf("message %q was captured twice", r.Data)
		}
		seen[string(r.Data)] = true
	}
	total := 0
	for _, p := range probes {
		p.mu.Lock()
		total += p.captured
		if p.again > 0 || len(p.failed) > 0 || len(p.skipped) > 0 {
			t.Errorf("%d captured again, failures %v, skipped %q, want none", p.again, p.failed, p.skipped)
		}
		p.mu.Unlock()
	}
	if total != messages {
		t.Errorf("the bridges say that they captured %d, want %d", total, messages)
	}
	if left := s.messages(t, "ORDERS"); left != 0 {
		t.Errorf("%d messages are left in the stream, want 0", left)
	}
}

// Stores share the advisories, and each has a reader of its own.
func TestBridge_severalStores(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	other := &bridgeSetup{srv: s.srv, nc: s.nc, js: s.js, cfg: dlq.Config{Stream: jetstream.StreamConfig{Name: "OTHER"}}}
	_, _, other.store = other.connect(t)
	if err := other.store.Provision(bridgeContext(t)); err != nil {
		t.Fatal(err)
	}
	startBridge(t, s.store, dlq.BridgeConfig{})
	startBridge(t, other.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
	s.publish(t, "ORDERS.created", "first")
	if err := nextMessage(t, c).Term(); err != nil {
		t.Fatal(err)
	}
	wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalTerminated, "ORDERS.created", "first")
	wantLetter(t, other.waitLetters(t, 1)[0], dlq.ReasonExternalTerminated, "ORDERS.created", "first")
}

func TestBridge_down(t *testing.T) {
	t.Parallel()

	t.Run("bridge", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		p := startBridge(t, s.store, dlq.BridgeConfig{})
		p.stop(t)
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, c, 1)
		p.start(t)
		wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
	})

	// What the server knows of redeliveries must survive: else the message looks
	// as if it had been acknowledged.
	t.Run("bridge and server", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		p := startBridge(t, s.store, dlq.BridgeConfig{})
		p.stop(t)
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, c, 1)
		s.restart(t)
		p.start(t)
		wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
	})

	t.Run("server while the bridge runs", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		startBridge(t, s.store, dlq.BridgeConfig{})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		s.restart(t)
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, c, 1)
		wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
	})
}

func TestBridge_storeDown(t *testing.T) {
	t.Parallel()

	t.Run("missing", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{})
		p := startBridge(t, s.store, dlq.BridgeConfig{})
		if err := s.js.DeleteStream(bridgeContext(t), "DLQ"); err != nil {
			t.Fatal(err)
		}
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.WorkQueuePolicy})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
		s.publish(t, "ORDERS.created", "first")
		s.exhaust(t, c, 1)
		bridgeEventually(t, "a capture to fail", func() bool { return p.failures() > 0 })
		if left := s.messages(t, "ORDERS"); left != 1 {
			t.Errorf("%d messages in the stream, want the one that is not captured", left)
		}
		if err := s.store.Provision(bridgeContext(t)); err != nil {
			t.Fatal(err)
		}
		wantLetter(t, s.waitLetters(t, 1)[0], dlq.ReasonExternalMaxDeliver, "ORDERS.created", "first")
		bridgeEventually(t, "the message to leave its stream", func() bool { return s.messages(t, "ORDERS") == 0 })
	})

	t.Run("full", func(t *testing.T) {
		t.Parallel()
		s := setupBridge(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgs: 1}})
		p := startBridge(t, s.store, dlq.BridgeConfig{})
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
		for range 2 {
			s.publish(t, "ORDERS.created", "first")
			if err := nextMessage(t, c).Term(); err != nil {
				t.Fatal(err)
			}
		}
		bridgeEventually(t, "a capture to fail", func() bool { return p.failures() > 0 })
		cfg := s.info(t, "DLQ").Config
		cfg.MaxMsgs = -1
		if _, err := s.js.UpdateStream(bridgeContext(t), cfg); err != nil {
			t.Fatal(err)
		}
		wantLetter(t, s.waitLetters(t, 2)[1], dlq.ReasonExternalTerminated, "ORDERS.created", "first")
	})
}

// What the bridge made may be deleted under it.
func TestBridge_deleted(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
	term := func() {
		t.Helper()
		s.publish(t, "ORDERS.created", "first")
		if err := nextMessage(t, c).Term(); err != nil {
			t.Fatal(err)
		}
	}
	term()
	s.waitLetters(t, 1)
	s.waitSettled(t)
	if err := s.js.DeleteConsumer(bridgeContext(t), dlq.AdvisoryStream, "bridge_DLQ"); err != nil {
		t.Fatal(err)
	}
	term() // kept by the stream
	s.waitLetters(t, 2)
	s.waitSettled(t)
	if err := s.js.DeleteStream(bridgeContext(t), dlq.AdvisoryStream); err != nil {
		t.Fatal(err)
	}
	bridgeEventually(t, "the stream of advisories", func() bool {
		_, err := s.js.Stream(bridgeContext(t), dlq.AdvisoryStream)
		return err == nil
	})
	term()
	s.waitLetters(t, 3)
}

func TestBridge_own(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	p := startBridge(t, s.store, dlq.BridgeConfig{
		Ours: func(stream, consumer string) bool { return stream == "ORDERS" && consumer == "ours" },
	})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	s.publish(t, "ORDERS.created", "first")
	ours := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "ours"})
	if err := nextMessage(t, ours).Term(); err != nil {
		t.Fatal(err)
	}
	p.wantSkip(t, dlq.SkipOwn)
	theirs := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "theirs"})
	if err := nextMessage(t, theirs).Term(); err != nil {
		t.Fatal(err)
	}
	if r := s.waitLetters(t, 1)[0]; r.Consumer != "theirs" {
		t.Errorf("the dead letter is of consumer %q, want theirs", r.Consumer)
	}
	// A reader of the dead-letter stream that terminates what it reads.
	reader := s.consumer(t, "DLQ", jetstream.ConsumerConfig{Durable: "reader"})
	if err := nextMessage(t, reader).Term(); err != nil {
		t.Fatal(err)
	}
	p.wantSkip(t, dlq.SkipOwn, dlq.SkipOwn)
	s.waitLetters(t, 1)
}

func TestBridge_skips(t *testing.T) {
	t.Parallel()
	const exhausted, terminated = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.", "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."
	past := time.Now().Add(-time.Hour).UTC().Format(time.RFC3339Nano)
	future := time.Now().Add(1000 * time.Hour).UTC().Format(time.RFC3339Nano)
	long := strings.Repeat("x", 100_000)
	for _, tt := range []struct {
		name    string
		subject string
		data    string
		want    string
	}{
		{name: "nothing", subject: exhausted + "ORDERS.billing", data: "", want: dlq.SkipMalformed},
		{name: "no JSON", subject: exhausted + "ORDERS.billing", data: "\x00\xff" + long, want: dlq.SkipMalformed},
		{name: "an array", subject: terminated + "ORDERS.billing", data: "[]", want: dlq.SkipMalformed},
		{name: "null", subject: terminated + "ORDERS.billing", data: "null", want: dlq.SkipMalformed},
		{name: "wrong types", subject: exhausted + "ORDERS.billing", data: `{"stream":1,"consumer":{},"stream_seq":"1"}`, want: dlq.SkipMalformed},
		{name: "negative", subject: exhausted + "ORDERS.billing", data: `{"stream":"ORDERS","consumer":"billing","stream_seq":-1}`, want: dlq.SkipMalformed},
		{name: "no sequence", subject: exhausted + "ORDERS.billing", data: `{"stream":"ORDERS","consumer":"billing"}`, want: dlq.SkipMalformed},
		{name: "other names", subject: exhausted + "ORDERS.billing", data: `{"stream":"ORDERS","consumer":"other","stream_seq":1}`, want: dlq.SkipMalformed},
		{name: "short subject", subject: exhausted + "ORDERS", data: `{"stream":"ORDERS","consumer":"","stream_seq":1}`, want: dlq.SkipMalformed},
		{name: "long subject", subject: exhausted + "ORDERS.a.b", data: `{"stream":"ORDERS","consumer":"a.b","stream_seq":1}`, want: dlq.SkipMalformed},
		{name: "bad time", subject: exhausted + "ORDERS.billing", data: `{"timestamp":"now","stream":"ORDERS","consumer":"billing","stream_seq":1}`, want: dlq.SkipMalformed},
		{name: "the stream of advisories", subject: terminated + "MONOTEL_ADVISORIES.x", data: `{"stream":"MONOTEL_ADVISORIES","consumer":"x","stream_seq":1}`, want: dlq.SkipOwn},
		{name: "another domain", subject: terminated + "ORDERS.billing", data: `{"stream":"ORDERS","consumer":"billing","stream_seq":1,"domain":"leaf"}`, want: dlq.SkipOtherDomain},
		{name: "stream gone", subject: terminated + "GONE.billing", data: `{"stream":"GONE","consumer":"billing","stream_seq":1}`, want: dlq.SkipStreamGone},
		{name: "stream made again", subject: terminated + "ORDERS.billing", data: `{"timestamp":"` + past + `","stream":"ORDERS","consumer":"billing","stream_seq":1}`, want: dlq.SkipStreamGone},
		{name: "consumer gone", subject: exhausted + "ORDERS.gone", data: `{"stream":"ORDERS","consumer":"gone","stream_seq":1,"deliveries":2}`, want: dlq.SkipConsumerGone},
		{name: "consumer set back", subject: exhausted + "ORDERS.billing", data: `{"stream":"ORDERS","consumer":"billing","stream_seq":1,"deliveries":2}`, want: dlq.SkipConsumerGone},
		{name: "in the future", subject: exhausted + "ORDERS.gone", data: `{"timestamp":"` + future + `","stream":"ORDERS","consumer":"gone","stream_seq":1}`, want: dlq.SkipConsumerGone},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			p := startBridge(t, s.store, dlq.BridgeConfig{})
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
			s.publish(t, "ORDERS.created", "first")
			s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
			if err := s.nc.Publish(tt.subject, []byte(tt.data)); err != nil {
				t.Fatal(err)
			}
			s.waitAdvisories(t, 1)
			p.wantSkip(t, tt.want)
			s.waitSettled(t)
			s.waitLetters(t, 0)
		})
	}
}

// The server takes headers that clients cannot read. Such a message must not come
// back for ever, and nothing of it be lost but its headers.
func TestBridge_unreadableHeaders(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 1, AckWait: 50 * time.Millisecond})
	publishRaw(t, s.srv.URL(), "ORDERS.created", "NATS/1.0\r\nno colon\r\n\r\n", "first")
	bridgeEventually(t, "the message", func() bool { return s.messages(t, "ORDERS") == 1 })
	if _, err := c.FetchNoWait(1); err != nil {
		t.Fatal(err)
	}
	r := s.waitLetters(t, 1)[0]
	if string(r.Data) != "first" || r.Subject != "ORDERS.created" || len(r.Header) > 0 || !strings.Contains(r.Error, "headers") {
		t.Errorf("body %q, subject %q, headers %q, error %q", r.Data, r.Subject, r.Header, r.Error)
	}
	s.waitSettled(t)
}

// publishRaw publishes without a client, which would refuse the header.
func publishRaw(t *testing.T, address, subject, header, data string) {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := (&net.Dialer{}).DialContext(bridgeContext(t), "tcp", u.Host)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	password, _ := u.User.Password()
	connect, err := json.Marshal(map[string]any{"user": u.User.Username(), "pass": password, "headers": true, "verbose": false, "pedantic": false})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %s\r\nHPUB %s %d %d\r\n%s%s\r\nPING\r\n",
		connect, subject, len(header), len(header)+len(data), header, data); err != nil {
		t.Fatal(err)
	}
	for lines := bufio.NewScanner(conn); lines.Scan(); {
		if lines.Text() == "PONG" {
			return
		}
	}
	t.Fatal("the server has hung up")
}

func TestBridge_trace(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	type key struct{}
	got := make(chan bool, 10)
	b, err := dlq.NewBridge(s.store, dlq.BridgeConfig{
		Trace: func(ctx context.Context, _ *dlq.Record) (context.Context, nats.Header) {
			return context.WithValue(ctx, key{}, true), nats.Header{"traceparent": {testTraceparent}}
		},
		Captured: func(ctx context.Context, _ *dlq.Record, _ bool, _ error) { got <- ctx.Value(key{}) == true },
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := b.Start(bridgeContext(t)); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := b.Stop(bridgeContext(t)); err != nil {
			t.Error(err)
		}
	}()
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
	s.publish(t, "ORDERS.created", "first")
	if err := nextMessage(t, c).Term(); err != nil {
		t.Fatal(err)
	}
	s.waitLetters(t, 1)
	select {
	case ok := <-got:
		if !ok {
			t.Error("Captured did not get the context of Trace")
		}
	case <-bridgeContext(t).Done():
		t.Fatal("Captured was not called")
	}
	stream, err := s.js.Stream(bridgeContext(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	m, err := stream.GetMsg(bridgeContext(t), 1)
	if err != nil || m.Header.Get("traceparent") != testTraceparent {
		t.Errorf("the record's headers are %q, error %v, want the trace's among them", m.Header, err)
	}
}

func TestBridge_provision(t *testing.T) {
	t.Parallel()

	for _, tt := range []struct {
		name string
		give jetstream.StreamConfig // is there before
		want string                 // part of the error
	}{
		{name: "a wider stream", give: jetstream.StreamConfig{Name: dlq.AdvisoryStream, Subjects: []string{"$JS.EVENT.>"}}},
		{
			name: "another stream has the subjects",
			give: jetstream.StreamConfig{Name: "AUDIT", Subjects: []string{"$JS.EVENT.ADVISORY.>"}},
			want: `stream "AUDIT" already stores some of`,
		},
		{
			name: "without the subjects",
			give: jetstream.StreamConfig{Name: dlq.AdvisoryStream, Subjects: []string{"x.>"}},
			want: `its subjects are ["x.>"], without "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"`,
		},
		{
			name: "of another retention",
			give: jetstream.StreamConfig{Name: dlq.AdvisoryStream, Subjects: []string{"$JS.EVENT.>"}, Retention: jetstream.InterestPolicy},
			want: "want limits",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			s.stream(t, tt.give)
			p := newBridgeProbe(t, s.store, dlq.BridgeConfig{})
			if tt.want == "" {
				p.start(t)
				return
			}
			err := p.Start(bridgeContext(t))
			if !errors.Is(err, dlq.ErrStreamConflict) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("Start() = %v, want ErrStreamConflict with %q", err, tt.want)
			}
			if err := s.js.DeleteStream(bridgeContext(t), tt.give.Name); err != nil {
				t.Fatal(err)
			}
			p.start(t)
			info := s.info(t, dlq.AdvisoryStream)
			if c := info.Config; c.MaxBytes != 64<<20 || c.MaxAge != 7*24*time.Hour || c.Discard != jetstream.DiscardOld ||
				c.Storage != jetstream.FileStorage || c.Retention != jetstream.LimitsPolicy {
				t.Errorf("the stream's configuration is %+v", c)
			}
		})
	}
}

func TestNewBridge(t *testing.T) {
	t.Parallel()
	s := setupBridge(t, dlq.Config{})
	if _, err := dlq.NewBridge(nil, dlq.BridgeConfig{}); !errors.Is(err, dlq.ErrInvalidConfig) {
		t.Errorf("without a store: %v, want ErrInvalidConfig", err)
	}
	if _, err := dlq.NewBridge(s.store, dlq.BridgeConfig{Grace: -1}); !errors.Is(err, dlq.ErrInvalidConfig) {
		t.Errorf("with a negative Grace: %v, want ErrInvalidConfig", err)
	}
}

func TestBridge_lifecycle(t *testing.T) { //nolint:paralleltest // it counts goroutines
	s := setupBridge(t, dlq.Config{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing"})
	blocked := make(chan struct{}, 1)
	block := true
	b, err := dlq.NewBridge(s.store, dlq.BridgeConfig{
		Trace: func(ctx context.Context, _ *dlq.Record) (context.Context, nats.Header) {
			if block {
				block = false
				blocked <- struct{}{}
				<-ctx.Done()
			}
			return ctx, nil
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx := bridgeContext(t)
	if err := b.Stop(ctx); err != nil {
		t.Errorf("Stop before Start: %v", err)
	}
	if err := errors.Join(b.Start(ctx), b.Stop(ctx)); err != nil { // the server has goroutines for what this makes
		t.Fatal(err)
	}
	before := goleak.IgnoreCurrent()
	ended, cancel := context.WithCancel(ctx)
	cancel()
	if err := b.Start(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Start without time: %v, want context.Canceled", err)
	}
	for range 3 {
		for range 2 { // the second one does nothing
			if err := b.Start(ctx); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := b.Stop(ctx); err != nil {
				t.Fatal(err)
			}
		}
	}
	goleak.VerifyNone(t, before)

	// Its time is up while it captures: nothing is lost.
	if err := b.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.publish(t, "ORDERS.created", "first")
	if err := nextMessage(t, c).Term(); err != nil {
		t.Fatal(err)
	}
	<-blocked
	if err := b.Stop(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("Stop without time: %v, want context.Canceled", err)
	}
	if err := b.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.waitLetters(t, 1)
	s.waitSettled(t)
	if err := b.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	goleak.VerifyNone(t, before)
}

// Start and Stop from everywhere, while there is something to do.
func TestBridge_startStopStress(t *testing.T) {
	t.Parallel()
	const messages = 20
	s := setupBridge(t, dlq.Config{})
	p := startBridge(t, s.store, dlq.BridgeConfig{})
	s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "billing", MaxDeliver: 2})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for range 20 {
				if err := errors.Join(p.Start(bridgeContext(t)), p.Stop(bridgeContext(t))); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range messages {
		s.publish(t, "ORDERS.created", fmt.Sprint(i))
		s.exhaust(t, c, 1)
	}
	wg.Wait()
	p.start(t)
	s.waitLetters(t, messages)
	bridgeEventually(t, "the messages to leave their stream", func() bool { return s.messages(t, "ORDERS") == 0 })
}
