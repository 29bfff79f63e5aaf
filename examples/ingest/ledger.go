package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
)

const (
	bucketName  = "github-ingest"
	bucketBytes = 512 << 20
)

// A ledger is the durable consumers' record of what they have handled. It is
// what makes them idempotent: JetStream delivers at least once, and the ledger
// counts once.
//
// It is a bucket of JetStream's key-value store with one key for each consumer
// and message. A key is created only if it does not exist, which the server
// decides, so that a record is complete or not there, and made once however
// often, and from however many processes, the message is handled. It lives with
// the messages: whoever copies, moves or deletes the store does so with both.
type ledger struct {
	opened chan struct{} // closed when kv and err are set
	kv     jetstream.KeyValue
	err    error

	repeated atomic.Int64 // records that existed: messages delivered again
}

// A record is what a consumer says about a message.
type record struct {
	Line   int    `json:"line"`
	Family string `json:"family"`
	SHA256 string `json:"sha256,omitempty"` // of the payload; audit
	Text   string `json:"text,omitempty"`   // what the payload says; typed
}

func newLedger() *ledger { return &ledger{opened: make(chan struct{})} }

// open makes the bucket. It is called once, and handlers wait for it: they may
// run before Start of the App has returned, and the App has a connection to
// offer only then.
func (l *ledger) open(ctx context.Context, js jetstream.JetStream) error {
	defer close(l.opened)
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	l.kv, l.err = js.CreateOrUpdateKeyValue(ctx, jetstream.KeyValueConfig{
		Bucket:      bucketName,
		Description: "What the consumers of stream " + streamName + " have handled",
		MaxBytes:    bucketBytes,
	})
	if l.err != nil {
		l.err = fmt.Errorf("open the ledger: %w", l.err)
	}
	return l.err
}

// inputID is what an input header looks like when it is ours.
var inputID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// write records that the consumer has handled msg. When it returns nil, the
// record is stored and msg may be acked; a second record of the same is none.
func (l *ledger) write(ctx context.Context, consumer string, msg *mono.Msg, r record) error {
	select {
	case <-l.opened:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if l.err != nil {
		return l.err
	}
	input := msg.Header.Get(inputHeader)
	if !inputID.MatchString(input) {
		input = "other" // somebody else publishes these events, too
	}
	number, err := strconv.Atoi(msg.Header.Get(lineHeader))
	if err == nil {
		r.Line = number
	}
	value, err := json.Marshal(r)
	if err != nil {
		return err
	}
	seq := msg.Metadata().Sequence.Stream
	_, err = l.kv.Create(ctx, fmt.Sprintf("%s.%s.%d", consumer, input, seq), value)
	if errors.Is(err, jetstream.ErrKeyExists) {
		l.repeated.Add(1)
		return nil
	}
	if err != nil {
		return fmt.Errorf("record message %d: %w", seq, err)
	}
	return nil
}

// read returns the consumer's records of one input, by stream sequence.
func (l *ledger) read(ctx context.Context, consumer, input string) (map[uint64]record, error) {
	prefix := fmt.Sprintf("%s.%s.", consumer, input)
	w, err := l.kv.Watch(ctx, prefix+"*", jetstream.IgnoreDeletes())
	if err != nil {
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	all := make(map[uint64]record)
	for err == nil {
		var e jetstream.KeyValueEntry
		select {
		case e = <-w.Updates():
		case <-ctx.Done():
			err = context.Cause(ctx)
			continue
		}
		if e == nil { // that was the last one
			break
		}
		var seq uint64
		var r record
		if seq, err = strconv.ParseUint(strings.TrimPrefix(e.Key(), prefix), 10, 64); err == nil {
			err = json.Unmarshal(e.Value(), &r)
		}
		all[seq] = r
	}
	if err := errors.Join(err, w.Stop()); err != nil {
		return nil, fmt.Errorf("read the ledger: %w", err)
	}
	return all, nil
}
