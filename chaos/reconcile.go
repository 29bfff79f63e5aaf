package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono"
)

// find reports a finding with the story of the message.
func (l *ledger) find(class string, at place, format string, args ...any) {
	f := finding{Class: class, Durable: at.durable, Seq: at.seq, ID: at.id, Detail: fmt.Sprintf(format, args...)}
	f.Kind = l.r.schedule.decide(at.id, at.durable, 0).kind
	for other, all := range l.handlings {
		if other.durable != at.durable || other.id != at.id {
			continue
		}
		for _, h := range all {
			text := h.String()
			if other.seq != at.seq {
				text += fmt.Sprintf(", as sequence %d", other.seq)
			}
			f.Proof = append(f.Proof, text)
		}
	}
	for _, d := range l.records[at] {
		f.Proof = append(f.Proof, d.String())
	}
	from, to := time.Time{}, time.Time{}
	if all := l.handlings[at]; len(all) > 0 {
		from, to = l.sent(all[0]), all[len(all)-1].at().Add(2*ackWait)
	}
	processes := make(map[string]bool)
	for _, h := range l.handlings[at] {
		processes[h.process] = true
	}
	for _, d := range l.r.disturbances {
		concerns := d.Process == ""
		for p := range processes {
			concerns = concerns || d.of(p)
		}
		if concerns && d.To.After(from) && d.From.Before(to) {
			f.Proof = append(f.Proof, d.String())
		}
	}
	slices.Sort(f.Proof)
	l.r.result.find(f)
}

func (d *disturbance) String() string {
	who := d.Process
	if who == "" {
		who = "the servers"
	}
	return fmt.Sprintf("%s %s of %s until %s", d.From.Format(clock), d.Kind, who, d.To.Format(clock))
}

func (d *deadLetter) String() string {
	var s strings.Builder
	fmt.Fprintf(&s, "%s dead letter %s: %s after %d deliveries, %q %q", d.at.Format(clock), d.ID, d.Reason, d.Deliveries, d.ReasonText, d.Error)
	for _, c := range d.changes {
		fmt.Fprintf(&s, "; %s %s %s", c.at.Format(clock), c.Kind, c.Operation)
	}
	return s.String()
}

// dead lists the places of dead letters, by durable and payload.
func (l *ledger) dead() map[string]map[string][]place {
	dead := make(map[string]map[string][]place)
	for at, all := range l.records {
		for _, d := range all {
			if dead[at.durable] == nil {
				dead[at.durable] = make(map[string][]place)
			}
			dead[at.durable][d.id] = append(dead[at.durable][d.id], at)
		}
	}
	return dead
}

// missing lists what was acknowledged, and neither handled with success nor
// dead-lettered.
func (l *ledger) missing() []place {
	var all []place
	dead := l.dead()
	for _, c := range l.r.schedule.consumers() {
		for _, id := range slices.Sorted(maps.Keys(l.acked)) {
			if strings.Split(id, "-")[1] != c.event || len(dead[c.durable][id]) > 0 {
				continue
			}
			if !slices.ContainsFunc(l.payloads[c.durable][id], func(seq uint64) bool {
				return slices.ContainsFunc(l.handlings[place{c.durable, seq, id}], (*handling).success)
			}) {
				all = append(all, place{c.durable, firstOf(l.payloads[c.durable][id]), id})
			}
		}
	}
	return all
}

// checkPublishes: each message that was acknowledged is handled with success or a dead
// letter, for each consumer of its event, and under one sequence.
func (l *ledger) checkPublishes() {
	for _, at := range l.missing() {
		l.find("lost", at, "acknowledged, neither handled with success nor a dead letter")
	}
	dead := l.dead()
	for _, c := range l.r.schedule.consumers() {
		for _, id := range slices.Sorted(maps.Keys(l.payloads[c.durable])) {
			seqs := slices.Clone(l.payloads[c.durable][id])
			for _, at := range dead[c.durable][id] {
				if !slices.Contains(seqs, at.seq) {
					seqs = append(seqs, at.seq)
				}
			}
			slices.Sort(seqs)
			if len(seqs) < 2 { //nolint:mnd // one is right
				continue
			}
			class := "stored_twice"
			if c.event == "Fan" { // by the server, which reads it from another stream
				class = "sourced_twice"
				if l.sourcedAgain(c.durable, id, seqs) {
					l.count("repeats", len(seqs)-1)
					l.count("repeat:sourced", len(seqs)-1)
					continue
				}
			}
			if class == "stored_twice" && l.publishedAgain(&c, id, seqs) {
				l.count("repeats", len(seqs)-1)
				l.count("repeat:stored", len(seqs)-1)
				continue
			}
			l.find(class, place{c.durable, seqs[1], id}, "the payload came under the sequences %v", seqs)
		}
	}
}

