package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const events = "testdata/events.ndjson" // 12 good lines of 10 families

// A result is what a run of the program came to.
type result struct {
	code           int
	stdout, stderr string
}

// ingestArgs runs the program in this process.
func ingestArgs(t *testing.T, args ...string) result {
	t.Helper()
	return ingestStdin(t, nil, args...)
}

func ingestStdin(t *testing.T, stdin *os.File, args ...string) result {
	t.Helper()
	var stdout, stderr bytes.Buffer
	code := run(t.Context(), args, stdin, &stdout, &stderr)
	r := result{code, stdout.String(), stderr.String()}
	t.Logf("ingest %q: exit code %d\n%s%s", args, r.code, r.stdout, r.stderr)
	return r
}

// totals returns the last three lines.
func (r result) totals() string {
	lines := strings.Split(strings.TrimSpace(r.stdout), "\n")
	return strings.Join(lines[max(len(lines)-3, 0):], "\n")
}

var before = regexp.MustCompile(`of which \d+ were there before`)

// settled is totals without what depends on how often the program was started.
func (r result) settled() string {
	return before.ReplaceAllString(r.totals(), "of which N were there before")
}

func (r result) check(t *testing.T, code int, totals string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	if got := r.totals(); got != totals {
		t.Errorf("the last lines are\n%s\nwant\n%s", got, totals)
	}
}

// digestOf computes what the totals show, in another way than the program: it
// cuts the payloads out of the lines.
func digestOf(t *testing.T, ndjson string, good func(payload string) bool) string {
	t.Helper()
	h := sha256.New()
	for i, text := range strings.Split(ndjson, "\n") {
		var l struct {
			Payload json.RawMessage `json:"payload"`
		}
		if json.Unmarshal([]byte(text), &l) != nil || !strings.Contains(text, string(l.Payload)) || !good(string(l.Payload)) {
			continue
		}
		sum := sha256.Sum256(l.Payload)
		fmt.Fprintf(h, "%d %x\n", i+1, sum)
	}
	return hex.EncodeToString(h.Sum(nil))
}

func object(payload string) bool { return strings.HasPrefix(payload, "{") }

