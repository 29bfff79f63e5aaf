package cli

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/safe"
)

func commands(cmd *cobra.Command) []*cobra.Command {
	all := []*cobra.Command{cmd}
	for _, sub := range cmd.Commands() {
		all = append(all, commands(sub)...)
	}
	return all
}

var shellWord = regexp.MustCompile(`'[^']*'|[^\s']+`)

// Every example is a command line that the command takes.
func TestHelp_examples(t *testing.T) {
	t.Parallel()
	newRoot := func() *cobra.Command {
		c := &cli{process: bare(t).process(nil, nil)}
		return c.root()
	}
	for _, cmd := range commands(newRoot()) {
		if cmd.Example == "" {
			t.Errorf("%s has no example", cmd.CommandPath())
		}
		if cmd.Short == "" || strings.HasSuffix(cmd.Short, ".") {
			t.Errorf("%s: Short is %q, want a phrase", cmd.CommandPath(), cmd.Short)
		}
		for line := range strings.Lines(cmd.Example) {
			for part := range strings.SplitSeq(line, " | ") {
				part, _, _ = strings.Cut(part, " > ")
				var words []string
				for _, w := range shellWord.FindAllString(part, -1) {
					words = append(words, strings.Trim(w, "'"))
				}
				if len(words) == 0 || words[0] != "monotel" {
					continue
				}
				root := newRoot()
				found, rest, err := root.Find(words[1:])
				if err != nil {
					t.Errorf("%s: %v", part, err)
					continue
				}
				if err := found.ParseFlags(rest); err != nil {
					t.Errorf("%s: %v", part, err)
				}
				if err := found.ValidateArgs(found.Flags().Args()); err != nil {
					t.Errorf("%s: %v", part, err)
				}
				if err := found.ValidateFlagGroups(); err != nil {
					t.Errorf("%s: %v", part, err)
				}
			}
		}
	}
}

