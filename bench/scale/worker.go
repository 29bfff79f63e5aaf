package scale

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"golang.org/x/time/rate"

	"github.com/monotel/monotel/mono"
)

// A workerSpec is what a worker is told: an App that publishes, or consumes.
type workerSpec struct {
	URL      string   `json:"url"`
	Subjects []string `json:"subjects"` // of the events, in the order of their numbers

	Publish *publishSpec  `json:"publish"` // nil: it consumes
	Consume []consumeSpec `json:"consume"` // durable consumers

	Concurrency   int           `json:"concurrency"`
	Batch         int           `json:"batch"`
	Handler       time.Duration `json:"handler"` // that a message takes
	MaxAckPending int           `json:"max_ack_pending"`
}

type publishSpec struct {
	Sync   bool          `json:"sync"`
	Window int           `json:"window"`
	Count  int           `json:"count"` // of messages
	For    time.Duration `json:"for"`   // without a count
	Rate   int           `json:"rate"`  // messages a second; 0: as fast as it goes
}

type consumeSpec struct {
	Stream  string `json:"stream"`
	Durable string `json:"durable"`
	Event   int    `json:"event"`
	Start   uint64 `json:"start"` // first sequence; 0: from the beginning
}

type workerQuestion struct {
	Begin bool `json:"begin"` // to publish
}

type workerReport struct {
	Done  int    `json:"done"`  // published and acknowledged, or acked
	Last  int64  `json:"last"`  // when, in Unix nanoseconds
	Ended bool   `json:"ended"` // of a publisher
	Error string `json:"error"`
}

const payloadSize = 256

func workerCommand() *cobra.Command {
	return &cobra.Command{
		Use: "worker", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, in, out := cmd.Context(), json.NewDecoder(cmd.InOrStdin()), cmd.OutOrStdout()
			w := &worker{}
			if err := in.Decode(&w.spec); err != nil {
				return err
			}
			app, err := w.app()
			if err != nil {
				return err
			}
			if err := app.Start(ctx); err != nil {
				return err
			}
			if err := json.NewEncoder(out).Encode(workerReport{}); err != nil {
				return err
			}
			ctx, cancel := context.WithCancel(ctx)
			err = serve(in, out, func(q workerQuestion) (any, error) {
				if q.Begin {
					w.publishing.Go(func() { w.fail(w.publish(ctx)) })
				}
				return w.report(), nil
			})
			cancel()
			w.publishing.Wait()
			stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), startTimeout)
			defer cancel()
			if stopErr := app.Stop(stop); err == nil {
				err = stopErr
			}
			return err
		},
	}
}

// A worker is an App with one module.
type worker struct {
	spec   workerSpec
	events []mono.BaseEventDefinition
	bus    mono.EventBus

	publishing sync.WaitGroup
	done       atomic.Int64
	last       atomic.Int64
	ended      atomic.Bool
	failed     atomic.Pointer[error]
}

// app does without telemetry and dead letters, which docs/performance.md measures.
func (w *worker) app() (*mono.App, error) {
	for i, s := range w.spec.Subjects {
		w.events = append(w.events, mono.BaseEventDefinition{
			ModuleName: w.Name(), Name: "Event" + strconv.Itoa(i), Version: "v1", Subject: s,
		})
	}
	opts := []mono.Option{
		mono.WithNATS(w.spec.URL), mono.WithLogger(slog.New(slog.DiscardHandler)), mono.WithoutDeadLetters(),
		mono.WithMeterProvider(nil), mono.WithTracerProvider(nil),
	}
	if p := w.spec.Publish; p != nil && p.Window > 0 {
		opts = append(opts, mono.WithPublishWindow(p.Window))
	}
	app, err := mono.New(opts...)
	if err != nil {
		return nil, err
	}
	err = app.Register(w)
	return app, err
}

