package triage

import (
	"context"
	"maps"
	"slices"
)

// unfinished notes the subject of a discarded dead letter that still has something
// before its trace.
func (d *Desk) unfinished(subject string) {
	const most = 10_000
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.halfDone == nil {
		d.halfDone = make(map[string]struct{})
	}
	if len(d.halfDone) < most {
		d.halfDone[subject] = struct{}{}
	}
}

// FinishDiscards deletes what is still stored of discarded dead letters, as far as this
// desk has come across them when it read: a process that discards may end before it has
// done so, or lack the permission. Every change of the desk begins with it. What cannot
// be deleted counts as discarded all the same.
func (d *Desk) FinishDiscards(ctx context.Context) error {
	if err := d.changes(); err != nil {
		return err
	}
	d.mu.Lock()
	subjects := slices.Collect(maps.Keys(d.halfDone))
	d.halfDone = nil
	d.mu.Unlock()
	for _, subject := range subjects {
		if _, err := d.store.FinishDiscard(ctx, subject); err != nil {
			return err
		}
	}
	return nil
}
