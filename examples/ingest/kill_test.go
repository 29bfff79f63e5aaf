package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/monotel/monotel/mono/monotest"
)

const killTimeout = 3 * time.Minute

// A moment says at which line of the output the program is killed, and with
// which flags it runs.
type moment struct {
	name string
	line func(text string, printed int) bool
	args []string
}

func afterStart(text string, _ int) bool { return strings.HasPrefix(text, "started in ") }

func afterStored(text string, _ int) bool { return strings.HasPrefix(text, "stored all ") }

func afterLines(n int) func(string, int) bool {
	return func(_ string, printed int) bool { return printed == n }
}

// killed runs the program and kills it, as SIGKILL does, at the moment. At full
// speed the program may be done before; it is an error if it was to be slow.
func killed(t *testing.T, binary string, at moment, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), killTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, append(at.args, args...)...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	printed, struck := 0, false
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		if strings.HasPrefix(lines.Text(), "line ") {
			printed++
		}
		if !struck && at.line(lines.Text(), printed) {
			struck = true
			if err := cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				t.Fatal(err)
			}
		}
	}
	err = cmd.Wait()
	switch {
	case ctx.Err() != nil:
		t.Fatalf("%s: the program did not come to it: %v\n%s", at.name, err, stderr.String())
	case err != nil && struck:
		t.Logf("killed %s; it had printed %d lines", at.name, printed)
	case err != nil:
		t.Fatalf("%s: the program ended before: %v\n%s", at.name, err, stderr.String())
	case len(at.args) > 0:
		t.Fatalf("%s: the program was done before", at.name)
	default:
		t.Logf("too late to kill it %s; it has printed %d lines", at.name, printed)
	}
}

// finished runs the program to its end.
func finished(t *testing.T, binary string, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), killTimeout)
	defer cancel()
	var stdout, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, binary, args...)
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		t.Fatal(err)
	}
	r := result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
	t.Logf("exit code %d\n%s%s", r.code, r.stdout[max(strings.Index(r.stdout, "took "), 0):], r.stderr)
	return r
}

// manyLines writes an input of n lines, in families of their own making.
func manyLines(t *testing.T, n int) string {
	t.Helper()
	var b strings.Builder
	families := []string{"issues", "push", "star", "release", "check_run", "workflow_run"}
	for i := range n {
		fmt.Fprintf(&b, `{"event":%q,"payload":{"action":"number %d","repository":{"full_name":"lighthouse/lamp"},"filler":%q}}`+"\n",
			families[i%len(families)], i, strings.Repeat("z", i*37%5000))
	}
	return writeFile(t, b.String())
}

// The program is killed again and again, on the same store, and ends with the
// totals of a program that was not.
func TestKill(t *testing.T) {
	t.Parallel()
	if testing.Short() {
		t.Skip("builds and kills a program")
	}
	binary := filepath.Join(t.TempDir(), "ingest")
	if runtime.GOOS == "windows" {
		binary += ".exe"
	}
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", binary, ".")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build: %v\n%s", err, out)
	}
	const lines = 600
	file := manyLines(t, lines)
	undisturbed := finished(t, binary, "-quiet", "-store", t.TempDir(), file)
	if undisturbed.code != exitOK {
		t.Fatal("the program does not work undisturbed")
	}
	want := undisturbed.settled()

	slow := []string{"-rate", "200"} // three seconds for all
	moments := []moment{
		{"before anything is published", afterStart, slow},
		{"at the first line", afterLines(1), slow},
		{"some lines later", afterLines(40), slow},
		{"again, at the first new line", afterLines(1), slow},
		{"in the middle, at full speed", afterLines(100), nil},
		{"at the end of publishing", afterStored, nil},
	}

	t.Run("embedded", func(t *testing.T) {
		t.Parallel()
		store := t.TempDir()
		for _, m := range moments {
			killed(t, binary, m, "-store", store, file)
		}
		killedOnFolder(t, binary, store, file)
		r := finished(t, binary, "-store", store, file)
		if r.code != exitOK || r.settled() != want {
			t.Errorf("exit code %d, and the last lines are\n%s\nwant\n%s", r.code, r.settled(), want)
		}
		checkServer(t, openStore(t, store).Conn(), lines)
	})

	// Here the server lives on: messages may be on their way to it, and what it
	// has delivered to the dead is not acked.
	t.Run("server", func(t *testing.T) {
		t.Parallel()
		server := monotest.Server(t)
		for _, m := range moments {
			killed(t, binary, m, "-server", server.URL(), file)
		}
		r := finished(t, binary, "-server", server.URL(), file)
		if r.code != exitOK || r.settled() != want {
			t.Errorf("exit code %d, and the last lines are\n%s\nwant\n%s", r.code, r.settled(), want)
		}
		checkServer(t, server.Conn(), lines)
	})

	// The printer sees a line when it passes, not when it is stored. So after
	// the last one there is still something to publish, and after the second
	// kill only something to consume.
	t.Run("the end", func(t *testing.T) {
		t.Parallel()
		store := t.TempDir()
		killed(t, binary, moment{"at the last line", afterLines(lines), nil}, "-store", store, file)
		killed(t, binary, moment{"when all is stored", afterStored, nil}, "-store", store, file)
		r := finished(t, binary, "-store", store, file)
		if r.code != exitOK || r.settled() != want {
			t.Errorf("exit code %d, and the last lines are\n%s\nwant\n%s", r.code, r.settled(), want)
		}
		checkServer(t, openStore(t, store).Conn(), lines)
	})
}

// killedOnFolder kills the program while it starts: when the folder of its
// server is locked, before it says a word.
func killedOnFolder(t *testing.T, binary, store, file string) {
	t.Helper()
	lock := filepath.Join(store, "monotel.lock")
	if err := os.Remove(lock); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), binary, "-store", store, file)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), killTimeout)
	defer cancel()
	poll := time.NewTicker(time.Millisecond)
	defer poll.Stop()
	for {
		if _, err := os.Stat(lock); err == nil {
			break
		}
		if err := wait(ctx, poll.C); err != nil {
			t.Fatal(err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the program was done before it was killed")
	}
}
