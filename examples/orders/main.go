// Orders is a small shop: three modules around one event, with the failures
// that a real one has.
//
//	go run ./examples/orders
//
// What it gives up is in the dead-letter stream. With -open the program stays, so
// that the command monotel can look at it and replay it. With -role it is one half of
// the shop, for two processes on one NATS server; docs/demo.md shows them with all
// that is around them.
//
// Package tracking emits the event, package notification consumes it over core
// NATS, package audit through a durable consumer. They are what to copy; this
// package is the world around them.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/examples/orders/audit"
	"github.com/monotel/monotel/examples/orders/notification"
	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

func main() {
	ctx, release := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, release) // a second Ctrl-C ends the program at once
	// The end of a pipe, as in "orders | head", is an orderly end, too: the
	// temporary folder is removed.
	ctx, _ = signal.NotifyContext(ctx, syscall.SIGPIPE)
	os.Exit(run(ctx, os.Args[1:], os.Stdout, os.Stderr))
}

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
)

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 30 * time.Second
	// retryTimeout is how long orders between two attempts are waited for at
	// the end. All attempts together take 3.5 s.
	retryTimeout = 10 * time.Second
)

// run is the program: it returns when ctx or the asked time has ended.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	o, err := parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		usage(stdout)
		return exitOK
	case err != nil:
		fmt.Fprintf(stderr, "orders: %v\nRun it with -help to see what can be set.\n", err)
		return exitUsage
	}
	switch {
	case o.health != "":
		err = checkHealth(ctx, o.health)
	case o.role == roleShop:
		err = runShop(ctx, o, stdout, stderr)
	default:
		err = runService(ctx, o, stderr)
	}
	if err != nil {
		fmt.Fprintf(stderr, "orders: %v\n", err)
		return exitFailed
	}
	return exitOK
}

// options is what can be set on the command line.
type options struct {
	role   string
	http   string // address of a service's pages
	health string // URL of a page to be looked at

	period  time.Duration
	rate    float64
	server  string
	store   string
	verbose bool

	open   string // as given
	stay   bool   // when the shop has closed
	listen string // address of the embedded server; none if empty

	metrics    string
	printTrace bool
}

func flags(o *options) *flag.FlagSet {
	fs := flag.NewFlagSet("orders", flag.ContinueOnError)
	fs.SetOutput(io.Discard) // run reports errors
	fs.Usage = func() {}
	fs.DurationVar(&o.period, "for", 10*time.Second, "take orders for this `time`; 0 means until Ctrl-C")
	fs.Float64Var(&o.rate, "rate", 3, "take this `number` of orders per second, up to 1000")
	fs.StringVar(&o.server, "server", "", "use the NATS server at this `URL` instead of an embedded one")
	fs.StringVar(&o.store, "store", "", "keep the stream in this `folder`; the next run goes on with what is in it\n"+
		"(default a temporary folder, removed at the end)")
	fs.BoolFunc("open", "when the orders are taken, stay until Ctrl-C with the ledger repaired, so that\n"+
		"\"monotel dlq\" can look at what was given up and replay it. For that the embedded\n"+
		"server listens, for a password of this run, on a free port of 127.0.0.1; on another\n"+
		"with -open=127.0.0.1:4222", func(value string) error {
		o.open = value
		return nil
	})
	fs.StringVar(&o.metrics, "metrics", "", "serve metrics for Prometheus at this `address`, such as :9464; without a host, on\nloopback")
	fs.BoolVar(&o.printTrace, "print-trace", false, "print the traces of one order at the end, instead of sending any to a collector")
	fs.BoolVar(&o.verbose, "v", false, "show what the framework logs, on standard error")
	fs.StringVar(&o.role, "role", roleShop, "be this `half` of the shop, emitter or consumers, until Ctrl-C, on the NATS server\n"+
		"of -server or NATS_URL. NATS_USER and NATS_PASSWORD, or the file NATS_CREDS, say\n"+
		"who it is there. The emitter takes orders by itself only if -rate is given")
	fs.StringVar(&o.http, "http", "", "with -role: serve /healthz, /metrics and /orders, or /ledger, at this `address`;\nwithout a host, on loopback")
	fs.StringVar(&o.health, "healthcheck", "", "do nothing but look whether the page at this `URL` is well, such as a service's\n/healthz")
	return fs
}

func parse(args []string) (options, error) {
	var o options
	fs := flags(&o)
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	given := make(map[string]bool)
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })
	var errs []error
	if fs.NArg() > 0 {
		errs = append(errs, fmt.Errorf("unexpected argument %q", fs.Arg(0)))
	}
	if o.period < 0 {
		errs = append(errs, fmt.Errorf("-for is %v, want 0 or more", o.period))
	}
	const most = 1000
	none := o.role == roleEmitter && o.rate == 0
	if !(o.rate > 0 && o.rate <= most) && !none { // also what is not a number
		errs = append(errs, fmt.Errorf("-rate is %v, want more than 0, up to %d", o.rate, most))
	}
	if o.server != "" && o.store != "" {
		errs = append(errs, errors.New("-store is a folder of the embedded server: use it or -server"))
	}
	switch err := o.setOpen(); {
	case err != nil:
		errs = append(errs, err)
	case o.server != "" && o.listen != "":
		errs = append(errs, errors.New("-open=ADDRESS is for the embedded server: with -server use -open alone"))
	}
	if err := o.setRole(given); err != nil {
		errs = append(errs, err)
	}
	return o, errors.Join(errs...)
}

