package mono_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// What a consumer gives up is captured once and never lost, whenever its process
// is killed. A child process consumes by way of a relay that knows the protocol:
// it stops at a chosen step of a capture, lets nothing through any more, and the
// child is killed. So the server has seen exactly what it would have, had the
// process died in that instant. Then the child begins again, until a last life
// in which it is left alone.

const (
	chaosStream   = "S"
	chaosDurable  = "worker"
	chaosRecords  = "monotel.dlq.DLQ." // what the subjects of records begin with
	chaosMessages = 40
	// More than a test has kills, so that a message that is decided at its first
	// delivery outlives them all. The other ones take this many attempts.
	chaosAttempts = 10
	// From this delivery on a message whose last attempts had no outcome is captured
	// as crashed, which is right: nobody can tell a kill from a crash.
	chaosCrashed = chaosAttempts + 3
	// A number of kills for each retention, for the long form.
	chaosKills = "MONO_CHAOS"
)

// chaosKind says what becomes of a message. Even numbers are acked, in two ways;
// odd ones are given up, in each way that there is.
func chaosKind(no int) (kind string, reason dlq.Reason, first bool) {
	if no%2 == 0 {
		return []string{"ack", "return"}[no/2%2], "", true
	}
	kinds := []struct {
		kind   string
		reason dlq.Reason
		first  bool // it is decided at the first delivery
	}{
		{"term", dlq.ReasonTerminated, true},
		{"term with reason", dlq.ReasonTerminated, true},
		{"nak", dlq.ReasonAttemptsExhausted, false},
		{"permanent", dlq.ReasonPermanentError, true},
		{"panic", dlq.ReasonPanic, false},
		{"undecodable", dlq.ReasonUndecodable, true},
		{"fail", dlq.ReasonPermanentError, true},
		{"error", dlq.ReasonAttemptsExhausted, false},
		{"nak with delay", dlq.ReasonAttemptsExhausted, false},
	}
	k := kinds[no/2%len(kinds)]
	return k.kind, k.reason, k.first
}

// chaosHandle does what the message says.
func chaosHandle(_ context.Context, msgs []*mono.Msg) error {
	m := msgs[0] // there is one in a batch
	_, kind, _ := strings.Cut(string(m.Data), " ")
	switch kind {
	case "ack":
		return m.Ack()
	case "return":
		return nil // AutoAck
	case "term":
		return m.Term()
	case "term with reason":
		return m.TermWithReason("no such order")
	case "nak":
		return m.Nak()
	case "nak with delay":
		return m.NakWithDelay(5 * time.Millisecond)
	case "permanent":
		return mono.Permanent(errBroken)
	case "fail":
		return m.Fail(mono.Permanent(errBroken))
	case "panic":
		panic(kind)
	case "undecodable":
		var order struct{}
		return &mono.DecodeError{Event: "shop/Numbered/v1", Err: json.Unmarshal(m.Data, &order)}
	}
	return errBroken
}

// chaosModule is the same in the parent, which makes the streams, and in the
// child, which consumes.
func chaosModule(retention jetstream.RetentionPolicy, h mono.EventStreamConsumerHandler) (*testModule, error) {
	e, err := mono.NewEvent("shop", "Numbered", "v1")
	if err != nil {
		return nil, err
	}
	m := durableModule("shop", e, mono.StreamConsumerConfig{
		Stream: mono.StreamConfig{Name: chaosStream, Retention: retention, MaxBytes: 64 << 20},
		Consumer: mono.ConsumerConfig{
			Durable: chaosDurable,
			AckWait: time.Second, // what a killed process held comes back soon
			// The server tells of each ack that it has acted on: only it knows.
			SampleFrequency: "100",
		},
		Retry:       mono.RetryPolicy{MaxAttempts: chaosAttempts, Backoff: []time.Duration{5 * time.Millisecond}},
		Fetch:       mono.FetchConfig{BatchSize: 1},
		Concurrency: 4,
		AutoAck:     true,
	}, h)
	m.emits = []mono.BaseEventDefinition{e}
	return m, nil
}

