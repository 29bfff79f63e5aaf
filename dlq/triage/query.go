package triage

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/common/types/ref"
	"cel.dev/cel-go/interpreter"
	"github.com/nats-io/nats.go"
	"golang.org/x/text/width"

	"github.com/monotel/monotel/dlq"
)

// The bounds of a query. Evaluating one costs as much as it may look at: a few
// hundred for what a person would write, and much more for a loop in a loop over a
// hostile payload.
const (
	longestQuery = 4096
	deepestQuery = 64
	queryCost    = 1_000_000

	// bytesPerCost is how much of a payload is decoded for a cost of 1: a payload of
	// 32 MB costs all that a query may.
	bytesPerCost = 32

	// interruptEvery is after how many steps of loops a query looks whether its context
	// has ended.
	interruptEvery = 64
)

// A Query is a condition on dead letters, written in CEL, the Common Expression
// Language. docs/queries.md has the variables. It is safe for concurrent use.
type Query struct {
	text    string
	program cel.Program
	payload bool
}

// A QueryError says what is wrong with a query, and where.
type QueryError struct {
	Text    string // the query
	Line    int    // from 1
	Column  int    // from 0, in characters
	Message string
}

// Error shows the line with a caret under the place.
func (e *QueryError) Error() string {
	lines := strings.Split(e.Text, "\n")
	if e.Line < 1 || e.Line > len(lines) {
		return "query: " + e.Message
	}
	line := lines[e.Line-1]
	var under strings.Builder
	column := 0
	for _, r := range line {
		if column == e.Column {
			break
		}
		column++
		switch kind := width.LookupRune(r).Kind(); {
		case r == '\t':
			under.WriteByte('\t')
		case kind == width.EastAsianWide || kind == width.EastAsianFullwidth:
			under.WriteString("  ")
		default:
			under.WriteByte(' ')
		}
	}
	return fmt.Sprintf("query: %s\n%s\n%s^", e.Message, line, under.String())
}

// Is reports whether target is [ErrInvalid].
func (e *QueryError) Is(target error) bool { return target == ErrInvalid }

// A variable of a query.
type variable struct {
	kind  *cel.Type
	value func(a *activation) any
	once  bool // it costs something to make
}

// variables are what a query may look at. What is not known is empty, 0, or the
// beginning of time.
var variables = map[string]variable{
	"id":              {cel.StringType, func(a *activation) any { return a.e.ID }, false},
	"state":           {cel.StringType, func(a *activation) any { return string(a.e.State) }, false},
	"reason":          {cel.StringType, func(a *activation) any { return string(a.e.Failure.Reason) }, false},
	"reason_text":     {cel.StringType, func(a *activation) any { return a.e.Failure.ReasonText }, false},
	"subject":         {cel.StringType, func(a *activation) any { return a.e.Subject }, false},
	"event":           {cel.StringType, func(a *activation) any { return a.e.Event }, false},
	"stream":          {cel.StringType, func(a *activation) any { return a.e.Stream }, false},
	"consumer":        {cel.StringType, func(a *activation) any { return a.e.Consumer }, false},
	"module":          {cel.StringType, func(a *activation) any { return a.e.Module }, false},
	"app":             {cel.StringType, func(a *activation) any { return a.e.App }, false},
	"app_version":     {cel.StringType, func(a *activation) any { return a.e.AppVersion }, false},
	"host":            {cel.StringType, func(a *activation) any { return a.e.Host }, false},
	"error":           {cel.StringType, func(a *activation) any { return a.e.Failure.Error }, false},
	"error_type":      {cel.StringType, func(a *activation) any { return a.e.Failure.ErrorType }, false},
	"error_types":     {cel.ListType(cel.StringType), func(a *activation) any { return a.e.Failure.ErrorTypes }, false},
	"stack":           {cel.StringType, func(a *activation) any { return strings.Join(a.e.Failure.Stack, "\n") }, true},
	"traceparent":     {cel.StringType, func(a *activation) any { return a.e.Failure.Traceparent }, false},
	"headers":         {cel.MapType(cel.StringType, cel.StringType), func(a *activation) any { return firstValues(a.e.Header) }, true},
	"payload":         {cel.DynType, func(a *activation) any { return a.payload() }, true},
	"size":            {cel.IntType, func(a *activation) any { return int64(a.e.BodySize) }, false},
	"deliveries":      {cel.IntType, func(a *activation) any { return clamped(a.e.Deliveries) }, false},
	"stream_sequence": {cel.IntType, func(a *activation) any { return clamped(a.e.StreamSequence) }, false},
	"sequence":        {cel.IntType, func(a *activation) any { return clamped(a.e.Sequence) }, false},
	"replays":         {cel.IntType, func(a *activation) any { return int64(a.e.Replays) }, false},
	"failures":        {cel.IntType, func(a *activation) any { return int64(a.e.Failures) }, false},
	"revision":        {cel.IntType, func(a *activation) any { return int64(a.e.Revision) }, false},
	"stored":          {cel.TimestampType, func(a *activation) any { return a.e.Stored }, false},
	"first_failed":    {cel.TimestampType, func(a *activation) any { return a.e.FirstFailed }, false},
	"failed":          {cel.TimestampType, func(a *activation) any { return a.e.Failure.Failed }, false},
	"changed":         {cel.TimestampType, func(a *activation) any { return a.e.Changed }, false},
	"age":             {cel.DurationType, func(a *activation) any { return time.Since(a.e.Failure.Failed) }, false},
	"actor":           {cel.StringType, func(a *activation) any { return a.e.Actor }, false},
	"operation":       {cel.StringType, func(a *activation) any { return a.e.Operation }, false},
	"group":           {cel.StringType, func(a *activation) any { return a.fingerprint(a.e) }, true},
}

