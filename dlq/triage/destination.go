package triage

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/subjects"
)

// A record says where its message came from, and a user that may publish on the subject
// of one dead letter can write a record. So a replay sends nowhere that a record alone
// has named.

// refusedPrefixes begin subjects that are not sent to: what is sent there is a request
// to the server, an answer that somebody waits for, or ours.
var refusedPrefixes = []string{"$", nats.InboxPrefix, "monotel."}

const (
	longestSubject = 1024 // bytes
	longestName    = 255  // of a stream or consumer, as the server has it

	notStored  = "no stream stores its original subject"
	notOfIts   = "its original subject is of another stream than its own, and its own does not source from that"
	streamGone = "its stream is gone, so it is not known whether its original subject was of it"
)

// subjectProblem says why nothing is replayed to a subject, or "".
func subjectProblem(subject string) string {
	switch {
	case subject == "":
		return "it is empty"
	case len(subject) > longestSubject:
		return fmt.Sprintf("it is longer than %d bytes", longestSubject)
	case !isSubject(subject):
		return "want one without wildcards, spaces and empty tokens"
	}
	for _, p := range refusedPrefixes {
		if strings.HasPrefix(subject, p) {
			return fmt.Sprintf("nothing is replayed to subjects that begin with %q", p)
		}
	}
	return ""
}

// subjectProblem adds to [subjectProblem] what is special for this connection.
func (d *Desk) subjectProblem(subject string) string {
	if why := subjectProblem(subject); why != "" {
		return why
	}
	for _, p := range []string{d.api.Subject("", ""), strings.TrimSuffix(d.nc.Opts.InboxPrefix, ".") + "."} {
		if p != "." && strings.HasPrefix(subject, p) {
			return fmt.Sprintf("nothing is replayed to subjects that begin with %q", p)
		}
	}
	return ""
}

// nameProblem says why a stream or consumer of that name is no target, or "". The
// server has no such name, or keeps buckets under it.
func nameProblem(stream, consumer string) string {
	for _, name := range []string{stream, consumer} {
		if name == "" || len(name) > longestName || !isSubject(name) || strings.ContainsAny(name, `./\`) {
			return "its stream or consumer has a name that the server does not allow"
		}
	}
	for _, p := range []string{"$", "KV_", "OBJ_"} {
		if strings.HasPrefix(stream, p) {
			return "its stream is a bucket or the server's own"
		}
	}
	return ""
}

// errMisplaced reports a record that is not on the subject of what it names: it is not
// where an App or this package would have stored it.
var errMisplaced = errors.New("its subject in the dead-letter stream is not that of its stream, consumer and ID, so it is not what it says")

// placed returns nil if a record is on the subject that it belongs on. Permissions are
// given by subject: somebody who may write dead letters of one consumer must not write
// those of another.
func (d *Desk) placed(r *dlq.Record, subject string) error {
	if d.store.SubjectOf(r) != subject || (&message{subject: subject}).id() != r.ID {
		return errMisplaced
	}
	return nil
}

// Owners finds out which streams store the original subjects of dead letters. Each
// stream is looked at once. It is safe for concurrent use.
type owners struct {
	d  *Desk
	mu sync.Mutex

	streams map[string]*jetstream.StreamConfig // nil: there is none
}

func newOwners(d *Desk) *owners {
	return &owners{d: d, streams: make(map[string]*jetstream.StreamConfig)}
}

// config is that of a stream, nil if there is none.
func (o *owners) config(ctx context.Context, name string) (*jetstream.StreamConfig, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if cfg, ok := o.streams[name]; ok {
		return cfg, nil
	}
	s, err := o.d.js.Stream(ctx, name)
	if err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, fmt.Errorf("look at stream %q: %w", name, err)
	}
	var cfg *jetstream.StreamConfig
	if err == nil {
		cfg = &s.CachedInfo().Config
	}
	o.streams[name] = cfg
	return cfg, nil
}

// of returns the stream that stores the original subject of a record: the record's own
// or one that it copies from. Otherwise it says why nothing is sent there.
func (o *owners) of(ctx context.Context, r *dlq.Record) (owner, why string, err error) {
	if why := o.d.subjectProblem(r.Subject); why != "" {
		return "", "its original subject cannot be replayed to: " + why, nil
	}
	if why := nameProblem(r.Stream, "-"); why != "" {
		return "", why, nil
	}
	cfg, err := o.config(ctx, r.Stream)
	switch {
	case err != nil:
		return "", "", err
	case cfg == nil:
		return "", streamGone, nil
	case stores(cfg, r.Subject):
		return r.Stream, "", nil
	}
	for _, s := range append(slices.Clone(cfg.Sources), cfg.Mirror) {
		if s == nil || s.External != nil || s.Domain != "" || nameProblem(s.Name, "-") != "" {
			continue
		}
		origin, err := o.config(ctx, s.Name)
		if err != nil {
			return "", "", err
		}
		if origin != nil && stores(origin, r.Subject) {
			return s.Name, "", nil
		}
	}
	// Only for the reason: it is not sent in either case.
	_, err = o.d.js.StreamNameBySubject(ctx, r.Subject)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return "", notStored, nil
	case err != nil && ctx.Err() != nil:
		return "", "", fmt.Errorf("look up the stream of subject %q: %w", r.Subject, err)
	}
	return "", notOfIts, nil
}

// stores reports whether a stream stores what is published on a subject. No two
// streams of an account do.
func stores(cfg *jetstream.StreamConfig, subject string) bool {
	return slices.ContainsFunc(cfg.Subjects, func(s string) bool { return subjects.Covers(s, subject) })
}

// ownerOf returns the stream that stores a subject which somebody has asked for.
// Otherwise it says why nothing is sent there.
func (d *Desk) ownerOf(ctx context.Context, subject string) (owner, why string, err error) {
	if why := d.subjectProblem(subject); why != "" {
		return "", fmt.Sprintf("target subject %q: %s", subject, why), nil
	}
	owner, err = d.js.StreamNameBySubject(ctx, subject)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return "", fmt.Sprintf("no stream stores subject %q, so what is sent there may be lost", subject), nil
	}
	if err != nil {
		return "", "", fmt.Errorf("look up the stream of subject %q: %w", subject, err)
	}
	return owner, "", nil
}
