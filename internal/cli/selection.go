package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

// A selection is what the flags say about which dead letters are meant.
type selection struct {
	where, groups, ids, states []string
	limit                      int
	all                        bool

	explicit bool        // one of --where, --group, --id and --all must be given
	usual    []dlq.State // those that are meant without --state and IDs; the default is open
}

const selectionHelp = `Which dead letters: those that meet all of --where, --group, --id and --state.
The default is the %s ones. --where is a condition in CEL, such as

  consumer == "billing" && error.contains("timeout") && age < duration("2h")
  payload.amount > 100 && reason != "undecodable"

Repeated: all conditions of --where must be true, and one of the groups, IDs and
states is enough. --id - reads IDs from the standard input, one on each line. The
first characters of an ID are enough if no other dead letter has them. --limit N
takes the newest N of all these.`

const allStates = "all"

// register adds the flags. A command that changes something has to be told what:
// then explicit is true.
func (s *selection) register(cmd *cobra.Command, c *cli, explicit bool) {
	s.explicit = explicit
	f := cmd.Flags()
	f.StringArrayVarP(&s.where, "where", "w", nil, "condition in `CEL`; repeated, all must be true")
	f.StringArrayVarP(&s.groups, "group", "g", nil, "with this `ID` of their group, see 'monotel dlq groups'; repeated, one is enough")
	f.StringArrayVar(&s.ids, "id", nil, "with this `ID`; can be repeated; - reads them from standard input")
	f.StringArrayVar(&s.states, "state", nil, "in this `STATE`, or in all; can be repeated")
	f.IntVar(&s.limit, "limit", 0, "no more than `N`, the newest (default: all)")
	if explicit {
		f.BoolVar(&s.all, "all", false, "all in that state, without --where, --group or --id")
	}
	usual := dlq.StateOpen
	if len(s.usual) > 0 {
		usual = s.usual[0]
	}
	cmd.Long += "\n\n" + fmt.Sprintf(selectionHelp, usual)
	c.complete(cmd, "id", c.deadLetterIDs)
	c.complete(cmd, "group", c.groupIDs)
	c.complete(cmd, "where", func(context.Context, string) []string {
		reasons := dlq.Reasons()
		words := make([]string, 0, len(reasons)+3)
		for _, r := range reasons {
			words = append(words, fmt.Sprintf("reason==%q", string(r)))
		}
		return append(words, `age<duration("2h")`, `consumer=="`, `error.contains("`)
	})
	c.complete(cmd, "state", func(context.Context, string) []string {
		states := dlq.States()
		names := make([]string, 0, len(states)+1)
		for _, s := range states {
			names = append(names, string(s))
		}
		return append(names, allStates)
	})
	c.complete(cmd, "limit", nil)
}

// given reports whether the user said which.
func (s *selection) given(args []string) bool {
	return len(s.where)+len(s.groups)+len(s.ids)+len(args) > 0
}

// check finds what can be found without reading anything. args are further IDs.
func (s *selection) check(args []string) error {
	// An empty value is a variable of a script that is not set. Without it, more would
	// be selected.
	for _, f := range []struct {
		name   string
		values []string
	}{{"--where", s.where}, {"--group", s.groups}, {"--id", s.ids}, {"--state", s.states}, {"ID", args}} {
		if slices.ContainsFunc(f.values, func(v string) bool { return strings.TrimSpace(v) == "" }) {
			return usagef("%s is empty: leave it out, or give it a value", f.name)
		}
	}
	given := s.given(args)
	switch {
	case s.all && given:
		return usagef("--all is for all: leave out --where, --group and IDs, or --all")
	case s.explicit && !s.all && !given:
		return usagef("say which: by ID, or with --where, --group or --all; 'monotel dlq groups' and 'ls' show what there is")
	case s.limit < 0:
		return usagef("--limit %d: want 0 for all, or more", s.limit)
	}
	return nil
}

// parse checks the flags, and reads IDs. args are further ones.
func (s *selection) parse(c *cli, args []string) (sel triage.Selection, err error) {
	if err := s.check(args); err != nil {
		return sel, err
	}
	if sel.IDs, err = s.readIDs(c, args); err != nil {
		return sel, err
	}
	if sel.Where, err = compileAll(s.where); err != nil {
		return sel, usagef("--where: %w", err)
	}
	sel.Groups, sel.Limit = slices.Clone(s.groups), s.limit
	for _, name := range s.states {
		if name == allStates {
			sel.States = dlq.States()
			break
		}
		state, err := dlq.ParseState(name)
		if err != nil {
			return sel, usagef("--state: %w, or all", err)
		}
		sel.States = append(sel.States, state)
	}
	if len(sel.States) == 0 && len(sel.IDs) == 0 {
		sel.States = s.usual
	}
	return sel, nil
}

