package main

// The uid of each board is in links and bookmarks: it never changes.
const (
	boardOverview    = "monotel-overview"
	boardConsumers   = "monotel-consumers"
	boardDeadLetters = "monotel-dead-letters"
	boardPublishers  = "monotel-publishers"
	boardTelemetry   = "monotel-telemetry"
)

// Units, as Grafana calls them.
const (
	count     = "short"
	perSecond = "cps"
	seconds   = "s"
	part      = "percentunit"
	bytesUnit = "bytes"
)

// Reasons why a query may return nothing.
const (
	noFailures = "only after something has failed"
	noAlerts   = "only while an alert fires"
	noOverflow = "only when an instrument has more series than its limit"
)

// Every App reports the first or the second, and every telemetry.Setup that sends
// spans the third.
const anyApp = `{__name__=~"mono.handlers.active|messaging.client.sent.messages|otel.sdk.processor.span.queue.capacity"`

// All jobs and instances are those of Apps, and not Prometheus itself.
var (
	jobs      = variable{name: "job", title: "Job", selector: anyApp + "}", label: "job"}
	instances = variable{name: "instance", title: "Instance", selector: anyApp + `, job=~"$job"}`, label: "instance"}
	streams   = variable{name: "stream", title: "Stream", selector: `mono.consumer.pending{job=~"$job"}`, label: "@stream", any: true}
	consumers = variable{
		name: "consumer", title: "Consumer", label: "@consumer", any: true,
		selector: `{__name__=~"mono.handlers.active|mono.dead_letters.open", job=~"$job"}`,
	}
	services = variable{name: "service", title: "Service in Jaeger", selector: `target_info{job=~"$job"}`, label: "service_name", one: true}
)

var (
	zero = new(0.0)
	one  = new(1.0)
)

// The consumers of several Apps may have one name; the name is all a reader needs
// otherwise.
const (
	byConsumer = "{{@consumer}}"
	byQueue    = "{{@stream}}/{{@consumer}}"
	byInstance = "{{instance}}"
)

// quantiles of a histogram, of which the highest has the exemplars.
func quantiles(histogram, selector string) []target {
	q := func(n, legend string) target {
		return target{
			expr:   "histogram_quantile(" + n + ", sum by (le) (rate(" + histogram + "_bucket{" + selector + "}[@rate])))",
			legend: legend,
		}
	}
	top := q("0.99", "99 %")
	top.exemplars = true
	return []target{q("0.5", "half"), q("0.95", "95 %"), top}
}

func buckets(histogram, selector string) []target {
	return []target{{
		expr: "sum by (le) (increase(" + histogram + "_bucket{" + selector + "}[@rate]))", legend: "{{le}}", exemplars: true,
	}}
}

const exemplarHint = " Each dot is a message: it leads to its trace."

func boards() []board {
	return []board{overview(), consumersBoard(), deadLettersBoard(), publishersBoard(), telemetryBoard()}
}

