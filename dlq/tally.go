package dlq

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

// Stand-ins for names of consumers, of which a [Tally] tells at most a hundred
// apart.
const (
	OpenExternal = "_external" // consumers that are not an App's
	OpenOther    = "_OTHER"    // those that came after the first hundred
)

// An OpenCount says how many dead letters of a consumer are open.
type OpenCount struct {
	Consumer string    `json:"consumer"` // durable name, OpenExternal or OpenOther
	Count    int       `json:"count"`
	Oldest   time.Time `json:"oldest,omitzero"` // when the oldest of them had failed, in whole seconds; zero: none is open
}

// Open reports whether a dead letter in this state is still to be dealt with. One
// that is being replayed is: until its consumer has handled it nothing is better,
// and if the consumer is down that never happens.
func (s State) Open() bool { return s == StateOpen || s == StateReplaying }

// A Tally counts the open dead letters of a stream, for gauges. Every process that
// asks gets the same numbers: what was counted is kept in a bucket beside the
// stream, with the sequence up to which it was, and whoever finds messages beyond
// that goes on from there.
//
// The last message on a dead letter's subject says whether it is open, so a Tally
// keeps the set of those that are, by their subjects, and not just how many: a
// message that it never sees because discarding has removed it, or one that it sees
// twice, makes no difference, and the oldest is known without a search. The set is
// in the bucket as long as it is small. When it is large, one process keeps it, and
// when that one ends and something happens, another reads the stream from the
// start; until it has, the numbers stay as they were.
//
// What somebody removes from the stream by hand, or an age limit, is noticed by the
// number of messages and subjects, unless it was just being counted from the start.
// Then it is counted anew.
//
// An Update also finishes discards that it comes across, see [Store.FinishDiscard].
//
// It is safe for concurrent use.
type Tally struct {
	store  *Store
	id     string
	limits tallyLimits

	mu       sync.Mutex
	bucket   jetstream.KeyValue
	known    *tallied  // what the bucket has, nil: nothing
	revision uint64    // of it, 0: nothing
	behind   time.Time // since when the stream has more than that, and nobody has written
	work     *fold     // nil: what there is to know is in the bucket
	odd      int       // how often in a row something was missing from the stream
	short    int       // how often in a row its last message was not to be seen
	traced   []string  // subjects of traces that may have something before them
	deleted  uint64    // messages that were deleted there, and are not counted as removed yet
}

// tallyLimits bound what a Tally takes.
type tallyLimits struct {
	batch     int           // messages that are read at a time
	update    int           // messages that one Update reads
	reading   time.Duration // that it takes for it
	entries   int           // of the set; of those beyond only the number is known
	stored    int           // entries that the bucket takes
	consumers int           // that are told apart
	patience  time.Duration // how long somebody else may take to go on
	recount   time.Duration // the least between the ends of two counts from the start, unless a process ends
}

func defaultTallyLimits() tallyLimits {
	return tallyLimits{
		batch: 512, update: 200_000, reading: 3 * time.Second, entries: 1 << 20, stored: 16 << 10, consumers: 100,
		patience: 45 * time.Second, recount: 5 * time.Minute,
	}
}

// NewTally returns a tally of a store's dead letters. It touches no network.
func NewTally(s *Store) *Tally {
	return &Tally{store: s, id: rand.Text(), limits: defaultTallyLimits()}
}

// tallied is what the bucket has. The key says its version.
type tallied struct {
	Created  time.Time   `json:"created"`            // of the stream
	Sequence uint64      `json:"sequence"`           // up to which everything counts
	Last     uint64      `json:"last"`               // of the stream then; the same, unless its last message was removed by hand
	Subjects uint64      `json:"subjects"`           // that the stream should have
	Removed  uint64      `json:"removed"`            // messages that it should lack
	Counted  bool        `json:"counted"`            // Counts are known
	Counts   []OpenCount `json:"counts,omitempty"`   // by consumer, in the order in which they came
	Whole    bool        `json:"whole"`              // Entries are all that are open
	Entries  []byte      `json:"entries,omitempty"`  // see fold.encode
	Keeper   string      `json:"keeper,omitempty"`   // the Tally that has the entries, or reads the stream from the start
	Progress uint64      `json:"progress,omitempty"` // up to where it has read
	Recount  time.Time   `json:"recount,omitzero"`   // not before, if something is missing
}

