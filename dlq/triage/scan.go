package triage

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

const (
	// chunk is how many messages are read at a time. It bounds the memory that a
	// scan takes: a few megabytes for what is read, and as much for what is read
	// ahead.
	chunk = 2048

	// aheads is how many chunks are read at a time, so that the server need not
	// wait for us between two of them.
	aheads = 2

	scanTries  = 5
	fetchWait  = 3 * time.Second
	rangeWait  = 5 * fetchWait
	sizeHeader = "Nats-Msg-Size" // what the server says instead of a body
)

// A message is one of the dead-letter stream.
type message struct {
	subject  string
	header   nats.Header
	data     []byte
	sequence uint64
	stored   time.Time
}

func (m *message) id() string { return m.subject[strings.LastIndexByte(m.subject, '.')+1:] }

// record decodes the message, which may have come without its body.
func (m *message) record(headersOnly bool) (*dlq.Record, error) {
	r, err := dlq.Decode(m.header, m.data)
	if r != nil && headersOnly && r.Body == dlq.BodyInline {
		r.Data = nil
		if size := m.header.Get(sizeHeader); size != "" {
			_, _ = fmt.Sscanf(size, "%d", &r.BodySize)
		}
	}
	return r, err
}

// chunksBackwards reads the messages of a range of sequences, the newest chunk
// first; within a chunk the oldest message comes first. The next chunks are read
// while one is worked on. What comes with an error is the end.
func (d *Desk) chunksBackwards(ctx context.Context, first, last uint64, headersOnly bool) iter.Seq2[[]message, error] {
	return func(yield func([]message, error) bool) {
		type read struct {
			messages []message
			err      error
		}
		ctx, cancel := context.WithCancel(ctx)
		var readers sync.WaitGroup
		defer readers.Wait()
		defer cancel()
		queue := make(chan chan read, aheads-1) // with one that waits for its place
		readers.Go(func() {
			defer close(queue)
			for hi := last; hi >= first && hi > 0; {
				lo := first
				if hi-first >= chunk {
					lo = hi - chunk + 1
				}
				done, to := make(chan read, 1), hi
				select {
				case queue <- done:
				case <-ctx.Done():
					return
				}
				readers.Go(func() {
					var r read
					r.messages, r.err = d.readRange(ctx, lo, to, headersOnly)
					done <- r
				})
				hi = lo - 1
			}
		})
		for done := range queue {
			r := <-done
			if !yield(r.messages, r.err) || r.err != nil {
				return
			}
		}
		if ctx.Err() != nil {
			yield(nil, context.Cause(ctx))
		}
	}
}

// readRange reads the messages from one sequence to another. It tries again when
// the connection is lost half-way.
func (d *Desk) readRange(ctx context.Context, lo, hi uint64, headersOnly bool) ([]message, error) {
	for try := 1; ; try++ {
		messages, err := d.tryRange(ctx, lo, hi, headersOnly)
		if err == nil || ctx.Err() != nil || try == scanTries || errors.Is(err, jetstream.ErrStreamNotFound) {
			if err != nil {
				err = fmt.Errorf("read dead-letter stream %q: %w", d.cfg.Stream, err)
			}
			return messages, err
		}
		if err := pause(ctx, time.Duration(try)*time.Second/4); err != nil {
			return nil, err
		}
	}
}