// Help can be read without colours, on 80 columns where it is prose.
func TestHelp(t *testing.T) {
	t.Parallel()
	b := bare(t)
	for _, cmd := range commands((&cli{process: b.process(nil, nil)}).root()) {
		for line := range strings.Lines(cmd.Long) {
			if n := len([]rune(strings.TrimSuffix(line, "\n"))); n > 84 {
				t.Errorf("%s: a line of its help has %d columns: %s", cmd.CommandPath(), n, line)
			}
		}
	}
	for _, args := range [][]string{{"help"}, {}, {"dlq", "--help"}, {"help", "dlq", "replay"}, {"version"}, {"completion", "bash"}, {"completion", "zsh"}, {"completion", "fish"}} {
		if out, errs := b.ok(args...); out == "" || errs != "" {
			t.Errorf("monotel %s prints %d bytes, and as errors %q", strings.Join(args, " "), len(out), errs)
		}
	}
	if out, _ := b.ok("help"); !strings.Contains(out, "rather use --password-file") {
		t.Error("help does not say that others see a password on the command line")
	}
	if out, _ := b.ok("help", "dlq", "ls"); strings.Contains(out, "--tlskey") || !strings.Contains(out, "see 'monotel --help'") {
		t.Errorf("help of a command repeats the flags of the connection, or does not say where they are:\n%s", out)
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	b := bare(t)
	plain, _ := b.ok("version")
	if flag, _ := b.ok("--version"); flag != plain || !strings.HasPrefix(plain, "monotel ") {
		t.Errorf("version prints %q, and --version %q", plain, flag)
	}
	out, _ := b.ok("version", "--output", "json")
	var v versionView
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Go != runtime.Version() || v.Version == "" {
		t.Errorf("version is %s, %v", out, err)
	}
}

// What is wrong with a command line is said before anybody is asked, and before
// a server is looked for.
func TestUsage(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		args string
		want string
	}{
		{"bogus", "unknown command"},
		{"dlq bogus", "unknown command"},
		{"dlq ls --bogus", "unknown flag"},
		{"dlq grups", "did you mean groups?"},
		{"dlq ops sow", "did you mean show?"},
		{"dlq ls extra", "--id extra"},
		{"dlq stats extra", "takes flags only"},
		{"dlq show", "want one ID, not 0; 'monotel dlq ls' lists them"},
		{"dlq ls --output yaml", "--output yaml: want one of table, json, ndjson"},
		{"dlq ls --timeout 0s", "--timeout"},
		{"dlq ls --limit -1", "--limit -1"},
		{"dlq ls --state gone", "want one of"},
		{"dlq ls --payload", "--output json"},
		{"dlq ls --tlscert x", "--tlskey"},
		{"dlq show x --trace-url-template http://x/", "{trace_id}"},
		{"dlq show x --trace-url-template javascript:{trace_id}", "{trace_id}"},
		{"dlq", "needs a terminal"},
		{"dlq replay --all", "--yes"},
		{"dlq discard x", "--yes"},
		{"dlq replay --yes", "say which"},
		{"dlq replay", "say which"},
		{"dlq discard", "say which"},
		{"dlq archive --yes", "say which"},
		{"dlq replay --all --where true --yes", "--all is for all"},
		{"dlq replay --all --yes --rate fast", "--rate fast"},
		{"dlq replay --all --yes --rate 0", "--rate 0"},
		{"dlq replay --all --yes --rate 5/", "--rate 5/"},
		{"dlq replay --all --yes --rate 5/d", "--rate 5/d"},
		{"dlq replay --all --yes --rate nan", "--rate nan"},
		{"dlq replay --all --yes --canary 1,x", "--canary 1,x"},
		{"dlq replay --all --yes --stop-if-failing 200%", "--stop-if-failing 200%"},
		{"dlq replay --all --yes --max-in-flight -1", "--max-in-flight -1"},
		{"dlq replay --all --yes --to nobody", "--to nobody"},
		{"dlq replay --all --yes --to subject=", "--to subject="},
		{"dlq replay --all --yes --patch /no/such/file", "--patch"},
		{"dlq replay --plan x --all", "plan"},
		{"dlq replay --plan x", "--yes"},
		{"dlq replay x --plan y --yes", "leave out the IDs"},
		{"dlq replay --all --dry-run --yes", "dry-run"},
		{"dlq edit x", "needs a terminal"},
		{"dlq edit x y --yes", "edit takes one ID"},
		{"dlq edit --where true --yes", "--patch"},
		{"dlq edit x --header Nats-Msg-Id:1 --yes", "stay"},
		{"dlq edit x --header dlq-id:1 --yes", "stay"},
		{"dlq edit x --header bad --yes", "want 'Key: value'"},
		{"dlq import /no/such/file", "import"},
		{"dlq doctor --fail-on always", "--fail-on always"},
		{"dlq tail --limit -1", "--limit"},
		{"dlq archive --id - --yes", "no ID on the standard input"},
		{"dlq ls --limit 1 --limit 2", "it is given twice"},
		{"dlq replay --all --yes --to consumer --to everyone", "it is given twice"},
		{"dlq replay --all --yes --rate 1/s --rate 9/s", "it is given twice"},
		{"dlq replay --all --yes --reason a --reason b", "it is given twice"},
		{"dlq replay --plan x --plan y --yes", "it is given twice"},
		{"dlq replay --all --dry-run --dry-run=false", "it is given twice"},
		{"dlq edit x --data a --data b --yes", "it is given twice"},
		{"dlq export --file a -f b", "it is given twice"},
		{"dlq ls -o json --output table", "it is given twice"},
		{"--server a dlq ls --server b", "it is given twice"},
		{"dlq ls --where x --where", "needs an argument"},
		{"dlq ls --where consumer=='a' --where nope", `there is no "nope"`},
		{"dlq ls --where consumer=='a')||(true --where true", "query"},
		{"dlq discard --where= --all --yes", "--where is empty"},
		{"dlq discard --group=a --where= --yes", "--where is empty"},
		{"dlq discard --where=true --group= --yes", "--group is empty"},
		{"dlq discard --where=true --id= --yes", "--id is empty"},
		{"dlq discard --where=true --state= --yes", "--state is empty"},
	} {
		t.Run(tt.args, func(t *testing.T) {
			t.Parallel()
			b := bare(t)
			b.env["NATS_URL"] = nowhere(t)
			b.fails(exitUsage, []string{tt.want}, strings.Fields(tt.args)...)
		})
	}
}

func TestParseRate(t *testing.T) {
	t.Parallel()
	for give, want := range map[string]float64{"": 0, "100": 100, "100/s": 100, "6000/m": 100, "3600/h": 1, "0.5/s": 0.5} {
		if got, err := parseRate(give); err != nil || got != want {
			t.Errorf("parseRate(%q) = %v, %v; want %v", give, got, err, want)
		}
	}
	for give, want := range map[string]float64{"": 0, "10%": 0.1, "0.1": 0.1, "never": -1, "100%": 1} {
		if got, err := parsePart(give); err != nil || got != want {
			t.Errorf("parsePart(%q) = %v, %v; want %v", give, got, err, want)
		}
	}
	if got, err := parseCanary("1, 5,20"); err != nil || !slices.Equal(got, []int{1, 5, 20}) {
		t.Errorf("parseCanary = %v, %v", got, err)
	}
}

func TestTraceID(t *testing.T) {
	t.Parallel()
	const id = "4bf92f3577b34da6a3ce929d0e0e4736"
	for give, want := range map[string]string{
		"00-" + id + "-00f067aa0ba902b7-01": id, "": "", "00-" + id: "", "00-\x1b]8;;x-00f067aa0ba902b7-01": "",
		"00-" + strings.ToUpper(id) + "-00f067aa0ba902b7-01": "",
	} {
		if got := traceID(give); got != want {
			t.Errorf("traceID(%q) = %q, want %q", give, got, want)
		}
	}
}

