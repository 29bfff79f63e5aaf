package screen

import (
	"fmt"
	"slices"
	"strings"

	"charm.land/bubbles/v2/spinner"
	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// wide is from where on a list has room for every column.
const wide = 60

func (m *model) View() tea.View {
	v := tea.NewView(strings.Join(m.draw(), "\n"))
	v.AltScreen = true
	return v
}

// draw draws as many lines as the screen has, none longer than it is wide.
func (m *model) draw() []string {
	if m.width < minWidth || m.height < minHeight {
		lines := wrap(fmt.Sprintf("A terminal of %d columns and %d lines is needed; this has %d and %d.", minWidth, minHeight, m.width, m.height), m.width)
		return lines[:min(len(lines), m.height)]
	}
	lines := []string{m.tabLine(), m.titleLine()}
	bottom := m.bottom()
	body := m.body(m.height - len(lines) - len(bottom))
	for len(body) < m.height-len(lines)-len(bottom) {
		body = append(body, "")
	}
	lines = append(append(lines, body...), bottom...)
	for i, l := range lines {
		lines[i] = ansi.Truncate(l, m.width, "…")
	}
	return lines
}

// tabLine has the states to choose from, and how many there are of each.
func (m *model) tabLine() string {
	stream := m.style.title.Render(oneLine(m.desk.Stream(), m.width/3)) + "  "
	all := make([]string, tabs)
	for i := range all {
		text := tabNames[i]
		if m.stats != nil {
			n := 0
			for _, s := range tabStates(i) {
				n += m.stats.States[s]
			}
			text += " " + count(n)
		}
		if i == m.tab {
			text = "[" + text + "]"
		}
		all[i] = text
	}
	line := strings.Join(all, "  ")
	if ansi.StringWidth(stream+line) > m.width {
		line = all[m.tab]
	}
	current := all[m.tab]
	before, after, _ := strings.Cut(line, current)
	return stream + m.style.faint.Render(before) + m.style.title.Render(current) + m.style.faint.Render(after)
}

// titleLine says what the page is about.
func (m *model) titleLine() string {
	var parts []string
	switch m.page {
	case pageGroups:
		n := 0
		for i := range m.groups.rows {
			n += m.groups.rows[i].Count
		}
		parts = append(parts, plural(len(m.groups.rows), "group"), plural(n, "dead letter"))
		if s := m.stats; s != nil && s.MaxBytes > 0 {
			n := int64(s.Bytes) //nolint:gosec // a stream's size
			parts = append(parts, fmt.Sprintf("%s, %.0f %% full", bytesText(n), 100*float64(n)/float64(s.MaxBytes)))
		}
		parts = append(parts, m.skippedText()...)
	case pageEntries:
		text := plural(len(m.entries.list.rows), "dead letter")
		if m.entries.more {
			text = "the newest " + count(len(m.entries.list.rows))
		}
		parts = append(parts, text)
		if n := len(m.entries.marked); n > 0 {
			parts = append(parts, count(n)+" marked")
		}
		if n := m.entries.unreadable; n > 0 {
			parts = append(parts, count(n)+" unreadable")
		}
		parts = append(parts, m.skippedText()...)
		parts = append(parts, safe.Line(m.entries.group.Consumer), safe.Line(beginning(m.entries.group.Title, maxLine)))
	case pageDetail:
		parts = append(parts, "dead letter "+safe.Line(m.detail.entry.ID), safe.Line(string(m.detail.entry.State)))
	}
	if m.where != nil && m.page != pageDetail {
		parts = append([]string{"where " + safe.Line(m.where.Text())}, parts...)
	}
	return m.style.title.Render(ansi.Truncate(strings.Join(parts, " · "), m.width, "…"))
}

func (m *model) skippedText() []string {
	if len(m.skipped) == 0 {
		return nil
	}
	return []string{count(len(m.skipped)) + " skipped"}
}

func (m *model) body(height int) []string {
	switch {
	case m.dialog != nil:
		return m.dialog.draw(m, m.width, height)
	case m.page == pageGroups:
		return m.groupRows(height)
	case m.page == pageEntries:
		return m.entryRows(height)
	case m.detail.view.TotalLineCount() == 0:
		return nil
	default:
		v := &m.detail.view
		v.SetWidth(m.width)
		v.SetHeight(height)
		scroll(v, 0) // what was seen at the end may not fill the screen any more
		return strings.Split(v.View(), "\n")
	}
}

// rows draws the window of a list below its heading.
func rows[T any](m *model, l *list[T], height int, heading, none string, draw func(T) string) []string {
	if len(l.rows) == 0 {
		if m.loading.what != "" {
			return nil
		}
		return append([]string{""}, wrap(none, m.width)...)
	}
	lines := []string{m.style.faint.Render(heading)}
	from, to := l.window(height - 1)
	for i := from; i < to; i++ {
		if i == l.at {
			lines = append(lines, m.style.selected.Render(pad(ansi.Truncate(">"+draw(l.rows[i]), m.width, "…"), m.width)))
			continue
		}
		lines = append(lines, ansi.Truncate(" "+draw(l.rows[i]), m.width, "…"))
	}
	return lines
}

func (m *model) none() string {
	none := "There are no dead letters that are " + tabNames[m.tab]
	if m.tab == tabAll {
		none = "There are no dead letters"
	}
	if m.where != nil {
		none += " for which the filter is true"
	}
	return none + "."
}

func (m *model) groupRows(height int) []string {
	const number, age, rate = 7, 5, 8
	consumer := len("consumer")
	for _, g := range m.groups.rows {
		consumer = max(consumer, ansi.StringWidth(oneLine(g.Consumer, m.width/3)))
	}
	heading := "  " + padLeft("count", number) + padLeft("last", age) + " "
	if m.width >= wide {
		heading += padLeft("rate", rate) + "  " + pad("consumer", consumer) + " "
	}
	return rows(m, &m.groups, height, heading+"error", m.none(), func(g triage.Group) string {
		mark := " "
		if g.Regressed {
			mark = "R"
		}
		line := mark + padLeft(count(g.Count), number) + padLeft(m.ago(g.Last), age) + " "
		if m.width >= wide {
			line += padLeft(perHour(g.PerHour), rate) + "  " + pad(oneLine(g.Consumer, consumer), consumer) + " "
		}
		return line + oneLine(g.Title, m.width)
	})
}

func (m *model) entryRows(height int) []string {
	const age, replays, state = 5, 8, 10
	id := shortID
	if m.width < wide {
		id = 8
	}
	heading := "   " + pad("id", id) + padLeft("age", age) + " "
	if m.width >= wide {
		heading += padLeft("replays", replays) + " "
	}
	if m.tab == tabAll {
		heading += pad("state", state) + " "
	}
	return rows(m, &m.entries.list, height, heading+"error", m.none(), func(e *dlq.Entry) string {
		mark := []byte("  ")
		if m.entries.marked[e.ID] {
			mark[0] = '*'
		}
		if m.entries.unread[e.ID] {
			mark[1] = '!'
		}
		line := string(mark) + pad(oneLine(beginning(e.ID, id), id), id) + padLeft(m.ago(e.Failure.Failed), age) + " "
		if m.width >= wide {
			line += padLeft(count(e.Replays), replays) + " "
		}
		if m.tab == tabAll {
			line += pad(oneLine(string(e.State), state), state) + " "
		}
		return line + oneLine(errorText(e.Failure), m.width)
	})
}

// bottom is the status, what is typed, and the keys.
func (m *model) bottom() []string {
	const mostStatus = 4
	var lines []string
	if f := m.filtering; f != nil {
		for _, l := range f.errorLines(m.width, m.height/2) {
			lines = append(lines, m.style.bad.Render(l))
		}
		lines = append(lines, f.input.view("where: ", m.width))
		return append(lines, m.style.faint.Render(oneLine("enter apply, or all if it is empty • esc back", m.width)))
	}
	if m.status != "" {
		style := m.style.good
		if m.statusBad {
			style = m.style.bad
		}
		lines = m.styled(style, m.status, m.width)
		if most := min(mostStatus, m.height/3); len(lines) > most {
			lines = lines[:most]
			lines[most-1] += "…"
		}
	}
	if what := m.waitingFor(); what != "" {
		frames := spinner.MiniDot.Frames
		text := frames[m.frame%len(frames)] + " " + what
		if m.quitting {
			text += "; then it quits, and q quits at once"
		}
		lines = append(lines, ansi.Truncate(text, m.width, "…"))
	}
	m.help.SetWidth(m.width)
	if m.dialog != nil {
		return append(lines, m.help.ShortHelpView(m.dialog.help()))
	}
	if len(lines) == 0 {
		lines = append(lines, m.position())
	}
	return append(lines, m.help.ShortHelpView(m.shortHelp()))
}

// position says where in a longer list or text one is.
func (m *model) position() string {
	at, all := 0, 0
	switch m.page {
	case pageGroups:
		at, all = m.groups.at+1, len(m.groups.rows)
	case pageEntries:
		at, all = m.entries.list.at+1, len(m.entries.list.rows)
	case pageDetail:
		v := &m.detail.view
		if v.TotalLineCount() > v.Height() && v.Height() > 0 {
			return m.style.faint.Render(more(v.YOffset(), v.Height(), v.TotalLineCount()))
		}
	}
	if all == 0 {
		return ""
	}
	return m.style.faint.Render(count(at) + " of " + count(all))
}

// errorLines are what is wrong with a query: a text, and as a rule the query with a
// caret below it, which are not broken. A caret that would be off the screen is
// moved into it, with the line above.
func (f *filter) errorLines(width, most int) []string {
	text, quoted := f.err, []string(nil)
	if n := len(f.err); n > 1 && strings.HasSuffix(f.err[n-1], "^") {
		text, quoted = f.err[:n-2], slices.Clone(f.err[n-2:])
		if at := ansi.StringWidth(quoted[1]); at > width {
			for i, l := range quoted {
				quoted[i] = ansi.TruncateLeft(l, at-width*3/4, "…")
			}
		}
	}
	var lines []string
	for _, l := range text {
		lines = append(lines, wrap(l, width)...)
	}
	if room := max(most-len(quoted), 1); len(lines) > room {
		lines = lines[:room]
		lines[room-1] += " …"
	}
	return append(lines, quoted...)
}
