package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"
)

// A finding is a promise that was broken, with what proves it.
type finding struct {
	Class   string   `json:"class"`
	Durable string   `json:"durable,omitempty"`
	ID      string   `json:"id,omitempty"`
	Kind    string   `json:"kind,omitempty"`
	Seq     uint64   `json:"seq,omitempty"`
	Detail  string   `json:"detail"`
	Proof   []string `json:"proof,omitempty"` // the message's story
}

// A result is what came of a round.
type result struct {
	Schedule *schedule      `json:"schedule"`
	Dir      string         `json:"dir"`
	Took     time.Duration  `json:"took"`
	Counts   map[string]int `json:"counts"`
	Findings []finding      `json:"findings"`
	Faults   []faultResult  `json:"faults"`
	NoDisk   bool           `json:"no_disk,omitempty"`

	mu sync.Mutex
}

type faultResult struct {
	Fault fault  `json:"fault"`
	Note  string `json:"note,omitempty"` // why it was none
}

func (r *result) find(f finding) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Findings = append(r.Findings, f)
}

func (r *result) count(what string, n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.Counts == nil {
		r.Counts = make(map[string]int)
	}
	r.Counts[what] += n
}

func (r *result) fault(f fault, note string) {
	r.mu.Lock()
	r.Faults = append(r.Faults, faultResult{f, note})
	r.mu.Unlock()
	if note == "" {
		r.count("fault:"+f.Kind, 1)
	} else {
		r.count("not-reached", 1)
	}
}

// The ways in which a process ends.
const (
	endKill  = "kill"
	endTerm  = "term"
	endExit  = "exit"
	endStart = "start-failed"
	endStop  = "stop-failed"
	endOther = "ended"
)

// ended judges the end of a process. told is whether it got a signal that ends it. That
// may have come before the process had a handler for it, or while it started.
func (r *result) ended(process string, code int, told, ending bool) string {
	kind := endOther
	switch {
	case told && code == -1:
		kind = endKill
	case code == 0:
		kind = endTerm
	case code == exitPoison:
		kind = endExit
	case code == exitStart && (told || !ending):
		kind = endStart
	case code == exitStop && !ending: // the servers may be away
		kind = endStop
	default:
		r.find(finding{Class: "process_ended", Detail: fmt.Sprintf("%s ended by itself with code %d, see %s.log", process, code, process)})
	}
	r.count("ended:"+kind, 1)
	return kind
}

// classes lists the classes of the findings.
func (r *result) classes() []string {
	seen := make(map[string]bool)
	for i := range r.Findings {
		seen[r.Findings[i].Class] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

// write keeps the result in the folder of the round.
func (r *result) write() error {
	slices.SortStableFunc(r.Findings, func(a, b finding) int { return cmp.Compare(a.Class, b.Class) })
	b, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.Dir, "result.json"), append(b, '\n'), 0o600)
}

// rows are the lines of the table, with what is counted for each.
func rows() []struct{ title, counts string } {
	return []struct{ title, counts string }{
		{"messages acknowledged", "acked"},
		{"handlings", "begun"},
		{"handled with success", "success"},
		{"kills", "ended:kill"},
		{"exits in handlers", "ended:exit"},
		{"panics in handlers", "panics"},
		{"orderly stops", "ended:term"},
		{"stops (SIGSTOP)", "fault:stop"},
		{"cut links", "fault:cut fault:cut-node"},
		{"stalled links", "fault:stall fault:stall-node"},
		{"servers killed", "fault:kill-server"},
		{"servers stopped (SIGSTOP)", "fault:stop-server"},
		{"nodes restarted in turn", "fault:roll"},
		{"full disks", "fault:disk-full"},
		{"full dead-letter streams", "fault:dlq-full"},
		{"upgrades", "fault:upgrade"},
		{"starts that failed", "ended:start-failed"},
		{"faults not reached, or failed", "not-reached"},
		{"captured", "records"},
		{"replays sent", "replays"},
		{"replays resolved", "resolved"},
		{"replays failed again", "failed_again"},
		{"repeats allowed", "repeats"},
		{"  after a kill or an exit", "repeat:kill repeat:exit"},
		{"  after a stop", "repeat:stop repeat:term repeat:stop-failed"},
		{"  after a cut or stalled link", "repeat:cut repeat:stall"},
		{"  after a fault of servers", "repeat:server"},
		{"  for want of CPU", "repeat:lag"},
		{"  by a source that began again", "repeat:sourced"},
		{"  published again after a server's restart", "repeat:stored"},
		{"  with the error of another in the batch", "repeat:batch"},
		{"crashed, cut short three times by others", "crashed-by-kills"},
		{"left in streams after faults of servers", "left"},
		{"FINDINGS", "findings"},
	}
}

// table prints the sum of results.
func table(w io.Writer, all ...*result) {
	sum := make(map[string]int)
	for _, r := range all {
		for k, n := range r.Counts {
			sum[k] += n
		}
		sum["findings"] += len(r.Findings)
	}
	for _, row := range rows() {
		n := 0
		for c := range strings.FieldsSeq(row.counts) {
			n += sum[c]
		}
		_, _ = fmt.Fprintf(w, "  %-42s %8d\n", row.title, n) // nobody reads it then
	}
	classes := make(map[string]int)
	for _, r := range all {
		for i := range r.Findings {
			classes[r.Findings[i].Class]++
		}
	}
	for _, class := range slices.Sorted(maps.Keys(classes)) {
		_, _ = fmt.Fprintf(w, "    %-40s %8d\n", class, classes[class])
	}
}
