package screen

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// A change is something that is done about each of some dead letters.
type change struct {
	verb, past string
	from       []dlq.State // in which it can be done
	means      string
	do         func(Desk, context.Context, *dlq.Entry, string) error
}

var (
	discarding = &change{
		"discard", "discarded",
		[]dlq.State{dlq.StateOpen, dlq.StateSent, dlq.StateResolved, dlq.StateArchived},
		"The payload is gone for good. What is left is that it was, who has discarded it, when and why.", Desk.Discard,
	}
	archiving = &change{
		"archive", "archived",
		[]dlq.State{dlq.StateOpen, dlq.StateSent, dlq.StateResolved},
		"It is put aside and kept. To take it back: u, where the archived ones are listed.", Desk.Archive,
	}
	restoring = &change{
		"restore", "restored",
		[]dlq.State{dlq.StateArchived, dlq.StateSent, dlq.StateResolved},
		"It is open again.", Desk.Restore,
	}
)

func (c *change) can(e *dlq.Entry) bool { return slices.Contains(c.from, e.State) }

// A bulk is a change that goes on.
type bulk struct {
	*change

	total, done, failed int
	cancel              context.CancelFunc
	updates             latest[bulkProgressMsg]
	ended               chan struct{}
}

func (b *bulk) progress() string {
	text := fmt.Sprintf("%s of %s %s", count(b.done), count(b.total), b.past)
	if b.failed > 0 {
		text += ", " + count(b.failed) + " not"
	}
	return text
}

type (
	countedMsg struct {
		load   int
		change *change
		group  triage.Group
		sel    triage.Selection
		found  found
		err    error
	}
	bulkProgressMsg struct {
		bulk         *bulk
		done, failed int
	}
	bulkDoneMsg struct {
		bulk         *bulk
		done, failed int
		err          error // the first, or what has ended it
	}
)

// found is what a selection is, counted before it is changed.
type found struct {
	count          int
	upto           uint64
	oldest, newest time.Time
}

// refuse says why nothing can be changed now, if so.
func (m *model) refuse() bool {
	if m.busy() {
		m.complain("Something is going on already: " + m.waitingFor() + ".")
	}
	return m.busy()
}

// askChange asks whether to change what is chosen.
func (m *model) askChange(c *change) tea.Cmd {
	if m.refuse() {
		return nil
	}
	if m.page == pageGroups {
		return m.askChangeGroup(c)
	}
	chosen := m.chosen()
	var entries []*dlq.Entry
	for _, e := range chosen {
		if c.can(e) {
			copied := *e // what is shown is not changed while it is drawn
			entries = append(entries, &copied)
		}
	}
	switch {
	case len(chosen) == 0:
		return nil
	case len(entries) == 0:
		m.complain(fmt.Sprintf("Cannot %s what is %s.", c.verb, chosen[0].State))
		return nil
	}
	d := &dialog{title: fmt.Sprintf("%s %s?", title(c.verb), plural(len(entries), "dead letter")), yes: c.verb, reason: &input{}}
	d.lines = func(width int) []string {
		lines := []string{c.means}
		if n := len(chosen) - len(entries); n > 0 {
			lines = append(lines, fmt.Sprintf("%s of the marked are left out: their state does not allow it.", count(n)))
		}
		return append(lines, m.samples(entries, width)...)
	}
	d.accept = func(reason string) tea.Cmd {
		return m.startBulk(c, len(entries), reason, func(ctx context.Context, yield func(*dlq.Entry) error) error {
			for _, e := range entries {
				if err := errors.Join(ctx.Err(), yield(e)); err != nil {
					return err
				}
			}
			return nil
		})
	}
	m.dialog = d
	return nil
}

// samples are some of the entries, one on each line.
func (m *model) samples(entries []*dlq.Entry, width int) []string {
	const most = 5
	var lines []string
	for _, e := range entries[:min(len(entries), most)] {
		lines = append(lines, oneLine("  "+beginning(e.ID, shortID)+"  "+m.ago(e.Failure.Failed)+"  "+errorText(e.Failure), width))
	}
	if n := len(entries) - most; n > 0 {
		lines = append(lines, "  and "+count(n)+" more")
	}
	return lines
}

// askChangeGroup counts a group before it asks: what fails from then on is not
// meant.
func (m *model) askChangeGroup(c *change) tea.Cmd {
	g, ok := m.groups.selected()
	if !ok {
		return nil
	}
	sel := triage.Selection{Where: m.where, Groups: []string{g.ID}}
	for _, s := range tabStates(m.tab) {
		if slices.Contains(c.from, s) {
			sel.States = append(sel.States, s)
		}
	}
	if len(sel.States) == 0 {
		m.complain(fmt.Sprintf("Cannot %s what is %s.", c.verb, tabNames[m.tab]))
		return nil
	}
	d := &dialog{title: title(c.verb) + " the group?"}
	d.lines = func(int) []string { return m.groupLines(&g) }
	m.dialog = d
	desk := m.desk
	return d.wait.start(m, "counting", func(ctx context.Context, n int) tea.Msg {
		msg := countedMsg{load: n, change: c, group: g, sel: sel}
		msg.err = each(ctx, desk, sel, func(e *dlq.Entry) error {
			msg.found.add(e)
			return nil
		})
		return msg
	})
}

