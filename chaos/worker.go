package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

// How the processes end.
const (
	exitPoison  = 42 // a handler has exited
	exitStart   = 43 // the App did not start; it is tried again
	exitJournal = 44
	exitStop    = 45 // Stop returned an error
)

// A job is what a child process is told, in a file.
type job struct {
	Schedule schedule `json:"schedule"`
	URL      string   `json:"url"`
	Journal  string   `json:"journal"`
	Gateway  string   `json:"gateway"`  // a file: it exists while the gateway is down
	Upgraded bool     `json:"upgraded"` // the new version
	From     int      `json:"from"`     // publishers: the first number
}

func readJob(file string) (*job, error) {
	b, err := os.ReadFile(file) //nolint:gosec // of this run
	if err != nil {
		return nil, err
	}
	j := &job{}
	return j, json.Unmarshal(b, j)
}

func (j *job) write(file string) error {
	b, err := json.Marshal(j)
	if err != nil {
		return err
	}
	return os.WriteFile(file, b, 0o600)
}

// A payload is what the events carry.
type payload struct {
	ID     string `json:"id"`
	Number int    `json:"number"`
}

func event(name string) helper.Event[payload] {
	return helper.EventDefinition[payload]("chaos", name, "v1")
}

func declared() []mono.BaseEventDefinition {
	all := make([]mono.BaseEventDefinition, 0, len(allEvents()))
	for _, name := range allEvents() {
		all = append(all, event(name).ToBase())
	}
	return all
}

// newApp is an App as each process has it.
func newApp(url string, opts ...mono.Option) (*mono.App, error) {
	return mono.New(append([]mono.Option{
		mono.WithNATS(url, nats.IgnoreDiscoveredServers(), nats.ReconnectWait(200*time.Millisecond),
			nats.ReconnectJitter(50*time.Millisecond, 0)),
		mono.WithLogger(slog.New(slog.NewTextHandler(os.Stderr, nil))),
		mono.WithName("chaos"),
	}, opts...)...)
}

// orderly is how long a process has to stop.
const orderly = 20 * time.Second

// run starts an App, does something until that returns or ctx ends, and stops it.
func run(ctx context.Context, app *mono.App, j *journal, do func(context.Context)) error {
	starting, cancel := context.WithTimeout(ctx, orderly)
	err := app.Start(starting)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "start:", err)
		return exitError(exitStart)
	}
	do(ctx)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), orderly)
	defer cancel()
	if err := app.Stop(stop); err != nil {
		fmt.Fprintln(os.Stderr, "stop:", err)
		return exitError(exitStop)
	}
	j.write(entry{What: wroteEnd})
	return nil
}

// An exitError is the code that a process ends with.
type exitError int

func (e exitError) Error() string { return "exit code " + strconv.Itoa(int(e)) }

func consumeCommand() *cobra.Command {
	return &cobra.Command{
		Use: "consume JOB", Short: "be a consumer of a run", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return consume(cmd.Context(), args[0]) },
	}
}

func consume(ctx context.Context, file string) error {
	j, err := readJob(file)
	if err != nil {
		return err
	}
	w := &worker{job: j, attempts: j.Schedule.Attempts}
	if j.Upgraded {
		w.attempts = upgraded
	}
	if w.journal, err = openJournal(j.Journal); err != nil {
		return err
	}
	done := make(chan struct{})
	defer close(done)
	go w.journal.watchLag(done)
	nodes := j.Schedule.Nodes
	app, err := newApp(j.URL, mono.WithEvents(declared()...), mono.WithShutdownTimeout(orderly), mono.WithDeadLetters(dlq.Config{
		Stream: mono.StreamConfig{Replicas: replicas(nodes, "DLQ"), MaxBytes: 256 << 20},
	}))
	if err != nil {
		return err
	}
	for _, c := range j.Schedule.consumers() {
		if err := app.Register(&module{worker: w, consumer: c}); err != nil {
			return err
		}
	}
	return run(ctx, app, w.journal, func(ctx context.Context) {
		w.journal.write(entry{What: wroteStart, Max: w.attempts})
		<-ctx.Done()
	})
}

