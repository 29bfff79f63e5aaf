package mono_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// A trail records what happened, in order.
type trail struct {
	mu    sync.Mutex
	steps []string
}

func (t *trail) add(step string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.steps = append(t.steps, step)
}

func (t *trail) take() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := strings.Join(t.steps, " ")
	t.steps = nil
	return s
}

// traced is middleware that leaves a trail around both sides.
func (t *trail) traced(name string) mono.Middleware {
	return mono.Middleware{
		Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				t.add(name + ">")
				defer t.add("<" + name)
				return next(ctx, msgs)
			}
		},
		Publish: func(next mono.PublishFunc) mono.PublishFunc {
			return func(ctx context.Context, msg *mono.Msg) error {
				t.add(name + ">")
				defer t.add("<" + name)
				return next(ctx, msg)
			}
		},
	}
}

// withMiddleware starts an App with the modules.
func withMiddleware(t *testing.T, mw []mono.Middleware, modules ...mono.Module) *mono.App {
	t.Helper()
	return monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), quiet(), mono.WithMiddleware(mw...)}, modules...)
}

func TestMiddleware_order(t *testing.T) {
	t.Parallel()
	const want = "a> b> c> <c <b <a"
	t.Run("publish", func(t *testing.T) {
		t.Parallel()
		for name, publish := range publishers {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				var trail trail
				app := monotest.AppWith(t, []mono.Option{
					mono.WithStoreDir(t.TempDir()), quiet(),
					mono.WithMiddleware(trail.traced("a"), trail.traced("b")), mono.WithMiddleware(mono.Middleware{Publish: trail.traced("c").Publish}),
				}, emitter("net", ping), consumer("other", nil))
				// The subject has no stream, and the middleware runs all the same.
				if err := publish(within(t), app.Bus(), pingMsg("x")); name == "Publish" && err != nil {
					t.Error(err)
				}
				if got := trail.take(); got != want {
					t.Errorf("went %s, want %s", got, want)
				}
			})
		}
	})
	t.Run("core handler", func(t *testing.T) {
		t.Parallel()
		var trail trail
		done := make(chan string, 1)
		outermost := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				err := next(ctx, msgs)
				done <- trail.take()
				return err
			}
		}}
		app := withMiddleware(t, []mono.Middleware{outermost, {Handle: trail.traced("a").Handle}, {Handle: trail.traced("b").Handle}},
			emitter("net", ping), consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
				return r.RegisterEventConsumer(ping, func(context.Context, *mono.Msg) error {
					trail.add("handler")
					return nil
				}, self)
			}))
		if err := app.Bus().Publish(within(t), pingMsg("x")); err != nil {
			t.Fatal(err)
		}
		if got, want := receive(t, done, "the handler"), "a> b> handler <b <a"; got != want {
			t.Errorf("went %s, want %s", got, want)
		}
	})
	t.Run("durable handler", func(t *testing.T) {
		t.Parallel()
		var trail trail
		done := make(chan string, 1)
		outermost := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				err := next(ctx, msgs)
				done <- trail.take()
				return err
			}
		}}
		app := withMiddleware(t, []mono.Middleware{outermost, {Handle: trail.traced("a").Handle}, {Handle: trail.traced("b").Handle}},
			emitter("net", ping), pinger(mono.StreamConsumerConfig{AutoAck: true}, func(context.Context, []*mono.Msg) error {
				trail.add("handler")
				return nil
			}))
		publishPings(t, app, "x")
		if got, want := receive(t, done, "the handler"), "a> b> handler <b <a"; got != want {
			t.Errorf("went %s, want %s", got, want)
		}
		settled(t, app, pingStream, pingDurable)
	})
}

