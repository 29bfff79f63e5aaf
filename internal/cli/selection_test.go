package cli

import (
	"cmp"
	"encoding/json"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// mixed stores twelve dead letters: of three errors, a third each, and of two consumers by
// turns.
func (b *bundle) mixed() []string {
	b.t.Helper()
	var records []*dlq.Record
	for n := 1; n <= 12; n++ {
		r := record(n)
		r.Error = []string{"ledger: closed", "address: unknown", "ledger: no address"}[n%3]
		if n%2 == 0 {
			r.Consumer = "mail"
		}
		r.ID = dlq.ID(r.Stream, r.StreamCreated, r.Consumer, r.StreamSequence)
		records = append(records, r)
	}
	return b.capture(records...)
}

// listed are the IDs that a command with --output json prints.
func (b *bundle) listed(args ...string) []string {
	b.t.Helper()
	out, _ := b.ok(append(args, "--output", "json")...)
	var views []entryView
	if err := json.Unmarshal([]byte(out), &views); err != nil {
		b.t.Fatalf("%v\n%s", err, out)
	}
	var ids []string
	for _, v := range views {
		ids = append(ids, v.ID)
	}
	return ids
}

// states are the states of all dead letters.
func (b *bundle) states() map[string]dlq.State {
	b.t.Helper()
	out, _ := b.ok("dlq", "ls", "--state", "all", "--output", "json")
	var views []entryView
	if err := json.Unmarshal([]byte(out), &views); err != nil {
		b.t.Fatal(err)
	}
	states := make(map[string]dlq.State)
	for _, v := range views {
		states[v.ID] = v.State
	}
	return states
}

// Flags narrow a selection, and none of them is dropped silently.
//
// Before, the last --where and the last --group counted alone.
func TestSelection_narrows(t *testing.T) {
	t.Parallel()
	b := setup(t)
	ids := b.mixed()
	var groups []groupView
	out, _ := b.ok("dlq", "groups", "--where", `consumer == "mail"`, "--output", "json")
	if err := json.Unmarshal([]byte(out), &groups); err != nil || len(groups) != 3 {
		t.Fatalf("groups %s, %v", out, err)
	}
	first, second := groups[0], groups[1]
	for _, tt := range []struct {
		name string
		args []string
		want int
	}{
		{"none", nil, 12},
		{"one condition", []string{"--where", `error.contains("ledger")`}, 8},
		{"two conditions", []string{"--where", `error.contains("ledger")`, "--where", `error.contains("address")`}, 4},
		{"that exclude each other", []string{"-w", `error.contains("closed")`, "--where", `error.contains("address")`}, 0},
		{"three", []string{"-w", `error.contains("ledger")`, "-w", `error.contains("address")`, "-w", `consumer == "mail"`}, 2},
		{"with a comment", []string{"-w", `error.contains("ledger") // all of them`, "-w", `consumer == "mail" // or so`}, 4},
		{"with an or", []string{"-w", `consumer == "mail" || consumer == "billing"`, "-w", `error.contains("closed") || error.contains("unknown")`}, 8},
		{"the same twice", []string{"-w", `consumer == "mail"`, "-w", `consumer == "mail"`}, 6},
		{"one that cannot be told", []string{"-w", `payload.nope == 1`, "-w", `consumer == "mail"`}, 0},
		{"one group", []string{"--group", first.Group}, first.Count},
		{"two groups", []string{"--group", first.Group, "-g", second.Group}, first.Count + second.Count},
		{"a group twice", []string{"--group", first.Group, "--group", first.Group}, first.Count},
		{"a group by its beginning", []string{"--group", first.Group[:8], "--group", first.Group}, first.Count},
		{"groups and a condition", []string{"-g", first.Group, "-g", second.Group, "-w", `consumer == "billing"`}, 0},
		{"an ID", []string{"--id", ids[0]}, 1},
		{"an ID twice", []string{"--id", ids[0], "--id", ids[0]}, 1},
		{"an ID and its beginning", []string{"--id", ids[0][:10], "--id", ids[0]}, 1},
		{"IDs and a condition", []string{"--id", ids[0], "--id", ids[1], "-w", `consumer == "mail"`}, 1},
		{"IDs and a group of others", []string{"--id", ids[0], "-g", first.Group}, 0},
		{"a state of none", []string{"--state", "archived"}, 0},
		{"two states", []string{"--state", "archived", "--state", "open"}, 12},
		{"all states", []string{"--state", "archived", "--state", "all"}, 12},
		{"a limit", []string{"--limit", "5"}, 5},
		{"IDs and a limit", []string{"--id", ids[0], "--id", ids[5], "--id", ids[3], "--limit", "2"}, 2},
		{"a condition and a limit", []string{"-w", `consumer == "mail"`, "--limit", "5"}, 5},
	} {
		got := b.listed(append([]string{"dlq", "ls"}, tt.args...)...)
		if len(got) != tt.want {
			t.Errorf("%s: %q selects %d, want %d", tt.name, tt.args, len(got), tt.want)
		}
		out, _ := b.ok(append([]string{"dlq", "groups", "--output", "json"}, tt.args...)...)
		var in []groupView
		if err := json.Unmarshal([]byte(out), &in); err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, g := range in {
			n += g.Count
		}
		if n != tt.want {
			t.Errorf("%s: groups of %d, want %d", tt.name, n, tt.want)
		}
	}
	if got := b.listed("dlq", "ls", "--id", ids[0], "--id", ids[5], "--id", ids[3], "--limit", "2"); !slices.Equal(got, []string{ids[5], ids[3]}) {
		t.Errorf("the limit takes %q, want the newest", got)
	}
	b.fails(exitUsage, []string{"group", "not found"}, "dlq", "discard", "--group", first.Group, "--group", "nope", "--yes")
}

// A limit holds, and two names of one dead letter are one, whatever is done.
//
// Before, IDs went past the limit, and were counted as often as they were named.
func TestSelection_everyCommand(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		command []string
		state   dlq.State // that it makes
	}{
		{[]string{"archive"}, dlq.StateArchived},
		{[]string{"discard"}, dlq.StateDiscarded},
		{[]string{"replay", "--no-wait"}, dlq.StateReplaying},
		{[]string{"edit", "--patch", "-"}, ""},
		{[]string{"export"}, ""},
	} {
		t.Run(tt.command[0], func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			b.billing(nil)
			ids := b.captureMany(6)
			args := append([]string{"dlq"}, tt.command...)
			for _, id := range []string{ids[0], ids[1][:12], ids[1], ids[1], ids[4]} {
				args = append(args, "--id", id)
			}
			args = append(args, "--limit", "2")
			switch tt.command[0] {
			case "export":
				out, _ := b.ok(args...)
				if n := strings.Count(out, "\n") - 2; n != 2 { // with a head and an end
					t.Errorf("%d exported, want 2:\n%s", n, out)
				}
				return
			case "edit":
				b.in = `{"z":2}`
			}
			b.ok(append(args, "--yes")...)
			want := map[string]dlq.State{ids[1]: tt.state, ids[4]: tt.state} // the newest two
			if tt.state == "" {
				got := b.listed("dlq", "ls", "--where", "revision == 1")
				slices.Sort(got)
				if !slices.Equal(got, slices.Sorted(maps.Keys(want))) {
					t.Errorf("changed %q, want %q", got, slices.Sorted(maps.Keys(want)))
				}
				return
			}
			for id, state := range b.states() {
				if got := cmp.Or(want[id], dlq.StateOpen); state != got {
					t.Errorf("dead letter %s is %s, want %s", id, state, got)
				}
			}
		})
	}
}

