package embedded

import "testing"

// SyncAlways shows in nothing but the loss of power, so what is asked of the
// server is looked at here.
func TestOptions(t *testing.T) {
	t.Parallel()
	for _, sync := range []bool{false, true} {
		opts, err := new(Server).options(Config{SyncAlways: sync})
		if err != nil {
			t.Fatal(err)
		}
		if opts.SyncAlways != sync {
			t.Errorf("SyncAlways is %v, want %v", opts.SyncAlways, sync)
		}
		if !opts.DontListen || !opts.JetStream || !opts.NoSigs {
			t.Errorf("DontListen %v, JetStream %v, NoSigs %v, want all three", opts.DontListen, opts.JetStream, opts.NoSigs)
		}
	}
	// The in-process user's name and password are new each time.
	a, b := new(Server), new(Server)
	for _, s := range []*Server{a, b} {
		if _, err := s.options(Config{Listen: "127.0.0.1:0"}); err != nil {
			t.Fatal(err)
		}
	}
	if a.internal.Username == b.internal.Username || a.internal.Password == b.internal.Password || len(a.internal.Password) < 20 {
		t.Error("the in-process password is not random")
	}
}
