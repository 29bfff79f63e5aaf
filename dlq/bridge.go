package dlq

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/time/rate"

	"github.com/monotel/monotel/internal/jsapi"
)

// AdvisoryStream is the stream that keeps what the server says of messages that
// were given up. An account has one, which every [Bridge] reads.
const AdvisoryStream = "MONOTEL_ADVISORIES"

const (
	exhaustedSubjects  = "$JS.EVENT.ADVISORY.CONSUMER.MAX_DELIVERIES."
	terminatedSubjects = "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."

	advisoryMaxBytes = 64 << 20
	advisoryMaxAge   = 7 * 24 * time.Hour

	defaultGrace = 30 * time.Second
)

const (
	// How much the clocks of a cluster's servers may differ.
	clockSkew = time.Second

	// For what is done about one advisory. Its lease is shorter, so that one which
	// arrives while a bridge stops is not late: two bridges that handle the same
	// one do no harm.
	handleTimeout   = 20 * time.Second
	advisoryAckWait = 10 * time.Second

	// Advisories that wait to be looked at again count, too. Those behind them
	// are due when their turn comes.
	advisoryMaxAckPending = 256

	// How often the server says that it knows our request: after a reconnect it
	// does not.
	advisoryHeartbeat = 3 * time.Second

	minRetry = time.Second
	maxRetry = time.Minute

	// How many advisories a bridge handles a second, and how many at once after a
	// pause. The others wait in their stream.
	advisoryRate  = 500
	advisoryBurst = 1000

	// How often an advisory comes again because its message, which is captured, may
	// still be in work and so must not be settled: about five minutes.
	releaseTries = 10
)

// What the server says when it terminates a message by itself, since its stream
// has dropped it while a consumer had it.
var droppedReasons = []string{"Message deleted by stream limits", "Unacknowledged message was deleted"}

// Why no dead letter is made of an advisory, see BridgeConfig.Skipped.
const (
	SkipMalformed    = "malformed"     // it is no advisory
	SkipOwn          = "own"           // the consumer captures its dead letters itself, or the stream is one of ours
	SkipOtherDomain  = "other_domain"  // it is about a stream in another JetStream domain
	SkipStreamGone   = "stream_gone"   // the stream was deleted, and perhaps made again
	SkipConsumerGone = "consumer_gone" // the consumer was deleted, and perhaps made again, or set back
	SkipAcknowledged = "acknowledged"  // it was acknowledged late
	SkipReplaced     = "replaced"      // a newer message of its subject took its place
	SkipBucket       = "bucket"        // the stream is a key-value or object bucket, or copies one
	SkipUnproven     = "unproven"      // the consumer's numbers on the server contradict it: anybody may publish an advisory
)

// A BridgeConfig configures a Bridge. The zero value is good for consumers none of
// which is ours.
type BridgeConfig struct {
	// Grace is how long after the server has given up a message it is looked at
	// again, since the handler of its last delivery may still acknowledge it. The
	// default is 30 s. Messages that a consumer terminates do not wait.
	Grace time.Duration

	// Ours reports whether the dead letters of a consumer are captured by whoever
	// reads it. It is called often, from one goroutine. Nil means that none are.
	Ours func(stream, consumer string) bool

	// Log gets what an operator must know. Nil is silent.
	Log *slog.Logger

	// Captured is called after each attempt to capture a record, without a lock.
	// captured is false if the record was there before, or with err, after which
	// it is tried again. ctx is that of Trace.
	Captured func(ctx context.Context, r *Record, captured bool, err error)

	// Skipped is called for each advisory that makes no dead letter, without a
	// lock. why is one of the Skip constants.
	Skipped func(ctx context.Context, why string)

	// Trace is called before each attempt to capture a record. It returns the
	// context to do so with, and headers to add to the record, such as its trace
	// context.
	Trace func(ctx context.Context, r *Record) (context.Context, nats.Header)
}

