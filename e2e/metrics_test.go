package e2e

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"
)

// same returns an error unless Prometheus has the value for the query.
func same(ctx context.Context, what, query string, want int) error {
	got, err := prom.value(ctx, query)
	if err != nil {
		return err
	}
	if got != float64(want) {
		return fmt.Errorf("%s: Prometheus has %v, the demo says %d", what, got, want)
	}
	return nil
}

// countsAgree compares what Prometheus has with what the two services say that they
// have done since they were started.
func countsAgree(ctx context.Context) error {
	l, err := askLedger(ctx)
	if err != nil {
		return err
	}
	var sold struct {
		Orders  int `json:"orders"`
		Garbage int `json:"garbage"`
	}
	if err := getJSON(ctx, sys.url(serviceEmitter)+"/orders", &sold); err != nil {
		return err
	}
	// What was never counted has no series, and is 0.
	sum := func(metric, labels string) string { return fmt.Sprintf("sum(%s{%s}) or vector(0)", metric, labels) }
	by := fmt.Sprintf("job=%q,messaging_consumer_group_name=%q", consumersName, auditor)
	settlements := func(kinds string) string {
		return sum("mono_settlements_total", fmt.Sprintf("%s,settlement=~%q,outcome=\"ok\"", by, kinds))
	}
	// This one has to be there.
	failed := fmt.Sprintf("sum(mono_settlements_total{%s}) - sum(mono_settlements_total{%[1]s,outcome=\"ok\"})", by)
	return errors.Join(
		same(ctx, "acks", settlements("ack"), l.Acked),
		same(ctx, "naks", settlements("nak|nak_delay"), l.Nacked),
		same(ctx, "terms", settlements("term"), l.GivenUp),
		same(ctx, "settlements that failed", failed, 0),
		same(ctx, "redeliveries", sum("mono_redeliveries_total", by), l.Nacked),
		same(ctx, "deliveries", sum("messaging_client_consumed_messages_total", by), l.Acked+l.Nacked+l.GivenUp),
		same(ctx, "dead letters", sum("mono_dead_letters_captured_total", by), l.GivenUp-l.FailedAgain),
		same(ctx, "replays that were handled", sum("mono_dead_letters_replayed_total", by+`,outcome="resolved"`), l.Resolved),
		same(ctx, "replays that failed again", sum("mono_dead_letters_replayed_total", by+`,outcome="failed_again"`), l.FailedAgain),
		same(ctx, "confirmations", sum("messaging_client_consumed_messages_total",
			fmt.Sprintf(`job=%q,messaging_consumer_group_name="notification"`, consumersName)), l.Confirmed),
		same(ctx, "orders", sum("messaging_client_sent_messages_total", fmt.Sprintf(`job=%q,error_type=""`, emitterName)), sold.Orders+sold.Garbage),
	)
}

// What Prometheus counts is what the demo says it did, and not about.
func TestMetrics_counts(t *testing.T) {
	setLedger(t, "flaky")
	before, err := askLedger(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	happy, anna := fresh("happy"), 25
	postMany(t, happy, anna)
	for _, customer := range []string{felix, greta, ivan, felix} {
		mustOrder(t, customer)
	}
	awaitSettled(t, happy, anna, 0)
	for customer, more := range map[string]settled{felix: {Acked: 2}, greta: {Acked: 1}, ivan: {GivenUp: 1}} {
		was := before.Customers[customer]
		awaitSettled(t, customer, was.Acked+more.Acked, was.GivenUp+more.GivenUp)
	}
	setLedger(t, "closed")
	failing := fresh("failing")
	postMany(t, failing, 7)
	awaitDead(t, failing, 7)
	replay(t, failing, exitPartly) // too early: they fail again
	awaitSettled(t, failing, 0, 14)
	setLedger(t, "repaired")
	replay(t, failing, exitDone)
	awaitSettled(t, failing, 7, 14)
	setLedger(t, "flaky")
	until(t, "the counts of Prometheus are those of the demo", countsAgree)
	l, err := askLedger(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if l.Acked < anna+3 || l.Nacked < 4 || l.GivenUp < 15 || l.Resolved < 7 || l.FailedAgain < 7 {
		t.Errorf("the demo has done %+v, which is less than it was asked for", l)
	}
}

// An exemplar of a histogram leads to its trace.
func TestMetrics_exemplar(t *testing.T) {
	begin := time.Now().Add(-time.Minute)
	customer := fresh("emma")
	until(t, "an exemplar's trace is in Jaeger", func(ctx context.Context) error {
		if _, err := postOrder(ctx, customer); err != nil {
			return err
		}
		ids, err := prom.exemplars(ctx, fmt.Sprintf("messaging_process_duration_seconds_bucket{job=%q}", consumersName), begin)
		if err != nil {
			return err
		}
		for _, id := range ids {
			tr, err := jae.trace(ctx, id)
			if errors.Is(err, errNoTrace) {
				continue
			}
			if err != nil {
				return err
			}
			if len(tr.named(processName)) == 0 {
				return fmt.Errorf("trace %s of an exemplar has no span %q but %q", id, processName, tr.names())
			}
			return nil
		}
		return fmt.Errorf("of %d exemplars none leads to a trace", len(ids))
	})
}
