package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"maps"
	"slices"

	"github.com/nats-io/nats.go/jetstream"
)

// totals are taken from the input, the stream and the ledger. None of them is
// counted along the way.
type totals struct {
	read, bad, good int // lines

	stored int // lines that the stream holds
	before int // of them, those that it held when the program began
	twice  int // messages that repeat a line

	audited     int    // messages in the ledger of the audit
	auditedOnce bool   // they are the stored ones, each once
	sent        string // digest of the payloads in the file
	arrived     string // digest of the payloads that the audit got

	typed         int // messages in the ledger of the typed consumers
	typedOnce     bool
	typedFamilies int
}

func newTotals(in *input) *totals {
	nothing := digest(nil)
	return &totals{read: in.read, bad: in.bad, good: len(in.lines), sent: nothing, arrived: nothing, auditedOnce: true, typedOnce: true}
}

// addUp reads the stream and the ledger.
func addUp(ctx context.Context, js jetstream.JetStream, in *input, l *ledger) (*totals, error) {
	have, err := readStored(ctx, js, in.id)
	if err != nil {
		return nil, err
	}
	audited, err := l.read(ctx, auditName, in.id)
	if err != nil {
		return nil, err
	}
	typed, err := l.read(ctx, typedName, in.id)
	if err != nil {
		return nil, err
	}
	t := newTotals(in)
	t.stored, t.twice = len(have.lines), have.twice
	t.audited, t.typed = len(audited), len(typed)
	t.auditedOnce, t.typedOnce = once(have, audited), once(have, typed)

	var sent, arrived []checksum
	for i := range in.lines {
		sent = append(sent, checksum{in.lines[i].number, hex.EncodeToString(in.lines[i].sum[:])})
	}
	for _, r := range audited {
		arrived = append(arrived, checksum{r.Line, r.SHA256})
	}
	t.sent, t.arrived = digest(sent), digest(arrived)

	families := make(map[string]bool)
	for _, r := range typed {
		families[r.Family] = true
	}
	t.typedFamilies = len(families)
	return t, nil
}

// once reports whether every stored line has one record, and no record is of
// anything else.
func once(have *stored, records map[uint64]record) bool {
	return maps.EqualFunc(records, invert(have.lines), func(r record, line int) bool { return r.Line == line })
}

func invert(lines map[int]uint64) map[uint64]int {
	m := make(map[uint64]int, len(lines))
	for line, seq := range lines {
		m[seq] = line
	}
	return m
}

type checksum struct {
	line int
	sum  string
}

// digest makes one checksum of many. It sorts them by line, since messages
// arrive in any order.
func digest(sums []checksum) string {
	slices.SortFunc(sums, func(a, b checksum) int { return cmp.Or(cmp.Compare(a.line, b.line), cmp.Compare(a.sum, b.sum)) })
	h := sha256.New()
	for _, s := range sums {
		fmt.Fprintf(h, "%d %s\n", s.line, s.sum)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// problems says what does not add up.
func (t *totals) problems() []string {
	var all []string
	add := func(when bool, format string, args ...any) {
		if when {
			all = append(all, fmt.Sprintf(format, args...))
		}
	}
	add(t.bad > 0, "%d bad lines", t.bad)
	add(t.stored != t.good, "%d of %d good lines are stored", t.stored, t.good)
	add(t.twice > 0, "%d messages of the stream repeat a line", t.twice)
	add(!t.auditedOnce, "%d of %d stored lines are audited", t.audited, t.stored)
	add(t.sent != t.arrived, "the audited payloads are not those of the input")
	add(!t.typedOnce, "%d of %d stored lines are typed; a payload that does not fit its Go type is given up, and logged", t.typed, t.stored)
	return all
}

// print writes the totals: the last lines of the output.
func (t *totals) print(w io.Writer) {
	fmt.Fprintf(w, "lines read %d, stored %d (of which %d were there before), duplicates %d, bad %d\n",
		t.read, t.stored, t.before, t.twice, t.bad)
	if t.sent == t.arrived {
		fmt.Fprintf(w, "audit %d messages, sha256 sent = arrived: yes (%s)\n", t.audited, t.sent)
	} else {
		fmt.Fprintf(w, "audit %d messages, sha256 sent = arrived: no (%s, %s)\n", t.audited, t.sent, t.arrived)
	}
	fmt.Fprintf(w, "typed %d in %d families\n", t.typed, t.typedFamilies)
}