// clamped fits a number into CEL's.
func clamped(n uint64) int64 { return int64(min(n, math.MaxInt64)) }

// firstValues is the first value of each header, by its key in small letters.
func firstValues(h nats.Header) map[string]string {
	values := make(map[string]string, len(h))
	for k, vs := range h {
		if k = strings.ToLower(k); len(vs) > 0 && values[k] == "" {
			values[k] = vs[0]
		}
	}
	return values
}

// An activation gives a program the values that it asks for, and makes no others.
type activation struct {
	e           *dlq.Entry
	fingerprint func(*dlq.Entry) string
	kept        map[string]any // values that are made once, since a loop asks again and again
}

// ResolveName returns the value of a variable.
func (a *activation) ResolveName(name string) (any, bool) {
	v, ok := variables[name]
	if !ok {
		return nil, false
	}
	if !v.once {
		return v.value(a), true
	}
	value, ok := a.kept[name]
	if !ok {
		value = v.value(a)
		if a.kept == nil {
			a.kept = make(map[string]any)
		}
		a.kept[name] = value
	}
	return value, true
}

// Parent returns nil: there are no other variables.
func (*activation) Parent() cel.Activation { return nil }

// payload is the decoded payload: what JSON says, or else the text.
func (a *activation) payload() any {
	dec := json.NewDecoder(bytes.NewReader(a.e.Data))
	dec.UseNumber()
	var v any
	if err := dec.Decode(&v); err != nil || dec.More() {
		return strings.ToValidUTF8(string(a.e.Data), "�")
	}
	return numbers(v)
}

// numbers makes whole numbers whole, so that large IDs keep their digits.
func numbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		if n, err := v.Int64(); err == nil {
			return n
		}
		f, err := v.Float64()
		if err != nil {
			return v.String()
		}
		return f
	case map[string]any:
		for k, x := range v {
			v[k] = numbers(x)
		}
	case []any:
		for i, x := range v {
			v[i] = numbers(x)
		}
	}
	return v
}

var environment = sync.OnceValues(func() (*cel.Env, error) {
	opts := append(make([]cel.EnvOption, 0, len(variables)+3), //nolint:mnd // these three
		cel.CrossTypeNumericComparisons(true), cel.ParserRecursionLimit(deepestQuery), cel.ParserExpressionSizeLimit(longestQuery),
	)
	for name, v := range variables {
		opts = append(opts, cel.Variable(name, v.kind))
	}
	return cel.NewEnv(opts...)
})

