package main

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// budget is the part of the messages that may be given up: the objective is that
// 99.9 % are handled.
const budget = "0.001"

const (
	critical = "critical" // wakes somebody
	warning  = "warning"  // is looked at in working hours
)

// A ruleFile is what Prometheus reads.
type ruleFile struct {
	Groups []ruleGroup `yaml:"groups"`
}

type ruleGroup struct {
	Name     string `yaml:"name"`
	Interval string `yaml:"interval,omitempty"`
	Rules    []rule `yaml:"rules"`
}

type rule struct {
	Record      string            `yaml:"record,omitempty"`
	Alert       string            `yaml:"alert,omitempty"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for,omitempty"`
	Labels      map[string]string `yaml:"labels,omitempty"`
	Annotations map[string]string `yaml:"annotations,omitempty"`
}

// givenUpRatio is the part of a consumer's messages that were given up, over a
// window. There is none while there is nothing to settle.
func givenUpRatio(window string) string { return "job_consumer:mono_given_up:ratio_rate" + window }

// Windows of the objective: those of each burn rate, and that of the objective
// itself. The long ones change slowly and are expensive.
var (
	shortWindows = []string{"5m", "30m", "1h", "6h"}
	longWindows  = []string{"3d", "30d"}
)

func recordings() []ruleGroup {
	group := func(name, interval string, windows []string) ruleGroup {
		g := ruleGroup{Name: name, Interval: interval}
		for _, w := range windows {
			g.Rules = append(g.Rules, rule{Record: givenUpRatio(w), Expr: fmt.Sprintf(`
sum by (job, @consumer) (rate(mono.settlements{settlement="term", outcome="ok"}[%s]))
/ (sum by (job, @consumer) (rate(mono.settlements{settlement=~"ack|term", outcome="ok"}[%[1]s])) > 0)`, w)})
		}
		return g
	}
	return []ruleGroup{group("monotel-objective", "", shortWindows), group("monotel-objective-long", "1m", longWindows)}
}

// An alert is a rule that somebody is told by. docs/monitoring.md has a section
// for each.
type alert struct {
	name     string
	severity string
	expr     string
	wait     string // how long it has to be so
	summary  string // one line, with the labels
	text     string // what it means, and what to do first
	board    string // that shows it
}

// burn is that of a fast and a slow window together: the slow one says that it
// matters, the fast one that it is still going on. A single message given up by a
// consumer that has few is no reason to wake somebody: the alert on open dead
// letters tells of it.
func burn(factor float64, slow, fast string) string {
	limit := strconv.FormatFloat(factor, 'g', -1, 64) + " * " + budget
	return fmt.Sprintf(`
(%s > %s and %s > %[2]s)
and sum by (job, @consumer) (increase(mono.settlements{settlement="term", outcome="ok"}[%[4]s])) >= 5`,
		givenUpRatio(slow), limit, givenUpRatio(fast), slow)
}

// grew is by how much a counter grew that is not there before it counts for the
// first time, which increase does not see.
func grew(selector, window string) string {
	return fmt.Sprintf("((%s unless %[1]s offset %s) or increase(%[1]s[%[2]s]))", selector, window)
}

