package screen

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"charm.land/bubbles/v2/key"
	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/internal/shell"
)

// A replay is an operation that this screen has begun.
type replay struct {
	id      string
	total   int
	op      *triage.Operation // as far as it has come; nil before that is known
	running bool
	cancel  context.CancelFunc // pauses it
	updates latest[*triage.Operation]
	done    chan struct{}
}

type (
	planMsg struct {
		load int
		what string
		plan *triage.Plan
		err  error
	}
	progressMsg struct {
		replay *replay
		op     *triage.Operation
	}
	replayDoneMsg struct {
		replay *replay
		op     *triage.Operation
		err    error
	}
	// An askedMsg is the answer to a wish to pause or cancel.
	askedMsg struct {
		replay *replay
		cancel bool
		err    error
	}
)

// ended reports whether there is nothing to go on with.
func (r *replay) ended() bool {
	return !r.running && r.op != nil && (r.op.Status == triage.StatusDone || r.op.Status == triage.StatusCancelled)
}

// summary is how far it has come, on one line.
func (r *replay) summary() string {
	if r.op == nil {
		return "replay of " + plural(r.total, "dead letter") + " begins"
	}
	return fmt.Sprintf("%s of %s sent, %s resolved, %s failed again, %s in flight", count(r.op.Claimed-r.op.Released), count(r.total),
		count(r.op.Resolved), count(r.op.FailedAgain), count(r.op.InFlight()))
}

// askReplay asks for a reason. The plan comes next: it is made with the reason, so
// that what is shown then is what is run.
func (m *model) askReplay() {
	if m.refuse() {
		return
	}
	var sel triage.Selection
	var what string
	var lines func(width int) []string
	if m.page == pageGroups {
		g, ok := m.groups.selected()
		if !ok {
			return
		}
		states := tabStates(m.tab)
		if m.tab == tabAll {
			states = tabStates(tabOpen)
		}
		sel = triage.Selection{Where: m.where, Groups: []string{g.ID}, States: states}
		what = "the group"
		lines = func(int) []string {
			which := "Those of this group that are " + statesText(states) + ":"
			return slices.Concat([]string{which}, m.groupLines(&g), m.skippedOf(g.ID))
		}
	} else {
		chosen := slices.Clone(m.chosen())
		if len(chosen) == 0 {
			return
		}
		for _, e := range chosen {
			sel.IDs = append(sel.IDs, e.ID)
		}
		what = plural(len(chosen), "dead letter")
		lines = func(width int) []string { return m.samples(chosen, width) }
	}
	d := &dialog{title: "Replay " + what + "?", yes: "plan", reason: &input{}}
	d.lines = func(width int) []string {
		return append([]string{"A plan is made first. Nothing is sent before you have seen it."}, lines(width)...)
	}
	d.accept = func(reason string) tea.Cmd { return m.plan(sel, what, reason) }
	m.dialog = d
}

// plan makes the plan of a replay.
func (m *model) plan(sel triage.Selection, what, reason string) tea.Cmd {
	m.dialog = &dialog{title: "Replay " + what + "?", lines: func(int) []string { return []string{"The plan is being made."} }}
	desk := m.desk
	return m.dialog.wait.start(m, "planning", func(ctx context.Context, n int) tea.Msg {
		p, err := desk.DryRun(ctx, sel, triage.Options{Reason: reason})
		return planMsg{load: n, what: what, plan: p, err: err}
	})
}

// planned shows a plan and asks whether to run it.
func (m *model) planned(msg planMsg) {
	if m.dialog == nil || !m.dialog.wait.done(msg.load) {
		return
	}
	m.dialog = nil
	if msg.err != nil {
		m.fail(msg.err)
		return
	}
	p := msg.plan
	d := &dialog{title: "Replay " + msg.what + ": the plan"}
	d.lines = func(width int) []string { return m.planLines(p, width) }
	if p.Selected > 0 && len(p.Problems) == 0 {
		d.yes = "replay " + count(p.Selected)
		d.accept = func(string) tea.Cmd { return m.runReplay(p.ID, p.Selected, p) }
	}
	m.dialog = d
}

