package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
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

// Prometheus keeps what it has, and goes on. It comes first because an alert that is
// pending waits from the start again.
func TestFault_prometheusRestarted(t *testing.T) {
	customer := fresh("prometheus")
	postMany(t, customer, 5)
	awaitSettled(t, customer, 5, 0)
	until(t, "the counts agree", countsAgree)
	stopped := time.Now() // what it has is from before, perhaps from the same second
	restarted(t, servicePrometheus, sys.stop, func() { postMany(t, customer, 5) })
	awaitSettled(t, customer, 10, 0)
	until(t, "Prometheus is back, the counts agree", countsAgree)
	old, err := prom.query(t.Context(), fmt.Sprintf("count_over_time(mono_settlements_total{job=%q,settlement=\"ack\"}[10m] @ %.3f)",
		consumersName, float64(stopped.UnixMilli())/1000))
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

// Without Jaeger messages flow, what could not be exported is counted, and traces are
// there again when it is.
func TestFault_jaegerStopped(t *testing.T) {
	const n = 30
	customer := fresh("david")
	const failures = `sum(otel_sdk_exporter_span_exported_total{job="orders-consumers",error_type!=""}) or vector(0)`
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

	mu      sync.Mutex
	taken   []string // order IDs
	refused int
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
				o, err := postOrder(context.WithoutCancel(ctx), customer)
				c.mu.Lock()
				if err == nil {
					c.taken = append(c.taken, o.OrderID)
				} else {
					c.refused++
				}
				c.mu.Unlock()
			}
		})
	}
	return c
}

// count is how many orders were taken.
func (c *crowd) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.taken)
}

// awaitMore waits until some more orders are taken.
func (c *crowd) awaitMore(t *testing.T) {
	t.Helper()
	const some = 20
	first := c.count()
	until(t, "orders are taken", func(context.Context) error {
		if now := c.count(); now < first+some {
			return fmt.Errorf("%d since then", now-first)
		}
		return nil
	})
}

// leave ends it, and says which orders were taken, and how many not.
func (c *crowd) leave() (taken []string, refused int) {
	c.cancel()
	c.all.Wait()
	return c.taken, c.refused
}

// Orders that were taken are written, also when the NATS server is restarted while
// they come, in an orderly way and not.
func TestFault_natsRestarted(t *testing.T) {
	for name, end := range map[string]func(context.Context, string) error{"stopped": sys.stop, "killed": sys.kill} {
		t.Run(name, func(t *testing.T) {
			customers := newCrowd(t, fresh("nats-"+name))
			customers.awaitMore(t)
			restarted(t, serviceNATS, end, func() {})
			customers.awaitMore(t)
			taken, refused := customers.leave()
			t.Logf("%d orders were taken, %d refused", len(taken), refused)
			// One that was refused may be stored, too: its acknowledgement got lost.
			awaitWritten(t, taken)
			until(t, "nothing is left", nothingLeft)
		})
	}
	until(t, "the gauges say that nothing is left", func(ctx context.Context) error {
		var errs []error
		for _, gauge := range []string{"mono_consumer_pending", "mono_consumer_ack_pending"} {
			got, err := prom.value(ctx, fmt.Sprintf("%s{job=%q,messaging_consumer_group_name=%q}", gauge, consumersName, auditor))
			if err == nil && got != 0 {
				err = fmt.Errorf("%s is %v", gauge, got)
			}
			errs = append(errs, err)
		}
		return errors.Join(errs...)
	})
}

// nothingLeft is an error while the consumer has something to do.
func nothingLeft(ctx context.Context) error {
	pending, inWork, err := auditorState(ctx)
	if err == nil && (pending > 0 || inWork > 0) {
		err = fmt.Errorf("%d messages are not delivered yet and %d not settled", pending, inWork)
	}
	return err
}

// auditorState is how many messages are not delivered to the consumer yet, and how many
// are with it, as the NATS server says.
func auditorState(ctx context.Context) (pending, inWork int, err error) {
	var page struct {
		Accounts []struct {
			Streams []struct {
				Consumers []struct {
					Name       string `json:"name"`
					Pending    int    `json:"num_pending"`
					AckPending int    `json:"num_ack_pending"`
				} `json:"consumer_detail"`
			} `json:"stream_detail"`
		} `json:"account_details"`
	}
	if err := sys.monitor(ctx, "/jsz?accounts=true&streams=true&consumers=true", &page); err != nil {
		return 0, 0, err
	}
	for _, account := range page.Accounts {
		for _, s := range account.Streams {
			for _, c := range s.Consumers {
				if c.Name == auditor {
					return c.Pending, c.AckPending, nil
				}
			}
		}
	}
	return 0, 0, fmt.Errorf("the NATS server does not know %s: %+v", auditor, page)
}

