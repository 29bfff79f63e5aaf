package mono

import (
	"sync/atomic"
	"time"
)

// A pace knows about how long a call of the handler takes. Most calls of a quick
// handler are not measured: reading the clock is no small part of them.
type pace struct {
	calls atomic.Uint32
	call  atomic.Int64 // duration of a call, smoothed; 0: none was measured
}

const (
	measureEvery = 8 // calls
	slowCall     = time.Millisecond
)

// begin returns when a call begins, or 0 if it is not to be measured.
func (p *pace) begin() time.Duration {
	if p.calls.Add(1)%measureEvery != 1 && time.Duration(p.call.Load()) < slowCall {
		return 0
	}
	return uptime()
}

// end says that the call which began then is over. It follows quicker calls at once
// and slower ones soon, so that one slow call of many changes little.
func (p *pace) end(began time.Duration) {
	if began == 0 {
		return
	}
	took := int64(max(uptime()-began, 1))
	const part = 4
	switch was := p.call.Load(); {
	case was == 0:
		p.call.Store(took)
	case took < was:
		p.call.Store(was - (was-took)/2) //nolint:mnd // half of the way
	default:
		p.call.Store(was + (took-was)/part)
	}
}

// ahead is how many messages to ask for in advance if workers take so many at a time:
// what they handle within aheadTime, in whole calls, up to most.
func (p *pace) ahead(perCall, most int) int {
	call := time.Duration(p.call.Load())
	if call == 0 {
		return 0
	}
	calls := int64(aheadTime / call)
	if calls >= int64(most) {
		return most
	}
	return int(min(calls*int64(perCall), int64(most)))
}
