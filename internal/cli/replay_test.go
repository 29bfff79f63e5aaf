package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// A target is the consumer that the dead letters are of. It says what comes of a
// replay as an App does.
type target struct {
	b       *bundle
	cons    jetstream.Consumer
	fail    func(id string) bool
	got     atomic.Int64
	mu      sync.Mutex
	payload map[string]string
}

// billing makes stream ORDERS with consumer billing, which handles what comes
// until the test ends, or not at all if fail is nil.
func (b *bundle) billing(fail func(id string) bool) *target {
	b.t.Helper()
	ctx := b.t.Context()
	s, err := b.js.CreateStream(ctx, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}})
	if err != nil {
		b.t.Fatal(err)
	}
	cons, err := s.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "billing", FilterSubject: "orders.created.v1"})
	if err != nil {
		b.t.Fatal(err)
	}
	to := &target{b: b, cons: cons, fail: fail, payload: make(map[string]string)}
	if fail == nil {
		return to
	}
	// As an App, it gets replays through a durable of their own.
	if _, err := dlq.EnsureReplayConsumer(ctx, s, cons.CachedInfo().Config); err != nil {
		b.t.Fatal(err)
	}
	if to.cons, err = s.Consumer(ctx, dlq.ReplayConsumer("billing")); err != nil {
		b.t.Fatal(err)
	}
	handling, err := to.cons.Consume(to.handle)
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() {
		handling.Stop()
		<-handling.Closed()
	})
	return to
}

