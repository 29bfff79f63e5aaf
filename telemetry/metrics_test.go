package telemetry_test

import (
	"bufio"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strconv"
	"strings"
	"testing"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"go.opentelemetry.io/otel/metric"

	"github.com/monotel/monotel/telemetry"
)

func scrape(t *testing.T, tel *telemetry.Telemetry, accept string) *http.Response {
	t.Helper()
	req := httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", http.NoBody)
	req.Header.Set("Accept", accept)
	w := httptest.NewRecorder()
	tel.MetricsHandler().ServeHTTP(w, req)
	return w.Result()
}

var sample = regexp.MustCompile(`^([^ {]+(?:\{[^}]*\})?) (\S+)(?: # (\{.*\}) .*)?$`)

var changing = regexp.MustCompile(`^(go|process|promhttp)_|_bucket\{`)

// scrapeText returns the series of the text format and of OpenMetrics with
// exemplars, which must agree.
func scrapeText(t *testing.T, tel *telemetry.Telemetry) (series map[string]float64, exemplars map[string]string) {
	t.Helper()
	read := func(accept string) (map[string]float64, map[string]string) {
		res := scrape(t, tel, accept)
		defer func() { _ = res.Body.Close() }()
		series, exemplars := map[string]float64{}, map[string]string{}
		lines := bufio.NewScanner(res.Body)
		for lines.Scan() {
			if strings.HasPrefix(lines.Text(), "#") {
				continue
			}
			m := sample.FindStringSubmatch(lines.Text())
			if m == nil {
				t.Errorf("not a sample: %q", lines.Text())
				continue
			}
			v, err := strconv.ParseFloat(m[2], 64)
			if err != nil {
				t.Error(err)
			}
			series[m[1]] = v
			if m[3] != "" {
				exemplars[m[1]] = m[3]
			}
		}
		return series, exemplars
	}
	text, none := read("text/plain")
	if len(none) > 0 {
		t.Errorf("the text format has exemplars: %v", none)
	}
	open, exemplars := read("application/openmetrics-text;version=1.0.0")
	for name, v := range text {
		// Of the process they change; of buckets they have other names.
		if !changing.MatchString(name) && open[name] != v {
			t.Errorf("%s is %v as text and %v in OpenMetrics", name, v, open[name])
		}
	}
	return text, exemplars
}

func TestMetricsHandler_exemplars(t *testing.T) {
	t.Parallel()
	tel := setup(t, telemetry.WithSpanExporter(fakeExporter{}))
	h, err := tel.MeterProvider().Meter("test").Float64Histogram("wait", metric.WithUnit("s"), metric.WithExplicitBucketBoundaries(1, 2))
	if err != nil {
		t.Fatal(err)
	}
	ctx, s := tel.TracerProvider().Tracer("test").Start(t.Context(), "measured")
	h.Record(ctx, 1.5)
	s.End()
	series, exemplars := scrapeText(t, tel)
	if series[`wait_seconds_bucket{le="2"}`] != 1 || series[`wait_seconds_bucket{le="1"}`] != 0 {
		t.Errorf("buckets of %v", series)
	}
	want := `trace_id="` + s.SpanContext().TraceID().String() + `"`
	found := false
	for name, e := range exemplars {
		found = found || strings.HasPrefix(name, "wait_seconds_bucket") && strings.Contains(e, want)
	}
	if !found {
		t.Errorf("no exemplar with %s in %v", want, exemplars)
	}
	for name := range series {
		if strings.Contains(name, "otel_scope") {
			t.Errorf("%s has labels of the scope", name)
		}
	}
}

func TestWithNativeHistograms(t *testing.T) {
	t.Parallel()
	for _, native := range []bool{false, true} {
		opts := []telemetry.Option{telemetry.WithSpanExporter(fakeExporter{})}
		if native {
			opts = append(opts, telemetry.WithNativeHistograms())
		}
		tel := setup(t, opts...)
		h, err := tel.MeterProvider().Meter("test").Float64Histogram("wait", metric.WithExplicitBucketBoundaries(1, 2))
		if err != nil {
			t.Fatal(err)
		}
		h.Record(t.Context(), 1.5)
		res := scrape(t, tel, "application/vnd.google.protobuf;proto=io.prometheus.client.MetricFamily;encoding=delimited")
		dec := expfmt.NewDecoder(res.Body, expfmt.ResponseFormat(res.Header))
		var got *dto.Histogram
		for {
			var f dto.MetricFamily
			if err := dec.Decode(&f); err != nil {
				if err != io.EOF { //nolint:errorlint // as documented
					t.Fatal(err)
				}
				break
			}
			if f.GetName() == "wait" {
				got = f.GetMetric()[0].GetHistogram()
			}
		}
		_ = res.Body.Close()
		if got == nil {
			t.Fatal("there is no histogram")
		}
		if isNative := len(got.GetPositiveSpan()) > 0; isNative != native {
			t.Errorf("WithNativeHistograms %v: native is %v: %v", native, isNative, got)
		}
	}
}
