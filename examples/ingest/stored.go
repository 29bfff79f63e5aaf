package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// askTimeout bounds a question to the server. One that is lost with a connection
// is never answered.
const askTimeout = 10 * time.Second

// stored is what the stream holds of one input.
type stored struct {
	lines map[int]uint64    // line to its sequence
	twice int               // messages that repeat a line
	last  map[string]uint64 // subject to the last sequence on it
}

// readStored asks the stream what it holds of the input. It reads the headers of
// the whole stream, some 200 000 messages a second: an index would be quicker,
// and one more thing that can be wrong after a kill.
func readStored(ctx context.Context, js jetstream.JetStream, id string) (*stored, error) {
	s := &stored{lines: make(map[int]uint64), last: make(map[string]uint64)}
	if err := s.read(ctx, js, id); err != nil {
		return nil, fmt.Errorf("read what stream %q holds: %w", streamName, err)
	}
	return s, nil
}

func (s *stored) read(ctx context.Context, js jetstream.JetStream, id string) error {
	ask, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stream, err := js.Stream(ask, streamName)
	if err != nil {
		return err
	}
	if stream.CachedInfo().State.Msgs == 0 {
		return nil
	}
	cons, err := stream.OrderedConsumer(ask, jetstream.OrderedConsumerConfig{HeadersOnly: true})
	if err != nil {
		return err
	}
	msgs, err := cons.Messages()
	if err != nil {
		return err
	}
	defer msgs.Stop()
	for {
		m, err := msgs.Next(jetstream.NextContext(ctx))
		if err != nil {
			return err
		}
		meta, err := m.Metadata()
		if err != nil {
			return err
		}
		if number, err := strconv.Atoi(m.Headers().Get(lineHeader)); err == nil && m.Headers().Get(inputHeader) == id {
			if _, ok := s.lines[number]; ok {
				s.twice++
			}
			s.lines[number] = meta.Sequence.Stream
			s.last[m.Subject()] = meta.Sequence.Stream
		}
		if meta.NumPending == 0 {
			return nil
		}
	}
}

// missing returns the lines that are not stored.
func (s *stored) missing(lines []line) []*line {
	var missing []*line
	for i := range lines {
		if _, ok := s.lines[lines[i].number]; !ok {
			missing = append(missing, &lines[i])
		}
	}
	return missing
}

// errNotDrained reports consumers that are not done with the input.
var errNotDrained = errors.New("durable consumers have messages left")

// drain waits until the durable consumers are done with everything that is
// stored of the input: every message delivered, and acked or given up.
//
// It looks at the sequence that a consumer has reached, because the number of
// messages that a consumer has before it, NumPending, is brought up to date a
// moment after a publish is acknowledged, and may say 0 too early.
func drain(ctx context.Context, js jetstream.JetStream, families []family, s *stored) error {
	goal := make(map[string]uint64) // consumer to the sequence that it has to reach
	for _, f := range families {
		if last := s.last[f.event.Subject]; last > 0 {
			goal[f.durable(auditName)] = last
			goal[f.durable(typedName)] = last
		}
	}
	poll := time.NewTicker(100 * time.Millisecond)
	defer poll.Stop()
	for {
		err := reached(ctx, js, goal)
		if len(goal) == 0 {
			return nil
		}
		// A server that does not answer may come back.
		if err := wait(ctx, poll.C); err != nil {
			return fmt.Errorf("%d %w: %w", len(goal), errNotDrained, err)
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("look at consumers of stream %q: %w", streamName, err)
		}
	}
}

// reached takes the consumers out of goal that have reached it.
func reached(ctx context.Context, js jetstream.JetStream, goal map[string]uint64) error {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	stream, err := js.Stream(ctx, streamName)
	if err != nil {
		return err
	}
	list := stream.ListConsumers(ctx)
	for c := range list.Info() {
		if last, ok := goal[c.Name]; ok && c.Delivered.Stream >= last && c.NumAckPending == 0 {
			delete(goal, c.Name)
		}
	}
	return list.Err()
}