func overview() board {
	return board{
		uid: boardOverview, title: "monotel: overview and objective",
		text:      "Is work being done, and is it done well enough? Start here.",
		variables: []variable{jobs, instances, streams, consumers, services},
		rows: []row{
			{title: "Now", panels: []panel{
				{
					kind: number, title: "Alerts firing", width: 4, unit: count, bad: 1,
					text:    "Alerts of monotel's rules. The table below names them; docs/monitoring.md says what to do first.",
					queries: []target{{expr: `count(ALERTS{alertname=~"Monotel.*", alertstate="firing"}) or vector(0)`, legend: "alerts"}},
				},
				{
					kind: number, title: "Instances up", width: 4, unit: count, bad: 1, lowIsBad: true,
					text:    "Instances that Prometheus reaches. What the others do is on no board.",
					queries: []target{{expr: `sum(up{@app})`, legend: "instances"}},
				},
				{
					kind: number, title: "Handled", width: 4, to: boardConsumers, unit: perSecond,
					text:    "Messages acked, each second. If it is 0 while messages are published, look at the consumers.",
					queries: []target{{expr: `sum(rate(mono.settlements{@own, settlement="ack", outcome="ok"}[@rate]))`, legend: "acked"}},
				},
				{
					kind: number, title: "Given up", width: 4, to: boardDeadLetters, unit: count, bad: 1,
					text: "Messages given up, in the time that the board shows.",
					queries: []target{{
						expr:   `sum(increase(mono.settlements{@own, settlement="term", outcome="ok"}[$__range]))`,
						legend: "given up",
					}},
				},
				{
					kind: number, title: "Dead letters open", width: 4, to: boardDeadLetters, unit: count, warn: 1, bad: 100,
					text:    "Given up and not seen to. The board of dead letters says of whom.",
					queries: []target{{expr: `sum(max by (@stream, @consumer) (mono.dead_letters.open{@letters}))`, legend: "open"}},
				},
				{
					kind: number, title: "Furthest behind", width: 4, to: boardConsumers, unit: seconds, warn: 60, bad: 300,
					text:    "Age of the oldest message that a consumer has not acked, of the consumer that is furthest behind.",
					queries: []target{{expr: `max(mono.consumer.oldest_unprocessed.age{@server})`, legend: "oldest"}},
				},
				{
					kind: rows, title: "Alerts", width: 24, height: 6,
					text:    "What fires now. critical wakes somebody, warning is for working hours.",
					queries: []target{{expr: `ALERTS{alertname=~"Monotel.*", alertstate="firing"}`, mayBeEmpty: noAlerts}},
				},
			}},
			{title: "Objective: 99.9 % of messages are handled without being given up", panels: []panel{
				{
					kind: number, title: "Error budget left, 30 days", width: 8, height: 8,
					unit: part, lowIsBad: true, warn: 0.5, bad: 0.1, max: one,
					text: "How much of the one message in a thousand that may be given up is left. Below 0 the objective is missed. " +
						"It needs the recording rules.",
					queries: []target{{
						expr: `min by (@consumer) (1 - ` + givenUpRatio("30d") + `{job=~"$job", @consumer=~"$consumer"}` +
							` / ` + budget + `)`,
						legend: byConsumer,
					}},
				},
				{
					kind: lines, title: "Burn rate", width: 16, unit: count, min: zero, warn: 1, bad: 14.4,
					text: "How many times faster than allowed the error budget is used up. At 1 it lasts for just 30 days, at 14.4 for two: " +
						"that wakes somebody if it holds for an hour. It needs the recording rules.",
					queries: []target{
						{
							expr:   `max by (@consumer) (` + givenUpRatio("1h") + `{job=~"$job", @consumer=~"$consumer"}) / ` + budget,
							legend: byConsumer + ", 1 h",
						},
						{
							expr:   `max by (@consumer) (` + givenUpRatio("6h") + `{job=~"$job", @consumer=~"$consumer"}) / ` + budget,
							legend: byConsumer + ", 6 h",
						},
					},
				},
			}},
			{title: "Flow", panels: []panel{
				{
					kind: lines, title: "Published, handled, given up", width: 12, unit: perSecond, min: zero,
					text: "Handled below published is a backlog that grows. Events with several consumers are handled several times.",
					queries: []target{
						{expr: `sum(rate(messaging.client.sent.messages{@app}[@rate]))`, legend: "published"},
						{expr: `sum(rate(messaging.client.consumed.messages{@own}[@rate]))`, legend: "given to handlers"},
						{expr: `sum(rate(mono.settlements{@own, settlement="ack", outcome="ok"}[@rate]))`, legend: "acked"},
						{expr: `sum(rate(mono.settlements{@own, settlement="term", outcome="ok"}[@rate]))`, legend: "given up"},
					},
				},
				{
					kind: lines, title: "From stored to acked", width: 12, unit: seconds, min: zero, warn: 60, bad: 300,
					text:    "How long messages of durable consumers take, retries included." + exemplarHint,
					queries: quantiles("mono.end_to_end.duration", "@own"),
				},
				{
					kind: lines, title: "Failures by type", width: 12, unit: perSecond, min: zero,
					text: "Attempts that failed, by error.type. Most are tried again.",
					queries: []target{{
						expr:   `sum by (@consumer, error.type) (rate(messaging.process.duration_count{@own, error.type!=""}[@rate]))`,
						legend: byConsumer + ": {{error.type}}", mayBeEmpty: noFailures, provoked: true,
					}},
				},
				{
					// Not by error=true: Jaeger's storage in memory finds nothing by it.
					kind: traces, title: "Traces of failures", width: 12,
					text: "The newest traces of the service, in Jaeger, in which a message of a durable consumer was given up or is to be " +
						"tried again.",
					queries: []target{{expr: "messaging.nats.settlement=term"}, {expr: "messaging.nats.settlement=nak_delay"}},
				},
			}},
		},
	}
}

