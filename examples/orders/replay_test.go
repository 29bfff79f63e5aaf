package main

import (
	"context"
	"regexp"
	"strings"
	"testing"

	"github.com/monotel/monotel/dlq/triage"
)

// What the repaired ledger had not answered is handled when it is replayed; what is
// wrong with the orders themselves stays wrong.
func TestRun_openReplay(t *testing.T) {
	t.Parallel()
	s := open(t, "-open", "-for", "1s", "-rate", "20")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	desk, err := triage.Open(ctx, connect(t, s.url(t).String()), triage.Config{Actor: "ann"})
	if err != nil {
		t.Fatal(err)
	}
	plan, err := desk.Plan(ctx, triage.Selection{}, triage.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if len(plan.Problems) > 0 {
		t.Fatalf("the plan has problems: %v", plan.Problems)
	}
	op, err := desk.Run(ctx, plan.ID, nil)
	if err != nil {
		t.Fatal(err)
	}
	s.stop(t)

	sum := readSummary(t, s.out.String())
	if op.Resolved == 0 || op.Resolved != sum["gave up"] || op.Resolved != sum["resolved"] {
		t.Errorf("%d are resolved, %d were given up, the summary has %d", op.Resolved, sum["gave up"], sum["resolved"])
	}
	if n := sum["rejected"] + sum["not decodable"]; op.FailedAgain != n || op.FailedAgain != sum["failed again"] {
		t.Errorf("%d failed again, want %d; the summary has %d", op.FailedAgain, n, sum["failed again"])
	}
	for _, row := range []string{"found", "handled elsewhere", "still waiting"} {
		if sum[row] > 0 {
			t.Errorf("the summary has %d for %q", sum[row], row)
		}
	}
	for row, line := range map[string]string{"resolved": ` resolved  +by a replay`, "failed again": ` failed again  +in a replay: `} {
		if n := len(regexp.MustCompile(`(?m)^ +[0-9.]+s .*`+line).FindAllString(s.out.String(), -1)); n != sum[row] {
			t.Errorf("the summary has %d for %q, %d lines say so", sum[row], row, n)
		}
	}
	if !strings.Contains(s.out.String(), "failed again       in a replay: ivan has no account") {
		t.Error("no line says that the account is still missing")
	}
	if t.Failed() {
		t.Log(s.out)
	}
}
