package triage_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/telemetry/messaging"
)

// start runs an operation. What it returns comes on a channel.
func (b *bundle) start(t testing.TB, d *triage.Desk, id string, progress func(*triage.Operation)) <-chan ended {
	t.Helper()
	ctx, done := within(t), make(chan ended, 1)
	go func() {
		op, err := d.Run(ctx, id, progress)
		done <- ended{op, err}
	}()
	return done
}

type ended struct {
	op  *triage.Operation
	err error
}

// until looks again and again until an operation is as it is to be.
func (b *bundle) until(t testing.TB, id string, is func(*triage.Operation) bool) *triage.Operation {
	t.Helper()
	ctx, tick := within(t), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for {
		op, err := b.desk.Operation(ctx, id)
		must(t, err)
		if is(op) {
			return op
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("operation %+v, and it stays so", op)
		}
	}
}

// change changes the configuration of a stream.
func (b *bundle) change(t testing.TB, stream string, f func(*jetstream.StreamConfig)) {
	t.Helper()
	s, err := b.js.Stream(within(t), stream)
	must(t, err)
	cfg := s.CachedInfo().Config
	f(&cfg)
	_, err = b.js.UpdateStream(within(t), cfg)
	must(t, err)
}

// claim has an operation claim all entries, as if it had been killed before it sent
// them.
func (b *bundle) claim(t *testing.T, id, target string) {
	t.Helper()
	var all sync.WaitGroup
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		must(t, err)
		all.Go(func() {
			c := dlq.Change{Kind: dlq.ChangeReplaying, Actor: "ann@ops", Operation: id, Target: target}
			if err := b.store.Change(within(t), e, c, nil); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	triage.MarkStarted(t, b.desk, id)
}

// What is selected is sent, skipped, or remains.
func wantCounts(t testing.TB, op *triage.Operation) {
	t.Helper()
	skipped := 0
	for _, n := range op.Skipped {
		skipped += n
	}
	if sent := op.Claimed - op.Released; sent+skipped+op.Remaining != op.Selected {
		t.Errorf("%d sent, %d skipped and %d that remain are not the %d that are selected", sent, skipped, op.Remaining, op.Selected)
	}
}

// An operation that is run is not taken over, however long its progress takes, and
// who cancels it waits until it is.
func TestOperation_held(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 400)
	b.consume(t, billing, nil)
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 10})
	release := make(chan struct{})
	run := b.start(t, b.desk, p.ID, func(*triage.Operation) { <-release })
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Claimed > 0 })
	if err := waitFor(t, triage.Lease+time.Second, run); err != nil {
		t.Fatal(err)
	}
	_, err := bob.Run(within(t), p.ID, nil)
	if !errors.Is(err, triage.ErrClaimed) || !strings.Contains(err.Error(), "ann@ops/") {
		t.Errorf("another run: %v, want ErrClaimed, and who has it", err)
	}
	if op := b.until(t, p.ID, func(*triage.Operation) bool { return true }); op.Interrupted() {
		t.Error("it is said to be interrupted, and is not")
	}
	close(release)
	must(t, bob.Cancel(within(t), p.ID))
	op := b.until(t, p.ID, func(*triage.Operation) bool { return true })
	if op.Status != triage.StatusCancelled || op.Why != "cancelled by bob@ops" {
		t.Errorf("cancelled, operation %+v", op)
	}
	if e := <-run; e.err != nil || e.op.Status != triage.StatusCancelled {
		t.Errorf("the run has ended with %+v, %v", e.op, e.err)
	}
}

// waitFor lets time pass. A run that ends in it is an error.
func waitFor(t testing.TB, how time.Duration, run <-chan ended) error {
	t.Helper()
	timer := time.NewTimer(how)
	defer timer.Stop()
	select {
	case e := <-run:
		return errors.Join(errors.New("the run has ended"), e.err)
	case <-timer.C:
		return nil
	}
}

// A run knows that its operation was taken over by another of the same name and
// process number, as containers have.
func TestOperation_takenOver(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 200)
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{Rate: 10})
	run := b.start(t, b.desk, p.ID, nil)
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Claimed > 0 })
	triage.TakeOver(t, b.desk, p.ID)
	if e := <-run; !errors.Is(e.err, triage.ErrClaimed) || e.op.Remaining == 0 {
		t.Errorf("the run has ended with %+v, %v, want ErrClaimed", e.op, e.err)
	}
}

