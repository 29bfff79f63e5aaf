package triage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/jsapi"
	"github.com/monotel/monotel/internal/shell"
	"github.com/monotel/monotel/telemetry/messaging"
)

// replay claims and sends one entry. why says why it was skipped instead; one that
// is claimed and cannot be sent is released, which says it.
func (r *runner) replay(ctx context.Context, j *job) (why string, err error) {
	it, claimed := r.items[j.index], func(sequence uint64) { r.isClaimed(j, sequence) }
	e, why, err := r.read(ctx, it, j.m)
	if e == nil {
		return why, err
	}
	if e.Last != it.last {
		return r.again(ctx, e, it.last, claimed)
	}
	return r.claimAndSend(ctx, e, claimed)
}

// read reads an entry as it was when it was selected, or as it is now if it has a
// history.
func (r *runner) read(ctx context.Context, it item, m *message) (e *dlq.Entry, why string, err error) {
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		if m == nil {
			m, err = r.d.message(ctx, it.sequence)
		}
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
			stored, err := r.d.api.Get(ctx, r.d.cfg.Stream, it.sequence)
			there, err := has(r.d.cfg.Stream, stored, err)
			if err == nil && there {
				return errNotVisible
			}
			why = "discarded meanwhile"
			return err
		case err != nil:
			return err
		case it.last != it.sequence:
			e, err = r.d.getAt(ctx, m.subject)
			switch {
			case errors.Is(err, ErrNotFound):
				e, why, err = nil, "discarded meanwhile", nil
			case errors.Is(err, errMisplaced):
				e, why, err = nil, errMisplaced.Error(), nil
			}
			return err
		}
		rec, err := dlq.Decode(m.header, m.data)
		if rec == nil {
			why = "it cannot be read"
			return nil
		}
		if r.d.placed(rec, m.subject) != nil {
			why = errMisplaced.Error()
			return nil //nolint:nilerr // it is skipped, as one that cannot be read
		}
		e = dlq.NewEntry(rec, m.sequence, nil)
		return err
	})
	return e, why, err
}

// again deals with an entry that is not as it was selected: this operation was
// interrupted while it had it in hand, or somebody else has done something. known is
// the last message on its subject that was known before.
func (r *runner) again(ctx context.Context, e *dlq.Entry, known uint64, claimed func(uint64)) (why string, err error) {
	var mine, last *dlq.Change
	for _, c := range e.History {
		last = c
		if c.Operation == r.id {
			mine = c
		}
	}
	switch {
	case e.State == dlq.StateDiscarded:
		return "discarded meanwhile", nil
	case mine != nil && mine.Kind == dlq.ChangeEdited && last == mine:
		return r.claimAndSend(ctx, e, claimed)
	case mine != nil && mine.Kind == dlq.ChangeReplaying && last == mine:
		return "", r.resend(ctx, e, mine.Sequence)
	case mine != nil && mine.Kind != dlq.ChangeEdited:
		return "", nil // it has its outcome, or was released
	case e.State == dlq.StateReplaying:
		return fmt.Sprintf("being replayed by %s, operation %s", e.Actor, e.Operation), nil
	case last == nil || last.Sequence <= known: // what came is no change
		return r.claimAndSend(ctx, e, claimed)
	}
	return fmt.Sprintf("%s meanwhile by %s", last.Kind, e.Actor), nil
}

// resend sends what was claimed before, unless that was done already.
func (r *runner) resend(ctx context.Context, e *dlq.Entry, claim uint64) error {
	sent := false
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		sent, err = r.sent(ctx, e, claim)
		return err
	})
	if sent || err != nil {
		return err
	}
	return r.sendEntry(ctx, e, claim)
}

