package dlq_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

// doctorPatience bounds every wait. A test that waits this long has failed.
const doctorPatience = 3 * time.Minute

// A doctorSetup is a server with a dead-letter stream and nothing to find.
type doctorSetup struct {
	srv   *monotest.TestServer
	nc    *nats.Conn
	js    jetstream.JetStream
	store *dlq.Store
}

func setupDoctor(t *testing.T) *doctorSetup {
	t.Helper()
	return setupDoctorWith(t, dlq.Config{})
}

func setupDoctorWith(t *testing.T, cfg dlq.Config) *doctorSetup {
	t.Helper()
	s := &doctorSetup{srv: monotest.Server(t)}
	s.nc = s.srv.Conn()
	var err error
	if s.js, err = jetstream.New(s.nc, jetstream.WithDefaultTimeout(doctorPatience)); err != nil {
		t.Fatal(err)
	}
	if s.store, err = dlq.NewStore(s.nc, s.js, cfg); err != nil {
		t.Fatal(err)
	}
	if err := s.store.Provision(doctorContext(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

func doctorContext(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), doctorPatience)
	t.Cleanup(cancel)
	return ctx
}

func (s *doctorSetup) stream(t *testing.T, cfg jetstream.StreamConfig) jetstream.Stream {
	t.Helper()
	if cfg.Subjects == nil {
		cfg.Subjects = []string{strings.ToLower(cfg.Name) + ".>"}
	}
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = 1 << 20
		cfg.Discard = jetstream.DiscardNew
	}
	cfg.Storage = jetstream.MemoryStorage
	stream, err := s.js.CreateStream(doctorContext(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func (s *doctorSetup) consumer(t *testing.T, stream string, cfg jetstream.ConsumerConfig) jetstream.Consumer {
	t.Helper()
	if cfg.AckWait == 0 && cfg.BackOff == nil {
		cfg.AckWait = time.Hour // only what the test does counts
	}
	if cfg.AckPolicy == jetstream.AckNonePolicy {
		cfg.AckPolicy = jetstream.AckExplicitPolicy
	}
	c, err := s.js.CreateConsumer(doctorContext(t), stream, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (s *doctorSetup) publish(t *testing.T, subject string, n int) {
	t.Helper()
	for i := range n {
		msg := &nats.Msg{Subject: subject, Data: fmt.Appendf(nil, "%s %d", subject, i), Header: nats.Header{"Number": {fmt.Sprint(i)}}}
		if _, err := s.js.PublishMsg(doctorContext(t), msg); err != nil {
			t.Fatal(err)
		}
	}
}

// doctorFetch waits for n messages.
func doctorFetch(t *testing.T, c jetstream.Consumer, n int) []jetstream.Msg {
	t.Helper()
	var msgs []jetstream.Msg
	for ctx := doctorContext(t); len(msgs) < n; {
		if ctx.Err() != nil {
			t.Fatalf("got %d of %d messages", len(msgs), n)
		}
		batch, err := c.Fetch(n-len(msgs), jetstream.FetchMaxWait(5*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		for m := range batch.Messages() {
			msgs = append(msgs, m)
		}
	}
	return msgs
}

func doctorAck(t *testing.T, msgs ...jetstream.Msg) {
	t.Helper()
	for _, m := range msgs {
		if err := m.DoubleAck(doctorContext(t)); err != nil {
			t.Fatal(err)
		}
	}
}

// doctorExhaust refuses messages until left of them are in flight and none is to
// be delivered.
func doctorExhaust(t *testing.T, c jetstream.Consumer, left int) {
	t.Helper()
	for ctx := doctorContext(t); ; {
		// NumPending lags behind publishes, so this comes first.
		batch, err := c.Fetch(100, jetstream.FetchMaxWait(50*time.Millisecond))
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for m := range batch.Messages() {
			n++
			if err := m.Nak(); err != nil {
				t.Fatal(err)
			}
		}
		info, err := c.Info(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 && info.NumAckPending == left && info.NumPending == 0 {
			return
		}
	}
}

func (s *doctorSetup) doctor(t *testing.T) []dlq.Finding {
	t.Helper()
	findings, err := s.store.Doctor(doctorContext(t))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range findings {
		if f.Detail == "" || f.Remedy == "" {
			t.Errorf("finding %q has no detail or no remedy: %+v", f.Check, f)
		}
	}
	return findings
}

// found are the findings of a check.
func (s *doctorSetup) found(t *testing.T, check string) []dlq.Finding {
	t.Helper()
	return slices.DeleteFunc(s.doctor(t), func(f dlq.Finding) bool { return f.Check != check })
}

// want is a finding without its texts.
func doctorWant(t *testing.T, got []dlq.Finding, want ...dlq.Finding) {
	t.Helper()
	bare := make([]dlq.Finding, 0, len(got))
	for _, f := range got {
		f.Detail, f.Remedy = "", ""
		bare = append(bare, f)
	}
	if !slices.Equal(bare, want) {
		t.Errorf("found %+v\nwant %+v", got, want)
	}
}

func zombies(stream, consumer string, n uint64) dlq.Finding {
	return dlq.Finding{Severity: dlq.SeverityCritical, Check: "zombies", Stream: stream, Consumer: consumer, Count: n}
}

func (s *doctorSetup) stored(t *testing.T, stream string) uint64 {
	t.Helper()
	st, err := s.js.Stream(doctorContext(t), stream)
	if err != nil {
		t.Fatal(err)
	}
	return st.CachedInfo().State.Msgs
}

func (s *doctorSetup) capture(t *testing.T, stream, consumer string, want int) {
	t.Helper()
	if n, err := s.store.CaptureZombies(doctorContext(t), stream, consumer); n != want || err != nil {
		t.Fatalf("CaptureZombies(%q, %q) = %d, %v, want %d", stream, consumer, n, err, want)
	}
}

func TestStore_Doctor_findsNothing(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	s.stream(t, jetstream.StreamConfig{Name: "INTEREST", Retention: jetstream.InterestPolicy})
	s.stream(t, jetstream.StreamConfig{Name: "LOG", MaxAge: time.Hour, MaxBytes: 1 << 20})
	for _, stream := range []string{"WORK", "INTEREST", "LOG"} {
		s.consumer(t, stream, jetstream.ConsumerConfig{Durable: "c"})
	}
	s.consumer(t, "INTEREST", jetstream.ConsumerConfig{Durable: "push", DeliverSubject: "deliver"})
	s.publish(t, "work.a", 3)
	s.publish(t, "interest.a", 3)
	s.publish(t, "log.a", 3)
	doctorWant(t, s.doctor(t))
}

func TestStore_Doctor_configuration(t *testing.T) {
	t.Parallel()
	until := time.Now().Add(time.Hour)

	tests := []struct {
		name string
		give jetstream.StreamConfig
		with jetstream.ConsumerConfig
		want dlq.Finding
	}{
		{
			name: "no MaxBytes",
			give: jetstream.StreamConfig{MaxBytes: -1},
			want: dlq.Finding{Severity: dlq.SeverityWarning, Check: "stream_without_max_bytes"},
		},
		{
			name: "limited by the number and size of messages",
			give: jetstream.StreamConfig{MaxBytes: -1, MaxMsgs: 10, MaxMsgSize: 1000},
		},
		{
			name: "a work queue drops the oldest",
			give: jetstream.StreamConfig{MaxBytes: 1 << 20, Retention: jetstream.WorkQueuePolicy},
			want: dlq.Finding{Severity: dlq.SeverityWarning, Check: "discard_old"},
		},
		{
			name: "an interest stream drops the oldest of a subject",
			give: jetstream.StreamConfig{MaxBytes: -1, MaxMsgs: 10, MaxMsgSize: 1000, MaxMsgsPerSubject: 2, Retention: jetstream.InterestPolicy},
			want: dlq.Finding{Severity: dlq.SeverityWarning, Check: "discard_old"},
		},
		{
			name: "a work queue drops the oldest of a subject, and else refuses",
			give: jetstream.StreamConfig{MaxBytes: 1 << 20, Discard: jetstream.DiscardNew, MaxMsgsPerSubject: 2, Retention: jetstream.WorkQueuePolicy},
			want: dlq.Finding{Severity: dlq.SeverityWarning, Check: "discard_old"},
		},
		{
			name: "a work queue refuses what is too much for a subject",
			give: jetstream.StreamConfig{
				MaxBytes: 1 << 20, Discard: jetstream.DiscardNew, MaxMsgsPerSubject: 2, DiscardNewPerSubject: true, Retention: jetstream.WorkQueuePolicy,
			},
		},
		{
			name: "a log drops the oldest, as it should",
			give: jetstream.StreamConfig{MaxBytes: 1 << 20},
		},
		{
			name: "a work queue drops with time",
			give: jetstream.StreamConfig{MaxAge: time.Hour, Retention: jetstream.WorkQueuePolicy},
			want: dlq.Finding{Severity: dlq.SeverityWarning, Check: "max_age"},
		},
		{
			name: "steps of BackOff for ever",
			with: jetstream.ConsumerConfig{Durable: "c", BackOff: []time.Duration{time.Hour}},
			want: dlq.Finding{Severity: dlq.SeverityNotice, Check: "backoff", Consumer: "c"},
		},
		{
			name: "paused",
			with: jetstream.ConsumerConfig{Durable: "c", PauseUntil: &until},
			want: dlq.Finding{Severity: dlq.SeverityNotice, Check: "paused", Consumer: "c", Count: 2},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupDoctor(t)
			tt.give.Name = "ORDERS"
			s.stream(t, tt.give)
			s.publish(t, "orders.a", 2)
			if tt.with.Durable != "" {
				s.consumer(t, "ORDERS", tt.with)
			}
			if tt.want.Check == "" {
				doctorWant(t, s.doctor(t))
				return
			}
			tt.want.Stream = "ORDERS"
			doctorWant(t, s.doctor(t), tt.want)
		})
	}
}

func TestStore_Doctor_maxDeliver(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	s.stream(t, jetstream.StreamConfig{Name: "LOG"})
	s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 3, BackOff: []time.Duration{time.Hour, time.Hour}})
	s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 3})
	s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "unlimited"})
	s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "push", MaxDeliver: 1, DeliverSubject: "deliver"})
	if _, err := s.js.OrderedConsumer(doctorContext(t), "LOG", jetstream.OrderedConsumerConfig{}); err != nil {
		t.Fatal(err)
	}

	of := func(severity dlq.Severity, stream, consumer string) dlq.Finding {
		return dlq.Finding{Severity: severity, Check: "max_deliver", Stream: stream, Consumer: consumer}
	}
	got := s.doctor(t)
	doctorWant(t, got, of(dlq.SeverityWarning, "LOG", "c"), of(dlq.SeverityWarning, "LOG", "push"),
		dlq.Finding{Severity: dlq.SeverityWarning, Check: "advisory_stream_missing", Stream: "MONOTEL_ADVISORIES", Count: 3},
		of(dlq.SeverityWarning, "WORK", "c"))
	if !strings.Contains(got[0].Detail, "passed over") || !strings.Contains(got[3].Detail, "zombie") {
		t.Errorf("the details do not tell what becomes of messages: %q, %q", got[0].Detail, got[3].Detail)
	}

	s.stream(t, jetstream.StreamConfig{Name: "MONOTEL_ADVISORIES", Subjects: []string{"$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES.>"}})
	doctorWant(t, s.doctor(t), of(dlq.SeverityNotice, "LOG", "c"), of(dlq.SeverityNotice, "LOG", "push"), of(dlq.SeverityNotice, "WORK", "c"))
}

