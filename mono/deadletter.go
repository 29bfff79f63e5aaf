package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"reflect"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

const (
	captureTimeout = 5 * time.Second
	// After a failed capture nobody tries for a while: messages that come in the
	// meantime are held at once, rather than each after a timeout.
	capturePause = time.Second
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
	r.denyRollups(ctx, store, cfg.StreamName())
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

// denyRollups turns off what versions that discard by a rollup have left on. An App
// that may not do so starts all the same.
func (r *run) denyRollups(ctx context.Context, store *dlq.Store, stream string) {
	switch were, err := store.DenyRollups(ctx); {
	case err != nil && were:
		r.log.LogAttrs(ctx, slog.LevelWarn, "rollups of the dead-letter stream not turned off: a user that may publish one dead letter can remove all",
			append(errorAttrs(err, 0), slog.String("stream", stream))...)
	case err != nil:
		r.log.LogAttrs(ctx, slog.LevelWarn, "rollups of the dead-letter stream not checked", append(errorAttrs(err, 0), slog.String("stream", stream))...)
	case were:
		r.log.LogAttrs(ctx, slog.LevelWarn, "rollups of the dead-letter stream turned off: tools of earlier versions cannot discard any more",
			slog.String("stream", stream))
	}
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

// deadLetter gives up on a message: it is captured, or the dead letter that it is a
// replay of has failed again, and only then it is terminated. When that cannot be
// stored it is held.
func (c *streamConsumer) deadLetter(m *Msg, v verdict) error {
	if c.leaseEnded(m) {
		return c.lapse(m, &v, v.cause)
	}
	if c.rt.dead == nil {
		line := v.line()
		if err := c.send(m, messaging.Term, []byte("+TERM "+line), v.cause); err != nil {
			return err
		}
		c.report(slog.LevelError, "message terminated", m, v.cause, slog.String("reason", line))
		return nil
	}
	if err := c.captureAndTerm(m, &v); err != nil {
		if unstored, ok := errors.AsType[*unstoredError](err); ok {
			return c.hold(m, v, unstored.err)
		}
		return err
	}
	return nil
}

// line is the reason on the wire and in the log.
func (v *verdict) line() string {
	line := string(v.reason)
	if text := oneLine(v.text); text != "" {
		line += ": " + text
	}
	return line
}

// An unstoredError says that a dead letter, or the outcome of a replay, could not be
// stored: the message must be kept.
type unstoredError struct{ err error }

func (e *unstoredError) Error() string { return e.err.Error() }
func (e *unstoredError) Unwrap() error { return e.err }

// captureAndTerm terminates a message once the dead-letter stream has its record, or
// the outcome if it is a replay.
func (c *streamConsumer) captureAndTerm(m *Msg, v *verdict) error {
	// It outlives the handler's context: a Stop that runs out of time must not keep
	// a message from its capture.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.work), captureTimeout)
	defer cancel()
	// What is sent without a connection would be stored when there is one again, to a
	// server that may have given the message to another instance.
	if !c.rt.isResumed() {
		return &unstoredError{ErrDisconnected}
	}
	if err := c.renew(ctx, m); err != nil {
		return &unstoredError{err}
	}
	if c.leaseEnded(m) {
		return c.lapse(m, v, v.cause)
	}
	done := "replayed message failed again"
	id, err := c.failedAgain(ctx, m, *v)
	if id == "" && err == nil {
		done = "message dead-lettered"
		id, err = c.capture(ctx, m, *v)
	}
	if err != nil {
		return &unstoredError{err}
	}
	line := v.line()
	if err := c.term(ctx, m, []byte("+TERM "+line), v.cause); err != nil {
		// It comes again, and is captured already: no handler is to see it.
		c.history.note(m, func(k *remembered) { k.verdict = v })
		return err
	}
	c.history.forget(m)
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
	store := func(capture func(context.Context, *dlq.Record, Header) (bool, error)) (*dlq.Record, error) {
		r := c.record(m, v)
		r.Traceparent, r.OriginTraceparent = op.Attempt, op.Origin
		captured, err = capture(ctx, r, op.Header)
		return r, err
	}
	r, err := store(dead.store.Capture)
	switch {
	case err == nil || c.leaseEnded(m):
	case errors.Is(err, jetstream.ErrNoStreamResponse) && dead.restore(ctx) == nil,
		errors.Is(err, dlq.ErrIDTaken) && c.lookAtStream(ctx) == nil:
		r, err = store(dead.store.CaptureNext)
	}
	if err != nil {
		if concernsAll(err) {
			dead.pause()
		}
		return "", err
	}
	return r.ID, nil
}

// concernsAll reports whether what cannot be stored because of err is no exception: the
// dead-letter stream is full or away, and not one record too large for it.
func concernsAll(err error) bool {
	if errors.Is(err, dlq.ErrNoRoomElsewhere) || errors.Is(err, dlq.ErrIDTaken) {
		return false
	}
	for _, wide := range []error{
		errCapturePaused, ErrDisconnected, context.DeadlineExceeded, context.Canceled, nats.ErrTimeout, nats.ErrNoResponders,
		nats.ErrConnectionClosed, nats.ErrDisconnected, jetstream.ErrNoStreamResponse, jetstream.ErrStreamNotFound,
	} {
		if errors.Is(err, wide) {
			return true
		}
	}
	return dlq.IsFull(err)
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

// recordID is the ID of a message's record, if it is given up.
func (c *streamConsumer) recordID(m *Msg) string {
	return dlq.ID(c.info.Stream, *c.created.Load(), c.info.Durable, m.sequence())
}

// record says what is known of a message and its failure. Nothing in it is
// shared with the message, since the user's redaction may change it.
func (c *streamConsumer) record(m *Msg, v verdict) *dlq.Record {
	dead := c.rt.dead
	r := &dlq.Record{
		ID:     c.recordID(m),
		Reason: v.reason, ReasonText: v.text,
		Subject: m.Subject, Header: c.ownHeader(m), Data: slices.Clone(m.Data),
		Event:  c.info.Event.String(),
		Stream: c.info.Stream, StreamCreated: *c.created.Load(), StreamSequence: m.sequence(),
		Consumer: c.info.Durable, ConsumerSequence: m.consumerSequence,
		Deliveries: m.attempt(), Stored: m.stored(), Failed: time.Now(),
		App: dead.app, AppVersion: dead.appVersion, Module: c.info.Module, Host: dead.host,
	}
	if v.gone {
		r.Body, r.BodySize = dlq.BodyGone, m.bytes()
	}
	if known := c.history.of(m); known != nil {
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

// deadLetterReasons are those that an App captures by itself.
func deadLetterReasons() []string {
	return []string{
		string(dlq.ReasonTerminated), string(dlq.ReasonPermanentError), string(dlq.ReasonAttemptsExhausted), string(dlq.ReasonPanic),
		string(dlq.ReasonCrashed), string(dlq.ReasonUndecodable),
	}
}
