// Package safe makes texts from the wire fit for a terminal: payloads, headers and
// errors are written by whoever could send a message.
package safe

import (
	"encoding/hex"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// mostMarks is how many marks, such as accents, one letter may have. No language
// needs as many; a hundred would be drawn over the lines above and below.
const mostMarks = 8

// Line makes a text fit for one line. What could move the cursor, change colours,
// hide text, reverse its direction or pass for a plain space is shown as an escape,
// such as \x1b, \n or \u202e, and so are bytes that are no UTF-8. Everything else
// stays, so that a text of a million letters has a million: whoever draws it cuts
// it.
func Line(s string) string {
	var b strings.Builder
	written, marks := 0, 0
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		marks++
		if r < utf8.RuneSelf || !unicode.In(r, unicode.Mn, unicode.Me) {
			marks = 0
		}
		switch {
		case r == utf8.RuneError && size == 1:
			b.WriteString(s[written:i])
			b.WriteString(`\x`)
			b.WriteString(hex.EncodeToString([]byte{s[i]}))
			written = i + size
		case !Rune(r) || marks > mostMarks:
			b.WriteString(s[written:i])
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
			written = i + size
		}
		i += size
	}
	if written == 0 {
		return s
	}
	b.WriteString(s[written:])
	return b.String()
}

// Block is [Line] for a text of several lines, which stay lines. Tabs become
// spaces.
func Block(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = Line(strings.ReplaceAll(strings.TrimSuffix(line, "\r"), "\t", "    "))
	}
	return strings.Join(lines, "\n")
}

// Rune reports whether a terminal draws r, and does nothing else: it is no control
// character, no space but the plain one, and not one of those that are not seen,
// some of which Unicode counts among letters and marks.
func Rune(r rune) bool {
	if r < utf8.RuneSelf {
		return ' ' <= r && r <= '~'
	}
	return unicode.IsPrint(r) && !unicode.In(r, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector)
}
