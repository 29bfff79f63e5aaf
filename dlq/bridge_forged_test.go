package dlq_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

const (
	exhaustedAdvisory  = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."
	terminatedAdvisory = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."
)

// forge publishes an advisory, as everybody may who has the right to publish its subject.
func (s *bridgeSetup) forge(t *testing.T, kind, stream, consumer, more string) {
	t.Helper()
	data := fmt.Sprintf(`{"stream":%q,"consumer":%q,%s}`, stream, consumer, more)
	if err := s.nc.Publish(kind+stream+"."+consumer, []byte(data)); err != nil {
		t.Fatal(err)
	}
}

// Each of these had a message copied into a dead letter, or removed from its stream.
func TestBridge_forged(t *testing.T) {
	t.Parallel()
	explicit := func(name string, most int) jetstream.ConsumerConfig {
		return jetstream.ConsumerConfig{Durable: name, MaxDeliver: most, AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Hour}
	}
	for _, tt := range []struct {
		name     string
		kind     string
		stream   string // the default is ORDERS, which has one message
		consumer jetstream.ConsumerConfig
		had      int    // deliveries of the message, in work after them
		more     string // fields of the advisory
		want     string
	}{
		{
			name: "key-value bucket, terminated", kind: terminatedAdvisory, stream: "KV_secrets", consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipBucket,
		},
		{
			name: "key-value bucket, exhausted", kind: exhaustedAdvisory, stream: "KV_secrets", consumer: explicit("c", 1), had: 1,
			more: `"stream_seq":1,"deliveries":1`, want: dlq.SkipBucket,
		},
		{
			name: "key-value bucket, no such consumer", kind: terminatedAdvisory, stream: "KV_secrets",
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipBucket,
		},
		{
			name: "object bucket", kind: terminatedAdvisory, stream: "OBJ_files", consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipBucket,
		},
		{
			name: "mirror of a bucket", kind: terminatedAdvisory, stream: "BACKUP", consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipBucket,
		},
		{
			name: "dead-letter stream", kind: terminatedAdvisory, stream: "DLQ",
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipOwn,
		},
		{
			name: "no such consumer, terminated", kind: terminatedAdvisory,
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipConsumerGone,
		},
		{
			name: "not delivered, terminated", kind: terminatedAdvisory, consumer: explicit("c", -1),
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipConsumerGone,
		},
		{
			name: "not delivered, exhausted", kind: exhaustedAdvisory, consumer: explicit("c", 1),
			more: `"stream_seq":1,"deliveries":1`, want: dlq.SkipConsumerGone,
		},
		{
			name: "sequence of the future", kind: terminatedAdvisory, consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":18446744073709551615,"consumer_seq":1,"deliveries":1`, want: dlq.SkipConsumerGone,
		},
		{
			name: "more deliveries than there were", kind: exhaustedAdvisory, consumer: explicit("c", 2), had: 1,
			more: `"stream_seq":1,"deliveries":2`, want: dlq.SkipUnproven,
		},
		{
			name: "fewer deliveries than the limit", kind: exhaustedAdvisory, consumer: explicit("c", 3), had: 2,
			more: `"stream_seq":1,"deliveries":1`, want: dlq.SkipUnproven,
		},
		{
			name: "no limit of deliveries", kind: exhaustedAdvisory, consumer: explicit("c", -1), had: 2,
			more: `"stream_seq":1,"deliveries":2`, want: dlq.SkipUnproven,
		},
		{
			name: "no deliveries", kind: exhaustedAdvisory, consumer: explicit("c", 2), had: 1,
			more: `"stream_seq":1`, want: dlq.SkipUnproven,
		},
		{
			name: "consumer sequence of the future", kind: terminatedAdvisory, consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":1,"consumer_seq":2,"deliveries":1`, want: dlq.SkipUnproven,
		},
		{
			name: "no consumer sequence", kind: terminatedAdvisory, consumer: explicit("c", -1), had: 1,
			more: `"stream_seq":1,"deliveries":1`, want: dlq.SkipUnproven,
		},
		{
			name: "more deliveries than the limit", kind: terminatedAdvisory, consumer: explicit("c", 2), had: 2,
			more: `"stream_seq":1,"consumer_seq":1,"deliveries":3`, want: dlq.SkipUnproven,
		},
		{
			name: "nothing is acknowledged", kind: terminatedAdvisory, had: 1,
			consumer: jetstream.ConsumerConfig{Durable: "c", AckPolicy: jetstream.AckNonePolicy},
			more:     `"stream_seq":1,"consumer_seq":1,"deliveries":1`, want: dlq.SkipUnproven,
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			p := startBridge(t, s.store, dlq.BridgeConfig{})
			ctx := bridgeContext(t)
			stream := tt.stream
			switch {
			case stream == "":
				stream = "ORDERS"
				s.stream(t, jetstream.StreamConfig{Name: stream, Retention: jetstream.WorkQueuePolicy})
				if tt.consumer.AckPolicy == jetstream.AckNonePolicy && tt.had > 0 {
					must(t, s.js.DeleteStream(ctx, stream))
					s.stream(t, jetstream.StreamConfig{Name: stream})
				}
				s.publish(t, "ORDERS.created", "secret")
			case strings.HasPrefix(stream, "OBJ_"):
				bucket, err := s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{Bucket: "files"})
				must(t, err)
				_, err = bucket.PutString(ctx, "name", "secret")
				must(t, err)
			case stream != "DLQ":
				bucket, err := s.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{Bucket: "secrets"})
				must(t, err)
				_, err = bucket.PutString(ctx, "key", "secret")
				must(t, err)
				if stream == "BACKUP" {
					_, err = s.js.CreateStream(ctx, jetstream.StreamConfig{Name: stream, Mirror: &jetstream.StreamSource{Name: "KV_secrets"}})
					must(t, err)
				}
			}
			if tt.consumer.Durable != "" {
				c := s.consumer(t, stream, tt.consumer)
				for n := 1; n <= tt.had; n++ {
					if m := nextMessage(t, c); n < tt.had {
						must(t, m.Nak())
					}
				}
			}
			before := s.messages(t, stream)
			s.forge(t, tt.kind, stream, "c", tt.more)
			s.waitAdvisories(t, 1)
			p.wantSkip(t, tt.want)
			s.waitSettled(t)
			s.waitLetters(t, 0)
			if left := s.messages(t, stream); left != before {
				t.Errorf("%d messages are left in the stream, want all %d", left, before)
			}
		})
	}
}

