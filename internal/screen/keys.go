package screen

import (
	"slices"

	"charm.land/bubbles/v2/key"
)

// A keyMap has what the keys do, outside dialogs.
type keyMap struct {
	up, down, pageUp, pageDown, top, bottom              key.Binding
	open, back, tab, untab, filter, reload, more, mark   key.Binding
	replay, edit, discard, archive, restore, skip, shown key.Binding
	payload, progress, help, quit, interrupt             key.Binding
}

func newKeyMap() keyMap {
	bind := func(shown, does string, keys ...string) key.Binding {
		return key.NewBinding(key.WithKeys(keys...), key.WithHelp(shown, does))
	}
	return keyMap{
		up:        bind("↑/k", "up", "up", "k"),
		down:      bind("↓/j", "down", "down", "j"),
		pageUp:    bind("pgup", "page up", "pgup"),
		pageDown:  bind("pgdn", "page down", "pgdown"),
		top:       bind("home", "first", "home"),
		bottom:    bind("end", "last", "end"),
		open:      bind("enter", "open", "enter"),
		back:      bind("esc", "back", "esc", "backspace"),
		tab:       bind("tab", "state", "tab"),
		untab:     bind("shift+tab", "state before", "shift+tab"),
		filter:    bind("/", "filter", "/"),
		reload:    bind("g", "reload", "g"),
		more:      bind("m", "load more", "m"),
		mark:      bind("space", "mark", "space"),
		replay:    bind("r", "replay", "r"),
		edit:      bind("e", "edit", "e"),
		discard:   bind("d", "discard", "d"),
		archive:   bind("a", "archive", "a"),
		restore:   bind("u", "restore", "u"),
		skip:      bind("s", "skip", "s"),
		shown:     bind("S", "show skipped", "S"),
		payload:   bind("p", "payload", "p"),
		progress:  bind("o", "the replay", "o"),
		help:      bind("?", "help", "?"),
		quit:      bind("q", "quit", "q"),
		interrupt: bind("ctrl+c", "quit", "ctrl+c"),
	}
}

// moves reports whether a key only looks around, so that what the status line says
// may stay.
func (k *keyMap) moves() []key.Binding {
	return []key.Binding{k.up, k.down, k.pageUp, k.pageDown, k.top, k.bottom, k.mark}
}

// shortHelp is the bottom line of a page.
func (m *model) shortHelp() []key.Binding {
	k := &m.keys
	restore := m.tab != tabOpen && m.tab != tabReplaying
	var keys []key.Binding
	switch m.page {
	case pageGroups:
		keys = []key.Binding{k.open, k.replay, k.archive, k.discard, k.filter, k.tab, k.skip}
	case pageEntries:
		keys = []key.Binding{k.open, k.back, k.replay, k.mark, k.edit, k.archive, k.discard, k.filter, k.tab, k.skip}
	case pageDetail:
		keys = []key.Binding{k.back, k.replay, k.edit, k.archive, k.discard, k.payload, k.skip}
	}
	if restore {
		keys = slices.Insert(keys, 1, k.restore)
	}
	if m.page == pageEntries && m.entries.more {
		keys = slices.Insert(keys, 0, k.more)
	}
	if m.replay != nil {
		keys = slices.Insert(keys, 0, k.progress)
	}
	return append([]key.Binding{k.help, k.quit}, keys...) // there is no room for all, and these lead out
}

// allHelp has all keys, in columns.
func (m *model) allHelp() [][]key.Binding {
	k := &m.keys
	return [][]key.Binding{
		{k.up, k.down, k.pageUp, k.pageDown, k.top, k.bottom, k.open, k.back, k.help, k.quit},
		{k.replay, k.edit, k.discard, k.archive, k.restore, k.mark, k.skip, k.shown, k.progress},
		{k.filter, k.tab, k.untab, k.reload, k.more, k.payload},
	}
}
