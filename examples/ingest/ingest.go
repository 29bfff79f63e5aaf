package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
)

const (
	stopTimeout   = 30 * time.Second
	totalsTimeout = 2 * time.Minute
)

var errTimeout = errors.New("the time of -timeout is up; run it again to go on")

// ingest does the job. It returns totals whenever it came so far as to have
// any, also with an error.
func ingest(ctx context.Context, o *options, stdin *os.File, stdout, stderr io.Writer) (*totals, error) {
	in, err := openInput(o.file, stdin, stderr)
	if err != nil {
		return nil, err
	}
	defer in.close()
	// From here on there is something to end in an orderly way. Before, a signal
	// may end the process as usual, even while it waits for standard input.
	ctx, release := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer release()
	if len(in.lines) == 0 {
		return newTotals(in), nil
	}
	work, cancel := context.WithTimeoutCause(ctx, o.timeout, errTimeout)
	defer cancel()
	j := newJob(o, in, stdout, stderr)
	app, err := j.app()
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := app.Start(work); err != nil {
		return nil, err
	}
	fmt.Fprintf(stdout, "started in %v: %d families of events, %d durable consumers\n",
		time.Since(began).Round(time.Millisecond), len(j.families), 2*len(j.families))
	err = j.run(work, app)
	stop, cancelStop := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancelStop()
	err = errors.Join(err, app.Stop(stop))
	if j.totals != nil {
		fmt.Fprintf(stdout, "took %v: %d lines sent, %d of them the stream had already; %d messages handled, %d of them again\n",
			time.Since(began).Round(time.Millisecond), j.source.sent.Load()+j.source.dropped.Load(), j.source.dropped.Load(),
			j.audit.handled.Load()+j.typed.handled.Load(), j.ledger.repeated.Load())
	}
	return j.totals, err
}

// A job is one input on its way.
type job struct {
	options  *options
	in       *input
	stdout   io.Writer
	stderr   io.Writer
	families []family
	ledger   *ledger
	source   *source
	audit    *audit
	typed    *typed
	printer  *printer
	totals   *totals // nil until known
}

func newJob(o *options, in *input, stdout, stderr io.Writer) *job {
	j := &job{options: o, in: in, stdout: stdout, stderr: stderr, families: newFamilies(in.families), ledger: newLedger()}
	j.source = &source{families: j.families}
	j.audit = &audit{families: j.families, ledger: j.ledger}
	j.typed = &typed{families: j.families, ledger: j.ledger}
	j.printer = &printer{families: j.families, w: stdout}
	return j
}

func (j *job) app() (*mono.App, error) {
	opts := []mono.Option{mono.WithName("ingest"), mono.WithPublishWindow(publishWindow)}
	if j.options.server != "" {
		opts = append(opts, mono.WithNATS(j.options.server))
	} else {
		opts = append(opts, mono.WithStoreDir(j.options.store))
	}
	app, err := mono.New(opts...)
	if err != nil {
		return nil, err
	}
	modules := []mono.Module{j.source, j.audit, j.typed}
	if !j.options.quiet {
		modules = append(modules, j.printer)
	}
	if err := app.Register(modules...); err != nil {
		return nil, err
	}
	return app, nil
}

// run publishes the lines, waits until they are consumed, and adds up.
func (j *job) run(ctx context.Context, app *mono.App) error {
	js, err := jetstream.New(app.Conn())
	if err != nil {
		return err
	}
	if err := j.ledger.open(ctx, js); err != nil {
		return err
	}
	have, err := readStored(ctx, js, j.in.id)
	if err != nil {
		return err
	}
	before := len(have.lines)
	done := j.progress()
	have, err = j.source.publish(ctx, js, j.in, have, j.options.rate, j.stderr)
	if err == nil {
		fmt.Fprintf(j.stdout, "stored all %d lines, waiting for the consumers\n", len(have.lines))
		err = drain(ctx, js, j.families, have)
	}
	done()
	// Totals of what there is are worth having, also when time was up.
	last, cancelLast := context.WithTimeout(context.WithoutCancel(ctx), totalsTimeout)
	defer cancelLast()
	t, totalsErr := addUp(last, js, j.in, j.ledger)
	if totalsErr != nil {
		return errors.Join(err, totalsErr)
	}
	t.before = before
	j.totals = t
	return err
}

// progress writes a line every few seconds, if somebody watches. The function
// that it returns ends that.
func (j *job) progress() func() {
	if !isTerminal(j.stderr) {
		return func() {}
	}
	quit := make(chan struct{})
	all := len(j.in.lines)
	var wg sync.WaitGroup
	wg.Go(func() {
		t := time.NewTicker(2 * time.Second)
		defer t.Stop()
		for {
			select {
			case <-t.C:
				fmt.Fprintf(j.stderr, "%d of %d lines sent, %d audited, %d typed\n",
					j.source.sent.Load(), all, j.audit.handled.Load(), j.typed.handled.Load())
			case <-quit:
				return
			}
		}
	})
	return func() {
		close(quit)
		wg.Wait()
	}
}