func consumersBoard() board {
	return board{
		uid: boardConsumers, title: "monotel: consumers",
		text:      "Is a consumer late, stuck, failing or slow?",
		variables: []variable{jobs, instances, streams, consumers},
		rows: []row{
			{title: "Is it late?", panels: []panel{
				{
					kind: lines, title: "Oldest message not acked", width: 8, unit: seconds, min: zero, warn: 60, bad: 300,
					text: "How far behind the consumer is. A line that rises by a second each second is a message that nothing happens to.",
					queries: []target{{
						expr: `max by (@stream, @consumer) (mono.consumer.oldest_unprocessed.age{@server})`, legend: byQueue,
					}},
				},
				{
					kind: lines, title: "Messages not delivered yet", width: 8, unit: count, min: zero,
					text:    "The backlog. It should come back to 0; what matters is for how long it does not.",
					queries: []target{{expr: `max by (@stream, @consumer) (mono.consumer.pending{@server})`, legend: byQueue}},
				},
				{
					kind: lines, title: "From stored to handler, 95 %", width: 8, unit: seconds, min: zero, warn: 60, bad: 300,
					text: "How long messages wait for their first attempt: the lag that they see." + exemplarHint,
					queries: []target{{
						expr:   `histogram_quantile(0.95, sum by (@consumer, le) (rate(mono.queue.duration_bucket{@own}[@rate])))`,
						legend: byConsumer, exemplars: true,
					}},
				},
			}},
			{title: "Is it stuck?", panels: []panel{
				{
					kind: lines, title: "Unsettled, of its limit", width: 8, unit: part, min: zero, warn: 0.5, bad: 0.8,
					text: "Messages delivered and not settled, as a part of MaxAckPending. At 100 % the server delivers nothing more, and nothing " +
						"else says so. Those that wait for their next attempt count.",
					queries: []target{{
						expr: `max by (@stream, @consumer) (mono.consumer.ack_pending{@server}) / ` +
							`max by (@stream, @consumer) (mono.consumer.ack_pending.limit{@server})`,
						legend: byQueue,
					}},
				},
				{
					kind: lines, title: "Requests that wait at the server", width: 8, unit: count, min: zero,
					text:    "Of all instances. 0 with a backlog is either a consumer that is busy, or one that nobody fetches for.",
					queries: []target{{expr: `max by (@stream, @consumer) (mono.consumer.waiting{@server})`, legend: byQueue}},
				},
				{
					kind: lines, title: "Messages in handlers", width: 8, unit: count, min: zero,
					text:    "A line that stays at the consumer's concurrency is a consumer that is full, or handlers that hang.",
					queries: []target{{expr: `sum by (@consumer) (mono.handlers.active{@own})`, legend: byConsumer}},
				},
			}},
			failingRow(),
			slowRow(),
			{title: "Is something wrong with how it settles? These should not move", panels: []panel{
				{
					kind: number, title: "Settled late", width: 8, unit: count, bad: 1,
					text: "After the lease had ended, in the time that the board shows: handled twice, perhaps.",
					queries: []target{{
						expr: `sum by (@consumer) (increase(mono.settlements.late{@own}[$__range]))`, legend: byConsumer,
					}},
				},
				{
					kind: number, title: "Left unsettled", width: 8, unit: count, bad: 1,
					text: "By a handler that returned nil, in the time that the board shows: a mistake in the handler.",
					queries: []target{{
						expr: `sum by (@consumer) (increase(mono.unsettled{@own}[$__range]))`, legend: byConsumer,
					}},
				},
				{
					kind: number, title: "Settlements not sent", width: 8, unit: count, bad: 1,
					text: "Since the instances started: the messages were handled and come again.",
					queries: []target{{
						expr: `sum by (@consumer) (mono.settlements{@own, outcome="error"})`, legend: byConsumer, mayBeEmpty: noFailures,
					}},
				},
			}},
		},
	}
}