// each calls f for the selected entries until it returns an error.
func each(ctx context.Context, desk Desk, sel triage.Selection, f func(*dlq.Entry) error) error {
	for e, err := range desk.Entries(ctx, sel, false) {
		if e == nil && errors.Is(err, dlq.ErrNotARecord) {
			continue
		}
		if e != nil {
			err = f(e)
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
	return nil
}

func (f *found) add(e *dlq.Entry) {
	f.count++
	f.upto = max(f.upto, e.Sequence)
	failed := e.Failure.Failed
	if f.oldest.IsZero() || failed.Before(f.oldest) {
		f.oldest = failed
	}
	if failed.After(f.newest) {
		f.newest = failed
	}
}

// counted asks whether to change the group, of which is known now how large it is.
func (m *model) counted(msg countedMsg) {
	if m.dialog == nil || !m.dialog.wait.done(msg.load) {
		return
	}
	m.dialog = nil
	switch {
	case msg.err != nil:
		m.fail(msg.err)
		return
	case msg.found.count == 0:
		m.complain("There is none left to " + msg.change.verb + ".")
		return
	}
	c, sel, found, desk := msg.change, msg.sel, msg.found, m.desk
	sel.Upto = found.upto
	d := &dialog{title: fmt.Sprintf("%s %s?", title(c.verb), plural(found.count, "dead letter")), yes: c.verb, reason: &input{}}
	d.lines = func(int) []string {
		which := fmt.Sprintf("All of this group that are %s, failed from %s to %s:", statesText(sel.States), m.when(found.oldest), m.when(found.newest))
		return slices.Concat([]string{c.means, which}, m.groupLines(&msg.group), m.skippedOf(msg.group.ID))
	}
	d.accept = func(reason string) tea.Cmd {
		return m.startBulk(c, found.count, reason, func(ctx context.Context, f func(*dlq.Entry) error) error {
			return each(ctx, desk, sel, f)
		})
	}
	m.dialog = d
}

// groupLines say which group is meant, and by which query.
func (m *model) groupLines(g *triage.Group) []string {
	lines := []string{"  " + safe.Line(g.Stream+"/"+g.Consumer), "  " + safe.Line(beginning(g.Title, maxLine))}
	if m.where != nil {
		lines = append(lines, "  where "+safe.Line(m.where.Text()))
	}
	return lines
}

// skippedOf reminds of what is not seen and meant all the same.
func (m *model) skippedOf(group string) []string {
	n := 0
	for _, of := range m.skipped {
		if of == group {
			n++
		}
	}
	if n == 0 {
		return nil
	}
	return []string{"Those that you have skipped are among them: " + count(n) + "."}
}

func statesText(states []dlq.State) string {
	text := make([]string, len(states))
	for i, s := range states {
		text[i] = string(s)
	}
	return strings.Join(text, ", ")
}

// title begins with a capital.
func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// startBulk changes entries one by one. Those that somebody else has changed
// meanwhile are left alone and counted.
func (m *model) startBulk(c *change, total int, reason string, all func(context.Context, func(*dlq.Entry) error) error) tea.Cmd {
	ctx, cancel := context.WithCancel(m.ctx)
	b := &bulk{change: c, total: total, cancel: cancel, updates: make(latest[bulkProgressMsg], 1), ended: make(chan struct{})}
	m.changing = b
	desk := m.desk
	work := m.work.cmd(func() tea.Msg {
		defer close(b.ended)
		defer cancel()
		msg := bulkDoneMsg{bulk: b}
		err := all(ctx, func(e *dlq.Entry) error {
			err := c.do(desk, ctx, e, reason)
			if err == nil {
				msg.done++
			} else {
				msg.failed++
				msg.err = cmp.Or(msg.err, err)
				if _, ok := errors.AsType[*triage.EntryError](err); !ok {
					return err // the next would fail, too
				}
			}
			b.updates.put(bulkProgressMsg{b, msg.done, msg.failed})
			return nil
		})
		if msg.failed == 0 {
			msg.err = err
		}
		return msg
	})
	return tea.Batch(work, m.watchBulk(b))
}

// watchBulk waits for the next that is known of a change.
func (m *model) watchBulk(b *bulk) tea.Cmd {
	return m.work.cmd(func() tea.Msg {
		select {
		case msg := <-b.updates:
			return msg
		case <-b.ended:
			return nil
		}
	})
}

// bulkDone says what has come of a change.
func (m *model) bulkDone(msg bulkDoneMsg) tea.Cmd {
	b := msg.bulk
	m.changing = nil
	b.done, b.failed = msg.done, msg.failed
	switch {
	case isCancelled(msg.err):
		m.complain("Stopped: " + b.progress() + ".")
	case msg.err != nil && b.total == 1:
		m.fail(msg.err)
	case msg.err != nil:
		m.complain(title(b.progress()) + ". The first: " + safe.Block(msg.err.Error()))
	default:
		m.say(fmt.Sprintf("%s %s.", plural(msg.done, "dead letter"), b.past))
	}
	if m.page == pageDetail && b.change == discarding && msg.done > 0 {
		m.page = pageEntries
	}
	if msg.done > 0 {
		m.entries.marked = make(map[string]bool)
	}
	return m.goOn()
}

// A latest has the newest value for a reader who may be slower than the one
// writer.
type latest[T any] chan T

func (c latest[T]) put(v T) {
	for {
		select {
		case c <- v:
			return
		default:
		}
		select {
		case <-c:
		default:
		}
	}
}
