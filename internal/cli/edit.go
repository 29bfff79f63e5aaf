package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os/exec"
	"runtime"
	"slices"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/draft"
	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/internal/shell"
)

func (c *cli) edit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "edit ID",
		Short: "Change what a replay sends",
		Long: "Change what a replay sends. The original stays, and who changed what and why is\n" +
			"kept in the history. Without --data, --patch or --header it opens an editor:\n" +
			"$VISUAL, $EDITOR or vi. A payload that is JSON stays JSON.\n\n" +
			"--patch is a JSON merge patch (RFC 7396). With --where, --group or --all, in\n" +
			"place of an ID, it is for many dead letters.",
		Example: "  monotel dlq edit 5d3kq7\n" +
			"  monotel dlq edit 5d3kq7 --data fixed.json --reason 'wrong currency' --yes\n" +
			"  monotel dlq edit 5d3kq7 --header 'Tenant: acme'\n" +
			"  monotel dlq edit --where 'payload.currency == \"\"' --patch eur.json --dry-run",
		ValidArgsFunction: c.completeArgs(c.deadLetterIDs, 1),
	}
	var s selection
	s.register(cmd, c, true)
	var h hand
	h.register(cmd, c)
	var ed editFlags
	f := cmd.Flags()
	f.StringVar(&ed.data, "data", "", "`FILE` with the new payload; - is standard input")
	f.StringVar(&ed.patch, "patch", "", "`FILE` with a JSON merge patch; - is standard input")
	f.StringArrayVar(&ed.headers, "header", nil, "`'Key: value'` sets a header, 'Key:' takes it away; can be repeated")
	f.BoolVar(&ed.notJSON, "not-json", false, "a payload that is JSON may become something else")
	f.BoolVar(&ed.showDiffs, "show-diffs", false, "with many: show what becomes of the first five, which prints parts of payloads")
	cmd.MarkFlagsMutuallyExclusive("data", "patch")
	c.complete(cmd, "header", nil)
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		one := len(args) == 1 && !s.given(nil) && !s.all
		switch {
		case len(args) > 1 || len(args) == 1 && !one:
			return usagef("edit takes one ID, or --patch with --where, --group, --id or --all")
		case !one && ed.patch == "":
			return usagef("say which with an ID; many, with --where, --group, --id or --all, are edited by --patch")
		case !one && len(ed.headers) > 0:
			return usagef("--header is for a single dead letter")
		case one && c.output != outputTable && h.dryRun:
			return usagef("a diff is text: leave out --output")
		}
		if !h.dryRun {
			if err := c.mayChange(); err != nil {
				return err
			}
		}
		if err := ed.check(c, &h); err != nil {
			return err
		}
		if one {
			return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error { return c.editOne(ctx, desk, args[0], &ed, &h) })
		}
		sel, err := s.parse(c, nil)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			return c.editMany(ctx, desk, sel, &ed, &h)
		})
	})
	return cmd
}

type editFlags struct {
	data, patch        string
	headers            []string
	notJSON, showDiffs bool

	newData  []byte
	newPatch json.RawMessage
}

// check finds what needs no server to be found.
func (ed *editFlags) check(c *cli, h *hand) (err error) {
	if ed.interactive() {
		_, in := c.tty(c.in)
		_, out := c.tty(c.out)
		if !in || !out {
			return usagef("an editor needs a terminal; use --data FILE, --patch FILE or --header 'Key: value'")
		}
	} else if err := h.check(c); err != nil {
		return err
	}
	if _, err := withHeaders(nil, ed.headers); err != nil {
		return usageError{err}
	}
	if ed.data != "" {
		if ed.newData, err = c.readFile(ed.data); err != nil {
			return usagef("--data: %w", err)
		}
	}
	if ed.patch != "" {
		if ed.newPatch, err = c.readPatch(ed.patch); err != nil {
			return usageError{err}
		}
	}
	return nil
}

func (ed *editFlags) interactive() bool {
	return ed.data == "" && ed.patch == "" && len(ed.headers) == 0
}

// apply returns what becomes of a message, without an editor.
func (ed *editFlags) apply(before *dlq.Record) (data []byte, err error) {
	switch {
	case ed.data != "":
		data = ed.newData
	case ed.patch != "":
		if data, err = patched(before.Data, ed.newPatch); err != nil {
			return nil, err
		}
		if same(before.Data, data) {
			return before.Data, nil // to the byte, if only headers are edited
		}
	default:
		return before.Data, nil
	}
	return data, ed.keepsJSON(before.Data, data)
}

