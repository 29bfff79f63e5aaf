package mono

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/telemetry/messaging"
)

const (
	openTimeout  = 10 * time.Second // for one look at the open dead letters
	openMostWait = 15 * time.Minute // until the next, if they cannot be counted
)

// An openGauge reports how many dead letters are open, for as long as somebody
// collects metrics.
type openGauge struct {
	tally *dlq.Tally
	own   []string // consumers that are reported although nothing of theirs is open

	mu     sync.Mutex
	failed int       // how often in a row
	next   time.Time // not before
}

// newOpenGauge reports also this App's own consumers, and external ones if they are
// captured, so that an alert ends.
func (r *run) newOpenGauge() *openGauge {
	g := &openGauge{tally: dlq.NewTally(r.dead.store)}
	for _, reg := range r.streamRegs {
		g.own = append(g.own, reg.info.Durable)
	}
	if r.dead.bridge != nil {
		g.own = append(g.own, dlq.OpenExternal)
	}
	return g
}

// pollDeadLetters looks how many dead letters are open. Where that cannot be found
// out the gauges stay as they were, one warning says so, and it is tried less and
// less often: a user who may not ask is told about each time by the server.
func (r *run) pollDeadLetters(ctx context.Context) {
	g := r.openGauge
	if g == nil || !r.nc.IsConnected() {
		return
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if time.Now().Before(g.next) {
		return
	}
	work, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	counts, err := g.tally.Update(work)
	if err != nil {
		g.fail(ctx, r, err)
		return
	}
	g.failed, g.next = 0, time.Time{}
	if counts == nil {
		return // not known yet
	}
	r.tel.SetOpenDeadLetters(r.dead.stream, g.withOwn(counts))
}

// fail says once that something is wrong: the second time, as the first may be a
// restart of the server.
func (g *openGauge) fail(ctx context.Context, r *run, err error) {
	if ctx.Err() != nil {
		return
	}
	const warn, doublings = 2, 6
	g.failed++
	g.next = time.Now().Add(min(pollInterval<<min(g.failed-1, doublings)-pollInterval, openMostWait))
	if g.failed == warn {
		r.log.LogAttrs(r.base, slog.LevelWarn, "open dead letters cannot be counted, their gauges are not reported or stay as they are",
			append(errorAttrs(err, 0), slog.String("stream", r.dead.stream))...)
	}
}

func (g *openGauge) withOwn(counts []dlq.OpenCount) []messaging.OpenDeadLetters {
	all := make([]messaging.OpenDeadLetters, 0, len(counts)+len(g.own))
	seen := make(map[string]bool, len(counts)+len(g.own))
	for _, c := range counts {
		all = append(all, messaging.OpenDeadLetters{Consumer: c.Consumer, Count: c.Count, Oldest: c.Oldest})
		seen[c.Consumer] = true
	}
	for _, name := range g.own {
		if !seen[name] {
			all = append(all, messaging.OpenDeadLetters{Consumer: name})
			seen[name] = true
		}
	}
	return all
}
