package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/monotel/monotel/examples/orders/audit"
	"github.com/monotel/monotel/examples/orders/tracking"
	"github.com/monotel/monotel/mono"
)

// A style is how a terminal shows a text.
type style string

const (
	plain  style = ""
	bold   style = "\x1b[1m"
	dim    style = "\x1b[2m"
	red    style = "\x1b[31m"
	green  style = "\x1b[32m"
	yellow style = "\x1b[33m"
	cyan   style = "\x1b[36m"
	reset        = "\x1b[0m"
)

// A screen shows what happens, line by line, and counts it.
type screen struct {
	mu     sync.Mutex
	out    io.Writer
	colour bool
	alone  bool // nobody else can reach the stream
	began  time.Time
	count  counts

	created map[string]bool // orders of this run
	foreign map[uint64]bool // messages of other runs that were seen, by sequence
	settled map[uint64]bool // messages that are dealt with; one may be handled twice
}

// counts is what was seen to happen.
type counts struct {
	orders    int // published
	garbage   int // published
	refused   int // not published
	confirmed int

	audited     int
	afterRetry  int // of those audited
	gaveUp      int
	rejected    int
	undecodable int

	resolved    int // replays of what was given up
	failedAgain int

	waiting  int  // in the stream at the end
	answered bool // it was the server who said so
}

func newScreen(out io.Writer, alone bool) *screen {
	return &screen{
		out:     out,
		alone:   alone,
		colour:  showsColours(out),
		began:   time.Now(),
		created: make(map[string]bool),
		foreign: make(map[uint64]bool),
		settled: make(map[uint64]bool),
	}
}

// showsColours reports whether out is a terminal whose user wants colours; see
// https://no-color.org.
func showsColours(out io.Writer) bool {
	f, ok := out.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	if runtime.GOOS == "windows" && os.Getenv("WT_SESSION") == "" {
		return false // an old console prints the codes
	}
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

func (s *screen) paint(st style, text string) string {
	if !s.colour || st == plain {
		return text
	}
	return string(st) + text + reset
}

// say writes a text between the lines of events.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintf(s.out, format+"\n", args...)
}

// line writes what happened to one order. s.mu is held.
func (s *screen) line(module, order string, st style, what, detail string) {
	// Padded first and painted then: colour codes have no width.
	fmt.Fprintln(s.out, strings.TrimRight(fmt.Sprintf("%s  %s  %-8s  %s  %s",
		s.paint(dim, fmt.Sprintf("%6.2fs", time.Since(s.began).Seconds())),
		s.paint(dim, fmt.Sprintf("%-12s", module)),
		order,
		s.paint(st, fmt.Sprintf("%-17s", what)),
		detail), " "))
}

// save shows a new order.
func (s *screen) save(o tracking.OrderCreatedEvent) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created[o.OrderID] = true
	s.line("tracking", o.OrderID, bold, "created", fmt.Sprintf("by %s, %.2f EUR", o.CustomerID, o.Amount))
}

// garbage shows that something is sent that is no order.
func (s *screen) garbage() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.line("somebody", "?", bold, "broken message", "half an order, on the same subject")
}

// published counts a publish, and shows one that went wrong.
func (s *screen) published(customer string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case err != nil:
		s.count.refused++
		s.line("tracking", "", red, "not published", err.Error())
	case customer == nobody:
		s.count.garbage++
	default:
		s.count.orders++
	}
}

// confirm shows that a customer was told.
func (s *screen) confirm(_ context.Context, o tracking.OrderCreatedEvent) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count.confirmed++
	s.line("notification", o.OrderID, cyan, "confirmation sent", "to "+o.CustomerID)
	return nil
}

// audited shows what became of an attempt to audit an order.
func (s *screen) audited(r audit.Result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.Replay {
		s.replayed(r)
		return
	}
	from := ""
	if !s.created[r.Order.OrderID] {
		s.foreign[r.Sequence] = true
		from = " (from another run)"
	}
	show := func(st style, what, detail string) { s.line("audit", r.Order.OrderID, st, what, detail+from) }

	switch most := uint64(audit.Retry.MaxAttempts); { //nolint:gosec // it is 4
	case r.Err == nil:
		if !s.settle(r.Sequence) {
			return
		}
		s.count.audited++
		if r.Attempt == 1 {
			show(green, "audited", "at once")
			return
		}
		s.count.afterRetry++
		show(green, "audited", fmt.Sprintf("on attempt %d", r.Attempt))
	case mono.IsPermanent(r.Err):
		if s.settle(r.Sequence) {
			s.count.rejected++
			show(red, "rejected", fmt.Sprintf("for good: %v", r.Err))
		}
	case r.Attempt >= most:
		if s.settle(r.Sequence) {
			s.count.gaveUp++
			show(red, "gave up", fmt.Sprintf("after %d attempts: %v", r.Attempt, r.Err))
		}
	default:
		show(yellow, fmt.Sprintf("retry %d of %d", r.Attempt, most-1), retryDetail(r))
	}
}

func retryDetail(r audit.Result) string {
	delays := audit.Retry.Backoff
	return fmt.Sprintf("in %v: %v", delays[min(r.Attempt, uint64(len(delays)))-1], r.Err)
}

