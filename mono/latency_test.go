package mono_test

import (
	"slices"
	"testing"
	"time"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// A lone durable event, with nobody else on the way, reaches its handler about
// as fast as through nats.go's Consume. It would not if a batch waited to fill,
// or if a pull request were sent only when it is needed.
//
//nolint:paralleltest // measures time
func TestLatency_loneDurableEvent(t *testing.T) {
	const (
		events = 400
		tries  = 10
		limit  = 3.0 // times nats.go's 99th percentile
		// An event whose batch waits to fill takes IdleTimeout, 5 s. A busy machine
		// stops a process for so long only now and then.
		waited    = 2500 * time.Millisecond
		mayWait   = 3
		warmingUp = events / 10
	)

	raw, monotel := latencyRaw(t), latencyMonotel(t)
	slow := 0
	measure := func() (time.Duration, time.Duration) {
		r, m := raw.measure(t), monotel.measure(t)
		if m > waited {
			slow++
		}
		if slow > mayWait {
			t.Fatalf("%d events took more than %v to reach their handlers, half of the idle timeout", slow, waited)
		}
		return r, m
	}
	for range warmingUp {
		measure()
	}

	// A 99th percentile of 400 is the fourth-slowest event, and any other
	// process on the machine can make four of them slow. It does not do so to
	// one side only, time and again.
	for try := range tries {
		raws, monotels := make([]time.Duration, events), make([]time.Duration, events)
		for i := range events {
			raws[i], monotels[i] = measure()
		}
		ratio := float64(percentile(monotels, 99)) / float64(percentile(raws, 99))
		t.Logf("try %d: median %v raw, %v monotel; 99th percentile %v raw, %v monotel, ratio %.2f", try+1,
			percentile(raws, 50), percentile(monotels, 50), percentile(raws, 99), percentile(monotels, 99), ratio)
		if ratio <= limit {
			return
		}
	}
	t.Errorf("p99 from publish to handler is more than %.0f times that of nats.go in %d measurements", limit, tries)
}

// The same as a benchmark, for docs/performance.md. It has both percentiles
// because the mean says little about waiting.
func BenchmarkLoneDurableEvent(b *testing.B) {
	for _, impl := range []struct {
		name  string
		probe func(testing.TB) *latencyProbe
	}{{"raw", latencyRaw}, {"monotel", latencyMonotel}} {
		b.Run("impl="+impl.name, func(b *testing.B) {
			probe := impl.probe(b)
			var took []time.Duration
			for b.Loop() {
				took = append(took, probe.measure(b))
			}
			b.ReportMetric(float64(percentile(took, 50)), "p50-ns/op")
			b.ReportMetric(float64(percentile(took, 99)), "p99-ns/op")
		})
	}
}

func latencyRaw(tb testing.TB) *latencyProbe {
	tb.Helper()
	return newLatencyProbe(tb, perfConsumeRaw(nil), func(s *embedded.Server) func() error {
		js := perfJetStream(tb, perfConn(tb, s))
		return func() error {
			_, err := js.Publish(tb.Context(), perfEvent.Subject, perfPayload)
			return err
		}
	})
}

func latencyMonotel(tb testing.TB) *latencyProbe {
	tb.Helper()
	return newLatencyProbe(tb, perfConsumeMonotel(0), func(s *embedded.Server) func() error {
		app := perfApp(tb, s, nil)
		perfJetStream(tb, app.Conn())
		return func() error {
			_, err := app.bus.PublishStream(tb.Context(), &mono.Msg{Subject: perfEvent.Subject, Data: perfPayload})
			return err
		}
	})
}

// A latencyProbe publishes an event and tells how long it takes to be handled.
type latencyProbe struct {
	publish func() error
	handled chan time.Time
}

// newLatencyProbe gives publisher and consumer a server and a connection each.
func newLatencyProbe(tb testing.TB, consume perfConsume, publisher func(*embedded.Server) func() error) *latencyProbe {
	tb.Helper()
	s := perfServer(tb)
	p := &latencyProbe{publish: publisher(s), handled: make(chan time.Time, 1)}
	tb.Cleanup(consume(tb, s, "perf_latency", func() { p.handled <- time.Now() }))
	return p
}

// measure runs from before the publish until the handler has acked.
func (p *latencyProbe) measure(tb testing.TB) time.Duration {
	tb.Helper()
	begin := time.Now()
	if err := p.publish(); err != nil {
		tb.Fatal(err)
	}
	select {
	case at := <-p.handled:
		return at.Sub(begin)
	case <-time.After(perfTimeout):
		tb.Fatal("event not handled")
		return 0
	}
}

// percentile returns the value that p percent of ds do not exceed.
func percentile(ds []time.Duration, p int) time.Duration {
	slices.Sort(ds)
	return ds[(len(ds)*p+99)/100-1]
}
