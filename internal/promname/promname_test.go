package promname_test

import (
	"testing"

	"go.opentelemetry.io/otel/attribute"

	"github.com/monotel/monotel/internal/promname"
	"github.com/monotel/monotel/telemetry/messaging"
)

func TestMetric(t *testing.T) {
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
		got, err := promname.Metric(m)
		if err != nil {
			t.Fatal(err)
		}
		if w, ok := want[m.Name]; ok && got != w {
			t.Errorf("%s is %s, want %s", m.Name, got, w)
		}
		delete(want, m.Name)
	}
	for name := range want {
		t.Errorf("there is no %s", name)
	}
}

func TestLabel(t *testing.T) {
	t.Parallel()
	for give, want := range map[string]string{"outcome": "outcome", "messaging.consumer.group.name": "messaging_consumer_group_name"} {
		got, err := promname.Label(attribute.Key(give))
		if err != nil || got != want {
			t.Errorf("Label(%q) = %q, %v, want %q", give, got, err, want)
		}
	}
}
