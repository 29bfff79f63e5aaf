package screen

import (
	"context"
	"errors"
	"slices"
	"time"

	"charm.land/bubbles/v2/help"
	"charm.land/bubbles/v2/key"
	"charm.land/bubbles/v2/viewport"
	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/internal/shell"
)

const (
	defaultWidth, defaultHeight = 80, 24
	minWidth, minHeight         = 40, 10

	// pageSize is how many entries of a group are listed at a time.
	pageSize = 500

	tickEvery = 100 * time.Millisecond
)

// A page is what the screen shows.
type page int

const (
	pageGroups page = iota
	pageEntries
	pageDetail
)

// The tabs choose by state.
const (
	tabOpen = iota
	tabReplaying
	tabResolved
	tabArchived
	tabAll
	tabs
)

var tabNames = [tabs]string{"open", "replaying", "resolved", "archived", "all"}

// tabStates are the states of a tab.
func tabStates(tab int) []dlq.State {
	if tab == tabAll {
		return dlq.States()
	}
	return []dlq.State{[]dlq.State{dlq.StateOpen, dlq.StateReplaying, dlq.StateResolved, dlq.StateArchived}[tab]}
}

// A model is the state of the screen. Only Update changes it; work that goes on
// beside has copies, and comes back as messages.
type model struct {
	ctx  context.Context //nolint:containedctx // ends with the screen; Update is given none
	desk Desk
	opt  Options
	work works

	// Tests have another: tea.Exec runs the editor on the terminal.
	exec func(tea.ExecCommand, tea.ExecCallback) tea.Cmd

	width, height int
	keys          keyMap
	help          help.Model
	style         styles

	page    page
	tab     int
	where   *triage.Query
	stale   [pageDetail + 1]bool // pages that have to be loaded again
	skipped map[string]string    // IDs of groups and entries, and the group of an entry

	groups  list[triage.Group]
	stats   *triage.Stats
	entries entriesPage
	detail  detailPage

	loading   load // of the page
	counting  load // of the numbers on top
	storing   load // an edit; it goes on whatever is looked at meanwhile
	dialog    *dialog
	filtering *filter
	replay    *replay // the latest; it may be paused
	changing  *bulk   // that is going on
	draft     *draft  // an edit that is not stored
	quitting  bool    // when what goes on has come to its end

	status    string
	statusBad bool
	frame     int // of the spinner
	ticking   bool
}

// An entriesPage lists the entries of a group.
type entriesPage struct {
	group      triage.Group
	list       list[*dlq.Entry]
	marked     map[string]bool
	unread     map[string]bool // IDs of entries that cannot be read whole
	unreadable int             // messages that are no dead letters
	more       bool            // there are older ones
	oldest     uint64          // sequence of the oldest that was loaded
}

// groupIDs is the group as a selection names it.
func (p *entriesPage) groupIDs() []string {
	if p.group.ID == "" {
		return nil
	}
	return []string{p.group.ID}
}

// A detailPage shows one entry.
type detailPage struct {
	entry   *dlq.Entry
	current *dlq.Record // the message as a replay would send it
	err     error       // what could not be read
	payload []string    // lines, as they are shown
	hidden  bool
	view    viewport.Model
}

type styles struct{ title, faint, selected, bad, warn, good lipgloss.Style }

func newModel(ctx context.Context, desk Desk, opt Options) *model {
	m := &model{
		ctx: ctx, desk: desk, opt: opt, exec: tea.Exec, width: defaultWidth, height: defaultHeight,
		keys: newKeyMap(), help: help.New(), skipped: make(map[string]string),
		style: styles{
			title: lipgloss.NewStyle().Bold(true), faint: lipgloss.NewStyle().Faint(true), selected: lipgloss.NewStyle().Reverse(true),
			bad: lipgloss.NewStyle().Foreground(lipgloss.Red), warn: lipgloss.NewStyle().Foreground(lipgloss.Yellow),
			good: lipgloss.NewStyle().Foreground(lipgloss.Green),
		},
	}
	// The library's own greys cannot be read on every background.
	m.help.Styles = help.Styles{ShortKey: m.style.title, FullKey: m.style.title, ShortDesc: m.style.faint, FullDesc: m.style.faint}
	m.detail.view = viewport.New()
	return m
}

