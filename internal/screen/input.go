package screen

import (
	"slices"
	"strings"
	"unicode"

	tea "charm.land/bubbletea/v2"
	"charm.land/lipgloss/v2"
	"github.com/charmbracelet/x/ansi"

	"github.com/monotel/monotel/internal/safe"
)

// An input is one line that is typed. It only takes what can be shown.
type input struct {
	text []rune
	at   int // of the cursor
}

const maxInput = 4000

func (in *input) value() string { return strings.TrimSpace(string(in.text)) }

// press takes a key.
func (in *input) press(msg tea.KeyPressMsg) {
	switch msg.String() {
	case "left", "ctrl+b":
		in.at = max(in.at-1, 0)
	case "right", "ctrl+f":
		in.at = min(in.at+1, len(in.text))
	case "home", "ctrl+a":
		in.at = 0
	case "end", "ctrl+e":
		in.at = len(in.text)
	case "backspace", "ctrl+h":
		if in.at > 0 {
			in.at--
			in.text = slices.Delete(in.text, in.at, in.at+1)
		}
	case "delete", "ctrl+d":
		if in.at < len(in.text) {
			in.text = slices.Delete(in.text, in.at, in.at+1)
		}
	case "ctrl+u":
		in.text, in.at = slices.Delete(in.text, 0, in.at), 0
	case "ctrl+k":
		in.text = in.text[:in.at]
	case "ctrl+w":
		before := strings.TrimRightFunc(string(in.text[:in.at]), unicode.IsSpace)
		from := len([]rune(before[:strings.LastIndexFunc(before, unicode.IsSpace)+1]))
		in.text, in.at = slices.Delete(in.text, from, in.at), from
	default:
		in.insert(msg.Text)
	}
}

// insert takes text, such as what is pasted.
func (in *input) insert(s string) {
	for _, r := range s {
		if unicode.IsSpace(r) {
			r = ' '
		}
		if !safe.Rune(r) || len(in.text) >= maxInput {
			continue
		}
		in.text = slices.Insert(in.text, in.at, r)
		in.at++
	}
}

// view draws the part around the cursor, which is a cell in reverse.
func (in *input) view(prompt string, width int) string {
	before, cursor, after := string(in.text[:in.at]), " ", ""
	if in.at < len(in.text) {
		cursor, after = string(in.text[in.at]), string(in.text[in.at+1:])
	}
	room := max(width-ansi.StringWidth(prompt)-ansi.StringWidth(cursor), 1)
	if over := ansi.StringWidth(before) - room; over > 0 {
		before = ansi.TruncateLeft(before, over+1, "…")
	}
	line := prompt + before + lipgloss.NewStyle().Reverse(true).Render(cursor) + after
	return ansi.Truncate(line, width, "…")
}
