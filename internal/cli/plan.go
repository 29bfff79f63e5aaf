package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// dryRun prints a plan, and stores it if it can be run, so that the plan can be executed
// exactly. Where nothing may be changed it is only printed.
func (c *cli) dryRun(ctx context.Context, desk *triage.Desk, p *triage.Plan, diffs bool) error {
	runs := p.Selected > 0 && len(p.Problems) == 0
	command := ""
	if runs && !c.readOnly {
		err := desk.StorePlan(ctx, p)
		if err != nil && !errors.Is(context.Cause(ctx), errRefused) {
			return err
		}
		if err == nil {
			command = c.commandLine("dlq", "replay", "--plan", p.ID)
		}
	}
	if err := c.printDryRun(p, command, diffs); err != nil {
		return err
	}
	if p.Selected > 0 && len(p.Problems) > 0 {
		return errors.New("it cannot be run like this: " + strings.Join(p.Problems, "; "))
	}
	return nil
}

// printDryRun prints a plan and the command that executes it, "" if it is not stored.
func (c *cli) printDryRun(p *triage.Plan, command string, diffs bool) error {
	if c.output != outputTable {
		v := viewPlan(p, diffs)
		v.Command = command
		return c.writeJSON(v)
	}
	if err := c.printPlan(c.out, p, diffs); err != nil {
		return err
	}
	switch {
	case p.Selected == 0 || len(p.Problems) > 0:
	case command == "":
		fmt.Fprintln(c.out, "\nNothing was sent. The plan is not stored: that needs the permission to write, and no --read-only.")
	default:
		fmt.Fprintf(c.out, "\nNothing was sent. To execute this, exactly:\n\n  %s\n", safe.Line(command))
	}
	return nil
}

// printPlan says what a replay would do.
func (c *cli) printPlan(w io.Writer, p *triage.Plan, diffs bool) error {
	if p.Selected == 0 {
		fmt.Fprintln(w, "There is nothing to replay.")
		c.printLeftOut(w, "left out", p.LeftOut)
		return nil
	}
	t := c.table(w, "PLAN "+p.ID, "")
	_ = t.row(plain("what"), plain(plural(p.Selected, "dead letter")+", "+size(p.Bytes)))
	_ = t.row(plain("to"), plain(strings.TrimPrefix(destination(p), "to ")))
	_ = t.row(plain("query"), plain(cmp.Or(p.Query, "-")))
	_ = t.row(plain("oldest"), plain(c.when(p.Oldest)))
	_ = t.row(plain("newest"), plain(c.when(p.Newest)))
	_ = t.row(plain("rate"), plain(pace(p)))
	for _, f := range []struct{ name, value string }{
		{"canary", strings.Trim(strings.ReplaceAll(fmt.Sprint(p.Options.Canary), " ", ", "), "[]")},
		{"stops", stops(p.Options.StopIfFailing)},
		{"patch", map[bool]string{true: "every payload is changed by a JSON merge patch"}[len(p.Options.Patch) > 0]},
		{"force", map[bool]string{true: "also what is being replayed, or was too often: it may be handled twice"}[p.Options.Force]},
		{"reason", p.Options.Reason},
	} {
		if f.value != "" {
			_ = t.row(plain(f.name), plain(f.value))
		}
	}
	if err := t.flush(); err != nil {
		return err
	}
	if err := c.printConsumers(w, p.Consumers); err != nil {
		return err
	}
	if err := c.printGroups(w, p.Groups); err != nil {
		return err
	}
	if err := c.printSamples(w, p.Samples); err != nil {
		return err
	}
	if diffs {
		for _, d := range p.Diffs {
			fmt.Fprintf(w, "\n%s", c.diff(w, d.ID, []byte(d.Before), []byte(d.After)))
		}
	}
	c.printLeftOut(w, "left out", p.LeftOut)
	for _, s := range p.Warnings {
		fmt.Fprintf(w, "\n%s %s", c.paint(w, styleWarn, "warning:"), safe.Line(s))
	}
	for _, s := range p.Problems {
		fmt.Fprintf(w, "\n%s %s", c.paint(w, styleBad, "problem:"), safe.Line(s))
	}
	if len(p.Warnings)+len(p.Problems) > 0 {
		fmt.Fprintln(w)
	}
	return nil
}

func (c *cli) printGroups(w io.Writer, groups []triage.Group) error {
	if len(groups) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := c.table(w, "GROUP", "COUNT", "LAST", "CONSUMER", "ERROR")
	for _, g := range groups {
		_ = t.row(plain(g.ID), number(g.Count), plain(c.age(g.Last)), plain(g.Stream+"/"+g.Consumer), plain(g.Title))
	}
	return t.flush()
}

func (c *cli) printSamples(w io.Writer, samples []*dlq.Entry) error {
	if len(samples) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	t := c.table(w, "SAMPLE", "FAILED", "ERROR")
	for _, e := range samples {
		_ = t.row(plain(e.ID), plain(c.age(latest(e).Failed)), plain(firstLine(latest(e))))
	}
	return t.flush()
}