func usage(w io.Writer) {
	fmt.Fprint(w, `Orders is a small shop: three modules around one event, with the failures that
a real one has. It needs nothing installed and leaves nothing behind.

Usage: go run ./examples/orders [flags]

`)
	var o options
	fs := flags(&o)
	fs.SetOutput(w)
	fs.PrintDefaults()
	fmt.Fprint(w, `
Examples:

  go run ./examples/orders -for 30s -rate 1
        slowly, to read along

  go run ./examples/orders -store data/orders
        press Ctrl-C while an order waits for its retry, run it again: nothing is
        lost

  go run ./examples/orders -open
        stays when the orders are taken, and says how to look at those that were
        given up, and how to replay them

  go run ./examples/orders -print-trace
        shows one order's way through the modules, retries included

  OTEL_EXPORTER_OTLP_ENDPOINT=http://localhost:4318 go run ./examples/orders -metrics :9464
        sends traces to an OpenTelemetry collector or Jaeger, and lets Prometheus
        scrape http://localhost:9464/metrics

  go run ./examples/orders -server nats://localhost:4222
        on your own NATS server, which keeps the stream "orders-audit"; run it twice
        at the same time and the two share the work

  export NATS_URL=nats://localhost:4222
  go run ./examples/orders -role consumers -http :8081
  go run ./examples/orders -role emitter -http :8080
  curl -d customer=anna -d amount=12.5 http://localhost:8080/orders
        as two processes, with one trace across them
`)
}

// runShop runs the App with its modules, and the customers.
func runShop(ctx context.Context, o options, stdout, stderr io.Writer) (err error) {
	where, dir, cleanUp, err := storage(o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cleanUp()) }()

	ob, err := observe(ctx, o)
	if err != nil {
		return err
	}
	temporary := o.store == "" && o.server == ""
	screen := newScreen(stdout, temporary && !o.stay)
	next := tour{id: anyID}
	defer func() {
		if stopErr := ob.stop(ctx); stopErr != nil { // the orders are not at fault
			fmt.Fprintf(stderr, "orders: telemetry: %v\n", stopErr)
		}
		if err != nil {
			return
		}
		if ob.book != nil {
			ob.book.show(stdout, screen.paint)
		}
		if !o.stay {
			farewell(screen, o, next)
		}
	}()
	log := slog.New(slog.DiscardHandler) // every failure is shown as a line already
	if o.verbose {
		log = slog.New(ob.logs(slog.NewTextHandler(stderr, nil)))
	}
	start, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	opts := ob.options()
	var d *door
	switch {
	case o.server != "":
		opts = append(opts, mono.WithNATS(o.server))
	case o.listen != "":
		if d, err = openDoor(start, o.listen, dir, log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, d.close(ctx)) }()
		opts = append(opts, d.option())
	default:
		opts = append(opts, mono.WithStoreDir(dir))
	}
	opts = append(opts, mono.WithName("orders"), mono.WithLogger(log), mono.WithMiddleware(watchUndecodable(screen.undecodable)))
	app, err := mono.New(opts...)
	if err != nil {
		return err
	}
	orders, ledger := tracking.New(screen.save), newLedger(ob.tracer())
	err = app.Register(
		&inventory{app: app, screen: screen}, // the first to start is the last to stop
		orders,
		notification.New(screen.confirm),
		audit.New(ledger.write, screen.audited),
	)
	if err != nil {
		return err
	}

	introduce(screen, where)
	if ob.metrics != "" {
		screen.say("Metrics are at %s\n", ob.metrics)
	}
	if d != nil {
		screen.say("Other programs of yours can connect while it runs, such as cmd/monotel:\n\n  %s\n", d.connection())
	}
	if err := app.Start(start); err != nil {
		return err
	}
	takeOrders(ctx, o, &shop{tracking: orders, bus: app.Bus(), witness: screen, tracer: ob.tracer()}, screen, app)
	switch {
	case o.stay && ctx.Err() == nil:
		stay(ctx, screen, ledger, newTour(ctx, o, d, app))
	case !o.stay && !temporary:
		next = newTour(ctx, o, d, app)
	}

	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	stopErr := app.Stop(stop)
	waiting, err := screen.summary()
	switch {
	case waiting > 0 && temporary:
		screen.say("\nWhat is waiting goes with the temporary folder. With -store the next run takes it up.")
	case waiting > 0:
		screen.say("\nWhat is waiting is stored: run it again with the same flags.")
	}
	return errors.Join(stopErr, err)
}

