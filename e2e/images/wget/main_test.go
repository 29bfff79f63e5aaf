package main

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestRun(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/ok":
			_, _ = w.Write([]byte("fine"))
		case "/moved":
			http.Redirect(w, r, "/ok", http.StatusFound)
		default:
			http.Error(w, "starting", http.StatusServiceUnavailable)
		}
	}))
	t.Cleanup(server.Close)
	closed := httptest.NewServer(http.NotFoundHandler())
	closed.Close()

	for _, tt := range []struct {
		name string
		args []string
		out  string
		err  string // a part of it, "" for none
	}{
		{"spider", []string{"-q", "--spider", server.URL + "/ok"}, "", ""},
		{"spider follows", []string{"--spider", server.URL + "/moved"}, "", ""},
		{"spider, unavailable", []string{"-q", "--spider", server.URL + "/"}, "", "503 Service Unavailable"},
		{"spider, refused", []string{"-q", "--spider", closed.URL}, "", "refused"},
		{"print", []string{"-qO-", server.URL + "/ok"}, "fine", ""},
		{"print, apart", []string{"-q", "-O-", server.URL + "/ok"}, "fine", ""},
		{"print, unavailable", []string{"-qO-", server.URL + "/"}, "", "503 Service Unavailable"},
		{"neither", []string{server.URL + "/ok"}, "", "usage"},
		{"both", []string{"--spider", "-O-", server.URL + "/ok"}, "", "usage"},
		{"no address", []string{"-q", "--spider"}, "", "usage"},
		{"two addresses", []string{"--spider", server.URL + "/ok", server.URL + "/ok"}, "", "not known here"},
		{"unknown flag", []string{"--spider", "-T", server.URL + "/ok"}, "", `"-T" is not known here`},
		{"no scheme", []string{"--spider", "127.0.0.1/ok"}, "", "unsupported protocol scheme"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			err := run(t.Context(), tt.args, &out)
			switch {
			case tt.err == "" && err != nil:
				t.Errorf("%q: %v", tt.args, err)
			case tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)):
				t.Errorf("%q: %v; want %q in it", tt.args, err, tt.err)
			}
			if out.String() != tt.out {
				t.Errorf("%q prints %q, want %q", tt.args, &out, tt.out)
			}
		})
	}
}