// childChaos consumes until its parent closes standard input. arg is the relay's
// address and the stream's retention.
func childChaos(ctx context.Context, arg string) error {
	url, number, _ := strings.Cut(arg, "|")
	retention, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	m, err := chaosModule(jetstream.RetentionPolicy(retention), chaosHandle)
	if err != nil {
		return err
	}
	app, err := mono.New(mono.WithNATS(url), mono.WithLogger(slog.New(slog.DiscardHandler)))
	if err != nil {
		return err
	}
	if err := app.Register(m); err != nil {
		return err
	}
	// With nothing left to do, the parent may end it while it starts.
	if err := app.Start(ctx); err != nil && ctx.Err() == nil {
		return err
	}
	<-ctx.Done()
	return app.Stop(context.WithoutCancel(ctx))
}

// A chaosStep is where a life of the child ends.
type chaosStep string

const (
	beforePublish   chaosStep = "before-publish"    // the record has not reached the server
	beforePubAck    chaosStep = "before-puback"     // it is stored, and the child does not know
	beforeTerm      chaosStep = "before-term"       // the child knows, and the server has no term
	beforeTermReply chaosStep = "before-term-reply" // the server has acted on the term, and the child does not know
	atRandom        chaosStep = "random"            // after some bytes, or some time
	untilDone       chaosStep = "done"              // the last life, that nothing ends
)

func chaosSteps() []chaosStep {
	return []chaosStep{beforePublish, beforePubAck, beforeTerm, beforeTermReply, atRandom}
}

// A trap ends a life of the child.
type trap struct {
	step  chaosStep
	count int // which time the step is reached; of bytes, if it is atRandom

	// atRandom: after some time, or else count bytes in one direction.
	after        time.Duration
	up           bool
	fromDelivery bool // counted from the first message on, not from the connect
}

func newTrap(step chaosStep) trap {
	tr := trap{step: step, count: 1 + rand.IntN(8)}
	if step != atRandom {
		return tr
	}
	tr.up, tr.fromDelivery = rand.IntN(2) == 0, rand.IntN(3) > 0
	most := chaosBytesDown
	if tr.up {
		most = chaosBytesUp
	}
	tr.count = rand.IntN(most)
	if rand.IntN(4) == 0 {
		// Ten attempts take longer.
		tr.after = time.Duration(1 + rand.Int64N(int64(70*time.Millisecond)))
	}
	return tr
}

// Less than what a first life takes in each direction: about 27 000 bytes and
// 18 000.
const (
	chaosBytesUp   = 20 << 10
	chaosBytesDown = 10 << 10
)

func (tr trap) String() string {
	switch {
	case tr.step == untilDone:
		return "when everything is decided"
	case tr.step != atRandom:
		return fmt.Sprintf("%s, number %d", tr.step, tr.count)
	case tr.after > 0:
		return fmt.Sprintf("after %v", tr.after)
	}
	s := fmt.Sprintf("after %d bytes", tr.count)
	if tr.up {
		s += " to the server"
	} else {
		s += " from the server"
	}
	if tr.fromDelivery {
		s += ", from the first delivery on"
	}
	return s
}

// A frame is one operation of the NATS protocol.
type frame struct {
	raw            []byte
	subject, reply string // of a message
	body           []byte // without headers
}

func readFrame(r *bufio.Reader) (frame, error) {
	line, err := r.ReadBytes('\n')
	if err != nil {
		return frame{}, err
	}
	f := frame{raw: line}
	fields := strings.Fields(string(line))
	if len(fields) == 0 {
		return f, nil
	}
	var before, sizes int // fields before the reply, and after it
	switch fields[0] {
	case "PUB":
		before, sizes = 2, 1
	case "HPUB":
		before, sizes = 2, 2
	case "MSG":
		before, sizes = 3, 1
	case "HMSG":
		before, sizes = 3, 2
	default:
		return f, nil
	}
	if len(fields) < before+sizes {
		return f, fmt.Errorf("not understood: %q", line)
	}
	f.subject = fields[1]
	if len(fields) > before+sizes {
		f.reply = fields[before]
	}
	size, err := strconv.Atoi(fields[len(fields)-1])
	if err != nil {
		return f, err
	}
	header := 0
	if sizes > 1 {
		if header, err = strconv.Atoi(fields[len(fields)-2]); err != nil {
			return f, err
		}
	}
	f.raw = append(f.raw, make([]byte, size+len("\r\n"))...)
	if _, err := io.ReadFull(r, f.raw[len(line):]); err != nil {
		return f, err
	}
	f.body = f.raw[len(line)+header : len(line)+size]
	return f, nil
}

