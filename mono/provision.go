package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"reflect"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	provisionTries = 5
	provisionWait  = 250 * time.Millisecond
	restoreTimeout = 10 * time.Second
)

// provision makes the server's streams and consumers what the registrations
// ask for. It is repeated when another instance was quicker, and while a new
// cluster is not ready.
func (r *run) provision(ctx context.Context) error {
	r.topologyMu.Lock()
	defer r.topologyMu.Unlock()
	if len(r.streamRegs) == 0 {
		r.lookForStreams(ctx)
		return nil
	}
	for try := 1; ; try++ {
		err := r.provisionOnce(ctx)
		if err == nil {
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
	api, ok := errors.AsType[*jetstream.APIError](err)
	if !ok {
		return false, false
	}
	switch api.ErrorCode {
	case codeTemporarilyUnavailable:
		return true, false
	case codeSubjectsOverlap, codeStreamNameExists:
		return false, true
	}
	return false, false
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
	have, err := r.listStreams(ctx)
	if err != nil {
		return fmt.Errorf("list streams: %w", jetStreamError(err))
	}
	t, err := planTopology(r.app.registry.GetAllEvents(), r.streamRegs, have, r.app.cfg.updateStreams)
	if err != nil {
		return err
	}
	for _, c := range t.changes {
		if err := r.change(ctx, c); err != nil {
			return err
		}
	}
	r.topology.Store(t)
	streams := make(map[string]jetstream.Stream)
	for _, reg := range r.streamRegs {
		stream := streams[reg.info.Stream]
		if stream == nil {
			if stream, err = r.js.Stream(ctx, reg.info.Stream); err != nil {
				return fmt.Errorf("look up stream %q: %w", reg.info.Stream, jetStreamError(err))
			}
			streams[reg.info.Stream] = stream
			r.created[reg.info.Stream] = stream.CachedInfo().Created
		}
		if err := r.provisionConsumer(ctx, stream, reg); err != nil {
			return fmt.Errorf("consumer %q of stream %q, of module %q for event %s: %w",
				reg.info.Durable, reg.info.Stream, reg.info.Module, reg.info.Event, jetStreamError(err))
		}
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
	return nil
}

// provisionConsumer creates a durable consumer, or brings the settings of an
// existing one up to date, which its position survives.
func (r *run) provisionConsumer(ctx context.Context, stream jetstream.Stream, reg *streamRegistration) error {
	want := reg.serverConfig()
	cons, err := stream.Consumer(ctx, want.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		_, err = stream.CreateConsumer(ctx, want)
		return err
	}
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return fmt.Errorf("%w: it exists as a push consumer; set Consumer.Durable to another name", ErrStreamConflict)
	}
	if err != nil {
		return err
	}
	have := cons.CachedInfo().Config
	if have.FilterSubject != want.FilterSubject {
		return fmt.Errorf("%w: it exists with filter subject %q, not %q; set Consumer.Durable to another name, or delete it to lose its position",
			ErrStreamConflict, have.FilterSubject, want.FilterSubject)
	}
	merged, changed := mergeConsumer(have, want)
	if !changed {
		return nil
	}
	if _, err = stream.UpdateConsumer(ctx, merged); err != nil {
		return err
	}
	r.log.LogAttrs(r.base, slog.LevelInfo, "consumer changed", consumerAttrs(reg.info)...)
	return nil
}

// mergeConsumer puts what is asked for over what exists. Fields left at zero ask
// for nothing: an operator's pause, or replicas, stay.
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

// restore brings back a consumer that is gone, and with it whatever else of the
// topology is. newStream reports that its stream is another one than before.
func (r *run) restore(c *streamConsumer) (newStream bool, err error) {
	ctx, cancel := context.WithTimeout(r.work, restoreTimeout)
	defer cancel()
	before := r.streamCreated(c.info.Stream)
	if err := r.provision(ctx); err != nil {
		return false, err
	}
	return !before.Equal(r.streamCreated(c.info.Stream)), nil
}

func (r *run) streamCreated(name string) time.Time {
	r.topologyMu.Lock()
	defer r.topologyMu.Unlock()
	return r.created[name]
}

// jetStreamError adds what an error of the JetStream API means for the user.
func jetStreamError(err error) error {
	if errors.Is(err, jetstream.ErrJetStreamNotEnabled) || errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount) {
		return fmt.Errorf("the server has no JetStream; start nats-server with -js, or enable it for the account: %w", err)
	}
	if api, ok := errors.AsType[*jetstream.APIError](err); ok {
		return refusal(api)
	}
	return err
}

// A janitor empties fan-out streams of what every target has copied. They are
// limits streams that refuse new messages when full, so that nothing is lost on
// the way; without it they would fill up.
type janitor struct {
	quit chan struct{}
	wg   sync.WaitGroup
}

const janitorInterval = 30 * time.Second

func (r *run) startJanitor() {
	t := r.topology.Load()
	if t == nil || len(t.fanOuts) == 0 {
		return
	}
	j := &janitor{quit: make(chan struct{})}
	r.janitor = j
	j.wg.Go(func() {
		tick := time.NewTicker(janitorInterval)
		defer tick.Stop()
		copied := make(map[string]uint64)
		for {
			select {
			case <-j.quit:
				return
			case <-tick.C:
				r.sweepFanOuts(t.fanOuts, copied)
			}
		}
	})
}

func (j *janitor) stop() {
	close(j.quit)
	j.wg.Wait()
}

// sweepFanOuts purges each fan-out stream up to what all of its targets had
// copied at the last sweep. That one interval is for a target that had seen a
// message and not stored it yet when its server went down.
func (r *run) sweepFanOuts(names []string, copied map[string]uint64) {
	ctx, cancel := context.WithTimeout(r.work, restoreTimeout)
	defer cancel()
	now := make(map[string]uint64)
	targets := make(map[string]bool)
	list := r.js.ListStreams(ctx)
	for info := range list.Info() {
		for _, s := range info.Sources {
			if seq, ok := now[s.Name]; !ok || s.Seq < seq {
				now[s.Name] = s.Seq
			}
			targets[s.Name] = true
		}
	}
	if list.Err() != nil {
		return // next time
	}
	for _, name := range names {
		upTo := min(copied[name], now[name])
		copied[name] = now[name]
		if upTo == 0 || !targets[name] {
			continue
		}
		stream, err := r.js.Stream(ctx, name)
		if err != nil {
			continue
		}
		if st := stream.CachedInfo().State; st.Msgs == 0 || st.FirstSeq > upTo {
			continue
		}
		if err := stream.Purge(ctx, jetstream.WithPurgeSequence(upTo+1)); err != nil {
			r.log.LogAttrs(r.base, slog.LevelWarn, "fan-out stream not purged",
				append(errorAttrs(err, 0), slog.String("stream", name))...)
		}
	}
}
