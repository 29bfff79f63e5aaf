package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A run is what exists between a Start and its Stop.
type run struct {
	app *App
	log *slog.Logger

	base       context.Context //nolint:containedctx // the values of Start's context, for ever
	work       context.Context //nolint:containedctx // handlers run under it
	cancelWork context.CancelCauseFunc
	ready      chan struct{} // closed when every module has started
	closing    atomic.Bool   // the connection is to be closed
	closed     chan struct{} // closed when the connection is

	server *embedded.Server // nil with WithNATS
	nc     *nats.Conn
	link   link // that nc uses, unless the server is embedded
	js     jetstream.JetStream
	api    *jsapi.Client
	async  *asyncPublisher

	dead      *deadLetters  // nil: there are none
	lane      chan struct{} // has one value while a marked message is handled
	openGauge *openGauge    // nil, too

	tel       *messaging.Telemetry
	polls     sync.WaitGroup
	stopPolls context.CancelFunc

	destinations       atomic.Pointer[map[string]*destination] // of declared events, by subject
	unmatched, inboxes destination

	streamRegs []*streamRegistration
	streams    []*streamConsumer
	cores      []*coreConsumer
	modules    []Module // started, in order
	janitor    *janitor

	topologyMu   sync.Mutex
	topology     atomic.Pointer[topology]
	connMu       sync.Mutex
	connected    context.Context //nolint:containedctx // ends when the connection is lost; guarded by connMu
	disconnected context.CancelFunc
	serverID     string        // that nc is connected to; guarded by connMu
	resumed      atomic.Uint64 // reconnects after which the consumers know of them

	// Guarded by topologyMu.
	created     map[string]time.Time // when each stream was made
	provisioned time.Time            // when the topology was last made right
	replays     replayState
}

func newRun(ctx context.Context, a *App) *run {
	r := &run{
		app:     a,
		log:     a.cfg.logger,
		base:    context.WithoutCancel(ctx),
		ready:   make(chan struct{}),
		closed:  make(chan struct{}),
		created: make(map[string]time.Time),
		lane:    make(chan struct{}, 1),
	}
	r.work, r.cancelWork = context.WithCancelCause(r.base)
	r.connected, r.disconnected = context.WithCancel(r.work)
	r.async = newAsyncPublisher(r, a.cfg.publishWindow)
	return r
}

// isResumed reports whether there is a connection, and the consumers know that it is
// another one than before, if it is.
func (r *run) isResumed() bool {
	return r.nc.IsConnected() && r.nc.Stats().Reconnects == r.resumed.Load()
}

// lost is called when the connection is lost: requests in flight get no answer.
func (r *run) lost() {
	r.connMu.Lock()
	r.disconnected()
	r.connMu.Unlock()
	r.async.failAll(ErrDisconnected, time.Now())
}

// start does everything up to running handlers. What it began is undone by
// abort.
func (r *run) start(ctx context.Context) error {
	if err := r.openTelemetry(); err != nil {
		return err
	}
	if err := r.open(ctx); err != nil {
		return err
	}
	coreRegs, streamRegs, err := r.register()
	if err != nil {
		return err
	}
	r.streamRegs = streamRegs
	r.setTopology(nil)
	if err := r.startWakes(); err != nil {
		return err
	}
	if err := r.provision(ctx); err != nil {
		return err
	}
	if err := r.openDeadLetters(ctx); err != nil {
		return err
	}
	for _, reg := range coreRegs {
		c := newCoreConsumer(r, reg, r.app.cfg.middleware)
		if err := c.start(); err != nil {
			return startError(c.info, err)
		}
		r.cores = append(r.cores, c)
	}
	r.warnOldServer(r.topology.Load())
	// Subscriptions must be known to the server before a module publishes.
	if err := r.flush(ctx); err != nil {
		return fmt.Errorf("subscribe: %w", err)
	}
	r.app.bus.run.Store(r)
	for _, m := range r.app.modules {
		if err := startModule(ctx, m); err != nil {
			return fmt.Errorf("start module %q: %w", m.Name(), err)
		}
		r.modules = append(r.modules, m)
	}
	for _, reg := range streamRegs {
		c := newStreamConsumer(r, reg, r.app.cfg.middleware)
		if err := c.start(); err != nil {
			return startError(c.info, err)
		}
		r.streams = append(r.streams, c)
	}
	for _, c := range r.streams {
		c.startWorkers()
	}
	r.startJanitor()
	r.startPolls()
	close(r.ready)
	r.log.LogAttrs(r.base, slog.LevelInfo, "started", slog.String("app", r.app.cfg.name),
		slog.Int("modules", len(r.modules)), slog.Int("consumers", len(r.cores)), slog.Int("stream_consumers", len(r.streams)))
	return nil
}

func startError(c Consumer, err error) error {
	return fmt.Errorf("start consumer of module %q for event %s: %w", c.Module, c.Event, err)
}

// startModule does not wait for a Start that ignores its context. What that one
// acquires is then its own affair.
func startModule(ctx context.Context, m Module) error {
	return bounded(ctx, m.Start)
}