// A tap is a relay before a server, for one life of the child. Its trap stops
// the flow in both directions at once.
type tap struct {
	listener net.Listener
	server   string
	sprung   chan struct{} // closed when the trap has
	closed   chan struct{}
	done     sync.WaitGroup

	mu        sync.Mutex // held while a frame is passed on
	trap      trap
	stopped   bool
	disarmed  bool
	delivered bool              // a message was
	captures  map[string]string // by the inbox of their PubAck: the subject of the record
	terms     map[string]string // by the inbox of their reply: what was sent to
	sent      []string          // subjects of records that went to the server
	caught    string            // subject of the capture or term that the trap closed on
	conns     []net.Conn
	problem   error // what the relay did not understand
}

func newTap(t *testing.T, srv *monotest.TestServer, tr trap) *tap {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, addr, _ := strings.Cut(srv.URL(), "@")
	p := &tap{
		listener: l, server: addr, trap: tr,
		sprung: make(chan struct{}), closed: make(chan struct{}),
		captures: make(map[string]string), terms: make(map[string]string),
	}
	p.done.Go(p.accept)
	t.Cleanup(p.close)
	return p
}

// close ends the tap once the child is dead, or does not need it any more.
func (p *tap) close() {
	p.mu.Lock()
	select {
	case <-p.closed:
	default:
		close(p.closed)
	}
	_ = p.listener.Close()
	for _, c := range p.conns {
		_ = c.Close()
	}
	p.mu.Unlock()
	p.done.Wait()
}

func (p *tap) url(srv *monotest.TestServer) string {
	return strings.Replace(srv.URL(), p.server, p.listener.Addr().String(), 1)
}

func (p *tap) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.server) //nolint:noctx // to this machine
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		p.conns = append(p.conns, client, server)
		p.mu.Unlock()
		p.done.Go(func() { p.relay(server, client, true) })
		p.done.Go(func() { p.relay(client, server, false) })
	}
}

func (p *tap) relay(to, from net.Conn, up bool) {
	defer func() { _ = to.Close() }()
	defer func() { _ = from.Close() }()
	r := bufio.NewReaderSize(from, 64<<10)
	for {
		f, err := readFrame(r)
		if err == nil && p.pass(to, &f, up) {
			continue
		}
		p.mu.Lock()
		stopped := p.stopped
		if err != nil && !stopped && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
			p.problem = err
		}
		p.mu.Unlock()
		if stopped {
			<-p.closed // the child is killed before it can see that the connection is lost
		}
		return
	}
}

// pass hands a frame on, or a part of it, and reports whether the flow goes on.
func (p *tap) pass(to io.Writer, f *frame, up bool) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return false
	}
	n := p.allowed(f, up)
	if _, err := to.Write(f.raw[:n]); err != nil {
		return false
	}
	if n < len(f.raw) {
		p.stop()
	}
	return !p.stopped
}

