package dlq

import (
	"context"
	"hash/maphash"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// A CapturedSet knows which messages of one consumer were captured at one moment. It
// may take a message for captured that was not, once in some billions: ask
// [Store.Holds] about each that it has. It is safe for concurrent use.
type CapturedSet struct {
	ids map[uint64]struct{} // hashes
}

var capturedSeed = maphash.MakeSeed()

// Has reports whether the message of an ID may have been captured. A nil set has
// none.
func (c *CapturedSet) Has(id string) bool {
	if c == nil {
		return false
	}
	_, ok := c.ids[maphash.String(capturedSeed, id)]
	return ok
}

// Len is how many dead letters there are in the set.
func (c *CapturedSet) Len() int {
	if c == nil {
		return 0
	}
	return len(c.ids)
}

// CapturedOf lists the dead letters of a consumer, in whichever state, traces of
// discarded ones included. It is nil if there are none, or no dead-letter stream.
//
// It asks the leader of the dead-letter stream, once for each 100 000 dead letters of
// the consumer, and keeps about 16 bytes for each.
func (s *Store) CapturedOf(ctx context.Context, stream, consumer string) (*CapturedSet, error) {
	prefix := s.Subject(stream, consumer, "")
	var set *CapturedSet
	err := s.api.Subjects(ctx, s.cfg.StreamName(), prefix+">", func(subject string, _ uint64, total int) {
		if set == nil {
			set = &CapturedSet{ids: make(map[uint64]struct{}, total)}
		}
		if id, ok := strings.CutPrefix(subject, prefix); ok {
			set.ids[maphash.String(capturedSeed, id)] = struct{}{}
		}
	})
	if isNoStream(err) {
		return nil, nil //nolint:nilnil // there are none
	}
	if err != nil {
		return nil, err
	}
	return set, nil
}

// isNoStream reports whether the API says that the stream does not exist.
func isNoStream(err error) bool { return jsapi.Is(err, jetstream.JSErrCodeStreamNotFound) }
