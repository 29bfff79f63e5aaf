// Package jsapi makes the requests to the JetStream API that package jetstream does not
// offer: messages from the leader of their stream only, push consumers like any other,
// lists that go on after a consumer that is missing, and refusals that name what the user
// may not do.
package jsapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// What is asked. A name follows, but for the first.
const (
	OpStreamNames   = "STREAM.NAMES"
	OpStreamInfo    = "STREAM.INFO."
	OpStreamCreate  = "STREAM.CREATE."
	OpStreamUpdate  = "STREAM.UPDATE."
	OpStreamPurge   = "STREAM.PURGE."
	OpConsumerList  = "CONSUMER.LIST."
	OpConsumerInfo  = "CONSUMER.INFO."
	OpMessageGet    = "STREAM.MSG.GET."
	OpMessageDelete = "STREAM.MSG.DELETE."
	OpDirectGet     = "DIRECT.GET."
)

// A Client makes requests on a connection. Its prefix is that of the JetStream.
type Client struct {
	nc *nats.Conn
	js jetstream.JetStream

	// Timeout bounds each request, so that a stream without a leader, which never
	// answers, leaves time for others. If it is 0 the caller's context does alone, and a
	// request that the user may not make is not told from one without an answer.
	Timeout time.Duration
}

// New returns a client.
func New(nc *nats.Conn, js jetstream.JetStream, timeout time.Duration) *Client {
	return &Client{nc: nc, js: js, Timeout: timeout}
}

// Subject is where the server is asked for something.
func (c *Client) Subject(op, name string) string {
	prefix := jetstream.DefaultAPIPrefix
	switch opts := c.js.Options(); {
	case opts.Domain != "":
		prefix = "$JS." + opts.Domain + ".API."
	case opts.APIPrefix != "":
		prefix = strings.TrimSuffix(opts.APIPrefix, ".") + "."
	}
	return prefix + op + name
}

// A RefusedError reports a request that this user may not make.
type RefusedError struct {
	Op      string // the beginning of the subject, after the prefix
	Subject string
}

func (e *RefusedError) Error() string { return "no permission to publish to " + e.Subject }

// violation is what the server has refused last on the connection, or nil.
func (c *Client) violation() error {
	if err := c.nc.LastError(); errors.Is(err, nats.ErrPermissionViolation) {
		return err
	}
	return nil
}

// Permitted makes a request within the Timeout. That it is refused, the server says beside
// it, to the connection: the request itself would only time out. Then the error is a
// [RefusedError]. If others on the connection are refused at the same moment, it may still
// time out.
func (c *Client) Permitted(ctx context.Context, op, name string, request func(ctx context.Context, subject string) error) error {
	const look = 10 * time.Millisecond
	subject := c.Subject(op, name)
	if c.Timeout == 0 {
		return request(ctx, subject)
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	before := c.violation()
	refused := func() bool {
		now := c.violation()
		another := now != nil && now != before //nolint:errorlint // is it this very refusal?
		return another && strings.Contains(now.Error(), fmt.Sprintf("Publish to %q", subject))
	}
	var looking sync.WaitGroup
	looking.Go(func() {
		t := time.NewTicker(look)
		defer t.Stop()
		for !refused() {
			select {
			case <-ctx.Done():
				return
			case <-t.C:
			}
		}
		cancel()
	})
	err := request(ctx, subject)
	cancel()
	looking.Wait()
	if err != nil && refused() {
		return &RefusedError{Op: op, Subject: subject}
	}
	return err
}

// None is an empty request or answer.
type None struct{}

// Request asks for something and reads the answer into resp. An answer that is an error is
// a jetstream.APIError.
func (c *Client) Request(ctx context.Context, op, name string, req, resp any) error {
	data, err := json.Marshal(req)
	if err != nil {
		return err
	}
	var msg *nats.Msg
	err = c.Permitted(ctx, op, name, func(ctx context.Context, subject string) error {
		msg, err = c.nc.RequestWithContext(ctx, subject, data)
		return err
	})
	if err != nil {
		return err
	}
	var failed struct {
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(msg.Data, &failed); err != nil {
		return fmt.Errorf("answer to %s: %w", c.Subject(op, name), err)
	}
	if failed.Error != nil {
		return failed.Error
	}
	if err := json.Unmarshal(msg.Data, resp); err != nil {
		return fmt.Errorf("answer to %s: %w", c.Subject(op, name), err)
	}
	return nil
}
