package main

import (
	"fmt"
	"os"
	"testing"
)

// TestMain lets the program keep its streams in an empty folder.
func TestMain(m *testing.M) { os.Exit(inTempDir(m.Run)) }

func inTempDir(run func() int) int {
	dir, err := os.MkdirTemp("", "first")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer func() { _ = os.RemoveAll(dir) }()
	if err := os.Chdir(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return run()
}

func Example() {
	main()
	// Output: receipt for order A-1
}
