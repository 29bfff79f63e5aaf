package dlq

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// ErrEntryChanged reports an entry that somebody has changed since it was read.
var ErrEntryChanged = errors.New("the dead letter was changed meanwhile")

// ErrStreamFull reports a dead-letter stream that takes no more.
var ErrStreamFull = errors.New("the dead-letter stream is full")

// IsFull reports whether the server refused a message because a limit of the
// stream or the account is reached.
func IsFull(err error) bool { return jsapi.IsFull(err) }

// SubjectOf is where an entry is stored.
func (s *Store) SubjectOf(r *Record) string { return s.Subject(r.Stream, r.Consumer, r.ID) }

// Change stores a change of an entry and applies it to e. It is stored only if
// nobody else has changed the entry since e was read: else that is an
// [ErrEntryChanged]. [ErrStreamFull] is another. c.From and c.Time are filled in.
// more are further headers.
//
// To discard stores a trace of the entry, and then deletes what is on the entry's
// subject before the trace, and what was put elsewhere. The entry is discarded as
// soon as the trace is stored. What cannot be deleted then, such as for lack of the
// permission, stays without an error, see [Store.FinishDiscard]. If the stream is
// full, its limit is raised until the trace is stored, for which the user must be
// allowed to update the stream; if that cannot be done, nothing is discarded, and
// the [ErrStreamFull] says what to do.
func (s *Store) Change(ctx context.Context, e *Entry, c Change, more nats.Header) error {
	msg := s.changeMessage(e, &c)
	if c.Edit != nil {
		msg.Data = c.Edit.Data
	}
	if c.Kind == ChangeDiscarded {
		maps.Copy(msg.Header, tombstone(e.Record).header())
	}
	maps.Copy(msg.Header, more)
	if !fits(msg, s.limit()) && len(c.Diff) > 0 {
		msg.Header.Del(HeaderChangeDiff)
	}
	ack, err := s.publishChange(ctx, msg, e.Last)
	if IsFull(err) && c.Kind == ChangeDiscarded {
		ack, err = s.discardFromFull(ctx, msg, e, err)
	}
	if err != nil {
		return fmt.Errorf("dead letter %s: %s: %w", e.ID, c.Kind, err)
	}
	read := e.onSubject()
	c.Sequence = ack.Sequence
	e.Apply(&c)
	if c.Kind == ChangeDiscarded {
		s.deleteDiscarded(ctx, e, read)
	}
	return nil
}

// onSubject returns the sequences of the record and of what came after it on its
// subject, or nil if the entry was made without them.
func (e *Entry) onSubject() []uint64 {
	all := append([]uint64{e.Sequence}, e.Later...)
	if all[len(all)-1] != e.Last {
		return nil
	}
	return all
}

// deleteDiscarded deletes what an entry was when its trace has been stored. The
// condition of the trace was that there is no more on its subject than was read. What
// cannot be deleted costs room, and nothing else.
func (s *Store) deleteDiscarded(ctx context.Context, e *Entry, read []uint64) {
	ctx = context.WithoutCancel(ctx) // each request has a bound of its own
	if read == nil {
		_, _ = s.FinishDiscard(ctx, s.SubjectOf(e.Record))
		return
	}
	_, _ = s.deleteRead(ctx, e, read)
}

// FinishDiscard deletes what is still stored of a discarded dead letter before its
// trace, and returns how many messages it has deleted: a process that discards may
// end before it has done so, or lack the permission. It does nothing if the dead
// letter on the subject is not discarded.
//
// It believes a trace only if the server has checked, when it was stored, that its
// writer had read what is before it. It takes a round trip for each message on the
// subject, and one more for each that it deletes.
func (s *Store) FinishDiscard(ctx context.Context, subject string) (deleted int, err error) {
	if s.denied.Load() {
		return 0, nil
	}
	e, before, err := s.beforeTrace(ctx, subject)
	if err != nil {
		return 0, fmt.Errorf("finish the discard of the dead letter on %q: %w", subject, err)
	}
	if deleted, err = s.deleteRead(ctx, e, before); err != nil {
		return deleted, fmt.Errorf("finish the discard of the dead letter on %q: %w", subject, err)
	}
	return deleted, nil
}