func TestList(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(record(1), record(2), record(3))

	out, errs := b.ok("dlq", "ls")
	for _, id := range ids {
		if !strings.Contains(out, id) {
			t.Errorf("dead letter %s is not listed:\n%s", id, out)
		}
	}
	if strings.Index(out, ids[2]) > strings.Index(out, ids[0]) {
		t.Errorf("the newest is not first:\n%s", out)
	}
	if !strings.Contains(errs, "3 dead letters") {
		t.Errorf("their number is not told: %q", errs)
	}
	if _, errs := b.ok("dlq", "ls", "--quiet"); errs != "" {
		t.Errorf("--quiet prints %q", errs)
	}

	out, _ = b.ok("dlq", "ls", "--output", "ndjson", "--limit", "2")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != 2 || strings.Contains(out, `"payload"`) {
		t.Errorf("--limit 2 lists:\n%s", out)
	}
	out, _ = b.ok("dlq", "ls", "--output", "json", "--payload", "--id", ids[1])
	var views []entryView
	if err := json.Unmarshal([]byte(out), &views); err != nil || len(views) != 1 || views[0].ID != ids[1] ||
		string(views[0].Payload) != string(record(2).Data) {
		t.Errorf("ls --payload --id gives %s, %v", out, err)
	}
	b.in = ids[0] + "\n\n" + ids[2] + "\n" + ids[0] + "\n"
	out, _ = b.ok("dlq", "ls", "--id", "-", "--output", "ndjson")
	if strings.Count(out, "\n") != 2 || !strings.Contains(out, ids[0]) || !strings.Contains(out, ids[2]) {
		t.Errorf("ls --id - gives %s", out)
	}
	b.fails(exitUsage, []string{ids[0]}, "dlq", "ls", "--id", ids[0][:20]+"xxxx")
}

// Who finds none is told that there may be others.
func TestList_none(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for _, args := range [][]string{{"ls"}, {"groups"}, {"ls", "--where", "age > duration(\"1h\")"}} {
		if out, errs := b.ok(append([]string{"dlq"}, args...)...); out != "" || !strings.Contains(errs, "0 dead letters") || !strings.Contains(errs, "--state all") {
			t.Errorf("%v of none prints %q, and says %q", args, out, errs)
		}
	}
	if _, errs := b.ok("dlq", "ls", "--state", "all"); errs != "0 dead letters\n" {
		t.Errorf("of none in any state it says %q", errs)
	}
	if out, _ := b.ok("dlq", "ls", "--output", "json"); out != "[]\n" {
		t.Errorf("of none, JSON is %q", out)
	}
}

func TestShow(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(record(1), record(2))

	out, _ := b.ok("dlq", "show", ids[0][:8])
	for _, part := range []string{ids[0], "gateway timeout", "Tenant: acme", `"amount": 1.50`} {
		if !strings.Contains(out, part) {
			t.Errorf("show lacks %q:\n%s", part, out)
		}
	}
	out, _ = b.ok("dlq", "show", ids[0], "--no-payload")
	if strings.Contains(out, "amount") || strings.Contains(out, "acme") {
		t.Errorf("--no-payload prints:\n%s", out)
	}
	out, _ = b.ok("dlq", "show", ids[0], "--output", "ndjson")
	var v wholeView
	if err := json.Unmarshal([]byte(out), &v); err != nil || string(v.Payload) != string(record(1).Data) || strings.Count(out, "\n") != 1 {
		t.Errorf("show as NDJSON gives %s, %v", out, err)
	}
	b.fails(exitUsage, []string{`dead letter "nope"`, "not found"}, "dlq", "show", "nope")
	var group struct {
		Group string `json:"group"`
	}
	out, _ = b.ok("dlq", "groups", "--output", "ndjson")
	if err := json.Unmarshal([]byte(out), &group); err != nil {
		t.Fatal(err)
	}
	b.fails(exitUsage, []string{"not found; it is a group", "'monotel dlq ls --group " + group.Group + "'"}, "dlq", "show", group.Group)
	b.fails(exitUsage, []string{"did you mean", ids[0]}, "dlq", "show", ids[0][:23]+"0")
}

func TestStats(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(record(1), record(2))
	out, _ := b.ok("dlq", "stats", "--output", "json")
	var v statsView
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.States[dlq.StateOpen] != 2 || v.Consumers["ORDERS/billing"] != 2 || v.Newest == nil {
		t.Errorf("stats are %s, %v", out, err)
	}
}