func failingRow() row {
	return row{title: "Does it fail?", panels: []panel{
		{
			kind: stacked, title: "Settlements", width: 8, unit: perSecond, min: zero,
			text: "ack: handled. nak_delay: tried again later. nak: tried again at once. term: given up. in_progress: leases extended while a " +
				"handler runs.",
			queries: []target{{expr: `sum by (settlement) (rate(mono.settlements{@own}[@rate]))`, legend: "{{settlement}}"}},
		},
		{
			kind: lines, title: "Attempts that fail", width: 8, unit: part, min: zero, warn: 0.05, bad: 0.2,
			text: "As a part of all attempts.",
			queries: []target{{
				expr: `sum by (@consumer) (rate(messaging.process.duration_count{@own, error.type!=""}[@rate])) / ` +
					`(sum by (@consumer) (rate(messaging.process.duration_count{@own}[@rate])) > 0)`,
				legend: byConsumer, mayBeEmpty: noFailures, provoked: true,
			}},
		},
		{
			kind: lines, title: "Failures by type", width: 8, unit: perSecond, min: zero,
			text: "Attempts that failed, by error.type: the name of a known error, what its ErrorType says, or its Go type.",
			queries: []target{{
				expr:   `sum by (@consumer, error.type) (rate(messaging.process.duration_count{@own, error.type!=""}[@rate]))`,
				legend: byConsumer + ": {{error.type}}", mayBeEmpty: noFailures, provoked: true,
			}},
		},
		{
			kind: lines, title: "Redeliveries", width: 8, unit: part, min: zero, warn: 0.05, bad: 0.1,
			text: "As a part of what handlers get. Above 10 % the consumer works on the same messages again and again.",
			queries: []target{{
				expr: `sum by (@consumer) (rate(mono.redeliveries{@own}[@rate])) / ` +
					`(sum by (@consumer) (rate(messaging.client.consumed.messages{@own}[@rate])) > 0)`,
				legend: byConsumer,
			}},
		},
		{
			kind: lines, title: "Attempts until it was settled, 99 %", width: 8, unit: count, min: zero,
			text: "Deliveries that a message took until its ack or term. 1 is what it should be.",
			queries: []target{{
				expr:   `histogram_quantile(0.99, sum by (@consumer, le) (rate(mono.delivery.attempts_bucket{@own}[@rate])))`,
				legend: byConsumer, exemplars: true,
			}},
		},
		{
			kind: lines, title: "Given up", width: 8, unit: perSecond, min: zero,
			text: "Messages that the consumer terminated. They are dead letters.",
			queries: []target{{
				expr:   `sum by (@consumer) (rate(mono.settlements{@own, settlement="term", outcome="ok"}[@rate]))`,
				legend: byConsumer,
			}},
		},
	}}
}

func slowRow() row {
	return row{title: "Is it slow?", panels: []panel{
		{
			kind: heat, title: "Time in handlers", width: 12, unit: seconds,
			text:    "How many messages took how long." + exemplarHint,
			queries: buckets("messaging.process.duration", "@own"),
		},
		{
			kind: lines, title: "Time in handlers, 95 %", width: 12, unit: seconds, min: zero,
			text: "By consumer." + exemplarHint,
			queries: []target{{
				expr:   `histogram_quantile(0.95, sum by (@consumer, le) (rate(messaging.process.duration_bucket{@own}[@rate])))`,
				legend: byConsumer, exemplars: true,
			}},
		},
		{
			kind: heat, title: "From stored to acked", width: 12, unit: seconds,
			text:    "Retries included. A second band far above the first is messages that needed one." + exemplarHint,
			queries: buckets("mono.end_to_end.duration", "@own"),
		},
		{
			kind: lines, title: "From stored to acked, 95 %", width: 12, unit: seconds, min: zero,
			text: "By consumer, retries included." + exemplarHint,
			queries: []target{{
				expr:   `histogram_quantile(0.95, sum by (@consumer, le) (rate(mono.end_to_end.duration_bucket{@own}[@rate])))`,
				legend: byConsumer, exemplars: true,
			}},
		},
	}}
}