func (m *model) Init() tea.Cmd { return tea.Batch(m.load(), m.tick()) }

func (m *model) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	cmd := m.update(msg)
	return m, tea.Batch(cmd, m.tick())
}

type tickMsg struct{}

// tick lets the spinner turn while there is something to wait for.
func (m *model) tick() tea.Cmd {
	if m.ticking || m.waitingFor() == "" {
		return nil
	}
	m.ticking = true
	ctx := m.ctx
	return m.work.cmd(func() tea.Msg {
		timer := time.NewTimer(tickEvery)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-ctx.Done():
		}
		return tickMsg{}
	})
}

// waitingFor says what goes on beside the screen, or nothing.
func (m *model) waitingFor() string {
	switch {
	case m.dialog != nil && m.dialog.wait.what != "":
		return m.dialog.wait.what
	case m.loading.what != "":
		return m.loading.what
	case m.storing.what != "":
		return m.storing.what
	case m.changing != nil:
		return m.changing.progress()
	case m.replay != nil && m.replay.running:
		return m.replay.summary()
	}
	return ""
}

func (m *model) update(msg tea.Msg) tea.Cmd {
	switch msg := msg.(type) {
	case tea.WindowSizeMsg:
		if msg.Width > 0 && msg.Height > 0 {
			m.width, m.height = msg.Width, msg.Height
			m.layout()
		}
	case tea.KeyPressMsg:
		return m.press(msg)
	case tea.PasteMsg:
		if in := m.typing(); in != nil {
			in.insert(msg.Content)
		}
	case tickMsg:
		m.frame++
		m.ticking = false
	case groupsMsg:
		m.gotGroups(msg)
	case statsMsg:
		if m.counting.done(msg.load) && msg.err == nil { // the groups report what is wrong
			m.stats = msg.stats
		}
	case entriesMsg:
		m.gotEntries(msg)
	case detailMsg:
		m.gotDetail(msg)
	case editMsg:
		return m.gotEntryToEdit(msg)
	case editedMsg:
		return m.edited(msg)
	case editStoredMsg:
		return m.editStored(msg)
	case countedMsg:
		m.counted(msg)
	case planMsg:
		m.planned(msg)
	case progressMsg:
		if m.replay == msg.replay && m.replay.running {
			m.replay.op = msg.op
			return m.watch(m.replay)
		}
	case replayDoneMsg:
		return m.replayDone(msg)
	case askedMsg:
		if msg.err != nil {
			m.fail(msg.err)
		}
		return m.operationAsked(msg)
	case bulkProgressMsg:
		if m.changing == msg.bulk {
			m.changing.done, m.changing.failed = msg.done, msg.failed
			return m.watchBulk(m.changing)
		}
	case bulkDoneMsg:
		return m.bulkDone(msg)
	}
	return nil
}

// typing is the line that is typed on, or nil.
func (m *model) typing() *input {
	switch {
	case m.dialog != nil:
		return m.dialog.reason
	case m.filtering != nil:
		return &m.filtering.input
	}
	return nil
}

func (m *model) say(text string)    { m.status, m.statusBad = text, false }
func (m *model) complain(s string)  { m.status, m.statusBad = s, true }
func (m *model) fail(err error)     { m.complain(safe.Block(err.Error())) }
func (m *model) entryHere() bool    { return m.page != pageGroups }
func groupID(g triage.Group) string { return g.ID }
func entryID(e *dlq.Entry) string   { return e.ID }

// busy reports whether something is being changed. Then nothing else is.
func (m *model) busy() bool {
	return m.changing != nil || m.storing.what != "" || m.replay != nil && m.replay.running
}

