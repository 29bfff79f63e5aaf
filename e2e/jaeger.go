package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strconv"
	"time"
)

// A span is what Jaeger tells of one, by either of its APIs.
type span struct {
	TraceID, SpanID string
	Parent          string // span ID, "" of a root
	Service, Name   string
	Kind            string // server, client, producer, consumer, internal
	Error           bool
	Start           time.Time
	Attributes      map[string]string
	Links           []link
}

type link struct{ TraceID, SpanID string }

// A trace is its spans.
type trace []span

// named returns the spans of that name.
func (t trace) named(name string) (found trace) {
	for _, s := range t {
		if s.Name == name {
			found = append(found, s)
		}
	}
	return found
}

// root returns the only span without a parent.
func (t trace) root() (span, error) {
	var roots trace
	for _, s := range t {
		if s.Parent == "" {
			roots = append(roots, s)
		}
	}
	if len(roots) != 1 {
		return span{}, fmt.Errorf("it has %d roots: %v", len(roots), roots.names())
	}
	return roots[0], nil
}

func (t trace) names() []string {
	names := make([]string, 0, len(t))
	for _, s := range t {
		names = append(names, s.Service+": "+s.Name)
	}
	return names
}

var errNoTrace = errors.New("jaeger does not have the trace")

// A jaeger asks one, by the API that its own pages use, and by version 3 of the
// public one.
type jaeger struct{ url string }

// trace asks both APIs, and makes sure that they agree in what they share.
func (j jaeger) trace(ctx context.Context, id string) (trace, error) {
	byPages, err := j.traceOfPages(ctx, id)
	if err != nil {
		return nil, err
	}
	t, err := j.traceV3(ctx, id)
	if err != nil {
		return nil, err
	}
	if !maps.Equal(t.shared(), byPages.shared()) {
		return nil, fmt.Errorf("trace %s is %+v\nby /api/v3/traces, and %+v\nby /api/traces", id, t.shared(), byPages.shared())
	}
	return t, nil
}

// A sharedSpan is what both APIs tell in the same way.
type sharedSpan struct {
	service, name, kind string
	failed              bool
}

// shared is what both APIs tell, by span ID.
func (t trace) shared() map[string]sharedSpan {
	all := make(map[string]sharedSpan, len(t))
	for _, s := range t {
		all[s.SpanID] = sharedSpan{s.Service, s.Name, s.Kind, s.Error}
	}
	return all
}

// search returns the traces that have a span of the consumers with the name, if any is
// given, and the attributes, by the API of the pages.
func (j jaeger) search(ctx context.Context, name string, attributes map[string]string, since time.Time) ([]trace, error) {
	tags, err := json.Marshal(attributes)
	if err != nil {
		return nil, err
	}
	const most = 200
	path := fmt.Sprintf("/api/traces?service=%s&operation=%s&tags=%s&start=%d&end=%d&limit=%d", consumersName, urlEscape(name),
		urlEscape(string(tags)), since.UnixMicro(), time.Now().Add(time.Minute).UnixMicro(), most)
	var answer pagesAnswer
	if err := getJSON(ctx, j.url+path, &answer); err != nil {
		return nil, err
	}
	all := make([]trace, 0, len(answer.Data))
	for _, d := range answer.Data {
		all = append(all, d.spans())
	}
	return all, nil
}

// services by the API of the pages.
func (j jaeger) services(ctx context.Context) ([]string, error) {
	var answer struct {
		Data []string `json:"data"`
	}
	err := getJSON(ctx, j.url+"/api/services", &answer)
	return answer.Data, err
}

type pagesAnswer struct {
	Data []pagesTrace `json:"data"`
}

type pagesTrace struct {
	Spans []struct {
		TraceID       string `json:"traceID"`
		SpanID        string `json:"spanID"`
		OperationName string `json:"operationName"`
		References    []struct {
			RefType string `json:"refType"`
			TraceID string `json:"traceID"`
			SpanID  string `json:"spanID"`
		} `json:"references"`
		StartTime int64      `json:"startTime"` // µs
		Tags      []pagesTag `json:"tags"`
		ProcessID string     `json:"processID"`
	} `json:"spans"`
	Processes map[string]struct {
		ServiceName string `json:"serviceName"`
	} `json:"processes"`
}

type pagesTag struct {
	Key   string `json:"key"`
	Value any    `json:"value"`
}

