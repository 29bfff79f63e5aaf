package mono_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
	"github.com/monotel/monotel/telemetry"
)

// A scraper serves metrics as a program would, and reads them as Prometheus
// does.
type scraper struct {
	url    string
	option mono.Option
}

func newScraper(t *testing.T, opts ...telemetry.Option) scraper {
	t.Helper()
	p := setUp(t, append([]telemetry.Option{telemetry.WithSpanExporter(nil)}, opts...)...)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := p.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return serveMetrics(t, p)
}

func serveMetrics(t *testing.T, p program) scraper {
	t.Helper()
	server := httptest.NewServer(p.MetricsHandler())
	t.Cleanup(server.Close)
	return scraper{server.URL, mono.WithMeterProvider(p.MeterProvider())}
}

// seriesOf is the value of the series with that destination template and label.
func (s scraper) seriesOf(t *testing.T, name, template, label string) float64 {
	t.Helper()
	return s.sumOf(t, name, `messaging_destination_template="`+template+`"`, label)
}

// seriesOfGroup is the value of the series with that consumer and label.
func (s scraper) seriesOfGroup(t *testing.T, name, group, label string) float64 {
	t.Helper()
	return s.sumOf(t, name, `messaging_consumer_group_name="`+group+`"`, label)
}

func (s scraper) sumOf(t *testing.T, name string, labels ...string) (sum float64) {
	t.Helper()
	body, _ := s.get(t, "text/plain;version=0.0.4")
	defer func() { _ = body.Close() }()
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		line := lines.Text()
		if !strings.HasPrefix(line, name+"{") || slices.ContainsFunc(labels, func(l string) bool { return !strings.Contains(line, l) }) {
			continue
		}
		v, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		if err != nil {
			t.Error(err)
		}
		sum += v
	}
	return sum
}

func (s scraper) get(t *testing.T, accept string) (body io.ReadCloser, contentType string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience) // also when the test cleans up
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Accept", accept)
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusOK {
		t.Errorf("the scrape is answered with %s", res.Status)
	}
	return res.Body, res.Header.Get("Content-Type")
}

// text scrapes the text format and returns its series: counters and gauges by
// value, histograms by count and sum.
func (s scraper) text(t *testing.T) map[string]float64 {
	t.Helper()
	body, _ := s.get(t, "text/plain;version=0.0.4")
	defer func() { _ = body.Close() }()
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(body)
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for name, f := range families {
		for _, m := range f.GetMetric() {
			labels := seriesLabels(m)
			switch f.GetType() {
			case dto.MetricType_HISTOGRAM:
				out[name+"_count"+labels] = float64(m.GetHistogram().GetSampleCount())
				out[name+"_sum"+labels] = m.GetHistogram().GetSampleSum()
			case dto.MetricType_COUNTER:
				out[name+labels] = m.GetCounter().GetValue()
			default:
				out[name+labels] = m.GetGauge().GetValue()
			}
		}
	}
	return out
}

// seriesLabels leaves out what all series of a test have in common.
func seriesLabels(m *dto.Metric) string {
	var all []string
	for _, l := range m.GetLabel() {
		if !commonLabel(l.GetName()) {
			all = append(all, l.GetName()+"="+l.GetValue())
		}
	}
	slices.Sort(all)
	return "{" + strings.Join(all, ",") + "}"
}

func commonLabel(name string) bool {
	return slices.Contains([]string{
		"messaging_system", "messaging_destination_template", "messaging_consumer_group_name", "messaging_operation_type",
	}, name)
}

var (
	openMetricsLine  = regexp.MustCompile(`^([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*?)\})? ([^ ]+)(?: # \{(.*)\} .*)?$`)
	openMetricsLabel = regexp.MustCompile(`([a-zA-Z_]+)="((?:[^"\\]|\\.)*)"`)
)

