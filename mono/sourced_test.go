package mono_test

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

const (
	originStream  = "ORIGIN"
	originSubject = "raw.created"
	sourcedStream = "T"
	sourcedBy     = "m_shop_created_v1"
)

// A sourcing is a stream that sources from another, as somebody set it up who wants
// events of elsewhere. What is published to the origin is an event in it.
type sourcing struct {
	t   *testing.T
	srv *monotest.TestServer
	js  jetstream.JetStream
	e   mono.BaseEventDefinition
	cfg jetstream.StreamConfig
}

func newSourcing(t *testing.T, retention jetstream.RetentionPolicy) *sourcing {
	t.Helper()
	s := &sourcing{t: t, srv: monotest.Server(t), e: defineEvent(t, "Created")}
	s.js = jetStreamOf(t, s.srv.Conn())
	s.makeOrigin()
	s.cfg = jetstream.StreamConfig{
		Name: sourcedStream, Subjects: []string{s.e.Subject}, Retention: retention, Duplicates: 100 * time.Millisecond,
	}
	s.sourceFrom(0)
	return s
}

func (s *sourcing) makeOrigin() {
	s.t.Helper()
	if _, err := s.js.CreateStream(within(s.t), jetstream.StreamConfig{Name: originStream, Subjects: []string{originSubject}}); err != nil {
		s.t.Fatal(err)
	}
}

// sourceFrom has the server source the origin from a sequence on, what it has sourced
// already included: the source is taken away and added again, and the stream is empty.
func (s *sourcing) sourceFrom(sequence uint64) {
	s.t.Helper()
	cfg := s.cfg
	if _, err := s.js.CreateOrUpdateStream(within(s.t), cfg); err != nil {
		s.t.Fatal(err)
	}
	cfg.Sources = []*jetstream.StreamSource{{
		Name: originStream, OptStartSeq: sequence,
		SubjectTransforms: []jetstream.SubjectTransformConfig{{Source: originSubject, Destination: s.e.Subject}},
	}}
	if _, err := s.js.UpdateStream(within(s.t), cfg); err != nil {
		s.t.Fatal(err)
	}
}

func (s *sourcing) publish(payloads []string) {
	s.t.Helper()
	for _, p := range payloads {
		if _, err := s.js.Publish(within(s.t), originSubject, []byte(p)); err != nil {
			s.t.Fatal(err)
		}
	}
}

func (s *sourcing) app(log *logBuffer, h mono.EventStreamConsumerHandler, opts ...mono.Option) *mono.App {
	s.t.Helper()
	cfg := mono.StreamConsumerConfig{
		Stream:  mono.StreamConfig{Name: sourcedStream, Retention: s.cfg.Retention},
		AutoAck: true, Retry: mono.RetryPolicy{Backoff: []time.Duration{time.Hour}},
	}
	opts = append(append(onServer(s.srv), mono.WithEvents(s.e)), opts...)
	if log != nil {
		opts = append(opts, mono.WithLogger(log.logger()))
	}
	return runApp(s.t, opts, durableModule("m", s.e, cfg, h))
}

// stored waits until the stream has had n messages, and its consumer is done with all
// but those that are retried.
func (s *sourcing) stored(n, retried int) {
	s.t.Helper()
	eventually(s.t, func() bool {
		stream, err := s.js.Stream(within(s.t), sourcedStream)
		if err != nil {
			return false
		}
		c, err := stream.Consumer(within(s.t), sourcedBy)
		if err != nil {
			return false
		}
		info := c.CachedInfo()
		// The server counts a message as pending a little later than it stores it.
		return stream.CachedInfo().State.LastSeq == uint64(n) && info.Delivered.Stream == uint64(n) && info.NumPending == 0 &&
			info.NumAckPending == retried
	}, fmt.Sprintf("the stream has had %d messages, and the consumer is done with them", n))
}

