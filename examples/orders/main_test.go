package main

import (
	"bytes"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/monotel/monotel/mono/monotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// outcomes are texts of which each run that takes a whole round of customers
// shows every one.
var outcomes = []string{
	"created", "broken message", "confirmation sent",
	"audited            at once", "audited            on attempt 2", "audited            on attempt 3",
	"retry 1 of 3", "retry 2 of 3", "retry 3 of 3",
	"gave up            after 4 attempts", "rejected", "not decodable",
}

func TestRun(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name string
		args func(t *testing.T) []string
		next string // how to go on, in the end
	}{
		{
			name: "in a temporary folder", args: func(*testing.T) []string { return nil },
			next: `(?s)goes with the temporary folder.*\n  go run ./examples/orders -open\n.* dlq groups\n.* dlq show ID\n.* dlq replay `,
		},
		{
			name: "in a folder", args: func(t *testing.T) []string {
				t.Helper()
				return []string{"-store", filepath.Join(t.TempDir(), "orders")}
			},
			next: `(?s)is kept in .*\n  go run ./examples/orders -store '.*orders' -open\n.* dlq groups\n.* dlq show [a-z0-9]{24}\n.* dlq replay `,
		},
		{
			name: "on a server", args: func(t *testing.T) []string {
				t.Helper()
				return []string{"-server", monotest.Server(t).URL()}
			},
			next: `(?s)is on your server.*\n  set NATS_URL to the URL you gave to -server\n.* dlq groups\n.* dlq show [a-z0-9]{24}\n.* dlq replay .*One with -open stays`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			args := tt.args(t)
			out := runOrders(t.Context(), t, append(args, "-for", "2s", "-rate", "20")...)
			for _, text := range outcomes {
				if !strings.Contains(out, text) {
					t.Errorf("no line says %q", text)
				}
			}
			sum := readSummary(t, out)
			for _, row := range []string{"published", "audited", "gave up", "rejected", "not decodable", "confirmations"} {
				if sum[row] == 0 {
					t.Errorf("the summary has 0 for %q", row)
				}
			}
			// Nobody else was there, so what the server has left must be what
			// this run did not see dealt with.
			for _, row := range []string{"found", "handled elsewhere", "not published"} {
				if n, ok := sum[row]; ok {
					t.Errorf("the summary has %d for %q, want no such row", n, row)
				}
			}
			// The rows are what the lines said.
			for row, line := range map[string]string{
				"audited": ` audited   +(at once|on attempt)`, "gave up": ` gave up   `, "rejected": ` rejected   `,
				"not decodable": ` not decodable  .* message `, "confirmations": ` confirmation sent `,
			} {
				if n := len(regexp.MustCompile(`(?m)^ +[0-9.]+s .*`+line).FindAllString(out, -1)); n != sum[row] {
					t.Errorf("the summary has %d for %q, %d lines say so", sum[row], row, n)
				}
			}
			_, end, _ := strings.Cut(out, "\nSummary after ")
			if !regexp.MustCompile(tt.next).MatchString(end) {
				t.Errorf("the end does not match %s", tt.next)
			}
			if password := passwordOf(t, args); password != "" && strings.Contains(out, password) {
				t.Error("the password is shown")
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// passwordOf is the password in a URL among the arguments.
func passwordOf(t *testing.T, args []string) string {
	t.Helper()
	for _, a := range args {
		if u, err := url.Parse(a); err == nil && u.User != nil {
			password, _ := u.User.Password()
			return password
		}
	}
	return ""
}

// What waits for its next attempt when a run is interrupted is not lost: the
// next run on the same folder finds it.
func TestRun_interrupted(t *testing.T) {
	t.Parallel()
	store := filepath.Join(t.TempDir(), "orders")

	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out := &output{text: "retry 3 of 3", seen: interrupt} // the next attempt is in 2 s
	first := readSummary(t, runOrdersTo(ctx, t, out, "-store", store, "-for", "0", "-rate", "5"))
	if first["still waiting"] == 0 {
		t.Errorf("nothing is waiting after an interrupt in the middle of retries\n%s", out)
	}

	text := runOrders(t.Context(), t, "-store", store, "-for", "1ms")
	second := readSummary(t, text)
	if second["found"] != first["still waiting"] {
		t.Errorf("the second run found %d messages, the first had left %d\n%s\n%s", second["found"], first["still waiting"], out, text)
	}
	if !strings.Contains(text, "from another run") {
		t.Errorf("no line says that an order is of another run\n%s", text)
	}
}

func TestRun_removesTemporaryFolder(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("TMPDIR", dir)
	t.Setenv("TMP", dir) // on Windows
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	runOrdersTo(ctx, t, &output{text: "audited", seen: interrupt})
	left, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 0 {
		t.Errorf("%q is left in the folder for temporary files", left[0].Name())
	}
}

// The story of one order: its own trace, and one for each further attempt with
// links to the publish and to the attempt before.
func TestRun_printTrace(t *testing.T) {
	t.Parallel()
	out := runOrders(t.Context(), t, "-for", "2s", "-rate", "20", "-print-trace")
	_, story, ok := strings.Cut(out, "\nOne order in traces: ")
	if !ok {
		t.Fatalf("no trace is printed:\n%s", out)
	}
	for _, want := range []string{
		`^\w+-\d+, by greta\.`,
		`(?m)^trace [0-9a-f]{32}\n.*\+0\.0ms  take order `,
		`└─ publish events\.tracking\.v1\.order-created .*stored in orders-audit at \d+`,
		`process events\.tracking\.v1\.order-created .*by notification\n`,
		`process .*attempt 1, nak_delay because of ledger_busy\n`,
		`(?m)├─ write ledger .*\n.*└─ nak `,
		`(?m)^trace [0-9a-f]{32}\n.*  process .*attempt 2, nak_delay because of ledger_busy → the publish → attempt 1$`,
		`(?m)^trace [0-9a-f]{32}\n.*  process .*attempt 3, ack → the publish → attempt 2$`,
		`└─ ack events\.tracking\.v1\.order-created`,
	} {
		if !regexp.MustCompile(want).MatchString(story) {
			t.Errorf("the story has no %s", want)
		}
	}
	if n := strings.Count(story, "\ntrace "); n != 3 {
		t.Errorf("the story has %d traces, want 3", n)
	}
	if t.Failed() {
		t.Log(story)
	}
}

func TestRun_metrics(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	page := make(chan string, 1)
	out := &output{text: "gave up"}
	out.seen = func() { // while the program runs, and holds out's lock
		_, rest, _ := strings.Cut(out.buf.String(), "Metrics are at ")
		url, _, _ := strings.Cut(rest, "\n")
		page <- fetch(ctx, url)
		stop()
		out.seen = nil
	}
	runOrdersTo(ctx, t, out, "-for", "0", "-rate", "20", "-metrics", "127.0.0.1:0")
	got := <-page
	for _, want := range []string{
		`mono_settlements_total\{.*settlement="term"\} [1-9]`, `mono_redeliveries_total\{.*\} [1-9]`,
		`messaging_process_duration_seconds_count\{error_type="ledger_busy",.*\} [1-9]`,
		`messaging_client_sent_messages_total\{.*\} [1-9]`, `go_goroutines [1-9]`,
	} {
		if !regexp.MustCompile(want).MatchString(got) {
			t.Errorf("the page has no %s:\n%s", want, got)
		}
	}
}

func fetch(ctx context.Context, url string) string {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err.Error()
	}
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	res, err := client.Do(req)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}

// Traces go where the standard variable says.
func TestRun_traces(t *testing.T) {
	arrived := make(chan struct{}, 1000)
	collector := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/v1/traces" {
			arrived <- struct{}{}
		}
		w.Header().Set("Content-Type", "application/x-protobuf")
	}))
	defer collector.Close()
	t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
	runOrders(t.Context(), t, "-for", "200ms", "-rate", "20")
	if len(arrived) == 0 {
		t.Error("no traces arrived")
	}
}

