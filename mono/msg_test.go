package mono_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

const (
	never = 24 * time.Hour // a delay that no test lives to see

	pingStream  = "pings"
	pingDurable = "pinger_net_ping_v1"
)

// A delivery is what a handler was given, and when.
type delivery struct {
	data string
	meta mono.Metadata
	at   time.Time
}

func deliveryOf(msg *mono.Msg) delivery {
	return delivery{string(msg.Data), msg.Metadata(), time.Now()}
}

// pinger is a module with one durable consumer of ping, in stream pingStream
// with durable name pingDurable.
func pinger(cfg mono.StreamConsumerConfig, handler mono.EventStreamConsumerHandler) *testModule {
	cfg.Stream.Name = pingStream
	m := consumer("pinger", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(ping, cfg, handler, self)
	})
	return m
}

// each is a handler that handles messages one by one and records deliveries.
func each(seen chan<- delivery, handle func(msg *mono.Msg) error) mono.EventStreamConsumerHandler {
	return func(_ context.Context, msgs []*mono.Msg) error {
		var errs []error
		for _, msg := range msgs {
			seen <- deliveryOf(msg)
			errs = append(errs, handle(msg))
		}
		return errors.Join(errs...)
	}
}

func publishPings(t *testing.T, app *mono.App, data ...string) {
	t.Helper()
	for _, d := range data {
		if _, err := app.Bus().PublishStream(within(t), pingMsg(d)); err != nil {
			t.Fatal(err)
		}
	}
}

// wantDeliveries receives one message again and again and checks that each
// delivery comes no earlier than all the delays before it together. A delay
// begins when the server sends the message, which the handler sees a little
// later: so they are counted from the first delivery's time at the server, and
// not from one delivery to the next. That none comes much later is shown by
// delays of never: a delay mistaken for another would not be seen to end.
func wantDeliveries(t *testing.T, seen <-chan delivery, delays ...time.Duration) {
	t.Helper()
	var least time.Duration
	for i, delay := range delays {
		d := receive(t, seen, fmt.Sprintf("delivery %d", i+1))
		if want := uint64(i + 1); d.meta.NumDelivered != want {
			t.Fatalf("delivery %d of the message, want %d", d.meta.NumDelivered, want)
		}
		least += delay
		// The server's clock for delays may differ a little from ours.
		const tolerance = 5 * time.Millisecond
		if since := d.at.Sub(d.meta.Timestamp); since < least-tolerance {
			t.Errorf("delivery %d came %v after the message was stored, want %v", i+1, since, least)
		}
	}
}

func retries(attempts int, backoff ...time.Duration) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{Retry: mono.RetryPolicy{MaxAttempts: attempts, Backoff: backoff, NoJitter: true}}
}

// The first nak of a message redelivers at once, later ones after the policy's
// delay of their attempt.
func TestMsg_Nak(t *testing.T) {
	t.Parallel()
	seen := make(chan delivery, 10)
	app := startApp(t, emitter("net", ping), pinger(retries(5, never, 200*time.Millisecond, 400*time.Millisecond, never),
		each(seen, func(msg *mono.Msg) error { return msg.Nak() })))
	publishPings(t, app, "x")
	wantDeliveries(t, seen, 0, 0, 200*time.Millisecond, 400*time.Millisecond)
}

func TestMsg_NakWithDelay(t *testing.T) {
	t.Parallel()
	delays := []time.Duration{0, 300 * time.Millisecond, -time.Second, 100 * time.Millisecond}
	seen := make(chan delivery, 10)
	app := startApp(t, emitter("net", ping), pinger(retries(5, never),
		each(seen, func(msg *mono.Msg) error {
			if n := msg.Metadata().NumDelivered; int(n) < len(delays) {
				return msg.NakWithDelay(delays[n])
			}
			return msg.Ack()
		})))
	publishPings(t, app, "x")
	wantDeliveries(t, seen, delays...)
	settled(t, app, pingStream, pingDurable)
}

// The longest delays there are must not wrap around to none.
func TestMsg_hugeDelay(t *testing.T) {
	t.Parallel()
	for name, fail := range map[string]func(msg *mono.Msg) error{
		"NakWithDelay": func(msg *mono.Msg) error { return msg.NakWithDelay(math.MaxInt64) },
		"RetryAfter":   func(*mono.Msg) error { return mono.RetryAfter(errors.New("busy"), math.MaxInt64) },
		"Backoff":      func(*mono.Msg) error { return errors.New("busy") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seen := make(chan delivery, 100)
			app := startApp(t, emitter("net", ping), pinger(retries(5, math.MaxInt64), each(seen, func(msg *mono.Msg) error {
				if string(msg.Data) == "huge" {
					return fail(msg)
				}
				return msg.Ack()
			})))
			publishPings(t, app, "huge")
			receive(t, seen, "the first delivery")
			for i := range 20 { // a time in which a second delivery would be seen
				publishPings(t, app, fmt.Sprint(i))
				if d := receive(t, seen, "another message"); d.data == "huge" {
					t.Fatal("the message came back at once")
				}
			}
		})
	}
}