// compileAll makes one query of conditions that must all be true, nil of none.
func compileAll(texts []string) (*triage.Query, error) {
	if len(texts) == 0 {
		return nil, nil //nolint:nilnil // there need not be one
	}
	q, err := triage.Compile(texts[0])
	if err != nil || len(texts) == 1 {
		return q, err
	}
	for _, text := range texts[1:] { // each by itself: an error shows where it is
		if _, err := triage.Compile(text); err != nil {
			return nil, err
		}
	}
	return triage.Compile("(" + strings.Join(texts, "\n) && (") + "\n)") // a text may end with a comment
}

// whichState says of which state none was found, unless the user has named one.
func (s *selection) whichState() string {
	if len(s.states) > 0 || len(s.ids) > 0 {
		return ""
	}
	return "; only those that are open were looked for, --state all is for the others, too"
}

func (s *selection) readIDs(c *cli, args []string) ([]string, error) {
	var ids []string
	seen := make(map[string]bool)
	add := func(id string) {
		if id = strings.TrimSpace(id); id != "" && !seen[id] {
			seen[id] = true
			ids = append(ids, id)
		}
	}
	stdin := false
	for _, id := range slices.Concat(s.ids, args) {
		if id != "-" {
			add(id)
			continue
		}
		stdin = true
		lines := bufio.NewScanner(c.in)
		for lines.Scan() {
			add(lines.Text())
		}
		if err := lines.Err(); err != nil {
			return nil, usagef("read IDs from the standard input: %w", err)
		}
	}
	if stdin && len(ids) == 0 {
		return nil, usagef("there is no ID on the standard input") // no ID must not mean every one
	}
	return ids, nil
}

// collect lists the selected dead letters before anything is done with them. What
// cannot be read whole is among them.
func collect(ctx context.Context, c *cli, desk *triage.Desk, sel triage.Selection, payload bool) ([]*dlq.Entry, error) {
	var all []*dlq.Entry
	for e, err := range desk.Entries(ctx, sel, payload) {
		switch {
		case e != nil:
			all = append(all, e)
		case errors.Is(err, dlq.ErrNotARecord):
			c.warn("%v", err)
		default:
			return nil, err
		}
	}
	return all, nil
}

// fullGroups replaces the beginnings of IDs of groups by the IDs.
func fullGroups(ctx context.Context, desk *triage.Desk, sel *triage.Selection) error {
	if len(sel.Groups) == 0 {
		return nil
	}
	groups, err := desk.Groups(ctx, triage.Selection{States: dlq.States()})
	if err != nil {
		return err
	}
	for i, id := range sel.Groups {
		if sel.Groups[i], err = fullGroup(groups, id); err != nil {
			return err
		}
	}
	return nil
}

func fullGroup(groups []triage.Group, id string) (string, error) {
	var found []string
	for _, g := range groups {
		if g.ID == id {
			return id, nil
		}
		if strings.HasPrefix(g.ID, id) {
			found = append(found, g.ID)
		}
	}
	if len(found) != 1 {
		return "", &triage.NotFoundError{What: "group", ID: id, Near: found[:min(len(found), 5)]}
	}
	return found[0], nil
}

// confirm asks, on a terminal, unless yes has answered. Elsewhere mayAsk has found
// before that there is somebody to ask.
func (c *cli) confirm(ctx context.Context, yes bool, question string) error {
	if yes {
		return nil
	}
	fmt.Fprint(c.err, safe.Line(question)+" [y/N] ")
	answer := make(chan string, 1)
	go func() { // it ends with the process: a terminal cannot be told to stop waiting
		line, _ := readLine(c.in)
		answer <- line
	}()
	select {
	case <-ctx.Done():
		fmt.Fprintln(c.err)
		return context.Cause(ctx)
	case line := <-answer:
		if a := strings.ToLower(strings.TrimSpace(line)); a == "y" || a == "yes" {
			return nil
		}
		return errors.New("not confirmed; nothing was changed")
	}
}

// readLine reads no further than the line, so that what comes after it is there
// for whoever reads next.
func readLine(r io.Reader) (string, error) {
	var line []byte
	for b := make([]byte, 1); ; {
		n, err := r.Read(b)
		if n > 0 && b[0] == '\n' || err != nil {
			return string(line), err
		}
		line = append(line, b[:n]...)
	}
}

// mayAsk finds, before anything is done, whether there is somebody to ask.
func (c *cli) mayAsk(yes bool) error {
	_, in := c.tty(c.in)
	_, shown := c.tty(c.err)
	if yes || in && shown {
		return nil
	}
	return usagef("nobody can be asked, as this is no terminal: add --yes, or look first with --dry-run")
}
