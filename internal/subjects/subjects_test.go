package subjects_test

import (
	"testing"

	"github.com/monotel/monotel/internal/subjects"
)

func TestCovers(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		pattern, subject string
		want             bool
	}{
		{"a.b", "a.b", true},
		{"a.*", "a.b", true},
		{"a.>", "a.b.c", true},
		{"a.>", "a.>", true},
		{"a.*", "a.*", true},
		{"a.>", "a", false},
		{"a.*", "a.>", false},
		{"a.b", "a.*", false},
		{"a.b", "a.b.c", false},
		{"a.b.c", "a.b", false},
		{"a.*", "a", false},
		{"*.b", "a.b", true},
		{"a.>", "a.b", true},
		{">", "a", true},
		{"a*", "a*", true}, // not a wildcard
		{"a*", "ab", false},
	} {
		if got := subjects.Covers(tt.pattern, tt.subject); got != tt.want {
			t.Errorf("Covers(%q, %q) = %v, want %v", tt.pattern, tt.subject, got, tt.want)
		}
	}
}

func TestOverlap(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		a, b string
		want bool
	}{
		{"a.b", "a.b", true},
		{"a.*", "*.b", true},
		{">", "a.b", true},
		{"a.>", "*.b.c", true},
		{"a.>", "a", false},
		{"a.b", "a.c", false},
		{"a.*", "a.b.c", false},
		{"b.>", "a.>", false},
	} {
		if got := subjects.Overlap(tt.a, tt.b); got != tt.want {
			t.Errorf("Overlap(%q, %q) = %v, want %v", tt.a, tt.b, got, tt.want)
		}
		if got := subjects.Overlap(tt.b, tt.a); got != tt.want {
			t.Errorf("Overlap(%q, %q) = %v, want %v", tt.b, tt.a, got, tt.want)
		}
	}
}
