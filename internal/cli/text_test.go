package cli

import (
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/monotel/monotel/internal/safe"
)

// checkSafe fails the test if a terminal would do anything with a text but draw it.
func checkSafe(t *testing.T, s string) {
	t.Helper()
	if got := safe.Block(s); got != s {
		t.Errorf("%q is not safe, which is %q", s, got)
	}
}

// What scripts get has the values as they are, and a terminal is safe from them.
func FuzzEncode(f *testing.F) {
	for _, s := range []string{"", "a", "\x1b[2J", "\u202e", "<&>", "a\nb", "\U0001f600", "\U000e0041", "\x7f\u0085", "\u3164"} {
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

// What a flag cannot be must not be taken for its default, which is no limit.
func FuzzFlags(f *testing.F) {
	for _, s := range []string{"", "100/s", "5e-324/h", "1/h", "NaN", "Inf/s", "0x1p-3/m", "1,5,20", "1,,2", "10%", "never", "1e-320%", "-1", "1_000"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if rate, err := parseRate(s); err == nil && (rate <= 0 || rate > math.MaxFloat64) != (s == "") {
			t.Errorf("parseRate(%q) = %v", s, rate)
		}
		if part, err := parsePart(s); err == nil && (part == 0) != (s == "") || part > 1 || part < 0 && s != "never" {
			t.Errorf("parsePart(%q) = %v, %v", s, part, err)
		}
		steps, err := parseCanary(s)
		if err == nil && (len(steps) == 0) != (s == "") || len(steps) > 0 && slices.Min(steps) < 1 {
			t.Errorf("parseCanary(%q) = %v, %v", s, steps, err)
		}
	})
}

func FuzzServerURLs(f *testing.F) {
	for _, s := range []string{"host", "nats://u:secret@a:1, b", "nats://u:secret%zz@a", "nats://u:1/secret@a", ",", "tls://[::1]:4222", "ws://a/b?c"} {
		f.Add(s, true)
		f.Add(s, false)
	}
	f.Fuzz(func(t *testing.T, list string, bare bool) {
		use, shown, err := serverURLs(list, bare)
		switch {
		case err != nil && strings.Contains(list, "secret") && strings.Contains(err.Error(), "secret"):
			t.Errorf("serverURLs(%q) = %v", list, err)
		case err == nil && (use == "" || strings.Contains(shown, "@") || bare && strings.Contains(use, "@")):
			t.Errorf("serverURLs(%q, %t) = %q, shown as %q", list, bare, use, shown)
		}
	})
}
