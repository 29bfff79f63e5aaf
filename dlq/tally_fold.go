package dlq

import (
	"encoding/binary"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// isRecord reports whether a message is a dead letter, and not just what stays of
// one.
func isRecord(h nats.Header) bool {
	return first(h, HeaderVersion) != "" && first(h, HeaderID) != "" && !IsChange(h)
}

// A fold is what the messages up to a sequence come to.
type fold struct {
	limits   tallyLimits
	created  time.Time // of the stream
	sequence uint64
	entries  map[uint64]openEntry // by the hash of the subject
	names    []string             // of consumers
	more     []int                // by consumer: open ones that are not among the entries
	beyond   int                  // the sum of them

	base      uint64              // revision of what it goes on from
	subjects  uint64              // that the stream should have
	removed   uint64              // messages that it should lack
	discards  int                 // since that was known
	fromStart bool                // nothing that it goes on from is known
	began     time.Time           // then
	closed    map[uint64]struct{} // hashes of the subjects of records that are not open, when it reads from the start
}

// An openEntry is small, as there may be a million. A map of them takes about 25
// bytes for each.
type openEntry struct {
	since    uint32 // seconds since 1970
	consumer uint16
}

func newFold(created time.Time, l tallyLimits) *fold {
	return &fold{limits: l, created: created, entries: make(map[uint64]openEntry)}
}

// of reports whether it can go on with what the stream has now.
func (f *fold) of(p position) bool { return f.created.Equal(p.created) && f.sequence <= p.last }

// add takes a message. It reports whether that opens a dead letter which is not
// among the open ones, so that its record has to be looked up.
func (f *fold) add(subject string, h nats.Header, stored time.Time) (lookUp bool) {
	if first(h, jetstream.ExpectedLastSubjSeqHeader) == "0" {
		f.subjects++ // nothing was on its subject
	}
	if isRecord(h) {
		f.open(subject, h, stored)
		return false
	}
	kind, key := ChangeKind(oneLine(first(h, HeaderChange))), hashOf(subject)
	if kind == ChangeDiscarded {
		f.discards++
	}
	const asBefore = State("")
	to := kind.state(asBefore)
	if to == asBefore { // or it is neither a record nor a change
		return false
	}
	_, has := f.entries[key]
	// One of those beyond the limit is known by what the writer saw, and no better.
	among := f.beyond > 0 && State(first(h, HeaderChangeFrom)).Open()
	switch {
	case to.Open():
		return !has && !among
	case has:
		delete(f.entries, key)
		if f.fromStart && len(f.closed) < f.limits.entries {
			if f.closed == nil {
				f.closed = make(map[uint64]struct{})
			}
			f.closed[key] = struct{}{}
		}
	case among:
		f.close(subject)
	}
	return false
}

// leaves reports whether a message is a trace that may have something before it. When
// the stream is read from the start, that has come before.
func (f *fold) leaves(subject string, h nats.Header) bool {
	if !IsTrace(h) || !hasRead(h, 1) || first(h, jetstream.MsgRollup) != "" { // earlier versions removed it by a rollup
		return false
	}
	if !f.fromStart {
		return true
	}
	key := hashOf(subject)
	_, open := f.entries[key]
	_, closed := f.closed[key]
	return open || closed
}

// open takes the record of an open dead letter.
func (f *fold) open(subject string, h nats.Header, stored time.Time) {
	key := hashOf(subject)
	if _, has := f.entries[key]; has {
		return
	}
	name := OpenExternal
	if first(h, HeaderEvent) != "" {
		name = consumerOf(subject)
	}
	i := f.consumer(name)
	if len(f.entries) >= f.limits.entries {
		f.more[i]++
		f.beyond++
		return
	}
	since := stored
	_ = timeInto(&since, first(h, HeaderFailed)) // else it was then, or a little earlier
	seconds := min(max(since.Unix(), 0), math.MaxUint32)
	f.entries[key] = openEntry{since: uint32(seconds), consumer: uint16(i)} //nolint:gosec // both are in bounds
}

// close takes away one of those that are only counted.
func (f *fold) close(subject string) {
	i := slices.Index(f.names, consumerOf(subject))
	if i < 0 || f.more[i] == 0 {
		i = slices.Index(f.names, OpenExternal)
	}
	if i >= 0 && f.more[i] > 0 {
		f.more[i]--
		f.beyond--
	}
}

// consumer returns the index of a name.
func (f *fold) consumer(name string) int {
	i := slices.Index(f.names, name)
	if i < 0 && name != OpenExternal && name != OpenOther {
		named := 0
		for _, n := range f.names {
			if n != OpenExternal && n != OpenOther {
				named++
			}
		}
		if named >= f.limits.consumers {
			return f.consumer(OpenOther)
		}
	}
	if i < 0 {
		i = len(f.names)
		f.names, f.more = append(f.names, strings.Clone(name)), append(f.more, 0)
	}
	return i
}

// consumerOf is the consumer in a dead letter's subject, whose last part is its ID.
func consumerOf(subject string) string {
	subject = subject[:max(strings.LastIndexByte(subject, '.'), 0)]
	return subject[strings.LastIndexByte(subject, '.')+1:]
}

// counts returns the numbers by consumer.
func (f *fold) counts() []OpenCount {
	counts := make([]OpenCount, len(f.names))
	oldest := make([]uint32, len(f.names))
	for _, e := range f.entries {
		if c := &counts[e.consumer]; c.Count == 0 || e.since < oldest[e.consumer] {
			oldest[e.consumer] = e.since
		}
		counts[e.consumer].Count++
	}
	for i := range counts {
		if counts[i].Consumer = f.names[i]; counts[i].Count > 0 {
			counts[i].Oldest = time.Unix(int64(oldest[i]), 0).UTC()
		}
		counts[i].Count += f.more[i]
	}
	return counts
}

func (f *fold) encode() []byte {
	b := make([]byte, 0, entrySize*len(f.entries))
	for key, e := range f.entries {
		b = binary.BigEndian.AppendUint64(b, key)
		b = binary.BigEndian.AppendUint32(b, e.since)
		b = binary.BigEndian.AppendUint16(b, e.consumer)
	}
	return b
}

// hashOf stands for a subject: FNV-1a. That two of a million are alike happens once
// in thirty million streams.
func hashOf(subject string) uint64 {
	h := uint64(0xcbf29ce484222325)
	for i := range len(subject) {
		h = (h ^ uint64(subject[i])) * 0x100000001b3
	}
	return h
}
