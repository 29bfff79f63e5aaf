package main

import (
	"bytes"
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/otlptranslator"
	"go.yaml.in/yaml/v3"

	"github.com/monotel/monotel/telemetry/messaging"
)

func made(t *testing.T) map[string][]byte {
	t.Helper()
	files, err := artefacts()
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// What is committed is what the code makes, twice the same and nothing else.
func TestFilesAreCurrent(t *testing.T) {
	t.Parallel()
	files, again := made(t), made(t)
	for name, want := range files {
		if !bytes.Equal(want, again[name]) {
			t.Errorf("%s differs from one time to the next", name)
		}
		got, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is not what the code says (%v): run make dashboards", name, err)
		}
	}
	boards, err := filepath.Glob("grafana/*")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range boards {
		if files[filepath.ToSlash(name)] == nil {
			t.Errorf("%s is made by nothing", name)
		}
	}
}

// A query that names what does not exist is not made.
func TestQueriesAreChecked(t *testing.T) {
	t.Parallel()
	c, err := newCatalogue(slices.Concat(messaging.Metrics(), spanMetrics))
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ expr, legend, want string }{
		{`sum by (@consumer) (rate(mono.settlements{@own}[$__rate_interval]))`, "{{@consumer}}", ""},
		{`sum without (instance) (mono.handlers.active)`, "{{@event}}", ""},
		{`histogram_quantile(0.9, sum by (le) (rate(mono.queue.duration_bucket[5m])))`, "90 %", ""},
		{`count by (metric) (label_replace({otel_metric_overflow="true"}, "metric", "$1", "__name__", "(.+)"))`, "{{metric}}", ""},
		{`mono.nothing`, "", "there is no metric or attribute mono.nothing"},
		{`mono_nothing_total`, "", `there is no metric "mono_nothing_total"`},
		{`mono.queue.duration`, "", "there is no metric or attribute mono.queue.duration"},
		{`mono.settlements{reason="panic"}`, "", `there is no label "reason"`},
		{`{__name__=~"up|down"}`, "", `there is no metric "down"`},
		{`sum by (le) (mono.settlements)`, "", `there is no label "le"`},
		{`mono.settlements / on (@stream) mono.redeliveries`, "", `there is no label "messaging_nats_stream"`},
		{`sum by (job) (mono.settlements) / sum by (instance) (mono.settlements)`, "", "matches"},
		{`histogram_quantile(0.9, sum by (job) (rate(mono.queue.duration_bucket[5m])))`, "", `there is no label "le"`},
		{`label_replace(mono.handlers.active, "a", "$1", "b", "(.+)")`, "", `there is no label "b"`},
		{`sum by (job) (mono.settlements)`, "{{instance}}", "shows the label instance"},
		{`sum(mono.settlements`, "", "parse error"},
	} {
		expr, err := c.translate(tt.expr)
		if err == nil {
			var q checked
			if q, err = c.check(expr); err == nil {
				legend, _ := c.translate(tt.legend)
				err = q.checkText(legend)
			}
		}
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.expr, err, tt.want)
		}
	}
}

// What Grafana needs to import a board, and to show it where others did.
func TestBoards(t *testing.T) {
	t.Parallel()
	uids := map[string]bool{}
	for name, text := range made(t) {
		if !strings.HasPrefix(name, "grafana/") {
			continue
		}
		var b struct {
			ID            *int   `json:"id"`
			UID           string `json:"uid"`
			SchemaVersion int    `json:"schemaVersion"` //nolint:tagliatelle // Grafana's name
			Panels        []struct {
				ID          int    `json:"id"`
				Type        string `json:"type"`
				Title       string `json:"title"`
				Description string `json:"description"`
				GridPos     struct {
					H int `json:"h"`
					W int `json:"w"`
					X int `json:"x"`
					Y int `json:"y"`
				} `json:"gridPos"` //nolint:tagliatelle // Grafana's name
				Datasource struct {
					UID string `json:"uid"`
				} `json:"datasource"`
			} `json:"panels"`
		}
		if err := json.Unmarshal(text, &b); err != nil {
			t.Fatal(err)
		}
		if b.ID != nil || b.UID != strings.TrimSuffix(filepath.Base(name), ".json") || uids[b.UID] || len(b.UID) > 40 || b.SchemaVersion != schemaVersion {
			t.Errorf("%s: id %v, uid %q, schema %d", name, b.ID, b.UID, b.SchemaVersion)
		}
		uids[b.UID] = true
		seen := map[int]bool{}
		taken := map[[2]int]string{}
		for _, p := range b.Panels {
			if p.ID == 0 || seen[p.ID] {
				t.Errorf("%s: %s has the id %d", name, p.Title, p.ID)
			}
			seen[p.ID] = true
			if p.Type != "row" && p.Type != "text" {
				if p.Description == "" || !strings.HasPrefix(p.Datasource.UID, "${") {
					t.Errorf("%s: %s: description %q, data source %q", name, p.Title, p.Description, p.Datasource.UID)
				}
			}
			for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
				for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
					if other := taken[[2]int{x, y}]; other != "" || x >= boardWidth {
						t.Fatalf("%s: %q is above %q", name, p.Title, other)
					}
					taken[[2]int{x, y}] = p.Title
				}
			}
		}
	}
	for _, a := range alerts {
		if !uids[a.board] {
			t.Errorf("%s: there is no board %q", a.name, a.board)
		}
	}
}