func TestTail(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(record(1), record(2))
	b.ok("dlq", "archive", ids[0], "--yes", "--reason", "a test")
	out, _ := b.ok("dlq", "tail", "--from", "1", "--limit", "3", "--output", "ndjson")
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	if len(lines) != 3 {
		t.Fatalf("tail prints %d lines, want 3:\n%s", len(lines), out)
	}
	var v eventView
	if err := json.Unmarshal([]byte(lines[2]), &v); err != nil || v.Event != "changed" || v.Change.Reason != "a test" || v.ID != ids[0] {
		t.Errorf("the last event is %s, %v", lines[2], err)
	}

	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	reader, o := io.Pipe()
	var e bytes.Buffer
	ended := make(chan int, 1)
	go func() { ended <- run(ctx, []string{"dlq", "tail", "--from", "1"}, b.process(o, &e)) }()
	if _, err := bufio.NewReader(reader).ReadString('\n'); err != nil { // it follows
		t.Fatal(err)
	}
	rest := make(chan struct{})
	go func() {
		defer close(rest)
		_, _ = io.Copy(io.Discard, reader)
	}()
	interrupt()
	code := <-ended
	_ = o.Close()
	<-rest
	if code != exitDone || e.Len() > 0 {
		t.Errorf("an interrupted tail ends with %d and %q", code, e.String())
	}
}

func TestChange(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.capture(record(1), record(2), record(3))
	states := func() map[string]dlq.State {
		out, _ := b.ok("dlq", "ls", "--state", "all", "--output", "json")
		var views []entryView
		if err := json.Unmarshal([]byte(out), &views); err != nil {
			t.Fatal(err)
		}
		m := make(map[string]dlq.State)
		for _, v := range views {
			m[v.ID] = v.State
		}
		return m
	}

	b.unchanged(func() {
		out, _ := b.ok("dlq", "archive", "--all", "--dry-run")
		if !strings.Contains(out, ids[2]) {
			t.Errorf("--dry-run does not say which:\n%s", out)
		}
		b.fails(exitUsage, []string{"--yes"}, "dlq", "discard", "--all")
		b.fails(exitUsage, []string{"not found"}, "dlq", "discard", ids[0], "nope", "--yes")
		b.width, b.in = 80, "n\n"
		b.fails(exitFailed, []string{
			"GROUP", "gateway timeout", "SAMPLE", ids[2], "Discard 3 dead letters? [y/N]", "nothing was changed",
		}, "dlq", "discard", "--all")
		b.width = 0
	})
	_, errs := b.ok("dlq", "archive", ids[0][:10], ids[0], ids[1], "--yes", "--reason", "later")
	if !strings.Contains(errs, "2 dead letters archived") {
		t.Errorf("it does not say how many: %q", errs)
	}
	if s := states(); s[ids[0]] != dlq.StateArchived || s[ids[1]] != dlq.StateArchived || s[ids[2]] != dlq.StateOpen {
		t.Errorf("after archive: %v", s)
	}
	b.fails(exitPartly, []string{"1 dead letter could not be archived", ids[0]}, "dlq", "archive", ids[0], ids[2], "--yes")
	b.fails(exitFailed, []string{"wrong state", ids[0]}, "dlq", "archive", ids[0], "--yes")
	b.ok("dlq", "restore", "--all", "--yes")
	if s := states(); s[ids[0]] != dlq.StateOpen || s[ids[1]] != dlq.StateOpen || s[ids[2]] != dlq.StateOpen {
		t.Errorf("after restore: %v", s)
	}
	b.width, b.in = 80, "y\n"
	b.ok("dlq", "discard", ids[1])
	b.width = 0
	if s := states(); s[ids[1]] != dlq.StateDiscarded {
		t.Errorf("after discard: %v", s)
	}
	out, _ := b.ok("dlq", "discard", "--all", "--yes", "--output", "json")
	var v changedView
	if err := json.Unmarshal([]byte(out), &v); err != nil || v.Changed != 2 || v.Failed == nil {
		t.Errorf("discard as JSON gives %s, %v", out, err)
	}
}

// editor is a command that does to a file what a person would.
func editor(t *testing.T, script string) string {
	t.Helper()
	if runtime.GOOS == "windows" {
		t.Skip("needs a shell")
	}
	path := filepath.Join(t.TempDir(), "editor")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script+"\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func (b *bundle) payload(id string) (string, wholeView) {
	b.t.Helper()
	out, _ := b.ok("dlq", "show", id, "--output", "json")
	var v wholeView
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		b.t.Fatal(err)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, v.Payload); err != nil {
		b.t.Fatal(err)
	}
	return compact.String(), v
}

