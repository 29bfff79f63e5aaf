package triage

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
)

// The targets of a replay.
const (
	TargetConsumer = "consumer" // the consumer that failed, alone
	TargetEveryone = "everyone" // the original subject: each consumer of it gets the message again
	TargetSubject  = "subject=" // and a subject
)

// Options say how to replay.
type Options struct {
	// Target is TargetConsumer, TargetEveryone, or TargetSubject and a subject. The
	// default is TargetConsumer, whose outcomes are written back.
	Target string `json:"target"`

	Rate        float64 `json:"rate,omitempty"`          // messages a second, 0 without limit
	MaxInFlight int     `json:"max_in_flight,omitempty"` // sent and without an outcome, 0 without limit

	// Canary are numbers of messages: after each of them the operation waits for
	// the outcomes. After the last the rest follows.
	Canary []int `json:"canary,omitempty"`

	// StopIfFailing stops the operation when more than this part of the outcomes,
	// 0 to 1, is that it failed again. It is looked at after each step of a canary,
	// and all the time from 20 outcomes on. The default is 0.1 with Canary and else
	// none; less than 0 is none.
	StopIfFailing float64 `json:"stop_if_failing,omitempty"`

	Patch  json.RawMessage `json:"patch,omitempty"` // JSON merge patch over every payload, kept as an edit
	Reason string          `json:"reason,omitempty"`

	// MaxReplays leaves out what was replayed so often before. The default is 5.
	MaxReplays int `json:"max_replays,omitempty"`

	// Force takes also what was replayed more often, or is on its way by another
	// operation, which may have it handled twice.
	Force bool `json:"force,omitempty"`

	// NoWait has Run return when everything is sent, without the outcomes.
	NoWait bool `json:"no_wait,omitempty"`
}

const (
	defaultMaxReplays = 5
	defaultStop       = 0.1
	outcomesToStop    = 20
)

// withDefaults fills in the defaults, and checks the options.
func (o *Options) withDefaults() error {
	o.Target = cmp.Or(o.Target, TargetConsumer)
	if o.MaxReplays == 0 {
		o.MaxReplays = defaultMaxReplays
	}
	if o.StopIfFailing == 0 && len(o.Canary) > 0 {
		o.StopIfFailing = defaultStop
	}
	return o.validate()
}

// validate reports every problem at once.
func (o *Options) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrInvalid}, args...)...))
	}
	subject, toSubject := strings.CutPrefix(o.Target, TargetSubject)
	switch {
	case toSubject && subjectProblem(subject) != "":
		bad("target subject %.100q: %s", subject, subjectProblem(subject))
	case !toSubject && o.Target != TargetConsumer && o.Target != TargetEveryone:
		bad("target %q: want %s, %s, or %s and a subject", o.Target, TargetConsumer, TargetEveryone, TargetSubject)
	}
	if o.Rate != 0 && !(o.Rate >= slowest && o.Rate <= fastest) { // not NaN either
		bad("rate %v: want one a day to %.0g a second, or 0 for no limit", o.Rate, fastest)
	}
	if o.MaxInFlight < 0 {
		bad("max in flight %d: want 1 or more, or 0 for no limit", o.MaxInFlight)
	}
	if o.MaxReplays < 0 {
		bad("max replays %d: want 1 or more", o.MaxReplays)
	}
	if !(o.StopIfFailing <= 1) {
		bad("stop if failing %v: want a part, from 0 to 1", o.StopIfFailing)
	}
	if len(o.Canary) > mostSteps {
		bad("a canary of %d steps: want at most %d", len(o.Canary), mostSteps)
	}
	left := mostInSteps
	for _, n := range o.Canary[:min(len(o.Canary), mostSteps)] {
		if n < 1 || n > left {
			bad("canary step %d: want 1 or more, and at most %d in all steps", n, mostInSteps)
			break
		}
		left -= n
	}
	if len(o.Canary) > 0 && o.Target != TargetConsumer {
		bad("a canary needs outcomes, and only target %q has them", TargetConsumer)
	}
	if len(o.Patch) > 0 {
		if !isObject(o.Patch) {
			bad("patch: want a JSON object")
		}
	}
	return errors.Join(errs...)
}

