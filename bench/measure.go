package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/pprof"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
)

// A result is what one cell measured.
type result struct {
	n       int
	metrics []metric
}

type metric struct {
	value float64
	unit  string
}

// line is in the format of Go benchmarks.
func (r result) line(c cell) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Benchmark%s\t%d", c, r.n)
	for _, m := range r.metrics {
		fmt.Fprintf(&b, "\t%.4g %s", m.value, m.unit)
	}
	return b.String()
}

// measureCommand measures one cell in this process, so that its heap, goroutines
// and memory are those of nothing else.
func measureCommand() *cobra.Command {
	var quick bool
	var profile, dir string
	cmd := &cobra.Command{
		Use: "measure CELL", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			c, err := parseCell(strings.TrimPrefix(args[0], "Benchmark"))
			if err != nil {
				return err
			}
			b := &bench{cell: c, quick: quick, profile: profile, dir: dir, leave: dir != ""}
			if !b.leave {
				if b.dir, err = os.MkdirTemp("", "monotel-bench-"); err != nil {
					return err
				}
				defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
			}
			r, err := b.measure(cmd.Context())
			if err != nil {
				return fmt.Errorf("%s: %w", c, err)
			}
			cmd.Println(r.line(c))
			return nil
		},
	}
	cmd.Flags().BoolVar(&quick, "quick", false, "with few messages, to see whether it works")
	cmd.Flags().StringVar(&dir, "dir", "", "keep streams in this folder, and leave them there as they are")
	cmd.Flags().StringVar(&profile, "cpuprofile", "", "write a CPU profile of what is measured to this file")
	return cmd
}

// A bench is a measurement and what it needs: a server, and a program that runs.
type bench struct {
	cell

	lib     library
	quick   bool
	profile string
	dir     string // of the server
	leave   bool   // the server as it is: a thousand consumers take it ten seconds to shut down
	closers []func() error

	// What was there before the program started, and how long that took.
	usedBefore       uint64
	goroutinesBefore int
	started          time.Duration

	// What was there when the measured part began.
	begin  time.Time
	busy   time.Duration
	before runtime.MemStats
}

func (b *bench) measure(ctx context.Context) (res result, err error) {
	all := slices.Concat(works, ownWorks)
	i := slices.IndexFunc(all, func(w work) bool { return w.name == b.work })
	if i < 0 {
		return result{}, fmt.Errorf("no work %q", b.work)
	}
	if why := all[i].absent(b.cell); why != "" {
		return result{}, fmt.Errorf("%s: %s", b.cell.lib, why)
	}
	if b.lib, err = findLibrary(b.cell.lib); err != nil {
		return result{}, err
	}
	res, err = all[i].measure(ctx, b)
	for _, f := range slices.Backward(b.closers) {
		err = errors.Join(err, f())
	}
	return res, err
}

const (
	streamBytes = 1 << 30
	spell       = 300 * time.Millisecond // that a publisher is measured
	quickSpell  = 20 * time.Millisecond
	quickShare  = 20 // --quick does one in so many messages
)

// count is a number of messages, or far fewer.
func (b *bench) count(n int) int {
	if b.quick {
		return max(n/quickShare, 20)
	}
	return n
}

// start starts a server, the stream if the program has one, a backlog of events in
// it, and the program.
func (b *bench) start(ctx context.Context, p program, backlog int) (*running, error) {
	t, stopServer, err := startServer(ctx, b.transport, b.dir)
	if err != nil {
		return nil, err
	}
	if p.stream && !(b.lib.ownServer && p.events > 1) { // see monolithModule.stream
		if err = b.fill(ctx, t, p, backlog); err != nil {
			return nil, errors.Join(err, stopServer())
		}
	}
	if b.lib.ownServer {
		if err := stopServer(); err != nil {
			return nil, err
		}
	} else if !b.leave || b.transport == loopback { // a process must end
		b.closers = append(b.closers, stopServer)
	}
	return b.run(ctx, t, p)
}

