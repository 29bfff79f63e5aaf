package screen

import (
	"strings"
	"testing"

	"github.com/charmbracelet/x/ansi"

	"github.com/monotel/monotel/internal/safe"
)

func TestOneLine_long(t *testing.T) {
	t.Parallel()
	for _, s := range []string{strings.Repeat("é", 1<<20), strings.Repeat("\x1b", 1<<20), strings.Repeat("e"+strings.Repeat("\u0336", 50), 1<<16)} {
		if got := oneLine(s, 20); ansi.StringWidth(got) != 20 || !strings.HasSuffix(got, "…") {
			t.Errorf("oneLine(%.20q…, 20) = %q, want 20 columns that end with …", s, got)
		}
	}
}

func FuzzOneLine(f *testing.F) {
	for _, s := range []string{"plain", "\x1b[31m", "\u202e", "\xff\xfe", "a\r\nb\tc", "東京東京東京東京東京東京", "e\u0301", "👩\u200d👩"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := oneLine(s, 20)
		if ansi.StringWidth(got) > 20 {
			t.Errorf("oneLine(%q, 20) = %q, which is wider", s, got)
		}
		if got != safe.Line(got) {
			t.Errorf("oneLine(%q, 20) = %q: a terminal would obey it", s, got)
		}
	})
}