// Handle runs once for each consumer, and is told which one.
func TestMiddleware_consumer(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var told []mono.Consumer
	publishes := 0
	mw := mono.Middleware{
		Handle: func(c mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, c)
			return next
		},
		Publish: func(next mono.PublishFunc) mono.PublishFunc {
			mu.Lock()
			defer mu.Unlock()
			publishes++
			return next
		},
	}
	seen := make(chan delivery, 10)
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping),
		consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			nothing := func(context.Context, *mono.Msg) error { return nil }
			return errors.Join(
				r.RegisterEventConsumer(ping, nothing, self),
				r.RegisterEventConsumer(ping, nothing, self, "workers"),
			)
		}),
		pinger(mono.StreamConsumerConfig{AutoAck: true, Concurrency: 4}, each(seen, func(*mono.Msg) error { return nil })))
	publishPings(t, app, "1", "2", "3")
	for range 3 {
		receive(t, seen, "a delivery")
	}

	mu.Lock()
	defer mu.Unlock()
	want := []mono.Consumer{
		{Module: "listener", Event: ping, Queue: "listener"},
		{Module: "listener", Event: ping, Queue: "workers"},
		{Module: "pinger", Event: ping, Stream: pingStream, Durable: pingDurable},
	}
	if !slices.Equal(told, want) {
		t.Errorf("Handle ran for %+v, want %+v", told, want)
	}
	if publishes != 1 {
		t.Errorf("Publish ran %d times, want once", publishes)
	}
}

type ctxKey struct{}

// The context and the messages that middleware hands on are those that the
// handler gets.
func TestMiddleware_handleHandsOn(t *testing.T) {
	t.Parallel()
	mw := mono.Middleware{Handle: func(c mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
		return func(ctx context.Context, msgs []*mono.Msg) error {
			for _, msg := range msgs {
				msg.Data = append([]byte("seen "), msg.Data...)
			}
			return next(context.WithValue(ctx, ctxKey{}, c.Module), msgs)
		}
	}}
	type sight struct {
		data  string
		value any
	}
	got := make(chan sight, 2)
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping),
		consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, func(ctx context.Context, msg *mono.Msg) error {
				got <- sight{string(msg.Data), ctx.Value(ctxKey{})}
				return nil
			}, self)
		}),
		pinger(mono.StreamConsumerConfig{AutoAck: true}, func(ctx context.Context, msgs []*mono.Msg) error {
			got <- sight{string(msgs[0].Data), ctx.Value(ctxKey{})}
			return nil
		}))
	publishPings(t, app, "x")
	all := []sight{receive(t, got, "an event"), receive(t, got, "an event")}
	for _, want := range []sight{{"seen x", "listener"}, {"seen x", "pinger"}} {
		if !slices.Contains(all, want) {
			t.Errorf("the handlers saw %v, want %v among them", all, want)
		}
	}
}

