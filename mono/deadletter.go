package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A message may be delivered a few times more than it has attempts, as when an App
// is stopped while it handles it. Beyond that its handler is taken to bring the
// process down.
const crashReserve = 3

const (
	captureTimeout = 5 * time.Second
	// After a failed capture nobody tries for a while: messages that come in the
	// meantime are held at once, rather than each after a timeout.
	capturePause = time.Second
	leastHold    = time.Second
	mostHold     = 30 * time.Second
)

var errCapturePaused = errors.New("the dead-letter stream did not answer a moment ago")

// deadLetters captures what the consumers of a run give up.
type deadLetters struct {
	store      *dlq.Store
	stream     string
	host       string
	app        string
	appVersion string

	bridge *dlq.Bridge // nil: only what this App's consumers give up

	paused    atomic.Int64 // until when nobody tries, as since epoch
	provision sync.Mutex   // one at a time brings the stream back
}

// openDeadLetters makes the dead-letter stream, for an App that has something to
// put there.
func (r *run) openDeadLetters(ctx context.Context) error {
	cfg := r.app.cfg.deadLetters
	if cfg == nil || len(r.streamRegs) == 0 && !cfg.External {
		return nil
	}
	store, err := dlq.NewStore(r.nc, r.js, *cfg)
	if err != nil {
		return err
	}
	if err := store.Provision(ctx); err != nil {
		return fmt.Errorf("dead letters in stream %q: %w; WithDeadLetters sets that stream's limits, WithoutDeadLetters does without",
			cfg.StreamName(), jetStreamError(err))
	}
	d := &deadLetters{store: store, stream: cfg.StreamName(), app: r.app.cfg.name}
	d.host, _ = os.Hostname() // or it is not known
	if info, ok := debug.ReadBuildInfo(); ok {
		d.appVersion = info.Main.Version
	}
	if cfg.External {
		if d.bridge, err = dlq.NewBridge(store, r.bridgeConfig(d.stream)); err != nil {
			return err
		}
		if err := d.bridge.Start(ctx); err != nil {
			return fmt.Errorf("dead letters of others: %w; External of dlq.Config asks for them", jetStreamError(err))
		}
	}
	r.dead = d
	return nil
}

// isPaused reports whether nobody is to try to store anything for now.
func (d *deadLetters) isPaused() bool { return int64(time.Since(epoch)) < d.paused.Load() }

func (d *deadLetters) pause() { d.paused.Store(int64(time.Since(epoch) + capturePause)) }

type captureKey struct{}

// bridgeConfig has the captures of others' dead letters traced and counted.
func (r *run) bridgeConfig(stream string) dlq.BridgeConfig {
	ours := make(map[[2]string]bool, len(r.streamRegs))
	for _, reg := range r.streamRegs {
		ours[[2]string{reg.info.Stream, reg.info.Durable}] = true
		ours[[2]string{reg.info.Stream, dlq.ReplayConsumer(reg.info.Durable)}] = true
	}
	tel := r.tel.Consumer(messaging.Route{Template: messaging.TemplateUnmatched, Group: messaging.GroupExternal})
	tel.CaptureDeadLetters([]string{string(dlq.ReasonExternalMaxDeliver), string(dlq.ReasonExternalTerminated), string(dlq.ReasonExpired)})
	return dlq.BridgeConfig{
		Ours: func(stream, consumer string) bool { return ours[[2]string{stream, consumer}] },
		Log:  r.log,
		Trace: func(ctx context.Context, rec *dlq.Record) (context.Context, Header) {
			op := tel.Capture(ctx, &messaging.Delivery{
				Attempt:  uint32(min(rec.Deliveries, math.MaxUint32)),
				Sequence: rec.StreamSequence,
			}, &messaging.Message{
				Subject: rec.Subject, Header: rec.Header, Stream: rec.Stream, Consumer: rec.Consumer,
			}, stream, string(rec.Reason))
			return context.WithValue(ctx, captureKey{}, &op), op.Header
		},
		Captured: func(ctx context.Context, _ *dlq.Record, captured bool, err error) {
			if op, ok := ctx.Value(captureKey{}).(*messaging.Capture); ok {
				op.End(captured, err)
			}
		},
	}
}

