package dlq_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// full limits the dead-letter stream to what it holds, and a little more, and
// returns its configuration.
func (b *bundle) full(t *testing.T, spare int64, edit func(*jetstream.StreamConfig, jetstream.StreamState)) jetstream.StreamConfig {
	t.Helper()
	info := b.info(t, "DLQ")
	c := info.Config
	c.MaxBytes = int64(info.State.Bytes) + spare
	if edit != nil {
		edit(&c, info.State)
	}
	if _, err := b.js.UpdateStream(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	return b.info(t, "DLQ").Config
}

// entries captures dead letters with sequences from 1 on, of size bytes.
func (b *bundle) entries(t *testing.T, s *dlq.Store, n, size int) []*dlq.Entry {
	t.Helper()
	all := make([]*dlq.Entry, 0, n)
	for i := range n {
		r := record(uint64(i + 1))
		r.Data = noise(uint64(i), size)
		capture(t, s, r)
		all = append(all, dlq.NewEntry(r, b.info(t, "DLQ").State.LastSeq, nil))
	}
	return all
}

// letter reads what is on an entry's subject. The first message has to be the record
// or its trace, whatever happens. It reports whether there is a trace.
func (b *bundle) letter(t *testing.T, s *dlq.Store, e *dlq.Entry) (discarded bool) {
	t.Helper()
	stream, err := b.js.Stream(t.Context(), "DLQ")
	if err != nil {
		t.Fatal(err)
	}
	for from := uint64(1); ; {
		m, err := stream.GetMsg(t.Context(), from, jetstream.WithGetMsgSubject(s.SubjectOf(e.Record)))
		if errors.Is(err, jetstream.ErrMsgNotFound) && from > 1 {
			return discarded
		}
		if err != nil {
			t.Fatalf("dead letter %s has vanished: %v", e.ID, err)
		}
		if r, err := dlq.Decode(m.Header, m.Data); from == 1 && (err != nil || r.ID != e.ID) {
			t.Fatalf("the first message of dead letter %s is %v, %v", e.ID, r, err)
		}
		discarded = discarded || dlq.IsTrace(m.Header)
		from = m.Sequence + 1
	}
}

func TestChange_discardFromFull(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		cfg  jetstream.StreamConfig
		edit func(*jetstream.StreamConfig, jetstream.StreamState)
	}{
		{name: "of bytes"},
		{name: "of bytes, in memory", cfg: jetstream.StreamConfig{Storage: jetstream.MemoryStorage}},
		{name: "of messages", edit: func(c *jetstream.StreamConfig, state jetstream.StreamState) {
			c.MaxBytes, c.MaxMsgs = 1<<20, int64(state.Msgs)
		}},
		{name: "of messages, with any bytes", edit: func(c *jetstream.StreamConfig, state jetstream.StreamState) {
			c.MaxBytes, c.MaxMsgs = -1, int64(state.Msgs)
		}},
		{name: "of both", edit: func(c *jetstream.StreamConfig, state jetstream.StreamState) { c.MaxMsgs = int64(state.Msgs) }},
		{name: "beyond its limits", edit: func(c *jetstream.StreamConfig, state jetstream.StreamState) {
			c.MaxBytes, c.MaxMsgs = int64(state.Bytes)-1000, int64(state.Msgs)-1
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			tt.cfg.Metadata = map[string]string{"team": "shop"}
			s := b.provisioned(t, dlq.Config{Stream: tt.cfg})
			all := b.entries(t, s, 3, 300)
			change(t, s, all[1], dlq.Change{Kind: dlq.ChangeArchived})
			want := b.full(t, 10, tt.edit)

			if err := s.Change(t.Context(), all[0], dlq.Change{Kind: dlq.ChangeArchived}, nil); !errors.Is(err, dlq.ErrStreamFull) {
				t.Fatalf("archive: %v, want ErrStreamFull", err)
			}
			for i, e := range all {
				change(t, s, e, dlq.Change{Kind: dlq.ChangeDiscarded, Actor: "ann@ops", Reason: "make room"})
				left := uint64(len(all))
				if i == 0 {
					left++ // the second has a history
				}
				if got := b.info(t, "DLQ").State.Msgs; got != left || !b.letter(t, s, e) {
					t.Errorf("after discarding %d there are %d messages, want %d, and the trace of it", i+1, got, left)
				}
			}
			if diff := cmp.Diff(want, b.info(t, "DLQ").Config); diff != "" {
				t.Errorf("the stream is not as before (-want +got):\n%s", diff)
			}
			if captured, err := s.Capture(t.Context(), record(1), nil); captured || err != nil {
				t.Errorf("capture what is discarded: %v, %v", captured, err)
			}
		})
	}
}

