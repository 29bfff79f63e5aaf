package dlq

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// A Config says where dead letters are kept, and what of them. The zero value is
// the default.
type Config struct {
	// Stream is the dead-letter stream. Name defaults to "DLQ", MaxBytes to 1 GiB, or
	// less on a server that has no room for that, Storage to files. Set MaxBytes, MaxAge, Replicas, Storage, Placement and the
	// like; its subjects, retention and discard policy are ours, and rollups, message
	// TTLs, schedules and batches are off. When it is full it
	// refuses: what cannot be captured stays in its own stream, and is captured
	// when there is room again.
	Stream jetstream.StreamConfig

	// MetadataOnly keeps neither bodies nor headers nor the text of errors, only
	// what failed where, when and how. Such a dead letter can be replayed only as
	// long as its stream has the message.
	MetadataOnly bool

	// External captures, besides, what consumers that are not the App's give up, and
	// what the server does: those of plain NATS clients and of other languages, of
	// the whole account. See Bridge. The default is not to.
	External bool

	// Redact may change a record before anything of it is stored: its Header, Data,
	// Error, ReasonText and Stack. It is called for each capture, from several
	// goroutines, and should be quick. When it panics, the record is stored as if
	// MetadataOnly were set.
	Redact func(r *Record)
}

// ErrInvalidConfig reports a Config that cannot work.
var ErrInvalidConfig = errors.New("invalid configuration")

// ErrStreamConflict reports a stream that exists and cannot be the dead-letter
// stream.
var ErrStreamConflict = errors.New("stream conflict")

const (
	defaultStream   = "DLQ"
	defaultMaxBytes = 1 << 30
	subjectPrefix   = "monotel.dlq."
)

// StreamName is the name of the dead-letter stream.
func (c Config) StreamName() string {
	if c.Stream.Name == "" {
		return defaultStream
	}
	return c.Stream.Name
}

// bucketName is that of the object store for what is too large for a record.
func (c Config) bucketName() string { return c.StreamName() + "_LARGE" }