var alerts = []alert{
	{
		name: "MonotelErrorBudgetBurnsFast", severity: critical, wait: "1m", board: boardOverview,
		expr:    burn(14.4, "1h", "5m"),
		summary: "{{ $labels.@consumer }} gives up {{ $value | humanizePercentage }} of its messages",
		text: "At this rate the error budget of 30 days is gone in two days. Messages are being given up now: find the error in the " +
			"groups of dead letters, and stop what causes it.",
	},
	{
		name: "MonotelErrorBudgetBurns", severity: critical, wait: "5m", board: boardOverview,
		expr:    burn(6, "6h", "30m"),
		summary: "{{ $labels.@consumer }} has given up {{ $value | humanizePercentage }} of its messages for hours",
		text:    "At this rate the error budget of 30 days is gone in five days.",
	},
	{
		name: "MonotelErrorBudgetBurnsSlowly", severity: warning, wait: "30m", board: boardOverview,
		expr:    burn(1, "3d", "6h"),
		summary: "{{ $labels.@consumer }} has given up {{ $value | humanizePercentage }} of its messages for days",
		text:    "At this rate the error budget of 30 days is used up and the objective is missed.",
	},
	{
		// A dead letter does not go away by itself, so waiting only spares what
		// somebody replays at once.
		name: "MonotelDeadLettersOpen", severity: warning, wait: "1m", board: boardDeadLetters,
		expr:    `max by (@stream, @consumer) (mono.dead_letters.open) > 0`,
		summary: "{{ $value }} dead letters of {{ $labels.@consumer }} are open in {{ $labels.@stream }}",
		text: "Messages were given up and nobody has seen to them. `monotel dlq groups` says what failed and `monotel dlq replay` has " +
			"it handled again; the alert ends when none is open.",
	},
	{
		name: "MonotelDeadLettersMany", severity: critical, wait: "5m", board: boardDeadLetters,
		expr:    `max by (@stream, @consumer) (mono.dead_letters.open) > 100`,
		summary: "{{ $value }} dead letters of {{ $labels.@consumer }} are open in {{ $labels.@stream }}",
		text:    "So many are an outage of something that the consumer needs, or a release that cannot read what is published.",
	},
	{
		name: "MonotelDeadLettersOld", severity: warning, wait: "5m", board: boardDeadLetters,
		expr:    `max by (@stream, @consumer) (mono.dead_letters.oldest_age) > 24 * 3600`,
		summary: "A dead letter of {{ $labels.@consumer }} in {{ $labels.@stream }} has been open for {{ $value | humanizeDuration }}",
		text:    "Nobody has decided about it: replay it, or discard or archive it with a reason.",
	},
	{
		// As long as the window: one capture that failed and then succeeded is not
		// enough.
		name: "MonotelCapturesFail", severity: critical, wait: "5m", board: boardDeadLetters,
		expr:    `sum by (job, @consumer) (increase(mono.dead_letters.capture_failures[5m])) > 0`,
		summary: "Dead letters of {{ $labels.@consumer }} cannot be stored",
		text: "The dead-letter stream takes nothing: it is full, gone, or may not be written. Nothing is lost, as the messages are held and " +
			"come again, but they keep others waiting.",
	},
	{
		name: "MonotelRedeliveries", severity: warning, wait: "5m", board: boardConsumers,
		expr: `
sum by (job, @consumer) (rate(mono.redeliveries[10m]))
/ (sum by (job, @consumer) (rate(messaging.client.consumed.messages[10m])) > 0)
> 0.1
and sum by (job, @consumer) (increase(mono.redeliveries[10m])) >= 10`,
		summary: "{{ $value | humanizePercentage }} of what {{ $labels.@consumer }} handles are redeliveries",
		text:    "It works on the same messages again and again. Look at the errors by type, and at late settlements.",
	},
	{
		name: "MonotelAckPendingNearLimit", severity: warning, wait: "5m", board: boardConsumers,
		expr: `
max by (job, @stream, @consumer) (mono.consumer.ack_pending)
/ max by (job, @stream, @consumer) (mono.consumer.ack_pending.limit)
> 0.8`,
		summary: "{{ $labels.@stream }}/{{ $labels.@consumer }} has {{ $value | humanizePercentage }} of the messages that it may have unsettled",
		text: "At 100 % the server delivers nothing more, and nothing else says so. Messages that wait for their next attempt count as well: " +
			"many failures with long delays fill it.",
	},
	{
		name: "MonotelConsumerLags", severity: critical, wait: "5m", board: boardConsumers,
		expr:    `histogram_quantile(0.95, sum by (job, @consumer, le) (rate(mono.queue.duration_bucket[5m]))) > 300`,
		summary: "{{ $labels.@consumer }} gets messages {{ $value | humanizeDuration }} after they were stored",
		text:    "It handles less than is published. Is it slow, are there too few instances, or does it catch up after it was away?",
	},
	{
		// The default policy gives a message up after less than four minutes.
		name: "MonotelUnprocessedOld", severity: warning, wait: "5m", board: boardConsumers,
		expr:    `max by (job, @stream, @consumer) (mono.consumer.oldest_unprocessed.age) > 900`,
		summary: "A message for {{ $labels.@stream }}/{{ $labels.@consumer }} has waited for {{ $value | humanizeDuration }}",
		text:    "It is either not delivered, or in a handler that does not return, or tried again and again.",
	},
	{
		// A consumer that is always busy has no request waiting, either: it must not
		// get anything as well.
		name: "MonotelNobodyFetches", severity: critical, wait: "2m", board: boardConsumers,
		expr: `
(
  max by (job, @stream, @consumer) (min_over_time(mono.consumer.pending[5m])) > 0
  and max by (job, @stream, @consumer) (max_over_time(mono.consumer.waiting[5m])) == 0
)
unless on (job, @consumer) sum by (job, @consumer) (increase(messaging.client.consumed.messages[5m])) > 0`,
		summary: "{{ $value }} messages wait for {{ $labels.@stream }}/{{ $labels.@consumer }} and nobody fetches them",
		text:    "Its instances run and ask the server for nothing: they are paused, hang in their handlers, or are being stopped.",
	},
	{
		name: "MonotelConsumerGone", severity: warning, wait: "5m", board: boardConsumers,
		expr: `
max by (job, @stream, @consumer) (max_over_time(mono.consumer.pending[1h]))
unless max by (job, @stream, @consumer) (mono.consumer.pending)`,
		summary: "No instance of {{ $labels.@stream }}/{{ $labels.@consumer }} is there any more",
		text:    "Nobody consumes, and nobody says how far behind it is. It ends by itself after an hour, for a consumer that was removed.",
	},
	{
		name: "MonotelSettlementsLate", severity: warning, board: boardConsumers,
		expr:    `sum by (job, @consumer) (increase(mono.settlements.late[10m])) > 0`,
		summary: "{{ $labels.@consumer }} settles messages after their lease has ended",
		text:    "The server may have delivered them to another instance meanwhile, so they are handled twice.",
	},
	{
		name: "MonotelSettlementsFail", severity: warning, board: boardConsumers,
		expr:    `sum by (job, @consumer) (` + grew(`mono.settlements{outcome="error"}`, "10m") + `) > 0`,
		summary: "{{ $labels.@consumer }} could not tell the server what has become of messages",
		text:    "They were handled and come again. The connection was lost, or the server has no leader for the consumer.",
	},
	{
		name: "MonotelUnsettled", severity: warning, board: boardConsumers,
		expr:    `sum by (job, @consumer) (increase(mono.unsettled[10m])) > 0`,
		summary: "A handler of {{ $labels.@consumer }} returns without settling messages",
		text:    "It is a mistake in the handler: without AutoAck it must settle each message. They come again after AckWait.",
	},
	{
		name: "MonotelPublishesFail", severity: warning, wait: "5m", board: boardPublishers,
		expr: `
sum by (job, @event) (rate(messaging.client.sent.messages{error.type!=""}[5m]))
/ (sum by (job, @event) (rate(messaging.client.sent.messages[5m])) > 0)
> 0.01`,
		summary: "{{ $value | humanizePercentage }} of the publishes of {{ $labels.@event }} fail",
		text:    "Whoever publishes gets the error and has to deal with it. The type of the error says which: a full stream, no stream, no connection.",
	},
	{
		name: "MonotelSpanQueueFull", severity: warning, board: boardTelemetry,
		expr:    `sum by (job, instance) (increase(otel.sdk.processor.span.processed{error.type="queue_full"}[5m])) > 0`,
		summary: "{{ $labels.instance }} drops spans: its queue is full",
		text:    "Traces have gaps. The collector is slow or away, or more is sampled than can be sent. Messages are not affected.",
	},
	{
		name: "MonotelSpanExportsFail", severity: warning, wait: "5m", board: boardTelemetry,
		expr:    `sum by (job, instance) (increase(otel.sdk.exporter.span.exported{error.type="export_failed"}[5m])) > 0`,
		summary: "{{ $labels.instance }} cannot send spans",
		text:    "They are lost. The collector is away, or refuses them. Messages are not affected.",
	},
	{
		name: "MonotelMetricOverflow", severity: warning, board: boardTelemetry,
		expr: `
count by (job, instance, metric) (
  label_replace({otel_metric_overflow="true"}, "metric", "$1", "__name__", "(.+?)(?:_bucket|_count|_sum)?")
) > 0`,
		summary: "{{ $labels.instance }} has too many series of {{ $labels.metric }}",
		text:    "What is beyond the limit is counted together, without its labels: boards and alerts no longer see each consumer.",
	},
}