func TestStore_Doctor_maxAckPending(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "LOG"})
	s.publish(t, "log.a", 3)
	for _, c := range []struct {
		name    string
		ackWait time.Duration
		limit   int
	}{
		{name: "slow", ackWait: time.Hour, limit: 2},
		{name: "stalled", ackWait: time.Millisecond, limit: 2},
		{name: "room", ackWait: time.Hour, limit: 3},
		{name: "at the end", ackWait: time.Hour, limit: 3},
	} {
		name := strings.ReplaceAll(c.name, " ", "_")
		got := s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: name, AckWait: c.ackWait, MaxAckPending: c.limit})
		doctorFetch(t, got, 2)
		if name == "at_the_end" {
			doctorFetch(t, got, 1)
		}
	}
	doctorWant(t, s.doctor(t),
		dlq.Finding{Severity: dlq.SeverityWarning, Check: "max_ack_pending", Stream: "LOG", Consumer: "stalled", Count: 2},
		dlq.Finding{Severity: dlq.SeverityNotice, Check: "max_ack_pending", Stream: "LOG", Consumer: "slow", Count: 2})
}

func TestStore_Doctor_deadLetterStream(t *testing.T) {
	t.Parallel()
	of := func(severity dlq.Severity, check string, count uint64) dlq.Finding {
		return dlq.Finding{Severity: severity, Check: check, Stream: "DLQ", Count: count}
	}

	t.Run("missing", func(t *testing.T) {
		t.Parallel()
		s := setupDoctor(t)
		if err := s.js.DeleteStream(doctorContext(t), "DLQ"); err != nil {
			t.Fatal(err)
		}
		doctorWant(t, s.doctor(t), of(dlq.SeverityCritical, "dlq_missing", 0))
	})
	t.Run("conflict", func(t *testing.T) {
		t.Parallel()
		s := setupDoctor(t)
		st, err := s.js.Stream(doctorContext(t), "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		cfg := st.CachedInfo().Config
		cfg.Discard, cfg.AllowDirect = jetstream.DiscardOld, false
		if _, err := s.js.UpdateStream(doctorContext(t), cfg); err != nil {
			t.Fatal(err)
		}
		doctorWant(t, s.doctor(t), of(dlq.SeverityCritical, "dlq_conflict", 0), of(dlq.SeverityWarning, "dlq_config", 0))
	})
	t.Run("rollups and TTLs", func(t *testing.T) {
		t.Parallel()
		s := setupDoctor(t)
		st, err := s.js.Stream(doctorContext(t), "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		cfg := st.CachedInfo().Config
		cfg.AllowRollup, cfg.AllowMsgTTL = true, true // as an App of an earlier version does, and an operator
		if _, err := s.js.UpdateStream(doctorContext(t), cfg); err != nil {
			t.Fatal(err)
		}
		got := s.doctor(t)
		doctorWant(t, got, of(dlq.SeverityWarning, "dlq_rollup", 0), of(dlq.SeverityNotice, "dlq_msg_ttl", 0))
		if !strings.Contains(got[0].Detail, "An App of an earlier version") || !strings.Contains(got[0].Remedy, "`nats stream edit DLQ --no-allow-rollup`") {
			t.Errorf("it does not say who does that, and what to do: %+v", got[0])
		}
		if were, err := s.store.DenyRollups(doctorContext(t)); !were || err != nil {
			t.Errorf("DenyRollups() = %v, %v, want true, nil", were, err)
		}
		doctorWant(t, s.doctor(t), of(dlq.SeverityNotice, "dlq_msg_ttl", 0))
	})
	t.Run("MaxAge", func(t *testing.T) {
		t.Parallel()
		s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{MaxAge: time.Hour}})
		got := s.doctor(t)
		doctorWant(t, got, of(dlq.SeverityWarning, "dlq_max_age", 0))
		if !strings.Contains(got[0].Detail, "1h0m0s") {
			t.Errorf("the detail lacks the age: %q", got[0].Detail)
		}
	})
	t.Run("messages near the limit", func(t *testing.T) {
		t.Parallel()
		s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgs: 100}})
		s.publish(t, "monotel.dlq.DLQ.a", 79)
		doctorWant(t, s.doctor(t))
		s.publish(t, "monotel.dlq.DLQ.a", 1)
		doctorWant(t, s.doctor(t), of(dlq.SeverityWarning, "dlq_near_limit", 80))
		s.publish(t, "monotel.dlq.DLQ.a", 15)
		doctorWant(t, s.doctor(t), of(dlq.SeverityCritical, "dlq_near_limit", 95))
	})
	t.Run("bytes near the limit", func(t *testing.T) {
		t.Parallel()
		s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 10 << 10}})
		if _, err := s.js.Publish(doctorContext(t), "monotel.dlq.DLQ.a", make([]byte, 9<<10)); err != nil {
			t.Fatal(err)
		}
		doctorWant(t, s.doctor(t), of(dlq.SeverityWarning, "dlq_near_limit", 1))
	})
	t.Run("raised limit", func(t *testing.T) {
		t.Parallel()
		s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{
			MaxBytes: 2000, MaxMsgs: 10,
			Metadata: map[string]string{"monotel.dlq.raised": `{"from":{"max_bytes":1000,"max_msgs":10},"to":{"max_bytes":2000,"max_msgs":10}}`},
		}})
		got := s.doctor(t)
		doctorWant(t, got, of(dlq.SeverityNotice, "dlq_limit_raised", 0))
		if !strings.Contains(got[0].Detail, "2000 bytes in place of 1000") || !strings.Contains(got[0].Remedy, "`nats stream edit DLQ --max-bytes 1000`") {
			t.Errorf("it does not say how to put it back: %+v", got[0])
		}
		// By somebody else it was changed on purpose.
		st, err := s.js.Stream(doctorContext(t), "DLQ")
		if err != nil {
			t.Fatal(err)
		}
		cfg := st.CachedInfo().Config
		cfg.MaxBytes = 3000
		if _, err := s.js.UpdateStream(doctorContext(t), cfg); err != nil {
			t.Fatal(err)
		}
		doctorWant(t, s.doctor(t))
	})
	t.Run("objects near the limit", func(t *testing.T) {
		t.Parallel()
		s := setupDoctor(t)
		bucket, err := s.js.CreateObjectStore(doctorContext(t), jetstream.ObjectStoreConfig{Bucket: "DLQ_LARGE", MaxBytes: 100 << 10})
		if err != nil {
			t.Fatal(err)
		}
		doctorWant(t, s.doctor(t))
		if _, err := bucket.PutBytes(doctorContext(t), "x", make([]byte, 90<<10)); err != nil {
			t.Fatal(err)
		}
		got := s.found(t, "dlq_objects_near_limit")
		if len(got) != 1 || got[0].Stream != "OBJ_DLQ_LARGE" || got[0].Severity != dlq.SeverityWarning {
			t.Errorf("found %+v", got)
		}
	})
	t.Run("less replicated than what it is for", func(t *testing.T) {
		t.Parallel()
		s := setupDoctor(t)
		s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
		s.alter(t, func(name string, st jetstream.Stream, err error) (jetstream.Stream, error) {
			if name == "ORDERS" && err == nil {
				st.CachedInfo().Config.Replicas = 3 // one server has no replicas
			}
			return st, err
		})
		doctorWant(t, s.doctor(t), of(dlq.SeverityWarning, "dlq_not_replicated", 0))
	})
}

