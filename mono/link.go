package mono

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
)

// A link that is dead without a reset is noticed in one of two ways. The server
// does not answer pings: after (pingsOut+1) intervals. Or the socket's buffer is
// full: nats.go then holds the connection's lock in a write, and its ping timer
// waits for that lock, so the write has a limit of its own, writeIntervals. Both
// together are the longest, which for the default interval is 30 s.
const (
	defaultPingInterval = 6 * time.Second
	minPingInterval     = 10 * time.Millisecond
	pingsOut            = 2
	writeIntervals      = 2

	// flusherTimeoutUnset is not positive, so nats.go takes it for none, and no
	// option sets it.
	flusherTimeoutUnset = -1
)

// A link keeps the App's network connection to the server, the present one of
// those that nats.go dials, so that Stop can end it without nats.go's lock.
type link struct {
	limit time.Duration // for a write without progress; 0: nats.go's options set it

	mu    sync.Mutex
	conn  net.Conn
	ended bool // no other connection is made
}

// detectDeadLinks sets the options that the user's may override.
func detectDeadLinks(o *nats.Options, interval time.Duration) {
	o.PingInterval, o.MaxPingsOut = interval, pingsOut
	o.FlusherTimeout = flusherTimeoutUnset
}

// init completes what the user's options left unset.
func (l *link) init(o *nats.Options) {
	if o.FlusherTimeout != flusherTimeoutUnset {
		return
	}
	skipper, ok := o.CustomDialer.(interface{ SkipTLSHandshake() bool })
	if o.InProcessServer != nil || o.PingInterval <= 0 || ok && skipper.SkipTLSHandshake() {
		o.FlusherTimeout = nats.DefaultFlusherTimeout // these connections are not wrapped, or have no measure
		return
	}
	l.limit = writeIntervals * o.PingInterval
}

// track returns the connection for nats.go to use.
func (l *link) track(conn net.Conn) (net.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return nil, errors.Join(ErrStopped, conn.Close())
	}
	// nats.go looks for this type.
	if _, ok := conn.(*tls.Conn); !ok {
		conn = &linkConn{Conn: conn, limit: l.limit}
	}
	l.conn = conn
	return conn, nil
}

// isEnded reports whether end was called.
func (l *link) isEnded() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.ended
}

// end closes the connection and lets no other be made.
func (l *link) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	if l.conn != nil {
		_ = l.conn.Close()
	}
}

// endIfStuck is end when the server has taken nothing of a write for a while.
func (l *link) endIfStuck() {
	const aWhile = 200 * time.Millisecond
	l.mu.Lock()
	c, ok := l.conn.(*linkConn)
	l.mu.Unlock()
	if ok && c.stuckFor(uptime()) >= aWhile {
		l.end()
	}
}

// A linkConn bounds how long a write makes no progress. nats.go bounds the whole
// write, so its limit has to suit the largest message over the slowest link.
type linkConn struct {
	net.Conn
	limit time.Duration // 0: none

	writing atomic.Int64 // when the write began that is under way, as uptime; 0: none
	given   atomic.Int64 // the deadline that somebody set, in Unix nanoseconds; 0: none
	failed  atomic.Bool  // a write made no progress, and the connection was closed
}

// errNoProgress says that the server takes nothing any more.
var errNoProgress = fmt.Errorf("%w: a write made no progress", nats.ErrStaleConnection)

// writeChunk is how much is written under one deadline.
const writeChunk = 64 << 10

func (c *linkConn) Write(b []byte) (n int, err error) {
	if len(b) == 0 {
		return c.Conn.Write(b)
	}
	defer c.writing.Store(0)
	for n < len(b) && err == nil {
		var m int
		m, err = c.writeChunk(b[n:min(len(b), n+writeChunk)])
		n += m
	}
	return n, err
}

func (c *linkConn) writeChunk(b []byte) (n int, err error) {
	c.writing.Store(int64(max(uptime(), 1)))
	if c.limit <= 0 {
		return c.Conn.Write(b)
	}
	deadline := time.Now().Add(c.limit)
	ours := true
	if given := c.given.Load(); given != 0 && given < deadline.UnixNano() {
		deadline, ours = time.Unix(0, given), false
	}
	if err := c.Conn.SetWriteDeadline(deadline); err != nil {
		return 0, err
	}
	n, err = c.Conn.Write(b)
	if ours && errors.Is(err, os.ErrDeadlineExceeded) {
		if n > 0 {
			return n, nil
		}
		c.failed.Store(true)
		_ = c.Conn.Close()
		return 0, errNoProgress
	}
	return n, err
}

// Read explains a connection that Write has closed: nats.go reports the error of
// its reading.
func (c *linkConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil && c.failed.Load() {
		err = errNoProgress
	}
	return n, err
}

func (c *linkConn) SetWriteDeadline(t time.Time) error {
	c.keep(t)
	return c.Conn.SetWriteDeadline(t)
}

func (c *linkConn) SetDeadline(t time.Time) error {
	c.keep(t)
	return c.Conn.SetDeadline(t)
}

func (c *linkConn) keep(t time.Time) {
	var given int64
	if !t.IsZero() {
		given = t.UnixNano()
	}
	c.given.Store(given)
}

// stuckFor is how long the write that is under way has made no progress.
func (c *linkConn) stuckFor(now time.Duration) time.Duration {
	began := time.Duration(c.writing.Load())
	if began == 0 {
		return 0
	}
	return now - began
}
