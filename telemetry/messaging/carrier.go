package messaging

import (
	"maps"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel/propagation"
)

// A Carrier reads and writes trace context in the header of a NATS message. It
// writes keys in lower case, as the W3C's trace context asks for, and reads them
// in any: nats.Header keeps keys as they were sent, and clients in other
// languages send traceparent, Traceparent or TRACEPARENT.
//
// It is not safe for concurrent use while it is written to, like the map that it
// is.
type Carrier nats.Header

var _ propagation.ValuesGetter = Carrier(nil)

const (
	traceparent = "traceparent"
	tracestate  = "tracestate"
	baggageKey  = "baggage"

	// Servers before 2.14 rename the traceparent of a message that they trace.
	renamedTraceparent = "Xraceparent"

	// Longer values are not read: nothing that is valid is as long, and
	// whoever may publish writes them.
	maxHeaderValue = 8 << 10
)

// Get returns the value of key: of its lower-case form if that is there, else of
// its canonical form, such as Traceparent, else of any other. Several values of
// one key are joined by commas, as in HTTP, unless they are all the same. A value
// above 8 KiB reads as "-", which is never valid.
func (c Carrier) Get(key string) string {
	return joined(c.Values(key))
}

func joined(values []string) string {
	switch len(values) {
	case 0:
		return ""
	case 1:
		return limited(values[0])
	}
	size, same := len(values), true
	for _, v := range values {
		size += len(v)
		same = same && v == values[0]
	}
	switch {
	case same: // a proxy has doubled it
		return limited(values[0])
	case size > maxHeaderValue:
		return unreadable
	}
	return strings.Join(values, ",")
}

const unreadable = "-"

func limited(v string) string {
	if len(v) > maxHeaderValue {
		return unreadable
	}
	return v
}

// Values returns the values of key, as Get finds it. The slice is the header's
// own.
func (c Carrier) Values(key string) []string {
	if len(c) == 0 {
		return nil
	}
	lower := strings.ToLower(key)
	if vs := c[lower]; len(vs) > 0 {
		return vs
	}
	if vs := c[canonical(lower)]; len(vs) > 0 {
		return vs
	}
	// The rest in an order of its own: a map has none.
	var found string
	for k, vs := range c {
		if len(k) == len(lower) && len(vs) > 0 && strings.EqualFold(k, lower) && (found == "" || k < found) {
			found = k
		}
	}
	if found == "" {
		if lower != traceparent {
			return nil // and not what the header has under the empty key
		}
		found = renamedTraceparent
	}
	return c[found]
}

// canonical returns the form of a key that textproto and older clients write.
func canonical(lower string) string {
	switch lower { // without an allocation
	case traceparent:
		return "Traceparent"
	case tracestate:
		return "Tracestate"
	case baggageKey:
		return "Baggage"
	}
	up, b := true, []byte(lower)
	for i, ch := range b {
		if up && 'a' <= ch && ch <= 'z' {
			b[i] = ch - 'a' + 'A'
		}
		up = ch == '-'
	}
	return string(b)
}

// Set replaces every form of key by its lower-case one.
func (c Carrier) Set(key, value string) {
	lower := strings.ToLower(key)
	c.Delete(lower)
	c[lower] = []string{value}
}

// Delete removes every form of key.
func (c Carrier) Delete(key string) {
	lower := strings.ToLower(key) // of İ, for one, that is another letter
	for k := range c {
		if strings.EqualFold(k, key) || strings.EqualFold(k, lower) {
			delete(c, k)
		}
	}
	if strings.EqualFold(key, traceparent) {
		delete(c, renamedTraceparent)
	}
}

// Keys lists the keys in lower case, sorted.
func (c Carrier) Keys() []string {
	keys := make([]string, 0, len(c))
	for k := range c {
		keys = append(keys, strings.ToLower(k))
	}
	slices.Sort(keys)
	return slices.Compact(keys)
}

// withoutBaggage hides baggage from propagators.
type withoutBaggage struct{ Carrier }

func (c withoutBaggage) Get(key string) string {
	if strings.EqualFold(key, baggageKey) {
		return ""
	}
	return c.Carrier.Get(key)
}

func (c withoutBaggage) Values(key string) []string {
	if strings.EqualFold(key, baggageKey) {
		return nil
	}
	return c.Carrier.Values(key)
}

// has reports whether any of the keys is there, in any form.
func (c Carrier) has(keys []string) bool {
	if len(c) == 0 {
		return false
	}
	for _, k := range keys {
		if len(c.Values(k)) > 0 {
			return true
		}
	}
	return false
}

// clone copies the map with room for more. Values are shared: they are replaced
// and never changed.
func (c Carrier) clone(more int) Carrier {
	out := make(Carrier, len(c)+more)
	maps.Copy(out, c)
	return out
}