// allowed returns how many bytes of a frame may pass: all of them, unless this
// is where the life of the child ends.
func (p *tap) allowed(f *frame, up bool) int {
	var step chaosStep
	var subject string
	switch {
	case up && strings.HasPrefix(f.subject, chaosRecords):
		step, subject = beforePublish, f.subject
		p.captures[f.reply] = subject
	case up && f.reply != "" && bytes.HasPrefix(f.body, []byte("+TERM")):
		step, subject = beforeTerm, f.subject
		p.terms[f.reply] = subject
	case !up && p.captures[f.subject] != "":
		step, subject = beforePubAck, p.captures[f.subject]
	case !up && p.terms[f.subject] != "":
		step, subject = beforeTermReply, p.terms[f.subject]
	}
	if !up && strings.HasPrefix(f.reply, "$JS.ACK.") {
		p.delivered = true
	}
	switch tr := &p.trap; {
	case p.disarmed:
	case tr.step == atRandom && tr.after == 0 && tr.up == up && (p.delivered || !tr.fromDelivery):
		if tr.count < len(f.raw) {
			return tr.count
		}
		tr.count -= len(f.raw)
	case tr.step == step:
		tr.count--
		if tr.count == 0 {
			p.caught = subject
			return 0
		}
	}
	if step == beforePublish {
		p.sent = append(p.sent, subject)
	}
	return len(f.raw)
}

// stop is called with p.mu held.
func (p *tap) stop() {
	if !p.stopped {
		p.stopped = true
		close(p.sprung)
	}
}

// spring springs the trap now.
func (p *tap) spring() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop()
}

// seen returns where the trap has closed, which records went to the server, and
// what the relay did not understand.
func (p *tap) seen() (caught string, sent []string, problem error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.caught, p.sent, p.problem
}

// disarm reports whether the trap has not sprung. It will not any more.
func (p *tap) disarm() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.disarmed = true
	return !p.stopped
}

// A chaosServer is a server with a stream of messages to decide, and what it has
// said of them.
type chaosServer struct {
	srv       *monotest.TestServer
	nc        *nats.Conn
	js        jetstream.JetStream
	retention jetstream.RetentionPolicy
	created   time.Time       // the stream
	payloads  map[int]string  // by stream sequence
	sent      map[string]bool // subjects of records that the server got
	plan      []string        // how the lives end
	kills     int
	lives     int

	mu         sync.Mutex
	acked      map[int]int // by stream sequence
	terminated map[int]int
}

func newChaosServer(t *testing.T, retention jetstream.RetentionPolicy) *chaosServer {
	t.Helper()
	s := &chaosServer{
		srv: monotest.Server(t), retention: retention,
		payloads: make(map[int]string), sent: make(map[string]bool), acked: make(map[int]int), terminated: make(map[int]int),
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the lives were to end: %s", strings.Join(s.plan, "; "))
		}
	})
	s.nc = s.srv.Conn()
	s.js = jetStreamOf(t, s.nc)
	s.watch(t, "$JS.EVENT.METRIC.CONSUMER.ACK.>", s.acked)
	s.watch(t, "$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>", s.terminated)

	// The consumer has to be there before the messages are, or else a stream with
	// interest retention drops them.
	m, err := chaosModule(retention, chaosHandle)
	if err != nil {
		t.Fatal(err)
	}
	mustStop(t, runApp(t, onServer(s.srv), m))
	stream, err := s.js.Stream(within(t), chaosStream)
	if err != nil {
		t.Fatal(err)
	}
	s.created = stream.CachedInfo().Created
	for no := range chaosMessages {
		kind, _, _ := chaosKind(no)
		payload := strconv.Itoa(no) + " " + kind
		ack, err := s.js.Publish(within(t), m.emits[0].Subject, []byte(payload))
		if err != nil {
			t.Fatal(err)
		}
		s.payloads[int(ack.Sequence)] = payload
	}
	return s
}