const howTo = `**What has failed?** ` + "`monotel dlq groups`" + ` puts failures together that are the same.
**Why?** ` + "`monotel dlq show ID`" + ` has the error, the stack, the payload and both traces.
**Try again:** ` + "`monotel dlq replay --group G --canary 1,5,20 --dry-run`" + `, then the plan that it prints.
**Not worth it:** ` + "`monotel dlq discard`" + ` or ` + "`archive`" + `, with a reason.

The operator's guide is docs/dead-letters.md.`

func deadLettersBoard() board {
	return board{
		uid: boardDeadLetters, title: "monotel: dead letters",
		text:      "What was given up, why, and what has become of it.",
		variables: []variable{jobs, instances, consumers, services},
		rows: []row{
			{title: "To be seen to", panels: []panel{
				{
					kind: number, title: "Open", width: 6, height: 6, unit: count, warn: 1, bad: 100,
					text: "Dead letters that nobody has replayed with success, archived or discarded.",
					queries: []target{{
						expr:   `sum by (@consumer) (max by (@stream, @consumer) (mono.dead_letters.open{@letters}))`,
						legend: byConsumer,
					}},
				},
				{
					kind: number, title: "Oldest", width: 6, height: 6, unit: seconds, warn: 3600, bad: 86400,
					text:    "For how long the oldest of them has been open.",
					queries: []target{{expr: `max by (@consumer) (mono.dead_letters.oldest_age{@letters})`, legend: byConsumer}},
				},
				{
					kind: number, title: "Captures that failed", width: 4, height: 6, unit: count, bad: 1,
					text: "In the time that the board shows. The dead-letter stream does not take them: they are held and come again.",
					queries: []target{{
						expr: `sum(increase(mono.dead_letters.capture_failures{@own}[$__range]))`, legend: "failed",
					}},
				},
				{kind: paragraph, title: "What to do", width: 8, height: 6, text: howTo},
				{
					kind: lines, title: "Open", width: 24, unit: count, min: zero, warn: 1, bad: 100,
					text:    "By consumer. A replay that succeeds takes it down, one that fails again does not.",
					queries: []target{{expr: `max by (@stream, @consumer) (mono.dead_letters.open{@letters})`, legend: byQueue}},
				},
			}},
			{title: "Captured", panels: []panel{
				{
					kind: stacked, title: "By reason", width: 12, unit: perSecond, min: zero,
					text: "attempts_exhausted: every attempt failed. permanent_error, terminated: the handler said so. undecodable: the payload is not " +
						"what the event says. panic, crashed: a mistake in the handler. external_…: a consumer that is not ours. expired: gone before it " +
						"could be captured.",
					queries: []target{{expr: `sum by (reason) (rate(mono.dead_letters.captured{@own}[@rate]))`, legend: "{{reason}}"}},
				},
				{
					kind: stacked, title: "By consumer", width: 12, unit: perSecond, min: zero,
					text:    "Many consumers at once is something that all of them need; one alone is that consumer.",
					queries: []target{{expr: `sum by (@consumer) (rate(mono.dead_letters.captured{@own}[@rate]))`, legend: byConsumer}},
				},
				{
					kind: lines, title: "Given up, of all that was handled", width: 12, unit: part, min: zero, warn: 0.001, bad: 0.0144,
					text: "The objective allows 0.1 %. It needs the recording rules.",
					queries: []target{{
						expr:   `max by (@consumer) (` + givenUpRatio("5m") + `{job=~"$job", @consumer=~"$consumer"})`,
						legend: byConsumer + ", 5 min",
					}},
				},
				{
					kind: traces, title: "Traces of captures", width: 12,
					text:    "The newest traces in which a dead letter was captured, in Jaeger.",
					queries: []target{{expr: "messaging.operation.name=dead_letter"}},
				},
			}},
			{title: "Replayed", panels: []panel{
				{
					kind: stacked, title: "Outcomes", width: 12, unit: perSecond, min: zero,
					text: "resolved: handled. failed_again: given up again, and open again.",
					queries: []target{{
						expr:   `sum by (outcome) (rate(mono.dead_letters.replayed{@own, outcome=~"resolved|failed_again"}[@rate]))`,
						legend: "{{outcome}}",
					}},
				},
				{
					kind: lines, title: "Replays that failed again", width: 12, unit: part, min: zero, warn: 0.05, bad: 0.1,
					text: "Of those that have an outcome. A replay stops by itself at 10 %.",
					queries: []target{{
						expr: `sum by (@consumer) (rate(mono.dead_letters.replayed{@own, outcome="failed_again"}[@rate])) / ` +
							`(sum by (@consumer) (rate(mono.dead_letters.replayed{@own, outcome=~"resolved|failed_again"}[@rate])) > 0)`,
						legend: byConsumer, mayBeEmpty: "only while replays have outcomes", provoked: true,
					}},
				},
			}},
		},
	}
}

