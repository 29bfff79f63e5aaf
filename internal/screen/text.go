package screen

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"

	"github.com/monotel/monotel/internal/safe"
)

// oneLine is a text from the wire on one line of a width.
func oneLine(s string, width int) string {
	if width <= 0 {
		return ""
	}
	return ansi.Truncate(safe.Line(beginning(s, maxLine)), width, "…")
}

// maxLine is as much of a text as can be seen on one line, with room to spare.
const maxLine = 4 << 10

// beginning is a text cut to at most so many bytes, between two letters.
func beginning(s string, most int) string {
	if len(s) <= most {
		return s
	}
	for i := range utf8.UTFMax {
		if utf8.RuneStart(s[most-i]) {
			return s[:most-i]
		}
	}
	return s[:most]
}

// wrap breaks a safe text into lines, at spaces where there are any.
func wrap(s string, width int) []string {
	// The library breaks at hyphens, too, such as those of a date.
	const hyphen, unbroken = "-", "\u2011"
	s = ansi.Wrap(strings.ReplaceAll(s, hyphen, unbroken), max(width, 1), "")
	return strings.Split(strings.ReplaceAll(s, unbroken, hyphen), "\n")
}

// hardwrap breaks a safe text into lines and keeps every space.
func hardwrap(s string, width int) []string {
	return strings.Split(ansi.Hardwrap(s, max(width, 1), true), "\n")
}

// pad fills a line with spaces.
func pad(s string, width int) string {
	return s + strings.Repeat(" ", max(width-ansi.StringWidth(s), 0))
}

// padLeft is pad for numbers.
func padLeft(s string, width int) string {
	return strings.Repeat(" ", max(width-ansi.StringWidth(s), 0)) + s
}

// count writes a number for people: 1,234.
func count(n int) string {
	s := strconv.Itoa(n)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// plural is "1 group" or "2 groups".
func plural(n int, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(n) + " " + one + "s"
}

func bytesText(n int64) string {
	const unit = 1024
	if n < unit {
		return plural(int(n), "byte")
	}
	f, units := float64(n)/unit, "KMGTPE"
	for f >= unit {
		f, units = f/unit, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", f, units[0])
}

// ago is how long ago something was, in the largest unit.
func (m *model) ago(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	const day = 24 * time.Hour
	switch d := m.opt.Now().Sub(t); {
	case d < time.Second:
		return "now"
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	default:
		return fmt.Sprintf("%dd", d/day)
	}
}

// when is a time that can be compared with a log.
func (m *model) when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05Z") + " (" + m.ago(t) + ")"
}

// perHour is a rate.
func perHour(f float64) string {
	switch {
	case f <= 0:
		return "-"
	case f < 1:
		return "<1/h"
	default:
		return count(int(f+0.5)) + "/h"
	}
}
