package triage

import (
	"context"
	"fmt"
	"maps"
	"time"
)

// tried is how many entries were taken in hand, in this run and before. r.mu is
// held.
func (r *runner) tried() int {
	return r.counted.Claimed - r.counted.Released + len(r.unseen) + r.inHand
}

// inFlight is how many of them have no outcome. r.mu is held.
func (r *runner) inFlight() int {
	n := &r.counted
	return n.Claimed - n.Released - n.Resolved - n.FailedAgain - n.Sent + len(r.unseen) + r.inHand
}

// gate waits until another entry, of so many bytes, may be taken in hand. It returns
// false if none may.
func (r *runner) gate(i, size int) bool {
	o := &r.s.Plan.Options
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		r.judge()
		switch {
		case r.ending != nil:
			return false
		case i-r.s.Cursor >= window:
		case r.bytes > 0 && r.bytes+size > mostBytes:
		case o.MaxInFlight > 0 && r.inFlight() >= o.MaxInFlight:
		case r.step < len(o.Canary) && r.tried() >= r.boundary(r.step):
			if r.inFlight() == 0 {
				r.step++
				continue
			}
		default:
			r.inHand++
			r.bytes += size
			return true
		}
		r.cond.Wait()
	}
}

// boundary is how many the canary has sent after a step.
func (r *runner) boundary(step int) int {
	n := 0
	for _, k := range r.s.Plan.Options.Canary[:step+1] {
		n += k
	}
	return n
}

// judge ends the operation if too many have failed again. r.mu is held.
func (r *runner) judge() {
	o := &r.s.Plan.Options
	if o.StopIfFailing <= 0 || r.ending != nil {
		return
	}
	failed := r.counted.FailedAgain - r.base.FailedAgain
	all := failed + r.counted.Resolved - r.base.Resolved
	complete := r.step < len(o.Canary) && r.inFlight() == 0 && all > 0
	if (complete || all >= outcomesToStop) && float64(failed) > o.StopIfFailing*float64(all) {
		r.endLocked(StatusStopped, fmt.Errorf("%d of %d outcomes are that it failed again, more than %.3g %%", failed, all, 100*o.StopIfFailing)) //nolint:mnd // percent
	}
}

// end has no more entries taken in hand. The first reason stands, unless another has
// the operation now. What somebody wants of it is looked at when the run is stored.
func (r *runner) end(status Status, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.endLocked(status, why)
}

func (r *runner) endLocked(status Status, why error) {
	if r.ending == nil || status == statusLost {
		r.ending, r.endStatus = why, status
	}
	r.stop()
	r.cond.Broadcast()
}

// statusLost is that of a run whose operation belongs to another.
const statusLost Status = ""

func (r *runner) isLost() bool { return r.ending != nil && r.endStatus == statusLost }

// follow counts what the dead-letter stream says, as it comes.
func (r *runner) follow(ctx context.Context) {
	for ctx.Err() == nil {
		r.mu.Lock()
		from := r.counted.Upto + 1
		r.mu.Unlock()
		for m, err := range r.d.follow(ctx, from) {
			if err != nil {
				break
			}
			r.mu.Lock()
			delete(r.unseen, m.sequence)
			before := r.inFlight()
			r.counted.add(m, r.id)
			if r.inFlight() < before {
				r.cond.Broadcast()
			}
			r.mu.Unlock()
		}
		if pause(ctx, time.Second/4) != nil { //nolint:mnd // then it tries again
			return
		}
	}
}

// checkpoint renews the lease, writes down how far the operation has come, and
// takes over what somebody else has stored: a wish to pause or cancel.
func (r *runner) checkpoint(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, lease/2) //nolint:mnd // then there is time for another
	defer cancel()
	r.mu.Lock()
	s := *r.s
	s.Skipped = maps.Clone(r.s.Skipped)
	s.Counted = r.counted.clone()
	r.mu.Unlock()
	now := time.Now().Round(0)
	err := r.d.update(ctx, &s)
	if isConflict(err) {
		other, loadErr := r.d.load(ctx, r.id)
		if loadErr != nil {
			return // the next time
		}
		switch {
		case other.Runner != s.Runner:
			r.end(statusLost, other.lost())
			return
		case other.Want != "":
			r.end(other.Want, fmt.Errorf("%s by %s", other.Want, other.WantBy))
		}
		s.revision, s.Want, s.WantBy = other.revision, other.Want, other.WantBy
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.s.revision, r.s.Want, r.s.WantBy = s.revision, s.Want, s.WantBy
	if err == nil {
		r.renewed = now
	}
}

// late reports whether another may have taken the operation over: the machine has
// slept, or had no connection.
func (r *runner) late() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return time.Now().Round(0).Sub(r.renewed).Abs() >= lease-heartbeat
}
