package triage

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"

	"github.com/monotel/monotel/dlq"
)

// releaseUnsent gives back what a runner had in hand when it ended: claimed, and
// neither sent nor settled.
func (d *Desk) releaseUnsent(ctx context.Context, s *stored) error {
	claims, err := d.unsettled(ctx, s)
	if err != nil {
		return fmt.Errorf("operation %s: look for what it had in hand, to give it back: %w; cancel it again", s.Plan.ID, err)
	}
	r := &runner{d: d, id: s.Plan.ID, s: s}
	n, err := each(claims, func(subject string, claim uint64) error { return r.releaseIfUnsent(ctx, subject, claim) })
	if err != nil {
		return fmt.Errorf("operation %s: of %d that it had in hand it is not known whether they are to be given back: cancel it again: %w",
			s.Plan.ID, n, err)
	}
	return nil
}

// each calls f for the claims, several at a time. It returns how many have failed, and
// one of the errors.
func each(claims map[string]uint64, f func(subject string, claim uint64) error) (failed int, err error) {
	queue := make(chan string)
	errs := make(chan error, len(claims))
	var all sync.WaitGroup
	for range min(inWork, len(claims)) {
		all.Go(func() {
			for subject := range queue {
				if err := f(subject, claims[subject]); err != nil {
					errs <- err
				}
			}
		})
	}
	for subject := range claims {
		queue <- subject
	}
	close(queue)
	all.Wait()
	if failed = len(errs); failed > 0 {
		err = <-errs
	}
	return failed, err
}

// claimedEntry is what a subject and its claim say of an entry, without reading it.
func claimedEntry(subject string, claim uint64) *dlq.Entry {
	var names [6]string // monotel.dlq.<dead-letter stream>.<stream>.<consumer>.<ID>
	copy(names[:], strings.Split(subject, "."))
	e := dlq.NewEntry(&dlq.Record{Stream: names[3], Consumer: names[4], ID: names[5]}, claim, nil)
	e.State = dlq.StateReplaying
	return e
}

// releaseIfUnsent gives an entry back, unless it is sent. If anything has come after
// the claim it is not released.
func (r *runner) releaseIfUnsent(ctx context.Context, subject string, claim uint64) error {
	e := claimedEntry(subject, claim)
	if !r.s.Plan.Options.tracked() {
		return r.release(ctx, e, whyUnknown)
	}
	there := false
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		there, err = r.isThere(ctx, e)
		return err
	})
	if there || err != nil {
		return err
	}
	return r.release(ctx, e, whyCancelled)
}

// unsettled are the subjects of the entries that an operation has claimed and that
// have no outcome, with the sequences of the claims. These are all after its
// selection was frozen.
func (d *Desk) unsettled(ctx context.Context, s *stored) (map[string]uint64, error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	claims := make(map[string]uint64)
	for lo := s.Plan.Upto + 1; lo <= info.State.LastSeq; {
		rd, err := d.readSome(ctx, lo, min(lo+chunk-1, info.State.LastSeq), true)
		if err != nil {
			return nil, err
		}
		lo = rd.upto + 1
		for i := range rd.messages {
			m := &rd.messages[i]
			if m.header.Get(dlq.HeaderChangeOperation) != s.Plan.ID {
				continue
			}
			switch dlq.ChangeKind(m.header.Get(dlq.HeaderChange)) {
			case dlq.ChangeReplaying:
				claims[m.subject] = m.sequence
			case dlq.ChangeEdited:
			default:
				delete(claims, m.subject)
			}
		}
	}
	return claims, nil
}

// resume sends what an earlier run has claimed and not sent. It counts as in
// flight, and the gate would wait for it.
func (r *runner) resume(ctx context.Context) error {
	claims, err := r.d.unsettled(ctx, r.s)
	if err != nil {
		return err
	}
	_, err = each(claims, func(subject string, claim uint64) error {
		var e *dlq.Entry
		err := r.retry(ctx, func(ctx context.Context) (err error) {
			if sent, err := r.sent(ctx, claimedEntry(subject, claim), claim); sent || err != nil {
				return err
			}
			e, err = r.d.getAt(ctx, subject)
			return err
		})
		switch {
		case e == nil: // it is sent, or gone
			return ignore(err, ErrNotFound)
		case errors.Is(err, errMisplaced):
			return nil
		case len(e.History) == 0 || e.History[len(e.History)-1].Sequence != claim: // somebody has taken it by force
			return nil
		}
		return r.sendEntry(ctx, e, claim)
	})
	return err
}
