// Command bench does the same work with nats.go, Watermill, go-monolith/mono and
// monotel, and compares what it costs. docs/performance.md has what came out.
//
//	go run . run --out results.txt
//	go run . report results.txt --write ../docs/performance.md
//
// Its command regress compares two versions of monotel, and scale measures what more
// processes bring.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/bench/scale"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process at once
	if err := command().ExecuteContext(ctx); err != nil {
		os.Exit(1)
	}
}

func command() *cobra.Command {
	cmd := &cobra.Command{
		Use:          "bench",
		Short:        "Compare monotel with nats.go, Watermill and go-monolith/mono",
		SilenceUsage: true,
	}
	cmd.SetOut(os.Stdout)
	cmd.AddCommand(runCommand(), regressCommand(), reportCommand(), measureCommand(), serverCommand(), scale.Command())
	return cmd
}
