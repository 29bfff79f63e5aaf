package triage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"iter"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

const (
	// A chunk is what is read at a time: this many sequences, or fewer, so that its
	// messages have about aimedBytes. It never has more than chunkBytes, unless it
	// is a single message. That bounds the memory that a scan takes: a chunk that is
	// worked on, and as many as are read ahead.
	chunk      = 2048
	firstChunk = 128 // before anything is known of the size of messages
	growth     = 4   // how many times as much the next chunk may be
	aimedBytes = 4 << 20
	chunkBytes = 6 << 20

	// aheads is how many chunks are read at a time, so that the server need not
	// wait for us between two of them.
	aheads = 2

	scanTries  = 5
	fetchWait  = 3 * time.Second
	stallWait  = 5 * fetchWait   // without a message, after which a read has failed
	sizeHeader = "Nats-Msg-Size" // what the server says instead of a body
)

// A message is one of the dead-letter stream.
type message struct {
	subject  string
	header   nats.Header
	data     []byte
	sequence uint64
	stored   time.Time
}

func (m *message) id() string { return m.subject[strings.LastIndexByte(m.subject, '.')+1:] }

// isRecord reports whether the message is a dead letter, or the trace of one.
func (m *message) isRecord() bool {
	return m.header.Get(dlq.HeaderVersion) != "" && m.header.Get(dlq.HeaderID) != ""
}

// payloadSize is about what the payload takes, which may be elsewhere.
func (m *message) payloadSize() int {
	n, err := strconv.Atoi(m.header.Get(dlq.HeaderBodySize))
	if err != nil || n < 0 {
		n = 0
	}
	return max(len(m.data), min(n, mostBytes))
}

// record decodes the message, which may have come without its body.
func (m *message) record(headersOnly bool) (*dlq.Record, error) {
	r, err := dlq.Decode(m.header, m.data)
	if r != nil && headersOnly && r.Body == dlq.BodyInline {
		r.Data = nil
		if size := m.header.Get(sizeHeader); size != "" {
			_, _ = fmt.Sscanf(size, "%d", &r.BodySize)
		}
	}
	return r, err
}

// A pace is how many sequences are read at a time. It follows the size of the
// messages.
type pace struct{ n atomic.Uint64 }

// saw takes what came of asking for some sequences: r has all of them, or as many
// as fit a chunk.
func (p *pace) saw(asked uint64, r *reading) {
	got := r.upto - r.first + 1
	n := got * aimedBytes / uint64(max(r.size, 1))
	if got < asked {
		n = min(n, asked/2) //nolint:mnd // so that it comes to an end, whatever comes first
	}
	p.n.Store(max(min(n, growth*asked, chunk), 1))
}

// chunksBackwards reads the messages of a range of sequences, the newest chunk
// first; within a chunk the oldest message comes first. The next chunk is read
// while one is worked on. What comes with an error is the end.
func (d *Desk) chunksBackwards(ctx context.Context, first, last uint64, headersOnly bool) iter.Seq2[[]message, error] {
	return func(yield func([]message, error) bool) {
		type read struct {
			messages []message
			err      error
		}
		ctx, cancel := context.WithCancel(ctx)
		var readers sync.WaitGroup
		defer readers.Wait()
		defer cancel()
		var pace pace
		pace.n.Store(firstChunk)
		queue := make(chan chan read, aheads-1) // with one that waits for its place
		readers.Go(func() {
			defer close(queue)
			for hi := last; hi >= first && hi > 0; {
				chunks := make(chan read)
				select {
				case queue <- chunks:
				case <-ctx.Done():
					return
				}
				lo, to := first, hi
				if n := pace.n.Load(); hi-first >= n {
					lo = hi - n + 1
				}
				readers.Go(func() {
					defer close(chunks)
					d.readBackwards(ctx, lo, to, headersOnly, &pace, func(messages []message, err error) bool {
						select {
						case chunks <- read{messages, err}:
							return true
						case <-ctx.Done():
							return false
						}
					})
				})
				hi = lo - 1
			}
		})
		for chunks := range queue {
			for r := range chunks {
				if !yield(r.messages, r.err) || r.err != nil {
					return
				}
			}
		}
		if ctx.Err() != nil {
			yield(nil, context.Cause(ctx))
		}
	}
}

