package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	coltracepb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"

	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono/monotest"
)

// A running is a service that serves.
type running struct {
	url string
	log *output

	interrupt context.CancelFunc
	ended     chan int
}

// startService runs a half of the shop until the test ends.
func startService(t *testing.T, role string, args ...string) *running {
	t.Helper()
	serving := make(chan struct{})
	s := &running{log: &output{text: `"msg":"serving"`}, ended: make(chan int, 1)}
	s.log.seen = func() { s.log.seen = nil; close(serving) }
	ctx, interrupt := context.WithCancel(t.Context())
	s.interrupt = interrupt
	go func() {
		s.ended <- run(ctx, append([]string{"-role", role, "-http", "127.0.0.1:0"}, args...), io.Discard, s.log)
	}()
	t.Cleanup(func() { s.stop(t) })
	select {
	case <-serving:
	case code := <-s.ended:
		s.ended <- code
		t.Fatalf("%s has ended with %d\n%s", role, code, s.log)
	case <-time.After(patience):
		t.Fatalf("%s does not serve\n%s", role, s.log)
	}
	s.url = regexp.MustCompile(`"url":"([^"]+)"`).FindStringSubmatch(s.log.String())[1]
	return s
}

// stop interrupts the service and waits until it has ended.
func (s *running) stop(t *testing.T) {
	t.Helper()
	s.interrupt()
	select {
	case code := <-s.ended:
		s.ended <- code
		if code != exitOK {
			t.Errorf("exit code %d\n%s", code, s.log)
		}
	case <-time.After(patience):
		t.Fatalf("it does not end\n%s", s.log)
	}
}

// ask sends a request and reads its JSON answer into out. headers are pairs.
func (s *running) ask(t *testing.T, method, path, body string, want int, out any, headers ...string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		req.Header.Set(headers[i], headers[i+1])
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	b, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != want {
		t.Fatalf("%s %s: %s, want %d\n%s", method, path, res.Status, want, b)
	}
	if out != nil {
		if err := json.Unmarshal(b, out); err != nil {
			t.Fatalf("%s %s: %v\n%s", method, path, err, b)
		}
	}
}

// order sends an order as JSON.
func (s *running) order(t *testing.T, customer string, headers ...string) orderReply {
	t.Helper()
	var reply orderReply
	s.ask(t, http.MethodPost, "/orders", fmt.Sprintf(`{"customer": %q, "amount": 12.5}`, customer), http.StatusCreated, &reply,
		append(headers, "Content-Type", "application/json")...)
	if reply.OrderID == "" {
		t.Error("the order has no ID")
	}
	return reply
}

// ledger waits until the ledger is as wanted.
func (s *running) ledger(t *testing.T, what string, wanted func(ledgerReply) bool) ledgerReply {
	t.Helper()
	var last ledgerReply
	poll(t, what, func() bool {
		last = ledgerReply{}
		s.ask(t, http.MethodGet, "/ledger", "", http.StatusOK, &last)
		return wanted(last)
	}, func() any { return fmt.Sprintf("%+v", last) })
	return last
}

// poll waits until done, and shows last if that takes too long.
func poll(t *testing.T, what string, done func() bool, last func() any) {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !done() {
		select {
		case <-deadline.C:
			t.Fatalf("not seen: %s; last %v", what, last())
		case <-tick.C:
		}
	}
}

// A collected is a span that has arrived.
type collected struct {
	*tracepb.Span

	service string
}

func (c collected) attr(key string) string {
	for _, a := range c.GetAttributes() {
		if a.GetKey() == key {
			if s := a.GetValue().GetStringValue(); s != "" {
				return s
			}
			return strconv.FormatInt(a.GetValue().GetIntValue(), 10)
		}
	}
	return ""
}

// A collector keeps the spans that are sent to it.
type collector struct {
	mu    sync.Mutex
	spans []collected
}

func startCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var req coltracepb.ExportTraceServiceRequest
		b, err := io.ReadAll(r.Body)
		if err == nil {
			err = proto.Unmarshal(b, &req)
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, rs := range req.GetResourceSpans() {
			service := ""
			for _, a := range rs.GetResource().GetAttributes() {
				if a.GetKey() == "service.name" {
					service = a.GetValue().GetStringValue()
				}
			}
			for _, ss := range rs.GetScopeSpans() {
				for _, s := range ss.GetSpans() {
					c.spans = append(c.spans, collected{s, service})
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	t.Cleanup(server.Close)
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", server.URL)
	t.Setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
	return c
}

// find waits for a span of a trace.
func (c *collector) find(t *testing.T, traceID, service, name string) collected {
	t.Helper()
	var found collected
	poll(t, fmt.Sprintf("span %q of %s in trace %s", name, service, traceID), func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, s := range c.spans {
			if fmt.Sprintf("%x", s.GetTraceId()) == traceID && s.service == service && strings.HasPrefix(s.GetName(), name) {
				found = s
				return true
			}
		}
		return false
	}, func() any { return nil })
	return found
}

// Two processes on one server: what one takes the other writes, in one trace. Failures
// begin and end over HTTP, and what the services say that they did is what they count.
func TestServices(t *testing.T) {
	server := monotest.Server(t)
	t.Setenv("NATS_URL", server.URL())
	spans := startCollector(t)

	emitter := startService(t, roleEmitter)
	// Nobody stores orders yet.
	emitter.ask(t, http.MethodPost, "/orders", "customer=anna&amount=1", http.StatusServiceUnavailable, nil,
		"Content-Type", "application/x-www-form-urlencoded")
	half := startService(t, roleConsumers)
	for _, s := range []*running{emitter, half} {
		var report checkup
		s.ask(t, http.MethodGet, "/healthz", "", http.StatusOK, &report)
		if !report.Healthy || len(report.Checks) < 2 {
			t.Errorf("the health is %+v", report)
		}
	}

	// One trace across the two.
	first := emitter.order(t, "anna")
	half.ledger(t, "the order written", func(l ledgerReply) bool { return l.Written == 1 && l.Acked == 1 && l.Confirmed == 1 })
	root := spans.find(t, first.TraceID, "orders-emitter", "POST /orders")
	if len(root.GetParentSpanId()) > 0 || root.GetKind() != tracepb.Span_SPAN_KIND_SERVER {
		t.Errorf("the request's span has the parent %x and the kind %v", root.GetParentSpanId(), root.GetKind())
	}
	for key, want := range map[string]string{
		"http.request.method": "POST", "http.route": "/orders", "url.path": "/orders", "url.scheme": "http",
		"http.response.status_code": "201", "server.address": "127.0.0.1", "network.protocol.version": "1.1",
		string(keyOrder): first.OrderID, string(keyCustomer): "anna",
	} {
		if got := root.attr(key); got != want {
			t.Errorf("%s is %q, want %q", key, got, want)
		}
	}
	publish := spans.find(t, first.TraceID, "orders-emitter", "publish ")
	if !bytes.Equal(publish.GetParentSpanId(), root.GetSpanId()) {
		t.Error("the publish is not below the request")
	}
	process := spans.find(t, first.TraceID, "orders-consumers", "process ")
	if !bytes.Equal(process.GetParentSpanId(), publish.GetSpanId()) {
		t.Error("the processing is not below the publish")
	}
	spans.find(t, first.TraceID, "orders-consumers", "write ledger")

	// A request that brings a trace goes on with it.
	const theirs = "0af7651916cd43dd8448eb211c80319c"
	if got := emitter.order(t, "ben", "traceparent", "00-"+theirs+"-b7ad6b7169203331-01").TraceID; got != theirs {
		t.Errorf("the trace is %q, want the caller's %q", got, theirs)
	}
	spans.find(t, theirs, "orders-consumers", "process ")

	// Retries.
	emitter.order(t, greta)
	half.ledger(t, "an order written at the third attempt", func(l ledgerReply) bool { return l.Customers[greta] == settled{Acked: 1, Nacked: 2} })

	// A burst that is given up at once.
	var state ledgerReply
	half.ask(t, http.MethodPost, "/ledger/break", "", http.StatusOK, &state)
	if state.Mode != closed {
		t.Errorf("the mode is %q", state.Mode)
	}
	const burst = 5
	var carla orderReply
	for range burst {
		carla = emitter.order(t, "carla")
	}
	half.ledger(t, "the burst given up", func(l ledgerReply) bool { return l.Customers["carla"] == settled{GivenUp: burst} })
	unwritten := func(ids ...string) []string {
		asked, err := json.Marshal(map[string][]string{"order_ids": ids})
		if err != nil {
			t.Fatal(err)
		}
		var reply writtenReply
		half.ask(t, http.MethodPost, "/ledger/written", string(asked), http.StatusOK, &reply)
		return reply.Missing
	}
	if got := unwritten(first.OrderID, carla.OrderID); !slices.Equal(got, []string{carla.OrderID}) {
		t.Errorf("%q are not written, want %q alone", got, carla.OrderID)
	}

	// Failures that end.
	half.ask(t, http.MethodPost, "/ledger/break?mode=busy", "", http.StatusOK, &state)
	emitter.order(t, "david")
	half.ledger(t, "an order to come again", func(l ledgerReply) bool { return l.Mode == busy && l.Customers["david"].Nacked > 0 })
	half.ask(t, http.MethodPost, "/ledger/repair", "", http.StatusOK, &state)
	if state.Mode != repaired {
		t.Errorf("the mode is %q", state.Mode)
	}
	// Its attempts may be used up before that on a slow machine.
	david := half.ledger(t, "the end of it", func(l ledgerReply) bool {
		return l.Customers["david"].Acked+l.Customers["david"].GivenUp == 1
	}).Customers["david"]
	givenUp := burst + david.GivenUp

	// What was given up succeeds when it is replayed.
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	desk, err := triage.Open(ctx, connect(t, server.URL()), triage.Config{Actor: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	plan, err := desk.Plan(ctx, triage.Selection{}, triage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	op, err := desk.Run(ctx, plan.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	if op.Resolved != givenUp {
		t.Errorf("%d are resolved, want %d", op.Resolved, givenUp)
	}
	last := half.ledger(t, "them written", func(l ledgerReply) bool { return l.Resolved == givenUp })
	if got := unwritten(first.OrderID, carla.OrderID); len(got) > 0 {
		t.Errorf("%q are not written", got)
	}
	const orders = 4 + burst
	if last.Written != orders || last.Acked != orders || last.Attempts-last.Refused != orders || last.Refused != last.Nacked+last.GivenUp {
		t.Errorf("%d orders do not agree with %+v", orders, last)
	}

	// What they say is what they count.
	page := fetch(t.Context(), half.url+"/metrics")
	for settlement, want := range map[string]int{"ack": last.Acked, "nak_delay": last.Nacked, "term": last.GivenUp} {
		if got := sum(t, page, `mono_settlements_total\{[^}]*outcome="ok"[^}]*settlement="`+settlement+`"[^}]*\}`); got != want {
			t.Errorf("%d %s are counted, want %d", got, settlement, want)
		}
	}
	if got := sum(t, page, `mono_dead_letters_captured_total\{[^}]*reason="permanent_error"[^}]*\}`); got != burst {
		t.Errorf("%d captures are counted, want %d", got, burst)
	}
	if !strings.Contains(page, `error_type="ledger_closed"`) {
		t.Error("the error has no type")
	}
	var sold salesState
	emitter.ask(t, http.MethodGet, "/orders", "", http.StatusOK, &sold)
	if sold.Orders != orders || sold.Garbage != 0 || sold.NotStored != 1 || sold.Customers["carla"] != burst {
		t.Errorf("%d orders are told as %+v", orders, sold)
	}
	page = fetch(t.Context(), emitter.url+"/metrics")
	if got := sum(t, page, `messaging_client_sent_messages_total\{[^}]*\}`); got != orders+1 {
		t.Errorf("%d publishes are counted, want %d", got, orders+1)
	}

	// Nobody gets in through a browser.
	half.ask(t, http.MethodPost, "/ledger/break", "", http.StatusForbidden, nil, "Sec-Fetch-Site", "cross-site")
	half.ask(t, http.MethodPost, "/ledger/break?mode=gone", "", http.StatusBadRequest, nil)
	half.ask(t, http.MethodPost, "/ledger/written", `{"order_ids": `, http.StatusBadRequest, nil)

	// Without its server a service is not well, and lives.
	server.Stop()
	poll(t, "a bad health", func() bool {
		return checkHealth(t.Context(), emitter.url+"/healthz") != nil && checkHealth(t.Context(), half.url+"/healthz") != nil
	}, func() any { return nil })
	server.Start()
	poll(t, "a good health", func() bool {
		return checkHealth(t.Context(), emitter.url+"/healthz") == nil && checkHealth(t.Context(), half.url+"/healthz") == nil
	}, func() any { return nil })

	emitter.stop(t)
	half.stop(t)
	password := passwordOf(t, []string{server.URL()})
	for _, s := range []*running{emitter, half} {
		if strings.Contains(s.log.String(), password) {
			t.Error("the password is shown")
		}
		for line := range strings.Lines(s.log.String()) {
			if !json.Valid([]byte(line)) {
				t.Errorf("a line of the log is no JSON: %s", line)
			}
		}
	}
}

// sum adds up the series whose text matches.
func sum(t *testing.T, page, series string) int {
	t.Helper()
	total := 0.0
	for _, m := range regexp.MustCompile(`(?m)^`+series+` (\S+)`).FindAllStringSubmatch(page, -1) {
		v, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		total += v
	}
	return int(total)
}

// Customers who come by themselves bring everything that can go wrong. Who the service
// is comes from the environment.
func TestServices_rate(t *testing.T) {
	server := monotest.Server(t)
	user, host, _ := strings.Cut(strings.TrimPrefix(server.URL(), "nats://"), "@")
	name, password, _ := strings.Cut(user, ":")
	t.Setenv("NATS_URL", "")
	t.Setenv("NATS_USER", name)
	t.Setenv("NATS_PASSWORD", password)
	half := startService(t, roleConsumers, "-server", "nats://"+host)
	emitter := startService(t, roleEmitter, "-server", "nats://"+host, "-rate", "50")
	half.ledger(t, "everything that can happen", func(l ledgerReply) bool {
		return l.Undecodable > 0 && l.Customers[ivan].GivenUp > 0 && l.Customers[hugo].GivenUp > 0 && l.Customers[felix].Acked > 0
	})
	emitter.stop(t)
	var health checkup
	half.ask(t, http.MethodGet, "/healthz", "", http.StatusOK, &health)
}

func TestRun_roleUsage(t *testing.T) {
	t.Setenv("NATS_URL", "")

	tests := []struct {
		name string
		give []string
		env  [2]string
		code int
		want string
	}{
		{name: "unknown", give: []string{"-role", "boss"}, code: exitUsage, want: `"boss"`},
		{name: "no server", give: []string{"-role", "emitter"}, code: exitUsage, want: "NATS_URL"},
		{name: "password for all to see", give: []string{"-role", "emitter", "-server", "nats://u:secret@127.0.0.1:1"}, code: exitUsage, want: "NATS_PASSWORD"},
		{name: "whole shop's flag", give: []string{"-role", "emitter", "-server", "a", "-store", "b"}, code: exitUsage, want: "-store"},
		{name: "half's flag", give: []string{"-http", ":0"}, code: exitUsage, want: "-http"},
		{name: "rate of consumers", give: []string{"-role", "consumers", "-server", "a", "-rate", "1"}, code: exitUsage, want: "-rate"},
		{name: "negative rate", give: []string{"-role", "emitter", "-server", "a", "-rate", "-1"}, code: exitUsage, want: "-rate"},
		{name: "no port", give: []string{"-role", "emitter", "-server", "a", "-http", "localhost"}, code: exitFailed, want: "-http"},
		{name: "nobody there", give: []string{"-role", "consumers", "-server", "nats://127.0.0.1:1"}, code: exitFailed, want: "connect to NATS"},
		{
			name: "nobody there, with a password", give: []string{"-role", "consumers"}, env: [2]string{"NATS_URL", "nats://u:secret@127.0.0.1:1"},
			code: exitFailed, want: "connect to NATS",
		},
		{
			name: "no credentials", give: []string{"-role", "emitter", "-server", "a"}, env: [2]string{"NATS_CREDS", "/no/such/file"},
			code: exitFailed, want: "NATS_CREDS",
		},
		{name: "not well", give: []string{"-healthcheck", "http://127.0.0.1:1/healthz"}, code: exitFailed, want: "refused"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.env[0] != "" {
				t.Setenv(tt.env[0], tt.env[1])
			}
			var stdout, stderr bytes.Buffer
			if got := run(t.Context(), tt.give, &stdout, &stderr); got != tt.code {
				t.Errorf("exit code %d, want %d", got, tt.code)
			}
			if !strings.Contains(stderr.String(), tt.want) {
				t.Errorf("standard error is %q, want %q in it", &stderr, tt.want)
			}
			if strings.Contains(stdout.String()+stderr.String(), "secret") {
				t.Error("the password is shown")
			}
		})
	}
}

// An address that is taken fails the start.
func TestRun_httpTaken(t *testing.T) {
	server := monotest.Server(t)
	t.Setenv("NATS_URL", server.URL())
	lis, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = lis.Close() }()
	var stderr bytes.Buffer
	args := []string{"-role", "emitter", "-http", lis.Addr().String()}
	if code := run(t.Context(), args, io.Discard, &stderr); code != exitFailed || !strings.Contains(stderr.String(), "-http") {
		t.Errorf("exit code %d\n%s", code, &stderr)
	}
}

func TestListenHTTP_loopback(t *testing.T) {
	t.Parallel()
	w, err := listenHTTP(t.Context(), ":0")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(w.url(), "http://127.0.0.1:") {
		t.Errorf("it listens on %s", w.url())
	}
	if err := w.stop(t.Context(), time.Second); err != nil {
		t.Error(err)
	}
}

func TestCheckHealth(t *testing.T) {
	t.Parallel()
	well := true
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if !well {
			refuse(w, http.StatusServiceUnavailable, io.ErrUnexpectedEOF)
		}
	}))
	defer server.Close()
	var stderr bytes.Buffer
	if code := run(t.Context(), []string{"-healthcheck", server.URL}, io.Discard, &stderr); code != exitOK {
		t.Errorf("exit code %d\n%s", code, &stderr)
	}
	well = false
	if code := run(t.Context(), []string{"-healthcheck", server.URL}, io.Discard, &stderr); code != exitFailed {
		t.Errorf("exit code %d", code)
	}
	if !strings.Contains(stderr.String(), "503") || !strings.Contains(stderr.String(), "unexpected EOF") {
		t.Errorf("standard error is %q", &stderr)
	}
}

// Orders that cannot be read are refused before anything is published.
func TestPostOrder_refused(t *testing.T) {
	t.Parallel()
	const (
		asJSON = "application/json"
		asForm = "application/x-www-form-urlencoded"
	)
	spans := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(spans))
	sold := newSales()
	e := &emitter{
		shop:       &shop{tracking: tracking.New(func(tracking.OrderCreatedEvent) {}), witness: sold, tracer: provider.Tracer("")},
		propagator: (&observation{}).propagator(),
	}
	mux := http.NewServeMux()
	e.routes(mux)

	t.Cleanup(func() { // when all of them have been answered
		if got := sold.state(); got.Orders+got.NotStored > 0 {
			t.Errorf("something was published: %+v", got)
		}
		for _, s := range spans.Ended() { // the customer is at fault
			if s.Status().Code != codes.Unset {
				t.Errorf("the span of %v has the status %v", s.Attributes(), s.Status())
			}
		}
		if len(spans.Ended()) == 0 {
			t.Error("there are no spans")
		}
	})

	tests := []struct {
		name, kind, body string
		want             int
		text             string
	}{
		{name: "no type", body: `{}`, want: http.StatusUnsupportedMediaType, text: "content type"},
		{name: "other type", kind: "text/plain", body: `{}`, want: http.StatusUnsupportedMediaType, text: "content type"},
		{name: "malformed", kind: asJSON, body: `{"customer": `, want: http.StatusBadRequest, text: "read the order"},
		{name: "another field", kind: asJSON, body: `{"customer": "a", "amount": 1, "id": 7}`, want: http.StatusBadRequest, text: "id"},
		{name: "two", kind: asJSON, body: `{"customer": "a", "amount": 1} {}`, want: http.StatusBadRequest, text: "follows"},
		{name: "nobody", kind: asJSON, body: `{"customer": " ", "amount": 1}`, want: http.StatusBadRequest, text: "customer"},
		{name: "control characters", kind: asJSON, body: `{"customer": "a\nb", "amount": 1}`, want: http.StatusBadRequest, text: "customer"},
		{name: "long name", kind: asJSON, body: `{"customer": "` + strings.Repeat("a", 65) + `", "amount": 1}`, want: http.StatusBadRequest, text: "customer"},
		{name: "for nothing", kind: asJSON, body: `{"customer": "a"}`, want: http.StatusBadRequest, text: "amount"},
		{name: "no number", kind: asForm, body: `customer=a&amount=much`, want: http.StatusBadRequest, text: "amount"},
		{name: "not a number", kind: asForm, body: `customer=a&amount=NaN`, want: http.StatusBadRequest, text: "amount"},
		{name: "malformed form", kind: asForm, body: `customer=%zz`, want: http.StatusBadRequest, text: "read the order"},
		{name: "large", kind: asJSON, body: `{"customer": "` + strings.Repeat("a", 1<<20), want: http.StatusRequestEntityTooLarge, text: "large"},
		{name: "large form", kind: asForm, body: `customer=` + strings.Repeat("a", 1<<20), want: http.StatusRequestEntityTooLarge, text: "large"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			req := httptest.NewRequestWithContext(t.Context(), http.MethodPost, "/orders", strings.NewReader(tt.body))
			if tt.kind != "" {
				req.Header.Set("Content-Type", tt.kind)
			}
			res := httptest.NewRecorder()
			mux.ServeHTTP(res, req)
			var reply struct {
				Error string `json:"error"`
			}
			if err := json.Unmarshal(res.Body.Bytes(), &reply); err != nil {
				t.Fatalf("%v: %s", err, res.Body)
			}
			if res.Code != tt.want || !strings.Contains(reply.Error, tt.text) {
				t.Errorf("%d %q, want %d and %q", res.Code, reply.Error, tt.want, tt.text)
			}
		})
	}
}

