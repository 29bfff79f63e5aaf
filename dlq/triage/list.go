package triage

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"strings"

	"github.com/monotel/monotel/dlq"
)

// A Selection says which dead letters are meant: those that meet all that it
// asks for. The zero value is every one that is open.
type Selection struct {
	IDs    []string    // these alone, in whatever state unless States is set
	Where  *Query      // that it is true for
	Groups []string    // of one of these groups, by their fingerprints
	States []dlq.State // the default is open
	Upto   uint64      // whose record's sequence is not greater; 0 is all there are now
	Limit  int         // this many of the newest, also of IDs; 0 is all
}

// states are those that are asked for; nil is every one.
func (s *Selection) states() []dlq.State {
	if len(s.States) > 0 || len(s.IDs) > 0 {
		return s.States
	}
	return []dlq.State{dlq.StateOpen}
}

// Entries lists the selected dead letters, each once, without their history: newest
// first, or in the order of the IDs if there are some and no limit.
// Payloads are read if payload is true or the query looks at them; else Data is
// nil. The payload is that of the latest edit.
//
// An entry that cannot be read whole comes with an error beside it that says what
// is missing, and the list goes on. An error without an entry is of a message that
// is no dead letter if it is a [dlq.ErrNotARecord], and the list goes on; else it
// ends it.
//
// It reads the stream from its end to its beginning, or until the limit is
// reached. Memory follows the entries that were changed, and not all.
func (d *Desk) Entries(ctx context.Context, sel Selection, payload bool) iter.Seq2[*dlq.Entry, error] {
	return func(yield func(*dlq.Entry, error) bool) {
		if len(sel.IDs) > 0 {
			d.entriesByID(ctx, sel, payload, yield)
			return
		}
		info, err := d.info(ctx)
		if err != nil {
			yield(nil, err)
			return
		}
		if sel.Upto == 0 {
			sel.Upto = info.State.LastSeq
		}
		l := &listing{
			d: d, sel: sel, states: sel.states(), payload: payload || sel.Where != nil && sel.Where.UsesPayload(),
			seen: newLaters(), left: sel.Limit, yield: yield,
		}
		for messages, err := range d.chunksBackwards(ctx, max(info.State.FirstSeq, 1), info.State.LastSeq, !l.payload) {
			if err != nil {
				yield(nil, err)
				return
			}
			for i := range slices.Backward(messages) {
				if !l.visit(ctx, &messages[i]) {
					return
				}
			}
		}
	}
}

// A listing is one run over the dead-letter stream.
type listing struct {
	d       *Desk
	sel     Selection
	states  []dlq.State
	payload bool
	seen    *laters
	left    int // until the limit
	yield   func(*dlq.Entry, error) bool
}

// visit looks at a message, which is older than all before it. It reports whether
// to go on.
func (l *listing) visit(ctx context.Context, m *message) bool {
	if l.seen.isBeforeTrace(m) {
		l.d.unfinished(m.subject)
		return true
	}
	trace := dlq.IsTrace(m.header)
	if !trace && dlq.IsChange(m.header) {
		l.seen.add(m)
		return true
	}
	last, state := m.sequence, dlq.StateOpen
	switch {
	case trace:
		last, state = l.seen.addTrace(m), dlq.StateDiscarded
	case m.isRecord():
		state = l.seen.state(m)
	}
	if m.sequence > l.sel.Upto {
		return true
	}
	if l.states != nil && !slices.Contains(l.states, state) {
		if m.isRecord() {
			l.seen.drop(m)
		} else {
			l.seen.see(m)
		}
		return true
	}
	e, err := l.d.entry(ctx, m, l.seen, trace, l.payload)
	if trace && e != nil {
		e.Last = last
	}
	switch {
	case e == nil:
		return l.yield(nil, err)
	case !l.d.wanted(ctx, &l.sel, e):
		if ctx.Err() != nil { // which is why it is not
			l.yield(nil, context.Cause(ctx))
		}
		return ctx.Err() == nil
	case !l.yield(e, err):
		return false
	}
	l.left--
	return l.left != 0
}

