// Command monotel looks after the dead letters of event-driven apps on NATS
// JetStream. "monotel help" says how.
package main

import (
	"context"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/monotel/monotel/internal/cli"
)

const (
	gcPercent   = 400
	memoryLimit = 150 << 20
)

func main() {
	// A list of a million dead letters makes garbage all the time and keeps next to
	// nothing: collecting it less often makes it a third faster, within this much
	// memory.
	debug.SetGCPercent(gcPercent)
	debug.SetMemoryLimit(memoryLimit)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the first signal ends what is going on in good order, the second ends the process
	os.Exit(cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
}
