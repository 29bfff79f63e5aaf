package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A puller asks the server for a durable consumer's messages, never for more
// than there is room for, and keeps alive the leases of those that are here.
//
// nats.go's Consume cannot do that: it buffers messages where nobody sees them
// while their AckWait runs out, so that a handler that is slow, but not wrong,
// gets its messages twice.
//
// It asks for what the workers can begin with and, if handlers are quick, for as much
// as keeps them busy for a moment: messages that wait here are not available to other
// instances. What is here and asked for is bounded in bytes, too.
//
// All messages of all pull requests arrive in receive, on one goroutine of
// nats.go. The puller's own goroutine, run, looks after leases, lost requests
// and a consumer that is gone.
type puller struct {
	c       *streamConsumer
	durable string // whose messages it asks for: the consumer's, or that of its replays
	names   string // of stream and durable, see ackReply
	most    int    // messages asked for in advance
	subject string // pull requests are published here
	inbox   string // and answered here
	lost    func() // called by run when the server does not know the durable

	expires   time.Duration // a request's life at the server
	heartbeat time.Duration // how often the server says that it knows the request

	sub     *nats.Subscription
	drained chan struct{} // closed when receive has seen its last message
	stopRun chan struct{}
	runDone chan struct{}
	gone    chan struct{} // the server says that the consumer does not exist
	retry   chan struct{} // a request was refused; ask again later

	activity   atomic.Uint64 // counts what the server sent, for the watchdog
	alive      atomic.Int64  // when something came from the server, or was first asked for, as uptime
	ticked     atomic.Int64  // when run has looked after leases, as uptime; 0: it does not run
	trustAfter atomic.Int64  // messages of sub; those before may have been under way for long; 0: none were
	// The consumer's sequence when its leader last answered: what was delivered up to
	// there may have been under way for long, whenever it comes. 0: it was not asked.
	deliveredBefore atomic.Uint64
	missing         atomic.Bool // consumer is being recreated
	stopping        atomic.Bool
	refusal         atomic.Pointer[error] // why the server does not deliver, if it does not
	running         context.Context       //nolint:containedctx // ends with run
	endRunning      context.CancelFunc
	extensions      sync.WaitGroup

	mu               sync.Mutex
	outstanding      int             // messages asked for and not here yet
	outstandingBytes int             // and their bytes
	inHand           map[uint64]*Msg // here, until their handler has returned; by stream sequence
	inHandBytes      int
	silences         uint32          // after which nothing was trusted
	ended            bool            // nothing is asked any more
	order            deliveryOrder   // of what has arrived
	echoes           map[uint64]*Msg // may come again although they were settled here, see expectEchoes
	echoesUntil      time.Duration
}

const (
	// aheadCalls is how many times the messages in work may be asked for in advance.
	// Messages that wait here cost leases, and are not available to other instances.
	aheadCalls   = 2
	leastAhead   = 512 // unless aheadCalls allows more
	maxHeartbeat = 5 * time.Second
	minHeartbeat = 250 * time.Millisecond

	// leaseTicks is how often leases are looked after in AckWait.
	leaseTicks = 3

	// heartbeatsInLease is how many heartbeats there are in AckWait, see heard.
	heartbeatsInLease = 6

	// Messages in advance should take no longer than this to handle. A handler that
	// takes longer for one call gets none in advance.
	aheadTime = 100 * time.Millisecond

	// A message may be larger than the server's max_payload by its subjects.
	subjectsSize = 4 << 10
)

func (p *puller) init(c *streamConsumer, durable string) {
	p.c, p.durable = c, durable
	p.names = c.info.Stream + "." + durable + "."
	p.lost = p.recreate
	p.most = max(leastAhead, aheadCalls*c.cfg.Concurrency*c.cfg.Fetch.BatchSize)
	p.expires = c.cfg.Fetch.IdleTimeout
	if limit := c.cfg.Consumer.MaxRequestExpires; limit > 0 {
		p.expires = min(p.expires, limit)
	}
	p.heartbeat = min(p.expires/2, maxHeartbeat, max(c.cfg.Consumer.AckWait/heartbeatsInLease, minHeartbeat))
	p.drained = make(chan struct{})
	p.stopRun = make(chan struct{})
	p.runDone = make(chan struct{})
	p.gone = make(chan struct{}, 1)
	p.retry = make(chan struct{}, 1)
	p.inHand = make(map[uint64]*Msg) // an idle consumer has none
	p.running, p.endRunning = context.WithCancel(c.rt.base)
}