func publishersBoard() board {
	return board{
		uid: boardPublishers, title: "monotel: publishers",
		text:      "Are events published, how fast, and what fails?",
		variables: []variable{jobs, instances},
		rows: []row{
			{title: "Published", panels: []panel{
				{
					kind: stacked, title: "By event", width: 12, unit: perSecond, min: zero,
					text:    "Publishes, those that failed included.",
					queries: []target{{expr: `sum by (@event) (rate(messaging.client.sent.messages{@app}[@rate]))`, legend: "{{@event}}"}},
				},
				{
					kind: lines, title: "By instance", width: 12, unit: perSecond, min: zero,
					text:    "A line that ends is an instance that is gone, or that nobody asks.",
					queries: []target{{expr: `sum by (instance) (rate(messaging.client.sent.messages{@app}[@rate]))`, legend: byInstance}},
				},
			}},
			{title: "Failures", panels: []panel{
				{
					kind: lines, title: "By type", width: 12, unit: perSecond, min: zero,
					text: "store_full: the stream is at its limit. no_stream: none stores the subject. disconnected, ack_timeout: the server is away " +
						"or slow. invalid_…: a mistake of the publisher.",
					queries: []target{{
						expr:   `sum by (@event, error.type) (rate(messaging.client.sent.messages{@app, error.type!=""}[@rate]))`,
						legend: "{{@event}}: {{error.type}}", mayBeEmpty: noFailures, provoked: true,
					}},
				},
				{
					kind: lines, title: "Of all publishes", width: 12, unit: part, min: zero, warn: 0.001, bad: 0.01,
					text: "Whoever publishes gets the error.",
					queries: []target{{
						expr: `sum by (@event) (rate(messaging.client.sent.messages{@app, error.type!=""}[@rate])) / ` +
							`(sum by (@event) (rate(messaging.client.sent.messages{@app}[@rate])) > 0)`,
						legend: "{{@event}}", mayBeEmpty: noFailures, provoked: true,
					}},
				},
			}},
			{title: "How long a publish takes", panels: []panel{
				{
					kind: heat, title: "All publishes", width: 12, unit: seconds,
					text:    "A durable publish until its acknowledgement, a core one until it was handed to the connection." + exemplarHint,
					queries: buckets("messaging.client.operation.duration", "@app"),
				},
				{
					kind: lines, title: "95 %, by event", width: 12, unit: seconds, min: zero, warn: 0.1, bad: 1,
					text: "Slow acknowledgements are a slow disk, or a cluster that waits for a replica." + exemplarHint,
					queries: []target{{
						expr: `histogram_quantile(0.95, sum by (@event, le) (` +
							`rate(messaging.client.operation.duration_bucket{@app}[@rate])))`,
						legend: "{{@event}}", exemplars: true,
					}},
				},
				{
					kind: lines, title: "Waiting for their acknowledgement", width: 12, unit: count, min: zero,
					text:    "Asynchronous durable publishes. A line that grows is a server that does not keep up.",
					queries: []target{{expr: `sum by (@event) (mono.publish.pending{@app})`, legend: "{{@event}}"}},
				},
				{
					kind: lines, title: "Quantiles", width: 12, unit: seconds, min: zero, warn: 0.1, bad: 1,
					text:    "Of all events together." + exemplarHint,
					queries: quantiles("messaging.client.operation.duration", "@app"),
				},
			}},
		},
	}
}