// noteTravels is how long a consumer may take until other instances, and its own next
// life, know that it has finished a sourced message.
const noteTravels = time.Second

// sourcedAgain reports whether a payload that a server has sourced again may be handled
// again: some handling of an earlier copy was not finished, or finished a moment before,
// when the server or its process was disturbed, or servers were, so that it could not be
// noted, or looked up. Guarantee 6 says so.
func (l *ledger) sourcedAgain(durable, id string, seqs []uint64) bool {
	for i, seq := range seqs {
		finished := false
		for _, h := range l.handlings[place{durable, seq, id}] {
			if l.unsettled(h) {
				return true
			}
			if i == len(seqs)-1 {
				break // the last copy is only looked up
			}
			for k := range l.r.disturbances {
				d := &l.r.disturbances[k]
				if d.of(h.process) && d.From.After(h.at()) && d.From.Before(h.end.Add(noteTravels)) {
					return true
				}
			}
			finished = finished || h.success() || h.gaveUp()
		}
		if !finished && i < len(seqs)-1 {
			return true
		}
	}
	return false
}

// unsettled reports whether servers were disturbed, or electing leaders, when a handling
// began or ended.
func (l *ledger) unsettled(h *handling) bool {
	return slices.ContainsFunc(l.r.disturbances, func(d disturbance) bool {
		return d.Process == "" && d.Kind != slowServer && d.From.Before(h.end.Add(noteTravels)) && d.To.Add(elections).After(h.at())
	})
}

// publishedAgain reports whether a message may be stored again that was published again
// with its ID: a server that is started again knows only the IDs of what its streams still
// have. Guarantee 1 says so.
func (l *ledger) publishedAgain(c *consumer, id string, seqs []uint64) bool {
	if c.retention.Retention == mono.LimitsPolicy {
		return false
	}
	for i := range seqs[1:] {
		first, second := l.handlings[place{c.durable, seqs[i], id}], l.handlings[place{c.durable, seqs[i+1], id}]
		restarted := func(d disturbance) bool {
			return (d.Kind == faultKillServer || d.Kind == faultRoll || d.Kind == faultDisk) &&
				d.To.After(first[0].at()) && d.From.Before(second[0].at())
		}
		if len(first) == 0 || len(second) == 0 || !slices.ContainsFunc(l.r.disturbances, restarted) {
			return false
		}
	}
	return true
}

func firstOf(seqs []uint64) uint64 {
	if len(seqs) == 0 {
		return 0
	}
	return seqs[0]
}

// How long after its end a handling's ack may be lost with the process, the link or the
// server that it was on.
const (
	ackTravels = 2 * time.Second
	ackStored  = 10 * time.Second
	// How long a cluster may elect leaders after a fault: what is acked to one that is
	// replaced is lost.
	elections = 10 * time.Second
	// Between a look at the dead-letter stream and the handler that it lets begin.
	lookup = time.Second
)

// sent returns when the message was published, before which no process had it.
func (l *ledger) sent(h *handling) time.Time {
	if d := l.byID[h.Of]; d != nil {
		for _, c := range d.changes {
			if c.Kind == dlq.ChangeReplaying && c.Operation == h.Op {
				return c.at
			}
		}
	}
	if at, ok := l.tried[h.ID]; ok && h.Op == "" {
		return at
	}
	return h.at().Add(-ackStored)
}

// explained returns the kind of disturbance that allows b after a, or "". Until when a
// disturbance of a's process counts depends on what a has decided: an ack is soon with
// the server, a verdict that waits for its capture is with the process.
func (l *ledger) explained(a, b *handling) string {
	from := l.sent(a)
	for i := range l.r.disturbances {
		d := &l.r.disturbances[i]
		to := d.To
		if d.Process == "" {
			to = to.Add(elections)
		}
		if !to.After(from) || d.From.After(b.at()) {
			continue
		}
		ofA, ofB := d.of(a.process), d.of(b.process)
		switch {
		case !ofA && !ofB:
			continue
		case a.success() && a.Op == "":
			// An orderly stop sends the acks.
			late := d.From.Sub(a.end)
			if d.Kind == endTerm || d.Process == "" && late > ackStored || d.Process != "" && late > ackTravels {
				continue
			}
		case !ofA && d.From.After(a.end) && d.Process != "":
			continue // a verdict is with its process, whatever happens to others
		}
		switch {
		case d.Process == "":
			return "server"
		case d.Kind == faultCut || d.Kind == faultStall || d.Kind == faultStop || d.Kind == wroteLag:
			return d.Kind
		case ofA:
			return d.Kind // its end
		}
	}
	return ""
}

