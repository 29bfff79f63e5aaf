// Package triage is for whoever looks after dead letters: it lists and groups
// them, finds them by queries, shows what became of each, and edits, discards,
// archives and replays them. The command "monotel dlq" is made of it.
//
// Package dlq captures dead letters and says what they are.
package triage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/user"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/telemetry/messaging"
)

// Errors of this package. Those of a single dead letter are an [EntryError].
var (
	// ErrNoDeadLetters reports that there is no dead-letter stream of that name.
	ErrNoDeadLetters = errors.New("no dead-letter stream")

	// ErrNotFound reports a dead letter, group, plan or operation that there is not. As a
	// [NotFoundError] it has IDs that look like the one asked for.
	ErrNotFound = errors.New("not found")

	// ErrChanged reports that somebody changed a dead letter in the meantime.
	ErrChanged = errors.New("changed meanwhile")

	// ErrClaimed reports a dead letter that an operation is replaying.
	ErrClaimed = errors.New("being replayed")

	// ErrState reports something that cannot be done in this state.
	ErrState = errors.New("wrong state")

	// ErrInvalid reports a request that makes no sense.
	ErrInvalid = errors.New("invalid")

	// ErrReadOnly reports a change that Config.ReadOnly refuses.
	ErrReadOnly = errors.New("read-only")

	// ErrFull reports that the dead-letter stream takes no more.
	ErrFull = errors.New("the dead-letter stream is full")
)

// A NotFoundError is an [ErrNotFound].
type NotFoundError struct {
	What string   // "dead letter", "group", "operation"
	ID   string   // that was asked for
	Near []string // IDs that look like it, at most a few
}

func (e *NotFoundError) Error() string {
	text := fmt.Sprintf("%s %q: %v", e.What, e.ID, ErrNotFound)
	if len(e.Near) > 0 {
		text += "; did you mean " + strings.Join(e.Near, " or ") + "?"
	}
	return text
}

// Is reports whether target is [ErrNotFound].
func (e *NotFoundError) Is(target error) bool { return target == ErrNotFound }

// An EntryError is what kept one dead letter from being changed: [ErrChanged],
// [ErrClaimed], [ErrState] or [ErrFull], with who did what to it meanwhile.
type EntryError struct {
	ID        string
	Err       error
	State     dlq.State // that it has
	Actor     string    // who changed it last
	Operation string    // by which replay, if it was one
	Changed   time.Time
}

func (e *EntryError) Error() string {
	text := fmt.Sprintf("dead letter %s: %v", e.ID, e.Err)
	var facts []string
	if e.State != "" {
		facts = append(facts, string(e.State))
	}
	if e.Actor != "" {
		facts = append(facts, "by "+e.Actor)
	}
	if e.Operation != "" {
		facts = append(facts, "operation "+e.Operation)
	}
	if !e.Changed.IsZero() {
		facts = append(facts, "at "+e.Changed.UTC().Format(time.RFC3339))
	}
	if len(facts) > 0 {
		text += " (" + strings.Join(facts, ", ") + ")"
	}
	return text
}

// Unwrap returns Err.
func (e *EntryError) Unwrap() error { return e.Err }

// A Config configures a [Desk]. The zero value is good.
type Config struct {
	// Stream is the dead-letter stream. The default is "DLQ".
	Stream string

	// Domain is the JetStream domain that the stream is in, such as that of the hub
	// for who is connected to a leaf node. The default is that of the server.
	Domain string

	// APIPrefix begins the subjects of the JetStream API in place of "$JS.API", where
	// it is another account's, imported under that name. It takes the place of
	// Domain: one of them can be set.
	APIPrefix string

	// Actor is who is at work, for the history: the default is user@host.
	Actor string

	// Telemetry records what is replayed: a span for each message, in a trace of
	// its own that is linked to those of the failure and of the publish, and how
	// many were sent. The default records nothing.
	Telemetry *messaging.Telemetry

	// ReadOnly refuses every change with [ErrReadOnly]: what would edit, archive,
	// discard, restore, import or replay, and what would store, pause or cancel a plan.
	ReadOnly bool

	// Fingerprint tells failures apart, see [Fingerprint], which is the default.
	Fingerprint func(*dlq.Entry) string
}

