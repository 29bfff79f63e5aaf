package dlq

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestParseMark(t *testing.T) {
	t.Parallel()
	for give, want := range map[string]int{
		"": 0, "0": 0, "3": 3, "-1": 0, "+3": 0, "3\n": 0, "x": 0, "1073741824": 1 << 30, "4294967295": 1 << 30, "4294967296": 0,
		"9223372036854775807": 0, "1e3": 0, "0x3": 0,
	} {
		if got := parseMark([]byte(give)); got != want {
			t.Errorf("parseMark(%q) = %d, want %d", give, got, want)
		}
	}
}

func FuzzParseMark(f *testing.F) {
	f.Add([]byte("3"))
	f.Add([]byte("2147483647"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if n := parseMark(data); n < 0 || n+1 < 0 || int32(n+1) < 0 {
			t.Errorf("parseMark(%q) = %d", data, n)
		}
	})
}

func FuzzDecodeHandedBack(f *testing.F) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	good, err := json.Marshal(&handedBack{created, [][3]uint64{{1, 2, 3}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"stream_created":"2026-01-02T03:04:05.000000006Z","handed_back":[[1],[1,2,3,4],null]}`))
	f.Add([]byte(`{"handed_back":[[-1]]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if n := len(decodeHandedBack(data, created)); n > handedBackMost {
			t.Errorf("%d deliveries", n)
		}
	})
}

func FuzzRaiseOf(f *testing.F) {
	f.Add(`{"from":{"max_bytes":1},"to":{"max_bytes":2}}`, int64(2), int64(-1))
	f.Add("null", int64(0), int64(0))
	f.Fuzz(func(t *testing.T, text string, bytes, msgs int64) {
		now := limits{MaxBytes: bytes, MaxMsgs: msgs}
		r := raiseOf(map[string]string{keyRaised: text})
		was := r.before(now)
		if r == nil && was != now {
			t.Errorf("%q makes %+v of %+v", text, was, now)
		}
	})
}

type advisoryMsg struct {
	jetstream.Msg

	subject string
	data    []byte
}

var advisoryTime = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

func (m advisoryMsg) Subject() string { return m.subject }
func (m advisoryMsg) Data() []byte    { return m.data }
func (m advisoryMsg) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Timestamp: advisoryTime}, nil
}

func FuzzReadAdvisory(f *testing.F) {
	f.Add(exhaustedSubjects+"S.c", []byte(`{"stream":"S","consumer":"c","stream_seq":1,"timestamp":"2026-01-02T03:04:05Z"}`))
	f.Add(terminatedSubjects+"S.c", []byte(`{"stream":"S","consumer":"c","stream_seq":1,"reason":"x","deliveries":18446744073709551615}`))
	f.Add("a.b", []byte(`{"stream":"a","consumer":"b","stream_seq":1}`))
	f.Add(exhaustedSubjects+"*.>", []byte(`{"stream":"*","consumer":">","stream_seq":1}`))
	f.Fuzz(func(t *testing.T, subject string, data []byte) {
		a, err := readAdvisory(advisoryMsg{subject: subject, data: data})
		if err != nil {
			return
		}
		if a.StreamSeq == 0 || a.Time.IsZero() || a.Time.After(advisoryTime) || strings.ContainsAny(a.Stream+a.Consumer, " .*>") || a.Stream == "" || a.Consumer == "" {
			t.Errorf("%q, %q is read as %+v", subject, data, a)
		}
	})
}

// What is in the bucket of the open dead letters may be anybody's.
func FuzzDecodeTally(f *testing.F) {
	f.Add([]byte(`{"counts":[{"consumer":"c"}],"entries":"AAAAAAAAAAEAAAABAAA="}`))
	f.Add([]byte(`{"counts":null,"entries":"AAAAAAAAAAEAAAAB//8="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c := &tallied{}
		if json.Unmarshal(data, c) != nil {
			return
		}
		tally := &Tally{limits: defaultTallyLimits()}
		fold := tally.decode(c)
		for h, e := range fold.entries {
			if int(e.consumer) >= len(fold.names) {
				t.Errorf("entry %x is of consumer %d of %d", h, e.consumer, len(fold.names))
			}
		}
		_ = c.counts()
	})
}
