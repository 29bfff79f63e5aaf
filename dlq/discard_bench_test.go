package dlq_test

import (
	"fmt"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

// BenchmarkDiscard discards dead letters one after the other, of about 1 KB each.
func BenchmarkDiscard(b *testing.B) {
	for _, changes := range []int{0, 2} {
		b.Run(fmt.Sprintf("changes=%d", changes), func(b *testing.B) {
			js, err := jetstream.New(monotest.Server(b).Conn())
			if err != nil {
				b.Fatal(err)
			}
			s, err := dlq.NewStore(js.Conn(), js, dlq.Config{})
			if err == nil {
				err = s.Provision(b.Context())
			}
			if err != nil {
				b.Fatal(err)
			}
			const letters = 1000
			fill := func(from uint64) (all []*dlq.Entry) {
				for i := range uint64(letters) {
					r := record(from + i)
					r.Data = noise(i, 1000)
					if _, err := s.Capture(b.Context(), r, nil); err != nil {
						b.Fatal(err)
					}
					stream, err := js.Stream(b.Context(), "DLQ")
					if err != nil {
						b.Fatal(err)
					}
					e := dlq.NewEntry(r, stream.CachedInfo().State.LastSeq, nil)
					for range changes {
						if err := s.Change(b.Context(), e, dlq.Change{Kind: dlq.ChangeArchived}, nil); err != nil {
							b.Fatal(err)
						}
					}
					all = append(all, e)
				}
				return all
			}
			var all []*dlq.Entry
			next := uint64(1)
			for b.Loop() {
				if len(all) == 0 {
					b.StopTimer()
					all, next = fill(next), next+letters
					b.StartTimer()
				}
				if err := s.Change(b.Context(), all[0], dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil {
					b.Fatal(err)
				}
				all = all[1:]
			}
		})
	}
}