// tracked reports whether the target's outcomes are written back.
func (o *Options) tracked() bool { return o.Target == TargetConsumer }

// A Plan is what a replay would do: a dry run. [Desk.Run] executes it, exactly.
type Plan struct {
	ID        string         `json:"id"`
	Created   time.Time      `json:"created"`
	Actor     string         `json:"actor"`
	Options   Options        `json:"options"`
	Query     string         `json:"query,omitempty"` // that selected, as text
	Group     string         `json:"group,omitempty"` // IDs of the groups that were selected, with commas between them
	Upto      uint64         `json:"upto"`            // the last sequence of the frozen selection
	Selected  int            `json:"selected"`
	Bytes     int64          `json:"bytes"` // of the payloads
	Oldest    time.Time      `json:"oldest,omitzero"`
	Newest    time.Time      `json:"newest,omitzero"`
	Duration  time.Duration  `json:"duration,omitempty"` // at the rate, 0 without one
	Groups    []Group        `json:"groups,omitempty"`
	Consumers []PlanConsumer `json:"consumers,omitempty"`
	LeftOut   map[string]int `json:"left_out,omitempty"` // entries that were selected and are left out, by why
	Warnings  []string       `json:"warnings,omitempty"`
	Problems  []string       `json:"problems,omitempty"` // with any of them it cannot be run

	Samples []*dlq.Entry `json:"-"` // at most 5, newest first, without payloads
	Diffs   []Diff       `json:"-"` // what the patch does to the samples

	items  []item // the frozen selection, oldest first, until it is stored
	stored bool
}

// A PlanConsumer is one target of a plan.
type PlanConsumer struct {
	Stream   string `json:"stream"`
	Consumer string `json:"consumer"`
	Count    int    `json:"count"`
	Paused   bool   `json:"paused,omitempty"`
	Waiting  int    `json:"waiting"` // pull requests: 0 is that nobody fetches
	Pending  uint64 `json:"pending"` // messages that wait before these
}

// A Diff is what a patch does to a payload.
type Diff struct {
	ID            string
	Before, After string // as indented JSON
}

// A Status says what an operation is doing.
type Status string

// The statuses.
const (
	StatusPlanned   Status = "planned"
	StatusRunning   Status = "running"
	StatusPaused    Status = "paused"
	StatusStopped   Status = "stopped" // by itself, as too many failed again
	StatusCancelled Status = "cancelled"
	StatusDone      Status = "done" // everything was tried
)

// An Operation is a replay: its plan, and how far it has come. The numbers are
// those of the dead-letter stream at the moment they were asked for, whoever is
// still at work.
type Operation struct {
	Plan

	Status  Status    `json:"status"`
	Why     string    `json:"why,omitempty"`    // it is paused, stopped or cancelled, or is to be
	Runner  string    `json:"runner,omitempty"` // the run that has it, as user@host/pid-xxxxxxxx
	Started time.Time `json:"started,omitzero"`
	Ended   time.Time `json:"ended,omitzero"`

	Claimed     int            `json:"claimed"` // entries that were taken in hand
	Resolved    int            `json:"resolved"`
	FailedAgain int            `json:"failed_again"`
	Sent        int            `json:"sent"`              // to others than the consumer that failed
	Released    int            `json:"released"`          // taken in hand, and given back unsent
	Skipped     map[string]int `json:"skipped,omitempty"` // by why; some of them were given back before
	Remaining   int            `json:"remaining"`         // neither sent, or about to be, nor skipped
	NewSince    int            `json:"new_since"`         // dead letters that came since the selection was frozen

	silent time.Duration // since its runner was heard of, by the server's clock
}

