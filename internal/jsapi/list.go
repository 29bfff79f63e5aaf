package jsapi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/nats-io/nats.go/jetstream"
)

// Stream asks for a stream.
func (c *Client) Stream(ctx context.Context, name string) (info *jetstream.StreamInfo, err error) {
	err = c.Permitted(ctx, OpStreamInfo, name, func(ctx context.Context, _ string) error {
		stream, err := c.js.Stream(ctx, name)
		if err == nil {
			info = stream.CachedInfo()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("stream %q: %w", name, err)
	}
	return info, nil
}

type page struct {
	Offset int `json:"offset"`
}

// StreamNames lists the streams of the account.
func (c *Client) StreamNames(ctx context.Context) ([]string, error) {
	var names []string
	for {
		var resp struct {
			Total   int      `json:"total"`
			Streams []string `json:"streams"`
		}
		if err := c.Request(ctx, OpStreamNames, "", page{Offset: len(names)}, &resp); err != nil {
			return nil, err
		}
		names = append(names, resp.Streams...)
		if len(resp.Streams) == 0 || len(names) >= resp.Total {
			return names, nil
		}
	}
}

// Subjects calls f for the subjects of a stream that match a filter, with how many
// messages each has, and with how many subjects there are in all. It takes a request for
// each 100 000.
func (c *Client) Subjects(ctx context.Context, stream, filter string, f func(subject string, msgs uint64, total int)) error {
	type request struct {
		Filter string `json:"subjects_filter"`
		Offset int    `json:"offset,omitempty"`
	}
	for offset := 0; ; {
		var resp struct {
			Total int `json:"total"`
			State struct {
				Subjects map[string]uint64 `json:"subjects"`
			} `json:"state"`
		}
		if err := c.Request(ctx, OpStreamInfo, stream, request{Filter: filter, Offset: offset}, &resp); err != nil {
			return err
		}
		for subject, msgs := range resp.State.Subjects {
			f(subject, msgs, resp.Total)
		}
		offset += len(resp.State.Subjects)
		if len(resp.State.Subjects) == 0 || offset >= resp.Total {
			return nil
		}
	}
}

// Consumer asks for a consumer, also for one that pushes.
func (c *Client) Consumer(ctx context.Context, stream, name string) (*jetstream.ConsumerInfo, error) {
	info := &jetstream.ConsumerInfo{}
	return info, c.Request(ctx, OpConsumerInfo, stream+"."+name, None{}, info)
}

// Consumers calls f for each consumer and bad for each that does not answer or
// cannot be read. It is jetstream's list, but for two things: that one asks for
// ever for what is missing, and gives up a page for one consumer.
func (c *Client) Consumers(ctx context.Context, stream string, f func(*jetstream.ConsumerInfo), bad func(string, error)) error {
	for offset := 0; ; {
		var resp struct {
			Total     int               `json:"total"`
			Limit     int               `json:"limit"`
			Consumers []json.RawMessage `json:"consumers"`
			Missing   []string          `json:"missing"`
			Offline   map[string]string `json:"offline"`
		}
		if err := c.Request(ctx, OpConsumerList, stream, page{Offset: offset}, &resp); err != nil {
			return err
		}
		for _, raw := range resp.Consumers {
			info := &jetstream.ConsumerInfo{}
			if err := json.Unmarshal(raw, info); err != nil {
				bad(info.Name, err)
				continue
			}
			f(info)
		}
		for _, name := range resp.Missing {
			if _, offline := resp.Offline[name]; !offline {
				bad(name, errors.New("its leader does not answer"))
			}
		}
		for name, reason := range resp.Offline {
			bad(name, fmt.Errorf("it is offline: %s", reason))
		}
		offset += max(resp.Limit, len(resp.Consumers)) // a page is of names, whether they answer or not
		if resp.Limit <= 0 && len(resp.Consumers) == 0 || offset >= resp.Total {
			return nil
		}
	}
}
