package triage_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

// sized makes the payload of a record so many bytes of JSON.
func sized(n int) func(*dlq.Record) {
	pad := bytes.Repeat([]byte("x"), n)
	return func(r *dlq.Record) { r.Data = fmt.Appendf(nil, `{"order":%d,"pad":"%s"}`, r.StreamSequence, pad) }
}

const large = 900_000

const childListURL = "TRIAGE_TEST_LIST_URL"

// TestChildLists lists with payloads in a process of its own, and does nothing in
// the parent. It says how much was live of its heap at most, in bytes.
func TestChildLists(t *testing.T) { //nolint:paralleltest // it has its process to itself
	url := os.Getenv(childListURL)
	if url == "" {
		return
	}
	nc, err := nats.Connect(url)
	must(t, err)
	defer nc.Close()
	d, err := triage.Open(within(t), nc, triage.Config{})
	must(t, err)
	n, most := 0, uint64(0)
	for e, err := range d.Entries(within(t), triage.Selection{}, true) {
		must(t, err)
		if len(e.Data) < large {
			t.Fatalf("dead letter %s has %d bytes", e.ID, len(e.Data))
		}
		n++
		runtime.GC()
		var memory runtime.MemStats
		runtime.ReadMemStats(&memory)
		most = max(most, memory.HeapAlloc)
	}
	_, _ = fmt.Fprintln(os.Stdout, "listed", n, "live", most)
}

// The memory of a list follows neither the number of dead letters nor their size.
// Once it held some chunks of 2048, whatever was in them.
func TestEntries_memory(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const entries, most = 150, 40 << 20
	b.capture(t, entries, sized(large))
	exe, err := os.Executable()
	must(t, err)
	cmd := exec.CommandContext(within(t), exe, "-test.run=^TestChildLists$", "-test.v=false", "-test.count=1")
	cmd.Env = append(os.Environ(), childListURL+"="+b.server.URL())
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var n, live int
	if _, err := fmt.Sscanf(string(out), "listed %d live %d", &n, &live); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("%.1f MiB are live at most", float64(live)/(1<<20))
	if n != entries || live > most {
		t.Errorf("%d were listed with %d bytes of live heap at most, want %d and %d", n, live, entries, most)
	}
}

// Chunks are bounded by their bytes, also where small and large messages are
// mixed, and large ones begin where there were small ones. The list is in its
// order all the same.
func TestEntries_sizes(t *testing.T) {
	t.Parallel()
	b := setup(t)
	var ids []string
	ids = append(ids, b.capture(t, 10, sized(large))...)
	ids = append(ids, b.capture(t, 300)...)
	for range 8 {
		ids = append(ids, b.capture(t, 1, sized(large))...)
		ids = append(ids, b.capture(t, 15)...)
	}
	ids = append(ids, b.capture(t, 10, sized(large))...)
	ids = append(ids, b.capture(t, 300)...)
	must(t, b.desk.Archive(within(t), b.get(t, ids[300]), ""))
	want := newestFirst(slices.Delete(slices.Clone(ids), 300, 301))
	for _, payload := range []bool{false, true} {
		var got []string
		for e, err := range b.desk.Entries(within(t), triage.Selection{}, payload) {
			must(t, err)
			got = append(got, e.ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("with payload %v, %d are listed, want %d, newest first", payload, len(got), len(want))
		}
	}
	messages, sizes, err := triage.ChunkSizes(within(t), b.desk, false)
	must(t, err)
	total := 0
	for i, size := range sizes {
		total += messages[i]
		if size > triage.ChunkBytes {
			t.Errorf("chunk %d has %d bytes in %d messages, want %d at most", i, size, messages[i], triage.ChunkBytes)
		}
	}
	if total != len(ids)+1 {
		t.Errorf("the chunks have %d messages, want %d", total, len(ids)+1)
	}
	if len(messages) > 60 {
		t.Errorf("there are %d chunks: %v", len(messages), messages)
	}
}

// Small messages are read by the thousand, once it is known that they are small.
func TestEntries_chunksGrow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.fill(t, 9000)
	for _, headersOnly := range []bool{false, true} {
		messages, _, err := triage.ChunkSizes(within(t), b.desk, headersOnly)
		must(t, err)
		if len(messages) > 10 || slices.Max(messages) != 2048 {
			t.Errorf("the chunks have %v messages, want few of 2048", messages)
		}
	}
}

