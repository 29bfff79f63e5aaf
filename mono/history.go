package mono

import (
	"sync"
	"time"

	"github.com/monotel/monotel/dlq"
)

// A verdict is why a message is to be dead-lettered, or that it is not.
type verdict struct {
	reason   dlq.Reason
	text     string
	cause    error // nil: a term, or no handler was there to say
	resolved bool  // a replay that was handled: it is to be acked
	gone     bool  // its stream has it no more
}

// settlement is what follows from the verdict, without a handler.
func (v *verdict) settlement() settlement {
	if v.resolved {
		return settlement{kind: settleAck}
	}
	return settlement{kind: settleDead, verdict: *v}
}

// A remembered is what this process knows of earlier deliveries of a message.
type remembered struct {
	stored      int64     // of the message: sequences may begin again
	attempt     uint64    // the latest one that ended here
	resets      uint32    // of what is known of the server, by then
	sure        bool      // it ended under a lease
	firstFailed time.Time // zero: not here
	verdict     *verdict  // decided, and not settled on the server
	left        bool      // its handler returned nil and left it
}

// A history remembers messages that may be delivered again. Forgetting one costs a
// look at the dead-letter stream, or a record its details, and no message.
type history struct {
	prior *priorState

	mu  sync.Mutex
	all map[uint64]*remembered // by stream sequence
}

const maxRemembered = 16_384

// of returns what is known of m, or nil.
func (h *history) of(m *Msg) *remembered {
	h.mu.Lock()
	defer h.mu.Unlock()
	known := h.all[m.sequence()]
	if known == nil || known.stored != m.tel.Stored {
		return nil
	}
	copied := *known
	return &copied
}

// note says that an attempt at m has ended here, and changes what is known of m.
func (h *history) note(m *Msg, change func(*remembered)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.all == nil || len(h.all) >= maxRemembered {
		h.all = make(map[uint64]*remembered) // other instances settle them too: nothing tells which still matter
	}
	known := h.all[m.sequence()]
	if known == nil || known.stored != m.tel.Stored {
		known = &remembered{stored: m.tel.Stored}
		h.all[m.sequence()] = known
	}
	if known.attempt != m.attempt() { // what was decided at another one is over
		known.verdict, known.left = nil, false
	}
	known.attempt, known.resets = m.attempt(), h.prior.resets.Load()
	change(known)
}

func (h *history) forget(m *Msg) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.all, m.sequence())
}

// failed notes a failed attempt.
func (h *history) failed(m *Msg) {
	h.note(m, func(k *remembered) {
		k.left = false
		if k.firstFailed.IsZero() && m.attempt() == 1 {
			k.firstFailed = time.Now()
		}
	})
}