// planLines say exactly what a replay would do.
func (m *model) planLines(p *triage.Plan, width int) []string {
	var lines []string
	add := func(format string, args ...any) { lines = append(lines, fmt.Sprintf(format, args...)) }
	switch {
	case p.Selected == 0:
		add("There is nothing to replay.")
	case len(p.Problems) > 0:
		add("%s would be sent, but it cannot be run:", plural(p.Selected, "dead letter"))
	default:
		add("%s will be sent, %s:", plural(p.Selected, "dead letter"), bytesText(p.Bytes))
	}
	for _, s := range p.Problems {
		lines = append(lines, m.styled(m.style.bad, "problem: "+safe.Line(s), width)...)
	}
	for _, c := range p.Consumers {
		text := fmt.Sprintf("  %s to %s", count(c.Count), safe.Line(c.Stream+"/"+c.Consumer))
		switch p.Options.Target {
		case triage.TargetConsumer, "": // the consumer, and nobody else
		default:
			text += ", sent to " + safe.Line(p.Options.Target)
		}
		lines = append(lines, text)
	}
	for _, s := range p.Warnings {
		lines = append(lines, m.styled(m.style.warn, "warning: "+safe.Line(s), width)...)
	}
	for _, why := range slices.Sorted(maps.Keys(p.LeftOut)) {
		add("left out: %s, %s", count(p.LeftOut[why]), safe.Line(why))
	}
	if p.Selected > 0 {
		add("failed from %s to %s", m.when(p.Oldest), m.when(p.Newest))
		lines = append(lines, m.samples(p.Samples, width)...)
		add("plan %s by %s", safe.Line(p.ID), safe.Line(p.Actor))
	}
	if p.Options.Reason != "" {
		add("reason: %s", safe.Line(p.Options.Reason))
	}
	return lines
}

// runReplay runs a plan, or goes on with an operation if the plan is nil.
func (m *model) runReplay(id string, total int, plan *triage.Plan) tea.Cmd {
	ctx, cancel := context.WithCancel(m.ctx)
	r := &replay{id: id, total: total, running: true, cancel: cancel, updates: make(latest[*triage.Operation], 1)}
	r.done = make(chan struct{})
	if m.replay != nil && m.replay.id == id {
		r.op = m.replay.op
	}
	m.replay = r
	m.openReplay()
	desk := m.desk
	work := m.work.cmd(func() tea.Msg {
		defer close(r.done)
		defer cancel()
		if plan != nil {
			if err := desk.StorePlan(ctx, plan); err != nil {
				return replayDoneMsg{replay: r, err: err}
			}
		}
		op, err := desk.Run(ctx, id, r.updates.put)
		if op == nil { // such as when another process runs it
			op, _ = desk.Operation(ctx, id)
		}
		return replayDoneMsg{replay: r, op: op, err: err}
	})
	return tea.Batch(work, m.watch(r))
}

// watch waits for the next that is known of a replay.
func (m *model) watch(r *replay) tea.Cmd {
	return m.work.cmd(func() tea.Msg {
		select {
		case op := <-r.updates:
			return progressMsg{r, op}
		case <-r.done:
			return nil
		}
	})
}

// replayDone says what has come of a replay.
func (m *model) replayDone(msg replayDoneMsg) tea.Cmd {
	r := msg.replay
	r.running = false
	if msg.op != nil {
		r.op = msg.op
	}
	switch status := r.status(); {
	case msg.err != nil && !isCancelled(msg.err):
		m.fail(fmt.Errorf("replay %s: %w", r.id, msg.err))
	case status == triage.StatusDone && r.op.FailedAgain == 0:
		m.say("Replay done: " + r.summary() + ".")
	case status == triage.StatusDone:
		m.complain("Replay done: " + r.summary() + ".")
	default:
		m.complain(fmt.Sprintf("Replay %s: %s.", status, r.summary()))
	}
	return m.goOn()
}

func (r *replay) status() triage.Status {
	switch {
	case r.running:
		return triage.StatusRunning
	case r.op == nil:
		return triage.StatusPaused
	default:
		return r.op.Status
	}
}

// openReplay shows how far the replay has come. Closing that does not stop it.
func (m *model) openReplay() {
	r := m.replay
	if r == nil {
		m.say("No replay was begun here.")
		return
	}
	d := &dialog{title: "Replay " + r.id}
	d.lines = func(width int) []string { return m.replayLines(width) }
	d.keys = m.replayKeys()
	m.dialog = d
}

