// Command chaos runs Apps of monotel in processes of their own, kills, stops and cuts
// off everything that they need, and then reconciles each message from journals and
// streams. docs/chaos.md explains what it looks for and how to read what it prints.
//
//	go run . run --seed 7 --for 30m
//	go run . replay testdata/held.json
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
)

// childVariable is set for the processes of a run.
const childVariable = "MONOTEL_CHAOS_CHILD"

func main() { os.Exit(execute(context.Background())) }

// again is how soon a second signal is the same one: a terminal, make and go run may each
// send it.
const again = 2 * time.Second

func execute(ctx context.Context) int {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	if os.Getenv(childVariable) == "" {
		context.AfterFunc(ctx, func() {
			wait(context.WithoutCancel(ctx), again)
			stop() // from now on a signal ends the process at once
		})
	}
	err := command().ExecuteContext(ctx)
	if code, ok := errors.AsType[exitError](err); ok {
		return int(code)
	}
	if err != nil {
		return 1
	}
	return 0
}

func command() *cobra.Command {
	cmd := &cobra.Command{
		Use: "chaos", Short: "Break everything around Apps of monotel, and reconcile each message", SilenceUsage: true,
	}
	cmd.SetOut(os.Stdout)
	cmd.AddCommand(runCommand(), replayCommand(), consumeCommand(), publishCommand())
	return cmd
}
