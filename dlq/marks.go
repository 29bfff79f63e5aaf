package dlq

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// Marks tell a message that brings its process down from one that was only
// delivered often. A mark is stored before such a message is handed to its handler,
// and removed with the outcome: what is left of marks counts the times that there was
// none. They are in a small stream of their own, which has room when the dead-letter
// stream has not. It is made with the first mark.

const (
	markPrefix    = "monotel.mark."
	marksMaxBytes = 4 << 20
	marksMaxAge   = 30 * 24 * time.Hour // a message that is gone leaves its mark
)

// marksName is the stream of the marks.
func (c Config) marksName() string { return c.StreamName() + "_MARKS" }

func (s *Store) markSubject(id string) string {
	return markPrefix + s.cfg.StreamName() + ".id." + token(id)
}

// A Mark counts how often a message was handed over without an outcome. The zero
// value says never.
type Mark struct {
	Count    int
	sequence uint64 // in the stream of the marks
}

// Mark reads the mark of a message. It takes a round trip.
func (s *Store) Mark(ctx context.Context, id string) (Mark, error) {
	m, err := s.api.Next(ctx, s.cfg.marksName(), s.markSubject(id), 1)
	if isNoStream(err) || err == nil && m == nil {
		return Mark{}, nil
	}
	if err != nil {
		return Mark{}, fmt.Errorf("read the mark of message %s: %w", id, err)
	}
	return Mark{Count: parseMark(m.Data), sequence: m.Sequence}, nil
}

// parseMark reads a count. What is not ours is none, and replaced; a count without
// room for another stays at the most.
func parseMark(data []byte) int {
	const most = 1 << 30
	n, err := strconv.ParseUint(string(data), 10, 32)
	if err != nil {
		return 0
	}
	return int(min(n, most))
}

// AddMark stores that a message is handed over once more than was says. It fails if
// somebody else has stored a mark since. It takes a round trip, and some more for the
// first mark there is.
func (s *Store) AddMark(ctx context.Context, id string, was Mark) error {
	err := s.withMarks(ctx, func() error {
		_, err := s.js.PublishMsg(ctx, &nats.Msg{Subject: s.markSubject(id), Data: strconv.AppendInt(nil, int64(was.Count)+1, 10)},
			jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(s.cfg.marksName()),
			jetstream.WithExpectLastSequencePerSubject(was.sequence))
		return err
	})
	if err != nil {
		return fmt.Errorf("mark message %s in stream %q: %w", id, s.cfg.marksName(), err)
	}
	return nil
}

// RemoveMark forgets a message, which has an outcome. It takes a round trip.
func (s *Store) RemoveMark(ctx context.Context, id string) error {
	type request struct {
		Filter string `json:"filter"`
	}
	var resp jsapi.None
	err := s.api.Request(ctx, jsapi.OpStreamPurge, s.cfg.marksName(), request{Filter: s.markSubject(id)}, &resp)
	if err != nil && !isNoStream(err) {
		return fmt.Errorf("remove the mark of message %s: %w", id, err)
	}
	return nil
}

func (s *Store) createMarks(ctx context.Context) error {
	cfg := s.cfg.streamConfig()
	err := s.reserve(marksMaxBytes, func(maxBytes int64) error {
		_, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: s.cfg.marksName(), Subjects: []string{markPrefix + s.cfg.StreamName() + ".>"},
			Description: "Messages that may bring their process down, see guarantee 11 of monotel's docs/guarantees.md",
			MaxBytes:    maxBytes, MaxAge: marksMaxAge, MaxMsgsPerSubject: 1, Discard: jetstream.DiscardOld,
			Storage: cfg.Storage, Replicas: cfg.Replicas, Placement: cfg.Placement,
		})
		return err
	})
	if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another instance was quicker
		return nil
	}
	return err
}