// bounded calls f and returns its error, or, if ctx ends first, ctx's.
func bounded(ctx context.Context, f func(context.Context) error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	done := make(chan error, 1)
	go func() {
		err := errGoexit
		defer func() { done <- err }()
		defer recoverPanic(&err)
		err = f(ctx)
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	select {
	case err := <-done: // it was quick all the same
		return err
	default:
		return fmt.Errorf("it has not returned: %w", context.Cause(ctx))
	}
}

// open starts or finds the server and connects to it.
func (r *run) open(ctx context.Context) error {
	cfg := &r.app.cfg
	url, opts := "", cfg.natsOptions
	if cfg.natsURL != nil {
		url = *cfg.natsURL
	} else {
		e := cfg.embeddedConfig()
		if e.Logger == nil {
			e.Logger = r.log
		}
		s, err := embedded.Start(ctx, e)
		if err != nil {
			return err
		}
		r.server, opts = s, s.ConnectOptions()
	}
	if err := r.connect(ctx, url, opts); err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	js, err := jetstream.New(r.nc)
	if err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	r.js, r.api = js, jsapi.New(r.nc, js, 0)
	if err := r.async.start(); err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	return nil
}

// register asks the modules what they emit and consume.
func (r *run) register() ([]*coreRegistration, []*streamRegistration, error) {
	reg := &r.app.registry
	reg.reset(r.app.modules)
	errs := []error{reg.declare("WithEvents", r.app.cfg.events)}
	for _, m := range r.app.modules {
		if b, ok := m.(EventBusAwareModule); ok {
			b.SetEventBus(r.app.bus)
		}
		if e, ok := m.(EventEmitterModule); ok {
			errs = append(errs, reg.declare(fmt.Sprintf("module %q", m.Name()), e.EmitEvents()))
		}
	}
	for _, m := range r.app.modules {
		if c, ok := m.(EventConsumerModule); ok {
			if err := registerConsumers(c, reg); err != nil {
				errs = append(errs, fmt.Errorf("module %q: %w", m.Name(), err))
			}
		}
	}
	core, streams := reg.close()
	return core, streams, errors.Join(errs...)
}

func registerConsumers(m EventConsumerModule, r EventRegistry) (err error) {
	defer recoverPanic(&err)
	return m.RegisterEventConsumers(r)
}

// resume asks for messages again after a reconnect. The server may have dropped the pull
// requests, or another node of its cluster may still have them.
func (r *run) resume() {
	r.connMu.Lock()
	r.connected, r.disconnected = context.WithCancel(r.work)
	id := r.nc.ConnectedServerId()
	sameServer := id == r.serverID
	r.serverID = id
	r.connMu.Unlock()
	reconnects := r.nc.Stats().Reconnects
	defer r.resumed.Store(reconnects)
	select {
	case <-r.ready:
	default:
		return // nothing consumes yet; start asks for itself
	}
	// A server that was started again has another ID. So has another node of a cluster: the
	// one before may be the one that led the consumers, and be gone.
	for _, c := range r.streams {
		if !sameServer {
			c.pull.loseState()
			if p := c.replays.pull.Load(); p != nil {
				p.loseState()
			}
		}
		c.pull.expectEchoes()
		c.pull.reset()
		c.replays.resume()
	}
}

// whileConnected is a context that ends when the connection is lost.
func (r *run) whileConnected() context.Context {
	r.connMu.Lock()
	defer r.connMu.Unlock()
	return r.connected
}

// A destination is what is known of a subject that is published on. A publish
// looks it up once.
type destination struct {
	publisher *messaging.Publisher
	durable   bool // a stream stores the subject, as far as this App knows
}

// setTopology keeps what was planned, nil before that, for publishes.
func (r *run) setTopology(t *topology) {
	r.topology.Store(t)
	events := r.app.registry.GetAllEvents()
	all := make(map[string]*destination, len(events))
	for _, e := range events {
		all[e.Subject] = &destination{publisher: r.tel.Publisher(e.Subject), durable: t != nil && t.durable[e.Subject]}
	}
	r.destinations.Store(&all)
}

// destination finds what is known of a subject, and whether an event declares it.
func (r *run) destination(subject string) (d *destination, declared bool) {
	if all := r.destinations.Load(); all != nil {
		if d := (*all)[subject]; d != nil {
			return d, true
		}
	}
	if strings.HasPrefix(subject, r.nc.Opts.InboxPrefix+".") || strings.HasPrefix(subject, "_INBOX.") {
		return &r.inboxes, false
	}
	return &r.unmatched, false
}

// lastChance is what a module's Stop gets when there is no time left.
const lastChance = 100 * time.Millisecond

// stop ends the run within ctx, in the order that loses nothing: intake,
// handlers, modules, what is still to be sent, the connection, the server.
// It goes on after errors and returns all of them.
func (r *run) stop(ctx context.Context) error {
	soft, cancel := before(ctx, 1)
	defer cancel()
	late, cancelLate := before(ctx, 1.0/2)
	defer cancelLate()
	// nats.go holds its lock while it writes, so a dead link would block all the rest.
	defer context.AfterFunc(soft, r.link.endIfStuck)()
	defer context.AfterFunc(ctx, r.link.end)()
	var errs []error
	errs = append(errs, r.stopConsumers(late, soft))
	if r.dead != nil && r.dead.bridge != nil {
		errs = append(errs, r.dead.bridge.Stop(late))
	}
	for _, m := range slices.Backward(r.modules) {
		if err := stopModule(late, m); err != nil {
			errs = append(errs, fmt.Errorf("stop module %q: %w", m.Name(), err))
		}
	}
	errs = append(errs, r.close(ctx))
	return errors.Join(errs...)
}

// stopConsumers waits for handlers until soft ends, then cancels them, and
// waits for that until ctx ends.
func (r *run) stopConsumers(ctx, soft context.Context) error {
	if r.janitor != nil {
		r.janitor.stop()
	}
	if r.stopPolls != nil {
		r.stopPolls()
		r.polls.Wait()
	}
	var all sync.WaitGroup
	running := make(map[string]bool)
	var mu sync.Mutex
	wait := func(c Consumer, stop func(context.Context)) {
		who := fmt.Sprintf("module %q for event %s", c.Module, c.Event)
		running[who] = true
		all.Go(func() {
			stop(soft)
			mu.Lock()
			delete(running, who)
			mu.Unlock()
		})
	}
	mu.Lock()
	for _, c := range r.cores {
		wait(c.info, c.stop)
	}
	for _, c := range r.streams {
		wait(c.info, c.stop)
	}
	mu.Unlock()
	done := make(chan struct{})
	go func() {
		all.Wait()
		close(done)
	}()
	select {
	case <-done:
		r.cancelWork(ErrStopped)
		return nil
	case <-soft.Done():
	}
	r.cancelWork(ErrStopped)
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	mu.Lock()
	defer mu.Unlock()
	if len(running) == 0 {
		return nil
	}
	return fmt.Errorf("%w: handlers of %s are still running; their messages will be delivered again: %w",
		ErrStopTimeout, strings.Join(slices.Sorted(maps.Keys(running)), ", "), context.Cause(ctx))
}

func stopModule(ctx context.Context, m Module) error {
	if ctx.Err() != nil { // it gets the chance to do what needs no time
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), lastChance)
		defer cancel()
	}
	err := bounded(ctx, m.Stop)
	if err != nil && ctx.Err() != nil {
		return fmt.Errorf("%w: %w", ErrStopTimeout, err)
	}
	return err
}