// Raising has an end, which an operator decides on.
func TestChange_discardFromFull_farBeyond(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	all := b.entries(t, s, 20, 10<<10)
	want := b.full(t, 0, func(c *jetstream.StreamConfig, _ jetstream.StreamState) { c.MaxBytes = 1000 })
	info := b.info(t, "DLQ")
	err := s.Change(t.Context(), all[0], dlq.Change{Kind: dlq.ChangeDiscarded}, nil)
	remedy := fmt.Sprintf("`nats stream edit DLQ --max-bytes %d`", 2*info.State.Bytes)
	if !errors.Is(err, dlq.ErrStreamFull) || !strings.Contains(err.Error(), remedy) {
		t.Errorf("discard: %v, want ErrStreamFull that says %s", err, remedy)
	}
	if b.letter(t, s, all[0]) || !cmp.Equal(want, b.info(t, "DLQ").Config) {
		t.Error("it is discarded, or the stream is not as before")
	}
	b.full(t, int64(info.State.Bytes), nil)
	change(t, s, all[0], dlq.Change{Kind: dlq.ChangeDiscarded})
}

// The page says what the stream's metadata may have.
func TestChange_discardFromFull_page(t *testing.T) {
	t.Parallel()
	content, err := os.ReadFile("../docs/dead-letter-format.md")
	if err != nil {
		t.Fatal(err)
	}
	note, err := json.Marshal(dlq.Raise{From: dlq.Limits{MaxBytes: 1000, MaxMsgs: -1}, To: dlq.Limits{MaxBytes: 1200, MaxMsgs: -1}})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"`" + dlq.KeyRaised + "`", "`" + string(note) + "`"} {
		if !strings.Contains(string(content), want) {
			t.Errorf("the page does not have %s", want)
		}
	}
}

// Somebody else's change since the entry was read is kept, at the limit too.
func TestChange_discardFromFull_changed(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	e := b.entries(t, s, 1, 300)[0]
	old := *e
	change(t, s, e, dlq.Change{Kind: dlq.ChangeArchived})
	want := b.full(t, 10, nil)
	if err := s.Change(t.Context(), &old, dlq.Change{Kind: dlq.ChangeDiscarded}, nil); !errors.Is(err, dlq.ErrEntryChanged) {
		t.Errorf("discard: %v, want ErrEntryChanged", err)
	}
	if got := b.info(t, "DLQ"); got.State.Msgs != 2 || !cmp.Equal(want, got.Config) {
		t.Errorf("after it the stream is %+v", got)
	}
}

// stuff takes all the room that the dead-letter stream has.
func (b *bundle) stuff(t *testing.T) {
	t.Helper()
	const subject, overhead = "monotel.dlq.DLQ.stuff", 64
	info := b.info(t, "DLQ")
	room := info.Config.MaxBytes - int64(info.State.Bytes) - overhead
	if room <= 0 {
		return
	}
	if _, err := b.js.Publish(t.Context(), subject, make([]byte, room)); err != nil {
		t.Fatal(err)
	}
}

// errCut is what a process sees of its own end.
var errCut = errors.New("cut")

// A cutConn ends a connection at the n-th publish or request that is written to
// it: before the server has got that, or after.
type cutConn struct {
	net.Conn
	left  *atomic.Int64
	after bool
}

func (c cutConn) Write(data []byte) (int, error) {
	if !bytes.Contains(data, []byte("PUB ")) || c.left.Add(-1) > 0 {
		return c.Conn.Write(data)
	}
	if c.after {
		_, _ = c.Conn.Write(data)
	}
	_ = c.Close()
	return 0, errCut
}

type cutDialer struct {
	left  *atomic.Int64
	after bool
}

func (d cutDialer) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address) //nolint:noctx // the interface has none
	return cutConn{Conn: c, left: d.left, after: d.after}, err
}

