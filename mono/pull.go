package mono

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
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
// All messages of all pull requests arrive in receive, on one goroutine of
// nats.go. The puller's own goroutine, run, looks after leases, lost requests
// and a consumer that is gone.
type puller struct {
	c       *streamConsumer
	durable string // whose messages it asks for: the consumer's, or that of its replays
	names   string // of stream and durable, see ackReply
	least   int    // bounds of capacity
	most    int
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

	activity atomic.Uint64 // counts what the server sent, for the watchdog
	missing  atomic.Bool   // consumer is being recreated
	stopping atomic.Bool
	refusal  atomic.Pointer[error] // why the server does not deliver, if it does not

	mu          sync.Mutex
	capacity    int             // most messages asked for and held at a time, see adapt
	asked       time.Time       // when capacity was last looked at
	outstanding int             // asked for and not here yet
	held        map[uint64]*Msg // here, until their handler has returned; by stream sequence
	echoes      map[uint64]*Msg // may come again although they were settled here, see expectEchoes
	echoesUntil time.Duration
}

// pullAhead is how many times the messages in work are asked for in advance, so
// that a worker finds its next batch waiting. Kept messages cost leases here
// and are missed by other instances, so it is small.
const pullAhead = 2

const (
	minCapacity  = 32
	maxCapacity  = 512 // unless pullAhead asks for more
	maxHeartbeat = 5 * time.Second

	// Half of the capacity should take this long to handle.
	quickPull = 100 * time.Millisecond
	slowPull  = time.Second
)

func (p *puller) init(c *streamConsumer, durable string) {
	p.c, p.durable = c, durable
	p.names = c.info.Stream + "." + durable + "."
	p.lost = p.recreate
	p.least = max(minCapacity, pullAhead*c.cfg.Concurrency*c.cfg.Fetch.BatchSize)
	p.most = max(maxCapacity, p.least)
	p.capacity = p.least
	p.expires = c.cfg.Fetch.IdleTimeout
	if limit := c.server.MaxRequestExpires; limit > 0 {
		p.expires = min(p.expires, limit)
	}
	p.heartbeat = min(p.expires/2, maxHeartbeat)
	p.drained = make(chan struct{})
	p.stopRun = make(chan struct{})
	p.runDone = make(chan struct{})
	p.gone = make(chan struct{}, 1)
	p.retry = make(chan struct{}, 1)
	p.held = make(map[uint64]*Msg) // an idle consumer holds none
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
	m.touch(uptime())
	p.mu.Lock()
	p.outstanding = max(p.outstanding-1, 0)
	old := p.held[seq]
	if old == nil {
		old = p.echoes[seq]
		delete(p.echoes, seq)
	}
	if old != nil && !p.supersedes(m, old) {
		p.mu.Unlock()
		p.pull()
		return
	}
	p.held[seq] = m
	p.mu.Unlock()
	p.c.queue.push(m)
}

