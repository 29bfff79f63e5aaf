package mono_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

// ping is an event without a type, for tests of what is below types.
var ping = mustEvent("net", "Ping", "v1")

func mustEvent(module, name, version string, subject ...string) mono.BaseEventDefinition {
	e, err := mono.NewEvent(module, name, version, subject...)
	if err != nil {
		panic(err)
	}
	return e
}

func pingMsg(data string) *mono.Msg {
	return &mono.Msg{Subject: ping.Subject, Data: []byte(data)}
}

// keeps is a module that asks for a stream of pings, "pings" unless it has a
// name, and handles nothing: what is stored stays stored.
func keeps(cfg mono.StreamConfig) *testModule {
	if cfg.Name == "" {
		cfg.Name = "pings"
	}
	return consumer("keeper", func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(ping, mono.StreamConsumerConfig{Stream: cfg},
			func(context.Context, []*mono.Msg) error { return nil }, self)
	})
}

// publishers are the three ways to publish, each with its outcome.
var publishers = map[string]func(ctx context.Context, bus mono.EventBus, msg *mono.Msg) error{
	"Publish": func(ctx context.Context, bus mono.EventBus, msg *mono.Msg) error {
		return bus.Publish(ctx, msg)
	},
	"PublishStream": func(ctx context.Context, bus mono.EventBus, msg *mono.Msg) error {
		_, err := bus.PublishStream(ctx, msg)
		return err
	},
	"PublishStreamAsync": func(ctx context.Context, bus mono.EventBus, msg *mono.Msg) error {
		f, err := bus.PublishStreamAsync(ctx, msg)
		if err != nil {
			return err
		}
		_, err = f.Wait(ctx)
		return err
	},
}

// eachPublisher runs a test for every way to publish.
func eachPublisher(t *testing.T, test func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error)) {
	t.Helper()
	for name, publish := range publishers {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, publish)
		})
	}
}

func TestBus_refusesMessages(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{}))
	tests := []struct {
		name string
		give *mono.Msg
		want error
		say  []string
	}{
		{name: "nil", give: nil, want: mono.ErrInvalidConfig, say: []string{"publish", "message is nil"}},
		{name: "no subject", give: &mono.Msg{}, want: mono.ErrInvalidSubject, say: []string{"publish", "empty"}},
		{name: "wildcard", give: &mono.Msg{Subject: "a.*"}, want: mono.ErrInvalidSubject, say: []string{"publish", `"a.*"`, "wildcard"}},
		{name: "tail wildcard", give: &mono.Msg{Subject: "a.>"}, want: mono.ErrInvalidSubject, say: []string{`"a.>"`}},
		{name: "empty token", give: &mono.Msg{Subject: "a..b"}, want: mono.ErrInvalidSubject, say: []string{`"a..b"`, "empty token"}},
		{name: "space", give: &mono.Msg{Subject: "a b"}, want: mono.ErrInvalidSubject, say: []string{`"a b"`}},
		{name: "a second command", give: &mono.Msg{Subject: "a\r\nPUB b 0\r\n"}, want: mono.ErrInvalidSubject, say: []string{`"a\r\nPUB b 0\r\n"`}},
		{
			name: "header with a line break", give: &mono.Msg{Subject: ping.Subject, Header: mono.Header{"X-A": {"s3cret\r\nX-B: b"}}},
			want: mono.ErrInvalidHeader, say: []string{"publish on", ping.Subject, `"X-A"`, "control character"},
		},
		{
			name: "header key with a line break", give: &mono.Msg{Subject: ping.Subject, Header: mono.Header{"X\nA": {"b"}}},
			want: mono.ErrInvalidHeader, say: []string{ping.Subject, `"X\nA"`},
		},
		{
			name: "empty header key", give: &mono.Msg{Subject: ping.Subject, Header: mono.Header{"": {"b"}}},
			want: mono.ErrInvalidHeader, say: []string{ping.Subject, "empty key"},
		},
		{
			// nats.go refuses these keys by itself, with an error that does not
			// tell which key it is about.
			name: "header key that nats.go refuses", give: &mono.Msg{Subject: ping.Subject, Header: mono.Header{"X/A": {"b"}}},
			want: mono.ErrInvalidHeader, say: []string{ping.Subject, `"X/A"`},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
				err := publish(within(t), app.Bus(), tt.give)
				wantError(t, err, tt.want, tt.say...)
				if err != nil && strings.Contains(err.Error(), "s3cret") {
					t.Errorf("error %q tells a header's value", err)
				}
			})
		})
	}
}

