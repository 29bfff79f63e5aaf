package cli

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"
)

func TestSafe(t *testing.T) {
	t.Parallel()

	tests := []struct {
		name, give, want string
	}{
		{"plain", "charge order 12: Zeitüberschreitung 请求", "charge order 12: Zeitüberschreitung 请求"},
		{"colour", "\x1b[31mred\x1b[0m", `\x1b[31mred\x1b[0m`},
		{"title of the window", "\x1b]0;owned\a", `\x1b]0;owned\a`},
		{"eight-bit escape", "\u009b31m", `\u009b31m`},
		{"carriage return", "all is well\rno", `all is well\rno`},
		{"lines", "a\nb\tc", `a\nb\tc`},
		{"right to left", "abc\u202etxt.exe", `abc\u202etxt.exe`},
		{"isolate", "\u2066x\u2069", `\u2066x\u2069`},
		{"zero width", "a\u200bb\ufeff", `a\u200bb\ufeff`},
		{"tag", "\U000e0041", `\U000e0041`},
		{"no UTF-8", "a\xffb\xc3", `a\xffb\xc3`},
		{"replacement character", "a\ufffdb", "a\ufffdb"},
		{"line separator", "a\u2028b", `a\u2028b`},
		{"delete", "a\x7fb", `a\x7fb`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := safe(tt.give); got != tt.want {
				t.Errorf("safe(%q) = %q, want %q", tt.give, got, tt.want)
			}
		})
	}
}

func checkSafe(t *testing.T, s string) {
	t.Helper()
	if !utf8.ValidString(s) {
		t.Errorf("%q is no UTF-8", s)
	}
	for _, r := range s {
		if r != '\n' && !unicode.IsPrint(r) {
			t.Errorf("%q has %U, which does not print", s, r)
		}
	}
}

func FuzzSafe(f *testing.F) {
	for _, s := range []string{"", "a", "\x1b[2J", "\u202e", "\xff", "a\nb", "\U0001f600"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		checkSafe(t, safe(s))
		if strings.Contains(safe(s), "\n") {
			t.Errorf("safe(%q) has several lines", s)
		}
		checkSafe(t, safeLines(s))
	})
}

// What scripts get has the values as they are, and a terminal is safe from them.
func FuzzEncode(f *testing.F) {
	for _, s := range []string{"", "a", "\x1b[2J", "\u202e", "<&>", "a\nb", "\U0001f600", "\U000e0041", "\x7f\u0085"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if !utf8.ValidString(s) {
			t.Skip("JSON has no bytes")
		}
		give := map[string]string{"v": s}
		b, err := encode(give, true)
		if err != nil {
			t.Fatal(err)
		}
		checkSafe(t, string(b))
		var got map[string]string
		if err := json.Unmarshal(b, &got); err != nil || !reflect.DeepEqual(got, give) {
			t.Errorf("encode(%q) = %s, which is %q, %v", s, b, got, err)
		}
	})
}

func TestNumbers(t *testing.T) {
	t.Parallel()
	for give, want := range map[int]string{0: "0", 12: "12", 999: "999", 1000: "1,000", -1234567: "-1,234,567", 100000: "100,000"} {
		if got := count(give); got != want {
			t.Errorf("count(%d) = %q, want %q", give, got, want)
		}
	}
	for give, want := range map[int64]string{1: "1 byte", 0: "0 bytes", 1023: "1,023 bytes", 1536: "1.5 KiB", 5 << 30: "5.0 GiB"} {
		if got := size(give); got != want {
			t.Errorf("size(%d) = %q, want %q", give, got, want)
		}
	}
}

func TestAge(t *testing.T) {
	t.Parallel()
	c := &cli{process: process{now: func() time.Time { return now }}}
	for give, want := range map[time.Duration]string{
		0: "now", 59 * time.Second: "59s ago", 3 * time.Minute: "3m ago", 47 * time.Hour: "47h ago", 72 * time.Hour: "3d ago",
		-time.Second: "now", -time.Hour: "2026-01-02T16:04:05Z",
	} {
		if got := c.age(now.Add(-give)); got != want {
			t.Errorf("age of %v = %q, want %q", give, got, want)
		}
	}
	if got := c.age(time.Time{}); got != "-" {
		t.Errorf("age of no time = %q, want -", got)
	}
}

func TestCut(t *testing.T) {
	t.Parallel()
	tests := []struct {
		give  string
		width int
		want  string
	}{
		{"abc", 3, "abc"},
		{"abcd", 3, "ab…"},
		{"请求超时", 5, "请求…"},
		{"abc", 0, ""},
		{"abc", -4, ""},
		{"abc", 1, "…"},
	}
	for _, tt := range tests {
		if got := cut(tt.give, tt.width); got != tt.want {
			t.Errorf("cut(%q, %d) = %q, want %q", tt.give, tt.width, got, tt.want)
		}
	}
}