// An alteredJetStream answers for streams what one server cannot.
type alteredJetStream struct {
	jetstream.JetStream
	alter func(name string, st jetstream.Stream, err error) (jetstream.Stream, error)
}

func (a alteredJetStream) Stream(ctx context.Context, name string) (jetstream.Stream, error) {
	st, err := a.JetStream.Stream(ctx, name)
	return a.alter(name, st, err)
}

func (s *doctorSetup) alter(t *testing.T, alter func(string, jetstream.Stream, error) (jetstream.Stream, error)) {
	t.Helper()
	var err error
	if s.store, err = dlq.NewStore(s.nc, alteredJetStream{s.js, alter}, dlq.Config{}); err != nil {
		t.Fatal(err)
	}
}

func TestStore_Doctor_goesOnAfterWhatIsUnreadable(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	for _, name := range []string{"A", "B", "C"} {
		s.stream(t, jetstream.StreamConfig{Name: name, MaxBytes: -1})
	}
	broken := errors.New("no leader")
	s.alter(t, func(name string, st jetstream.Stream, err error) (jetstream.Stream, error) {
		if name == "B" || name == "DLQ" {
			return nil, broken
		}
		return st, err
	})
	of := func(check, stream string) dlq.Finding {
		return dlq.Finding{Severity: dlq.SeverityWarning, Check: check, Stream: stream}
	}
	doctorWant(t, s.doctor(t), of("stream_without_max_bytes", "A"), of("unreadable", "B"), of("stream_without_max_bytes", "C"), of("unreadable", "DLQ"))
}

