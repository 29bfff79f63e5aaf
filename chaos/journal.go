package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// An entry is a line of a journal. Each is one write, so that a process that is killed
// leaves all that it has begun.
type entry struct {
	Time    int64  `json:"t"` // nanoseconds since 1970
	What    string `json:"k"`
	ID      string `json:"id,omitempty"`
	Durable string `json:"c,omitempty"`
	Batch   int64  `json:"b,omitempty"`
	Seq     uint64 `json:"s,omitempty"`
	Attempt uint64 `json:"a,omitempty"`
	Kind    string `json:"kind,omitempty"`
	Outcome string `json:"o,omitempty"`
	Of      string `json:"of,omitempty"` // the dead letter that it is a replay of
	Op      string `json:"op,omitempty"`
	Replay  int    `json:"n,omitempty"`
	Source  string `json:"src,omitempty"` // Nats-Stream-Source
	Max     int    `json:"max,omitempty"` // MaxAttempts
	For     int64  `json:"for,omitempty"` // nanoseconds

	process string // from the name of the file
}

func (e *entry) at() time.Time { return time.Unix(0, e.Time) }

// What entries say.
const (
	wroteStart   = "start"   // the process handles, or publishes, from now on
	wroteEnd     = "over"    // it has ended in order
	wroteTry     = "try"     // a publish is about to be sent
	wroteAcked   = "acked"   // and was acknowledged
	wroteFailed  = "failed"  // or was not; it is tried again
	wroteAbandon = "abandon" // or is not tried any more
	wroteBegin   = "begin"   // the handler has begun with a message
	wroteOutcome = "outcome" // this is what it will do with it
	wroteAck     = "ack"     // Ack has returned nil
	wroteReturn  = "return"  // the handler returns from a batch
	wroteLag     = "lag"     // the process had no CPU for a time
)

// The outcomes of a handling.
const (
	outcomeOK        = "ok"
	outcomeError     = "error"
	outcomePermanent = "permanent"
	outcomePanic     = "panic"
	outcomeTerm      = "term"
	outcomeNak       = "nak"
	outcomeExit      = "exit"
	outcomeCancelled = "cancelled" // by Stop
)

// A journal is written by one process.
type journal struct {
	mu   sync.Mutex
	file *os.File
}

func openJournal(file string) (*journal, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600) //nolint:gosec // of this run
	return &journal{file: f}, err
}

// write panics if it fails: without its journal the process proves nothing.
func (j *journal) write(e entry) {
	e.Time = time.Now().UnixNano()
	b, err := json.Marshal(e)
	if err == nil {
		j.mu.Lock()
		_, err = j.file.Write(append(b, '\n'))
		j.mu.Unlock()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "journal:", err)
		os.Exit(exitJournal) //nolint:revive // see above
	}
}

// watchLag writes down when this process did not get the CPU, which may end leases
// without any fault. It returns when done is closed.
func (j *journal) watchLag(done <-chan struct{}) {
	const every, late = 50 * time.Millisecond, 250 * time.Millisecond
	t := time.NewTicker(every)
	defer t.Stop()
	last := time.Now()
	for {
		select {
		case <-done:
			return
		case <-t.C:
		}
		now := time.Now()
		if lag := now.Sub(last); lag > late {
			j.write(entry{What: wroteLag, For: int64(lag)})
		}
		last = now
	}
}

// A tail reads what is new in the journals of a folder.
type tail struct {
	dir    string
	offset map[string]int64
}

// read calls f for each new entry.
func (t *tail) read(f func(*entry)) error {
	files, err := filepath.Glob(filepath.Join(t.dir, "*.jsonl"))
	if err != nil {
		return err
	}
	for _, file := range files {
		if err := t.readFile(file, f); err != nil {
			return err
		}
	}
	return nil
}

func (t *tail) readFile(file string, f func(*entry)) error {
	info, err := os.Stat(file)
	if err != nil || info.Size() == t.offset[file] {
		return err
	}
	b := make([]byte, info.Size()-t.offset[file])
	r, err := os.Open(file) //nolint:gosec // of this run
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }() // it was only read
	if _, err := r.ReadAt(b, t.offset[file]); err != nil {
		return err
	}
	end := bytes.LastIndexByte(b, '\n') + 1
	t.offset[file] += int64(end)
	process := strings.TrimSuffix(filepath.Base(file), ".jsonl")
	for line := range bytes.Lines(b[:end]) {
		e := &entry{process: process}
		if err := json.Unmarshal(line, e); err != nil {
			return fmt.Errorf("%s: %w: %s", file, err, line)
		}
		f(e)
	}
	return nil
}