func (to *target) handle(m jetstream.Msg) {
	r, ok := dlq.ParseReplay("ORDERS", "billing", m.Subject(), m.Headers())
	if !ok {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	to.mu.Lock()
	to.payload[r.ID] = string(m.Data())
	to.mu.Unlock()
	to.got.Add(1)
	var failure *dlq.Record
	if to.fail(r.ID) {
		failure = &dlq.Record{ID: r.ID, Reason: dlq.ReasonPermanentError, Error: "card refused", Failed: time.Now()}
	}
	if _, err := to.b.store.Outcome(ctx, r, "shop", failure, nil); err != nil {
		to.b.t.Errorf("outcome: %v", err)
	}
	if err := m.Ack(); err != nil {
		to.b.t.Errorf("ack: %v", err)
	}
}

func never(string) bool { return false }

func (b *bundle) captureMany(n int) []string {
	b.t.Helper()
	records := make([]*dlq.Record, 0, n)
	for i := range n {
		records = append(records, record(i+1))
	}
	return b.capture(records...)
}

var planID = regexp.MustCompile(`\d{8}-\d{6}-[a-z0-9]+`)

func TestReplay_dryRunThenPlan(t *testing.T) {
	t.Parallel()
	b := setup(t)
	to := b.billing(never)
	ids := b.captureMany(20)
	out, _ := b.ok("dlq", "replay", "--all", "--dry-run", "--rate", "1000/s", "--reason", "billing is back")
	for _, part := range []string{"20 dead letters", "consumer billing of stream ORDERS", "1000 a second", "Nothing was sent", ids[19], "billing is back"} {
		if !strings.Contains(out, part) {
			t.Errorf("the plan lacks %q:\n%s", part, out)
		}
	}
	if strings.Contains(out, "amount") {
		t.Errorf("the plan prints payloads:\n%s", out)
	}
	id := planID.FindString(out)
	if want := "\n  monotel dlq replay --plan " + id + "\n"; !strings.Contains(out, want) {
		t.Errorf("it does not say how to execute the plan, %q:\n%s", want, out)
	}
	if n := to.got.Load(); n != 0 {
		t.Fatalf("a dry run has sent %d", n)
	}

	// What comes after the plan is not in it.
	late := b.capture(record(21))
	b.unchanged(func() { b.fails(exitUsage, []string{"--yes"}, "dlq", "replay", "--plan", id) })
	b.unchanged(func() {
		b.fails(exitUsage, []string{"is a plan that was not run", "replay --plan " + id}, "dlq", "ops", "resume", id)
	})
	out, errs := b.ok("dlq", "replay", "--plan", id, "--yes", "--output", "json")
	var v operationView
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Resolved != 20 || v.Remaining != 0 || v.Status != "done" || v.NewSince != 1 {
		t.Errorf("the replay ends with %s, %v\n%s", out, err, errs)
	}
	if n := to.got.Load(); n != 20 {
		t.Errorf("the consumer has got %d, want 20", n)
	}
	out, _ = b.ok("dlq", "ls", "--output", "ndjson")
	if strings.Count(out, "\n") != 1 || !strings.Contains(out, late[0]) {
		t.Errorf("open are still:\n%s", out)
	}
	out, _ = b.ok("dlq", "ops", "show", id, "--tried")
	if strings.Count(out, "\n") != 20 {
		t.Errorf("--tried lists:\n%s", out)
	}
	out, _ = b.ok("dlq", "ops")
	if !strings.Contains(out, id) || !strings.Contains(out, "done") {
		t.Errorf("ops lists:\n%s", out)
	}
	b.fails(exitFailed, []string{"wrong state"}, "dlq", "ops", "pause", id)
}

func TestReplay_asks(t *testing.T) {
	t.Parallel()
	b := setup(t)
	to := b.billing(never)
	ids := b.captureMany(2)
	b.width, b.env["NO_COLOR"], b.in = 100, "1", "n\n"
	b.unchanged(func() {
		b.fails(exitFailed, []string{
			"GROUP", "SAMPLE", ids[1], "Replay 2 dead letters to consumer billing of stream ORDERS? [y/N]", "nothing was changed",
		}, "dlq", "replay", "--all")
	})
	if n := to.got.Load(); n != 0 {
		t.Fatalf("it has sent %d without a yes", n)
	}
	b.in = "y\n"
	b.ok("dlq", "replay", ids[0])
	if n := to.got.Load(); n != 1 {
		t.Errorf("it has sent %d, want 1", n)
	}
}

func TestReplay_failedAgain(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.captureMany(3)
	b.billing(func(id string) bool { return id == ids[1] })
	code, out, errs := b.run("dlq", "replay", "--all", "--yes")
	if code != exitPartly || !strings.Contains(errs, "1 dead letter failed again") || !strings.Contains(out, "failed again") {
		t.Errorf("exit code %d:\n%s%s", code, out, errs)
	}
	out, _ = b.ok("dlq", "show", ids[1])
	for _, part := range []string{"card refused", "gateway timeout", "failed_again", "First error"} {
		if !strings.Contains(out, part) {
			t.Errorf("show lacks %q:\n%s", part, out)
		}
	}
}

func TestReplay_stopsItself(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.captureMany(30)
	to := b.billing(func(string) bool { return true })
	code, out, errs := b.run("dlq", "replay", "--all", "--yes", "--canary", "1,5")
	if code != exitPartly {
		t.Fatalf("exit code %d:\n%s%s", code, out, errs)
	}
	id := planID.FindString(out)
	for _, part := range []string{"has stopped itself", "29 dead letters not tried", "dlq ops show " + id + " --tried", "dlq ops resume " + id} {
		if !strings.Contains(errs, part) {
			t.Errorf("it does not say %q:\n%s", part, errs)
		}
	}
	if n := to.got.Load(); n != 1 {
		t.Errorf("it has sent %d, want 1", n)
	}
	out, _ = b.ok("dlq", "ops", "show", id, "--remaining", "--output", "json")
	var left []string
	if err := json.Unmarshal([]byte(out), &left); err != nil || len(left) != 29 {
		t.Errorf("remaining are %s, %v", out, err)
	}
	b.ok("dlq", "ops", "cancel", id)
	b.fails(exitFailed, []string{"cancelled"}, "dlq", "ops", "resume", id)
}

func TestReplay_interruptedAndResumed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.captureMany(200)
	to := b.billing(never)
	ctx, interrupt := context.WithCancel(t.Context())
	var out, errs strings.Builder
	done := make(chan int)
	go func() {
		done <- run(ctx, []string{"dlq", "replay", "--all", "--yes", "--rate", "100/s"}, b.process(&out, &errs))
	}()
	for to.got.Load() < 5 {
		select {
		case code := <-done:
			t.Fatalf("it ended by itself with %d:\n%s", code, errs.String())
		case <-time.After(5 * time.Millisecond):
		}
	}
	interrupt()
	if code := <-done; code != exitPartly {
		t.Fatalf("exit code %d:\n%s%s", code, out.String(), errs.String())
	}
	id := planID.FindString(out.String())
	if !strings.Contains(errs.String(), "is paused") || !strings.Contains(errs.String(), "'monotel dlq ops resume "+id+"'") {
		t.Errorf("it does not say how to go on:\n%s", errs.String())
	}
	// A rate of 100/s is too slow for the rest; what has been decided stays, so this
	// takes two seconds.
	text, _ := b.ok("dlq", "ops", "resume", id, "--output", "json")
	var v operationView
	if err := json.Unmarshal([]byte(text), &v); err != nil || v.Resolved != 200 || to.got.Load() != 200 {
		t.Errorf("after resume %s, %v; the consumer has got %d", text, err, to.got.Load())
	}
}