// Middleware that does not call next decides as a handler would: by settling,
// or by its error.
func TestMiddleware_handleDecides(t *testing.T) {
	t.Parallel()
	unreachable := func(t *testing.T) mono.EventStreamConsumerHandler {
		t.Helper()
		return func(context.Context, []*mono.Msg) error {
			t.Error("the handler was called")
			return nil
		}
	}
	stop := func(decide func(msgs []*mono.Msg) error) []mono.Middleware {
		return []mono.Middleware{{Handle: func(mono.Consumer, mono.HandleFunc) mono.HandleFunc {
			return func(_ context.Context, msgs []*mono.Msg) error { return decide(msgs) }
		}}}
	}
	t.Run("by settling", func(t *testing.T) {
		t.Parallel()
		app := withMiddleware(t, stop(func(msgs []*mono.Msg) error { return msgs[0].TermWithReason("not today") }),
			emitter("net", ping), pinger(retries(5), unreachable(t)))
		terminated := watchTerminated(t, app)
		publishPings(t, app, "x")
		wantTerminated(t, terminated, 1, 1, "terminated: not today")
	})
	t.Run("by its error", func(t *testing.T) {
		t.Parallel()
		app := withMiddleware(t, stop(func([]*mono.Msg) error { return mono.Permanent(errors.New("not today")) }),
			emitter("net", ping), pinger(retries(5), unreachable(t)))
		terminated := watchTerminated(t, app)
		publishPings(t, app, "x")
		wantTerminated(t, terminated, 1, 1, "permanent_error: not today")
	})
	t.Run("by nil with AutoAck", func(t *testing.T) {
		t.Parallel()
		cfg := retries(5)
		cfg.AutoAck = true
		app := withMiddleware(t, stop(func([]*mono.Msg) error { return nil }), emitter("net", ping), pinger(cfg, unreachable(t)))
		publishPings(t, app, "x")
		settled(t, app, pingStream, pingDurable)
	})
	t.Run("by a panic", func(t *testing.T) {
		t.Parallel()
		app := withMiddleware(t, stop(func([]*mono.Msg) error { panic("oh no") }), emitter("net", ping), pinger(retries(2, 0), unreachable(t)))
		terminated := watchTerminated(t, app)
		publishPings(t, app, "x")
		wantTerminated(t, terminated, 1, 2, "panic: "+(&mono.PanicError{Value: "oh no"}).Error())
	})
	t.Run("by swallowing the handler's error", func(t *testing.T) {
		t.Parallel()
		cfg := retries(5, never)
		cfg.AutoAck = true
		mw := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				if next(ctx, msgs) == nil {
					t.Error("the handler's error did not reach the middleware")
				}
				return nil
			}
		}}
		app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping),
			pinger(cfg, func(context.Context, []*mono.Msg) error { return errors.New("no luck") }))
		publishPings(t, app, "x")
		settled(t, app, pingStream, pingDurable)
	})
	t.Run("of a core consumer", func(t *testing.T) {
		t.Parallel()
		handled, stopped := make(chan string, 2), make(chan string, 2)
		mw := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				if string(msgs[0].Data) == "bad" {
					stopped <- "bad"
					return errors.New("not today")
				}
				return next(ctx, msgs)
			}
		}}
		app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping), consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, func(_ context.Context, msg *mono.Msg) error {
				handled <- string(msg.Data)
				return nil
			}, self)
		}))
		for _, data := range []string{"bad", "good"} {
			if err := app.Bus().Publish(within(t), pingMsg(data)); err != nil {
				t.Fatal(err)
			}
		}
		receive(t, stopped, "the bad event")
		if got := receive(t, handled, "the good event"); got != "good" {
			t.Errorf("the handler got %q, want good", got)
		}
	})
}

// What publish middleware changes is sent, by every way to publish.
func TestMiddleware_publishChanges(t *testing.T) {
	t.Parallel()
	pong := mustEvent("net", "Pong", "v1")
	mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, msg *mono.Msg) error {
			msg.Subject = pong.Subject
			msg.Data = append([]byte("changed "), msg.Data...)
			msg.Header.Set("X-Trace", "1") // it has a header always
			return next(ctx, msg)
		}
	}}
	for name, publish := range publishers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			got := make(chan *mono.Msg, 10)
			app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping, pong),
				consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
					return errors.Join(
						r.RegisterEventStreamConsumer(pong, mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "pongs"}, AutoAck: true},
							func(_ context.Context, msgs []*mono.Msg) error {
								got <- msgs[0]
								return nil
							}, self),
						r.RegisterEventConsumer(ping, func(context.Context, *mono.Msg) error {
							t.Error("the original was sent")
							return nil
						}, self),
					)
				}))
			msg := pingMsg("x")
			if err := publish(within(t), app.Bus(), msg); err != nil {
				t.Fatal(err)
			}
			m := receive(t, got, "the changed message")
			if m.Subject != pong.Subject || string(m.Data) != "changed x" || m.Header.Get("X-Trace") != "1" {
				t.Errorf("%q with %q arrived on %q", m.Data, m.Header, m.Subject)
			}
			if msg.Subject != ping.Subject || string(msg.Data) != "x" || msg.Header != nil {
				t.Errorf("the caller's message is now %+v", msg)
			}
		})
	}
}

