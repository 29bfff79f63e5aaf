package dlq

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// The limit of JetStream for a message's header, less a margin for what others
// may add.
const maxHeader = 64<<10 - 1<<10

// What is kept of diagnostics, most first: the first that fits is taken. The
// message counts more than what is said about it.
var diagnostics = []struct{ stack, text int }{ // bytes
	{stack: 16 << 10, text: 8 << 10},
	{stack: 2 << 10, text: 8 << 10},
	{stack: 2 << 10, text: 1 << 10},
	{stack: 0, text: 256},
}

// Capture stores a record and returns when the dead-letter stream has
// acknowledged it. captured is false if it was stored before, which is as good:
// the message may be terminated in both cases, and in no other. more are further
// headers of the record, such as its trace context.
//
// It takes a round trip, and several more if the message does not fit beside its
// diagnostics. It changes r: what is redacted or put elsewhere.
func (s *Store) Capture(ctx context.Context, r *Record, more nats.Header) (captured bool, err error) {
	s.redact(r)
	msg, err := s.message(ctx, r, more)
	if err != nil {
		return false, fmt.Errorf("capture dead letter %s: %w", r.ID, err)
	}
	// No retries: whoever calls comes again, with the message.
	_, err = s.js.PublishMsg(ctx, msg, jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(s.cfg.StreamName()),
		jetstream.WithExpectLastSequencePerSubject(0))
	if jsapi.Is(err, jsapi.CodeWrongLastSequence) {
		return false, s.checkSame(ctx, r, msg.Subject)
	}
	if err != nil {
		return false, fmt.Errorf("capture dead letter %s in stream %q: %w", r.ID, s.cfg.StreamName(), err)
	}
	return true, nil
}

// CaptureNext is [Store.Capture] that does not give up where something else is stored
// under the record's ID: it goes on with the next ones, see [NextID]. r.ID is the one
// that the record has in the end.
func (s *Store) CaptureNext(ctx context.Context, r *Record, more nats.Header) (captured bool, err error) {
	for range maxIDs {
		captured, err = s.Capture(ctx, r, more)
		if !errors.Is(err, ErrIDTaken) {
			break
		}
		r.ID = NextID(r.ID)
	}
	return captured, err
}

// ErrIDTaken reports that what is stored under the record's ID is not this
// message: its stream was deleted and made again and the record says the wrong time
// of creation, or somebody else has published there. See [NextID].
var ErrIDTaken = errors.New("another message has the ID of this dead letter")

// ErrNoRoomElsewhere reports a record that is too large for a message, and whose body
// could not be put into the object store. Other records may fit.
var ErrNoRoomElsewhere = errors.New("its body is not stored in the object store")

// maxIDs is how many IDs are tried for one message, see [NextID].
const maxIDs = 4

// Holds reports whether a record of the message that r describes is stored. It
// looks under r.ID and, as long as something else is there, under the IDs that
// follow it. If it finds the record, r.ID is where.
//
// It takes a round trip to the leader of the dead-letter stream.
func (s *Store) Holds(ctx context.Context, r *Record) (bool, error) {
	id := r.ID
	for range maxIDs {
		switch err := s.checkSame(ctx, r, s.Subject(r.Stream, r.Consumer, id)); {
		case err == nil:
			r.ID = id
			return true, nil
		case errors.Is(err, jetstream.ErrMsgNotFound):
			return false, nil
		case !errors.Is(err, ErrIDTaken):
			return false, err
		}
		id = NextID(id)
	}
	return false, nil
}

// checkSame returns nil if what is stored on the subject is a record of the same
// message, [ErrIDTaken] if it is anything else, and jetstream.ErrMsgNotFound if
// there is nothing.
func (s *Store) checkSame(ctx context.Context, r *Record, subject string) error {
	m, err := s.api.Next(ctx, s.cfg.StreamName(), subject, 1)
	if err == nil && m == nil {
		err = jetstream.ErrMsgNotFound
	}
	if err != nil {
		return fmt.Errorf("look at dead letter %s: %w", r.ID, err)
	}
	h, err := nats.DecodeHeadersMsg(m.Headers)
	if err != nil {
		return fmt.Errorf("dead letter %s: %w: its header cannot be read", r.ID, ErrIDTaken)
	}
	if have, _ := Decode(h, nil); have == nil || !r.sameMessage(have) {
		return fmt.Errorf("dead letter %s: %w", r.ID, ErrIDTaken)
	}
	return nil
}

