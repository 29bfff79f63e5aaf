package cli

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/jsontext"
	"github.com/monotel/monotel/internal/safe"
)

// The names of the fields below are for scripts: they stay. The error, its
// reason and traces are those of the latest failure.

type entryView struct {
	ID            string     `json:"id"`
	State         dlq.State  `json:"state"`
	Group         string     `json:"group"`
	Reason        dlq.Reason `json:"reason"`
	ReasonText    string     `json:"reason_text,omitempty"`
	Error         string     `json:"error"`
	ErrorType     string     `json:"error_type"`
	ErrorTypes    []string   `json:"error_types,omitempty"`
	Event         string     `json:"event,omitempty"`
	Subject       string     `json:"subject"`
	Stream        string     `json:"stream"`
	StreamSeq     uint64     `json:"stream_sequence"`
	Consumer      string     `json:"consumer"`
	ConsumerSeq   uint64     `json:"consumer_sequence"`
	Deliveries    uint64     `json:"deliveries"`
	StoredAt      time.Time  `json:"stored_at,omitzero"`
	FirstFailedAt time.Time  `json:"first_failed_at,omitzero"`
	FailedAt      time.Time  `json:"failed_at,omitzero"`
	ChangedAt     time.Time  `json:"changed_at,omitzero"`
	ChangedBy     string     `json:"changed_by,omitempty"`
	Operation     string     `json:"operation,omitempty"`
	Replays       int        `json:"replays"`
	Failures      int        `json:"failures"`
	Revision      int        `json:"revision"`
	PayloadBytes  int        `json:"payload_bytes"`
	PayloadPlace  string     `json:"payload_place"`
	TraceID       string     `json:"trace_id,omitempty"`
	OriginTraceID string     `json:"origin_trace_id,omitempty"`
	App           string     `json:"app,omitempty"`
	AppVersion    string     `json:"app_version,omitempty"`
	Module        string     `json:"module,omitempty"`
	Host          string     `json:"host,omitempty"`
	Sequence      uint64     `json:"sequence"`
	Problem       string     `json:"problem,omitempty"` // what could not be read

	Payload       json.RawMessage `json:"payload,omitempty"`
	PayloadBase64 *[]byte         `json:"payload_base64,omitempty"`
}

// latest is how it failed last.
func latest(e *dlq.Entry) *dlq.Record {
	if e.Failure != nil {
		return e.Failure
	}
	return e.Record
}

func viewEntry(e *dlq.Entry, problem error) entryView {
	f := latest(e)
	v := entryView{
		ID: e.ID, State: e.State, Group: triage.Fingerprint(e), Reason: f.Reason, ReasonText: f.ReasonText,
		Error: f.Error, ErrorType: f.ErrorType, ErrorTypes: f.ErrorTypes, Event: e.Event, Subject: e.Subject,
		Stream: e.Stream, StreamSeq: e.StreamSequence, Consumer: e.Consumer, ConsumerSeq: e.ConsumerSequence, Deliveries: e.Deliveries,
		StoredAt: e.Stored, FirstFailedAt: e.FirstFailed, FailedAt: f.Failed, ChangedAt: e.Changed, ChangedBy: e.Actor,
		Operation: e.Operation, Replays: e.Replays, Failures: e.Failures, Revision: e.Revision, PayloadBytes: e.BodySize,
		PayloadPlace: place(e.Body), TraceID: traceID(f.Traceparent), OriginTraceID: traceID(e.OriginTraceparent),
		App: e.App, AppVersion: e.AppVersion, Module: e.Module, Host: e.Host, Sequence: e.Sequence,
	}
	if problem != nil {
		v.Problem = problem.Error()
	}
	return v
}

func place(p dlq.BodyPlace) string {
	if p == dlq.BodyInline {
		return "inline"
	}
	return string(p)
}