// Middleware can refuse a publish by its error; nothing is sent then.
func TestMiddleware_publishVeto(t *testing.T) {
	t.Parallel()
	errVeto := errors.New("not today")
	mw := mono.Middleware{Publish: func(mono.PublishFunc) mono.PublishFunc {
		return func(context.Context, *mono.Msg) error { return errVeto }
	}}
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping), keeps(mono.StreamConfig{}))
	for name, publish := range publishers {
		if err := publish(within(t), app.Bus(), pingMsg("x")); !errors.Is(err, errVeto) {
			t.Errorf("%s = %v, want the veto", name, err)
		}
	}
	if ack, err := app.Bus().PublishStream(within(t), pingMsg("x")); ack != nil || err == nil {
		t.Errorf("PublishStream = %v, %v, want no acknowledgement", ack, err)
	}
	if f, err := app.Bus().PublishStreamAsync(within(t), pingMsg("x")); f != nil || err == nil {
		t.Errorf("PublishStreamAsync = %v, %v, want no future", f, err)
	}
	if n := streamMsgs(t, app, "pings"); n != 0 {
		t.Errorf("%d messages were stored all the same", n)
	}
}

// Middleware that swallows a publish, with nil and without next, left the
// caller of a durable publish with neither an acknowledgement nor an error: nil
// there means stored, and ack.Sequence() panicked.
func TestMiddleware_publishSwallowed(t *testing.T) {
	t.Parallel()
	mw := mono.Middleware{Publish: func(mono.PublishFunc) mono.PublishFunc {
		return func(context.Context, *mono.Msg) error { return nil }
	}}
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping), keeps(mono.StreamConfig{}))
	say := []string{"publish on", ping.Subject, "must call next or return an error"}
	ack, err := app.Bus().PublishStream(within(t), pingMsg("x"))
	if ack != nil {
		t.Errorf("PublishStream acknowledges what is not stored: %+v", ack)
	}
	wantError(t, err, mono.ErrInvalidConfig, say...)
	f, err := app.Bus().PublishStreamAsync(within(t), pingMsg("x"))
	if f != nil {
		t.Error("PublishStreamAsync has a future for what is not sent")
	}
	wantError(t, err, mono.ErrInvalidConfig, say...)
	wantError(t, app.Bus().Publish(within(t), pingMsg("x")), mono.ErrInvalidConfig, say...)
}

func TestMiddleware_publishFailures(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		do   func(next mono.PublishFunc, ctx context.Context, msg *mono.Msg) error
		want error
		say  string
	}{
		{
			name: "a context of its own",
			do: func(next mono.PublishFunc, _ context.Context, msg *mono.Msg) error {
				return next(context.Background(), msg)
			},
			want: mono.ErrInvalidConfig, say: "must pass on a context made from the one it got",
		},
		{
			name: "a wildcard for a subject",
			do: func(next mono.PublishFunc, ctx context.Context, msg *mono.Msg) error {
				msg.Subject = "events.>"
				return next(ctx, msg)
			},
			want: mono.ErrInvalidSubject, say: `"events.>"`,
		},
		{
			name: "a header with a line break",
			do: func(next mono.PublishFunc, ctx context.Context, msg *mono.Msg) error {
				msg.Header.Set("X-A", "a\nb")
				return next(ctx, msg)
			},
			want: mono.ErrInvalidHeader, say: `"X-A"`,
		},
		{
			name: "no message",
			do:   func(next mono.PublishFunc, ctx context.Context, _ *mono.Msg) error { return next(ctx, nil) },
			want: mono.ErrInvalidConfig, say: "message is nil",
		},
		{
			name: "a panic",
			do:   func(mono.PublishFunc, context.Context, *mono.Msg) error { panic(errOhNo) },
			want: errOhNo, say: "panic: oh no",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
				return func(ctx context.Context, msg *mono.Msg) error { return tt.do(next, ctx, msg) }
			}}
			app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping), keeps(mono.StreamConfig{}))
			for _, publish := range publishers {
				wantError(t, publish(within(t), app.Bus(), pingMsg("x")), tt.want, tt.say)
			}
			wantError(t, app.Bus().Publish(within(t), nil), mono.ErrInvalidConfig, "message is nil") // before any middleware
		})
	}
}