type worker struct {
	job      *job
	journal  *journal
	attempts int
	batches  atomic.Int64
}

// A module has one durable consumer.
type module struct {
	consumer

	worker *worker
}

func (m *module) Name() string {
	if m.worker.job.Upgraded {
		return m.durable + "-renamed"
	}
	return m.durable
}

func (*module) Start(context.Context) error { return nil }
func (*module) Stop(context.Context) error  { return nil }

func (m *module) RegisterEventConsumers(r mono.EventRegistry) error {
	stream := m.retention
	stream.Name, stream.MaxBytes = m.stream, 256<<20
	stream.Replicas = replicas(m.worker.job.Schedule.Nodes, m.stream)
	cfg := mono.StreamConsumerConfig{
		Stream:   stream,
		Consumer: mono.ConsumerConfig{Durable: m.durable, AckWait: ackWait},
		Retry: mono.RetryPolicy{
			MaxAttempts: m.worker.attempts, Backoff: []time.Duration{100 * time.Millisecond, 300 * time.Millisecond},
		},
		AutoAck:     m.style != acks,
		Concurrency: 4,
		Fetch:       mono.FetchConfig{BatchSize: 1, IdleTimeout: 2 * time.Second},
	}
	if m.style != single {
		cfg.Fetch.BatchSize, cfg.Concurrency = 10, 2
	}
	return helper.RegisterTypedEventStreamConsumer(r, event(m.event), cfg, m.handle, m)
}

var errBroken = errors.New("broken")

// handle goes through a batch and returns at the first error, as many handlers do.
func (m *module) handle(_ context.Context, all []payload, msgs []*mono.Msg) (err error) {
	w := m.worker
	number := w.batches.Add(1)
	outcome := outcomePanic
	defer func() { w.journal.write(entry{What: wroteReturn, Durable: m.durable, Batch: number, Outcome: outcome}) }()
	for i := range all {
		if err := m.handleOne(number, all[i].ID, msgs[i]); err != nil {
			outcome = outcomeError
			return err
		}
	}
	outcome = outcomeOK
	return nil
}

func (m *module) handleOne(number int64, id string, msg *mono.Msg) error {
	w := m.worker
	meta := msg.Metadata()
	of := msg.Header.Get(dlq.HeaderReplayOf)
	replay, _ := strconv.Atoi(msg.Header.Get(dlq.HeaderReplayCount)) // 0: it is none
	d := w.job.Schedule.decide(id, m.durable, replay)
	e := entry{
		ID: id, Durable: m.durable, Batch: number, Seq: meta.Sequence.Stream, Attempt: meta.NumDelivered, Kind: d.kind,
		Of: of, Op: msg.Header.Get(dlq.HeaderReplayOperation), Replay: replay, Source: msg.Header.Get("Nats-Stream-Source"),
		Max: w.attempts,
	}
	note := func(what, outcome string) {
		e.What, e.Outcome = what, outcome
		w.journal.write(e)
	}
	note(wroteBegin, "")
	if d.work > 0 && (d.kind != kindFlip || meta.NumDelivered == 1) {
		wait(msg.Context(), d.work)
		if msg.Context().Err() != nil {
			note(wroteOutcome, outcomeCancelled)
			return context.Cause(msg.Context())
		}
	}
	broken := fmt.Errorf("%w: %s of %s", errBroken, id, m.durable)
	outcome := d.outcome(meta.NumDelivered, w.gatewayDown)
	note(wroteOutcome, outcome)
	switch outcome {
	case outcomeError:
		return broken
	case outcomePermanent:
		return msg.Fail(mono.Permanent(broken))
	case outcomePanic:
		panic(broken)
	case outcomeTerm:
		return msg.TermWithReason(broken.Error())
	case outcomeNak:
		return msg.Nak()
	case outcomeExit:
		os.Exit(exitPoison) //nolint:revive // that is what poison does
	}
	if m.style != acks {
		return nil
	}
	err := msg.Ack()
	if err == nil {
		note(wroteAck, outcome)
	}
	return err
}

