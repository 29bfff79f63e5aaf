package screen

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Safe makes a text from the wire fit for one line of a terminal. What could move
// the cursor, change colours, hide text or reverse its direction is shown as an
// escape, such as \x1b, \n or \u202e, and so are bytes that are no UTF-8. Every
// kind of space is a plain one.
func Safe(s string) string {
	if strings.IndexFunc(s, unsafeRune) < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, size := utf8.DecodeRuneInString(s[i:])
		switch {
		case r == utf8.RuneError && size == 1:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case unicode.IsPrint(r):
			b.WriteString(s[i : i+size])
		case unicode.Is(unicode.Zs, r):
			b.WriteByte(' ')
		default:
			q := strconv.QuoteRuneToASCII(r)
			b.WriteString(q[1 : len(q)-1])
		}
		i += size
	}
	return b.String()
}

// unsafeRune also stops at U+FFFD, which a byte that is no UTF-8 decodes to.
func unsafeRune(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }

// SafeBlock is [Safe] for a text of several lines, which stay lines. Tabs become
// spaces.
func SafeBlock(s string) string {
	lines := strings.Split(s, "\n")
	for i, line := range lines {
		lines[i] = Safe(strings.ReplaceAll(strings.TrimSuffix(line, "\r"), "\t", "    "))
	}
	return strings.Join(lines, "\n")
}
