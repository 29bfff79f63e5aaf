package main

import (
	"context"
	"strings"
	"sync"
	"time"
)

// counters follow the journals.
type counters struct {
	tail tail

	mu      sync.Mutex
	n       map[string]int
	last    map[string]string // by kind of message: the process that has begun with one last
	tries   map[string]int    // by publisher: the next number
	changed chan struct{}
	failure error
}

func newCounters(dir string) *counters {
	return &counters{
		tail: tail{dir: dir, offset: make(map[string]int64)}, n: make(map[string]int), last: make(map[string]string),
		tries: make(map[string]int), changed: make(chan struct{}),
	}
}

// pump reads what is new until ctx ends.
func (c *counters) pump(ctx context.Context) {
	for ctx.Err() == nil {
		c.read()
		wait(ctx, 10*time.Millisecond)
	}
}

func (c *counters) read() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.tail.read(c.note); err != nil {
		c.failure = err
	}
	c.signal()
}

// signal is called with c.mu held.
func (c *counters) signal() {
	close(c.changed)
	c.changed = make(chan struct{})
}

func (c *counters) note(e *entry) {
	name, _, _ := strings.Cut(e.process, ".")
	switch e.What {
	case wroteStart:
		if strings.HasPrefix(name, consumerName) {
			c.n["started"]++
		}
	case wroteTry:
		c.tries[name] = max(c.tries[name], int(e.Seq)+1) //nolint:gosec // a number of ours
	case wroteAcked:
		c.n[countAcked]++
	case wroteFailed:
		c.n[countFailed]++
	case wroteBegin:
		c.n[countBegun]++
		c.n[countBegun+":"+e.Kind]++
		c.last[e.Kind] = name
		if e.Op != "" {
			c.n[countReplayed]++
		}
	}
}

func (c *counters) get(name string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.n[name]
}

func (c *counters) set(name string, n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.n[name] = n
	c.signal()
}

// next is the first number that a publisher has not tried.
func (c *counters) next(publisher string) int {
	c.read()
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tries[publisher]
}

func (c *counters) lastBegun(kind string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last[kind]
}

func (c *counters) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failure
}

// wait reports whether a counter has reached a number before the bound.
func (c *counters) wait(ctx context.Context, t trigger, bound time.Duration) bool {
	timer := time.NewTimer(bound)
	defer timer.Stop()
	for {
		c.mu.Lock()
		n, changed := c.n[t.Counter], c.changed
		c.mu.Unlock()
		if n >= t.N {
			return true
		}
		select {
		case <-changed:
		case <-timer.C:
			return false
		case <-ctx.Done():
			return false
		}
	}
}
