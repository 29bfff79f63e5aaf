package triage

import "github.com/monotel/monotel/dlq"

// A Query is a condition on dead letters, written in CEL.
type Query struct{ text string }

// Compile reads a query.
func Compile(text string) (*Query, error) { return &Query{text: text}, nil }

// Text is what was compiled.
func (q *Query) Text() string { return q.text }

// UsesPayload reports whether the query looks at the payload or the original headers' object.
func (q *Query) UsesPayload() bool { return false }

// Match reports whether the query is true for an entry.
func (q *Query) Match(e *dlq.Entry) (bool, error) { return true, nil }