func readFile(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func writeFile(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "input.ndjson")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func totalsOf(t *testing.T, stored, before int) string {
	t.Helper()
	return fmt.Sprintf("lines read 12, stored %d (of which %d were there before), duplicates 0, bad 0\n"+
		"audit 12 messages, sha256 sent = arrived: yes (%s)\ntyped 12 in 10 families",
		stored, before, digestOf(t, readFile(t, events), object))
}

func TestRun(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	r := ingestArgs(t, "-store", store, events)
	r.check(t, exitOK, totalsOf(t, 12, 0))
	for _, want := range []string{
		"line 1: ping in lighthouse/lamp by keeper\n",
		"line 2: issues opened in lighthouse/lamp by mara: issue #7 \"The lamp flickers in the rain\"\n",
		"line 3: issues labeled in lighthouse/lamp by keeper: issue #7 \"The lamp flickers in the rain\", label \"needs a ladder\"\n",
		"line 6: create in lighthouse/lamp by mara: branch dry-socket\n",
		"line 7: push in lighthouse/lamp by mara: 2 commits to refs/heads/dry-socket\n",
		"line 8: pull_request opened in lighthouse/lamp by mara: pull request #8 \"Seal the socket — größer, 海\"\n",
		"line 9: check_run completed in lighthouse/lamp by lamp-bot: \"light test\" completed, success\n",
		"line 12: release published in lighthouse/lamp by keeper: release v1.1.0\n",
		"line 13: branch_protection_rule created in lighthouse by keeper\n",
	} {
		if strings.Count(r.stdout, want) != 1 {
			t.Errorf("want this line once: %q", want)
		}
	}

	// A second run finds everything done, and prints no event again.
	r = ingestArgs(t, "-store", store, events)
	r.check(t, exitOK, totalsOf(t, 12, 12))
	if strings.Contains(r.stdout, "line 1: ") {
		t.Error("the second run published again")
	}

	// Another input in the same store has totals of its own.
	other := ingestArgs(t, "-store", store, "-quiet", writeFile(t, readFile(t, events)+"\n"))
	other.check(t, exitOK, totalsOf(t, 12, 0))
}

func TestRun_stdin(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{{"-"}, {}} {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		text := readFile(t, events)
		wrote := make(chan error, 1)
		go func() {
			_, err := w.WriteString(text)
			wrote <- errors.Join(err, w.Close())
		}()
		ingestStdin(t, r, append([]string{"-quiet", "-store", t.TempDir()}, args...)...).check(t, exitOK, totalsOf(t, 12, 0))
		if err := errors.Join(<-wrote, r.Close()); err != nil {
			t.Error(err)
		}
	}
}

func TestRun_server(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	ingestArgs(t, "-server", server.URL(), events).check(t, exitOK, totalsOf(t, 12, 0))
	ingestArgs(t, "-server", server.URL(), events).check(t, exitOK, totalsOf(t, 12, 12))
	checkServer(t, server.Conn(), 12)
}

// checkServer looks at the server with means of its own: each of the lines is
// one message, and each durable consumer has handled it once.
func checkServer(t *testing.T, nc *nats.Conn, lines int) {
	t.Helper()
	js, err := jetstream.New(nc)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]int{streamName: lines, "KV_" + bucketName: 2 * lines} {
		stream, err := js.Stream(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		s := stream.CachedInfo().State
		if s.Msgs != uint64(want) || s.LastSeq != uint64(want) {
			t.Errorf("stream %q has %d messages and has had %d, want %d", name, s.Msgs, s.LastSeq, want)
		}
	}
}

func TestRun_badLines(t *testing.T) {
	t.Parallel()
	const bad = "testdata/bad.ndjson"
	r := ingestArgs(t, "-store", t.TempDir(), bad)
	sum := digestOf(t, readFile(t, bad), func(p string) bool { return strings.Contains(p, "lighthouse/lamp") })
	r.check(t, exitBad, "lines read 9, stored 2 (of which 0 were there before), duplicates 0, bad 7\n"+
		"audit 2 messages, sha256 sent = arrived: yes ("+sum+")\ntyped 2 in 2 families")
	for _, want := range []string{
		"line 2: want a JSON object",
		"line 3: no \"event\"",
		"line 4: \"event\" is \"Star Wars\": want",
		"line 5: no \"payload\"",
		"line 6: \"payload\" is not an object",
		"line 7: want a JSON object",
		"line 9: \"event\" is \"../../etc\": want",
	} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("standard error lacks %q", want)
		}
	}
}

// A payload that does not fit its Go type is audited all the same. It does not
// hold up the others, and stays in the totals as long as it is there.
func TestRun_misfit(t *testing.T) {
	t.Parallel()
	file := writeFile(t, `{"event":"issues","payload":{"issue":{"number":1}}}
{"event":"issues","payload":{"issue":{"number":"two"}}}
{"event":"issues","payload":{"issue":{"number":3}}}
`)
	store := t.TempDir()
	for _, before := range []int{0, 3} {
		r := ingestArgs(t, "-quiet", "-store", store, file)
		r.check(t, exitBad, fmt.Sprintf("lines read 3, stored 3 (of which %d were there before), duplicates 0, bad 0\n"+
			"audit 3 messages, sha256 sent = arrived: yes (%s)\ntyped 2 in 1 families", before, digestOf(t, readFile(t, file), object)))
		if want := "2 of 3 stored lines are typed"; !strings.Contains(r.stderr, want) {
			t.Errorf("standard error lacks %q", want)
		}
	}
}

func TestRun_largeLines(t *testing.T) {
	t.Parallel()
	large := func(n int) string {
		return fmt.Sprintf(`{"event":"gollum","payload":{"pages":%q}}`+"\n", strings.Repeat("x", n))
	}
	// The server takes 1 MiB with the headers.
	file := writeFile(t, large(100_000)+large(1<<20)+large(1_000_000)+large(5<<20))
	r := ingestArgs(t, "-quiet", "-store", t.TempDir(), file)
	sum := digestOf(t, readFile(t, file), func(p string) bool { return len(p) < 1<<20 })
	r.check(t, exitBad, "lines read 4, stored 2 (of which 0 were there before), duplicates 0, bad 2\n"+
		"audit 2 messages, sha256 sent = arrived: yes ("+sum+")\ntyped 2 in 1 families")
	for _, want := range []string{"line 2: publish ", "line 4: publish ", "payload too large"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("standard error lacks %q", want)
		}
	}
}