// deleteRead deletes messages on the subject of an entry, oldest first, and what the
// entry has elsewhere. The first one is deleted last: as long as it is there, and when
// it is gone, the first message on the subject says whose it is.
func (s *Store) deleteRead(ctx context.Context, e *Entry, sequences []uint64) (deleted int, err error) {
	if len(sequences) == 0 || s.denied.Load() {
		return 0, nil
	}
	const together = 16 // requests
	for chunk := range slices.Chunk(sequences[1:], together) {
		var requests sync.WaitGroup
		errs := make([]error, len(chunk))
		for i, sequence := range chunk {
			requests.Go(func() { errs[i] = s.deleteOne(ctx, sequence) })
		}
		requests.Wait()
		if err := errors.Join(errs...); err != nil {
			return deleted, err
		}
		deleted += len(chunk)
	}
	if e != nil {
		s.deleteObjects(ctx, e)
	}
	if err := s.deleteOne(ctx, sequences[0]); err != nil {
		return deleted, err
	}
	return deleted + 1, nil
}

// beforeTrace returns the messages before the trace on a subject, oldest first, and
// the entry that they make, nil if they are none.
func (s *Store) beforeTrace(ctx context.Context, subject string) (e *Entry, before []uint64, err error) {
	for from := uint64(1); ; {
		m, err := s.api.Next(ctx, s.cfg.StreamName(), subject, from)
		if m == nil || err != nil {
			return nil, nil, err
		}
		from = m.Sequence + 1
		h, err := nats.DecodeHeadersMsg(m.Headers)
		if err != nil {
			h = nil // it is neither a record nor a change
		}
		if IsTrace(h) {
			if len(before) == 0 || !hasRead(h, before[len(before)-1]) {
				return nil, nil, nil
			}
			return e, before, nil
		}
		before = append(before, m.Sequence)
		if c, err := DecodeChange(h, m.Data); err == nil && e != nil {
			c.Sequence = m.Sequence
			e.Apply(c)
		} else if r, _ := Decode(h, m.Data); r != nil && e == nil {
			e = NewEntry(r, m.Sequence, nil)
		}
	}
}

// hasRead reports whether the writer of a stored message knew the message of a
// sequence on its subject, which the server has checked.
func hasRead(h nats.Header, sequence uint64) bool {
	var last uint64
	err := numberInto(&last, first(h, jetstream.ExpectedLastSubjSeqHeader))
	return err == nil && last >= sequence && first(h, jetstream.ExpectedLastSubjSeqSubjHeader) == ""
}

// deleteOne deletes a message of the dead-letter stream. One that is gone already is no
// error.
func (s *Store) deleteOne(ctx context.Context, sequence uint64) error {
	err := s.api.Delete(ctx, s.cfg.StreamName(), sequence)
	if _, refused := errors.AsType[*jsapi.RefusedError](err); refused {
		s.denied.Store(true) // the server logs each, and there may be many
	}
	if jsapi.IsGone(err) {
		return nil
	}
	return err
}

// ChangeMessage is what [Store.Change] publishes for a change without a payload, and
// how: for those who publish many of them before they wait for the answers. It fills
// in c.From and c.Time. What is stored is to be applied to e, with its sequence.
func (s *Store) ChangeMessage(e *Entry, c *Change) (*nats.Msg, []jetstream.PublishOpt) {
	return s.changeMessage(e, c), s.unchangedSince(e.Last)
}

func (s *Store) changeMessage(e *Entry, c *Change) *nats.Msg {
	c.From = e.State
	if c.Time.IsZero() {
		c.Time = time.Now()
	}
	return &nats.Msg{Subject: s.SubjectOf(e.Record), Header: c.header(e.ID)}
}

// unchangedSince has a change stored only if the last message of its subject is still
// that one.
func (s *Store) unchangedSince(last uint64) []jetstream.PublishOpt {
	return []jetstream.PublishOpt{
		jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(s.cfg.StreamName()), jetstream.WithExpectLastSequencePerSubject(last),
	}
}

func (s *Store) publishChange(ctx context.Context, msg *nats.Msg, last uint64) (*jetstream.PubAck, error) {
	ack, err := s.js.PublishMsg(ctx, msg, s.unchangedSince(last)...)
	switch {
	case jsapi.Is(err, jsapi.CodeWrongLastSequence):
		return nil, ErrEntryChanged
	case IsFull(err):
		return nil, fmt.Errorf("%w: %w", ErrStreamFull, err)
	}
	return ack, err
}

