package mono

import (
	"testing"
	"time"
)

// What is asked for in advance is what handlers do within aheadTime, in whole calls:
// nothing if they are slow, and never more than the bound.
func TestPace_ahead(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name    string
		call    time.Duration
		perCall int
		want    int
	}{
		{name: "not measured", perCall: 10, want: 0},
		{name: "quick", call: 10 * time.Microsecond, perCall: 10, want: leastAhead},
		{name: "a hundredth of a second", call: 10 * time.Millisecond, perCall: 10, want: 100},
		{name: "almost slow", call: aheadTime, perCall: 10, want: 10},
		{name: "slow", call: aheadTime + 1, perCall: 10, want: 0},
		{name: "large batches", call: 10 * time.Millisecond, perCall: 4000, want: leastAhead},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var p pace
			p.call.Store(int64(tt.call))
			if got := p.ahead(tt.perCall, leastAhead); got != tt.want {
				t.Errorf("%d messages ahead, want %d", got, tt.want)
			}
		})
	}
}

// Every call is measured until one was, and while calls are slow; later every eighth.
func TestPace_begin(t *testing.T) {
	t.Parallel()
	measured := func(p *pace) (n int) {
		for range 80 {
			if p.begin() != 0 {
				n++
			}
		}
		return n
	}
	var quick, slow pace
	if quick.begin() == 0 {
		t.Error("the first call is not measured")
	}
	quick.call.Store(int64(time.Microsecond))
	if got := measured(&quick); got != 10 {
		t.Errorf("%d of 80 quick calls are measured, want 10", got)
	}
	slow.call.Store(int64(time.Second))
	if got := measured(&slow); got != 80 {
		t.Errorf("%d of 80 slow calls are measured, want all", got)
	}
}