// A message that is larger than a chunk comes alone.
func TestEntries_largerThanAChunk(t *testing.T) {
	t.Parallel()
	b := &bundle{
		server: monotest.ServerWith(t, embedded.Config{MaxPayload: triage.ChunkBytes + 1<<20}),
		begin:  time.Now().Add(-time.Hour).UTC().Truncate(time.Second),
	}
	b.nc = b.server.Conn()
	js, err := jetstream.New(b.nc, jetstream.WithDefaultTimeout(longestWait))
	must(t, err)
	b.js = js
	b.store, err = dlq.NewStore(b.nc, b.js, dlq.Config{})
	must(t, err)
	must(t, b.store.Provision(within(t)))
	b.desk = b.open(t, triage.Config{})
	var ids []string
	for range 3 {
		ids = append(ids, b.capture(t, 2)...)
		ids = append(ids, b.capture(t, 1, sized(triage.ChunkBytes+1000))...)
	}
	var got []string
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, true) {
		must(t, err)
		got = append(got, e.ID)
	}
	if !slices.Equal(got, newestFirst(ids)) {
		t.Errorf("listed are %v, want %v", got, newestFirst(ids))
	}
}

// The history of a dead letter is read in parts, and whole.
func TestGet_largeHistory(t *testing.T) {
	t.Parallel()
	b := setup(t)
	id := b.capture(t, 1, sized(large))[0]
	const edits = 3 * triage.AimedBytes / large
	for i := range edits {
		must(t, b.desk.Edit(within(t), b.get(t, id), triage.Revision{Data: bytes.Repeat([]byte{byte('a' + i)}, large)}))
	}
	e := b.get(t, id)
	if len(e.History) != edits || e.Revision != edits {
		t.Errorf("it has %d changes and revision %d, want %d", len(e.History), e.Revision, edits)
	}
	n, err := triage.MessagesOf(within(t), b.desk, b.store.SubjectOf(e.Record))
	must(t, err)
	if n != edits+1 {
		t.Errorf("it has %d messages, want %d", n, edits+1)
	}
}

// A read may take long, as long as there is progress: time runs from one message
// to the next. Once it failed after 15 seconds, wherever it was.
func TestRead_slow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const messages, size, stall = 40, 100_000, 3 * time.Second
	b.capture(t, messages, sized(size))
	line := newSlowLine(t, b.server.URL())
	nc, err := nats.Connect(line.url)
	must(t, err)
	t.Cleanup(nc.Close)
	d, err := triage.Open(within(t), nc, triage.Config{})
	must(t, err)

	line.pace(messages*size/20, stall/10) // twice as long as without a message
	begin := time.Now()
	n, upto, err := triage.ReadOnce(within(t), d, 1, messages, stall)
	took := time.Since(begin) //nolint:forbidigo // a lower bound
	if err != nil || n != messages || upto != messages {
		t.Errorf("read are %d up to %d: %v, want %d", n, upto, err, messages)
	}
	if took < 3*stall/2 {
		t.Errorf("it took %v, which proves nothing", took)
	}
}

// A list goes on as well: a reader waits for its turn behind another one.
func TestEntries_slow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const messages, size = 300, 20_000
	ids := b.capture(t, messages, sized(size))
	line := newSlowLine(t, b.server.URL())
	nc, err := nats.Connect(line.url)
	must(t, err)
	t.Cleanup(nc.Close)
	d, err := triage.Open(within(t), nc, triage.Config{})
	must(t, err)
	line.pace(messages*size/100, 100*time.Millisecond)
	var got []string
	for e, err := range d.Entries(within(t), triage.Selection{}, true) {
		must(t, err)
		got = append(got, e.ID)
	}
	if !slices.Equal(got, newestFirst(ids)) {
		t.Errorf("%d were listed, want %d", len(got), len(ids))
	}
}

