package telemetry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	collogs "go.opentelemetry.io/proto/otlp/collector/logs/v1"
	colmetrics "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	coltrace "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/monotel/monotel/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const patience = 3 * time.Minute

// setup is telemetry.Setup without globals and without output. It ends with the
// test.
func setup(t *testing.T, opts ...telemetry.Option) *telemetry.Telemetry {
	t.Helper()
	opts = append([]telemetry.Option{telemetry.WithoutGlobals(), telemetry.WithLogger(slog.New(slog.DiscardHandler))}, opts...)
	tel, err := telemetry.Setup(t.Context(), opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		_ = tel.Shutdown(ctx)
	})
	return tel
}

type flusher interface{ ForceFlush(context.Context) error }

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

// A collector takes what is sent by OTLP, over HTTP or gRPC.
type collector struct {
	coltrace.UnimplementedTraceServiceServer

	mu      sync.Mutex
	spans   []*tracepb.ResourceSpans
	metrics int
	logs    []*collogs.ExportLogsServiceRequest
}

func (c *collector) Export(_ context.Context, req *coltrace.ExportTraceServiceRequest) (*coltrace.ExportTraceServiceResponse, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.spans = append(c.spans, req.GetResourceSpans()...)
	return &coltrace.ExportTraceServiceResponse{}, nil
}

func (c *collector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	var in io.Reader = r.Body
	if r.Header.Get("Content-Encoding") == "gzip" {
		z, err := gzip.NewReader(r.Body)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		in = z
	}
	body, err := io.ReadAll(in)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	switch r.URL.Path {
	case "/v1/traces":
		var req coltrace.ExportTraceServiceRequest
		if err = proto.Unmarshal(body, &req); err == nil {
			_, err = c.Export(r.Context(), &req)
		}
	case "/v1/metrics":
		var req colmetrics.ExportMetricsServiceRequest
		if err = proto.Unmarshal(body, &req); err == nil {
			c.mu.Lock()
			c.metrics += len(req.GetResourceMetrics())
			c.mu.Unlock()
		}
	case "/v1/logs":
		var req collogs.ExportLogsServiceRequest
		if err = proto.Unmarshal(body, &req); err == nil {
			c.mu.Lock()
			c.logs = append(c.logs, &req)
			c.mu.Unlock()
		}
	default:
		err = errors.New("unknown path")
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/x-protobuf")
}

// names lists the spans that arrived, as service/name.
func (c *collector) names() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var names []string
	for _, rs := range c.spans {
		service := ""
		for _, a := range rs.GetResource().GetAttributes() {
			if a.GetKey() == "service.name" {
				service = a.GetValue().GetStringValue()
			}
		}
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				names = append(names, service+"/"+s.GetName())
			}
		}
	}
	return names
}

func span(t *testing.T, tel *telemetry.Telemetry, name string) trace.SpanContext {
	t.Helper()
	_, s := tel.TracerProvider().Tracer("test").Start(t.Context(), name)
	s.End()
	return s.SpanContext()
}

