package mono

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"math/bits"
	"strconv"
	"time"
)

// noteSize is how many sequences of an origin a note is about. It is part of the names
// on the wire.
const (
	noteSize  = 1024
	noteWords = noteSize / 64
)

// A sourceNote says which of noteSize sequences of an origin a consumer has finished.
type sourceNote struct {
	done [noteWords]uint64 // a bit for each
	// upTo is the highest stream sequence at which one of a word was finished. What
	// comes later in the stream is no redelivery of it.
	upTo [noteWords]uint64
	sums [noteSize]uint32 // what was finished
}

func notePlace(sequence uint64) (word int, bit uint64, at int) {
	at = int(sequence % noteSize)
	return at / 64, 1 << (at % 64), at
}

// add says that the message was finished that is sequence in the origin and stored in
// the stream.
func (n *sourceNote) add(sequence, stored uint64, sum uint32) {
	word, bit, at := notePlace(sequence)
	if n.done[word]&bit != 0 && n.sums[at] == sum {
		stored = min(stored, n.upTo[word]) // one more copy; the first one counts
	}
	n.done[word] |= bit
	n.sums[at] = sum
	n.upTo[word] = max(n.upTo[word], stored)
}

// has reports whether this very message was finished, and earlier in the stream.
func (n *sourceNote) has(sequence, stored uint64, sum uint32) bool {
	word, bit, at := notePlace(sequence)
	return n.done[word]&bit != 0 && n.sums[at] == sum && stored > n.upTo[word]
}

// last returns the place of the highest sequence that was finished, and a stream
// sequence that is not lower than its own; 0 if none was finished.
func (n *sourceNote) last() (at, stored uint64) {
	for word := noteWords - 1; word >= 0; word-- {
		if done := n.done[word]; done != 0 {
			return uint64(word*64 + bits.Len64(done) - 1), n.upTo[word] //nolint:gosec // small
		}
	}
	return 0, 0
}

// merge adds what another instance has finished. Where both know of different
// messages, n is right for what it has seen itself.
func (n *sourceNote) merge(other *sourceNote) {
	for word := range n.done {
		for added := other.done[word] &^ n.done[word]; added != 0; added &= added - 1 {
			at := word*64 + bits.TrailingZeros64(added)
			n.sums[at] = other.sums[at]
		}
		n.done[word] |= other.done[word]
		n.upTo[word] = max(n.upTo[word], other.upTo[word])
	}
}

// noteVersion is the first byte of a note on the wire. The words follow, then their
// highest stream sequences, then a checksum for each bit that is set, all in little endian.
const noteVersion = 1

const noteHead = 1 + 2*8*noteWords

func (n *sourceNote) encode() []byte {
	b := append(make([]byte, 0, noteHead+4*noteSize), noteVersion)
	for _, word := range n.done {
		b = binary.LittleEndian.AppendUint64(b, word)
	}
	for _, stored := range n.upTo {
		b = binary.LittleEndian.AppendUint64(b, stored)
	}
	for at, sum := range &n.sums {
		if n.done[at/64]&(1<<(at%64)) != 0 {
			b = binary.LittleEndian.AppendUint32(b, sum)
		}
	}
	return b
}

var errNote = errors.New("no note of finished messages")

func decodeNote(b []byte) (n sourceNote, err error) {
	if len(b) < noteHead || b[0] != noteVersion {
		return n, errNote
	}
	set := 0
	for i := range n.done {
		n.done[i] = binary.LittleEndian.Uint64(b[1+8*i:])
		n.upTo[i] = binary.LittleEndian.Uint64(b[1+8*(noteWords+i):])
		set += bits.OnesCount64(n.done[i])
	}
	b = b[noteHead:]
	if len(b) != 4*set {
		return sourceNote{}, errNote
	}
	for at := range n.sums {
		if n.done[at/64]&(1<<(at%64)) != 0 {
			n.sums[at] = binary.LittleEndian.Uint32(b)
			b = b[4:]
		}
	}
	return n, nil
}

// noteToken is a subject's token for one origin of one incarnation of a stream.
func noteToken(stream, durable string, created time.Time, ref sourceRef) string {
	key := stream + " " + durable + " " + strconv.FormatInt(created.UnixNano(), 10) + " " + ref.stream + " " + ref.filter + " " + ref.identity
	sum := sha256.Sum256([]byte(key))
	return base64.RawURLEncoding.EncodeToString(sum[:12])
}
