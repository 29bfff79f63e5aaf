package triage_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// A replay is run by a child process, which is killed at random points and
// started again until it is done. So are discards.

const (
	childURL = "TRIAGE_TEST_URL"
	childOp  = "TRIAGE_TEST_OPERATION"
	// A number of kills, for the long form.
	killsEnv = "TRIAGE_KILLS"

	discardAll = "discard" // an operation's ID, for a child that discards all
)

// TestChildProcess is the child, and does nothing in the parent.
func TestChildProcess(t *testing.T) { //nolint:paralleltest // it has its process to itself
	url, id := os.Getenv(childURL), os.Getenv(childOp)
	if url == "" {
		return
	}
	nc, err := nats.Connect(url)
	must(t, err)
	defer nc.Close()
	d, err := triage.Open(within(t), nc, triage.Config{Actor: "child"})
	must(t, err)
	if id == discardAll {
		var all []*dlq.Entry
		for e, err := range d.Entries(within(t), triage.Selection{States: []dlq.State{dlq.StateOpen, dlq.StateArchived}}, false) {
			must(t, err)
			all = append(all, e)
		}
		_, _ = fmt.Fprintln(os.Stdout, "claimed", len(all))
		for _, e := range all {
			must(t, d.Discard(within(t), e, "spam"))
		}
		_, _ = fmt.Fprintln(os.Stdout, "ended")
		return
	}
	op, err := d.Run(within(t), id, func(o *triage.Operation) {
		_, _ = fmt.Fprintln(os.Stdout, "claimed", o.Claimed, "in flight", o.InFlight(), o.Status)
	})
	must(t, err)
	_, _ = fmt.Fprintln(os.Stdout, "ended", op.Status)
}

func TestRun_killed(t *testing.T) {
	t.Parallel()
	kills := 4
	if n, err := strconv.Atoi(os.Getenv(killsEnv)); err == nil {
		kills = n
	}
	const entries = 10_000
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{Retention: retention})
			b.fill(t, entries)
			failing := func(id string) bool { return id[0] == 'a' } // one in 32
			billed := b.consume(t, billing, failing)
			var reported *target
			if retention == jetstream.LimitsPolicy {
				reported = b.consume(t, reports, nil)
			}
			// Slow enough that there is something to be killed.
			p := b.plan(t, triage.Selection{}, triage.Options{Rate: float64(entries) / 4})
			killed := 0
			for life := 0; ; life++ {
				limit := time.Hour
				if life < kills {
					limit = 100*time.Millisecond + rand.N(800*time.Millisecond)
				}
				if done := b.runChild(t, p.ID, limit); done {
					break
				}
				killed++
			}
			op, err := b.desk.Operation(within(t), p.ID)
			must(t, err)
			t.Logf("killed %d times: %d resolved, %d failed again", killed, op.Resolved, op.FailedAgain)
			if op.Status != triage.StatusDone || op.Claimed != entries || op.Resolved+op.FailedAgain != entries || op.InFlight() != 0 ||
				op.Remaining != 0 || len(op.Skipped) != 0 {
				t.Errorf("operation %+v", op)
			}
			if n, most := billed.total(); n != entries || most != 1 {
				t.Errorf("the consumer got %d messages, one of them %d times", n, most)
			}
			if reported != nil {
				if n, _ := reported.total(); n != 0 {
					t.Errorf("another consumer got %d of them", n)
				}
			}
			s, err := b.desk.Stats(within(t))
			must(t, err)
			if s.States[dlq.StateResolved] != op.Resolved || s.States[dlq.StateOpen] != op.FailedAgain || s.States[dlq.StateReplaying] != 0 {
				t.Errorf("the entries are %v, the operation says %d resolved, %d failed again", s.States, op.Resolved, op.FailedAgain)
			}
			if killed < kills {
				t.Errorf("it was killed %d times, want %d: it was done too soon", killed, kills)
			}
		})
	}
}

