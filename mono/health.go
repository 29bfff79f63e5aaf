package mono

import (
	"context"
	"errors"
	"fmt"
)

// A HealthReport says what works and what does not.
type HealthReport struct {
	// Healthy is true when no check has an error.
	Healthy bool
	// Checks are in a fixed order: the app, the connection, the embedded server,
	// stream consumers in order of registration, modules in order of start.
	Checks []HealthCheck
}

// A HealthCheck is the state of one part of an App.
type HealthCheck struct {
	Name string // such as "connection", or `module "billing"`
	Err  error  // nil while it works
}

// Err joins the errors of all checks; it is nil when the App is healthy.
func (r HealthReport) Err() error {
	var errs []error
	for _, c := range r.Checks {
		if c.Err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", c.Name, c.Err))
		}
	}
	return errors.Join(errs...)
}

// Health checks the connection, with a round trip to the server, the embedded
// server's streams, the stream consumers, and each module that implements
// [HealthCheckableModule]. Give ctx a deadline: a server that does not answer is
// waited for until then, or for 10 s. The connection's error is then that of the
// context, and [ErrDisconnected] as soon as the App has noticed that the link is
// dead, see [WithPingInterval].
func (a *App) Health(ctx context.Context) HealthReport {
	var report HealthReport
	add := func(name string, err error) {
		report.Checks = append(report.Checks, HealthCheck{name, err})
	}
	r := a.current()
	if r == nil {
		add("app", ErrNotStarted)
		return report
	}
	add("app", nil)
	add("connection", r.connectionHealth(ctx))
	if r.server != nil {
		add("embedded server", r.server.Health())
	}
	for _, c := range r.streams {
		add(fmt.Sprintf("stream consumer %q", c.info.Durable), errors.Join(c.health(), c.held.health()))
	}
	for _, m := range r.modules {
		if h, ok := m.(HealthCheckableModule); ok {
			add(fmt.Sprintf("module %q", m.Name()), moduleHealth(ctx, h))
		}
	}
	report.Healthy = report.Err() == nil
	return report
}

// connectionHealth does not wait for nats.go beyond ctx: it holds its lock while it
// writes to a dead link.
func (r *run) connectionHealth(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, flushLimit)
	defer cancel()
	err := bounded(ctx, func(ctx context.Context) error {
		if !r.nc.IsConnected() {
			return fmt.Errorf("%w: status %v", ErrDisconnected, r.nc.Status())
		}
		return r.flush(ctx)
	})
	if err != nil && ctx.Err() != nil && !errors.Is(err, ErrDisconnected) {
		return fmt.Errorf("the server does not answer: %w", err)
	}
	return err
}

func moduleHealth(ctx context.Context, m HealthCheckableModule) (err error) {
	defer recoverPanic(&err)
	return m.Health(ctx)
}