func (b *bench) run(ctx context.Context, t target, p program) (*running, error) {
	b.usedBefore, b.goroutinesBefore = inUse(), runtime.NumGoroutine()
	begin := time.Now()
	r, err := b.lib.start(ctx, t, p)
	if err != nil {
		return nil, err
	}
	b.started = time.Since(begin)
	if r.conn == nil { // look at the server through a connection of our own
		if r.conn, err = t.connect(); err != nil {
			return nil, err
		}
		stop := r.stop
		r.stop = func() error {
			defer r.conn.Close()
			return stop()
		}
	}
	return r, nil
}

// fill makes the stream and puts events into it, as the library itself would send
// them.
func (b *bench) fill(ctx context.Context, t target, p program, n int) error {
	nc, err := t.connect()
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	_, err = js.CreateStream(ctx, jetstream.StreamConfig{
		Name: streamName, Subjects: p.subjects(), Storage: jetstream.FileStorage, MaxBytes: streamBytes,
	})
	if err != nil || n == 0 {
		return err
	}
	r := &running{stop: func() error { return nil }}
	if b.lib.marshals {
		if r, err = b.lib.start(ctx, t, program{events: p.events, stream: true}); err != nil {
			return err
		}
	}
	publish, wait, err := b.publisher(nc, r)
	if err != nil {
		return err
	}
	for i := range n {
		if err := publish(i%p.events, b.payload(i)); err != nil {
			return err
		}
	}
	return errors.Join(wait(), r.stop(), stored(ctx, nc, n))
}

// stored checks the number of events in the stream.
func stored(ctx context.Context, nc *nats.Conn, n int) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	s, err := js.Stream(ctx, streamName)
	if err != nil {
		return err
	}
	if last := s.CachedInfo().State.LastSeq; last != uint64(n) { //nolint:gosec // a count
		return fmt.Errorf("stream is at sequence %d after %d publishes", last, n)
	}
	return nil
}

// payload returns a payload of its own for event number i, with the time of now.
func (b *bench) payload(i int) []byte {
	data := make([]byte, b.size)
	binary.BigEndian.PutUint64(data, uint64(i)) //nolint:gosec // a count
	stamp(data, time.Now())
	return data
}

func number(data []byte) int { return int(binary.BigEndian.Uint64(data)) } //nolint:gosec // see payload

// Times are told by the monotonic clock.
var epoch = time.Now()

func stamp(data []byte, at time.Time) {
	binary.BigEndian.PutUint64(data[8:], uint64(at.Sub(epoch))) //nolint:gosec // after epoch
}

func sent(data []byte) time.Duration {
	return time.Duration(binary.BigEndian.Uint64(data[8:])) //nolint:gosec // see stamp
}

// on begins what is measured; off ends it and returns the cost of each of n
// operations. Processor time and allocations are those of the whole process.
func (b *bench) on() error {
	if b.profile != "" {
		f, err := os.Create(b.profile)
		if err != nil {
			return err
		}
		b.closers = append(b.closers, f.Close)
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
	}
	runtime.ReadMemStats(&b.before)
	b.begin, b.busy = time.Now(), processorTime()
	return nil
}

func (b *bench) off(n int) result {
	elapsed, busy := time.Since(b.begin), processorTime()-b.busy
	var after runtime.MemStats
	runtime.ReadMemStats(&after)
	if b.profile != "" {
		pprof.StopCPUProfile()
	}
	return result{n, []metric{
		{float64(elapsed.Nanoseconds()) / float64(n), unitTime},
		{float64(busy.Nanoseconds()) / float64(n), unitProcessor},
		{float64(after.TotalAlloc-b.before.TotalAlloc) / float64(n), unitBytes},
		{float64(after.Mallocs-b.before.Mallocs) / float64(n), unitAllocs},
	}}
}

// processorTime is what this process has had so far. Other processes of a busy
// machine make everything take longer, but hardly change it.
func processorTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		return 0
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