func TestEdit_withEditor(t *testing.T) {
	t.Parallel()
	seen := filepath.Join(t.TempDir(), "seen")
	tests := []struct {
		name   string
		script string
		answer string
		code   int
		want   string   // payload then
		parts  []string // of what is said
		kept   bool     // the temporary file
	}{
		{
			name: "changed", script: `cp "$1" ` + seen + `; ls -l "$1" | cut -c1-10 >> ` + seen + `; sed -i 's/1.50/2.75/' "$1"`, answer: "y\n",
			want: `{"order":1,"amount":2.75}`, parts: []string{`-  "amount": 1.50`, `+  "amount": 2.75`, "revision 1"},
		},
		{name: "unchanged", script: "true", want: string(record(1).Data), parts: []string{"Nothing has changed"}},
		{name: "no JSON", script: `echo '{' > "$1"`, answer: "y\n", code: exitUsage, want: string(record(1).Data), parts: []string{"was JSON", "--not-json", "What you wrote is in "}, kept: true},
		{name: "not confirmed", script: `echo '{}' > "$1"`, answer: "n\n", code: exitFailed, want: string(record(1).Data), parts: []string{"not confirmed", "What you wrote is in "}, kept: true},
		{name: "editor fails", script: "exit 7", code: exitFailed, want: string(record(1).Data), parts: []string{"editor", "exit status 7", "What you wrote is in "}, kept: true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			ids := b.capture(record(1))
			path := filepath.Join(t.TempDir(), "path")
			b.env["EDITOR"], b.width, b.env["NO_COLOR"] = editor(t, `echo "$1" > '`+path+"'\n"+tt.script), 80, "1"
			answer := filepath.Join(t.TempDir(), "answer") // a file, as the editor gets the same
			if err := os.WriteFile(answer, []byte(tt.answer), 0o600); err != nil {
				t.Fatal(err)
			}
			in, err := os.Open(answer)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = in.Close() })
			b.stdin = in
			code, _, errs := b.run("dlq", "edit", ids[0], "--reason", "wrong amount")
			if code != tt.code {
				t.Fatalf("exit code %d, want %d:\n%s", code, tt.code, errs)
			}
			for _, part := range tt.parts {
				if !strings.Contains(errs, part) {
					t.Errorf("it does not say %q:\n%s", part, errs)
				}
			}
			if _, file, ok := strings.Cut(errs, "What you wrote is in "); ok {
				file = strings.TrimSpace(file)
				if _, err := os.Stat(file); err != nil {
					t.Errorf("what was written is lost: %v", err)
				}
				if err := os.Remove(file); err != nil {
					t.Error(err)
				}
			} else if tt.kept {
				t.Errorf("it does not say where the file is:\n%s", errs)
			} else if name, err := os.ReadFile(path); err != nil {
				t.Error(err)
			} else if _, err := os.Stat(strings.TrimSpace(string(name))); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the payload is still in %s: %v", name, err)
			}
			b.width = 0
			if got, _ := b.payload(ids[0]); got != tt.want {
				t.Errorf("payload is %s, want %s", got, tt.want)
			}
		})
	}
	t.Cleanup(func() {
		b, err := os.ReadFile(seen)
		if runtime.GOOS != "windows" && (err != nil || string(b) != "{\n  \"order\": 1,\n  \"amount\": 1.50\n}\n-rw-------\n") {
			t.Errorf("the editor has seen %q, %v", b, err)
		}
	})
}

func TestEdit(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.env["NO_COLOR"] = "1"
	ids := b.capture(record(1), record(2), record(3))
	file := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}

	b.ok("dlq", "edit", ids[0], "--data", file("d", `{"order":1}`), "--yes", "--reason", "no amount")
	got, v := b.payload(ids[0])
	if got != `{"order":1}` || v.Revision != 1 || v.History[0].Reason != "no amount" {
		t.Errorf("after --data: %s, %+v", got, v)
	}
	b.in = `{"amount":9,"order":null}`
	b.ok("dlq", "edit", ids[0], "--patch", "-", "--yes")
	if got, _ := b.payload(ids[0]); got != `{"amount":9}` {
		t.Errorf("after --patch: %s", got)
	}
	b.ok("dlq", "edit", ids[0], "--header", "tenant: other", "--header", "New: x:y", "--yes")
	_, v = b.payload(ids[0])
	if fmt.Sprint(v.Headers) != "map[New:[x:y] tenant:[other]]" || v.Revision != 3 {
		t.Errorf("after --header: %v, revision %d", v.Headers, v.Revision)
	}
	b.unchanged(func() {
		b.fails(exitUsage, []string{"was JSON"}, "dlq", "edit", ids[0], "--data", file("d", "text"), "--yes")
		_, errs := b.ok("dlq", "edit", ids[0], "--data", file("d", ` { "amount": 9 } `), "--yes")
		if !strings.Contains(errs, "Nothing has changed") {
			t.Errorf("layout is taken for a change: %s", errs)
		}
		out, _ := b.ok("dlq", "edit", ids[1], "--data", file("d", `{}`), "--dry-run")
		if !strings.Contains(out, `-  "order": 2`) {
			t.Errorf("--dry-run shows no diff: %s", out)
		}
	})
	b.ok("dlq", "edit", ids[1], "--data", file("d", "text"), "--not-json", "--yes")

	// Many: one is not JSON any more, one is as the patch would have it.
	patch := file("p", `{"amount":9}`)
	b.unchanged(func() {
		out, _ := b.ok("dlq", "edit", "--all", "--patch", patch, "--dry-run")
		if out != "1 would change, 1 stay as they are, 1 cannot be patched\n" {
			t.Errorf("--dry-run says %q", out)
		}
		_, errs := b.ok("dlq", "edit", "--all", "--patch", patch, "--dry-run", "--show-diffs")
		if !strings.Contains(errs, `-  "amount": 3.50`) {
			t.Errorf("--show-diffs shows none: %s", errs)
		}
	})
	b.fails(exitPartly, []string{"1 dead letter could not be edited", ids[1]}, "dlq", "edit", "--all", "--patch", patch, "--yes")
	if got, _ := b.payload(ids[2]); got != `{"order":3,"amount":9}` {
		t.Errorf("after a patch of many: %s", got)
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.ok("dlq", "doctor", "--output", "json", "--fail-on", "never")
	b.fails(exitFailed, []string{"as severe as notice"}, "dlq", "doctor", "--fail-on", "notice", "--stream", b.withoutLimit())
}

