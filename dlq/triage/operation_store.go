package triage

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

const (
	storedVersion = 1
	// planLife is how long a plan is kept that nobody runs, endedLife an operation
	// that has ended.
	planLife  = 24 * time.Hour
	endedLife = 30 * 24 * time.Hour

	bucketBytes = 256 << 20
)

func (d *Desk) bucketName() string { return d.cfg.Stream + "_OPERATIONS" }

// operations is the bucket that holds operations, made when it is first needed.
func (d *Desk) operations(ctx context.Context, create bool) (jetstream.KeyValue, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.bucket != nil {
		return d.bucket, nil
	}
	kv, err := d.js.KeyValue(ctx, d.bucketName())
	if errors.Is(err, jetstream.ErrBucketNotFound) && create {
		kv, err = d.createBucket(ctx)
	}
	if err != nil {
		return nil, fmt.Errorf("operations in bucket %q: %w", d.bucketName(), err)
	}
	d.bucket = kv
	return kv, nil
}

func (d *Desk) createBucket(ctx context.Context) (jetstream.KeyValue, error) {
	info, err := d.info(ctx)
	if err != nil {
		return nil, err
	}
	const least = 1 << 20
	for size := int64(bucketBytes); ; size /= 4 {
		kv, err := d.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
			Bucket: d.bucketName(), Description: "Replays of the dead letters of stream " + d.cfg.Stream, History: 1, MaxBytes: size,
			Storage: info.Config.Storage, Replicas: info.Config.Replicas, Placement: info.Config.Placement,
		})
		switch {
		case err == nil:
			return kv, nil
		case errors.Is(err, jetstream.ErrBucketExists): // another was quicker
			return d.js.KeyValue(ctx, d.bucketName())
		case jsapi.NoRoom(err) && size > least: // the server reserves it
			continue
		}
		return nil, err
	}
}

// Keys of the bucket.
func operationKey(id string) string        { return "op." + id }
func selectionKey(id string, n int) string { return fmt.Sprintf("sel.%s.%d", id, n) }
func selectionKeys(id string) string       { return "sel." + id + ".*" }

// newID names an operation: by its time, so that the newest sorts last, and some
// luck.
func newID(now time.Time) string {
	return now.UTC().Format("20060102-150405-") + strings.ToLower(rand.Text()[:5])
}

// An item is one entry of a frozen selection: where its record is, the sequence
// that its latest change had, and that of its latest edit, 0 if there is none.
type item struct{ sequence, last, edit uint64 }

const itemsPerKey = 16 << 10

func encodeItems(items []item) []byte {
	b := make([]byte, 0, 4*len(items))
	before := uint64(0)
	for _, i := range items {
		b = binary.AppendUvarint(b, i.sequence-before)
		b = binary.AppendUvarint(b, i.last-i.sequence)
		edit := uint64(0)
		if i.edit > 0 {
			edit = i.edit - i.sequence
		}
		b = binary.AppendUvarint(b, edit)
		before = i.sequence
	}
	return b
}

var errSelection = errors.New("the stored selection cannot be read")

func decodeItems(b []byte) ([]item, error) {
	var items []item
	before := uint64(0)
	next := func() (n uint64, ok bool) {
		n, size := binary.Uvarint(b)
		if size <= 0 {
			return 0, false
		}
		b = b[size:]
		return n, true
	}
	for len(b) > 0 {
		sequence, ok1 := next()
		last, ok2 := next()
		edit, ok3 := next()
		if !ok1 || !ok2 || !ok3 {
			return nil, errSelection
		}
		i := item{sequence: before + sequence}
		i.last = i.sequence + last
		if edit > 0 {
			i.edit = i.sequence + edit
		}
		before = i.sequence
		items = append(items, i)
	}
	return items, nil
}

// save writes a new plan and its selection down, the plan last: what is half
// written is no plan.
func (d *Desk) save(ctx context.Context, p *Plan, items []item) error {
	kv, err := d.operations(ctx, true)
	if err != nil {
		return err
	}
	for n, part := 0, items; len(part) > 0; n++ {
		size := min(len(part), itemsPerKey)
		if _, err := kv.Put(ctx, selectionKey(p.ID, n), encodeItems(part[:size])); err != nil {
			return fmt.Errorf("store plan %s: %w", p.ID, err)
		}
		part = part[size:]
	}
	s := &stored{Version: storedVersion, Plan: *p, Status: StatusPlanned, Counted: counted{Upto: p.Upto}}
	value, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("store plan %s: %w", p.ID, err)
	}
	if _, err := kv.Create(ctx, operationKey(p.ID), value); err != nil {
		return fmt.Errorf("store plan %s: %w", p.ID, err)
	}
	return nil
}