func patched(data, patch []byte) ([]byte, error) {
	return triage.Patch(data, patch)
}

func (ed *editFlags) keepsJSON(before, after []byte) error {
	if ed.notJSON || !isJSON(before) || isJSON(after) {
		return nil
	}
	var read json.RawMessage
	err := json.Unmarshal(after, &read)
	if s, ok := errors.AsType[*json.SyntaxError](err); ok {
		line := 1 + bytes.Count(after[:min(int(s.Offset), len(after))], []byte("\n"))
		return fmt.Errorf("%w: the payload was JSON and is not any more, see line %d; --not-json allows that", triage.ErrInvalid, line)
	}
	return fmt.Errorf("%w: the payload was JSON and is not any more; --not-json allows that", triage.ErrInvalid)
}

func (c *cli) editOne(ctx context.Context, desk *triage.Desk, id string, ed *editFlags, h *hand) error {
	e, err := desk.Get(ctx, id)
	if e == nil {
		return err
	}
	before, err := desk.Current(ctx, e)
	if err != nil {
		return err
	}
	if before.Data == nil && before.Body != dlq.BodyInline && ed.data == "" {
		return fmt.Errorf("%w: the payload of dead letter %s is not there (%s); --data FILE gives it one", triage.ErrInvalid, e.ID, before.Body)
	}
	header, err := withHeaders(before.Header, ed.headers)
	if err != nil {
		return usageError{err}
	}
	store := func(data []byte) error {
		return c.storeEdit(ctx, desk, e, before, triage.Revision{Data: data, Header: header, Reason: h.reason}, h, ed.interactive())
	}
	if ed.interactive() {
		return c.editText(ctx, e.ID, before.Data, func(data []byte) error {
			if err := ed.keepsJSON(before.Data, data); err != nil {
				return err
			}
			return store(data)
		})
	}
	data, err := ed.apply(before)
	if err != nil {
		return err
	}
	return store(data)
}

// storeEdit shows what an edit does, asks and stores it.
func (c *cli) storeEdit(ctx context.Context, desk *triage.Desk, e *dlq.Entry, before *dlq.Record, r triage.Revision,
	h *hand, ask bool,
) error {
	if same(before.Data, r.Data) && sameHeaders(before.Header, r.Header) {
		c.remark("Nothing has changed.")
		return nil
	}
	if !h.yes || ask {
		w := c.err
		if h.dryRun { // it is all that was asked for
			w = c.out
		}
		fmt.Fprint(w, c.diff(w, e.ID, display(before.Header, before.Data), display(r.Header, r.Data)))
	}
	if h.dryRun {
		return nil
	}
	if err := c.confirm(ctx, h.yes, fmt.Sprintf("Store this as revision %d?", e.Revision+1)); err != nil {
		return err
	}
	if err := desk.Edit(ctx, e, r); err != nil {
		return err
	}
	if c.output != outputTable {
		return c.writeJSON(viewEntry(e, nil))
	}
	c.remark("dead letter %s: revision %d; '%s' sends it", safe.Line(e.ID), e.Revision, shell.Command("monotel dlq replay", []string{e.ID}))
	return nil
}

// same reports whether two payloads mean the same, if they are JSON in spite of
// their layout.
func same(a, b []byte) bool {
	if bytes.Equal(a, b) {
		return true
	}
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

func sameHeaders(a, b nats.Header) bool {
	return maps.EqualFunc(a, b, slices.Equal)
}

// display is a message for a diff.
func display(h nats.Header, data []byte) []byte {
	var b bytes.Buffer
	for _, k := range slices.Sorted(maps.Keys(h)) {
		for _, v := range h[k] {
			b.WriteString(k + ": " + v + "\n")
		}
	}
	if b.Len() > 0 {
		b.WriteString("\n")
	}
	text, left := layOut(data, mostCompared, mostCompared)
	b.WriteString(text)
	if left > 0 {
		b.WriteString("\n… " + plural(left, "byte") + " more, which are not compared here")
	}
	return b.Bytes()
}

// Bounds of a diff, in bytes: what is compared, what is printed of it, and of one
// line.
const mostCompared, mostDiff, mostLine = 4 << 20, 256 << 10, 8 << 10

// diff is a unified diff, safe to print.
func (c *cli) diff(w io.Writer, id string, before, after []byte) string {
	lines := func(b []byte) []byte { // the last one, too, ends
		return append(bytes.TrimRight(b, "\n"), '\n')
	}
	text := diff.Diff(id+" now", lines(before), id+" after", lines(after))
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "diff ") {
			continue
		}
		if b.Len() > mostDiff {
			b.WriteString("… the rest of the diff is left out; 'monotel dlq show --output json' prints the payload as it is now\n")
			break
		}
		line = strings.ReplaceAll(strings.TrimRight(line, "\n"), "\t", "    ")
		if len(line) > mostLine {
			line = strings.ToValidUTF8(line[:mostLine], "") + "… " + plural(len(line)-mostLine, "byte") + " more"
		}
		line = safe.Line(line)
		switch {
		case strings.HasPrefix(line, "+"):
			line = c.paint(w, styleGood, line)
		case strings.HasPrefix(line, "-"):
			line = c.paint(w, styleBad, line)
		}
		b.WriteString(line + "\n")
	}
	return b.String()
}

