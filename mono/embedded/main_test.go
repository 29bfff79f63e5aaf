package embedded_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/monotel/monotel/mono/embedded"
)

// holdStore makes the test binary a process that runs a server on the folder
// that the variable names, until its standard input ends.
const holdStore = "MONOTEL_TEST_HOLD_STORE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdStore); dir != "" {
		hold(dir)
		return
	}
	goleak.VerifyTestMain(m)
}

func hold(dir string) {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := embedded.Start(ctx, embedded.Config{StoreDir: dir})
	if err != nil {
		_, _ = fmt.Fprintln(os.Stdout, err)
		return
	}
	_, _ = fmt.Fprintln(os.Stdout, "running")
	bufio.NewScanner(os.Stdin).Scan() // the parent ends it, or ends itself
	if err := s.Stop(ctx); err != nil {
		_, _ = fmt.Fprintln(os.Stdout, err)
	}
}