// What changes nothing. All other commands are refused when nothing may be changed.
var readingCommands = []string{
	"groups", "ls", "show", "stats", "tail", "export", "doctor", "ops", "ops ls", "ops show", "",
}

// Every command of the tree either only reads, or is refused before it connects.
func TestReadOnly(t *testing.T) {
	t.Parallel()
	root := (&cli{process: bare(t).process(nil, nil)}).root()
	i := slices.IndexFunc(root.Commands(), func(c *cobra.Command) bool { return c.Name() == "dlq" })
	arguments := map[string][]string{
		"capture": {"S", "c"}, "import": {"-"}, "ops resume": {"x"}, "ops pause": {"x"}, "ops cancel": {"x"}, "edit": {"x"},
	}
	refused := 0
	for _, cmd := range commands(root.Commands()[i]) {
		name := strings.TrimPrefix(strings.TrimPrefix(cmd.CommandPath(), "monotel dlq"), " ")
		if slices.Contains(readingCommands, name) {
			continue
		}
		refused++
		args := append([]string{"dlq"}, strings.Fields(name)...)
		args = append(args, arguments[name]...)
		if arguments[name] == nil {
			args = append(args, "x")
		}
		if cmd.Flags().Lookup("yes") != nil {
			args = append(args, "--yes")
		}
		for how, value := range map[string]string{"--read-only": "", "1": "1", "true": "true"} {
			b := bare(t)
			b.env["NATS_URL"], b.env["MONOTEL_READ_ONLY"] = nowhere(t), value
			flag := how
			if value != "" {
				flag = "--read-only=false" // the environment is stronger
			}
			b.fails(exitUsage, []string{"nothing may be changed"}, append(slices.Clone(args), flag)...)
		}
	}
	if refused < 10 { //nolint:mnd // as many as there are
		t.Errorf("%d commands were looked at", refused)
	}
	b := bare(t)
	b.env["MONOTEL_READ_ONLY"] = "perhaps"
	b.fails(exitUsage, []string{`MONOTEL_READ_ONLY="perhaps"`}, "dlq", "ls")
}