// discardFromFull raises the limits of a full stream until the trace is stored:
// the server has no room for it before it removes what that replaces, and nothing
// else may be removed before the trace is there. Others may take the room first,
// which makes another try, with more. full is why the trace was refused.
func (s *Store) discardFromFull(ctx context.Context, msg *nats.Msg, e *Entry, full error) (ack *jetstream.PubAck, err error) {
	const tries = 8
	if api, ok := errors.AsType[*jetstream.APIError](full); ok && api.ErrorCode != jsapi.CodeStoreFailed {
		return nil, fmt.Errorf("%w: nothing was discarded, since what stays of it has no room in the account or on its server: make room there, "+
			"such as by purging another stream, or %s", full, s.withoutTrace(e))
	}
	// Whether it is stored or not, and also when ctx has ended. If it fails, or the
	// process ends before, the stream holds a little more than it should until the
	// next who needs room puts it right.
	defer func() { _ = s.lowerLimits(context.WithoutCancel(ctx)) }()
	for try := range tries {
		if err := s.raiseLimits(ctx, storedSize(msg), 1<<try); err != nil {
			return nil, fmt.Errorf("%w: nothing was discarded, since its limit cannot be raised for what stays of it: %w; or %s",
				full, err, s.withoutTrace(e))
		}
		ack, err = s.publishChange(ctx, msg, e.Last)
		if !errors.Is(err, ErrStreamFull) {
			return ack, err
		}
	}
	return nil, fmt.Errorf("%w: nothing was discarded, since others take the room at once that is made for what stays of it: try again, or "+
		"raise the limit of the stream", err)
}

// withoutTrace is what somebody can do who needs room more than a trace.
func (s *Store) withoutTrace(e *Entry) string {
	return fmt.Sprintf("delete it so that nothing stays of it, and the same message can come again: %s",
		natsCommand("stream rmm", []string{s.cfg.StreamName()}, strconv.FormatUint(e.Sequence, 10)))
}

// storedSize is no less than what the message takes in a stream, in bytes.
func storedSize(msg *nats.Msg) int64 {
	const more = 512 // what the server keeps of each, and the headers that steer the publish
	return int64(len(msg.Subject) + wireSize(msg.Header) + len(msg.Data) + more)
}

// Limits are those of a stream: 0 and less are none.
type limits struct {
	MaxBytes int64 `json:"max_bytes"`
	MaxMsgs  int64 `json:"max_msgs"`
}

// keyRaised is the stream's metadata for a raise that is not put back.
const keyRaised = "monotel.dlq.raised"

// A raise is what becomes of the limits for a moment. It is kept in the stream
// itself, so that they do not stay raised when the process ends, nor do those of
// several processes add up.
type raise struct {
	From limits `json:"from"`
	To   limits `json:"to"`
}

// raiseOf reads the raise that a stream's metadata has, or nil.
func raiseOf(metadata map[string]string) *raise {
	r := &raise{}
	if json.Unmarshal([]byte(metadata[keyRaised]), r) != nil {
		return nil
	}
	return r
}

// before returns the limits as they were. One that is not what it was raised to
// was changed by somebody since, and stays.
func (r *raise) before(now limits) limits {
	if r == nil {
		return now
	}
	if now.MaxBytes == r.To.MaxBytes {
		now.MaxBytes = r.From.MaxBytes
	}
	if now.MaxMsgs == r.To.MaxMsgs {
		now.MaxMsgs = r.From.MaxMsgs
	}
	return now
}

// A room is what a stream has, and how much of it is taken.
type room struct {
	config      map[string]json.RawMessage // all of it: a newer server's may have more than we know
	metadata    map[string]string
	limits      limits
	discard     string
	rollups     bool
	bytes, msgs int64
}

func (s *Store) readRoom(ctx context.Context) (*room, error) {
	var resp struct {
		Config map[string]json.RawMessage `json:"config"`
		State  struct {
			Bytes int64 `json:"bytes"`
			Msgs  int64 `json:"messages"`
		} `json:"state"`
	}
	if err := s.api.Request(ctx, jsapi.OpStreamInfo, s.cfg.StreamName(), jsapi.None{}, &resp); err != nil {
		return nil, err
	}
	r := &room{config: resp.Config, bytes: resp.State.Bytes, msgs: resp.State.Msgs}
	for key, into := range map[string]any{
		"max_bytes": &r.limits.MaxBytes, "max_msgs": &r.limits.MaxMsgs, "discard": &r.discard, "metadata": &r.metadata,
		"allow_rollup_hdrs": &r.rollups,
	} {
		if raw, ok := resp.Config[key]; ok {
			if err := json.Unmarshal(raw, into); err != nil {
				return nil, fmt.Errorf("configuration of stream %q: %w", s.cfg.StreamName(), err)
			}
		}
	}
	return r, nil
}

// setLimits updates the stream, with a raise to remember or nil. The server has no
// way to say "if it is still as I have read it": what somebody else changes within
// this round trip is overwritten, which is why it is made only when a stream is
// full, and right after the reading.
func (s *Store) setLimits(ctx context.Context, r *room, to limits, note *raise) error {
	metadata := maps.Clone(r.metadata)
	delete(metadata, keyRaised)
	if note != nil {
		if metadata == nil {
			metadata = make(map[string]string)
		}
		text, err := json.Marshal(note)
		if err != nil {
			return err
		}
		metadata[keyRaised] = string(text)
	}
	return s.updateStream(ctx, r, map[string]any{"max_bytes": to.MaxBytes, "max_msgs": to.MaxMsgs, "metadata": metadata})
}