func (p pagesTrace) spans() trace {
	t := make(trace, 0, len(p.Spans))
	for _, s := range p.Spans {
		out := span{
			TraceID: s.TraceID, SpanID: s.SpanID, Service: p.Processes[s.ProcessID].ServiceName, Name: s.OperationName,
			Start: time.UnixMicro(s.StartTime), Attributes: make(map[string]string),
		}
		for _, tag := range s.Tags {
			out.Attributes[tag.Key] = fmt.Sprint(tag.Value)
		}
		out.Kind, out.Error = out.Attributes["span.kind"], out.Attributes["error"] == "true"
		// The first that is a child of the same trace is the parent; links are the rest.
		for _, r := range s.References {
			if out.Parent == "" && r.RefType == "CHILD_OF" && r.TraceID == s.TraceID {
				out.Parent = r.SpanID
				continue
			}
			out.Links = append(out.Links, link{r.TraceID, r.SpanID})
		}
		t = append(t, out)
	}
	return t
}

func (j jaeger) traceOfPages(ctx context.Context, id string) (trace, error) {
	var answer pagesAnswer
	err := getJSON(ctx, j.url+"/api/traces/"+id, &answer)
	if isNotFound(err) || err == nil && len(answer.Data) == 0 {
		return nil, errNoTrace
	}
	if err != nil {
		return nil, err
	}
	return answer.Data[0].spans(), nil
}

// otlpSpans is the part of OTLP in JSON that is looked at.
type otlpSpans struct {
	ResourceSpans []struct {
		Resource struct {
			Attributes []otlpAttribute `json:"attributes"`
		} `json:"resource"`
		ScopeSpans []struct {
			Spans []struct {
				TraceID           string          `json:"traceId"`
				SpanID            string          `json:"spanId"`
				ParentSpanID      string          `json:"parentSpanId"`
				Name              string          `json:"name"`
				Kind              int             `json:"kind"`
				StartTimeUnixNano string          `json:"startTimeUnixNano"`
				Attributes        []otlpAttribute `json:"attributes"`
				Links             []struct {
					TraceID string `json:"traceId"`
					SpanID  string `json:"spanId"`
				} `json:"links"`
				Status struct {
					Code int `json:"code"`
				} `json:"status"`
			} `json:"spans"`
		} `json:"scopeSpans"`
	} `json:"resourceSpans"`
}

type otlpAttribute struct {
	Key   string                     `json:"key"`
	Value map[string]json.RawMessage `json:"value"`
}

func (a otlpAttribute) text() string {
	for _, raw := range a.Value { // it has one
		var s string
		if json.Unmarshal(raw, &s) == nil {
			return s
		}
		return string(raw)
	}
	return ""
}

func (j jaeger) traceV3(ctx context.Context, id string) (t trace, err error) {
	body, err := get(ctx, j.url+"/api/v3/traces/"+id)
	if isNotFound(err) {
		return nil, errNoTrace
	}
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, body.Close()) }()
	// A long trace comes in several objects, one after another.
	for dec := json.NewDecoder(body); ; {
		var answer struct {
			Result otlpSpans `json:"result"`
		}
		switch err := dec.Decode(&answer); {
		case errors.Is(err, io.EOF):
			if len(t) == 0 {
				return nil, errNoTrace
			}
			return t, nil
		case err != nil:
			return nil, fmt.Errorf("trace %s by /api/v3/traces: %w", id, err)
		}
		t = append(t, answer.Result.spans()...)
	}
}

const otlpStatusError = 2

func (o otlpSpans) spans() (t trace) {
	kinds := []string{"", "internal", "server", "client", "producer", "consumer"}
	for _, r := range o.ResourceSpans {
		var service string
		for _, a := range r.Resource.Attributes {
			if a.Key == "service.name" {
				service = a.text()
			}
		}
		for _, scope := range r.ScopeSpans {
			for _, s := range scope.Spans {
				nanos, _ := strconv.ParseInt(s.StartTimeUnixNano, 10, 64) // zero is noticed
				out := span{
					TraceID: s.TraceID, SpanID: s.SpanID, Parent: s.ParentSpanID, Service: service, Name: s.Name,
					Error: s.Status.Code == otlpStatusError, Start: time.Unix(0, nanos), Attributes: make(map[string]string),
				}
				if s.Kind >= 0 && s.Kind < len(kinds) {
					out.Kind = kinds[s.Kind]
				}
				for _, a := range s.Attributes {
					out.Attributes[a.Key] = a.text()
				}
				for _, l := range s.Links {
					out.Links = append(out.Links, link(l))
				}
				t = append(t, out)
			}
		}
	}
	return t
}

// A statusError is an answer other than 200.
type statusError struct {
	url  string
	code int
	body string
}

func (e *statusError) Error() string { return fmt.Sprintf("%s: %d: %s", e.url, e.code, e.body) }

func isNotFound(err error) bool {
	status, ok := errors.AsType[*statusError](err)
	return ok && status.code == http.StatusNotFound
}