func TestStore_Doctor_pages(t *testing.T) {
	t.Parallel()
	const n = 300 // a page of consumers is 256
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "LOG"})
	for i := range n {
		s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: fmt.Sprintf("c%03d", i), MaxDeliver: 5, MemoryStorage: true})
	}
	got := s.found(t, "max_deliver")
	if len(got) != n {
		t.Fatalf("found %d consumers, want %d", len(got), n)
	}
	for i, f := range got {
		if want := fmt.Sprintf("c%03d", i); f.Consumer != want {
			t.Fatalf("finding %d is of consumer %q, want %q", i, f.Consumer, want)
		}
	}
}

func TestStore_Doctor_endsWithItsContext(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "A", MaxBytes: -1})
	s.stream(t, jetstream.StreamConfig{Name: "B", MaxBytes: -1})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.alter(t, func(name string, st jetstream.Stream, err error) (jetstream.Stream, error) {
		if name == "B" {
			cancel()
		}
		return st, err
	})
	findings, err := s.store.Doctor(ctx)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("Doctor() = %v, want %v", err, context.Canceled)
	}
	doctorWant(t, findings, dlq.Finding{Severity: dlq.SeverityWarning, Check: "stream_without_max_bytes", Stream: "A"})
}

func TestStore_Doctor_serverVersion(t *testing.T) {
	t.Parallel()
	tests := []struct {
		give string
		want dlq.Severity
	}{
		{give: "2.10.29", want: dlq.SeverityNotice},
		{give: "2.11.9", want: dlq.SeverityNotice},
		{give: "2.12.0", want: dlq.SeverityWarning},
		{give: "2.12.2", want: dlq.SeverityWarning},
		{give: "2.12.3", want: dlq.SeverityCritical},
		{give: "2.12.4-RC.1", want: dlq.SeverityCritical},
		{give: "2.12.5", want: dlq.SeverityWarning},
		{give: "2.12.8", want: dlq.SeverityWarning},
		{give: "2.12.9"},
		{give: "2.12.12"},
		{give: "2.14.0", want: dlq.SeverityWarning},
		{give: "2.14.1"},
		{give: "2.15.2"},
		{give: "3.0.0"},
		{give: "mine", want: dlq.SeverityNotice},
	}
	srv := monotest.Server(t)
	for _, tt := range tests {
		t.Run(tt.give, func(t *testing.T) {
			t.Parallel()
			nc, err := nats.Connect(versionProxy(t, srv.URL(), tt.give), nats.Timeout(doctorPatience))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			s := &doctorSetup{srv: srv, nc: nc}
			if s.js, err = jetstream.New(nc, jetstream.WithDefaultTimeout(doctorPatience)); err != nil {
				t.Fatal(err)
			}
			if s.store, err = dlq.NewStore(nc, s.js, dlq.Config{}); err != nil {
				t.Fatal(err)
			}
			got := s.found(t, "server_version")
			if tt.want == "" {
				doctorWant(t, got)
				return
			}
			doctorWant(t, got, dlq.Finding{Severity: tt.want, Check: "server_version"})
			if len(got) == 1 && !strings.Contains(got[0].Detail, tt.give) {
				t.Errorf("the detail lacks the version: %q", got[0].Detail)
			}
		})
	}
}

// versionProxy passes on one connection, and says that the server is of another
// version. It returns its address.
func versionProxy(t *testing.T, server, version string) string {
	t.Helper()
	u, err := url.Parse(server)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it listens at once
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	t.Cleanup(wg.Wait)
	t.Cleanup(func() { l.Close() }) //nolint:errcheck // it may be closed
	pass := func(to, from net.Conn, change func([]byte) []byte) {
		defer func() { _ = to.Close() }() // so that the other direction ends
		buf := make([]byte, 64<<10)
		for {
			n, err := from.Read(buf)
			if err != nil {
				return
			}
			if _, err := to.Write(change(buf[:n])); err != nil {
				return
			}
		}
	}
	said := regexp.MustCompile(`(INFO \{.*"version":")[^"]*`)
	wg.Go(func() {
		client, err := l.Accept()
		if err != nil {
			return
		}
		srv, err := net.Dial("tcp", u.Host) //nolint:noctx // on this host
		if err != nil {
			_ = client.Close()
			return
		}
		wg.Go(func() { pass(srv, client, func(b []byte) []byte { return b }) })
		pass(client, srv, func(b []byte) []byte { return said.ReplaceAll(b, []byte("${1}"+version)) })
	})
	proxy := *u
	proxy.Host = l.Addr().String()
	return proxy.String()
}

