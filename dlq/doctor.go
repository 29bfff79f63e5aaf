package dlq

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
)

const (
	// Each request has a bound of its own, so that a stream without a leader,
	// which never answers, leaves time for the others.
	requestTimeout = 5 * time.Second

	// An acknowledged message leaves its stream a moment after its consumer's
	// numbers have changed; with replicas, after they have agreed on it.
	settleTime           = 250 * time.Millisecond
	settleTimeReplicated = time.Second

	// How often a busy consumer is looked at, in the hope of finding it quiet.
	looks = 4

	// How many messages are read, bodies included, to count what cannot be
	// counted otherwise.
	walkLimit      = 1000
	walkLimitBytes = 16 << 20
)

// Doctor looks at every stream and consumer of the account for what may lose
// messages or dead letters, or already has. It only reads. The findings are
// sorted: most severe first, then by stream, consumer and check.
//
// It takes a round trip or two for each stream, some more for each consumer that
// looks as if it had left messages behind, and up to a few seconds to look at all
// of these again.
// Zombies are counted exactly if their consumer is quiet meanwhile. Of one that
// never rests, those that are more than it has in flight are found.
//
// What cannot be read, or what this user may not ask for, is a finding of its own
// and hides nothing else, see [Finding.Incomplete]. When ctx ends, or the streams
// cannot be listed for another reason than a missing permission, Doctor returns an
// error and what it has found until then.
func (s *Store) Doctor(ctx context.Context) ([]Finding, error) {
	d := &doctor{s: s}
	err := d.run(ctx)
	slices.SortStableFunc(d.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(a.Severity.rank(), b.Severity.rank()), cmp.Compare(a.Stream, b.Stream),
			cmp.Compare(a.Consumer, b.Consumer), cmp.Compare(a.Check, b.Check), cmp.Compare(a.Detail, b.Detail))
	})
	if err != nil {
		return d.findings, fmt.Errorf("doctor: %w", err)
	}
	return d.findings, nil
}

// A doctor keeps what is found, and of streams and consumers only what has to be
// looked at again.
type doctor struct {
	s        *Store
	findings []Finding
	suspects []*suspect

	bridged    bool   // the bridge's stream is there
	finite     uint64 // consumers with a MaxDeliver
	replicas   int    // most of any stream with messages to lose
	replicated string // that stream
}

func (d *doctor) add(f Finding) { d.findings = append(d.findings, f) }

func (d *doctor) unreadable(stream, consumer string, err error) {
	if refused, ok := errors.AsType[*jsapi.RefusedError](err); ok {
		d.notPermitted(stream, consumer, refused)
		return
	}
	d.add(Finding{
		Severity: SeverityWarning, Check: checkUnreadable, Stream: stream, Consumer: consumer,
		Detail: fmt.Sprintf("it could not be read, so nothing is known of it: %v", err),
		Remedy: "See with `nats stream report` whether it has a leader, and run " + d.command("doctor") + " again.",
	})
}

func (d *doctor) notPermitted(stream, consumer string, refused *jsapi.RefusedError) {
	unchecked := map[string]string{
		jsapi.OpStreamNames: "which streams there are. Of all but the dead-letter stream and those that belong to it, nothing was checked",
		jsapi.OpStreamInfo:  "the stream's configuration, limits and state, nor its consumers",
		jsapi.OpConsumerList: "whether the stream's consumers are paused, give up messages (max_deliver, backoff), are stalled " +
			"(max_ack_pending) or have left messages behind (zombies)",
		jsapi.OpConsumerInfo: "whether the consumer is stalled (max_ack_pending) or has left messages behind (zombies)",
		jsapi.OpMessageGet:   "whether the consumer has left messages behind (zombies)",
	}[refused.Op]
	d.add(Finding{
		Severity: SeverityWarning, Check: checkNotPermitted, Stream: stream, Consumer: consumer,
		Detail: fmt.Sprintf("the server refused a request of this user on %s. Not checked: %s", refused.Subject, unchecked),
		Remedy: fmt.Sprintf("Allow the user to publish to %s, or run %s as another.", refused.Subject, d.command("doctor")),
	})
}