const tallyKey = "open.v1"

// A position is what a stream says of itself.
type position struct {
	created                       time.Time
	last, msgs, subjects, removed uint64
}

func positionOf(info *jetstream.StreamInfo) position {
	s := info.State
	return position{created: info.Created, last: s.LastSeq, msgs: s.Msgs, subjects: s.NumSubjects, removed: s.LastSeq - s.Msgs}
}

// at reports whether the stream is as it was when this was counted.
func (c *tallied) at(p position) bool {
	return c.of(p) && c.Counted && c.Last == p.last && c.Subjects == p.subjects && c.Removed == p.removed
}

// of reports whether this is of the same stream.
func (c *tallied) of(p position) bool {
	return c != nil && c.Created.Equal(p.created) && c.Sequence <= p.last
}

func (c *tallied) counts() []OpenCount {
	if c == nil || !c.Counted {
		return nil
	}
	return append([]OpenCount{}, c.Counts...)
}

// Update returns the numbers by consumer, as they are or were a moment ago, and nil
// while they are not known: when the stream is read for the first time. A consumer
// of which none is open any more is among them.
//
// When nothing has changed it takes one round trip. Otherwise it reads the headers
// of what is new, a limited number of messages; the next Update goes on. A process
// that cannot use the bucket gets an error.
func (t *Tally) Update(ctx context.Context) ([]OpenCount, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	counts, err := t.update(ctx)
	if err != nil {
		t.bucket = nil // it may have been deleted
		return nil, fmt.Errorf("count the open dead letters of stream %q: %w", t.store.cfg.StreamName(), err)
	}
	return counts, nil
}

func (t *Tally) update(ctx context.Context) ([]OpenCount, error) {
	info, err := t.store.api.Stream(ctx, t.store.cfg.StreamName()) // a refusal is seen at once
	if err != nil {
		return nil, err
	}
	p := positionOf(info)
	switch {
	case p.last == 0: // and nothing ever was
		t.work = nil
		return []OpenCount{}, nil
	case t.known.at(p):
		t.behind = time.Time{}
		t.deleted += t.finish(ctx)
		return t.known.counts(), nil
	case t.behind.IsZero():
		t.behind = time.Now()
	}
	if err := t.load(ctx, info.Config); err != nil {
		return nil, err
	}
	if t.known.at(p) {
		return t.known.counts(), nil
	}
	if p.msgs == 0 { // somebody has purged it
		if t.work, err = t.claim(ctx, p); t.work == nil || err != nil {
			return []OpenCount{}, err
		}
		t.work.sequence = p.last
	}
	for {
		f, err := t.begin(ctx, p)
		if f == nil || err != nil {
			return t.known.counts(), err
		}
		f.removed, t.deleted = f.removed+t.deleted, 0
		done, err := t.read(ctx, f, p.last)
		if err != nil {
			return nil, err
		}
		t.deleted = t.finish(ctx)
		if !done || f.sequence < p.last && !t.gone() {
			return t.known.counts(), t.progress(ctx, f)
		}
		if !t.missing(f, p) {
			return t.publish(ctx, f, p)
		}
		// From the start, once.
		if t.work, err = t.claim(ctx, p); t.work == nil || err != nil {
			return t.known.counts(), err
		}
	}
}

