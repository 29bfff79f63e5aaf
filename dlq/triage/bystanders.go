package triage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/subjects"
)

const (
	listWait = 5 * time.Second // a cluster takes 4 s to find out who does not answer
	maxPages = 4               // of 256 consumers or streams
)

// Bystanders are who gets replayed messages although they are for another
// consumer: a replay goes through the failed consumer's own stream.
type bystanders struct {
	targets  map[string][]PlanConsumer // by their stream
	warnings []string
	unasked  error // why the server is asked no more
}

// target adds a consumer that is to get messages.
func (b *bystanders) target(c *PlanConsumer) {
	if b.targets == nil {
		b.targets = make(map[string][]PlanConsumer)
	}
	b.targets[c.Stream] = append(b.targets[c.Stream], *c)
}

// find returns warnings of them. What cannot be found out, such as for want of a
// permission, is one of the warnings. It asks for a list of the consumers of each
// stream, and for one of the streams.
func (b *bystanders) find(ctx context.Context, d *Desk) ([]string, error) {
	streams := make([]string, 0, len(b.targets))
	for stream := range b.targets {
		streams = append(streams, stream)
	}
	slices.Sort(streams)
	for _, stream := range streams {
		b.consumers(ctx, d, stream)
	}
	if len(streams) > 0 {
		b.copies(ctx, d)
	}
	if ctx.Err() != nil {
		return nil, fmt.Errorf("look who else gets what is replayed: %w", context.Cause(ctx))
	}
	return b.warnings, nil
}

func (b *bystanders) warn(format string, args ...any) {
	b.warnings = append(b.warnings, fmt.Sprintf(format, args...))
}

// consumers looks at those of a stream.
func (b *bystanders) consumers(ctx context.Context, d *Desk, stream string) {
	n := 0
	total, left, err := b.list(ctx, d, "CONSUMER.LIST."+stream, func(p *listPage) {
		for i := range p.Consumers {
			c := &p.Consumers[i]
			if why, gets := b.getsToo(stream, c); gets {
				n++
				if n <= samples {
					b.warn("consumer %q of stream %q has %s, so it gets the replayed messages, too: give it the subjects that it is for as its filters",
						c.Name, stream, why)
				}
			}
		}
	})
	if n > samples {
		b.warn("%d more consumers of stream %q get the replayed messages, too", n-samples, stream)
	}
	switch {
	case err != nil:
		b.warn("the consumers of stream %q cannot be listed, so it is not known whether others get the replayed messages, too: %v", stream, err)
	case left > 0:
		b.warn("%d of the %d consumers of stream %q were not looked at, and may get the replayed messages, too", left, total, stream)
	}
}

// getsToo reports whether a consumer gets what is for another one of its stream,
// and why.
func (b *bystanders) getsToo(stream string, c *listedConsumer) (why string, gets bool) {
	filters := c.Config.FilterSubjects
	if c.Config.FilterSubject != "" {
		filters = []string{c.Config.FilterSubject}
	}
	for i := range b.targets[stream] {
		t := &b.targets[stream][i]
		if t.Consumer == c.Name || dlq.ReplayConsumer(t.Consumer) == c.Name {
			continue
		}
		if len(filters) == 0 {
			return "no filter", true
		}
		for _, f := range filters {
			if subjects.Overlap(f, dlq.ReplaySubjects(stream, t.Consumer)) {
				return fmt.Sprintf("filter %q", f), true
			}
		}
	}
	return "", false
}

// copies looks for streams that have all of another one, and consumers of their
// own.
func (b *bystanders) copies(ctx context.Context, d *Desk) {
	n := 0
	total, left, err := b.list(ctx, d, "STREAM.LIST", func(p *listPage) {
		for i := range p.Streams {
			s := &p.Streams[i]
			if s.State.Consumers == 0 {
				continue
			}
			if from, gets := b.copiesFrom(s); gets {
				n++
				if n <= samples {
					b.warn("stream %q copies what stream %q has, also the replayed messages, so its consumers may get them, too: give the copy a filter",
						s.Config.Name, from)
				}
			}
		}
	})
	if n > samples {
		b.warn("%d more streams copy the replayed messages", n-samples)
	}
	switch {
	case err != nil:
		b.warn("the streams cannot be listed, so it is not known whether one copies the replayed messages: %v", err)
	case left > 0:
		b.warn("%d of the %d streams were not looked at, and may copy the replayed messages", left, total)
	}
}

