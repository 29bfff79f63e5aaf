package mono

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// A replayIntake fetches what is replayed to a consumer. Replays have a durable of
// their own, <durable>_replay: a durable with two filters, one of them over many
// subjects, makes the server walk through its stream for each message.
//
// Both pullers fill the same queue. A consumer that nobody replays to has no second
// puller.
type replayIntake struct {
	pull    atomic.Pointer[puller]
	created atomic.Int64             // when the durable was made, Unix time in nanoseconds; 0: there was none
	last    atomic.Pointer[delivery] // that something was sent for

	mu    sync.Mutex // held while the puller starts
	ended bool
}

// replayState is what a run knows of replays on the server.
type replayState struct {
	wake   chan struct{}         // a consumer is woken
	byWake []*streamRegistration // sorted by wake subject; not changed after the start
	next   int                   // where the next look at woken consumers begins

	// Guarded by topologyMu.
	subjects map[string][]string     // of each stream, when streams were listed last
	made     map[[2]string]time.Time // by stream and consumer: when the durable for replays was made, if there is one
	old      map[[2]string]bool      // consumers that have, or may have, the filter of earlier versions
}

const (
	wakeRest    = 200 * time.Millisecond // between looks at consumers that were woken
	wakeRetry   = time.Second            // after one that failed
	mostWoken   = 64                     // consumers in one look
	lookTimeout = 5 * time.Second        // for one consumer

	// oldReplayGrace is how long the old subject stays in a stream after its last
	// message: a tool of an earlier version may still be sending. What it sends later
	// is refused, and released by the tool.
	oldReplayGrace = time.Minute
)

// startWakes subscribes to what tools publish when they have made a durable for
// replays. The janitor finds it by itself, but later. Anybody may publish there: a
// wake-up names a consumer and says no more than that it should be looked at.
func (r *run) startWakes() error {
	if len(r.streamRegs) == 0 {
		return nil
	}
	r.replays.wake = make(chan struct{}, 1)
	// A map by subject would take many times the memory. Subjects come seldom.
	r.replays.byWake = slices.SortedFunc(slices.Values(r.streamRegs), func(a, b *streamRegistration) int {
		return cmp.Compare(a.wakeSubject(), b.wakeSubject())
	})
	_, err := r.nc.Subscribe(dlq.WakeSubjects, func(nm *nats.Msg) {
		i, found := slices.BinarySearchFunc(r.replays.byWake, nm.Subject, func(reg *streamRegistration, s string) int {
			return cmp.Compare(reg.wakeSubject(), s)
		})
		if found {
			r.replays.byWake[i].woken.Store(true)
			notify(r.replays.wake)
		}
	})
	if err != nil {
		return fmt.Errorf("subscribe to %q: %w", dlq.WakeSubjects, err)
	}
	return nil
}

func (r *streamRegistration) wakeSubject() string {
	return dlq.WakeSubject(r.info.Stream, r.info.Durable)
}

// provisionReplays prepares a consumer for what is replayed to it, if anything ever
// was. main is its own durable as the server has it. A failure keeps no App from
// starting: the janitor tries again. r.topologyMu is held.
func (r *run) provisionReplays(ctx context.Context, stream jetstream.Stream, reg *streamRegistration, main ConsumerConfig) {
	if err := r.tryProvisionReplays(ctx, stream, reg, main); err != nil {
		r.log.LogAttrs(r.base, slog.LevelWarn, "the consumer gets no replays yet; will try again", append(consumerAttrs(reg.info), errorAttrs(err, 0)...)...)
	}
}

func (r *run) tryProvisionReplays(ctx context.Context, stream jetstream.Stream, reg *streamRegistration, main ConsumerConfig) error {
	subjects := stream.CachedInfo().Config.Subjects
	if covers(subjects, dlq.ReplaySubjects(reg.info.Stream, reg.info.Durable)) {
		info, err := dlq.EnsureReplayConsumer(ctx, stream, main)
		if err != nil {
			return err
		}
		if r.replays.made == nil {
			r.replays.made = make(map[[2]string]time.Time)
		}
		r.replays.made[[2]string{reg.info.Stream, reg.info.Durable}] = info.Created
		if c := r.runningConsumer(reg.info); c != nil {
			if err := c.openReplays(info.Created); err != nil {
				return err
			}
		}
	}
	return r.migrateReplays(ctx, stream, reg.info)
}

