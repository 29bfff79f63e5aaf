package dlq

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
)

// A State says what has become of a dead letter.
type State string

// The states.
const (
	StateOpen      State = "open"      // nothing was done yet, or it failed again
	StateReplaying State = "replaying" // it is on its way to the consumer that failed
	StateSent      State = "sent"      // it was replayed to others than the consumer that failed, who do not say what comes of it
	StateResolved  State = "resolved"  // that consumer has handled it
	StateArchived  State = "archived"  // somebody has put it aside
	StateDiscarded State = "discarded" // somebody has thrown it away; only a trace of it is left
)

// States lists the states.
func States() []State {
	return []State{StateOpen, StateReplaying, StateSent, StateResolved, StateArchived, StateDiscarded}
}

// A ChangeKind is what was done about a dead letter.
type ChangeKind string

// The kinds of changes.
const (
	ChangeReplaying   ChangeKind = "replaying"    // an operation has claimed it, and sends it
	ChangeSent        ChangeKind = "sent"         // an operation has sent it to others
	ChangeReleased    ChangeKind = "released"     // its operation has given it back, unsent or without an outcome
	ChangeResolved    ChangeKind = "resolved"     // the consumer has handled what was replayed
	ChangeFailedAgain ChangeKind = "failed_again" // the consumer has given up what was replayed
	ChangeEdited      ChangeKind = "edited"       // a new revision; the original stays
	ChangeArchived    ChangeKind = "archived"
	ChangeRestored    ChangeKind = "restored" // open again
	ChangeDiscarded   ChangeKind = "discarded"
)

// The headers of a change. Those of a failure are the record's.
const (
	HeaderChange          = "Dlq-Change"           // see ChangeKind
	HeaderChangeFrom      = "Dlq-Change-From"      // the state before
	HeaderChangeTime      = "Dlq-Change-Time"      // RFC 3339
	HeaderChangeActor     = "Dlq-Change-Actor"     // who
	HeaderChangeReason    = "Dlq-Change-Reason"    // JSON string: why
	HeaderChangeOperation = "Dlq-Change-Operation" // of the replay
	HeaderChangeTarget    = "Dlq-Change-Target"    // to whom it was replayed
	HeaderChangeRevision  = "Dlq-Change-Revision"  // number of an edit, from 1
	HeaderChangeDiff      = "Dlq-Change-Diff"      // JSON merge patch of an edit, if that is small
)

// A Change is one thing that was done about a dead letter: a message on its
// subject, after the record.
type Change struct {
	Kind      ChangeKind
	From      State // before
	Time      time.Time
	Actor     string // who did it; an App's name for an outcome
	Reason    string // why, in the actor's words
	Operation string // of a replay
	Target    string // of a replay: "consumer", "everyone" or "subject=…"
	Revision  int    // of an edit: its number, from 1

	// Diff is what an edit changed, as a JSON merge patch; empty if that is large
	// or the payload is not JSON.
	Diff json.RawMessage

	// Edit holds the payload and headers of an edit: Header, Data, Body,
	// BodyObject, BodySize and HeadersObject. It is nil for other changes.
	Edit *Record

	// Failure is how a replayed message failed: Reason, the error, the traces and
	// where it happened. It is nil for other changes.
	Failure *Record

	Sequence uint64 // in the dead-letter stream
}

// State is the state after a change. A discard is final.
func (k ChangeKind) state(from State) State {
	if from == StateDiscarded {
		return from
	}
	switch k {
	case ChangeReplaying:
		return StateReplaying
	case ChangeSent:
		return StateSent
	case ChangeResolved:
		return StateResolved
	case ChangeReleased, ChangeFailedAgain, ChangeRestored:
		return StateOpen
	case ChangeArchived:
		return StateArchived
	case ChangeDiscarded:
		return StateDiscarded
	case ChangeEdited:
		return from
	default: // of a newer version
		return from
	}
}

// To is the state after the change.
func (c *Change) To() State { return c.Kind.state(c.From) }

// header returns the headers of the change on the wire. id is the dead letter's.
func (c *Change) header(id string) nats.Header {
	h := make(nats.Header)
	if c.Failure != nil {
		f := *c.Failure
		f.Subject, f.Header, f.HeadersObject, f.Body, f.BodyObject, f.Unknown = "", nil, "", BodyInline, "", nil
		h = f.header()
	}
	if c.Edit != nil {
		e := Record{
			Header: c.Edit.Header, HeadersObject: c.Edit.HeadersObject,
			Body: c.Edit.Body, BodyObject: c.Edit.BodyObject, BodySize: c.Edit.BodySize,
		}
		h = e.header()
	}
	delete(h, HeaderVersion) // it would be taken for a record
	set := func(key, value string) {
		if value != "" {
			h[key] = []string{value}
		}
	}
	set(HeaderID, id)
	set(HeaderChange, string(c.Kind))
	set(HeaderChangeFrom, string(c.From))
	if !c.Time.IsZero() {
		set(HeaderChangeTime, c.Time.UTC().Format(time.RFC3339Nano))
	}
	set(HeaderChangeActor, oneLine(c.Actor))
	if c.Reason != "" {
		set(HeaderChangeReason, toJSON(c.Reason))
	}
	set(HeaderChangeOperation, oneLine(c.Operation))
	set(HeaderChangeTarget, oneLine(c.Target))
	if c.Revision > 0 {
		set(HeaderChangeRevision, strconv.Itoa(c.Revision))
	}
	set(HeaderChangeDiff, oneLine(string(c.Diff)))
	return h
}