// finish finishes discards that somebody else has left, for a limited time, and
// returns how many messages that has deleted. The next Update goes on.
func (t *Tally) finish(ctx context.Context) (deleted uint64) {
	const most = time.Second
	for began := time.Now(); len(t.traced) > 0 && time.Since(began) < most; t.traced = t.traced[1:] {
		n, err := t.store.FinishDiscard(ctx, t.traced[0])
		deleted += uint64(n) //nolint:gosec // it is not negative
		_, answered := errors.AsType[*jetstream.APIError](err)
		_, refused := errors.AsType[*jsapi.RefusedError](err)
		if err != nil && !answered && !refused {
			return deleted
		}
	}
	return deleted
}

// gone reports whether the stream's last message has been removed by hand, as it
// seems, and not only kept by a replica that is late.
func (t *Tally) gone() bool {
	const often = 3
	t.short++
	return t.short >= often
}

// begin returns what there is to go on with, or nil if somebody else does.
func (t *Tally) begin(ctx context.Context, p position) (*fold, error) {
	c := t.known
	switch {
	case t.work != nil && t.work.of(p):
		return t.work, nil
	case c.of(p) && c.Whole:
		t.work = t.decode(c)
		return t.work, nil
	case c != nil && c.Keeper != "" && c.Keeper != t.id && time.Since(t.behind) < t.limits.patience:
		return nil, nil //nolint:nilnil // it may be at work
	case c.of(p) && c.Counted && c.Last == p.last && time.Now().Before(c.Recount):
		return nil, nil //nolint:nilnil // nothing is new, only something is missing
	}
	var err error
	t.work, err = t.claim(ctx, p)
	return t.work, err
}

// missing reports whether something has disappeared from the stream that was not
// discarded, and it is time to count anew. A discard may be under way, so that once
// is no reason.
func (t *Tally) missing(f *fold, p position) bool {
	if f.fromStart {
		f.subjects, f.removed, f.discards = p.subjects, p.removed, 0
	}
	if f.discards > 0 { // how many messages each has removed is not known
		f.removed, f.discards = p.removed, 0
	}
	if f.subjects == p.subjects && f.removed == p.removed && (f.beyond == 0 || len(f.entries) > t.limits.entries/2) {
		t.odd = 0
		return false
	}
	t.odd++
	return t.odd > 1 && time.Now().After(t.known.Recount)
}

// claim says that this Tally reads the stream from the start. It returns nil if
// somebody else has said so first.
func (t *Tally) claim(ctx context.Context, p position) (*fold, error) {
	next := tallied{}
	if t.known.of(p) {
		next = *t.known // it holds until there is something newer
	}
	next.Created, next.Whole, next.Entries, next.Keeper, next.Progress = p.created, false, nil, t.id, 0
	ok, err := t.save(ctx, &next)
	if !ok || err != nil {
		return nil, err
	}
	f := newFold(p.created, t.limits)
	f.fromStart, f.began, f.base = true, time.Now(), t.revision
	t.odd, t.short = 0, 0
	return f, nil
}

// progress tells those who wait that something is done.
func (t *Tally) progress(ctx context.Context, f *fold) error {
	if t.known == nil || t.known.Keeper != t.id {
		return nil
	}
	next := *t.known
	next.Progress = f.sequence
	ok, err := t.save(ctx, &next)
	if ok {
		f.base = t.revision
	}
	return err
}

// publish stores what was counted. If somebody else was quicker, theirs is as good.
func (t *Tally) publish(ctx context.Context, f *fold, p position) ([]OpenCount, error) {
	const share = 50 // counting from the start takes at most this part of the time
	counts := f.counts()
	next := tallied{
		Created: p.created, Sequence: f.sequence, Last: p.last, Subjects: f.subjects, Removed: f.removed,
		Counted: true, Counts: counts, Keeper: t.id, Recount: t.known.Recount,
	}
	if f.fromStart {
		next.Recount = time.Now().Add(max(t.limits.recount, share*time.Since(f.began)))
	}
	if f.beyond == 0 && len(f.entries) <= min(t.limits.stored, t.room()) {
		next.Whole, next.Entries, next.Keeper = true, f.encode(), ""
	}
	k := t.known
	if !f.fromStart && k.Sequence == next.Sequence && k.Last == next.Last && k.Subjects == next.Subjects && k.Removed == next.Removed {
		return counts, nil // something is missing, and it is not time yet
	}
	ok, err := t.save(ctx, &next)
	f.fromStart, f.closed, f.base, t.short = false, nil, t.revision, 0
	if !ok || next.Whole {
		t.work = nil
	}
	return counts, err
}

