package dlq

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// ErrEntryChanged reports an entry that somebody has changed since it was read.
var ErrEntryChanged = errors.New("the dead letter was changed meanwhile")

// ErrStreamFull reports a dead-letter stream that takes no more.
var ErrStreamFull = errors.New("the dead-letter stream is full")

// Codes of the server for a stream that is at a limit.
const (
	codeStreamStoreFailed = 10077 // maximum bytes or messages exceeded, with discard new
	codeResourcesExceeded = 10023
)

// IsFull reports whether the server refused a message because a limit of the
// stream or the account is reached.
func IsFull(err error) bool {
	api, ok := errors.AsType[*jetstream.APIError](err)
	return ok && slices.Contains([]jetstream.ErrorCode{codeStreamStoreFailed, codeResourcesExceeded, codeNoRoom}, api.ErrorCode)
}

// SubjectOf is where an entry is stored.
func (s *Store) SubjectOf(r *Record) string { return s.Subject(r.Stream, r.Consumer, r.ID) }

// Change stores a change of an entry and applies it to e. It is stored only if
// nobody else has changed the entry since e was read: else that is an
// [ErrEntryChanged]. [ErrStreamFull] is another. c.From and c.Time are filled in. more are further
// headers.
//
// To discard is to replace all that is stored on the entry's subject by a trace
// of it. What was put elsewhere is deleted afterwards.
func (s *Store) Change(ctx context.Context, e *Entry, c Change, more nats.Header) error {
	c.From = e.State
	if c.Time.IsZero() {
		c.Time = time.Now()
	}
	msg := &nats.Msg{Subject: s.SubjectOf(e.Record), Header: c.header(e.ID)}
	if c.Edit != nil {
		msg.Data = c.Edit.Data
	}
	if c.Kind == ChangeDiscarded {
		maps.Copy(msg.Header, tombstone(e.Record).header())
		msg.Header.Set(jetstream.MsgRollup, jetstream.MsgRollupSubject)
	}
	maps.Copy(msg.Header, more)
	if !fits(msg, s.limit()) && len(c.Diff) > 0 {
		msg.Header.Del(HeaderChangeDiff)
	}
	ack, err := s.publishChange(ctx, msg, e.Last)
	if IsFull(err) && c.Kind == ChangeDiscarded {
		ack, err = s.discardFromFull(ctx, msg, e)
	}
	if err != nil {
		return fmt.Errorf("dead letter %s: %s: %w", e.ID, c.Kind, err)
	}
	c.Sequence = ack.Sequence
	e.Apply(&c)
	if c.Kind == ChangeDiscarded {
		s.deleteObjects(ctx, e)
	}
	return nil
}

func (s *Store) publishChange(ctx context.Context, msg *nats.Msg, last uint64) (*jetstream.PubAck, error) {
	ack, err := s.js.PublishMsg(ctx, msg, jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(s.cfg.StreamName()),
		jetstream.WithExpectLastSequencePerSubject(last))
	api, ok := errors.AsType[*jetstream.APIError](err)
	switch {
	case ok && api.ErrorCode == codeWrongLastSequence:
		return nil, ErrEntryChanged
	case IsFull(err):
		return nil, fmt.Errorf("%w: %w", ErrStreamFull, err)
	}
	return ack, err
}

// discardFromFull makes the room that the trace needs by deleting the record
// first: the server refuses the trace before it removes what that replaces.
// Nobody can change the entry in between, as the stream takes nothing.
func (s *Store) discardFromFull(ctx context.Context, msg *nats.Msg, e *Entry) (*jetstream.PubAck, error) {
	if err := s.deleteMsg(ctx, s.cfg.StreamName(), e.Sequence); err != nil {
		return nil, err
	}
	last := e.Last
	if last == e.Sequence {
		last = 0
	}
	return s.publishChange(ctx, msg, last)
}

// tombstone is what stays of a discarded record: what it takes to know it again.
func tombstone(r *Record) *Record {
	t := &Record{
		ID: r.ID, Reason: r.Reason, Event: r.Event, Stream: r.Stream, StreamCreated: r.StreamCreated, StreamSequence: r.StreamSequence,
		Consumer: r.Consumer, Deliveries: r.Deliveries, Stored: r.Stored, Failed: r.Failed, App: r.App, Module: r.Module,
		Body: BodyOmitted, BodySize: r.BodySize,
	}
	return t
}

// deleteObjects removes the bodies and headers of an entry that are too large for
// its messages. What it cannot remove costs room, and nothing else.
func (s *Store) deleteObjects(ctx context.Context, e *Entry) {
	if e.BodyObject == "" && e.HeadersObject == "" && e.Revision == 0 {
		return
	}
	bucket, err := s.largeBucket(ctx, false)
	if err != nil {
		return
	}
	names := []string{e.ID, e.ID + ".headers"} // and not what the record says, which may be another's
	if e.Revision > 0 {
		all, _ := bucket.List(ctx) // or none is left
		for _, o := range all {
			if strings.HasPrefix(o.Name, e.ID+".r") {
				names = append(names, o.Name)
			}
		}
	}
	for _, name := range names {
		_ = bucket.Delete(ctx, name)
	}
}

// PutRevision puts the payload of an edit into the object store if it is too
// large for a message.
func (s *Store) PutRevision(ctx context.Context, id string, c *Change) error {
	msg := &nats.Msg{Header: c.header(id), Data: c.Edit.Data}
	delete(msg.Header, HeaderChangeDiff) // it is left out if need be
	if fits(msg, s.limit()) {
		return nil
	}
	bucket, err := s.largeBucket(ctx, true)
	if err != nil {
		return fmt.Errorf("dead letter %s: %w", id, err)
	}
	// Of two who edit at the same time one is refused: theirs must not replace the
	// other's.
	name := fmt.Sprintf("%s.r%d.%s", id, c.Revision, rand.Text())
	if _, err := bucket.PutBytes(ctx, name, c.Edit.Data); err != nil {
		s.setBucket(nil)
		return fmt.Errorf("dead letter %s: put %d bytes into object store %q: %w", id, len(c.Edit.Data), s.cfg.bucketName(), err)
	}
	c.Edit.Body, c.Edit.BodyObject, c.Edit.BodySize, c.Edit.Data = BodyObject, name, len(c.Edit.Data), nil
	return nil
}

// Object reads what a record or a change has in the object store.
func (s *Store) Object(ctx context.Context, name string) ([]byte, error) {
	bucket, err := s.largeBucket(ctx, false)
	if err != nil {
		return nil, err
	}
	data, err := bucket.GetBytes(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("object %q: %w", name, err)
	}
	return data, nil
}

// PutObjects stores objects by their names, unless they are there.
func (s *Store) PutObjects(ctx context.Context, objects map[string][]byte) error {
	for name, data := range objects {
		bucket, err := s.largeBucket(ctx, true)
		if err != nil {
			return err
		}
		if _, err := bucket.GetInfo(ctx, name); err == nil {
			continue
		}
		if _, err := bucket.PutBytes(ctx, name, data); err != nil {
			s.setBucket(nil)
			return fmt.Errorf("put %d bytes into object store %q: %w", len(data), s.cfg.bucketName(), err)
		}
	}
	return nil
}