// noted waits until it is written down that n messages are finished.
func (s *sourcing) noted(n int) {
	s.t.Helper()
	eventually(s.t, func() bool {
		have, err := mono.NotedAsFinished(within(s.t), s.js, sourcedStream, sourcedBy)
		return err == nil && have == n
	}, fmt.Sprintf("%d messages are noted as finished", n))
}

// The server sources again what the consumer has handled. A cluster does that by
// itself when another of its nodes leads; here the source is taken away and added
// again. Before, every event was handled twice.
func TestRepeats_dropped(t *testing.T) {
	t.Parallel()
	for name, retention := range map[string]jetstream.RetentionPolicy{
		"work queue": mono.WorkQueuePolicy, "interest": mono.InterestPolicy,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const n = 1500 // of two notes
			s := newSourcing(t, retention)
			handled, log := newTally(), &logBuffer{}
			s.app(log, handled.handle)
			want := payloads("n", 0, n)
			s.publish(want)
			handled.waitFor(t, want)
			s.stored(n, 0)
			s.sourceFrom(1)
			s.publish([]string{"after"})
			handled.waitFor(t, []string{"after"})
			s.stored(2*n+1, 0)
			s.sourceFrom(1) // and once more
			s.stored(3*n+2, 0)
			if twice := handled.deliveredTwice(); len(twice) > 0 {
				t.Errorf("%d of %d events were handled twice, such as %q", len(twice), n, twice[:min(10, len(twice))])
			}
			for _, part := range []string{"message dropped", "sourced it again", "origin=ORIGIN", "origin_sequence=", "stream_sequence="} {
				if !strings.Contains(log.String(), part) {
					t.Errorf("the log does not say %q", part)
				}
			}
		})
	}
}

// Two instances have handled a part each. One of them is replaced by a third, which
// has handled none, and neither knows what the other did but by the notes.
func TestRepeats_instancesAndRestarts(t *testing.T) {
	t.Parallel()
	const n = 400
	s := newSourcing(t, mono.WorkQueuePolicy)
	first, second := newTally(), newTally()
	a := s.app(nil, first.handle)
	b := s.app(nil, second.handle)
	want := payloads("n", 0, n)
	for _, p := range want {
		s.publish([]string{p})
	}
	s.stored(n, 0)
	s.noted(n)
	if first.distinct() == 0 || second.distinct() == 0 {
		t.Logf("one instance handled everything: %d and %d", first.distinct(), second.distinct())
	}
	mustStop(t, a)
	third := newTally()
	s.app(nil, third.handle)
	s.sourceFrom(1)
	s.stored(2*n, 0)
	mustStop(t, b)
	fourth := newTally()
	s.app(nil, fourth.handle)
	s.sourceFrom(1)
	s.stored(3*n, 0)
	s.publish([]string{"after"})
	eventually(t, func() bool { return third.has("after") || fourth.has("after") }, "the next event is handled")
	if got := first.total() + second.total() + third.total() + fourth.total(); got != n+1 {
		t.Errorf("%d events were handled %d times: %d, %d, %d and %d", n+1, got, first.total(), second.total(), third.total(), fourth.total())
	}
}

// Stop writes down what was finished just before.
func TestRepeats_stopNotes(t *testing.T) {
	t.Parallel()
	const n = 50
	s := newSourcing(t, mono.WorkQueuePolicy)
	before, after := newTally(), newTally()
	app := s.app(nil, before.handle)
	s.publish(payloads("n", 0, n))
	s.stored(n, 0)
	mustStop(t, app)
	have, err := mono.NotedAsFinished(within(t), s.js, sourcedStream, sourcedBy)
	if err != nil || have != n {
		t.Fatalf("%d messages are noted as finished after Stop, %v; want %d", have, err, n)
	}
	s.app(nil, after.handle)
	s.sourceFrom(1)
	s.stored(2*n, 0)
	if got := after.total(); got != 0 {
		t.Errorf("%d of %d events were handled again after the restart", got, n)
	}
}

