package draft

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMain is also a process that is killed while it edits, see TestClean_killed.
func TestMain(m *testing.M) {
	if payload, ok := os.LookupEnv("DRAFT_TEST_PAYLOAD"); ok {
		d, err := New([]byte(payload))
		if err == nil {
			err = d.Create()
		}
		if err != nil {
			panic(err)
		}
		_, _ = os.Stdout.WriteString(d.Path() + "\n")
		_, _ = os.Stdin.Read(make([]byte, 1)) // until it is killed
		os.Exit(1)
	}
	cache, err := os.MkdirTemp("", "draft-test-")
	if err != nil {
		panic(err)
	}
	if err := errors.Join(os.Setenv("XDG_CACHE_HOME", cache), os.Setenv("HOME", cache), os.Setenv("LocalAppData", cache)); err != nil {
		panic(err)
	}
	code := m.Run()
	_ = os.RemoveAll(cache)
	os.Exit(code)
}

func create(t *testing.T, payload string) *Draft {
	t.Helper()
	d, err := New([]byte(payload))
	if err == nil {
		err = d.Create()
	}
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// An edit that changed nothing stored a payload without its last \r.
func TestPayload_untouched(t *testing.T) {
	t.Parallel()
	for _, give := range []string{
		"", "a", "a\r", "a\n", "a\r\n", "a\n\r", "\r", "\n", "a\n\n", "a\r\r", "one\r\ntwo\nthree\rfour", "\ufeffa", "\ufeff{\"a\":1}", " a ", "\t",
		`{"a":1}`, "{\"a\":1}\r", "{\"a\":1}\n", "{\"a\":1}\r\n", `{ "b" : 1.50, "a":[ ] , "a":2 }`, "{\n\t\"a\": 1\n}", "{\r\n\"a\":1\r\n}\r", `"a"`, " 1 ", `{"<b>":"\u003cb\u003e&é\u00e9"}`,
		`[[[[` + strings.Repeat("[", 200) + strings.Repeat("]", 204), `{"a":1e400,"b":12345678901234567890}`,
	} {
		d, err := New([]byte(give))
		if err != nil {
			t.Errorf("New(%q): %v", give, err)
			continue
		}
		if got := d.Payload(slices.Clone(d.Text())); string(got) != give {
			t.Errorf("%q becomes %q", give, got)
		}
		// vi ends the last line.
		if got := d.Payload(append(slices.Clone(d.Text()), '\n')); string(got) != give && !strings.HasSuffix(give, "\n") {
			t.Errorf("with a newline at its end, %q becomes %q", give, got)
		}
	}
}

func TestPayload_edited(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, give, from, to, want string }{
		{"text with \\r", "cent 1\r", "1", "2", "cent 2\r"},
		{"lines of both kinds", "a\r\nb 1\nc\r", "1", "2", "a\r\nb 2\nc\r"},
		{"BOM", "\ufeffa 1\n", "1", "2", "\ufeffa 2\n"},
		{"compact", `{"a":1,"b":[1,2],"c":{}}`, `"a": 1`, `"a": 7`, `{"a":7,"b":[1,2],"c":{}}`},
		{"with spaces", `{"a": 1, "b": [1, 2], "c": {}}`, `"a": 1`, `"a": 7`, `{"a": 7, "b": [1, 2], "c": {}}`},
		{"in two places", `{"a": 1, "b": [1, 2], "c": 1}`, ": 1", ": 7", `{"a": 7, "b": [1, 2], "c": 7}`},
		{"odd spaces before and after", "\r{ \"a\" :1 ,\t\"b\": 2  ,\"c\":3 }\r", ": 2", ": 20", "\r{ \"a\" :1 ,\t\"b\": 20  ,\"c\":3 }\r"},
		{"a key more", `{ "a": 1 }`, `"a": 1`, `"a": 1, "b" : [ 2 ]`, `{ "a": 1, "b": [2] }`},
		{"a key less", `{"a": 1, "b": 2}`, ",\n  \"b\": 2", "", `{"a": 1}`},
		{"escapes and numbers stay", `{"t":"\u003cb\u003e","n":1.50,"m":12345678901234567890,"x":1}`, `"x": 1`, `"x": 2`, `{"t":"\u003cb\u003e","n":1.50,"m":12345678901234567890,"x":2}`},
		{"keys that are there twice", `{"a":1,"a":2,"b":3}`, `"b": 3`, `"b": 4`, `{"a":1,"a":2,"b":4}`},
		{"laid out already", "{\n\t\"a\": 1,\n\t\"b\":  2\n}", `1`, `7`, "{\n\t\"a\": 7,\n\t\"b\":  2\n}"},
		{"spaces of what is laid out already", "{\n\t\"a\": 1\n}", "\t", "    ", "{\n\t\"a\": 1\n}"},
		{"a newline at the end, of JSON", "{\"a\":1}\n", "1", "2", "{\"a\":2}\n"},
		{"no JSON any more", `{"a":1}`, `"a"`, `a`, "{\n  a: 1\n}"},
		{"emptied", `{"a":1}`, "{\n  \"a\": 1\n}\n", "", ""},
	} {
		d, err := New([]byte(tt.give))
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
			continue
		}
		if !strings.Contains(string(d.Text()), tt.from) {
			t.Errorf("%s: %q is not in %q", tt.name, tt.from, d.Text())
		}
		if got := d.Payload([]byte(strings.ReplaceAll(string(d.Text()), tt.from, tt.to))); string(got) != tt.want {
			t.Errorf("%s: %q becomes %q, want %q", tt.name, tt.give, got, tt.want)
		}
	}
}