var errOhNo = errors.New("oh no")

// Middleware may publish more than it was asked to, and more than once.
func TestMiddleware_publishMore(t *testing.T) {
	t.Parallel()
	var bus atomic.Pointer[mono.App]
	mw := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, msg *mono.Msg) error {
			if strings.HasPrefix(string(msg.Data), "copy") {
				return next(ctx, msg)
			}
			if _, err := bus.Load().Bus().PublishStream(ctx, pingMsg("copy of "+string(msg.Data))); err != nil {
				return err
			}
			if err := next(ctx, msg); err != nil { // as a retry would
				return err
			}
			return next(ctx, msg)
		}
	}}
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping), keeps(mono.StreamConfig{}))
	bus.Store(app)
	ack, err := app.Bus().PublishStream(within(t), pingMsg("x"))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := readAll(t, app, "pings"), []string{"copy of x", "x", "x"}; !slices.Equal(got, want) {
		t.Errorf("stored %q, want %q", got, want)
	}
	if ack.Sequence() != 3 {
		t.Errorf("the acknowledgement is that of message %d, want 3, its own", ack.Sequence())
	}
}

// A handler publishes with its own context, through the same middleware.
func TestMiddleware_publishFromHandler(t *testing.T) {
	t.Parallel()
	pong := mustEvent("net", "Pong", "v1")
	var trail trail
	got := make(chan string, 1)
	net := emitter("net", ping, pong)
	app := withMiddleware(t, []mono.Middleware{{Publish: trail.traced("a").Publish}}, net,
		pinger(mono.StreamConsumerConfig{AutoAck: true}, func(ctx context.Context, msgs []*mono.Msg) error {
			return net.bus.Publish(ctx, &mono.Msg{Subject: pong.Subject, Data: msgs[0].Data})
		}),
		consumer("listener", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(pong, func(_ context.Context, msg *mono.Msg) error {
				got <- string(msg.Data)
				return nil
			}, self)
		}))
	publishPings(t, app, "x")
	if data := receive(t, got, "the pong"); data != "x" {
		t.Errorf("got %q, want x", data)
	}
	settled(t, app, pingStream, pingDurable)
	steps := strings.Fields(trail.take()) // the two may overlap
	slices.Sort(steps)
	if want := []string{"<a", "<a", "a>", "a>"}; !slices.Equal(steps, want) {
		t.Errorf("went %s, want %s", steps, want)
	}
}

// Middleware is used by many goroutines at a time. The race detector watches
// the messages that it gets.
func TestMiddleware_concurrent(t *testing.T) {
	t.Parallel()
	mw := mono.Middleware{
		Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
			return func(ctx context.Context, msgs []*mono.Msg) error {
				slices.Reverse(msgs)
				return next(ctx, msgs)
			}
		},
		Publish: func(next mono.PublishFunc) mono.PublishFunc {
			return func(ctx context.Context, msg *mono.Msg) error {
				msg.Header.Set("X-At", time.Now().String())
				return next(ctx, msg)
			}
		},
	}
	const workers, each = 8, 50
	var handled atomic.Int32
	app := withMiddleware(t, []mono.Middleware{mw}, emitter("net", ping),
		pinger(mono.StreamConsumerConfig{AutoAck: true, Concurrency: 4}, func(_ context.Context, msgs []*mono.Msg) error {
			for _, msg := range msgs {
				if msg.Header.Get("X-At") == "" {
					return errors.New("the header is missing")
				}
			}
			handled.Add(int32(len(msgs)))
			return nil
		}))
	shared := mono.Header{"X-Tenant": {"t-1"}}
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			for i := range each {
				msg := pingMsg(fmt.Sprintf("%d-%d", w, i))
				msg.Header = shared
				if _, err := app.Bus().PublishStream(within(t), msg); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	all.Wait()
	settled(t, app, pingStream, pingDurable)
	if n := handled.Load(); n != workers*each {
		t.Errorf("%d messages were handled, want %d", n, workers*each)
	}
}
