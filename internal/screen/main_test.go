package screen

import (
	"bytes"
	"flag"
	"os"
	"testing"

	"go.uber.org/goleak"
)

var update = flag.Bool("update", false, "write the golden files")

// TestMain is also the editor that tests run: this program, with a replacement in
// its environment.
func TestMain(m *testing.M) {
	if from, ok := os.LookupEnv("SCREEN_TEST_REPLACE"); ok {
		os.Exit(edit(os.Args[len(os.Args)-1], from, os.Getenv("SCREEN_TEST_BY")))
	}
	cache, err := os.MkdirTemp("", "screen-test-") // where payloads are edited
	if err != nil {
		panic(err)
	}
	_ = os.Setenv("XDG_CACHE_HOME", cache)
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		_ = os.RemoveAll(cache)
		os.Exit(code)
	}))
}

// edit replaces text in a file.
func edit(path, from, to string) int {
	if from == "crash" {
		return 1
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return 1
	}
	if err := os.WriteFile(path, bytes.ReplaceAll(b, []byte(from), []byte(to)), 0o600); err != nil {
		return 1
	}
	return 0
}
