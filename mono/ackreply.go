package mono

import (
	"strings"
	"time"
)

// parseAckReply reads a delivery's facts from its reply subject, which the
// server writes as
//
//	$JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<stored, ns>.<pending>
//
// or, with the domain and account that newer servers add, as
//
//	$JS.ACK.<domain or _>.<account>.<stream>.<consumer>.<deliveries>.….<pending>[.<random>]
//
// It does what jetstream.Msg.Metadata does, without an allocation.
func parseAckReply(reply string, m *Metadata) bool {
	rest, ok := strings.CutPrefix(reply, ackPrefix)
	if !ok {
		return false
	}
	var tok [10]string
	n := 0
	for more := true; more && n < len(tok); n++ {
		tok[n], rest, more = strings.Cut(rest, ".")
	}
	t := tok[:n]
	switch {
	case n == 7 && rest == "": // old form
	case n >= 9:
		if t[0] != "_" {
			m.Domain = t[0]
		}
		t = t[2:9]
	default:
		return false
	}
	var num [5]uint64
	for i := range num {
		if num[i], ok = parseUint(t[2+i]); !ok {
			return false
		}
	}
	if t[0] == "" || t[1] == "" {
		return false
	}
	m.Stream, m.Consumer = t[0], t[1]
	m.NumDelivered, m.Sequence.Stream, m.Sequence.Consumer = num[0], num[1], num[2]
	m.Timestamp, m.NumPending = time.Unix(0, int64(num[3])), num[4] //nolint:gosec // nanoseconds fit until 2262
	return true
}

const ackPrefix = "$JS.ACK."

// An ackReply is what a delivery is handled by.
type ackReply struct {
	deliveries, sequence, consumerSequence uint64
	stored                                 int64 // Unix time in nanoseconds
}

// read reads the reply subject of each message that arrives. It finds what
// parseAckReply does if that finds this stream and consumer, names as
// <stream>.<consumer>., and nothing else; it takes less time.
func (a *ackReply) read(reply, names string) bool {
	rest, ok := strings.CutPrefix(reply, ackPrefix)
	if !ok {
		return false
	}
	if numbers, ok := strings.CutPrefix(rest, names); ok && a.numbers(numbers, true) {
		return true
	}
	for range 2 { // domain and account
		i := strings.IndexByte(rest, '.')
		rest = rest[i+1:]
	}
	numbers, ok := strings.CutPrefix(rest, names)
	return ok && a.numbers(numbers, false)
}

// numbers reads <deliveries>.<stream seq>.<consumer seq>.<stored, ns>.<pending>,
// which more may follow unless it is all.
func (a *ackReply) numbers(s string, all bool) bool {
	var n [5]uint64
	for i := range n {
		if i > 0 {
			if s == "" || s[0] != '.' {
				return false
			}
			s = s[1:]
		}
		v, digits := uint64(0), 0
		for ; digits < len(s) && s[digits]-'0' <= 9; digits++ {
			v = v*10 + uint64(s[digits]-'0')
		}
		if digits == 0 || digits > maxDigits {
			return false
		}
		n[i], s = v, s[digits:]
	}
	a.deliveries, a.sequence, a.consumerSequence = n[0], n[1], n[2]
	a.stored = int64(n[3]) //nolint:gosec // nanoseconds fit until 2262
	return s == "" || s[0] == '.' && !all
}

const maxDigits = 19 // what fits without overflow

func parseUint(s string) (n uint64, ok bool) {
	if s == "" || len(s) > maxDigits {
		return 0, false
	}
	for i := range len(s) {
		c := s[i] - '0'
		if c > 9 {
			return 0, false
		}
		n = n*10 + uint64(c)
	}
	return n, true
}
