package mono

import (
	"context"
	"fmt"
	"hash/crc32"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// A server that leads a stream which sources from others may lose its position in
// one of them, and then stores messages again that the stream has had; see
// docs/decisions/0027. Such a repeat has a new sequence, so JetStream takes it for a
// new message. Its Nats-Stream-Source header names the sequence that it has in the
// origin.
//
// A repeat is dropped when this consumer has finished its first copy, which is when
// an ack or a term was sent for it. Nothing else counts: neither that the first copy
// was stored, nor that it was delivered. Four more things have to be so:
//
//   - The origin is the same incarnation of the same stream, by the same filter and
//     transform: the header has the identity that servers from 2.15 write. Those
//     refuse the header in what clients publish, so it is not forged.
//   - Subject, message ID and payload are the same, by their checksum. An origin that
//     lost its last messages gives their sequences to others.
//   - The stream sequence is higher than that of the first copy. A redelivery has the
//     same, also after an operator has reset the consumer.
//   - The stream is the one that the first copy was in, and not one made since: it is
//     asked for, once for the messages that wait here.
//
// What is finished is kept here, and in the stream repeatsStream for other instances
// and for the time after a restart. Where something is not known, the handler gets the
// message.

// Names on the wire.
const (
	sourceHeader   = "Nats-Stream-Source"
	repeatsStream  = "MONOTEL_SOURCED"
	repeatsSubject = "monotel.sourced."
)

const (
	repeatsMaxBytes = 32 << 20 // in the stream, of all consumers

	noteDelay   = 500 * time.Millisecond // what is finished is written down after this
	noteFresh   = time.Second            // a note is read again after this, when it is needed
	noteTimeout = time.Second            // for one request
	notePause   = 2 * time.Second        // without requests, after one failed
	noteTries   = 5                      // against other instances that write at the same time

	maxOrigins = 64     // of one consumer
	maxNotes   = 256    // of one consumer, 4.4 KB each
	maxTracked = 16_384 // sourced messages that are not finished
)

// A sourceRef is where a sourced message comes from.
type sourceRef struct {
	stream   string // with a hash of the API prefix, when it is elsewhere
	filter   string // and the transform
	identity string
	sequence uint64
}

// parseSource reads "<stream> <sequence> <filter> <transform> <subject> <identity>". Headers
// of servers before 2.15 have no identity and are refused.
func parseSource(header string) (ref sourceRef, ok bool) {
	stream, rest, ok := strings.Cut(header, " ")
	if !ok || stream == "" {
		return ref, false
	}
	sequence, rest, ok := strings.Cut(rest, " ")
	if !ok {
		return ref, false
	}
	n, err := strconv.ParseUint(sequence, 10, 64)
	if err != nil || n == 0 {
		return ref, false
	}
	filter := strings.IndexByte(rest, ' ')
	if filter < 0 {
		return ref, false
	}
	transform := strings.IndexByte(rest[filter+1:], ' ')
	if transform < 0 {
		return ref, false
	}
	both := rest[:filter+1+transform]
	subject, identity, ok := strings.Cut(rest[len(both)+1:], " ")
	if !ok || subject == "" || identity == "" || strings.Contains(identity, " ") {
		return ref, false
	}
	return sourceRef{stream: stream, filter: both, identity: identity, sequence: n}, true
}

// sourceOf returns the header of a message that a handler may not have to see.
func sourceOf(m *Msg) (ref sourceRef, ok bool) {
	if h := m.Header[sourceHeader]; len(h) == 1 && m.replay == nil {
		return parseSource(h[0])
	}
	return ref, false
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// checksum tells messages apart that have had the same sequence in an origin.
func checksum(m *Msg) uint32 {
	sum := crc32.Checksum(m.Data, castagnoli)
	sum = checksumText(sum, m.Subject)
	if id := m.Header[jetstream.MsgIDHeader]; len(id) > 0 {
		sum = checksumText(^sum, id[0]) // or a subject would look the same
	}
	return sum
}

// checksumText is crc32.Update of a text and its length, without an allocation.
func checksumText(sum uint32, s string) uint32 {
	sum = ^sum
	for i := range len(s) {
		sum = castagnoli[byte(sum&0xff)^s[i]] ^ sum>>8
	}
	return ^sum ^ uint32(len(s)) //nolint:gosec // a part of it will do
}

// An origin is one source of the stream.
type origin struct {
	ref   sourceRef // without a sequence
	token string    // in the subjects of its notes
	notes map[uint64]*keptNote

	// The highest sequence that is known to have come, and where it was stored. The
	// server sources in order, so one that is not higher and is stored later says that
	// it has gone back.
	highest  uint64
	storedAt uint64
}

// came notes that a message has come.
func (o *origin) came(sequence, stored uint64) {
	if sequence > o.highest {
		o.highest, o.storedAt = sequence, stored
	}
}

// wentBack reports whether the server has sourced the message out of order.
func (o *origin) wentBack(sequence, stored uint64) bool {
	return sequence <= o.highest && stored > o.storedAt
}

// A keptNote is a note, and what is known of its copy in the stream.
type keptNote struct {
	sourceNote
	subject  string
	revision uint64        // of the copy; 0: there is none
	read     time.Duration // when the copy was read, as uptime; 0: never
	used     time.Duration
	dirty    bool // there is something that the copy does not have
}

// repeats knows which sourced messages a consumer has finished.
type repeats struct {
	tracked atomic.Int64 // len(inWork), for a look without the lock
	unsure  atomic.Int64 // since when the server has not said which stream it is, as uptime; 0: it has

	mu       sync.Mutex
	created  *time.Time // of the stream that all of this is about
	origins  []*origin
	notes    int           // of all origins
	now      time.Duration // when a message was last looked at, as uptime
	inWork   map[uint64]workedOn
	pause    time.Duration // no requests until then, as uptime
	verified time.Duration // when the stream was last asked for, as uptime
	timer    *time.Timer   // nil: nothing waits to be written
	stopped  bool
	writing  sync.WaitGroup
	stream   jetstream.Stream // nil: not looked up, or not there
}

// workedOn is a sourced message that is not finished. It is kept here, since the
// handler may change the message.
type workedOn struct {
	origin   *origin
	sequence uint64
	sum      uint32
}

// withoutRepeats settles the repeats of a batch and returns the other messages. When the
// consumer stops it hands back what may be a repeat.
func (c *streamConsumer) withoutRepeats(batch []*Msg) []*Msg {
	var rest, back []*Msg // rest is nil: the same as batch
	var now time.Duration
	for i, m := range batch {
		ref, ok := sourceOf(m)
		if ok && now == 0 {
			now = uptime()
		}
		var repeat, stops bool
		if ok {
			repeat, stops = c.isRepeatAtLast(m, ref, now)
		}
		if !repeat && !stops {
			if rest != nil {
				rest = append(rest, m)
			}
			continue
		}
		if rest == nil {
			rest = append(make([]*Msg, 0, len(batch)), batch[:i]...)
		}
		if repeat {
			c.dropRepeat(m, ref)
		} else {
			back = append(back, m)
		}
	}
	c.handBack(back)
	if rest == nil {
		return batch
	}
	return rest
}

func (c *streamConsumer) dropRepeat(m *Msg, ref sourceRef) {
	if c.finish(m, settlement{kind: settleAck}) != nil {
		return // it comes again
	}
	c.tel.Repeated()
	c.report(slog.LevelWarn, "message dropped: the server has sourced it again, and it was handled before", m, nil,
		slog.String("origin", ref.stream), slog.Uint64("origin_sequence", ref.sequence))
}

// isRepeatAtLast is isRepeat. While the server does not say whether the stream is still the
// one in which m was finished, m waits here, its lease kept; after lookUpPatience it is
// taken for new. stops says that the consumer stops before that is known.
func (c *streamConsumer) isRepeatAtLast(m *Msg, ref sourceRef, now time.Duration) (repeat, stops bool) {
	r := &c.repeats
	for {
		wait := r.unsure.Load() == 0 || uptime()-time.Duration(r.unsure.Load()) < lookUpPatience
		repeat, sure := c.isRepeat(m, ref, now, wait)
		if sure {
			r.unsure.Store(0)
			return repeat, false
		}
		if !wait {
			return false, false
		}
		r.unsure.CompareAndSwap(0, int64(uptime()))
		select {
		case <-c.ending:
			return false, true
		case <-time.After(lookUpPause):
		}
	}
}

// isRepeat reports whether m was finished before under another sequence. If not, m
// is remembered until it is finished. It is not sure if the server does not answer; then m
// is remembered unless the caller waits and asks again.
func (c *streamConsumer) isRepeat(m *Msg, ref sourceRef, now time.Duration, wait bool) (repeat, sure bool) {
	r := &c.repeats
	sum := checksum(m)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = now
	r.follow(c.created.Load())
	o := r.origin(c, ref)
	if o == nil {
		return false, true
	}
	n := r.note(c, o, ref.sequence)
	switch {
	case n.read == 0, now-n.read > noteFresh:
		c.readNote(o, n, ref.sequence)
	case o.wentBack(ref.sequence, m.sequence()) && n.read <= now-m.lease.untouched(now):
		// Others may have finished it since the note was read.
		c.readNote(o, n, ref.sequence)
	}
	sure = true
	if n.has(ref.sequence, m.sequence(), sum) {
		var same bool
		same, sure = c.sameStream(m)
		if same || !sure && wait {
			return same, sure
		}
	}
	if r.follow(c.created.Load()) {
		return false, true // nothing is known of the new stream
	}
	o.came(ref.sequence, m.sequence())
	r.begin(m.sequence(), workedOn{origin: o, sequence: ref.sequence, sum: sum})
	return false, sure
}

// follow forgets everything when the stream is another one than before, and reports
// whether it is.
func (r *repeats) follow(created *time.Time) bool {
	if r.created != nil && (r.created == created || r.created.Equal(*created)) {
		return false
	}
	r.created = created
	r.origins, r.notes = nil, 0
	clear(r.inWork)
	r.tracked.Store(0)
	return true
}

// origin finds a source of the stream. It returns nil when there are too many.
func (r *repeats) origin(c *streamConsumer, ref sourceRef) *origin {
	for _, o := range r.origins {
		if o.ref.stream == ref.stream && o.ref.filter == ref.filter && o.ref.identity == ref.identity {
			return o
		}
	}
	if len(r.origins) >= maxOrigins {
		return nil
	}
	ref = sourceRef{stream: strings.Clone(ref.stream), filter: strings.Clone(ref.filter), identity: strings.Clone(ref.identity)}
	o := &origin{ref: ref, token: noteToken(c.info.Stream, c.info.Durable, *r.created, ref), notes: make(map[uint64]*keptNote)}
	r.origins = append(r.origins, o)
	return o
}

// note returns the note that is about a sequence of the origin.
func (r *repeats) note(c *streamConsumer, o *origin, sequence uint64) *keptNote {
	number := sequence / noteSize
	n := o.notes[number]
	if n == nil {
		if r.notes >= maxNotes {
			r.evict()
		}
		n = &keptNote{subject: repeatsSubject + c.info.Stream + "." + c.info.Durable + "." + o.token + "." + strconv.FormatUint(number, 10)}
		o.notes[number] = n
		r.notes++
	}
	n.used = r.now
	return n
}

// evict forgets the note that was not needed for the longest time, one that is
// written down if there is one.
func (r *repeats) evict() {
	var from *origin
	var which uint64
	var oldest *keptNote
	for _, o := range r.origins {
		for number, n := range o.notes {
			if oldest == nil || oldest.dirty && !n.dirty || oldest.dirty == n.dirty && n.used < oldest.used {
				from, which, oldest = o, number, n
			}
		}
	}
	if oldest != nil {
		delete(from.notes, which)
		r.notes--
	}
}

func (r *repeats) begin(sequence uint64, w workedOn) {
	if r.inWork == nil {
		r.inWork = make(map[uint64]workedOn)
	}
	if len(r.inWork) >= maxTracked {
		for other := range r.inWork { // any: others may have settled it
			delete(r.inWork, other)
			break
		}
	}
	r.inWork[sequence] = w
	r.tracked.Store(int64(len(r.inWork)))
}

// finished notes that a message was acked or terminated.
func (c *streamConsumer) finished(m *Msg) {
	r := &c.repeats
	if r.tracked.Load() == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	w, ok := r.inWork[m.sequence()]
	if !ok {
		return
	}
	delete(r.inWork, m.sequence())
	r.tracked.Store(int64(len(r.inWork)))
	n := r.note(c, w.origin, w.sequence)
	n.add(w.sequence, m.sequence(), w.sum)
	n.dirty = true
	c.writeLater()
}

// writeLater has the notes written soon. r.mu is held.
func (c *streamConsumer) writeLater() {
	r := &c.repeats
	if r.timer != nil || r.stopped {
		return
	}
	r.writing.Add(1)
	r.timer = time.AfterFunc(max(noteDelay, r.pause-uptime()), func() {
		defer r.writing.Done()
		c.writeNotes(c.rt.whileConnected())
	})
}

// unwritten lists the notes with something that their copies do not have. r.mu is held.
func (r *repeats) unwritten() []*keptNote {
	var all []*keptNote
	for _, o := range r.origins {
		for _, n := range o.notes {
			if n.dirty {
				all = append(all, n)
			}
		}
	}
	return all
}

// sameStream asks for the stream since m has arrived, and reports whether it is the
// one that is known. It is not sure without an answer. r.mu is held, so that a worker with
// the next batch waits for the answer instead of asking, too.
func (c *streamConsumer) sameStream(m *Msg) (same, sure bool) {
	r := &c.repeats
	now := uptime()
	if arrived := now - m.lease.untouched(now); r.verified > arrived {
		return true, true
	}
	if !sourcesTrusted(c.rt.nc.ConnectedServerVersion()) {
		return false, true
	}
	if now < r.pause {
		return false, false
	}
	ctx, cancel := context.WithTimeout(c.rt.whileConnected(), noteTimeout)
	defer cancel()
	s, err := c.rt.js.Stream(ctx, c.info.Stream)
	if err != nil {
		c.pauseNotes(err)
		return false, false
	}
	if created := s.CachedInfo().Created; !created.Equal(*r.created) {
		c.created.Store(&created) // another instance has made it again
		return false, true
	}
	r.verified = now
	return true, true
}

// sourcesTrusted reports whether the server refuses the header in what clients publish.
func sourcesTrusted(version string) bool {
	const major, minor = 2, 15
	var a, b int
	_, err := fmt.Sscanf(version, "%d.%d", &a, &b)
	return err == nil && (a > major || a == major && b >= minor)
}

// stopRepeats writes down what is left, within ctx.
func (c *streamConsumer) stopRepeats(ctx context.Context) {
	r := &c.repeats
	r.mu.Lock()
	r.stopped = true
	if r.timer != nil && r.timer.Stop() {
		r.writing.Done()
	}
	r.mu.Unlock()
	r.writing.Wait()
	if ctx.Err() == nil {
		c.writeNotes(ctx)
	}
}