func TestReplay_noWait(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.captureMany(3)
	b.billing(nil) // nobody handles them, so the command would wait for their outcomes until its context ends
	out, errs := b.ok("dlq", "replay", "--all", "--yes", "--no-wait", "--output", "json")
	var v operationView
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.InFlight != 3 || v.Status != "done" {
		t.Errorf("it ends with %s, %v", out, err)
	}
	if !strings.Contains(errs, "nobody fetches") {
		t.Errorf("the plan does not warn:\n%s", errs)
	}
}

func TestReplay_problems(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.captureMany(1) // of a stream that there is not
	b.unchanged(func() {
		code, out, _ := b.run("dlq", "replay", "--all", "--dry-run")
		if code != exitFailed || !strings.Contains(out, "problem:") || strings.Contains(out, "--plan") {
			t.Errorf("exit code %d; the plan is\n%s", code, out)
		}
	})
	b.fails(exitFailed, []string{"cannot be run", "ORDERS"}, "dlq", "replay", "--all", "--yes")
	out, _ := b.ok("dlq", "show", ids[0], "--output", "json")
	if !strings.Contains(out, `"state": "open"`) {
		t.Errorf("the dead letter is\n%s", out)
	}
	b.unchanged(func() {
		_, errs := b.ok("dlq", "replay", "--state", "archived", "--where", "true", "--yes")
		if !strings.Contains(errs, "nothing to replay") {
			t.Errorf("it does not say that there is nothing: %s", errs)
		}
		b.fails(exitUsage, []string{"not found"}, "dlq", "replay", "nope", "--yes")
		b.fails(exitUsage, []string{"not found"}, "dlq", "replay", "--plan", "nope", "--yes")
		b.fails(exitUsage, []string{"invalid"}, "dlq", "replay", "--all", "--to", "subject=a.*", "--yes")
	})
}

func TestReplay_patch(t *testing.T) {
	t.Parallel()
	b := setup(t)
	to := b.billing(never)
	ids := b.captureMany(2)
	patch := filepath.Join(t.TempDir(), "patch.json")
	if err := os.WriteFile(patch, []byte(`{"amount":1}`), 0o600); err != nil {
		t.Fatal(err)
	}
	out, _ := b.ok("dlq", "replay", "--all", "--patch", patch, "--dry-run")
	if strings.Contains(out, "amount") {
		t.Errorf("payloads are shown without --show-diffs:\n%s", out)
	}
	out, _ = b.ok("dlq", "replay", "--all", "--patch", patch, "--dry-run", "--show-diffs")
	if !strings.Contains(out, `-  "amount": 2.50`) || !strings.Contains(out, `+  "amount": 1`) {
		t.Errorf("--show-diffs shows none:\n%s", out)
	}
	b.ok("dlq", "replay", "--plan", planID.FindString(out), "--yes")
	to.mu.Lock()
	defer to.mu.Unlock()
	if got := to.payload[ids[1]]; got != `{"order":2,"amount":1}` {
		t.Errorf("the consumer has got %s", got)
	}
}

// A terminal has a bar, a log has a line from time to time, and --quiet nothing.
func TestProgress(t *testing.T) {
	t.Parallel()

	steps := func(t *testing.T, b *bundle, quiet bool) string {
		t.Helper()
		var errs safeBuffer
		clock := now
		b.now = func() time.Time { return clock }
		c := &cli{process: b.process(nil, &errs), quiet: quiet}
		p := c.progress("messages")
		for i := range 13 {
			p.set(i*100, 1200, fmt.Sprintf("%d resolved", i*90))
			clock = clock.Add(time.Second)
		}
		p.end()
		return errs.String()
	}
	t.Run("lines", func(t *testing.T) {
		t.Parallel()
		got := steps(t, bare(t), false)
		want := "500 of 1,200 messages: 100/s, 7s left, 450 resolved\n1,000 of 1,200 messages: 100/s, 2s left, 900 resolved\n"
		if got != want {
			t.Errorf("progress is\n%s, want\n%s", got, want)
		}
	})
	t.Run("bar", func(t *testing.T) {
		t.Parallel()
		b := bare(t)
		b.width = 100
		if got := steps(t, b, false); !strings.Contains(got, "1200 / 1200") || !strings.Contains(got, "100/s") || !strings.Contains(got, "100 %") {
			t.Errorf("progress is\n%s", got)
		}
	})
	t.Run("quiet", func(t *testing.T) {
		t.Parallel()
		if got := steps(t, bare(t), true); got != "" {
			t.Errorf("progress is %q", got)
		}
	})
}

// A safeBuffer is written by the bar's goroutine.
type safeBuffer struct {
	mu sync.Mutex
	b  strings.Builder
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}
