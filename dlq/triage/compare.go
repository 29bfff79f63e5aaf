package triage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

const (
	compared    = 100 // entries of a plan: each takes two round trips
	comparers   = 8   // at a time
	compareWait = 3 * time.Second
)

// A comparison looks at the messages that streams still have, for records that are not
// what they say. It cannot tell who has changed a record: redaction does so, too.
type comparison struct {
	d    *Desk
	stop context.CancelFunc

	mu      sync.Mutex
	streams map[string]jetstream.Stream // nil: there is none
	n       int                         // messages that were there to be compared
	differ  []string                    // IDs
	failed  error                       // why the others are not compared
}

// compare returns warnings of planned entries. all is how many are planned.
func (d *Desk) compare(ctx context.Context, entries []*dlq.Entry, all int) []string {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c := &comparison{d: d, stop: cancel, streams: make(map[string]jetstream.Stream)}
	queue := make(chan *dlq.Entry)
	var workers sync.WaitGroup
	for range min(comparers, len(entries)) {
		workers.Go(func() {
			for e := range queue {
				c.add(ctx, e)
			}
		})
	}
	for _, e := range entries {
		queue <- e
	}
	close(queue)
	workers.Wait()
	return c.warnings(len(entries), all)
}

func (c *comparison) warnings(looked, all int) []string {
	var found []string
	warn := func(format string, args ...any) { found = append(found, fmt.Sprintf(format, args...)) }
	of := "all"
	if looked < all {
		of = fmt.Sprintf("the newest %d", looked)
	}
	slices.Sort(c.differ)
	if n := len(c.differ); n > 0 {
		warn("%d of %d that were compared differ from the message that their stream still has, in subject, headers or payload, such as %s: "+
			"redaction does that, and so does who forges a record; %s were looked at", n, c.n, strings.Join(c.differ[:min(n, samples)], ", "), of)
	}
	if c.failed != nil {
		warn("the dead letters cannot be compared with the messages that their streams still have: %v", c.failed)
	}
	return found
}

// add compares one entry, unless there is nothing to compare it with.
func (c *comparison) add(ctx context.Context, e *dlq.Entry) {
	if ctx.Err() != nil || e.StreamSequence == 0 || nameProblem(e.Stream, "-") != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, compareWait)
	defer cancel()
	same, there, err := c.look(ctx, e)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err != nil && c.failed == nil:
		c.failed = err
		c.stop() // the others would take as long
	case err != nil:
	case there:
		c.n++
		if !same {
			c.differ = append(c.differ, e.ID)
		}
	}
}

// look compares the record of an entry, as it was captured, with its message. It is not
// there if it is gone, or if the stream was made again since: then it is another.
func (c *comparison) look(ctx context.Context, e *dlq.Entry) (same, there bool, err error) {
	s, err := c.stream(ctx, e.Stream)
	if s == nil || !s.CachedInfo().Created.Equal(e.StreamCreated) {
		return false, false, err
	}
	m, err := s.GetMsg(ctx, e.StreamSequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return false, false, nil
	}
	if err != nil {
		return false, false, fmt.Errorf("message of stream %q: %w", e.Stream, err)
	}
	stored, err := c.d.message(ctx, e.Sequence)
	if errors.Is(err, jetstream.ErrMsgNotFound) { // it was discarded meanwhile
		return false, false, nil
	}
	if err != nil {
		return false, false, err
	}
	r, _ := dlq.Decode(stored.header, stored.data)
	return r != nil && sameMessage(r, m), true, nil
}

func (c *comparison) stream(ctx context.Context, name string) (jetstream.Stream, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if s, ok := c.streams[name]; ok {
		return s, nil
	}
	s, err := c.d.js.Stream(ctx, name)
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, fmt.Errorf("look at stream %q: %w", name, err)
	}
	c.streams[name] = s
	return s, nil
}

// sameMessage compares what a record has kept of a message.
func sameMessage(r *dlq.Record, m *jetstream.RawStreamMsg) bool {
	switch {
	case r.Subject != "" && r.Subject != m.Subject:
		return false
	case r.Body == dlq.BodyOmitted, r.Body == dlq.BodyGone: // nor are the headers kept then
		return true
	case r.Body == dlq.BodyInline && !bytes.Equal(r.Data, m.Data), r.Body == dlq.BodyObject && r.BodySize != len(m.Data):
		return false
	case r.HeadersObject != "":
		return true
	}
	return maps.EqualFunc(ownHeaders(r.Header), ownHeaders(m.Header), slices.Equal)
}

// ownHeaders leaves out those that the server and traces add, which no replay sends.
func ownHeaders(h nats.Header) nats.Header {
	own := make(nats.Header, len(h))
	for k, vs := range h {
		if !hasPrefixFold(k, "Nats-") && !isTraceHeader(k) && len(vs) > 0 {
			own[k] = vs
		}
	}
	return own
}