// InFlight is how many are sent, or about to be, and have no outcome yet.
func (o *Operation) InFlight() int {
	return max(o.Claimed-o.Resolved-o.FailedAgain-o.Sent-o.Released, 0)
}

// Interrupted reports whether its process has ended without saying so.
func (o *Operation) Interrupted() bool { return o.Status == StatusRunning && o.silent >= lease }

func (o *Operation) skipped() int {
	n := 0
	for _, k := range o.Skipped {
		n += k
	}
	return n
}

// A counted is what the changes in the dead-letter stream say of an operation, up
// to a sequence.
type counted struct {
	Upto        uint64 `json:"upto"`
	Claimed     int    `json:"claimed"`
	Resolved    int    `json:"resolved"`
	FailedAgain int    `json:"failed_again"`
	Sent        int    `json:"sent"`
	Released    int    `json:"released"`
	New         int    `json:"new"`

	// Skipped are those of the released that cannot be sent, by why. They are
	// counted here, and not with those that were skipped before they were claimed:
	// so the claim and what became of it are always seen in their order.
	Skipped map[string]int `json:"skipped,omitempty"`
}

// clone is a copy that does not change with n.
func (n *counted) clone() counted {
	c := *n
	c.Skipped = maps.Clone(n.Skipped)
	return c
}

// add counts one message.
func (n *counted) add(m *message, operation string) {
	n.Upto = m.sequence
	if !dlq.IsChange(m.header) {
		n.New++
		return
	}
	if m.header.Get(dlq.HeaderChangeOperation) != operation {
		return
	}
	switch dlq.ChangeKind(m.header.Get(dlq.HeaderChange)) { //nolint:exhaustive // the others are not counted
	case dlq.ChangeReplaying:
		n.Claimed++
	case dlq.ChangeResolved:
		n.Resolved++
	case dlq.ChangeFailedAgain:
		n.FailedAgain++
	case dlq.ChangeSent:
		n.Sent++
	case dlq.ChangeReleased:
		n.Released++
		if c, err := dlq.DecodeChange(m.header, nil); err == nil && !strings.HasPrefix(c.Reason, whyCancelled) {
			if n.Skipped == nil {
				n.Skipped = make(map[string]int)
			}
			n.Skipped[c.Reason]++
		}
	}
}

// A stored operation is what is written down of it.
type stored struct {
	Version int            `json:"version"`
	Plan    Plan           `json:"plan"`
	Status  Status         `json:"status"`
	Want    Status         `json:"want,omitempty"` // what somebody has asked its runner for
	WantBy  string         `json:"want_by,omitempty"`
	Why     string         `json:"why,omitempty"`
	Runner  string         `json:"runner,omitempty"`
	Started time.Time      `json:"started,omitzero"`
	Ended   time.Time      `json:"ended,omitzero"`
	Cursor  int            `json:"cursor"`            // entries of the selection before it are done with
	Skipped map[string]int `json:"skipped,omitempty"` // before they were claimed, by why
	Counted counted        `json:"counted"`
	InHand  bool           `json:"in_hand,omitempty"` // it is cancelled, and what it had in hand is not given back yet

	revision uint64        // in the bucket
	silent   time.Duration // since it was written, if it is running, by the server's clock
}

func (s *stored) operation(n counted) *Operation {
	o := &Operation{
		Plan: s.Plan, Status: s.Status, Why: s.Why, Runner: s.Runner, Started: s.Started, Ended: s.Ended, silent: s.silent,
		Claimed: n.Claimed, Resolved: n.Resolved, FailedAgain: n.FailedAgain, Sent: n.Sent, Released: n.Released, NewSince: n.New,
		Skipped: maps.Clone(s.Skipped),
	}
	if o.Skipped == nil && len(n.Skipped) > 0 {
		o.Skipped = make(map[string]int)
	}
	for why, k := range n.Skipped {
		o.Skipped[why] += k
	}
	o.Remaining = max(o.Selected-(o.Claimed-o.Released)-o.skipped(), 0)
	switch {
	case s.Status == StatusRunning && s.Want != "":
		o.Why = fmt.Sprintf("to be %s, as %s has asked", s.Want, s.WantBy)
	case s.InHand:
		o.Why += "; what it had in hand is not all given back yet: if it stays so, cancel it again"
	}
	return o
}