func TestRun_usage(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name       string
		give       []string
		want       int
		wantStdout string
		wantStderr string
	}{
		{name: "help", give: []string{"-help"}, want: exitOK, wantStdout: "go run ./examples/orders -for 30s"},
		{name: "unknown flag", give: []string{"-fast"}, want: exitUsage, wantStderr: "-fast"},
		{name: "argument", give: []string{"now"}, want: exitUsage, wantStderr: `"now"`},
		{name: "negative time", give: []string{"-for", "-1s"}, want: exitUsage, wantStderr: "-for"},
		{name: "no rate", give: []string{"-rate", "0"}, want: exitUsage, wantStderr: "-rate"},
		{name: "rate that is no number", give: []string{"-rate", "NaN"}, want: exitUsage, wantStderr: "-rate"},
		{name: "no port", give: []string{"-metrics", "localhost"}, want: exitFailed, wantStderr: "-metrics"},
		{name: "server and folder", give: []string{"-server", "a", "-store", "b"}, want: exitUsage, wantStderr: "-store"},
		{name: "open to everybody", give: []string{"-open=0.0.0.0:4222"}, want: exitUsage, wantStderr: "loopback"},
		{name: "open to everybody by IPv6", give: []string{"-open=[::]:0"}, want: exitUsage, wantStderr: "loopback"},
		{name: "open to others", give: []string{"-open=192.0.2.1:0"}, want: exitUsage, wantStderr: "loopback"},
		{name: "open by name", give: []string{"-open=example.com:0"}, want: exitUsage, wantStderr: "loopback"},
		{name: "open without a port", give: []string{"-open=127.0.0.1"}, want: exitUsage, wantStderr: "host:port"},
		{name: "open at a wrong port", give: []string{"-open=127.0.0.1:65536"}, want: exitUsage, wantStderr: "65535"},
		{name: "open server", give: []string{"-server", "a", "-open=127.0.0.1:0"}, want: exitUsage, wantStderr: "-server"},
		{name: "no server there", give: []string{"-server", "nats://u:secret@127.0.0.1:1"}, want: exitFailed, wantStderr: "connect to NATS"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			ctx, cancel := context.WithTimeout(t.Context(), patience) // -open has no end by itself
			defer cancel()
			var stdout, stderr bytes.Buffer
			if got := run(ctx, tt.give, &stdout, &stderr); got != tt.want {
				t.Errorf("exit code %d, want %d", got, tt.want)
			}
			if !strings.Contains(stdout.String(), tt.wantStdout) {
				t.Errorf("standard output lacks %q:\n%s", tt.wantStdout, &stdout)
			}
			if !strings.Contains(stderr.String(), tt.wantStderr) || tt.wantStderr == "" && stderr.Len() > 0 {
				t.Errorf("standard error is %q, want %q in it", &stderr, tt.wantStderr)
			}
			if strings.Contains(stdout.String()+stderr.String(), "secret") {
				t.Error("the password is shown")
			}
		})
	}
}

