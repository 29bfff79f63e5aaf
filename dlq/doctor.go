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
	"github.com/monotel/monotel/internal/shell"
	"github.com/monotel/monotel/internal/subjects"
)

// A Severity says how soon a [Finding] wants attention.
type Severity string

// The severities, most severe first.
const (
	SeverityCritical Severity = "critical" // messages are lost or stuck already, or will be by what is known
	SeverityWarning  Severity = "warning"  // messages are lost when something else goes wrong
	SeverityNotice   Severity = "notice"   // worth knowing, and perhaps wanted
)

func (s Severity) rank() int {
	return slices.Index([]Severity{SeverityCritical, SeverityWarning, SeverityNotice}, s)
}

// A Finding is one thing that may lose messages or dead letters, or already has.
type Finding struct {
	Severity Severity

	// Check is a stable identifier of what was checked: "zombies",
	// "max_deliver", "backoff", "max_ack_pending", "paused",
	// "stream_without_max_bytes", "discard_old", "max_age", "server_version",
	// "dlq_missing", "dlq_conflict", "dlq_config", "dlq_near_limit",
	// "dlq_objects_near_limit", "dlq_limit_raised", "dlq_max_age",
	// "dlq_not_replicated" or "advisory_stream_missing"; or what was not checked
	// and why not, see Incomplete: "not_permitted" or "unreadable".
	Check string

	Stream   string // empty if it is about no single stream
	Consumer string // empty if it is about no single consumer
	Detail   string // what was found, with numbers
	Remedy   string // what to do
	Count    uint64 // of zombies, of consumers and the like; 0 if nothing is counted
}

// Incomplete reports whether the finding is that something was not checked: only
// without one of these, no finding means that all is well.
func (f *Finding) Incomplete() bool {
	return f.Check == checkNotPermitted || f.Check == checkUnreadable
}