// sameMessage reports whether a stored record is of the message that r describes.
// A record that does not say when its message was stored proves nothing: anybody
// can publish one. Where r does not know that time, the sequence decides.
func (r *Record) sameMessage(have *Record) bool {
	if have.Stream != r.Stream || have.Consumer != r.Consumer {
		return false
	}
	if r.StreamSequence != 0 && have.StreamSequence != 0 && have.StreamSequence != r.StreamSequence {
		return false
	}
	if r.Stored.IsZero() {
		return r.StreamSequence != 0 && have.StreamSequence == r.StreamSequence
	}
	return have.Stored.Equal(r.Stored)
}

// redact takes away what is not to be stored.
func (s *Store) redact(r *Record) {
	if r.Body == BodyInline { // not if an earlier try has put it elsewhere
		r.BodySize = len(r.Data)
	}
	omit := s.cfg.MetadataOnly
	if s.cfg.Redact != nil && !omit && !callRedact(s.cfg.Redact, r) {
		omit, r.Stack = true, nil
	}
	if omit {
		r.Data, r.Header, r.Error, r.ReasonText = nil, nil, "", ""
		if r.Body == BodyInline {
			r.Body = BodyOmitted
		}
	}
}

// callRedact reports whether the user's function has returned.
func callRedact(redact func(*Record), r *Record) (ok bool) {
	defer func() { _ = recover() }() // what it panics with may hold what was to be redacted
	redact(r)
	return true
}

// message makes the message to store, small enough for the server.
func (s *Store) message(ctx context.Context, r *Record, more nats.Header) (*nats.Msg, error) {
	msg := &nats.Msg{Subject: s.Subject(r.Stream, r.Consumer, r.ID), Data: r.Data}
	limit := s.limit()
	for _, d := range diagnostics {
		if msg.Header = r.cut(d.stack, d.text, more); fits(msg, limit) {
			return msg, nil
		}
	}
	// The objects are named after the ID. Those of another message must not be replaced.
	if err := s.checkSame(ctx, r, msg.Subject); errors.Is(err, ErrIDTaken) {
		return nil, err
	}
	if err := s.putElsewhere(ctx, r); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoRoomElsewhere, err)
	}
	msg.Data = nil
	for _, d := range diagnostics {
		if msg.Header = r.cut(d.stack, d.text, more); fits(msg, limit) {
			return msg, nil
		}
	}
	return nil, fmt.Errorf("its metadata are %d bytes, and the server takes at most %d", wireSize(msg.Header), limit)
}

// limit is the most that the server takes, header and body.
func (s *Store) limit() int64 {
	limit := s.nc.MaxPayload()
	if most := int64(s.cfg.Stream.MaxMsgSize); most > 0 {
		limit = min(limit, most)
	}
	// For the headers that steer the publish.
	const steering = 512
	return limit - steering
}

func fits(msg *nats.Msg, limit int64) bool {
	size := wireSize(msg.Header)
	return size <= maxHeader && int64(size+len(msg.Data)) <= limit
}

// cut returns the record's header with shorter diagnostics.
func (r *Record) cut(stack, text int, more nats.Header) nats.Header {
	h := r.shortened(stack, text).header()
	maps.Copy(h, more)
	return h
}

// shortened returns a copy with shorter diagnostics.
func (r *Record) shortened(stack, text int) *Record {
	short := *r
	short.Error, short.ReasonText, short.ErrorType = shorten(r.Error, text), shorten(r.ReasonText, text), shorten(r.ErrorType, text)
	short.Stack, short.ErrorTypes = firstLines(r.Stack, stack), firstLines(r.ErrorTypes, text)
	return &short
}

// firstLines returns the lines that most bytes hold, with what separates them.
func firstLines(lines []string, most int) []string {
	for i, line := range lines {
		if most -= len(line) + len("\n"); most < 0 {
			return lines[:i]
		}
	}
	return lines
}

