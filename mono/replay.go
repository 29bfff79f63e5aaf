package mono

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// unwrap makes a replayed message look like the one that failed: its subject is
// the event's, and what only steered its publish is gone, which whoever sends it on
// would trip over.
func (c *streamConsumer) unwrap(m *Msg) {
	replay, ok := dlq.ParseReplay(c.info.Stream, c.info.Durable, m.Subject, m.Header)
	if !ok {
		return
	}
	m.replay, m.Subject = &replay, c.info.Event.Subject
	maps.DeleteFunc(m.Header, func(k string, _ []string) bool { return strings.HasPrefix(k, "Nats-Expected-") })
}

// links are the traceparents of what the message is a replay of.
func (m *Msg) links() []string {
	if m.replay == nil {
		return nil
	}
	return m.Header[dlq.HeaderReplayLinks]
}

// ownHeader returns a copy of a message's header without what replaying it has
// added.
func (*streamConsumer) ownHeader(m *Msg) Header {
	h := cloneHeader(m.Header)
	if m.replay != nil {
		maps.DeleteFunc(h, func(k string, _ []string) bool {
			return strings.HasPrefix(k, dlq.ReplayHeaderPrefix) || strings.HasPrefix(k, "Nats-")
		})
	}
	return h
}

// resolve notes on a dead letter that its replay was handled. It returns when that
// is stored, or when there is nothing to note it on.
func (c *streamConsumer) resolve(m *Msg) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), captureTimeout)
	defer cancel()
	err := c.outcome(ctx, m, nil)
	if errors.Is(err, dlq.ErrNoEntry) {
		c.report(slog.LevelWarn, "replayed message handled, its dead letter is gone", m, nil, slog.String("dead_letter", m.replay.ID))
		return nil
	}
	return err
}

// failedAgain notes on a dead letter that its replay was given up, and returns its
// ID. It is "" if there is none to note it on.
func (c *streamConsumer) failedAgain(ctx context.Context, m *Msg, v verdict) (id string, err error) {
	if m.replay == nil {
		return "", nil
	}
	switch err = c.outcome(ctx, m, &v); {
	case errors.Is(err, dlq.ErrNoEntry):
		return "", nil
	case err != nil:
		return "", err
	}
	return m.replay.ID, nil
}

// outcome stores what has come of a replay; it failed if v is not nil.
func (c *streamConsumer) outcome(ctx context.Context, m *Msg, v *verdict) (err error) {
	dead := c.rt.dead
	msg := c.message(m)
	op := c.tel.Outcome(ctx, &m.tel, &msg)
	written := false
	defer func() {
		if errors.Is(err, dlq.ErrNoEntry) {
			return // it is not this that has failed
		}
		op.End(v != nil, written, err)
	}()
	if dead.isPaused() {
		return errCapturePaused
	}
	store := func() error {
		var failure *dlq.Record
		if v != nil {
			failure = c.record(m, *v)
			failure.Traceparent, failure.OriginTraceparent = op.Attempt, op.Origin
		}
		written, err = dead.store.Outcome(ctx, *m.replay, dead.app, failure, op.Header)
		return err
	}
	err = store()
	mine := v == nil || !c.leaseEnded(m)
	if mine && (errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, jetstream.ErrStreamNotFound)) && dead.restore(ctx) == nil {
		err = store()
	}
	if err != nil && concernsAll(err) {
		dead.pause()
	}
	return err
}
