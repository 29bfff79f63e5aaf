package cli

import (
	"fmt"
	"strings"
	"time"
)

// count writes a number for people: 1,234.
func count[N int | int64 | uint64](n N) string {
	s := fmt.Sprint(n)
	digits := strings.TrimPrefix(s, "-")
	for i := len(digits) - 3; i > 0; i -= 3 {
		digits = digits[:i] + "," + digits[i:]
	}
	if n < 0 {
		return "-" + digits
	}
	return digits
}

// plural is "1 message" or "2 messages".
func plural[N int | int64 | uint64](n N, one string) string {
	if n == 1 {
		return "1 " + one
	}
	return count(n) + " " + one + "s"
}

func size(n int64) string {
	const unit = 1024
	if n < unit {
		return plural(n, "byte")
	}
	f, units := float64(n)/unit, "KMGTPE"
	for f >= unit {
		f, units = f/unit, units[1:]
	}
	return fmt.Sprintf("%.1f %ciB", f, units[0])
}

// age says how long ago something was.
func (c *cli) age(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	d := c.now().Sub(t)
	switch {
	case d < -time.Minute: // a clock is wrong
		return t.UTC().Format(time.RFC3339)
	case d < time.Second:
		return "now"
	}
	return span(d) + " ago"
}

// span is a duration for people, in its largest unit.
func span(d time.Duration) string {
	const day = 24 * time.Hour
	switch {
	case d < time.Second:
		return d.Round(time.Millisecond).String()
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 2*day:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/day)
}

// when is a time for people who need to compare it with a log.
func (c *cli) when(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02T15:04:05.000Z") + " (" + c.age(t) + ")"
}