func TestStore_zombiesOfWorkQueue(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give []jetstream.ConsumerConfig // the first has the zombies, of subject work.a.*
		want uint64
	}{
		{
			name: "without filter",
			give: []jetstream.ConsumerConfig{{Durable: "a", MaxDeliver: 2}},
			want: 8,
		},
		{
			name: "delivered once",
			give: []jetstream.ConsumerConfig{{Durable: "a", MaxDeliver: 1}},
			want: 8,
		},
		{
			name: "with a filter beside another",
			give: []jetstream.ConsumerConfig{{Durable: "a", MaxDeliver: 2, FilterSubject: "work.a.>"}, {Durable: "b", FilterSubject: "work.b"}},
			want: 5,
		},
		{
			name: "with filters",
			give: []jetstream.ConsumerConfig{{Durable: "a", MaxDeliver: 3, FilterSubjects: []string{"work.a.1", "work.a.2", "work.c"}}},
			want: 5,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupDoctor(t)
			s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
			consumers := make([]jetstream.Consumer, 0, len(tt.give))
			for _, cfg := range tt.give {
				consumers = append(consumers, s.consumer(t, "WORK", cfg))
			}
			s.publish(t, "work.a.1", 2)
			doctorAck(t, doctorFetch(t, consumers[0], 2)...)
			s.publish(t, "work.b", 3) // another's or nobody's, if there is a filter
			s.publish(t, "work.a.1", 2)
			s.publish(t, "work.a.2", 3)
			doctorWant(t, s.found(t, "zombies"))
			doctorExhaust(t, consumers[0], 0)
			s.publish(t, "work.a.1", 4) // not yet delivered

			doctorWant(t, s.found(t, "zombies"), zombies("WORK", "a", tt.want))
			before := s.stored(t, "WORK")
			s.capture(t, "WORK", "a", int(tt.want))
			if n := s.stored(t, "WORK"); n != before-tt.want {
				t.Errorf("%d messages are left, want %d", n, before-tt.want)
			}
			if n := s.stored(t, "DLQ"); n != tt.want {
				t.Errorf("there are %d dead letters, want %d", n, tt.want)
			}
			doctorWant(t, s.found(t, "zombies"))
			s.capture(t, "WORK", "a", 0)
			doctorAck(t, doctorFetch(t, consumers[0], 4)...) // they were left alone
		})
	}
}

func TestStore_CaptureZombies_record(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	st := s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 2)
	doctorExhaust(t, c, 0)
	s.capture(t, "WORK", "a", 2)

	dead, err := s.js.Stream(doctorContext(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	created := st.CachedInfo().Created
	for seq := range uint64(2) {
		id := dlq.ID("WORK", created, "a", seq+1)
		msg, err := dead.GetLastMsgForSubject(doctorContext(t), s.store.Subject("WORK", "a", id))
		if err != nil {
			t.Fatal(err)
		}
		r, err := s.store.Load(doctorContext(t), msg.Header, msg.Data)
		if err != nil {
			t.Fatal(err)
		}
		if r.ID != id || r.Reason != dlq.ReasonExternalMaxDeliver || r.Subject != "work.a" || r.Stream != "WORK" || r.Consumer != "a" ||
			!r.StreamCreated.Equal(created) || r.StreamSequence != seq+1 || r.Deliveries != 2 || r.Stored.IsZero() {
			t.Errorf("record %+v", r)
		}
		if want := fmt.Sprintf("work.a %d", seq); string(r.Data) != want || r.Header.Get("Number") != fmt.Sprint(seq) {
			t.Errorf("record has %q, %v, want %q", r.Data, r.Header, want)
		}
	}
}

// Killed between the capture and the delete, it has to find the message captured.
func TestStore_CaptureZombies_goesOnWhereItWasInterrupted(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	st := s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 3)
	doctorExhaust(t, c, 0)
	id := dlq.ID("WORK", st.CachedInfo().Created, "a", 1)
	m, err := st.GetMsg(doctorContext(t), 1)
	if err != nil {
		t.Fatal(err)
	}
	r := &dlq.Record{ID: id, Stream: "WORK", Consumer: "a", Reason: dlq.ReasonExternalMaxDeliver, StreamSequence: 1, Stored: m.Time}
	if captured, err := s.store.Capture(doctorContext(t), r, nil); !captured || err != nil {
		t.Fatalf("Capture() = %t, %v", captured, err)
	}
	s.capture(t, "WORK", "a", 2)
	if work, dead := s.stored(t, "WORK"), s.stored(t, "DLQ"); work != 0 || dead != 3 {
		t.Errorf("%d messages and %d dead letters, want 0 and 3", work, dead)
	}
}

func TestStore_CaptureZombies_whenNothingCanBeDeleted(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy, DenyDelete: true})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 2)
	doctorExhaust(t, c, 0)
	for _, want := range []int{1, 0} {
		if n, err := s.store.CaptureZombies(doctorContext(t), "WORK", "a"); n != want || err == nil {
			t.Errorf("CaptureZombies() = %d, %v, want %d and an error", n, err, want)
		}
	}
	if work, dead := s.stored(t, "WORK"), s.stored(t, "DLQ"); work != 2 || dead != 1 {
		t.Errorf("%d messages and %d dead letters, want 2 and 1", work, dead)
	}
}

// What cannot be captured stays where it is.
func TestStore_CaptureZombies_whenDeadLettersAreRefused(t *testing.T) {
	t.Parallel()
	s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{MaxMsgs: 1}})
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 3)
	doctorExhaust(t, c, 0)
	if n, err := s.store.CaptureZombies(doctorContext(t), "WORK", "a"); n != 1 || err == nil {
		t.Errorf("CaptureZombies() = %d, %v, want 1 and an error", n, err)
	}
	if n := s.stored(t, "WORK"); n != 2 {
		t.Errorf("%d messages are left, want 2", n)
	}
}

