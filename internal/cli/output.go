package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"strings"
	"unicode/utf16"

	"charm.land/lipgloss/v2"

	"github.com/monotel/monotel/internal/jsontext"
	"github.com/monotel/monotel/internal/safe"
)

// The kinds of output.
const (
	outputTable  = "table"
	outputJSON   = "json"
	outputNDJSON = "ndjson"
)

var outputs = []string{outputTable, outputJSON, outputNDJSON}

// encode is JSON that keeps every value and is safe for a terminal: what does
// not print is escaped, which means the same. It ends with a newline.
func encode(v any, indent bool) ([]byte, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return nil, fmt.Errorf("write JSON: %w", err)
	}
	text := b.Bytes()
	if indent {
		text, _ = jsontext.Indent(text, math.MaxInt)
		text = append(bytes.TrimRight(text, "\n"), '\n')
	}
	return escapeUnprintable(text), nil
}

// escapeUnprintable escapes runes that JSON allows in strings and a terminal may
// obey. Outside of strings there are none.
func escapeUnprintable(b []byte) []byte {
	risky := func(r rune) bool { return r != '\n' && !safe.Rune(r) }
	if bytes.IndexFunc(b, risky) < 0 {
		return b
	}
	var to bytes.Buffer
	for _, r := range string(b) {
		switch {
		case !risky(r):
			to.WriteRune(r)
		case r > 0xffff:
			high, low := utf16.EncodeRune(r)
			fmt.Fprintf(&to, `\u%04x\u%04x`, high, low)
		default:
			fmt.Fprintf(&to, `\u%04x`, r)
		}
	}
	return to.Bytes()
}

// writeJSON writes one value: indented, or on one line as NDJSON.
func (c *cli) writeJSON(v any) error {
	b, err := encode(v, c.output == outputJSON)
	if err != nil {
		return err
	}
	return c.write(b)
}

func (c *cli) write(b []byte) error {
	if _, err := c.out.Write(b); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// A list writes values one after the other: an array, or a line for each.
type list struct {
	c *cli
	n int
}

func (l *list) add(v any) error {
	b, err := encode(v, false)
	if err != nil {
		return err
	}
	if l.c.output == outputJSON {
		b = append([]byte(map[bool]string{true: "[\n  ", false: ",\n  "}[l.n == 0]), bytes.TrimSuffix(b, []byte("\n"))...)
	}
	l.n++
	return l.c.write(b)
}

func (l *list) close() error {
	switch {
	case l.c.output != outputJSON:
		return nil
	case l.n == 0:
		return l.c.write([]byte("[]\n"))
	}
	return l.c.write([]byte("\n]\n"))
}

// writeList writes what is in memory already.
func writeList[T any](c *cli, values []T) error {
	l := &list{c: c}
	for _, v := range values {
		if err := l.add(v); err != nil {
			return err
		}
	}
	return l.close()
}

// colours of a terminal's own palette, so that they fit its background.
var (
	styleHead = lipgloss.NewStyle().Bold(true)
	styleDim  = lipgloss.NewStyle().Faint(true)
	styleBad  = lipgloss.NewStyle().Foreground(lipgloss.Color("1"))
	styleWarn = lipgloss.NewStyle().Foreground(lipgloss.Color("3"))
	styleGood = lipgloss.NewStyle().Foreground(lipgloss.Color("2"))
)

// paint styles a text if whoever reads it is at a terminal and wants that.
func (c *cli) paint(w io.Writer, style lipgloss.Style, s string) string {
	if _, ok := c.tty(w); !ok || c.env("NO_COLOR") != "" || c.env("TERM") == "dumb" || s == "" {
		return s
	}
	return style.Render(s)
}

// A cell is a text of a table, made safe already.
type cell struct {
	text  string
	style lipgloss.Style
}

func plain(s string) cell                        { return cell{text: safe.Line(s)} }
func styled(style lipgloss.Style, s string) cell { return cell{text: safe.Line(s), style: style} }
func number[N int | int64 | uint64](n N) cell    { return cell{text: count(n)} }

// A table aligns its columns by its first rows, so that the length of a list
// costs no memory. On a terminal, lines are cut at its width.
type table struct {
	c      *cli
	w      io.Writer
	rows   [][]cell // that wait for the widths; the first is the header
	widths []int    // nil until they are known
	screen int      // columns, 0 for no limit
}

const alignRows = 500

func (c *cli) table(w io.Writer, header ...string) *table {
	t := &table{c: c, w: w}
	t.screen, _ = c.tty(w)
	head := make([]cell, len(header))
	for i, h := range header {
		head[i] = styled(styleHead, h)
	}
	t.rows = [][]cell{head}
	return t
}

func (t *table) row(cells ...cell) error {
	if t.widths != nil {
		return t.print(cells)
	}
	t.rows = append(t.rows, cells)
	if len(t.rows) > alignRows {
		return t.flush()
	}
	return nil
}

// flush prints what waits. An empty table prints nothing.
func (t *table) flush() error {
	if t.widths != nil || len(t.rows) == 1 {
		return nil
	}
	t.widths = make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, c := range row {
			t.widths[i] = max(t.widths[i], lipgloss.Width(c.text))
		}
	}
	for _, row := range t.rows {
		if err := t.print(row); err != nil {
			return err
		}
	}
	t.rows = nil
	return nil
}

func (t *table) print(row []cell) error {
	var b strings.Builder
	used := 0
	for i, c := range row {
		text := c.text
		if t.screen > 0 {
			text = cut(text, t.screen-used)
		}
		b.WriteString(t.c.paint(t.w, c.style, text))
		if i == len(row)-1 {
			break
		}
		pad := max(t.widths[i]-lipgloss.Width(text), 0) + 2
		used += lipgloss.Width(text) + pad
		if t.screen > 0 && used >= t.screen {
			break
		}
		b.WriteString(strings.Repeat(" ", pad))
	}
	_, err := io.WriteString(t.w, strings.TrimRight(b.String(), " ")+"\n")
	if err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

// cut shortens a text to a width.
func cut(s string, width int) string {
	switch {
	case lipgloss.Width(s) <= width:
		return s
	case width < 1:
		return ""
	case width == 1: // MaxWidth takes 0 for no limit
		return "…"
	}
	return lipgloss.NewStyle().Inline(true).MaxWidth(width-1).Render(s) + "…"
}

// remark tells how it went, where somebody may read it.
func (c *cli) remark(format string, args ...any) {
	if !c.quiet {
		fmt.Fprintf(c.err, format+"\n", args...)
	}
}

// warn is for what should not be missed, with quiet too.
func (c *cli) warn(format string, args ...any) {
	fmt.Fprintln(c.err, c.paint(c.err, styleWarn, "warning:")+" "+safe.Line(fmt.Sprintf(format, args...)))
}