// sent reports whether what was claimed is sent. A message that is gone from its
// stream has left its outcome first: so when neither is there it is not, unless it
// is on its way this moment. Of others than the consumer that failed that is not
// known: the message ID has it stored once within the stream's duplicate window.
func (r *runner) sent(ctx context.Context, e *dlq.Entry, claim uint64) (bool, error) {
	if !r.s.Plan.Options.tracked() {
		return false, nil
	}
	subject := r.d.store.SubjectOf(e.Record)
	there, err := r.isThere(ctx, e)
	if there || err != nil {
		return there, err
	}
	// To find that nothing has come after the claim is quick, to read a history is not.
	m, err := r.d.api.Next(ctx, r.d.cfg.Stream, subject, claim+1)
	changed, err := has(r.d.cfg.Stream, m, err)
	if !changed || err != nil {
		return false, err
	}
	outcome, err := r.d.store.Settled(ctx, dlq.Replay{Stream: r.d.cfg.Stream, Subject: subject, ID: e.ID, Operation: r.id})
	return outcome != "", err
}

// isThere reports whether what is sent for an entry is in its stream. The operation may
// have been begun by a tool of an earlier version, which sends on another subject.
func (r *runner) isThere(ctx context.Context, e *dlq.Entry) (bool, error) {
	m, err := r.d.api.Last(ctx, e.Stream, dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id))
	there, err := has(e.Stream, m, err)
	if there || err != nil {
		return there, err
	}
	m, err = r.d.api.Last(ctx, e.Stream, dlq.OldReplaySubject(e.Stream, e.Consumer, e.ID, r.id))
	return has(e.Stream, m, err)
}

// has reports whether a stream has what was asked for. A stream that does not exist has
// nothing.
func has(stream string, m *jsapi.Message, err error) (bool, error) {
	switch {
	case jsapi.Is(err, jetstream.JSErrCodeStreamNotFound):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look for a message of stream %q: %w", stream, err)
	}
	return m != nil, nil
}

// claim is the change that claims an entry.
func (r *runner) claim() dlq.Change {
	o := &r.s.Plan.Options
	return dlq.Change{Kind: dlq.ChangeReplaying, Actor: r.d.cfg.Actor, Reason: o.Reason, Operation: r.id, Target: o.Target}
}

// claimAndSend takes an entry in hand and sends it.
func (r *runner) claimAndSend(ctx context.Context, e *dlq.Entry, claimed func(uint64)) (why string, err error) {
	o := &r.s.Plan.Options
	if _, why, err := r.destination(ctx, e.Record); why != "" || err != nil {
		return why, err
	}
	if len(o.Patch) > 0 && !(len(e.History) > 0 && e.History[len(e.History)-1].Operation == r.id) {
		if why, err := r.patch(ctx, e); why != "" || err != nil {
			return why, err
		}
	}
	err = r.retry(ctx, func(ctx context.Context) error {
		return r.d.store.Change(ctx, e, r.claim(), nil)
	})
	switch {
	case errors.Is(err, dlq.ErrEntryChanged):
		// Somebody else, or an earlier try whose answer was lost.
		var now *dlq.Entry
		err = r.retry(ctx, func(ctx context.Context) (err error) {
			if now, err = r.d.getAt(ctx, r.d.store.SubjectOf(e.Record)); err == nil && now.Last == e.Last {
				return errNotVisible
			}
			return err
		})
		switch {
		case errors.Is(err, ErrNotFound):
			return "discarded meanwhile", nil
		case err != nil:
			return "", err
		}
		return r.again(ctx, now, e.Last, claimed)
	case errors.Is(err, dlq.ErrStreamFull):
		return "", fmt.Errorf("%w: raise its limit, such as with `%s`",
			ErrFull, shell.Command("nats stream edit", []string{r.d.cfg.Stream}, "--max-bytes 2GiB"))
	case err != nil:
		return "", err
	}
	claimed(e.Last)
	return "", r.sendEntry(ctx, e, e.Last)
}

func ignore(err, target error) error {
	if errors.Is(err, target) {
		return nil
	}
	return err
}