// A Bridge captures the dead letters of consumers that are not ours, such as those
// of plain clients and of other languages: the server tells of them, without the
// message and only once, so a stream keeps what it tells, and the bridge fetches
// the message.
//
// Several bridges with the same dead-letter stream share the work, as one durable
// consumer. An advisory counts as handled when its dead letter is stored. A message
// that the server gave up is then settled for its consumer, so that work queue and
// interest streams do not keep it for ever. What an AckAll consumer left in an interest
// stream stays there: such an acknowledgement would be of the messages before, too.
//
// Anybody who may publish the subjects of advisories can forge one. A bridge acts on
// an advisory only if its consumer exists and, by the server's numbers, has had the
// message as often as the advisory says, and never on one about a key-value or object
// bucket. It settles a message only when the consumer no longer has it in work. It
// handles at most 500 advisories a second; the others wait in their stream.
//
// A message is told apart from one that was acknowledged late by what the server
// still knows. It does not tell for consumers with a MaxDeliver of 1, nor, on
// limits and interest streams, while other messages of the consumer are being
// delivered again: such a message may be a dead letter although it was handled.
type Bridge struct {
	store *Store
	cfg   BridgeConfig

	limiter *rate.Limiter // of advisories

	gate chan struct{} // held by Start and Stop; guards what follows
	stop func(error)   // ends fetching
	kill func(error)   // ends what is being done
	done chan struct{} // closed when run has returned; nil before Start

	// Of run's goroutine.
	domain    string
	malformed logLimit
	failed    logLimit
}

// NewBridge returns a bridge to a store. It touches no network; see [Bridge.Start].
func NewBridge(s *Store, cfg BridgeConfig) (*Bridge, error) {
	if s == nil {
		return nil, fmt.Errorf("advisory bridge: %w: there is no Store, make one with NewStore", ErrInvalidConfig)
	}
	if cfg.Grace < 0 {
		return nil, fmt.Errorf("advisory bridge: %w: Grace is %v, want 0 or more", ErrInvalidConfig, cfg.Grace)
	}
	if cfg.Grace == 0 {
		cfg.Grace = defaultGrace
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Bridge{store: s, cfg: cfg, limiter: rate.NewLimiter(advisoryRate, advisoryBurst), gate: make(chan struct{}, 1)}, nil
}

var (
	errBridgeStopped = errors.New("the advisory bridge was stopped")
	errBridgeKilled  = errors.New("the advisory bridge had no more time to stop")
)

// Start makes the stream and its reader, unless they are there, and begins to read.
// Call it before consumers are made: what the server tells before that is lost. ctx
// bounds the start only. The dead-letter stream need not be there yet. Starting twice
// does nothing.
func (b *Bridge) Start(ctx context.Context) error {
	if err := b.lock(ctx); err != nil {
		return fmt.Errorf("start advisory bridge: %w", err)
	}
	defer b.unlock()
	if b.done != nil {
		if b.stop != nil {
			return nil
		}
		select { // what a Stop left that ran out of time
		case <-b.done:
		case <-ctx.Done():
			return fmt.Errorf("start advisory bridge: %w: it has not stopped yet", context.Cause(ctx))
		}
	}
	reader, err := b.open(ctx)
	if err != nil {
		return fmt.Errorf("start advisory bridge: %w", err)
	}
	base := context.WithoutCancel(ctx)
	fetch, stop := context.WithCancelCause(base)
	work, kill := context.WithCancelCause(base)
	b.stop, b.kill, b.done = stop, kill, make(chan struct{})
	go b.run(fetch, work, reader, b.done)
	return nil
}

// Stop stops to read, and waits for the capture that is under way. If ctx ends first
// it is cancelled, which loses nothing: the advisory comes again. Stopping twice, or
// before Start, is fine.
func (b *Bridge) Stop(ctx context.Context) error {
	if err := b.lock(ctx); err != nil {
		return fmt.Errorf("stop advisory bridge: %w", err)
	}
	defer b.unlock()
	if b.done == nil {
		return nil
	}
	if b.stop != nil {
		b.stop(errBridgeStopped)
		b.stop = nil
	}
	select {
	case <-b.done:
		b.kill(errBridgeStopped)
		b.done = nil
		return nil
	case <-ctx.Done():
		b.kill(errBridgeKilled)
		return fmt.Errorf("stop advisory bridge: %w: a capture is under way", context.Cause(ctx))
	}
}

// run reads advisories until fetch ends. It asks for one at a time: none waits here
// while its lease runs out, and other bridges take the next. What arrives when fetch
// has ended comes again after its lease.
func (b *Bridge) run(fetch, work context.Context, reader jetstream.Consumer, done chan<- struct{}) {
	defer close(done)
	for fetch.Err() == nil {
		batch, err := reader.Fetch(1, jetstream.FetchContext(fetch), jetstream.FetchHeartbeat(advisoryHeartbeat))
		if err == nil {
			for m := range batch.Messages() {
				b.process(work, m)
				_ = b.limiter.Wait(fetch) // or it has ended
			}
			err = batch.Error()
		}
		if err != nil && fetch.Err() == nil {
			if reader = b.reopen(fetch, err); reader == nil {
				return
			}
		}
	}
}

// reopen arranges stream and reader again, which is right whether they are gone, the
// connection is, or just the server that knew our request. It returns nil when ctx
// ends first.
func (b *Bridge) reopen(ctx context.Context, cause error) jetstream.Consumer {
	const first = 100 * time.Millisecond // not at once, in case it is our request that is refused
	for wait, failing := first, false; ; wait = minRetry {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
		reader, err := b.provision(ctx)
		switch {
		case err == nil && failing:
			b.cfg.Log.LogAttrs(ctx, slog.LevelInfo, "advisories are read again", slog.String("stream", AdvisoryStream))
			return reader
		case err == nil:
			return reader
		case ctx.Err() == nil && !failing:
			failing = true
			b.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "advisories cannot be read, will try again",
				slog.String("stream", AdvisoryStream), slog.String("error", oneLine(errors.Join(cause, err).Error())))
		}
	}
}

