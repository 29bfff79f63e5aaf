package permissions_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/monotel/monotel/internal/permissions"
)

const page = `# Page

<!-- permissions: one -->
` + "```" + `
permissions: {
  publish: [
    # First: what is "quoted" here counts not.
    "a.*"
    "a.b"

    # Second: more.
    "ORDERS.billing.>"  # a note
  ]
  subscribe: [
    # First: answers.
    "_INBOX.>"
  ]
}
` + "```" + `

` + "```sh" + `
nsc "x"
` + "```" + `

<!-- permissions: two -->
` + "```" + `
permissions: {
  publish: [ # on one line
    "b"
  ]
}
` + "```" + `
`

func TestRead(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "page.md")
	if err := os.WriteFile(file, []byte(page), 0o600); err != nil {
		t.Fatal(err)
	}
	lists, err := permissions.Read(file)
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string][]permissions.Entry)
	for name, list := range lists {
		got[name] = list.Entries
	}
	want := map[string][]permissions.Entry{
		"one": {
			{Subject: "a.*", Section: "First"},
			{Subject: "a.b", Section: "First"},
			{Subject: "ORDERS.billing.>", Section: "Second"},
			{Subject: "_INBOX.>", Subscribe: true, Section: "First"},
		},
		"two": {{Subject: "b"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"ORDERS.billing.>"}, lists["one"].Without("First").Publish()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{"own.>"}, lists["one"].WithInbox("own").Subscribe()); diff != "" {
		t.Error(diff)
	}
	lists["one"].Repeat("ORDERS", "AUDIT", "billing", "audit")
	if diff := cmp.Diff([]string{"a.*", "a.b", "ORDERS.billing.>", "AUDIT.audit.>"}, lists["one"].Publish()); diff != "" {
		t.Error(diff)
	}
	if _, err := permissions.Read(filepath.Join(t.TempDir(), "none.md")); err == nil {
		t.Error("a page that is not there is read")
	}
}

func TestMatches(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		pattern, subject string
		want             bool
	}{
		{"a.b", "a.b", true},
		{"a.b", "a", false},
		{"a.b", "a.b.c", false},
		{"a.*", "a.b", true},
		{"a.*", "a.*", true},
		{"a.b", "a.*", false},
		{"a.*", "a.>", false},
		{"a.*", "a", false},
		{"a.>", "a.b.c", true},
		{"a.>", "a.>", true},
		{"a.>", "a", false},
		{">", "a", true},
		{"*.b", "a.b", true},
		{"*.b", "a.c", false},
	} {
		if got := permissions.Matches(tt.pattern, tt.subject); got != tt.want {
			t.Errorf("Matches(%q, %q) = %v, want %v", tt.pattern, tt.subject, got, tt.want)
		}
	}
}

func TestList_Unused(t *testing.T) {
	t.Parallel()
	list := &permissions.List{Entries: []permissions.Entry{
		{Subject: "a.*"}, {Subject: "a.b"}, {Subject: "c"}, {Subject: "s", Subscribe: true}, {Subject: "c", Subscribe: true},
	}}
	want := []permissions.Entry{{Subject: "a.b"}, {Subject: "c", Subscribe: true}}
	if diff := cmp.Diff(want, list.Unused([]string{"a.b", "a.x", "c"}, []string{"s"})); diff != "" {
		t.Error(diff)
	}
}
