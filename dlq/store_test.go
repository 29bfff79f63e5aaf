package dlq_test

import (
	"context"
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

// A bundle is what a test needs: a server of its own, and a connection.
type bundle struct {
	server *monotest.TestServer
	nc     *nats.Conn
	js     jetstream.JetStream
}

func setup(t *testing.T) *bundle {
	t.Helper()
	b := &bundle{server: monotest.Server(t)}
	b.nc, b.js = b.connect(t)
	return b
}

func (b *bundle) connect(t *testing.T) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc := b.server.Conn(nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(bridgePatience))
	if err != nil {
		t.Fatal(err)
	}
	return nc, js
}

// store returns a store on b's connection that is not provisioned.
func (b *bundle) store(t *testing.T, cfg dlq.Config) *dlq.Store {
	t.Helper()
	s, err := dlq.NewStore(b.nc, b.js, cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// provisioned returns a store whose stream is there.
func (b *bundle) provisioned(t *testing.T, cfg dlq.Config) *dlq.Store {
	t.Helper()
	s := b.store(t, cfg)
	if err := s.Provision(t.Context()); err != nil {
		t.Fatal(err)
	}
	return s
}

func (b *bundle) info(t *testing.T, stream string) *jetstream.StreamInfo {
	t.Helper()
	s, err := b.js.Stream(t.Context(), stream)
	if err != nil {
		t.Fatal(err)
	}
	info, err := s.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return info
}

func (b *bundle) createStream(t *testing.T, cfg jetstream.StreamConfig) {
	t.Helper()
	if _, err := b.js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

func TestProvision(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		give jetstream.StreamConfig
		want jetstream.StreamConfig // what differs from the default
	}{
		{name: "default", want: jetstream.StreamConfig{Name: "DLQ", MaxBytes: 1 << 30}},
		{
			name: "limits and name",
			give: jetstream.StreamConfig{Name: "broken_orders", MaxBytes: 1 << 20, MaxAge: time.Hour, MaxMsgs: 10, Storage: jetstream.MemoryStorage},
			want: jetstream.StreamConfig{Name: "broken_orders", MaxBytes: 1 << 20, MaxAge: time.Hour, MaxMsgs: 10, Storage: jetstream.MemoryStorage},
		},
		{
			name: "what is ours cannot be changed",
			give: jetstream.StreamConfig{
				Discard: jetstream.DiscardOld, MaxBytes: -1, AllowRollup: true, AllowMsgTTL: true, SubjectDeleteMarkerTTL: time.Hour,
				AllowMsgSchedules: true, AllowAtomicPublish: true, AllowBatchPublish: true,
			},
			want: jetstream.StreamConfig{Name: "DLQ", MaxBytes: -1},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s := b.store(t, dlq.Config{Stream: tt.give})
			for range 2 { // idempotent
				if err := s.Provision(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			got := b.info(t, tt.want.Name).Config
			if len(got.Subjects) != 1 || got.Subjects[0] != "monotel.dlq."+tt.want.Name+".>" {
				t.Errorf("subjects are %q", got.Subjects)
			}
			if got.Retention != jetstream.LimitsPolicy || got.Discard != jetstream.DiscardNew || !got.AllowDirect {
				t.Errorf("retention %v, discard %v, direct %v; want limits, new, true", got.Retention, got.Discard, got.AllowDirect)
			}
			if got.AllowRollup || got.AllowMsgTTL || got.SubjectDeleteMarkerTTL != 0 || got.AllowMsgSchedules || got.AllowAtomicPublish ||
				got.AllowBatchPublish {
				t.Errorf("rollup %v, TTL %v, delete marker %v, schedules %v, batches %v and %v; want none of them", got.AllowRollup,
					got.AllowMsgTTL, got.SubjectDeleteMarkerTTL, got.AllowMsgSchedules, got.AllowAtomicPublish, got.AllowBatchPublish)
			}
			if got.MaxBytes != tt.want.MaxBytes || got.MaxAge != tt.want.MaxAge || got.Storage != tt.want.Storage {
				t.Errorf("max bytes %d, max age %v, storage %v; want %d, %v, %v",
					got.MaxBytes, got.MaxAge, got.Storage, tt.want.MaxBytes, tt.want.MaxAge, tt.want.Storage)
			}
			if want := tt.want.MaxMsgs; want != 0 && got.MaxMsgs != want {
				t.Errorf("max messages %d, want %d", got.MaxMsgs, want)
			}
		})
	}
}

// TestProvision_concurrent has two versions of a program start at once, which ask
// for different limits: one wins, and none fails.
func TestProvision_concurrent(t *testing.T) {
	t.Parallel()

	b := setup(t)
	limits := []int64{1 << 20, 2 << 20}
	start, errs := make(chan struct{}), make(chan error, 8)
	for i := range cap(errs) {
		_, js := b.connect(t)
		s, err := dlq.NewStore(b.nc, js, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: limits[i%2]}})
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			<-start
			errs <- s.Provision(t.Context())
		}()
	}
	close(start)
	for range cap(errs) {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	first := b.info(t, "DLQ").Config.MaxBytes
	if first != limits[0] && first != limits[1] {
		t.Errorf("max bytes is %d, want one of %d", first, limits)
	}
	// Limits that an operator has changed stay.
	b.provisioned(t, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 3 << 20}})
	if got := b.info(t, "DLQ").Config.MaxBytes; got != first {
		t.Errorf("max bytes went from %d to %d", first, got)
	}
}