// process handles one advisory and settles it. A settlement that does not arrive is
// no loss: the advisory comes again, and finds its dead letter.
func (b *Bridge) process(work context.Context, m jetstream.Msg) {
	ctx, cancel := context.WithTimeout(work, handleTimeout)
	defer cancel()
	wait, err := b.handle(ctx, m)
	switch {
	case err != nil:
		b.report(ctx, m, err)
		_ = m.NakWithDelay(retryDelay(m))
	case wait > 0:
		_ = m.NakWithDelay(wait)
	default:
		_ = m.Ack()
	}
}

// retryDelay doubles with each delivery of an advisory.
func retryDelay(m jetstream.Msg) time.Duration {
	const doublings = 6
	meta, err := m.Metadata()
	if err != nil {
		return minRetry
	}
	return min(minRetry<<min(max(meta.NumDelivered, 1)-1, doublings), maxRetry)
}

func (b *Bridge) report(ctx context.Context, m jetstream.Msg, err error) {
	if left, ok := b.failed.allow(time.Now()); ok {
		b.cfg.Log.LogAttrs(ctx, slog.LevelError, "dead letter not captured, will try again", slog.String("advisory", m.Subject()),
			slog.String("error", oneLine(err.Error())), slog.Uint64("similar_left_out", left))
	}
}

// A logLimit lets one line pass every ten seconds, so that an outage does not fill
// the disk.
type logLimit struct {
	next time.Time
	left uint64
}

func (l *logLimit) allow(now time.Time) (left uint64, ok bool) {
	const every = 10 * time.Second
	if now.Before(l.next) {
		l.left++
		return 0, false
	}
	left, l.left, l.next = l.left, 0, now.Add(every)
	return left, true
}

// handle makes a dead letter of an advisory, if it is one. It returns how long to
// wait before that can be said.
func (b *Bridge) handle(ctx context.Context, m jetstream.Msg) (wait time.Duration, err error) {
	a, err := readAdvisory(m)
	if err != nil {
		if left, ok := b.malformed.allow(time.Now()); ok {
			const enough = 256 // whoever sent it chose the subject
			b.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "advisory cannot be read, it is left out",
				slog.String("advisory", shorten(m.Subject(), enough)), slog.String("error", oneLine(err.Error())),
				slog.Uint64("similar_left_out", left))
		}
		return b.skip(ctx, nil, SkipMalformed)
	}
	switch {
	case a.Stream == AdvisoryStream || a.Stream == b.store.cfg.StreamName() || a.Stream == b.store.cfg.marksName() ||
		b.cfg.Ours != nil && b.cfg.Ours(a.Stream, a.Consumer):
		return b.skip(ctx, a, SkipOwn)
	case isBucket(a.Stream):
		return b.skip(ctx, a, SkipBucket)
	case a.Domain != b.domain:
		return b.skip(ctx, a, SkipOtherDomain)
	}
	stream, err := b.store.js.Stream(ctx, a.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return b.skip(ctx, a, SkipStreamGone)
	}
	if err != nil {
		return 0, fmt.Errorf("stream %q: %w", a.Stream, err)
	}
	info := stream.CachedInfo()
	switch {
	case slices.ContainsFunc(info.Config.Subjects, func(s string) bool { return strings.HasPrefix(s, subjectPrefix) }):
		return b.skip(ctx, a, SkipOwn) // a dead-letter stream, of this or another store
	case copiesBucket(&info.Config):
		return b.skip(ctx, a, SkipBucket)
	case info.Created.After(a.Time.Add(clockSkew)):
		return b.skip(ctx, a, SkipStreamGone) // the sequence is of another message now
	}
	if !a.exhausted {
		return b.terminated(ctx, a, info)
	}
	// The server's clock, since the advisory's time is the server's.
	now := info.TimeStamp
	if now.IsZero() {
		now = time.Now()
	}
	if rest := a.Time.Add(b.cfg.Grace).Sub(now); rest > 0 {
		return min(rest, b.cfg.Grace), nil
	}
	return b.exhausted(ctx, m, a, stream)
}

