package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"
)

// restarted fails the test unless the service was ended and started. What is in
// between runs while it is away.
func restarted(t *testing.T, service string, end func(context.Context, string) error, meanwhile func()) {
	t.Helper()
	if err := end(t.Context(), service); err != nil {
		t.Fatal(err)
	}
	back := false
	t.Cleanup(func() { // the tests after this one need it
		if !back {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), downTimeout)
			defer cancel()
			_ = sys.start(ctx, service)
		}
	})
	meanwhile()
	if t.Failed() {
		t.FailNow()
	}
	if err := sys.start(t.Context(), service); err != nil {
		t.Fatal(err)
	}
	back = true
}

func awaitPage(t *testing.T, page string) {
	t.Helper()
	until(t, page+" answers", func(ctx context.Context) error { return getJSON(ctx, page, nil) })
}

// Without Jaeger messages flow, what could not be exported is counted, and traces are
// there again when it is.
func TestFault_jaegerStopped(t *testing.T) {
	const n = 30
	customer := fresh("david")
	const failures = `sum(otel_sdk_exporter_span_exported_total{job="orders-consumers",error_type!=""})`
	before, err := prom.value(t.Context(), failures)
	if err != nil {
		t.Fatal(err)
	}
	restarted(t, serviceJaeger, sys.stop, func() {
		postMany(t, customer, n)
		awaitSettled(t, customer, n, 0)
		until(t, "spans that could not be exported are counted", func(ctx context.Context) error {
			got, err := prom.value(ctx, failures)
			if err == nil && got <= before {
				err = fmt.Errorf("still %v", got)
			}
			return err
		})
	})
	awaitPage(t, jae.url+"/api/services")
	until(t, "new traces come", func(ctx context.Context) error {
		o, err := postOrder(ctx, customer)
		if err != nil {
			return err
		}
		short, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		return poll(short, func(ctx context.Context) error {
			tr, err := jae.trace(ctx, o.TraceID)
			if err != nil {
				return err
			}
			_, err = one(tr, ackName)
			return err
		})
	})
}

// A crowd are customers of one name who order as fast as they are served.
type crowd struct {
	cancel context.CancelFunc
	all    sync.WaitGroup

	mu             sync.Mutex
	taken, refused int
}

func newCrowd(t *testing.T, customer string) *crowd {
	t.Helper()
	const many = 4
	c := &crowd{}
	var ctx context.Context
	ctx, c.cancel = context.WithCancel(t.Context())
	t.Cleanup(func() { c.leave() })
	for range many {
		c.all.Go(func() {
			for ctx.Err() == nil {
				_, err := postOrder(context.WithoutCancel(ctx), customer)
				c.mu.Lock()
				if err == nil {
					c.taken++
				} else {
					c.refused++
				}
				c.mu.Unlock()
			}
		})
	}
	return c
}

// counts are the orders that were taken, and that were not.
func (c *crowd) counts() (taken, refused int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.taken, c.refused
}

// awaitMore waits until some more orders are taken.
func (c *crowd) awaitMore(t *testing.T) {
	t.Helper()
	const some = 20
	first, _ := c.counts()
	until(t, "orders are taken", func(context.Context) error {
		if now, _ := c.counts(); now < first+some {
			return fmt.Errorf("%d since then", now-first)
		}
		return nil
	})
}

// leave ends it, and says how many orders were taken, and how many not.
func (c *crowd) leave() (taken, refused int) {
	c.cancel()
	c.all.Wait()
	return c.counts()
}

// Orders that were taken are written, also when the NATS server is restarted while
// they come, in an orderly way and not.
func TestFault_natsRestarted(t *testing.T) {
	for name, end := range map[string]func(context.Context, string) error{"stopped": sys.stop, "killed": sys.kill} {
		t.Run(name, func(t *testing.T) {
			customer := fresh("nats-" + name)
			customers := newCrowd(t, customer)
			customers.awaitMore(t)
			restarted(t, serviceNATS, end, func() {})
			customers.awaitMore(t)
			taken, refused := customers.leave()
			t.Logf("%d orders were taken, %d refused", taken, refused)
			// One that was refused may be stored: its acknowledgement got lost.
			until(t, "what was taken is acked", func(ctx context.Context) error {
				l, err := askLedger(ctx)
				if err != nil {
					return err
				}
				if got := l.Customers[customer].Acked; got < taken {
					return fmt.Errorf("%d of %d are", got, taken)
				}
				return nil
			})
			until(t, "nothing is left", nothingLeft)
		})
	}
}