func TestStore_CaptureZombies_whereThereCanBeNone(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "LOG"})
	c := s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "log.a", 2)
	doctorExhaust(t, c, 0)
	doctorWant(t, s.found(t, "zombies"))
	for _, tt := range []struct {
		stream, consumer string
		want             error
	}{
		{stream: "LOG", consumer: "a", want: dlq.ErrNoZombies},
		{stream: "NONE", consumer: "a", want: jetstream.ErrStreamNotFound},
	} {
		if n, err := s.store.CaptureZombies(doctorContext(t), tt.stream, tt.consumer); n != 0 || !errors.Is(err, tt.want) {
			t.Errorf("CaptureZombies(%q) = %d, %v, want %v", tt.stream, n, err, tt.want)
		}
	}
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	if _, err := s.store.CaptureZombies(doctorContext(t), "WORK", "none"); !errors.Is(err, jetstream.ErrConsumerNotFound) {
		t.Errorf("CaptureZombies() = %v, want %v", err, jetstream.ErrConsumerNotFound)
	}
}

// The server has moved the delivered and the floor of these, or not, in every way
// that is not a zombie.
func TestStore_Doctor_leavesAloneWhatIsInFlight(t *testing.T) {
	t.Parallel()
	each := func(t *testing.T, msgs []jetstream.Msg, f func(m jetstream.Msg) error) {
		t.Helper()
		for _, m := range msgs {
			if err := f(m); err != nil {
				t.Fatal(err)
			}
		}
	}
	tests := []struct {
		name string
		give func(t *testing.T, c jetstream.Consumer)
		left uint64
	}{
		{name: "not delivered", give: func(*testing.T, jetstream.Consumer) {}, left: 4},
		{name: "in flight", give: func(t *testing.T, c jetstream.Consumer) { doctorFetch(t, c, 3) }, left: 4},
		{name: "to be delivered again later", left: 4, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 3), func(m jetstream.Msg) error { return m.NakWithDelay(time.Hour) })
		}},
		{name: "to be delivered again", left: 4, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 3), jetstream.Msg.Nak)
		}},
		{name: "in flight for the last time", left: 4, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 3), jetstream.Msg.Nak)
			doctorFetch(t, c, 3)
		}},
		{name: "refused for the last time, and the server has not noticed", left: 4, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 3), jetstream.Msg.Nak)
			each(t, doctorFetch(t, c, 3), jetstream.Msg.Nak)
		}},
		{name: "acknowledged but one", left: 2, give: func(t *testing.T, c jetstream.Consumer) {
			msgs := doctorFetch(t, c, 3)
			doctorAck(t, msgs[0], msgs[2])
		}},
		{name: "acknowledged the second time", left: 2, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 2), jetstream.Msg.Nak)
			doctorAck(t, doctorFetch(t, c, 2)...)
		}},
		{name: "terminated", left: 1, give: func(t *testing.T, c jetstream.Consumer) {
			each(t, doctorFetch(t, c, 3), jetstream.Msg.Term)
			for ctx := doctorContext(t); ; { // it is not answered
				info, err := c.Info(ctx)
				if err != nil {
					t.Fatal(err)
				}
				if info.NumAckPending == 0 {
					return
				}
			}
		}},
	}
	for _, retention := range []jetstream.RetentionPolicy{jetstream.WorkQueuePolicy, jetstream.InterestPolicy} {
		for _, tt := range tests {
			t.Run(fmt.Sprintf("%v: %s", retention, tt.name), func(t *testing.T) {
				t.Parallel()
				s := setupDoctor(t)
				s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: retention})
				c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
				s.publish(t, "work.a", 4)
				tt.give(t, c)
				doctorWant(t, s.found(t, "zombies"))
				s.capture(t, "WORK", "a", 0)
				if n := s.stored(t, "WORK"); n != tt.left {
					t.Errorf("%d messages are left, want %d", n, tt.left)
				}
			})
		}
	}
}

// The ack floor stays below a message in flight. Those given up above it are
// counted, but cannot be told from those in flight.
func TestStore_zombiesAboveTheFloor(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 4)
	held := doctorFetch(t, c, 1)
	doctorExhaust(t, c, 1)
	doctorWant(t, s.found(t, "zombies"), zombies("WORK", "a", 3))
	s.capture(t, "WORK", "a", 0)
	if n := s.stored(t, "WORK"); n != 4 {
		t.Fatalf("%d messages are left, want 4", n)
	}
	doctorAck(t, held...)
	doctorWant(t, s.found(t, "zombies"), zombies("WORK", "a", 3))
	s.capture(t, "WORK", "a", 3)
	if n := s.stored(t, "WORK"); n != 0 {
		t.Errorf("%d messages are left, want none", n)
	}
}

// A consumer that was made again gets everything again.
func TestStore_zombiesOfAConsumerMadeAgain(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	st := s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", 2)
	doctorExhaust(t, c, 0)
	doctorWant(t, s.found(t, "zombies"), zombies("WORK", "a", 2))
	if err := st.DeleteConsumer(doctorContext(t), "a"); err != nil {
		t.Fatal(err)
	}
	c = s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	doctorWant(t, s.found(t, "zombies"))
	s.capture(t, "WORK", "a", 0)
	doctorAck(t, doctorFetch(t, c, 2)...)
}