func TestNew_binary(t *testing.T) {
	t.Parallel()
	for _, give := range []string{"\xff", "a\x00", "\x00", "a\xc3", "\xed\xa0\x80", "{\"a\":\"\xff\"}"} {
		if _, err := New([]byte(give)); !errors.Is(err, ErrBinary) {
			t.Errorf("New(%q) = %v, want %v", give, err, ErrBinary)
		}
	}
}

// A payload that is edited is nobody else's to read, and gone when it is done with.
func TestCreate(t *testing.T) {
	t.Parallel()
	d := create(t, `{"a":1}`)
	for path, want := range map[string]fs.FileMode{
		d.Path(): 0o600, filepath.Dir(d.Path()): 0o700, filepath.Dir(filepath.Dir(d.Path())): 0o700,
	} {
		info, err := os.Stat(path)
		if err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v, want mode %v", path, info.Mode(), err, want)
		}
	}
	if err := Clean(); err != nil {
		t.Error(err)
	}
	dir := filepath.Dir(d.Path())
	if b, err := d.Written(); err != nil || string(b) != "{\n  \"a\": 1\n}\n" {
		t.Errorf("while it is edited the file has %q, %v", b, err)
	}
	for range 2 {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
}

// What was written and not stored stays until the user has taken it.
func TestKeep(t *testing.T) {
	t.Parallel()
	d := create(t, "payload")
	if err := errors.Join(os.WriteFile(d.Path(), []byte("changed"), 0o600), os.WriteFile(d.Path()+"~", []byte("payload"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if err := d.Keep(); err != nil {
		t.Error(err)
	}
	for range 2 {
		if err := Clean(); err != nil {
			t.Error(err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(d.Path()))
	if b, readErr := d.Written(); err != nil || readErr != nil || string(b) != "changed" || len(entries) != 1 {
		t.Errorf("kept: %q among %v, %v, %v", b, entries, err, readErr)
	}
}

// A process that is killed leaves its payload behind, and what its editor has
// written beside it. The next one removes both, and nothing of those that live.
func TestClean_killed(t *testing.T) {
	t.Parallel()
	start := func() (*exec.Cmd, string) {
		cmd := exec.CommandContext(t.Context(), os.Args[0])
		cmd.Env = append(os.Environ(), "DRAFT_TEST_PAYLOAD=secret")
		if _, err := cmd.StdinPipe(); err != nil {
			t.Fatal(err)
		}
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		line := make([]byte, 4096)
		n, err := out.Read(line)
		if err != nil {
			t.Fatal(err)
		}
		return cmd, strings.TrimSpace(string(line[:n]))
	}
	killed, left := start()
	alive, used := start()
	mine := create(t, "mine")
	if err := os.WriteFile(filepath.Join(filepath.Dir(left), ".payload.txt.swp"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	there := func() (paths []string) {
		for _, p := range []string{left, used, mine.Path()} {
			if _, err := os.Stat(p); err == nil {
				paths = append(paths, p)
			}
		}
		return paths
	}
	if err := Clean(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{left, used, mine.Path()}, there()); diff != "" {
		t.Errorf("while all live (-want +got):\n%s", diff)
	}
	_ = killed.Process.Kill()
	_ = killed.Wait()
	if err := Clean(); err != nil {
		t.Error(err)
	}
	for len(there()) == 3 && t.Context().Err() == nil { // another test was cleaning
		if err := Clean(); err != nil {
			t.Fatal(err)
		}
	}
	if diff := cmp.Diff([]string{used, mine.Path()}, there()); diff != "" {
		t.Errorf("after one was killed (-want +got):\n%s", diff)
	}
	if _, err := os.Stat(filepath.Dir(left)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is still there: %v", filepath.Dir(left), err)
	}
	_ = alive.Process.Kill()
	_ = alive.Wait()
	if err := mine.Remove(); err != nil {
		t.Error(err)
	}
}

func FuzzPayload(f *testing.F) {
	for _, s := range []string{"a\r", `{"a":[1, 2],"b":"x"}`, " [ ] ", "{\r\n\"a\":1}", "\ufeff", "[{},[],\"\\\"\"]"} {
		f.Add([]byte(s), []byte("1"), []byte("2"))
	}
	f.Fuzz(func(t *testing.T, give, from, to []byte) {
		d, err := New(give)
		if err != nil {
			return
		}
		if got := d.Payload(slices.Clone(d.Text())); !bytes.Equal(got, give) {
			t.Errorf("%q becomes %q", give, got)
		}
		written := []byte(strings.ReplaceAll(string(d.Text()), string(from), string(to)))
		got := d.Payload(written)
		if d.laidOut && sameJSON(written, written) && !sameJSON(got, written) {
			t.Errorf("%q, written as %q, becomes %q", give, written, got)
		}
	})
}