func (p *puller) start() error {
	nc := p.c.rt.nc
	p.subject = "$JS.API.CONSUMER.MSG.NEXT." + p.c.info.Stream + "." + p.durable
	p.inbox = nc.NewInbox()
	sub, err := nc.Subscribe(p.inbox, p.receive)
	if err != nil {
		return err
	}
	// What is in flight is bounded by capacity; nats.go's own limit in bytes
	// would drop large messages.
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return errors.Join(err, sub.Unsubscribe())
	}
	sub.SetClosedHandler(func(string) { close(p.drained) })
	p.sub = sub
	p.pull()
	go p.run()
	return nil
}

// receive takes what the server sends: messages and notices about requests.
func (p *puller) receive(nm *nats.Msg) {
	p.activity.Add(1)
	now := uptime()
	trusted := p.heard(now)
	if nm.Reply == "" { // what can be settled has one
		p.notice(nm.Header.Get("Status"), nm.Header)
		return
	}
	m, ok := p.c.toMsg(p, nm)
	if !ok {
		return // not an answer to our request: somebody knows the inbox
	}
	if p.refusal.Load() != nil {
		p.refusal.Store(nil)
	}
	seq := m.sequence()
	p.mu.Lock()
	p.outstanding = max(p.outstanding-1, 0)
	p.outstandingBytes = max(p.outstandingBytes-m.bytes(), 0)
	lost, behind := p.order.note(m.consumerSequence)
	if behind { // it may have begun to count again where other instances had the messages
		p.c.prior.reset()
	}
	late := m.consumerSequence <= p.deliveredBefore.Load()
	trusted = trusted && !late
	if lost {
		p.mu.Unlock()
		p.loseState()
		if late { // it may be long until the server has counted up to there
			p.distrust()
		}
		p.mu.Lock()
	}
	m.lease.begin(now, trusted)
	old := p.inHand[seq]
	if old == nil {
		old = p.echoes[seq]
		delete(p.echoes, seq)
	}
	if old != nil && !p.supersedes(m, old, now, trusted) || p.c.held.delivered(m, now, trusted) {
		p.mu.Unlock()
		p.pull()
		return
	}
	if before := p.inHand[seq]; before != nil {
		p.inHandBytes -= before.bytes()
	}
	p.inHand[seq] = m
	p.inHandBytes += m.bytes()
	p.mu.Unlock()
	p.c.queue.push(m)
}

// supersedes reports whether m is to be handled although an earlier delivery,
// old, is still here. It is when old was handed back and only waits for the
// rest of its batch, and when no handler has begun with old and another instance has
// had the message since.
//
// Otherwise the lease ended while old was in work, because the connection or
// this process was stopped for a while, or because the server missed the
// settlement. The settlement of old applies to both deliveries, and old takes over the
// new lease.
func (p *puller) supersedes(m, old *Msg, now time.Duration, trusted bool) bool {
	if old.tel.Stored != m.tel.Stored {
		// Another message: the stream was made anew. An ack of old would reach m.
		old.state.CompareAndSwap(stateOpen, stateGone)
		return true
	}
	switch old.state.Load() {
	case stateOpen:
		if p.inHand[m.sequence()] != old {
			return true // its handler has returned and left it
		}
		if m.attempt() != old.attempt()+1 && old.leaveWaiting(phaseReplaced) {
			return true // another instance had it in between, and may have decided it
		}
		old.lease.begin(now, trusted)
	case stateReturned, stateHeld: // held.delivered looks at the latter
		return true
	case stateSettling:
		old.lease.begin(now, trusted)
	case stateSettled:
		if err := p.c.reply(m.delivery, *old.final); err != nil {
			p.c.report(slog.LevelWarn, "settlement not sent again, the message comes back after AckWait", m, err)
		}
	}
	return false
}

// notice handles a status message, which ends a pull request or keeps it alive.
func (p *puller) notice(status string, h Header) {
	const (
		heartbeat    = "100"
		notFound     = "404"
		timeout      = "408"
		conflict     = "409"
		noResponders = "503"
	)
	if status == "" || status == heartbeat {
		return // no notice at all, or one that changes nothing
	}
	// The server says how much of the request it did not fill. Where it does
	// not, nothing is known about any request: start afresh.
	left, err := strconv.Atoi(h.Get("Nats-Pending-Messages"))
	leftBytes, bytesErr := strconv.Atoi(h.Get("Nats-Pending-Bytes"))
	p.mu.Lock()
	if err != nil {
		p.outstanding, p.outstandingBytes = 0, 0
	}
	p.outstanding = max(p.outstanding-left, 0)
	if bytesErr == nil {
		p.outstandingBytes = max(p.outstandingBytes-leftBytes, 0)
	}
	p.mu.Unlock()

	text := h.Get("Description")
	switch {
	case status == conflict && text == messageTooLarge && leftBytes < p.largest():
		p.pull() // the request has run out of bytes, and nothing is wrong
	case status == timeout || status == notFound:
		p.refusal.Store(nil)
		p.pull()
	case status == conflict && text == "Batch Completed":
		p.pull()
	case status == noResponders || status == conflict && text == "Consumer Deleted":
		p.loseState()
		notify(p.gone)
	case status == conflict && text == "Server Shutdown":
		// If it is the server that we are connected to, the reconnect asks again,
		// and nothing before that would do. If not, the watchdog asks.
		p.loseState()
	case status == conflict && text == "Leadership Change":
		p.loseState()
		notify(p.retry)
	default:
		err := fmt.Errorf("pull request refused: %s %s", status, oneLine(text))
		if text == messageTooLarge {
			err = fmt.Errorf("%w: the next message is larger than a request may ask for; "+
				"raise or remove max_bytes of the consumer's requests (Consumer.MaxRequestMaxBytes)", err)
		}
		p.refusal.Store(&err)
		p.c.report(slog.LevelWarn, "the server refuses to deliver, will ask again", nil, err)
		notify(p.retry)
	}
}