// cancel ends the operation for good.
func (s *stored) cancel(by string) {
	s.Status, s.Why, s.Ended = StatusCancelled, "cancelled by "+by, time.Now()
	s.InHand = !s.Started.IsZero()
	s.Runner, s.Want, s.WantBy = "", "", ""
}

// lost is what a runner is told that has the operation no more.
func (s *stored) lost() error {
	if s.Runner == "" {
		return fmt.Errorf("operation %s is %s meanwhile: %s: %w", s.Plan.ID, s.Status, s.Why, ErrState)
	}
	return fmt.Errorf("operation %s was taken over by %s: %w", s.Plan.ID, s.Runner, ErrClaimed)
}

// Operation returns a plan or an operation with its present numbers: those that
// were written down last, and what the dead-letter stream has had since.
func (d *Desk) Operation(ctx context.Context, id string) (*Operation, error) {
	s, err := d.load(ctx, id)
	if err != nil {
		return nil, err
	}
	n := s.Counted
	if err := d.count(ctx, &n, id); err != nil {
		return nil, err
	}
	return s.operation(n), nil
}

// count goes on with counting until now.
func (d *Desk) count(ctx context.Context, n *counted, id string) error {
	info, err := d.info(ctx)
	if err != nil {
		return err
	}
	for n.Upto < info.State.LastSeq {
		rd, err := d.readSome(ctx, n.Upto+1, min(n.Upto+chunk, info.State.LastSeq), true)
		if err != nil {
			return err
		}
		for i := range rd.messages {
			n.add(&rd.messages[i], id)
		}
		n.Upto = rd.upto
	}
	return nil
}