// A stream that goes dead in the middle of a read is noticed.
func TestRead_stalled(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const messages, size, stall = 40, 100_000, 2 * time.Second
	b.capture(t, messages, sized(size))
	line := newSlowLine(t, b.server.URL())
	nc, err := nats.Connect(line.url)
	must(t, err)
	t.Cleanup(nc.Close)
	d, err := triage.Open(within(t), nc, triage.Config{})
	must(t, err)
	line.after(messages * size / 2)
	if _, _, err := triage.ReadOnce(within(t), d, 1, messages, stall); !errors.Is(err, triage.ErrStalled) {
		t.Errorf("the read has ended with %v, want ErrStalled", err)
	}
}

// A slowLine is a TCP relay before a server that passes on what the server sends
// at a pace.
type slowLine struct {
	url string

	mu    sync.Mutex
	bytes int // in each step; 0 is none
	step  time.Duration
	left  int // until it is dead
	done  chan struct{}
}

func newSlowLine(t *testing.T, server string) *slowLine {
	t.Helper()
	var lc net.ListenConfig
	l, err := lc.Listen(within(t), "tcp", "127.0.0.1:0")
	must(t, err)
	_, addr, _ := strings.Cut(server, "@")
	const much = 1 << 30
	s := &slowLine{url: strings.Replace(server, addr, l.Addr().String(), 1), bytes: much, left: much, done: make(chan struct{})}
	var relays sync.WaitGroup
	var conns []net.Conn
	relays.Go(func() {
		client, err := l.Accept()
		if err != nil {
			return
		}
		srv, err := net.Dial("tcp", addr) //nolint:noctx // to this machine
		if err != nil {
			_ = client.Close()
			return
		}
		s.mu.Lock()
		conns = append(conns, client, srv)
		s.mu.Unlock()
		relays.Go(func() {
			_, _ = io.Copy(srv, client)
			_ = srv.Close()
		})
		s.relay(client, srv)
		_ = client.Close()
	})
	t.Cleanup(func() {
		close(s.done)
		_ = l.Close()
		s.mu.Lock()
		for _, c := range conns {
			_ = c.Close()
		}
		s.mu.Unlock()
		relays.Wait()
	})
	return s
}

// pace has n bytes passed on in each step.
func (s *slowLine) pace(n int, step time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.bytes, s.step = n, step
}

// after has nothing passed on after n more bytes.
func (s *slowLine) after(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.left = n
}

func (s *slowLine) relay(to io.Writer, from io.Reader) {
	buf := make([]byte, 64<<10)
	passed := 0
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		for data := buf[:n]; len(data) > 0; {
			s.mu.Lock()
			most, step := min(s.bytes-passed, s.left), s.step
			s.mu.Unlock()
			if most <= 0 {
				timer := time.NewTimer(max(step, time.Millisecond))
				select {
				case <-s.done:
					timer.Stop()
					return
				case <-timer.C:
				}
				passed = 0
				continue
			}
			k := min(len(data), most)
			if _, err := to.Write(data[:k]); err != nil {
				return
			}
			data, passed = data[k:], passed+k
			s.mu.Lock()
			s.left -= k
			s.mu.Unlock()
		}
	}
}

// A replica that has not caught up says that there is no more, and the leader knows
// better.
func TestRead_behind(t *testing.T) {
	t.Parallel()
	b := setup(t)
	const n = 5
	b.capture(t, n)
	if err := triage.Behind(within(t), b.desk, 3, n); !errors.Is(err, triage.ErrBehind) {
		t.Errorf("messages that were not seen are the error %v", err)
	}
	if err := triage.Behind(within(t), b.desk, n, n+4); err != nil {
		t.Errorf("what is not there is the error %v", err)
	}
}