// noteSubjects remembers the subjects of the streams. r.topologyMu is held.
func (r *run) noteSubjects(have []StreamConfig) {
	r.replays.subjects = make(map[string][]string, len(have))
	for _, s := range have {
		r.replays.subjects[s.Name] = s.Subjects
	}
}

// keepOldReplays gives a consumer that is made again the filter of earlier versions if
// its stream has replays by them: the consumer may not have handled all.
// r.topologyMu is held.
func (r *run) keepOldReplays(ctx context.Context, stream jetstream.Stream, want *ConsumerConfig) error {
	cfg := stream.CachedInfo().Config
	old := dlq.OldReplaySubjects(cfg.Name, want.Durable)
	if !covers(cfg.Subjects, old) && !r.replays.old[[2]string{cfg.Name, want.Durable}] {
		return nil
	}
	last, _, err := r.lastOn(ctx, cfg.Name, old)
	if err == nil && last > 0 {
		want.FilterSubjects, want.FilterSubject = []string{want.FilterSubject, old}, ""
	}
	return err
}

// runningConsumer returns the consumer, nil while the run starts.
func (r *run) runningConsumer(i Consumer) *streamConsumer {
	select {
	case <-r.ready:
	default:
		return nil
	}
	for _, c := range r.streams {
		if c.info.Stream == i.Stream && c.info.Durable == i.Durable {
			return c
		}
	}
	return nil
}

// startReplays begins to fetch replays if the durable for them was found.
func (c *streamConsumer) startReplays() {
	c.rt.topologyMu.Lock()
	created, found := c.rt.replays.made[[2]string{c.info.Stream, c.info.Durable}]
	c.rt.topologyMu.Unlock()
	if !found {
		return
	}
	if err := c.openReplays(created); err != nil {
		c.report(slog.LevelWarn, "replays are not fetched yet; will try again", nil, err)
		c.wakeReplays()
	}
}

// openReplays fetches from the durable for replays, which was made at the given time.
func (c *streamConsumer) openReplays(created time.Time) error {
	r := &c.replays
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return nil
	}
	r.created.Store(created.UnixNano())
	if p := r.pull.Load(); p != nil {
		if p.missing.Load() {
			p.found()
		}
		return nil
	}
	p := &puller{}
	p.init(c, dlq.ReplayConsumer(c.info.Durable))
	p.lost = func() {
		p.missing.Store(true)
		c.wakeReplays()
	}
	// Workers release to it as soon as they see it, and it must be there before its first
	// message can be. Until it is started it asks for none.
	p.missing.Store(true)
	r.pull.Store(p)
	if err := p.start(); err != nil {
		r.pull.Store(nil)
		return err
	}
	c.prior.reset()
	p.missing.Store(false)
	p.pull()
	return nil
}

// fetching reports whether replays are fetched. They are not if there never were any,
// or if their durable is gone.
func (r *replayIntake) fetching() bool {
	p := r.pull.Load()
	return p != nil && !p.missing.Load()
}

// wakeReplays has the janitor look for the durable for replays.
func (c *streamConsumer) wakeReplays() {
	c.woken.Store(true)
	notify(c.rt.replays.wake)
}

// resume goes on after a reconnect.
func (r *replayIntake) resume() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if p := r.pull.Load(); p != nil && !r.ended {
		p.expectEchoes()
		p.reset()
	}
}

// forget settles what is here from a stream that does not exist any more.
func (r *replayIntake) forget() {
	if p := r.pull.Load(); p != nil {
		p.forget()
	}
}

func (r *replayIntake) stopIntake(ctx context.Context) {
	r.mu.Lock()
	r.ended = true
	r.mu.Unlock()
	if p := r.pull.Load(); p != nil {
		p.stopIntake(ctx)
	}
}

func (r *replayIntake) stop() {
	if p := r.pull.Load(); p != nil {
		p.stop()
	}
}

// release makes room: the handler of these messages has returned.
func (c *streamConsumer) release(batch []*Msg) {
	c.pull.release(batch)
	if p := c.replays.pull.Load(); p != nil {
		p.release(batch)
	}
}

// health reports what keeps the consumer from getting messages, if anything. A durable
// for replays that was deleted does not: the next replay makes it again.
func (c *streamConsumer) health() error {
	if err := c.pull.health(); err != nil {
		return err
	}
	if p := c.replays.pull.Load(); p != nil && !p.missing.Load() {
		if err := p.health(); err != nil {
			return fmt.Errorf("replays: %w", err)
		}
	}
	return nil
}

