package triage

import (
	"context"
	"time"

	"github.com/monotel/monotel/dlq"
)

// Fingerprint names the group of a failure.
func Fingerprint(e *dlq.Entry) string { return "" }

// A Group is the dead letters that failed for the same cause.
type Group struct {
	ID        string // the fingerprint
	Title     string // the normalised text of the error
	Consumer  string
	Stream    string
	ErrorType string
	Count     int       // of entries that were selected
	First     time.Time // when the first of them failed
	Last      time.Time
	PerHour   float64  // over the last hour before Last
	Samples   []string // IDs, newest first, at most 5
	Regressed bool     // one of the same group was resolved before the last failed
}

// Groups groups the selected dead letters, the largest group first.
func (d *Desk) Groups(ctx context.Context, sel Selection) ([]Group, error) { return nil, nil }
