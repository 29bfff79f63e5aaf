package triage

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"
)

// Whoever may write to the bucket of operations can write one that this package would
// not have written. It is checked as a whole when it is read, before anything follows
// one of its numbers.

// ErrUnreadable reports a plan or operation that is stored and is not what this package
// stores. It is left in its bucket.
var ErrUnreadable = errors.New("cannot be read")

const (
	longestStored     = 8 << 20  // bytes of an operation, without its selection
	longestStoredText = 64 << 10 // bytes of a text in it
	longestList       = 100_000  // of texts, groups and the like
	longestID         = 64

	mostSelected  = 100_000_000 // more than the bucket has room for
	mostCounted   = math.MaxInt32
	mostConsumers = 10_000
	mostSteps     = 1000    // of a canary
	mostInSteps   = 1 << 30 // messages, together
	lastSequence  = math.MaxInt64

	slowest = 1.0 / (24 * 60 * 60) // messages a second: one a day
	fastest = 1e9
)

// decodeStored reads an operation as it is stored under an ID.
func decodeStored(id string, value []byte) (*stored, error) {
	unreadable := func(err error) error {
		return fmt.Errorf("operation %s: %w: %w; `nats kv purge` removes it", id, ErrUnreadable, err)
	}
	if len(value) > longestStored {
		return nil, unreadable(fmt.Errorf("it has %d bytes, want at most %d", len(value), longestStored))
	}
	s := &stored{}
	if err := json.Unmarshal(value, s); err != nil {
		return nil, unreadable(errors.New("it is not the JSON of an operation")) // the cause may quote it
	}
	if err := s.validate(id); err != nil {
		return nil, unreadable(err)
	}
	return s, nil
}

// validate returns the first thing that is wrong with what was read.
func (s *stored) validate(id string) error {
	p := &s.Plan
	switch {
	case s.Version != storedVersion:
		return fmt.Errorf("version %d, want %d", s.Version, storedVersion)
	case p.ID != id:
		return fmt.Errorf("it is of operation %.100q", p.ID)
	case p.Upto < 1 || p.Upto > lastSequence:
		return fmt.Errorf("upto is %d, want a sequence", p.Upto)
	case uint64(max(p.Selected, 0)) > p.Upto:
		return fmt.Errorf("selected is %d, of %d", p.Selected, p.Upto)
	case s.Cursor < 0 || s.Cursor > p.Selected:
		return fmt.Errorf("cursor is %d of %d", s.Cursor, p.Selected)
	case s.Counted.Upto > lastSequence:
		return fmt.Errorf("counted.upto is %d, want a sequence", s.Counted.Upto)
	case !slices.Contains([]Status{StatusPlanned, StatusRunning, StatusPaused, StatusStopped, StatusCancelled, StatusDone}, s.Status):
		return fmt.Errorf("status is %.100q", s.Status)
	case !slices.Contains([]Status{"", StatusPaused, StatusCancelled}, s.Want):
		return fmt.Errorf("want is %.100q", s.Want)
	}
	if err := s.numbers(); err != nil {
		return err
	}
	if err := s.texts(); err != nil {
		return err
	}
	for i := range p.Consumers {
		if why := nameProblem(p.Consumers[i].Stream, p.Consumers[i].Consumer); why != "" {
			return fmt.Errorf("consumer %d: %s", i+1, why)
		}
	}
	if p.Options.Target == "" || p.Options.MaxReplays < 1 {
		return errors.New("its options have no target or no limit of replays")
	}
	return p.Options.validate()
}

// A number of what was read, and the most that it may be.
type number struct {
	name string
	n    int64
	most int64
}