// lastOf is where the last delivery is kept that was answered to d's durable.
func (c *streamConsumer) lastOf(d *delivery) *atomic.Pointer[delivery] {
	if d.isOfReplays() {
		return &c.replays.last
	}
	return &c.last
}

// pullerOf returns what a delivery came through.
func (c *streamConsumer) pullerOf(d *delivery) *puller {
	if d.isOfReplays() {
		return c.replays.pull.Load()
	}
	return &c.pull
}

// isOfReplays reports whether a delivery is of the durable for replays.
func (d *delivery) isOfReplays() bool { return d.replay != nil && !d.replay.Old }

// maybeSettled reports whether m is a replay that may have its outcome although it is
// delivered for the first time: the durable that delivered it before was deleted, or a
// tool of an earlier version has sent again what a newer one had sent.
func (c *streamConsumer) maybeSettled(m *Msg) bool {
	return m.replay != nil && (m.replay.Old || m.tel.Stored < c.replays.created.Load())
}

// lookAtWoken looks for the durables for replays of the consumers that were woken, of
// a bounded number at a time. It returns how long to wait before the next look.
func (r *run) lookAtWoken(ctx context.Context) time.Duration {
	if !r.nc.IsConnected() {
		notify(r.replays.wake)
		return wakeRetry
	}
	rest := wakeRest
	looked := 0
	for range r.streams {
		c := r.streams[r.replays.next%len(r.streams)]
		if !c.woken.Load() || c.replays.fetching() {
			c.woken.Store(false)
			r.replays.next++
			continue
		}
		if looked == mostWoken {
			notify(r.replays.wake)
			break
		}
		looked++
		r.replays.next++
		c.woken.Store(false)
		if err := r.lookForReplays(ctx, c); err != nil && ctx.Err() == nil {
			c.report(slog.LevelWarn, "replays are not fetched yet; will try again", nil, err)
			c.wakeReplays()
			rest = wakeRetry
		}
	}
	return rest
}

// lookForReplays begins to fetch replays if the stream takes any. The durable for them
// is made again if it is gone.
func (r *run) lookForReplays(ctx context.Context, c *streamConsumer) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	stream, err := r.js.Stream(ctx, c.info.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil // the consumer's own durable is gone as well, and its puller looks after that
	}
	if err != nil {
		return err
	}
	if !covers(stream.CachedInfo().Config.Subjects, dlq.ReplaySubjects(c.info.Stream, c.info.Durable)) {
		return nil
	}
	main, err := stream.Consumer(ctx, c.info.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	info, err := dlq.EnsureReplayConsumer(ctx, stream, main.CachedInfo().Config)
	if errors.Is(err, dlq.ErrReplayConsumer) {
		c.report(slog.LevelError, "the consumer gets no replays", nil, err)
		return nil
	}
	if err != nil {
		return err
	}
	return c.openReplays(info.Created)
}

// sweepReplays does what the janitor does for replays: it fetches them where that was
// missed, and migrates consumers that have the filter of earlier versions. It asks the
// server only about consumers whose stream has a subject for replays.
func (r *run) sweepReplays(ctx context.Context) error {
	var errs []error
	for _, c := range r.streams {
		look, migrate := r.replaysDue(c)
		if look {
			if err := r.lookForReplays(ctx, c); err != nil {
				errs = append(errs, fmt.Errorf("replays to consumer %q of stream %q: %w", c.info.Durable, c.info.Stream, err))
			}
		}
		if migrate {
			if err := r.migrate(ctx, c); err != nil {
				errs = append(errs, fmt.Errorf("migrate replays to consumer %q of stream %q: %w", c.info.Durable, c.info.Stream, err))
			}
		}
	}
	return errors.Join(errs...)
}

// replaysDue reports what is to be done for a consumer: to look for the durable for its
// replays, and to migrate it.
func (r *run) replaysDue(c *streamConsumer) (look, migrate bool) {
	r.topologyMu.Lock()
	defer r.topologyMu.Unlock()
	have := r.replays.subjects[c.info.Stream]
	look = covers(have, dlq.ReplaySubjects(c.info.Stream, c.info.Durable)) && !c.replays.fetching()
	migrate = covers(have, dlq.OldReplaySubjects(c.info.Stream, c.info.Durable)) || r.replays.old[[2]string{c.info.Stream, c.info.Durable}]
	return look, migrate
}

