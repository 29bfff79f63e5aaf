package main

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// A handling is one call of a handler for one message.
type handling struct {
	entry // of its begin

	handed   time.Time // when the first message of its batch began
	end      time.Time // when it decided; zero: it did not
	outcome  string    // "": the process ended before
	acked    time.Time // when Ack had returned
	returned string    // the outcome of its batch
	style    style
}

// success reports whether the handler has done the work, and no other message of its
// batch has made that undone by contract.
func (h *handling) success() bool {
	return h.outcome == outcomeOK && (h.style == acks || h.returned == "" || h.returned == outcomeOK)
}

// handedOver is when the handler got the batch.
func (h *handling) handedOver() time.Time {
	if h.handed.IsZero() {
		return h.at()
	}
	return h.handed
}

// counted reports whether it is the number of attempts that decides.
func (h *handling) counted() bool {
	return h.outcome == outcomeError || h.outcome == outcomePanic || h.outcome == outcomeNak
}

// gaveUp reports whether the message is to be dead-lettered.
func (h *handling) gaveUp() bool {
	switch h.outcome {
	case outcomePermanent, outcomeTerm:
		return true
	case outcomeError, outcomePanic, outcomeNak:
		return h.Attempt >= uint64(h.Max) //nolint:gosec // 5 or 20
	}
	return false
}

func (h *handling) String() string {
	s := fmt.Sprintf("%s attempt %d by %s, batch %d", h.at().Format(clock), h.Attempt, h.process, h.Batch)
	if h.outcome == "" {
		s += ": no outcome"
	} else {
		s += fmt.Sprintf(": %s at %s", h.outcome, h.end.Format(clock))
	}
	if !h.acked.IsZero() {
		s += ", acked"
	}
	if h.returned != "" && h.returned != h.outcome {
		s += ", its batch: " + h.returned
	}
	if h.Op != "" {
		s += fmt.Sprintf(", replay %d of %s by %s", h.Replay, h.Of, h.Op)
	}
	return s
}

const clock = "15:04:05.000"

// A place is a message as a consumer sees it.
type place struct {
	durable string
	seq     uint64
	id      string // of the payload: a server that loses its last writes gives a sequence twice
}

// A deadLetter is a record with its history.
type deadLetter struct {
	*dlq.Record
	id      string // of the payload
	at      time.Time
	changes []change
}

type change struct {
	*dlq.Change
	at time.Time
}

// A ledger is all that was written down.
type ledger struct {
	r         *round
	consumers map[string]consumer
	acked     map[string]uint64 // by payload: the sequence of its acknowledgement
	tried     map[string]time.Time
	handlings map[place][]*handling
	payloads  map[string]map[string][]uint64 // by durable and payload: sequences, replays left out
	records   map[place][]*deadLetter
	byID      map[string]*deadLetter
	draft     bool // it is read before the end, and counts nothing
}

func (l *ledger) count(what string, n int) {
	if !l.draft {
		l.r.result.count(what, n)
	}
}

func (r *round) readLedger(ctx context.Context, draft bool) (*ledger, error) {
	l := &ledger{
		r: r, draft: draft, consumers: make(map[string]consumer),
		acked: make(map[string]uint64), tried: make(map[string]time.Time), handlings: make(map[place][]*handling),
		payloads: make(map[string]map[string][]uint64), records: make(map[place][]*deadLetter), byID: make(map[string]*deadLetter),
	}
	for _, c := range r.schedule.consumers() {
		l.consumers[c.durable] = c
		l.payloads[c.durable] = make(map[string][]uint64)
	}
	if err := l.readJournals(); err != nil {
		return nil, err
	}
	err := l.readDeadLetters(ctx)
	return l, err
}

func (r *round) reconcile(ctx context.Context) error {
	l, err := r.readLedger(ctx, false)
	if err != nil {
		return err
	}
	l.checkPublishes()
	for _, at := range l.places() {
		l.checkHandlings(at, l.handlings[at])
	}
	for _, at := range slices.SortedFunc(maps.Keys(l.records), comparePlaces) {
		l.checkRecords(at, l.records[at])
	}
	return l.checkStreams(ctx)
}

func comparePlaces(a, b place) int {
	if c := strings.Compare(a.durable, b.durable); c != 0 {
		return c
	}
	return cmp.Or(cmp.Compare(a.seq, b.seq), strings.Compare(a.id, b.id))
}

func (l *ledger) places() []place { return slices.SortedFunc(maps.Keys(l.handlings), comparePlaces) }

