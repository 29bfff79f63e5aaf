package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/monotel/monotel/telemetry/messaging"
)

var page = filepath.Join("..", "..", "docs", "metrics.md")

// The page is what the code would make of it.
func TestPageIsCurrent(t *testing.T) {
	t.Parallel()
	before, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "metrics.md")
	if err := os.WriteFile(file, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(file); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("docs/metrics.md is not what the code says: run make docs")
	}
	for _, m := range messaging.Metrics() {
		if !strings.Contains(string(after), "### `"+m.Name+"`") {
			t.Errorf("%s is not on the page", m.Name)
		}
	}
}
