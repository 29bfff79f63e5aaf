package main

import (
	"errors"
	"io"
	"strings"
	"testing"
)

const (
	config   = `{"config":{"go_version":"go1.26.8"}}` + "\n"
	stdlib   = `{"osv":{"id":"GO-1","summary":"net/http is slow"}}{"finding":{"osv":"GO-1","fixed_version":"v1.26.9","trace":[{"module":"stdlib","version":"v1.26.8"}]}}{"finding":{"osv":"GO-1","fixed_version":"v1.26.9","trace":[{"module":"stdlib","version":"v1.26.8","package":"net/http","function":"Do","receiver":"*Client"},{"module":"m","package":"m/p","function":"F"}]}}`
	uncalled = `{"finding":{"osv":"GO-2","fixed_version":"v2","trace":[{"module":"a.b/c","version":"v1","package":"a.b/c"}]}}`
	called   = `{"osv":{"id":"GO-3","summary":"it panics"}}{"finding":{"osv":"GO-3","fixed_version":"v2","trace":[{"module":"a.b/c","version":"v1","package":"a.b/c","function":"G"},{"module":"m","package":"m/p","function":"F"}]}}`
	unmended = `{"finding":{"osv":"GO-4","trace":[{"module":"a.b/c","version":"v1","package":"a.b/c","function":"H"}]}}`
)

func TestRun(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name string
		give string
		want string
		err  error
	}{
		{"nothing", config, "0 called in modules, 0 not called\n", nil},
		{
			"standard library", config + stdlib,
			"GO-1, standard library of go1.26.8, Go 1.26.9 mends it: net/http is slow\n0 called in modules, 0 not called\n", nil,
		},
		{"not called", config + uncalled, "0 called in modules, 1 not called\n", nil},
		{
			"called", config + called + uncalled,
			"GO-3, a.b/c v1, v2 mends it: it panics\n    a.b/c.G, by m/p.F\n1 called in modules, 1 not called\n", errCalled,
		},
		{"not mended", config + unmended, "GO-4, a.b/c v1, nothing mends it yet: \n    a.b/c.H, by a.b/c.H\n1 called in modules, 0 not called\n", errCalled},
		{"cut short", config + called[:len(called)-3], "", io.ErrUnexpectedEOF},
		{"no output", "", "", io.EOF},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out strings.Builder
			if err := run(strings.NewReader(tt.give), &out); !errors.Is(err, tt.err) || out.String() != tt.want {
				t.Errorf("run = %v, and says %q, want %v and %q", err, out.String(), tt.err, tt.want)
			}
		})
	}
}

func FuzzRun(f *testing.F) {
	f.Add(config + stdlib + uncalled)
	f.Add(config + called)
	f.Fuzz(func(t *testing.T, text string) {
		var out strings.Builder
		if err := run(strings.NewReader(text), &out); err == nil && strings.Contains(out.String(), "mends it: \n    ") {
			t.Errorf("%q passes: %s", text, out.String())
		}
	})
}