func TestRun_nothing(t *testing.T) {
	t.Parallel()
	none := digestOf(t, "", object)
	for name, tt := range map[string]struct {
		text string
		code int
		bad  int
	}{
		"empty": {text: "", code: exitOK},
		"blank": {text: "\n \n\r\n", code: exitOK},
		"bad":   {text: "no", code: exitBad, bad: 1},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ingestArgs(t, "-store", t.TempDir(), writeFile(t, tt.text)).check(t, tt.code,
				fmt.Sprintf("lines read %d, stored 0 (of which 0 were there before), duplicates 0, bad %[1]d\n"+
					"audit 0 messages, sha256 sent = arrived: yes (%s)\ntyped 0 in 0 families", tt.bad, none))
		})
	}
}

func TestRun_usage(t *testing.T) {
	t.Parallel()
	for _, args := range [][]string{
		{"-nonsense"},
		{"-rate", "-1", events},
		{"-timeout", "0s", events},
		{"-store", "", events},
		{"-store", "here", "-server", "nats://localhost:4222", events},
		{events, events},
	} {
		if r := ingestArgs(t, args...); r.code != exitUsage || r.stdout != "" || r.stderr == "" {
			t.Errorf("%q: exit code %d, want %d and a word on standard error alone", args, r.code, exitUsage)
		}
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	if r := ingestStdin(t, null); r.code != exitUsage && isTerminal(null) {
		t.Errorf("without a FILE and input: exit code %d, want %d", r.code, exitUsage)
	}
	if err := null.Close(); err != nil {
		t.Error(err)
	}
	if r := ingestArgs(t, "-help"); r.code != exitOK || !strings.Contains(r.stderr, "-server URL") {
		t.Errorf("-help: exit code %d, want %d and the flags", r.code, exitOK)
	}
	if r := ingestArgs(t, filepath.Join(t.TempDir(), "none")); r.code != exitBad {
		t.Errorf("a file that does not exist: exit code %d, want %d", r.code, exitBad)
	}
	if r := ingestArgs(t, "-server", "nats://127.0.0.1:1", events); r.code != exitBad {
		t.Errorf("no server: exit code %d, want %d", r.code, exitBad)
	}
}

func TestRun_timeout(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	r := ingestArgs(t, "-store", store, "-rate", "1", "-timeout", "3s", events)
	if r.code != exitBad || !strings.Contains(r.stderr, errTimeout.Error()) {
		t.Errorf("exit code %d, want %d and the reason", r.code, exitBad)
	}
	r = ingestArgs(t, "-store", store, events)
	if r.code != exitOK || r.settled() != settledTotals(t) {
		t.Errorf("the next run did not finish:\n%s", r.totals())
	}
}

func settledTotals(t *testing.T) string {
	t.Helper()
	return result{stdout: totalsOf(t, 12, 0)}.settled()
}

// A watch calls a function when a line is written.
type watch struct {
	bytes.Buffer

	prefix string
	call   func()
}

func (w *watch) Write(b []byte) (int, error) {
	if strings.HasPrefix(string(b), w.prefix) {
		w.call()
	}
	return w.Buffer.Write(b)
}

// An orderly end, as SIGTERM asks for, still prints totals.
func TestRun_interrupted(t *testing.T) {
	t.Parallel()
	store := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stdout := &watch{prefix: "line 4: ", call: cancel}
	var stderr bytes.Buffer
	if code := run(ctx, []string{"-store", store, "-rate", "20", events}, nil, stdout, &stderr); code != exitBad {
		t.Errorf("exit code %d, want %d", code, exitBad)
	}
	if !strings.Contains(stdout.String(), "lines read 12, stored ") || !strings.Contains(stderr.String(), context.Canceled.Error()) {
		t.Errorf("want totals and the reason:\n%s%s", stdout.String(), stderr.String())
	}
	r := ingestArgs(t, "-store", store, events)
	if r.code != exitOK || r.settled() != settledTotals(t) {
		t.Errorf("the next run did not finish:\n%s", r.totals())
	}
}

// The server goes away in the middle and comes back: what was on its way is
// published again if, and only if, it is not stored.
func TestRun_serverRestarts(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	seen := make(chan struct{})
	stdout := &watch{prefix: "line 4: ", call: sync.OnceFunc(func() { close(seen) })}
	var stderr bytes.Buffer
	code := make(chan int, 1)
	go func() {
		code <- run(t.Context(), []string{"-server", server.URL(), "-rate", "40", events}, nil, stdout, &stderr)
	}()
	<-seen
	server.Stop()
	server.Start()
	r := result{<-code, stdout.String(), stderr.String()}
	if r.code != exitOK || r.settled() != settledTotals(t) {
		t.Errorf("exit code %d, and the last lines are\n%s\n%s", r.code, r.totals(), r.stderr)
	}
	checkServer(t, server.Conn(), 12)
}

// Two programs with the same input share the work, and each sees all of it done.
func TestRun_twoAtATime(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	file := manyLines(t, 300)
	results := make(chan result)
	for range 2 {
		go func() {
			var stdout, stderr bytes.Buffer
			code := run(t.Context(), []string{"-quiet", "-server", server.URL(), file}, nil, &stdout, &stderr)
			results <- result{code, stdout.String(), stderr.String()}
		}()
	}
	a, b := <-results, <-results
	if a.code != exitOK || b.code != exitOK || a.settled() != b.settled() {
		t.Errorf("exit codes %d and %d, and the last lines are\n%s\n%s\nand\n%s\n%s", a.code, b.code, a.totals(), a.stderr, b.totals(), b.stderr)
	}
	checkServer(t, server.Conn(), 300)
}

// What is stored is asked of the stream. The server's memory of message IDs
// cannot help here: the lines were stored without one, which is how they look
// when the window is over. Lines in between are missing, as after a kill.
func TestRun_holes(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	in := openTestInput(t, events)
	store := storer(t, server, in)
	store(3)
	store(12)
	store(7)
	ingestArgs(t, "-server", server.URL(), events).check(t, exitOK, totalsOf(t, 12, 3))
	checkServer(t, server.Conn(), 12)
}

// A line that is stored twice is reported. It takes somebody else to do it.
func TestRun_storedTwice(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	in := openTestInput(t, events)
	store := storer(t, server, in)
	store(3)
	store(3)
	r := ingestArgs(t, "-server", server.URL(), "-quiet", events)
	if want := "stored 12 (of which 1 were there before), duplicates 1, bad 0\naudit 13 messages, sha256 sent = arrived: no ("; r.code != exitBad ||
		!strings.Contains(r.stdout, want) {
		t.Errorf("exit code %d, want %d and %q", r.code, exitBad, want)
	}
}

// A payload that was changed on its way is reported.
func TestRun_forged(t *testing.T) {
	t.Parallel()
	server := monotest.Server(t)
	in := openTestInput(t, events)
	forge := storer(t, server, in)
	in.lines[2].family = "push"
	forge(in.lines[2].number)
	r := ingestArgs(t, "-server", server.URL(), "-quiet", events)
	if want := "the audited payloads are not those of the input"; r.code != exitBad || !strings.Contains(r.stderr, want) {
		t.Errorf("exit code %d, want %d and %q", r.code, exitBad, want)
	}
}

func openTestInput(t *testing.T, path string) *input {
	t.Helper()
	in, err := openInput(path, nil, t.Output())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(in.close)
	return in
}

// storer stores lines of an input without the program.
func storer(t *testing.T, server *monotest.TestServer, in *input) func(number int) {
	t.Helper()
	js, err := jetstream.New(server.Conn())
	if err != nil {
		t.Fatal(err)
	}
	_, err = js.CreateStream(t.Context(), jetstream.StreamConfig{Name: streamName, Subjects: []string{"events.github.>"}})
	if err != nil {
		t.Fatal(err)
	}
	return func(number int) {
		t.Helper()
		for i := range in.lines {
			l := &in.lines[i]
			if l.number != number {
				continue
			}
			payload, err := in.payload(l)
			if err != nil {
				payload = []byte("{}") // the test has changed the line
			}
			m := nats.NewMsg(newFamilies([]string{l.family})[0].event.Subject)
			m.Data = payload
			m.Header.Set(inputHeader, in.id)
			m.Header.Set(lineHeader, fmt.Sprint(number))
			if _, err := js.PublishMsg(t.Context(), m); err != nil {
				t.Fatal(err)
			}
			return
		}
		t.Fatalf("no line %d", number)
	}
}

// openStore starts a server on the store of an ended run.
func openStore(t *testing.T, dir string) *monotest.TestServer {
	t.Helper()
	return monotest.ServerWith(t, embedded.Config{StoreDir: dir})
}
