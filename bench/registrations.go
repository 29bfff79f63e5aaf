package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	unitStart      = "start-ns"
	unitStop       = "stop-ns"
	unitMemory     = "idle-B"
	unitResident   = "rss-B"
	unitGoroutines = "goroutines/consumer"
)

// measureRegistrations measures the start of a program with many durable consumers,
// what they need while nothing happens, and its stop.
func measureRegistrations(ctx context.Context, b *bench) (result, error) {
	n := b.count(b.param("consumers"))
	var handled atomic.Int64
	done := make(chan struct{})
	p := program{
		events: n, stream: true, durable: n, concurrency: 1, settled: func() {},
		handle: func(int, []byte) {
			if handled.Add(1) == int64(n) {
				close(done)
			}
		},
	}
	r, err := b.start(ctx, p, 0)
	if err != nil {
		return result{}, err
	}
	started := b.started
	memory, goroutines := inUse(), runtime.NumGoroutine()
	debug.FreeOSMemory()
	resident, err := residentMemory()
	if err != nil {
		return result{}, err
	}

	// Each of them works.
	if err := publishEach(ctx, r.conn, n, b); err != nil {
		return result{}, err
	}
	select {
	case <-done:
	case <-time.After(patience):
		return result{}, fmt.Errorf("%d of %d consumers got their event", handled.Load(), n)
	}

	begin := time.Now()
	err = r.stop()
	return result{1, []metric{
		{float64(started), unitStart},
		{float64(time.Since(begin)), unitStop},
		{float64(memory) - float64(b.usedBefore), unitMemory},
		{float64(resident), unitResident},
		{float64(goroutines-b.goroutinesBefore) / float64(n), unitGoroutines},
	}}, err
}

func publishEach(ctx context.Context, nc *nats.Conn, n int, b *bench) error {
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	for i := range n {
		if _, err := js.Publish(ctx, subject(i), b.payload(i)); err != nil {
			return err
		}
	}
	return nil
}

// inUse returns the memory of the heap and the stacks, without garbage.
func inUse() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapInuse + m.StackInuse
}

// residentMemory is that of the process, in bytes. Only Linux tells.
func residentMemory() (uint64, error) {
	if runtime.GOOS != "linux" {
		return 0, nil
	}
	f, err := os.Open("/proc/self/status")
	if err != nil {
		return 0, err
	}
	defer func() { _ = f.Close() }()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if rest, ok := strings.CutPrefix(lines.Text(), "VmRSS:"); ok {
			var kib uint64
			_, err := fmt.Sscan(rest, &kib)
			return kib << 10, err
		}
	}
	return 0, errors.New("/proc/self/status has no VmRSS")
}
