package triage_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// An export goes into another server whole: large ones, edits and discarded ones
// among them.
func TestExport(t *testing.T) {
	t.Parallel()
	from, to := setup(t), setupWith(t, dlq.Config{Stream: jetstream.StreamConfig{Name: "COPY"}}, jetstream.StreamConfig{})
	ids := from.capture(t, 3)
	large := from.capture(t, 1, func(r *dlq.Record) { r.Data = bytes.Repeat([]byte{0, 1}, 1<<19) })[0]
	must(t, from.desk.Edit(within(t), from.get(t, ids[0]), triage.Revision{Data: []byte(`{}`)}))
	must(t, from.desk.Discard(within(t), from.get(t, ids[1]), "spam"))
	// Nobody consumes, so it stays on its way.
	p := from.plan(t, triage.Selection{IDs: ids[2:]}, triage.Options{NoWait: true})
	from.run(t, p.ID)

	var file bytes.Buffer
	n, err := from.desk.Export(within(t), triage.Selection{States: dlq.States()}, &file)
	must(t, err)
	if n != 4 {
		t.Errorf("%d were exported, want 4", n)
	}
	whole := file.String()
	for range 2 { // it can be repeated
		got, err := to.desk.Import(within(t), strings.NewReader(whole))
		must(t, err)
		if got.Imported+got.Present != 4 {
			t.Errorf("imported %+v", got)
		}
	}
	for id, state := range map[string]dlq.State{
		ids[0]: dlq.StateOpen, ids[1]: dlq.StateDiscarded, ids[2]: dlq.StateOpen, large: dlq.StateOpen,
	} {
		to.wantState(t, id, state)
		was, err := from.desk.Current(within(t), from.get(t, id))
		must(t, err)
		is, err := to.desk.Current(within(t), to.get(t, id))
		must(t, err)
		if !bytes.Equal(was.Data, is.Data) || was.Error != is.Error || was.Header.Get("Tenant") != is.Header.Get("Tenant") {
			t.Errorf("dead letter %s is another one: %d and %d bytes", id, len(was.Data), len(is.Data))
		}
	}
	if got := len(to.get(t, ids[2]).History); got != 2 {
		t.Errorf("the history of what was on its way has %d changes, want the claim and its release", got)
	}
}

// A file that is cut short anywhere says so, and what was whole is kept.
func TestImport_cutShort(t *testing.T) {
	t.Parallel()
	from := setup(t)
	from.capture(t, 3)
	var file bytes.Buffer
	_, err := from.desk.Export(within(t), triage.Selection{}, &file)
	must(t, err)
	lines := strings.SplitAfter(file.String(), "\n")
	for name, cut := range map[string]struct {
		text     string
		imported int
		want     error
		says     string
	}{
		"in a line":            {strings.Join(lines[:3], "")[:len(lines[0])+len(lines[1])+40], 1, triage.ErrInvalid, "line 3"},
		"after a line":         {strings.Join(lines[:3], ""), 2, triage.ErrCutShort, "after line 3"},
		"before the first":     {"", 0, triage.ErrCutShort, "line 0"},
		"something else":       {`{"hello":1}` + "\n", 0, triage.ErrInvalid, "line 1"},
		"of a newer version":   {strings.Replace(lines[0], `"version":1`, `"version":2`, 1), 0, triage.ErrInvalid, "version 2"},
		"with another's id":    {lines[0] + strings.Replace(lines[1], `"id":"`, `"id":"x`, 1), 0, triage.ErrInvalid, "line 2"},
		"with no messages":     {lines[0] + `{"id":"abc"}` + "\n", 0, triage.ErrInvalid, "line 2"},
		"with another's parts": {lines[0] + strings.Replace(lines[1], `"messages"`, `"objects":{"other":"AA=="},"messages"`, 1), 0, triage.ErrInvalid, "line 2"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			to := setup(t)
			n, err := to.desk.Import(within(t), strings.NewReader(cut.text))
			if n.Imported != cut.imported || !errors.Is(err, cut.want) || !strings.Contains(err.Error(), cut.says) {
				t.Errorf("imported %+v, %v; want %d and %v that says %q", n, err, cut.imported, cut.want, cut.says)
			}
			if ids := to.list(t, triage.Selection{}); len(ids) != cut.imported {
				t.Errorf("there are %v", ids)
			}
		})
	}
}

// An import that was cut off in the middle of a history is completed.
func TestImport_goesOn(t *testing.T) {
	t.Parallel()
	from, to := setup(t), setup(t)
	id := from.capture(t, 1)[0]
	var before, after bytes.Buffer
	_, err := from.desk.Export(within(t), triage.Selection{}, &before)
	must(t, err)
	must(t, from.desk.Archive(within(t), from.get(t, id), ""))
	_, err = from.desk.Export(within(t), triage.Selection{IDs: []string{id}}, &after)
	must(t, err)
	for _, file := range []*bytes.Buffer{&before, &after} {
		n, err := to.desk.Import(within(t), file)
		must(t, err)
		if n.Imported != 1 {
			t.Errorf("imported %+v", n)
		}
	}
	to.wantState(t, id, dlq.StateArchived)
	if ids := to.list(t, triage.Selection{States: dlq.States()}); !slices.Equal(ids, []string{id}) {
		t.Errorf("there are %v", ids)
	}
}