// A table of customers does not grow without end.
func TestSales_manyCustomers(t *testing.T) {
	t.Parallel()
	s := newSales()
	const many = 1000
	for i := range many {
		s.published("customer "+strconv.Itoa(i), nil)
	}
	got := s.state()
	if len(got.Customers) > 101 || got.Customers["(others)"] != many-100 || got.Orders != many {
		t.Errorf("%d customers, %d others, %d orders", len(got.Customers), got.Customers["(others)"], got.Orders)
	}
}

// A ledger that runs for long forgets old orders only.
func TestLedger_forgets(t *testing.T) {
	t.Parallel()
	l := newLedger((&observation{}).tracer())
	l.most = 10
	const many = 25
	for i := range many {
		if err := l.try(tracking.OrderCreatedEvent{OrderID: strconv.Itoa(i), CustomerID: "anna"}); err != nil {
			t.Fatal(err)
		}
		_ = l.try(tracking.OrderCreatedEvent{OrderID: "h" + strconv.Itoa(i), CustomerID: hugo}) // never succeeds
	}
	if n := len(l.written) + len(l.before); n > 2*l.most {
		t.Errorf("it remembers %d orders", n)
	}
	if n := len(l.attempts); n > l.most {
		t.Errorf("it remembers %d attempts", n)
	}
	if err := l.try(tracking.OrderCreatedEvent{OrderID: strconv.Itoa(many - 1), CustomerID: "anna"}); err != nil {
		t.Error(err)
	}
	if _, count := l.state(); count.Written != many {
		t.Errorf("%d are written, want %d", count.Written, many)
	}
}