func (b *Bridge) skip(ctx context.Context, a *advisory, why string) (time.Duration, error) {
	if a != nil && b.cfg.Log.Enabled(ctx, slog.LevelDebug) {
		b.cfg.Log.LogAttrs(ctx, slog.LevelDebug, "advisory makes no dead letter", slog.String("why", why), slog.String("stream", a.Stream),
			slog.String("consumer", a.Consumer), slog.Uint64("stream_sequence", a.StreamSeq))
	}
	if b.cfg.Skipped != nil {
		b.cfg.Skipped(ctx, why)
	}
	return 0, nil
}

// look fetches what an advisory is about. why is not "" if the server contradicts the
// advisory. The message is nil if it is gone.
func (b *Bridge) look(ctx context.Context, a *advisory) (consumer *jetstream.ConsumerInfo, msg *jsapi.Message, why string, err error) {
	consumer, err = b.consumer(ctx, a)
	if err != nil {
		return nil, nil, "", err
	}
	switch {
	case consumer == nil || consumer.Created.After(a.Time.Add(clockSkew)) || consumer.Delivered.Stream < a.StreamSeq:
		return nil, nil, SkipConsumerGone, nil // if the consumer is created again, it gets the message again
	case !a.fits(consumer):
		return nil, nil, SkipUnproven, nil
	}
	if msg, err = b.message(ctx, a); err != nil || msg == nil {
		return consumer, nil, "", err
	}
	switch {
	case isBucketSubject(msg.Subject):
		return nil, nil, SkipBucket, nil
	case !isFor(&consumer.Config, msg.Subject):
		return nil, nil, SkipUnproven, nil
	}
	return consumer, msg, "", nil
}

// terminated handles a message that its consumer has terminated. On work queue and
// interest streams it is gone, unless other consumers need it.
func (b *Bridge) terminated(ctx context.Context, a *advisory, info *jetstream.StreamInfo) (time.Duration, error) {
	_, msg, why, err := b.look(ctx, a)
	if err != nil {
		return 0, err
	}
	if why != "" {
		return b.skip(ctx, a, why)
	}
	reason := ReasonExternalTerminated
	if msg == nil && slices.Contains(droppedReasons, a.Reason) {
		if info.Config.MaxMsgsPerSubject > 0 {
			return b.skip(ctx, a, SkipReplaced) // which is what such a stream is for
		}
		reason = ReasonExpired
	}
	return 0, b.capture(ctx, a.record(info, msg, reason))
}

// exhausted handles a message that the server has given up some time ago.
func (b *Bridge) exhausted(ctx context.Context, m jetstream.Msg, a *advisory, stream jetstream.Stream) (time.Duration, error) {
	info := stream.CachedInfo()
	consumer, msg, why, err := b.look(ctx, a)
	if err != nil {
		return 0, err
	}
	switch {
	case why != "":
		return b.skip(ctx, a, why)
	case msg == nil && info.Config.Retention != jetstream.LimitsPolicy:
		return b.skip(ctx, a, SkipAcknowledged)
	case msg != nil && consumer.NumRedelivered == 0 && consumer.Config.MaxDeliver != 1:
		// The ack floor would not tell: the server moves it past what it gives up.
		// But it counts that as redelivered until it is acknowledged or gone. It
		// hides the number where nothing is ever delivered twice.
		return b.skip(ctx, a, SkipAcknowledged)
	}
	reason := ReasonExternalMaxDeliver
	if msg == nil {
		reason = ReasonExpired
	}
	if err := b.capture(ctx, a.record(info, msg, reason)); err != nil {
		return 0, err
	}
	if msg == nil {
		return 0, nil
	}
	return b.release(ctx, m, a, stream, consumer)
}

