package mono

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/monotel/monotel/dlq"
)

func configured(cfg StreamConsumerConfig) *streamConsumer {
	return &streamConsumer{streamRegistration: &streamRegistration{cfg: cfg}}
}

// While one message is handled alone no other is, and both wait for each other.
func TestGate_alone(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(4)
		ending := make(chan struct{})
		for range 2 {
			if !g.enter(ending) {
				t.Fatal("two may run together")
			}
		}
		var order []string
		alone, other := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(alone)
			if !g.enterAlone(ending) {
				t.Error("it is not let in")
			}
			order = append(order, "alone")
			g.leaveAlone()
		}()
		synctest.Wait()
		go func() {
			defer close(other)
			if !g.enter(ending) {
				t.Error("it is not let in")
			}
			order = append(order, "other")
			g.leave()
		}()
		synctest.Wait()
		if len(order) != 0 {
			t.Fatalf("let in while others run: %v", order)
		}
		g.leave()
		g.leave()
		<-alone
		<-other
		if len(order) != 2 || order[0] != "alone" {
			t.Errorf("let in: %v, want the one that is alone first", order)
		}
	})
}

// One that hangs keeps the one that is to be alone for aloneTimeout, and Stop ends
// every wait.
func TestGate_givesUp(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		g := newGate(2)
		ending := make(chan struct{})
		g.enter(ending) // and hangs
		begin := time.Now()
		if !g.enterAlone(ending) {
			t.Error("it is not let in")
		}
		if waited := time.Since(begin); waited != aloneTimeout { //nolint:forbidigo // the bubble's clock
			t.Errorf("it waited %v, want %v", waited, aloneTimeout)
		}
		entered := make(chan bool)
		go func() { entered <- g.enter(ending) }()
		synctest.Wait()
		close(ending)
		if <-entered {
			t.Error("one is let in beside the one that is alone")
		}
	})
}

// The batch limit halves with each attempt, and the last one is alone.
func TestBatchLimit(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		batch, attempts int
		want            []int // at attempt 1, 2, …
	}{
		{batch: 10, attempts: 5, want: []int{10, 5, 2, 1, 1, 1}},
		{batch: 1000, attempts: 3, want: []int{1000, 500, 1, 1}},
		{batch: 1000, attempts: -1, want: []int{1000, 500, 250, 125}},
		{batch: 10, attempts: 1, want: []int{1, 1}},
		{batch: 1, attempts: 5, want: []int{1, 1, 1}},
	} {
		c := configured(StreamConsumerConfig{Fetch: FetchConfig{BatchSize: tt.batch}, Retry: RetryPolicy{MaxAttempts: tt.attempts}})
		for i, want := range tt.want {
			if got := c.batchLimit(uint64(i + 1)); got != want {
				t.Errorf("batches of %d, %d attempts: %d together at attempt %d, want %d", tt.batch, tt.attempts, got, i+1, want)
			}
		}
	}
}

// A lease is trusted from when the server has heard of the message for sure.
func TestLease(t *testing.T) {
	t.Parallel()
	const wait = 30 * time.Second
	var l lease
	l.begin(time.Second, true)
	if l.ended(time.Second+wait, wait) || !l.ended(2*time.Second+wait, wait) {
		t.Error("it does not last AckWait from the delivery")
	}
	l.extend(20*time.Second, 21*time.Second, wait)
	if l.ended(20*time.Second+wait, wait) || !l.ended(21*time.Second+wait, wait) {
		t.Error("it does not last AckWait from when the extension was sent")
	}
	l.extend(15*time.Second, 22*time.Second, wait) // one that was sent before is confirmed after it
	if l.ended(20*time.Second+wait, wait) {
		t.Error("an earlier extension that is confirmed later takes back a later one")
	}
	l.extend(40*time.Second, 51*time.Second, wait) // it may have ended between the two
	if !l.ended(52*time.Second, wait) {
		t.Error("an extension that may have come too late is trusted")
	}
	l.extend(53*time.Second, 54*time.Second, wait)
	if !l.ended(55*time.Second, wait) {
		t.Error("a lease that has ended is extended")
	}
	l.begin(60*time.Second, false)
	if !l.ended(60*time.Second, wait) {
		t.Error("a delivery that may be old is trusted")
	}
	l.begin(61*time.Second, true)
	l.end()
	if !l.ended(61*time.Second, wait) || l.untouched(62*time.Second) != time.Second {
		t.Error("a lease is trusted although the server may have lost its state")
	}
}