// press takes a key.
func (m *model) press(msg tea.KeyPressMsg) tea.Cmd {
	if key.Matches(msg, m.keys.interrupt) {
		return m.interrupt()
	}
	if m.width < minWidth || m.height < minHeight { // nobody acts on what he cannot see
		return nil
	}
	switch {
	case m.dialog != nil:
		return m.dialog.press(m, msg)
	case m.filtering != nil:
		return m.pressFilter(msg)
	}
	if !key.Matches(msg, m.keys.moves()...) {
		m.status = ""
	}
	k := &m.keys
	switch {
	case key.Matches(msg, k.quit):
		return m.quit()
	case key.Matches(msg, k.help):
		m.openHelp()
	case key.Matches(msg, k.progress):
		m.openReplay()
	case key.Matches(msg, k.back):
		return m.back()
	case key.Matches(msg, k.reload):
		return m.load()
	case key.Matches(msg, k.filter) && m.page != pageDetail:
		m.openFilter()
	case key.Matches(msg, k.tab) && m.page != pageDetail:
		return m.switchTab(1)
	case key.Matches(msg, k.untab) && m.page != pageDetail:
		return m.switchTab(-1)
	case key.Matches(msg, k.skip):
		return m.skip()
	case key.Matches(msg, k.shown):
		clear(m.skipped)
		m.stale = [...]bool{true, true, false}
		return m.load()
	case key.Matches(msg, k.replay):
		m.askReplay()
	case key.Matches(msg, k.edit) && m.entryHere():
		return m.startEdit()
	case key.Matches(msg, k.discard):
		return m.askChange(discarding)
	case key.Matches(msg, k.archive):
		return m.askChange(archiving)
	case key.Matches(msg, k.restore):
		return m.askChange(restoring)
	case m.page == pageDetail:
		m.pressDetail(msg)
	default:
		return m.pressList(msg)
	}
	return nil
}

// step is how far a key moves, on a page of so many lines.
func (m *model) step(msg tea.KeyPressMsg, height int) int {
	const far = 1 << 30
	k := &m.keys
	switch {
	case key.Matches(msg, k.up):
		return -1
	case key.Matches(msg, k.down):
		return 1
	case key.Matches(msg, k.pageUp):
		return -height
	case key.Matches(msg, k.pageDown):
		return height
	case key.Matches(msg, k.top):
		return -far
	case key.Matches(msg, k.bottom):
		return far
	}
	return 0
}

func (m *model) pressDetail(msg tea.KeyPressMsg) {
	if key.Matches(msg, m.keys.payload) {
		m.detail.hidden = !m.detail.hidden
		m.layout()
	}
	scroll(&m.detail.view, m.step(msg, m.detail.view.Height()))
}

// scroll moves a view by lines.
func scroll(v *viewport.Model, n int) {
	last := max(v.TotalLineCount()-v.Height(), 0)
	v.SetYOffset(max(min(v.YOffset()+n, last), 0))
}

func (m *model) pressList(msg tea.KeyPressMsg) tea.Cmd {
	n := m.step(msg, max(m.height-6, 1)) // about what is seen
	if m.page == pageGroups {
		m.groups.move(n)
		if g, ok := m.groups.selected(); ok && key.Matches(msg, m.keys.open) {
			m.page = pageEntries
			m.entries = entriesPage{group: g, marked: make(map[string]bool)}
			return m.load()
		}
		return nil
	}
	m.entries.list.move(n)
	e, ok := m.entries.list.selected()
	switch {
	case key.Matches(msg, m.keys.more) && m.entries.more:
		return m.loadMore()
	case !ok:
	case key.Matches(msg, m.keys.mark):
		if m.entries.marked[e.ID] {
			delete(m.entries.marked, e.ID)
		} else {
			m.entries.marked[e.ID] = true
		}
		m.entries.list.move(1)
	case key.Matches(msg, m.keys.open):
		return m.openDetail(e)
	}
	return nil
}

func (m *model) openDetail(e *dlq.Entry) tea.Cmd {
	m.page = pageDetail
	m.detail = detailPage{entry: e, hidden: m.detail.hidden, view: viewport.New()}
	return m.load()
}

// back goes to the page before. What is loading is given up.
func (m *model) back() tea.Cmd {
	m.loading.stop()
	if m.page == pageGroups {
		if m.where != nil {
			m.where = nil
			return m.load()
		}
		return nil
	}
	m.page--
	if m.stale[m.page] {
		return m.load()
	}
	return nil
}

func (m *model) switchTab(n int) tea.Cmd {
	m.tab = (m.tab + n + tabs) % tabs
	m.emptied()
	return m.load()
}