// Who takes over from a process that was killed has watched it for a lease, and no
// longer.
func TestOperation_interrupted(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 3)
	b.consume(t, billing, nil)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	triage.MarkStarted(t, b.desk, p.ID)
	if op := b.until(t, p.ID, func(*triage.Operation) bool { return true }); op.Interrupted() {
		t.Error("it is interrupted at once")
	}
	begin := time.Now()
	if op := b.run(t, p.ID); op.Resolved != 3 {
		t.Errorf("operation %+v", op)
	}
	if took := time.Since(begin); took < triage.Lease { //nolint:forbidigo // a lower bound
		t.Errorf("it was taken over after %v", took)
	}
	p = b.plan(t, triage.Selection{States: dlq.States()}, triage.Options{})
	triage.MarkStarted(t, b.desk, p.ID)
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Interrupted() })
	must(t, b.desk.Pause(within(t), p.ID)) // nobody is there who could
	if op := b.until(t, p.ID, func(*triage.Operation) bool { return true }); op.Status != triage.StatusPaused {
		t.Errorf("paused: %+v", op)
	}
	// A paused one has no runner that is watched for a lease: few questions take it.
	paused := triage.Acquire(t, b.desk, p.ID)
	dead := triage.Acquire(t, b.desk, p.ID) // its runner says nothing
	if paused > dead/2 {
		t.Errorf("one that is paused takes %d messages, and one with a dead runner %d", paused, dead)
	}
	b.run(t, p.ID)
	if triage.DeadAtOnce(triage.Lease) || !triage.DeadAtOnce(time.Hour) {
		t.Error("who was killed an hour ago is to be dead at once, and not who is silent for a lease")
	}
}

// A wish to cancel wins over one to pause, also when it comes while the run waits
// for what it has in hand, and nobody takes it back.
func TestOperation_cancelWins(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{NoAck: true}) // a publish ends after five seconds
	b.capture(t, 300)
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	p := b.plan(t, triage.Selection{}, triage.Options{})
	var beats atomic.Int32
	run := b.start(t, b.desk, p.ID, func(*triage.Operation) { beats.Add(1) })
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Claimed > 0 })
	must(t, bob.Pause(within(t), p.ID))
	op := b.until(t, p.ID, func(*triage.Operation) bool { return true })
	if op.Why != "to be paused, as bob@ops has asked" {
		t.Errorf("it is to be paused, and says %q", op.Why)
	}
	// It has noticed, and has stored something since.
	before := beats.Load()
	op = b.until(t, p.ID, func(*triage.Operation) bool { return beats.Load() > before+2 })
	if op.Why != "to be paused, as bob@ops has asked" {
		t.Errorf("it has forgotten that, and says %q", op.Why)
	}
	cancelled := make(chan error, 1)
	ctx := within(t)
	go func() { cancelled <- bob.Cancel(ctx, p.ID) }()
	b.until(t, p.ID, func(o *triage.Operation) bool {
		return o.Why == "to be cancelled, as bob@ops has asked" || o.Status == triage.StatusCancelled
	})
	if err := b.desk.Pause(within(t), p.ID); !errors.Is(err, triage.ErrState) {
		t.Errorf("pause what is to be cancelled: %v, want ErrState", err)
	}
	e := <-run
	if e.err != nil || e.op.Status != triage.StatusCancelled || e.op.Remaining == 0 {
		t.Errorf("the run has ended with %+v, %v, want it cancelled", e.op, e.err)
	}
	wantCounts(t, e.op)
	must(t, <-cancelled)
	if err := bob.Cancel(ctx, p.ID); !errors.Is(err, triage.ErrState) {
		t.Errorf("cancel it again: %v, want ErrState", err)
	}
}

// What is claimed and could not be sent to others is open again when its operation
// is cancelled.
func TestOperation_cancelToEveryone(t *testing.T) {
	t.Parallel()
	const fit = 5
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{MaxMsgs: fit, Discard: jetstream.DiscardNew})
	ids := b.capture(t, 20)
	bob := b.open(t, triage.Config{Actor: "bob@ops"})
	p := b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone})
	run := b.start(t, b.desk, p.ID, nil)
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Claimed == len(ids) && o.Sent == fit })
	must(t, bob.Cancel(within(t), p.ID))
	e := <-run
	must(t, e.err)
	if o := e.op; o.Status != triage.StatusCancelled || o.Released != len(ids)-fit || o.Remaining != len(ids)-fit || o.InFlight() != 0 {
		t.Errorf("operation %+v", o)
	}
	wantCounts(t, e.op)
	states := map[dlq.State]int{}
	for _, id := range ids {
		entry := b.get(t, id)
		states[entry.State]++
		if last := entry.History[len(entry.History)-1]; entry.State == dlq.StateOpen && last.Reason != "cancelled; it may have been sent before" {
			t.Errorf("it was given back because %q", last.Reason)
		}
	}
	if states[dlq.StateSent] != fit || states[dlq.StateOpen] != len(ids)-fit {
		t.Errorf("the entries are %v", states)
	}
	_, remaining, err := b.desk.Tried(within(t), p.ID)
	must(t, err)
	if len(remaining) != e.op.Remaining {
		t.Errorf("%d are listed as remaining, %d counted", len(remaining), e.op.Remaining)
	}
}