func TestStore_zombiesOfInterestStream(t *testing.T) {
	t.Parallel()
	const n = 3
	setup := func(t *testing.T, cfgs ...jetstream.ConsumerConfig) (*doctorSetup, []jetstream.Consumer) {
		t.Helper()
		s := setupDoctor(t)
		s.stream(t, jetstream.StreamConfig{Name: "NEWS", Retention: jetstream.InterestPolicy})
		var consumers []jetstream.Consumer
		for _, cfg := range cfgs {
			consumers = append(consumers, s.consumer(t, "NEWS", cfg))
		}
		s.publish(t, "news.a", n)
		return s, consumers
	}
	empty := func(t *testing.T, s *doctorSetup) {
		t.Helper()
		doctorWant(t, s.found(t, "zombies"))
		if left := s.stored(t, "NEWS"); left != 0 {
			t.Errorf("%d messages are left, want none", left)
		}
	}

	t.Run("of the only consumer", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
		doctorExhaust(t, c[0], 0)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", n))
		s.capture(t, "NEWS", "a", n)
		empty(t, s)
	})
	t.Run("when others want other messages", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2, FilterSubject: "news.a"},
			jetstream.ConsumerConfig{Durable: "b", FilterSubject: "news.b"})
		s.publish(t, "news.b", 1)
		doctorExhaust(t, c[0], 0)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", n))
		s.capture(t, "NEWS", "a", n)
		doctorAck(t, doctorFetch(t, c[1], 1)...)
		empty(t, s)
	})
	t.Run("when another has handled them", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2}, jetstream.ConsumerConfig{Durable: "b", MaxDeliver: 5})
		doctorExhaust(t, c[0], 0)
		doctorAck(t, doctorFetch(t, c[1], n)...)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", n))
		s.capture(t, "NEWS", "b", 0)
		s.capture(t, "NEWS", "a", n)
		empty(t, s)
	})
	t.Run("when another has still to handle some", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2}, jetstream.ConsumerConfig{Durable: "b", FilterSubject: "news.*"})
		doctorExhaust(t, c[0], 0)
		doctorWant(t, s.found(t, "zombies"))
		s.capture(t, "NEWS", "a", 0)
		msgs := doctorFetch(t, c[1], 2)
		doctorAck(t, msgs[0])
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", 1))
		s.capture(t, "NEWS", "a", 1)
		if left := s.stored(t, "NEWS"); left != 2 {
			t.Errorf("%d messages are left, want 2", left)
		}
		doctorAck(t, msgs[1])
		doctorAck(t, doctorFetch(t, c[1], 1)...)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", 2))
		s.capture(t, "NEWS", "a", 2)
		empty(t, s)
	})
	t.Run("when another wants some of them", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2}, jetstream.ConsumerConfig{Durable: "b", FilterSubject: "news.b"})
		s.publish(t, "news.b", 2)
		doctorExhaust(t, c[0], 0)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", n))
		s.capture(t, "NEWS", "a", n)
		doctorAck(t, doctorFetch(t, c[1], 2)...)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", 2))
		s.capture(t, "NEWS", "a", 2)
		empty(t, s)
	})
	// Either may have given up what is there. The first that is captured must not
	// take away what is the other's.
	t.Run("when another has given up, too", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2}, jetstream.ConsumerConfig{Durable: "b", MaxDeliver: 2})
		doctorExhaust(t, c[0], 0)
		doctorExhaust(t, c[1], 0)
		got := s.found(t, "zombies")
		doctorWant(t, got, zombies("NEWS", "a", n), zombies("NEWS", "b", n))
		if !strings.HasSuffix(got[0].Detail, "it may also have been b") {
			t.Errorf("detail %q does not name the other", got[0].Detail)
		}
		s.capture(t, "NEWS", "a", n)
		if left := s.stored(t, "NEWS"); left != n {
			t.Errorf("%d messages are left, want %d", left, n)
		}
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "b", n))
		s.capture(t, "NEWS", "b", n)
		empty(t, s)
		if dead := s.stored(t, "DLQ"); dead != 2*n {
			t.Errorf("there are %d dead letters, want %d", dead, 2*n)
		}
	})
	t.Run("of a consumer that acknowledges all before", func(t *testing.T) {
		t.Parallel()
		s, c := setup(t, jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2, AckPolicy: jetstream.AckAllPolicy})
		doctorExhaust(t, c[0], 0)
		doctorWant(t, s.found(t, "zombies"), zombies("NEWS", "a", n))
		s.capture(t, "NEWS", "a", n)
		empty(t, s)
	})
}

// Numbers that are read one after the other do not agree while messages flow.
func TestStore_Doctor_whileMessagesFlow(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.WorkQueuePolicy, jetstream.InterestPolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			s := setupDoctor(t)
			s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: retention, MaxBytes: 64 << 20, Discard: jetstream.DiscardNew})
			bad := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "bad", MaxDeliver: 2, FilterSubject: "work.bad"})
			s.publish(t, "work.bad", 3)
			doctorExhaust(t, bad, 0)

			var wg sync.WaitGroup
			defer wg.Wait()
			flow, stop := context.WithCancel(t.Context())
			defer stop()
			running := make(chan struct{}, 3)
			once := func(f func()) func() {
				var o sync.Once
				return func() { o.Do(f) }
			}
			for _, name := range []string{"good", "slow", "bad"} {
				c := bad
				if name != "bad" {
					c = s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: name, MaxDeliver: 5, FilterSubject: "work." + name})
				}
				wg.Go(func() {
					for flow.Err() == nil {
						if _, err := s.js.Publish(flow, "work."+name, []byte("x")); err != nil && flow.Err() == nil {
							t.Errorf("publish: %v", err)
							return
						}
					}
				})
				it, err := c.Messages(jetstream.PullMaxMessages(20))
				if err != nil {
					t.Fatal(err)
				}
				context.AfterFunc(flow, it.Stop)
				seen := once(func() { running <- struct{}{} })
				wg.Go(func() {
					for i := 0; ; i++ {
						m, err := it.Next()
						if err != nil {
							return
						}
						settle := m.Ack
						if meta, err := m.Metadata(); err == nil && name == "slow" && i%3 == 0 && meta.NumDelivered < 3 {
							settle = m.Nak
						}
						if err := settle(); err != nil {
							return
						}
						seen()
					}
				})
			}
			for range 3 {
				select {
				case <-running:
				case <-time.After(doctorPatience):
					t.Fatal("nothing flows")
				}
			}
			for range 3 {
				for _, f := range s.found(t, "zombies") {
					if f.Consumer != "bad" || f.Count > 3 {
						t.Errorf("found %+v", f)
					}
				}
			}
			s.capture(t, "WORK", "slow", 0)
			s.capture(t, "WORK", "good", 0)
		})
	}
}

// A consumer that always has something in flight has no moment at which the server
// tells that from what it gave up.
func TestStore_zombiesOfAConsumerThatNeverRests(t *testing.T) {
	t.Parallel()
	const n = 6
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	c := s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "a", MaxDeliver: 2})
	s.publish(t, "work.a", n)
	doctorExhaust(t, c, 0)
	s.publish(t, "work.a", 3)
	slow := doctorFetch(t, c, 2) // in flight all the time
	held := doctorFetch(t, c, 1)[0]

	flow, stop := context.WithCancel(t.Context())
	defer stop()
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			for flow.Err() == nil {
				if _, err := s.js.Publish(t.Context(), "work.a", nil); err != nil {
					return err
				}
				next, err := c.Next(jetstream.FetchMaxWait(doctorPatience))
				if err != nil {
					return err
				}
				if err := held.DoubleAck(t.Context()); err != nil {
					return err
				}
				held = next
			}
			return held.DoubleAck(t.Context())
		}()
	}()
	got := s.found(t, "zombies")
	if len(got) != 1 || got[0].Count < n-4 || got[0].Count > n || !strings.HasPrefix(got[0].Detail, "at least") {
		t.Errorf("found %+v, want at least %d zombies", got, n-4) // at most four are in flight
	}
	s.capture(t, "WORK", "a", 0)
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	doctorAck(t, slow...)
	doctorWant(t, s.found(t, "zombies"), zombies("WORK", "a", n))
	s.capture(t, "WORK", "a", n)
}