// A consumer that is killed while it gives orders up loses none and captures none
// twice.
func TestFault_consumerKilled(t *testing.T) {
	if redelivered := killConsumer(t); redelivered == 0 {
		t.Error("what was in work when it was killed was not counted as delivered again")
	}
	// What was in work has come again, which the ledger of the new process does not know.
	// The tests after this one compare the two.
	restarted(t, serviceConsumers, sys.stop, func() {})
	awaitPage(t, sys.url(serviceConsumers)+"/healthz")
	until(t, "the counts of a new process are right", countsAgree)
}

// killConsumer kills it while it gives up the orders of a crowd, and returns how many
// messages came again, since they were in work.
func killConsumer(t *testing.T) (redelivered int) {
	t.Helper()
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
	var taken []string
	restarted(t, serviceConsumers, killInWork, func() {
		customers.awaitMore(t)
		var refused int
		if taken, refused = customers.leave(); refused > 0 {
			t.Errorf("%d orders were refused, although the NATS server was there", refused)
		}
	})
	// The new process has a new ledger, which is not closed: it writes the others.
	awaitPage(t, sys.url(serviceConsumers)+"/healthz")
	until(t, "nothing is left", nothingLeft)
	dead, err := listDead(t.Context(), customer)
	if err != nil {
		t.Fatal(err)
	}
	captured := map[uint64]bool{}
	givenUp := map[string]bool{} // order IDs
	for _, e := range dead {
		if captured[e.Sequence] {
			t.Errorf("message %d was captured twice", e.Sequence)
		}
		if !slices.Contains(taken, e.Payload.OrderID) {
			t.Errorf("nobody has sent the order %q of a dead letter", e.Payload.OrderID)
		}
		captured[e.Sequence], givenUp[e.Payload.OrderID] = true, true
	}
	others := slices.DeleteFunc(slices.Clone(taken), func(id string) bool { return givenUp[id] })
	t.Logf("of %d orders %d were given up before the kill", len(taken), len(dead))
	if len(dead) < some || len(others) == 0 {
		t.Errorf("%d of %d are dead letters: the kill was not in the middle of them", len(dead), len(taken))
	}
	awaitWritten(t, others)
	redelivered, err = counted(t.Context(), serviceConsumers, "mono_redeliveries_total{", fmt.Sprintf("messaging_consumer_group_name=%q", auditor))
	if err != nil {
		t.Fatal(err)
	}
	setLedger(t, "repaired")
	replay(t, customer, exitDone)
	awaitWritten(t, taken)
	return redelivered
}

// killInWork kills the consumer when messages are with it. That would be a matter of luck
// with one that is quick, so it stands still before.
func killInWork(ctx context.Context, service string) error {
	if err := sys.freeze(ctx, service); err != nil {
		return err
	}
	limited, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err := poll(limited, func(ctx context.Context) error {
		_, inWork, err := auditorState(ctx)
		if err == nil && inWork == 0 {
			err = errors.New("no message is with the consumer")
		}
		return err
	})
	return errors.Join(err, sys.kill(ctx, service))
}

// counted adds up series of a service's own page of metrics: Prometheus may not have
// read it since the service was started.
func counted(ctx context.Context, service, prefix, label string) (sum int, err error) {
	body, err := get(ctx, sys.url(service)+"/metrics")
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	found := false
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, prefix) || !strings.Contains(line, label) {
			continue
		}
		found = true
		n, err := strconv.Atoi(line[strings.LastIndexByte(line, ' ')+1:])
		if err != nil {
			return 0, err
		}
		sum += n
	}
	if !found {
		return 0, errors.Join(fmt.Errorf("%s has no series %s with %s", service, prefix, label), lines.Err())
	}
	return sum, lines.Err()
}

// A service whose process is gone is started again, as its restart policy says.
func TestFault_restartPolicy(t *testing.T) {
	c, ok := sys.(*containers)
	if !ok {
		t.Skip("processes have none")
	}
	err := c.crash(t.Context(), serviceEmitter)
	if errors.Is(err, errElsewhere) || errors.Is(err, os.ErrPermission) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	until(t, "Docker has started it again", func(ctx context.Context) error {
		n, err := c.restarts(ctx, serviceEmitter)
		if err == nil && n != "1" {
			err = fmt.Errorf("%s times", n)
		}
		return err
	})
	until(t, "everything is healthy", c.healthy)
	mustOrder(t, fresh("restarted"))
}
