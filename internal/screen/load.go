package screen

import (
	"context"
	"errors"
	"slices"
	"strings"

	"charm.land/bubbles/v2/key"
	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// A load is work whose result the screen waits for. A later one takes its place:
// what was begun before is cancelled, and its result ignored.
type load struct {
	what   string // that is waited for; empty: nothing is
	n      int
	cancel context.CancelFunc
}

func (l *load) start(m *model, what string, f func(ctx context.Context, load int) tea.Msg) tea.Cmd {
	l.stop()
	ctx, cancel := context.WithCancel(m.ctx)
	l.what, l.cancel = what, cancel
	n := l.n
	return m.work.cmd(func() tea.Msg {
		defer cancel()
		return f(ctx, n)
	})
}

func (l *load) stop() {
	l.n++
	l.what = ""
	if l.cancel != nil {
		l.cancel()
		l.cancel = nil
	}
}

// done reports whether a result is what is waited for.
func (l *load) done(n int) bool {
	if n != l.n {
		return false
	}
	l.stop()
	return true
}

type (
	groupsMsg struct {
		load   int
		groups []triage.Group
		err    error
	}
	statsMsg struct {
		load  int
		stats *triage.Stats
		err   error
	}
	entriesMsg struct {
		load       int
		add        bool // to what is listed
		entries    []*dlq.Entry
		unread     map[string]bool
		unreadable int
		more       bool
		err        error
	}
	detailMsg struct {
		load    int
		entry   *dlq.Entry
		current *dlq.Record
		err     error
	}
)

// load loads what the page shows, again if it was loaded before.
func (m *model) load() tea.Cmd {
	desk := m.desk
	switch m.page {
	case pageGroups:
		sel := triage.Selection{Where: m.where, States: tabStates(m.tab)}
		return tea.Batch(m.count(), m.loading.start(m, "loading groups", func(ctx context.Context, n int) tea.Msg {
			groups, err := desk.Groups(ctx, sel)
			return groupsMsg{load: n, groups: groups, err: err}
		}))
	case pageEntries:
		sel := m.selection()
		sel.Limit = max(len(m.entries.list.rows), pageSize)
		return m.loadEntries(sel, false)
	default: // pageDetail
		id := m.detail.entry.ID
		return m.loading.start(m, "loading", func(ctx context.Context, n int) tea.Msg {
			e, current, err := read(ctx, desk, id)
			return detailMsg{load: n, entry: e, current: current, err: err}
		})
	}
}

// count counts the dead letters of each state.
func (m *model) count() tea.Cmd {
	desk := m.desk
	return m.counting.start(m, "", func(ctx context.Context, n int) tea.Msg {
		stats, err := desk.Stats(ctx)
		return statsMsg{load: n, stats: stats, err: err}
	})
}

// selection is what the page lists.
func (m *model) selection() triage.Selection {
	return triage.Selection{Where: m.where, Groups: m.entries.groupIDs(), States: tabStates(m.tab)}
}

// read reads an entry with its history, and the message as it is now.
func read(ctx context.Context, desk Desk, id string) (*dlq.Entry, *dlq.Record, error) {
	e, err := desk.Get(ctx, id)
	if e == nil {
		return nil, nil, err
	}
	current, currentErr := desk.Current(ctx, e)
	if currentErr != nil && err != nil && currentErr.Error() == err.Error() {
		currentErr = nil // the same payload is missing
	}
	return e, current, errors.Join(err, currentErr)
}

// loadMore lists older entries than those that are listed.
func (m *model) loadMore() tea.Cmd {
	oldest := m.entries.oldest
	if oldest <= 1 { // before the first is nothing, and 0 would be all
		m.entries.more = false
		return nil
	}
	sel := m.selection()
	sel.Upto, sel.Limit = oldest-1, pageSize
	return m.loadEntries(sel, true)
}

func (m *model) loadEntries(sel triage.Selection, add bool) tea.Cmd {
	desk := m.desk
	limit := sel.Limit
	sel.Limit++ // to know whether there are more
	return m.loading.start(m, "loading dead letters", func(ctx context.Context, n int) tea.Msg {
		msg := entriesMsg{load: n, add: add, unread: make(map[string]bool)}
		for e, err := range desk.Entries(ctx, sel, false) {
			switch {
			case e == nil && errors.Is(err, dlq.ErrNotARecord):
				msg.unreadable++
			case e == nil:
				msg.err = err
			default:
				msg.entries = append(msg.entries, e)
				if err != nil {
					msg.unread[e.ID] = true
				}
			}
		}
		if msg.more = len(msg.entries) > limit; msg.more {
			msg.entries = msg.entries[:limit]
		}
		return msg
	})
}

func (m *model) gotGroups(msg groupsMsg) {
	if !m.loading.done(msg.load) {
		return
	}
	m.stale[pageGroups] = msg.err != nil
	if msg.err != nil {
		m.fail(msg.err)
		return
	}
	m.groups.set(slices.DeleteFunc(msg.groups, func(g triage.Group) bool { return m.isSkipped(g.ID) }), groupID)
}

func (m *model) isSkipped(id string) bool {
	_, ok := m.skipped[id]
	return ok
}

// gotEntries lists what came, also if the rest could not be read.
func (m *model) gotEntries(msg entriesMsg) {
	if !m.loading.done(msg.load) {
		return
	}
	p := &m.entries
	if n := len(msg.entries); n > 0 {
		p.oldest = msg.entries[n-1].Sequence
	}
	entries := slices.DeleteFunc(msg.entries, func(e *dlq.Entry) bool { return m.isSkipped(e.ID) })
	if msg.add {
		entries = append(slices.Clone(p.list.rows), entries...)
		for id := range p.unread {
			msg.unread[id] = true
		}
		msg.unreadable += p.unreadable
	}
	p.list.set(entries, entryID)
	p.unread, p.unreadable, p.more = msg.unread, msg.unreadable, msg.more
	listed := make(map[string]bool, len(entries))
	for _, e := range entries {
		listed[e.ID] = p.marked[e.ID]
	}
	for id := range p.marked { // what is not seen is not to be changed
		if !listed[id] {
			delete(p.marked, id)
		}
	}
	m.stale[pageEntries] = msg.err != nil
	if msg.err != nil {
		m.fail(msg.err)
	}
}

func (m *model) gotDetail(msg detailMsg) {
	if !m.loading.done(msg.load) {
		return
	}
	m.stale[pageDetail] = msg.err != nil
	if msg.entry == nil {
		m.fail(msg.err)
		return
	}
	m.detail.entry, m.detail.current, m.detail.err = msg.entry, msg.current, msg.err
	m.detail.payload = payloadLines(msg.current)
	m.layout()
}

// A filter is the query that is typed.
type filter struct {
	input input
	err   []string // lines of what is wrong with it
}

func (m *model) openFilter() {
	m.filtering = &filter{}
	if m.where != nil {
		m.filtering.input.insert(m.where.Text())
	}
}

func (m *model) pressFilter(msg tea.KeyPressMsg) tea.Cmd {
	f := m.filtering
	switch {
	case msg.String() == "esc":
		m.filtering = nil
	case key.Matches(msg, m.keys.open):
		text := f.input.value()
		var where *triage.Query
		if text != "" {
			q, err := triage.Compile(text)
			if err != nil {
				f.err = strings.Split(strings.TrimRight(safe.Block(err.Error()), "\n "), "\n")
				return nil
			}
			where = q
		}
		m.filtering, m.where = nil, where
		m.emptied()
		return m.load()
	default:
		f.input.press(msg)
	}
	return nil
}
