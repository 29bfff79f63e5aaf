package triage

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// The lines of an export: a head, one for each dead letter, and an end, without
// which the file was cut short.
type (
	exportHead struct {
		Format   string    `json:"format"`
		Version  int       `json:"version"`
		Stream   string    `json:"stream"`
		Exported time.Time `json:"exported"`
	}
	exportLine struct {
		ID       string            `json:"id,omitempty"`
		Messages []exportMessage   `json:"messages,omitempty"` // the record, and its changes
		Objects  map[string][]byte `json:"objects,omitempty"`  // what is elsewhere, by its name
		End      *exportEnd        `json:"end,omitempty"`
	}
	exportMessage struct {
		Time   time.Time   `json:"time"`
		Header nats.Header `json:"header"`
		Data   []byte      `json:"data,omitempty"` // base64
	}
	exportEnd struct {
		Count int `json:"count"`
	}
)

const (
	exportFormat  = "monotel-dead-letters"
	exportVersion = 1
	longestHead   = 64 << 10
	longestLine   = 512 << 20
)

// Export writes the selected dead letters with their history and whatever they
// have in the object store as NDJSON, newest first, and returns how many. Payloads
// are among it.
func (d *Desk) Export(ctx context.Context, sel Selection, w io.Writer) (n int, err error) {
	out := bufio.NewWriter(w)
	enc := json.NewEncoder(out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(exportHead{exportFormat, exportVersion, d.cfg.Stream, time.Now().UTC()}); err != nil {
		return 0, fmt.Errorf("export: %w", err)
	}
	for e, err := range d.Entries(ctx, sel, false) {
		if e == nil {
			if isNotARecord(err) {
				continue
			}
			return n, err
		}
		line, err := d.exportLine(ctx, e)
		if err != nil {
			return n, fmt.Errorf("export dead letter %s: %w", e.ID, err)
		}
		if err := enc.Encode(line); err != nil {
			return n, fmt.Errorf("export: %w", err)
		}
		n++
	}
	if err := errors.Join(enc.Encode(exportLine{End: &exportEnd{n}}), out.Flush()); err != nil {
		return n, fmt.Errorf("export: %w", err)
	}
	return n, nil
}

func (d *Desk) exportLine(ctx context.Context, e *dlq.Entry) (*exportLine, error) {
	line := &exportLine{ID: e.ID}
	var objects []string
	err := d.messagesOf(ctx, d.store.SubjectOf(e.Record), func(m *message) {
		if dlq.IsTrace(m.header) { // what is before it is to be deleted
			line.Messages, objects = nil, nil
		}
		line.Messages = append(line.Messages, exportMessage{m.stored.UTC(), m.header, m.data})
		for _, key := range []string{dlq.HeaderBodyObject, dlq.HeaderHeadersObject} {
			if name := m.header.Get(key); name != "" {
				objects = append(objects, name)
			}
		}
	})
	if err != nil {
		return nil, err
	}
	slices.Sort(objects)
	size := 0
	for _, name := range slices.Compact(objects) {
		data, err := d.store.Object(ctx, name)
		if err != nil {
			return nil, err
		}
		if size += base64.StdEncoding.EncodedLen(len(data)); size > longestLine {
			return nil, fmt.Errorf("%w: it has more than %d bytes, which no import reads", ErrInvalid, longestLine)
		}
		if line.Objects == nil {
			line.Objects = make(map[string][]byte)
		}
		line.Objects[name] = data
	}
	return line, nil
}

// Imported says what came of an import.
type Imported struct {
	Imported int // stored now
	Present  int // were there already, and are left alone
}

// A LineError names the line of an import that cannot be read. What came before
// it is stored.
type LineError struct {
	Line int
	Err  error
}

func (e *LineError) Error() string { return fmt.Sprintf("line %d: %v", e.Line, e.Err) }

// Unwrap returns Err.
func (e *LineError) Unwrap() error { return e.Err }

// ErrCutShort reports an export that has no end.
var ErrCutShort = errors.New("the file was cut short: its last line is missing")

// Import stores exported dead letters, with their history. What is there already
// is left alone, so that an import can be repeated. What was being replayed when
// it was exported is open.
//
// A line that cannot be read is a [LineError], and [ErrCutShort] says that the end
// is missing: all that came before is stored in both cases.
func (d *Desk) Import(ctx context.Context, r io.Reader) (n Imported, err error) {
	if err := d.changes(); err != nil {
		return n, err
	}
	lines := newLineReader(r, longestHead)
	number := 0
	bad := func(err error) error { return fmt.Errorf("import: %w", &LineError{number, err}) }
	ended := false
	for {
		text, err := lines.next()
		if errors.Is(err, io.EOF) {
			break
		}
		number++
		if err != nil {
			return n, bad(err)
		}
		if number == 1 {
			lines.longest = longestLine
			var head exportHead
			if err := json.Unmarshal(text, &head); err != nil || head.Format != exportFormat {
				return n, bad(fmt.Errorf("%w: it is no export of dead letters", ErrInvalid))
			}
			if head.Version != exportVersion {
				return n, bad(fmt.Errorf("%w: version %d of the format, want %d", ErrInvalid, head.Version, exportVersion))
			}
			continue
		}
		var line exportLine
		if err := json.Unmarshal(text, &line); err != nil {
			return n, bad(fmt.Errorf("%w: %w", ErrInvalid, err))
		}
		if line.End != nil {
			ended = true
			break
		}
		present, err := d.importLine(ctx, &line)
		if err != nil {
			return n, bad(err)
		}
		if present {
			n.Present++
		} else {
			n.Imported++
		}
	}
	if !ended {
		return n, fmt.Errorf("import: after line %d: %w", number, ErrCutShort)
	}
	return n, nil
}

// A lineReader reads lines up to a length. It reads no more of a longer one than
// that, and keeps no more of it: bufio.Scanner looks for the end from the beginning
// again with each piece that a pipe gives, which takes minutes.
type lineReader struct {
	r       *bufio.Reader
	longest int // bytes
}

func newLineReader(r io.Reader, longest int) *lineReader {
	const buffer = 64 << 10
	return &lineReader{bufio.NewReaderSize(r, buffer), longest}
}

// next returns the next line without its end, or io.EOF. It is good until the next
// call.
func (l *lineReader) next() ([]byte, error) {
	var parts [][]byte
	size := 0
	for {
		part, err := l.r.ReadSlice('\n')
		size += len(part)
		more := errors.Is(err, bufio.ErrBufferFull)
		switch {
		case size > l.longest+len("\n"):
			return nil, fmt.Errorf("%w: it is longer than %d bytes", ErrInvalid, l.longest)
		case err != nil && !more && !errors.Is(err, io.EOF):
			return nil, err
		case more:
			parts = append(parts, bytes.Clone(part)) // joined when all of it is there
			continue
		case size == 0: // io.EOF
			return nil, err
		case len(parts) > 0:
			part = slices.Concat(append(parts, part)...)
		}
		return bytes.TrimSuffix(part, []byte("\n")), nil
	}
}

// record reads the record of a line, and refuses what no export has.
func (line *exportLine) record() (*dlq.Record, error) {
	if len(line.Messages) == 0 {
		return nil, fmt.Errorf("%w: it has no messages", ErrInvalid)
	}
	first := line.Messages[0]
	rec, err := dlq.Decode(first.Header, first.Data)
	if rec == nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if !isID(rec.ID) || rec.ID != line.ID {
		return nil, fmt.Errorf("%w: it is of dead letter %.100q, and its record of %.100q", ErrInvalid, line.ID, rec.ID)
	}
	if rec.ID != dlq.ID(rec.Stream, rec.StreamCreated, rec.Consumer, rec.StreamSequence) {
		return nil, fmt.Errorf("%w: dead letter %s is not the message that its record names", ErrInvalid, rec.ID)
	}
	for name := range line.Objects {
		if name != rec.ID && !strings.HasPrefix(name, rec.ID+".") {
			return nil, fmt.Errorf("%w: object %.100q is not of dead letter %s", ErrInvalid, name, rec.ID)
		}
	}
	return rec, nil
}

// importLine stores one dead letter. It goes on where an earlier import ended.
func (d *Desk) importLine(ctx context.Context, line *exportLine) (present bool, err error) {
	if i := slices.IndexFunc(line.Messages, func(m exportMessage) bool { return dlq.IsTrace(m.Header) }); i > 0 {
		line.Messages, line.Objects = line.Messages[i:], nil // an earlier version has exported what was to be deleted
	}
	rec, err := line.record()
	if err != nil {
		return false, err
	}
	subject := d.store.SubjectOf(rec)
	var have []nats.Header
	last := uint64(0)
	err = d.messagesOf(ctx, subject, func(m *message) {
		have, last = append(have, m.header), m.sequence
	})
	if err != nil {
		return false, err
	}
	if len(have) >= len(line.Messages) || !isBeginning(have, line.Messages) {
		return true, nil
	}
	if err := d.store.PutObjects(ctx, line.Objects); err != nil {
		return false, err
	}
	e := dlq.NewEntry(rec, last, nil)
	for i, m := range line.Messages {
		if c, err := dlq.DecodeChange(m.Header, m.Data); err == nil {
			e.Apply(c)
		} else if i > 0 {
			return false, fmt.Errorf("%w: message %d is no change of the dead letter", ErrInvalid, i+1)
		}
		if i < len(have) {
			continue
		}
		ack, err := d.js.PublishMsg(ctx, &nats.Msg{Subject: subject, Header: stripped(m.Header), Data: m.Data},
			jetstream.WithExpectStream(d.cfg.Stream), jetstream.WithExpectLastSequencePerSubject(last))
		if dlq.IsFull(err) {
			return false, fmt.Errorf("%w: %w", ErrFull, err)
		}
		if err != nil {
			return false, fmt.Errorf("store dead letter %s: %w", rec.ID, err)
		}
		last = ack.Sequence
	}
	e.Last = last
	if e.State == dlq.StateReplaying {
		return false, d.apply(ctx, e, dlq.Change{Kind: dlq.ChangeReleased, Actor: d.cfg.Actor, Operation: e.Operation, Reason: "imported"})
	}
	return false, nil
}

// isBeginning reports whether what is stored is the beginning of what is
// imported.
func isBeginning(have []nats.Header, all []exportMessage) bool {
	for i, h := range have {
		if !maps.EqualFunc(stripped(h), stripped(all[i].Header), slices.Equal[[]string]) {
			return false
		}
	}
	return true
}

// stripped is without what only steers a publish.
func stripped(h nats.Header) nats.Header {
	s := make(nats.Header, len(h))
	for k, v := range h {
		if !hasPrefixFold(k, "Nats-") {
			s[k] = v
		}
	}
	return s
}