// editText has a payload edited, and stores it. The file is removed then, and kept
// if anything goes wrong.
func (c *cli) editText(ctx context.Context, id string, payload []byte, store func([]byte) error) error {
	d, err := draft.New(payload)
	if err != nil {
		return fmt.Errorf("%w: dead letter %s: %w: use --data FILE", triage.ErrInvalid, id, err)
	}
	if err := d.Create(); err != nil {
		return fmt.Errorf("edit dead letter %s: %w", id, err)
	}
	err = c.callEditor(ctx, d.Path())
	var written []byte
	if err == nil {
		if written, err = d.Written(); err != nil {
			err = fmt.Errorf("edit dead letter %s: %w", id, err)
		}
	}
	if err == nil {
		err = store(d.Payload(written))
	}
	if err != nil {
		return errors.Join(fmt.Errorf("%w\nWhat you wrote is in %s", err, d.Path()), d.Keep())
	}
	return d.Remove()
}

func (c *cli) callEditor(ctx context.Context, file string) error {
	editor := c.env("VISUAL")
	if editor == "" {
		editor = c.env("EDITOR")
	}
	if strings.TrimSpace(editor) == "" {
		editor = map[bool]string{true: "notepad", false: "vi"}[runtime.GOOS == "windows"]
	}
	words := append(strings.Fields(editor), file)           // such as "code --wait"
	cmd := exec.CommandContext(ctx, words[0], words[1:]...) //nolint:gosec // the user's own editor
	cmd.Stdin, cmd.Stdout, cmd.Stderr = c.in, c.out, c.err
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("editor %q (set VISUAL or EDITOR): %w", words[0], err)
	}
	return nil
}

// editMany patches every selected dead letter.
func (c *cli) editMany(ctx context.Context, desk *triage.Desk, sel triage.Selection, ed *editFlags, h *hand) error {
	all, err := collect(ctx, c, desk, sel, true)
	if err != nil {
		return err
	}
	const shown = 5
	var changing []*dlq.Entry
	unchanged, refused := 0, 0
	for _, e := range all {
		after, err := ed.apply(e.Record)
		switch {
		case err != nil:
			refused++
			fmt.Fprintf(c.err, "dead letter %s: %s\n", safe.Line(e.ID), safe.Line(err.Error()))
		case same(e.Data, after):
			unchanged++
		default:
			changing = append(changing, e)
			if ed.showDiffs && len(changing) <= shown {
				fmt.Fprint(c.err, c.diff(c.err, e.ID, display(nil, e.Data), display(nil, after)))
			}
		}
	}
	if h.dryRun {
		v := patchView{Changed: len(changing), Unchanged: unchanged, Refused: refused}
		if c.output != outputTable {
			return c.writeJSON(v)
		}
		fmt.Fprintf(c.out, "%s would change, %s stay as they are, %s cannot be patched\n", count(len(changing)), count(unchanged), count(refused))
		return nil
	}
	if err := c.confirmMany(ctx, desk, changing, h.yes, fmt.Sprintf("Edit %s?", plural(len(changing), "dead letter"))); err != nil {
		return err
	}
	return c.each(ctx, all, "edited", func(ctx context.Context, e *dlq.Entry) error {
		after, err := ed.apply(e.Record)
		if err != nil {
			return fmt.Errorf("dead letter %s: %w", e.ID, err)
		}
		if same(e.Data, after) {
			return errUnchanged
		}
		return desk.Edit(ctx, e, triage.Revision{Data: after, Reason: h.reason})
	})
}

type patchView struct {
	Changed   int `json:"changed"`
	Unchanged int `json:"unchanged"`
	Refused   int `json:"refused"`
}
