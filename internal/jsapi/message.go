package jsapi

import (
	"context"
	"errors"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// A Message is a message as its stream's leader has it.
type Message struct {
	Subject  string    `json:"subject"`
	Sequence uint64    `json:"seq"`
	Headers  []byte    `json:"hdrs"`
	Data     []byte    `json:"data"`
	Time     time.Time `json:"time"`
}

// Header decodes the headers. It fails for some that the server takes and clients cannot
// read.
func (m *Message) Header() (nats.Header, error) {
	if len(m.Headers) == 0 {
		return nil, nil //nolint:nilnil // it has none
	}
	return nats.DecodeHeadersMsg(m.Headers)
}

// Get returns the message with a sequence, or nil. A replica, which may answer to other
// ways of asking, may not have it yet, or still have what was acknowledged.
func (c *Client) Get(ctx context.Context, stream string, sequence uint64) (*Message, error) {
	type request struct {
		Sequence uint64 `json:"seq"`
	}
	return c.get(ctx, stream, request{sequence})
}

// Next returns the first message of a subject from a sequence on, or nil.
func (c *Client) Next(ctx context.Context, stream, subject string, from uint64) (*Message, error) {
	type request struct {
		Sequence uint64 `json:"seq"`
		Subject  string `json:"next_by_subj"`
	}
	return c.get(ctx, stream, request{from, subject})
}

// Last returns the last message of a subject, or nil.
func (c *Client) Last(ctx context.Context, stream, subject string) (*Message, error) {
	type request struct {
		Subject string `json:"last_by_subj"`
	}
	return c.get(ctx, stream, request{subject})
}

var errNoMessage = errors.New("the server's answer has no message")

func (c *Client) get(ctx context.Context, stream string, request any) (*Message, error) {
	var resp struct {
		Message *Message `json:"message"`
	}
	err := c.Request(ctx, OpMessageGet, stream, request, &resp)
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		return nil, nil //nolint:nilnil // there is none, which is no error
	case err == nil && resp.Message == nil:
		return nil, errNoMessage
	}
	return resp.Message, err
}

// Delete deletes a message without overwriting it on the disk.
func (c *Client) Delete(ctx context.Context, stream string, sequence uint64) error {
	type request struct {
		Sequence uint64 `json:"seq"`
		NoErase  bool   `json:"no_erase"`
	}
	var resp None
	return c.Request(ctx, OpMessageDelete, stream, request{Sequence: sequence, NoErase: true}, &resp)
}