// A verdict is why a message is to be dead-lettered, or that it is not.
type verdict struct {
	reason   dlq.Reason
	text     string
	cause    error // nil: a term, or no handler was there to say
	resolved bool  // a replay that was handled: it is to be acked
}

// settlement is what follows from the verdict, without a handler.
func (v *verdict) settlement() settlement {
	if v.resolved {
		return settlement{kind: settleAck}
	}
	return settlement{kind: settleDead, verdict: *v}
}

// A past is what this process knows of a message from before.
type past struct {
	stored      time.Time // of the message: sequences may begin anew
	firstFailed time.Time
	verdict     *verdict // it is dead and not captured yet, or its outcome is not stored
	tries       int      // to capture it
	left        bool     // its handler returned nil and left it
}

// pasts remembers messages that failed, as long as they may come again. What it
// forgets costs a record its details, and no message.
type pasts struct {
	mu  sync.Mutex
	all map[uint64]*past // by stream sequence
}

const maxPasts = 16_384

// of returns what is known of m, or nil.
func (p *pasts) of(m *Msg) *past {
	p.mu.Lock()
	defer p.mu.Unlock()
	known := p.all[m.sequence()]
	if known == nil || !known.stored.Equal(m.stored()) {
		return nil
	}
	copied := *known
	return &copied
}

// note changes what is known of m.
func (p *pasts) note(m *Msg, change func(*past)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.all == nil || len(p.all) >= maxPasts {
		p.all = make(map[uint64]*past) // others settle them too, so there is no telling which are of use
	}
	known := p.all[m.sequence()]
	if known == nil || !known.stored.Equal(m.stored()) {
		known = &past{stored: m.stored()}
		p.all[m.sequence()] = known
	}
	change(known)
}

func (p *pasts) forget(m *Msg) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.all, m.sequence())
}

// failed notes a failed attempt.
func (p *pasts) failed(m *Msg) {
	p.note(m, func(k *past) {
		k.left = false
		if k.firstFailed.IsZero() && m.attempt() == 1 {
			k.firstFailed = time.Now()
		}
	})
}

// sift settles the messages of a batch that no handler is to see any more, and
// returns the others: those that wait for their capture or for the outcome of a
// replay to be stored, and those whose every attempt ended without an outcome, as
// when the handler brings the process down.
func (c *streamConsumer) sift(batch []*Msg) []*Msg {
	if c.rt.dead == nil || !slices.ContainsFunc(batch, func(m *Msg) bool { return m.attempt() > 1 || c.maybeSettled(m) }) {
		return batch
	}
	rest := make([]*Msg, 0, len(batch))
	for _, m := range batch {
		v := c.condemned(m)
		if v == nil {
			rest = append(rest, m)
			continue
		}
		_ = c.finish(m, v.settlement())
	}
	return rest
}

// condemned returns the verdict on a message that has just arrived, or nil.
func (c *streamConsumer) condemned(m *Msg) *verdict {
	if m.attempt() <= 1 {
		if c.maybeSettled(m) {
			return c.before(m)
		}
		return nil
	}
	known := c.pasts.of(m)
	if known != nil && known.verdict != nil {
		return known.verdict
	}
	if m.attempt() <= crashReserve || !c.retry.last(m.attempt()-crashReserve) {
		if known == nil {
			return c.before(m)
		}
		return nil
	}
	if known != nil && known.left {
		return &verdict{reason: dlq.ReasonAttemptsExhausted, text: "the handler returned nil and left the message unsettled"}
	}
	return &verdict{
		reason: dlq.ReasonCrashed,
		text: fmt.Sprintf("delivered %d times without an outcome: the process ended, was stopped, or lost its connection while it was handled",
			m.attempt()-1),
	}
}