// emptied forgets what is listed, as something else is asked for.
func (m *model) emptied() {
	m.stale[pageGroups] = true
	m.groups = list[triage.Group]{}
	m.entries = entriesPage{group: m.entries.group, marked: make(map[string]bool)}
}

// skippedSaid keeps it from being taken for done with.
const skippedSaid = "Skipped: it is hidden until you quit, and otherwise as before. S shows it again."

// skip hides what the cursor is on until the screen is left.
func (m *model) skip() tea.Cmd {
	if m.page == pageGroups {
		if g, ok := m.groups.selected(); ok {
			m.skipped[g.ID] = ""
			m.groups.remove()
			m.say(skippedSaid)
		}
		return nil
	}
	e, ok := m.entries.list.selected()
	if !ok {
		return nil
	}
	m.skipped[e.ID] = m.entries.group.ID
	delete(m.entries.marked, e.ID)
	m.entries.list.remove()
	m.say(skippedSaid)
	if m.page != pageDetail {
		return nil
	}
	if next, ok := m.entries.list.selected(); ok {
		return m.openDetail(next)
	}
	m.say("That was the last one here. S shows what was skipped again.")
	return m.back()
}

// interrupt is ctrl+c: whatever is asked is declined, except whether to quit.
func (m *model) interrupt() tea.Cmd {
	m.filtering = nil
	var cmd tea.Cmd
	if d := m.dialog; d != nil {
		if d.quits {
			m.dialog = nil
			return d.accept("")
		}
		cmd = d.leave(m)
	}
	return tea.Batch(cmd, m.quit())
}

// quit leaves the screen, and asks first if something is going on.
func (m *model) quit() tea.Cmd {
	if m.quitting || !m.busy() {
		return tea.Quit
	}
	d := &dialog{title: "Quit?", yes: "quit", quits: true}
	d.lines = func(int) []string {
		if m.replay != nil && m.replay.running {
			return []string{
				"Replay " + safe.Line(m.replay.id) + " is running: " + m.replay.summary() + ".",
				"Quitting pauses it. To go on later: " + shell.Command("monotel dlq ops resume", []string{m.replay.id}),
			}
		}
		if m.storing.what != "" {
			return []string{"An edit is being stored. It quits when that is done."}
		}
		if m.changing != nil {
			return []string{m.changing.progress() + ".", "Quitting stops after the one at hand. What is done stays done."}
		}
		return nil // it has just come to its end
	}
	d.accept = func(string) tea.Cmd {
		if !m.busy() {
			return tea.Quit
		}
		m.quitting = true
		m.stopWork()
		return nil
	}
	m.dialog = d
	return nil
}

// stopWork has what is going on come to its end.
func (m *model) stopWork() {
	if m.changing != nil {
		m.changing.cancel()
	}
	if m.replay != nil && m.replay.running {
		m.replay.cancel()
	}
}

// goOn is what happens when something has come to its end: the screen is left if
// that was asked for, else what it shows is loaded again.
func (m *model) goOn() tea.Cmd {
	if m.quitting {
		return tea.Quit
	}
	if m.dialog != nil && m.dialog.quits {
		m.dialog = nil // there is nothing any more to ask for
	}
	m.stale = [...]bool{true, true, true}
	if m.page == pageGroups {
		return m.load()
	}
	return tea.Batch(m.load(), m.count())
}

func isCancelled(err error) bool { return errors.Is(err, context.Canceled) }

// marked are the entries that are marked, in the order they are listed, or the one
// under the cursor, or the one that is open.
func (m *model) chosen() []*dlq.Entry {
	if m.page == pageDetail {
		if m.detail.entry == nil {
			return nil
		}
		return []*dlq.Entry{m.detail.entry}
	}
	if len(m.entries.marked) > 0 {
		return slices.Collect(func(yield func(*dlq.Entry) bool) {
			for _, e := range m.entries.list.rows {
				if m.entries.marked[e.ID] && !yield(e) {
					return
				}
			}
		})
	}
	if e, ok := m.entries.list.selected(); ok {
		return []*dlq.Entry{e}
	}
	return nil
}