// consumer returns nil if the consumer is gone.
func (b *Bridge) consumer(ctx context.Context, a *advisory) (*jetstream.ConsumerInfo, error) {
	var info *jetstream.ConsumerInfo
	pull, err := b.store.js.Consumer(ctx, a.Stream, a.Consumer)
	if err == nil {
		info = pull.CachedInfo()
	} else if errors.Is(err, jetstream.ErrNotPullConsumer) {
		var push jetstream.PushConsumer
		if push, err = b.store.js.PushConsumer(ctx, a.Stream, a.Consumer); err == nil {
			info = push.CachedInfo()
		}
	}
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil, nil //nolint:nilnil // it is gone, which is no error
	}
	if err != nil {
		return nil, fmt.Errorf("consumer %q of stream %q: %w", a.Consumer, a.Stream, err)
	}
	return info, nil
}

func (b *Bridge) capture(ctx context.Context, r *Record) error {
	var more nats.Header
	if b.cfg.Trace != nil {
		ctx, more = b.cfg.Trace(ctx, r)
	}
	captured, err := b.store.CaptureNext(ctx, r, more)
	if b.cfg.Captured != nil {
		b.cfg.Captured(ctx, r, captured, err)
	}
	return err
}

// release settles a captured message in its consumer's name. The server keeps what
// it gave up in work queue and interest streams for ever, and counts it as
// redelivered in all of them. It returns how long to wait before that can be done: a
// message that the consumer may still have in work is never settled.
//
// The acknowledgement leaves the message to other consumers of an interest stream,
// whatever they do meanwhile. Deleting it once they are past it would not: a consumer
// is also past what the server gave up for it, which has still to be captured.
func (b *Bridge) release(
	ctx context.Context, m jetstream.Msg, a *advisory, stream jetstream.Stream, consumer *jetstream.ConsumerInfo,
) (wait time.Duration, err error) {
	queue := stream.CachedInfo().Config.Retention == jetstream.WorkQueuePolicy
	explicit := consumer.Config.AckPolicy == jetstream.AckExplicitPolicy
	if !queue && !explicit {
		return 0, nil
	}
	if consumer.NumAckPending > 0 && consumer.AckFloor.Stream < a.StreamSeq {
		if meta, err := m.Metadata(); err != nil || meta.NumDelivered < releaseTries {
			return retryDelay(m), nil
		}
		b.unsettled(ctx, a, errInWork)
		return 0, nil
	}
	if queue {
		if err = stream.DeleteMsg(ctx, a.StreamSeq); err == nil {
			return 0, nil
		}
	}
	if explicit {
		const timeout = 5 * time.Second
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		_, err = b.store.nc.RequestWithContext(ctx, a.ackSubject(), []byte("+ACK"))
		if err == nil || errors.Is(err, nats.ErrNoResponders) { // without its consumer it is nobody's
			return 0, nil
		}
	}
	if err != nil && !b.store.nc.IsConnected() {
		return 0, fmt.Errorf("settle message %d of stream %q for consumer %q: %w", a.StreamSeq, a.Stream, a.Consumer, err)
	}
	if err != nil { // not allowed, most likely, and it will not be next time
		b.unsettled(ctx, a, err)
	}
	return 0, nil
}

var errInWork = errors.New("its consumer has had it, or an earlier message, in work all the time")

// unsettled says that a message is left in its stream.
func (b *Bridge) unsettled(ctx context.Context, a *advisory, err error) {
	if left, ok := b.failed.allow(time.Now()); ok {
		b.cfg.Log.LogAttrs(ctx, slog.LevelWarn, "message is captured, and could not be settled in its stream", slog.String("stream", a.Stream),
			slog.String("consumer", a.Consumer), slog.Uint64("stream_sequence", a.StreamSeq),
			slog.String("error", oneLine(err.Error())), slog.Uint64("similar_left_out", left))
	}
}

// message fetches a message from the leader of its stream, and returns nil if it is
// gone. A direct get, which jetstream prefers, may be answered by a replica that has
// not got it yet; and jetstream has no answer for headers that it cannot read.
func (b *Bridge) message(ctx context.Context, a *advisory) (*jsapi.Message, error) {
	m, err := b.store.api.Get(ctx, a.Stream, a.StreamSeq)
	if err != nil {
		return nil, fmt.Errorf("message %d of stream %q: %w", a.StreamSeq, a.Stream, err)
	}
	return m, nil
}