// before returns the verdict of another process, or of this one before it was
// started again, that has captured the message, or stored the outcome of a replay,
// and ended before the settlement. A handler that succeeds with it now would leave
// a dead letter of what was handled, or handle twice what was. Where that cannot be
// found out the handler gets it.
func (c *streamConsumer) before(m *Msg) *verdict {
	const limit = time.Second
	dead := c.rt.dead
	if dead.isPaused() {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), limit)
	defer cancel()
	if m.replay != nil {
		switch outcome, err := dead.store.Settled(ctx, *m.replay); {
		case err != nil:
			dead.pause()
			return nil
		case outcome == dlq.ChangeResolved:
			return &verdict{resolved: true}
		case outcome == dlq.ChangeFailedAgain:
			return &verdict{reason: dlq.ReasonTerminated, text: "failed again before, and not terminated then"}
		}
	}
	holds, err := dead.store.Holds(ctx, &dlq.Record{
		ID:     dlq.ID(c.info.Stream, *c.created.Load(), c.info.Durable, m.sequence()),
		Stream: c.info.Stream, Consumer: c.info.Durable, Stored: m.stored(),
	})
	if err != nil {
		dead.pause()
	}
	if !holds {
		return nil
	}
	return &verdict{reason: dlq.ReasonTerminated, text: "captured before, and not terminated then"}
}

// deadLetter gives up on a message: it is captured, or the dead letter that it is a
// replay of has failed again, and only then it is terminated. When that cannot be
// stored it is held, and comes again.
func (c *streamConsumer) deadLetter(m *Msg, v verdict) error {
	line := string(v.reason)
	if text := oneLine(v.text); text != "" {
		line += ": " + text
	}
	dead := c.rt.dead
	if dead == nil {
		if err := c.send(m, messaging.Term, []byte("+TERM "+line), v.cause); err != nil {
			return err
		}
		c.report(slog.LevelError, "message terminated", m, v.cause, slog.String("reason", line))
		return nil
	}
	// It outlives the handler's context: a Stop that runs out of time must not keep
	// a message from its capture.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), captureTimeout)
	defer cancel()
	done := "replayed message failed again"
	id, err := c.failedAgain(ctx, m, v)
	if id == "" && err == nil {
		done = "message dead-lettered"
		id, err = c.capture(ctx, m, v)
	}
	if err != nil {
		return c.hold(m, v, err)
	}
	if err := c.term(ctx, m, []byte("+TERM "+line), v.cause); err != nil {
		// It comes again, and is captured already: no handler is to see it.
		c.pasts.note(m, func(k *past) { k.verdict = &v })
		return err
	}
	c.pasts.forget(m)
	c.report(slog.LevelError, done, m, v.cause, slog.String("reason", line), slog.String("dead_letter", id))
	return nil
}

// capture returns when the dead-letter stream has the message.
func (c *streamConsumer) capture(ctx context.Context, m *Msg, v verdict) (id string, err error) {
	dead := c.rt.dead
	msg := c.message(m)
	op := c.tel.Capture(m.Context(), &m.tel, &msg, dead.stream, string(v.reason))
	captured := false
	defer func() { op.End(captured, err) }()
	if dead.isPaused() {
		return "", errCapturePaused
	}
	store := func() (*dlq.Record, error) {
		r := c.record(m, v)
		r.Traceparent, r.OriginTraceparent = op.Attempt, op.Origin
		captured, err = dead.store.Capture(ctx, r, op.Header)
		return r, err
	}
	r, err := store()
	switch {
	case errors.Is(err, jetstream.ErrNoStreamResponse) && dead.restore(ctx) == nil,
		errors.Is(err, dlq.ErrIDTaken) && c.lookAtStream(ctx) == nil:
		r, err = store()
	}
	if err != nil {
		dead.pause()
		return "", err
	}
	return r.ID, nil
}

// lookAtStream asks when the stream was made. Another instance may have made it
// anew, and its sequences began anew with it.
func (c *streamConsumer) lookAtStream(ctx context.Context) error {
	s, err := c.rt.js.Stream(ctx, c.info.Stream)
	if err == nil {
		c.created.Store(&s.CachedInfo().Created)
	}
	return err
}