// What was given up has one dead letter, also when it is sourced again.
func TestRepeats_deadLetters(t *testing.T) {
	t.Parallel()
	const n = 20
	s := newSourcing(t, mono.WorkQueuePolicy)
	app := s.app(nil, func(context.Context, []*mono.Msg) error { return mono.Permanent(errBroken) })
	s.publish(payloads("n", 0, n))
	s.stored(n, 0)
	s.sourceFrom(1)
	s.stored(2*n, 0)
	if got := streamMsgs(t, app, "DLQ"); got != n {
		t.Errorf("%d messages have %d dead letters", n, got)
	}
}

// Messages that look like repeats and are none reach the handler.
func TestRepeats_genuine(t *testing.T) {
	t.Parallel()
	t.Run("the first copy is not finished", func(t *testing.T) {
		t.Parallel()
		s := newSourcing(t, mono.InterestPolicy)
		var tries atomic.Int64
		handled := newTally()
		s.app(nil, func(ctx context.Context, msgs []*mono.Msg) error {
			if tries.Add(1) == 1 {
				return mono.RetryAfter(errBroken, time.Hour)
			}
			return handled.handle(ctx, msgs)
		})
		s.publish([]string{"x"})
		eventually(t, func() bool { return tries.Load() == 1 }, "the first try")
		s.stored(1, 1)
		if err := purge(t, s.js, sourcedStream); err != nil { // so that the server sources again
			t.Fatal(err)
		}
		s.sourceFrom(1)
		handled.waitFor(t, []string{"x"})
	})
	t.Run("the origin is made again", func(t *testing.T) {
		t.Parallel()
		const n = 100
		s := newSourcing(t, mono.WorkQueuePolicy)
		handled := newTally()
		s.app(nil, handled.handle)
		s.publish(payloads("same", 0, n))
		s.stored(n, 0)
		if err := s.js.DeleteStream(within(t), originStream); err != nil {
			t.Fatal(err)
		}
		s.makeOrigin()
		s.sourceFrom(1)
		s.publish(payloads("same", 0, n))
		s.stored(2*n, 0)
		if got := handled.total(); got != 2*n {
			t.Errorf("%d of %d messages were handled", got, 2*n)
		}
	})
	t.Run("another source has the same messages", func(t *testing.T) {
		t.Parallel()
		const n = 50
		s := newSourcing(t, mono.WorkQueuePolicy)
		handled := newTally()
		s.app(nil, handled.handle)
		s.publish(payloads("n", 0, n))
		s.stored(n, 0)
		cfg := s.cfg
		cfg.Sources = []*jetstream.StreamSource{{
			Name: originStream, OptStartSeq: 1,
			SubjectTransforms: []jetstream.SubjectTransformConfig{{Source: "raw.*", Destination: s.e.Subject}},
		}}
		if _, err := s.js.UpdateStream(within(t), cfg); err != nil {
			t.Fatal(err)
		}
		s.stored(2*n, 0)
		if got := handled.total(); got != 2*n {
			t.Errorf("%d of %d messages were handled", got, 2*n)
		}
	})
	t.Run("the stream is made again", func(t *testing.T) {
		t.Parallel()
		const n = 50
		s := newSourcing(t, mono.WorkQueuePolicy)
		handled := newTally()
		app := s.app(nil, handled.handle)
		s.publish(payloads("n", 0, n))
		s.stored(n, 0)
		if err := s.js.DeleteStream(within(t), sourcedStream); err != nil {
			t.Fatal(err)
		}
		eventually(t, func() bool {
			_, err := s.js.Stream(within(t), sourcedStream)
			return err == nil && app.Health(within(t)).Healthy
		}, "the App makes the stream again")
		s.sourceFrom(1)
		s.stored(n, 0)
		if got := handled.total(); got != 2*n {
			t.Errorf("%d of %d messages were handled: what was finished in a stream that is gone counts for nothing", got, 2*n)
		}
	})
}