// readBackwards reads the messages from one sequence to another, all of them
// together if they fit a chunk, else the newest first.
func (d *Desk) readBackwards(ctx context.Context, lo, hi uint64, headersOnly bool, pace *pace, yield func([]message, error) bool) {
	for hi >= lo {
		from := lo
		if n := pace.n.Load(); hi-lo >= n {
			from = hi - n + 1
		}
		r, err := d.readSome(ctx, from, hi, headersOnly)
		if err != nil {
			yield(nil, err)
			return
		}
		pace.saw(hi-from+1, r)
		if r.upto < hi { // the newest are missing: they come first, so it is read again
			continue
		}
		if !yield(r.messages, nil) {
			return
		}
		hi = from - 1
	}
}

// readSome reads the messages from one sequence to another, or as many of them as
// fit a chunk. It tries again when the connection is lost half-way.
func (d *Desk) readSome(ctx context.Context, lo, hi uint64, headersOnly bool) (*reading, error) {
	for try := 1; ; try++ {
		// On a slow line the answer comes behind what another reader has asked for.
		r, err := d.readOnce(ctx, lo, hi, headersOnly, time.Duration(try)*fetchWait, stallWait)
		if err == nil {
			return r, nil
		}
		if ctx.Err() != nil || try == scanTries || errors.Is(err, jetstream.ErrStreamNotFound) {
			return nil, fmt.Errorf("read dead-letter stream %q: %w", d.cfg.Stream, err)
		}
		if err := pause(ctx, time.Duration(try)*time.Second/4); err != nil {
			return nil, err
		}
	}
}

// A reading is what was read of a range of sequences: all that there is up to one
// of them.
type reading struct {
	messages    []message
	size        int // of the messages, in bytes
	first, upto uint64

	d          *Desk
	consumer   jetstream.Consumer // made for this
	inbox      string
	incoming   chan *nats.Msg
	stall      time.Duration
	moved      time.Time // when the last message came
	left       uint64    // messages that the consumer has, also beyond the range
	received   uint64
	reconnects uint64
	full       bool
}

// readOnce reads the messages from one sequence to another, as many of them as fit
// a chunk. It gives up when the server does not answer for so long as begin, or no
// message has come for so long as stall, however long it may take in all.
func (d *Desk) readOnce(ctx context.Context, lo, hi uint64, headersOnly bool, begin, stall time.Duration) (*reading, error) {
	const spare = 16 // for what the server says beside the messages
	create, cancel := context.WithTimeout(ctx, begin)
	defer cancel()
	r := &reading{d: d, first: lo, stall: stall, moved: time.Now(), reconnects: d.nc.Stats().Reconnects, inbox: d.nc.NewInbox()}
	var err error
	r.consumer, err = d.js.CreateConsumer(create, d.cfg.Stream, jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: lo,
		HeadersOnly: headersOnly, MemoryStorage: true, Replicas: 1, InactiveThreshold: 4 * stall, //nolint:mnd // while much is on its way
	})
	if err != nil {
		return nil, err
	}
	info := r.consumer.CachedInfo()
	defer func() {
		// Nobody waits for it. If it is lost the server deletes it by itself.
		_ = d.nc.Publish(d.api.Subject("CONSUMER.DELETE.", d.cfg.Stream+"."+info.Name), nil)
	}()
	r.left = info.NumPending
	most := min(r.left, hi-lo+1)
	r.incoming, r.messages = make(chan *nats.Msg, most+spare), make([]message, 0, most)
	sub, err := d.nc.ChanSubscribe(r.inbox, r.incoming)
	if err != nil {
		return nil, err
	}
	defer func() { _ = sub.Unsubscribe() }()
	for r.left > 0 && r.upto < hi && !r.full {
		err := r.pull(ctx, min(r.left, hi-lo+1-uint64(len(r.messages))), chunkBytes-r.size, hi)
		if r.full && len(r.messages) == 0 { // the first is larger than a chunk, so it comes alone
			r.full = false
			err = r.pull(ctx, 1, 0, hi)
		}
		if err != nil {
			return nil, err
		}
		r.full = r.full || r.size >= chunkBytes
	}
	if !r.full || r.left == 0 {
		if err := r.nothingFrom(ctx, max(r.upto+1, lo), hi); err != nil {
			return nil, err
		}
		r.upto = hi
	}
	return r, nil
}

// nothingFrom makes sure that there is no message in a range of sequences. The
// consumer may be on a replica that is late, and has less than the leader.
func (r *reading) nothingFrom(ctx context.Context, lo, hi uint64) error {
	if lo > hi || !r.d.replicated.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, fetchWait)
	defer cancel()
	next, err := r.d.api.Next(ctx, r.d.cfg.Stream, ">", lo)
	there, err := has(r.d.cfg.Stream, next, err)
	switch {
	case err != nil:
		return err
	case there && next.Sequence <= hi:
		return errBehind
	}
	return nil
}

