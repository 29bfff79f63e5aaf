package mono

import (
	"context"
	"math/bits"

	"github.com/nats-io/nats.go/jetstream"
)

// RepeatsStream is where it is noted which sourced messages are finished.
const RepeatsStream = repeatsStream

// NotedAsFinished counts the sourced messages that a consumer has noted as finished.
func NotedAsFinished(ctx context.Context, js jetstream.JetStream, stream, durable string) (int, error) {
	s, err := js.Stream(ctx, repeatsStream)
	if err != nil {
		return 0, err
	}
	info, err := s.Info(ctx, jetstream.WithSubjectFilter(repeatsSubject+stream+"."+durable+".>"))
	if err != nil {
		return 0, err
	}
	n := 0
	for subject := range info.State.Subjects {
		msg, err := s.GetLastMsgForSubject(ctx, subject)
		if err != nil {
			return 0, err
		}
		note, err := decodeNote(msg.Data)
		if err != nil {
			return 0, err
		}
		for _, word := range note.done {
			n += bits.OnesCount64(word)
		}
	}
	return n, nil
}
