package dlq

import (
	"time"

	"github.com/nats-io/nats.go"
)

// TallyLimits are what the tests make small.
type TallyLimits struct {
	Batch, Update, Entries, Stored, Consumers int
	Patience, Recount                         time.Duration
}

// NewTallyWith is NewTally with other limits. Zero is the default.
func NewTallyWith(s *Store, l TallyLimits) *Tally {
	t := NewTally(s)
	set := func(to *int, n int) {
		if n > 0 {
			*to = n
		}
	}
	set(&t.limits.batch, l.Batch)
	set(&t.limits.update, l.Update)
	set(&t.limits.entries, l.Entries)
	set(&t.limits.stored, l.Stored)
	set(&t.limits.consumers, l.Consumers)
	t.limits.patience, t.limits.recount = l.Patience, l.Recount
	return t
}

// At reports whether the tally has counted up to a sequence.
func (t *Tally) At(sequence uint64) bool {
	return t.known != nil && t.known.Counted && t.known.Sequence == sequence
}

// FromStart reports whether the tally reads the stream from the start, and up to
// where it has.
func (t *Tally) FromStart() (sequence uint64, ok bool) {
	if t.work == nil || !t.work.fromStart {
		return 0, false
	}
	return t.work.sequence, true
}

// Keeps reports whether the tally has the entries in its memory.
func (t *Tally) Keeps() bool { return t.work != nil }

// FillFold returns what keeps n open entries in memory.
func FillFold(n int) any {
	f := newFold(time.Time{}, defaultTallyLimits())
	h := nats.Header{HeaderVersion: {"1"}, HeaderID: {"a"}, HeaderEvent: {"a/b/v1"}}
	for i := range n {
		f.open("monotel.dlq.DLQ.orders.billing."+ID("orders", time.Time{}, "billing", uint64(i)), h, time.Unix(int64(i), 0))
	}
	return f
}