// Compile reads a query. What is wrong with it is a [QueryError].
func Compile(text string) (*Query, error) {
	if len(text) > longestQuery {
		return nil, fmt.Errorf("query: %w: it has %d bytes, and may have %d", ErrInvalid, len(text), longestQuery)
	}
	if !utf8.ValidString(text) {
		return nil, fmt.Errorf("query: %w: it is not UTF-8", ErrInvalid)
	}
	if strings.TrimSpace(text) == "" {
		return nil, &QueryError{Text: text, Line: 1, Message: "it is empty; want a condition such as reason == \"panic\""}
	}
	env, err := environment()
	if err != nil {
		return nil, fmt.Errorf("query: %w", err)
	}
	ast, issues := env.Compile(text)
	if issues != nil && len(issues.Errors()) > 0 {
		first := issues.Errors()[0]
		return nil, &QueryError{Text: text, Line: first.Location.Line(), Column: first.Location.Column(), Message: helpful(first.Message)}
	}
	if err := issues.Err(); err != nil {
		return nil, fmt.Errorf("query: %w: %w", ErrInvalid, err)
	}
	if out := ast.OutputType(); !out.IsExactType(cel.BoolType) && !out.IsExactType(cel.DynType) {
		return nil, &QueryError{Text: text, Line: 1, Message: fmt.Sprintf("it is a %s; want a condition, such as %s == …", out, strings.TrimSpace(firstLine(text)))}
	}
	program, err := env.Program(ast, cel.EvalOptions(cel.OptOptimize), cel.CostTracking(costs{}), cel.CostLimit(queryCost),
		cel.InterruptCheckFrequency(interruptEvery))
	if err != nil {
		return nil, fmt.Errorf("query: %w: %w", ErrInvalid, err)
	}
	q := &Query{text: text, program: program}
	for _, ref := range ast.NativeRep().ReferenceMap() {
		q.payload = q.payload || ref.Name == "payload"
	}
	return q, nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// helpful adds to a message what is near an unknown name.
func helpful(message string) string {
	_, rest, ok := strings.Cut(message, "undeclared reference to '")
	if !ok {
		return message
	}
	name, _, _ := strings.Cut(rest, "'")
	names := make([]string, 0, len(variables))
	for known := range variables {
		names = append(names, known)
	}
	slices.Sort(names)
	text := fmt.Sprintf("there is no %q", name)
	if like := nearNames(names, name); len(like) > 0 {
		return text + "; did you mean " + strings.Join(like, " or ") + "?"
	}
	return text + "; there are " + strings.Join(names, ", ")
}

// nearNames returns the names that differ from one in a few letters.
func nearNames(names []string, name string) []string {
	const farthest = 2
	var found []string
	for _, known := range names {
		if distance(name, known, farthest) <= farthest && len(name) > farthest {
			found = append(found, known)
		}
	}
	return found
}

// Text is what was compiled.
func (q *Query) Text() string { return q.text }

// UsesPayload reports whether the query looks at the payload, which then has to
// be read.
func (q *Query) UsesPayload() bool { return q.payload }

// errTooMuch reports a query that would cost too much together with the decoding of the
// payload. What the evaluator counts by itself is the same error.
var errTooMuch = interpreter.EvalCancelledError{
	Cause: interpreter.CostLimitExceeded, Message: "operation cancelled: actual cost limit exceeded, with the size of the payload",
}

// costs counts for the evaluator what comparing costs: it looks at every part of both
// values, and not only at the outermost.
type costs struct{}

// CallCost returns what a call has cost, nil for what the evaluator counts.
func (costs) CallCost(function, _ string, args []ref.Val, _ ref.Val) *uint64 {
	isOne := func(v ref.Val) bool { return v.Type() != types.ListType && v.Type() != types.MapType }
	switch {
	case function == operators.In && args[1].Type() == types.MapType: // it is looked up
		return nil
	case function != operators.Equals && function != operators.NotEquals && function != operators.In, isOne(args[0]) && isOne(args[1]):
		return nil
	}
	cost := uint64(1)
	for _, a := range args {
		cost += parts(a.Value())
	}
	return &cost
}

// parts is how many parts a value has, about.
func parts(v any) uint64 {
	const letters = 10 // compared in one step, as the evaluator counts them
	n := uint64(1)
	switch v := v.(type) {
	case string:
		n += uint64(len(v) / letters)
	case []any:
		for _, x := range v {
			n += parts(x)
		}
	case map[string]any:
		for _, x := range v {
			n += parts(x)
		}
	case []ref.Val:
		for _, x := range v {
			n += parts(x.Value())
		}
	case map[ref.Val]ref.Val:
		for k, x := range v {
			n += parts(k.Value()) + parts(x.Value())
		}
	}
	return n
}

// errNotBool reports a query whose value is no condition after all.
var errNotBool = errors.New("the query's value is neither true nor false")

// Match reports whether the query is true for an entry. Where it cannot be told,
// as when the payload lacks a field or has text for a number, it is false, and the
// error says why: for a list that is no error.
func (q *Query) Match(e *dlq.Entry) (bool, error) {
	return q.evaluate(e, Fingerprint, func(a *activation) (ref.Val, *cel.EvalDetails, error) { return q.program.Eval(a) })
}

// match is [Query.Match] that ends, with an error, when ctx does.
func (q *Query) match(ctx context.Context, e *dlq.Entry, fingerprint func(*dlq.Entry) string) (bool, error) {
	return q.evaluate(e, fingerprint, func(a *activation) (ref.Val, *cel.EvalDetails, error) { return q.program.ContextEval(ctx, a) })
}

func (q *Query) evaluate(
	e *dlq.Entry, fingerprint func(*dlq.Entry) string, eval func(*activation) (ref.Val, *cel.EvalDetails, error),
) (bool, error) {
	size := uint64(0)
	if q.payload {
		size = uint64(len(e.Data) / bytesPerCost)
	}
	if size > queryCost {
		return false, fmt.Errorf("query: %w", errTooMuch)
	}
	value, details, err := eval(&activation{e: e, fingerprint: fingerprint})
	if err != nil {
		return false, fmt.Errorf("query: %w", err)
	}
	if cost := details.ActualCost(); cost != nil && *cost+size > queryCost {
		return false, fmt.Errorf("query: %w", errTooMuch)
	}
	ok, isBool := value.Value().(bool)
	if !isBool {
		return false, fmt.Errorf("query: %w", errNotBool)
	}
	return ok, nil
}
