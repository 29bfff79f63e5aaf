package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"
)

const (
	publishName    = "publish " + subject
	processName    = "process " + subject
	ackName        = "ack " + subject
	nakName        = "nak " + subject
	termName       = "term " + subject
	batchName      = "batch " + subject
	deadLetterName = "dead_letter " + deadLetters
	replayName     = "replay " + subject
	takeName       = "POST /orders"
)

// processBy returns the processing span of a consumer: the event has two.
func processBy(t trace, group string) (span, error) {
	var found trace
	for _, s := range t.named(processName) {
		if s.Attributes["messaging.consumer.group.name"] == group {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		return span{}, fmt.Errorf("there are %d spans %q of %s, want one", len(found), processName, group)
	}
	return found[0], nil
}

// An order is one trace through two processes: the request, the publish, what each
// consumer does with it, and the ack.
func TestTrace_order(t *testing.T) {
	customer := fresh("anna")
	o := mustOrder(t, customer)
	var request, publish, process, ack, confirm, write span
	awaitTrace(t, o.TraceID, func(tr trace) (err error) {
		var errs [6]error
		request, errs[0] = one(tr, takeName)
		publish, errs[1] = one(tr, publishName)
		process, errs[2] = processBy(tr, auditor)
		ack, errs[3] = one(tr, ackName)
		confirm, errs[4] = processBy(tr, "notification")
		write, errs[5] = one(tr, "write ledger")
		return errors.Join(errs[:]...)
	})
	for _, c := range []struct {
		what          string
		child, parent span
		service, kind string
	}{
		{"the request", request, span{}, emitterName, "server"},
		{"the publish", publish, request, emitterName, "producer"},
		{"its processing", process, publish, consumersName, "consumer"},
		{"what the handler does", write, process, consumersName, "client"},
		{"its ack", ack, process, consumersName, "client"},
		{"the core consumer's processing", confirm, publish, consumersName, "consumer"},
	} {
		if c.child.Parent != c.parent.SpanID {
			t.Errorf("%s: its parent is %q, want %q of %s", c.what, c.child.Parent, c.parent.SpanID, c.parent.Name)
		}
		if c.child.Service != c.service || c.child.Kind != c.kind || c.child.Error {
			t.Errorf("%s: it is %s of %s, error %v; want %s of %s", c.what, c.child.Kind, c.child.Service, c.child.Error, c.kind, c.service)
		}
	}
	if !process.linksTo(publish) {
		t.Errorf("the processing has the links %v, want the publish %s", process.Links, publish.SpanID)
	}
	sequence := process.Attributes["messaging.nats.stream_sequence"]
	for _, err := range []error{
		request.has(map[string]string{
			"http.request.method": "POST", "http.route": "/orders", "http.response.status_code": "201", "url.scheme": "http", "url.path": "/orders",
		}),
		publish.has(map[string]string{
			"messaging.system": "nats", "messaging.operation.name": "publish", "messaging.operation.type": "send",
			"messaging.destination.template": subject, "messaging.destination.name": subject,
			"messaging.nats.stream": stream, "messaging.nats.stream_sequence": sequence, "server.address": "*", "server.port": "*",
		}),
		process.has(map[string]string{
			"messaging.system": "nats", "messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.destination.template": subject, "messaging.destination.name": subject,
			"messaging.consumer.group.name": auditor, "messaging.nats.stream": stream, "messaging.nats.stream_sequence": "*",
			"messaging.nats.consumer_sequence": "*", "messaging.nats.delivery_count": "1", "messaging.nats.settlement": "ack",
			"server.address": "*", "server.port": "*",
		}),
		ack.has(map[string]string{
			"messaging.system": "nats", "messaging.operation.name": "ack", "messaging.operation.type": "settle",
			"messaging.destination.template": subject, "messaging.nats.settlement": "ack",
		}),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	known, err := jae.services(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{emitterName, consumersName} {
		if !slices.Contains(known, name) {
			t.Errorf("Jaeger knows the services %v, not %s", known, name)
		}
	}
}

// Messages that a handler gets together are each in the trace of their publish; the
// batch is a trace of its own, linked to them.
func TestTrace_batch(t *testing.T) {
	customer, begin := fresh("ben"), time.Now()
	orders := map[string]bool{} // trace IDs
	var batch span
	until(t, "a handler gets several orders together", func(ctx context.Context) error {
		for _, o := range postMany(t, customer, 40) {
			orders[o.TraceID] = true
		}
		batches, err := jae.search(ctx, batchName, nil, begin)
		if err != nil {
			return err
		}
		for _, b := range batches {
			root, err := b.root()
			if err != nil {
				return err
			}
			own := !slices.ContainsFunc(root.Links, func(l link) bool { return !orders[l.TraceID] })
			if len(root.Links) > 1 && own {
				batch = root
				return nil
			}
		}
		return fmt.Errorf("of %d batches none has several", len(batches))
	})
	if n := batch.Attributes["messaging.batch.message_count"]; n != fmt.Sprint(len(batch.Links)) {
		t.Errorf("the batch is of %s messages, with %d links", n, len(batch.Links))
	}
	seen := map[string]bool{}
	for _, l := range batch.Links {
		if seen[l.TraceID] {
			t.Errorf("two messages of the batch are in trace %s", l.TraceID)
		}
		seen[l.TraceID] = true
		awaitTrace(t, l.TraceID, func(tr trace) error {
			process, err := processBy(tr, auditor)
			if err != nil {
				return err
			}
			if process.SpanID != l.SpanID {
				return fmt.Errorf("the batch links to span %s, and the processing is %s", l.SpanID, process.SpanID)
			}
			if b := tr.named(batchName); len(b) > 0 {
				return errors.New("the batch is in it")
			}
			_, err = tr.root()
			return err
		})
	}
}

// attempts are the traces of the later deliveries of a message, by their number.
func attempts(ctx context.Context, since time.Time, sequence string) (map[string]trace, error) {
	found, err := jae.search(ctx, processName, map[string]string{"messaging.nats.stream_sequence": sequence}, since)
	if err != nil {
		return nil, err
	}
	all := make(map[string]trace)
	for _, tr := range found {
		process, err := processBy(tr, auditor)
		if err != nil {
			return nil, err
		}
		all[process.Attributes["messaging.nats.delivery_count"]] = tr
	}
	return all, nil
}

// firstAttempt waits for the publish of an order and its first processing, which ended
// with that settlement.
func firstAttempt(t *testing.T, o order, settlement string) (publish, process span, first trace) {
	t.Helper()
	first = awaitTrace(t, o.TraceID, func(tr trace) (err error) {
		if publish, err = one(tr, publishName); err != nil {
			return err
		}
		if process, err = processBy(tr, auditor); err != nil {
			return err
		}
		_, err = one(tr, settlement)
		return err
	})
	return publish, process, first
}

// Each attempt after the first is a trace of its own, linked to the publish and to
// the attempt before.
func TestTrace_retry(t *testing.T) {
	setLedger(t, "flaky")
	begin := time.Now()
	publish, previous, first := firstAttempt(t, mustOrder(t, greta), nakName)
	nak, err := one(first, nakName)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(
		nak.has(map[string]string{"messaging.nats.settlement": "nak_delay"}),
		previous.has(map[string]string{"error.type": "ledger_busy", "messaging.nats.settlement": "nak_delay"}),
	); err != nil {
		t.Error(err)
	}
	if !previous.Error || nak.Parent != previous.SpanID {
		t.Errorf("the first attempt is %+v, its nak %+v", previous, nak)
	}
	var later map[string]trace
	until(t, "there are three attempts", func(ctx context.Context) (err error) {
		later, err = attempts(ctx, begin, previous.Attributes["messaging.nats.stream_sequence"])
		if err == nil && len(later) != 3 {
			err = fmt.Errorf("there are %d", len(later))
		}
		if err != nil {
			return err
		}
		_, err = one(later["3"], ackName)
		return err
	})
	for _, n := range []string{"2", "3"} {
		root, err := later[n].root()
		if err != nil {
			t.Fatalf("attempt %s: %v", n, err)
		}
		if root.Name != processName || root.TraceID == publish.TraceID {
			t.Errorf("attempt %s: its root is %s in trace %s", n, root.Name, root.TraceID)
		}
		if !root.linksTo(publish, previous) {
			t.Errorf("attempt %s: it has the links %v, want the publish %s and the attempt before, %s", n, root.Links, publish.SpanID, previous.SpanID)
		}
		// The public API has the links, too.
		public, err := jae.traceV3(t.Context(), root.TraceID)
		if err != nil {
			t.Fatal(err)
		}
		if s, err := public.root(); err != nil || !s.linksTo(publish, previous) {
			t.Errorf("attempt %s: /api/v3 has the links %v, %v", n, s.Links, err)
		}
		previous = root
	}
}

// An order that is given up is captured in the trace of its failing attempt. Its
// replay is a new trace, linked to the publish and to that attempt.
func TestTrace_deadLetter(t *testing.T) {
	setLedger(t, "closed")
	defer setLedger(t, "flaky")
	customer, begin := fresh("carla"), time.Now()
	publish, process, first := firstAttempt(t, mustOrder(t, customer), termName)
	var dead span
	awaitTrace(t, publish.TraceID, func(tr trace) (err error) {
		dead, err = one(tr, deadLetterName)
		return err
	})
	term, err := one(first, termName)
	if err != nil {
		t.Fatal(err)
	}
	if term.Parent != process.SpanID || dead.Parent != process.SpanID || dead.Kind != "producer" || !dead.linksTo(publish) {
		t.Errorf("the term is %+v,\nthe dead letter %+v,\nof the attempt %+v", term, dead, process)
	}
	if err := errors.Join(
		term.has(map[string]string{"messaging.operation.type": "settle", "messaging.nats.settlement": "term"}),
		dead.has(map[string]string{
			"messaging.system": "nats", "messaging.operation.name": "dead_letter", "messaging.nats.dead_letter.reason": "permanent_error",
		}),
		process.has(map[string]string{"error.type": "ledger_closed", "messaging.nats.settlement": "term"}),
	); err != nil {
		t.Error(err)
	}
	if !process.Error {
		t.Error("the failing attempt is not marked as an error")
	}

	awaitDead(t, customer, 1)
	setLedger(t, "repaired")
	replay(t, customer, exitDone)
	awaitSettled(t, customer, 1, 1)
	var again trace
	until(t, "the replay is in Jaeger", func(ctx context.Context) error {
		found, err := jae.search(ctx, processName, map[string]string{"messaging.consumer.group.name": auditor}, begin)
		if err != nil {
			return err
		}
		for _, tr := range found {
			if r := tr.named(replayName); len(r) == 1 && slices.Contains(r[0].Links, process.link()) {
				// The API of the pages has a parent that is linked to as a link alone.
				if again, err = jae.traceV3(ctx, r[0].TraceID); err != nil {
					return err
				}
				_, err = one(again, ackName)
				return err
			}
		}
		return fmt.Errorf("of %d traces none is its replay", len(found))
	})
	root, err := again.root()
	if err != nil {
		t.Fatal(err)
	}
	handled, err := processBy(again, auditor)
	if err != nil {
		t.Fatal(err)
	}
	if root.Name != replayName || root.TraceID == publish.TraceID || root.Service != "monotel" || root.Kind != "producer" {
		t.Errorf("the replay is %+v", root)
	}
	if !root.linksTo(publish, process) {
		t.Errorf("the replay has the links %v, want the publish %s and the attempt %s", root.Links, publish.SpanID, process.SpanID)
	}
	if handled.Parent != root.SpanID || handled.Service != consumersName || handled.Error {
		t.Errorf("its processing is %+v", handled)
	}
}
