package dlq

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// replayOfKey names, in the metadata of a durable for replays, the consumer whose
// replays it gets.
const replayOfKey = "monotel.replay_of"

// ErrReplayConsumer reports a consumer that has the name of a durable for replays and
// is something else.
var ErrReplayConsumer = errors.New("is not a durable for replays; delete it, or give it another name")

// ReplayConsumerConfig is the configuration of the durable that gets what is replayed
// to a consumer, given the consumer's own as the server has it.
func ReplayConsumerConfig(stream string, main jetstream.ConsumerConfig) jetstream.ConsumerConfig {
	name := ReplayConsumer(main.Durable)
	return jetstream.ConsumerConfig{
		Name:               name,
		Durable:            name,
		Description:        "Replays of dead letters to consumer " + main.Durable,
		FilterSubject:      ReplaySubjects(stream, main.Durable),
		DeliverPolicy:      jetstream.DeliverAllPolicy,
		AckPolicy:          jetstream.AckExplicitPolicy,
		AckWait:            main.AckWait,
		MaxDeliver:         -1, // attempts are counted by the App
		MaxAckPending:      main.MaxAckPending,
		MaxWaiting:         main.MaxWaiting,
		MaxRequestBatch:    main.MaxRequestBatch,
		MaxRequestExpires:  main.MaxRequestExpires,
		MaxRequestMaxBytes: main.MaxRequestMaxBytes,
		Replicas:           main.Replicas,
		MemoryStorage:      main.MemoryStorage,
		Metadata:           map[string]string{replayOfKey: main.Durable},
	}
}

// IsReplayConsumer reports whether a consumer of a stream is the durable for
// another one's replays, and for whose.
func IsReplayConsumer(stream string, cfg jetstream.ConsumerConfig) (of string, ok bool) {
	of, ok = strings.CutSuffix(cfg.Durable, replayConsumerSuffix)
	return of, ok && cfg.FilterSubject == ReplaySubjects(stream, of)
}

// EnsureReplayConsumer returns the durable that gets what is replayed to a consumer.
// It is made if it is missing, and brought up to date with the consumer, whose
// configuration on the server is main. [ErrReplayConsumer] means that something else
// has its name. Several processes may do this at a time.
func EnsureReplayConsumer(
	ctx context.Context, s jetstream.Stream, main jetstream.ConsumerConfig,
) (info *jetstream.ConsumerInfo, err error) {
	const tries = 5
	want := ReplayConsumerConfig(s.CachedInfo().Config.Name, main)
	defer func() {
		if err != nil {
			err = fmt.Errorf("consumer %q of stream %q: %w", want.Durable, s.CachedInfo().Config.Name, err)
		}
	}()
	for range tries {
		cons, err := s.Consumer(ctx, want.Durable)
		switch {
		case errors.Is(err, jetstream.ErrConsumerNotFound):
			if cons, err = s.CreateConsumer(ctx, want); errors.Is(err, jetstream.ErrConsumerExists) {
				continue // another process was quicker
			}
			if err != nil {
				return nil, err
			}
			return cons.CachedInfo(), nil
		case errors.Is(err, jetstream.ErrNotPullConsumer):
			return nil, ErrReplayConsumer
		case err != nil:
			return nil, err
		}
		info = cons.CachedInfo()
		have := info.Config
		if _, ok := IsReplayConsumer(info.Stream, have); !ok || have.AckPolicy != want.AckPolicy {
			return nil, ErrReplayConsumer
		}
		next := updatedReplayConsumer(have, want)
		if sameReplayConsumer(have, next) {
			return info, nil
		}
		// A server that was restarted answers the first update of a consumer with what it
		// was before. The next look tells.
		if _, err := s.UpdateConsumer(ctx, next); err != nil {
			return nil, err
		}
	}
	return info, nil // as the server keeps it
}

// updatedReplayConsumer is have with what may change, as want has it.
func updatedReplayConsumer(have, want jetstream.ConsumerConfig) jetstream.ConsumerConfig {
	next := have
	next.AckWait, next.BackOff, next.MaxDeliver, next.MaxAckPending = want.AckWait, nil, want.MaxDeliver, want.MaxAckPending
	next.HeadersOnly, next.InactiveThreshold = false, 0
	next.MaxRequestBatch, next.MaxRequestExpires = want.MaxRequestBatch, want.MaxRequestExpires
	next.MaxRequestMaxBytes, next.Replicas = want.MaxRequestMaxBytes, want.Replicas
	next.Metadata = maps.Clone(have.Metadata) // the server adds its own
	if next.Metadata == nil {
		next.Metadata = make(map[string]string, 1)
	}
	next.Metadata[replayOfKey] = want.Metadata[replayOfKey]
	return next
}

func sameReplayConsumer(a, b jetstream.ConsumerConfig) bool {
	return a.AckWait == b.AckWait && slices.Equal(a.BackOff, b.BackOff) && a.MaxDeliver == b.MaxDeliver &&
		a.MaxAckPending == b.MaxAckPending && a.HeadersOnly == b.HeadersOnly && a.InactiveThreshold == b.InactiveThreshold &&
		a.MaxRequestBatch == b.MaxRequestBatch &&
		a.MaxRequestExpires == b.MaxRequestExpires && a.MaxRequestMaxBytes == b.MaxRequestMaxBytes && a.Replicas == b.Replicas &&
		maps.Equal(a.Metadata, b.Metadata)
}

// SpareSubject is a subject that nobody uses. A stream that has messages from sources
// and no subject but that of one consumer's replays needs a second one: the server
// takes a consumer that filters the only subject of its stream for one of all messages,
// and then keeps those from the sources until that consumer acks them, which it never
// does.
func SpareSubject(stream string) string { return "monotel.spare." + stream }

// WithReplaySubjects returns the subjects of a stream with those for replays to one of
// its consumers, and with a [SpareSubject] where one is needed.
func WithReplaySubjects(cfg jetstream.StreamConfig, consumer string) []string {
	subjects := withSubject(cfg.Subjects, ReplaySubjects(cfg.Name, consumer))
	if needsSpare(cfg, subjects) {
		subjects = withSubject(subjects, SpareSubject(cfg.Name))
	}
	return subjects
}

// WithoutOldReplaySubjects returns the subjects of a stream without those by which
// earlier versions replay to one of its consumers.
func WithoutOldReplaySubjects(cfg jetstream.StreamConfig, consumer string) []string {
	old := OldReplaySubjects(cfg.Name, consumer)
	subjects := slices.DeleteFunc(slices.Clone(cfg.Subjects), func(s string) bool { return s == old })
	if needsSpare(cfg, subjects) {
		subjects = withSubject(subjects, SpareSubject(cfg.Name))
	}
	return subjects
}

func needsSpare(cfg jetstream.StreamConfig, subjects []string) bool {
	return len(cfg.Sources) > 0 && cfg.Retention != jetstream.LimitsPolicy && len(subjects) > 0 &&
		!slices.ContainsFunc(subjects, func(s string) bool { return !IsReplaySubject(s) })
}

func withSubject(subjects []string, subject string) []string {
	if slices.Contains(subjects, subject) {
		return subjects
	}
	return append(slices.Clone(subjects), subject)
}