// copiesFrom returns a stream whose replayed messages a stream copies.
func (b *bystanders) copiesFrom(s *listedStream) (from string, gets bool) {
	sources := s.Config.Sources
	if s.Config.Mirror != nil {
		sources = []*jetstream.StreamSource{s.Config.Mirror}
	}
	for _, source := range sources {
		if source.External != nil || source.Domain != "" { // a stream of that name elsewhere
			continue
		}
		filters := make([]string, 0, max(len(source.SubjectTransforms), 1))
		for _, t := range source.SubjectTransforms {
			filters = append(filters, t.Source)
		}
		if len(filters) == 0 {
			filters = []string{cmp.Or(source.FilterSubject, ">")}
		}
		for i := range b.targets[source.Name] {
			replays := dlq.ReplaySubjects(source.Name, b.targets[source.Name][i].Consumer)
			if slices.ContainsFunc(filters, func(f string) bool { return subjects.Overlap(f, replays) }) {
				return source.Name, true
			}
		}
	}
	return "", false
}

// A listPage is a part of the server's list of consumers or of streams, as far as
// we look at it.
type listPage struct {
	Error     *jetstream.APIError `json:"error"`
	Total     int                 `json:"total"`
	Limit     int                 `json:"limit"`
	Consumers []listedConsumer    `json:"consumers"`
	Streams   []listedStream      `json:"streams"`
	Missing   []string            `json:"missing"` // whose leader does not answer
}

type listedConsumer struct {
	Name   string `json:"name"`
	Config struct {
		FilterSubject  string   `json:"filter_subject"`
		FilterSubjects []string `json:"filter_subjects"`
	} `json:"config"`
}

type listedStream struct {
	Config struct {
		Name    string                    `json:"name"`
		Mirror  *jetstream.StreamSource   `json:"mirror"`
		Sources []*jetstream.StreamSource `json:"sources"`
	} `json:"config"`
	State struct {
		Consumers int `json:"consumer_count"`
	} `json:"state"`
}

// list calls f for the first pages of a list. It returns how long the list is, and
// how many of it f has not seen.
func (b *bystanders) list(ctx context.Context, d *Desk, subject string, f func(*listPage)) (total, left int, err error) {
	if b.unasked != nil { // it would take as long again
		return 0, 0, b.unasked
	}
	missing := 0
	for offset, pages := 0, 0; ; {
		page, err := listOf(ctx, d, subject, offset)
		if errors.Is(err, errNoAnswer) {
			b.unasked = err
		}
		if err != nil {
			return 0, 0, err
		}
		if page.Error != nil {
			return 0, 0, page.Error
		}
		f(page)
		missing += len(page.Missing)
		seen := max(page.Limit, len(page.Consumers)+len(page.Streams)) // a page is of names, whether they answer or not
		offset += seen
		pages++
		if pages == maxPages || offset >= page.Total || seen == 0 {
			return page.Total, max(page.Total-offset, 0) + missing, nil
		}
	}
}

// listOf asks for a page. If there is no permission to, it finds that out itself:
// the server tells the connection, and answers no request.
func listOf(ctx context.Context, d *Desk, subject string, offset int) (*listPage, error) {
	const again = 100 * time.Millisecond
	subject = d.api.Subject(subject, "")
	answers, err := d.nc.SubscribeSync(d.nc.NewInbox())
	if err != nil {
		return nil, err
	}
	defer func() { _ = answers.Unsubscribe() }()
	if err := d.nc.PublishRequest(subject, answers.Subject, fmt.Appendf(nil, `{"offset":%d}`, offset)); err != nil {
		return nil, err
	}
	for begin := time.Now(); ; {
		m, err := answers.NextMsg(again)
		switch {
		case err == nil:
			page := &listPage{}
			if err := json.Unmarshal(m.Data, page); err != nil {
				return nil, fmt.Errorf("answer to %s: %w", subject, err)
			}
			return page, nil
		case ctx.Err() != nil:
			return nil, context.Cause(ctx)
		case !errors.Is(err, nats.ErrTimeout):
			return nil, err
		}
		if err := d.nc.LastError(); errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), `"`+subject+`"`) {
			return nil, fmt.Errorf("%w to publish to %s", errNoPermission, subject)
		}
		if time.Since(begin) > listWait {
			return nil, fmt.Errorf("%w to %s within %v", errNoAnswer, subject, listWait)
		}
	}
}

var (
	errNoPermission = errors.New("no permission")
	errNoAnswer     = errors.New("no answer")
)
