package cli

import (
	"errors"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/rogpeppe/go-internal/testscript"
)

// A script's server, in the values of its environment.
type scriptServer struct {
	fingerprint func() (string, error)
	before      string
}

// TestScript runs the command as a process of its own, as testdata/script/*.txt say. Each
// has a server with three dead letters, whose IDs are $ID1 to $ID3. NATS_URL is
// for a user who may do everything, $GUEST for one who may do little, $NOWHERE is
// where no server is. Beside the usual commands there are
//
//	exitcode N COMMAND...  run a command, which has to exit with N
//	unchanged              nothing was stored on the server since the beginning
func TestScript(t *testing.T) {
	t.Parallel()
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			return setupScript(t, env)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exitcode":  exitcode,
			"unchanged": scriptUnchanged,
		},
	})
}

type serverKey struct{}

func setupScript(t *testing.T, env *testscript.Env) error {
	t.Helper()
	admin, guest := permitted(t, "$JS.API.STREAM.INFO.DLQ", "monotel.dlq.>")
	nc, err := nats.Connect(admin)
	if err != nil {
		return err
	}
	env.Defer(nc.Close)
	b := bare(t)
	b.js, b.store = openStore(t, nc)
	ids := b.captureMany(3)
	for i, id := range ids {
		env.Setenv("ID"+strconv.Itoa(i+1), id)
	}
	env.Setenv("NATS_URL", admin)
	env.Setenv("GUEST", guest)
	env.Setenv("NOWHERE", nowhere(t))
	env.Setenv("XDG_CONFIG_HOME", env.WorkDir)
	state := func() (string, error) { return fingerprint(t.Context(), b.js) }
	before, err := state()
	env.Values[serverKey{}] = &scriptServer{fingerprint: state, before: before}
	return err
}

func exitcode(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exitcode N COMMAND...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	err = ts.Exec(args[1], args[2:]...)
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		got, err = exit.ExitCode(), nil
	}
	ts.Check(err)
	if got != want {
		ts.Fatalf("%s: exit code %d, want %d", strings.Join(args[1:], " "), got, want)
	}
}

func scriptUnchanged(ts *testscript.TestScript, neg bool, _ []string) {
	s, ok := ts.Value(serverKey{}).(*scriptServer)
	if !ok || neg {
		ts.Fatalf("usage: unchanged")
	}
	after, err := s.fingerprint()
	ts.Check(err)
	if after != s.before {
		ts.Fatalf("something was stored; before:\n%safter:\n%s", s.before, after)
	}
}