func TestExportAndImport(t *testing.T) {
	t.Parallel()
	from := setup(t)
	ids := from.captureMany(3)
	from.ok("dlq", "archive", ids[0], "--yes", "--reason", "later")
	file := filepath.Join(t.TempDir(), "export.ndjson")
	_, errs := from.ok("dlq", "export", "--state", "all", "--file", file)
	if !strings.Contains(errs, "3 dead letters exported") {
		t.Errorf("export says %q", errs)
	}
	if info, err := os.Stat(file); err != nil || runtime.GOOS != "windows" && info.Mode().Perm() != 0o600 {
		t.Errorf("the file is %v, %v: payloads are for its owner", info, err)
	}
	from.fails(exitUsage, []string{"exists already"}, "dlq", "export", "--file", file)
	out, _ := from.ok("dlq", "export", "--id", ids[1])
	if n := strings.Count(out, "\n"); n != 3 || !strings.Contains(out, ids[1]) || strings.Contains(out, ids[0]) {
		t.Errorf("export of one prints %d lines, want a first, one and a last:\n%s", n, out)
	}
	from.width = 80
	from.fails(exitUsage, []string{"not for a terminal"}, "dlq", "export")

	to := setup(t)
	text, _ := to.ok("dlq", "import", file, "--output", "json")
	var v importedView
	if err := json.Unmarshal([]byte(text), &v); err != nil || v.Imported != 3 || v.Present != 0 {
		t.Errorf("import says %s, %v", text, err)
	}
	all, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	to.in = string(all)
	_, errs = to.ok("dlq", "import", "-")
	if !strings.Contains(errs, "0 imported, 3 were there already") {
		t.Errorf("the second import says %q", errs)
	}
	if out, _ := to.ok("dlq", "show", ids[0]); !strings.Contains(out, "later") || !strings.Contains(out, "archived") {
		t.Errorf("the history is not there:\n%s", out)
	}
	to.in = "nonsense\n"
	to.fails(exitUsage, []string{"nothing was imported", "line 1"}, "dlq", "import", "-")
}

// withoutLimit makes a stream that the doctor warns of, and returns the
// dead-letter stream.
func (b *bundle) withoutLimit() string {
	b.t.Helper()
	if _, err := b.js.CreateStream(b.t.Context(), jetstream.StreamConfig{Name: "UNBOUND", Subjects: []string{"unbound.>"}}); err != nil {
		b.t.Fatal(err)
	}
	return "DLQ"
}

func TestComplete(t *testing.T) {
	t.Parallel()
	b := setup(t)
	evil := record(3)
	evil.Error = "boom\n:4\n\x1b[2J\tx"
	ids := b.capture(record(1), record(2), evil)
	suggests := func(want []string, args ...string) {
		t.Helper()
		out, _ := b.ok(append([]string{"__complete"}, args...)...)
		lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
		for _, w := range want {
			if !slices.ContainsFunc(lines, func(l string) bool { return l == w || strings.HasPrefix(l, w+"\t") }) {
				t.Errorf("%v does not suggest %q:\n%s", args, w, out)
			}
		}
		checkSafe(t, strings.ReplaceAll(out, "\t", ""))
		if lines[len(lines)-1] != ":4" || slices.Index(lines, ":4") != len(lines)-1 {
			t.Errorf("%v does not end with the directive for no files:\n%s", args, out)
		}
	}
	suggests(ids, "dlq", "show", "")
	suggests(ids[1:2], "dlq", "show", ids[1][:5])
	suggests(ids, "dlq", "replay", "--id", "")
	suggests([]string{"open", "archived", "all"}, "dlq", "ls", "--state", "")
	suggests([]string{`reason=="panic"`}, "dlq", "ls", "--where", "reason")
	suggests([]string{"critical", "never"}, "dlq", "doctor", "--fail-on", "")
	suggests([]string{"consumer", "everyone"}, "dlq", "replay", "--to", "")
	suggests(nil, "dlq", "ops", "show", "")
	suggests([]string{"table", "json"}, "dlq", "ls", "--output", "")

	// A server that is not there costs little, and suggests nothing.
	b.env["NATS_URL"] = nowhere(t)
	suggests(nil, "dlq", "show", "")
}