// Whatever fails on the last attempt is given up, with its reason in the
// server's advisory, and nothing is left pending.
func TestMsg_lastAttempt(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name   string
		handle func(msg *mono.Msg) error
		reason string
	}{
		{"nak", func(msg *mono.Msg) error { return msg.Nak() }, "attempts_exhausted: nak on the last attempt"},
		{"nak with delay", func(msg *mono.Msg) error { return msg.NakWithDelay(time.Millisecond) }, "attempts_exhausted: nak on the last attempt"},
		{"error", func(*mono.Msg) error { return errors.New("no luck") }, "attempts_exhausted: no luck"},
		{"retry after", func(*mono.Msg) error { return mono.RetryAfter(errors.New("no luck"), 0) }, "attempts_exhausted: no luck"},
		{"fail", func(msg *mono.Msg) error { return msg.Fail(errors.New("no luck")) }, "attempts_exhausted: no luck"},
		{"panic", func(*mono.Msg) error { panic("oh no") }, "panic: " + (&mono.PanicError{Value: "oh no"}).Error()},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seen := make(chan delivery, 10)
			app := startApp(t, emitter("net", ping), pinger(retries(3, time.Millisecond), each(seen, tt.handle)))
			terminated := watchTerminated(t, app)
			publishPings(t, app, "x")
			wantTerminated(t, terminated, 1, 3, tt.reason)
			wantDeliveries(t, seen, 0, 0, 0)
			settled(t, app, pingStream, pingDurable)
			if len(seen) != 0 {
				t.Error("the message was delivered after it was given up")
			}
		})
	}
}

// What cannot be helped by trying again is given up at once.
func TestMsg_givenUpAtOnce(t *testing.T) {
	t.Parallel()
	undecodable := &mono.DecodeError{Event: "net/Ping/v1", Err: errors.New("no JSON")}
	tests := []struct {
		name   string
		handle func(msg *mono.Msg) error
		reason string
	}{
		{"term", func(msg *mono.Msg) error { return msg.Term() }, "terminated"},
		{"term with reason", func(msg *mono.Msg) error { return msg.TermWithReason("order\r\nis closed\x00") }, "terminated: order  is closed"},
		{"permanent", func(*mono.Msg) error { return mono.Permanent(errors.New("no such order")) }, "permanent_error: no such order"},
		{"wrapped permanent", func(*mono.Msg) error {
			return fmt.Errorf("bill: %w", errors.Join(errors.New("a"), mono.Permanent(errors.New("b"))))
		}, "permanent_error: bill: a b"},
		{"permanent wins over retry after", func(*mono.Msg) error {
			return mono.RetryAfter(mono.Permanent(errors.New("no such order")), time.Hour)
		}, "permanent_error: no such order"},
		{"undecodable", func(*mono.Msg) error { return undecodable }, "undecodable: decode event net/Ping/v1: *errors.errorString"},
		{"fail with permanent", func(msg *mono.Msg) error { return msg.Fail(mono.Permanent(errors.New("no such order"))) }, "permanent_error: no such order"},
		{"fail with undecodable", func(msg *mono.Msg) error { return msg.Fail(undecodable) }, "undecodable: decode event net/Ping/v1: *errors.errorString"},
		{"panic with permanent", func(*mono.Msg) error { panic(mono.Permanent(errors.New("no such order"))) }, "permanent_error: panic: no such order"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			seen := make(chan delivery, 10)
			app := startApp(t, emitter("net", ping), pinger(retries(5, 0), each(seen, tt.handle)))
			terminated := watchTerminated(t, app)
			publishPings(t, app, "x")
			wantTerminated(t, terminated, 1, 1, tt.reason)
			wantDeliveries(t, seen, 0)
			settled(t, app, pingStream, pingDurable)
		})
	}
}

func wantTerminated(t *testing.T, terminated <-chan terminatedMsg, seq, deliveries uint64, reason string) {
	t.Helper()
	got := receive(t, terminated, "the server's advisory")
	want := terminatedMsg{Stream: pingStream, Consumer: pingDurable, StreamSeq: seq, Deliveries: deliveries, Reason: reason}
	if got != want {
		t.Errorf("terminated %+v, want %+v", got, want)
	}
}

// A long reason is cut, between characters, so that it stays readable.
func TestMsg_TermWithReason_long(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), pinger(retries(5), func(_ context.Context, msgs []*mono.Msg) error {
		return msgs[0].TermWithReason(strings.Repeat("ż", 10_000))
	}))
	terminated := watchTerminated(t, app)
	publishPings(t, app, "x")
	wantTerminated(t, terminated, 1, 1, "terminated: "+strings.Repeat("ż", 256))
}

