// Command monotel looks after the dead letters of event-driven apps on NATS
// JetStream. "monotel help" says how.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/monotel/monotel/internal/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the first signal ends what is going on in good order, the second ends the process
	os.Exit(cli.Main(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr, os.Getenv))
}
