package scale_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/bench/scale"
)

// TestMain lets the test's binary be the nodes and workers that the command starts.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "scale" {
		if err := run(context.Background(), os.Args[1:]...); err != nil {
			os.Exit(1)
		}
		return
	}
	os.Exit(m.Run())
}

func run(ctx context.Context, args ...string) error {
	root := &cobra.Command{Use: "bench", SilenceUsage: true}
	root.SetOut(os.Stdout)
	root.AddCommand(scale.Command())
	root.SetArgs(args)
	return root.ExecuteContext(ctx)
}

// Everything is measured once, with few messages, and put into a copy of the page.
func TestSmoke(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("it starts a cluster and some eighty processes, which takes up to a minute")
	}
	dir := t.TempDir()
	page := filepath.Join(dir, "scaling.md")
	before, err := os.ReadFile("../../docs/scaling.md")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(page, before, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), "scale", "--quick", "--out", dir, "--page", page); err != nil {
		t.Fatal(err)
	}
	after, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{"NaN", "Inf", "%!"} {
		if strings.Contains(string(after), bad) {
			t.Errorf("the page has %s:\n%s", bad, after)
		}
	}
	charts, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range charts {
		if name := "(scaling/" + filepath.Base(file) + ")"; !strings.Contains(string(after), name) {
			t.Errorf("the page does not show %s", name)
		}
	}
	if want := strings.Count(string(after), "](scaling/") - 1; len(charts) != want { // one is results.ndjson
		t.Errorf("%d charts, and the page shows %d", len(charts), want)
	}
}