// A plain error follows the policy: growing delays, not a tight loop.
func TestHandlerError_backoff(t *testing.T) {
	t.Parallel()
	backoff := []time.Duration{100 * time.Millisecond, 250 * time.Millisecond, 500 * time.Millisecond, never}
	for name, fail := range map[string]func(msg *mono.Msg) error{
		"returned": func(*mono.Msg) error { return errors.New("no luck") },
		"for one":  func(msg *mono.Msg) error { return msg.Fail(errors.New("no luck")) },
		"panic":    func(*mono.Msg) error { panic("oh no") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seen := make(chan delivery, 10)
			app := startApp(t, emitter("net", ping), pinger(retries(6, backoff...), each(seen, fail)))
			publishPings(t, app, "x")
			wantDeliveries(t, seen, 0, backoff[0], backoff[1], backoff[2])
		})
	}
}

func TestHandlerError_retryAfter(t *testing.T) {
	t.Parallel()
	seen := make(chan delivery, 10)
	app := startApp(t, emitter("net", ping), pinger(retries(5, never), each(seen, func(msg *mono.Msg) error {
		switch msg.Metadata().NumDelivered {
		case 1:
			return fmt.Errorf("bill: %w", mono.RetryAfter(errors.New("busy"), 300*time.Millisecond))
		case 2:
			return msg.Fail(mono.RetryAfter(errors.New("busy"), -time.Second))
		}
		return msg.Ack()
	})))
	publishPings(t, app, "x")
	wantDeliveries(t, seen, 0, 300*time.Millisecond, 0)
	settled(t, app, pingStream, pingDurable)
}

// A policy without limit goes on beyond the default of five attempts.
func TestHandlerError_unlimitedAttempts(t *testing.T) {
	t.Parallel()
	seen := make(chan delivery, 20)
	app := startApp(t, emitter("net", ping), pinger(retries(-1, 0), each(seen, func(msg *mono.Msg) error {
		if msg.Metadata().NumDelivered < 12 {
			return errors.New("no luck")
		}
		return msg.Ack()
	})))
	publishPings(t, app, "x")
	wantDeliveries(t, seen, make([]time.Duration, 12)...)
	settled(t, app, pingStream, pingDurable)
}

// An error settles what the handler left, and nothing else.
func TestHandlerError_settlesTheRest(t *testing.T) {
	t.Parallel()
	for _, autoAck := range []bool{false, true} {
		t.Run(fmt.Sprintf("AutoAck %v", autoAck), func(t *testing.T) {
			t.Parallel()
			ready := make(chan struct{})
			seen := make(chan delivery, 20)
			cfg := retries(5, 0)
			cfg.AutoAck = autoAck
			app := startApp(t, emitter("net", ping), pinger(cfg, func(_ context.Context, msgs []*mono.Msg) error {
				<-ready
				var err error
				for _, msg := range msgs {
					seen <- deliveryOf(msg)
					switch string(msg.Data) {
					case "acked":
						err = errors.Join(err, msg.Ack())
					case "termed":
						err = errors.Join(err, msg.Term())
					case "left":
						if msg.Metadata().NumDelivered > 1 {
							err = errors.Join(err, msg.Ack())
							continue
						}
						err = errors.Join(err, errors.New("no luck"))
					}
				}
				return err
			}))
			terminated := watchTerminated(t, app)
			publishPings(t, app, "acked", "left", "termed")
			close(ready)
			want := map[attempt]int{{"acked", 1}: 1, {"termed", 1}: 1, {"left", 1}: 1, {"left", 2}: 1}
			got := make(map[attempt]int)
			for range want {
				d := receive(t, seen, "a delivery")
				got[attempt{d.data, d.meta.NumDelivered}]++
			}
			if !maps.Equal(got, want) {
				t.Errorf("the handler saw %v, want %v", got, want)
			}
			wantTerminated(t, terminated, 3, 1, "terminated")
			settled(t, app, pingStream, pingDurable)
		})
	}
}

// A panic ends its batch, and neither the consumer nor another one.
func TestHandlerPanic(t *testing.T) {
	t.Parallel()
	cause := errors.New("index out of range")
	failed := make(chan error, 10)
	watch := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
		return func(ctx context.Context, msgs []*mono.Msg) (err error) {
			defer func() {
				if v := recover(); v != nil {
					failed <- v.(error)
					panic(v)
				}
			}()
			return next(ctx, msgs)
		}
	}}
	log := &logBuffer{}
	seen := make(chan delivery, 10)
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithLogger(log.logger()), mono.WithMiddleware(watch)},
		emitter("net", ping),
		pinger(mono.StreamConsumerConfig{Fetch: mono.FetchConfig{BatchSize: 1}, Retry: mono.RetryPolicy{Backoff: []time.Duration{0}}},
			each(seen, func(msg *mono.Msg) error {
				if string(msg.Data) == "bad" && msg.Metadata().NumDelivered == 1 {
					handlerThatPanics(cause)
				}
				return msg.Ack()
			})))
	publishPings(t, app, "bad", "good")

	if err := receive(t, failed, "the panic"); !errors.Is(err, cause) {
		t.Errorf("the middleware saw %v", err)
	}
	want := map[attempt]int{{"bad", 1}: 1, {"bad", 2}: 1, {"good", 1}: 1}
	got := make(map[attempt]int)
	for range want {
		d := receive(t, seen, "a delivery")
		got[attempt{d.data, d.meta.NumDelivered}]++
	}
	if !maps.Equal(got, want) {
		t.Errorf("the handler saw %v, want %v", got, want)
	}
	settled(t, app, pingStream, pingDurable)
	// The log tells where it happened.
	for _, part := range []string{"panic: index out of range", "handlerThatPanics", "msg_test.go"} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log does not say %q:\n%s", part, log)
		}
	}
}