// pull asks for messages, so many of them and of so many bytes together at most, 0
// bytes for no limit, and takes what comes, up to a sequence. It returns without
// an error when there is no more to wait for: all have come, or the server has said
// that the next is too large or that there is none.
func (r *reading) pull(ctx context.Context, batch uint64, limit int, hi uint64) error {
	request, err := json.Marshal(struct {
		Batch    uint64        `json:"batch"`
		MaxBytes int           `json:"max_bytes,omitempty"`
		Expires  time.Duration `json:"expires"`
	}{batch, limit, fetchWait})
	if err != nil {
		return err
	}
	next := r.d.api.Subject("CONSUMER.MSG.NEXT.", r.d.cfg.Stream+"."+r.consumer.CachedInfo().Name)
	if err := r.d.nc.PublishRequest(next, r.inbox, request); err != nil {
		return err
	}
	idle := time.NewTimer(r.patience())
	defer idle.Stop()
	for ; batch > 0; batch-- {
		var m *nats.Msg
		for m == nil {
			select {
			case m = <-r.incoming:
			case <-idle.C:
				if over, err := r.look(ctx); over || err != nil {
					return err
				}
				idle.Reset(r.patience())
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if m.Reply == "" {
			return r.status(ctx, m)
		}
		idle.Reset(r.patience())
		if err := r.add(m, hi); err != nil {
			return err
		}
		if r.upto >= hi || (limit > 0 && r.size >= chunkBytes) {
			return nil
		}
	}
	return nil
}

// patience is how long nothing may come before we ask why. By then a request has
// expired.
func (r *reading) patience() time.Duration { return min(fetchWait+time.Second, r.stall) }

// add takes a message that has come.
func (r *reading) add(m *nats.Msg, hi uint64) error {
	meta, err := m.Metadata()
	if err != nil {
		return err
	}
	r.moved = time.Now()
	if meta.Sequence.Consumer != r.received+1 {
		return errGap
	}
	r.received++
	r.left = meta.NumPending
	r.upto = min(meta.Sequence.Stream, hi)
	if meta.Sequence.Stream <= hi {
		r.messages = append(r.messages, message{m.Subject, m.Header, m.Data, meta.Sequence.Stream, meta.Timestamp})
		r.size += m.Size()
	}
	return nil
}

// status takes what the server says instead of a message: why it sends no more.
func (r *reading) status(ctx context.Context, m *nats.Msg) error {
	const conflict, noMessages, timeout, tooLarge = "409", "404", "408", "Message Size Exceeds MaxBytes"
	code, text := m.Header.Get("Status"), m.Header.Get("Description")
	switch {
	case code == conflict && text == tooLarge:
		r.full = true
		return nil
	case code == noMessages || code == timeout:
		_, err := r.look(ctx) // what was there is gone, or it is slow
		return err
	}
	return fmt.Errorf("%w: %s %s", errRefused, code, text)
}

// look finds out why nothing comes, and reports whether to wait no longer: what was
// asked for is lost, or there is nothing more.
func (r *reading) look(ctx context.Context) (over bool, err error) {
	if time.Since(r.moved) >= r.stall {
		return false, errStalled
	}
	if r.d.nc.Stats().Reconnects != r.reconnects {
		return false, errGap
	}
	ask, cancel := context.WithTimeout(ctx, fetchWait)
	defer cancel()
	info, err := r.consumer.Info(ask)
	switch {
	case ctx.Err() != nil:
		return false, context.Cause(ctx)
	case errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, nats.ErrConnectionClosed):
		return false, err
	case err != nil:
		return false, nil // nobody knows: if it is on its way, so is the answer
	case info.Delivered.Consumer == r.received:
		r.left = info.NumPending
		return true, nil
	}
	return false, nil // on its way, or lost: then it stalls
}

var (
	// Nothing is acknowledged, so what was on its way when a connection broke does
	// not come again.
	errGap = errors.New("messages were lost with a connection")

	errBehind  = errors.New("a replica of the stream does not have all messages yet")
	errStalled = errors.New("no message has come for too long")
	errRefused = errors.New("the server sends no messages")
)

// pause waits, or returns why ctx has ended.
func pause(ctx context.Context, how time.Duration) error {
	timer := time.NewTimer(how)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// A later is what a scan that goes backwards has seen of an entry whose record is
// still to come.
type later struct {
	state                       dlq.State
	last                        uint64
	changed                     int64 // nanoseconds since 1970, 0: it is not known
	actor, operation            string
	replays, failures, revision int32
	revisionSequence            uint64
	sequences                   []uint64 // of what is on its subject after the record, newest first
	failure                     *dlq.Record
}

// laters keeps what was seen of entries, by the hashes of their subjects: anybody who
// may publish a dead letter can put another's ID into its subject. Its memory follows
// the entries that were changed and whose record is still to come, and takes about 10
// bytes for each that is discarded.
type laters struct {
	entries map[uint64]*later
	traced  map[uint64]struct{} // those whose trace was seen
	names   map[string]string   // few, so each is kept once
}

func newLaters() *laters {
	return &laters{entries: make(map[uint64]*later), traced: make(map[uint64]struct{}), names: make(map[string]string)}
}

var subjectSeed = maphash.MakeSeed()

func hashOf(subject string) uint64 { return maphash.String(subjectSeed, subject) }

func (l *laters) name(s string) string {
	if known, ok := l.names[s]; ok {
		return known
	}
	const most = 10_000
	if len(l.names) < most {
		s = strings.Clone(s)
		l.names[s] = s
	}
	return s
}

// add takes a change that is older than all that were added of its entry.
func (l *laters) add(m *message) {
	c, err := dlq.DecodeChange(m.header, m.data)
	if err != nil {
		return
	}
	e := l.see(m)
	if e.state == "" || c.Kind == dlq.ChangeDiscarded { // a discard is final
		e.state, e.actor, e.changed = dlq.State(l.name(string(c.To()))), l.name(c.Actor), 0
		if !c.Time.IsZero() {
			e.changed = c.Time.UnixNano()
		}
	}
	if e.operation == "" {
		e.operation = l.name(c.Operation)
	}
	switch c.Kind { //nolint:exhaustive // the others leave no more than their state
	case dlq.ChangeReplaying:
		e.replays++
	case dlq.ChangeFailedAgain:
		e.failures++
		if e.failure == nil {
			e.failure = c.Failure
		}
	case dlq.ChangeEdited:
		if e.revision == 0 {
			e.revision, e.revisionSequence = int32(c.Revision), m.sequence //nolint:gosec // edits are few
		}
	}
}

// see notes a message that is none of the records, and returns what was seen of its
// entry. If that is nothing, the message is the last on its subject.
func (l *laters) see(m *message) *later {
	key := hashOf(m.subject)
	e := l.entries[key]
	if e == nil {
		e = &later{last: m.sequence}
		l.entries[key] = e
	}
	e.sequences = append(e.sequences, m.sequence)
	return e
}

// isBeforeTrace reports whether the message is older than the trace on its subject.
func (l *laters) isBeforeTrace(m *message) bool {
	_, ok := l.traced[hashOf(m.subject)]
	return ok
}

// addTrace takes the trace of an entry. What came after it does not count, but for
// that it was there.
func (l *laters) addTrace(m *message) (last uint64) {
	key := hashOf(m.subject)
	last = m.sequence
	if e := l.entries[key]; e != nil {
		last = e.last
		delete(l.entries, key)
	}
	if m.header.Get(jetstream.MsgRollup) == "" { // earlier versions removed what was before it by a rollup
		l.traced[key] = struct{}{}
	}
	return last
}

// state is that of an entry whose record has come.
func (l *laters) state(m *message) dlq.State {
	if e := l.entries[hashOf(m.subject)]; e != nil && e.state != "" {
		return e.state
	}
	return dlq.StateOpen
}

// drop forgets what was kept for an entry.
func (l *laters) drop(m *message) { delete(l.entries, hashOf(m.subject)) }

// take completes an entry and forgets what was kept for it.
func (l *laters) take(e *dlq.Entry, m *message) {
	k := l.entries[hashOf(m.subject)]
	if k == nil {
		return
	}
	l.drop(m)
	e.State, e.Last, e.Actor, e.Operation = cmp.Or(k.state, e.State), k.last, k.actor, k.operation
	if k.changed != 0 {
		e.Changed = time.Unix(0, k.changed).UTC()
	}
	slices.Reverse(k.sequences)
	e.Later = k.sequences
	e.Replays, e.Failures, e.Revision, e.RevisionSequence = int(k.replays), int(k.failures), int(k.revision), k.revisionSequence
	if k.failure != nil {
		e.Failure = k.failure
	}
}