// maxRevision bounds what the wire says: whoever discards the entry deletes as
// many objects.
const maxRevision = 10_000

// IsChange reports whether a message of the dead-letter stream is a change, and
// not a record.
func IsChange(h nats.Header) bool { return first(h, HeaderChange) != "" }

// IsTrace reports whether a message of the dead-letter stream is the trace of a
// discarded dead letter. What is on the subject before it is not deleted yet, and
// counts no more; nor does what comes after it.
func IsTrace(h nats.Header) bool {
	return ChangeKind(oneLine(first(h, HeaderChange))) == ChangeDiscarded && first(h, HeaderVersion) != "" && first(h, HeaderID) != ""
}

// DecodeChange reads a change. What cannot be read is left zero. It is nil, with
// [ErrNotARecord], if the message is no change. The change shares data.
func DecodeChange(h nats.Header, data []byte) (*Change, error) {
	kind := oneLine(first(h, HeaderChange))
	if kind == "" {
		return nil, fmt.Errorf("%w, and no change of one: it lacks %s", ErrNotARecord, HeaderChange)
	}
	c := &Change{
		Kind: ChangeKind(kind), From: State(oneLine(first(h, HeaderChangeFrom))), Actor: oneLine(first(h, HeaderChangeActor)),
		Operation: oneLine(first(h, HeaderChangeOperation)), Target: oneLine(first(h, HeaderChangeTarget)),
	}
	_ = timeInto(&c.Time, first(h, HeaderChangeTime))
	_ = jsonInto(&c.Reason, first(h, HeaderChangeReason))
	if _ = sizeInto(&c.Revision, first(h, HeaderChangeRevision)); c.Revision > maxRevision {
		c.Revision = 0
	}
	if d := oneLine(first(h, HeaderChangeDiff)); json.Valid([]byte(d)) {
		c.Diff = json.RawMessage(d)
	}
	switch c.Kind {
	case ChangeFailedAgain:
		c.Failure = decodePart(h, nil)
	case ChangeEdited:
		c.Edit = decodePart(h, data)
	default: // the others have no more to say
	}
	return c, nil
}

// decodePart reads the headers of a record that a change has.
func decodePart(h nats.Header, data []byte) *Record {
	part := make(nats.Header, len(h))
	for k, v := range h {
		if strings.HasPrefix(k, headerPrefix) && !strings.HasPrefix(k, HeaderChange) {
			part[k] = v
		}
	}
	part[HeaderVersion] = []string{"1"}
	if oneLine(first(part, HeaderID)) == "" {
		part[HeaderID] = []string{"_"}
	}
	r, _ := Decode(part, data)
	r.Unknown = nil
	return r
}

// An Entry is a dead letter with what has become of it.
type Entry struct {
	*Record

	State    State
	Sequence uint64 // of the record in the dead-letter stream

	// Last is the sequence of the latest message on its subject: the record's own,
	// or that of its latest change. Whoever changes the entry names it, so that of
	// two who do so at the same time one is told.
	Last uint64

	// Later has the sequences of what was read on its subject after the record, oldest
	// first: those of its changes, and of whatever else somebody has published there.
	Later []uint64

	Changed   time.Time // when it was last changed; zero: never
	Actor     string    // who changed it last
	Operation string    // that has replayed it last
	Replays   int       // how often it was replayed
	Failures  int       // how often it failed again

	// Revision is the number of the latest edit, 0 if there is none, and
	// RevisionSequence where that edit is in the dead-letter stream.
	Revision         int
	RevisionSequence uint64

	// Failure is the latest failure: of the latest replay that failed, or the
	// record itself.
	Failure *Record

	// History has the changes, oldest first. Lists leave it out.
	History []*Change
}

// NewEntry returns the entry of a record and its changes, oldest first.
func NewEntry(r *Record, sequence uint64, history []*Change) *Entry {
	e := &Entry{Record: r, Sequence: sequence, Last: sequence, State: StateOpen, Failure: r}
	for _, c := range history {
		e.Apply(c)
	}
	e.History = history
	return e
}

// Apply makes the entry what it is after a change. After a discard there is none.
func (e *Entry) Apply(c *Change) {
	if c.Sequence > e.Last {
		e.Later = append(e.Later, c.Sequence)
	}
	if e.State == StateDiscarded {
		e.Last = max(e.Last, c.Sequence)
		return
	}
	e.State, e.Changed, e.Actor = c.Kind.state(e.State), c.Time, c.Actor
	e.Last = max(e.Last, c.Sequence)
	if c.Operation != "" {
		e.Operation = c.Operation
	}
	switch c.Kind {
	case ChangeReplaying: // before each ChangeSent, too
		e.Replays++
	case ChangeFailedAgain:
		e.Failures++
		if c.Failure != nil {
			e.Failure = c.Failure
		}
	case ChangeEdited:
		e.Revision, e.RevisionSequence = max(c.Revision, e.Revision+1), c.Sequence
	default: // the state says it all
	}
}

// ParseState reads the name of a state.
func ParseState(s string) (State, error) {
	if !slices.Contains(States(), State(s)) {
		return "", fmt.Errorf("state %q: want one of %v", s, States())
	}
	return State(s), nil
}