func TestProvision_conflict(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		give func(cfg *jetstream.StreamConfig)
		want string // in the error
	}{
		{"drops the oldest", func(cfg *jetstream.StreamConfig) { cfg.Discard = jetstream.DiscardOld }, "discard new"},
		{"other subjects", func(cfg *jetstream.StreamConfig) { cfg.Subjects = []string{"dead.>"} }, `without "monotel.dlq.DLQ.>"`},
		{"fewer subjects", func(cfg *jetstream.StreamConfig) { cfg.Subjects = []string{"monotel.dlq.DLQ.orders.>"} }, `without "monotel.dlq.DLQ.>"`},
		{"work queue", func(cfg *jetstream.StreamConfig) { cfg.Retention = jetstream.WorkQueuePolicy }, "retention is WorkQueue, want limits"},
		{"interest", func(cfg *jetstream.StreamConfig) { cfg.Retention = jetstream.InterestPolicy }, "retention is Interest, want limits"},
		{"messages of a subject", func(cfg *jetstream.StreamConfig) { cfg.MaxMsgsPerSubject = 1 }, "keeps 1 messages of a subject"},
		{"no acknowledgements", func(cfg *jetstream.StreamConfig) { cfg.NoAck = true }, "does not acknowledge"},
		{"counters", func(cfg *jetstream.StreamConfig) { cfg.AllowMsgCounter, cfg.Discard = true, jetstream.DiscardOld }, "counter"},
		{"other subjects inside", func(cfg *jetstream.StreamConfig) {
			cfg.SubjectTransform = &jetstream.SubjectTransformConfig{Source: ">", Destination: "moved.>"}
		}, "transform"},
		{"no deletes", func(cfg *jetstream.StreamConfig) { cfg.DenyDelete = true }, "denies deletes"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			cfg := jetstream.StreamConfig{
				Name: "DLQ", Subjects: []string{"monotel.dlq.DLQ.>"}, MaxBytes: 1 << 20, Discard: jetstream.DiscardNew,
			}
			tt.give(&cfg)
			b.createStream(t, cfg)
			before := b.info(t, "DLQ").Config
			err := b.store(t, dlq.Config{}).Provision(t.Context())
			if !errors.Is(err, dlq.ErrStreamConflict) {
				t.Fatalf("Provision() = %v, want ErrStreamConflict", err)
			}
			for _, want := range []string{tt.want, `"DLQ"`, "set Stream.Name of dlq.Config to another name, or change the stream"} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error lacks %q: %v", want, err)
				}
			}
			if after := b.info(t, "DLQ").Config; after.AllowRollup != before.AllowRollup || after.AllowDirect != before.AllowDirect {
				t.Error("a stream that is not ours was changed")
			}
		})
	}

	t.Run("sealed", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		s := b.provisioned(t, dlq.Config{})
		cfg := b.info(t, "DLQ").Config
		cfg.Sealed = true
		if _, err := b.js.UpdateStream(t.Context(), cfg); err != nil {
			t.Fatal(err)
		}
		if err := s.Provision(t.Context()); !errors.Is(err, dlq.ErrStreamConflict) || !strings.Contains(err.Error(), "it is sealed") {
			t.Errorf("Provision() = %v, want ErrStreamConflict because it is sealed", err)
		}
	})
	t.Run("all problems at once", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.createStream(t, jetstream.StreamConfig{Name: "DLQ", Subjects: []string{"dead"}, Retention: jetstream.WorkQueuePolicy, MaxMsgsPerSubject: 2})
		err := b.store(t, dlq.Config{}).Provision(t.Context())
		if !errors.Is(err, dlq.ErrStreamConflict) || strings.Count(err.Error(), ";") != 4 {
			t.Errorf("Provision() = %v, want four problems and what to do", err)
		}
	})
	t.Run("subjects of another stream", func(t *testing.T) {
		t.Parallel()
		b := setup(t)
		b.createStream(t, jetstream.StreamConfig{Name: "everything", Subjects: []string{"monotel.>"}})
		err := b.store(t, dlq.Config{}).Provision(t.Context())
		if api, ok := errors.AsType[*jetstream.APIError](err); !ok || api.ErrorCode != 10065 {
			t.Errorf("Provision() = %v, want error 10065, subjects overlap", err)
		}
	})
}