// entry makes an entry of its record and what was seen later.
func (d *Desk) entry(ctx context.Context, m *message, seen *laters, trace, payload bool) (*dlq.Entry, error) {
	r, err := m.record(!payload)
	if r == nil {
		seen.see(m) // it is on the subject all the same
		return nil, fmt.Errorf("message %d of stream %q: %w", m.sequence, d.cfg.Stream, err)
	}
	err = joined(err, d.placed(r, m.subject))
	e := dlq.NewEntry(r, m.sequence, nil)
	if trace {
		if c, changeErr := dlq.DecodeChange(m.header, nil); changeErr == nil {
			c.Sequence = m.sequence
			e.Apply(c)
		}
	}
	seen.take(e, m)
	if payload {
		err = joined(err, d.loadCurrent(ctx, e))
	}
	return e, err
}

// loadCurrent puts the payload and headers of the latest edit into the entry's
// record, or fetches those that are elsewhere.
func (d *Desk) loadCurrent(ctx context.Context, e *dlq.Entry) error {
	current, err := d.Current(ctx, e)
	if current == nil {
		return err
	}
	e.Record = current
	return err
}

func (d *Desk) wanted(ctx context.Context, sel *Selection, e *dlq.Entry) bool {
	if len(sel.Groups) > 0 && !slices.Contains(sel.Groups, d.cfg.Fingerprint(e)) {
		return false
	}
	if sel.Where == nil {
		return true
	}
	ok, err := sel.Where.match(ctx, e, d.cfg.Fingerprint)
	return err == nil && ok
}

// entriesByID looks up each of the selected IDs. Two IDs may be of one entry: a
// beginning is enough.
func (d *Desk) entriesByID(ctx context.Context, sel Selection, payload bool, yield func(*dlq.Entry, error) bool) {
	seen := make(map[string]bool, len(sel.IDs))
	newest := &newestEntries{limit: sel.Limit}
	for _, id := range sel.IDs {
		e, err := d.Get(ctx, id)
		if e == nil {
			yield(nil, err)
			return
		}
		if seen[e.ID] {
			continue
		}
		seen[e.ID] = true
		e.History = nil
		if sel.States != nil && !slices.Contains(sel.States, e.State) {
			continue
		}
		if payload {
			err = joined(err, d.loadCurrent(ctx, e))
		} else {
			r := *e.Record
			r.Data, e.Record = nil, &r
		}
		if (sel.Upto > 0 && e.Sequence > sel.Upto) || !d.wanted(ctx, &sel, e) {
			if ctx.Err() != nil {
				yield(nil, context.Cause(ctx))
				return
			}
			continue
		}
		if sel.Limit > 0 {
			newest.add(e, err)
		} else if !yield(e, err) {
			return
		}
	}
	for _, f := range newest.sorted() {
		if !yield(f.entry, f.err) {
			return
		}
	}
}

// newestEntries keeps the newest of the entries that are added, limit of them.
type newestEntries struct {
	limit int
	found []foundEntry
}

type foundEntry struct {
	entry *dlq.Entry
	err   error // beside the entry, see Entries
}

func (n *newestEntries) add(e *dlq.Entry, err error) {
	n.found = append(n.found, foundEntry{e, err})
	if len(n.found)/2 >= n.limit { // in bounded memory, sorted seldom
		n.found = n.sorted()
	}
}

func (n *newestEntries) sorted() []foundEntry {
	slices.SortFunc(n.found, func(a, b foundEntry) int { return cmp.Compare(b.entry.Sequence, a.entry.Sequence) })
	kept := n.found[:min(len(n.found), n.limit)]
	clear(n.found[len(kept):])
	return kept
}

// An Event is what Tail reports: a new dead letter, or a change of one.
type Event struct {
	ID       string
	Sequence uint64
	Record   *dlq.Record // of a new dead letter, without its payload; else nil
	Change   *dlq.Change // else nil
}