// room is how many entries fit into a message.
func (t *Tally) room() int {
	const part = 3 // what is left is for base64 and the counts
	return int(t.store.nc.MaxPayload()) / part / entrySize
}

// read goes on until a sequence. It reports whether there is nothing left up to
// there.
func (t *Tally) read(ctx context.Context, f *fold, last uint64) (done bool, err error) {
	const wait = 3 * time.Second
	if f.sequence >= last {
		return true, nil
	}
	stream := t.store.cfg.StreamName()
	cons, err := t.store.js.CreateConsumer(ctx, stream, jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: f.sequence + 1,
		HeadersOnly: true, MemoryStorage: true, Replicas: 1, InactiveThreshold: 2 * wait,
	})
	if err != nil {
		return false, err
	}
	defer func() { _ = t.store.js.DeleteConsumer(ctx, stream, cons.CachedInfo().Name) }() // or the server does, when it is idle
	left, received, began := cons.CachedInfo().NumPending, 0, time.Now()
	for left > 0 && received < t.limits.update && time.Since(began) < t.limits.reading {
		got, err := func() (got int, err error) {
			ctx, cancel := context.WithTimeout(ctx, wait)
			defer cancel()
			batch, err := cons.Fetch(int(min(left, uint64(t.limits.batch))), jetstream.FetchContext(ctx)) //nolint:gosec // a batch is small
			if err != nil {
				return 0, err
			}
			for m := range batch.Messages() {
				meta, err := m.Metadata()
				if err != nil {
					return got, err
				}
				if meta.Sequence.Stream > last {
					left = 0
					return got, nil
				}
				got++
				if meta.Sequence.Consumer != uint64(received+got) { //nolint:gosec // it is counted from 0
					return got, errTallyGap
				}
				if err := t.add(ctx, f, m.Subject(), m.Headers(), meta.Timestamp); err != nil {
					return got, err
				}
				f.sequence, left = meta.Sequence.Stream, meta.NumPending
			}
			return got, batch.Error()
		}()
		received += got
		if got > 0 && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
			return false, nil // to look up records has taken the time: the next Update goes on
		}
		if err != nil {
			return false, err
		}
		if left > 0 && got == 0 { // what was pending is gone
			return false, nil
		}
	}
	return left == 0, nil
}

// Nothing is acknowledged, so what was on its way when a connection broke does not
// come again.
var errTallyGap = errors.New("messages were lost with a connection")

// add takes a message.
func (t *Tally) add(ctx context.Context, f *fold, subject string, h nats.Header, stored time.Time) error {
	const most = 50_000
	if f.leaves(subject, h) && len(t.traced) < most {
		t.traced = append(t.traced, strings.Clone(subject))
	}
	if !f.add(subject, h, stored) {
		return nil
	}
	// It is open again. Its record says since when, and whether there is one. A
	// discard is final.
	var record *jsapi.Message
	var header nats.Header
	for from := uint64(1); ; {
		m, err := t.store.api.Next(ctx, t.store.cfg.StreamName(), subject, from)
		if err != nil {
			return err
		}
		if m == nil {
			break
		}
		from = m.Sequence + 1
		h, err := nats.DecodeHeadersMsg(m.Headers)
		switch {
		case err != nil:
		case ChangeKind(oneLine(first(h, HeaderChange))) == ChangeDiscarded:
			return nil
		case record == nil && isRecord(h):
			record, header = m, h
		}
	}
	if record != nil {
		f.open(subject, header, record.Time)
	}
	return nil
}

// entrySize is what an entry takes in the bucket, in bytes: the hash, the time, the
// index of the consumer among the counts.
const entrySize = 8 + 4 + 2

