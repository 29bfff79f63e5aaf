package mono_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// defineEvent is an event of module "shop".
func defineEvent(t testing.TB, name string) mono.BaseEventDefinition {
	t.Helper()
	e, err := mono.NewEvent("shop", name, "v1")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// A tally counts what a consumer's handler got, by payload. Deliveries of one
// message have one stream sequence; the same payload with two sequences is an
// event that was stored twice.
type tally struct {
	mu         sync.Mutex
	seqs       map[string]map[uint64]bool
	deliveries map[string]int
}

func newTally() *tally {
	return &tally{seqs: make(map[string]map[uint64]bool), deliveries: make(map[string]int)}
}

func (c *tally) add(msgs ...*mono.Msg) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range msgs {
		p := string(m.Data)
		if c.seqs[p] == nil {
			c.seqs[p] = make(map[uint64]bool)
		}
		c.seqs[p][m.Metadata().Sequence.Stream] = true
		c.deliveries[p]++
	}
}

// handle counts messages and leaves them to AutoAck.
func (c *tally) handle(_ context.Context, msgs []*mono.Msg) error {
	c.add(msgs...)
	return nil
}

func (c *tally) distinct() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.seqs)
}

func (c *tally) total() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, d := range c.deliveries {
		n += d
	}
	return n
}

func (c *tally) has(payload string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.deliveries[payload] > 0
}

// storedTwice lists payloads that came as two messages.
func (c *tally) storedTwice() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var twice []string
	for p, s := range c.seqs {
		if len(s) > 1 {
			twice = append(twice, p)
		}
	}
	slices.Sort(twice)
	return twice
}

// deliveredTwice lists payloads that were handled more than once.
func (c *tally) deliveredTwice() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var twice []string
	for p, n := range c.deliveries {
		if n > 1 {
			twice = append(twice, p)
		}
	}
	slices.Sort(twice)
	return twice
}

func (c *tally) missing(want []string) []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var missing []string
	for _, p := range want {
		if c.deliveries[p] == 0 {
			missing = append(missing, p)
		}
	}
	return missing
}

// waitFor waits until each of want was handled.
func (c *tally) waitFor(t testing.TB, want []string) {
	t.Helper()
	if !pollFor(2*patience, func() bool { return len(c.missing(want)) == 0 }) {
		m := c.missing(want)
		t.Fatalf("%d of %d events were not handled, such as %q", len(m), len(want), m[:min(len(m), 20)])
	}
}

// pollFor waits until cond holds and reports whether it did in time.
func pollFor(limit time.Duration, cond func() bool) bool {
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline.C:
			return cond()
		}
	}
	return true
}

// durableModule is a module with one durable consumer.
func durableModule(name string, e mono.BaseEventDefinition, cfg mono.StreamConsumerConfig, h mono.EventStreamConsumerHandler) *testModule {
	return consumer(name, func(r mono.EventRegistry, self mono.Module) error {
		return r.RegisterEventStreamConsumer(e, cfg, h, self)
	})
}

// autoAck is the configuration of a consumer that acks by itself.
func autoAck(name string, retention jetstream.RetentionPolicy) mono.StreamConsumerConfig {
	return mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: name, Retention: retention, MaxBytes: 64 << 20},
		// What a lost connection or a killed process held comes back soon.
		Consumer: mono.ConsumerConfig{AckWait: 5 * time.Second},
		AutoAck:  true,
	}
}

// makeApp makes an App and registers modules. If the test leaves it running it
// is stopped in the end.
func makeApp(t testing.TB, opts []mono.Option, modules ...mono.Module) *mono.App {
	t.Helper()
	app, err := mono.New(append([]mono.Option{quiet()}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	if err := app.Register(modules...); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := app.Stop(ctx); err != nil {
			t.Errorf("stop at the end: %v", err)
		}
	})
	return app
}

func mustStart(t testing.TB, app *mono.App) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := app.Start(ctx); err != nil {
		t.Fatal(err)
	}
}

func mustStop(t testing.TB, app *mono.App) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := app.Stop(ctx); err != nil {
		t.Fatal(err)
	}
}

// runApp is makeApp and mustStart.
func runApp(t testing.TB, opts []mono.Option, modules ...mono.Module) *mono.App {
	t.Helper()
	app := makeApp(t, opts, modules...)
	mustStart(t, app)
	return app
}

// onServer connects an App to a server, with reconnects that do not make tests
// wait.
func onServer(srv *monotest.TestServer) []mono.Option { return onURL(srv.URL()) }