// setPayload gives a payload as what it is: JSON, or bytes.
func (v *entryView) setPayload(data []byte, body dlq.BodyPlace) {
	switch {
	case data == nil && body != dlq.BodyInline:
	case isJSON(data) && !jsontext.Nested(data, mostLevels):
		v.Payload = data
	default:
		data = append([]byte{}, data...) // not null if it is empty
		v.PayloadBase64 = &data
	}
}

// mostLevels is how deep a payload may be that is shown as JSON: programs that read
// it refuse more, such as jq 1.6 with 256.
const mostLevels = 200

func isJSON(data []byte) bool { return utf8.Valid(data) && json.Valid(data) }

// A wholeView is what show says.
type wholeView struct {
	entryView
	StreamCreated     time.Time           `json:"stream_created_at,omitzero"`
	Traceparent       string              `json:"traceparent,omitempty"`
	OriginTraceparent string              `json:"origin_traceparent,omitempty"`
	TraceURL          string              `json:"trace_url,omitempty"`
	OriginTraceURL    string              `json:"origin_trace_url,omitempty"`
	Stack             []string            `json:"stack,omitempty"`
	FirstFailure      *failureView        `json:"first_failure,omitempty"` // if it failed again
	Headers           map[string][]string `json:"headers,omitempty"`
	History           []changeView        `json:"history"`
}

type failureView struct {
	Reason      dlq.Reason `json:"reason"`
	ReasonText  string     `json:"reason_text,omitempty"`
	Error       string     `json:"error"`
	ErrorType   string     `json:"error_type"`
	ErrorTypes  []string   `json:"error_types,omitempty"`
	FailedAt    time.Time  `json:"failed_at,omitzero"`
	Deliveries  uint64     `json:"deliveries,omitempty"`
	Traceparent string     `json:"traceparent,omitempty"`
	Stack       []string   `json:"stack,omitempty"`
}

func viewFailure(r *dlq.Record) *failureView {
	if r == nil {
		return nil
	}
	return &failureView{
		Reason: r.Reason, ReasonText: r.ReasonText, Error: r.Error, ErrorType: r.ErrorType, ErrorTypes: r.ErrorTypes,
		FailedAt: r.Failed, Deliveries: r.Deliveries, Traceparent: r.Traceparent, Stack: r.Stack,
	}
}

type changeView struct {
	Kind      dlq.ChangeKind  `json:"kind"`
	From      dlq.State       `json:"from,omitempty"`
	To        dlq.State       `json:"to,omitempty"`
	At        time.Time       `json:"at,omitzero"`
	By        string          `json:"by,omitempty"`
	Reason    string          `json:"reason,omitempty"`
	Operation string          `json:"operation,omitempty"`
	Target    string          `json:"target,omitempty"`
	Revision  int             `json:"revision,omitempty"`
	Diff      json.RawMessage `json:"diff,omitempty"` // part of a payload
	Failure   *failureView    `json:"failure,omitempty"`
	Sequence  uint64          `json:"sequence,omitempty"`
}

func viewChange(c *dlq.Change, payload bool) changeView {
	v := changeView{
		Kind: c.Kind, From: c.From, To: c.To(), At: c.Time, By: c.Actor, Reason: c.Reason, Operation: c.Operation, Target: c.Target,
		Revision: c.Revision, Failure: viewFailure(c.Failure), Sequence: c.Sequence,
	}
	if payload {
		v.Diff = c.Diff
	}
	return v
}

// viewWhole includes the message as current has it, if that is not nil.
func viewWhole(e *dlq.Entry, current *dlq.Record, problem error, template string) wholeView {
	f := latest(e)
	v := wholeView{
		entryView: viewEntry(e, problem), StreamCreated: e.StreamCreated,
		Traceparent: f.Traceparent, OriginTraceparent: e.OriginTraceparent,
		TraceURL: traceLink(template, f.Traceparent), OriginTraceURL: traceLink(template, e.OriginTraceparent),
		Stack: f.Stack, History: []changeView{},
	}
	if e.Failures > 0 {
		v.FirstFailure = viewFailure(e.Record)
	}
	for _, c := range e.History {
		v.History = append(v.History, viewChange(c, current != nil))
	}
	if current != nil {
		v.PayloadBytes, v.PayloadPlace = current.BodySize, place(current.Body)
		v.setPayload(current.Data, current.Body)
		v.Headers = current.Header
	}
	return v
}

