package cli

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A user who may not look at everything is told what was not checked, and that
// this is no clean bill of health.
func TestDoctor_noPermission(t *testing.T) {
	t.Parallel()
	admin, guest := permitted(t, "$JS.API.CONSUMER.LIST.*", "$JS.API.STREAM.INFO.HIDDEN")
	nc, err := nats.Connect(admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	js, _ := openStore(t, nc)
	for _, name := range []string{"HIDDEN", "ORDERS", "UNBOUND"} {
		c := jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}, MaxBytes: 1 << 20}
		if name == "UNBOUND" {
			c.MaxBytes = -1
		}
		if _, err := js.CreateStream(t.Context(), c); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := js.CreateConsumer(t.Context(), "ORDERS", jetstream.ConsumerConfig{Durable: "billing", AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
		t.Fatal(err)
	}
	b := bare(t)
	b.env["NATS_URL"] = guest
	// That no request waits in vain is kept by TestStore_Doctor_permissions of package dlq.
	code, out, errs := b.run("dlq", "doctor", "--output", "json")
	if code != exitPartly || !strings.Contains(errs, "2 checks could not be made") {
		t.Errorf("exit code %d, want %d: %s", code, exitPartly, errs)
	}
	var views []findingView
	if err := json.Unmarshal([]byte(out), &views); err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, v := range views {
		found = append(found, v.Check+" "+v.Stream)
	}
	if want := []string{"not_permitted HIDDEN", "not_permitted ORDERS", "stream_without_max_bytes UNBOUND"}; !slices.Equal(found, want) {
		t.Errorf("found %q, want %q", found, want)
	}

	out, _ = b.ok("dlq", "doctor", "--fail-on", "never")
	for _, subject := range []string{"$JS.API.STREAM.INFO.HIDDEN", "$JS.API.CONSUMER.LIST.ORDERS"} {
		if !strings.Contains(out, subject) {
			t.Errorf("it does not name %s:\n%s", subject, out)
		}
	}
	b.fails(exitFailed, []string{"3 findings as severe as warning"}, "dlq", "doctor", "--fail-on", "warning")
	b.env["NATS_URL"] = admin
	b.ok("dlq", "doctor")
}

// Without a dead-letter stream there is the more to look at.
func TestDoctor_noStream(t *testing.T) {
	t.Parallel()
	b := setup(t)
	out, _ := b.ok("dlq", "doctor", "--fail-on", "never", "--stream", "OTHER")
	if !strings.Contains(out, "dlq_missing") {
		t.Errorf("it does not say that there is none:\n%s", out)
	}
	b.fails(exitFailed, []string{"as severe as critical"}, "dlq", "doctor", "--stream", "OTHER")
	b.fails(exitUsage, []string{"--stream"}, "dlq", "doctor", "--stream", "a b")
}

func TestDoctor_noServer(t *testing.T) {
	t.Parallel()
	b := bare(t)
	b.env["NATS_URL"] = nowhere(t)
	b.fails(exitFailed, []string{"no NATS server"}, "dlq", "doctor")
}

// What the server gave up is found, captured with the command that the doctor names,
// and then not found any more.
func TestCapture(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 3
	if _, err := b.js.CreateStream(t.Context(), jetstream.StreamConfig{
		Name: "WORK", Subjects: []string{"work.>"}, Retention: jetstream.WorkQueuePolicy, MaxBytes: 1 << 20,
	}); err != nil {
		t.Fatal(err)
	}
	cons, err := b.js.CreateConsumer(t.Context(), "WORK", jetstream.ConsumerConfig{
		Durable: "plain", AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: 1,
	})
	if err != nil {
		t.Fatal(err)
	}
	for range n {
		if _, err := b.js.Publish(t.Context(), "work.a", []byte("{}")); err != nil {
			t.Fatal(err)
		}
	}
	batch, err := cons.Fetch(n)
	if err != nil {
		t.Fatal(err)
	}
	got := 0
	for m := range batch.Messages() {
		got++
		if err := m.Nak(); err != nil {
			t.Fatal(err)
		}
	}
	// The server finds at the next request that there is no delivery left.
	if batch, err = cons.Fetch(n, jetstream.FetchMaxWait(50*time.Millisecond)); err != nil || got != n {
		t.Fatalf("%d messages, %v", got, err)
	}
	for range batch.Messages() {
		t.Fatal("a message came again")
	}
	b.fails(exitUsage, []string{"want a stream and a consumer"}, "dlq", "capture", "WORK")
	b.fails(exitUsage, []string{"--yes"}, "dlq", "capture", "WORK", "plain")
	b.fails(exitFailed, []string{"no-such", "consumer not found"}, "dlq", "capture", "WORK", "no-such", "--yes")
	if code, out, _ := b.run("dlq", "doctor"); code != exitFailed || !strings.Contains(out, "monotel dlq capture WORK plain") {
		t.Fatalf("exit code %d, want %d, and the command that helps:\n%s", code, exitFailed, out)
	}
	if out, _ := b.ok("dlq", "capture", "WORK", "plain", "--yes", "--output", "json"); strings.TrimSpace(out) != fmt.Sprintf(`{"captured":%d}`, n) &&
		!strings.Contains(out, fmt.Sprintf(`"captured": %d`, n)) {
		t.Errorf("it says %s", out)
	}
	if out, _ := b.ok("dlq", "ls", "--where", `consumer == "plain"`, "--output", "ndjson"); strings.Count(out, "\n") != n {
		t.Errorf("dead letters:\n%s", out)
	}
	s, err := b.js.Stream(t.Context(), "WORK")
	if err != nil {
		t.Fatal(err)
	}
	if left := s.CachedInfo().State.Msgs; left != 0 {
		t.Errorf("%d messages are left in the stream", left)
	}
	if out, _ := b.ok("dlq", "doctor", "--fail-on", "never"); strings.Contains(out, "zombies") {
		t.Errorf("the doctor still finds some:\n%s", out)
	}
	if out, errs := b.ok("dlq", "capture", "WORK", "plain", "--yes"); out != "" || !strings.Contains(errs, "0 messages captured") {
		t.Errorf("again: %q, %q", out, errs)
	}
}