// While an instance is away, the stream is deleted and made again, with its consumer, by
// somebody else. It is not told, and what it has finished in the old stream counts for
// nothing in the new one.
func TestRepeats_streamMadeAgainUnseen(t *testing.T) {
	t.Parallel()
	const n, more = 30, 70
	s := newSourcing(t, mono.WorkQueuePolicy)
	w := newWire(t, s.srv)
	handled := newTally()
	cfg := mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: sourcedStream, Retention: mono.WorkQueuePolicy}, AutoAck: true}
	app := runApp(t, append(onURL(w.url(s.srv)), mono.WithEvents(s.e), mono.WithPingInterval(quickPing)),
		durableModule("m", s.e, cfg, handled.handle))
	s.publish(payloads("n", 0, n))
	s.stored(n, 0)
	w.later(lossy)
	w.now(lossy)
	awaitDisconnect(t, app)
	old, err := s.js.Consumer(within(t), sourcedStream, sourcedBy)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.js.DeleteStream(within(t), sourcedStream); err != nil {
		t.Fatal(err)
	}
	if _, err := s.js.CreateStream(within(t), s.cfg); err != nil {
		t.Fatal(err)
	}
	if _, err := s.js.CreateConsumer(within(t), sourcedStream, old.CachedInfo().Config); err != nil {
		t.Fatal(err)
	}
	for _, p := range payloads("direct", 0, more) { // so that what is sourced has higher sequences than before
		if _, err := s.js.Publish(within(t), s.e.Subject, []byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	s.sourceFrom(1)
	w.later(alive)
	s.stored(more+n, 0)
	if got := handled.total(); got != 2*n+more {
		t.Errorf("%d of %d messages were handled", got, 2*n+more)
	}
}

func purge(t *testing.T, js jetstream.JetStream, name string) error {
	t.Helper()
	s, err := js.Stream(within(t), name)
	if err != nil {
		return err
	}
	return s.Purge(within(t))
}

// The header is believed because the server refuses it in what clients publish.
func TestRepeats_forged(t *testing.T) {
	t.Parallel()
	s := newSourcing(t, mono.WorkQueuePolicy)
	handled := newTally()
	app := s.app(nil, handled.handle)
	_, err := app.Bus().PublishStream(within(t), &mono.Msg{
		Subject: s.e.Subject, Data: []byte("forged"),
		Header: mono.Header{"Nats-Stream-Source": {"ORIGIN 1 raw.created " + s.e.Subject + " raw.created id"}},
	})
	wantError(t, err, nil, "source header is not allowed")
}

// Without leave to make the stream for notes an instance knows what it has finished
// itself, says what is missing, and handles every event.
func TestRepeats_notesCannotBeStored(t *testing.T) {
	t.Parallel()
	const n = 30
	s := newSourcing(t, mono.WorkQueuePolicy)
	if _, err := s.js.CreateStream(within(t), jetstream.StreamConfig{
		Name: mono.RepeatsStream, Subjects: []string{"monotel.sourced.>"}, MaxMsgs: 1, MaxMsgSize: 10,
	}); err != nil {
		t.Fatal(err)
	}
	handled, log := newTally(), &logBuffer{}
	s.app(log, handled.handle)
	s.publish(payloads("n", 0, n))
	s.stored(n, 0)
	eventually(t, func() bool { return strings.Contains(log.String(), "finished sourced messages not looked up or noted") },
		"the log says that nothing can be noted")
	s.sourceFrom(1)
	s.publish([]string{"after"})
	handled.waitFor(t, append(payloads("n", 0, n), "after"))
	s.stored(2*n+1, 0)
	if !strings.Contains(log.String(), mono.RepeatsStream) {
		t.Errorf("the log does not name the stream:\n%s", log)
	}
}