// openMetrics scrapes the OpenMetrics format: the same series, without buckets,
// and the exemplars' trace IDs by the name of their metric.
func (s scraper) openMetrics(t *testing.T) (series map[string]float64, exemplars map[string]string) {
	t.Helper()
	body, contentType := s.get(t, "application/openmetrics-text;version=1.0.0")
	defer func() { _ = body.Close() }()
	if !strings.HasPrefix(contentType, "application/openmetrics-text") {
		t.Fatalf("asked for OpenMetrics, got %q", contentType)
	}
	series, exemplars = make(map[string]float64), make(map[string]string)
	lines := bufio.NewScanner(body)
	last := ""
	for lines.Scan() {
		last = lines.Text()
		if strings.HasPrefix(last, "#") {
			continue
		}
		m := openMetricsLine.FindStringSubmatch(last)
		if m == nil {
			t.Errorf("not OpenMetrics: %q", last)
			continue
		}
		name, value := m[1], m[3]
		if m[4] != "" {
			exemplars[strings.TrimSuffix(name, "_bucket")] = m[4]
		}
		if strings.HasSuffix(name, "_bucket") {
			continue
		}
		var labels []string
		for _, l := range openMetricsLabel.FindAllStringSubmatch(m[2], -1) {
			if !commonLabel(l[1]) {
				labels = append(labels, l[1]+"="+l[2])
			}
		}
		slices.Sort(labels)
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Errorf("%q: %v", last, err)
		}
		series[name+"{"+strings.Join(labels, ",")+"}"] = v
	}
	if last != "# EOF" {
		t.Errorf("the last line is %q", last)
	}
	return series, exemplars
}

// names lists every series of ours with all of its labels.
func (s scraper) names(t *testing.T) []string {
	t.Helper()
	body, _ := s.get(t, "text/plain;version=0.0.4")
	defer func() { _ = body.Close() }()
	var out []string
	lines := bufio.NewScanner(body)
	for lines.Scan() {
		if line := lines.Text(); strings.HasPrefix(line, "mono_") || strings.HasPrefix(line, "messaging_") {
			out = append(out, line[:strings.LastIndexByte(line, ' ')])
		}
	}
	slices.Sort(out)
	return out
}

// only keeps the series that can be known beforehand: durations have no known
// sum.
func only(series map[string]float64, prefixes ...string) map[string]float64 {
	series = maps.Clone(series)
	maps.DeleteFunc(series, func(name string, _ float64) bool {
		return strings.Contains(name, "seconds_sum") ||
			!slices.ContainsFunc(prefixes, func(p string) bool { return strings.HasPrefix(name, p) })
	})
	return series
}

var errBrokenPipe = errors.New("broken pipe")