// Operations lists operations, newest first, with the numbers that were written
// down last. Plans that were not run are among them as [StatusPlanned]. Those that are
// [ErrUnreadable] are left out, and named in an error that comes with the others.
func (d *Desk) Operations(ctx context.Context) ([]*Operation, error) {
	_, err := d.operations(ctx, false)
	if errors.Is(err, jetstream.ErrBucketNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	ids, err := d.operationIDs(ctx)
	if err != nil {
		return nil, err
	}
	var all []*Operation
	var unreadable []error
	for _, id := range ids {
		s, err := d.load(ctx, id)
		switch {
		case errors.Is(err, ErrNotFound): // removed since
		case errors.Is(err, ErrUnreadable):
			unreadable = append(unreadable, err)
		case err != nil:
			return all, err
		default:
			all = append(all, s.operation(s.Counted))
		}
	}
	if n := len(unreadable); n > samples {
		unreadable = append(unreadable[:samples], fmt.Errorf("%d more operations: %w", n-samples, ErrUnreadable))
	}
	return all, errors.Join(unreadable...)
}

// Pause has the process that runs an operation stop sending. What is sent goes on
// to its consumer. [Desk.Run] resumes it. One that is to be cancelled is an
// [ErrState].
func (d *Desk) Pause(ctx context.Context, id string) error {
	_, err := d.change(ctx, id, func(s *stored) error {
		switch {
		case s.Status != StatusRunning:
			return fmt.Errorf("operation %s is %s, and not running: %w", id, s.Status, ErrState)
		case s.Want == StatusCancelled:
			return fmt.Errorf("operation %s is to be cancelled, as %s has asked: %w", id, s.WantBy, ErrState)
		case s.silent >= lease: // there is nobody to ask
			s.Status, s.Why, s.Runner, s.Want, s.WantBy = StatusPaused, "paused by "+d.cfg.Actor, "", "", ""
		default:
			s.Want, s.WantBy = StatusPaused, d.cfg.Actor
		}
		return nil
	})
	return err
}

// Cancel ends an operation for good, or a plan. What is sent goes on to its
// consumer; what was taken in hand and not sent is open again. That is so when
// Cancel returns: it waits for the process that runs the operation, and does it
// itself if that process does not live. So it is not to be called by what Run calls
// for its progress.
//
// If it returns an error, or ctx ends, it can be called again. To others than the
// consumer that failed an entry may have been sent although it is open again, if the
// process that ran the operation has ended in the middle of it: its history says so.
func (d *Desk) Cancel(ctx context.Context, id string) error {
	var runner watch
	for asked := false; ; asked = true {
		s, err := d.change(ctx, id, func(s *stored) error {
			switch {
			case s.Status == StatusCancelled && (asked || s.InHand):
				return errAsItIs
			case s.Status == StatusDone || s.Status == StatusCancelled:
				return fmt.Errorf("operation %s is %s already: %w", id, s.Status, ErrState)
			case s.Status != StatusRunning || runner.dead(s):
				s.cancel(d.cfg.Actor)
			case s.Want == StatusCancelled:
				return errAsItIs
			default:
				s.Want, s.WantBy = StatusCancelled, d.cfg.Actor
			}
			return nil
		})
		switch {
		case err != nil && !errors.Is(err, errAsItIs):
			return err
		case s.Status == StatusCancelled:
			return d.giveBack(ctx, s)
		}
		if err := pause(ctx, heartbeat); err != nil {
			return fmt.Errorf("operation %s is to be cancelled, and %s has not done so yet: %w", id, s.Runner, err)
		}
	}
}

var errAsItIs = errors.New("nothing is to be changed")

// giveBack releases what a cancelled operation had in hand, and notes that it has
// nothing any more.
func (d *Desk) giveBack(ctx context.Context, s *stored) error {
	if !s.InHand {
		return nil
	}
	if err := d.releaseUnsent(ctx, s); err != nil {
		return err
	}
	s.InHand = false
	_, err := d.change(ctx, s.Plan.ID, func(s *stored) error {
		s.InHand = false
		return nil
	})
	return err
}

// A watch finds out whether the runner of an operation is dead: it has not been
// heard of for a lease, by the clock of the one who watches. Clocks of different
// hosts are not compared.
type watch struct {
	revision uint64 // that was seen last
	since    time.Time
	heard    int // how often something was written since the watch has begun
}

func (w *watch) dead(s *stored) bool {
	if s.revision != w.revision {
		if w.revision != 0 {
			w.heard++
		}
		w.revision, w.since = s.revision, time.Now()
	}
	return time.Since(w.since) >= lease || s.silent >= longSilence
}

// tidy removes plans that nobody has run, and operations that ended long ago.
func (d *Desk) tidy(ctx context.Context) error {
	all, err := d.Operations(ctx)
	if err != nil && !errors.Is(err, ErrUnreadable) {
		return err
	}
	kv, err := d.operations(ctx, false)
	if err != nil {
		return err
	}
	for _, o := range all {
		old := o.Status == StatusPlanned && time.Since(o.Created) > planLife || !o.Ended.IsZero() && time.Since(o.Ended) > endedLife
		if !old {
			continue
		}
		if err := kv.Purge(ctx, operationKey(o.ID)); err != nil {
			return fmt.Errorf("remove old operation %s: %w", o.ID, err)
		}
		parts, err := d.keys(ctx, selectionKeys(o.ID))
		if err != nil {
			return err
		}
		for _, key := range parts {
			if err := kv.Purge(ctx, key); err != nil {
				return fmt.Errorf("remove old operation %s: %w", o.ID, err)
			}
		}
	}
	return nil
}
