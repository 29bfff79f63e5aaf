package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/telemetry"
)

// What a process is. The shop is everything in one process; the others are its two
// halves, on one NATS server, so that an order's trace crosses processes.
const (
	roleShop      = "shop"
	roleEmitter   = "emitter"   // takes orders
	roleConsumers = "consumers" // confirms and audits them
)

// name is what the process is called in traces, unless OTEL_SERVICE_NAME says so, and
// on the NATS server.
func (o *options) name() string {
	if o.role == roleShop {
		return "orders"
	}
	return "orders-" + o.role
}

// setRole checks what goes with the role, and completes it. given are the flags of the
// command line.
func (o *options) setRole(given map[string]bool) error {
	switch o.role {
	case roleShop:
		if given["http"] {
			return errors.New("-http is for -role emitter and -role consumers; -metrics serves those of the whole shop")
		}
		return nil
	case roleEmitter, roleConsumers:
	default:
		return fmt.Errorf("-role is %q, want %s, %s or %s", o.role, roleShop, roleEmitter, roleConsumers)
	}
	var errs []error
	for _, name := range []string{"for", "store", "open", "metrics", "print-trace"} {
		if given[name] {
			errs = append(errs, fmt.Errorf("-%s is for the whole shop, not for -role %s", name, o.role))
		}
	}
	switch {
	case o.role == roleConsumers && given["rate"]:
		errs = append(errs, errors.New("-rate is of orders that are taken: give it to -role emitter"))
	case !given["rate"]:
		o.rate = 0
	}
	if strings.Contains(o.server, "@") {
		errs = append(errs, errors.New("-server has a password or a token in it, which others on this machine can see: "+
			"set NATS_URL, or NATS_USER and NATS_PASSWORD"))
	}
	if o.server == "" {
		o.server = os.Getenv("NATS_URL")
	}
	if o.server == "" {
		errs = append(errs, fmt.Errorf("-role %s needs a NATS server: give -server, or set NATS_URL", o.role))
	}
	return errors.Join(errs...)
}

// identity is who a service is on the NATS server, if its URL does not say so: what the
// environment names, as the command monotel has it, too.
func identity() ([]nats.Option, error) {
	if file := os.Getenv("NATS_CREDS"); file != "" {
		if _, err := os.Stat(file); err != nil { //nolint:gosec // who runs the program names its files
			return nil, fmt.Errorf("NATS_CREDS: %w", err)
		}
		return []nats.Option{nats.UserCredentials(file)}, nil
	}
	if user := os.Getenv("NATS_USER"); user != "" {
		return []nats.Option{nats.UserInfo(user, os.Getenv("NATS_PASSWORD"))}, nil
	}
	return nil, nil
}

// A service is a half of the shop, as a process of its own.
type service interface {
	modules() []mono.Module
	options() []mono.Option
	// routes adds what it answers over HTTP.
	routes(mux *http.ServeMux)
	// run is what it does by itself, until ctx ends. bus is that of the App, which
	// has started.
	run(ctx context.Context, bus mono.EventBus)
}

// runService runs a half of the shop until ctx ends. It logs as JSON, since what reads
// it is a program, too.
func runService(ctx context.Context, o options, stderr io.Writer) (err error) {
	lines := slog.NewJSONHandler(stderr, nil).WithAttrs([]slog.Attr{slog.String("service", o.name())})
	ob, err := observe(ctx, o, telemetry.WithLogger(slog.New(lines)))
	if err != nil {
		return err
	}
	log := slog.New(ob.logs(lines))
	defer func() {
		if stopErr := ob.stop(ctx); stopErr != nil { // the orders are not at fault
			log.WarnContext(ctx, "telemetry did not end well", slog.String("error", stopErr.Error()))
		}
	}()
	who, err := identity()
	if err != nil {
		return err
	}
	var s service
	if o.role == roleEmitter {
		s = newEmitter(o, ob)
	} else {
		s = newConsumers(ob)
	}
	opts := append(ob.options(), mono.WithName(o.name()), mono.WithNATS(o.server, who...), mono.WithLogger(log))
	app, err := mono.New(append(opts, s.options()...)...)
	if err != nil {
		return err
	}
	if err := app.Register(s.modules()...); err != nil {
		return err
	}

	work, fail := context.WithCancelCause(ctx)
	defer fail(nil)
	var web *webServer
	if o.http != "" {
		// Before the App starts: an address that is taken is found at once. Who asks
		// now waits until it has.
		if web, err = listenHTTP(ctx, o.http); err != nil {
			return fmt.Errorf("-http: %w", err)
		}
		const patience = 10 * time.Second // with requests that are under way
		defer func() { err = errors.Join(err, web.stop(ctx, patience)) }()
	}
	start, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if err := app.Start(start); err != nil {
		return err
	}
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		err = errors.Join(err, app.Stop(stop))
	}()
	if web != nil {
		web.serve(pages(app, ob, s), fail)
		log.InfoContext(ctx, "serving", slog.String("url", web.url()))
	}
	s.run(work, app.Bus())
	return nil
}

// pages is all that a service answers over HTTP. Web pages of others cannot have a
// browser send orders or break the ledger.
func pages(app *mono.App, ob *observation, s service) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /healthz", healthPage(app))
	mux.Handle("GET /metrics", ob.tel.MetricsHandler())
	s.routes(mux)
	return http.NewCrossOriginProtection().Handler(mux)
}