// The consumer gives up only messages that its filter selects.
func TestBridge_forgedFilter(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		filters []string
		subject string // of the message
		want    bool   // a dead letter
	}{
		{name: "another subject", filters: []string{"ORDERS.created"}, subject: "ORDERS.secret"},
		{name: "none of several", filters: []string{"ORDERS.created", "ORDERS.paid"}, subject: "ORDERS.secret"},
		{name: "one token too many", filters: []string{"ORDERS.*"}, subject: "ORDERS.secret.x"},
		{name: "one token too few", filters: []string{"ORDERS.created.>"}, subject: "ORDERS.created"},
		{name: "another case", filters: []string{"ORDERS.created"}, subject: "ORDERS.Created"},
		{name: "a wildcard", filters: []string{"ORDERS.*"}, subject: "ORDERS.created", want: true},
		{name: "a tail", filters: []string{"ORDERS.x", "ORDERS.created.>"}, subject: "ORDERS.created.a.b", want: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			p := startBridge(t, s.store, dlq.BridgeConfig{})
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS"})
			s.publish(t, tt.subject, "secret")
			own := strings.NewReplacer("*", "last", ">", "last").Replace(tt.filters[0])
			s.publish(t, own, "its own") // so that it is past the first
			c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "c", FilterSubjects: tt.filters})
			for {
				m := nextMessage(t, c)
				must(t, m.DoubleAck(bridgeContext(t)))
				if m.Subject() == own {
					break
				}
			}
			s.forge(t, terminatedAdvisory, "ORDERS", "c", `"stream_seq":1,"consumer_seq":1,"deliveries":1`)
			s.waitAdvisories(t, 1)
			if tt.want {
				s.waitLetters(t, 1)
				return
			}
			p.wantSkip(t, dlq.SkipUnproven)
			s.waitLetters(t, 0)
		})
	}
}

