package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/monotel/monotel/telemetry/messaging"
)

var page = filepath.Join("..", "..", "docs", "metrics.md")

// The page is what the code would make of it.
func TestPageIsCurrent(t *testing.T) {
	t.Parallel()
	before, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "metrics.md")
	if err := os.WriteFile(file, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(file); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("docs/metrics.md is not what the code says: run make docs")
	}
	for _, m := range messaging.Metrics() {
		if !strings.Contains(string(after), "### `"+m.Name+"`") {
			t.Errorf("%s is not on the page", m.Name)
		}
	}
}

func TestPrometheusName(t *testing.T) {
	t.Parallel()
	want := map[string]string{
		"mono.settlements":                     "mono_settlements_total",
		"mono.handlers.active":                 "mono_handlers_active",
		"mono.delivery.attempts":               "mono_delivery_attempts",
		"messaging.process.duration":           "messaging_process_duration_seconds",
		"messaging.client.sent.messages":       "messaging_client_sent_messages_total",
		"mono.consumer.oldest_unprocessed.age": "mono_consumer_oldest_unprocessed_age_seconds",
		"mono.consumer.ack_pending.limit":      "mono_consumer_ack_pending_limit",
	}
	for _, m := range messaging.Metrics() {
		got, err := prometheusName(m)
		if err != nil {
			t.Fatal(err)
		}
		if w, ok := want[m.Name]; ok && got != w {
			t.Errorf("%s is %s, want %s", m.Name, got, w)
		}
	}
}