// runOrders runs the program and returns what it wrote.
func runOrders(ctx context.Context, t *testing.T, args ...string) string {
	t.Helper()
	return runOrdersTo(ctx, t, &output{}, args...)
}

func runOrdersTo(ctx context.Context, t *testing.T, out *output, args ...string) string {
	t.Helper()
	// A run that hangs is interrupted and shows its summary.
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var stderr bytes.Buffer
	if code := run(ctx, args, out, &stderr); code != exitOK || stderr.Len() > 0 {
		t.Fatalf("exit code %d\n%s\n%s", code, &stderr, out)
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("there are colours, and no terminal")
	}
	return out.String()
}

// readSummary returns the summary's rows and checks that they add up.
func readSummary(t *testing.T, out string) map[string]int {
	t.Helper()
	_, text, ok := strings.Cut(out, "\nSummary after ")
	if !ok {
		t.Fatalf("no summary\n%s", out)
	}
	rows := make(map[string]int)
	for _, m := range regexp.MustCompile(`(?m)^ +(\d+) {2}(\w+( \w+)*)(?: {2}|$)`).FindAllStringSubmatch(text, -1) {
		n, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		rows[m[2]] = n
	}
	const all = "in all"
	for _, row := range []string{"published", all, "audited", "gave up", "rejected", "not decodable", "still waiting", "confirmations"} {
		if _, ok := rows[row]; !ok {
			t.Errorf("the summary has no row %q\n%s", row, text)
		}
	}
	if n := rows["published"] + rows["found"]; n != rows[all] {
		t.Errorf("published and found are %d, in all %d\n%s", n, rows[all], text)
	}
	sum := 0
	for _, row := range []string{"audited", "gave up", "rejected", "not decodable", "still waiting", "handled elsewhere"} {
		sum += rows[row]
	}
	if sum != rows[all] {
		t.Errorf("the outcomes add up to %d, not %d\n%s", sum, rows[all], text)
	}
	return rows
}

// An output collects what is written and calls seen when text is in it.
type output struct {
	text string
	seen func()

	mu  sync.Mutex
	buf bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.seen != nil && bytes.Contains(p, []byte(o.text)) {
		o.seen()
	}
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}