func (l *ledger) readJournals() error {
	type key struct {
		process, durable string
		batch            int64
		seq              uint64
	}
	open := make(map[key]*handling)
	batches := make(map[key][]*handling)
	t := tail{dir: l.r.path("journal"), offset: make(map[string]int64)}
	return t.read(func(e *entry) {
		k := key{e.process, e.Durable, e.Batch, e.Seq}
		whole := k
		whole.seq = 0
		switch e.What {
		case wroteAcked:
			l.acked[e.ID] = e.Seq
			l.count("acked", 1)
		case wroteTry:
			if _, ok := l.tried[e.ID]; !ok {
				l.tried[e.ID] = e.at()
			}
		case wroteAbandon:
			l.count("abandoned", 1)
		case wroteLag:
			l.r.note(l.draft, disturbance{wroteLag, e.process, e.at().Add(-time.Duration(e.For)), e.at()})
		case wroteBegin:
			h := &handling{entry: *e, style: l.consumers[e.Durable].style}
			open[k] = h
			h.handed = e.at()
			if first := batches[whole]; len(first) > 0 {
				h.handed = first[0].handed
			}
			batches[whole] = append(batches[whole], h)
			at := place{e.Durable, e.Seq, e.ID}
			if len(l.handlings[at]) == 0 && e.Op == "" {
				l.payloads[e.Durable][e.ID] = append(l.payloads[e.Durable][e.ID], e.Seq)
			}
			l.handlings[at] = append(l.handlings[at], h)
			l.count("begun", 1)
		case wroteOutcome:
			open[k].outcome, open[k].end = e.Outcome, e.at()
			if e.Outcome == outcomeExit {
				l.r.note(l.draft, disturbance{endExit, e.process, e.at(), e.at()})
			}
			if e.Outcome == outcomePanic {
				l.count("panics", 1)
			}
		case wroteAck:
			open[k].acked = e.at()
		case wroteReturn:
			for _, h := range batches[whole] {
				h.returned = e.Outcome
			}
		}
	})
}

// readDeadLetters reads the whole stream in order.
func (l *ledger) readDeadLetters(ctx context.Context) error {
	return l.readStream(ctx, deadLetters, func(m jetstream.Msg, meta *jetstream.MsgMetadata) error {
		if dlq.IsChange(m.Headers()) {
			c, err := dlq.DecodeChange(m.Headers(), m.Data())
			if err != nil {
				return err
			}
			if d := l.byID[m.Headers().Get(dlq.HeaderID)]; d != nil {
				d.changes = append(d.changes, change{c, meta.Timestamp})
			}
			return nil
		}
		rec, err := dlq.Decode(m.Headers(), m.Data())
		if err != nil {
			return err
		}
		d := &deadLetter{Record: rec, at: meta.Timestamp, id: payloadID(rec.Data)}
		if rec.Body != dlq.BodyInline {
			d.id = l.idOf(rec)
		}
		at := place{rec.Consumer, rec.StreamSequence, d.id}
		l.records[at] = append(l.records[at], d)
		l.byID[rec.ID] = d
		l.count("records", 1)
		return nil
	})
}

// idOf finds the payload of a record that has none.
func (l *ledger) idOf(rec *dlq.Record) string {
	for at := range l.handlings {
		if at.durable == rec.Consumer && at.seq == rec.StreamSequence {
			return at.id
		}
	}
	return ""
}

func payloadID(data []byte) string {
	var p struct {
		ID string `json:"id"`
	}
	if json.Unmarshal(data, &p) != nil {
		return string(data)
	}
	return p.ID
}

func (l *ledger) readStream(ctx context.Context, name string, f func(jetstream.Msg, *jetstream.MsgMetadata) error) error {
	var stream jetstream.Stream
	err := until(ctx, time.Minute, func(ctx context.Context) (err error) {
		stream, err = l.r.servers.js.Stream(ctx, name)
		return err
	})
	if err != nil {
		return err
	}
	left := stream.CachedInfo().State.Msgs
	if left == 0 {
		return nil
	}
	c, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{})
	if err != nil {
		return err
	}
	it, err := c.Messages()
	if err != nil {
		return err
	}
	defer it.Stop()
	for ; left > 0; left-- {
		m, err := it.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := m.Metadata()
		if err != nil {
			return err
		}
		if err := f(m, meta); err != nil {
			return fmt.Errorf("message %d of %s: %w", meta.Sequence.Stream, name, err)
		}
		if meta.NumPending == 0 {
			break
		}
	}
	return nil
}