// selection reads the frozen selection of an operation, oldest first.
func (d *Desk) selection(ctx context.Context, p *Plan) ([]item, error) {
	kv, err := d.operations(ctx, false)
	if err != nil {
		return nil, err
	}
	items := make([]item, 0, min(p.Selected, itemsPerKey)) // what is stored may claim any number
	for n := 0; len(items) < p.Selected; n++ {
		value, err := kv.Get(ctx, selectionKey(p.ID, n))
		if err != nil {
			return nil, fmt.Errorf("selection of operation %s: %w", p.ID, err)
		}
		part, err := decodeItems(value.Value())
		if err != nil || len(part) == 0 {
			return nil, fmt.Errorf("selection of operation %s: %w", p.ID, errSelection)
		}
		items = append(items, part...)
	}
	if err := validItems(p, items); err != nil {
		return nil, fmt.Errorf("selection of operation %s: %w", p.ID, err)
	}
	return items, nil
}

// load reads an operation.
func (d *Desk) load(ctx context.Context, id string) (*stored, error) {
	kv, err := d.operations(ctx, false)
	if errors.Is(err, jetstream.ErrBucketNotFound) || !validOperationID(id) {
		return nil, &NotFoundError{What: "operation", ID: id}
	}
	if err != nil {
		return nil, err
	}
	value, err := kv.Get(ctx, operationKey(id))
	if errors.Is(err, jetstream.ErrKeyNotFound) {
		return nil, d.noOperation(ctx, id)
	}
	if err != nil {
		return nil, fmt.Errorf("operation %s: %w", id, err)
	}
	s, err := decodeStored(id, value.Value())
	if err != nil {
		return nil, err
	}
	s.revision = value.Revision()
	if s.Status == StatusRunning {
		// Both times are the server's: those of two hosts may be minutes apart.
		bucket, err := d.js.Stream(ctx, "KV_"+d.bucketName())
		if err != nil {
			return nil, fmt.Errorf("operation %s: when it was written: %w", id, err)
		}
		s.silent = bucket.CachedInfo().TimeStamp.Sub(value.Created())
	}
	return s, nil
}

func validOperationID(id string) bool {
	return id != "" && len(id) <= longestID && strings.IndexFunc(id, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-'
	}) < 0
}

func (d *Desk) noOperation(ctx context.Context, id string) error {
	ids, err := d.operationIDs(ctx)
	if err != nil {
		return err
	}
	return &NotFoundError{What: "operation", ID: id, Near: near(ids, id)}
}

// operationIDs lists them, newest first.
func (d *Desk) operationIDs(ctx context.Context) ([]string, error) {
	ids, err := d.keys(ctx, operationKey("*"))
	if err != nil {
		return nil, err
	}
	for i, key := range ids {
		ids[i] = strings.TrimPrefix(key, operationKey(""))
	}
	slices.Sort(ids)
	slices.Reverse(ids)
	return ids, nil
}

// keys lists the keys of a pattern. It reads by batched gets: the bucket's own list takes
// a push consumer, for which readers would need one more right.
func (d *Desk) keys(ctx context.Context, pattern string) ([]string, error) {
	const removed = "KV-Operation" // header of what is no value
	prefix := "$KV." + d.bucketName() + "."
	found := make(map[string]struct{}) // one that is changed meanwhile may come twice
	err := d.messagesIn(ctx, "KV_"+d.bucketName(), prefix+pattern, func(m *message) {
		key := strings.TrimPrefix(m.subject, prefix)
		if m.header.Get(removed) == "" {
			found[key] = struct{}{}
		} else {
			delete(found, key)
		}
	})
	if err != nil {
		return nil, fmt.Errorf("list operations: %w", err)
	}
	return slices.Collect(maps.Keys(found)), nil
}

// update changes what is stored of an operation, unless somebody else has done so
// since it was read: that is a [jetstream.ErrKeyExists].
func (d *Desk) update(ctx context.Context, s *stored) error {
	kv, err := d.operations(ctx, false)
	if err != nil {
		return err
	}
	value, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("operation %s: %w", s.Plan.ID, err)
	}
	revision, err := kv.Update(ctx, operationKey(s.Plan.ID), value, s.revision)
	if err != nil {
		return fmt.Errorf("store operation %s: %w", s.Plan.ID, err)
	}
	s.revision, s.silent = revision, 0
	return nil
}

// isConflict reports an update that somebody else was quicker with.
func isConflict(err error) bool {
	return errors.Is(err, jetstream.ErrKeyExists) || jsapi.Is(err, jsapi.CodeWrongLastSequence)
}

// change reads, changes and stores an operation until nobody is in between.
func (d *Desk) change(ctx context.Context, id string, f func(*stored) error) (*stored, error) {
	if err := d.changes(); err != nil {
		return nil, err
	}
	for {
		s, err := d.load(ctx, id)
		if err != nil {
			return nil, err
		}
		if err := f(s); err != nil {
			return s, err
		}
		err = d.update(ctx, s)
		if !isConflict(err) {
			return s, err
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
	}
}