//go:noinline
func handlerThatPanics(cause error) { panic(cause) }

func TestPanicError(t *testing.T) {
	t.Parallel()
	cause := errors.New("cause")
	err := error(&mono.PanicError{Value: cause, Stack: []byte("stack")})
	wantError(t, err, cause, "panic: cause")
	if p, ok := errors.AsType[*mono.PanicError](fmt.Errorf("handle: %w", err)); !ok || string(p.Stack) != "stack" {
		t.Errorf("the stack is not to be had from %v", err)
	}
	if err := errors.Unwrap(&mono.PanicError{Value: "text"}); err != nil {
		t.Errorf("a panic with a text wraps %v", err)
	}
}

// A handler that ends its goroutine, as the Fatal of a testing.T does, costs
// its batch an attempt and not the consumer its life.
func TestHandlerGoexit(t *testing.T) {
	t.Parallel()
	seen := make(chan delivery, 20)
	cfg := retries(5, 0)
	cfg.Fetch.BatchSize = 1
	app := startApp(t, emitter("net", ping), pinger(cfg, each(seen, func(msg *mono.Msg) error {
		if string(msg.Data) == "bad" && msg.Metadata().NumDelivered < 4 {
			runtime.Goexit()
		}
		return msg.Ack()
	})))
	publishPings(t, app, "bad", "good")
	want := map[attempt]int{{"bad", 1}: 1, {"bad", 2}: 1, {"bad", 3}: 1, {"bad", 4}: 1, {"good", 1}: 1}
	got := make(map[attempt]int)
	for range want {
		d := receive(t, seen, "a delivery")
		got[attempt{d.data, d.meta.NumDelivered}]++
	}
	if !maps.Equal(got, want) {
		t.Errorf("the handler saw %v, want %v", got, want)
	}
	settled(t, app, pingStream, pingDurable)
}

// The same for a core consumer: its handler runs on the subscription's own
// goroutine, so that a Goexit ended the subscription without a word, and Stop
// waited for it in vain. What arrived meanwhile may be lost, as with core NATS.
func TestCoreHandlerGoexit(t *testing.T) {
	t.Parallel()
	seen := make(chan string, 1000)
	m := consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventConsumer(ping, func(_ context.Context, msg *mono.Msg) error {
			seen <- string(msg.Data)
			if string(msg.Data) == "bad" {
				runtime.Goexit()
			}
			return nil
		}, self)
	})
	app := newApp(t, emitter("net", ping), m)
	if err := app.Start(within(t)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := app.Bus().Publish(within(t), pingMsg("bad")); err != nil {
			t.Fatal(err)
		}
		for receive(t, seen, "the bad event") != "bad" {
			continue // good ones of the round before
		}
		eventually(t, func() bool {
			if err := app.Bus().Publish(within(t), pingMsg("good")); err != nil {
				t.Fatal(err)
			}
			select {
			case data := <-seen:
				return data == "good"
			default:
				return false
			}
		}, "the consumer goes on")
	}
	// Without a deadline: Stop waits for as long as it takes.
	stopped := make(chan error, 1)
	go func() { stopped <- app.Stop(context.Background()) }()
	if err := receive(t, stopped, "the end of Stop"); err != nil {
		t.Error(err)
	}
}

func startCore(t *testing.T, handler mono.EventConsumerHandler) *mono.App {
	t.Helper()
	return startApp(t, emitter("net", ping), consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventConsumer(ping, handler, self)
	}))
}

