package jsapi_test

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/mono/monotest"
)

func connect(t *testing.T) (*nats.Conn, jetstream.JetStream) {
	t.Helper()
	nc := monotest.Server(t).Conn()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	return nc, js
}

func TestClient_subject(t *testing.T) {
	t.Parallel()
	nc, js := connect(t)
	domain, err := jetstream.NewWithDomain(nc, "hub")
	if err != nil {
		t.Fatal(err)
	}
	prefix, err := jetstream.NewWithAPIPrefix(nc, "from.hub")
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		js   jetstream.JetStream
		want string
	}{
		{js, "$JS.API.STREAM.INFO.S"},
		{domain, "$JS.hub.API.STREAM.INFO.S"},
		{prefix, "from.hub.STREAM.INFO.S"},
	} {
		if got := jsapi.New(nc, tt.js, 0).Subject(jsapi.OpStreamInfo, "S"); got != tt.want {
			t.Errorf("the subject is %q, want %q", got, tt.want)
		}
	}
}

func TestClient_messages(t *testing.T) {
	t.Parallel()
	nc, js := connect(t)
	ctx := t.Context()
	for _, timeout := range []time.Duration{0, monotest.Timeout} {
		name := fmt.Sprintf("S%d", timeout)
		if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: name, Subjects: []string{name + ".>"}}); err != nil {
			t.Fatal(err)
		}
		for i, subject := range []string{"a", "b", "a"} {
			m := &nats.Msg{Subject: name + "." + subject, Data: []byte{byte(i)}, Header: nats.Header{"N": {fmt.Sprint(i)}}}
			if _, err := js.PublishMsg(ctx, m); err != nil {
				t.Fatal(err)
			}
		}
		c := jsapi.New(nc, js, timeout)
		check := func(what string, m *jsapi.Message, err error, want uint64) {
			t.Helper()
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if m == nil {
				m = &jsapi.Message{}
			}
			h, err := m.Header()
			if m.Sequence != want || want != 0 && (h.Get("N") != fmt.Sprint(want-1) || int(m.Data[0]) != int(want-1)) || err != nil {
				t.Errorf("%s: message %d with headers %v, %v, want %d", what, m.Sequence, h, err, want)
			}
		}
		m, err := c.Get(ctx, name, 2)
		check("get", m, err, 2)
		m, err = c.Get(ctx, name, 9)
		check("get a message that is gone", m, err, 0)
		m, err = c.Next(ctx, name, name+".a", 2)
		check("next", m, err, 3)
		m, err = c.Next(ctx, name, name+".b", 3)
		check("next of none", m, err, 0)
		m, err = c.Last(ctx, name, name+".b")
		check("last", m, err, 2)
		m, err = c.Last(ctx, name, name+".c")
		check("last of none", m, err, 0)
		var subjects []string
		err = c.Subjects(ctx, name, name+".*", func(s string, n uint64, total int) { subjects = append(subjects, fmt.Sprint(s, " ", n, " of ", total)) })
		slices.Sort(subjects)
		if want := []string{name + ".a 2 of 2", name + ".b 1 of 2"}; err != nil || !slices.Equal(subjects, want) {
			t.Errorf("subjects %q, %v, want %q", subjects, err, want)
		}
		if err := c.Delete(ctx, name, 2); err != nil {
			t.Error(err)
		}
		if err := c.Delete(ctx, name, 2); !jsapi.IsGone(err) {
			t.Errorf("to delete again: %v, want that it is gone", err)
		}
		if _, err := c.Get(ctx, "NONE", 1); !jsapi.Is(err, jetstream.JSErrCodeStreamNotFound) {
			t.Errorf("of a stream that does not exist: %v", err)
		}
	}
}

func TestErrors(t *testing.T) {
	t.Parallel()
	api := func(code jetstream.ErrorCode, text string) error {
		return fmt.Errorf("publish: %w", &jetstream.APIError{Code: 400, ErrorCode: code, Description: text})
	}
	for _, tt := range []struct {
		err                error
		full, noRoom, gone bool
	}{
		{err: nil},
		{err: errors.New("no message found")},
		{err: api(10077, "maximum messages exceeded"), full: true},
		{err: api(10023, "insufficient resources"), full: true},
		{err: api(10002, "resource limits exceeded for account"), full: true},
		{err: api(10047, "insufficient storage resources available"), full: true, noRoom: true},
		{err: api(10005, "no suitable peers for placement"), noRoom: true},
		{err: api(10043, "sequence 7 not found"), gone: true},
		{err: api(10057, "no message found"), gone: true},
		{err: api(10057, "message delete not permitted")},
		{err: api(10071, "wrong last sequence: 3")},
	} {
		if full, noRoom, gone := jsapi.IsFull(tt.err), jsapi.NoRoom(tt.err), jsapi.IsGone(tt.err); full != tt.full || noRoom != tt.noRoom || gone != tt.gone {
			t.Errorf("%v: full %v, no room %v, gone %v, want %v, %v, %v", tt.err, full, noRoom, gone, tt.full, tt.noRoom, tt.gone)
		}
	}
}