// supersedes reports whether m is to be handled although an earlier delivery,
// old, is still here. It is when old was handed back and only waits for the
// rest of its batch.
//
// Otherwise the lease ended while old was in work, because the connection or
// this process was stopped for a while, or because the server missed the
// settlement. That of old counts for both.
func (p *puller) supersedes(m, old *Msg) bool {
	if old.tel.Stored != m.tel.Stored {
		// Another message: the stream was made anew. An ack of old would reach m.
		old.state.CompareAndSwap(stateOpen, stateGone)
		return true
	}
	switch old.state.Load() {
	case stateOpen:
		return p.held[m.sequence()] != old // its handler has returned and left it
	case stateReturned:
		return true
	case stateSettled:
		if err := p.c.reply(m, *old.final); err != nil {
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
	if err != nil {
		left = p.most
	}
	p.mu.Lock()
	p.outstanding = max(p.outstanding-left, 0)
	p.mu.Unlock()

	switch text := h.Get("Description"); {
	case status == timeout || status == notFound:
		p.refusal.Store(nil)
		p.pull()
	case status == noResponders || status == conflict && text == "Consumer Deleted":
		notify(p.gone)
	case status == conflict && text == "Server Shutdown":
		// If it is the server that we are connected to, the reconnect asks again,
		// and nothing before that would do. If not, the watchdog asks.
	case status == conflict && (text == "Leadership Change" || text == "Batch Completed"):
		notify(p.retry)
	default:
		err := fmt.Errorf("pull request refused: %s %s", status, oneLine(text))
		p.refusal.Store(&err)
		p.c.report(slog.LevelWarn, "the server refuses to deliver, will ask again", nil, err)
		notify(p.retry)
	}
}

func notify(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // already signalled
	}
}

// pull asks for as many messages as there is room for, once that is half of the
// capacity.
func (p *puller) pull() {
	if p.stopping.Load() || p.missing.Load() {
		return
	}
	p.mu.Lock()
	room := p.room()
	if room > 0 {
		p.adapt(time.Now())
		room = p.room()
	}
	p.outstanding += room
	p.mu.Unlock()
	for room > 0 {
		n := room
		if limit := p.c.server.MaxRequestBatch; limit > 0 {
			n = min(n, limit)
		}
		room -= n
		if err := p.c.rt.nc.PublishRequest(p.subject, p.inbox, p.request(n)); err != nil {
			// Not sent. The watchdog asks again.
			p.c.report(slog.LevelWarn, "pull request not sent", nil, err)
			return
		}
	}
}

// room returns how many messages to ask for: none until that is half of the
// capacity. p.mu is held.
func (p *puller) room() int {
	room := p.capacity - p.outstanding - len(p.held)
	if room < (p.capacity+1)/2 {
		return 0
	}
	return room
}

// adapt lets the capacity follow the pace of the handlers: a request costs the
// server as much as some messages do, so quick handlers ask for many at a time;
// slow ones keep few from other instances. p.mu is held.
func (p *puller) adapt(now time.Time) {
	switch took := now.Sub(p.asked); {
	case took < quickPull:
		p.capacity = min(2*p.capacity, p.most)
	case took > slowPull:
		p.capacity = max(p.capacity/2, p.least)
	}
	p.asked = now
}

func (p *puller) request(n int) []byte {
	b := append(make([]byte, 0, 96), `{"expires":`...)
	b = strconv.AppendInt(b, p.expires.Nanoseconds(), 10)
	b = append(b, `,"batch":`...)
	b = strconv.AppendInt(b, int64(n), 10)
	b = append(b, `,"idle_heartbeat":`...)
	b = strconv.AppendInt(b, p.heartbeat.Nanoseconds(), 10)
	if limit := p.c.server.MaxRequestMaxBytes; limit > 0 {
		b = append(b, `,"max_bytes":`...)
		b = strconv.AppendInt(b, int64(limit), 10)
	}
	return append(b, '}')
}

// reset forgets all requests and asks anew: after a reconnect, and when the
// server has been silent for too long.
func (p *puller) reset() {
	p.mu.Lock()
	p.outstanding = 0
	p.mu.Unlock()
	p.pull()
}

// expectEchoes is called when leases may have ended unseen: the server then has
// messages in line to be delivered again that are in work here, and sends them
// with the next request, even if they are settled by then.
func (p *puller) expectEchoes() {
	const atLeast = time.Minute
	p.mu.Lock()
	defer p.mu.Unlock()
	p.echoes = maps.Clone(p.held)
	p.echoesUntil = uptime() + max(atLeast, 2*p.c.server.AckWait)
}

// release makes room: the handler of these messages has returned.
func (p *puller) release(batch []*Msg) {
	p.mu.Lock()
	for _, m := range batch {
		if seq := m.sequence(); p.held[seq] == m {
			delete(p.held, seq)
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
	lease := p.c.server.AckWait / 3
	leases := time.NewTicker(lease)
	defer leases.Stop()
	watchdog := time.NewTicker(2*p.heartbeat + time.Second)
	defer watchdog.Stop()
	refused := time.NewTimer(0)
	defer refused.Stop()
	var seen uint64
	last := uptime()
	for {
		select {
		case <-p.stopRun:
			return
		case <-leases.C:
			now := uptime()
			if now-last > p.c.server.AckWait { // this process was stopped for a while
				p.expectEchoes()
			}
			last = now
			p.extendLeases(now, lease)
		case <-watchdog.C:
			if n := p.activity.Load(); n != seen {
				seen = n
			} else if p.c.rt.nc.IsConnected() {
				p.reset()
			}
		case <-p.retry:
			refused.Reset(retryWait())
		case <-refused.C:
			p.pull()
		case <-p.gone:
			p.lost()
		}
	}
}

// retryWait spreads the clients that were refused together.
func retryWait() time.Duration {
	const least, spread = 200 * time.Millisecond, 200 * time.Millisecond
	return least + rand.N(spread) //nolint:gosec // nobody gains by guessing it
}

func (p *puller) extendLeases(now, lease time.Duration) {
	var due []*Msg
	p.mu.Lock()
	if now > p.echoesUntil {
		p.echoes = nil
	}
	for _, m := range p.held {
		// One that is being settled may wait for its capture.
		if state := m.state.Load(); (state == stateOpen || state == stateSettling) && m.untouched(now) >= lease/2 {
			due = append(due, m)
		}
	}
	p.mu.Unlock()
	for _, m := range due {
		if err := p.c.inProgress(m); err != nil {
			// Without the message's context, which its handler may just be given.
			p.c.report(slog.LevelWarn, "lease not extended", nil, err, messageAttrs(m)...)
			return
		}
	}
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
	p.missing.Store(false)
	p.reset()
}

// forget settles what is here from a stream that exists no more. Its sequences
// begin anew: an ack sent for an old message would reach a new one.
func (p *puller) forget() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, m := range p.held {
		m.state.CompareAndSwap(stateOpen, stateGone)
	}
	clear(p.held)
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