// A subject longer than the server's control line, 4 KiB by default, made the
// server end the connection, and nats.go close it for good: one bad publish
// stopped every consumer of the App.
func TestBus_refusesLongSubject(t *testing.T) {
	t.Parallel()
	eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
		lost := make(chan error, 1)
		srv := monotest.Server(t)
		app := monotest.AppWith(t, []mono.Option{quiet(), mono.WithNATS(srv.URL(), nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			select {
			case lost <- err:
			default:
			}
		}))})
		ctx := within(t) // if the subject is not refused, nothing answers
		err := publish(ctx, app.Bus(), &mono.Msg{Subject: strings.Repeat("long.", 1000) + "subject"})
		wantError(t, err, mono.ErrInvalidSubject)
		if err := app.Conn().FlushWithContext(ctx); err != nil {
			t.Errorf("the connection is broken: %v", err)
		}
		select {
		case err := <-lost:
			t.Errorf("the connection was lost: %v", err)
		default:
		}
	})
}

func TestBus_payloadTooLarge(t *testing.T) {
	t.Parallel()
	const limit = 2048
	app := monotest.AppWith(t,
		[]mono.Option{quiet(), mono.WithEmbedded(embedded.Config{StoreDir: t.TempDir(), MaxPayload: limit})},
		emitter("net", ping), keeps(mono.StreamConfig{}))

	eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
		say := []string{fmt.Sprintf("publish %d bytes on %q", limit+1, ping.Subject), fmt.Sprintf("at most %d bytes", limit), "max_payload"}
		wantError(t, publish(within(t), app.Bus(), pingMsg(strings.Repeat("x", limit+1))), mono.ErrPayloadTooLarge, say...)

		withHeader := pingMsg(strings.Repeat("x", limit))
		withHeader.Header = mono.Header{"X-A": {"b"}}
		wantError(t, publish(within(t), app.Bus(), withHeader), mono.ErrPayloadTooLarge, "with headers")

		if err := publish(within(t), app.Bus(), pingMsg(strings.Repeat("x", limit))); err != nil {
			t.Errorf("a payload of exactly max_payload: %v", err)
		}
	})
}

func TestBus_largerThanStreamTakes(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{MaxMsgSize: 100}))
	eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
		wantError(t, publish(within(t), app.Bus(), pingMsg(strings.Repeat("x", 101))), mono.ErrPayloadTooLarge,
			"publish 101 bytes on", ping.Subject, "MaxMsgSize")
	})
}

func TestBus_noStream(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping))
	if err := app.Bus().Publish(within(t), pingMsg("for nobody")); err != nil {
		t.Errorf("Publish needs no stream: %v", err)
	}
	say := []string{`publish 4 bytes on "events.net.v1.ping"`, "register a stream consumer"}
	for _, name := range []string{"PublishStream", "PublishStreamAsync"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := publishers[name](within(t), app.Bus(), pingMsg("lost"))
			wantError(t, err, mono.ErrNoStream, say...)
			wantError(t, err, jetstream.ErrNoStreamResponse)
		})
	}
}

// What a full stream cannot take is refused, and what it took stays.
func TestBus_storeFull(t *testing.T) {
	t.Parallel()
	payload := strings.Repeat("x", 200)
	for name, limits := range map[string]mono.StreamConfig{
		"work queue with MaxMsgs":  {Retention: mono.WorkQueuePolicy, MaxMsgs: 3},
		"work queue with MaxBytes": {Retention: mono.WorkQueuePolicy, MaxBytes: 1000},
		"work queue in memory":     {Retention: mono.WorkQueuePolicy, MaxBytes: 1000, Storage: mono.MemoryStorage},
		"interest with MaxMsgs":    {Retention: mono.InterestPolicy, MaxMsgs: 3},
		"limits that asks for it":  {MaxMsgs: 3, Discard: jetstream.DiscardNew},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
				app := startApp(t, emitter("net", ping), keeps(limits))
				const most = 50
				accepted := 0
				var err error
				for ; accepted < most; accepted++ {
					if err = publish(within(t), app.Bus(), pingMsg(fmt.Sprintf("%02d %s", accepted, payload))); err != nil {
						break
					}
				}
				wantError(t, err, mono.ErrStoreFull, "publish 203 bytes on", ping.Subject, "MaxBytes", "raise the limit")
				if _, ok := errors.AsType[*jetstream.APIError](err); !ok {
					t.Errorf("error %v does not carry the server's answer", err)
				}
				if accepted == 0 {
					t.Fatal("nothing was accepted")
				}
				stored := readAll(t, app, "pings")
				if len(stored) != accepted {
					t.Fatalf("%d publishes were accepted, %d messages are stored", accepted, len(stored))
				}
				for i, data := range stored {
					if want := fmt.Sprintf("%02d %s", i, payload); data != want {
						t.Errorf("message %d is %.10q, want %.10q", i+1, data, want)
					}
				}
			})
		})
	}
}