// TestStore_Doctor_zombieRemedies follows what the findings say can be done, and
// what is not to be done.
func TestStore_Doctor_zombieRemedies(t *testing.T) {
	t.Parallel()
	s := setupDoctor(t)
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy})
	s.stream(t, jetstream.StreamConfig{Name: "INTEREST", Retention: jetstream.InterestPolicy})
	for _, stream := range []string{"WORK", "INTEREST"} {
		c := s.consumer(t, stream, jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 2})
		s.publish(t, strings.ToLower(stream)+".a", 2)
		doctorExhaust(t, c, 0)
	}
	got := s.found(t, "zombies")
	doctorWant(t, got, zombies("INTEREST", "c", 2), zombies("WORK", "c", 2))
	for i, want := range []string{"Do not delete the consumer", "`nats consumer rm WORK c`"} {
		if !strings.Contains(got[i].Remedy, want) || !strings.Contains(got[i].Remedy, "`monotel dlq capture "+got[i].Stream+" c`") {
			t.Errorf("remedy %d does not say %q: %s", i, want, got[i].Remedy)
		}
	}
	for _, stream := range []string{"WORK", "INTEREST"} {
		if err := s.js.DeleteConsumer(doctorContext(t), stream, "c"); err != nil {
			t.Fatal(err)
		}
	}
	if n := s.stored(t, "INTEREST"); n != 0 {
		t.Errorf("the interest stream keeps %d messages of a consumer that was deleted: the remedy warns for nothing", n)
	}
	doctorFetch(t, s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "c"}), 2)
}

// TestStore_Doctor_quotes has no remedy that would run what the name of a stream or
// a consumer says: the user that creates the consumer chooses it.
func TestStore_Doctor_quotes(t *testing.T) {
	t.Parallel()
	until := time.Now().Add(time.Hour)
	for i, tt := range []struct{ name, quoted string }{
		{"a`id`", "'a`id`'"},
		{"a$(id)", "'a$(id)'"},
		{"a;id", "'a;id'"},
		{"a|id&", "'a|id&'"},
		{"a'b", `'a'\''b'`},
		{`a"b`, `'a"b'`},
		{"-rf", "-- -rf"},
		{"~", "'~'"},
	} {
		s := setupDoctor(t)
		subject := fmt.Sprintf("s%d.>", i)
		s.stream(t, jetstream.StreamConfig{
			Name: tt.name, Subjects: []string{subject}, Retention: jetstream.WorkQueuePolicy, MaxBytes: -1, MaxAge: time.Hour, MaxMsgsPerSubject: 9,
		})
		c := s.consumer(t, tt.name, jetstream.ConsumerConfig{Durable: tt.name, MaxDeliver: 1})
		s.publish(t, strings.TrimSuffix(subject, ">")+"a", 2)
		doctorExhaust(t, c, 0)
		if _, err := s.js.PauseConsumer(doctorContext(t), tt.name, tt.name, until); err != nil {
			t.Fatal(err)
		}
		checks := make(map[string]bool)
		for _, f := range s.doctor(t) {
			if f.Stream != tt.name {
				continue
			}
			checks[f.Check] = true
			for _, command := range []string{"nats ", "monotel "} {
				for part := range strings.SplitSeq(f.Remedy, "`"+command) {
					if part != f.Remedy && strings.Contains(part, tt.name) && !strings.Contains(part, tt.quoted) {
						t.Errorf("%q in the remedy for %s: %s, want %s", tt.name, f.Check, f.Remedy, tt.quoted)
					}
				}
			}
		}
		for _, check := range []string{"zombies", "paused", "max_deliver", "max_age", "discard_old", "stream_without_max_bytes"} {
			if !checks[check] {
				t.Errorf("%q: %s is not found", tt.name, check)
			}
		}
	}
}

// TestStore_Doctor_remedies has no remedy that an operator cannot follow: it names
// a command, a setting or, where there is neither, the call.
func TestStore_Doctor_remedies(t *testing.T) {
	t.Parallel()
	until := time.Now().Add(time.Hour)
	s := setupDoctorWith(t, dlq.Config{Stream: jetstream.StreamConfig{Name: "LETTERS", MaxBytes: 10 << 10, MaxAge: time.Hour}})
	s.stream(t, jetstream.StreamConfig{Name: "WORK", Retention: jetstream.WorkQueuePolicy, MaxBytes: 1 << 20, MaxAge: time.Hour, MaxMsgsPerSubject: 9})
	s.stream(t, jetstream.StreamConfig{Name: "LOG", MaxBytes: -1})
	s.consumer(t, "WORK", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: 3, PauseUntil: &until})
	s.consumer(t, "LOG", jetstream.ConsumerConfig{Durable: "c", BackOff: []time.Duration{time.Hour}})
	if _, err := s.js.Publish(doctorContext(t), "monotel.dlq.LETTERS.a", make([]byte, 9<<10)); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"paused":                   "`nats consumer resume WORK c`",
		"max_deliver":              "`nats consumer edit WORK c --max-deliver=-1`",
		"backoff":                  "NumDelivered",
		"discard_old":              "`nats stream edit WORK --discard new --discard-per-subject`",
		"max_age":                  "`nats stream edit WORK --max-age 0s`",
		"stream_without_max_bytes": "`nats stream edit LOG --max-bytes 1GiB`",
		"dlq_near_limit":           "`monotel dlq discard --all --state resolved --stream LETTERS`",
		"dlq_max_age":              "`nats stream edit LETTERS --max-age 0s`",
		"advisory_stream_missing":  "Set External of dlq.Config",
	}
	for _, f := range s.doctor(t) {
		if w, ok := want[f.Check]; !ok || !strings.Contains(f.Remedy, w) {
			t.Errorf("the remedy for %s does not say %q: %s", f.Check, w, f.Remedy)
		}
		delete(want, f.Check)
	}
	for check := range want {
		t.Errorf("%s is not found", check)
	}
}
