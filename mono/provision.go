package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/jsapi"
)

const (
	provisionTries = 5
	provisionWait  = 250 * time.Millisecond
	arrangeTries   = 10
	arrangeWait    = 100 * time.Millisecond
	restoreTimeout = 10 * time.Second

	// deletionTime is how long the server may take to delete a stream. It says that
	// the stream and its consumers are gone before it moves their folder away. A
	// stream that is made anew before that loses its own folder, and takes no message
	// until the server is started again.
	deletionTime = 2 * time.Second
)

// provision makes the server's streams and consumers what the registrations
// ask for. It is repeated when another instance was quicker, and while a new
// cluster is not ready.
func (r *run) provision(ctx context.Context) error {
	r.topologyMu.Lock()
	defer r.topologyMu.Unlock()
	return r.provisionLocked(ctx)
}

func (r *run) provisionLocked(ctx context.Context) error {
	if len(r.streamRegs) == 0 {
		r.lookForStreams(ctx)
		return nil
	}
	for try := 1; ; try++ {
		err := r.provisionOnce(ctx)
		if err == nil {
			r.provisioned = time.Now()
			return nil
		}
		unready, raced := provisionRetry(err)
		if !unready && (!raced || try == provisionTries) {
			return err
		}
		select {
		case <-time.After(provisionWait):
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// provisionRetry tells errors that go away: a cluster that is forming, and
// another instance that made the same change first.
func provisionRetry(err error) (unready, raced bool) {
	return jsapi.Is(err, jsapi.CodeTemporarilyUnavailable),
		jsapi.Is(err, jsapi.CodeSubjectsOverlap, jsapi.CodeStreamNameExists, jsapi.CodeConsumerExists)
}

// lookForStreams finds the streams of others that store this App's events, for
// an App that needs none itself. A server without JetStream, or one that does
// not let us ask, is no reason not to start.
func (r *run) lookForStreams(ctx context.Context) {
	const limit = 2 * time.Second
	if len(r.app.registry.GetAllEvents()) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := r.provisionOnce(ctx)
	if err != nil && !errors.Is(err, jetstream.ErrJetStreamNotEnabled) && !errors.Is(err, nats.ErrNoResponders) {
		r.log.LogAttrs(r.base, slog.LevelWarn, "streams not listed; events of streams made elsewhere are published over core NATS",
			errorAttrs(err, 0)...)
	}
}

func (r *run) provisionOnce(ctx context.Context) error {
	if err := r.arrangeStreams(ctx, r.app.cfg.updateStreams); err != nil {
		return err
	}
	done := make(map[string]bool)
	for _, reg := range r.streamRegs {
		if name := reg.info.Stream; !done[name] {
			done[name] = true
			if err := r.provisionConsumers(ctx, name); err != nil {
				return err
			}
		}
	}
	return nil
}

// provisionConsumers makes the consumers of one stream.
func (r *run) provisionConsumers(ctx context.Context, name string) error {
	var stream jetstream.Stream
	for _, reg := range r.streamRegs {
		if reg.info.Stream != name {
			continue
		}
		if stream == nil {
			var err error
			if stream, err = r.js.Stream(ctx, name); err != nil {
				return fmt.Errorf("look up stream %q: %w", name, jetStreamError(err))
			}
			r.noteStream(name, stream.CachedInfo().Created)
		}
		if err := r.provisionConsumer(ctx, stream, reg); err != nil {
			return fmt.Errorf("consumer %q of stream %q, of module %q for event %s: %w",
				reg.info.Durable, name, reg.info.Module, reg.info.Event, jetStreamError(err))
		}
	}
	return nil
}

// arrangeStreams plans and makes changes until there is nothing left to change:
// the server has no compare-and-set for a stream's configuration, so that
// another instance may have overwritten ours. What was changed is looked at
// again after a while that differs from instance to instance.
func (r *run) arrangeStreams(ctx context.Context, updates bool) error {
	for try := 1; ; try++ {
		have, err := r.listStreams(ctx)
		if err != nil {
			return fmt.Errorf("list streams: %w", jetStreamError(err))
		}
		r.noteSubjects(have)
		t, err := planTopology(r.app.registry.GetAllEvents(), r.streamRegs, have, updates)
		if err != nil {
			return err
		}
		if len(t.changes) == 0 || try == arrangeTries {
			r.setTopology(t)
			return nil
		}
		if err := r.apply(ctx, t.changes); err != nil {
			return err
		}
		select {
		case <-time.After(arrangeWait/2 + rand.N(arrangeWait)): //nolint:gosec // nobody gains by guessing it
		case <-ctx.Done():
			return fmt.Errorf("look at the changed streams again: %w", context.Cause(ctx))
		}
	}
}

// apply makes the changes. When one is refused it gives subjects back that were
// taken from streams for it.
//
// An interest stream drops what comes before it has a consumer that wants it, and
// says that it is stored. So its consumers are there before subjects and sources are.
func (r *run) apply(ctx context.Context, changes []streamChange) error {
	for i, c := range changes {
		var err error
		if !c.create && c.cfg.Retention == InterestPolicy {
			err = r.provisionConsumers(ctx, c.cfg.Name)
			if jsapi.Is(err, jsapi.CodeFilterNotSubset) {
				err = nil // an old server wants the subjects first
			}
		}
		if err == nil {
			err = r.change(ctx, c)
		}
		if err == nil {
			continue
		}
		for _, done := range slices.Backward(changes[:i]) {
			if done.undo == nil {
				continue
			}
			if _, undoErr := r.js.UpdateStream(ctx, *done.undo); undoErr != nil {
				err = errors.Join(err, fmt.Errorf("give stream %q its subjects back: %w", done.cfg.Name, undoErr))
			}
		}
		return err
	}
	return nil
}

func (r *run) listStreams(ctx context.Context) ([]StreamConfig, error) {
	var have []StreamConfig
	list := r.js.ListStreams(ctx)
	for info := range list.Info() {
		have = append(have, info.Config)
	}
	return have, list.Err()
}

func (r *run) change(ctx context.Context, c streamChange) error {
	act, verb := r.js.UpdateStream, "update"
	if c.create {
		act, verb = r.js.CreateStream, "create"
	}
	if _, err := act(ctx, c.cfg); err != nil {
		return fmt.Errorf("%s stream %q: %w", verb, c.cfg.Name, jetStreamError(err))
	}
	r.log.LogAttrs(r.base, slog.LevelInfo, "stream arranged",
		slog.String("stream", c.cfg.Name), slog.String("done", verb), slog.String("why", c.why))
	if c.warn {
		r.log.LogAttrs(r.base, slog.LevelWarn, "a stream that no module of this app names still gets the events; "+
			"delete it if its consumer is gone, or it fills up", slog.String("stream", c.cfg.Name))
	}
	return nil
}

// provisionConsumer creates a durable consumer, or brings the settings of an
// existing one up to date, which its position survives.
func (r *run) provisionConsumer(ctx context.Context, stream jetstream.Stream, reg *streamRegistration) error {
	want := reg.cfg.Consumer
	cons, err := stream.Consumer(ctx, want.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if err := r.keepOldReplays(ctx, stream, &want); err != nil {
			return err
		}
		if cons, err = stream.CreateConsumer(ctx, want); err != nil {
			return err
		}
		r.provisionReplays(ctx, stream, reg, cons.CachedInfo().Config)
		return nil
	}
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return fmt.Errorf("%w: it exists as a push consumer; set Consumer.Durable to another name", ErrStreamConflict)
	}
	if err != nil {
		return err
	}
	have := cons.CachedInfo().Config
	filters := filtersOf(have)
	old := dlq.OldReplaySubjects(reg.info.Stream, reg.info.Durable)
	if own := without(filters, old); !slices.Equal(own, []string{reg.info.Event.Subject}) {
		return fmt.Errorf("%w: it exists with filter subject %q, not %q; set Consumer.Durable to another name, or delete it to lose its position",
			ErrStreamConflict, strings.Join(filters, ", "), reg.info.Event.Subject)
	}
	if have.AckPolicy != want.AckPolicy {
		return fmt.Errorf("%w: it exists with ack policy %v, and each message must be acked by itself; set Consumer.Durable to another name",
			ErrStreamConflict, have.AckPolicy)
	}
	if have.FilterSubject == "" { // with that of earlier versions for replays, see migrateReplays
		want.FilterSubject, want.FilterSubjects = "", have.FilterSubjects
	}
	merged, changed := mergeConsumer(have, want)
	if changed {
		if cons, err = stream.UpdateConsumer(ctx, merged); err != nil {
			return err
		}
		r.log.LogAttrs(r.base, slog.LevelInfo, "consumer changed", consumerAttrs(reg.info)...)
	}
	r.provisionReplays(ctx, stream, reg, cons.CachedInfo().Config)
	return nil
}

// filtersOf lists the subjects that a consumer filters, which the server writes in
// one of two ways.
func filtersOf(c ConsumerConfig) []string {
	if c.FilterSubject != "" {
		return []string{c.FilterSubject}
	}
	return c.FilterSubjects
}

// mergeConsumer puts what is asked for over what exists. Fields left at zero that
// have no default of ours ask for nothing: an operator's pause, or replicas, stay.
func mergeConsumer(have, want ConsumerConfig) (merged ConsumerConfig, changed bool) {
	if len(want.Metadata) > 0 {
		metadata := maps.Clone(want.Metadata)
		for k, v := range have.Metadata { // the server adds its own
			if _, asked := metadata[k]; !asked {
				metadata[k] = v
			}
		}
		want.Metadata = metadata
	}
	merged = have
	m, w := reflect.ValueOf(&merged).Elem(), reflect.ValueOf(want)
	for i := range w.NumField() {
		if !w.Field(i).IsZero() && !reflect.DeepEqual(w.Field(i).Interface(), m.Field(i).Interface()) {
			m.Field(i).Set(w.Field(i))
			changed = true
		}
	}
	return merged, changed
}

// streamGone reports whether a stream that was there is not any more. It may still
// be being deleted, so whoever makes it anew waits for deletionTime before.
func (r *run) streamGone() bool {
	ctx, cancel := context.WithTimeout(r.whileConnected(), restoreTimeout)
	defer cancel()
	r.topologyMu.Lock()
	names := slices.Collect(maps.Keys(r.created))
	r.topologyMu.Unlock()
	return slices.ContainsFunc(names, func(name string) bool {
		_, err := r.js.Stream(ctx, name)
		return errors.Is(err, jetstream.ErrStreamNotFound)
	})
}

// restore brings back what is gone from the server: streams, their subjects and
// sources, and consumers. It does nothing when that has been done since the
// moment at which something was missed: many miss it at once.
func (r *run) restore(missed time.Time) error {
	ctx, cancel := context.WithTimeout(r.whileConnected(), restoreTimeout)
	defer cancel()
	r.topologyMu.Lock()
	defer r.topologyMu.Unlock()
	if r.provisioned.After(missed) {
		return nil
	}
	return r.provisionLocked(ctx)
}

// noteStream remembers when a stream was made. When it is another one than
// before, its consumers here forget the messages of the old one, before they can
// get any of the new.
func (r *run) noteStream(name string, created time.Time) {
	before, known := r.created[name]
	r.created[name] = created
	if !known || before.Equal(created) {
		return
	}
	select {
	case <-r.ready:
	default:
		return // nothing consumes yet
	}
	for _, c := range r.streams {
		if c.info.Stream == name {
			c.created.Store(&created)
			c.pull.forget()
			c.held.forget()
			c.replays.forget()
		}
	}
}

// jetStreamError adds what an error of the JetStream API means for the user.
func jetStreamError(err error) error {
	if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
		return fmt.Errorf("the server has no JetStream; start nats-server with -js, or enable it for the account: %w", err)
	}
	api, ok := errors.AsType[*jetstream.APIError](err)
	switch {
	case !ok:
		return err
	case api.ErrorCode == jsapi.CodeWorkQueueUnfiltered || api.ErrorCode == jsapi.CodeWorkQueueNotUnique:
		return fmt.Errorf("%w: another consumer of this work queue takes the event already, and only one can; name another stream: %w",
			ErrStreamConflict, api)
	}
	return refusal(api)
}

// warnOldServer says what goes wrong with streams that source from others where
// the server does not keep, nor tell, how far they are.
func (r *run) warnOldServer(t *topology) {
	const major, minor = 2, 15
	if t == nil || !t.sources {
		return
	}
	var a, b int
	version := r.nc.ConnectedServerVersion()
	if _, err := fmt.Sscanf(version, "%d.%d", &a, &b); err != nil || a > major || a == major && b >= minor {
		return
	}
	r.log.LogAttrs(r.base, slog.LevelWarn, "several streams want the same event, which needs nats-server 2.15 or later: "+
		"with this one, events may come twice after a restart of the server, and fan-out streams are not emptied and refuse when full",
		slog.String("server_version", version), slog.Any("fan_out_streams", t.fanOuts))
}