// A limits stream with limits of the user's own follows the user's Discard.
func TestBus_limitsStreamDropsOldest(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{MaxMsgs: 3}))
	for i := range 5 {
		if _, err := app.Bus().PublishStream(within(t), pingMsg(fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	if got, want := readAll(t, app, "pings"), []string{"2", "3", "4"}; !slices.Equal(got, want) {
		t.Errorf("stored are %q, want %q", got, want)
	}
}

func readAll(t *testing.T, app *mono.App, name string) []string {
	t.Helper()
	s, err := jetStream(t, app).Stream(within(t), name)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	state := s.CachedInfo().State
	for seq := state.FirstSeq; seq <= state.LastSeq && state.Msgs > 0; seq++ {
		m, err := s.GetMsg(within(t), seq)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, string(m.Data))
	}
	return all
}

func TestBus_outsideOfStartAndStop(t *testing.T) {
	t.Parallel()
	eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
		app, err := mono.New(mono.WithStoreDir(t.TempDir()), quiet())
		if err != nil {
			t.Fatal(err)
		}
		if err := app.Register(emitter("net", ping), keeps(mono.StreamConfig{})); err != nil {
			t.Fatal(err)
		}
		bus := app.Bus()
		wantError(t, publish(within(t), bus, pingMsg("early")), mono.ErrNotStarted, "publish on", ping.Subject)
		if err := app.Start(within(t)); err != nil {
			t.Fatal(err)
		}
		if err := publish(within(t), bus, pingMsg("in time")); err != nil {
			t.Errorf("the bus from before Start: %v", err)
		}
		if err := app.Stop(within(t)); err != nil {
			t.Fatal(err)
		}
		wantError(t, publish(within(t), bus, pingMsg("late")), mono.ErrNotStarted, "publish on", ping.Subject)
	})
}

func TestBus_endedContext(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{}))
	eachPublisher(t, func(t *testing.T, publish func(context.Context, mono.EventBus, *mono.Msg) error) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		wantError(t, publish(ctx, app.Bus(), pingMsg("x")), context.Canceled, "publish on", ping.Subject)

		reason := errors.New("the user went home")
		ctx, cancelCause := context.WithCancelCause(t.Context())
		cancelCause(reason)
		wantError(t, publish(ctx, app.Bus(), pingMsg("x")), reason, ping.Subject)
		if n := streamMsgs(t, app, "pings"); n != 0 {
			t.Errorf("%d messages were stored all the same", n)
		}
	})
}

