package scale

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"
)

// A memory is what things take that are there, in bytes.
type memory struct {
	Durable float64 `json:"durable"` // on each node, of a durable consumer with three replicas
	Pending float64 `json:"pending"` // on each node, of a message that was delivered and not acked
	Disk    float64 `json:"disk"`    // on each node, of a message of the backlog in files
	Payload int     `json:"payload"` // of those messages
}

const (
	idleDurables    = 100
	pendingMessages = backlogSize
)

// memory measures on the backlog of one replicated stream.
func (l *lab) memory(ctx context.Context, quick bool) (m memory, err error) {
	durables, pending := idleDurables, pendingMessages
	if quick {
		durables, pending = 10, 1000
	}
	t := &trial{lab: l, cell: cell{Replicas: nodes, Streams: 1, Subjects: 1, FanOut: 1}}
	if err := l.clear(ctx); err != nil {
		return m, err
	}
	empty, err := l.disk()
	if err != nil {
		return m, err
	}
	if err := t.prepare(ctx); err != nil {
		return m, err
	}
	full, err := l.disk()
	if err != nil {
		return m, err
	}
	m.Payload = payloadSize
	m.Disk = float64(full-empty) / nodes / float64(t.backlogs)

	before, err := l.heap()
	if err != nil {
		return m, err
	}
	stream := streamName(0)
	var g errgroup.Group
	g.SetLimit(atOnce)
	for i := range durables {
		g.Go(func() error {
			cfg := jetstream.ConsumerConfig{Durable: idleName(i), AckPolicy: jetstream.AckExplicitPolicy, MaxAckPending: -1}
			return l.createConsumer(ctx, stream, cfg, anyNode)
		})
	}
	if err := g.Wait(); err != nil {
		return m, err
	}
	after, err := l.heap()
	if err != nil {
		return m, err
	}
	m.Durable = (after - before) / nodes / float64(durables)

	if before, err = l.settled(ctx, quick); err != nil {
		return m, err
	}
	if err := l.fetch(ctx, stream, pending); err != nil {
		return m, err
	}
	if after, err = l.settled(ctx, quick); err != nil {
		return m, err
	}
	m.Pending = (after - before) / nodes / float64(pending)
	return m, l.clear(ctx)
}

// fetch takes messages and leaves them unacked.
func (l *lab) fetch(ctx context.Context, stream string, count int) error {
	cons, err := l.js.Consumer(ctx, stream, idleName(0))
	if err != nil {
		return err
	}
	const most = 1000
	for got := 0; got < count; {
		batch, err := cons.Fetch(min(count-got, most))
		if err != nil {
			return err
		}
		n := got
		for range batch.Messages() {
			got++
		}
		if batch.Error() != nil || got == n {
			return fmt.Errorf("fetch after %d messages: %w", n, batch.Error())
		}
	}
	return nil
}

func idleName(i int) string { return "idle" + strconv.Itoa(i) }

// settled is the heap when the nodes have emptied their caches, which takes them ten
// seconds without work.
func (l *lab) settled(ctx context.Context, quick bool) (float64, error) {
	rest := 12 * time.Second
	if quick {
		rest = 0
	}
	select {
	case <-time.After(rest):
		return l.heap()
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}

// heap is what all nodes have in use.
func (l *lab) heap() (sum float64, err error) {
	stats, err := l.stats(true)
	for _, s := range stats {
		sum += float64(s.Heap)
	}
	return sum, err
}