func (c *cli) printConsumers(w io.Writer, consumers []triage.PlanConsumer) error {
	fmt.Fprintln(w)
	t := c.table(w, "STREAM", "CONSUMER", "COUNT", "FETCHING", "WAITING BEFORE")
	for _, k := range consumers {
		fetching := count(k.Waiting)
		if k.Paused {
			fetching = "paused"
		}
		_ = t.row(plain(k.Stream), plain(k.Consumer), number(k.Count), plain(fetching), number(k.Pending))
	}
	return t.flush()
}

func pace(p *triage.Plan) string {
	text := "no limit"
	if r := p.Options.Rate; r > 0 {
		text = fmt.Sprintf("%.4g a second, for %s", r, span(p.Duration))
	}
	if n := p.Options.MaxInFlight; n > 0 {
		text += fmt.Sprintf(", at most %s in flight", count(n))
	}
	return text
}

func stops(part float64) string {
	if part <= 0 {
		return ""
	}
	return fmt.Sprintf("when more than %.4g%% failed again", 100*part)
}

func (c *cli) printLeftOut(w io.Writer, name string, counts map[string]int) {
	for _, why := range byCount(counts) {
		fmt.Fprintf(w, "\n%s %s: %s", name, count(counts[why]), safe.Line(why))
	}
	if len(counts) > 0 {
		fmt.Fprintln(w)
	}
}

type planView struct {
	Plan            string         `json:"plan"`
	CreatedAt       time.Time      `json:"created_at,omitzero"`
	By              string         `json:"by"`
	Target          string         `json:"target"`
	Rate            float64        `json:"rate"` // a second, 0 without limit
	MaxInFlight     int            `json:"max_in_flight"`
	Canary          []int          `json:"canary"`
	StopIfFailing   float64        `json:"stop_if_failing"`
	Patched         bool           `json:"patched"`
	Reason          string         `json:"reason,omitempty"`
	MaxReplays      int            `json:"max_replays"`
	Force           bool           `json:"force"`
	Query           string         `json:"query,omitempty"`
	Group           string         `json:"group,omitempty"`
	Upto            uint64         `json:"upto"`
	Selected        int            `json:"selected"`
	Bytes           int64          `json:"bytes"`
	OldestAt        time.Time      `json:"oldest_at,omitzero"`
	NewestAt        time.Time      `json:"newest_at,omitzero"`
	DurationSeconds float64        `json:"duration_seconds"`
	Groups          []groupView    `json:"groups"`
	Consumers       []consumerView `json:"consumers"`
	LeftOut         map[string]int `json:"left_out"`
	Warnings        []string       `json:"warnings"`
	Problems        []string       `json:"problems"`
	Samples         []sampleView   `json:"samples"`
	Diffs           []diffView     `json:"diffs,omitempty"` // parts of payloads
	Command         string         `json:"command,omitempty"`
}

type consumerView struct {
	Stream   string `json:"stream"`
	Consumer string `json:"consumer"`
	Count    int    `json:"count"`
	Paused   bool   `json:"paused"`
	Waiting  int    `json:"waiting"`
	Pending  uint64 `json:"pending"`
}

type sampleView struct {
	ID       string    `json:"id"`
	FailedAt time.Time `json:"failed_at,omitzero"`
	Error    string    `json:"error"`
}

type diffView struct {
	ID     string `json:"id"`
	Before string `json:"before"`
	After  string `json:"after"`
}

func viewPlan(p *triage.Plan, diffs bool) planView {
	o := &p.Options
	v := planView{
		Plan: p.ID, CreatedAt: p.Created, By: p.Actor, Target: o.Target, Rate: o.Rate, MaxInFlight: o.MaxInFlight,
		Canary:        orEmpty(o.Canary),
		StopIfFailing: max(o.StopIfFailing, 0), Patched: len(o.Patch) > 0, Reason: o.Reason, MaxReplays: o.MaxReplays, Force: o.Force,
		Query: p.Query, Group: p.Group, Upto: p.Upto, Selected: p.Selected, Bytes: p.Bytes, OldestAt: p.Oldest, NewestAt: p.Newest,
		DurationSeconds: p.Duration.Seconds(), Groups: []groupView{}, Consumers: []consumerView{}, LeftOut: orEmptyMap(p.LeftOut),
		Warnings: orEmpty(p.Warnings), Problems: orEmpty(p.Problems), Samples: []sampleView{},
	}
	for _, g := range p.Groups {
		v.Groups = append(v.Groups, viewGroup(g))
	}
	for _, k := range p.Consumers {
		v.Consumers = append(v.Consumers, consumerView(k))
	}
	for _, e := range p.Samples {
		v.Samples = append(v.Samples, sampleView{ID: e.ID, FailedAt: latest(e).Failed, Error: latest(e).Error})
	}
	if diffs {
		for _, d := range p.Diffs {
			v.Diffs = append(v.Diffs, diffView(d))
		}
	}
	return v
}
