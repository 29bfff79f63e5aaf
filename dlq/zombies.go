package dlq

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/internal/subjects"
)

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
