package cli

import (
	"encoding/json"
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
	start := time.Now()
	code, out, errs := b.run("dlq", "doctor", "--output", "json")
	if took := time.Since(start); took > 8*time.Second {
		t.Errorf("it took %v: requests that are refused have timed out", took)
	}
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
