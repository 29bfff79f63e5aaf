package dlq

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// The server counts deliveries. One that was handed back before a handler had begun is
// no attempt, so those are listed, in the stream of the marks, on one subject for each
// consumer.

const (
	handedBackMost = 10_000 // deliveries in a list
	handedBackAge  = 24 * time.Hour
)

// A Delivery is one delivery of a message of a consumer.
type Delivery struct {
	Sequence uint64 // of the message in its stream
	Number   uint64 // counted from 1
}

// handedBack is the list on the wire. Its elements are sequence, number, and time in
// Unix seconds.
type handedBack struct {
	Created time.Time   `json:"stream_created"`
	List    [][3]uint64 `json:"handed_back"`
}

func (s *Store) handedBackSubject(stream, consumer string) string {
	return markPrefix + s.cfg.StreamName() + ".back." + token(stream) + "." + token(consumer)
}

// HandedBack returns the deliveries of a consumer that were handed back within the last
// day. created is when the consumer's stream was made. It takes a round trip.
func (s *Store) HandedBack(ctx context.Context, stream string, created time.Time, consumer string) (map[Delivery]bool, error) {
	list, _, err := s.readHandedBack(ctx, stream, created, consumer)
	if err != nil {
		return nil, err
	}
	all := make(map[Delivery]bool, len(list.List))
	for _, d := range list.List {
		all[Delivery{Sequence: d[0], Number: d[1]}] = true
	}
	return all, nil
}

func (s *Store) readHandedBack(ctx context.Context, stream string, created time.Time, consumer string) (*handedBack, uint64, error) {
	list := &handedBack{Created: created.UTC()}
	m, err := s.api.Next(ctx, s.cfg.marksName(), s.handedBackSubject(stream, consumer), 1)
	if isNoStream(err) || err == nil && m == nil {
		return list, 0, nil
	}
	if err != nil {
		return nil, 0, fmt.Errorf("deliveries of consumer %q that were handed back: %w", consumer, err)
	}
	list.List = decodeHandedBack(m.Data, created)
	return list, m.Sequence, nil
}

// decodeHandedBack reads a list. One of another stream, or not ours, is empty.
func decodeHandedBack(data []byte, created time.Time) [][3]uint64 {
	var have handedBack
	if json.Unmarshal(data, &have) != nil || !have.Created.Equal(created) {
		return nil
	}
	return have.List[max(len(have.List)-handedBackMost, 0):]
}

// AddHandedBack lists deliveries that are about to be handed back. It takes two round
// trips, and some more if another instance does so at the same time.
func (s *Store) AddHandedBack(ctx context.Context, stream string, created time.Time, consumer string, deliveries []Delivery) error {
	const tries = 5
	var err error
	for range tries {
		if err = s.addHandedBack(ctx, stream, created, consumer, deliveries); !jsapi.Is(err, jsapi.CodeWrongLastSequence) {
			break
		}
	}
	if err != nil {
		return fmt.Errorf("list deliveries of consumer %q that are handed back: %w", consumer, err)
	}
	return nil
}

func (s *Store) addHandedBack(ctx context.Context, stream string, created time.Time, consumer string, deliveries []Delivery) error {
	list, last, err := s.readHandedBack(ctx, stream, created, consumer)
	if err != nil {
		return err
	}
	now := uint64(time.Now().Unix()) //nolint:gosec // it is after 1970
	kept := make([][3]uint64, 0, len(list.List)+len(deliveries))
	for _, d := range list.List {
		if d[2]+uint64(handedBackAge/time.Second) > now {
			kept = append(kept, d)
		}
	}
	for _, d := range deliveries {
		kept = append(kept, [3]uint64{d.Sequence, d.Number, now})
	}
	list.List = kept[max(len(kept)-handedBackMost, 0):]
	data, err := json.Marshal(list)
	if err != nil {
		return err
	}
	publish := func() error {
		_, err := s.js.PublishMsg(ctx, &nats.Msg{Subject: s.handedBackSubject(stream, consumer), Data: data},
			jetstream.WithRetryAttempts(0), jetstream.WithExpectStream(s.cfg.marksName()), jetstream.WithExpectLastSequencePerSubject(last))
		return err
	}
	return s.withMarks(ctx, publish)
}

// withMarks calls publish, and again when it has made the stream that is missing.
func (s *Store) withMarks(ctx context.Context, publish func() error) error {
	err := publish()
	if errors.Is(err, jetstream.ErrNoStreamResponse) || errors.Is(err, nats.ErrNoResponders) {
		if err = s.createMarks(ctx); err == nil {
			err = publish()
		}
	}
	return err
}
