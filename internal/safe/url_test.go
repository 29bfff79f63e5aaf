package safe

import (
	"strings"
	"testing"
)

// What somebody has written wrong must not be printed: it has a password in it.
func TestParseURL(t *testing.T) {
	t.Parallel()
	for _, good := range []string{"nats://host:4222", "nats://u:%40p@host", "http://u:p@ss@host/v1", "localhost:4317", "https://[::1]:4318/x?y=z"} {
		if _, err := ParseURL(good); err != nil {
			t.Errorf("ParseURL(%q) = %v", good, err)
		}
	}
	for _, bad := range []string{
		"http://u:secret%zz@host", "http://u:secret%@host", "http://u:sec ret@host", "http://u:secret@host:port", "http://u:secret/@host",
		"http://u:123/secret@host", "http://u:1?secret@host", "http://u:1#secret@host", "http://u:secret@[::1", "http://u:secret\x00@host", "u:secret@host", "://u:secret@host",
	} {
		_, err := ParseURL(bad)
		if err == nil || strings.Contains(err.Error(), "secret") || strings.Contains(err.Error(), "sec ret") {
			t.Errorf("ParseURL(%q) = %v, want an error without the password", bad, err)
		}
	}
}

func FuzzParseURL(f *testing.F) {
	f.Add("http://u:secret%zz@host")
	f.Add("nats://u:1/2@host")
	f.Fuzz(func(t *testing.T, s string) {
		u, err := ParseURL(s)
		if err != nil && err.Error() != errURL.Error() {
			t.Errorf("ParseURL(%q) = %v", s, err)
		}
		if err == nil && strings.Contains(u.Host, "@") {
			t.Errorf("ParseURL(%q) has the host %q", s, u.Host)
		}
	})
}