// TestProvision_older has the stream of an operator, or of an older version,
// without what reading needs.
func TestProvision_older(t *testing.T) {
	t.Parallel()

	b := setup(t)
	b.createStream(t, jetstream.StreamConfig{
		Name: "DLQ", Subjects: []string{"monotel.dlq.DLQ.>", "more"}, Discard: jetstream.DiscardNew,
		MaxBytes: 1 << 20, MaxAge: time.Hour, Description: "operator's",
	})
	if b.info(t, "DLQ").Config.AllowDirect {
		t.Fatal("the stream has direct gets before")
	}
	b.provisioned(t, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 2 << 20}})
	cfg := b.info(t, "DLQ").Config
	if !cfg.AllowDirect {
		t.Error("the stream has no direct gets")
	}
	if cfg.MaxBytes != 1<<20 || cfg.MaxAge != time.Hour || cfg.Description != "operator's" || len(cfg.Subjects) != 2 {
		t.Errorf("what is the operator's has changed: %+v", cfg)
	}
}

func TestProvision_serverDown(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.store(t, dlq.Config{})
	b.server.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.Provision(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Provision() = %v, want the context's error", err)
	}
}

func TestStore_Subject(t *testing.T) {
	t.Parallel()

	b := setup(t)
	s := b.store(t, dlq.Config{Stream: jetstream.StreamConfig{Name: "D"}})
	tests := []struct {
		name             string
		stream, consumer string
		want             string
	}{
		{"names", "orders", "billing", "monotel.dlq.D.orders.billing.id"},
		{"none", "", "", "monotel.dlq.D._._.id"},
		{"not fit for a subject", "a.b c", "*>\n\x7f", "monotel.dlq.D.a_b_c.____.id"},
		{"other alphabets", "größe", "注文", "monotel.dlq.D.größe.注文.id"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := s.Subject(tt.stream, tt.consumer, "id"); got != tt.want {
				t.Errorf("Subject(%q, %q) = %q, want %q", tt.stream, tt.consumer, got, tt.want)
			}
		})
	}
}