// What only reads works when nothing may be changed, and changes nothing.
func TestReadOnly_reads(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.billing(nil)
	ids := b.captureMany(3)
	out, _ := b.ok("dlq", "replay", "--all", "--dry-run", "--output", "json")
	var p planView
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		t.Fatal(err)
	}
	b.env["MONOTEL_READ_ONLY"] = "1"
	b.unchanged(func() {
		for _, line := range []string{
			"groups", "ls", "show " + ids[0], "stats", "export", "ops", "ops show " + p.Plan, "replay --all --dry-run", "replay " + ids[0] + " --dry-run --output json",
			"discard --all --dry-run", "archive --all --dry-run", "edit " + ids[0] + " --header a:b --dry-run",
		} {
			b.ok(append([]string{"dlq"}, strings.Fields(line)...)...)
		}
		out, _ := b.ok("dlq", "replay", "--all", "--dry-run")
		if strings.Contains(out, "--plan") || !strings.Contains(out, "not stored") {
			t.Errorf("the dry run says\n%s", out)
		}
	})
}

// Who may only read can look at what a replay would do.
func TestReplay_dryRunByReader(t *testing.T) {
	t.Parallel()
	admin, guest := permitted(t, "$KV.>", "$JS.API.STREAM.CREATE.>", "$JS.API.STREAM.UPDATE.>", "monotel.dlq.>")
	nc, err := nats.Connect(admin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	b := bare(t)
	b.js, b.store = openStore(t, nc)
	b.billing(never)
	b.captureMany(3)
	b.env["NATS_URL"] = guest
	b.unchanged(func() {
		out, _ := b.ok("dlq", "replay", "--all", "--dry-run")
		if !strings.Contains(out, "3 dead letters") || !strings.Contains(out, "not stored") {
			t.Errorf("the dry run says\n%s", out)
		}
	})
}

// randomFlags are a selection, often one that makes no sense.
func randomFlags(random *rand.Rand, ids []string) []string {
	var flags []string
	some := func(name string, most int, pool ...string) {
		for range random.IntN(most + 1) {
			flags = append(flags, name, pool[random.IntN(len(pool))])
		}
	}
	if random.IntN(2) == 0 {
		some("--where", 3, "true", `stream_sequence > 10`, `stream_sequence % 2 == 0`, `error.contains("1")`, `payload.order < 20`, `state != "archived"`)
	}
	if random.IntN(2) == 0 {
		for range 1 + random.IntN(6) {
			id := ids[random.IntN(len(ids))]
			if random.IntN(3) == 0 {
				id = id[:12]
			}
			flags = append(flags, "--id", id)
		}
	}
	if random.IntN(3) == 0 {
		some("--state", 2, "open", "archived", "all")
	}
	if random.IntN(2) == 0 {
		flags = append(flags, "--limit", strconv.Itoa(1+random.IntN(8)))
	}
	if !slices.Contains(flags, "--where") && !slices.Contains(flags, "--id") {
		flags = append(flags, "--all")
	}
	return flags
}

// dryRun returns the IDs that a command would change.
func (b *bundle) dryRun(line []string) []string {
	b.t.Helper()
	if line[1] != "replay" {
		return b.listed(append(slices.Clone(line), "--dry-run")...)
	}
	out, _ := b.ok(append(slices.Clone(line), "--dry-run", "--output", "json")...)
	var p planView
	if err := json.Unmarshal([]byte(out), &p); err != nil {
		b.t.Fatal(err)
	}
	if p.Selected == 0 {
		return nil
	}
	out, _ = b.ok("dlq", "ops", "show", p.Plan, "--remaining")
	return strings.Fields(out)
}

// changedFor returns the IDs of the dead letters that were changed for a reason.
func (b *bundle) changedFor(desk *triage.Desk, ids []string, reason string) []string {
	b.t.Helper()
	ops, err := desk.Operations(b.t.Context())
	if err != nil {
		b.t.Fatal(err)
	}
	ours := make(map[string]bool)
	for _, o := range ops {
		ours[o.ID] = o.Options.Reason == reason
	}
	var changed []string
	for _, id := range ids {
		e, err := desk.Get(b.t.Context(), id)
		if err != nil {
			b.t.Fatal(err)
		}
		if slices.ContainsFunc(e.History, func(c *dlq.Change) bool { return c.Reason == reason || ours[c.Operation] }) {
			changed = append(changed, id)
		}
	}
	return changed
}

// Whatever the flags, a command changes what its dry run has shown and nothing else, also
// while others change the same dead letters.
func TestDryRun_showsAll(t *testing.T) {
	t.Parallel()
	for seed := range uint64(4) {
		t.Run(strconv.FormatUint(seed, 10), func(t *testing.T) {
			t.Parallel()
			random := rand.New(rand.NewPCG(seed, 17))
			b := setup(t)
			b.billing(nil)
			ids := b.captureMany(30)
			desk, err := triage.Open(t.Context(), b.nc, triage.Config{})
			if err != nil {
				t.Fatal(err)
			}
			for round := range 12 {
				command := []string{"archive", "discard", "restore", "replay"}[random.IntN(4)]
				line := append([]string{"dlq", command}, randomFlags(random, ids)...)
				shown := b.dryRun(line)
				reason := fmt.Sprintf("round %d", round)
				var others sync.WaitGroup
				if round%2 == 1 {
					for _, i := range random.Perm(len(ids))[:8] {
						others.Go(func() { b.run("dlq", "edit", ids[i], "--header", "Round: "+reason, "--yes", "--reason", "another") })
					}
				}
				done := append(slices.Clone(line), "--yes", "--reason", reason)
				if command == "replay" {
					done = append(done, "--no-wait")
				}
				code, out, errs := b.run(done...)
				others.Wait()
				if code == exitUsage {
					t.Fatalf("%q: %s%s", done, out, errs)
				}
				changed := b.changedFor(desk, ids, reason)
				for _, id := range changed {
					if !slices.Contains(shown, id) {
						t.Errorf("%q has changed %s, and its dry run has shown %q", line, id, shown)
					}
				}
				if command == "replay" && round%2 == 0 && len(changed) != len(shown) {
					t.Errorf("%q has sent %d, and its dry run has shown %d", line, len(changed), len(shown))
				}
			}
		})
	}
}
