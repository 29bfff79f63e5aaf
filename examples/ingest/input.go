package main

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"regexp"
	"slices"
)

const (
	// maxLine bounds what one line may take of the memory. It is the largest
	// message that any NATS server takes; most take 1 MiB, and refuse the rest.
	maxLine = 64 << 20

	// maxFamilies bounds the consumers that an input can ask for, two for each
	// family of events. GitHub has about 70.
	maxFamilies = 200

	// maxShown is how many bad lines are reported one by one.
	maxShown = 20
)

// An input is what the first reading finds out. The lines themselves stay in
// the file.
type input struct {
	file     *os.File
	discard  func() // removes a temporary file
	id       string // what the input is known by: the start of its SHA-256
	read     int    // lines that are not blank
	bad      int
	lines    []line // the good ones, in order
	families []string
}

// A line is where a good line is, and what it holds.
type line struct {
	number int // in the file, from 1
	offset int64
	size   int
	family string
	sum    [sha256.Size]byte // of the payload
}

// openInput reads the file at path for the first time, or standard input for
// "-", and reports bad lines to w.
func openInput(path string, stdin *os.File, w io.Writer) (*input, error) {
	in := &input{discard: func() {}}
	if path == "-" {
		if err := in.spool(stdin); err != nil {
			return nil, fmt.Errorf("read standard input: %w", err)
		}
	} else {
		f, err := os.Open(path) //nolint:gosec // the user's own file
		if err != nil {
			return nil, err
		}
		in.file = f
		// A pipe that has a name can be read only once, as well.
		if info, err := f.Stat(); err == nil && !info.Mode().IsRegular() {
			if err := errors.Join(in.spool(f), f.Close()); err != nil {
				return nil, fmt.Errorf("read %q: %w", path, err)
			}
		}
	}
	if err := in.scan(w); err != nil {
		in.close()
		return nil, fmt.Errorf("read %q: %w", path, err)
	}
	return in, nil
}

// spool copies r to a temporary file. Where the system allows it, the file has
// no name any more while it is used, so that a kill leaves nothing behind.
func (in *input) spool(r io.Reader) error {
	f, err := os.CreateTemp("", "ingest-*.ndjson")
	if err != nil {
		return err
	}
	in.file = f
	if os.Remove(f.Name()) != nil {
		in.discard = func() { _ = os.Remove(f.Name()) } // a temporary file
	}
	if _, err := io.Copy(f, r); err != nil {
		in.close()
		return err
	}
	return nil
}

func (in *input) close() {
	_ = in.file.Close() // it was only read
	in.discard()
}

// scan reads the input from its start.
func (in *input) scan(w io.Writer) error {
	const idSize = 16
	all := sha256.New()
	families := make(map[string]bool)
	r := lineReader{r: bufio.NewReaderSize(io.TeeReader(in.file, all), 64<<10), limit: maxLine}
	if _, err := in.file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	for {
		text, err := r.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, errLongLine) {
			return err
		}
		if err == nil && len(bytes.TrimSpace(text)) == 0 {
			continue
		}
		in.read++
		var family string
		var payload []byte
		if err == nil {
			family, payload, err = parseLine(text)
		}
		if err == nil && !families[family] && len(families) == maxFamilies {
			err = fmt.Errorf("event %q is one too many: an input may have %d different ones", family, maxFamilies)
		}
		if err != nil {
			in.reject(w, r.number, err)
			continue
		}
		families[family] = true
		in.lines = append(in.lines, line{r.number, r.offset, len(text), family, sha256.Sum256(payload)})
	}
	in.id = hex.EncodeToString(all.Sum(nil)[:idSize])
	in.families = slices.Sorted(maps.Keys(families))
	return nil
}

// reject counts a bad line.
func (in *input) reject(w io.Writer, number int, err error) {
	in.bad++
	switch {
	case in.bad <= maxShown:
		fmt.Fprintf(w, "line %d: %v\n", number, err)
	case in.bad == maxShown+1:
		fmt.Fprintln(w, "There are more bad lines; the total counts them.")
	}
}

// remove takes lines out that turned out to be bad.
func (in *input) remove(numbers map[int]bool) {
	in.lines = slices.DeleteFunc(in.lines, func(l line) bool { return numbers[l.number] })
}

// payload reads a line again.
func (in *input) payload(l *line) ([]byte, error) {
	text := make([]byte, l.size)
	if _, err := in.file.ReadAt(text, l.offset); err != nil {
		return nil, fmt.Errorf("line %d: %w", l.number, err)
	}
	family, payload, err := parseLine(text)
	if err != nil || family != l.family || sha256.Sum256(payload) != l.sum {
		return nil, fmt.Errorf("line %d: the file was changed while it was read; run again to take it as it is now", l.number)
	}
	return payload, nil
}

// A webhook is one line, as far as it is needed here.
type webhook struct {
	Event   string          `json:"event"`
	Payload json.RawMessage `json:"payload"`
}

// familyName is stricter than an App is. "a_b", "a-b" and "AB" would be three
// events with one subject.
var familyName = regexp.MustCompile(`^[a-z][a-z0-9_]{0,63}$`)

// parseLine returns the family of events that a line belongs to, and its
// payload byte for byte.
func parseLine(text []byte) (family string, payload []byte, err error) {
	var w webhook
	if err := json.Unmarshal(text, &w); err != nil {
		return "", nil, fmt.Errorf(`want a JSON object with "event" and "payload": %w`, err)
	}
	switch {
	case w.Event == "":
		return "", nil, errors.New(`no "event"`)
	case !familyName.MatchString(w.Event):
		return "", nil, fmt.Errorf(`"event" is %.80q: want 1 to 64 lower-case letters, digits and "_", starting with a letter`, w.Event)
	case len(w.Payload) == 0:
		return "", nil, errors.New(`no "payload"`)
	case w.Payload[0] != '{':
		return "", nil, errors.New(`"payload" is not an object`)
	}
	return w.Event, w.Payload, nil
}

// A lineReader reads lines of any length up to its limit. A bufio.Scanner would
// give up at the first that is too long.
type lineReader struct {
	r      *bufio.Reader
	limit  int
	buf    []byte
	number int   // of the line that next returned
	offset int64 // where it starts
	end    int64 // where it ends
}

var errLongLine = errors.New("the line is too long")

// next returns the next line without its line break, valid until the next call.
// After errLongLine it goes on with the line after that.
func (r *lineReader) next() ([]byte, error) {
	r.buf = r.buf[:0]
	r.offset = r.end
	for {
		part, err := r.r.ReadSlice('\n')
		r.end += int64(len(part))
		if len(r.buf) <= r.limit {
			r.buf = append(r.buf, part...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if err != nil && (!errors.Is(err, io.EOF) || r.end == r.offset) {
			return nil, err
		}
		r.number++
		text := bytes.TrimSuffix(r.buf, []byte("\n"))
		if len(text) > r.limit {
			return nil, fmt.Errorf("%w: want at most %d bytes", errLongLine, r.limit)
		}
		return text, nil
	}
}