func TestConfig_Validate(t *testing.T) {
	t.Parallel()

	source := &jetstream.StreamSource{Name: "a"}
	tests := []struct {
		name string
		give jetstream.StreamConfig
		want []string // fields that the error names; none is no error
	}{
		{name: "default"},
		{name: "limits", give: jetstream.StreamConfig{Name: "a-B_9", MaxBytes: 1, MaxAge: 1, MaxMsgs: 1, Replicas: 3, Storage: jetstream.MemoryStorage}},
		{name: "dot", give: jetstream.StreamConfig{Name: "a.b"}, want: []string{"Name"}},
		{name: "wildcard", give: jetstream.StreamConfig{Name: "*"}, want: []string{"Name"}},
		{name: "space", give: jetstream.StreamConfig{Name: "a b"}, want: []string{"Name"}},
		// The name is the object store's, too, which takes less than a stream does.
		{name: "colon", give: jetstream.StreamConfig{Name: "a:b"}, want: []string{"Name"}},
		{name: "umlaut", give: jetstream.StreamConfig{Name: "größe"}, want: []string{"Name"}},
		{name: "too long", give: jetstream.StreamConfig{Name: strings.Repeat("a", 250)}, want: []string{"Name"}},
		{name: "as long as can be", give: jetstream.StreamConfig{Name: strings.Repeat("a", 200)}},
		{name: "subjects", give: jetstream.StreamConfig{Subjects: []string{"a"}}, want: []string{"Subjects"}},
		{name: "work queue", give: jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy}, want: []string{"Retention"}},
		{name: "messages of a subject", give: jetstream.StreamConfig{MaxMsgsPerSubject: 5}, want: []string{"MaxMsgsPerSubject"}},
		{name: "no limit of a subject", give: jetstream.StreamConfig{MaxMsgsPerSubject: -1}},
		{name: "mirror", give: jetstream.StreamConfig{Mirror: source}, want: []string{"Mirror"}},
		{name: "sources", give: jetstream.StreamConfig{Sources: []*jetstream.StreamSource{source}}, want: []string{"Sources"}},
		{name: "transform", give: jetstream.StreamConfig{SubjectTransform: &jetstream.SubjectTransformConfig{}}, want: []string{"SubjectTransform"}},
		{name: "republish", give: jetstream.StreamConfig{RePublish: &jetstream.RePublish{}}, want: []string{"RePublish"}},
		{name: "no ack", give: jetstream.StreamConfig{NoAck: true}, want: []string{"NoAck"}},
		{name: "sealed", give: jetstream.StreamConfig{Sealed: true}, want: []string{"Sealed"}},
		{name: "counters", give: jetstream.StreamConfig{AllowMsgCounter: true}, want: []string{"AllowMsgCounter"}},
		{name: "no deletes", give: jetstream.StreamConfig{DenyDelete: true}, want: []string{"DenyDelete"}},
		{name: "no purge", give: jetstream.StreamConfig{DenyPurge: true}},
		{
			name: "everything", give: jetstream.StreamConfig{
				Name: "a.b", Subjects: []string{"a"}, Retention: jetstream.InterestPolicy, MaxMsgsPerSubject: 1, Mirror: source,
			},
			want: []string{"Name", "Subjects", "Retention", "MaxMsgsPerSubject", "Mirror"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			err := dlq.Config{Stream: tt.give}.Validate()
			if len(tt.want) == 0 {
				if err != nil {
					t.Errorf("Validate() = %v, want nil", err)
				}
				return
			}
			if !errors.Is(err, dlq.ErrInvalidConfig) {
				t.Fatalf("Validate() = %v, want ErrInvalidConfig", err)
			}
			for _, want := range tt.want {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("the error does not name %s: %v", want, err)
				}
			}
			if got := strings.Count(err.Error(), "\n") + 1; got != len(tt.want) {
				t.Errorf("want %d problems, got %v", len(tt.want), err)
			}
			if s, err := dlq.NewStore(nil, nil, dlq.Config{Stream: tt.give}); s != nil || !errors.Is(err, dlq.ErrInvalidConfig) {
				t.Errorf("NewStore() = %v, %v, want nil and ErrInvalidConfig", s, err)
			}
		})
	}
}

// inParallel runs f n times at once and waits.
func inParallel(n int, f func(i int)) {
	start := make(chan struct{})
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			<-start
			f(i)
		})
	}
	close(start)
	wg.Wait()
}