// A core consumer goes on after an error and after a panic.
func TestCoreHandler_failures(t *testing.T) {
	t.Parallel()
	log := &logBuffer{}
	seen := make(chan string, 10)
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithLogger(log.logger())},
		emitter("net", ping), consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, func(_ context.Context, msg *mono.Msg) error {
				seen <- string(msg.Data)
				switch string(msg.Data) {
				case "error":
					return errors.New("no luck")
				case "panic":
					panic("oh no")
				}
				return nil
			}, self)
		}))
	for _, data := range []string{"error", "panic", "good"} {
		if err := app.Bus().Publish(within(t), pingMsg(data)); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range []string{"error", "panic", "good"} {
		if got := receive(t, seen, "an event"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	for _, part := range []string{"no luck", "module=listener", "event=net/Ping/v1"} {
		if !strings.Contains(log.String(), part) {
			t.Errorf("the log does not say %q:\n%s", part, log)
		}
	}
}

func TestAutoAck(t *testing.T) {
	t.Parallel()
	seen := make(chan delivery, 20)
	app := startApp(t, emitter("net", ping), pinger(mono.StreamConsumerConfig{AutoAck: true}, each(seen, func(*mono.Msg) error { return nil })))
	publishPings(t, app, "a", "b", "c")
	for range 3 {
		if d := receive(t, seen, "a delivery"); d.meta.NumDelivered != 1 {
			t.Errorf("%q was delivered %d times", d.data, d.meta.NumDelivered)
		}
	}
	settled(t, app, pingStream, pingDurable)
}

// Without AutoAck, what a handler leaves comes back after AckWait, and the
// attempt does not count as failed.
func TestNoAutoAck(t *testing.T) {
	t.Parallel()
	const ackWait = 500 * time.Millisecond
	seen := make(chan delivery, 20)
	cfg := retries(1, never)
	cfg.Consumer.AckWait = ackWait
	app := startApp(t, emitter("net", ping), pinger(cfg, each(seen, func(msg *mono.Msg) error {
		if msg.Metadata().NumDelivered < 3 {
			return nil
		}
		return msg.Ack()
	})))
	publishPings(t, app, "x")
	wantDeliveries(t, seen, 0, ackWait, ackWait)
	settled(t, app, pingStream, pingDurable)
}

// The first settlement stands; later ones say that they came late.
func TestMsg_alreadySettled(t *testing.T) {
	t.Parallel()
	ways := map[string]func(msg *mono.Msg) error{
		"Ack":            (*mono.Msg).Ack,
		"Nak":            (*mono.Msg).Nak,
		"NakWithDelay":   func(msg *mono.Msg) error { return msg.NakWithDelay(time.Second) },
		"Term":           (*mono.Msg).Term,
		"TermWithReason": func(msg *mono.Msg) error { return msg.TermWithReason("why") },
		"Fail":           func(msg *mono.Msg) error { return msg.Fail(errors.New("no luck")) },
		"Fail(nil)":      func(msg *mono.Msg) error { return msg.Fail(nil) },
		"InProgress":     (*mono.Msg).InProgress,
	}
	got := make(chan *mono.Msg, 1)
	app := startApp(t, emitter("net", ping), pinger(mono.StreamConsumerConfig{}, func(_ context.Context, msgs []*mono.Msg) error {
		if err := msgs[0].Ack(); err != nil {
			return err
		}
		got <- msgs[0]
		return errors.New("an error after the settlement changes nothing")
	}))
	publishPings(t, app, "x")
	msg := receive(t, got, "the message")
	for name, settle := range ways {
		err := settle(msg)
		if name == "InProgress" {
			wantError(t, err, mono.ErrAlreadySettled)
			continue
		}
		wantError(t, err, mono.ErrAlreadySettled, "message 1", `"pings"`)
	}
	settled(t, app, pingStream, pingDurable)
	if info := consumerInfo(t, app, pingStream, pingDurable); info.NumRedelivered != 0 || info.Delivered.Consumer != 1 {
		t.Errorf("the message was delivered %d times", info.Delivered.Consumer)
	}

	for name, other := range map[string]*mono.Msg{"never delivered": {}, "core": receiveCore(t)} {
		for way, settle := range ways {
			if err := settle(other); !errors.Is(err, mono.ErrNotDurable) {
				t.Errorf("%s of a message that is %s: %v, want ErrNotDurable", way, name, err)
			}
		}
		if other.Metadata() != (mono.Metadata{}) {
			t.Errorf("a message that is %s has metadata %+v", name, other.Metadata())
		}
		if other.Context() == nil {
			t.Errorf("a message that is %s has no context", name)
		}
	}
}

// receiveCore returns a message as a core consumer gets it.
func receiveCore(t *testing.T) *mono.Msg {
	t.Helper()
	got := make(chan *mono.Msg, 1)
	app := startCore(t, func(ctx context.Context, msg *mono.Msg) error {
		if msg.Context() != ctx {
			t.Error("Msg.Context is not the handler's")
		}
		got <- msg
		return nil
	})
	if err := app.Bus().Publish(within(t), pingMsg("core")); err != nil {
		t.Fatal(err)
	}
	return receive(t, got, "the core message")
}

// Of many settlements at a time exactly one wins, also against the one that
// follows from the handler's return.
func TestMsg_concurrentSettlements(t *testing.T) {
	t.Parallel()
	const messages, goroutines = 50, 16
	ways := []func(msg *mono.Msg) error{
		(*mono.Msg).Ack, (*mono.Msg).Term, func(msg *mono.Msg) error { return msg.Fail(nil) },
		func(msg *mono.Msg) error { return msg.TermWithReason("race") },
	}
	var wins [messages]atomic.Int32
	var all sync.WaitGroup
	started := make(chan struct{}, messages)
	cfg := mono.StreamConsumerConfig{AutoAck: true, Concurrency: 4}
	app := startApp(t, emitter("net", ping), pinger(cfg, func(_ context.Context, msgs []*mono.Msg) error {
		for _, msg := range msgs {
			for g := range goroutines {
				all.Go(func() {
					switch err := ways[g%len(ways)](msg); {
					case err == nil:
						wins[msg.Metadata().Sequence.Stream-1].Add(1)
					case !errors.Is(err, mono.ErrAlreadySettled):
						t.Errorf("settle: %v", err)
					}
				})
			}
			started <- struct{}{}
		}
		return nil
	}))
	for i := range messages {
		publishPings(t, app, fmt.Sprint(i))
	}
	for range messages {
		receive(t, started, "a message")
	}
	all.Wait()
	settled(t, app, pingStream, pingDurable)
	for i := range wins {
		// None at all: the consumer's own ack won.
		if n := wins[i].Load(); n > 1 {
			t.Errorf("%d settlements of message %d won", n, i+1)
		}
	}
	if info := consumerInfo(t, app, pingStream, pingDurable); info.Delivered.Consumer != messages {
		t.Errorf("%d deliveries of %d messages", info.Delivered.Consumer, messages)
	}
}

// Exactly one, when the handler waits for all of them.
func TestMsg_concurrentSettlements_oneWins(t *testing.T) {
	t.Parallel()
	result := make(chan int32, 1)
	app := startApp(t, emitter("net", ping), pinger(mono.StreamConsumerConfig{}, func(_ context.Context, msgs []*mono.Msg) error {
		var wins atomic.Int32
		var all sync.WaitGroup
		go1 := make(chan struct{})
		for range 64 {
			all.Go(func() {
				<-go1
				if msgs[0].Ack() == nil {
					wins.Add(1)
				}
			})
		}
		close(go1)
		all.Wait()
		result <- wins.Load()
		return nil
	}))
	publishPings(t, app, "x")
	if n := receive(t, result, "the handler"); n != 1 {
		t.Errorf("%d settlements won, want 1", n)
	}
	settled(t, app, pingStream, pingDurable)
}

func TestMsg_Metadata(t *testing.T) {
	t.Parallel()
	got := make(chan *mono.Msg, 4)
	cfg := retries(5, 0)
	cfg.Fetch.BatchSize = 1
	app := startApp(t, emitter("net", ping), pinger(cfg, func(ctx context.Context, msgs []*mono.Msg) error {
		if msgs[0].Context() != ctx {
			t.Error("Msg.Context is not the handler's")
		}
		got <- msgs[0]
		return errors.New("again")
	}))
	before := time.Now().Add(-time.Second)
	msg := pingMsg("x")
	msg.Header = mono.Header{"X-A": {"1", "2"}}
	if _, err := app.Bus().PublishStream(within(t), msg); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(2) {
		m := receive(t, got, "a delivery")
		meta := m.Metadata()
		if meta.Stream != pingStream || meta.Consumer != pingDurable || meta.NumDelivered != i+1 ||
			meta.Sequence.Stream != 1 || meta.Sequence.Consumer != i+1 || meta.Domain != "" {
			t.Errorf("metadata of delivery %d is %+v", i+1, meta)
		}
		if meta.Timestamp.Before(before) || meta.Timestamp.After(time.Now().Add(time.Second)) {
			t.Errorf("stored at %v, want about now", meta.Timestamp)
		}
		if m.Subject != ping.Subject || string(m.Data) != "x" || !slices.Equal(m.Header["X-A"], []string{"1", "2"}) {
			t.Errorf("got %q with %q on %q", m.Data, m.Header, m.Subject)
		}
	}
}

var typedPing = helper.EventDefinition[pingPayload]("net", "Ping", "v1")

type pingPayload struct {
	N int `json:"n"`
}

// A payload that does not decode is given up alone: the rest of its batch is
// handled, and whatever becomes of that changes nothing about it.
func TestTypedBatch_undecodable(t *testing.T) {
	t.Parallel()
	open := make(chan struct{})
	type batch struct {
		ns   []int
		seqs []uint64
	}
	batches := make(chan batch, 10)
	app := startApp(t, emitter("net", ping),
		consumer("pinger", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(r, typedPing,
				mono.StreamConsumerConfig{
					Stream: mono.StreamConfig{Name: pingStream}, Fetch: mono.FetchConfig{BatchSize: 10},
					Retry: mono.RetryPolicy{Backoff: []time.Duration{0}},
				},
				func(_ context.Context, events []pingPayload, msgs []*mono.Msg) error {
					<-open
					var b batch
					for i, e := range events {
						b.ns, b.seqs = append(b.ns, e.N), append(b.seqs, msgs[i].Metadata().Sequence.Stream)
					}
					var err error
					for _, msg := range msgs {
						if msg.Metadata().NumDelivered > 1 {
							err = errors.Join(err, msg.Ack())
						} else {
							err = errors.Join(err, errors.New("the good ones fail once"))
						}
					}
					batches <- b
					return err
				}, self)
		}))
	terminated := watchTerminated(t, app)
	publishPings(t, app, `{"n":1}`) // its batch waits, and the next one fills up
	publishPings(t, app, `{"n":2}`, `{"n":`, `{"n":4}`, `"five"`, `{"n":6}`)
	close(open)

	ns := make(map[int]int)
	for len(ns) < 4 || ns[1]+ns[2]+ns[4]+ns[6] < 8 {
		b := receive(t, batches, "a batch")
		if len(b.ns) != len(b.seqs) {
			t.Fatalf("%d events and %d messages", len(b.ns), len(b.seqs))
		}
		for i, n := range b.ns {
			ns[n]++
			if b.seqs[i] != uint64(n) {
				t.Errorf("event %d came with message %d", n, b.seqs[i])
			}
		}
	}
	if want := map[int]int{1: 2, 2: 2, 4: 2, 6: 2}; !maps.Equal(ns, want) {
		t.Errorf("handled %v, want %v", ns, want)
	}
	var gone []uint64
	for range 2 {
		a := receive(t, terminated, "the server's advisory")
		gone = append(gone, a.StreamSeq)
		if !strings.HasPrefix(a.Reason, "undecodable: decode event net/Ping/v1: ") || a.Deliveries != 1 {
			t.Errorf("terminated %+v", a)
		}
	}
	slices.Sort(gone)
	if !slices.Equal(gone, []uint64{3, 5}) {
		t.Errorf("messages %v were terminated, want 3 and 5", gone)
	}
	settled(t, app, pingStream, pingDurable)
}

// A batch with nothing in it that decodes does not reach the handler.
func TestTypedBatch_nothingDecodes(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping),
		consumer("pinger", func(r mono.EventRegistry, self mono.Module) error {
			return helper.RegisterTypedEventStreamConsumer(r, typedPing, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: pingStream}},
				func(context.Context, []pingPayload, []*mono.Msg) error {
					t.Error("the handler was called for nothing")
					return nil
				}, self)
		}))
	terminated := watchTerminated(t, app)
	publishPings(t, app, "a", "b")
	receive(t, terminated, "the first advisory")
	receive(t, terminated, "the second advisory")
	settled(t, app, pingStream, pingDurable)
}