func (s *chaosServer) watch(t *testing.T, subject string, into map[int]int) {
	t.Helper()
	_, err := s.nc.Subscribe(subject, func(m *nats.Msg) {
		var said struct {
			Stream    string `json:"stream"`
			StreamSeq int    `json:"stream_seq"`
		}
		if err := json.Unmarshal(m.Data, &said); err != nil || said.Stream != chaosStream {
			t.Errorf("%s: %s: %v", m.Subject, m.Data, err)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		into[said.StreamSeq]++
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (s *chaosServer) consumer(t *testing.T) *jetstream.ConsumerInfo {
	t.Helper()
	c, err := s.js.Consumer(within(t), chaosStream, chaosDurable)
	if err != nil {
		t.Fatal(err)
	}
	return c.CachedInfo()
}

// live runs the child until the trap springs, and kills it then. It reports
// whether everything was decided before.
func (s *chaosServer) live(t *testing.T, tr trap) (done bool) {
	t.Helper()
	s.plan = append(s.plan, tr.String())
	p := newTap(t, s.srv, tr)
	defer p.close()
	c := startChild(t, "chaos", p.url(s.srv)+"|"+strconv.Itoa(int(s.retention)))
	s.lives++
	var moment <-chan time.Time
	if tr.after > 0 {
		moment = time.After(tr.after)
	}
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(patience)
	for {
		select {
		case <-moment:
			p.spring()
		case <-p.sprung:
			c.kill()
			said := c.wait(t)
			if c.cmd.ProcessState.Success() {
				t.Errorf("the child ended before it was killed, and said %q", said)
			}
			s.kills++
			s.checkStep(t, tr.step, p)
			return false
		case <-c.waited:
			_, _, problem := p.seen()
			t.Fatalf("the child ended by itself with %v, and said %q; the relay: %v", c.err, c.wait(t), problem)
		case <-deadline:
			info := s.consumer(t)
			t.Fatalf("after %v %d messages were not delivered and %d not settled, and the trap has not sprung",
				patience, info.NumPending, info.NumAckPending)
		case <-tick.C:
			if info := s.consumer(t); info.NumPending > 0 || info.NumAckPending > 0 || !p.disarm() {
				continue
			}
			_ = c.stdin.Close()
			if said := c.wait(t); c.err != nil {
				t.Errorf("the last life ended with %v, and said %q", c.err, said)
			}
			return true
		}
	}
}

// checkStep checks that the child died where it should have, as the server knows
// it.
func (s *chaosServer) checkStep(t *testing.T, step chaosStep, p *tap) {
	t.Helper()
	caught, sent, _ := p.seen()
	for _, subject := range sent {
		s.sent[subject] = true
	}
	if caught == "" {
		return // it died anywhere
	}
	record, seq := caught, 0
	if !strings.HasPrefix(caught, chaosRecords) { // $JS.ACK.….<consumer>.<deliveries>.<sequence>.…
		_, rest, _ := strings.Cut(caught, "."+chaosDurable+".")
		parts := strings.Split(rest, ".")
		seq, _ = strconv.Atoi(parts[min(1, len(parts)-1)])
		record = chaosRecords + chaosStream + "." + chaosDurable + "." + dlq.ID(chaosStream, s.created, chaosDurable, uint64(seq))
	}
	stream, err := s.js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.GetLastMsgForSubject(within(t), record)
	if err != nil && !errors.Is(err, jetstream.ErrMsgNotFound) {
		t.Fatal(err)
	}
	stored := err == nil
	// A message that was under way in an earlier life has been captured before.
	if want := step != beforePublish || s.sent[record]; stored != want {
		t.Errorf("%s: there is a record: %v, want %v", step, stored, want)
	}
	terminated := func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.terminated[seq] > 0
	}
	if step == beforeTerm && terminated() {
		t.Errorf("%s: message %d is terminated", step, seq)
	}
	if step == beforeTermReply && !pollFor(patience, terminated) {
		t.Errorf("%s: message %d is not terminated", step, seq)
	}
}

// run kills the child once for each trap, unless everything is decided before,
// and then leaves it alone.
func (s *chaosServer) run(t *testing.T, traps ...trap) {
	t.Helper()
	for _, tr := range traps {
		if s.live(t, tr) {
			return
		}
	}
	s.live(t, trap{step: untilDone})
}

// A chaosResult counts what became of the messages.
type chaosResult struct {
	kills, lives, messages, redeliveries, acked, captured, crashed int
	duplicates, lost, both, wrong                                  int
}

func (r chaosResult) plus(o chaosResult) chaosResult {
	return chaosResult{
		kills: r.kills + o.kills, lives: r.lives + o.lives, messages: r.messages + o.messages, redeliveries: r.redeliveries + o.redeliveries,
		acked: r.acked + o.acked, captured: r.captured + o.captured, crashed: r.crashed + o.crashed,
		duplicates: r.duplicates + o.duplicates, lost: r.lost + o.lost, both: r.both + o.both, wrong: r.wrong + o.wrong,
	}
}

func (r chaosResult) String() string {
	return fmt.Sprintf("kills=%d lives=%d messages=%d redeliveries=%d acked=%d captures=%d (crashed=%d) duplicates=%d lost=%d acked_and_captured=%d wrong=%d",
		r.kills, r.lives, r.messages, r.redeliveries, r.acked, r.captured, r.crashed, r.duplicates, r.lost, r.both, r.wrong)
}

// check asks the server what became of each message, and fails the test unless
// each was either acked or captured, once, as it should be.
func (s *chaosServer) check(t *testing.T) chaosResult {
	t.Helper()
	info := s.consumer(t)
	if info.NumPending != 0 || info.NumAckPending != 0 {
		t.Errorf("%d messages are not delivered and %d not settled", info.NumPending, info.NumAckPending)
	}
	s.checkStream(t)
	// The server says it of each message that has left the consumer, a moment later.
	if !pollFor(patience, func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		for seq := range s.payloads {
			if s.acked[seq] == 0 && s.terminated[seq] == 0 {
				return false
			}
		}
		return true
	}) {
		t.Error("there are messages that were neither acked nor terminated")
	}
	records := s.records(t)
	s.mu.Lock()
	defer s.mu.Unlock()
	res := chaosResult{
		kills: s.kills, lives: s.lives, messages: len(s.payloads),
		redeliveries: int(info.Delivered.Consumer) - len(s.payloads), acked: len(s.acked),
	}
	for seq, payload := range s.payloads {
		captured := records[seq]
		acked := s.acked[seq] > 0
		res.captured += len(captured)
		switch {
		case len(captured) > 1:
			res.duplicates += len(captured) - 1
			t.Errorf("message %d, %q, was captured %d times", seq, payload, len(captured))
		case len(captured) == 0 && !acked:
			res.lost++
			t.Errorf("message %d, %q, is lost: it was terminated %d times, and neither acked nor captured", seq, payload, s.terminated[seq])
		case len(captured) > 0 && acked:
			res.both++
			t.Errorf("message %d, %q, was acked, and captured as %s", seq, payload, captured[0].Reason)
		}
		if len(captured) == 0 {
			if _, reason, _ := chaosKind(seq - 1); reason != "" && acked {
				res.wrong++
				t.Errorf("message %d, %q, was acked", seq, payload)
			}
			continue
		}
		if problem := s.checkRecord(seq, captured[0]); problem != "" {
			res.wrong++
			t.Errorf("message %d, %q: %s", seq, payload, problem)
		}
		if captured[0].Reason == dlq.ReasonCrashed {
			res.crashed++
		}
	}
	if res.acked+res.captured != res.messages {
		t.Errorf("%d messages were stored, %d acked and %d captured", res.messages, res.acked, res.captured)
	}
	return res
}

// checkStream checks that the stream has what its retention says: everything, or
// nothing that is settled.
func (s *chaosServer) checkStream(t *testing.T) {
	t.Helper()
	want := uint64(0)
	if s.retention == jetstream.LimitsPolicy {
		want = chaosMessages
	}
	var got uint64
	if !pollFor(patience, func() bool {
		stream, err := s.js.Stream(within(t), chaosStream)
		if err != nil {
			t.Fatal(err)
		}
		if last := stream.CachedInfo().State.LastSeq; last != chaosMessages {
			t.Fatalf("the stream's last sequence is %d, want %d", last, chaosMessages)
		}
		got = stream.CachedInfo().State.Msgs
		return got == want
	}) {
		t.Errorf("the stream has %d messages, want %d", got, want)
	}
}

// records returns what is in the dead-letter stream, by the sequence of the
// message.
func (s *chaosServer) records(t *testing.T) map[int][]*dlq.Record {
	t.Helper()
	stream, err := s.js.Stream(within(t), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[int][]*dlq.Record)
	for seq := range stream.CachedInfo().State.LastSeq {
		msg, err := stream.GetMsg(within(t), seq+1)
		if err != nil {
			t.Fatal(err)
		}
		r, err := dlq.Decode(msg.Header, msg.Data)
		if err != nil {
			t.Fatalf("message %d of the dead-letter stream: %v", seq+1, err)
		}
		if s.payloads[int(r.StreamSequence)] == "" {
			t.Errorf("dead letter of a message that was not stored: %+v", r)
		}
		if !strings.HasSuffix(msg.Subject, "."+r.ID) {
			t.Errorf("dead letter %s is on subject %q", r.ID, msg.Subject)
		}
		all[int(r.StreamSequence)] = append(all[int(r.StreamSequence)], r)
	}
	return all
}

// checkRecord says what is wrong with a record.
func (s *chaosServer) checkRecord(seq int, r *dlq.Record) string {
	_, reason, first := chaosKind(seq - 1)
	switch {
	case string(r.Data) != s.payloads[seq]:
		return fmt.Sprintf("its record has payload %q", r.Data)
	case r.ID != dlq.ID(chaosStream, s.created, chaosDurable, uint64(seq)) || r.Stream != chaosStream || r.Consumer != chaosDurable:
		return fmt.Sprintf("its record is of another one: %+v", r)
	case r.Reason == dlq.ReasonCrashed && !first && r.Deliveries >= chaosCrashed:
		return "" // its last attempts were all cut short
	case reason == "":
		return fmt.Sprintf("it was captured as %s after %d deliveries, and should have been acked", r.Reason, r.Deliveries)
	case r.Reason != reason:
		return fmt.Sprintf("it was captured as %s after %d deliveries, and should be %s", r.Reason, r.Deliveries, reason)
	case !first && r.Deliveries < chaosAttempts:
		return fmt.Sprintf("it was captured after %d of %d attempts", r.Deliveries, chaosAttempts)
	}
	return ""
}

func chaosRetentions() []jetstream.RetentionPolicy {
	return []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.InterestPolicy, jetstream.WorkQueuePolicy}
}

func TestChaos_captureOnceAndNeverLost(t *testing.T) {
	t.Parallel()
	for _, retention := range chaosRetentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			for _, step := range chaosSteps() {
				t.Run(string(step), func(t *testing.T) {
					t.Parallel()
					s := newChaosServer(t, retention)
					traps, kills := []trap{newTrap(step), newTrap(step)}, 2
					if step == atRandom {
						// A later life may be done before its trap springs.
						traps, kills = append(traps, newTrap(step), newTrap(step)), 1
					}
					s.run(t, traps...)
					res := s.check(t)
					if res.kills < kills {
						t.Errorf("the child was killed %d times, want %d", res.kills, kills)
					}
					t.Log(res)
				})
			}
		})
	}
}