func TestSetup_otlpHTTP(t *testing.T) {
	var c collector
	server := httptest.NewServer(&c)
	defer server.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_METRICS_EXPORTER", "otlp")
	t.Setenv("OTEL_LOGS_EXPORTER", "otlp")
	tel := setup(t, telemetry.WithServiceName("shop"), telemetry.WithServiceVersion("1.2.3"))
	ctx, s := tel.TracerProvider().Tracer("test").Start(t.Context(), "by http")
	log := slog.New(tel.Handler(slog.DiscardHandler))
	log.DebugContext(ctx, "nobody wants to know")
	log.InfoContext(ctx, "it happened", "where", "here")
	s.End()
	if err := tel.Shutdown(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := c.names(); len(got) != 1 || got[0] != "shop/by http" {
		t.Errorf("the collector has the spans %q", got)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.metrics == 0 {
		t.Error("no metrics were pushed")
	}
	if len(c.logs) != 1 {
		t.Fatalf("%d exports of log records", len(c.logs))
	}
	records := c.logs[0].GetResourceLogs()[0].GetScopeLogs()[0].GetLogRecords()
	if len(records) != 1 {
		t.Errorf("%d log records: %v", len(records), records)
	}
	record := records[0]
	id := s.SpanContext().TraceID()
	if record.GetBody().GetStringValue() != "it happened" || !bytes.Equal(record.GetTraceId(), id[:]) {
		t.Errorf("log record %v is not of trace %v", record, id)
	}
	attrs := map[string]string{}
	for _, a := range c.spans[0].GetResource().GetAttributes() {
		attrs[a.GetKey()] = a.GetValue().GetStringValue()
	}
	if attrs["service.version"] != "1.2.3" || attrs["process.command_args"] != "" || attrs["process.command_line"] != "" {
		t.Errorf("resource is %v", attrs)
	}
}

func TestSetup_otlpGRPC(t *testing.T) {
	var c collector
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	coltrace.RegisterTraceServiceServer(server, &c)
	served := make(chan error, 1)
	go func() { served <- server.Serve(lis) }()
	defer func() {
		server.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	t.Setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://"+lis.Addr().String())
	t.Setenv("OTEL_SERVICE_NAME", "from-env")
	tel := setup(t, telemetry.WithServiceName("shop"))
	span(t, tel, "by gRPC")
	if err := tel.Shutdown(within(t)); err != nil {
		t.Fatal(err)
	}
	if got := c.names(); len(got) != 1 || got[0] != "from-env/by gRPC" {
		t.Errorf("the collector has the spans %q", got)
	}
}

// A collector that is not there costs the spans, which are counted.
func TestSetup_collectorDown(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	server.Close() // nobody listens there now
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	var out lockedBuffer
	tel := setup(t, telemetry.WithLogger(slog.New(slog.NewTextHandler(&out, nil))))
	for range 3 {
		span(t, tel, "lost")
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := tel.TracerProvider().(flusher).ForceFlush(ctx); err == nil {
		t.Error("a flush to nobody says that all is well")
	}
	series, _ := scrapeText(t, tel)
	if got := series[`otel_sdk_exporter_span_exported_total{error_type="export_failed"}`]; got != 3 {
		t.Errorf("%v spans are counted as not exported, want 3", got)
	}
	if got := out.String(); strings.Count(got, "\n") != 1 || !strings.Contains(got, "connection refused") {
		t.Errorf("the log says:\n%s", got)
	}
	span(t, tel, "lost, too")
	if err := tel.Shutdown(ctx); err == nil || !strings.Contains(err.Error(), "1 spans were not exported") {
		t.Errorf("Shutdown = %v", err)
	}
	span(t, tel, "after the end")
	series, _ = scrapeText(t, tel)
	if got := series["otel_sdk_processor_span_queue_size"]; got != 0 {
		t.Errorf("%v spans wait for ever", got)
	}
}

// A lockedBuffer is a buffer that may be written to from everywhere.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// A fakeExporter is a SpanExporter made of functions.
type fakeExporter struct {
	export   func(ctx context.Context, spans []sdktrace.ReadOnlySpan) error
	shutdown func(ctx context.Context) error
}

func (e fakeExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	if e.export == nil {
		return nil
	}
	return e.export(ctx, spans)
}

func (e fakeExporter) Shutdown(ctx context.Context) error {
	if e.shutdown == nil {
		return nil
	}
	return e.shutdown(ctx)
}

// Shutdown returns when its context ends, whatever the exporter does; and again,
// and from everywhere.
func TestShutdown_hangingExporter(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	tel := setup(t, telemetry.WithSpanExporter(fakeExporter{export: func(context.Context, []sdktrace.ReadOnlySpan) error {
		<-release // deaf to its context
		return nil
	}}))
	span(t, tel, "stuck")
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	for range 3 {
		all.Go(func() {
			if err := tel.Shutdown(ctx); !errors.Is(err, context.Canceled) {
				t.Errorf("Shutdown = %v", err)
			}
		})
	}
	cancel()
	all.Wait()
	close(release)
}

func TestShutdown_panickingExporter(t *testing.T) {
	t.Parallel()
	tel := setup(t, telemetry.WithSpanExporter(fakeExporter{
		export:   func(context.Context, []sdktrace.ReadOnlySpan) error { panic("export") },
		shutdown: func(context.Context) error { panic("shutdown") },
	}))
	span(t, tel, "lost")
	if err := tel.Shutdown(within(t)); err == nil || !strings.Contains(err.Error(), "panic") {
		t.Errorf("Shutdown = %v", err)
	}
}

// Nobody waits for a full queue, and what is dropped is counted to the span.
func TestSpanQueue_full(t *testing.T) {
	t.Parallel()
	const (
		size  = 4
		spans = 100
	)
	busy, release := make(chan int, 1), make(chan struct{})
	var once sync.Once
	tel := setup(t, telemetry.WithSpanQueueSize(size), telemetry.WithSpanExporter(fakeExporter{
		export: func(_ context.Context, ss []sdktrace.ReadOnlySpan) error {
			once.Do(func() {
				busy <- len(ss)
				<-release
			})
			return nil
		},
	}))
	// The first ones keep the exporter busy.
	for range size / 2 {
		span(t, tel, "first")
	}
	var first int
	select {
	case first = <-busy:
	case <-time.After(patience):
		t.Fatal("nothing is exported")
	}
	for range spans {
		span(t, tel, "more")
	}
	series, _ := scrapeText(t, tel)
	want := map[string]float64{
		`otel_sdk_processor_span_processed_total{error_type="queue_full"}`: float64(spans - size + size/2 - first),
		`otel_sdk_processor_span_queue_size`:                               size,
		`otel_sdk_processor_span_queue_capacity`:                           size,
	}
	for name, n := range want {
		if series[name] != n {
			t.Errorf("%s is %v, want %v", name, series[name], n)
		}
	}
	close(release)
	if err := tel.TracerProvider().(flusher).ForceFlush(within(t)); err != nil {
		t.Fatal(err)
	}
	series, _ = scrapeText(t, tel)
	exported := series[`otel_sdk_exporter_span_exported_total`]
	dropped := series[`otel_sdk_processor_span_processed_total{error_type="queue_full"}`]
	if exported+dropped != spans+size/2 || series[`otel_sdk_processor_span_queue_size`] != 0 {
		t.Errorf("%v exported and %v dropped of %d, %v waiting", exported, dropped, spans+size/2, series[`otel_sdk_processor_span_queue_size`])
	}
}

func TestSetup_globals(t *testing.T) {
	before := otel.GetTracerProvider()
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	setup(t) // without
	if otel.GetTracerProvider() != before {
		t.Error("WithoutGlobals sets the global TracerProvider")
	}
	tel, err := telemetry.Setup(t.Context(), telemetry.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		t.Fatal(err)
	}
	if otel.GetTracerProvider() != tel.TracerProvider() || otel.GetMeterProvider() != tel.MeterProvider() {
		t.Error("Setup does not set the globals")
	}
	if fields := otel.GetTextMapPropagator().Fields(); len(fields) == 0 {
		t.Error("Setup does not set the global propagator")
	}
	if err := tel.Shutdown(within(t)); err != nil {
		t.Error(err)
	}
}

func TestSetup_refuses(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		opts []telemetry.Option
		want []string
	}{
		{
			name: "every option at once",
			opts: []telemetry.Option{
				telemetry.WithServiceName(""), telemetry.WithSampleRatio(1.5), telemetry.WithSpanQueueSize(0),
				telemetry.WithRegistry(nil), telemetry.WithLogger(nil), nil,
			},
			want: []string{"WithServiceName", "WithSampleRatio", "WithSpanQueueSize", "WithRegistry", "WithLogger"},
		},
		{
			name: "every variable at once",
			env: map[string]string{
				"OTEL_BSP_MAX_QUEUE_SIZE": "many", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE": "-1", "OTEL_TRACES_SAMPLER": "sometimes",
				"OTEL_PROPAGATORS": "tracecontext, pigeon",
			},
			opts: []telemetry.Option{telemetry.WithServiceName("")},
			want: []string{
				"OTEL_BSP_MAX_QUEUE_SIZE", "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "OTEL_TRACES_SAMPLER", "OTEL_PROPAGATORS", "pigeon", "WithServiceName",
			},
		},
		{
			name: "every exporter at once",
			env: map[string]string{
				"OTEL_TRACES_EXPORTER": "pigeon", "OTEL_METRICS_EXPORTER": "pigeon", "OTEL_LOGS_EXPORTER": "pigeon",
			},
			want: []string{"OTEL_TRACES_EXPORTER", "OTEL_METRICS_EXPORTER", "OTEL_LOGS_EXPORTER"},
		},
		{name: "protocol", env: map[string]string{"OTEL_EXPORTER_OTLP_PROTOCOL": "pigeon"}, want: []string{"OTEL_EXPORTER_OTLP_PROTOCOL"}},
		{name: "sampler", env: map[string]string{"OTEL_TRACES_SAMPLER": "sometimes"}, want: []string{"OTEL_TRACES_SAMPLER", "sometimes"}},
		{
			name: "ratio", env: map[string]string{"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "2"},
			want: []string{"OTEL_TRACES_SAMPLER_ARG"},
		},
		{name: "traces", env: map[string]string{"OTEL_TRACES_EXPORTER": "pigeon"}, want: []string{"OTEL_TRACES_EXPORTER"}},
		{name: "metrics", env: map[string]string{"OTEL_METRICS_EXPORTER": "pigeon"}, want: []string{"OTEL_METRICS_EXPORTER"}},
		{name: "logs", env: map[string]string{"OTEL_LOGS_EXPORTER": "pigeon", "OTEL_TRACES_EXPORTER": "none"}, want: []string{"OTEL_LOGS_EXPORTER"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			tel, err := telemetry.Setup(t.Context(), append(tt.opts, telemetry.WithoutGlobals())...)
			if err == nil || tel != nil {
				t.Fatalf("Setup = %v, %v", tel, err)
			}
			for _, part := range tt.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%q does not name %s", err, part)
				}
			}
		})
	}
}

// What cannot be parsed has a password in it at times, and was printed.
func TestSetup_tellsNoSecret(t *testing.T) {
	for _, tt := range []struct{ variable, value string }{
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "http://u:secret%zz@host:4318"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", " http://u:secret%@host:4318"},
		{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://u:secret@host:port"},
		{"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://u:1/secret@host"},
		{"OTEL_EXPORTER_OTLP_LOGS_ENDPOINT", "http://u:secret\x7f@host"},
		{"OTEL_EXPORTER_OTLP_ENDPOINT", "u:secret@host:4317"},
		{"OTEL_EXPORTER_OTLP_HEADERS", "a=b,authorization=Bearer secret%zz"},
		{"OTEL_EXPORTER_OTLP_TRACES_HEADERS", "authorization: secret"},
		{"OTEL_EXPORTER_OTLP_METRICS_HEADERS", "authorization: Bearer secret=="},
		{"OTEL_EXPORTER_OTLP_LOGS_HEADERS", "a=b,secret"},
	} {
		t.Run(tt.variable, func(t *testing.T) {
			t.Setenv("OTEL_METRICS_EXPORTER", "otlp")
			t.Setenv("OTEL_LOGS_EXPORTER", "otlp")
			t.Setenv(tt.variable, tt.value)
			tel, err := telemetry.Setup(t.Context(), telemetry.WithoutGlobals())
			if !errors.Is(err, telemetry.ErrInvalidConfig) || tel != nil || !strings.Contains(err.Error(), tt.variable) {
				t.Errorf("Setup = %v, %v, want an error that names %s", tel, err, tt.variable)
			}
			if strings.Contains(fmt.Sprint(err), "secret") {
				t.Errorf("%s is %q, and it says %v", tt.variable, tt.value, err)
			}
		})
	}
}

// The environment's Prometheus exporter would open a port without a word, and
// fail where it is taken.
func TestSetup_opensNoPort(t *testing.T) {
	taken, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "localhost:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	_, port, _ := net.SplitHostPort(taken.Addr().String())
	t.Setenv("OTEL_METRICS_EXPORTER", "prometheus")
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	t.Setenv("OTEL_EXPORTER_PROMETHEUS_PORT", port)
	setup(t)
}

// Where no spans are exported, those of others are not cut off from each other.
func TestSetup_withoutTraces(t *testing.T) {
	for _, tt := range []struct {
		name string
		env  map[string]string
		opts []telemetry.Option
	}{
		{name: "disabled", env: map[string]string{"OTEL_SDK_DISABLED": "true"}, opts: []telemetry.Option{neverExport(t)}},
		{name: "disabled, in capitals", env: map[string]string{"OTEL_SDK_DISABLED": "TRUE", "OTEL_TRACES_SAMPLER": "nonsense"}},
		{name: "none", env: map[string]string{"OTEL_TRACES_EXPORTER": "none"}},
		{name: "nil", opts: []telemetry.Option{telemetry.WithSpanExporter(nil)}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for k, v := range tt.env {
				t.Setenv(k, v)
			}
			tel := setup(t, tt.opts...)
			if span(t, tel, "root").IsValid() {
				t.Error("a root is made")
			}
			parent := parentOf(true)
			ctx, s := tel.TracerProvider().Tracer("test").Start(trace.ContextWithRemoteSpanContext(t.Context(), parent), "child")
			s.End()
			if got := trace.SpanContextFromContext(ctx); got.SpanID() != parent.SpanID() || !got.IsSampled() {
				t.Errorf("the parent %v becomes %v", parent, got)
			}
			if err := tel.Shutdown(within(t)); err != nil {
				t.Error(err)
			}
		})
	}
}

func neverExport(t *testing.T) telemetry.Option {
	t.Helper()
	return telemetry.WithSpanExporter(fakeExporter{export: func(context.Context, []sdktrace.ReadOnlySpan) error {
		t.Error("a span is exported")
		return nil
	}})
}

// The environment's queue and batch sizes are taken, and a batch fits the queue.
func TestSetup_batches(t *testing.T) {
	for _, tt := range []struct {
		queue, batch string
		size         int
		spans, want  int // the first batch
	}{
		{queue: "", batch: "", size: 10_000, spans: 600, want: 512},
		{queue: "", batch: "100", size: 10_000, spans: 200, want: 100},
		{queue: "", batch: "4096", size: 10_000, spans: 5000, want: 4096},
		{queue: "50", batch: "400", size: 10_000, spans: 40, want: 25},
		{queue: "", batch: "400", size: 100, spans: 60, want: 50},
	} {
		t.Run(fmt.Sprintf("%+v", tt), func(t *testing.T) {
			t.Setenv("OTEL_BSP_MAX_QUEUE_SIZE", tt.queue)
			t.Setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", tt.batch)
			t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "60000") // only what is full is sent
			first := make(chan int, 1)
			tel := setup(t, telemetry.WithSpanQueueSize(tt.size), telemetry.WithSpanExporter(fakeExporter{
				export: func(_ context.Context, ss []sdktrace.ReadOnlySpan) error {
					select {
					case first <- len(ss):
					default:
					}
					return nil
				},
			}))
			for range tt.spans {
				span(t, tel, "one of many")
			}
			select {
			case n := <-first:
				if n != tt.want {
					t.Errorf("the first batch has %d spans, want %d", n, tt.want)
				}
			case <-time.After(patience):
				t.Error("nothing is sent")
			}
		})
	}
}

// A hanging exporter of spans leaves time for the last metrics.
func TestShutdown_leavesTimeForMetrics(t *testing.T) {
	var c collector
	server := httptest.NewServer(&c)
	defer server.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_METRICS_EXPORTER", "otlp")
	release := make(chan struct{})
	defer close(release)
	tel := setup(t, telemetry.WithSpanExporter(fakeExporter{export: func(context.Context, []sdktrace.ReadOnlySpan) error {
		<-release
		return nil
	}}))
	span(t, tel, "stuck")
	ctx, cancel := context.WithTimeout(t.Context(), 12*time.Second) // a quarter is for the metrics
	defer cancel()
	if err := tel.Shutdown(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Shutdown = %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.metrics == 0 {
		t.Error("no metrics were pushed")
	}
}

// A set-up that fails leaves the program's registry as it was.
func TestSetup_failedLeavesNothing(t *testing.T) {
	t.Setenv("OTEL_METRICS_EXPORTER", "pigeon")
	registry := prometheus.NewRegistry()
	opts := []telemetry.Option{telemetry.WithoutGlobals(), telemetry.WithRegistry(registry), telemetry.WithSpanExporter(fakeExporter{})}
	if _, err := telemetry.Setup(t.Context(), opts...); err == nil {
		t.Fatal("no error")
	}
	if families, err := registry.Gather(); err != nil || len(families) > 0 {
		t.Errorf("the registry has %d families, %v", len(families), err)
	}
	t.Setenv("OTEL_METRICS_EXPORTER", "none")
	tel := setup(t, opts...)
	if series, _ := scrapeText(t, tel); series["go_goroutines"] == 0 {
		t.Error("nothing is collected")
	}
}

func TestWithRegistry(t *testing.T) {
	t.Parallel()
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "mine", Help: "Of the program."}, func() float64 { return 7 }))
	tel := setup(t, telemetry.WithRegistry(registry), telemetry.WithSpanExporter(fakeExporter{}))
	counter, err := tel.MeterProvider().Meter("test").Int64Counter("theirs")
	if err != nil {
		t.Fatal(err)
	}
	counter.Add(t.Context(), 3, metric.WithAttributes(attribute.String("a", "b")))
	series, _ := scrapeText(t, tel)
	if series["mine"] != 7 || series[`theirs_total{a="b"}`] != 3 || series["go_goroutines"] == 0 {
		t.Errorf("mine %v, theirs %v, goroutines %v", series["mine"], series[`theirs_total{a="b"}`], series["go_goroutines"])
	}
}

// Failures of the export are reported once a minute, not once each.
func TestErrorHandler_isNotSpammed(t *testing.T) {
	var buf lockedBuffer
	t.Setenv("OTEL_TRACES_EXPORTER", "none")
	tel, err := telemetry.Setup(t.Context(), telemetry.WithLogger(slog.New(slog.NewTextHandler(&buf, nil))))
	if err != nil {
		t.Fatal(err)
	}
	for range 100 {
		otel.Handle(errors.New("no collector"))
	}
	if got := strings.Count(buf.String(), "no collector"); got != 1 {
		t.Errorf("%d lines:\n%s", got, buf.String())
	}
	if err := tel.Shutdown(within(t)); err != nil {
		t.Error(err)
	}
}
