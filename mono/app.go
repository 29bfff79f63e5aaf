package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"sync"
	"syscall"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/telemetry/messaging"
)

// An App runs modules that emit and consume events. Its methods are safe for
// concurrent use.
type App struct {
	cfg      config
	bus      *bus
	registry registry

	lifecycle chan struct{} // holds a value while Register, Start or Stop is at work
	modules   []Module
	telemetry *messaging.Telemetry // made by the first start; guarded by lifecycle
	run       *run                 // guarded by mu and lifecycle: read under either, written under both
	mu        sync.RWMutex
}

// New returns an App. It checks every option, starts nothing and dials nothing,
// so there is nothing to close if Start is never called. Its error wraps
// [ErrInvalidConfig] for each option that cannot work.
func New(opts ...Option) (*App, error) {
	cfg := defaultConfig()
	for _, o := range opts {
		if o != nil {
			o.apply(&cfg)
		}
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("new app: %w", err)
	}
	return &App{cfg: cfg, bus: newBus(cfg.middleware), lifecycle: make(chan struct{}, 1)}, nil
}

// Register adds modules. They start in the order of registration and stop in
// reverse. The error names every module that is nil, has an invalid name or one
// that is taken; then none is added. After Start it returns [ErrAlreadyStarted].
func (a *App) Register(modules ...Module) error {
	select {
	case a.lifecycle <- struct{}{}:
		defer a.unlock()
	default:
		return fmt.Errorf("register modules: %w: it is starting or stopping", ErrAlreadyStarted)
	}
	if a.run != nil {
		return fmt.Errorf("register modules: %w", ErrAlreadyStarted)
	}
	all := slices.Clone(a.modules)
	var errs []error
	for i, m := range modules {
		if isNil(m) {
			errs = append(errs, fmt.Errorf("register module number %d: %w: it is nil", i+1, ErrInvalidConfig))
			continue
		}
		name := m.Name()
		if err := checkName(name); err != nil {
			errs = append(errs, fmt.Errorf("register module of type %T: %w", m, err))
			continue
		}
		if slices.ContainsFunc(all, func(o Module) bool { return o.Name() == name }) {
			errs = append(errs, fmt.Errorf("register module %q: %w: module names are unique in an App", name, ErrDuplicate))
			continue
		}
		all = append(all, m)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	a.modules = all
	return nil
}

// Start connects, arranges streams and consumers, starts the modules and begins
// to handle events. It is bounded by ctx, which may end afterwards: the App
// keeps ctx's values only.
//
// A start that fails undoes what it began, streams on the server excepted, and
// may be repeated. Its error wraps the cause, and reports everything that is
// wrong with the registrations at once. An App that was stopped may be started
// again.
func (a *App) Start(ctx context.Context) error {
	if err := a.lock(ctx); err != nil {
		return fmt.Errorf("start app %q: %w", a.cfg.name, err)
	}
	defer a.unlock()
	if a.run != nil {
		return ErrAlreadyStarted
	}
	r := newRun(ctx, a)
	if err := startRun(ctx, r); err != nil {
		// The undoing has a time of its own: ctx may be what ended the start.
		undo, cancel := context.WithTimeout(r.base, a.cfg.shutdownTimeout)
		defer cancel()
		if undoErr := r.abort(undo); undoErr != nil {
			err = errors.Join(err, fmt.Errorf("undo the start: %w", undoErr))
		}
		return fmt.Errorf("start app %q: %w", a.cfg.name, err)
	}
	a.setRun(r)
	return nil
}

// startRun contains panics of the modules' other methods, so that what was begun
// is undone.
func startRun(ctx context.Context, r *run) (err error) {
	defer recoverPanic(&err)
	return r.start(ctx)
}

func (a *App) lock(ctx context.Context) error {
	select {
	case a.lifecycle <- struct{}{}:
		return nil
	default:
	}
	select {
	case a.lifecycle <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("another Start or Stop is at work: %w", context.Cause(ctx))
	}
}

func (a *App) unlock() { <-a.lifecycle }

func (a *App) setRun(r *run) {
	a.mu.Lock()
	a.run = r
	a.mu.Unlock()
}

// Stop ends the App within ctx and loses nothing: it stops fetching, waits for
// handlers, stops the modules in reverse order, sends what was settled and
// published, and closes the connection and the embedded server.
//
// Shortly before ctx's deadline the contexts of handlers are cancelled, with
// [ErrStopped] as cause. If they are still running at the deadline Stop returns
// [ErrStopTimeout], naming them; their messages are delivered again later.
// Without a deadline Stop waits for as long as handlers take. Stop before Start
// and a second Stop do nothing.
func (a *App) Stop(ctx context.Context) error {
	if err := a.lock(ctx); err != nil {
		return fmt.Errorf("stop app %q: %w", a.cfg.name, err)
	}
	defer a.unlock()
	r := a.run
	if r == nil {
		return nil
	}
	err := r.stop(ctx)
	a.setRun(nil)
	if err != nil {
		return fmt.Errorf("stop app %q: %w", a.cfg.name, err)
	}
	r.log.LogAttrs(r.base, slog.LevelInfo, "stopped", slog.String("app", a.cfg.name))
	return nil
}

// Run starts the App, waits until ctx ends, or until the process gets SIGINT or
// SIGTERM, and stops it within [WithShutdownTimeout]. A second signal ends the
// process at once. It returns nil after an orderly stop. If the connection is
// closed for good it stops too, with an error.
func (a *App) Run(ctx context.Context) error {
	ctx, release := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer release()
	if err := a.Start(ctx); err != nil {
		return err
	}
	lost := a.wait(ctx)
	release()
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), a.cfg.shutdownTimeout)
	defer cancel()
	return errors.Join(lost, a.Stop(stop))
}

// wait waits until ctx ends, the App is stopped by somebody else, or its
// connection is lost for good, which is an error.
func (a *App) wait(ctx context.Context) error {
	r := a.current()
	if r == nil {
		return nil
	}
	select {
	case <-ctx.Done():
		return nil
	case <-r.closed:
	}
	if r.closing.Load() {
		return nil
	}
	return fmt.Errorf("run app %q: %w", a.cfg.name, nats.ErrConnectionClosed)
}

// Bus returns the App's event bus. It may be kept, and works while the App runs.
func (a *App) Bus() EventBus { return a.bus }

// Registry returns the App's events. It is filled by Start.
func (a *App) Registry() EventRegistry { return &a.registry }

// Conn returns the App's connection, from before the first module starts until
// after the last one has stopped, and nil otherwise. It is for what the App has
// no methods for; closing or draining it breaks the App.
func (a *App) Conn() *nats.Conn {
	if r := a.bus.run.Load(); r != nil {
		return r.nc
	}
	return nil
}

func (a *App) current() *run {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return a.run
}
