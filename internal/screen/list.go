package screen

import "slices"

// A list is rows with a cursor on one of them, and a window on those that fit the
// screen.
type list[T any] struct {
	rows    []T
	at, top int
}

func (l *list[T]) selected() (row T, ok bool) {
	if l.at < len(l.rows) {
		return l.rows[l.at], true
	}
	return row, false
}

// move moves the cursor by n rows.
func (l *list[T]) move(n int) { l.at = max(min(l.at+n, len(l.rows)-1), 0) }

// set replaces the rows. The cursor stays on its row if that is among them.
func (l *list[T]) set(rows []T, id func(T) string) {
	if old, ok := l.selected(); ok {
		if i := slices.IndexFunc(rows, func(r T) bool { return id(r) == id(old) }); i >= 0 {
			l.at = i
		}
	}
	l.rows = rows
	l.move(0)
}

// remove takes the row under the cursor away, so that it is on the next one.
func (l *list[T]) remove() {
	if l.at < len(l.rows) {
		l.rows = slices.Delete(l.rows, l.at, l.at+1)
	}
	l.move(0)
}

// window is what is shown on so many lines.
func (l *list[T]) window(height int) (from, to int) {
	l.top = min(l.top, l.at)
	l.top = max(l.top, l.at-height+1, 0)
	l.top = max(min(l.top, len(l.rows)-height), 0)
	return l.top, min(l.top+height, len(l.rows))
}