// patch stores what the operation's patch makes of the payload as an edit.
func (r *runner) patch(ctx context.Context, e *dlq.Entry) (why string, err error) {
	o := &r.s.Plan.Options
	var current *dlq.Record
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		current, err = r.d.Current(ctx, e)
		return err
	})
	if isGone(err) {
		return payloadGone, nil
	}
	if err != nil {
		return "", err
	}
	after, err := Patch(current.Data, o.Patch)
	if err != nil {
		return "the patch does not apply", nil //nolint:nilerr // that is why it is skipped
	}
	c := dlq.Change{
		Kind: dlq.ChangeEdited, Actor: r.d.cfg.Actor, Reason: o.Reason, Operation: r.id, Revision: e.Revision + 1,
		Edit: &dlq.Record{Data: after, Header: current.Header, BodySize: len(after)}, Diff: mergeDiff(current.Data, after),
	}
	err = r.retry(ctx, func(ctx context.Context) error {
		if err := r.d.store.PutRevision(ctx, e.ID, &c); err != nil {
			return err
		}
		return r.d.store.Change(ctx, e, c, nil)
	})
	if errors.Is(err, dlq.ErrEntryChanged) {
		return "changed meanwhile", nil
	}
	return "", err
}

const payloadGone = "its payload is gone"

// isGone reports whether a payload will not be there later either.
func isGone(err error) bool {
	return isOneOf(err, jetstream.ErrObjectNotFound, jetstream.ErrBucketNotFound, jetstream.ErrMsgNotFound, dlq.ErrObject)
}

// sendEntry sends what is claimed. If that cannot be done, the entry is released.
func (r *runner) sendEntry(ctx context.Context, e *dlq.Entry, claim uint64) error {
	var current *dlq.Record
	err := r.retry(ctx, func(ctx context.Context) (err error) {
		current, err = r.d.Current(ctx, e)
		return err
	})
	if isGone(err) {
		return r.release(ctx, e, payloadGone)
	}
	if err != nil {
		return err
	}
	owner, why, err := r.destination(ctx, e.Record)
	if why != "" {
		return r.release(ctx, e, why)
	}
	if err != nil {
		return err
	}
	msg, opts := r.message(e, current, claim, owner)
	return r.deliver(ctx, e, claim, msg, opts, r.trace(ctx, e, msg), false)
}

// deliver publishes what is sent for an entry. tried is that this was tried before
// and what came of it is not known; end ends its span.
func (r *runner) deliver(
	ctx context.Context, e *dlq.Entry, claim uint64, msg *nats.Msg, opts []jetstream.PublishOpt, end func(error), tried bool,
) error {
	tracked := r.s.Plan.Options.tracked()
	err := r.retry(ctx, func(ctx context.Context) error {
		// The answer to the try before may be lost, and the message handled since, and
		// gone from its stream: then that would store another.
		if tried || r.late() {
			if sent, err := r.sent(ctx, e, claim); sent || err != nil {
				return err
			}
		}
		if r.d.nc.IsReconnecting() {
			return nats.ErrDisconnected // the client would send it after the reconnect, when another process may have sent it
		}
		tried = true
		_, err := r.d.js.PublishMsg(ctx, msg, opts...)
		if errors.Is(err, jetstream.ErrNoStreamResponse) {
			// Its leader may be away. The server that knows the streams says if there is none.
			if _, nameErr := r.d.js.StreamNameBySubject(ctx, msg.Subject); errors.Is(nameErr, jetstream.ErrStreamNotFound) {
				return errNoStream
			}
		}
		return err
	})
	end(err)
	why := ""
	switch {
	case jsapi.Is(err, jsapi.CodeWrongLastSequence) && tracked:
		err = nil // it is there
	case errors.Is(err, errNoStream):
		why = fmt.Sprintf("no stream takes subject %q", targetName(msg.Subject, tracked))
	case errors.Is(err, nats.ErrMaxPayload), jsapi.Is(err, jsapi.CodeMessageTooLarge):
		why = "too large for its stream, with what a replay adds"
	case jsapi.Is(err, jsapi.CodeOtherStream):
		why = "another stream takes its subject now"
	}
	if why != "" {
		return r.release(ctx, e, why)
	}
	if err != nil || tracked {
		return err
	}
	sent := dlq.Change{Kind: dlq.ChangeSent, Actor: r.d.cfg.Actor, Operation: r.id, Target: r.s.Plan.Options.Target}
	err = r.retry(ctx, func(ctx context.Context) error { return r.d.store.Change(ctx, e, sent, nil) })
	return ignore(err, dlq.ErrEntryChanged) // somebody forced it
}

