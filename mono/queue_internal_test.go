package mono

import (
	"sync"
	"testing"
)

// What is pushed is taken once and in order, in batches that are no larger than
// asked for, whatever the ring's size and place.
func TestMsgQueue(t *testing.T) {
	t.Parallel()
	const n, most = 10_000, 7
	var q msgQueue
	q.init()
	var pushed sync.WaitGroup
	msgs := make([]Msg, n)
	pushed.Go(func() {
		for i := range msgs {
			q.push(&msgs[i])
		}
		q.end()
	})
	next := 0
	for batch := q.take(make([]*Msg, 0, most)); len(batch) > 0; batch = q.take(batch[:0]) {
		if len(batch) > most {
			t.Fatalf("a batch of %d", len(batch))
		}
		for _, m := range batch {
			if m != &msgs[next] {
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

// Workers that wait all return when the queue ends, and each message goes to one.
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
			for batch := q.take(make([]*Msg, 0, 3)); len(batch) > 0; batch = q.take(batch[:0]) {
				mu.Lock()
				for _, m := range batch {
					seen[m]++
				}
				mu.Unlock()
			}
		})
	}
	for range n {
		q.push(&Msg{})
	}
	q.end()
	all.Wait()
	if len(seen) != n {
		t.Errorf("%d of %d were taken", len(seen), n)
	}
	for _, times := range seen {
		if times != 1 {
			t.Errorf("one was taken %d times", times)
		}
	}
}
