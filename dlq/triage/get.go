package triage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"github.com/monotel/monotel/dlq"
)

// subjectOf is the pattern of what is stored of a dead letter.
func (d *Desk) subjectOf(id string) string { return "monotel.dlq." + d.cfg.Stream + ".*.*." + id }

// Get returns a dead letter whole, with its payload as it was captured and its
// history. A beginning of an ID will do, if it is that of one dead letter only.
//
// It is a [NotFoundError] if there is none. What cannot be read of it is left zero
// and named in an error that comes with the entry.
func (d *Desk) Get(ctx context.Context, id string) (*dlq.Entry, error) {
	if !isID(id) {
		return nil, &NotFoundError{What: "dead letter", ID: id}
	}
	e, err := d.get(ctx, id)
	if !errors.Is(err, ErrNotFound) {
		return e, err
	}
	ids, listErr := d.ids(ctx)
	if listErr != nil {
		return nil, listErr
	}
	if found := matchesBeginning(ids, id); len(found) == 1 {
		return d.get(ctx, found[0])
	}
	return nil, &NotFoundError{What: "dead letter", ID: id, Near: near(ids, id)}
}

// isID reports whether s may be an ID or the beginning of one.
func isID(s string) bool {
	const longest = 64
	return s != "" && len(s) <= longest && strings.IndexFunc(s, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9')
	}) < 0
}

// get finds an entry by its ID.
func (d *Desk) get(ctx context.Context, id string) (*dlq.Entry, error) {
	s, err := d.stream(ctx)
	if err != nil {
		return nil, fmt.Errorf("look up dead letter %s: %w", id, err)
	}
	// Subjects are in a tree. To ask for a message by a pattern would have the
	// server look at one after the other.
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(d.subjectOf(id)))
	if err != nil {
		return nil, fmt.Errorf("look up dead letter %s: %w", id, err)
	}
	// A user that may publish dead letters of one consumer can use the ID of another's.
	var found *dlq.Entry
	err = &NotFoundError{What: "dead letter", ID: id}
	for _, subject := range slices.Sorted(maps.Keys(info.State.Subjects)) {
		e, readErr := d.getAt(ctx, subject)
		if e != nil && e.HasOwnID() && d.store.SubjectOf(e.Record) == subject {
			return e, readErr
		}
		if found == nil && !errors.Is(readErr, ErrNotFound) {
			found, err = e, readErr
		}
	}
	return found, err
}

