package messaging

import (
	"context"
	"testing"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(error) {})) // what tests provoke is not to be read
	goleak.VerifyTestMain(m)
}

func newTelemetry(t testing.TB, cfg Config) *Telemetry {
	t.Helper()
	if cfg.TracerProvider == nil { // not the global one, which a test sets
		cfg.TracerProvider = noop.NewTracerProvider()
	}
	tel, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return tel
}

func sampledTracers(t testing.TB) trace.TracerProvider {
	t.Helper()
	return sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(tracetest.NewSpanRecorder()))
}

func recorded(t testing.TB, opts ...sdktrace.TracerProviderOption) (*tracetest.SpanRecorder, trace.TracerProvider) {
	t.Helper()
	r := tracetest.NewSpanRecorder()
	return r, sdktrace.NewTracerProvider(append(opts, sdktrace.WithSpanProcessor(r))...)
}

// last returns the span that ended last.
func last(t testing.TB, r *tracetest.SpanRecorder) sdktrace.ReadOnlySpan {
	t.Helper()
	spans := r.Ended()
	if len(spans) == 0 {
		t.Fatal("no span has ended")
	}
	return spans[len(spans)-1]
}

func attr(s sdktrace.ReadOnlySpan, key string) string {
	for _, a := range s.Attributes() {
		if string(a.Key) == key {
			return a.Value.String()
		}
	}
	return ""
}

// A meter collects metrics on demand.
type meter struct {
	*metric.MeterProvider

	reader *metric.ManualReader
}

func newMeter() meter {
	r := metric.NewManualReader()
	return meter{metric.NewMeterProvider(metric.WithReader(r)), r}
}

func (m meter) collect(t testing.TB) map[string]metricdata.Metrics {
	t.Helper()
	var rm metricdata.ResourceMetrics
	if err := m.reader.Collect(context.Background(), &rm); err != nil {
		t.Fatal(err)
	}
	all := make(map[string]metricdata.Metrics)
	for _, sm := range rm.ScopeMetrics {
		for _, x := range sm.Metrics {
			all[x.Name] = x
		}
	}
	return all
}
