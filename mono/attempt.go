package mono

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/monotel/monotel/dlq"
)

// An attempt is a delivery that a handler has begun with. The server counts deliveries;
// those that were handed back before that, here or by another instance, are listed
// beside the dead letters, and are not counted.

// handedBackRefresh is how often the list is read at most.
const handedBackRefresh = time.Second

type handedBackState struct {
	mu   sync.Mutex
	all  map[dlq.Delivery]bool
	read time.Duration // when, as uptime; 0: it was not
}

// attemptOf returns which attempt a delivery is, counted from 1.
func (c *streamConsumer) attemptOf(m *Msg) uint64 {
	attempt := m.attempt()
	if attempt == 1 || c.rt.dead == nil {
		return attempt
	}
	b := &c.handedBack
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.all) == 0 {
		return attempt
	}
	const most = 1000 // deliveries to look for
	for n := m.attempt() - 1; n >= 1 && m.attempt()-n <= most; n-- {
		if b.all[dlq.Delivery{Sequence: m.sequence(), Number: n}] {
			attempt--
		}
	}
	return attempt
}

// readHandedBack reads what was handed back, unless that was done a moment ago.
func (c *streamConsumer) readHandedBack() {
	b := &c.handedBack
	now := uptime()
	b.mu.Lock()
	if b.read != 0 && now-b.read < handedBackRefresh {
		b.mu.Unlock()
		return
	}
	b.read = now
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), lookUpTimeout)
	defer cancel()
	all, err := c.rt.dead.store.HandedBack(ctx, c.info.Stream, *c.created.Load(), c.info.Durable)
	if err != nil {
		b.mu.Lock()
		b.read = uptime() + marksPause
		b.mu.Unlock()
		c.report(slog.LevelWarn, "deliveries that were handed back cannot be read; they count as attempts", nil, err)
		return
	}
	b.mu.Lock()
	b.all = all
	b.mu.Unlock()
}

// handBack gives messages back that no handler has begun with, at the end.
func (c *streamConsumer) handBack(left []*Msg) {
	if len(left) == 0 {
		return
	}
	if c.rt.dead != nil {
		c.listHandedBack(left)
	}
	for _, m := range left {
		_ = c.finish(m, settlement{kind: settleBack})
	}
}

// listHandedBack has the deliveries count as no attempts.
func (c *streamConsumer) listHandedBack(left []*Msg) {
	const limit = 2 * time.Second // Stop waits for it
	deliveries := make([]dlq.Delivery, 0, len(left))
	for _, m := range left {
		if !c.leaseEnded(m) {
			deliveries = append(deliveries, dlq.Delivery{Sequence: m.sequence(), Number: m.attempt()})
		}
	}
	if len(deliveries) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), limit)
	defer cancel()
	if err := c.rt.dead.store.AddHandedBack(ctx, c.info.Stream, *c.created.Load(), c.info.Durable, deliveries); err != nil {
		c.report(slog.LevelWarn, "deliveries that are handed back count as attempts", nil, err)
	}
}
