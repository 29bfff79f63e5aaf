package main

import (
	"encoding/json"
	"io"
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func TestMeanInterval(t *testing.T) {
	t.Parallel()
	mean, half := meanInterval([]float64{1, 2, 3, 4, 5})
	if math.Abs(mean-3) > 1e-9 || math.Abs(half-1.963) > 1e-3 { // 2.776 * sqrt(2.5/5)
		t.Errorf("mean %v ± %v, want 3 ± 1.963", mean, half)
	}
	for degrees, want := range map[int]float64{1: 12.706, 9: 2.262, 20: 2.086, 30: 2.042, 60: 2.000, 1000: 1.962} {
		if got := student(degrees); math.Abs(got-want) > 5e-3 {
			t.Errorf("t of %d degrees is %v, want %v", degrees, got, want)
		}
	}
}

func TestJudge(t *testing.T) {
	t.Parallel()
	ones := []float64{1, 1, 1, 1, 1, 1, 1, 1, 1, 1}
	times := func(factor, noise float64) []float64 {
		vs := make([]float64, len(ones))
		for i := range vs {
			vs[i] = factor * (1 + noise*float64(2*(i%2)-1))
		}
		return vs
	}
	consume := cell{work: "ConsumeAck", transport: loopback, size: smallSize, lib: monotelOff}
	replay := cell{work: workReplay, transport: inProcess, size: smallSize, lib: monotelOff}
	idle := cell{work: "Registrations", transport: loopback, size: smallSize, lib: monotelOff}
	live := cell{work: workLive, transport: inProcess, size: minSize, lib: monotelOff}
	for _, tt := range []struct {
		name       string
		cell       cell
		unit       string
		bases, now []float64
		want       verdict
	}{
		{"the same", consume, unitProcessor, ones, ones, passed},
		{"within the margin", consume, unitProcessor, ones, times(1.02, 0.001), passed},
		{"beyond the margin", consume, unitProcessor, ones, times(1.05, 0.01), failing},
		{"perhaps beyond the margin", consume, unitTime, ones, times(1.05, 0.1), passed},
		{"faster", consume, unitTime, ones, times(0.5, 0.01), passed},
		{"more memory", idle, unitMemory, ones, times(1.05, 0.01), failing},
		{"an allocation more", consume, unitAllocs, times(5, 0), times(6, 0), failing},
		{"an allocation more in one round", consume, unitAllocs, times(5, 0), append(times(6, 0)[1:], 5), passed},
		{"an allocation less", consume, unitAllocs, times(5, 0), times(4, 0), passed},
		{"a goroutine more", idle, unitGoroutines, times(3.011, 0), times(4.011, 0), failing},
		{"allocations of a replay", replay, unitAllocs, times(500, 0.01), times(501, 0.01), passed},
		{"more allocations of a replay", replay, unitAllocs, times(500, 0.01), times(530, 0.01), failing},
		{"live as before", live, unitLive, nil, times(0.97, 0.05), passed},
		{"live much slower", live, unitLive, nil, times(0.9, 0.05), failing},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			rep := judge([]cell{tt.cell}, samples{{tt.cell.String(), tt.unit}: {tt.bases, tt.now}})
			if len(rep.Figures) != 1 || rep.Figures[0].Verdict != tt.want {
				t.Errorf("judged %+v, want %s", rep.Figures, tt.want)
			}
			if d := rep.doubtful([]cell{tt.cell}); tt.want == failing && rep.Figures[0].Ratio != 0 && tt.cell.work != workLive {
				if len(d) != 1 {
					t.Error("it is not measured again")
				}
				same := judge(d, samples{{tt.cell.String(), tt.unit}: {tt.bases, tt.now}})
				rep.confirm(same)
				if rep.Figures[0].Verdict != failing {
					t.Errorf("confirmed, it is %s", rep.Figures[0].Verdict)
				}
				other := judge([]cell{tt.cell}, samples{{tt.cell.String(), tt.unit}: {tt.bases, tt.now}})
				other.confirm(judge(d, samples{{tt.cell.String(), tt.unit}: {ones, ones}}))
				if len(other.failed()) > 0 {
					t.Errorf("not confirmed, it fails: %+v", other.Figures)
				}
			} else if len(d) > 0 {
				t.Error("it is measured again")
			}
			if failed := rep.failed(); (len(failed) > 0) != (tt.want == failing) {
				t.Errorf("failed: %q", failed)
			}
			if table := rep.table(); !strings.Contains(table, tt.unit) || !strings.Contains(table, string(tt.want)) {
				t.Errorf("the table lacks the figure:\n%s", table)
			}
		})
	}
}

// The command compares this tree with its own commit, in a worktree that is gone
// afterwards.
func TestRegress(t *testing.T) {
	t.Parallel()
	if err := exec.CommandContext(t.Context(), "git", "rev-parse", "--verify", "HEAD").Run(); err != nil {
		t.Skipf("SKIPPED, the comparison is not tested: this is no git repository: %v", err)
	}
	g := regression{
		base: "HEAD", work: "^(CorePublish|Replay|LiveAfter)", rounds: 2, quick: true, json: filepath.Join(t.TempDir(), "figures.json"),
	}
	var table strings.Builder
	if err := g.run(t.Context(), &table, t.Logf); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(g.json)
	if err != nil {
		t.Fatal(err)
	}
	var rep regressReport
	if err := json.Unmarshal(data, &rep); err != nil {
		t.Fatal(err)
	}
	const figures = 2*3 + 3 + 2 // core publish off and 1 %, replay, live
	if len(rep.Figures) != figures || len(rep.Dependencies) > 0 {
		t.Errorf("%d figures, want %d:\n%s", len(rep.Figures), figures, table.String())
	}
	for _, f := range rep.Figures {
		c, err := parseCell(f.Cell)
		if err != nil {
			t.Fatal(err)
		}
		if len(f.News) != g.rounds*c.pairs() || f.New <= 0 {
			t.Errorf("not measured in each round: %+v", f)
		}
	}
	left, err := exec.CommandContext(t.Context(), "git", "worktree", "list").Output()
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(left), "monotel-regress-") && !strings.Contains(string(left), "prunable") {
		t.Logf("other comparisons are running, or one has left its worktree:\n%s", left)
	}
}

func TestRegress_refuses(t *testing.T) {
	t.Parallel()
	for name, g := range map[string]regression{
		"too few rounds":      {base: "HEAD", rounds: 1},
		"no regular exp":      {base: "HEAD", rounds: 2, work: "("},
		"nothing to measure":  {base: "HEAD", rounds: 2, work: "^None"},
		"no such commit":      {base: "no-such-commit", rounds: 2},
		"an option for a rev": {base: "--all", rounds: 2},
	} {
		if err := g.run(t.Context(), io.Discard, t.Logf); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// The cells are measured by the command, so their names have to be read back.
func TestRegressCells(t *testing.T) {
	t.Parallel()
	for _, c := range regressCells() {
		if got, err := parseCell(c.String()); err != nil || got.String() != c.String() {
			t.Errorf("%s became %s, %v", c, got, err)
		}
	}
}
