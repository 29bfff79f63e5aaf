package mono

import "sync"

// A msgQueue hands messages from the goroutine that they arrive on to the workers.
// It is a channel without a size, which an idle consumer would pay for, and gives a
// worker its whole batch at once. What is in it is bounded by what was asked for.
type msgQueue struct {
	mu      sync.Mutex
	ready   sync.Cond // of mu: there is one more, or none will come
	ring    []*Msg    // its length is a power of two, or 0
	head    int       // of the first
	n       int
	waiting int // workers in take
	ended   bool
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

// take waits for a message, and appends to batch what is there: up to its capacity, and
// no more than a fair share if other workers wait, too. limit bounds the batch further
// for messages that were delivered before. It returns an empty batch when the queue has
// ended.
func (q *msgQueue) take(batch []*Msg, limit func(attempt uint64) int) []*Msg {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.waiting++
	for q.n == 0 && !q.ended {
		q.ready.Wait()
	}
	most := min(cap(batch), (q.n+q.waiting-1)/q.waiting)
	q.waiting--
	for q.n > 0 && !q.ended && len(batch) < most {
		m := q.ring[q.head]
		if m.attempt() > 1 {
			if most = min(most, limit(m.attempt())); len(batch) >= most {
				break // it begins the next batch
			}
		}
		batch = append(batch, m)
		q.drop()
	}
	if q.n > 0 && q.waiting > 0 {
		q.ready.Signal() // what is left, another may begin with
	}
	return batch
}

// drop removes the first message. q.mu is held.
func (q *msgQueue) drop() {
	q.ring[q.head] = nil
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.n--
}

func (q *msgQueue) len() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.n
}

// end says that nothing more is to be taken.
func (q *msgQueue) end() {
	q.mu.Lock()
	q.ended = true
	q.mu.Unlock()
	q.ready.Broadcast()
}

// rest removes and returns what was not taken.
func (q *msgQueue) rest() []*Msg {
	q.mu.Lock()
	defer q.mu.Unlock()
	left := make([]*Msg, 0, q.n)
	for q.n > 0 {
		left = append(left, q.ring[q.head])
		q.drop()
	}
	return left
}
