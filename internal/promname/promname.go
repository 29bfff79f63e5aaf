// Package promname knows what our metrics and attributes are called in
// Prometheus, as the exporter of package telemetry translates them.
package promname

import (
	"github.com/prometheus/otlptranslator"
	"go.opentelemetry.io/otel/attribute"

	"github.com/monotel/monotel/telemetry/messaging"
)

var kinds = map[messaging.MetricKind]otlptranslator.MetricType{
	messaging.Counter:       otlptranslator.MetricTypeMonotonicCounter,
	messaging.UpDownCounter: otlptranslator.MetricTypeNonMonotonicCounter,
	messaging.Histogram:     otlptranslator.MetricTypeHistogram,
	messaging.Gauge:         otlptranslator.MetricTypeGauge,
}

// Metric is the name of a metric. A histogram's series have the suffixes _bucket,
// _count and _sum besides.
func Metric(m messaging.Metric) (string, error) {
	namer := otlptranslator.NewMetricNamer("", otlptranslator.UnderscoreEscapingWithSuffixes)
	return namer.Build(otlptranslator.Metric{Name: m.Name, Unit: m.Unit, Type: kinds[m.Kind]})
}

// Label is the name of the label that an attribute becomes.
func Label(key attribute.Key) (string, error) {
	namer := otlptranslator.LabelNamer{}
	return namer.Build(string(key))
}
