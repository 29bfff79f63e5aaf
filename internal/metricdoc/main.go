// Command metricdoc writes the catalogue of docs/metrics.md from the code, and
// puts it into the file it is given:
//
//	go run ./internal/metricdoc docs/metrics.md
package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"

	"github.com/monotel/monotel/internal/docpage"
	"github.com/monotel/monotel/internal/promname"
	"github.com/monotel/monotel/telemetry/messaging"
)

func main() {
	if len(os.Args) != 2 { //nolint:mnd // the command and the file
		fmt.Fprintln(os.Stderr, "metricdoc: want the file to write, such as docs/metrics.md")
		os.Exit(2) //nolint:mnd // usage
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "metricdoc:", err)
		os.Exit(1)
	}
}

func run(file string) error {
	text, err := catalogue(messaging.Metrics())
	if err != nil {
		return err
	}
	return docpage.Update(file, docpage.Section{Name: "catalogue", Target: "docs", Text: text})
}

// catalogue describes each metric, by both of its names.
func catalogue(metrics []messaging.Metric) (string, error) {
	var b strings.Builder
	var errs []error
	for i, m := range metrics {
		if i > 0 {
			b.WriteString("\n")
		}
		name, err := promname.Metric(m)
		errs = append(errs, err)
		fmt.Fprintf(&b, "### `%s`\n\n%s\n\n", m.Name, m.Description)
		fmt.Fprintf(&b, "- Prometheus: `%s`\n", name)
		fmt.Fprintf(&b, "- %s, %s\n", m.Kind, unit(m.Unit))
		attrs := make([]string, 0, len(m.Attributes))
		for _, a := range m.Attributes {
			label, err := promname.Label(a)
			errs = append(errs, err)
			attrs = append(attrs, attributeText(a, label))
		}
		fmt.Fprintf(&b, "- by %s\n", strings.Join(attrs, ", "))
		if len(m.Buckets) > 0 {
			bounds := make([]string, 0, len(m.Buckets))
			for _, v := range m.Buckets {
				bounds = append(bounds, strconv.FormatFloat(v, 'g', -1, 64))
			}
			fmt.Fprintf(&b, "- buckets up to %s\n", strings.Join(bounds, ", "))
		}
	}
	return b.String(), errors.Join(errs...)
}

// attributeText shows an attribute, and its label where that is not just the name
// with underscores.
func attributeText(a attribute.Key, label string) string {
	if strings.ReplaceAll(string(a), ".", "_") == label {
		return "`" + string(a) + "`"
	}
	return "`" + string(a) + "` (`" + label + "`)"
}

func unit(u string) string {
	if u == "s" {
		return "in seconds"
	}
	return "in " + strings.Trim(u, "{}") + "s"
}
