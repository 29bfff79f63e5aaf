package scale

import (
	"math"
	"testing"
	"time"
)

func TestCell_paper(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give cell
		want float64
	}{
		{"handlers", cell{Consumers: 4, Concurrency: 16, Batch: 10, MaxAckPending: 10_000}, 32_000},
		{"batches of what may be pending", cell{Consumers: 4, Concurrency: 16, Batch: 10, MaxAckPending: 256}, 12_500},
		{"one for each process", cell{Consumers: 4, Concurrency: 16, Batch: 10, MaxAckPending: 16}, 2000},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			tt.give.Handler = 2 * time.Millisecond
			if got := tt.give.paper(); math.Abs(got-tt.want) > 1e-6 {
				t.Errorf("%v messages a second, want %v", got, tt.want)
			}
		})
	}
}

// Costs that are easy to add up: each role takes ten times what the one before takes.
func roundCosts() costs {
	publish := result{PublisherCPU: 1, NodeCPU: [nodes]float64{10, 2, 2}}
	consume := result{ConsumerCPU: 5, NodeCPU: [nodes]float64{20, 1, 1}}
	far := publish
	far.NodeCPU[1] += 3
	return costs{
		publish: [2]result{publish, publish}, consume: [2]result{consume, consume}, publishFar: far, consumeFar: consume,
	}
}

func TestCosts_predict(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give cell
		want float64
	}{
		{"one durable", cell{Replicas: 3, FanOut: 1}, 15 + 27},
		{"three durables", cell{Replicas: 3, FanOut: 3}, 15 + 3*27},
		{"two of three connections hop", cell{Replicas: 3, FanOut: 1, Clients: clientsSpread}, 15 + 27 + 2},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := roundCosts().predict(tt.give); math.Abs(got-tt.want) > 1e-6 {
				t.Errorf("%v µs a message, want %v", got, tt.want)
			}
		})
	}
}

// Messages are divided among streams, subjects and publishers without a rest, and
// there are never more of them than the backlog has.
func TestCells(t *testing.T) {
	t.Parallel()
	for _, quick := range []bool{false, true} {
		most := backlogSize
		if quick {
			most = quickSize
		}
		seen := make(map[cell]bool)
		for _, c := range cells(quick) {
			if seen[c] {
				t.Errorf("%s: twice", c)
			}
			seen[c] = true
			if c.Messages > most || c.Messages%c.partitions() != 0 || c.Publishers > 0 && c.Messages%c.Publishers != 0 {
				t.Errorf("%s: %d messages of %d", c, c.Messages, most)
			}
			if c.Publishers == 0 && c.Messages == 0 {
				t.Errorf("%s: nothing to consume", c)
			}
		}
	}
}

func TestWhole(t *testing.T) {
	t.Parallel()
	for give, want := range map[float64]string{0: "0", 0.6: "1", 999: "999", 1234: "1 230", 99_950: "100 000", 1_234_567: "1 230 000"} {
		if got := whole(give); got != want {
			t.Errorf("whole(%v) = %q, want %q", give, got, want)
		}
	}
}
