package dlq

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/internal/subjects"
	"github.com/monotel/monotel/telemetry/messaging"
)

// An advisory is what the server says of a message that was given up.
type advisory struct {
	Time        time.Time `json:"timestamp"`
	Stream      string    `json:"stream"`
	Consumer    string    `json:"consumer"`
	ConsumerSeq uint64    `json:"consumer_seq"` // only of a terminated message
	StreamSeq   uint64    `json:"stream_seq"`
	Deliveries  uint64    `json:"deliveries"`
	Reason      string    `json:"reason"` // only of a terminated message
	Domain      string    `json:"domain"`

	exhausted bool // it was not terminated
}

// readAdvisory refuses what no server sends: clients may publish these subjects, too.
func readAdvisory(m jetstream.Msg) (*advisory, error) {
	a := &advisory{}
	if err := json.Unmarshal(m.Data(), a); err != nil {
		return nil, err
	}
	names, exhausted := strings.CutPrefix(m.Subject(), exhaustedSubjects)
	if !exhausted {
		names = strings.TrimPrefix(m.Subject(), terminatedSubjects)
	}
	a.exhausted = exhausted
	if names != a.Stream+"."+a.Consumer || strings.Count(names, ".") != 1 || strings.ContainsAny(names, " \t\r\n*>/\\") ||
		a.Stream == "" || a.Consumer == "" {
		return nil, errors.New("its stream and consumer are not those of its subject")
	}
	if a.StreamSeq == 0 {
		return nil, errors.New("it names no message")
	}
	meta, err := m.Metadata()
	if err != nil {
		return nil, err
	}
	if a.Time.IsZero() || a.Time.After(meta.Timestamp) { // what has not happened yet would be waited for
		a.Time = meta.Timestamp
	}
	return a, nil
}

// isBucket reports whether a stream holds a key-value or object bucket. What was
// deleted there, or is secret, has no place in a dead letter.
func isBucket(stream string) bool {
	return strings.HasPrefix(stream, "KV_") || strings.HasPrefix(stream, "OBJ_")
}

func isBucketSubject(subject string) bool {
	return strings.HasPrefix(subject, "$KV.") || strings.HasPrefix(subject, "$O.")
}

// copiesBucket reports whether a stream has another name and a bucket's messages.
func copiesBucket(cfg *jetstream.StreamConfig) bool {
	return cfg.Mirror != nil && isBucket(cfg.Mirror.Name) ||
		slices.ContainsFunc(cfg.Sources, func(s *jetstream.StreamSource) bool { return isBucket(s.Name) }) ||
		slices.ContainsFunc(cfg.Subjects, isBucketSubject)
}

// fits reports whether the numbers of an advisory can be those of its consumer.
func (a *advisory) fits(c *jetstream.ConsumerInfo) bool {
	limit := uint64(max(c.Config.MaxDeliver, 0))
	switch {
	case c.Config.AckPolicy == jetstream.AckNonePolicy, a.Deliveries > c.Delivered.Consumer:
		return false
	case a.exhausted:
		return limit > 0 && a.Deliveries >= limit
	}
	return a.ConsumerSeq > 0 && a.ConsumerSeq <= c.Delivered.Consumer && (limit == 0 || a.Deliveries <= limit)
}

// isFor reports whether a consumer gets the messages of a subject.
func isFor(cfg *jetstream.ConsumerConfig, subject string) bool {
	filters := cfg.FilterSubjects
	if cfg.FilterSubject != "" {
		filters = append(slices.Clone(filters), cfg.FilterSubject)
	}
	return len(filters) == 0 || slices.ContainsFunc(filters, func(f string) bool { return subjects.Covers(f, subject) })
}

// record describes the message, which is nil if it is gone.
func (a *advisory) record(info *jetstream.StreamInfo, msg *jsapi.Message, reason Reason) *Record {
	r := &Record{
		ID:               ID(a.Stream, info.Created, a.Consumer, a.StreamSeq),
		Reason:           reason,
		ReasonText:       a.Reason,
		Stream:           a.Stream,
		StreamCreated:    info.Created,
		StreamSequence:   a.StreamSeq,
		Consumer:         a.Consumer,
		ConsumerSequence: a.ConsumerSeq,
		Deliveries:       a.Deliveries,
		Failed:           a.Time,
	}
	if msg == nil {
		r.Body = BodyGone
		return r
	}
	r.Subject, r.Data, r.Stored = msg.Subject, msg.Data, msg.Time
	r.Header, r.Error = headerOf(msg)
	r.OriginTraceparent = messaging.Carrier(r.Header).Get("traceparent")
	return r
}

// ackSubject is the reply subject of the message's last delivery as far as it counts.
// A consumer sequence of 0 only removes what the server keeps of redeliveries.
func (a *advisory) ackSubject() string {
	return fmt.Sprintf("$JS.ACK.%s.%s.%d.%d.0.0.0", a.Stream, a.Consumer, max(a.Deliveries, 1), a.StreamSeq)
}

// headerOf returns the headers, and what is wrong with them: the server takes what
// clients cannot read.
func headerOf(m *jsapi.Message) (h nats.Header, problem string) {
	h, err := m.Header()
	if err != nil {
		return nil, fmt.Sprintf("the message's headers cannot be read: %v", err)
	}
	return h, ""
}