// TestDiscard_killed kills the process that discards: each dead letter is there, or its
// trace is, once, and the next who changes something finishes what was begun.
func TestDiscard_killed(t *testing.T) {
	t.Parallel()
	kills := 5
	if n, err := strconv.Atoi(os.Getenv(killsEnv)); err == nil {
		kills = n
	}
	const entries, most = 3000, 200 * time.Millisecond
	b := setup(t)
	b.fill(t, entries)
	n := 0
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		must(t, err)
		n++
		if n%3 == 0 { // some have a history
			must(t, b.desk.Archive(within(t), e, ""))
		}
	}
	killed, halfDone := 0, 0
	for done := false; !done; {
		limit := time.Hour
		if killed < kills {
			limit = 10*time.Millisecond + rand.N(most)
		}
		if done = b.runChild(t, discardAll, limit); !done {
			killed++
		}
		info := b.info(t)
		if info.State.NumSubjects != entries {
			t.Fatalf("there are %d dead letters, want %d", info.State.NumSubjects, entries)
		}
		states, seen := make(map[dlq.State]int), make(map[string]bool)
		for e, err := range b.desk.Entries(within(t), triage.Selection{States: dlq.States()}, true) {
			must(t, err)
			if seen[e.ID] || (e.State != dlq.StateDiscarded && len(e.Data) == 0) {
				t.Fatalf("dead letter %s is listed again, or has no payload", e.ID)
			}
			seen[e.ID] = true
			states[e.State]++
		}
		if len(seen) != entries {
			t.Fatalf("%d are listed, want %d", len(seen), entries)
		}
		// Each that is discarded has one message, each that is archived two.
		if left := int(info.State.Msgs) - entries - states[dlq.StateArchived]; left > 0 {
			halfDone++
			t.Logf("killed with %d discarded; %d messages are left before traces", states[dlq.StateDiscarded], left)
		}
	}
	must(t, b.desk.FinishDiscards(within(t))) // this desk has listed what the last one has left
	if info := b.info(t); info.State.Msgs != entries {
		t.Errorf("%d messages are left of %d dead letters", info.State.Msgs, entries)
	}
	t.Logf("killed %d times, %d of them between a trace and the deletion", killed, halfDone)
}

func (b *bundle) info(t testing.TB) *jetstream.StreamInfo {
	t.Helper()
	s, err := b.js.Stream(within(t), "DLQ")
	must(t, err)
	return s.CachedInfo()
}

// fill stores many dead letters quickly.
func (b *bundle) fill(t testing.TB, n int) {
	t.Helper()
	const most = 1000
	slots := make(chan error, most)
	for range most {
		slots <- nil
	}
	for range n {
		must(t, <-slots)
		r := b.record()
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), longestWait)
			defer cancel()
			_, err := b.store.Capture(ctx, r, nil)
			slots <- err
		}()
	}
	for range most {
		must(t, <-slots)
	}
}

// runChild runs the operation in a child process and kills it when it has worked
// for as long as the limit. It reports whether it has come to the end.
func (b *bundle) runChild(t *testing.T, id string, limit time.Duration) (done bool) {
	t.Helper()
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(within(t), exe, "-test.run=^TestChildProcess$", "-test.v=false", "-test.count=1")
	cmd.Env = append(os.Environ(), childURL+"="+b.server.URL(), childOp+"="+id)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var kill *time.Timer
	defer func() {
		if kill != nil {
			kill.Stop()
		}
	}()
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "claimed") && kill == nil:
			kill = time.AfterFunc(limit, func() { _ = cmd.Process.Kill() })
		case strings.HasPrefix(line, "ended"):
			done = true
		case strings.Contains(line, "FAIL") || strings.Contains(line, "_test.go"):
			t.Errorf("child: %s", line)
		}
	}
	_ = cmd.Wait() // it was killed, as a rule
	return done
}