// unreadableOnce is for a stream that may have been in the list.
func (d *doctor) unreadableOnce(stream string, err error) {
	if !slices.ContainsFunc(d.findings, func(f Finding) bool { return f.Incomplete() && f.Stream == stream && f.Consumer == "" }) {
		d.unreadable(stream, "", err)
	}
}

func (d *doctor) run(ctx context.Context) error {
	d.serverVersion(d.s.nc.ConnectedServerVersion())
	if err := d.streams(ctx); err != nil {
		return err
	}
	d.deadLetterStream(ctx)
	d.objectStore(ctx)
	if !d.bridged && d.finite > 0 {
		d.add(Finding{
			Severity: SeverityWarning, Check: "advisory_stream_missing", Stream: AdvisoryStream, Count: d.finite,
			Detail: fmt.Sprintf("%d consumers have a MaxDeliver, and nothing stores the server's word that a message is given up", d.finite),
			Remedy: "Set External of dlq.Config, for WithDeadLetters, in one App: it then runs the advisory bridge, which makes this stream " +
				"and captures what the server gives up.",
		})
	}
	if err := d.lookAgain(ctx); err != nil {
		return err
	}
	return ctx.Err()
}

// streams asks for names and then for each stream: a list of infos waits for the
// slowest and leaves out who does not answer.
func (d *doctor) streams(ctx context.Context) error {
	names, err := d.s.api.StreamNames(ctx)
	refused, ok := errors.AsType[*jsapi.RefusedError](err)
	switch {
	case ok:
		d.notPermitted("", "", refused)
		names = []string{d.s.cfg.StreamName(), objectStreamPrefix + d.s.cfg.bucketName(), AdvisoryStream}
	case err != nil:
		return fmt.Errorf("list streams: %w", err)
	}
	d.bridged = slices.Contains(names, AdvisoryStream)
	if ok {
		// If it cannot be read, it may be there, and is reported below.
		_, err := d.s.api.Stream(ctx, AdvisoryStream)
		d.bridged = !errors.Is(err, jetstream.ErrStreamNotFound)
	}
	for _, name := range names {
		info, err := d.s.api.Stream(ctx, name)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case errors.Is(err, jetstream.ErrStreamNotFound): // deleted since
		case err != nil:
			d.unreadable(name, "", err)
		default:
			d.stream(info)
			d.consumers(ctx, info)
		}
	}
	return nil
}

// loses reports whether a stream holds messages only until they are handled.
func loses(c jetstream.StreamConfig) bool { return c.Retention != jetstream.LimitsPolicy }

func (d *doctor) stream(info *jetstream.StreamInfo) {
	c := info.Config
	if ours := c.Name == d.s.cfg.StreamName() || c.Name == objectStreamPrefix+d.s.cfg.bucketName(); !ours && c.Replicas > d.replicas {
		d.replicas, d.replicated = c.Replicas, c.Name
	}
	if c.MaxBytes <= 0 && (c.MaxMsgs <= 0 || c.MaxMsgSize <= 0) {
		d.add(Finding{
			Severity: SeverityWarning, Check: "stream_without_max_bytes", Stream: c.Name,
			Detail: fmt.Sprintf("it has no MaxBytes and holds %d bytes: it can take the whole store, and then every stream refuses, "+
				"the dead-letter stream too", info.State.Bytes),
			Remedy: fmt.Sprintf("Set MaxBytes, to more than it is ever to hold, such as with %s.",
				editStream(c.Name, fmt.Sprintf("--max-bytes %dGiB", 1+2*info.State.Bytes>>30))),
		})
	}
	if !loses(c) {
		return
	}
	var limits []string
	limit := func(name string, n int64) {
		if n > 0 {
			limits = append(limits, fmt.Sprintf("%s %d", name, n))
		}
	}
	if c.Discard == jetstream.DiscardOld {
		limit("MaxBytes", c.MaxBytes)
		limit("MaxMsgs", c.MaxMsgs)
	}
	refuse := "--discard new"
	if c.MaxMsgsPerSubject > 0 && !c.DiscardNewPerSubject { // whatever Discard says
		limit("MaxMsgsPerSubject", c.MaxMsgsPerSubject)
		refuse += " --discard-per-subject"
	}
	if len(limits) > 0 {
		d.add(Finding{
			Severity: SeverityWarning, Check: "discard_old", Stream: c.Name,
			Detail: fmt.Sprintf("at %s it drops the oldest message, handled or not, and tells nobody; it holds %d messages, %d bytes",
				strings.Join(limits, " or "), info.State.Msgs, info.State.Bytes),
			Remedy: fmt.Sprintf("Let it refuse new messages instead: %s.", editStream(c.Name, refuse)),
		})
	}
	if c.MaxAge > 0 {
		d.add(Finding{
			Severity: SeverityWarning, Check: "max_age", Stream: c.Name,
			Detail: fmt.Sprintf("it drops messages after %v, handled or not, and tells nobody", c.MaxAge),
			Remedy: fmt.Sprintf("Make MaxAge longer than any outage of its consumers, or remove it: %s.", editStream(c.Name, "--max-age 0s")),
		})
	}
}

