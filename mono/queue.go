package mono

import "sync"

// A msgQueue hands messages from the goroutine that they arrive on to the workers.
// It is a channel without a size, which an idle consumer would pay for, and gives a
// worker its whole batch at once. What is in it is bounded by what was asked for.
type msgQueue struct {
	mu    sync.Mutex
	ready sync.Cond // of mu: there is one more, or none will come
	ring  []*Msg    // its length is a power of two, or 0
	head  int       // of the first
	n     int
	ended bool
}

func (q *msgQueue) init() { q.ready.L = &q.mu }

func (q *msgQueue) push(m *Msg) {
	q.mu.Lock()
	if q.n == len(q.ring) {
		q.grow()
	}
	q.ring[(q.head+q.n)&(len(q.ring)-1)] = m
	q.n++
	q.mu.Unlock()
	q.ready.Signal()
}

func (q *msgQueue) grow() {
	const least = 8
	ring := make([]*Msg, max(least, 2*len(q.ring)))
	n := copy(ring, q.ring[q.head:])
	copy(ring[n:], q.ring[:q.head])
	q.ring, q.head = ring, 0
}

// take waits for a message, and appends to batch what is there, up to its capacity.
// It returns an empty batch when the queue has ended and is empty.
func (q *msgQueue) take(batch []*Msg) []*Msg {
	q.mu.Lock()
	defer q.mu.Unlock()
	for q.n == 0 && !q.ended {
		q.ready.Wait()
	}
	for q.n > 0 && len(batch) < cap(batch) {
		batch = append(batch, q.ring[q.head])
		q.ring[q.head] = nil
		q.head = (q.head + 1) & (len(q.ring) - 1)
		q.n--
	}
	return batch
}

// end says that no more will come. What is there can still be taken.
func (q *msgQueue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.ready.Broadcast()
}