// decode makes of what the bucket has what it was.
func (t *Tally) decode(c *tallied) *fold {
	f := newFold(c.Created, t.limits)
	f.sequence, f.subjects, f.removed, f.base = c.Sequence, c.Subjects, c.Removed, t.revision
	for _, n := range c.Counts {
		f.names, f.more = append(f.names, n.Consumer), append(f.more, 0)
	}
	for b := c.Entries; len(b) >= entrySize; b = b[entrySize:] {
		e := openEntry{since: binary.BigEndian.Uint32(b[8:]), consumer: binary.BigEndian.Uint16(b[12:])}
		if int(e.consumer) < len(f.names) {
			f.entries[binary.BigEndian.Uint64(b)] = e
		}
	}
	return f
}

// load reads what the bucket has.
func (t *Tally) load(ctx context.Context, like jetstream.StreamConfig) error {
	if t.bucket == nil {
		bucket, err := t.openBucket(ctx, like)
		if err != nil {
			return err
		}
		t.bucket = bucket
	}
	value, err := t.bucket.Get(ctx, tallyKey)
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		t.known, t.revision, t.work = nil, 0, nil
		return nil
	}
	if err != nil {
		return err
	}
	if value.Revision() <= t.revision { // a replica may be late
		return nil
	}
	c := &tallied{}
	if json.Unmarshal(value.Value(), c) != nil {
		c = nil // it is written anew
	}
	t.known, t.revision, t.behind = c, value.Revision(), time.Now()
	if t.work != nil && t.work.base != t.revision {
		t.work = nil // somebody else goes on
	}
	return nil
}

// save writes to the bucket, unless somebody else has done so first.
func (t *Tally) save(ctx context.Context, c *tallied) (ok bool, err error) {
	value, err := json.Marshal(c)
	if err != nil {
		return false, err
	}
	var revision uint64
	if t.revision == 0 {
		revision, err = t.bucket.Create(ctx, tallyKey, value)
	} else {
		revision, err = t.bucket.Update(ctx, tallyKey, value, t.revision)
	}
	switch {
	case errors.Is(err, jetstream.ErrKeyExists) || jsapi.Is(err, jsapi.CodeWrongLastSequence):
		t.revision, t.work = 0, nil // whatever is there is newer, or the bucket is
		return false, nil
	case err != nil:
		return false, err
	}
	t.known, t.revision, t.behind = c, revision, time.Now()
	return true, nil
}

// stateName is that of the bucket for what is known of the stream as a whole.
func (c Config) stateName() string { return c.StreamName() + "_STATE" }

// openBucket returns the bucket, made like the stream if it is not there.
func (t *Tally) openBucket(ctx context.Context, like jetstream.StreamConfig) (jetstream.KeyValue, error) {
	const (
		size     = 4 << 20
		kvPrefix = "KV_" // of the bucket's stream
	)
	s, name := t.store, t.store.cfg.stateName()
	find := func() (bucket jetstream.KeyValue, err error) {
		err = s.api.Permitted(ctx, jsapi.OpStreamInfo, kvPrefix+name, func(ctx context.Context, _ string) error {
			bucket, err = s.js.KeyValue(ctx, name)
			return err
		})
		return bucket, err
	}
	bucket, err := find()
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		err = s.api.Permitted(ctx, jsapi.OpStreamCreate, kvPrefix+name, func(ctx context.Context, _ string) error {
			return s.reserve(size, func(maxBytes int64) error {
				bucket, err = s.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
					Bucket: name, Description: "How many dead letters of stream " + s.cfg.StreamName() + " are open", History: 1,
					MaxBytes: maxBytes, Storage: like.Storage, Replicas: like.Replicas, Placement: like.Placement,
				})
				return err
			})
		})
		if errors.Is(err, jetstream.ErrBucketExists) { // another was quicker
			bucket, err = find()
		}
	}
	if err != nil {
		return nil, fmt.Errorf("bucket %q: %w", name, err)
	}
	return bucket, nil
}
