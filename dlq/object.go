package dlq

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/synadia-io/orbit.go/jetstreamext"

	"github.com/monotel/monotel/internal/jsapi"
)

// Objects are read by batched gets. The bucket's own Get and List make a push consumer,
// for which readers would need one more right, and one that is easily misused.

const (
	objectPrefix = "OBJ_" // of the bucket's stream
	objectChunk  = 128 << 10
	objectBatch  = 64      // chunks that are asked for at a time, or fewer, so that
	objectBytes  = 4 << 20 // they have about so many bytes
)

// ErrObject reports an object that is not what a record says of it, or is larger than
// what an object of a dead letter may be: 64 MiB, which is the most that a server takes
// as a message, and 1 MiB for headers. It is not read.
var ErrObject = errors.New("the object is not that of the dead letter")

// ErrObjectBroken is an [ErrObject] of which parts are missing, or that is not what its
// description says.
var ErrObjectBroken = fmt.Errorf("%w: it is not whole", ErrObject)

const (
	maxObject        = 64 << 20
	maxHeadersObject = 1 << 20
)

// readObject reads an object of a size, -1 if it is not known, and of most bytes. A record
// can name any object, so its size is asked for first. It is an [ErrObjectBroken] if its
// size or digest is not that of its description. Its memory follows what there is, and not
// what the description says.
func (s *Store) readObject(ctx context.Context, bucket jetstream.ObjectStore, name string, size, most int64) ([]byte, error) {
	info, err := bucket.GetInfo(ctx, name)
	if err != nil {
		return nil, err
	}
	has := int64(min(info.Size, math.MaxInt64))
	switch {
	case info.NUID == "", info.Opts != nil && info.Opts.Link != nil: // what is linked is not ours
		return nil, fmt.Errorf("%w: %w", ErrObject, jetstream.ErrBadObjectMeta)
	case has > most:
		return nil, fmt.Errorf("%w: it has %d bytes, and may have %d", ErrObject, has, most)
	case size >= 0 && has != size:
		return nil, fmt.Errorf("%w: it has %d bytes, want %d", ErrObject, has, size)
	}
	return s.readChunks(ctx, info)
}

func (s *Store) readChunks(ctx context.Context, info *jetstream.ObjectInfo) ([]byte, error) {
	var parts [][]byte
	size, digest := uint64(0), sha256.New()
	subject := fmt.Sprintf("$O.%s.C.%s", s.cfg.bucketName(), info.NUID)
	for from := uint64(1); size < info.Size; {
		last := uint64(0)
		// No more than are left, and one that shows whether there are more than there should be.
		batch := min(objectBatch, int((info.Size-size)/objectChunk)+2) //nolint:gosec,mnd // it is bounded; see above
		err := s.chunks(ctx, subject, from, batch, func(sequence uint64, chunk []byte) error {
			if size += uint64(len(chunk)); size > info.Size {
				return fmt.Errorf("%w: it has more than %d bytes", ErrObjectBroken, info.Size)
			}
			digest.Write(chunk)
			parts, last = append(parts, chunk), sequence
			return nil
		})
		if err != nil {
			return nil, err
		}
		if last == 0 {
			return nil, fmt.Errorf("%w: it has %d of %d bytes", ErrObjectBroken, size, info.Size)
		}
		from = last + 1
	}
	if size > 0 && jetstream.GetObjectDigestValue(digest) != info.Digest {
		return nil, fmt.Errorf("%w: %w", ErrObjectBroken, jetstream.ErrDigestMismatch)
	}
	return slices.Concat(parts...), nil
}

// chunks calls f for the next messages of a subject, as many as come, and for none if
// there are none.
func (s *Store) chunks(ctx context.Context, subject string, from uint64, batch int, f func(sequence uint64, chunk []byte) error) error {
	stream := objectPrefix + s.cfg.bucketName()
	js, err := s.batched()
	if err != nil {
		return err
	}
	n := 0
	err = s.api.Permitted(ctx, jsapi.OpDirectGet, stream, func(ctx context.Context, _ string) error {
		all, err := jetstreamext.GetBatch(ctx, js, stream, batch,
			jetstreamext.GetBatchSeq(from), jetstreamext.GetBatchSubject(subject), jetstreamext.GetBatchMaxBytes(objectBytes))
		if err != nil {
			return err
		}
		for m, err := range all {
			if err != nil {
				return err
			}
			n++
			if err := f(m.Sequence, m.Data); err != nil {
				return err
			}
		}
		if n == 0 { // the end of ctx ends it without an error
			return context.Cause(ctx)
		}
		return nil
	})
	if !errors.Is(err, jetstreamext.ErrNoMessages) {
		return err
	}
	// A replica that is late may have answered. The leader knows.
	m, err := s.api.Next(ctx, stream, subject, from)
	if m == nil || err != nil {
		return err
	}
	return f(m.Sequence, m.Data)
}

// batched is the JetStream for batched gets. Package jetstreamext leaves out a part of
// the subjects of a domain, so a domain is written as the prefix that it is.
func (s *Store) batched() (jetstream.JetStream, error) {
	if domain := s.js.Options().Domain; domain != "" {
		return jetstream.NewWithAPIPrefix(s.nc, "$JS."+domain+".API")
	}
	return s.js, nil
}

// objectNames lists the objects whose name begins so, those that were deleted, too.
func (s *Store) objectNames(ctx context.Context, prefix string) ([]string, error) {
	before, stream := fmt.Sprintf("$O.%s.M.", s.cfg.bucketName()), objectPrefix+s.cfg.bucketName()
	var names []string
	err := s.api.Subjects(ctx, stream, before+"*", func(subject string, _ uint64, _ int) {
		name, err := base64.URLEncoding.DecodeString(strings.TrimPrefix(subject, before))
		if err == nil && strings.HasPrefix(string(name), prefix) {
			names = append(names, string(name))
		}
	})
	return names, err
}