type groupView struct {
	Group     string    `json:"group"`
	Title     string    `json:"title"`
	Stream    string    `json:"stream"`
	Consumer  string    `json:"consumer"`
	ErrorType string    `json:"error_type"`
	Count     int       `json:"count"`
	FirstAt   time.Time `json:"first_at,omitzero"`
	LastAt    time.Time `json:"last_at,omitzero"`
	PerHour   float64   `json:"per_hour"`
	Regressed bool      `json:"regressed"`
	Samples   []string  `json:"samples"`
}

func viewGroup(g triage.Group) groupView {
	return groupView{
		Group: g.ID, Title: g.Title, Stream: g.Stream, Consumer: g.Consumer, ErrorType: g.ErrorType, Count: g.Count,
		FirstAt: g.First, LastAt: g.Last, PerHour: g.PerHour, Regressed: g.Regressed, Samples: orEmpty(g.Samples),
	}
}

// orEmpty is an empty array in JSON, not null.
func orEmpty[T any](s []T) []T {
	if s == nil {
		return []T{}
	}
	return s
}

type statsView struct {
	Stream     string             `json:"stream"`
	States     map[dlq.State]int  `json:"states"`
	Reasons    map[dlq.Reason]int `json:"reasons"`
	Consumers  map[string]int     `json:"consumers"`
	Oldest     *entryView         `json:"oldest,omitempty"`
	Newest     *entryView         `json:"newest,omitempty"`
	Bytes      uint64             `json:"bytes"`
	MaxBytes   int64              `json:"max_bytes"` // -1: no limit
	Unreadable int                `json:"unreadable"`

	OtherReasons   othersView `json:"other_reasons,omitzero"`   // that are left out of reasons
	OtherConsumers othersView `json:"other_consumers,omitzero"` // that are left out of consumers
}

type othersView struct {
	Count int `json:"count"`
	Open  int `json:"open"` // their dead letters
}

func viewStats(s *triage.Stats) statsView {
	v := statsView{
		Stream: s.Stream, States: orEmptyMap(s.States), Reasons: orEmptyMap(s.Reasons), Consumers: orEmptyMap(s.Consumers),
		Bytes: s.Bytes, MaxBytes: s.MaxBytes, Unreadable: s.Unreadable,
		OtherReasons: othersView(s.OtherReasons), OtherConsumers: othersView(s.OtherConsumers),
	}
	if s.Oldest != nil {
		e := viewEntry(s.Oldest, nil)
		v.Oldest = &e
	}
	if s.Newest != nil {
		e := viewEntry(s.Newest, nil)
		v.Newest = &e
	}
	return v
}

func orEmptyMap[K comparable](m map[K]int) map[K]int {
	if m == nil {
		return map[K]int{}
	}
	return m
}

// An eventView is what tail says: a new dead letter, or a change of one.
type eventView struct {
	Event      string      `json:"event"` // "captured" or "changed"
	ID         string      `json:"id"`
	Sequence   uint64      `json:"sequence"`
	DeadLetter *entryView  `json:"dead_letter,omitempty"`
	Change     *changeView `json:"change,omitempty"`
}

func viewEvent(e triage.Event) eventView {
	v := eventView{Event: "captured", ID: e.ID, Sequence: e.Sequence}
	if e.Record != nil {
		entry := viewEntry(dlq.NewEntry(e.Record, e.Sequence, nil), nil)
		v.DeadLetter = &entry
	}
	if e.Change != nil {
		c := viewChange(e.Change, false)
		v.Event, v.Change = "changed", &c
	}
	return v
}

