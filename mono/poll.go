package mono

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/telemetry/messaging"
)

// How often the server is asked about the consumers, and for how long after
// somebody has collected metrics.
const (
	pollInterval = 15 * time.Second
	pollPatience = 5 * time.Minute
	pollTimeout  = 5 * time.Second // for one consumer
)

func (r *run) startPolls() {
	if len(r.streams) == 0 && r.dead == nil {
		return
	}
	if r.dead != nil {
		r.openGauge = r.newOpenGauge()
	}
	ctx, cancel := context.WithCancel(r.base)
	r.stopPolls = cancel
	r.polls.Go(func() {
		r.pollConsumers(ctx)
		r.forgetPolls()
	})
}

func (r *run) forgetPolls() {
	for _, c := range r.streams {
		c.tel.SetState(nil)
	}
	if r.dead != nil {
		r.tel.SetOpenDeadLetters(r.dead.stream, nil)
	}
}

// pollConsumers asks the server about each durable consumer, and about open dead
// letters, while somebody collects metrics. It ends with ctx. What cannot be asked
// stays as it was.
func (r *run) pollConsumers(ctx context.Context) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	var wanted time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.tel.Collected():
			first := time.Since(wanted) > pollPatience
			wanted = time.Now()
			if !first {
				continue
			}
			tick.Reset(pollInterval)
		case <-tick.C:
			if time.Since(wanted) > pollPatience {
				r.forgetPolls() // who asks no more has nothing to say
				continue
			}
		}
		for _, c := range r.streams {
			c.poll(ctx)
		}
		r.pollDeadLetters(ctx)
	}
}

func (c *streamConsumer) poll(ctx context.Context) {
	if !c.rt.nc.IsConnected() {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	consumer, err := c.rt.js.Consumer(ctx, c.info.Stream, c.info.Durable)
	if err != nil {
		return
	}
	info := consumer.CachedInfo() // just fetched
	s := &messaging.ConsumerState{
		Pending: info.NumPending, AckPending: info.NumAckPending, Limit: info.Config.MaxAckPending, Waiting: info.NumWaiting,
	}
	all := []*jetstream.ConsumerInfo{info}
	if replays := c.replayInfo(ctx); replays != nil {
		all = append(all, replays)
		s.Pending += replays.NumPending
		s.AckPending += replays.NumAckPending
	}
	if s.Pending > 0 || s.AckPending > 0 {
		s.Oldest, err = c.oldest(ctx, all)
		// It may have been acked and be gone meanwhile, which is no reason not to
		// know the rest.
		s.NoOldest = err != nil && !errors.Is(err, jetstream.ErrMsgNotFound)
	}
	c.tel.SetState(s)
}

// oldest tells when the first message was stored that is not acked, among those of
// the consumer's own durable and of the one for its replays.
func (c *streamConsumer) oldest(ctx context.Context, durables []*jetstream.ConsumerInfo) (oldest time.Time, err error) {
	stream, err := c.rt.js.Stream(ctx, c.info.Stream)
	if err != nil {
		return time.Time{}, err
	}
	for _, d := range durables {
		for _, subject := range filtersOf(d.Config) {
			m, getErr := stream.GetMsg(ctx, d.AckFloor.Stream+1, jetstream.WithGetMsgSubject(subject))
			switch {
			case getErr != nil:
				err = getErr
			case oldest.IsZero() || m.Time.Before(oldest):
				oldest = m.Time
			}
		}
	}
	if !oldest.IsZero() {
		err = nil // there are replays and no events, or the other way round
	}
	return oldest, err
}