// trace begins the span of a replay, if there is telemetry.
func (r *runner) trace(ctx context.Context, e *dlq.Entry, msg *nats.Msg) (end func(error)) {
	if r.d.cfg.Telemetry == nil {
		return func(error) {}
	}
	dead := messaging.DeadLetter{
		Subject: msg.Subject, Consumer: e.Consumer, Traceparent: e.Failure.Traceparent, Origin: e.OriginTraceparent,
	}
	if r.s.Plan.Options.tracked() {
		// Who failed is an App's, which consumes declared subjects.
		dead.Subject, dead.Template, dead.Stream = e.Subject, e.Subject, e.Stream
	}
	op := r.d.cfg.Telemetry.Replay(ctx, &dead)
	maps.Copy(msg.Header, op.Header)
	return op.End
}

// targetName leaves out what is of one entry.
func targetName(subject string, tracked bool) string {
	if tracked {
		const tokens = 4 // monotel.replays.<stream>.<consumer>
		return strings.Join(strings.SplitN(subject, ".", tokens+1)[:tokens], ".") + ".>"
	}
	return subject
}

// notPlanned says why an entry is not for a consumer of the plan, or "". What is stored
// of an operation may be changed by others, and so may what it selects.
func (r *runner) notPlanned(rec *dlq.Record) string {
	if r.planned[[2]string{rec.Stream, rec.Consumer}] {
		return ""
	}
	return cmp.Or(nameProblem(rec.Stream, rec.Consumer), "its consumer is not in the plan")
}

// destination returns the stream that takes what is sent for a record. Otherwise it
// says why nothing is sent.
func (r *runner) destination(ctx context.Context, rec *dlq.Record) (owner, why string, err error) {
	o := &r.s.Plan.Options
	switch {
	case o.tracked():
		return rec.Stream, r.notPlanned(rec), nil
	case o.Target != TargetEveryone:
		return r.owner, "", nil
	}
	err = r.retry(ctx, func(ctx context.Context) (err error) {
		owner, why, err = r.owners.of(ctx, rec)
		return err
	})
	return owner, why, err
}

// message is what is sent for an entry. owner is the stream that takes it.
func (r *runner) message(e *dlq.Entry, current *dlq.Record, claim uint64, owner string) (*nats.Msg, []jetstream.PublishOpt) {
	o := &r.s.Plan.Options
	msg := &nats.Msg{Subject: current.Subject, Data: current.Data, Header: replayHeader(e, current, r.d.cfg.Stream, r.id, claim)}
	opts := []jetstream.PublishOpt{
		jetstream.WithRetryAttempts(0), jetstream.WithMsgID(r.id + "." + e.ID), jetstream.WithExpectStream(owner),
	}
	if subject, ok := strings.CutPrefix(o.Target, TargetSubject); ok {
		msg.Subject = subject
	}
	if o.tracked() {
		msg.Subject = dlq.ReplaySubject(e.Stream, e.Consumer, e.ID, r.id)
		opts = append(opts, jetstream.WithExpectLastSequencePerSubject(0))
	}
	return msg, opts
}

