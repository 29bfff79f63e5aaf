// Package monotel_test keeps promises that the repository makes as a whole: who
// may import whom, and that its pages quote code that runs.
package monotel_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/monotel/monotel"

// deps lists what a package reaches, itself included.
func deps(t *testing.T, pkg string) []string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", pkg).Output()
	if err != nil {
		t.Fatalf("go list -deps %s: %v", pkg, err)
	}
	return strings.Fields(string(out))
}

func TestImports(t *testing.T) {
	t.Parallel()
	frontEnds := []string{module + "/helper", module + "/examples", module + "/internal/cli", module + "/internal/operator", module + "/internal/screen", "testing"}
	sdks := []string{
		"go.opentelemetry.io/otel/sdk", "go.opentelemetry.io/otel/exporters", "go.opentelemetry.io/contrib", "github.com/prometheus",
		"cel.dev", "charm.land", "github.com/spf13",
	}
	mono, monotest, dlq, triage := module+"/mono", module+"/mono/monotest", module+"/dlq", module+"/dlq/triage"
	for _, tt := range []struct {
		pkg    string
		refuse []string // import path prefixes
		allow  []string
	}{
		{pkg: "./mono", refuse: slices.Concat(frontEnds, sdks, []string{monotest, triage})},
		{pkg: "./mono/embedded", refuse: frontEnds},
		{pkg: "./telemetry/messaging", refuse: slices.Concat(frontEnds, sdks, []string{mono, dlq})},
		{pkg: "./dlq", refuse: slices.Concat(frontEnds, sdks, []string{mono, triage})},
		{pkg: "./dlq/triage", refuse: slices.Concat(frontEnds, sdks, []string{mono}), allow: []string{"cel.dev"}},
		{pkg: "./telemetry", refuse: slices.Concat(frontEnds, []string{mono})},
		{pkg: "./helper", refuse: slices.Concat(frontEnds, sdks, []string{monotest}), allow: []string{module + "/helper"}},
		{pkg: "./internal/jsapi", refuse: slices.Concat(frontEnds, sdks, []string{mono, dlq})},
	} {
		t.Run(tt.pkg, func(t *testing.T) {
			t.Parallel()
			for _, dep := range deps(t, tt.pkg) {
				for _, r := range tt.refuse {
					if slices.Contains(tt.allow, r) {
						continue
					}
					if dep == r || strings.HasPrefix(dep, r+"/") {
						t.Errorf("%s reaches %s", tt.pkg, dep)
					}
				}
			}
		})
	}
}

// TestServerImportedOnce keeps nats-server behind one package.
func TestServerImportedOnce(t *testing.T) {
	t.Parallel()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-f", `{{.ImportPath}} {{join .Imports " "}}`, "./...").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(out)) {
		pkg, imports, _ := strings.Cut(strings.TrimSpace(line), " ")
		if strings.Contains(imports, "github.com/nats-io/nats-server/") && pkg != module+"/mono/embedded" {
			t.Errorf("%s imports nats-server; only mono/embedded may", pkg)
		}
	}
}

func pages(t *testing.T) []string {
	t.Helper()
	all := []string{"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"}
	err := filepath.WalkDir("docs", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(path, ".md") {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// goBlock finds a Go snippet and the comment before it that names its source.
var goBlock = regexp.MustCompile("(?s)(?:<!-- from ([^ ]+) -->\n+)?```go\n(.*?)```")

// TestSnippets checks that each Go snippet of a page stands, line for line, in
// the file that the comment above it names: a test or an example, which CI runs.
func TestSnippets(t *testing.T) {
	t.Parallel()
	found := 0
	for _, page := range pages(t) {
		for _, m := range goBlock.FindAllStringSubmatch(read(t, page), -1) {
			source, snippet := m[1], m[2]
			if source == "" {
				t.Errorf("%s: a Go snippet does not say where it runs: put <!-- from FILE --> above it:\n%s", page, snippet)
				continue
			}
			found++
			if !strings.Contains(unindent(read(t, source)), unindent(snippet)) {
				t.Errorf("%s: the snippet from %s is not there any more:\n%s", page, source, snippet)
			}
		}
	}
	if found == 0 {
		t.Error("no page quotes any code; the README should")
	}
}

// unindent drops leading space and blank lines, so that a snippet may be quoted
// from inside a function.
func unindent(s string) string {
	var b strings.Builder
	for line := range strings.Lines(s) {
		if line = strings.TrimSpace(line); line != "" {
			b.WriteString(line + "\n")
		}
	}
	return b.String()
}

var codeBlock = regexp.MustCompile("(?s)```.*?```")

var pageLink = regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)

func TestLinks(t *testing.T) {
	t.Parallel()
	for _, page := range pages(t) {
		text := codeBlock.ReplaceAllString(read(t, page), "")
		for _, m := range pageLink.FindAllStringSubmatch(text, -1) {
			target := filepath.Join(filepath.Dir(page), m[1])
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link to %s: %v", page, m[1], err)
			}
		}
	}
}

var testName = regexp.MustCompile("`((?:Test|Fuzz|Example)[A-Za-z0-9_]*)[^`]*`")

// TestGuarantees checks that each test that docs/guarantees.md names exists, and
// that each guarantee names one.
func TestGuarantees(t *testing.T) {
	t.Parallel()
	var defined []string
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasSuffix(path, "_test.go") {
			for _, m := range regexp.MustCompile(`(?m)^func ((?:Test|Fuzz|Example)\w*)\(`).FindAllStringSubmatch(read(t, path), -1) {
				defined = append(defined, m[1])
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for section := range strings.SplitSeq(read(t, "docs/guarantees.md"), "\n## ") {
		title, _, _ := strings.Cut(section, "\n")
		names := testName.FindAllStringSubmatch(section, -1)
		for _, m := range names {
			if !slices.Contains(defined, m[1]) {
				t.Errorf("guarantee %q: there is no %s", title, m[1])
			}
		}
		if len(names) == 0 && !strings.HasPrefix(title, "# ") {
			t.Errorf("guarantee %q names no test", title)
		}
	}
}