// progress prints a line at once: the long form takes minutes.
func progress(format string, args ...any) {
	_, _ = fmt.Fprintf(os.Stderr, format+"\n", args...) // nobody reads it then
}

// The long form: as many kills as MONO_CHAOS says, for each retention.
func TestChaos_manyKills(t *testing.T) {
	t.Parallel()
	kills, err := strconv.Atoi(os.Getenv(chaosKills))
	if err != nil || kills <= 0 {
		t.Skipf("set %s to a number of kills, or run make kills", chaosKills)
	}
	const inRound = 5
	for _, retention := range chaosRetentions() {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			var sum chaosResult
			for round := 1; sum.kills < kills && !t.Failed(); round++ {
				t.Run(strconv.Itoa(round), func(t *testing.T) {
					s := newChaosServer(t, retention)
					var traps []trap
					for range min(inRound, kills-sum.kills) {
						// Most of them at any point: the steps have tests of their own.
						step := atRandom
						if rand.IntN(2) == 0 {
							step = chaosSteps()[rand.IntN(len(chaosSteps()))]
						}
						traps = append(traps, newTrap(step))
					}
					s.run(t, traps...)
					sum = sum.plus(s.check(t))
				})
				progress("%v, round %d: %v", retention, round, sum)
			}
			progress("summary of %v: %v", retention, sum)
		})
	}
}