// Publish hands an event that a stream stores to JetStream, so that nothing is
// lost under load, and core consumers still get it.
func TestBus_publishOfStoredEvent(t *testing.T) {
	t.Parallel()
	const n = 5000
	live := make(chan string, n)
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{}),
		consumer("live", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(ping, func(_ context.Context, msg *mono.Msg) error {
				live <- string(msg.Data)
				return nil
			}, self)
		}))
	var publish sync.WaitGroup
	for worker := range 10 {
		publish.Go(func() {
			for i := range n / 10 {
				if err := app.Bus().Publish(within(t), pingMsg(fmt.Sprintf("%d-%d", worker, i))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	publish.Wait()
	if got := streamMsgs(t, app, "pings"); got != n {
		t.Errorf("%d messages are stored, want %d", got, n)
	}
	for range n {
		receive(t, live, "a live event")
	}
}

func TestBus_duplicates(t *testing.T) {
	t.Parallel()
	app := startApp(t, emitter("net", ping), keeps(mono.StreamConfig{}))
	msg := pingMsg("once")
	msg.Header = mono.Header{"Nats-Msg-Id": {"invoice-7"}}

	first, err := app.Bus().PublishStream(within(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if first.Duplicate() || first.Sequence() != 1 || first.Stream() != "pings" {
		t.Errorf("first: %d of %q, duplicate %v", first.Sequence(), first.Stream(), first.Duplicate())
	}
	second, err := app.Bus().PublishStream(within(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if !second.Duplicate() || second.Sequence() != first.Sequence() {
		t.Errorf("second: %d, duplicate %v, want a duplicate of %d", second.Sequence(), second.Duplicate(), first.Sequence())
	}
	f, err := app.Bus().PublishStreamAsync(within(t), msg)
	if err != nil {
		t.Fatal(err)
	}
	if third, err := f.Wait(within(t)); err != nil || !third.Duplicate() {
		t.Errorf("third: %+v, %v, want a duplicate", third, err)
	}
	if err := app.Bus().Publish(within(t), msg); err != nil {
		t.Errorf("a duplicate is no error: %v", err)
	}
	if n := streamMsgs(t, app, "pings"); n != 1 {
		t.Errorf("%d messages are stored, want 1", n)
	}
}

// The caller's message is read and never written, with middleware or without:
// many goroutines may publish the same one. The race detector watches.
func TestBus_leavesMessageAlone(t *testing.T) {
	t.Parallel()
	meddling := mono.Middleware{Publish: func(next mono.PublishFunc) mono.PublishFunc {
		return func(ctx context.Context, msg *mono.Msg) error {
			msg.Header.Set("X-Trace", "1")
			msg.Header["X-Shared"][0] = "changed"
			msg.Data = append(msg.Data[:0:0], "changed"...)
			return next(ctx, msg)
		}
	}}
	for name, opts := range map[string][]mono.Option{
		"without middleware": nil,
		"with middleware":    {mono.WithMiddleware(meddling)},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			app := monotest.AppWith(t, append(opts, mono.WithStoreDir(t.TempDir()), quiet()), emitter("net", ping), keeps(mono.StreamConfig{}))
			msg := pingMsg("original")
			msg.Header = mono.Header{"X-Shared": {"original"}}
			want := maps.Clone(msg.Header)

			var all sync.WaitGroup
			for _, publish := range publishers {
				for range 4 {
					all.Go(func() {
						for range 25 {
							if err := publish(within(t), app.Bus(), msg); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
			}
			all.Wait()
			if string(msg.Data) != "original" || msg.Subject != ping.Subject {
				t.Errorf("the message is now %q on %q", msg.Data, msg.Subject)
			}
			if !maps.EqualFunc(msg.Header, want, slices.Equal) || want.Get("X-Shared") != "original" {
				t.Errorf("the header is now %q", msg.Header)
			}
			if n := streamMsgs(t, app, "pings"); n != 300 {
				t.Errorf("%d messages are stored, want 300", n)
			}
		})
	}
}

// scripted answers durable publishes on "void.>" when it is told to, in place
// of a stream.
type scripted struct {
	t    *testing.T
	msgs chan *nats.Msg
}

func scriptAcks(t *testing.T, app *mono.App) *scripted {
	t.Helper()
	s := &scripted{t, make(chan *nats.Msg, 1000)}
	if _, err := app.Conn().ChanSubscribe("void.>", s.msgs); err != nil {
		t.Fatal(err)
	}
	if err := app.Conn().Flush(); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *scripted) answer(text string) {
	s.t.Helper()
	if err := receive(s.t, s.msgs, "a publish").Respond([]byte(text)); err != nil {
		s.t.Error(err)
	}
}

func TestPublishStreamAsync_window(t *testing.T) {
	t.Parallel()
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), quiet(), mono.WithPublishWindow(2)})
	acks := scriptAcks(t, app)
	void := &mono.Msg{Subject: "void.a"}

	var futures []*mono.PubAckFuture
	for range 2 {
		f, err := app.Bus().PublishStreamAsync(within(t), void)
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}

	// The window is full: the call waits for as long as its context lets it.
	reason := errors.New("tired of waiting")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 100*time.Millisecond, reason)
	defer cancel()
	_, err := app.Bus().PublishStreamAsync(ctx, void)
	wantError(t, err, reason, `publish on "void.a"`, "2 publishes wait for their acknowledgement")

	// Or until there is room.
	type result struct {
		f   *mono.PubAckFuture
		err error
	}
	third := make(chan result, 1)
	go func() {
		f, err := app.Bus().PublishStreamAsync(within(t), void)
		third <- result{f, err}
	}()
	if len(third) != 0 {
		t.Error("the third publish does not wait")
	}
	acks.answer(`{"stream":"void","seq":7}`)
	r := receive(t, third, "the third publish")
	if r.err != nil {
		t.Fatal(r.err)
	}
	for i := range uint64(2) {
		acks.answer(fmt.Sprintf(`{"stream":"void","seq":%d}`, i+8))
	}
	for i, f := range append(futures, r.f) {
		ack, err := f.Wait(within(t))
		if err != nil {
			t.Fatal(err)
		}
		if want := uint64(7 + i); ack.Stream() != "void" || ack.Sequence() != want {
			t.Errorf("publish %d is stored as %d of %q, want %d of void", i+1, ack.Sequence(), ack.Stream(), want)
		}
	}
}

func TestPublishStreamAsync_future(t *testing.T) {
	t.Parallel()
	app := startApp(t)
	acks := scriptAcks(t, app)
	f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: "void.a"})
	if err != nil {
		t.Fatal(err)
	}

	select {
	case <-f.Done():
		t.Fatal("done before the server has answered")
	default:
	}
	// A Wait that ends early leaves the publish alone.
	reason := errors.New("another time")
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(reason)
	if ack, err := f.Wait(ctx); ack != nil || !errors.Is(err, reason) {
		t.Errorf("Wait = %v, %v, want the context's cause", ack, err)
	}

	acks.answer(`{"stream":"void","seq":1,"duplicate":true}`)
	receive(t, f.Done(), "the future")
	// Once known, the outcome is told to everybody, and whatever the context.
	var readers sync.WaitGroup
	for range 4 {
		readers.Go(func() {
			if ack, err := f.Wait(ctx); err != nil || ack.Sequence() != 1 || !ack.Duplicate() {
				t.Errorf("Wait = %+v, %v", ack, err)
			}
		})
	}
	readers.Wait()
}

func TestPublishStreamAsync_refusals(t *testing.T) {
	t.Parallel()
	app := startApp(t)
	acks := scriptAcks(t, app)
	tests := []struct {
		name, answer string
		want         error
	}{
		{"full", `{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"}}`, mono.ErrStoreFull},
		{"no room on the server", `{"error":{"code":503,"err_code":10023,"description":"insufficient resources"}}`, mono.ErrStoreFull},
		{"too large", `{"error":{"code":400,"err_code":10054,"description":"message size exceeds maximum allowed"}}`, mono.ErrPayloadTooLarge},
		{"not an acknowledgement", `hello`, jetstream.ErrInvalidJSAck},
		{"without a stream", `{}`, jetstream.ErrInvalidJSAck},
	}
	for _, tt := range tests { // one after the other: they share the script
		f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: "void.a", Data: []byte("abc")})
		if err != nil {
			t.Fatal(err)
		}
		acks.answer(tt.answer)
		ack, err := f.Wait(within(t))
		if ack != nil {
			t.Errorf("%s: got the acknowledgement %+v", tt.name, ack)
		}
		wantError(t, err, tt.want, `publish 3 bytes on "void.a"`)
	}
}

// Many publishers, a small window: every publish gets its own answer.
func TestPublishStreamAsync_many(t *testing.T) {
	t.Parallel()
	const workers, each = 8, 250
	app := monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), quiet(), mono.WithPublishWindow(16)},
		emitter("net", ping), keeps(mono.StreamConfig{}))
	sent := make([]map[uint64]string, workers)
	var all sync.WaitGroup
	for w := range workers {
		all.Go(func() {
			sent[w] = make(map[uint64]string)
			futures := make(map[string]*mono.PubAckFuture)
			for i := range each {
				data := fmt.Sprintf("%d-%d", w, i)
				f, err := app.Bus().PublishStreamAsync(within(t), pingMsg(data))
				if err != nil {
					t.Error(err)
					return
				}
				futures[data] = f
			}
			for data, f := range futures {
				ack, err := f.Wait(within(t))
				if err != nil {
					t.Error(err)
					return
				}
				sent[w][ack.Sequence()] = data
			}
		})
	}
	all.Wait()
	stored := readAll(t, app, "pings")
	if len(stored) != workers*each {
		t.Fatalf("%d messages are stored, want %d", len(stored), workers*each)
	}
	for _, m := range sent {
		for seq, data := range m {
			if got := stored[seq-1]; got != data {
				t.Errorf("the acknowledgement of %q names message %d, which is %q", data, seq, got)
			}
		}
	}
}
