package jsontext

import (
	"bytes"
	"encoding/json"
	"math"
	"strings"
	"testing"
	"unicode/utf8"
)

// A client that may publish a message must not make whoever looks at it run out of
// memory. 20 KB of brackets were 200 MB when they were indented.
func TestIndent_bounded(t *testing.T) {
	t.Parallel()
	deep := func(n int) string { return strings.Repeat("[", n) + strings.Repeat("]", n) }
	for _, tt := range []struct{ name, give string }{
		{"20 KB of brackets", deep(10_000)},
		{"1 MB of brackets, 10 000 deep", "[" + strings.TrimSuffix(strings.Repeat(deep(9_000)+",", 50), ",") + "]"},
		{"brackets that are not closed", strings.Repeat("[", 20_000)},
		{"1 MB of brackets that are not closed", strings.Repeat("[", 1<<20)},
		{"objects", strings.Repeat(`{"a":`, 9_000) + "1" + strings.Repeat("}", 9_000)},
		{"arrays in objects", strings.Repeat(`{"a":[`, 4_000) + strings.Repeat("]}", 4_000)},
		{"many elements far down", strings.Repeat("[", 60) + "1" + strings.Repeat(",1", 200_000) + strings.Repeat("]", 60)},
		{"many empty objects far down", strings.Repeat("[", 60) + "{}" + strings.Repeat(",{}", 200_000) + strings.Repeat("]", 60)},
		{"many keys", `{"a":1` + strings.Repeat(`,"b":2`, 200_000) + "}"},
		{"a long string", `"` + strings.Repeat("x", 1<<20) + `"`},
		{"a long line", strings.Repeat("word ", 200_000)},
		{"white space", strings.Repeat(" \n", 1<<19) + "1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			text, left := Indent([]byte(tt.give), math.MaxInt)
			if most := 6*len(tt.give) + 65<<10; len(text) > most || left != 0 {
				t.Errorf("%d bytes of %d, and %d left, want at most %d and 0", len(text), len(tt.give), left, most)
			}
			if json.Valid([]byte(tt.give)) && compact(t, text) != compact(t, []byte(tt.give)) {
				t.Error("it is something else now")
			}
			const most = 1000
			text, left = Indent([]byte(tt.give), most)
			if whole := len(strings.TrimSpace(tt.give)) <= most; len(text) > most || left == 0 && !whole {
				t.Errorf("cut to %d bytes, and %d left", len(text), left)
			}
		})
	}
}

func compact(t *testing.T, text []byte) string {
	t.Helper()
	var b bytes.Buffer
	if err := json.Compact(&b, text); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// What is not out of the ordinary looks as encoding/json writes it.
func TestIndent_ordinary(t *testing.T) {
	t.Parallel()
	for _, give := range []string{
		`{}`, `[]`, `{"a":1}`, `[1,2,[3,{}],{"b":[]}]`, `"a \" b"`, `"\\"`, ` { "a" : "x, y: {" , "b" : [ ] } `, "null", "-1.5e3",
		`{"a":{"b":{"c":[1,"\u00e9",true]}}}`, `["请求"]`, `[[[[[[[[1]]]]]]]]`,
	} {
		var want bytes.Buffer
		if err := json.Indent(&want, bytes.TrimSpace([]byte(give)), "", "  "); err != nil {
			t.Fatal(err)
		}
		if got, left := Indent([]byte(give), math.MaxInt); string(got) != want.String() || left != 0 {
			t.Errorf("Indent(%s) = %s, %d left, want %s", give, got, left, &want)
		}
	}
}

func TestIndent_cut(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		give string
		most int
		want string
		left int
	}{
		{"", 3, "", 0},
		{"abc", 3, "abc", 0},
		{"abcd", 3, "abc", 1},
		{"aéé", 2, "a", 4},
		{"aéé", 0, "", 5},
		{"\x80\x80\x80\x80\x80\x80", 5, "\x80", 5}, // it is no text
		{"[1,2]", 4, "[\n  ", 4},
		{"1 \n", 10, "1", 0},
	} {
		if text, left := Indent([]byte(tt.give), tt.most); string(text) != tt.want || left != tt.left {
			t.Errorf("Indent(%q, %d) = %q, %d left, want %q, %d", tt.give, tt.most, text, left, tt.want, tt.left)
		}
	}
}

func TestNested(t *testing.T) {
	t.Parallel()
	for give, want := range map[string]bool{
		"": false, "1": false, "[[]]": false, "[[[]]]": true, `{"a":{"b":1}}`: false, `{"a":{"b":{}}}`: true, `["[[[["]`: false, "[[],[],[]]": false,
		"[[[[": true,
	} {
		if got := Nested([]byte(give), 2); got != want {
			t.Errorf("Nested(%s, 2) = %t, want %t", give, got, want)
		}
	}
}

func FuzzIndent(f *testing.F) {
	for _, s := range []string{"", "[[[[", `{"a":[1,{"b":"\"é"}],"c":{}}`, "text\r", "\xff", strings.Repeat("[", 70) + strings.Repeat("]", 70)} {
		f.Add([]byte(s), 20)
	}
	f.Fuzz(func(t *testing.T, data []byte, most int) {
		most = max(most, 0)
		text, left := Indent(data, most)
		if len(text) > most || left < 0 || left > len(data) {
			t.Errorf("Indent(%q, %d) = %q, %d left", data, most, text, left)
		}
		whole, left := Indent(data, math.MaxInt)
		if left != 0 || !bytes.HasPrefix(whole, text) {
			t.Errorf("Indent(%q) = %q, %d left, and cut %q", data, whole, left, text)
		}
		if utf8.Valid(data) && !utf8.Valid(text) {
			t.Errorf("Indent(%q, %d) = %q, which is not UTF-8", data, most, text)
		}
		if json.Valid(data) && compact(t, whole) != compact(t, data) {
			t.Errorf("Indent(%q) = %q", data, whole)
		}
	})
}