// updateStream changes some fields of the stream's configuration, and leaves the
// others as they were read, those that we do not know among them.
func (s *Store) updateStream(ctx context.Context, r *room, fields map[string]any) error {
	config := maps.Clone(r.config)
	for key, value := range fields {
		raw, err := json.Marshal(value)
		if err != nil {
			return err
		}
		config[key] = raw
	}
	var resp jsapi.None
	return s.api.Request(ctx, jsapi.OpStreamUpdate, s.cfg.StreamName(), config, &resp)
}

var errBeyond = errors.New("it holds much more than its limit already, as when others take all the room that is made")

// raiseLimits makes room for a trace of so many bytes, if there is not. factor is
// how much more than that it makes. The error says what to do.
func (s *Store) raiseLimits(ctx context.Context, bytes, factor int64) error {
	r, err := s.readRoom(ctx)
	if err != nil {
		return err
	}
	was := raiseOf(r.metadata).before(r.limits)
	// A raise for each of many dead letters, of which captures take all they can
	// get, must not make the limits worthless.
	const part, leastBytes, leastMsgs = 16, 64 << 10, 64
	most := limits{MaxBytes: was.MaxBytes + max(was.MaxBytes/part, leastBytes), MaxMsgs: was.MaxMsgs + max(was.MaxMsgs/part, leastMsgs)}
	var to limits
	var bytesFit, msgsFit bool
	to.MaxBytes, bytesFit = raisedTo(r.limits.MaxBytes, r.bytes+bytes, r.bytes+bytes*factor, most.MaxBytes)
	to.MaxMsgs, msgsFit = raisedTo(r.limits.MaxMsgs, r.msgs+1, r.msgs+factor, most.MaxMsgs)
	var flags []string
	if was.MaxBytes > 0 {
		flags = append(flags, fmt.Sprintf("--max-bytes %d", 2*max(was.MaxBytes, r.bytes)))
	}
	if was.MaxMsgs > 0 {
		flags = append(flags, fmt.Sprintf("--max-msgs %d", 2*max(was.MaxMsgs, r.msgs)))
	}
	byHand := "raise it, such as with " + editStream(s.cfg.StreamName(), flags...)
	switch {
	case !bytesFit || !msgsFit:
		return fmt.Errorf("%w; %s", errBeyond, byHand)
	case to == r.limits:
		return nil
	}
	err = s.setLimits(ctx, r, to, &raise{From: was, To: to})
	if _, ok := errors.AsType[*jetstream.APIError](err); ok {
		return fmt.Errorf("%w; raise what the account may store, or lower the limit of another stream by %d bytes", err, bytes)
	}
	if err != nil {
		return fmt.Errorf("%w; %s", err, byHand)
	}
	return nil
}

// raisedTo is a limit with room for what is needed, and for what is wished as far
// as that is no more than most. It is not ok if there would be too little.
func raisedTo(limit, needed, wished, most int64) (to int64, ok bool) {
	switch {
	case limit <= 0 || wished <= limit:
		return limit, true
	case needed > max(limit, most):
		return limit, false
	}
	return max(limit, min(wished, most)), true
}

// lowerLimits puts back what was raised, by whomever. Nothing is dropped by that:
// a stream that refuses new messages may hold more than its limit.
func (s *Store) lowerLimits(ctx context.Context) error {
	r, err := s.readRoom(ctx)
	if err != nil {
		return err
	}
	note := raiseOf(r.metadata)
	if note == nil || r.discard != "new" {
		return nil
	}
	return s.setLimits(ctx, r, note.before(r.limits), nil)
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
	if e.BodyObject == "" && e.HeadersObject == "" && e.Revision == 0 || !e.HasOwnID() {
		return
	}
	bucket, err := s.largeBucket(ctx, false)
	if err != nil {
		return
	}
	names := []string{e.ID, e.ID + ".headers"} // and not what the record says, which may be another's
	if e.Revision > 0 {
		revisions, _ := s.objectNames(ctx, e.ID+".r") // or none is left
		names = append(names, revisions...)
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

// Object reads what a record or a change has in the object store. One of more than
// 64 MiB is an [ErrObject].
func (s *Store) Object(ctx context.Context, name string) ([]byte, error) {
	bucket, err := s.largeBucket(ctx, false)
	if err != nil {
		return nil, err
	}
	data, err := s.readObject(ctx, bucket, name, -1, maxObject)
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