// consumers checks those of a stream.
func (d *doctor) consumers(ctx context.Context, info *jetstream.StreamInfo) {
	name := info.Config.Name
	if info.State.Consumers == 0 {
		return
	}
	var views []view // of an interest stream: they decide together what stays
	err := d.s.api.Consumers(ctx, name, func(i *jetstream.ConsumerInfo) {
		d.consumer(info.Config, i)
		v := viewOf(i)
		if v.stalled {
			d.suspects = append(d.suspects, &suspect{view: v, replicas: info.Config.Replicas, full: true})
		}
		if info.Config.Retention == jetstream.InterestPolicy {
			views = append(views, v)
		} else if loses(info.Config) {
			d.suspect(ctx, info, v, nil)
		}
	}, func(consumer string, err error) { d.unreadable(name, consumer, err) })
	if err != nil && ctx.Err() == nil {
		d.unreadable(name, "", fmt.Errorf("list consumers: %w", err))
		return // not all of those who decide are known
	}
	for _, v := range views {
		d.suspect(ctx, info, v, views)
	}
}

func (d *doctor) consumer(stream jetstream.StreamConfig, i *jetstream.ConsumerInfo) {
	c := i.Config
	if i.Paused {
		d.add(Finding{
			Severity: SeverityNotice, Check: "paused", Stream: i.Stream, Consumer: i.Name, Count: i.NumPending,
			Detail: fmt.Sprintf("it is paused for another %v, and %d messages wait", i.PauseRemaining.Round(time.Second), i.NumPending),
			Remedy: fmt.Sprintf("If this is not wanted any more: %s.", natsCommand("consumer resume", []string{i.Stream, i.Name})),
		})
	}
	if c.AckPolicy == jetstream.AckNonePolicy {
		return // nothing is delivered again
	}
	if c.MaxDeliver > 0 {
		d.finite++
		d.maxDeliver(stream, i)
	}
	// The server refuses a MaxDeliver that has not room for all the steps.
	if n := len(c.BackOff); n > 0 && c.MaxDeliver <= 0 {
		d.add(Finding{
			Severity: SeverityNotice, Check: "backoff", Stream: i.Stream, Consumer: i.Name,
			Detail: fmt.Sprintf("its BackOff ends after %d steps and its MaxDeliver is unlimited: a message that always fails comes "+
				"back every %v for ever", n, c.BackOff[n-1]),
			Remedy: "Have its code count attempts, with the message's NumDelivered, and terminate what has failed too often, as an App's " +
				"consumers do: a MaxDeliver would leave it behind.",
		})
	}
}

func (d *doctor) maxDeliver(stream jetstream.StreamConfig, i *jetstream.ConsumerInfo) {
	f := Finding{Severity: SeverityWarning, Check: "max_deliver", Stream: i.Stream, Consumer: i.Name}
	then := "is passed over: it stays in the stream until a limit removes it"
	if loses(stream) {
		then = "becomes a zombie: it stays in the stream for ever, and nobody gets it"
	}
	f.Detail = fmt.Sprintf("its MaxDeliver is %d, with nothing in reserve: a message whose last delivery fails, or whose handler crashes, %s",
		i.Config.MaxDeliver, then)
	f.Remedy = fmt.Sprintf("Have its code count attempts, as an App's consumers do, and make MaxDeliver unlimited: "+
		"%s; or set External of dlq.Config in an App, which then captures what the server gives up.",
		natsCommand("consumer edit", []string{i.Stream, i.Name}, "--max-deliver=-1"))
	if d.bridged {
		f.Severity = SeverityNotice
		f.Detail += fmt.Sprintf("; stream %s is there, so it is captured as long as the advisory bridge runs", AdvisoryStream)
	}
	d.add(f)
}