type findingView struct {
	Severity dlq.Severity `json:"severity"`
	Check    string       `json:"check"`
	Stream   string       `json:"stream,omitempty"`
	Consumer string       `json:"consumer,omitempty"`
	Detail   string       `json:"detail"`
	Remedy   string       `json:"remedy"`
	Count    uint64       `json:"count"`
}

func viewFinding(f dlq.Finding) findingView { return findingView(f) }

// traceURL is where traces can be looked at.
type traceURL struct{ flag string }

const traceIDPlace = "{trace_id}"

func (t *traceURL) register(cmd *cobra.Command, c *cli) {
	cmd.Flags().StringVar(&t.flag, "trace-url-template", "",
		"`URL` where a trace can be looked at, such as http://localhost:16686/trace/{trace_id} (default $MONOTEL_TRACE_URL)")
	c.complete(cmd, "trace-url-template", nil)
}

func (t *traceURL) template(c *cli) (string, error) {
	s := t.flag
	if s == "" {
		s = c.env("MONOTEL_TRACE_URL")
	}
	if s == "" {
		return "", nil
	}
	u, err := safe.ParseURL(strings.ReplaceAll(s, traceIDPlace, "0"))
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || !strings.Contains(s, traceIDPlace) {
		return "", usagef("--trace-url-template: want a URL with %s in it, such as http://localhost:16686/trace/%s", traceIDPlace, traceIDPlace)
	}
	return s, nil
}

var traceparent = regexp.MustCompile(`^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}`)

// traceID is that of a traceparent, or nothing.
func traceID(parent string) string {
	if m := traceparent.FindStringSubmatch(parent); m != nil {
		return m[1]
	}
	return ""
}

func traceLink(template, parent string) string {
	id := traceID(parent)
	if template == "" || id == "" {
		return ""
	}
	return strings.ReplaceAll(template, traceIDPlace, id)
}

// headerName is what HTTP allows, too: every client can write and read it.
var headerName = regexp.MustCompile("^[a-zA-Z0-9!#$%&'*+.^_`|~-]+$")

// headerLine reads "Key: value" as given on the command line. A header without a
// value is to be taken away.
func headerLine(s string) (key, value string, err error) {
	key, value, ok := strings.Cut(s, ":")
	key = strings.TrimSpace(key)
	if !ok || key == "" {
		return "", "", fmt.Errorf("--header %q: want 'Key: value', or 'Key:' to take it away", key)
	}
	if !headerName.MatchString(key) {
		return "", "", fmt.Errorf("--header %q: a name has letters, digits and - _ . only, or others that HTTP allows", key)
	}
	if strings.ContainsAny(value, "\r\n") {
		return "", "", fmt.Errorf("--header %q: a value is one line", key)
	}
	for _, locked := range []string{"Nats-", "Dlq-"} {
		if len(key) >= len(locked) && strings.EqualFold(key[:len(locked)], locked) {
			return "", "", fmt.Errorf("--header %q: headers that begin with %s say what the message is, and stay", key, locked)
		}
	}
	return key, strings.TrimSpace(value), nil
}

// withHeaders returns a copy of h after the lines. Those of one key, in whatever
// case, together replace the values that it has, or take it away.
func withHeaders(h nats.Header, lines []string) (nats.Header, error) {
	to := make(nats.Header, len(h))
	maps.Copy(to, h)
	var errs []error
	given := make(map[string]string) // keys as they were first given, by themselves in lower case
	for _, line := range lines {
		key, value, err := headerLine(line)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		lower := strings.ToLower(key)
		first, again := given[lower]
		if !again {
			given[lower], first = key, key
			maps.DeleteFunc(to, func(k string, _ []string) bool { return strings.EqualFold(k, key) })
		}
		switch {
		case again && (value == "") != (len(to[first]) == 0):
			errs = append(errs, fmt.Errorf("--header %q: it is set and taken away at once", key))
		case value != "":
			to[first] = append(to[first], value)
		}
	}
	return to, errors.Join(errs...)
}
