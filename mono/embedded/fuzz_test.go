package embedded_test

import (
	"net"
	"testing"

	"github.com/monotel/monotel/mono/embedded"
)

func FuzzConfig_Listen(f *testing.F) {
	for _, s := range []string{"127.0.0.1:0", "0.0.0.0:4222", "[::1]:1", ":4222", "a:b", "a:-1", "a:+1", "a:65536", "[::1", "a"} {
		f.Add(s, "alice", "secret")
	}
	f.Fuzz(func(t *testing.T, listen, user, password string) {
		err := embedded.Config{Listen: listen, Users: []embedded.User{{Name: user, Password: password}}}.Validate()
		if host, _, splitErr := net.SplitHostPort(listen); err == nil && (splitErr != nil || host == "" || user == "" || password == "") {
			t.Errorf("Listen %q with user %q is good", listen, user)
		}
	})
}