func (d *doctor) deadLetterStream(ctx context.Context) {
	name := d.s.cfg.StreamName()
	info, err := d.s.api.Stream(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		d.add(Finding{
			Severity: SeverityCritical, Check: "dlq_missing", Stream: name,
			Detail: "there is no dead-letter stream: nothing can be captured",
			Remedy: "Start an App that has dead letters: it makes the stream. If it has another name, say so with --stream.",
		})
		return
	case err != nil:
		d.unreadableOnce(name, err)
		return
	}
	c := info.Config
	if err := d.s.conflict(c); err != nil {
		d.add(Finding{
			Severity: SeverityCritical, Check: "dlq_conflict", Stream: name, Detail: err.Error(),
			Remedy: fmt.Sprintf("Put right what is named with %s; or leave it to its other purpose, and set Stream.Name of "+
				"dlq.Config, for WithDeadLetters, to another name in all Apps.", editStream(name)),
		})
	}
	if !c.AllowDirect {
		d.add(Finding{
			Severity: SeverityWarning, Check: "dlq_config", Stream: name,
			Detail: "AllowDirect is false: dead letters are read slowly",
			Remedy: fmt.Sprintf("Allow direct gets: %s. An App does so, too, when it starts.", editStream(name, "--allow-direct")),
		})
	}
	if c.AllowRollup {
		d.add(Finding{
			Severity: SeverityWarning, Check: "dlq_rollup", Stream: name,
			Detail: "AllowRollup is true: a user that may publish on the subject of one dead letter can remove all of them with one message. " +
				"An App of an earlier version turns it on when it starts, one of this version turns it off",
			Remedy: fmt.Sprintf("Upgrade the Apps of earlier versions. Then turn it off: %s.", editStream(name, "--no-allow-rollup")),
		})
	}
	if c.AllowMsgTTL {
		d.add(Finding{
			Severity: SeverityNotice, Check: "dlq_msg_ttl", Stream: name,
			Detail: "AllowMsgTTL is true: a message on the subject of a dead letter may vanish by itself, if its publisher wishes so",
			Remedy: "The server cannot turn it off. Restrict by permissions which users may publish on the subjects of dead letters.",
		})
	}
	d.nearLimit(checkDLQNearFull, info, "dead letters")
	d.raised(c)
	if c.MaxAge > 0 {
		d.add(Finding{
			Severity: SeverityWarning, Check: "dlq_max_age", Stream: name,
			Detail: fmt.Sprintf("dead letters vanish after %v, whether anybody has seen them or not; it holds %d messages", c.MaxAge, info.State.Msgs),
			Remedy: fmt.Sprintf("Remove MaxAge: %s. What is done with, %s throws away.",
				editStream(name, "--max-age 0s"), d.command("discard --all --state resolved")),
		})
	}
	if c.Replicas < d.replicas {
		d.add(Finding{
			Severity: SeverityWarning, Check: "dlq_not_replicated", Stream: name,
			Detail: fmt.Sprintf("it has %d replicas, and stream %s has %d: one lost disk loses the dead letters of messages that would "+
				"have survived", c.Replicas, d.replicated, d.replicas),
			Remedy: fmt.Sprintf("Give it as many: %s, and the same for %s%s, if that is there.",
				editStream(name, fmt.Sprintf("--replicas %d", d.replicas)), objectStreamPrefix, d.s.cfg.bucketName()),
		})
	}
}

