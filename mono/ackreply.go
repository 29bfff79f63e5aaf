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
// It does what jetstream.Msg.Metadata does, without a second allocation a
// message.
func parseAckReply(reply string, m *Metadata) bool {
	const prefix = "$JS.ACK."
	rest, ok := strings.CutPrefix(reply, prefix)
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

func parseUint(s string) (n uint64, ok bool) {
	const maxDigits = 19 // what fits without overflow
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