// replayHeader restores the original headers, but for those that steer the server
// and those that would continue a trace of long ago.
func replayHeader(e *dlq.Entry, current *dlq.Record, stream, operation string, claim uint64) nats.Header {
	h := make(nats.Header, len(current.Header))
	for k, vs := range current.Header {
		if hasPrefixFold(k, "Nats-") || hasPrefixFold(k, dlq.ReplayHeaderPrefix) {
			continue
		}
		if isTraceHeader(k) {
			continue
		}
		h[k] = append([]string(nil), vs...)
	}
	set := func(key, value string) {
		if value != "" {
			h[key] = []string{value}
		}
	}
	set(dlq.HeaderReplayOf, e.ID)
	set(dlq.HeaderReplayOperation, operation)
	set(dlq.HeaderReplayCount, strconv.Itoa(e.Replays))
	set(dlq.HeaderReplaySubject, current.Subject)
	set(dlq.HeaderReplayStream, stream)
	set(dlq.HeaderReplayClaim, strconv.FormatUint(claim, 10))
	set(dlq.HeaderReplayLinks, strings.TrimSpace(e.Failure.Traceparent+" "+e.OriginTraceparent))
	return h
}

// isTraceHeader reports whether a header continues a trace.
func isTraceHeader(key string) bool {
	switch strings.ToLower(key) {
	case "traceparent", "tracestate", "baggage":
		return true
	}
	return false
}

// release gives an entry back that was claimed and cannot be sent.
func (r *runner) release(ctx context.Context, e *dlq.Entry, why string) error {
	c := dlq.Change{Kind: dlq.ChangeReleased, Actor: r.d.cfg.Actor, Reason: why, Operation: r.id}
	err := r.retry(ctx, func(ctx context.Context) error { return r.d.store.Change(ctx, e, c, nil) })
	return ignore(err, dlq.ErrEntryChanged)
}

// retry calls f until it succeeds, or the error is one that does not pass. A
// server that is away, or a target that is full, is waited for until the
// operation is to end.
func (r *runner) retry(ctx context.Context, f func(context.Context) error) error {
	const first, longest = 100 * time.Millisecond, 2 * time.Second
	for wait := first; ; wait = min(2*wait, longest) {
		try, cancel := context.WithTimeout(ctx, answerTime)
		err := f(try)
		cancel()
		if err == nil || !passes(err) && ctx.Err() == nil {
			return err
		}
		r.mu.Lock()
		ending := r.ending != nil
		r.mu.Unlock()
		if ending {
			return fmt.Errorf("%w: %w", errStopped, err)
		}
		if pauseErr := pause(ctx, wait); pauseErr != nil {
			return joined(err, pauseErr)
		}
	}
}

// passes reports whether an error is one that goes away by itself.
func passes(err error) bool {
	if errors.Is(err, dlq.ErrStreamFull) {
		return false // a claim that the dead-letter stream cannot take
	}
	api, ok := errors.AsType[*jetstream.APIError](err)
	switch {
	case dlq.IsFull(err):
		return true
	case ok:
		// A cluster without a leader, or one that has not applied the try before yet.
		return api.Code == 503 || jsapi.Is(err, jsapi.CodeSubjectInProcess, jsapi.CodeIDInProcess) //nolint:mnd // as above
	case errors.Is(err, nats.ErrPermissionViolation), errors.Is(err, nats.ErrConnectionClosed):
		return false
	}
	return isOneOf(err, errNotVisible, errStalled, nats.ErrTimeout, context.DeadlineExceeded, nats.ErrNoResponders,
		jetstream.ErrNoStreamResponse, jetstream.ErrJetStreamNotEnabled, nats.ErrDisconnected, nats.ErrReconnectBufExceeded)
}

func isOneOf(err error, targets ...error) bool {
	return slices.ContainsFunc(targets, func(target error) bool { return errors.Is(err, target) })
}
