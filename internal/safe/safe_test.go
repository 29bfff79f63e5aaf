package safe

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/charmbracelet/x/ansi"
)

func TestLine(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, give, want string }{
		{"empty", "", ""},
		{"plain", "order 17: Zeitüberschreitung, 请求超时 🚀", "order 17: Zeitüberschreitung, 请求超时 🚀"},
		{"accents of their own", "cafe\u0301 Vie\u0302\u0323t", "cafe\u0301 Vie\u0302\u0323t"},

		{"colour", "\x1b[31mred\x1b[0m", `\x1b[31mred\x1b[0m`},
		{"clear the screen", "\x1b[2J\x1b[H", `\x1b[2J\x1b[H`},
		{"title of the window", "\x1b]0;owned\a", `\x1b]0;owned\a`},
		{"link, OSC 8", "\x1b]8;;http://evil.example\x1b\\bank\x1b]8;;\x1b\\", `\x1b]8;;http://evil.example\x1b\bank\x1b]8;;\x1b\`},
		{"clipboard, OSC 52", "\x1b]52;c;cm0gLXJm\a", `\x1b]52;c;cm0gLXJm\a`},
		{"device control", "\x1bP+q544e\x1b\\", `\x1bP+q544e\x1b\`},

		{"C0", "\x00\a\b\t\n\v\f\r\x0e\x1f", `\x00\a\b\t\n\v\f\r\x0e\x1f`},
		{"delete", "a\x7fb", `a\x7fb`},
		{"C1", "\u0080\u0085\u009b2J\u009d52;c;eA==\u009c", `\u0080\u0085\u009b2J\u009d52;c;eA==\u009c`},
		{"C1 as bytes", "a\x9b2Jb\x9d0;x\x9c", `a\x9b2Jb\x9d0;x\x9c`},
		{"overwritten line", "all is well\rno", `all is well\rno`},

		{"bidi overrides", "abc\u202etxt.exe\u202d\u202c", `abc\u202etxt.exe\u202d\u202c`},
		{"bidi embeddings and isolates", "\u202a\u202b\u2066\u2067\u2068\u2069", `\u202a\u202b\u2066\u2067\u2068\u2069`},
		{"bidi marks", "\u200e\u200f\u061c", `\u200e\u200f\u061c`},

		{"zero width", "a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg", `a\u200bb\u200cc\u200dd\u2060e\ufefff\u00adg`},
		{"letters and marks that are not seen", "\u034f\u115f\u1160\u17b4\u3164\uffa0", `\u034f\u115f\u1160\u17b4\u3164\uffa0`},
		{"variation selectors", "a\ufe0f\U000e0100", `a\ufe0f\U000e0100`},
		{"tags", "\U000e0001\U000e0041", `\U000e0001\U000e0041`},
		{"line separators", "a\u2028b\u2029", `a\u2028b\u2029`},
		{"spaces that are none", "a\u00a0b\u3000c\u2003", `a\u00a0b\u3000c\u2003`},
		{"private use, surrogate, unassigned", "\ue000\xed\xa0\x80\U0010ffff", `\ue000\xed\xa0\x80\U0010ffff`},

		{"not UTF-8", "a\xffb\xc3", `a\xffb\xc3`},
		{"overlong escape", "\xc0\x9b[2J", `\xc0\x9b[2J`},
		{"replacement character", "a\ufffdb", "a\ufffdb"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			if got := Line(tt.give); got != tt.want {
				t.Errorf("Line(%q) = %q, want %q", tt.give, got, tt.want)
			}
		})
	}
}

// Marks without end would be drawn over other lines.
func TestLine_manyMarks(t *testing.T) {
	t.Parallel()
	got := Line("a" + strings.Repeat("\u0336", 500) + "b\u0336")
	want := "a" + strings.Repeat("\u0336", mostMarks) + strings.Repeat(`\u0336`, 500-mostMarks) + "b\u0336"
	if got != want {
		t.Errorf("Line() = %q, want %q", got, want)
	}
}

// What is long stays whole, and costs no more than its length.
func TestLine_long(t *testing.T) {
	t.Parallel()
	const n = 1 << 18
	plain := strings.Repeat("é", n)
	if got := Line(plain); got != plain {
		t.Error("a long line is changed")
	}
	if got, want := Line("\x1b"+plain+"\x1b"), `\x1b`+plain+`\x1b`; got != want {
		t.Errorf("of a long line with escapes there are %d bytes, want %d", len(got), len(want))
	}
	if got, want := Line(strings.Repeat("\x1b", n)), strings.Repeat(`\x1b`, n); got != want {
		t.Errorf("of many escapes there are %d bytes, want %d", len(got), len(want))
	}
}

func TestLine_doesNotAllocate(t *testing.T) { //nolint:paralleltest // counts the allocations of the process
	if n := testing.AllocsPerRun(100, func() { _ = Line("charge order 12: Zeitüberschreitung") }); n != 0 {
		t.Errorf("a line that is fine makes %v allocations, want 0", n)
	}
}

func TestBlock(t *testing.T) {
	t.Parallel()
	const give, want = "one\r\n\ttwo\x1b[2J\n\nover\rwritten\u202e\n", "one\n    two\\x1b[2J\n\nover\\rwritten\\u202e\n"
	if got := Block(give); got != want {
		t.Errorf("Block(%q) = %q, want %q", give, got, want)
	}
}

// seen fails the test unless each rune is drawn, and nothing is obeyed.
func seen(t *testing.T, s string) {
	t.Helper()
	if !utf8.ValidString(s) || ansi.Strip(s) != s {
		t.Errorf("%q: a terminal would obey it", s)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			t.Errorf("%q has %U, which is not seen", s, r)
		}
	}
}

func FuzzLine(f *testing.F) {
	for _, s := range []string{
		"", "plain", "\x1b[2J", "\x1b]52;c;eA==\a", "\u202e", "\xff\xfe", "a\r\nb\tc", "\u009b", "e\u0301", "👩\u200d👩", "\u3164", "\U000e0041",
		"a" + strings.Repeat("\u0336", 20),
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		line := Line(s)
		seen(t, line)
		if again := Line(line); again != line {
			t.Errorf("Line(%q) = %q, which is not safe: %q", s, line, again)
		}
		for l := range strings.SplitSeq(Block(s), "\n") {
			seen(t, l)
			if l != Line(l) {
				t.Errorf("Block(%q) has line %q", s, l)
			}
		}
	})
}
