package mono_test

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// perfDead is where the default configuration keeps dead letters.
const perfDead = "DLQ"

// What nobody gives up costs the same with and without a dead-letter stream: the
// work of BenchmarkConsumeAck, impl=off by an App without one. The two differ by
// less than rounds do on a machine with other work, so the quickest round counts:
// what else happens only adds to it.
func BenchmarkDeadLetterHealthyPath(b *testing.B) {
	b.Run("impl=off", func(b *testing.B) { perfQuickest(b, perfConsumeMonotel(10, mono.WithoutDeadLetters())) })
	b.Run("impl=on", func(b *testing.B) { perfQuickest(b, perfConsumeMonotel(10)) })
}

func perfQuickest(b *testing.B, consume perfConsume) {
	b.Helper()
	const tries = 6
	s, js := perfFilled(b, perfBacklog, perfPayload)
	b.ReportAllocs()
	var best *perfMeter
	for b.Loop() {
		for range tries {
			if m := perfRound(b, s, js, perfBacklog, consume); best == nil || m.elapsed < best.elapsed {
				best = m
			}
		}
	}
	msgs := float64(best.want - 1) // the first message starts the clock
	b.ReportMetric(float64(best.elapsed.Nanoseconds())/msgs, "ns/op")
	b.ReportMetric(msgs/best.elapsed.Seconds(), "msg/s")
	b.ReportMetric(float64(best.bytes)/msgs, "B/op")
	b.ReportMetric(float64(best.mallocs)/msgs, "allocs/op")
}

//nolint:paralleltest // counts the allocations of the process
func TestAlloc_deadLettersHealthyPath(t *testing.T) {
	skipAllocUnderRace(t)
	const n = 10_000

	s, js := perfFilled(t, n, perfPayload)
	least := func(consume perfConsume) float64 {
		best := perfRound(t, s, js, n, consume).mallocs
		for range allocTries - 1 {
			best = min(best, perfRound(t, s, js, n, consume).mallocs)
		}
		return float64(best) / n
	}
	off, on := least(perfConsumeMonotel(10, mono.WithoutDeadLetters())), least(perfConsumeMonotel(10))
	t.Logf("consume and ack: %.2f allocations without dead letters, %.2f with them", off, on)
	if on-off > allocSlack {
		t.Errorf("a dead-letter stream costs %.2f allocations for a message that is acked, want none", on-off)
	}
}

// A consumer gives up on everything it gets, one batch after the other, as when a
// deployment has broken its handler. The clock runs from the first call of the
// handler until the last message is in the dead-letter stream.
func BenchmarkDeadLetterCapture(b *testing.B) {
	const msgs = 5000
	s, js := perfFilled(b, msgs, perfPayload)
	var elapsed time.Duration
	var mallocs, bytes uint64
	b.ReportAllocs()
	for b.Loop() {
		m := perfCapture(b, s, js, msgs)
		elapsed += m.elapsed
		mallocs += m.mallocs
		bytes += m.bytes
	}
	total := float64(msgs * b.N)
	b.ReportMetric(float64(elapsed.Nanoseconds())/total, "ns/op")
	b.ReportMetric(total/elapsed.Seconds(), "msg/s")
	b.ReportMetric(float64(bytes)/total, "B/op")
	b.ReportMetric(float64(mallocs)/total, "allocs/op")
}

func perfCapture(b *testing.B, s *embedded.Server, js jetstream.JetStream, msgs int) *perfMeter {
	b.Helper()
	const durable = "perf_reader"
	errBroken := mono.Permanent(errors.New("column total does not exist"))
	m := newPerfMeter(msgs + 1) // the last one is counted when everything is captured
	_, stop := perfStartApp(b, s, func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(perfEvent, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: perfStream},
			Consumer: mono.ConsumerConfig{Durable: durable},
		}, func(_ context.Context, batch []*mono.Msg) error {
			for range batch {
				m.count()
			}
			return errBroken
		}, self)
	})
	dead, err := js.Stream(b.Context(), perfDead)
	if err != nil {
		b.Fatal(err)
	}
	perfUntil(b, "every message is captured", func() (bool, error) {
		info, err := dead.Info(b.Context())
		return err == nil && info.State.Msgs == uint64(msgs), err
	})
	m.count()
	stop()
	c, err := js.Consumer(b.Context(), perfStream, durable)
	if err != nil {
		b.Fatal(err)
	}
	perfUntil(b, "every message is terminated", func() (bool, error) {
		info, err := c.Info(b.Context())
		if err == nil && info.Delivered.Consumer > uint64(msgs) {
			err = fmt.Errorf("%d deliveries of %d messages", info.Delivered.Consumer, msgs)
		}
		return err == nil && info.AckFloor.Stream == uint64(msgs) && info.NumAckPending == 0, err
	})
	// The same messages have the same IDs in the next round, and would be found to
	// be captured already.
	if err := js.DeleteConsumer(b.Context(), perfStream, durable); err != nil {
		b.Fatal(err)
	}
	if err := js.DeleteStream(b.Context(), perfDead); err != nil {
		b.Fatal(err)
	}
	return m
}
