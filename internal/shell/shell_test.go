package shell

import (
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"github.com/monotel/monotel/internal/safe"
)

var words = []string{
	"ORDERS", "orders_v1", "a-b", "a`id`", "$(id)", "${HOME}", "$HOME", "a;id", "a|id", "a&id", "a>b", "a<b", "a b", "a'b", `a"b`, `a\b`, "*", "?", "[a]",
	"~", "~root", "!!", "#a", "=ls", "{a,b}", "'; id; '", "a\nid", "a\x1b[2J", "a\u202eb", "请求", "", "-rf", "--force", "%1", "a\xffb", "a\r",
}

// Names of streams are chosen by others. A shell must take each for one word,
// and for nothing else.
func TestQuote(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ give, want string }{
		{"ORDERS", "ORDERS"},
		{"a`id`", "'a`id`'"},
		{"a'b", `'a'\''b'`},
		{"", "''"},
		{"=ls", "'=ls'"},
		{"a=b", "a=b"},
		{"a\n'\\\x1b", `$'a\x0a\'\\\x1b'`},
	} {
		if got := Quote(tt.give); got != tt.want {
			t.Errorf("Quote(%q) = %s, want %s", tt.give, got, tt.want)
		}
	}
	bash, err := exec.LookPath("bash")
	if err != nil && runtime.GOOS == "windows" {
		t.Skip("NOT CHECKED: there is no bash")
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range words {
		line := "printf '<%s>' " + Quote(w)
		if got := safe.Line(line); got != line {
			t.Errorf("%q is not fit for a terminal", line)
		}
		out, err := exec.CommandContext(t.Context(), bash, "-c", line).Output()
		if err != nil || string(out) != "<"+w+">" {
			t.Errorf("a shell reads %s as %q, %v, want %q", line, out, err, w)
		}
	}
}

func TestCommand(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		names []string
		flags []string
		want  string
	}{
		{[]string{"ORDERS"}, []string{"--max-age", "0s"}, "nats stream edit ORDERS --max-age 0s"},
		{[]string{"a`id`", "b c"}, nil, "nats stream edit 'a`id`' 'b c'"},
		{[]string{"--force"}, []string{"--max-age", "0s"}, "nats stream edit --max-age 0s -- --force"},
		{nil, nil, "nats stream edit"},
	} {
		if got := Command("nats stream edit", tt.names, tt.flags...); got != tt.want {
			t.Errorf("Command(%q, %q) = %s, want %s", tt.names, tt.flags, got, tt.want)
		}
	}
}

func FuzzQuote(f *testing.F) {
	for _, w := range words {
		f.Add(w)
	}
	f.Fuzz(func(t *testing.T, w string) {
		q := Quote(w)
		if safe.Line(q) != q {
			t.Errorf("Quote(%q) = %q, which is not fit for a terminal", w, q)
		}
		switch {
		case q == w:
			if strings.ContainsAny(w, "`$&;|<>()*?[]{}#~!\\\"' \t\n") || w == "" || w[0] == '=' {
				t.Errorf("Quote(%q) is not quoted", w)
			}
		case strings.HasPrefix(q, "$'"):
		default: // outside of the quotes there is nothing but escaped ones
			if rest := strings.ReplaceAll(q[1:len(q)-1], `'\''`, ""); strings.Contains(rest, "'") || q[0] != '\'' || q[len(q)-1] != '\'' {
				t.Errorf("Quote(%q) = %s", w, q)
			}
		}
	})
}