// nothingLeft is an error while the consumer has something to do.
func nothingLeft(ctx context.Context) error {
	var errs []error
	for _, gauge := range []string{"mono_consumer_pending", "mono_consumer_ack_pending"} {
		got, err := prom.query(ctx, fmt.Sprintf("%s{job=%q,messaging_consumer_group_name=%q}", gauge, consumersName, auditor))
		switch {
		case err != nil:
			errs = append(errs, err)
		case len(got) != 1 || got[0].value != 0:
			errs = append(errs, fmt.Errorf("%s is %v", gauge, got))
		}
	}
	return errors.Join(errs...)
}

// A consumer that is killed while it gives orders up loses none and captures none
// twice.
func TestFault_consumerKilled(t *testing.T) {
	const some = 50
	customer := fresh("killed")
	setLedger(t, "closed")
	customers := newCrowd(t, customer)
	until(t, "some are given up", func(ctx context.Context) error {
		l, err := askLedger(ctx)
		if err == nil && l.Customers[customer].GivenUp < some {
			err = fmt.Errorf("%d are", l.Customers[customer].GivenUp)
		}
		return err
	})
	n := 0
	restarted(t, serviceConsumers, sys.kill, func() {
		customers.awaitMore(t)
		var refused int
		if n, refused = customers.leave(); refused > 0 {
			t.Errorf("%d orders were refused, although the NATS server was there", refused)
		}
	})
	// The new process has a new ledger, which is not closed: it writes the others.
	awaitPage(t, sys.url(serviceConsumers)+"/healthz")
	var dead []entry
	until(t, "every order is a dead letter or written", func(ctx context.Context) (err error) {
		if dead, err = listDead(ctx, customer); err != nil {
			return err
		}
		l, err := askLedger(ctx)
		if err != nil {
			return err
		}
		if got := len(dead) + l.Customers[customer].Acked; got != n {
			return fmt.Errorf("%d of %d are: %d dead letters, and of the new process %+v", got, n, len(dead), l.Customers[customer])
		}
		return nil
	})
	captured := map[uint64]bool{}
	for _, e := range dead {
		if captured[e.Sequence] {
			t.Errorf("message %d was captured twice", e.Sequence)
		}
		captured[e.Sequence] = true
	}
	t.Logf("%d of %d were given up before the kill", len(dead), n)
	if len(dead) < some || len(dead) == n {
		t.Errorf("%d of %d are dead letters: the kill was not in the middle of them", len(dead), n)
	}
	setLedger(t, "repaired")
	replay(t, customer, exitDone)
	awaitSettled(t, customer, n, 0)
	// What was on its way to the killed one has come to this one again, which its
	// ledger does not know. The tests after this one compare the two.
	restarted(t, serviceConsumers, sys.stop, func() {})
	awaitPage(t, sys.url(serviceConsumers)+"/healthz")
	until(t, "the counts of a new process are right", countsAgree)
}

// Prometheus keeps what it has, and goes on.
func TestFault_prometheusRestarted(t *testing.T) {
	customer := fresh("prometheus")
	postMany(t, customer, 5)
	awaitSettled(t, customer, 5, 0)
	until(t, "the counts agree", countsAgree)
	stopped := time.Now()
	restarted(t, servicePrometheus, sys.stop, func() { postMany(t, customer, 5) })
	awaitSettled(t, customer, 10, 0)
	until(t, "Prometheus is back, the counts agree", countsAgree)
	old, err := prom.query(t.Context(), fmt.Sprintf("count_over_time(mono_settlements_total{job=%q,settlement=\"ack\"}[10m] @ %d)",
		consumersName, stopped.Unix()))
	if err != nil || len(old) == 0 {
		t.Errorf("what it had before is %v, %v", old, err)
	}
	until(t, "every target is scraped", func(ctx context.Context) error {
		down, err := prom.targetsDown(ctx)
		if err == nil && len(down) > 0 {
			err = errors.New(strings.Join(down, ", ") + " is not")
		}
		return err
	})
}