func telemetryBoard() board {
	return board{
		uid: boardTelemetry, title: "monotel: telemetry health",
		text:      "Can the other boards, and the traces, be believed?",
		variables: []variable{jobs, instances},
		rows: []row{
			{title: "Spans", panels: []panel{
				{
					kind: lines, title: "Queue", width: 8, unit: part, min: zero, max: one, warn: 0.5, bad: 0.8,
					text: "Ended spans that wait to be sent, as a part of the most that may. A full queue drops spans; no message waits for it.",
					queries: []target{{
						expr:   `otel.sdk.processor.span.queue.size{@app} / otel.sdk.processor.span.queue.capacity{@app}`,
						legend: byInstance,
					}},
				},
				{
					kind: lines, title: "Sent", width: 8, unit: perSecond, min: zero,
					text: "Spans that the collector has taken.",
					queries: []target{{
						expr:   `sum by (instance) (rate(otel.sdk.exporter.span.exported{@app, error.type=""}[@rate]))`,
						legend: byInstance,
					}},
				},
				{
					kind: lines, title: "Lost", width: 8, unit: perSecond, min: zero, bad: 0.1,
					text: "Dropped because the queue was full, or not taken by the collector. Traces have gaps.",
					queries: []target{
						{
							expr:   `sum by (instance) (rate(otel.sdk.processor.span.processed{@app, error.type="queue_full"}[@rate]))`,
							legend: byInstance + ", queue full",
						},
						{
							expr:   `sum by (instance) (rate(otel.sdk.exporter.span.exported{@app, error.type="export_failed"}[@rate]))`,
							legend: byInstance + ", export failed",
						},
					},
				},
			}},
			{title: "Trace context", panels: []panel{
				{
					kind: stacked, title: "Of messages", width: 12, unit: perSecond, min: zero,
					text: "continued: the trace goes on. linked: a trace of its own, as the message was not fresh. absent: the publisher sent none. " +
						"malformed: it could not be read. dropped: the message would have been too large with it.",
					queries: []target{{expr: `sum by (state) (rate(mono.trace_context{@app}[@rate]))`, legend: "{{state}}"}},
				},
				{
					kind: number, title: "Malformed or dropped", width: 12, height: 8, unit: count, warn: 1,
					text: "Since the instances started. A malformed one comes from a publisher in another language, most often.",
					queries: []target{{
						expr:   `sum by (state) (mono.trace_context{@app, state=~"malformed|dropped"})`,
						legend: "{{state}}", mayBeEmpty: noFailures,
					}},
				},
			}},
			{title: "Metrics", panels: []panel{
				{
					kind: number, title: "Instruments with too many series", width: 8, height: 8, unit: count, bad: 1,
					text: "What is beyond the limit is counted together, without its labels. Boards and alerts no longer see each consumer.",
					queries: []target{{
						expr: `count by (metric) (label_replace({otel_metric_overflow="true", job=~"$job"}, ` +
							`"metric", "$1", "__name__", "(.+)"))`,
						legend: "{{metric}}", mayBeEmpty: noOverflow,
					}},
				},
				{
					kind: lines, title: "Series of each instance", width: 8, unit: count, min: zero, warn: 50000, bad: 200000,
					text:    "They follow the number of consumers and events, never the number of messages. A line that keeps rising is a label that should not be one.",
					queries: []target{{expr: `scrape_samples_scraped{@app}`, legend: byInstance}},
				},
				{
					kind: lines, title: "Time of a scrape", width: 8, unit: seconds, min: zero, warn: 1, bad: 5,
					text:    "Prometheus gives up after its scrape_timeout, by default 10 s, and then there are gaps.",
					queries: []target{{expr: `scrape_duration_seconds{@app}`, legend: byInstance}},
				},
			}},
			{title: "Processes", panels: []panel{
				{
					kind: lines, title: "Memory", width: 8, unit: bytesUnit, min: zero,
					text:    "Resident memory of each instance.",
					queries: []target{{expr: `process_resident_memory_bytes{@app}`, legend: byInstance}},
				},
				{
					kind: lines, title: "Processor", width: 8, unit: count, min: zero,
					text:    "Cores in use by each instance.",
					queries: []target{{expr: `rate(process_cpu_seconds_total{@app}[@rate])`, legend: byInstance}},
				},
				{
					kind: lines, title: "Goroutines", width: 8, unit: count, min: zero,
					text:    "A line that keeps rising is a leak.",
					queries: []target{{expr: `go_goroutines{@app}`, legend: byInstance}},
				},
			}},
		},
	}
}