func (*worker) Name() string                             { return "scale" }
func (*worker) Start(context.Context) error              { return nil }
func (*worker) Stop(context.Context) error               { return nil }
func (w *worker) SetEventBus(bus mono.EventBus)          { w.bus = bus }
func (w *worker) EmitEvents() []mono.BaseEventDefinition { return w.events }

func (w *worker) RegisterEventConsumers(r mono.EventRegistry) error {
	for _, c := range w.spec.Consume {
		cfg := mono.StreamConsumerConfig{
			Stream:      mono.StreamConfig{Name: c.Stream},
			Consumer:    c.config(w.spec.MaxAckPending),
			Fetch:       mono.FetchConfig{BatchSize: w.spec.Batch},
			Concurrency: w.spec.Concurrency,
		}
		if err := r.RegisterEventStreamConsumer(w.events[c.Event], cfg, w.handle, w); err != nil {
			return err
		}
	}
	return nil
}

// config is what an App asks the server for, as far as it is not given by the App.
func (c consumeSpec) config(maxAckPending int) jetstream.ConsumerConfig {
	cfg := jetstream.ConsumerConfig{Durable: c.Durable, MaxAckPending: maxAckPending}
	if c.Start > 0 {
		cfg.DeliverPolicy, cfg.OptStartSeq = jetstream.DeliverByStartSequencePolicy, c.Start
	}
	return cfg
}

func (w *worker) handle(ctx context.Context, msgs []*mono.Msg) error {
	for _, m := range msgs {
		if w.spec.Handler > 0 {
			select {
			case <-time.After(w.spec.Handler): // it waits for something, such as a database
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err := m.Ack(); err != nil {
			return err
		}
	}
	w.did(len(msgs))
	return nil
}

func (w *worker) did(n int) {
	w.last.Store(time.Now().UnixNano())
	w.done.Add(int64(n))
}

func (w *worker) fail(err error) {
	if err != nil {
		w.failed.CompareAndSwap(nil, &err)
	}
}

func (w *worker) report() workerReport {
	r := workerReport{Ended: w.ended.Load(), Done: int(w.done.Load()), Last: w.last.Load()}
	if err := w.failed.Load(); err != nil {
		r.Error = (*err).Error()
	}
	return r
}

func (w *worker) publish(ctx context.Context) error {
	defer w.ended.Store(true)
	p := w.spec.Publish
	limit := rate.NewLimiter(rate.Inf, 20) // a burst, since timers are late
	if p.Rate > 0 {
		limit.SetLimit(rate.Limit(p.Rate))
	}
	send, wait := w.publishSync, func() {}
	if !p.Sync {
		send, wait = w.publishAsync()
	}
	defer wait()
	begin := time.Now()
	for i := 0; i < p.Count || p.Count == 0 && time.Since(begin) < p.For; i++ {
		if p.Rate > 0 {
			if err := limit.Wait(ctx); err != nil {
				return err
			}
		}
		err := send(ctx, &mono.Msg{Subject: w.spec.Subjects[i%len(w.spec.Subjects)], Data: make([]byte, payloadSize)})
		if err != nil {
			return fmt.Errorf("message %d: %w", i, err)
		}
	}
	return nil
}

func (w *worker) publishSync(ctx context.Context, m *mono.Msg) error {
	_, err := w.bus.PublishStream(ctx, m)
	if err == nil {
		w.did(1)
	}
	return err
}

// publishAsync returns what sends a message, and what waits for all that were sent.
func (w *worker) publishAsync() (send func(context.Context, *mono.Msg) error, wait func()) {
	futures := make(chan *mono.PubAckFuture, 1<<10)
	var waiter sync.WaitGroup
	waiter.Go(func() {
		for f := range futures {
			<-f.Done()
			if _, err := f.Wait(context.Background()); err != nil {
				w.fail(err)
				continue
			}
			w.did(1)
		}
	})
	send = func(ctx context.Context, m *mono.Msg) error {
		f, err := w.bus.PublishStreamAsync(ctx, m)
		if err == nil {
			futures <- f
		}
		return err
	}
	return send, func() { close(futures); waiter.Wait() }
}