// storage says where the orders are stored, in words and as a folder of the embedded
// server, if it is that.
func storage(o options) (where, dir string, cleanUp func() error, err error) {
	nothing := func() error { return nil }
	switch {
	case o.server != "":
		return "on your NATS server", "", nothing, nil // a URL may hold a password
	case o.store != "":
		return "in " + o.store, o.store, nothing, nil
	}
	dir, err = os.MkdirTemp("", "monotel-orders-")
	if err != nil {
		return "", "", nil, err
	}
	return "in a temporary folder", dir, func() error { return os.RemoveAll(dir) }, nil
}

func introduce(s *screen, where string) {
	s.say(`Three modules around one event, OrderCreated:

  %s      creates orders and emits the event
  %s  confirms each order to its customer, over core NATS
  %s         writes each order into a ledger, through a durable consumer:
                what fails comes again, after %v, and is then
                given up

Some orders fail for a while, some for ever, and some are not even orders.
They are stored %s. Ctrl-C stops.
`, s.paint(bold, "tracking"), s.paint(bold, "notification"), s.paint(bold, "audit"), delays(), where)
}

// delays are those of the audit's retries, as text.
func delays() string {
	all := make([]string, 0, len(audit.Retry.Backoff))
	for _, d := range audit.Retry.Backoff {
		all = append(all, d.String())
	}
	return strings.Join(all, ", ")
}

// takeOrders opens the shop, and waits a while for what is left to do. It
// returns at once when ctx ends.
func takeOrders(ctx context.Context, o options, s *shop, screen *screen, app *mono.App) {
	closing, cancel := ctx, context.CancelFunc(func() {})
	if o.period > 0 {
		closing, cancel = context.WithTimeout(ctx, o.period)
	}
	defer cancel()
	s.open(closing, o.rate)
	if ctx.Err() != nil {
		screen.say("\nStopped: no more orders.")
		return
	}
	wait, cancel := context.WithTimeout(ctx, retryTimeout)
	defer cancel()
	n, err := stored(wait, app)
	if err == nil && n > 0 {
		screen.say("\nTime is up: no more orders. Still to be dealt with: %d.\n", n)
		_, err = untilStored(wait, app, func(n int) bool { return n == 0 })
	}
	if err != nil {
		screen.say("\nWill not wait for retries: %v", err)
	}
}

// watchUndecodable returns middleware that reports messages that are no orders.
// The audit never sees them: package helper gives them up before.
func watchUndecodable(report func(*mono.Msg, error)) mono.Middleware {
	return mono.Middleware{Handle: func(c mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
		if c.Durable == "" {
			return next // core consumers see the same messages
		}
		return func(ctx context.Context, msgs []*mono.Msg) error {
			broken := make(map[*mono.Msg]error)
			for _, msg := range msgs {
				if _, err := tracking.OrderCreatedV1.Unmarshal(msg); err != nil {
					broken[msg] = err
				}
			}
			err := next(ctx, msgs)
			for msg, decodeErr := range broken {
				report(msg, decodeErr)
			}
			return err
		}
	}}
}

// inventory is a module that counts what is left when the others have stopped,
// so that the summary checks what was seen against what the server has.
type inventory struct {
	app    *mono.App
	screen *screen
}

func (i *inventory) Name() string { return "inventory" }

func (i *inventory) Start(context.Context) error { return nil }

// Stop runs when no handler does any more. The server may have settlements to
// work through, so it is asked again while it disagrees.
func (i *inventory) Stop(ctx context.Context) error {
	if i.app.Conn() == nil {
		return nil // the start failed
	}
	patience := 3 * time.Second
	if i.screen.alone {
		patience = 10 * time.Second // it must agree in the end
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	n, err := untilStored(ctx, i.app, i.screen.agrees)
	i.screen.left(n, err)
	return err
}

// stored asks the server how many messages wait to be audited, not counting those
// that are replayed: they were dealt with before.
func stored(ctx context.Context, app *mono.App) (int, error) {
	const patience = 5 * time.Second // a server that was lost may stay away
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	js, err := jetstream.New(app.Conn())
	if err != nil {
		return 0, err
	}
	stream, err := js.Stream(ctx, audit.Stream)
	if err != nil {
		return 0, fmt.Errorf("count what is waiting: %w", err)
	}
	subject := tracking.OrderCreatedV1.ToBase().Subject
	info, err := stream.Info(ctx, jetstream.WithSubjectFilter(subject))
	if err != nil {
		return 0, fmt.Errorf("count what is waiting: %w", err)
	}
	return int(info.State.Subjects[subject]), nil //nolint:gosec // its 16 MiB hold fewer
}

// untilStored asks until the number is the wanted one, or until ctx ends, and
// returns the last answer. The error is that of asking, not that of ctx.
func untilStored(ctx context.Context, app *mono.App, wanted func(int) bool) (int, error) {
	const pause = 50 * time.Millisecond
	tick := time.NewTicker(pause)
	defer tick.Stop()
	last, err := stored(ctx, app)
	for err == nil && !wanted(last) {
		select {
		case <-ctx.Done():
			return last, nil
		case <-tick.C:
		}
		n, askErr := stored(ctx, app)
		if ctx.Err() != nil {
			return last, nil
		}
		last, err = n, askErr
	}
	return last, err
}
