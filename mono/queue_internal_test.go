package mono

import (
	"math"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/monotel/monotel/telemetry/messaging"
)

// What is pushed is taken once and in order, in batches that are no larger than
// asked for, whatever the ring's size and place.
func TestMsgQueue(t *testing.T) {
	t.Parallel()
	const n, most = 10_000, 7
	var q msgQueue
	q.init()
	var pushed sync.WaitGroup
	msgs := make([]*Msg, n)
	for i := range msgs {
		msgs[i] = attemptAt(1)
	}
	pushed.Go(func() {
		for _, m := range msgs {
			q.push(m)
		}
	})
	next := 0
	for next < n {
		batch := q.take(make([]*Msg, 0, most), noLimit)
		if len(batch) > most {
			t.Fatalf("a batch of %d", len(batch))
		}
		for _, m := range batch {
			if m != msgs[next] {
				t.Fatalf("number %d is another", next)
			}
			next++
		}
	}
	pushed.Wait()
	if next != n {
		t.Errorf("%d of %d were taken", next, n)
	}
	for _, m := range q.ring {
		if m != nil {
			t.Fatal("the ring keeps what was taken")
		}
	}
}

func attemptAt(attempt uint32) *Msg {
	return &Msg{delivery: &delivery{tel: messaging.Delivery{Attempt: attempt}}}
}

func noLimit(uint64) int { return math.MaxInt }

// Messages that were delivered before are handed over in smaller batches; those that
// come after them begin the next one.
func TestMsgQueue_limit(t *testing.T) {
	t.Parallel()
	var q msgQueue
	q.init()
	for _, attempt := range []uint32{1, 1, 2, 1, 1, 1, 3, 3, 1, 5} {
		q.push(attemptAt(attempt))
	}
	limit := func(attempt uint64) int { return map[uint64]int{2: 3, 3: 1, 5: 1}[attempt] }
	var got [][]uint32
	for q.len() > 0 {
		var attempts []uint32
		for _, m := range q.take(make([]*Msg, 0, 4), limit) {
			attempts = append(attempts, m.tel.Attempt)
		}
		got = append(got, attempts)
	}
	want := [][]uint32{{1, 1, 2}, {1, 1, 1}, {3}, {3}, {1}, {5}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("batches (-want +got):\n%s", diff)
	}
}

// A worker takes its share only, if others wait.
func TestMsgQueue_share(t *testing.T) {
	t.Parallel()
	var q msgQueue
	q.init()
	q.waiting = 3 // beside the one that takes
	for range 8 {
		q.push(attemptAt(1))
	}
	if got := len(q.take(make([]*Msg, 0, 10), noLimit)); got != 2 {
		t.Errorf("one of four workers takes %d of 8, want 2", got)
	}
	q.waiting = 0
	if got := len(q.take(make([]*Msg, 0, 10), noLimit)); got != 6 {
		t.Errorf("the only worker takes %d of 6", got)
	}
}

// Workers that wait all return when the queue ends, and each message goes to one, or
// is left.
func TestMsgQueue_workers(t *testing.T) {
	t.Parallel()
	const n, workers = 1000, 16
	var q msgQueue
	q.init()
	var mu sync.Mutex
	seen := make(map[*Msg]int)
	var all sync.WaitGroup
	for range workers {
		all.Go(func() {
			for batch := q.take(make([]*Msg, 0, 3), noLimit); len(batch) > 0; batch = q.take(batch[:0], noLimit) {
				mu.Lock()
				for _, m := range batch {
					seen[m]++
				}
				mu.Unlock()
			}
		})
	}
	for range n {
		q.push(attemptAt(1))
	}
	q.end()
	all.Wait()
	for _, m := range q.rest() {
		seen[m]++
	}
	if len(seen) != n {
		t.Errorf("%d of %d were taken", len(seen), n)
	}
	for _, times := range seen {
		if times != 1 {
			t.Errorf("one was taken %d times", times)
		}
	}
}