// TestChange_discardFromFull_killed ends the process that discards at each of its
// steps, with the server having got the last one or not. Each time the entry is
// there or its trace is, nobody can capture it again, and who comes next puts
// everything right.
func TestChange_discardFromFull_killed(t *testing.T) {
	t.Parallel()
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("after the server has got it: %t", after), func(t *testing.T) {
			t.Parallel()
			const most = 30
			b := setup(t)
			s := b.provisioned(t, dlq.Config{})
			all := b.entries(t, s, 2*most, 1000)
			want := b.full(t, 10, nil)
			for n := 1; ; n++ {
				if n == most {
					t.Fatalf("discarding one takes more than %d steps", most)
				}
				e := all[n]
				var left atomic.Int64
				left.Store(int64(n))
				nc, err := nats.Connect(b.server.URL(), nats.NoReconnect(), nats.SetCustomDialer(cutDialer{&left, after}),
					nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})) // the default prints
				if err != nil {
					t.Fatal(err)
				}
				js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(bridgePatience))
				if err != nil {
					t.Fatal(err)
				}
				killed, err := dlq.NewStore(nc, js, dlq.Config{})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), bridgePatience)
				err = killed.Change(ctx, e, dlq.Change{Kind: dlq.ChangeDiscarded}, nil)
				cancel()
				nc.Close()
				done := b.letter(t, s, e)
				if err == nil && !done {
					t.Fatalf("step %d: it is not discarded, and there is no error", n)
				}
				if captured, err := s.Capture(t.Context(), e.Record, nil); captured || err != nil {
					t.Fatalf("step %d: it is captured again: %v, %v", n, captured, err)
				}
				if left.Load() > 0 { // it was not killed
					if n < 5 {
						t.Errorf("it took %d requests only: this tests nothing", n)
					}
					break
				}
				// The server may get the last request only now.
				if err := s.Change(t.Context(), e, dlq.Change{Kind: dlq.ChangeDiscarded}, nil); err != nil && !errors.Is(err, dlq.ErrEntryChanged) {
					t.Fatalf("step %d: discard it after all: %v", n, err)
				}
				if !b.letter(t, s, e) {
					t.Fatalf("step %d: it is not discarded", n)
				}
				b.stuff(t)
				next := all[most+n]
				change(t, s, next, dlq.Change{Kind: dlq.ChangeDiscarded})
				if diff := cmp.Diff(want, b.info(t, "DLQ").Config); diff != "" || !b.letter(t, s, next) {
					t.Fatalf("step %d: the next has not put the stream right (-want +got):\n%s", n, diff)
				}
				b.stuff(t)
			}
		})
	}
}

// TestChange_discardFromFull_whileCaptured has captures take all the room there is
// while two discard: no entry vanishes, none can be captured again, nothing that
// was captured is lost, and all get discarded.
func TestChange_discardFromFull_whileCaptured(t *testing.T) {
	t.Parallel()
	const letters, capturers = 40, 8
	b := setup(t)
	s := b.provisioned(t, dlq.Config{})
	all := b.entries(t, s, letters, 1000)
	// A limit is raised by a part of what is there, and on a busy machine captures take
	// more of what is made than discards need.
	for i := range uint64(3) {
		ballast := record(1<<40 + i)
		ballast.Data = noise(i+1, 900<<10)
		capture(t, s, ballast)
	}
	want := b.full(t, 10, nil)

	ctx, cancel := context.WithTimeout(t.Context(), bridgePatience)
	defer cancel()
	var captures sync.WaitGroup
	stop := make(chan struct{})
	stored := make([]map[uint64]bool, capturers)
	for i := range stored {
		nc, js := b.connect(t)
		store, err := dlq.NewStore(nc, js, dlq.Config{})
		if err != nil {
			t.Fatal(err)
		}
		stored[i] = make(map[uint64]bool)
		captures.Go(func() {
			for seq := uint64(i+1) << 20; ; seq++ {
				select {
				case <-stop:
					return
				default:
				}
				r := record(seq)
				r.Data = noise(seq, int(seq%5)*200) // sometimes less than a trace
				if captured, err := store.Capture(ctx, r, nil); captured && err == nil {
					stored[i][seq] = true
				} else if !dlq.IsFull(err) {
					t.Errorf("capture: %v, %v", captured, err)
					return
				}
				e := all[seq%letters]
				if captured, err := store.Capture(ctx, record(e.StreamSequence), nil); captured || err != nil {
					t.Errorf("dead letter %s is captured again: %v, %v", e.ID, captured, err)
					return
				}
			}
		})
	}
	var discards sync.WaitGroup
	for half := range 2 {
		nc, js := b.connect(t)
		store, err := dlq.NewStore(nc, js, dlq.Config{})
		if err != nil {
			t.Fatal(err)
		}
		discards.Go(func() {
			again := time.NewTicker(time.Millisecond)
			defer again.Stop()
			for i, tries := half, 0; i < letters; tries++ {
				err := store.Change(ctx, all[i], dlq.Change{Kind: dlq.ChangeDiscarded}, nil)
				switch {
				case err == nil:
					i += 2
				case !errors.Is(err, dlq.ErrStreamFull), tries == 10*letters, ctx.Err() != nil:
					t.Errorf("discard: %v", err)
					return
				}
				<-again.C
			}
		})
	}
	discards.Wait()
	close(stop)
	captures.Wait()

	for _, e := range all {
		if !b.letter(t, s, e) {
			t.Errorf("dead letter %s is not discarded", e.ID)
		}
	}
	n := 0
	for _, seqs := range stored {
		for seq := range seqs {
			n++
			b.letter(t, s, &dlq.Entry{Record: record(seq)})
		}
	}
	if n == 0 {
		t.Error("nothing was captured: this tests nothing")
	}
	info := b.info(t, "DLQ")
	t.Logf("%d captured; the stream has %d bytes more than its limit of %d", n, int64(info.State.Bytes)-info.Config.MaxBytes, info.Config.MaxBytes)
	if diff := cmp.Diff(want, info.Config); diff != "" {
		t.Errorf("the stream is not as before (-want +got):\n%s", diff)
	}
}