func TestConfirm_endsWithContext(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var out bytes.Buffer
	b := bare(t)
	p := b.process(&out, &out)
	p.in = r
	c := &cli{process: p}
	cancel()
	if err := c.confirm(ctx, false, "Really\x1b?"); err == nil {
		t.Error("confirm is taken for a yes")
	}
	checkSafe(t, out.String())
	if err := w.Close(); err != nil { // ends who reads
		t.Error(err)
	}
}

func TestWithHeaders(t *testing.T) {
	t.Parallel()
	before := nats.Header{"Tenant": {"acme"}, "Nats-Msg-Id": {"1"}, "Keep": {"a", "b"}}
	got, err := withHeaders(before, []string{"tenant:", "New:  v: w "})
	if err != nil || fmt.Sprint(got) != "map[Keep:[a b] Nats-Msg-Id:[1] New:[v: w]]" {
		t.Errorf("withHeaders = %v, %v", got, err)
	}
	if len(before) != 3 {
		t.Errorf("the original is changed: %v", before)
	}
}

// The command refuses a patch where the library does, and quotes no payload.
func TestEdit_patchRefused(t *testing.T) {
	t.Parallel()
	b := setup(t)
	for n, data := range []string{`[1,2]`, `"secret"`, `17`, `null`, `true`, `secret`, `{"secret":`, ``} {
		r := record(n + 1)
		r.Data = []byte(data)
		id := b.capture(r)[0]
		b.unchanged(func() {
			b.in = `{"b":2}`
			b.fails(exitUsage, []string{"no JSON object"}, "dlq", "edit", id, "--patch", "-", "--yes")
		})
	}
}

// Of several values for one header only the last was taken.
func TestWithHeaders_several(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		give []string
		want string
		bad  string
	}{
		{[]string{"Tenant: red", "Tenant: yellow"}, "map[Keep:[a b] Tenant:[red yellow]]", ""},
		{[]string{"Tenant: red", "tenant: yellow", "TENANT: blue"}, "map[Keep:[a b] Tenant:[red yellow blue]]", ""},
		{[]string{"tenant: red", "New: 1", "tenant: red"}, "map[Keep:[a b] New:[1] tenant:[red red]]", ""},
		{[]string{"Keep: c"}, "map[Keep:[c] Tenant:[acme]]", ""},
		{[]string{"Tenant:", "Tenant:"}, "map[Keep:[a b]]", ""},
		{[]string{"Tenant:", "Keep: c", "Keep: d"}, "map[Keep:[c d]]", ""},
		{[]string{"Tenant: red", "Tenant:"}, "", "set and taken away"},
		{[]string{"Tenant:", "tenant: red"}, "", "set and taken away"},
		{[]string{"Tenant: red", "Tenant: ", "Tenant: blue"}, "", "set and taken away"},
		{[]string{"a b: 1"}, "", "a name has letters"},
		{[]string{"a\x00: 1"}, "", "a name has letters"},
		{[]string{"a\x1b[2J: 1"}, "", "a name has letters"},
		{[]string{"ä: 1"}, "", "a name has letters"},
		{[]string{"a\xff: 1"}, "", "a name has letters"},
		{[]string{"a\r\nb: 1"}, "", "a name has letters"},
		{[]string{"a(b): 1"}, "", "a name has letters"},
		{[]string{"a: 1\r\nb: 2"}, "", "a value is one line"},
		{[]string{": 1"}, "", "want 'Key: value'"},
		{[]string{"a"}, "", "want 'Key: value'"},
		{[]string{"nats-msg-id: 1"}, "", "say what the message is"},
	} {
		got, err := withHeaders(nats.Header{"Tenant": {"acme"}, "Keep": {"a", "b"}}, tt.give)
		switch {
		case tt.bad != "":
			if err == nil || !strings.Contains(err.Error(), tt.bad) {
				t.Errorf("withHeaders(%q) = %v, want an error with %q", tt.give, err, tt.bad)
			}
		case err != nil || fmt.Sprint(got) != tt.want:
			t.Errorf("withHeaders(%q) = %v, %v, want %s", tt.give, got, err, tt.want)
		}
	}
}

func FuzzWithHeaders(f *testing.F) {
	f.Add("Tenant: red", "tenant: blue")
	f.Add("Tenant:", "Tenant: red")
	f.Add("a\x00: b", ":")
	f.Fuzz(func(t *testing.T, one, two string) {
		h, err := withHeaders(nats.Header{"Tenant": {"acme"}, "Nats-Msg-Id": {"1"}}, []string{one, two})
		if err != nil {
			checkSafe(t, safe.Line(err.Error()))
			return
		}
		if h.Get("Nats-Msg-Id") != "1" {
			t.Errorf("%q, %q: the ID is %q", one, two, h["Nats-Msg-Id"])
		}
		for k, vs := range h {
			if len(vs) == 0 || strings.ContainsAny(k, ": \r\n\x00") || strings.ContainsAny(strings.Join(vs, ""), "\r\n") {
				t.Errorf("%q, %q become %q: %q", one, two, k, vs)
			}
		}
	})
}