// replayed shows what became of an attempt at an order that was given up before. It
// was counted then, so the sums leave it out. s.mu is held.
func (s *screen) replayed(r audit.Result) {
	show := func(st style, what, detail string) { s.line("audit", r.Order.OrderID, st, what, detail) }
	switch most := uint64(audit.Retry.MaxAttempts); { //nolint:gosec // it is 4
	case r.Err == nil:
		if s.settle(r.Sequence) {
			s.count.resolved++
			show(green, "resolved", "by a replay")
		}
	case mono.IsPermanent(r.Err) || r.Attempt >= most:
		if s.settle(r.Sequence) {
			s.count.failedAgain++
			show(red, "failed again", fmt.Sprintf("in a replay: %v", r.Err))
		}
	default:
		show(yellow, fmt.Sprintf("retry %d of %d", r.Attempt, most-1), retryDetail(r)+" (a replay)")
	}
}

// undecodable shows a message that is no order.
func (s *screen) undecodable(msg *mono.Msg, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	seq := msg.Metadata().Sequence.Stream
	if !s.settle(seq) {
		return
	}
	if d, ok := errors.AsType[*mono.DecodeError](err); ok {
		err = d.Err // without the event's name, which is the same in every line
	}
	if audit.IsReplay(msg) {
		s.count.failedAgain++
		s.line("audit", "?", red, "failed again", fmt.Sprintf("in a replay: %v", err))
		return
	}
	s.count.undecodable++
	s.line("audit", "?", red, "not decodable", fmt.Sprintf("message %d: %v", seq, err))
}

// settle notes that a message is dealt with. It returns false for one that was
// before: at-least-once means that this can happen. s.mu is held.
func (s *screen) settle(seq uint64) bool {
	if s.settled[seq] {
		return false
	}
	s.settled[seq] = true
	return true
}

// left notes how many messages are in the stream at the end. When the server
// could not be asked it is what this run knows.
func (s *screen) left(n int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.count.waiting, s.count.answered = n, err == nil
	if err != nil {
		s.count.waiting = s.open()
	}
}

// agrees reports whether as many messages as the server has are not dealt with.
func (s *screen) agrees(stored int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return stored == s.open()
}

// open is how many of the known messages are not seen to be dealt with. s.mu is
// held.
func (s *screen) open() int {
	return s.count.published() + len(s.foreign) - s.count.dealtWith()
}

func (c counts) published() int { return c.orders + c.garbage }

func (c counts) dealtWith() int { return c.audited + c.gaveUp + c.rejected + c.undecodable }

// elsewhere is how many messages came from other runs, or, below zero, were
// handled by them. Runs share what a folder or a server has stored.
func (c counts) elsewhere() int { return c.dealtWith() + c.waiting - c.published() }

// summary writes the numbers and returns how many messages are waiting. Its
// error says that the numbers do not match what the server has, although
// nobody else uses it.
func (s *screen) summary() (waiting int, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, elsewhere := s.count, s.count.elsewhere()
	row := func(n int, st style, what, format string, args ...any) {
		number := fmt.Sprintf("%6d", n)
		if n > 0 {
			number = s.paint(st, number)
		}
		fmt.Fprintf(s.out, "%s  %-18s %s\n", number, what, fmt.Sprintf(format, args...))
	}
	rule := func() { fmt.Fprintln(s.out, s.paint(dim, "  ----")) }

	fmt.Fprintf(s.out, "\n%s\n\n", s.paint(bold, fmt.Sprintf("Summary after %.1f s", time.Since(s.began).Seconds())))
	row(c.published(), plain, "published", "%d orders and %d broken", c.orders, c.garbage)
	if elsewhere > 0 {
		row(elsewhere, yellow, "found", "published by another run")
	}
	rule()
	row(c.audited, green, "audited", "%d of them after a retry", c.afterRetry)
	row(c.gaveUp, red, "gave up", "after %d attempts each", audit.Retry.MaxAttempts)
	row(c.rejected, red, "rejected", "for good, without a retry")
	row(c.undecodable, red, "not decodable", "given up without a try")
	if c.answered {
		row(c.waiting, yellow, "still waiting", "in the stream, as the server says")
	} else {
		row(c.waiting, yellow, "still waiting", "as far as seen: the server did not answer")
	}
	if elsewhere < 0 {
		row(-elsewhere, yellow, "handled elsewhere", "by another run")
	}
	rule()
	wrong := s.alone && elsewhere != 0
	verdict := "every message is accounted for"
	if wrong {
		verdict = "which does not add up"
	}
	row(c.published()+max(elsewhere, 0), bold, "in all", "%s", verdict)

	fmt.Fprintln(s.out)
	row(c.confirmed, cyan, "confirmations", "sent by notification, over core NATS")
	if c.resolved+c.failedAgain > 0 {
		row(c.resolved, green, "resolved", "by a replay of what was given up")
		row(c.failedAgain, red, "failed again", "in a replay")
	}
	if c.refused > 0 {
		row(c.refused, red, "not published", "and not counted above")
	}
	if wrong {
		return c.waiting, fmt.Errorf("%d messages were published, %d are dealt with or waiting", c.published(), c.published()+elsewhere)
	}
	return c.waiting, nil
}