// A delivery that waits for a worker takes over the lease of the next one, unless another
// instance had the message in between and may have decided it.
func TestPuller_supersedes(t *testing.T) {
	t.Parallel()
	const wait = 30 * time.Second
	for _, tt := range []struct {
		name       string
		begun      bool
		old, next  uint32
		supersedes bool
	}{
		{name: "the next attempt", old: 2, next: 3},
		{name: "one was elsewhere", old: 2, next: 4, supersedes: true},
		{name: "many were elsewhere", old: 1, next: 9, supersedes: true},
		{name: "the server counts again", old: 3, next: 1, supersedes: true},
		{name: "the same attempt again", old: 3, next: 3, supersedes: true},
		{name: "a handler has the next attempt", begun: true, old: 2, next: 3},
		{name: "a handler has it, one was elsewhere", begun: true, old: 2, next: 4},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			old, next := attemptAt(tt.old), attemptAt(tt.next)
			old.lease.begin(time.Second, true)
			p := &puller{inHand: map[uint64]*Msg{old.sequence(): old}}
			if tt.begun && len(markBegun([]*Msg{old})) != 1 {
				t.Fatal("a handler does not get what waits")
			}
			if got := p.supersedes(next, old, time.Minute, true); got != tt.supersedes {
				t.Errorf("supersedes is %t, want %t", got, tt.supersedes)
			}
			if got := !old.lease.ended(time.Minute+wait, wait); got == tt.supersedes {
				t.Errorf("the lease is renewed: %t", got)
			}
			if tt.begun {
				return
			}
			if got := len(markBegun([]*Msg{old})) == 0; got != tt.supersedes {
				t.Errorf("a handler gets the old delivery: %t", !got)
			}
		})
	}
}

// What was decided at one attempt does not decide a later one that has ended otherwise.
func TestHistory_laterAttempt(t *testing.T) {
	t.Parallel()
	c := configured(StreamConsumerConfig{Retry: RetryPolicy{MaxAttempts: 20}})
	c.history.prior = &c.prior
	at := func(attempt uint32) *Msg {
		m := attemptAt(attempt)
		m.consumer, m.tel.Sequence, m.tel.Stored = c, 1, 1
		return m
	}
	verdictAt := func(attempt uint32) {
		c.history.note(at(attempt), func(k *remembered) { k.verdict = &verdict{reason: dlq.ReasonPermanentError} })
	}
	verdictAt(3)
	if s := c.decidedBefore(at(4)); s == nil || s.verdict.reason != dlq.ReasonPermanentError {
		t.Error("the verdict does not decide the next delivery")
	}
	c.history.note(at(5), func(k *remembered) { k.sure = true }) // nakked
	if s := c.decidedBefore(at(6)); s != nil {
		t.Errorf("attempt 6 is decided by the verdict of attempt 3: %s", s.verdict.reason)
	}
}

// A durable that has no leader, as while it is being made, says nothing of the messages of
// the other.
func TestPuller_noLeader(t *testing.T) {
	t.Parallel()
	for _, status := range []string{"503", "409 Consumer Deleted", "409 Leadership Change", "409 Server Shutdown"} {
		for _, replays := range []bool{false, true} {
			c := configured(StreamConsumerConfig{}.withDefaults())
			c.held.c = c
			c.pull.c = c
			r := &puller{c: c}
			c.replays.pull.Store(r)
			now := uptime()
			at := func(seq uint64, replay *dlq.Replay) *Msg {
				m := attemptAt(1)
				m.consumer, m.replay, m.tel.Sequence = c, replay, seq
				m.lease.begin(now, true)
				return m
			}
			event, replay := at(1, nil), at(1, &dlq.Replay{})
			c.pull.inHand, r.inHand = map[uint64]*Msg{1: event}, map[uint64]*Msg{1: replay}
			heldEvent, heldReplay, heldOld := at(2, nil), at(3, &dlq.Replay{}), at(4, &dlq.Replay{Old: true})
			c.held.all = make(map[uint64]*heldMessage)
			for _, m := range []*Msg{heldEvent, heldReplay, heldOld} {
				c.held.all[m.sequence()] = &heldMessage{Msg: m}
			}
			p := &c.pull
			if replays {
				p = r
			}
			code, text, _ := strings.Cut(status, " ")
			p.notice(code, Header{"Description": {text}})
			for name, m := range map[string]*Msg{"event": event, "replay": replay, "held event": heldEvent, "held replay": heldReplay, "held replay of an earlier version": heldOld} {
				ofReplays := m == replay || m == heldReplay
				if ended := m.lease.ended(now, time.Hour); ended != (ofReplays == replays) {
					t.Errorf("%s to the durable for replays %v: the lease of the %s has ended: %v", status, replays, name, ended)
				}
			}
		}
	}
}

// Nothing comes while nothing is asked for: that is no reason to look up what was
// decided before.
func TestPuller_silent(t *testing.T) {
	t.Parallel()
	c := configured(StreamConsumerConfig{}.withDefaults())
	p := &c.pull
	p.c = c
	p.ended = true // it cannot ask
	p.stopping.Store(true)
	p.silent()
	if c.prior.resets.Load() != 0 {
		t.Error("silence is taken for a lost state although nothing was asked for")
	}
	p.outstanding = 1
	p.silent()
	if c.prior.resets.Load() != 1 || p.outstanding != 0 {
		t.Error("silence after a request is not taken for a lost one")
	}
}