// An edit in which nothing was edited stored the payload without its last \r.
func TestEdit_untouched(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.env["EDITOR"], b.width, b.env["NO_COLOR"] = editor(t, "true"), 80, "1"
	null, err := os.Open(os.DevNull) // a file, as the editor gets the same
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = null.Close() })
	b.stdin = null
	for i, give := range []string{
		"text\r", "text", "one\r\ntwo\n", "\ufefftext", "{\"a\":1}\r", "{\"a\": 1,  \"b\":[ ]}", "{\n\t\"a\": 1\n}", `{"a":"\u003cb\u003e"}`, "\ufeff{}", " 1 ",
		strings.Repeat("[", 9_000) + strings.Repeat("]", 9_000),
	} {
		r := record(i + 1)
		r.Data, r.BodySize = []byte(give), len(give)
		id := b.capture(r)[0]
		b.unchanged(func() {
			if _, errs := b.ok("dlq", "edit", id); !strings.Contains(errs, "Nothing has changed.") {
				t.Errorf("%.50q: it says %.500q", give, errs)
			}
		})
	}
	r := record(100)
	r.Data, r.BodySize = []byte("a\x00\xff"), 3
	id := b.capture(r)[0]
	b.unchanged(func() { b.fails(exitUsage, []string{"binary", "--data FILE"}, "dlq", "edit", id) })
}

// A process that is killed while a payload is edited leaves it behind.
func TestEdit_killed(t *testing.T) {
	t.Parallel()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(cache, "monotel", "edits")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if dir, err = os.MkdirTemp(dir, ""); err != nil { //nolint:usetesting // it is where the command looks
		t.Fatal(err)
	}
	for _, name := range []string{"lock", "payload.json", ".payload.json.swp"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b := bare(t)
	for t.Context().Err() == nil { // other tests clean, too
		b.ok("version")
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
			return
		}
	}
	t.Error("the payload is still there")
}

// A payload that somebody has made for it was laid out on 200 MB.
func TestShow_bounded(t *testing.T) {
	t.Parallel()
	b := setup(t)
	deep := strings.Repeat("[", 10_000) + strings.Repeat("]", 10_000)
	wide := strings.Repeat("[", 64) + "1" + strings.Repeat(",1", 100_000) + strings.Repeat("]", 64)
	for i, give := range []string{
		deep, strings.Repeat("[", 20_000), "[" + strings.Repeat(deep[1:len(deep)-1]+",", 20) + "1]", wide,
		strings.Repeat(`{"a":`, 9_000) + "1" + strings.Repeat("}", 9_000), `"` + strings.Repeat("x", 400_000) + `"`,
		`{"a":1` + strings.Repeat(`,"b":2`, 60_000) + "}", strings.Repeat("long ", 80_000),
	} {
		r := record(i + 1)
		r.Data, r.BodySize = []byte(give), len(give)
		id := b.capture(r)[0]
		const others = 10_000 // bytes of other fields
		for _, tt := range []struct {
			most int
			cut  bool
			args []string
		}{
			{16<<10 + others, len(give) > 20_000, []string{"dlq", "show", id}},
			{12*len(give) + 128<<10 + others, false, []string{"dlq", "show", id, "--full"}}, // a line is indented by two
			{6*len(give) + 64<<10 + others, false, []string{"dlq", "show", id, "--output", "json"}},
			{6*len(give) + 64<<10 + others, false, []string{"dlq", "ls", "--id", id, "--payload", "--output", "json"}},
		} {
			out, _ := b.ok(tt.args...)
			if len(out) > tt.most {
				t.Errorf("payload %d, %d bytes: %v prints %d, want at most %d", i, len(give), tt.args, len(out), tt.most)
			}
			if strings.Contains(out, "--full prints all") != tt.cut && tt.cut {
				t.Errorf("payload %d: %v does not say that it is cut", i, tt.args)
			}
			if tt.args[len(tt.args)-1] == "json" {
				var v any
				if err := json.Unmarshal([]byte(out), &v); err != nil {
					t.Errorf("payload %d: %v prints no JSON: %v", i, tt.args, err)
				}
			}
		}
		if _, v := b.whole(id); string(v) != give {
			t.Errorf("payload %d is not whole as JSON", i)
		}
		b.in = strings.Replace(give, "[", "[7,", 1)
		out, _ := b.ok("dlq", "edit", id, "--data", "-", "--dry-run", "--not-json")
		if most := mostDiff + 4*mostLine; len(out) > most {
			t.Errorf("payload %d: the diff has %d bytes, want at most %d", i, len(out), most)
		}
	}
}

// whole is a payload as scripts get it.
func (b *bundle) whole(id string) (wholeView, []byte) {
	b.t.Helper()
	out, _ := b.ok("dlq", "show", id, "--output", "ndjson")
	var v wholeView
	if err := json.Unmarshal([]byte(out), &v); err != nil {
		b.t.Fatal(err)
	}
	if v.PayloadBase64 != nil {
		return v, *v.PayloadBase64
	}
	return v, v.Payload
}