const (
	runbook = "https://github.com/monotel/monotel/blob/main/docs/monitoring.md#"
	firing  = "only while it fires"
)

func (a alert) rule() rule {
	return rule{
		Alert: a.name, Expr: a.expr, For: a.wait, Labels: map[string]string{"severity": a.severity},
		Annotations: map[string]string{
			"summary": a.summary, "description": a.text, "runbook_url": runbook + strings.ToLower(a.name),
			"board": "/d/" + a.board, // of Grafana
		},
	}
}

// buildRules makes the files of rules, and adds what is recorded to what exists.
func buildRules(c *catalogue) (files map[string][]byte, queries []query, err error) {
	recorded := ruleFile{Groups: recordings()}
	alerting := ruleFile{Groups: []ruleGroup{{Name: "monotel"}}}
	for _, a := range alerts {
		alerting.Groups[0].Rules = append(alerting.Groups[0].Rules, a.rule())
	}
	files = map[string][]byte{}
	for _, f := range []struct {
		name string
		file ruleFile
	}{{"rules/recording.yml", recorded}, {"rules/alerts.yml", alerting}} {
		var errs []error
		for _, g := range f.file.Groups {
			for i := range g.Rules {
				q, err := g.Rules[i].resolve(c)
				q.From = f.name + ": " + q.From
				queries, errs = append(queries, q), append(errs, err)
			}
		}
		text, err := toYAML(f.file)
		files[f.name] = text
		if err := errors.Join(append(errs, err)...); err != nil {
			return nil, nil, err
		}
	}
	return files, queries, nil
}