func onURL(url string) []mono.Option {
	return []mono.Option{mono.WithNATS(url, nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))}
}

// inFolder keeps an App's embedded server in a folder.
func inFolder(dir string) []mono.Option { return []mono.Option{mono.WithStoreDir(dir)} }

func payloads(prefix string, from, to int) []string {
	var ns []string
	for i := from; i < to; i++ {
		ns = append(ns, prefix+strconv.Itoa(i))
	}
	return ns
}

// publishAll stores each payload, and fails the test when one is refused.
func publishAll(t testing.TB, bus mono.EventBus, e mono.BaseEventDefinition, payloads []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var futures []*mono.PubAckFuture
	for _, p := range payloads {
		f, err := bus.PublishStreamAsync(ctx, &mono.Msg{Subject: e.Subject, Data: []byte(p)})
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}
	for _, f := range futures {
		if _, err := f.Wait(ctx); err != nil {
			t.Fatal(err)
		}
	}
}

// A stubbornPublisher publishes numbered events one by one, each with its
// Nats-Msg-Id and again and again until it is acknowledged, whatever happens to
// the server meanwhile.
type stubbornPublisher struct {
	stop  context.CancelFunc
	done  chan struct{}
	acked []string // complete when done is closed
	n     int      // guarded by mu
	fails int      // guarded by mu
	last  error    // guarded by mu
	mu    sync.Mutex
}

func publishStubbornly(t testing.TB, bus mono.EventBus, e mono.BaseEventDefinition, prefix string) *stubbornPublisher {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	p := &stubbornPublisher{stop: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		for i := 0; ctx.Err() == nil; i++ {
			payload := prefix + strconv.Itoa(i)
			for {
				one, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
				_, err := bus.PublishStream(one, &mono.Msg{
					Subject: e.Subject,
					Data:    []byte(payload),
					Header:  mono.Header{jetstream.MsgIDHeader: []string{payload}},
				})
				cancel()
				p.mu.Lock()
				if err == nil {
					p.acked = append(p.acked, payload)
					p.n++
					p.mu.Unlock()
					break
				}
				p.fails++
				p.last = err
				p.mu.Unlock()
				if ctx.Err() != nil {
					return
				}
				pauseFor(ctx, 5*time.Millisecond)
			}
			pauseFor(ctx, 200*time.Microsecond)
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-p.done
	})
	return p
}

func pauseFor(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (p *stubbornPublisher) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.n
}

// more waits until n more events are acknowledged.
func (p *stubbornPublisher) more(t testing.TB, n int) {
	t.Helper()
	want := p.count() + n
	if !pollFor(patience, func() bool { return p.count() >= want }) {
		p.mu.Lock()
		defer p.mu.Unlock()
		t.Fatalf("only %d of %d events were acknowledged; %d failures, the last one: %v", p.n, want, p.fails, p.last)
	}
}

// end stops publishing and returns what was acknowledged.
func (p *stubbornPublisher) end() []string {
	p.stop()
	<-p.done
	return p.acked
}

// serverState describes every stream and consumer of a server, for comparisons.
func serverState(t testing.TB, nc *nats.Conn) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	streams := js.ListStreams(ctx)
	for s := range streams.Info() {
		// Nobody asks for these: they come with the first sourced message, and when
		// something is handed back.
		if s.Config.Name == mono.RepeatsStream || strings.HasSuffix(s.Config.Name, "_MARKS") {
			continue
		}
		b, err := json.Marshal(s.Config)
		if err != nil {
			t.Fatal(err)
		}
		all["stream "+s.Config.Name] = fmt.Sprintf("%s created %v", b, s.Created)
		st, err := js.Stream(ctx, s.Config.Name)
		if err != nil {
			t.Fatal(err)
		}
		consumers := st.ListConsumers(ctx)
		for c := range consumers.Info() {
			b, err := json.Marshal(c.Config)
			if err != nil {
				t.Fatal(err)
			}
			all["consumer "+s.Config.Name+"/"+c.Name] = fmt.Sprintf("%s created %v", b, c.Created)
		}
		if err := consumers.Err(); err != nil {
			t.Fatal(err)
		}
	}
	if err := streams.Err(); err != nil {
		t.Fatal(err)
	}
	text := ""
	for _, k := range slices.Sorted(maps.Keys(all)) {
		text += k + ": " + all[k] + "\n"
	}
	return text
}

func jetStreamOf(t testing.TB, nc *nats.Conn) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return js
}