// A known mix of everything that can become of a message is counted exactly, and
// a scrape tells the same in both formats.
func TestCount_everySettlement(t *testing.T) {
	t.Parallel()
	const (
		acks       = 70
		naks       = 11
		nakDelays  = 9
		terms      = 7
		inProgress = 13
		panics     = 3
		failures   = 5
		unsettled  = 4
	)
	mix := map[string]int{
		"ack": acks, "nak": naks, "nak_delay": nakDelays, "term": terms,
		"in_progress": inProgress, "panic": panics, "error": failures, "unsettled": unsettled,
	}
	event := monotestEvent(t)
	handle := func(_ context.Context, msgs []*mono.Msg) error {
		msg := msgs[0]
		if msg.Metadata().NumDelivered > 1 {
			return msg.Ack()
		}
		switch string(msg.Data) {
		case "nak":
			return msg.Nak()
		case "nak_delay":
			return msg.NakWithDelay(time.Millisecond)
		case "term":
			return msg.Term()
		case "in_progress":
			return errors.Join(msg.InProgress(), msg.Ack())
		case "panic":
			panic("as ordered")
		case "error":
			return fmt.Errorf("write: %w", errBrokenPipe)
		case "unsettled":
			return nil
		default:
			return msg.Ack()
		}
	}
	config := mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: "mix"},
		// Long enough that no lease is extended, short enough to wait for.
		Consumer: mono.ConsumerConfig{Durable: "mixer", AckWait: 10 * time.Second},
		Fetch:    mono.FetchConfig{BatchSize: 1},
		Retry:    mono.RetryPolicy{Backoff: []time.Duration{time.Millisecond}},
	}
	scrape := newScraper(t)
	tr := newTracing() // everything is sampled, for exemplars
	app := startAppWith(t, []mono.Option{scrape.option, tr.option()}, emitter("shop", event),
		consumer("mixer", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(event, config, handle, self)
		}))

	// What people are alerted by is there before it happens.
	for _, name := range []string{"mono_settlements_total{outcome=ok,settlement=term}", "mono_redeliveries_total{}", "mono_unsettled_total{}"} {
		if v, ok := scrape.text(t)[name]; !ok || v != 0 {
			t.Errorf("before the first message %s is %v, %v; want 0", name, v, ok)
		}
	}
	total := 0
	for kind, n := range mix {
		total += n
		for range n {
			if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: event.Subject, Data: []byte(kind)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	settled(t, app, "mix", "mixer")

	again := naks + nakDelays + panics + failures + unsettled
	acked := total - terms
	want := map[string]float64{
		"mono_settlements_total{outcome=ok,settlement=ack}":                                                         float64(acked),
		"mono_settlements_total{outcome=ok,settlement=nak}":                                                         naks,
		"mono_settlements_total{outcome=ok,settlement=nak_delay}":                                                   nakDelays + panics + failures,
		"mono_settlements_total{outcome=ok,settlement=term}":                                                        terms,
		"mono_settlements_total{outcome=ok,settlement=in_progress}":                                                 inProgress + terms, // each before its dead letter
		"mono_settlements_late_total{}":                                                                             0,
		"mono_redeliveries_total{}":                                                                                 float64(again),
		"mono_unsettled_total{}":                                                                                    unsettled,
		"mono_handlers_active{}":                                                                                    0,
		"mono_delivery_attempts_count{}":                                                                            float64(total),
		"mono_delivery_attempts_sum{}":                                                                              float64(total + again),
		"mono_queue_duration_seconds_count{}":                                                                       float64(total),
		"mono_end_to_end_duration_seconds_count{}":                                                                  float64(acked),
		"mono_trace_context_total{state=continued}":                                                                 float64(total),
		"mono_trace_context_total{state=linked}":                                                                    float64(again),
		"mono_publish_pending{}":                                                                                    0,
		"messaging_client_sent_messages_total{messaging_operation_name=publish}":                                    float64(total),
		"messaging_client_consumed_messages_total{messaging_operation_name=process}":                                float64(total + again),
		"messaging_process_duration_seconds_count{messaging_operation_name=process}":                                float64(total + again - panics - failures),
		"messaging_process_duration_seconds_count{error_type=panic,messaging_operation_name=process}":               panics,
		"messaging_process_duration_seconds_count{error_type=*errors.errorString,messaging_operation_name=process}": failures,
		"messaging_client_operation_duration_seconds_count{messaging_operation_name=publish}":                       float64(total),
	}
	prefixes := []string{
		"mono_settlements", "mono_redeliveries", "mono_unsettled", "mono_handlers", "mono_delivery", "mono_queue",
		"mono_end_to_end", "mono_trace_context", "mono_publish", "messaging_",
	}
	// The server knows of the last ack a moment before the App has counted it.
	eventually(t, func() bool {
		return scrape.text(t)["messaging_process_duration_seconds_count{messaging_operation_name=process}"] == float64(total+again-panics-failures)
	}, "the last message is counted")
	if diff := cmp.Diff(want, only(scrape.text(t), prefixes...)); diff != "" {
		t.Errorf("text format (-want +got):\n%s", diff)
	}
	series, exemplars := scrape.openMetrics(t)
	if diff := cmp.Diff(want, only(series, prefixes...)); diff != "" {
		t.Errorf("OpenMetrics (-want +got):\n%s", diff)
	}
	for _, name := range []string{
		"messaging_process_duration_seconds", "messaging_client_operation_duration_seconds",
		"mono_queue_duration_seconds", "mono_end_to_end_duration_seconds", "mono_delivery_attempts",
	} {
		// Each leads to a span that there is.
		if !slices.ContainsFunc(tr.Ended(), func(s sdktrace.ReadOnlySpan) bool {
			sc := s.SpanContext()
			return strings.Contains(exemplars[name], `trace_id="`+sc.TraceID().String()+`"`) &&
				strings.Contains(exemplars[name], `span_id="`+sc.SpanID().String()+`"`)
		}) {
			t.Errorf("%s has the exemplar %q, want one of a span of ours", name, exemplars[name])
		}
	}
}

// monotestEvent is an event of the test's own.
func monotestEvent(t *testing.T) mono.BaseEventDefinition {
	t.Helper()
	e, err := mono.NewEvent("shop", "OrderPlaced", "v1")
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// startAppWith is startApp with further options.
func startAppWith(t *testing.T, opts []mono.Option, modules ...mono.Module) *mono.App {
	t.Helper()
	return monotest.AppWith(t, append([]mono.Option{mono.WithStoreDir(t.TempDir()), quiet()}, opts...), modules...)
}

// A batch of many messages is counted by message.
func TestCount_batches(t *testing.T) {
	t.Parallel()
	const total = 5000
	event := monotestEvent(t)
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", event),
		consumer("reader", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(event, mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "many"}, Consumer: mono.ConsumerConfig{Durable: "reader"},
				Fetch: mono.FetchConfig{BatchSize: 100}, Concurrency: 4, AutoAck: true,
			}, func(context.Context, []*mono.Msg) error { return nil }, self)
		}))
	var futures []*mono.PubAckFuture
	for range total {
		f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: event.Subject, Data: []byte("x")})
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}
	for _, f := range futures {
		if _, err := f.Wait(within(t)); err != nil {
			t.Fatal(err)
		}
	}
	settled(t, app, "many", "reader")
	eventually(t, func() bool { return scrape.text(t)["mono_handlers_active{}"] == 0 }, "no message is in work")
	got := scrape.text(t)
	for name, want := range map[string]float64{
		"mono_settlements_total{outcome=ok,settlement=ack}":                          total,
		"messaging_client_consumed_messages_total{messaging_operation_name=process}": total,
		"messaging_client_sent_messages_total{messaging_operation_name=publish}":     total,
		"mono_publish_pending{}":                                                     0,
		"mono_trace_context_total{state=absent}":                                     total,
		"mono_end_to_end_duration_seconds_count{}":                                   total,
		"messaging_process_duration_seconds_count{messaging_operation_name=process}": total,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
}

