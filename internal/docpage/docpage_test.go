package docpage_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/monotel/monotel/internal/docpage"
)

func page(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func read(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestUpdate(t *testing.T) {
	t.Parallel()
	one := docpage.Section{Name: "one", Target: "docs", Text: "new 1\n"}
	two := docpage.Section{Name: "two", Target: "docs", Text: "new 2\n"}
	file := page(t, "above\n"+one.Begin()+"old\n"+docpage.End+"between\n"+two.Begin()+docpage.End+"below\n")
	want := "above\n" + one.Begin() + "\nnew 1\n\n" + docpage.End + "between\n" + two.Begin() + "\nnew 2\n\n" + docpage.End + "below\n"
	for range 2 { // again and again
		if err := docpage.Update(file, two, one); err != nil {
			t.Fatal(err)
		}
		if got := read(t, file); got != want {
			t.Errorf("the page is now:\n%s\nwant:\n%s", got, want)
		}
	}
}

func TestUpdate_changesNothing(t *testing.T) {
	t.Parallel()
	one := docpage.Section{Name: "one", Target: "docs", Text: "new\n"}
	two := docpage.Section{Name: "two", Target: "docs", Text: "new\n"}
	for _, give := range []string{"", one.Begin(), docpage.End + one.Begin(), one.Begin() + docpage.End} {
		file := page(t, give)
		if err := docpage.Update(file, one, two); err == nil {
			t.Errorf("%q: no error", give)
		}
		if got := read(t, file); got != give {
			t.Errorf("%q became %q", give, got)
		}
	}
	if err := docpage.Update(filepath.Join(t.TempDir(), "none.md"), one); err == nil {
		t.Error("a missing file: no error")
	}
}
