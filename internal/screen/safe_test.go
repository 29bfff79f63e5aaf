package screen

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
)

func TestSafe(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, give, want string }{
		{"plain", "order 17 über 東京 🚀", "order 17 über 東京 🚀"},
		{"colour", "\x1b[31mred", `\x1b[31mred`},
		{"title", "\x1b]0;owned\a", `\x1b]0;owned\a`},
		{"C1", "a\u009b2Jb", `a\u009b2Jb`},
		{"C1 as a byte", "a\x9b2Jb", `a\x9b2Jb`},
		{"carriage return", "good\rbad", `good\rbad`},
		{"new line and tab", "a\nb\tc", `a\nb\tc`},
		{"backspace, delete, nul", "a\b\x7f\x00", `a\b\x7f\x00`},
		{"bidi override", "a\u202eb\u2066c\u200f", `a\u202eb\u2066c\u200f`},
		{"invisible", "a\u200bb\ufeffc\u2028\U000e0041", `a\u200bb\ufeffc\u2028\U000e0041`},
		{"not UTF-8", "a\xffb\xc3", `a\xffb\xc3`},
		{"replacement character", "a\ufffdb", "a\ufffdb"},
		{"spaces", "a\u00a0b\u3000c", "a b c"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := Safe(tt.give); got != tt.want {
				t.Errorf("Safe(%q) = %q, want %q", tt.give, got, tt.want)
			}
		})
	}
}

func TestSafeBlock(t *testing.T) {
	t.Parallel()
	const give, want = "one\r\n\ttwo\x1b[2J\n\nlast\u202e", "one\n    two\\x1b[2J\n\nlast\\u202e"
	if got := SafeBlock(give); got != want {
		t.Errorf("SafeBlock(%q) = %q, want %q", give, got, want)
	}
}

func FuzzSafe(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[31m", "\u202e", "\xff\xfe", "a\r\nb\tc", "\u009b", "e\u0301", "👩\u200d👩"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := Safe(s)
		if again := Safe(line); again != line {
			t.Errorf("Safe(%q) = %q, which is not safe: %q", s, line, again)
		}
		if !utf8.ValidString(line) || ansi.Strip(line) != line || strings.ContainsAny(line, "\x1b\n\r\t") {
			t.Errorf("Safe(%q) = %q: a terminal would obey it", s, line)
		}
		for l := range strings.SplitSeq(SafeBlock(s), "\n") {
			if l != Safe(l) {
				t.Errorf("SafeBlock(%q) has line %q", s, l)
			}
		}
		if got := oneLine(s, 20); ansi.StringWidth(got) > 20 {
			t.Errorf("oneLine(%q, 20) = %q, which is wider", s, got)
		}
	})
}
