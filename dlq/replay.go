package dlq

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// The headers of a replayed message, beside those of the original.
const (
	HeaderReplayOf        = "Dlq-Replay-Of"        // ID of the dead letter
	HeaderReplayOperation = "Dlq-Replay-Operation" // of the replay
	HeaderReplayCount     = "Dlq-Replay-Count"     // how often it was replayed, this time included
	HeaderReplaySubject   = "Dlq-Replay-Subject"   // original subject
	HeaderReplayClaim     = "Dlq-Replay-Claim"     // sequence of the claim in the dead-letter stream
	HeaderReplayStream    = "Dlq-Replay-Stream"    // the dead-letter stream
	HeaderReplayLinks     = "Dlq-Replay-Links"     // traceparents of the dead letter and of the origin, a space between them
)

// ReplayHeaderPrefix is what the headers above begin with.
const ReplayHeaderPrefix = "Dlq-Replay-"

const (
	replayPrefix = "monotel.replays."
	// oldReplayPrefix is that of earlier versions, which replayed through a second
	// filter of the consumer's own durable.
	oldReplayPrefix = "monotel.replay."

	replayConsumerSuffix = "_replay"
	wakePrefix           = "monotel.wake."
)

// ReplaySubjects are the subjects of the messages that are replayed to one
// consumer. The consumer's stream has them from the first replay on, and the durable
// [ReplayConsumer] filters them.
func ReplaySubjects(stream, consumer string) string {
	return replayPrefix + token(stream) + "." + token(consumer) + ".>"
}

// ReplaySubject is where one operation replays one dead letter: once, as the
// stream refuses a second message.
func ReplaySubject(stream, consumer, id, operation string) string {
	return replayPrefix + token(stream) + "." + token(consumer) + "." + token(id) + "." + token(operation)
}

// OldReplaySubjects are the subjects that earlier versions replay to. There the
// consumer's own durable filters them, beside its event.
func OldReplaySubjects(stream, consumer string) string {
	return oldReplayPrefix + token(stream) + "." + token(consumer) + ".>"
}

// OldReplaySubject is the [ReplaySubject] of earlier versions.
func OldReplaySubject(stream, consumer, id, operation string) string {
	return oldReplayPrefix + token(stream) + "." + token(consumer) + "." + token(id) + "." + token(operation)
}

// IsReplaySubject reports whether a subject is for replays, of any consumer and any
// version.
func IsReplaySubject(subject string) bool {
	return strings.HasPrefix(subject, replayPrefix) || strings.HasPrefix(subject, oldReplayPrefix)
}

// ReplayConsumer is the name of the durable that gets what is replayed to a
// consumer.
func ReplayConsumer(consumer string) string { return consumer + replayConsumerSuffix }

// WakeSubjects are the subjects of all wake-ups, see [WakeSubject].
const WakeSubjects = wakePrefix + "*.*"

// WakeSubject is where a running App is told that the durable for a consumer's
// replays was made. The message has no payload, and no stream stores it.
func WakeSubject(stream, consumer string) string {
	return wakePrefix + token(stream) + "." + token(consumer)
}

// A Replay is what a replayed message says of itself.
type Replay struct {
	Stream    string // the dead-letter stream
	Subject   string // of the dead letter there
	ID        string
	Operation string
	Claim     uint64 // sequence of the claim, 0 if it is not known
	Count     int
	Old       bool // it came on the subject of an earlier version
}

// ParseReplay reports whether a message that a consumer of a stream got is a
// replay, and which. The subject decides. What the headers say is no more than
// where to look: [Store.Outcome] and [Store.Settled] believe the dead letter's own
// history.
func ParseReplay(stream, consumer, subject string, h nats.Header) (Replay, bool) {
	old := false
	rest, ok := strings.CutPrefix(subject, replayPrefix)
	if !ok {
		rest, old = strings.CutPrefix(subject, oldReplayPrefix)
		if !old {
			return Replay{}, false
		}
	}
	rest, ok = strings.CutPrefix(rest, token(stream)+"."+token(consumer)+".")
	if !ok {
		return Replay{}, false
	}
	id, operation, _ := strings.Cut(rest, ".")
	if id != token(id) || operation != token(operation) { // a wildcard would find other dead letters
		return Replay{}, false
	}
	r := Replay{Stream: oneLine(first(h, HeaderReplayStream)), ID: id, Operation: operation, Old: old}
	_ = numberInto(&r.Claim, first(h, HeaderReplayClaim))
	_ = sizeInto(&r.Count, first(h, HeaderReplayCount))
	r.Subject = subjectPrefix + r.Stream + "." + token(stream) + "." + token(consumer) + "." + id
	return r, true
}

// ErrNoEntry reports a replayed message that is of no dead letter, or of none any
// more.
var ErrNoEntry = errors.New("there is no such dead letter that was replayed")