// The slice that a handler gets is its own: what it does to it changes nothing
// about the settlement of what it left.
func TestHandler_ownsItsSlice(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(msgs []*mono.Msg) []*mono.Msg{
		"reorder":  func(msgs []*mono.Msg) []*mono.Msg { slices.Reverse(msgs); return msgs },
		"truncate": func(msgs []*mono.Msg) []*mono.Msg { clear(msgs[1:]); return msgs[:1] },
		"forget":   func(msgs []*mono.Msg) []*mono.Msg { clear(msgs); return nil },
		"repeat": func(msgs []*mono.Msg) []*mono.Msg {
			for i := range msgs {
				msgs[i] = msgs[0]
			}
			return msgs[:1]
		},
		"append": func(msgs []*mono.Msg) []*mono.Msg { return append(msgs, &mono.Msg{})[:1] },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			open := make(chan struct{})
			cfg := retries(5, 0)
			cfg.AutoAck = true
			var failed atomic.Bool
			app := startApp(t, emitter("net", ping), pinger(cfg, func(_ context.Context, msgs []*mono.Msg) error {
				<-open
				left := spoil(msgs)
				if len(left) > 0 {
					if err := left[0].Ack(); err != nil {
						return err
					}
				}
				if !failed.Swap(true) {
					return errors.New("the rest comes back")
				}
				return nil
			}))
			publishPings(t, app, "0")
			for i := range 9 {
				publishPings(t, app, fmt.Sprint(i+1))
			}
			close(open)
			settled(t, app, pingStream, pingDurable)
			if n := consumerInfo(t, app, pingStream, pingDurable).Delivered.Consumer; n < 10 || n > 30 {
				t.Errorf("10 messages were delivered %d times", n)
			}
		})
	}
}