// Stats are the numbers of a dead-letter stream.
type Stats struct {
	Stream     string
	States     map[dlq.State]int
	Reasons    map[dlq.Reason]int // of the open ones: the 100 with the most
	Consumers  map[string]int     // of the open ones, as stream/consumer: the 100 with the most
	Oldest     *dlq.Entry         // of the open ones, by when it failed first; nil if there is none
	Newest     *dlq.Entry
	Bytes      uint64 // of the stream
	MaxBytes   int64  // its limit, -1 without one
	Unreadable int    // messages that are no dead letters

	OtherReasons, OtherConsumers Others // that are left out of Reasons and Consumers
}

// Others are what a list leaves out.
type Others struct {
	Count int // how many; from 100 000 on, at least so many
	Open  int // their open dead letters
}

// A tally counts by names that records choose, and so may be any number of any length.
type tally[K ~string] struct {
	counts map[K]int
	others Others // beyond what is kept
}

func (t *tally[K]) add(name K) {
	const distinct, longest = 100_000, 600
	if len(name) > longest {
		name = name[:longest]
	}
	if _, ok := t.counts[name]; !ok && len(t.counts) >= distinct {
		t.others.Count = 1
		t.others.Open++
		return
	}
	t.counts[K(strings.Clone(string(name)))]++
}

// largest returns the largest counts, and what they leave out.
func (t *tally[K]) largest() (map[K]int, Others) {
	const most = 100
	if len(t.counts) <= most {
		return t.counts, t.others
	}
	names := slices.SortedFunc(maps.Keys(t.counts), func(a, b K) int {
		return cmp.Or(cmp.Compare(t.counts[b], t.counts[a]), cmp.Compare(a, b))
	})
	kept := make(map[K]int, most)
	for i, name := range names {
		if i < most {
			kept[name] = t.counts[name]
			continue
		}
		t.others.Count++
		t.others.Open += t.counts[name]
	}
	return kept, t.others
}

// Stats counts the dead letters. It reads them all, headers only.
func (d *Desk) Stats(ctx context.Context) (*Stats, error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	s := &Stats{
		Stream: d.cfg.Stream, Bytes: info.State.Bytes, MaxBytes: info.Config.MaxBytes,
		States: make(map[dlq.State]int),
	}
	reasons, consumers := tally[dlq.Reason]{counts: make(map[dlq.Reason]int)}, tally[string]{counts: make(map[string]int)}
	for e, err := range d.Entries(ctx, Selection{States: dlq.States()}, false) {
		if e == nil {
			if !isNotARecord(err) {
				return nil, err
			}
			s.Unreadable++
			continue
		}
		s.States[e.State]++
		if e.State != dlq.StateOpen {
			continue
		}
		reasons.add(e.Failure.Reason)
		consumers.add(e.Stream + "/" + e.Consumer)
		if s.Oldest == nil || e.Failed.Before(s.Oldest.Failed) {
			s.Oldest = e
		}
		if s.Newest == nil || e.Failed.After(s.Newest.Failed) {
			s.Newest = e
		}
	}
	s.Reasons, s.OtherReasons = reasons.largest()
	s.Consumers, s.OtherConsumers = consumers.largest()
	return s, nil
}

// Tail reports new dead letters and changes as they come, until ctx ends, which
// is no error. It begins with what comes now, or with sequence from of the
// dead-letter stream if that is not 0.
func (d *Desk) Tail(ctx context.Context, from uint64) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		if from == 0 {
			info, err := d.info(ctx)
			if err != nil {
				yield(Event{}, err)
				return
			}
			from = info.State.LastSeq + 1
		}
		for m, err := range d.follow(ctx, from) {
			if err != nil {
				if ctx.Err() == nil {
					yield(Event{}, err)
				}
				return
			}
			ev := Event{ID: m.id(), Sequence: m.sequence}
			if dlq.IsChange(m.header) {
				ev.Change, err = dlq.DecodeChange(m.header, nil)
				if ev.Change != nil {
					ev.Change.Sequence = m.sequence
				}
			} else {
				ev.Record, err = m.record(true)
			}
			if !yield(ev, err) {
				return
			}
		}
	}
}

func matchesBeginning(ids []string, beginning string) []string {
	var found []string
	for _, id := range ids {
		if strings.HasPrefix(id, beginning) {
			found = append(found, id)
		}
	}
	return found
}