// close sends what is left to be sent and ends the connection and the server.
func (r *run) close(ctx context.Context) error {
	var errs []error
	r.app.bus.run.CompareAndSwap(r, nil)
	if r.nc != nil {
		if r.nc.IsConnected() {
			errs = append(errs, r.async.drain(ctx), r.awaitServer(ctx))
			if err := r.flush(ctx); err != nil {
				errs = append(errs, fmt.Errorf("send the last messages: %w", err))
			}
		}
		r.closing.Store(true)
		r.nc.Close()
		r.async.stop()
		if !r.nc.Opts.NoCallbacksAfterClientClose {
			<-r.closed
		}
	}
	if r.server != nil {
		errs = append(errs, r.server.Stop(ctx))
	}
	return errors.Join(errs...)
}

// awaitServer lets an embedded server, which is about to stop, act on the last
// settlements.
func (r *run) awaitServer(ctx context.Context) error {
	const limit = 10 * time.Second // nats.go insists on a deadline
	if r.server == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var errs []error
	for _, c := range r.streams {
		if err := c.awaitServer(ctx); err != nil {
			errs = append(errs, fmt.Errorf("send the last settlements of consumer %q: %w", c.info.Durable, err))
		}
	}
	return errors.Join(errs...)
}

// flushLimit bounds a flush: nats.go insists on a deadline.
const flushLimit = 10 * time.Second

// flush waits until the server has read everything that was sent.
func (r *run) flush(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, flushLimit)
	defer cancel()
	return r.nc.FlushWithContext(ctx)
}

// abort undoes a start that failed half-way.
func (r *run) abort(ctx context.Context) error {
	r.cancelWork(ErrStopped)
	return r.stop(ctx)
}

// before is a context that ends before ctx does, by a part of what Stop keeps of
// its time: at the start of it handlers are cancelled, early enough that they can
// return and that what they settled can be sent; half of it is for closing the
// connection and the server. It has no deadline when ctx has none.
func before(ctx context.Context, part float64) (context.Context, context.CancelFunc) {
	const share, least, most = 5, 500 * time.Millisecond, 2 * time.Second
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	left := time.Until(deadline)
	reserve := min(max(left/share, least), most, left/2) //nolint:mnd // half of what there is, when it is little
	return context.WithDeadline(ctx, deadline.Add(-time.Duration(part*float64(reserve))))
}