const messageTooLarge = "Message Size Exceeds MaxBytes"

func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // already signalled
	}
}

// pull asks for as many messages as should be here and are not, once those are half
// of them.
func (p *puller) pull() {
	if p.stopping.Load() || p.missing.Load() || p.asksFirst() {
		return
	}
	for begun := false; ; begun = true {
		p.mu.Lock()
		n, size := p.room(begun)
		if n > 0 && p.outstanding == 0 {
			p.alive.Store(int64(uptime()))
		}
		p.outstanding += n
		p.outstandingBytes += size
		p.mu.Unlock()
		if n == 0 {
			return
		}
		if err := p.c.rt.nc.PublishRequest(p.subject, p.inbox, p.request(n, size)); err != nil {
			// Not sent. The watchdog asks again.
			p.c.report(slog.LevelWarn, "pull request not sent", nil, err)
			return
		}
		if p.c.cfg.Consumer.MaxRequestBatch <= 0 {
			return // it is all
		}
	}
}

// room returns how many messages to ask for, and of how many bytes: as many as free
// workers can begin with, and as the others will have done soon; unless the asking has
// begun, none until that is half of what should be here. p.mu is held.
func (p *puller) room(begun bool) (n, size int) {
	c := p.c
	perCall := c.cfg.Concurrency * c.cfg.Fetch.BatchSize
	target := perCall - int(c.busy.Load())*c.cfg.Fetch.BatchSize + c.pace.ahead(perCall, p.most)
	waiting := c.queue.len()
	n = target - p.outstanding - waiting
	if n <= 0 || !begun && n < (target+1)/2 {
		return 0, 0
	}
	if p.outstanding == 0 {
		p.outstandingBytes = 0
	}
	largest := p.largest()
	size = max(c.cfg.Fetch.MaxBytes, largest) - p.inHandBytes - p.outstandingBytes
	if limit := c.cfg.Consumer.MaxRequestMaxBytes; limit > 0 {
		size = min(size, limit)
	}
	if limit := c.cfg.Consumer.MaxRequestBatch; limit > 0 && n > limit {
		size = size / n * limit // the other requests want some, too
		n = limit
		size = max(size, largest)
	}
	if size < largest { // the next message might not fit
		if p.outstanding > 0 || waiting > 0 {
			return 0, 0
		}
		return 1, largest // but free workers should not wait for others
	}
	return n, size
}

// largest is how many bytes a request must ask for to get any message at all.
func (p *puller) largest() int {
	largest := int(min(p.c.rt.nc.MaxPayload(), math.MaxInt32)) + subjectsSize
	if limit := p.c.cfg.Consumer.MaxRequestMaxBytes; limit > 0 {
		largest = min(largest, limit)
	}
	return largest
}

func (p *puller) request(n, size int) []byte {
	b := append(make([]byte, 0, 128), `{"expires":`...) //nolint:mnd // it is shorter
	b = strconv.AppendInt(b, p.expires.Nanoseconds(), 10)
	b = append(b, `,"batch":`...)
	b = strconv.AppendInt(b, int64(n), 10)
	b = append(b, `,"max_bytes":`...)
	b = strconv.AppendInt(b, int64(size), 10)
	b = append(b, `,"idle_heartbeat":`...)
	b = strconv.AppendInt(b, p.heartbeat.Nanoseconds(), 10)
	return append(b, '}')
}

// reset forgets all requests and asks again: after a reconnect, and when the
// server has been silent for too long. Messages that an old request still brings are not
// trusted, since they may have been delivered long ago.
func (p *puller) reset() {
	p.c.prior.reset()
	p.mu.Lock()
	p.outstanding, p.outstandingBytes = 0, 0
	p.mu.Unlock()
	p.distrust()
}