// Whoever is paged finds a section for each alert, and none for what is no alert.
func TestRunbook(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/monitoring.md")
	if err != nil {
		t.Fatal(err)
	}
	var sections, want []string
	for _, m := range regexp.MustCompile(`(?m)^### (Monotel\w+)$`).FindAllStringSubmatch(string(page), -1) {
		sections = append(sections, m[1])
	}
	for _, a := range alerts {
		want = append(want, a.name)
	}
	slices.Sort(sections)
	slices.Sort(want)
	if !slices.Equal(sections, want) {
		t.Errorf("docs/monitoring.md has sections for %q, want %q", sections, want)
	}
	for name := range made(t) {
		file, ok := strings.CutPrefix(name, "grafana/")
		if uid := strings.TrimSuffix(file, ".json"); ok && !bytes.Contains(page, []byte("`"+uid+"`")) {
			t.Errorf("docs/monitoring.md does not name %s", uid)
		}
	}
}

// The exemplars' label and the data sources are known in three places.
func TestProvisioning(t *testing.T) {
	t.Parallel()
	var sources struct {
		Datasources []struct {
			UID, Type, URL string
			JSONData       struct {
				Exemplars []struct {
					Name          string
					DatasourceUID string `yaml:"datasourceUid"` //nolint:tagliatelle // Grafana's name
				} `yaml:"exemplarTraceIdDestinations"` //nolint:tagliatelle // Grafana's name
			} `yaml:"jsonData"` //nolint:tagliatelle // Grafana's name
		}
	}
	text, err := os.ReadFile("provisioning/datasources/monotel.yml")
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(text, &sources); err != nil {
		t.Fatal(err)
	}
	kinds, linked := map[string]string{}, 0
	for _, s := range sources.Datasources {
		kinds[s.UID] = s.Type
		for _, e := range s.JSONData.Exemplars {
			linked++
			if e.Name != otlptranslator.ExemplarTraceIDKey || e.DatasourceUID != "jaeger" {
				t.Errorf("exemplars lead by %q to %q", e.Name, e.DatasourceUID)
			}
		}
	}
	if linked != 1 || kinds["prometheus"] != "prometheus" || kinds["jaeger"] != "jaeger" {
		t.Errorf("data sources are %v, %d with exemplars", kinds, linked)
	}
}

// A ruleTest is what this needs of a file of promtool's.
type ruleTest struct {
	Tests []struct {
		Name string
		Expr []struct {
			Expr    string
			Samples []any `yaml:"exp_samples"`
		} `yaml:"promql_expr_test"`
	}
}

var asked = regexp.MustCompile(`^ALERTS{alertname="(\w+)", alertstate="firing"}$`)

// Each alert has a test in which it does not fire, then fires, then ends.
func TestAlertsAreTested(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("rules/*_test.yml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	seen := map[string]bool{}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		var f ruleTest
		if err := yaml.Unmarshal(text, &f); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		for _, test := range f.Tests {
			course := map[string]string{}
			for _, e := range test.Expr {
				m := asked.FindStringSubmatch(e.Expr)
				if m == nil {
					t.Fatalf("%s: %s: %s is no alert", name, test.Name, e.Expr)
				}
				if len(e.Samples) == 0 {
					course[m[1]] += "."
				} else {
					course[m[1]] += "!"
				}
			}
			for alert, c := range course {
				seen[alert] = seen[alert] || strings.Contains(c, ".!") && strings.Contains(c, "!.")
			}
		}
	}
	for _, a := range alerts {
		if !seen[a.name] {
			t.Errorf("no test sees %s begin and end", a.name)
		}
		delete(seen, a.name)
	}
	for name := range seen {
		t.Errorf("%s is tested and does not exist", name)
	}
}

// TestRules runs Prometheus's own tool over the rules and their tests.
func TestRules(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("building promtool takes minutes")
	}
	tests, err := filepath.Glob("rules/*_test.yml")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rules", "--lint=all", "--lint-fatal", "rules/recording.yml", "rules/alerts.yml"},
		append([]string{"test", "rules"}, tests...),
	} {
		// Built as for the e2e images, so that what is compiled for them serves here. It
		// is not `go tool`, which takes no -tags.
		build := []string{
			"run", "-modfile=../e2e/images/prometheus/go.mod", "-trimpath", "-buildvcs=false", "-tags=remove_all_sd",
			"github.com/prometheus/prometheus/cmd/promtool",
		}
		cmd := exec.CommandContext(t.Context(), "go", slices.Concat(build, args)...)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args[:2], " "), err, out)
		}
	}
}

// run writes what artefacts makes.
func TestRun(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	if err := run(dir); err == nil {
		t.Error("run writes into folders that do not exist")
	}
	for _, sub := range []string{"grafana", "rules"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(dir); err != nil {
		t.Fatal(err)
	}
	n := 0
	err := filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			n++
		}
		return err
	})
	if want := len(made(t)); err != nil || n != want {
		t.Errorf("wrote %d files, %v, want %d", n, err, want)
	}
}