const (
	checkZombies      = "zombies"
	checkNotPermitted = "not_permitted"
	checkUnreadable   = "unreadable"
	checkDLQNearFull  = "dlq_near_limit"

	// The object store of jetstream keeps a bucket in a stream of this name.
	objectStreamPrefix = "OBJ_"
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

// command is a command line of monotel, for a remedy, with names that are quoted
// for a shell.
func (d *doctor) command(args string, names ...string) string {
	if name := d.s.cfg.StreamName(); name != defaultStream {
		args += " --stream " + shell.Quote(name)
	}
	return "`" + shell.Command("monotel dlq "+args, names) + "`"
}

// natsCommand is a command line of the nats command, for a remedy, about a stream
// or a consumer, whose names are quoted for a shell.
func natsCommand(command string, names []string, flags ...string) string {
	return "`" + shell.Command("nats "+command, names, flags...) + "`"
}

func editStream(stream string, flags ...string) string {
	return natsCommand("stream edit", []string{stream}, flags...)
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

// A view is what is kept of a consumer.
type view struct {
	stream, name  string
	created       time.Time
	filters       []string
	policy        jetstream.AckPolicy
	floor         uint64 // stream sequence up to which nothing is in flight
	delivered     uint64 // stream sequence
	deliveries    uint64
	pending       uint64
	ackPending    int
	redelivered   int // of these, and of those given up
	maxDeliver    int
	maxAckPending int
	lastAck       time.Time
	lastDelivery  time.Time
	ackWait       time.Duration
	now           time.Time // the server's
	stalled       bool      // as much is in flight as it allows, and more waits
}

func viewOf(i *jetstream.ConsumerInfo) view {
	v := view{
		stream: i.Stream, name: i.Name, created: i.Created, filters: i.Config.FilterSubjects, policy: i.Config.AckPolicy,
		floor: i.AckFloor.Stream, delivered: i.Delivered.Stream, deliveries: i.Delivered.Consumer, pending: i.NumPending,
		ackPending: i.NumAckPending, redelivered: i.NumRedelivered, maxDeliver: i.Config.MaxDeliver,
		maxAckPending: i.Config.MaxAckPending, ackWait: i.Config.AckWait, now: i.TimeStamp,
	}
	if v.ackPending == 0 {
		// The server's floor stays below what it has given up until an
		// acknowledgement leaves nothing in flight.
		v.floor = max(v.floor, v.delivered)
	}
	if i.Config.FilterSubject != "" {
		v.filters = []string{i.Config.FilterSubject}
	}
	if i.AckFloor.Last != nil {
		v.lastAck = *i.AckFloor.Last
	}
	if i.Delivered.Last != nil {
		v.lastDelivery = *i.Delivered.Last
	}
	v.stalled = v.policy != jetstream.AckNonePolicy && v.maxAckPending > 0 && v.ackPending >= v.maxAckPending && v.pending > 0
	return v
}

// subjects are the filters to ask the server with.
func (v *view) subjects() []string {
	if len(v.filters) == 0 {
		return []string{">"}
	}
	return v.filters
}

// wants reports whether a filter has the whole of a subject, which may have
// wildcards.
func (v *view) wants(subject string) bool {
	return slices.ContainsFunc(v.subjects(), func(f string) bool { return subjects.Covers(f, subject) })
}

// gaveUp reports whether the consumer may have messages that were delivered as
// often as it allows. NumRedelivered counts them, except with a MaxDeliver of 1.
func (v *view) gaveUp() bool {
	return v.policy != jetstream.AckNonePolicy && (v.maxDeliver == 1 || v.maxDeliver > 1 && v.redelivered > 0)
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

// A suspect is a consumer that has to be looked at again: its numbers and the
// stream's were not read at the same moment.
type suspect struct {
	view
	replicas int
	interest bool // the stream's retention, otherwise it is a work queue

	full bool // MaxAckPending was reached

	zombies bool   // it may have left some behind
	alone   bool   // nobody else wants its messages: all there are count for it
	stored  uint64 // messages for it at the look before, if counted
	counted bool
	bound   uint64 // up to here its messages are in nobody's flight, as far as others has not to be asked
	others  []view // of its stream, if it is not alone
}

// suspect decides on what one look tells whether a consumer may have zombies.
func (d *doctor) suspect(ctx context.Context, info *jetstream.StreamInfo, v view, all []view) {
	if v.policy == jetstream.AckNonePolicy || info.State.Msgs == 0 || info.State.FirstSeq > v.delivered || ctx.Err() != nil {
		return
	}
	p := &suspect{
		view: v, replicas: info.Config.Replicas, interest: info.Config.Retention == jetstream.InterestPolicy, zombies: true,
	}
	p.among(all)
	if !p.alone && !v.gaveUp() {
		return // if there are any, they are another's
	}
	first := info.State.FirstSeq
	if len(v.filters) > 0 {
		var err error
		if first, err = d.s.first(ctx, &v); err != nil {
			d.unreadable(v.stream, v.name, err)
			return
		}
	}
	// With work in flight, some may be above the floor.
	if first > 0 && (first <= p.bound || p.alone && first <= v.delivered && v.gaveUp()) {
		d.suspects = append(d.suspects, p)
	}
}

// among finds out who else wants the consumer's messages. A work queue has no two
// consumers for one message; all is nil then.
func (p *suspect) among(all []view) {
	p.alone, p.bound = true, p.floor
	for i := range all {
		o := &all[i]
		if o.name == p.name || !slices.ContainsFunc(p.subjects(), func(a string) bool {
			return slices.ContainsFunc(o.subjects(), func(b string) bool { return subjects.Overlap(a, b) })
		}) {
			continue
		}
		p.alone, p.others = false, all
		if !slices.ContainsFunc(p.subjects(), func(a string) bool { return !o.wants(a) }) {
			p.bound = min(p.bound, o.floor)
		}
	}
}

// needed reports whether another consumer still has to handle a message.
func (p *suspect) needed(m *jsapi.Message) bool {
	return slices.ContainsFunc(p.others, func(o view) bool {
		return o.name != p.name && o.floor < m.Sequence && o.wants(m.Subject)
	})
}

// mayBeOf lists the other consumers that may have given up a message, which the
// server does not tell.
func (p *suspect) mayBeOf(m *jsapi.Message) []string {
	var names []string
	for i := range p.others {
		if o := &p.others[i]; o.name != p.name && o.gaveUp() && o.wants(m.Subject) {
			names = append(names, o.name)
		}
	}
	return names
}

// pause waits until what was acknowledged at the first look has left its stream.
func pause(ctx context.Context, replicas int) error {
	d := settleTime
	if replicas > 1 {
		d = settleTimeReplicated
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// lookAgain looks at all suspects after one pause, so that it does not take a
// pause for each. Those that were busy get another.
func (d *doctor) lookAgain(ctx context.Context) error {
	for look := 1; len(d.suspects) > 0; look++ {
		replicas := 0
		for _, p := range d.suspects {
			replicas = max(replicas, p.replicas)
		}
		if err := pause(ctx, replicas); err != nil {
			return err
		}
		var busy []*suspect
		for _, p := range d.suspects {
			done, err := d.second(ctx, p, look == looks)
			switch {
			case ctx.Err() != nil:
				return ctx.Err()
			case errors.Is(err, jetstream.ErrConsumerNotFound), errors.Is(err, jetstream.ErrStreamNotFound): // deleted since
			case err != nil:
				d.unreadable(p.stream, p.name, err)
			case !done:
				busy = append(busy, p)
			}
		}
		d.suspects = busy
	}
	return nil
}

// second is another look at a suspect. It is not done if the consumer was too busy
// to be sure, unless this is the last look.
func (d *doctor) second(ctx context.Context, p *suspect, last bool) (done bool, err error) {
	info, err := d.s.api.Consumer(ctx, p.stream, p.name)
	if err != nil {
		return false, err
	}
	now := viewOf(info)
	if !now.created.Equal(p.created) {
		return true, nil // another of the same name, which gets everything again
	}
	quiet := now.deliveries == p.deliveries && now.ackPending == p.ackPending
	if p.full && quiet && now.stalled && now.lastAck.Equal(p.lastAck) {
		d.full(&now)
	}
	if !p.zombies {
		return true, nil
	}
	if !p.alone || last && (!quiet || !p.counted) {
		return true, d.walked(ctx, p)
	}
	stored, err := d.s.stored(ctx, &p.view)
	if err != nil {
		return false, err
	}
	before := p.stored
	p.stored = stored
	if !quiet {
		p.view, p.bound, p.counted = now, max(p.bound, now.floor), true
		return false, nil
	}
	if !p.counted || before != stored && !last {
		p.counted = true
		return false, nil
	}
	// Nothing was delivered, acknowledged or given up since the look before. So
	// what was stored then, and is neither to be delivered nor in flight, is left
	// behind. A consumer learns of what is published only some time later: had it
	// been counted now, it might be missing in NumPending.
	n := min(before, stored)
	n -= min(n, now.pending+uint64(max(now.ackPending, 0)))
	if n == 0 {
		return true, nil
	}
	first, err := d.s.first(ctx, &p.view)
	if err != nil {
		return false, err
	}
	if first > now.floor {
		// All are above the floor, where the server's numbers are the only
		// evidence. They have to agree.
		switch {
		case now.maxDeliver == 1:
		case now.gaveUp():
			n = min(n, uint64(max(now.redelivered, 0)))
		default:
			return true, nil
		}
	}
	d.zombies(p, n, before != stored, first, nil)
	return true, nil
}

func (d *doctor) full(v *view) {
	f := Finding{
		Severity: SeverityNotice, Check: "max_ack_pending", Stream: v.stream, Consumer: v.name, Count: uint64(max(v.ackPending, 0)),
		Detail: fmt.Sprintf("%d messages are in flight, as many as its MaxAckPending allows, and %d wait: none is delivered until one is "+
			"acknowledged", v.ackPending, v.pending),
		Remedy: fmt.Sprintf("See whether its handlers hang or forget to acknowledge; if they are only slow, raise it: "+
			"%s.", natsCommand("consumer edit", []string{v.stream, v.name}, fmt.Sprintf("--max-pending %d", 2*v.maxAckPending))),
	}
	last := v.lastAck
	if v.lastDelivery.After(last) {
		last = v.lastDelivery
	}
	if idle := v.now.Sub(last); !last.IsZero() && idle >= v.ackWait {
		f.Severity = SeverityWarning
		f.Detail += fmt.Sprintf("; nothing was delivered or acknowledged for %v, more than its AckWait of %v", idle.Round(time.Millisecond), v.ackWait)
	}
	d.add(f)
}

// errEnough ends a walk.
var errEnough = errors.New("enough")

// walked counts zombies one by one, however busy the consumer is. What is below
// the floors of all who want it, and was so before the pause, is not in flight. Of
// the rest that was delivered before the pause and is still there, no more can be
// in flight than were then.
func (d *doctor) walked(ctx context.Context, p *suspect) error {
	flight := uint64(max(p.ackPending, 0))
	var below, above, seen, first, size uint64
	var others []string
	last := p.bound
	if p.alone {
		last = max(last, p.delivered)
	}
	err := d.s.walk(ctx, &p.view, last, func(m *jsapi.Message) error {
		if seen == walkLimit+flight || size > walkLimitBytes {
			return errEnough
		}
		seen++
		size += uint64(len(m.Data))
		if p.needed(m) {
			return nil
		}
		if first == 0 || m.Sequence < first {
			first = m.Sequence
		}
		if m.Sequence > p.bound {
			above++
			return nil
		}
		below++
		for _, name := range p.mayBeOf(m) {
			if !slices.Contains(others, name) {
				others = append(others, name)
			}
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return err
	}
	if n := below + above - min(above, flight); n > 0 {
		d.zombies(p, n, err != nil || flight > 0, first, others)
	}
	return nil
}

func (d *doctor) zombies(p *suspect, n uint64, atLeast bool, first uint64, others []string) {
	f := Finding{
		Severity: SeverityCritical, Check: checkZombies, Stream: p.stream, Consumer: p.name, Count: n,
		Remedy: fmt.Sprintf("Capture them as dead letters, which deletes them here: %s.", d.command("capture", p.stream, p.name)),
	}
	if p.interest {
		f.Remedy += " Do not delete the consumer: the server then deletes what only it still has to handle."
	} else {
		f.Remedy += fmt.Sprintf(" Or delete the consumer (%s) and have its program make it again, from the first "+
			"message on: it then gets them again.", natsCommand("consumer rm", []string{p.stream, p.name}))
	}
	count := fmt.Sprintf("%d messages", n)
	if atLeast {
		count = "at least " + count
	}
	why := fmt.Sprintf("past its MaxDeliver of %d", p.maxDeliver)
	if p.maxDeliver <= 0 {
		why = "passed over, such as when its filter or MaxDeliver was changed"
	}
	f.Detail = fmt.Sprintf("%s, from sequence %d on, are %s: they are stored, and it never gets them again", count, first, why)
	if len(others) > 0 {
		slices.Sort(others)
		const shown = 5
		names := strings.Join(others[:min(len(others), shown)], ", ")
		if len(others) > shown {
			names += ", …"
		}
		f.Detail += "; the server does not tell who gave them up: it may also have been " + names
		f.Remedy = fmt.Sprintf("Capture them as dead letters of each of these consumers, which deletes them here: %s, and the same with "+
			"each of the others. Do not delete a consumer: the server then deletes what only that one still has to handle.",
			d.command("capture", p.stream, p.name))
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

// ErrNoZombies reports a stream that cannot have zombies, since it keeps messages
// whether they are handled or not.
var ErrNoZombies = errors.New("its stream keeps what is handled, so there are no zombies")

// CaptureZombies captures the messages of a work-queue or interest stream that
// the server will not deliver to the consumer any more, with
// [ReasonExternalMaxDeliver]. When the dead-letter stream has acknowledged one, it
// is deleted from a work queue; from an interest stream, too, unless another
// consumer still needs it. n counts those that were not captured before, also when
// err is not nil. It may be interrupted and called again: nothing is captured
// twice.
//
// It leaves alone what may be in flight: while the consumer has work, the server
// does not tell that from what it gave up after its ack floor. On an interest
// stream it also leaves what another consumer has still to handle. The server does not tell which of several
// consumers of an interest stream has given up a message; each that may have gets
// a dead letter, which is one too many rather than one too few.
//
// It takes a pause of up to a few seconds, and four round trips for each message.
func (s *Store) CaptureZombies(ctx context.Context, stream, consumer string) (n int, err error) {
	n, err = s.captureZombies(ctx, stream, consumer)
	if err != nil {
		return n, fmt.Errorf("capture zombies of consumer %q of stream %q: %w", consumer, stream, err)
	}
	return n, nil
}

func (s *Store) captureZombies(ctx context.Context, stream, consumer string) (n int, err error) {
	info, err := s.api.Stream(ctx, stream)
	if err != nil {
		return 0, err
	}
	if !loses(info.Config) {
		return 0, ErrNoZombies
	}
	ci, err := s.api.Consumer(ctx, stream, consumer)
	if err != nil {
		return 0, err
	}
	p := &suspect{view: viewOf(ci), interest: info.Config.Retention == jetstream.InterestPolicy}
	if p.policy == jetstream.AckNonePolicy {
		return 0, nil // it gives nothing up
	}
	all, err := s.others(ctx, info)
	if err != nil {
		return 0, err
	}
	p.among(all)
	if !p.alone && !p.gaveUp() {
		return 0, nil
	}
	if err := s.settled(ctx, p, info.Config.Replicas); err != nil {
		return 0, err
	}
	err = s.walk(ctx, &p.view, p.bound, func(m *jsapi.Message) error {
		if p.needed(m) {
			return nil
		}
		captured, err := s.captureZombie(ctx, p, info.Created, m)
		if captured {
			n++
		}
		return err
	})
	return n, err
}

// settled waits until what was acknowledged below the bound has left the stream,
// and for a moment with nothing in flight, since the bound is best then.
func (s *Store) settled(ctx context.Context, p *suspect, replicas int) error {
	for look := 1; ; look++ {
		if err := pause(ctx, replicas); err != nil {
			return err
		}
		if !p.alone || p.ackPending == 0 || look == looks {
			return nil
		}
		info, err := s.api.Consumer(ctx, p.stream, p.name)
		if err != nil {
			return err
		}
		now := viewOf(info)
		if !now.created.Equal(p.created) {
			return errMadeAgain
		}
		p.view, p.bound = now, max(p.bound, now.floor)
	}
}

var errMadeAgain = errors.New("it was made again or reset meanwhile, and gets its messages again: nothing more is deleted")

// others returns the consumers of an interest stream. All have to be known: one
// that is not may still need a message.
func (s *Store) others(ctx context.Context, info *jetstream.StreamInfo) ([]view, error) {
	if info.Config.Retention != jetstream.InterestPolicy {
		return nil, nil
	}
	var all []view
	var unreadable []error
	err := s.api.Consumers(ctx, info.Config.Name, func(i *jetstream.ConsumerInfo) { all = append(all, viewOf(i)) },
		func(name string, err error) {
			unreadable = append(unreadable, fmt.Errorf("consumer %q: %w", name, err))
		})
	return all, errors.Join(append(unreadable, err)...)
}

func (s *Store) captureZombie(ctx context.Context, p *suspect, created time.Time, m *jsapi.Message) (captured bool, err error) {
	r := &Record{
		ID: ID(p.stream, created, p.name, m.Sequence), Reason: ReasonExternalMaxDeliver,
		ReasonText: "found in its stream, where the server does not deliver it any more",
		Subject:    m.Subject, Data: m.Data,
		Stream: p.stream, StreamCreated: created, StreamSequence: m.Sequence, Consumer: p.name,
		Deliveries: uint64(max(p.maxDeliver, 0)), Stored: m.Time,
	}
	r.Header, r.Error = headerOf(m)
	r.OriginTraceparent = r.Header.Get("traceparent")
	captured, err = s.CaptureNext(ctx, r, nil)
	if err != nil {
		return false, err
	}
	// A consumer that was made again, or reset, gets the message again. If the
	// stream was made again, the sequence is another message's.
	now, err := s.api.Consumer(ctx, p.stream, p.name)
	if err != nil {
		return captured, err
	}
	if !now.Created.Equal(p.created) || now.Delivered.Stream < m.Sequence || now.Delivered.Consumer < p.deliveries {
		return captured, errMadeAgain
	}
	if err := s.settle(ctx, p, m); err != nil {
		return captured, fmt.Errorf("message %d is captured, and cannot be deleted: %w", m.Sequence, err)
	}
	return captured, nil
}

// settle removes a captured message.
//
// On an interest stream it is acknowledged in the consumer's name, so that the
// server decides whether others need it: it alone knows who else has given it up.
// A consumer that acknowledges everything up to a message cannot do that for one
// below its floor.
func (s *Store) settle(ctx context.Context, p *suspect, m *jsapi.Message) error {
	if p.interest && p.policy == jetstream.AckExplicitPolicy {
		ctx, cancel := context.WithTimeout(ctx, s.api.Timeout)
		defer cancel()
		// A consumer sequence of 0 only removes what the server keeps of redeliveries.
		subject := fmt.Sprintf("$JS.ACK.%s.%s.%d.%d.0.0.0", p.stream, p.name, max(p.maxDeliver, 1), m.Sequence)
		_, err := s.nc.RequestWithContext(ctx, subject, []byte("+ACK"))
		return err
	}
	if p.interest && p.mayBeOf(m) != nil {
		return nil
	}
	err := s.api.Delete(ctx, p.stream, m.Sequence)
	if err == nil {
		return nil
	}
	if left, lookErr := s.api.Next(ctx, p.stream, m.Subject, m.Sequence); lookErr == nil && (left == nil || left.Sequence != m.Sequence) {
		return nil // somebody else did it
	}
	return err
}

// stored counts the messages in the stream that the consumer wants.
func (s *Store) stored(ctx context.Context, v *view) (uint64, error) {
	if len(v.filters) == 0 {
		var resp struct {
			State struct {
				Msgs uint64 `json:"messages"`
			} `json:"state"`
		}
		err := s.api.Request(ctx, jsapi.OpStreamInfo, v.stream, jsapi.None{}, &resp)
		return resp.State.Msgs, err
	}
	var n uint64
	for _, filter := range v.filters {
		err := s.api.Subjects(ctx, v.stream, filter, func(_ string, msgs uint64, _ int) { n += msgs })
		if err != nil {
			return 0, err
		}
	}
	return n, nil
}

// first returns the sequence of the first message in the stream that the consumer
// wants, or 0.
func (s *Store) first(ctx context.Context, v *view) (uint64, error) {
	var first uint64
	for _, subject := range v.subjects() {
		m, err := s.api.Next(ctx, v.stream, subject, 1)
		if err != nil {
			return 0, err
		}
		if m != nil && (first == 0 || m.Sequence < first) {
			first = m.Sequence
		}
	}
	return first, nil
}

// walk calls f for the stored messages that a consumer wants, up to a sequence.
func (s *Store) walk(ctx context.Context, v *view, last uint64, f func(*jsapi.Message) error) error {
	for _, subject := range v.subjects() {
		for seq := uint64(1); seq <= last; {
			m, err := s.api.Next(ctx, v.stream, subject, seq)
			if err != nil {
				return err
			}
			if m == nil || m.Sequence > last {
				break
			}
			if err := f(m); err != nil {
				return err
			}
			seq = m.Sequence + 1
		}
	}
	return nil
}
