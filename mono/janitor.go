package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const janitorInterval = 30 * time.Second

// A janitor looks after the streams while an App with stream consumers runs.
//
// It makes the topology right again when something else changed it, and looks
// for what is replayed to consumers, see replayIntake. And it empties fan-out streams of what every target has copied: those are limits
// streams that refuse new messages when full, so that nothing is lost on the
// way, and would fill up without it.
type janitor struct {
	r       *run
	cancel  context.CancelFunc
	wg      sync.WaitGroup
	targets map[string]map[string]bool // of each fan-out stream, as seen so far
}

func (r *run) startJanitor() {
	if len(r.streamRegs) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(r.work)
	j := &janitor{r: r, cancel: cancel, targets: make(map[string]map[string]bool)}
	r.janitor = j
	j.wg.Go(func() { j.run(ctx) })
}

func (j *janitor) stop() {
	j.cancel()
	j.wg.Wait()
}

func (j *janitor) run(ctx context.Context) {
	tick := time.NewTicker(janitorInterval)
	defer tick.Stop()
	wake := j.r.replays.wake
	var rested <-chan time.Time // wake-ups are not looked at before
	for {
		select {
		case <-ctx.Done():
			return
		case <-wake:
			wake, rested = nil, time.After(j.r.lookAtWoken(ctx))
			continue
		case <-rested:
			wake, rested = j.r.replays.wake, nil
			continue
		case <-tick.C:
		}
		if !j.r.nc.IsConnected() {
			continue
		}
		if err := j.sweep(ctx); err != nil && ctx.Err() == nil {
			j.r.log.LogAttrs(j.r.base, slog.LevelWarn, "streams not looked after, will try again", errorAttrs(err, 0)...)
		}
	}
}

func (j *janitor) sweep(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, restoreTimeout)
	defer cancel()
	if err := j.arrange(ctx); err != nil {
		return err
	}
	return errors.Join(j.r.sweepReplays(ctx), j.purgeFanOuts(ctx))
}

func (j *janitor) purgeFanOuts(ctx context.Context) error {
	t := j.r.topology.Load()
	if len(t.fanOuts) == 0 {
		return nil
	}
	copied, err := j.copied(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, name := range t.fanOuts {
		if err := j.purge(ctx, name, copied[name]); err != nil {
			errs = append(errs, fmt.Errorf("purge fan-out stream %q: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// arrange makes the topology right. Settings are left alone: another version of
// the App may have asked for others since.
func (j *janitor) arrange(ctx context.Context) error {
	j.r.topologyMu.Lock()
	defer j.r.topologyMu.Unlock()
	err := j.r.arrangeStreams(ctx, false)
	if errors.Is(err, ErrStreamConflict) {
		return nil
	}
	return err
}

// copied returns, for each stream that others source from, up to which sequence
// all of them have it.
func (j *janitor) copied(ctx context.Context) (map[string]uint64, error) {
	upTo := make(map[string]uint64)
	seen := make(map[string]map[string]bool)
	list := j.r.js.ListStreams(ctx)
	for info := range list.Info() {
		for _, s := range info.Config.Sources {
			seq := sourceSeq(info, s)
			if least, ok := upTo[s.Name]; !ok || seq < least {
				upTo[s.Name] = seq
			}
			if seen[s.Name] == nil {
				seen[s.Name] = make(map[string]bool)
			}
			seen[s.Name][info.Config.Name] = true
		}
	}
	if err := list.Err(); err != nil {
		return nil, err
	}
	// A list may lack a stream whose server is down.
	for owner, targets := range j.targets {
		for target := range targets {
			if seen[owner][target] {
				continue
			}
			if _, err := j.r.js.Stream(ctx, target); errors.Is(err, jetstream.ErrStreamNotFound) {
				continue // deleted
			}
			upTo[owner] = 0
			if seen[owner] == nil {
				seen[owner] = make(map[string]bool)
			}
			seen[owner][target] = true
		}
	}
	j.targets = seen
	return upTo, nil
}

// sourceSeq is the last sequence that the stream has from a source, 0 if it does
// not say: an offline stream is listed without that.
func sourceSeq(info *jetstream.StreamInfo, source *jetstream.StreamSource) uint64 {
	for _, s := range info.Sources {
		if s.Name == source.Name && s.FilterSubject == source.FilterSubject {
			return s.Seq
		}
	}
	return 0
}

func (j *janitor) purge(ctx context.Context, name string, upTo uint64) error {
	if upTo == 0 {
		return nil
	}
	stream, err := j.r.js.Stream(ctx, name)
	if err != nil {
		return err
	}
	if st := stream.CachedInfo().State; st.Msgs == 0 || st.FirstSeq > upTo {
		return nil
	}
	return stream.Purge(ctx, jetstream.WithPurgeSequence(upTo+1))
}
