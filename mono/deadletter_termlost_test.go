package mono_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// A lossyDialer loses the connection, once, instead of sending a term.
type lossyDialer struct{ lost atomic.Bool }

func (d *lossyDialer) Dial(network, address string) (net.Conn, error) {
	c, err := net.Dial(network, address) //nolint:noctx // to this machine
	return &lossyConn{Conn: c, d: d}, err
}

type lossyConn struct {
	net.Conn

	d *lossyDialer
}

func (c *lossyConn) Write(b []byte) (int, error) {
	if bytes.Contains(b, []byte("+TERM")) && c.d.lost.CompareAndSwap(false, true) {
		_ = c.Close()
		return 0, net.ErrClosed
	}
	return c.Conn.Write(b)
}

// What is captured has had its attempts, also when its term was lost: a handler
// that gets it again, and succeeds, would leave a dead letter of a message that
// was handled.
func TestDeadLetter_termLost(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "OrderPlaced")
	var calls atomic.Int32
	shop := emitter("shop", e)
	srv := monotest.Server(t)
	runApp(t, []mono.Option{mono.WithNATS(srv.URL(), nats.SetCustomDialer(&lossyDialer{}),
		nats.ReconnectWait(20*time.Millisecond), nats.ReconnectJitter(0, 0))},
		shop, durableModule("orders", e, mono.StreamConsumerConfig{
			Stream:   mono.StreamConfig{Name: "ORDERS", MaxBytes: 64 << 20},
			Consumer: mono.ConsumerConfig{Durable: "orders", AckWait: time.Second},
			AutoAck:  true,
		}, func(context.Context, []*mono.Msg) error {
			if calls.Add(1) == 1 {
				return mono.Permanent(errors.New("poison"))
			}
			return nil
		}))
	js := jetStreamOf(t, srv.Conn()) // what the App asks may be lost, too
	if _, err := js.Publish(within(t), e.Subject, []byte("1")); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		s, err := js.Stream(within(t), "DLQ")
		return err == nil && s.CachedInfo().State.Msgs == 1
	}, "the message is captured")
	eventually(t, func() bool {
		c, err := js.Consumer(within(t), "ORDERS", "orders")
		return err == nil && c.CachedInfo().NumPending == 0 && c.CachedInfo().NumAckPending == 0
	}, "it is settled")
	if n := calls.Load(); n != 1 {
		t.Errorf("the handler was called %d times: the message is handled, and a dead letter", n)
	}
}