// getAt reads what is on an entry's subject.
func (d *Desk) getAt(ctx context.Context, subject string) (*dlq.Entry, error) {
	id := (&message{subject: subject}).id()
	var e *dlq.Entry
	var errs []error
	var last uint64
	err := d.messagesOf(ctx, subject, func(m *message) {
		first := last == 0
		last = m.sequence
		if e != nil && e.State == dlq.StateDiscarded { // which is final
			e.Later = append(e.Later, m.sequence)
			return
		}
		trace := dlq.IsTrace(m.header)
		c, changeErr := dlq.DecodeChange(m.header, m.data)
		switch {
		case changeErr == nil:
			c.Sequence = m.sequence
			if trace {
				break
			}
			if e != nil {
				e.Apply(c)
				e.History = append(e.History, c)
			}
			return
		case e != nil:
			e.Later = append(e.Later, m.sequence)
			return
		}
		r, err := dlq.Decode(m.header, m.data)
		if r == nil {
			return
		}
		if trace && !first {
			d.unfinished(subject)
			errs = nil
		}
		if err = joined(err, d.placed(r, subject)); err != nil {
			errs = append(errs, err)
		}
		e = dlq.NewEntry(r, m.sequence, nil)
		if trace {
			e.Apply(c)
			e.History = append(e.History, c)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("read dead letter %s: %w", id, err)
	}
	if e == nil {
		return nil, &NotFoundError{What: "dead letter", ID: id}
	}
	e.Last = last // whatever it is: nobody must be able to keep an entry from being changed
	if err := d.store.Fetch(ctx, e.Record); err != nil {
		errs = append(errs, err)
	}
	return e, errors.Join(errs...)
}

// messagesOf calls f for the messages of a subject of the dead-letter stream, oldest
// first.
func (d *Desk) messagesOf(ctx context.Context, subject string, f func(*message)) error {
	return d.messagesIn(ctx, d.cfg.Stream, subject, f)
}

// messagesIn calls f for the messages that a stream has of a subject, oldest first. A
// few megabytes of them are read at a time.
func (d *Desk) messagesIn(ctx context.Context, stream, subject string, f func(*message)) error {
	const batch = 100
	silent := 0
	for from, left := uint64(1), uint64(1); left > 0; {
		n, err := d.someOf(ctx, stream, subject, from, batch, time.Duration(silent+1)*fetchWait, func(m *message, behind uint64) {
			from, left = m.sequence+1, behind
			f(m)
		})
		if errors.Is(err, jetstreamext.ErrNoMessages) {
			return nil
		}
		if err != nil {
			return err
		}
		if n > 0 {
			silent = 0
			continue
		}
		silent++
		if silent == scanTries {
			return errStalled
		}
	}
	return nil
}

// someOf calls f for the next messages of a subject and how many are behind it, as
// far as they come in time. It returns how many have come.
func (d *Desk) someOf(
	ctx context.Context, stream, subject string, from uint64, batch int, wait time.Duration, f func(m *message, behind uint64),
) (n int, err error) {
	within, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	all, err := jetstreamext.GetBatch(within, d.js, stream, batch,
		jetstreamext.GetBatchSeq(from), jetstreamext.GetBatchSubject(subject), jetstreamext.GetBatchMaxBytes(aimedBytes))
	if err != nil {
		return 0, err
	}
	for m, err := range all {
		if err != nil {
			return n, err
		}
		behind, err := strconv.ParseUint(m.Header.Get("Nats-Num-Pending"), 10, 64)
		if err != nil {
			return n, fmt.Errorf("answer to a batched get: %w", err)
		}
		n++
		f(&message{subject: m.Subject, header: m.Header, data: m.Data, sequence: m.Sequence, stored: m.Time}, behind)
	}
	if ctx.Err() != nil {
		return n, context.Cause(ctx)
	}
	return n, nil
}

// ids lists the IDs of all dead letters.
func (d *Desk) ids(ctx context.Context) ([]string, error) {
	s, err := d.js.Stream(ctx, d.cfg.Stream)
	if err != nil {
		return nil, fmt.Errorf("list dead letters of stream %q: %w", d.cfg.Stream, err)
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(">"))
	if err != nil {
		return nil, fmt.Errorf("list dead letters of stream %q: %w", d.cfg.Stream, err)
	}
	ids := make([]string, 0, len(info.State.Subjects))
	for subject := range info.State.Subjects {
		ids = append(ids, subject[strings.LastIndexByte(subject, '.')+1:])
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// near returns the few IDs that look most like one that there is not.
func near(ids []string, id string) []string {
	const most, farthest = 5, 3
	type candidate struct {
		id       string
		distance int
	}
	var found []candidate
	for _, other := range ids {
		n := distance(id, other[:min(len(other), len(id))], farthest)
		if n <= farthest && n < len(id) {
			found = append(found, candidate{other, n})
		}
	}
	slices.SortFunc(found, func(a, b candidate) int {
		return cmp.Or(cmp.Compare(a.distance, b.distance), cmp.Compare(a.id, b.id))
	})
	found = found[:min(len(found), most)]
	names := make([]string, 0, len(found))
	for _, c := range found {
		names = append(names, c.id)
	}
	return names
}

// distance is how many letters of a and b differ, counted up to one more than
// most. A letter left out or doubled moves the others, so it is looked at from
// both ends.
func distance(a, b string, most int) int {
	head := 0
	for head < len(a) && head < len(b) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	return min(max(len(a), len(b))-head-tail, most+1)
}

// Current is the message as a replay would send it: the original, or what the
// latest edit has made of it, whole. It is a copy.
func (d *Desk) Current(ctx context.Context, e *dlq.Entry) (*dlq.Record, error) {
	r := *e.Record
	if e.Revision == 0 {
		err := d.store.Fetch(ctx, &r)
		return &r, err
	}
	m, err := d.message(ctx, e.RevisionSequence)
	if err != nil {
		return &r, fmt.Errorf("read edit %d of dead letter %s: %w", e.Revision, e.ID, err)
	}
	c, err := dlq.DecodeChange(m.header, m.data)
	if err != nil || c.Edit == nil {
		return &r, fmt.Errorf("read edit %d of dead letter %s: message %d of stream %q is none", e.Revision, e.ID, m.sequence, d.cfg.Stream)
	}
	err = d.store.Fetch(ctx, c.Edit)
	r.Data, r.Header, r.Body, r.BodyObject, r.BodySize = c.Edit.Data, c.Edit.Header, c.Edit.Body, c.Edit.BodyObject, c.Edit.BodySize
	r.HeadersObject = c.Edit.HeadersObject
	return &r, err
}

// message reads one message of the dead-letter stream.
func (d *Desk) message(ctx context.Context, sequence uint64) (*message, error) {
	s, err := d.stream(ctx)
	if err != nil {
		return nil, err
	}
	m, err := s.GetMsg(ctx, sequence)
	if err != nil {
		return nil, err
	}
	return &message{subject: m.Subject, header: m.Header, data: m.Data, sequence: m.Sequence, stored: m.Time}, nil
}

// stream is the handle of the dead-letter stream, asked for once.
func (d *Desk) stream(ctx context.Context) (jetstream.Stream, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.handle != nil {
		return d.handle, nil
	}
	s, err := d.js.Stream(ctx, d.cfg.Stream)
	if err == nil {
		d.handle = s
	}
	return s, err
}

// follow reads the dead-letter stream from a sequence on, headers only, and goes
// on when the connection was lost.
func (d *Desk) follow(ctx context.Context, from uint64) iter.Seq2[*message, error] {
	return func(yield func(*message, error) bool) {
		cons, err := d.js.OrderedConsumer(ctx, d.cfg.Stream, jetstream.OrderedConsumerConfig{
			DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from, HeadersOnly: true,
		})
		if err != nil {
			yield(nil, fmt.Errorf("follow stream %q: %w", d.cfg.Stream, err))
			return
		}
		all, err := cons.Messages()
		if err != nil {
			yield(nil, fmt.Errorf("follow stream %q: %w", d.cfg.Stream, err))
			return
		}
		stop := context.AfterFunc(ctx, all.Stop)
		defer func() {
			stop()
			all.Stop()
		}()
		for {
			m, err := all.Next()
			if ctx.Err() != nil {
				yield(nil, context.Cause(ctx))
				return
			}
			if err == nil {
				var meta *jetstream.MsgMetadata
				if meta, err = m.Metadata(); err == nil {
					if !yield(&message{m.Subject(), m.Headers(), m.Data(), meta.Sequence.Stream, meta.Timestamp}, nil) {
						return
					}
					continue
				}
			}
			if errors.Is(err, jetstream.ErrNoHeartbeat) {
				continue
			}
			yield(nil, fmt.Errorf("follow stream %q: %w", d.cfg.Stream, err))
			return
		}
	}
}

func joined(a, b error) error {
	if a == nil {
		return b
	}
	return errors.Join(a, b)
}

func isNotARecord(err error) bool { return errors.Is(err, dlq.ErrNotARecord) }