// More than a run has in hand are given back in little time. What cannot be is said,
// and is when it can.
func TestOperation_cancelMany(t *testing.T) {
	t.Parallel()
	const entries = 1200
	b := setup(t)
	b.fill(t, entries)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	b.claim(t, p.ID, triage.TargetConsumer)
	b.change(t, "DLQ", func(c *jetstream.StreamConfig) { c.MaxMsgs = 2 * entries })
	err := b.desk.Cancel(within(t), p.ID)
	if err == nil || !strings.Contains(err.Error(), "of 1200 that it had in hand") {
		t.Errorf("cancelled while the stream is full: %v", err)
	}
	op := b.until(t, p.ID, func(*triage.Operation) bool { return true })
	if op.Status != triage.StatusCancelled || op.InFlight() != entries || !strings.Contains(op.Why, "cancel it again") {
		t.Errorf("nothing is given back, and the operation is %+v", op)
	}
	wantCounts(t, op)
	b.change(t, "DLQ", func(c *jetstream.StreamConfig) { c.MaxMsgs = -1 })
	must(t, b.desk.Cancel(within(t), p.ID))
	op = b.until(t, p.ID, func(*triage.Operation) bool { return true })
	if op.Released != entries || op.InFlight() != 0 || op.Remaining != entries || op.Why != "cancelled by ann@ops" {
		t.Errorf("all are given back, and the operation is %+v", op)
	}
	if open := b.list(t, triage.Selection{States: []dlq.State{dlq.StateOpen}}); len(open) != entries {
		t.Errorf("%d are open, want %d", len(open), entries)
	}
}

// The numbers fit at every moment, also those of entries that are skipped when they
// are claimed already.
func TestOperation_counts(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const each = 60
	for range each {
		b.capture(t, 1)
		b.capture(t, 1, func(r *dlq.Record) { r.Data = bytes.Repeat([]byte("x"), 8<<10) }) // too large for its stream
	}
	b.change(t, ordersStream, func(c *jetstream.StreamConfig) { c.MaxMsgSize = 4 << 10 })
	p := b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone, Rate: 20}) // it must not be done before it is paused
	paused := false
	run := b.start(t, b.desk, p.ID, func(o *triage.Operation) {
		wantCounts(t, o)
		if !paused && len(o.Skipped) > 0 {
			paused = true
			if err := b.desk.Pause(context.WithoutCancel(t.Context()), p.ID); err != nil {
				t.Error(err)
			}
		}
	})
	op := b.until(t, p.ID, func(o *triage.Operation) bool {
		wantCounts(t, o)
		return o.Status == triage.StatusPaused
	})
	must(t, (<-run).err)
	_, remaining, err := b.desk.Tried(within(t), p.ID)
	must(t, err)
	if len(remaining) != op.Remaining || op.Remaining == 0 {
		t.Errorf("%d remain, %d are counted", len(remaining), op.Remaining)
	}
	run = b.start(t, b.desk, p.ID, func(o *triage.Operation) { wantCounts(t, o) })
	b.until(t, p.ID, func(o *triage.Operation) bool {
		wantCounts(t, o)
		return o.Status == triage.StatusDone
	})
	e := <-run
	must(t, e.err)
	wantCounts(t, e.op)
	if o := e.op; o.Sent != each || o.Released != each || o.Skipped["too large for its stream, with what a replay adds"] != each || o.Remaining != 0 {
		t.Errorf("operation %+v", o)
	}
}

// An entry whose release was the last that a killed process did is skipped, and does
// not remain.
func TestOperation_countsAfterACrash(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(t, 2)
	p := b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone})
	e := b.get(t, ids[0])
	for _, c := range []dlq.Change{{Kind: dlq.ChangeReplaying, Operation: p.ID}, {Kind: dlq.ChangeReleased, Operation: p.ID, Reason: "too large"}} {
		must(t, b.store.Change(within(t), e, c, nil))
	}
	triage.MarkStarted(t, b.desk, p.ID)
	op := b.run(t, p.ID)
	wantCounts(t, op)
	if op.Sent != 1 || op.Skipped["too large"] != 1 || op.Remaining != 0 {
		t.Errorf("operation %+v", op)
	}
}

