// Ingest stores a file of webhooks as durable events and consumes each of them
// in three ways. It answers the question "does nothing get lost, and nothing
// counted twice, when my program is killed?" with totals.
//
//	go run ./examples/ingest FILE
//	go run ./examples/ingest < FILE
//
// The input has one JSON object a line:
//
//	{"event":"issues","action":"opened","payload":{"action":"opened","issue":{"number":7}}}
//
// Each line's payload is published, byte for byte, as the event
// github/<event>/v1 (source.go). All events share the stream github-events.
// They are consumed
//
//   - by the module "audit", which gets raw messages and records the SHA-256 of
//     what arrived (audit.go),
//   - by the module "typed", which gets Go values, of a type for each kind of
//     event, and records what they say (typed.go, shapes.go),
//   - by the module "printer", over core NATS, which prints them as they pass
//     (printer.go). What is lost to it is lost.
//
// The last lines say whether all of it adds up:
//
//	lines read 187, stored 187 (of which 0 were there before), duplicates 0, bad 0
//	audit 187 messages, sha256 sent = arrived: yes (2f6c…)
//	typed 187 in 50 families
//
// # Which events there are
//
// An App declares its events before it starts, and which events there are is
// known only from the input. So the input is read twice: first for its events
// and checksums (input.go), then to publish it. What is not a plain file,
// standard input above all, is copied to a temporary file first; nothing is
// published before its end is read.
//
// # Killed and started again
//
// The program may be killed at any moment, and again while it recovers, and the
// totals come out the same. Nothing is kept in memory that the totals need, and
// nothing in files of our own. All state is in JetStream:
//
//   - Which lines are stored is asked of the stream (stored.go). Each message
//     carries the input's checksum and its line number. At every start they are
//     read, without the payloads, and the lines that are missing are published.
//     Publishing is asynchronous: a line may be refused, or lost with its
//     connection, while later ones are stored. A set of lines has no trouble
//     with such holes, where "the last line stored" would.
//   - A kill can leave a line on its way to a server that lives on. It could
//     arrive after the stream was read, and so be stored twice. The message ID,
//     which is the same every time, lets the server drop the copy. That takes
//     milliseconds, so the usual window of two minutes is plenty; a restart
//     long after it relies on the stream alone.
//   - Which messages a durable consumer has handled is recorded before they are
//     acked, under the name of the consumer and the message's sequence, and a
//     record is never made twice (ledger.go). A message whose ack was lost is
//     delivered again, finds its record, and is acked without being counted.
//
// An input is known by its checksum: the same bytes are the same input,
// wherever they come from, and a file that has grown is a new one.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

func main() {
	os.Exit(run(context.Background(), os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

const (
	exitOK    = 0
	exitBad   = 1 // a bad line, totals that do not add up, or no totals at all
	exitUsage = 2
)

const usage = `Usage: ingest [flags] [FILE]

Reads one JSON object a line, {"event":"issues","payload":{...}}, from FILE or,
without FILE or with "-", from standard input. Publishes each payload durably as
the event github/<event>/v1 and consumes it three times: audited, typed, printed.

The input is read twice, because all events are declared before the first is
published. Standard input is copied to a temporary file for that, to its end.

It may be killed at any time. Started again with the same input and store it
goes on where it was and ends with the same totals.

The exit code is 0 when every line was good, is stored, and was handled once by
each durable consumer; 1 when not; 2 for wrong usage.

Flags:
`

// options are what the command line says.
type options struct {
	file    string // "-" for standard input
	store   string
	server  string
	quiet   bool
	rate    int
	timeout time.Duration
}

func parse(args []string, stderr io.Writer) (options, error) {
	var o options
	flags := flag.NewFlagSet("ingest", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.Usage = func() {
		fmt.Fprint(stderr, usage)
		flags.PrintDefaults()
	}
	flags.StringVar(&o.store, "store", "data/ingest", "`folder` of the embedded server's streams, made when it is missing")
	flags.StringVar(&o.server, "server", "",
		"`URL` of a NATS server with JetStream to use instead of the embedded one, such as nats://localhost:4222")
	flags.BoolVar(&o.quiet, "quiet", false, "print no line for each event, only the totals")
	flags.IntVar(&o.rate, "rate", 0, "publish at most so many `lines` a second; 0 is no limit")
	flags.DurationVar(&o.timeout, "timeout", 10*time.Minute, "give up after this `duration`; the next run goes on from there")
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	bad := func(format string, args ...any) error {
		err := fmt.Errorf(format, args...)
		fmt.Fprintf(stderr, "ingest: %v\nRun it with -help to see what it takes.\n", err)
		return err
	}
	stored := false
	flags.Visit(func(f *flag.Flag) { stored = stored || f.Name == "store" })
	switch {
	case flags.NArg() > 1:
		return o, bad("want one FILE, got %d; flags go before it", flags.NArg())
	case stored && o.server != "":
		return o, bad("-store is the embedded server's folder: leave out -store or -server")
	case o.store == "":
		return o, bad("-store: want the name of a folder")
	case o.rate < 0 || o.rate > 1_000_000:
		return o, bad("-rate %d: want 0 to 1000000 lines a second", o.rate)
	case o.timeout <= 0:
		return o, bad("-timeout %v: want more than 0", o.timeout)
	}
	o.file = "-"
	if flags.NArg() == 1 {
		o.file = flags.Arg(0)
	}
	return o, nil
}

// run is main without the process: it returns the exit code.
func run(ctx context.Context, args []string, stdin *os.File, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return exitOK
	case err != nil:
		return exitUsage
	case o.file == "-" && isTerminal(stdin):
		fmt.Fprintln(stderr, "ingest: no FILE, and standard input is no file or pipe.\nRun it with -help to see what it takes.")
		return exitUsage
	}
	stdout = &syncWriter{w: stdout}
	t, err := ingest(ctx, &o, stdin, stdout, stderr)
	code := exitOK
	if err != nil {
		fmt.Fprintf(stderr, "ingest: %v\n", err)
		code = exitBad
	}
	if t == nil {
		return code
	}
	for _, p := range t.problems() {
		fmt.Fprintf(stderr, "ingest: %s\n", p)
		code = exitBad
	}
	t.print(stdout)
	return code
}

// A syncWriter lets the printer's consumers, which run at the same time, write
// whole lines.
type syncWriter struct {
	mu sync.Mutex
	w  io.Writer
}

func (s *syncWriter) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.w.Write(b)
}

// isTerminal reports whether w is a device, such as a terminal, and not a file
// or a pipe.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	if !ok || f == nil {
		return false
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}