func (d *Desk) tryRange(ctx context.Context, lo, hi uint64, headersOnly bool) ([]message, error) {
	// A request whose server has ended gets no answer, however long ctx may be.
	ctx, cancel := context.WithTimeout(ctx, rangeWait)
	defer cancel()
	create, cancelCreate := context.WithTimeout(ctx, fetchWait)
	defer cancelCreate()
	cons, err := d.js.CreateConsumer(create, d.cfg.Stream, jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: lo,
		HeadersOnly: headersOnly, MemoryStorage: true, Replicas: 1, InactiveThreshold: rangeWait,
	})
	if err != nil {
		return nil, err
	}
	defer func() {
		// Nobody waits for it. If it is lost the server deletes it by itself.
		_ = d.nc.Publish(jetstream.DefaultAPIPrefix+"CONSUMER.DELETE."+d.cfg.Stream+"."+cons.CachedInfo().Name, nil)
	}()
	left, received := cons.CachedInfo().NumPending, uint64(0)
	messages := make([]message, 0, min(left, hi-lo+1))
	for left > 0 {
		most := int(min(left, hi-lo+1-uint64(len(messages)))) //nolint:gosec // at most a chunk
		batch, err := cons.Fetch(most, jetstream.FetchMaxWait(fetchWait))
		if err != nil {
			return nil, err
		}
		got := 0
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err != nil {
				return nil, err
			}
			got++
			if meta.Sequence.Consumer != received+1 {
				return nil, errGap
			}
			received++
			if meta.Sequence.Stream > hi {
				return messages, nil
			}
			messages = append(messages, message{m.Subject(), m.Headers(), m.Data(), meta.Sequence.Stream, meta.Timestamp})
			left = meta.NumPending
		}
		if err := batch.Error(); err != nil {
			return nil, err
		}
		if got == 0 { // what was pending is gone, or the consumer, or the connection
			info, err := cons.Info(ctx)
			if err != nil {
				return nil, err
			}
			if info.Delivered.Consumer != received {
				return nil, errGap
			}
			left = info.NumPending
		}
		if uint64(len(messages)) >= hi-lo+1 {
			return messages, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
	return messages, nil
}

// Nothing is acknowledged, so what was on its way when a connection broke does not
// come again.
var errGap = errors.New("messages were lost with a connection")

// pause waits, or returns why ctx has ended.
func pause(ctx context.Context, how time.Duration) error {
	timer := time.NewTimer(how)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A later is what a scan that goes backwards has seen of an entry whose record is
// still to come.
type later struct {
	state                       dlq.State
	last                        uint64
	changed                     int64 // nanoseconds since 1970, 0: it is not known
	actor, operation            string
	replays, failures, revision int32
	revisionSequence            uint64
	failure                     *dlq.Record
}

// laters keeps what was seen of entries. Its memory follows the entries that were
// changed, and of those the ones whose record is still to come.
type laters struct {
	entries map[string]*later
	names   map[string]string // few, so each is kept once
}

func newLaters() *laters {
	return &laters{entries: make(map[string]*later), names: make(map[string]string)}
}

func (l *laters) name(s string) string {
	if known, ok := l.names[s]; ok {
		return known
	}
	const most = 10_000
	if len(l.names) < most {
		s = strings.Clone(s)
		l.names[s] = s
	}
	return s
}

// add takes a change that is older than all that were added of its entry.
func (l *laters) add(m *message) {
	c, err := dlq.DecodeChange(m.header, m.data)
	if err != nil {
		return
	}
	id := m.id()
	e := l.entries[id]
	if e == nil {
		e = &later{state: dlq.State(l.name(string(c.To()))), last: m.sequence, actor: l.name(c.Actor)}
		if !c.Time.IsZero() {
			e.changed = c.Time.UnixNano()
		}
		l.entries[strings.Clone(id)] = e
	}
	if e.operation == "" {
		e.operation = l.name(c.Operation)
	}
	switch c.Kind { //nolint:exhaustive // the others leave no more than their state
	case dlq.ChangeReplaying:
		e.replays++
	case dlq.ChangeFailedAgain:
		e.failures++
		if e.failure == nil {
			e.failure = c.Failure
		}
	case dlq.ChangeEdited:
		if e.revision == 0 {
			e.revision, e.revisionSequence = int32(c.Revision), m.sequence //nolint:gosec // edits are few
		}
	}
}

// state is that of an entry whose record has come.
func (l *laters) state(id string) dlq.State {
	if e := l.entries[id]; e != nil && e.state != "" {
		return e.state
	}
	return dlq.StateOpen
}

// take completes an entry and forgets what was kept for it.
func (l *laters) take(e *dlq.Entry, id string) {
	k := l.entries[id]
	if k == nil {
		return
	}
	delete(l.entries, id)
	e.State, e.Last, e.Actor, e.Operation = k.state, k.last, k.actor, k.operation
	if k.changed != 0 {
		e.Changed = time.Unix(0, k.changed).UTC()
	}
	e.Replays, e.Failures, e.Revision, e.RevisionSequence = int(k.replays), int(k.failures), int(k.revision), k.revisionSequence
	if k.failure != nil {
		e.Failure = k.failure
	}
}