func (r *run) migrate(ctx context.Context, c *streamConsumer) error {
	ctx, cancel := context.WithTimeout(ctx, lookTimeout)
	defer cancel()
	r.topologyMu.Lock() // it changes a stream
	defer r.topologyMu.Unlock()
	stream, err := r.js.Stream(ctx, c.info.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	return r.migrateReplays(ctx, stream, c.info)
}

// migrateReplays takes from a consumer the second filter that earlier versions gave it
// for replays, step by step: first its stream refuses more of them, then what is there
// is handled, then the filter goes. It does what can be done now; the janitor does the
// rest. r.topologyMu is held.
func (r *run) migrateReplays(ctx context.Context, stream jetstream.Stream, i Consumer) error {
	if r.replays.old == nil {
		r.replays.old = make(map[[2]string]bool)
	}
	both, err := r.tryMigrateReplays(ctx, stream, i)
	if key := [2]string{i.Stream, i.Durable}; both || err != nil {
		r.replays.old[key] = true
	} else {
		delete(r.replays.old, key)
	}
	return err
}

// tryMigrateReplays reports whether the consumer still has the filter.
func (r *run) tryMigrateReplays(ctx context.Context, stream jetstream.Stream, i Consumer) (both bool, err error) {
	old := dlq.OldReplaySubjects(i.Stream, i.Durable)
	const tries = 3
	for range tries {
		cons, err := stream.Consumer(ctx, i.Durable)
		if errors.Is(err, jetstream.ErrConsumerNotFound) {
			return false, nil
		}
		if err != nil {
			return both, err
		}
		info := cons.CachedInfo()
		cfg := stream.CachedInfo().Config
		both = len(without(filtersOf(info.Config), old)) < len(filtersOf(info.Config))
		takes := len(without(cfg.Subjects, old)) < len(cfg.Subjects)
		if !both && !takes {
			return false, nil
		}
		last, stored, err := r.lastOn(ctx, i.Stream, old)
		if err != nil {
			return both, err
		}
		if takes {
			if last > 0 && time.Since(stored) < r.app.cfg.replayGrace {
				return both, nil
			}
			if cfg.Subjects = dlq.WithoutOldReplaySubjects(cfg, i.Durable); len(cfg.Subjects) == 0 && len(cfg.Sources) == 0 {
				return both, nil // the server would give it another subject
			}
			if stream, err = r.js.UpdateStream(ctx, cfg); err != nil {
				return both, err
			}
			r.log.LogAttrs(r.base, slog.LevelInfo, "stream takes no more replays of earlier versions", slog.String("stream", i.Stream), slog.String("subject", old))
			continue // something may have come in between
		}
		if last > info.AckFloor.Stream && (info.NumPending > 0 || info.NumAckPending > 0) {
			return true, nil // some may not be handled yet
		}
		next := info.Config
		next.FilterSubjects = without(filtersOf(next), old)
		if next.FilterSubject = ""; len(next.FilterSubjects) == 1 {
			next.FilterSubject, next.FilterSubjects = next.FilterSubjects[0], nil
		}
		// A server that was restarted answers the first update of a consumer with what it
		// was before. The next look tells.
		if _, err := stream.UpdateConsumer(ctx, next); err != nil {
			return true, err
		}
		r.log.LogAttrs(r.base, slog.LevelInfo, "consumer migrated: replays have a durable of their own", consumerAttrs(i)...)
	}
	return both, nil
}

// lastOn returns the sequence of the last message of a stream on subjects, 0 if there
// is none, and when it was stored. It asks the stream's leader: a replica may not have
// it yet.
func (r *run) lastOn(ctx context.Context, stream, subjects string) (sequence uint64, stored time.Time, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("look for messages on %q of stream %q: %w", subjects, stream, err)
		}
	}()
	m, err := r.api.Last(ctx, stream, subjects)
	if m == nil || err != nil {
		return 0, time.Time{}, err
	}
	return m.Sequence, m.Time, nil
}

// replayInfo asks about the durable for replays. It is nil if there is none.
func (c *streamConsumer) replayInfo(ctx context.Context) *jetstream.ConsumerInfo {
	if !c.replays.fetching() {
		return nil
	}
	consumer, err := c.rt.js.Consumer(ctx, c.info.Stream, dlq.ReplayConsumer(c.info.Durable))
	if err != nil {
		return nil
	}
	return consumer.CachedInfo()
}
