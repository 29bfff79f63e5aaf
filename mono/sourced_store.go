package mono

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// pauseNotes makes no requests for a while. Until then this process knows what it
// has finished itself.
func (c *streamConsumer) pauseNotes(err error) {
	if c.rt.whileConnected().Err() != nil {
		return // everybody knows, and a request fails at once
	}
	c.repeats.pause = uptime() + notePause
	c.report(slog.LevelWarn, "finished sourced messages not looked up or noted; a repeat that another instance or an earlier run has handled is handled again",
		nil, jetStreamError(err), slog.String("notes", repeatsStream))
}

// readNote takes over what other instances, and earlier runs, have written. r.mu is held.
func (c *streamConsumer) readNote(o *origin, n *keptNote, sequence uint64) {
	now := uptime()
	if now < c.repeats.pause {
		return
	}
	ctx, cancel := context.WithTimeout(c.rt.whileConnected(), noteTimeout)
	defer cancel()
	if err := c.mergeNote(ctx, n); err != nil {
		c.pauseNotes(err)
		return
	}
	n.read = now
	if highest, stored := n.last(); stored > 0 {
		o.came(sequence-sequence%noteSize+highest, stored)
	}
}

// mergeNote reads a note. That there is none, or no stream for it, is no error.
func (c *streamConsumer) mergeNote(ctx context.Context, n *keptNote) error {
	r := &c.repeats
	if r.stream == nil {
		s, err := c.rt.js.Stream(ctx, repeatsStream)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			n.revision = 0
			return nil
		}
		if err != nil {
			return err
		}
		r.stream = s
	}
	msg, err := r.stream.GetLastMsgForSubject(ctx, n.subject)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		n.revision = 0
		return nil
	case errors.Is(err, jetstream.ErrStreamNotFound), errors.Is(err, jetstream.ErrNoStreamResponse):
		r.stream, n.revision = nil, 0
		return nil
	case err != nil:
		return err
	}
	n.revision = msg.Sequence
	other, err := decodeNote(msg.Data)
	if err != nil {
		return nil //nolint:nilerr // of a later release, or of nobody: it tells nothing, and is replaced
	}
	n.merge(&other)
	return nil
}

// writeNotes writes down what was finished since it was last called. It runs once at a
// time, and holds no lock while it waits for the server.
func (c *streamConsumer) writeNotes(parent context.Context) {
	r := &c.repeats
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, n := range r.unwritten() {
		if uptime() < r.pause || parent.Err() != nil {
			break
		}
		ctx, cancel := context.WithTimeout(parent, noteTimeout)
		err := c.writeNote(ctx, n)
		cancel()
		if err != nil {
			n.dirty = true
			c.pauseNotes(err)
		}
	}
	r.timer = nil
	if len(r.unwritten()) > 0 { // finished meanwhile, or it could not be written
		c.writeLater()
	}
}

// writeNote stores a note, unless another instance has written it meanwhile, whose
// note is then merged. r.mu is held, and released while it waits for the server.
func (c *streamConsumer) writeNote(ctx context.Context, n *keptNote) error {
	for try := 1; ; try++ {
		ack, began, err := c.publishNote(ctx, n)
		if err == nil {
			n.revision, n.read = ack.Sequence, began
			return nil
		}
		switch {
		case try == noteTries:
			return err
		case errors.Is(err, jetstream.ErrNoStreamResponse):
			err = c.makeNotes(ctx)
			n.revision = 0
		case jsapi.Is(err, jetstream.JSErrCodeStreamWrongLastSequence):
			err = c.mergeNote(ctx, n)
		}
		if err != nil {
			return err
		}
	}
}

func (c *streamConsumer) publishNote(ctx context.Context, n *keptNote) (ack *jetstream.PubAck, began time.Duration, err error) {
	body, revision := n.encode(), n.revision
	n.dirty = false // what is finished meanwhile makes it so again
	c.repeats.mu.Unlock()
	defer c.repeats.mu.Lock()
	began = uptime()
	ack, err = c.rt.js.Publish(ctx, n.subject, body, jetstream.WithExpectStream(repeatsStream),
		jetstream.WithExpectLastSequencePerSubject(revision), jetstream.WithRetryAttempts(0))
	return ack, began, err
}

// makeNotes makes the stream for notes, with as many replicas as the consumer's own.
func (c *streamConsumer) makeNotes(ctx context.Context) error {
	own, err := c.rt.js.Stream(ctx, c.info.Stream)
	if err != nil {
		return err
	}
	s, err := c.rt.js.CreateStream(ctx, StreamConfig{
		Name:              repeatsStream,
		Description:       "which sourced messages the consumers of monotel have finished",
		Subjects:          []string{repeatsSubject + ">"},
		Replicas:          own.CachedInfo().Config.Replicas,
		Storage:           own.CachedInfo().Config.Storage,
		MaxBytes:          repeatsMaxBytes,
		MaxMsgsPerSubject: 1,
		Discard:           jetstream.DiscardOld,
	})
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
		return nil // another instance was quicker
	}
	c.repeats.stream = s
	return err
}
