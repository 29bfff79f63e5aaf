package main

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"go.opentelemetry.io/otel/attribute"

	"github.com/monotel/monotel/internal/promname"
	"github.com/monotel/monotel/telemetry/messaging"
)

// Queries are written in the names of the code, such as mono.settlements and
// error.type, and translated as Prometheus's exporter does. So a metric that is
// renamed or goes away is found here, and not by whoever is paged.

// spanMetrics are those of telemetry.Setup, which a test compares with what it
// exports.
var spanMetrics = []messaging.Metric{
	{
		Name: "otel.sdk.processor.span.processed", Kind: messaging.Counter, Unit: "{span}",
		Attributes: []attribute.Key{"error.type"},
	},
	{
		Name: "otel.sdk.exporter.span.exported", Kind: messaging.Counter, Unit: "{span}",
		Attributes: []attribute.Key{"error.type"},
	},
	{Name: "otel.sdk.processor.span.queue.size", Kind: messaging.UpDownCounter, Unit: "{span}"},
	{Name: "otel.sdk.processor.span.queue.capacity", Kind: messaging.UpDownCounter, Unit: "{span}"},
}

// others come from Prometheus itself and its client library, with their labels
// besides job and instance.
var others = map[string][]string{
	"up":                            nil,
	"scrape_samples_scraped":        nil,
	"scrape_duration_seconds":       nil,
	"ALERTS":                        {"alertname", "alertstate", "severity", consumerLabel, streamLabel},
	"target_info":                   {"service_name"},
	"go_goroutines":                 nil,
	"process_resident_memory_bytes": nil,
	"process_cpu_seconds_total":     nil,
	"process_start_time_seconds":    nil,
}

// words stand for what queries repeat.
var words = strings.NewReplacer(
	"@consumer", consumerLabel,
	"@stream", streamLabel,
	"@event", "messaging.destination.template",
	"@rate", "$__rate_interval",
	// Selectors of a board: what an instance counts, what it says of itself, what is
	// in the dead-letter stream, and what the server says of a consumer. The latter
	// two are the same in all instances.
	"@own", `job=~"$job", instance=~"$instance", messaging.consumer.group.name=~"$consumer"`,
	"@app", `job=~"$job", instance=~"$instance"`,
	"@letters", `job=~"$job", messaging.consumer.group.name=~"$consumer"`,
	"@server", `job=~"$job", messaging.nats.stream=~"$stream", messaging.consumer.group.name=~"$consumer"`,
)

const (
	consumerLabel = "messaging_consumer_group_name"
	streamLabel   = "messaging_nats_stream"
	nameLabel     = "__name__"             // of the metric
	overflowLabel = "otel_metric_overflow" // of what the SDK puts together beyond its limit
)

// A labelSet holds names of labels.
type labelSet map[string]bool

func setOf(names ...string) labelSet {
	l := labelSet{}
	for _, n := range names {
		l[n] = true
	}
	return l
}

// A catalogue knows what exists.
type catalogue struct {
	names  map[string]string   // Prometheus's, by ours
	series map[string]labelSet // by Prometheus's name
}

func newCatalogue(metrics []messaging.Metric) (*catalogue, error) {
	c := &catalogue{names: map[string]string{}, series: map[string]labelSet{}}
	var errs []error
	for _, m := range metrics {
		name, err := promname.Metric(m)
		errs = append(errs, err)
		own := setOf("job", "instance")
		for _, a := range m.Attributes {
			label, err := promname.Label(a)
			errs = append(errs, err)
			own[label] = true
			c.names[string(a)] = label
		}
		if m.Kind != messaging.Histogram {
			c.add(m.Name, name, own)
			continue
		}
		for _, suffix := range []string{"_bucket", "_count", "_sum"} {
			c.add(m.Name+suffix, name+suffix, own)
		}
		bucket := setOf("le")
		for l := range own {
			bucket[l] = true
		}
		c.series[name+"_bucket"] = bucket
	}
	for name, more := range others {
		c.series[name] = setOf(append([]string{"job", "instance"}, more...)...)
	}
	return c, errors.Join(errs...)
}

func (c *catalogue) add(ours, prometheus string, own labelSet) {
	c.names[ours], c.series[prometheus] = prometheus, own
}

// Ours have dots; a single word such as settlement is a label that keeps its name.
var ourName = regexp.MustCompile(`\b(?:mono|messaging|otel|error)(?:\.[a-z_]+)+`)

// translate replaces our names and words in a query, a legend or an annotation.
func (c *catalogue) translate(text string) (string, error) {
	var errs []error
	out := ourName.ReplaceAllStringFunc(words.Replace(text), func(ours string) string {
		name, ok := c.names[ours]
		if !ok {
			errs = append(errs, fmt.Errorf("there is no metric or attribute %s", ours))
		}
		return name
	})
	return out, errors.Join(errs...)
}