// restore makes the stream again if somebody has deleted it.
func (d *deadLetters) restore(ctx context.Context) error {
	d.provision.Lock()
	defer d.provision.Unlock()
	return d.store.Provision(ctx)
}

// record says what is known of a message and its failure. Nothing in it is
// shared with the message, since the user's redaction may change it.
func (c *streamConsumer) record(m *Msg, v verdict) *dlq.Record {
	dead := c.rt.dead
	r := &dlq.Record{
		ID:     dlq.ID(c.info.Stream, *c.created.Load(), c.info.Durable, m.sequence()),
		Reason: v.reason, ReasonText: v.text,
		Subject: m.Subject, Header: c.ownHeader(m), Data: slices.Clone(m.Data),
		Event:  c.info.Event.String(),
		Stream: c.info.Stream, StreamCreated: *c.created.Load(), StreamSequence: m.sequence(),
		Consumer: c.info.Durable, ConsumerSequence: m.consumerSequence,
		Deliveries: m.attempt(), Stored: m.stored(), Failed: time.Now(),
		App: dead.app, AppVersion: dead.appVersion, Module: c.info.Module, Host: dead.host,
	}
	if known := c.pasts.of(m); known != nil {
		r.FirstFailed = known.firstFailed
	}
	if v.cause != nil {
		r.Error, r.ErrorType, r.ErrorTypes = v.cause.Error(), c.rt.tel.ErrorType(v.cause), typeChain(v.cause)
		if v.text == r.Error {
			r.ReasonText = ""
		}
		if p, ok := errors.AsType[*PanicError](v.cause); ok {
			r.Stack = strings.Split(strings.TrimSpace(string(p.Stack)), "\n")
		}
	}
	return r
}

// typeChain lists the types of an error and of what it wraps, outermost first.
func typeChain(err error) []string {
	const most = 16
	var chain []string
	for next := []error{err}; len(next) > 0 && len(chain) < most; next = next[1:] {
		e := next[0]
		if e == nil {
			continue
		}
		chain = append(chain, reflect.TypeOf(e).String())
		next = append(next, unwrapped(e)...)
	}
	return chain
}

// unwrapped calls the user's method, which may panic.
func unwrapped(err error) (all []error) {
	defer func() { _ = recover() }()
	switch w := err.(type) { //nolint:errorlint // it is the wrappers that are looked at
	case interface{ Unwrap() error }:
		all = []error{w.Unwrap()}
	case interface{ Unwrap() []error }:
		all = w.Unwrap()
	}
	return all
}

// hold hands a message back that could not be captured, or whose outcome could not
// be stored. This process remembers the verdict, so that no handler sees the
// message again.
func (c *streamConsumer) hold(m *Msg, v verdict, err error) error {
	var tries int
	c.pasts.note(m, func(k *past) {
		k.verdict = &v
		k.tries++
		tries = k.tries
	})
	const doublings = 6
	delay := min(leastHold<<min(tries-1, doublings), mostHold)
	delay += rand.N(delay / 4) //nolint:gosec,mnd // so that they do not all come back at once
	text, attrs := "dead letter not captured, the message is held and comes again", []slog.Attr{slog.Duration("delay", delay)}
	if m.replay != nil {
		text = "outcome of a replay not stored, the message is held and comes again"
		attrs = append(attrs, slog.String("dead_letter", m.replay.ID))
	}
	if !v.resolved {
		attrs = append(attrs, slog.String("reason", string(v.reason)))
	}
	c.report(slog.LevelError, text, m, err, attrs...)
	return c.nak(m, delay, v.cause)
}

// deadLetterReasons are those that an App captures by itself.
func deadLetterReasons() []string {
	return []string{
		string(dlq.ReasonTerminated), string(dlq.ReasonPermanentError), string(dlq.ReasonAttemptsExhausted), string(dlq.ReasonPanic),
		string(dlq.ReasonCrashed), string(dlq.ReasonUndecodable),
	}
}