// Outcome writes on a dead letter what has come of its replay: it is resolved, or
// failed again if failure is not nil. It returns when that is stored. written is
// false if an outcome of this replay was stored before, which is as good. more are
// further headers, such as the trace context. It changes failure: what is redacted.
//
// [ErrNoEntry] means that there is nothing to write on: the dead letter was
// discarded meanwhile, or purged, or is in another stream, or no such operation has
// claimed it, so that the message is not what it says.
//
// It takes two round trips, and some more if it failed again or somebody changed
// the entry meanwhile.
func (s *Store) Outcome(ctx context.Context, replay Replay, actor string, failure *Record, more nats.Header) (written bool, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("outcome of the replay of dead letter %.100q: %w", replay.ID, err)
		}
	}()
	if replay.Stream != s.cfg.StreamName() {
		return false, ErrNoEntry
	}
	c := Change{Kind: ChangeResolved, From: StateReplaying, Time: time.Now(), Actor: actor, Operation: replay.Operation}
	last := uint64(0)
	if failure != nil {
		c.Kind = ChangeFailedAgain
		s.redact(failure)
	} else if last, err = s.claim(ctx, replay); err != nil {
		return false, err
	}
	const tries = 10
	for range tries {
		if last == 0 {
			prior, err := s.prior(ctx, replay)
			if err != nil {
				return false, err
			}
			if prior.outcome != "" {
				return false, nil
			}
			c.From, last = prior.state, prior.last
		}
		_, err = s.js.PublishMsg(ctx, s.outcomeMessage(replay, &c, failure, more), jetstream.WithRetryAttempts(0),
			jetstream.WithExpectStream(s.cfg.StreamName()), jetstream.WithExpectLastSequencePerSubject(last))
		if !jsapi.Is(err, jsapi.CodeWrongLastSequence) {
			break
		}
		last = 0
	}
	return err == nil, err
}

// outcomeMessage leaves out diagnostics until the message fits.
func (s *Store) outcomeMessage(replay Replay, c *Change, failure *Record, more nats.Header) *nats.Msg {
	msg := &nats.Msg{Subject: replay.Subject}
	if failure == nil {
		msg.Header = c.header(replay.ID)
		maps.Copy(msg.Header, more)
		return msg
	}
	for _, d := range diagnostics {
		c.Failure = failure.shortened(d.stack, d.text)
		msg.Header = c.header(replay.ID)
		maps.Copy(msg.Header, more)
		if fits(msg, s.limit()) {
			break
		}
	}
	return msg
}

// Settled returns what has come of a replay as far as it is stored:
// [ChangeResolved], [ChangeFailedAgain], or "". A message that comes again is
// looked up here, in case another process has ended between the outcome and the
// settlement. It takes some round trips.
func (s *Store) Settled(ctx context.Context, replay Replay) (ChangeKind, error) {
	if replay.Stream != s.cfg.StreamName() {
		return "", nil
	}
	prior, err := s.prior(ctx, replay)
	if err != nil && !errors.Is(err, ErrNoEntry) && !isNoStream(err) {
		return "", fmt.Errorf("look at the replay of dead letter %.100q: %w", replay.ID, err)
	}
	return prior.outcome, nil
}

// isClaim reports whether a change is that with which a replay began.
func (r *Replay) isClaim(c *Change) bool {
	return c.Kind == ChangeReplaying && c.Operation == r.Operation
}

// claim returns the sequence of the claim if it is where the message says, else 0:
// as long as nothing is stored after it, nothing else has to be read, not even the
// record, which may be large.
func (s *Store) claim(ctx context.Context, replay Replay) (uint64, error) {
	if replay.Claim == 0 {
		return 0, nil
	}
	m, err := s.api.Next(ctx, s.cfg.StreamName(), replay.Subject, replay.Claim)
	if err != nil || m == nil || m.Sequence != replay.Claim {
		return 0, err
	}
	if c := changeOf(m); c == nil || !replay.isClaim(c) {
		return 0, nil
	}
	return m.Sequence, nil
}

// changeOf is what a message says was done, or nil.
func changeOf(m *jsapi.Message) *Change {
	h, err := nats.DecodeHeadersMsg(m.Headers)
	if err != nil {
		return nil
	}
	c, err := DecodeChange(h, m.Data)
	if err != nil {
		return nil
	}
	return c
}

// A priorOutcome is what is on a dead letter's subject, as far as it concerns a
// replay.
type priorOutcome struct {
	state   State
	last    uint64     // sequence
	outcome ChangeKind // of this replay
}

// prior reads what is on a dead letter's subject. [ErrNoEntry] means that there is
// no record that this replay has claimed: what is given up must not be
// noted on a history without its message.
func (s *Store) prior(ctx context.Context, replay Replay) (p priorOutcome, err error) {
	p.state = StateOpen
	recorded, claimed := false, false
	for from := uint64(1); ; {
		m, err := s.api.Next(ctx, s.cfg.StreamName(), replay.Subject, from)
		if err != nil {
			return p, err
		}
		if m == nil {
			break
		}
		from, p.last = m.Sequence+1, m.Sequence
		c := changeOf(m)
		if c == nil {
			recorded = true
			continue
		}
		if c.Kind == ChangeDiscarded {
			return p, ErrNoEntry
		}
		p.state = c.Kind.state(p.state)
		claimed = claimed || replay.isClaim(c)
		if c.Operation == replay.Operation && (c.Kind == ChangeResolved || c.Kind == ChangeFailedAgain) {
			p.outcome = c.Kind
		}
	}
	if !recorded || !claimed {
		return p, ErrNoEntry
	}
	return p, nil
}
