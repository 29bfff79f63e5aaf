package triage

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// openTo makes sure that a consumer gets what is replayed to it: its stream takes the
// subject, and the durable for the consumer's replays exists. Both are left so. The
// consumer's own durable is not changed.
//
// A consumer without a filter is not an App's. It gets every message of its stream, and
// a second durable would have its replays handled twice.
func (d *Desk) openTo(ctx context.Context, stream, consumer string) error {
	const tries = 10
	subject := dlq.ReplaySubjects(stream, consumer)
	for range tries {
		s, err := d.js.Stream(ctx, stream)
		if err != nil {
			return fmt.Errorf("open stream %q to replays: %w", stream, err)
		}
		cfg := s.CachedInfo().Config
		if subjects := dlq.WithReplaySubjects(cfg, consumer); !slices.Equal(subjects, cfg.Subjects) {
			cfg.Subjects = subjects
			if _, err := d.js.UpdateStream(ctx, cfg); err != nil {
				return fmt.Errorf("open stream %q to replays, by subject %q: %w", stream, subject, err)
			}
			continue // another may have written over it: there is no compare-and-set
		}
		cons, err := s.Consumer(ctx, consumer)
		if err != nil {
			return fmt.Errorf("open consumer %q of stream %q to replays: %w", consumer, stream, err)
		}
		has := cons.CachedInfo().Config
		if has.FilterSubject == "" && len(has.FilterSubjects) == 0 {
			return nil
		}
		if _, err := dlq.EnsureReplayConsumer(ctx, s, has); err != nil {
			return fmt.Errorf("open consumer %q of stream %q to replays: %w", consumer, stream, err)
		}
		return nil
	}
	return fmt.Errorf("open consumer %q of stream %q to replays: others change the stream all the time", consumer, stream)
}

// wake tells the Apps that run a consumer that something is replayed to it. An App that
// misses it, or that the server does not let us tell, finds out by itself, later.
func (d *Desk) wake(stream, consumer string) {
	_ = d.nc.Publish(dlq.WakeSubject(stream, consumer), nil)
}

// replayInfo looks at the durable for a consumer's replays. It is nil if there is none
// yet.
func (d *Desk) replayInfo(ctx context.Context, stream, consumer string) (*jetstream.ConsumerInfo, error) {
	cons, err := d.js.Consumer(ctx, stream, dlq.ReplayConsumer(consumer))
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil, nil //nolint:nilnil // it is made when it is needed
	}
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return nil, dlq.ErrReplayConsumer
	}
	if err != nil {
		return nil, err
	}
	if _, ok := dlq.IsReplayConsumer(stream, cons.CachedInfo().Config); !ok {
		return nil, dlq.ErrReplayConsumer
	}
	return cons.CachedInfo(), nil
}