func shorten(s string, most int) string {
	const mark = "…"
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most-len(mark)], "") + mark
}

// putElsewhere stores the body, and the headers if they are large, as objects of
// the record's name.
func (s *Store) putElsewhere(ctx context.Context, r *Record) error {
	bucket, err := s.largeBucket(ctx, true)
	if err != nil {
		return err
	}
	put := func(name string, data []byte) error {
		if _, err := bucket.Put(ctx, jetstream.ObjectMeta{Name: name}, bytes.NewReader(data)); err != nil {
			s.setBucket(nil) // it may have been deleted
			return fmt.Errorf("put %d bytes into object store %q: %w", len(data), s.cfg.bucketName(), err)
		}
		return nil
	}
	if r.Body == BodyInline {
		if err := put(r.ID, r.Data); err != nil {
			return err
		}
		r.Body, r.BodyObject, r.BodySize, r.Data = BodyObject, r.ID, len(r.Data), nil
	}
	const small = 16 << 10
	if headers := encodeHeaders(r.Header); len(r.Header) > 0 && len(headers) > small {
		name := r.ID + ".headers"
		if err := put(name, []byte(headers)); err != nil {
			return err
		}
		r.Header, r.HeadersObject = nil, name
	}
	return nil
}

// largeBucket returns the object store. If it is missing, it is made, or that is
// an error.
func (s *Store) largeBucket(ctx context.Context, create bool) (jetstream.ObjectStore, error) {
	s.mu.Lock()
	bucket := s.bucket
	s.mu.Unlock()
	if bucket != nil {
		return bucket, nil
	}
	name, cfg := s.cfg.bucketName(), s.cfg.streamConfig()
	bucket, err := s.js.ObjectStore(ctx, name)
	if create && errors.Is(err, jetstream.ErrBucketNotFound) {
		err = s.reserve(cfg.MaxBytes, func(maxBytes int64) error {
			bucket, err = s.js.CreateObjectStore(ctx, jetstream.ObjectStoreConfig{
				Bucket: name, Description: "Bodies of dead letters that are too large for stream " + s.cfg.StreamName(),
				MaxBytes: maxBytes, Storage: cfg.Storage, Replicas: cfg.Replicas, Placement: cfg.Placement, TTL: cfg.MaxAge,
			})
			return err
		})
		if errors.Is(err, jetstream.ErrBucketExists) { // another instance was quicker
			bucket, err = s.js.ObjectStore(ctx, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("object store %q: %w", name, err)
	}
	s.setBucket(bucket)
	return bucket, nil
}

func (s *Store) setBucket(bucket jetstream.ObjectStore) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bucket = bucket
}

// Load reads a record from a message of the dead-letter stream, with what was put
// elsewhere.
func (s *Store) Load(ctx context.Context, h nats.Header, data []byte) (*Record, error) {
	r, err := Decode(h, data)
	if r == nil {
		return nil, err
	}
	return r, errors.Join(err, s.Fetch(ctx, r))
}

// Fetch fills in what a record has in the object store: its body, its headers. It
// does nothing for others. An object that is not as large as the record says is an
// [ErrObject], and not read.
func (s *Store) Fetch(ctx context.Context, r *Record) error {
	if r.Body != BodyObject && r.HeadersObject == "" {
		return nil
	}
	bucket, err := s.largeBucket(ctx, false)
	if err != nil {
		return err
	}
	var errs []error
	if r.Body == BodyObject {
		r.Data, err = s.readObject(ctx, bucket, r.BodyObject, int64(r.BodySize), maxObject)
		if err != nil {
			errs = append(errs, fmt.Errorf("body of dead letter %s: %w", r.ID, err))
		}
	}
	if r.HeadersObject != "" {
		text, err := s.readObject(ctx, bucket, r.HeadersObject, -1, maxHeadersObject)
		if err == nil {
			r.Header, err = decodeHeaders(string(text))
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("headers of dead letter %s: %w", r.ID, err))
		}
	}
	return errors.Join(errs...)
}