// before names what had befallen the process of a handling, or the servers, within a few
// seconds before it.
func (l *ledger) before(h *handling) string {
	seen := make(map[string]bool)
	for i := range l.r.disturbances {
		d := &l.r.disturbances[i]
		if d.of(h.process) && d.Kind != wroteLag && d.Kind != slowServer && d.From.Before(h.at()) && d.To.After(h.at().Add(-ackStored)) {
			seen[d.Kind] = true
		}
	}
	if len(seen) == 0 {
		return "nothing"
	}
	return strings.Join(slices.Sorted(maps.Keys(seen)), ", ")
}

// checkHandlings looks at what was handled again after it was decided.
func (l *ledger) checkHandlings(at place, all []*handling) {
	slices.SortStableFunc(all, func(a, b *handling) int { return int(a.Time - b.Time) })
	succeeded := 0
	for i, a := range all {
		if a.success() {
			succeeded++
			l.count("success", 1)
		} else if a.outcome == outcomeOK {
			l.count("repeat:batch", 1)
		}
		if !a.success() && !a.gaveUp() || i == len(all)-1 {
			continue
		}
		if a.counted() && i+1 < a.Max {
			continue // deliveries that were handed back are no attempts
		}
		b := all[i+1]
		if a.Op != b.Op {
			continue // cannot be: a replay has a sequence of its own
		}
		if why := l.explained(a, b); why != "" {
			if a.success() {
				l.count("repeats", 1)
				l.count("repeat:"+why, 1)
			}
			continue
		}
		class := "held_handled_again"
		switch {
		case a.success() && a.Op != "":
			class = "replay_handled_again"
		case a.success():
			class = "success_repeated"
		}
		l.find(class, at, "attempt %d decided %s, attempt %d began after it, and nothing explains that", a.Attempt, a.outcome, b.Attempt)
	}
	if first := all[0]; first.Op != "" {
		l.checkReplay(at, all)
	}
}

// checkReplay: the outcome of a replay is stored once, and then it is not handled again.
func (l *ledger) checkReplay(at place, all []*handling) {
	first := all[0]
	d := l.byID[first.Of]
	if d == nil {
		l.find("replay_of_nothing", at, "there is no dead letter %s", first.Of)
		return
	}
	for _, c := range d.changes {
		if c.Operation != first.Op || c.Kind != dlq.ChangeResolved && c.Kind != dlq.ChangeFailedAgain {
			continue
		}
		for _, h := range all {
			if h.handedOver().After(c.at.Add(lookup)) {
				l.find("outcome_handled_again", at, "%s was stored at %s, and attempt %d began after that; before it: %s",
					c.Kind, c.at.Format(clock), h.Attempt, l.before(h))
			}
		}
		if c.Kind == dlq.ChangeResolved && !slices.ContainsFunc(all, (*handling).success) {
			l.find("resolved_without_success", at, "no handling of the replay has succeeded")
		}
	}
}

// checkRecords looks at the dead letters of one message.
func (l *ledger) checkRecords(at place, all []*deadLetter) {
	d := all[0]
	if len(all) > 1 {
		l.find("captured_twice", at, "%d records", len(all))
	}
	if d.Body != dlq.BodyInline { // they are small
		l.find("payload_lost", at, "the record has no payload: %s", d.Body)
	}
	handled := l.handlings[at]
	for _, h := range handled {
		if h.Op == "" && h.handedOver().After(d.at.Add(lookup)) {
			l.find("captured_handled_again", at, "captured at %s, and attempt %d began after that; before it: %s",
				d.at.Format(clock), h.Attempt, l.before(h))
		}
	}
	l.checkBoth(at, d, handled)
	l.checkReason(at, d, handled)
	l.checkHistory(at, d)
}

// ackLost reports whether the ack of a success may not have reached the server, or was
// forgotten there. Then the message may come back to a process that has given it up
// before.
func (l *ledger) ackLost(h *handling) bool {
	return slices.ContainsFunc(l.r.disturbances, func(d disturbance) bool {
		late := ackTravels
		if d.Process == "" {
			late = ackStored
		}
		if d.Kind == endTerm || d.Kind == wroteLag || d.Kind == slowServer { // they lose nothing
			return false
		}
		return d.of(h.process) && !d.To.Before(h.end) && d.From.Before(h.end.Add(late))
	})
}

// checkBoth: a message that was handled with success is no dead letter, unless its ack
// was lost and a later attempt gave it up.
func (l *ledger) checkBoth(at place, d *deadLetter, handled []*handling) {
	for _, h := range handled {
		if !h.success() {
			continue
		}
		later := slices.IndexFunc(handled, func(g *handling) bool { return g.gaveUp() && g.at().After(h.end) })
		if later >= 0 && l.explained(h, handled[later]) != "" || d.at.After(h.end) && l.ackLost(h) {
			continue
		}
		l.find("handled_and_dead", at, "attempt %d by %s succeeded, and the message is a dead letter: %s", h.Attempt, h.process, d.Reason)
		return
	}
}