// A handler that takes longer than AckWait is not wrong, only slow: its
// messages, and those that wait for it, are kept.
func TestHandler_slowerThanAckWait(t *testing.T) {
	t.Parallel()
	const (
		ackWait  = 2 * time.Second // a busy machine extends leases late
		slow     = 3 * time.Second
		messages = 3
	)
	seen := make(chan delivery, 20)
	var running, most atomic.Int32
	app := startApp(t, emitter("net", ping), pinger(
		mono.StreamConsumerConfig{
			Consumer: mono.ConsumerConfig{AckWait: ackWait}, Fetch: mono.FetchConfig{BatchSize: 1}, AutoAck: true,
		},
		func(ctx context.Context, msgs []*mono.Msg) error {
			defer running.Add(-1)
			most.Store(max(most.Load(), running.Add(1)))
			seen <- deliveryOf(msgs[0])
			timer := time.NewTimer(slow)
			defer timer.Stop()
			select {
			case <-timer.C:
				return nil
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}))
	publishPings(t, app, "0", "1", "2")
	for i := range messages {
		d := receive(t, seen, "a delivery")
		if d.data != fmt.Sprint(i) || d.meta.NumDelivered != 1 {
			t.Errorf("delivery %d of %q, want the first of %d", d.meta.NumDelivered, d.data, i)
		}
	}
	settled(t, app, pingStream, pingDurable)
	if info := consumerInfo(t, app, pingStream, pingDurable); info.Delivered.Consumer != messages || len(seen) != 0 {
		t.Errorf("%d deliveries of %d messages", info.Delivered.Consumer, messages)
	}
	if most.Load() != 1 {
		t.Errorf("%d batches were handled at a time, want 1", most.Load())
	}
}

// A message may be settled after its handler has returned; InProgress keeps it
// until then.
func TestMsg_InProgress(t *testing.T) {
	t.Parallel()
	const ackWait = 2 * time.Second
	seen, later := make(chan delivery, 10), make(chan *mono.Msg, 10)
	app := startApp(t, emitter("net", ping), pinger(
		mono.StreamConsumerConfig{Consumer: mono.ConsumerConfig{AckWait: ackWait}},
		each(seen, func(msg *mono.Msg) error {
			later <- msg
			return nil
		})))
	publishPings(t, app, "x")
	msg := receive(t, later, "the message")
	end := time.NewTimer(2 * ackWait)
	defer end.Stop()
	beat := time.NewTicker(ackWait / 10)
	defer beat.Stop()
	for working := true; working; {
		select {
		case <-beat.C:
			if err := msg.InProgress(); err != nil {
				t.Fatal(err)
			}
		case <-end.C:
			working = false
		}
	}
	if err := msg.Ack(); err != nil {
		t.Fatal(err)
	}
	settled(t, app, pingStream, pingDurable)
	if n := consumerInfo(t, app, pingStream, pingDurable).Delivered.Consumer; n != 1 {
		t.Errorf("the message was delivered %d times, want once", n)
	}
}

// A message with an empty payload and a header that looks like a status of the
// server was taken for one: no handler saw it, it was never settled, and came
// back after each AckWait for ever.
func TestHandler_getsStatusLookalike(t *testing.T) {
	t.Parallel()
	for _, status := range []string{"100", "404", "408", "409", "503", "shipped"} {
		t.Run(status, func(t *testing.T) {
			t.Parallel()
			seen := make(chan delivery, 10)
			app := startApp(t, emitter("net", ping), pinger(mono.StreamConsumerConfig{},
				each(seen, func(msg *mono.Msg) error { return msg.Ack() })))
			msg := &mono.Msg{Subject: ping.Subject, Header: mono.Header{"Status": {status}}}
			if _, err := app.Bus().PublishStream(within(t), msg); err != nil {
				t.Fatal(err)
			}
			receive(t, seen, "the message")
			settled(t, app, pingStream, pingDurable)
		})
	}
}

// What has arrived is a batch: none waits for it to fill, none is larger than
// asked for, and as many run at a time as asked for.
func TestBatches(t *testing.T) {
	t.Parallel()
	const batchSize, concurrency = 7, 3
	open := make(chan struct{})
	sizes := make(chan int, 1000)
	var running, most atomic.Int32
	app := startApp(t, emitter("net", ping), pinger(
		mono.StreamConsumerConfig{Fetch: mono.FetchConfig{BatchSize: batchSize}, Concurrency: concurrency, AutoAck: true},
		func(_ context.Context, msgs []*mono.Msg) error {
			defer running.Add(-1)
			n := running.Add(1)
			for m := most.Load(); n > m; m = most.Load() {
				if most.CompareAndSwap(m, n) {
					break
				}
			}
			sizes <- len(msgs)
			<-open
			return nil
		}))
	publishPings(t, app, "lone")
	if n := receive(t, sizes, "a lone message"); n != 1 {
		t.Errorf("the first batch holds %d messages, want 1", n)
	}
	const messages = 99
	for i := range messages {
		publishPings(t, app, fmt.Sprint(i))
	}
	eventually(t, func() bool { return running.Load() == concurrency }, "all workers are busy")
	close(open)
	settled(t, app, pingStream, pingDurable)
	total, largest := 0, 0
	for total < messages {
		n := receive(t, sizes, "a batch")
		total, largest = total+n, max(largest, n)
	}
	if total != messages || largest != batchSize {
		t.Errorf("%d messages in batches of up to %d, want %d and %d", total, largest, messages, batchSize)
	}
	if n := most.Load(); n != concurrency {
		t.Errorf("%d batches were handled at a time, want %d", n, concurrency)
	}
}