// numbers returns the first number that is out of bounds.
func (s *stored) numbers() error {
	p, n := &s.Plan, &s.Counted
	all := []number{
		{"selected", int64(p.Selected), mostSelected},
		{"bytes", p.Bytes, math.MaxInt64},
		{"duration", int64(p.Duration), math.MaxInt64},
		{"consumers", int64(len(p.Consumers)), mostConsumers},
		{"groups", int64(len(p.Groups)), longestList},
		{"warnings", int64(len(p.Warnings)), longestList},
		{"problems", int64(len(p.Problems)), longestList},
		{"left out", int64(len(p.LeftOut)), longestList},
		{"skipped", int64(len(s.Skipped)), longestList},
		{"counted.claimed", int64(n.Claimed), mostCounted},
		{"counted.resolved", int64(n.Resolved), mostCounted},
		{"counted.failed_again", int64(n.FailedAgain), mostCounted},
		{"counted.sent", int64(n.Sent), mostCounted},
		{"counted.released", int64(n.Released), mostCounted},
		{"counted.new", int64(n.New), mostCounted},
		{"counted.skipped", int64(len(n.Skipped)), longestList},
	}
	for _, counts := range []map[string]int{p.LeftOut, s.Skipped, n.Skipped} {
		for _, k := range counts {
			all = append(all, number{"the count of a reason", int64(k), mostCounted})
		}
	}
	for i := range p.Consumers {
		c := &p.Consumers[i]
		all = append(all, number{"the count of a consumer", int64(c.Count), mostCounted}, number{"waiting", int64(c.Waiting), mostCounted})
	}
	for i := range p.Groups {
		all = append(all, number{"the count of a group", int64(p.Groups[i].Count), mostCounted},
			number{"the samples of a group", int64(len(p.Groups[i].Samples)), mostCounted})
	}
	for _, n := range all {
		if n.n < 0 || n.n > n.most {
			return fmt.Errorf("%s is %d, want 0 to %d", n.name, n.n, n.most)
		}
	}
	return nil
}

// texts returns the first text that is too long, or time that is none.
func (s *stored) texts() error {
	p := &s.Plan
	if len(p.Query) > longestQuery {
		return fmt.Errorf("its query has %d bytes, want at most %d", len(p.Query), longestQuery)
	}
	texts := slices.Concat([]string{p.Actor, p.Group, s.Why, s.WantBy, s.Runner, p.Options.Reason}, p.Warnings, p.Problems)
	times := []time.Time{p.Created, p.Oldest, p.Newest, s.Started, s.Ended}
	for i := range p.Groups {
		g := &p.Groups[i]
		texts = append(texts, g.ID, g.Title, g.Stream, g.Consumer, g.ErrorType)
		texts = append(texts, g.Samples...)
		times = append(times, g.First, g.Last)
	}
	for _, counts := range []map[string]int{p.LeftOut, s.Skipped, s.Counted.Skipped} {
		for why := range counts {
			texts = append(texts, why)
		}
	}
	for _, text := range texts {
		if len(text) > longestStoredText {
			return fmt.Errorf("a text has %d bytes, want at most %d", len(text), longestStoredText)
		}
	}
	const first, last = 1900, 2200
	for _, t := range times {
		if !t.IsZero() && (t.Year() < first || t.Year() > last) {
			return fmt.Errorf("a time is of the year %d", t.Year())
		}
	}
	return nil
}

// validItems returns an error unless a selection is one that a plan has frozen: as many
// entries as it says, each once, and none that came later. Earlier versions did not sort
// those that were selected by ID.
func validItems(p *Plan, items []item) error {
	if len(items) != p.Selected {
		return fmt.Errorf("%w: it has %d entries, want %d", errSelection, len(items), p.Selected)
	}
	bySequence := func(a, b item) int { return cmp.Compare(a.sequence, b.sequence) }
	if !slices.IsSortedFunc(items, bySequence) {
		items = slices.SortedFunc(slices.Values(items), bySequence)
	}
	before := uint64(0)
	for _, i := range items {
		if i.sequence <= before || i.sequence > p.Upto || i.last < i.sequence || i.last > lastSequence || i.edit > i.last {
			return errSelection
		}
		before = i.sequence
	}
	return nil
}
