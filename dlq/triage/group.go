package triage

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"time"

	"github.com/monotel/monotel/dlq"
)

// A Group is the dead letters that failed for the same cause: "2 000 failures are
// 3 errors".
type Group struct {
	ID        string    `json:"id"`    // its fingerprint
	Title     string    `json:"title"` // the text of the error, normalised
	Stream    string    `json:"stream"`
	Consumer  string    `json:"consumer"`
	ErrorType string    `json:"error_type,omitempty"`
	Count     int       `json:"count"` // of the entries that were selected
	First     time.Time `json:"first"` // when the first of them failed
	Last      time.Time `json:"last"`
	PerHour   float64   `json:"per_hour"`            // between First and Last, which counts as an hour at least
	Samples   []string  `json:"samples,omitempty"`   // IDs, newest first, at most 5
	Regressed bool      `json:"regressed,omitempty"` // it has failed since an entry of the group was resolved
}

const (
	// maxGroups bounds the memory that a fingerprint takes which is another one
	// for each message. What is beyond it is one group.
	maxGroups     = 10_000
	otherGroup    = "other"
	groupOfOthers = "(more groups than are kept)"
)

// Groups groups the selected dead letters, the largest group first. Which groups
// there are is decided by the latest failure of each entry.
//
// It reads the headers of the whole stream. Memory follows the number of groups,
// which is bounded.
func (d *Desk) Groups(ctx context.Context, sel Selection) ([]Group, error) {
	g := newGrouper(d.cfg.Fingerprint)
	states, limit := sel.states(), sel.Limit
	if states != nil && len(sel.IDs) == 0 && !slices.Contains(states, dlq.StateResolved) {
		// Those tell of groups that have failed again.
		sel.States, sel.Limit = append(slices.Clone(states), dlq.StateResolved), 0
	}
	n := 0
	for e, err := range d.Entries(ctx, sel, false) {
		if e == nil {
			if !isNotARecord(err) {
				return nil, err
			}
			continue
		}
		if states != nil && !slices.Contains(states, e.State) {
			g.resolved(e)
			continue
		}
		g.add(e)
		n++
		if n == limit {
			break
		}
	}
	return g.result(), nil
}

// GroupsOf groups entries, newest first, as Groups does.
func (d *Desk) GroupsOf(entries []*dlq.Entry) []Group {
	g := newGrouper(d.cfg.Fingerprint)
	for _, e := range entries {
		g.add(e)
	}
	return g.result()
}

// A grouper puts entries together.
type grouper struct {
	fingerprint func(*dlq.Entry) string
	groups      map[string]*Group
	resolvedAt  map[string]time.Time // when an entry of a group was first resolved
}

func newGrouper(fingerprint func(*dlq.Entry) string) *grouper {
	return &grouper{fingerprint: fingerprint, groups: make(map[string]*Group), resolvedAt: make(map[string]time.Time)}
}

// add counts an entry. The newest comes first.
func (g *grouper) add(e *dlq.Entry) {
	id := g.fingerprint(e)
	group := g.groups[id]
	if group == nil {
		if len(g.groups) >= maxGroups {
			id = otherGroup
			group = g.groups[id]
		}
		if group == nil {
			group = &Group{ID: strings.Clone(id), Title: groupOfOthers}
			if id != otherGroup {
				group.Title, group.Stream, group.Consumer, group.ErrorType = cause(e.Failure), e.Stream, e.Consumer, e.Failure.ErrorType
			}
			g.groups[group.ID] = group
		}
	}
	const samples = 5
	if len(group.Samples) < samples {
		group.Samples = append(group.Samples, strings.Clone(e.ID))
	}
	group.Count++
	failed := e.Failure.Failed
	if group.First.IsZero() || failed.Before(group.First) {
		group.First = failed
	}
	if failed.After(group.Last) {
		group.Last = failed
	}
}

// resolved notes an entry that is only there to tell of its group.
func (g *grouper) resolved(e *dlq.Entry) {
	id := g.fingerprint(e)
	if at, ok := g.resolvedAt[id]; (!ok || e.Changed.Before(at)) && len(g.resolvedAt) < maxGroups {
		g.resolvedAt[id] = e.Changed
	}
}

func (g *grouper) result() []Group {
	all := make([]Group, 0, len(g.groups))
	for _, group := range g.groups {
		group.PerHour = float64(group.Count) / max(group.Last.Sub(group.First).Hours(), 1)
		at, ok := g.resolvedAt[group.ID]
		group.Regressed = ok && at.Before(group.Last)
		all = append(all, *group)
	}
	slices.SortFunc(all, func(a, b Group) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), b.Last.Compare(a.Last), strings.Compare(a.ID, b.ID))
	})
	return all
}