// resolve translates and checks a rule.
func (r *rule) resolve(c *catalogue) (query, error) {
	var errs []error
	translate := func(text *string) {
		got, err := c.translate(*text)
		*text, errs = strings.TrimSpace(got), append(errs, err)
	}
	translate(&r.Expr)
	if err := errors.Join(errs...); err != nil {
		return query{}, fmt.Errorf("%s: %w", r.Record+r.Alert, err)
	}
	q, err := c.check(r.Expr)
	errs = append(errs, err)
	out := query{From: r.Record + r.Alert, Expr: q.expr, Metrics: q.metrics}
	if r.Record != "" {
		c.series[r.Record] = q.labels
	} else {
		out.MayBeEmpty = firing
	}
	for name, text := range r.Annotations {
		translate(&text)
		r.Annotations[name] = text
		errs = append(errs, q.checkText(text))
	}
	if err := errors.Join(errs...); err != nil {
		return out, fmt.Errorf("%s: %w", out.From, err)
	}
	return out, nil
}

func toYAML(v any) ([]byte, error) {
	var b bytes.Buffer
	b.WriteString(header)
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	err := errors.Join(e.Encode(v), e.Close())
	return b.Bytes(), err
}

const header = "# Made by `go run .` in dashboards/, do not edit.\n"