// replayKeys are what can be done about the replay in its state.
func (m *model) replayKeys() []dialogKey {
	r := m.replay
	bind := func(k, does string, do func() tea.Cmd) dialogKey {
		return dialogKey{key.NewBinding(key.WithKeys(k), key.WithHelp(k, does)), do}
	}
	cancel := bind("c", "cancel", func() tea.Cmd {
		m.askCancel(r)
		return nil
	})
	switch {
	case r.running:
		return []dialogKey{bind("p", "pause", func() tea.Cmd {
			m.say("Pausing.")
			return m.ask(r, false)
		}), cancel}
	case !r.ended():
		return []dialogKey{bind("r", "go on", func() tea.Cmd {
			if m.refuse() {
				return nil
			}
			m.status = ""
			return m.runReplay(r.id, r.total, nil)
		}), cancel}
	}
	return nil
}

func (m *model) askCancel(r *replay) {
	d := &dialog{title: "Cancel the replay for good?", yes: "cancel it"}
	d.lines = func(int) []string {
		return []string{
			r.summary() + ".",
			"No more is sent. What is sent goes on to its consumer; what was taken in hand and not sent is open again.",
		}
	}
	d.no = func() tea.Cmd {
		m.openReplay()
		return nil
	}
	d.accept = func(string) tea.Cmd {
		m.openReplay()
		m.say("Cancelling.")
		return m.ask(r, true)
	}
	m.dialog = d
}

// ask has an operation paused or cancelled.
func (m *model) ask(r *replay, cancel bool) tea.Cmd {
	ctx, desk := m.ctx, m.desk
	do := desk.Pause
	if cancel {
		do = desk.Cancel
	}
	return m.work.cmd(func() tea.Msg { return askedMsg{replay: r, cancel: cancel, err: do(ctx, r.id)} })
}

// operationAsked takes note of a cancelled operation that nobody runs. One that
// runs comes to its end, and says so.
func (m *model) operationAsked(msg askedMsg) tea.Cmd {
	r := msg.replay
	if msg.err != nil || !msg.cancel || r.running || m.replay != r {
		return nil
	}
	if r.op == nil {
		r.op = &triage.Operation{}
	}
	op := *r.op
	op.Status = triage.StatusCancelled
	r.op = &op
	m.say("Replay cancelled: " + r.summary() + ".")
	return m.goOn()
}

// replayLines say how far the replay has come.
func (m *model) replayLines(width int) []string {
	r := m.replay
	m.dialog.keys = m.replayKeys()
	op := r.op
	if op == nil {
		return []string{title(r.summary()) + "."}
	}
	tried := r.total - op.Remaining
	lines := []string{
		fmt.Sprintf("%s: %s of %s tried", r.status(), count(tried), count(r.total)),
		bar(tried, r.total, min(width, 50)),
		fmt.Sprintf("sent %s · resolved %s · failed again %s · in flight %s", count(op.Claimed-op.Released), count(op.Resolved),
			count(op.FailedAgain), count(op.InFlight())),
	}
	if op.Sent > 0 {
		lines = append(lines, count(op.Sent)+" to others than the consumer that failed, who do not say what comes of it")
	}
	for _, why := range slices.Sorted(maps.Keys(op.Skipped)) {
		lines = append(lines, fmt.Sprintf("skipped: %s, %s", count(op.Skipped[why]), safe.Line(why)))
	}
	if op.NewSince > 0 {
		lines = append(lines, plural(op.NewSince, "new dead letter")+" since the plan was made")
	}
	if op.Why != "" && !r.running {
		lines = append(lines, "why: "+safe.Line(op.Why))
	}
	switch {
	case r.running:
		lines = append(lines, "It goes on when this is closed; o opens it again.")
	case !r.ended():
		lines = append(lines, "To go on elsewhere: "+shell.Command("monotel dlq ops resume", []string{r.id}))
	}
	return lines
}

// bar is a progress bar.
func bar(n, all, width int) string {
	full := 0
	if all > 0 {
		full = min(max(n, 0), all) * width / all
	}
	return strings.Repeat("█", full) + strings.Repeat("░", width-full)
}
