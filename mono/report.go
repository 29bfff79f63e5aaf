package mono

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"time"
)

// report writes at most one line a second and level for this consumer, with the
// number of lines left out, so that an outage does not fill the disk.
func (c *streamConsumer) report(level slog.Level, text string, m *Msg, err error, attrs ...slog.Attr) {
	if !c.rt.log.Enabled(c.rt.base, level) {
		return
	}
	left, ok := c.limiter.allow(level, time.Now())
	if !ok {
		return
	}
	attrs = append(attrs, consumerAttrs(c.info)...)
	ctx := c.rt.base
	if m != nil {
		ctx = m.Context() // with its span, so that the line can be found from the trace
		attrs = append(attrs, messageAttrs(m)...)
	}
	c.rt.log.LogAttrs(ctx, level, text, //nolint:sloglint // constants, a call away
		append(attrs, errorAttrs(err, left)...)...)
}

func messageAttrs(m *Msg) []slog.Attr { return deliveryAttrs(m.delivery) }

func deliveryAttrs(d *delivery) []slog.Attr {
	return []slog.Attr{slog.Uint64("stream_sequence", d.sequence()), slog.Uint64("attempt", d.attempt())}
}

func consumerAttrs(i Consumer) []slog.Attr {
	as := []slog.Attr{slog.String("module", i.Module), slog.String("event", i.Event.String())}
	if i.Durable != "" {
		return append(as, slog.String("stream", i.Stream), slog.String("consumer", i.Durable))
	}
	return append(as, slog.String("queue", i.Queue))
}

func errorAttrs(err error, left uint64) []slog.Attr {
	var as []slog.Attr
	if err != nil {
		as = append(as, slog.String("error", oneLine(err.Error())))
		if p, ok := errors.AsType[*PanicError](err); ok {
			as = append(as, slog.String("stack", string(p.Stack)))
		}
	}
	if left > 0 {
		as = append(as, slog.Uint64("similar_left_out", left))
	}
	return as
}

// A logLimiter lets one line a second pass for each level.
type logLimiter struct {
	warn, error struct {
		next atomic.Int64 // Unix nanoseconds
		left atomic.Uint64
	}
}

func (l *logLimiter) allow(level slog.Level, now time.Time) (left uint64, ok bool) {
	s := &l.warn
	if level >= slog.LevelError {
		s = &l.error
	}
	next := s.next.Load()
	if now.UnixNano() < next || !s.next.CompareAndSwap(next, now.Add(time.Second).UnixNano()) {
		s.left.Add(1)
		return 0, false
	}
	return s.left.Swap(0), true
}