// A message whose acknowledgement is lost is not sent again when it was handled
// since, and is gone from a stream that has forgotten its ID.
func TestRun_lostAnswers(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{
		Retention: jetstream.WorkQueuePolicy, NoAck: true, Duplicates: 100 * time.Millisecond,
	})
	ids := b.capture(t, 40)
	billed := b.consume(t, billing, nil)
	op := b.run(t, b.plan(t, triage.Selection{}, triage.Options{}).ID)
	if op.Status != triage.StatusDone || op.Resolved != len(ids) {
		t.Errorf("operation %+v", op)
	}
	if n, most := billed.total(); n != len(ids) || most != 1 {
		t.Errorf("the consumer got %d messages, one of them %d times", n, most)
	}
}

// A process that had no connection while another took its operation over sends
// nothing of it when the connection is back.
func TestRun_disconnected(t *testing.T) {
	t.Parallel()
	b := setupWith(t, dlq.Config{}, jetstream.StreamConfig{Retention: jetstream.WorkQueuePolicy, Duplicates: 100 * time.Millisecond})
	const entries = 8 // as many as senders, so that each is claimed while the first of a batch is held
	b.capture(t, entries)
	billed := b.consume(t, billing, nil)

	line := &cable{conns: make(map[net.Conn]struct{})}
	nc, err := nats.Connect(b.server.URL(), nats.SetCustomDialer(line), nats.MaxReconnects(-1), nats.ReconnectWait(10*time.Millisecond))
	must(t, err)
	t.Cleanup(nc.Close)
	// Its entries are claimed, and wait to be sent.
	hold := holdingTracer{started: make(chan struct{}, entries), release: make(chan struct{})}
	tel, err := messaging.New(messaging.Config{TracerProvider: hold})
	must(t, err)
	away, err := triage.Open(within(t), nc, triage.Config{Actor: "away@ops", Telemetry: tel})
	must(t, err)
	p := b.plan(t, triage.Selection{}, triage.Options{})
	run := b.start(t, away, p.ID, nil)
	<-hold.started
	b.until(t, p.ID, func(o *triage.Operation) bool { return o.Claimed == entries })
	line.cut(true)
	if op := b.run(t, p.ID); op.Resolved != entries {
		t.Errorf("operation %+v", op)
	}
	close(hold.release)
	line.cut(false)
	if e := <-run; e.err == nil {
		t.Errorf("the run has ended with %+v, want it to have lost its operation", e.op)
	}
	ctx, tick := within(t), time.NewTicker(20*time.Millisecond)
	defer tick.Stop()
	for s, err := b.js.Stream(ctx, ordersStream); ; s, err = b.js.Stream(ctx, ordersStream) { // until all is handled
		must(t, err)
		if s.CachedInfo().State.Msgs == 0 {
			break
		}
		<-tick.C
	}
	if n, most := billed.total(); n != entries || most != 1 {
		t.Errorf("the consumer got %d messages, one of them %d times", n, most)
	}
}

// A cable is a connection that can be cut.
type cable struct {
	mu    sync.Mutex
	isCut bool
	conns map[net.Conn]struct{}
}

var errCut = errors.New("the cable is cut")

func (c *cable) Dial(network, address string) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.isCut {
		return nil, errCut
	}
	var d net.Dialer
	conn, err := d.DialContext(context.Background(), network, address)
	if err == nil {
		c.conns[conn] = struct{}{}
	}
	return conn, err
}

func (c *cable) cut(isCut bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.isCut = isCut
	for conn := range c.conns {
		_ = conn.Close()
		delete(c.conns, conn)
	}
}

// A holdingTracer holds who begins a span.
type holdingTracer struct {
	noop.TracerProvider

	started, release chan struct{}
}

func (h holdingTracer) Tracer(string, ...trace.TracerOption) trace.Tracer { return holder{h: h} }

type holder struct {
	noop.Tracer

	h holdingTracer
}

func (h holder) Start(ctx context.Context, name string, opts ...trace.SpanStartOption) (context.Context, trace.Span) {
	h.h.started <- struct{}{}
	<-h.h.release
	return h.Tracer.Start(ctx, name, opts...)
}