// streamName is what an object store may be called, with room for what is added.
var streamName = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,240}$`)

// Validate reports every problem at once, each naming the field to change.
func (c Config) Validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalidConfig}, args...)...))
	}
	s := c.Stream
	if name := c.StreamName(); !streamName.MatchString(name) {
		bad("Stream.Name is %.300q, want 1 to 240 of the characters a-z, A-Z, 0-9, - and _: an object store is named after it", name)
	}
	if len(s.Subjects) > 0 {
		bad("Stream.Subjects is %q, want none: the records have subjects of their own", s.Subjects)
	}
	if s.Retention != jetstream.LimitsPolicy {
		bad("Stream.Retention is %v, want limits: dead letters are read more than once", s.Retention)
	}
	if s.MaxMsgsPerSubject > 0 {
		bad("Stream.MaxMsgsPerSubject is %d, want none: a dead letter's history is on its subject", s.MaxMsgsPerSubject)
	}
	if s.AllowMsgCounter || s.DenyDelete {
		bad("Stream has AllowMsgCounter or DenyDelete, want none of them: records are no counters, and discarding one deletes it")
	}
	if s.Mirror != nil || len(s.Sources) > 0 || s.SubjectTransform != nil || s.RePublish != nil || s.NoAck || s.Sealed {
		bad("Stream has a Mirror, Sources, SubjectTransform, RePublish, NoAck or Sealed, want none of them")
	}
	return errors.Join(errs...)
}

// streamConfig is what the server is asked for.
func (c Config) streamConfig() jetstream.StreamConfig {
	s := c.Stream
	s.Name = c.StreamName()
	s.Subjects = []string{c.subjects()}
	s.Retention = jetstream.LimitsPolicy
	s.Discard = jetstream.DiscardNew
	s.AllowDirect = true
	// What a publisher could use to remove dead letters, or to have the server store some.
	s.AllowRollup, s.AllowMsgTTL, s.SubjectDeleteMarkerTTL, s.AllowMsgSchedules = false, false, 0, false
	s.AllowAtomicPublish, s.AllowBatchPublish = false, false
	if s.MaxBytes == 0 {
		s.MaxBytes = defaultMaxBytes
	}
	if s.Description == "" {
		s.Description = "Messages that could not be handled, see monotel's docs/dead-letter-format.md"
	}
	return s
}

// subjects has the stream's name in it, so that there can be several.
func (c Config) subjects() string { return subjectPrefix + c.StreamName() + ".>" }

// A Store keeps dead letters. It is safe for concurrent use.
type Store struct {
	nc  *nats.Conn
	js  jetstream.JetStream
	cfg Config

	api    *jsapi.Client
	denied atomic.Bool // the server has refused to let this user delete messages

	mu     sync.Mutex
	bucket jetstream.ObjectStore // made when it is first needed
}

// NewStore returns a store. It touches no network; see [Store.Provision].
func NewStore(nc *nats.Conn, js jetstream.JetStream, cfg Config) (*Store, error) {
	if err := cfg.Validate(); err != nil {
		return nil, fmt.Errorf("dead letters: %w", err)
	}
	return &Store{nc: nc, js: js, cfg: cfg, api: jsapi.New(nc, js, requestTimeout)}, nil
}

// Provision makes the dead-letter stream, unless it is there. Limits of a stream
// that exists are left as they are: an operator may have changed them. What would
// lose dead letters is an [ErrStreamConflict].
func (s *Store) Provision(ctx context.Context) error {
	want := s.cfg.streamConfig()
	stream, err := s.js.Stream(ctx, want.Name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = s.create(ctx, want)
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another instance was quicker
			stream, err = s.js.Stream(ctx, want.Name)
		}
	}
	if err != nil {
		return fmt.Errorf("dead-letter stream %q: %w", want.Name, err)
	}
	have := stream.CachedInfo().Config
	if err := s.conflict(have); err != nil {
		return err
	}
	if have.AllowDirect {
		return nil
	}
	have.AllowDirect = true
	if _, err := s.js.UpdateStream(ctx, have); err != nil {
		return fmt.Errorf("dead-letter stream %q: allow direct gets: %w", want.Name, err)
	}
	return nil
}

// DenyRollups turns rollups of the dead-letter stream off, and reports whether they
// were on: with one message, a user that may publish on the subject of one dead letter
// removes all of them. Versions that discard by a rollup turn them on when an App
// starts; their discards are refused afterwards.
//
// It takes a round trip, and two more if they are on.
func (s *Store) DenyRollups(ctx context.Context) (were bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("dead-letter stream %q: deny rollups: %w", s.cfg.StreamName(), err)
		}
	}()
	r, err := s.readRoom(ctx)
	if err != nil || !r.rollups {
		return false, err
	}
	if err := s.updateStream(ctx, r, map[string]any{"allow_rollup_hdrs": false}); err != nil {
		return true, err
	}
	if r, err = s.readRoom(ctx); err == nil && r.rollups { // without an error, for the sake of the other setting
		err = errors.New("the server keeps them, for SubjectDeleteMarkerTTL")
	}
	return true, err
}

// create makes the stream.
func (s *Store) create(ctx context.Context, want jetstream.StreamConfig) (stream jetstream.Stream, err error) {
	err = s.reserve(want.MaxBytes, func(maxBytes int64) error {
		want.MaxBytes = maxBytes
		stream, err = s.js.CreateStream(ctx, want)
		return err
	})
	return stream, err
}

// reserve creates what has MaxBytes. The server reserves them, and a small one
// has no room for the default: then there is less.
func (s *Store) reserve(maxBytes int64, create func(maxBytes int64) error) error {
	const least, part = 1 << 20, 4
	for {
		err := create(maxBytes)
		if !jsapi.NoRoom(err) || s.cfg.Stream.MaxBytes != 0 || maxBytes/part < least {
			return err
		}
		maxBytes /= part
	}
}

// conflict says what is wrong with a stream that exists.
func (s *Store) conflict(have jetstream.StreamConfig) error {
	name, subject := s.cfg.StreamName(), s.cfg.subjects()
	var problems []string
	if !slices.Contains(have.Subjects, subject) {
		problems = append(problems, fmt.Sprintf("its subjects are %q, without %q", have.Subjects, subject))
	}
	if have.Retention != jetstream.LimitsPolicy {
		problems = append(problems, fmt.Sprintf("its retention is %v, want limits", have.Retention))
	}
	if have.Discard != jetstream.DiscardNew {
		problems = append(problems, "when it is full it drops the oldest dead letter, want discard new")
	}
	if have.MaxMsgsPerSubject > 0 {
		problems = append(problems, fmt.Sprintf("it keeps %d messages of a subject, want no such limit", have.MaxMsgsPerSubject))
	}
	if have.Sealed {
		problems = append(problems, "it is sealed")
	}
	if have.NoAck {
		problems = append(problems, "it does not acknowledge what it stores")
	}
	if have.SubjectTransform != nil {
		problems = append(problems, "it has a subject transform, want none")
	}
	if have.AllowMsgCounter {
		problems = append(problems, "it is for counters")
	}
	if have.DenyDelete {
		problems = append(problems, "it denies deletes, which discarding a dead letter needs")
	}
	if len(problems) == 0 {
		return nil
	}
	return fmt.Errorf("dead-letter stream %q: %w: %s; set Stream.Name of dlq.Config to another name, or change the stream",
		name, ErrStreamConflict, strings.Join(problems, "; "))
}

// Subject is where the record of an ID is stored: with those of its stream and
// consumer, which can be asked for with a wildcard.
func (s *Store) Subject(stream, consumer, id string) string {
	return subjectPrefix + s.cfg.StreamName() + "." + token(stream) + "." + token(consumer) + "." + id
}

// token makes a name fit for a subject. Names of streams and durable consumers
// are.
func token(name string) string {
	if name == "" {
		return "_"
	}
	return strings.Map(func(r rune) rune {
		if r <= ' ' || r == 0x7f || r == '.' || r == '*' || r == '>' {
			return '_'
		}
		return r
	}, name)
}
