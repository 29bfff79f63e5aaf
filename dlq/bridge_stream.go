package dlq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// open asks again when a request is lost, as they are when the server has just come
// back.
func (b *Bridge) open(ctx context.Context) (jetstream.Consumer, error) {
	const timeout = 5 * time.Second
	for {
		attempt, cancel := context.WithTimeout(ctx, timeout)
		reader, err := b.provision(attempt)
		if err == nil {
			var account *jetstream.AccountInfo
			if account, err = b.store.js.AccountInfo(attempt); err == nil {
				b.domain = account.Domain
			}
		}
		cancel()
		switch {
		case err == nil:
			return reader, nil
		case ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded):
			return nil, err
		}
	}
}

func (b *Bridge) lock(ctx context.Context) error {
	select {
	case b.gate <- struct{}{}:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

func (b *Bridge) unlock() { <-b.gate }

// readerName is the durable's name, so that bridges to one dead-letter stream share
// the work, and bridges to several do not.
func (b *Bridge) readerName() string { return "bridge_" + b.store.cfg.StreamName() }

// provision makes the stream of advisories and the reader of it. It can be repeated
// whenever one of them is gone.
func (b *Bridge) provision(ctx context.Context) (jetstream.Consumer, error) {
	js := b.store.js
	stream, err := js.Stream(ctx, AdvisoryStream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		stream, err = js.CreateStream(ctx, b.streamConfig())
		if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) { // another bridge was quicker
			stream, err = js.Stream(ctx, AdvisoryStream)
		}
	}
	if jsapi.Is(err, jsapi.CodeSubjectsOverlap) {
		return nil, b.overlap(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("stream %q: %w", AdvisoryStream, err)
	}
	if err := advisoryConflict(stream.CachedInfo().Config); err != nil {
		return nil, err
	}
	reader, err := stream.CreateOrUpdateConsumer(ctx, jetstream.ConsumerConfig{
		Durable:        b.readerName(),
		Description:    "Captures dead letters of consumers that are not monotel's into stream " + b.store.cfg.StreamName(),
		FilterSubjects: advisorySubjects(),
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        advisoryAckWait,
		MaxDeliver:     -1,
		MaxAckPending:  advisoryMaxAckPending,
	})
	if err != nil {
		return nil, fmt.Errorf("consumer %q of stream %q: %w", b.readerName(), AdvisoryStream, err)
	}
	return reader, nil
}

func advisorySubjects() []string { return []string{exhaustedSubjects + ">", terminatedSubjects + ">"} }

// streamConfig is as safe as the dead-letter stream: a message whose advisory is
// lost is never captured.
func (b *Bridge) streamConfig() jetstream.StreamConfig {
	letters := b.store.cfg.streamConfig()
	return jetstream.StreamConfig{
		Name:        AdvisoryStream,
		Description: "What the server says of messages that were given up, for monotel's dead letters",
		Subjects:    advisorySubjects(),
		Retention:   jetstream.LimitsPolicy,
		Discard:     jetstream.DiscardOld,
		MaxBytes:    advisoryMaxBytes,
		MaxAge:      advisoryMaxAge,
		Storage:     letters.Storage,
		Replicas:    letters.Replicas,
		Placement:   letters.Placement,
	}
}

// overlap says which stream is in the way.
func (b *Bridge) overlap(ctx context.Context) error {
	other := "another stream"
	for _, s := range advisorySubjects() {
		if name, err := b.store.js.StreamNameBySubject(ctx, s); err == nil {
			other = fmt.Sprintf("stream %q", name)
			break
		}
	}
	return fmt.Errorf("stream %q: %w: %s already stores some of %q; take these subjects from it, or let it source them from %q",
		AdvisoryStream, ErrStreamConflict, other, advisorySubjects(), AdvisoryStream)
}

// advisoryConflict says what is wrong with a stream that exists. Its limits are an
// operator's to change.
func advisoryConflict(have jetstream.StreamConfig) error {
	var problems []string
	for _, s := range advisorySubjects() {
		if !slices.ContainsFunc(have.Subjects, func(h string) bool {
			prefix, all := strings.CutSuffix(h, ">")
			return all && strings.HasPrefix(s, prefix)
		}) {
			problems = append(problems, fmt.Sprintf("its subjects are %q, without %q", have.Subjects, s))
		}
	}
	if have.Retention != jetstream.LimitsPolicy {
		problems = append(problems, fmt.Sprintf("its retention is %v, want limits: several readers share it", have.Retention))
	}
	if have.Sealed {
		problems = append(problems, "it is sealed")
	}
	if len(problems) == 0 {
		return nil
	}
	return fmt.Errorf("stream %q: %w: %s; delete the stream, or change it", AdvisoryStream, ErrStreamConflict, strings.Join(problems, "; "))
}