// A settlement after the lease has ended is late, and one without a connection
// is an error. Both are still counted after Stop.
func TestCount_lateAndUnsent(t *testing.T) {
	t.Parallel()
	event := monotestEvent(t)
	var (
		mu    sync.Mutex
		kept  []*mono.Msg
		began time.Time // the first delivery
	)
	const ackWait = 200 * time.Millisecond
	second := make(chan error, 1)
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", event),
		consumer("late", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(event, mono.StreamConsumerConfig{
				Stream:   mono.StreamConfig{Name: "late"},
				Consumer: mono.ConsumerConfig{Durable: "late", AckWait: ackWait},
				Fetch:    mono.FetchConfig{BatchSize: 1},
			}, func(ctx context.Context, msgs []*mono.Msg) error {
				mu.Lock()
				defer mu.Unlock()
				kept = append(kept, msgs...)
				switch len(kept) {
				case 1:
					began = time.Now()
				case 2: // the lease began earlier at the server than here, so it may last a little longer here
					pauseFor(ctx, ackWait-time.Since(began)+time.Millisecond) //nolint:forbidigo // the rest of a lease
					second <- kept[0].Ack()
				}
				return nil
			}, self)
		}))
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: event.Subject, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	if err := receive(t, second, "the second delivery"); err != nil {
		t.Fatal(err)
	}
	if err := app.Stop(within(t)); err != nil {
		t.Fatal(err)
	}
	mu.Lock()
	defer mu.Unlock()
	if err := kept[1].Ack(); err == nil {
		t.Error("an ack after Stop is sent")
	}
	got := scrape.text(t)
	for name, want := range map[string]float64{
		"mono_settlements_late_total{}":                        1,
		"mono_settlements_total{outcome=ok,settlement=ack}":    1,
		"mono_settlements_total{outcome=error,settlement=ack}": 1,
		"mono_handlers_active{}":                               0,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if got["mono_unsettled_total{}"] < 2 {
		t.Errorf("%v deliveries were left unsettled, want 2", got["mono_unsettled_total{}"])
	}
}

