package mono

import (
	"testing"
	"time"
)

// Quick handlers ask for many messages at a time, slow ones for few, and both
// stay within the bounds.
func TestPuller_adapt(t *testing.T) {
	t.Parallel()
	setup := func(batch, concurrency int) *puller {
		cfg := StreamConsumerConfig{Fetch: FetchConfig{BatchSize: batch}, Concurrency: concurrency}.withDefaults()
		p := &puller{}
		p.init(&streamConsumer{cfg: &cfg}, "d")
		return p
	}
	after := func(p *puller, n int, pace time.Duration) int {
		for range n {
			p.adapt(p.asked.Add(pace))
		}
		return p.capacity
	}
	for _, tt := range []struct {
		name               string
		batch, concurrency int
		pace               time.Duration
		rounds, want       int
	}{
		{name: "at first", batch: 10, concurrency: 1, want: minCapacity},
		{name: "quick", batch: 10, concurrency: 1, pace: quickPull / 2, rounds: 1, want: 2 * minCapacity},
		{name: "quick for long", batch: 10, concurrency: 1, pace: quickPull / 2, rounds: 20, want: maxCapacity},
		{name: "neither", batch: 10, concurrency: 1, pace: quickPull, rounds: 20, want: minCapacity},
		{name: "slow", batch: 10, concurrency: 1, pace: 2 * slowPull, rounds: 20, want: minCapacity},
		{name: "large batches", batch: 1000, concurrency: 4, pace: quickPull / 2, rounds: 20, want: pullAhead * 4000},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := after(setup(tt.batch, tt.concurrency), tt.rounds, tt.pace); got != tt.want {
				t.Errorf("capacity is %d, want %d", got, tt.want)
			}
		})
	}
	p := setup(10, 1)
	after(p, 20, quickPull/2)
	if got := after(p, 1, 2*slowPull); got != maxCapacity/2 {
		t.Errorf("capacity is %d when handlers become slow, want %d", got, maxCapacity/2)
	}
	if got := after(p, 20, 2*slowPull); got != minCapacity {
		t.Errorf("capacity is %d when handlers stay slow, want %d", got, minCapacity)
	}
}
