package triage

import (
	"context"
	"time"
)

// What the tests of package triage_test look at of a scan.
const (
	ChunkBytes = chunkBytes
	AimedBytes = aimedBytes
)

var ErrStalled = errStalled

// ChunkSizes reads the stream backwards and returns how many messages and bytes
// each chunk has.
func ChunkSizes(ctx context.Context, d *Desk, headersOnly bool) (messages, bytes []int, err error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, nil, err
	}
	for chunk, err := range d.chunksBackwards(ctx, info.State.FirstSeq, info.State.LastSeq, headersOnly) {
		if err != nil {
			return nil, nil, err
		}
		size := 0
		for i := range chunk {
			m := &chunk[i]
			size += len(m.subject) + len(m.data)
			for k, all := range m.header {
				for _, v := range all {
					size += len(k) + len(v)
				}
			}
		}
		messages, bytes = append(messages, len(chunk)), append(bytes, size)
	}
	return messages, bytes, nil
}

// ReadOnce reads what fits a chunk, whole, and fails after a while without a
// message. It returns how many messages it has got, and of which sequence the last
// is that they go up to.
func ReadOnce(ctx context.Context, d *Desk, lo, hi uint64, stall time.Duration) (n int, upto uint64, err error) {
	r, err := d.readOnce(ctx, lo, hi, false, stall, stall)
	if err != nil {
		return 0, 0, err
	}
	return len(r.messages), r.upto, nil
}

// MessagesOf counts the messages of a dead letter.
func MessagesOf(ctx context.Context, d *Desk, subject string) (n int, err error) {
	err = d.messagesOf(ctx, subject, func(*message) { n++ })
	return n, err
}

// Behind reads up to a sequence of a replicated stream as if that were the end of
// what the consumer's replica has.
func Behind(ctx context.Context, d *Desk, upto, hi uint64) error {
	d.replicated.Store(true)
	r, err := d.readOnce(ctx, 1, upto, true, fetchWait, stallWait)
	if err != nil {
		return err
	}
	return r.nothingFrom(ctx, r.upto+1, hi)
}

var ErrBehind = errBehind