// Failed publishes are counted by what went wrong, and refused ones, too.
func TestCount_publishes(t *testing.T) {
	t.Parallel()
	event := monotestEvent(t)
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", event))
	bus, ctx := app.Bus(), within(t)
	publish := func(want error, subject string, header mono.Header) {
		t.Helper()
		if err := bus.Publish(ctx, &mono.Msg{Subject: subject, Data: []byte("x"), Header: header}); !errors.Is(err, want) {
			t.Errorf("Publish on %q = %v, want %v", subject, err, want)
		}
	}
	publish(nil, event.Subject, nil)
	publish(nil, "elsewhere", nil)
	publish(mono.ErrInvalidSubject, "not a subject", nil)
	publish(mono.ErrInvalidHeader, event.Subject, mono.Header{"a\nb": {"c"}})
	if _, err := bus.PublishStream(ctx, &mono.Msg{Subject: event.Subject}); !errors.Is(err, mono.ErrNoStream) {
		t.Errorf("PublishStream without a stream = %v", err)
	}
	if f, err := bus.PublishStreamAsync(ctx, &mono.Msg{Subject: event.Subject}); err != nil {
		t.Error(err)
	} else if _, err := f.Wait(ctx); !errors.Is(err, mono.ErrNoStream) {
		t.Errorf("PublishStreamAsync without a stream = %v", err)
	}
	got := only(scrape.text(t), "messaging_client_sent")
	want := map[string]float64{
		"messaging_client_sent_messages_total{messaging_operation_name=publish}":                            1,
		"messaging_client_sent_messages_total{error_type=invalid_subject,messaging_operation_name=publish}": 1,
		"messaging_client_sent_messages_total{error_type=invalid_header,messaging_operation_name=publish}":  1,
		"messaging_client_sent_messages_total{error_type=no_stream,messaging_operation_name=publish}":       2,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// Whatever subjects programs and peers make up, there are as many series as
// there are declared events and consumers.
func TestCount_cardinality(t *testing.T) {
	t.Parallel()
	const subjects = 10_000
	event := monotestEvent(t)
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", event),
		consumer("reader", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventConsumer(event, func(context.Context, *mono.Msg) error { return nil }, self)
		}))
	publish := func(subject string) {
		t.Helper()
		if err := app.Bus().Publish(within(t), &mono.Msg{Subject: subject, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	warmUp := []string{event.Subject, "somewhere", app.Conn().NewInbox()}
	for _, s := range warmUp {
		publish(s)
	}
	consumed := func() bool {
		return scrape.text(t)["messaging_client_consumed_messages_total{messaging_operation_name=process}"] == 1
	}
	eventually(t, consumed, "the event is consumed")
	if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: "nowhere", Data: []byte("x")}); !errors.Is(err, mono.ErrNoStream) {
		t.Fatal(err)
	}
	before := scrape.names(t)
	for _, template := range []string{"_unmatched", "_inbox", event.Subject} {
		if !slices.ContainsFunc(before, func(s string) bool {
			return strings.HasPrefix(s, "messaging_client_sent") && strings.Contains(s, `messaging_destination_template="`+template+`"`)
		}) {
			t.Errorf("nothing is counted as sent to %s", template)
		}
	}
	var futures []*mono.PubAckFuture
	for i := range subjects {
		subject := fmt.Sprintf("made.up.%d", i)
		publish(subject)
		publish(app.Conn().NewInbox())
		if i%10 != 0 { // these wait for an answer
			continue
		}
		f, err := app.Bus().PublishStreamAsync(within(t), &mono.Msg{Subject: subject, Data: []byte("x")})
		if err != nil {
			t.Fatal(err)
		}
		futures = append(futures, f)
	}
	for _, f := range futures {
		if _, err := f.Wait(within(t)); !errors.Is(err, mono.ErrNoStream) {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff(before, scrape.names(t)); diff != "" {
		t.Errorf("%d subjects made new series (-before +after):\n%s", subjects, diff)
	}
}

// The gauges are the server's word on each durable consumer, asked for once
// somebody collects.
func TestCount_consumerGauges(t *testing.T) {
	t.Parallel()
	const msgs = 7
	event := monotestEvent(t)
	release := make(chan struct{})
	scrape := newScraper(t)
	app := startAppWith(t, []mono.Option{scrape.option}, emitter("shop", event),
		consumer("slow", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(event, mono.StreamConsumerConfig{
				Stream:   mono.StreamConfig{Name: "slow"},
				Consumer: mono.ConsumerConfig{Durable: "slow", MaxAckPending: 3},
				Fetch:    mono.FetchConfig{BatchSize: 1}, AutoAck: true, Concurrency: msgs,
			}, func(context.Context, []*mono.Msg) error {
				<-release
				return nil
			}, self)
		}))
	defer close(release)
	for range msgs {
		if _, err := app.Bus().PublishStream(within(t), &mono.Msg{Subject: event.Subject, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return consumerInfo(t, app, "slow", "slow").NumAckPending == 3 }, "the server waits for acks")
	const labels = "{messaging_nats_stream=slow}"
	eventually(t, func() bool {
		_, ok := scrape.text(t)["mono_consumer_pending"+labels]
		return ok
	}, "the gauges are there")
	got := scrape.text(t)
	for name, want := range map[string]float64{
		"mono_consumer_pending" + labels: msgs - 3, "mono_consumer_ack_pending" + labels: 3, "mono_consumer_ack_pending_limit" + labels: 3,
	} {
		if got[name] != want {
			t.Errorf("%s is %v, want %v", name, got[name], want)
		}
	}
	if _, ok := got["mono_consumer_waiting"+labels]; !ok {
		t.Error("no mono_consumer_waiting")
	}
	if age := got["mono_consumer_oldest_unprocessed_age_seconds"+labels]; age <= 0 || age > patience.Seconds() {
		t.Errorf("the oldest message is %v s old", age)
	}
}

// Without a server the gauges stay as they were, and after Stop there are none.
func TestCount_consumerGaugesWithoutServer(t *testing.T) {
	t.Parallel()
	const labels = "{messaging_nats_stream=orders}"
	srv := monotest.Server(t)
	scrape := newScraper(t)
	app := runApp(t, append(onServer(srv), scrape.option), emitter("shop", monotestEvent(t)),
		consumer("idle", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "idle", MaxAckPending: 77},
			}, ackAll, self)
		}))
	limit := func() (float64, bool) {
		v, ok := scrape.text(t)["mono_consumer_ack_pending_limit"+labels]
		return v, ok
	}
	eventually(t, func() bool { _, ok := limit(); return ok }, "the gauges are there")
	srv.Stop()
	awaitDisconnect(t, app)
	for range 3 { // each scrape asks for news
		if v, ok := limit(); !ok || v != 77 {
			t.Errorf("without a server the limit is %v, %v", v, ok)
		}
	}
	if err := app.Stop(within(t)); err != nil {
		t.Log(err) // without a server not everything can be said goodbye to
	}
	if v, ok := limit(); ok {
		t.Errorf("after Stop the limit is %v", v)
	}
}

