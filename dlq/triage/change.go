package triage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/shell"
)

// A Revision is what an edit makes of a message.
type Revision struct {
	Data   []byte
	Header nats.Header // the whole of it; nil leaves the headers as they are
	Reason string
}

// Edit adds a revision to a dead letter that is open or archived. It is what a
// replay sends from then on; the original stays. e is as [Desk.Get] or
// [Desk.Entries] returned it, and becomes what it is after the edit.
//
// If the entry has changed since e was read, nothing happens and the error is an
// [EntryError] of [ErrChanged]. Headers that begin with "Nats-" or "Dlq-" are
// refused with [ErrInvalid], unless they are as before: they say what the message
// is.
func (d *Desk) Edit(ctx context.Context, e *dlq.Entry, rev Revision) error {
	if err := d.allowed(e, "edit", dlq.StateOpen, dlq.StateArchived); err != nil {
		return err
	}
	before, err := d.Current(ctx, e)
	if err != nil {
		return err
	}
	if rev.Header == nil {
		rev.Header = before.Header
	} else if err := lockedHeaders(before.Header, rev.Header); err != nil {
		return fmt.Errorf("edit dead letter %s: %w", e.ID, err)
	}
	c := dlq.Change{
		Kind: dlq.ChangeEdited, Actor: d.cfg.Actor, Reason: rev.Reason, Revision: e.Revision + 1,
		Edit: &dlq.Record{Data: rev.Data, Header: rev.Header, BodySize: len(rev.Data)}, Diff: mergeDiff(before.Data, rev.Data),
	}
	if err := d.store.PutRevision(ctx, e.ID, &c); err != nil {
		return err
	}
	return d.apply(ctx, e, c)
}

// lockedHeaders refuses changes of headers that steer the server or belong to us.
func lockedHeaders(before, after nats.Header) error {
	locked := func(k string) bool {
		return hasPrefixFold(k, "Nats-") || hasPrefixFold(k, "Dlq-")
	}
	for _, pair := range [][2]nats.Header{{before, after}, {after, before}} {
		for k, v := range pair[0] {
			if locked(k) && !slices.Equal(v, pair[1][k]) {
				return fmt.Errorf("%w: header %.100q is not to be edited", ErrInvalid, k)
			}
		}
	}
	return nil
}

func hasPrefixFold(s, prefix string) bool {
	return len(s) >= len(prefix) && strings.EqualFold(s[:len(prefix)], prefix)
}

// Discard throws a dead letter away, in any state but while it is replayed. What
// is left is that it was, who has discarded it, when and why.
func (d *Desk) Discard(ctx context.Context, e *dlq.Entry, reason string) error {
	if err := d.allowed(e, "discard", dlq.StateOpen, dlq.StateSent, dlq.StateResolved, dlq.StateArchived); err != nil {
		if errors.Is(err, ErrState) { // it is discarded
			_ = d.FinishDiscards(ctx)
		}
		return err
	}
	return d.apply(ctx, e, dlq.Change{Kind: dlq.ChangeDiscarded, Actor: d.cfg.Actor, Reason: reason})
}

// Archive puts a dead letter aside. [Desk.Restore] takes it back.
func (d *Desk) Archive(ctx context.Context, e *dlq.Entry, reason string) error {
	if err := d.allowed(e, "archive", dlq.StateOpen, dlq.StateSent, dlq.StateResolved); err != nil {
		return err
	}
	return d.apply(ctx, e, dlq.Change{Kind: dlq.ChangeArchived, Actor: d.cfg.Actor, Reason: reason})
}

// Restore opens a dead letter again that is archived, resolved or sent.
func (d *Desk) Restore(ctx context.Context, e *dlq.Entry, reason string) error {
	if err := d.allowed(e, "restore", dlq.StateArchived, dlq.StateSent, dlq.StateResolved); err != nil {
		return err
	}
	return d.apply(ctx, e, dlq.Change{Kind: dlq.ChangeRestored, Actor: d.cfg.Actor, Reason: reason})
}

// allowed refuses what cannot be done in the entry's state, or at all.
func (d *Desk) allowed(e *dlq.Entry, what string, states ...dlq.State) error {
	if err := d.changes(); err != nil {
		return err
	}
	if slices.Contains(states, e.State) {
		return nil
	}
	err := fmt.Errorf("%w: cannot %s", ErrState, what)
	if e.State == dlq.StateReplaying {
		err = ErrClaimed
	}
	return entryError(e, err)
}

func entryError(e *dlq.Entry, err error) *EntryError {
	return &EntryError{ID: e.ID, Err: err, State: e.State, Actor: e.Actor, Operation: e.Operation, Changed: e.Changed}
}

// apply stores a change, and says who was quicker if somebody was.
func (d *Desk) apply(ctx context.Context, e *dlq.Entry, c dlq.Change) error {
	_ = d.FinishDiscards(ctx) // or the next change does
	err := d.store.Change(ctx, e, c, nil)
	switch {
	case errors.Is(err, dlq.ErrEntryChanged):
		return d.changed(ctx, e)
	case errors.Is(err, dlq.ErrStreamFull) && c.Kind == dlq.ChangeDiscarded: // it says what to do
		return fmt.Errorf("%w: %w", ErrFull, err)
	case errors.Is(err, dlq.ErrStreamFull):
		return fmt.Errorf("%w: raise its limit, such as with `%s`, or discard what is not needed: %w",
			ErrFull, shell.Command("nats stream edit", []string{d.cfg.Stream}, "--max-bytes 2GiB"), err)
	}
	return err
}

// changed says what has become of an entry that was changed meanwhile.
func (d *Desk) changed(ctx context.Context, e *dlq.Entry) error {
	now, err := d.getAt(ctx, d.store.SubjectOf(e.Record))
	if now == nil {
		return joined(entryError(e, ErrChanged), err)
	}
	if now.State == dlq.StateReplaying {
		return entryError(now, ErrClaimed)
	}
	return entryError(now, ErrChanged)
}