// JetStream returns the JetStream that has the dead letters, in whose domain or
// with whose prefix all is asked for. Domain and APIPrefix together are an
// [ErrInvalid], and so is one that cannot be part of a subject.
func (c Config) JetStream(nc *nats.Conn) (jetstream.JetStream, error) {
	prefix, timeout := strings.TrimSuffix(c.APIPrefix, "."), jetstream.WithPublishAsyncTimeout(answerTime) // it is never by itself
	switch {
	case c.Domain != "" && prefix != "":
		return nil, fmt.Errorf("%w: a JetStream domain and an API prefix, want one of them", ErrInvalid)
	case strings.Contains(c.Domain, "."), !isSubject(c.Domain):
		return nil, fmt.Errorf("%w: JetStream domain %q, want a name without dots, spaces and wildcards", ErrInvalid, c.Domain)
	case !isSubject(prefix):
		return nil, fmt.Errorf("%w: JetStream API prefix %q, want the beginning of a subject", ErrInvalid, c.APIPrefix)
	case c.Domain != "":
		// It is a prefix, too. Package jetstreamext, which we read with, knows only
		// how to write that: of a domain it leaves out ".API".
		prefix = "$JS." + c.Domain + ".API"
	case prefix == "":
		return jetstream.New(nc, timeout)
	}
	return jetstream.NewWithAPIPrefix(nc, prefix, timeout)
}

// isSubject reports whether s may begin a subject, as nothing may.
func isSubject(s string) bool {
	odd := func(r rune) bool { return r <= ' ' || r == 0x7f || r == '*' || r == '>' }
	return s == "" || strings.IndexFunc(s, odd) < 0 && !strings.Contains("."+s+".", "..")
}

// A Desk is where dead letters are looked at and worked on. It is safe for
// concurrent use.
type Desk struct {
	nc    *nats.Conn
	js    jetstream.JetStream
	api   *jsapi.Client
	store *dlq.Store
	cfg   Config

	mu     sync.Mutex
	handle jetstream.Stream // made when they are first needed
	bucket jetstream.KeyValue

	halfDone map[string]struct{} // subjects of discarded entries that have something before their trace

	replicated atomic.Bool // the stream has more replicas than one, as was last seen
}

// Open returns a desk for the dead letters of a stream, which must exist: else it
// is an [ErrNoDeadLetters].
func Open(ctx context.Context, nc *nats.Conn, cfg Config) (*Desk, error) {
	js, err := cfg.JetStream(nc)
	if err != nil {
		return nil, fmt.Errorf("open dead letters: %w", err)
	}
	d := &Desk{nc: nc, js: js, api: jsapi.New(nc, js, 0), cfg: cfg}
	if d.cfg.Stream == "" {
		d.cfg.Stream = dlq.Config{}.StreamName()
	}
	if d.cfg.Actor == "" {
		d.cfg.Actor = defaultActor()
	}
	if d.cfg.Fingerprint == nil {
		d.cfg.Fingerprint = Fingerprint
	}
	d.store, err = dlq.NewStore(nc, js, dlq.Config{Stream: jetstream.StreamConfig{Name: d.cfg.Stream}})
	if err != nil {
		return nil, fmt.Errorf("open dead letters: %w", err)
	}
	if _, err := d.info(ctx); err != nil {
		return nil, err
	}
	return d, nil
}

// Stream is the name of the dead-letter stream.
func (d *Desk) Stream() string { return d.cfg.Stream }

// Actor is who is at work.
func (d *Desk) Actor() string { return d.cfg.Actor }

// changes returns ErrReadOnly if nothing may be changed.
func (d *Desk) changes() error {
	if d.cfg.ReadOnly {
		return fmt.Errorf("%w: nothing may be changed", ErrReadOnly)
	}
	return nil
}

func defaultActor() string {
	name := os.Getenv("USER")
	if u, err := user.Current(); err == nil {
		name = u.Username
	}
	host, _ := os.Hostname() // or it is not known
	return strings.Trim(name+"@"+host, "@")
}

// info looks at the dead-letter stream.
func (d *Desk) info(ctx context.Context) (*jetstream.StreamInfo, error) {
	s, err := d.js.Stream(ctx, d.cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, fmt.Errorf("%w %q: no App has made one here, or it has another name", ErrNoDeadLetters, d.cfg.Stream)
	}
	if err != nil {
		return nil, fmt.Errorf("dead-letter stream %q: %w", d.cfg.Stream, err)
	}
	info := s.CachedInfo()
	d.replicated.Store(info.Config.Replicas > 1)
	return info, nil
}