// A lease that ended while the connection was lost makes the settlement late,
// although it was extended before and after.
func TestCount_lateAfterOutage(t *testing.T) {
	t.Parallel()
	const ackWait = 200 * time.Millisecond
	srv := monotest.Server(t)
	c := newCable(t, srv)
	scrape := newScraper(t)
	began, release := make(chan struct{}, 10), make(chan struct{})
	app := runApp(t, append(onURL(c.url(srv)), scrape.option), emitter("shop", monotestEvent(t)),
		consumer("slow", func(r mono.EventRegistry, self mono.Module) error {
			return r.RegisterEventStreamConsumer(monotestEvent(t), mono.StreamConsumerConfig{
				Stream: mono.StreamConfig{Name: "orders"}, Consumer: mono.ConsumerConfig{Durable: "slow", AckWait: ackWait},
			}, func(ctx context.Context, msgs []*mono.Msg) error {
				began <- struct{}{}
				<-release
				return ackAll(ctx, msgs)
			}, self)
		}))
	publishStored(t, app, nil)
	receive(t, began, "the message")
	srv.Stop()
	awaitDisconnect(t, app)
	<-time.After(2 * ackWait) // the lease ends meanwhile
	srv.Start()
	eventually(t, func() bool { return app.Conn().IsConnected() }, "the App is connected again")
	extended := func() float64 {
		return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=in_progress}"]
	}
	before := extended()
	eventually(t, func() bool { return extended() > before }, "the lease is extended again")
	close(release)
	settled(t, app, "orders", "slow")
	eventually(t, func() bool { return scrape.text(t)["mono_settlements_total{outcome=ok,settlement=ack}"] >= 1 }, "the ack is counted")
	if got := scrape.text(t)["mono_settlements_late_total{}"]; got != 1 {
		t.Errorf("%v settlements are late, want 1", got)
	}
}