// A message in work is not settled, whatever an advisory says: it would be lost for a
// handler that fails after that.
func TestBridge_forgedInWork(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name      string
		retention jetstream.RetentionPolicy
		max       int
		earlier   bool // another message is in work before it, too
	}{
		{name: "work queue", retention: jetstream.WorkQueuePolicy, max: 2},
		{name: "work queue, one delivery", retention: jetstream.WorkQueuePolicy, max: 1},
		{name: "work queue, behind another", retention: jetstream.WorkQueuePolicy, max: 2, earlier: true},
		{name: "interest", retention: jetstream.InterestPolicy, max: 2},
		{name: "interest, one delivery", retention: jetstream.InterestPolicy, max: 1},
		{name: "limits", retention: jetstream.LimitsPolicy, max: 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			s := setupBridge(t, dlq.Config{})
			p := startBridge(t, s.store, dlq.BridgeConfig{})
			s.stream(t, jetstream.StreamConfig{Name: "ORDERS", Retention: tt.retention})
			c := s.consumer(t, "ORDERS", jetstream.ConsumerConfig{Durable: "c", MaxDeliver: tt.max, AckWait: time.Hour})
			var work []jetstream.Msg
			if tt.earlier {
				s.publish(t, "ORDERS.created", "first")
				work = append(work, nextMessage(t, c))
			}
			s.publish(t, "ORDERS.created", "forged")
			for n := 1; n < tt.max; n++ {
				must(t, nextMessage(t, c).Nak())
			}
			work = append(work, nextMessage(t, c))
			s.forge(t, exhaustedAdvisory, "ORDERS", "c", fmt.Sprintf(`"stream_seq":%d,"deliveries":%d`, len(work), tt.max))
			bridgeEventually(t, "the advisory to come again", func() bool {
				p.mu.Lock()
				defer p.mu.Unlock()
				return p.again > 0
			})
			if left := s.messages(t, "ORDERS"); left != uint64(len(work)) {
				t.Errorf("%d messages are left in the stream, want %d", left, len(work))
			}
			info, err := c.Info(bridgeContext(t))
			if err != nil || info.NumAckPending != len(work) {
				t.Errorf("%d messages are in work, error %v, want %d", info.NumAckPending, err, len(work))
			}
			for _, m := range work {
				must(t, m.DoubleAck(bridgeContext(t)))
			}
			s.waitSettled(t)
		})
	}
}

// A flood of advisories waits in its stream.
func TestBridge_rate(t *testing.T) {
	t.Parallel()
	const flood = 20
	s := setupBridge(t, dlq.Config{})
	p := newBridgeProbe(t, s.store, dlq.BridgeConfig{})
	dlq.LimitBridge(p.Bridge, 2)
	p.start(t)
	for range flood {
		must(t, s.nc.Publish(terminatedAdvisory+"GONE.c", []byte(`{"stream":"GONE","consumer":"c","stream_seq":1}`)))
	}
	s.waitAdvisories(t, flood)
	// Two of a burst, and one that waits before the next is fetched.
	p.wantSkip(t, dlq.SkipStreamGone, dlq.SkipStreamGone, dlq.SkipStreamGone)
	p.stop(t)
	bridgeEventually(t, "the others to wait", func() bool {
		c, err := s.js.Consumer(bridgeContext(t), dlq.AdvisoryStream, "bridge_DLQ")
		return err == nil && c.CachedInfo().NumPending+uint64(c.CachedInfo().NumAckPending) == flood-3
	})
	if n := len(p.skips()); n != 3 {
		t.Errorf("%d advisories were handled, want 3", n)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
