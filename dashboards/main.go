// Command dashboards makes the boards for Grafana, the rules for Prometheus and
// the list of their queries from the code, and writes them beside itself:
//
//	go run .
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/monotel/monotel/telemetry/messaging"
)

func main() {
	if err := run("."); err != nil {
		fmt.Fprintln(os.Stderr, "dashboards:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	files, err := artefacts()
	if err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		const everybodyReads = 0o644
		if err := os.WriteFile(filepath.Join(dir, name), files[name], everybodyReads); err != nil {
			return err
		}
	}
	return nil
}

// A query is one that a board or a rule asks, ready for Prometheus or Jaeger, so that a
// test can ask it.
type query struct {
	From       string   `json:"from"`                   // where it is asked
	Expr       string   `json:"expr,omitempty"`         // for Prometheus; Grafana's variables are filled in: all, over 1 m and 1 h
	Tags       string   `json:"tags,omitempty"`         // instead, what is searched for in Jaeger: an attribute of a span, as key=value
	Metrics    []string `json:"metrics,omitempty"`      // that Expr reads
	MayBeEmpty string   `json:"may_be_empty,omitempty"` // why it returns nothing in a healthy system
	Provoked   bool     `json:"provoked,omitempty"`     // it may be empty, but not in the end-to-end run
}

// artefacts makes all files, by their path.
func artefacts() (map[string][]byte, error) {
	c, err := newCatalogue(slices.Concat(messaging.Metrics(), spanMetrics))
	if err != nil {
		return nil, err
	}
	files, queries, err := buildRules(c)
	if err != nil {
		return nil, err
	}
	var errs []error
	for _, b := range boards() {
		text, asked, err := buildBoard(c, b)
		files["grafana/"+b.uid+".json"] = text
		queries, errs = append(queries, asked...), append(errs, err)
	}
	files["queries.json"], err = toJSON(queries)
	return files, errors.Join(append(errs, err)...)
}

var unescape = strings.NewReplacer(`\u003c`, "<", `\u003e`, ">", `\u0026`, "&")

func toJSON(v any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	err := e.Encode(v)
	// The library's own types escape what HTML would read.
	return []byte(unescape.Replace(b.String())), err
}