// cutShort reports whether a handling may have ended without an outcome for monotel: the
// process ended in it, or nothing could be sent when it had decided.
func (l *ledger) cutShort(h *handling) bool {
	if h.outcome == "" || h.outcome == outcomeExit {
		return true
	}
	return slices.ContainsFunc(l.r.disturbances, func(d disturbance) bool {
		switch d.Kind {
		case endKill, endExit, endTerm, endStart, endStop, endOther, wroteLag, slowServer:
			return false
		}
		return d.of(h.process) && d.From.Before(h.end.Add(ackTravels)) && d.To.After(h.at())
	})
}

// checkReason: a message is dead for what it did, and not for what others did.
func (l *ledger) checkReason(at place, d *deadLetter, handled []*handling) {
	const crashes = 3
	kind := l.r.schedule.decide(d.id, at.durable, 0).kind
	unfinished := 0
	for _, h := range handled {
		if l.cutShort(h) {
			unfinished++
		}
	}
	if d.Reason == dlq.ReasonCrashed {
		switch {
		case kind == kindPoison:
		case unfinished >= crashes:
			l.count("crashed-by-kills", 1)
		default:
			l.find("crashed_without_crash", at, "dead as crashed after %d deliveries, and its handler was cut short %d times", d.Deliveries, unfinished)
		}
		return
	}
	if innocent(kind) {
		l.find("innocent_dead", at, "a message that always succeeds is dead: %s, %q", d.Reason, d.Error+d.ReasonText)
		return
	}
	want := map[string]dlq.Reason{
		kindPermanent: dlq.ReasonPermanentError, kindFlip: dlq.ReasonPermanentError, kindGateway: dlq.ReasonPermanentError,
		kindFail: dlq.ReasonAttemptsExhausted, kindLate: dlq.ReasonAttemptsExhausted, kindNak: dlq.ReasonAttemptsExhausted,
		kindPanic: dlq.ReasonPanic, kindTerm: dlq.ReasonTerminated, kindUndecodable: dlq.ReasonUndecodable, kindPoison: dlq.ReasonCrashed,
	}[kind]
	text := d.Error + d.ReasonText
	own := kind == kindNak || kind == kindUndecodable || strings.Contains(text, d.id+" of") || strings.Contains(text, "settle message")
	if d.Reason != want && !strings.Contains(text, "settle message") || !own {
		l.find("wrong_reason", at, "dead as %s, %q; it should be %s", d.Reason, text, want)
	}
}

// checkHistory: what was claimed has an outcome, and one.
func (l *ledger) checkHistory(at place, d *deadLetter) {
	outcomes := make(map[string]int)
	state := dlq.StateOpen
	for _, c := range d.changes {
		state = c.To()
		switch c.Kind {
		case dlq.ChangeReplaying:
			l.count("replays", 1)
		case dlq.ChangeResolved:
			l.count("resolved", 1)
			outcomes[c.Operation]++
		case dlq.ChangeFailedAgain:
			l.count("failed_again", 1)
			outcomes[c.Operation]++
		default: // it says nothing of what came of a replay
		}
	}
	for op, n := range outcomes {
		if n > 1 {
			l.find("outcome_twice", at, "%d outcomes of operation %s", n, op)
		}
	}
	if state == dlq.StateReplaying {
		l.find("replay_without_outcome", at, "it is replaying still")
	}
}

// checkStreams: what was handled or is dead has left work queues and interest streams,
// unless servers were disturbed.
func (l *ledger) checkStreams(ctx context.Context) error {
	var all []*jetstream.StreamInfo
	list := l.r.servers.js.ListStreams(ctx)
	for s := range list.Info() {
		all = append(all, s)
	}
	if err := list.Err(); err != nil {
		return err
	}
	for _, s := range all {
		if s.Config.Retention == jetstream.LimitsPolicy || s.State.Msgs == 0 {
			continue
		}
		// A server that is killed forgets that it has removed a message, and then
		// knows all the same that no consumer wants it.
		l.count("left", int(s.State.Msgs)) //nolint:gosec // a few thousand
		if !slices.ContainsFunc(l.r.disturbances, func(d disturbance) bool { return d.Process == "" && d.Kind != slowServer }) {
			l.r.result.find(finding{Class: "left_in_stream", Detail: fmt.Sprintf("%s has %d messages left", s.Config.Name, s.State.Msgs)})
		}
	}
	return nil
}