// silent asks again when nothing has come for long. If nothing was asked for, that says
// nothing.
func (p *puller) silent() {
	p.mu.Lock()
	asked := p.outstanding > 0
	p.mu.Unlock()
	if p.missing.Load() {
		return
	}
	if asked || p.asksFirst() {
		p.reset()
	} else {
		p.pull()
	}
}

// release makes room: the handler of these messages has returned.
func (p *puller) release(batch []*Msg) {
	p.mu.Lock()
	for _, m := range batch {
		if seq := m.sequence(); p.inHand[seq] == m {
			delete(p.inHand, seq)
			p.inHandBytes -= m.bytes()
		}
	}
	p.mu.Unlock()
	p.pull()
}

// run extends leases, notices silence and recreates a lost consumer.
func (p *puller) run() {
	defer close(p.runDone)
	// A lease is extended when a third of it has passed, and looked at as often:
	// two chances are left when a message to the server is lost.
	lease := p.c.cfg.Consumer.AckWait / leaseTicks
	leases := time.NewTicker(lease)
	defer leases.Stop()
	watchdog := time.NewTicker(2*p.heartbeat + time.Second)
	defer watchdog.Stop()
	refused := time.NewTimer(0)
	defer refused.Stop()
	var seen uint64
	last := uptime()
	p.ticked.Store(int64(last))
	for {
		select {
		case <-p.stopRun:
			return
		case <-leases.C:
			now := uptime()
			if now-last > p.c.cfg.Consumer.AckWait { // this process was stopped for a while
				p.expectEchoes()
			}
			if p.stoodStill(now) {
				p.distrust()
			}
			last = now
			p.ticked.Store(int64(now))
			p.extendLeases(now, lease)
		case <-watchdog.C:
			if n := p.activity.Load(); n != seen {
				seen = n
			} else if p.c.rt.nc.IsConnected() {
				p.silent()
			}
		case <-p.retry:
			refused.Reset(retryWait())
		case <-refused.C:
			p.pull()
		case <-p.gone:
			p.ticked.Store(0)
			p.lost()
			last = uptime()
			p.ticked.Store(int64(last))
		}
	}
}

// retryWait spreads the clients that were refused together.
func retryWait() time.Duration {
	const least, spread = 200 * time.Millisecond, 200 * time.Millisecond
	return least + rand.N(spread) //nolint:gosec // nobody gains by guessing it
}

// recreate brings back a consumer that was deleted under us, or whose stream
// was, and goes on from where the server then begins.
func (p *puller) recreate() {
	p.missing.Store(true)
	missed := time.Now()
	p.c.report(slog.LevelWarn, "the server does not know the consumer, arranging streams and consumers again", nil, nil)
	if p.c.rt.streamGone() {
		select {
		case <-p.stopRun:
			return
		case <-time.After(deletionTime):
		}
	}
	for {
		err := p.c.rt.restore(missed)
		if err == nil {
			break
		}
		p.c.report(slog.LevelError, "streams and consumers not arranged, will try again", nil, err)
		select {
		case <-p.stopRun:
			return
		case <-time.After(time.Second + retryWait()):
		}
	}
	p.c.rt.log.LogAttrs(p.c.rt.base, slog.LevelWarn, "the consumer is there", consumerAttrs(p.c.info)...)
	select {
	case <-p.gone: // what was said of the old one
	default:
	}
	p.found()
}

// found goes on with a consumer that was missing.
func (p *puller) found() {
	p.reset() // first: a worker may ask as soon as it is not missing
	p.missing.Store(false)
	p.pull()
}

// forget settles what is here from a stream that exists no more. Its sequences
// begin anew: an ack sent for an old message would reach a new one.
func (p *puller) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.inHand {
		m.state.CompareAndSwap(stateOpen, stateGone)
	}
	clear(p.inHand)
	p.inHandBytes, p.order = 0, deliveryOrder{}
	p.echoes = nil
}

// stopIntake ends the flow from the server and returns when everything that was
// already on its way has arrived, or with ctx.
func (p *puller) stopIntake(ctx context.Context) {
	p.stopping.Store(true)
	endIntake(ctx, p.c.rt.nc, p.sub, p.drained)
}

// stop ends run, and with it the leases.
func (p *puller) stop() {
	close(p.stopRun)
	<-p.runDone
	p.endRunning()
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	p.extensions.Wait()
}

// health reports what keeps the consumer from getting messages, if anything.
func (p *puller) health() error {
	if p.missing.Load() {
		return fmt.Errorf("stream %q: %w", p.c.info.Stream, jetstream.ErrConsumerNotFound)
	}
	if err := p.refusal.Load(); err != nil {
		return fmt.Errorf("stream %q: %w", p.c.info.Stream, *err)
	}
	return nil
}