// outcome is what comes of an attempt.
func (d decision) outcome(attempt uint64, gatewayDown func() bool) string {
	switch d.kind {
	case kindRetry, kindLate:
		if attempt <= d.fails {
			return outcomeError
		}
	case kindFlip:
		if attempt == 1 {
			return outcomePermanent
		}
	case kindGateway:
		if gatewayDown() {
			return outcomePermanent
		}
	case kindPermanent:
		return outcomePermanent
	case kindFail:
		return outcomeError
	case kindPanic:
		return outcomePanic
	case kindTerm:
		return outcomeTerm
	case kindNak:
		return outcomeNak
	case kindPoison:
		return outcomeExit
	}
	return outcomeOK
}

func (w *worker) gatewayDown() bool {
	_, err := os.Stat(w.job.Gateway)
	return err == nil
}

func publishCommand() *cobra.Command {
	return &cobra.Command{
		Use: "publish JOB", Short: "be a publisher of a run", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error { return publish(cmd.Context(), args[0]) },
	}
}

// publish stores each message of each event, and writes down what was acknowledged
// before it goes on. One that fails is sent again under its ID, as long as the
// server remembers it.
func publish(ctx context.Context, file string) error {
	j, err := readJob(file)
	if err != nil {
		return err
	}
	log, err := openJournal(j.Journal)
	if err != nil {
		return err
	}
	app, err := newApp(j.URL, mono.WithEvents(declared()...))
	if err != nil {
		return err
	}
	name, _, _ := strings.Cut(filepath.Base(j.Journal), ".")
	return run(ctx, app, log, func(ctx context.Context) {
		log.write(entry{What: wroteStart})
		pace := time.NewTicker(time.Second / time.Duration(j.Schedule.Rate))
		defer pace.Stop()
		for n := j.From; n < j.Schedule.Messages*len(j.Schedule.events()); n++ {
			select {
			case <-ctx.Done():
				return
			case <-pace.C:
			}
			publishOne(ctx, app, log, &j.Schedule, name, n)
		}
		log.write(entry{What: wroteEnd, Outcome: outcomeOK})
	})
}

func publishOne(ctx context.Context, app *mono.App, log *journal, s *schedule, name string, n int) {
	const patience, once = time.Minute, 3 * time.Second // the server remembers IDs for two minutes
	all := s.events()
	def := event(all[n%len(all)])
	id := fmt.Sprintf("%s-%s-%d", name, all[n%len(all)], n)
	body := fmt.Sprintf(`{"id":%q,"number":%d}`, id, n)
	if s.undecodable(id) {
		body = fmt.Sprintf(`{"id":%q,"number":"text"}`, id)
	}
	begin := time.Now()
	for ctx.Err() == nil {
		log.write(entry{What: wroteTry, ID: id, Seq: uint64(n)}) //nolint:gosec // from 0
		attempt, cancel := context.WithTimeout(ctx, once)
		ack, err := app.Bus().PublishStream(attempt, &mono.Msg{
			Subject: def.ToBase().Subject, Data: []byte(body), Header: mono.Header{nats.MsgIdHdr: {id}},
		})
		cancel()
		if err == nil {
			log.write(entry{What: wroteAcked, ID: id, Seq: ack.Sequence()})
			return
		}
		log.write(entry{What: wroteFailed, ID: id, Outcome: err.Error()})
		if time.Since(begin) > patience {
			log.write(entry{What: wroteAbandon, ID: id})
			return
		}
		wait(ctx, 100*time.Millisecond)
	}
}

// wait returns after a time, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}
