package screen

import (
	"strings"

	"charm.land/bubbles/v2/key"
	"charm.land/bubbles/v2/viewport"
	tea "charm.land/bubbletea/v2"
	"github.com/charmbracelet/x/ansi"
)

// A dialog stands in the place of the page. It says what will happen, and takes the
// keys until it is answered: enter accepts, esc declines.
type dialog struct {
	title  string
	lines  func(width int) []string // safe; they are wrapped
	reason *input                   // typed on, if it is not nil
	yes    string                   // what enter does; empty: nothing can be accepted
	accept func(reason string) tea.Cmd
	no     func() tea.Cmd // when it is declined; may be nil
	keys   []dialogKey    // others
	wait   load           // what it waits for, before there is anything to accept
	quits  bool           // whether to quit is what it asks
	view   viewport.Model
}

type dialogKey struct {
	key.Binding

	do func() tea.Cmd
}

func (d *dialog) press(m *model, msg tea.KeyPressMsg) tea.Cmd {
	switch {
	case msg.String() == "esc", d.onlySays() && key.Matches(msg, m.keys.quit):
		return d.leave(m)
	case key.Matches(msg, m.keys.open):
		if d.yes == "" {
			return nil
		}
		reason := ""
		if d.reason != nil {
			reason = d.reason.value()
		}
		m.dialog = nil
		return d.accept(reason)
	}
	for _, k := range d.keys {
		if key.Matches(msg, k.Binding) {
			return k.do()
		}
	}
	switch n := m.step(msg, d.view.Height()); {
	case n != 0 && (d.reason == nil || msg.Text == "" && msg.String() != "home" && msg.String() != "end"):
		scroll(&d.view, n)
	case d.reason != nil:
		d.reason.press(msg)
	}
	return nil
}

// onlySays reports whether there is nothing to answer: then q, too, closes it.
func (d *dialog) onlySays() bool { return d.yes == "" && d.reason == nil }

// leave declines.
func (d *dialog) leave(m *model) tea.Cmd {
	d.wait.stop()
	m.dialog = nil
	if d.no == nil {
		return nil
	}
	return d.no()
}

// help is the bottom line.
func (d *dialog) help() []key.Binding {
	var keys []key.Binding
	if d.yes != "" {
		keys = append(keys, key.NewBinding(key.WithKeys("enter"), key.WithHelp("enter", d.yes)))
	}
	for _, k := range d.keys {
		keys = append(keys, k.Binding)
	}
	if d.onlySays() {
		return append(keys, key.NewBinding(key.WithKeys("esc"), key.WithHelp("esc/q", "close")))
	}
	return append(keys, key.NewBinding(key.WithKeys("esc"), key.WithHelp("esc", "no")))
}

// draw draws the dialog on so many lines.
func (d *dialog) draw(m *model, width, height int) []string {
	title := oneLine("── "+d.title+" ", width)
	drawn := []string{m.style.title.Render(title + strings.Repeat("─", max(width-ansi.StringWidth(title), 0)))}
	var bottom []string
	if d.reason != nil {
		bottom = []string{d.reason.view("reason (optional): ", width)}
	}
	said := d.lines(width)
	lines := make([]string, 0, len(said))
	for _, l := range said {
		lines = append(lines, wrap(l, width)...)
	}
	room := max(height-len(drawn)-len(bottom), 1)
	if len(lines) > room {
		room = max(room-1, 1)
	}
	d.view.SetWidth(width)
	d.view.SetHeight(room)
	d.view.SetContentLines(lines)
	from := d.view.YOffset()
	drawn = append(drawn, lines[from:min(from+room, len(lines))]...)
	if len(lines) > room {
		drawn = append(drawn, m.style.faint.Render(oneLine(more(from, room, len(lines)), width)))
	}
	if len(bottom) > 0 && len(drawn)+len(bottom) < height {
		drawn = append(drawn, "")
	}
	return append(drawn, bottom...)
}

// more says where in a longer text one is.
func more(from, height, all int) string {
	return "lines " + count(from+1) + " to " + count(min(from+height, all)) + " of " + count(all)
}

func (m *model) openHelp() {
	m.dialog = &dialog{title: "Keys", lines: func(width int) []string {
		columns := m.allHelp()
		if width < defaultWidth {
			all := columns[0]
			for _, c := range columns[1:] {
				all = append(all, c...)
			}
			columns = columns[:1]
			columns[0] = all
		}
		m.help.SetWidth(width)
		lines := strings.Split(m.help.FullHelpView(columns), "\n")
		return append(lines, "",
			"r, d, a and u are for the group under the cursor, or for the marked entries, or else for the one under the cursor. "+
				"Each says what will happen and asks first.",
			"R: it was resolved before, and came again. *: marked. !: cannot be read whole.",
			"A filter is a condition in CEL, such as consumer == \"billing\" && error.contains(\"timeout\").")
	}}
}