// raised is what a process leaves behind that ends while it discards.
func (d *doctor) raised(c jetstream.StreamConfig) {
	was := raiseOf(c.Metadata).before(limits{MaxBytes: c.MaxBytes, MaxMsgs: c.MaxMsgs})
	var more, flags []string
	for _, l := range []struct {
		unit, flag string
		now, was   int64
	}{{"bytes", "--max-bytes", c.MaxBytes, was.MaxBytes}, {"messages", "--max-msgs", c.MaxMsgs, was.MaxMsgs}} {
		if l.now != l.was {
			more = append(more, fmt.Sprintf("%d %s in place of %d", l.now, l.unit, l.was))
			flags = append(flags, fmt.Sprintf("%s %d", l.flag, l.was))
		}
	}
	if len(more) == 0 {
		return
	}
	d.add(Finding{
		Severity: SeverityNotice, Check: "dlq_limit_raised", Stream: c.Name,
		Detail: fmt.Sprintf("it may hold %s: a dead letter is discarded while it is full, or that was interrupted", strings.Join(more, " and ")),
		Remedy: fmt.Sprintf("If nobody is at that, put it back: %s. That drops nothing.", editStream(c.Name, flags...)),
	})
}

// objectStore holds what is too large for a record. It is made when it is needed.
func (d *doctor) objectStore(ctx context.Context) {
	name := objectStreamPrefix + d.s.cfg.bucketName()
	info, err := d.s.api.Stream(ctx, name)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
	case err != nil:
		d.unreadableOnce(name, err)
	default:
		d.nearLimit("dlq_objects_near_limit", info, "dead letters that are too large for a record")
	}
}

func (d *doctor) nearLimit(check string, info *jetstream.StreamInfo, what string) {
	const near, full = 80, 95 // percent
	used, of, more := 0.0, "", ""
	measure := func(have uint64, limit int64, unit, flag string) {
		if limit <= 0 {
			return
		}
		if p := 100 * float64(have) / float64(limit); p > used {
			used, of, more = p, fmt.Sprintf("%d of %d %s", have, limit, unit), fmt.Sprintf("%s %d", flag, 2*limit)
		}
	}
	measure(info.State.Bytes, info.Config.MaxBytes, "bytes", "--max-bytes")
	measure(info.State.Msgs, info.Config.MaxMsgs, "messages", "--max-msgs")
	if used < near {
		return
	}
	f := Finding{
		Severity: SeverityWarning, Check: check, Stream: info.Config.Name, Count: info.State.Msgs,
		Detail: fmt.Sprintf("it is %.0f %% full: %s. When it is full, %s cannot be captured and stay in their own streams, "+
			"where they are tried again and again", used, of, what),
		Remedy: fmt.Sprintf("Discard what is done with, such as with %s (%s lists it), or raise the limit: %s.",
			d.command("discard --all --state resolved"), d.command("discard --all --state resolved --dry-run"), editStream(info.Config.Name, more)),
	}
	if used >= full {
		f.Severity = SeverityCritical
	}
	d.add(f)
}

// serverVersion knows releases that lose or leak messages by themselves.
func (d *doctor) serverVersion(version string) {
	f := Finding{Check: "server_version", Remedy: "Update nats-server to 2.14.1 or later, or to 2.12.9 or later of 2.12."}
	var v [3]int
	_, err := fmt.Sscanf(version, "%d.%d.%d", &v[0], &v[1], &v[2])
	before := func(minor, patch int) bool { return slices.Compare(v[:], []int{2, minor, patch}) < 0 }
	switch {
	case err != nil:
		f.Severity, f.Detail = SeverityNotice, fmt.Sprintf("the server's version is %q, of which nothing is known", version)
	case before(12, 0):
		f.Severity, f.Detail = SeverityNotice, fmt.Sprintf("nats-server %s is older than what dead letters are tested with", version)
	case before(12, 5) && !before(12, 3):
		f.Severity = SeverityCritical
		f.Detail = fmt.Sprintf("nats-server %s loses messages of replicated work queues whose consumers have a MaxDeliver", version)
	case before(12, 9), before(14, 1) && !before(13, 0):
		f.Severity = SeverityWarning
		f.Detail = fmt.Sprintf("nats-server %s leaks messages that were delivered as often as MaxDeliver allows: they stay in their stream", version)
	default:
		return
	}
	d.add(f)
}
