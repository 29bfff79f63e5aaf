package screen

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"unicode/utf8"

	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	file "github.com/monotel/monotel/internal/draft"
	"github.com/monotel/monotel/internal/jsontext"
	"github.com/monotel/monotel/internal/safe"
)

// A draft is a payload that is being edited. Its file is removed when the edit is
// stored or given up, and kept when something went wrong.
type draft struct {
	*file.Draft

	entry  *dlq.Entry // a copy
	before []byte     // the payload
	json   bool
	path   string // empty without a file
	after  []byte // what the editor left
}

type (
	editMsg struct {
		load    int
		entry   *dlq.Entry
		current *dlq.Record
		err     error
	}
	editedMsg struct {
		draft *draft
		err   error
	}
	editStoredMsg struct {
		draft *draft
		err   error
	}
)

// startEdit reads the payload, which lists do not have.
func (m *model) startEdit() tea.Cmd {
	if m.refuse() {
		return nil
	}
	e := m.detail.entry
	if m.page == pageEntries {
		var ok bool
		if e, ok = m.entries.list.selected(); !ok {
			return nil
		}
	}
	if e == nil {
		return nil
	}
	if e.State != dlq.StateOpen && e.State != dlq.StateArchived {
		m.complain(fmt.Sprintf("Cannot edit what is %s.", e.State))
		return nil
	}
	desk, id := m.desk, e.ID
	return m.loading.start(m, "loading the payload", func(ctx context.Context, n int) tea.Msg {
		e, current, err := read(ctx, desk, id)
		return editMsg{load: n, entry: e, current: current, err: err}
	})
}

func (m *model) gotEntryToEdit(msg editMsg) tea.Cmd {
	if !m.loading.done(msg.load) || m.typing() != nil || m.dialog != nil { // something else is asked meanwhile
		return nil
	}
	if msg.err != nil {
		m.fail(fmt.Errorf("edit: %w", msg.err))
		return nil
	}
	d, err := newDraft(msg.entry, msg.current)
	if err != nil {
		m.fail(err)
		return nil
	}
	return m.openEditor(d)
}

func newDraft(e *dlq.Entry, current *dlq.Record) (*draft, error) {
	if current.Body == dlq.BodyOmitted || current.Body == dlq.BodyGone {
		return nil, fmt.Errorf("edit dead letter %s: its payload was not kept, or was gone", e.ID)
	}
	f, err := file.New(current.Data)
	if err != nil {
		return nil, fmt.Errorf("edit dead letter %s: its payload is no text, so an editor would break it", e.ID)
	}
	return &draft{Draft: f, entry: e, before: current.Data, json: json.Valid(current.Data)}, nil
}

// openEditor hands the terminal to the editor.
func (m *model) openEditor(d *draft) tea.Cmd {
	m.draft = d
	return m.exec(&editor{ctx: m.ctx, draft: d, environ: m.opt.Environ}, func(err error) tea.Msg { return editedMsg{d, err} })
}

// An editor is $VISUAL or $EDITOR at work on a draft.
type editor struct {
	ctx            context.Context //nolint:containedctx // Run is given none
	draft          *draft
	environ        []string
	stdin          io.Reader
	stdout, stderr io.Writer
}

func (ed *editor) SetStdin(r io.Reader)  { ed.stdin = r }
func (ed *editor) SetStdout(w io.Writer) { ed.stdout = w }
func (ed *editor) SetStderr(w io.Writer) { ed.stderr = w }

// Run writes the file if there is none yet, and reads what the editor has left.
func (ed *editor) Run() error {
	d := ed.draft
	if d.path == "" {
		if err := d.Create(); err != nil {
			return err
		}
		d.path = d.Path()
	}
	command := ed.command()
	cmd := exec.CommandContext(ed.ctx, command[0], append(command[1:], d.path)...) //nolint:gosec // the operator's own choice
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = ed.environ, ed.stdin, ed.stdout, ed.stderr
	runErr := cmd.Run()
	if runErr != nil {
		runErr = fmt.Errorf("editor %q: %w", strings.Join(command, " "), runErr)
	}
	after, err := d.Written()
	d.after = after
	return errors.Join(runErr, err)
}

func (ed *editor) command() []string {
	for _, name := range []string{"VISUAL", "EDITOR"} {
		if fields := strings.Fields(getenv(ed.environ, name)); len(fields) > 0 {
			return fields
		}
	}
	if runtime.GOOS == "windows" {
		return []string{"notepad"}
	}
	return []string{"vi"}
}

// drop removes the draft and its file.
func (m *model) drop() {
	d := m.draft
	m.draft = nil
	if d == nil {
		return
	}
	if err := d.Remove(); err != nil {
		m.complain(safe.Line("The payload is still in a file: " + err.Error()))
	}
}

// keep leaves the file where it is, and says where that is.
func (m *model) keep(err error) {
	d := m.draft
	m.draft = nil
	err = errors.Join(err, d.Keep())
	m.complain(safe.Block(err.Error()) + "\nWhat you wrote is kept in " + safe.Line(d.path))
}

// edited asks whether to store what the editor has left.
func (m *model) edited(msg editedMsg) tea.Cmd {
	d := msg.draft
	unchanged := bytes.Equal(d.after, d.Text())
	switch {
	case msg.err != nil && (unchanged || d.after == nil):
		m.fail(msg.err) // nothing was written that could be lost
		m.drop()
		return nil
	case msg.err != nil:
		m.keep(msg.err)
		return nil
	case unchanged:
		m.drop()
		m.say("Nothing was changed.")
		return nil
	}
	payload, err := d.payload()
	if err != nil {
		m.askAgain(err)
		return nil
	}
	if bytes.Equal(payload, d.before) {
		m.drop()
		m.say("Nothing was changed.")
		return nil
	}
	m.askEdit(payload)
	return nil
}

// payload is what the editor has left.
func (d *draft) payload() ([]byte, error) {
	if d.json {
		if err := jsonError(d.after); err != nil {
			return nil, err
		}
	}
	return d.Payload(d.after), nil
}

// jsonError says where a text is not JSON.
func jsonError(text []byte) error {
	var v json.RawMessage
	err := json.Unmarshal(text, &v)
	if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
		before := text[:min(max(int(syntax.Offset)-1, 0), len(text))]
		line := bytes.Count(before, []byte("\n")) + 1
		column := utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:]) + 1
		return fmt.Errorf("line %d, column %d: %w", line, column, err)
	}
	return err
}

// askAgain opens the editor again on what is not JSON any more.
func (m *model) askAgain(why error) {
	d := m.draft
	m.dialog = &dialog{
		title: "Not JSON any more", yes: "edit again",
		lines: func(int) []string {
			return []string{safe.Line(why.Error()), "The payload was JSON and has to stay so. esc gives up, and keeps what you wrote in " + safe.Line(d.path)}
		},
		accept: func(string) tea.Cmd { return m.openEditor(d) },
		no: func() tea.Cmd {
			m.keep(fmt.Errorf("not stored, as it is not JSON: %w", why))
			return nil
		},
	}
}

func (m *model) askEdit(payload []byte) {
	d := m.draft
	changes := diffLines(compared(d.before), compared(payload))
	m.dialog = &dialog{
		title: "Edit dead letter " + beginning(d.entry.ID, shortID) + "?", yes: "store the edit", reason: &input{},
		lines: func(width int) []string {
			lines := make([]string, 0, 1+len(changes))
			lines = append(lines, fmt.Sprintf("Revision %d: %s become %s. A replay sends it from then on; the original stays.", d.entry.Revision+1,
				bytesText(int64(len(d.before))), bytesText(int64(len(payload)))))
			for _, l := range changes {
				style := m.style.faint
				switch l[0] {
				case '-':
					style = m.style.bad
				case '+':
					style = m.style.good
				}
				lines = append(lines, style.Render(oneLine(l, width)))
			}
			return lines
		},
		accept: func(reason string) tea.Cmd { return m.storeEdit(payload, reason) },
		no: func() tea.Cmd {
			m.drop()
			m.say("Not stored.")
			return nil
		},
	}
}

// compared is as much of a payload as is compared.
func compared(payload []byte) []byte {
	const most = 4 << 20
	text, left := jsontext.Indent(payload, most)
	if left > 0 {
		text = fmt.Appendf(bytes.Clone(text), "\n… %s more", bytesText(int64(left)))
	}
	return text
}

// storeEdit stores the edit. The file is removed at once when that is done, even if
// the screen is left meanwhile.
func (m *model) storeEdit(payload []byte, reason string) tea.Cmd {
	d, desk := m.draft, m.desk
	return m.storing.start(m, "storing the edit", func(ctx context.Context, _ int) tea.Msg {
		err := desk.Edit(ctx, d.entry, triage.Revision{Data: payload, Reason: reason})
		if err == nil {
			err = d.Remove()
			if err != nil {
				err = fmt.Errorf("it is stored, but the file is still there: %w", err)
			}
		}
		return editStoredMsg{draft: d, err: err}
	})
}

func (m *model) editStored(msg editStoredMsg) tea.Cmd {
	m.storing.stop()
	if msg.err != nil {
		m.keep(msg.err)
	} else {
		m.draft = nil
		m.say(fmt.Sprintf("Stored as revision %d of dead letter %s.", msg.draft.entry.Revision, safe.Line(beginning(msg.draft.entry.ID, shortID))))
	}
	return m.goOn()
}

// diffLines is what has changed from one text to another, with a line before and
// after each change. Where that would take long, the part that differs is shown as
// replaced.
func diffLines(before, after []byte) []string {
	const most = 1 << 20 // comparisons
	a, b := strings.Split(string(before), "\n"), strings.Split(string(after), "\n")
	head := 0
	for head < len(a) && head < len(b) && a[head] == b[head] {
		head++
	}
	tail := 0
	for tail < len(a)-head && tail < len(b)-head && a[len(a)-1-tail] == b[len(b)-1-tail] {
		tail++
	}
	var lines []string
	put := func(sign string, text ...string) {
		for _, t := range text {
			lines = append(lines, sign+t)
		}
	}
	put("  ", a[max(head-1, 0):head]...)
	end := a[len(a)-tail : min(len(a)-tail+1, len(a))]
	a, b = a[head:len(a)-tail], b[head:len(b)-tail]
	if len(a)*len(b) > most {
		put("- ", a...)
		put("+ ", b...)
	} else {
		common := longestCommon(a, b)
		for len(a) > 0 || len(b) > 0 {
			switch {
			case len(a) > 0 && len(b) > 0 && a[0] == b[0]:
				put("  ", a[0])
				a, b = a[1:], b[1:]
			case len(b) == 0 || len(a) > 0 && common[len(a)-1][len(b)] >= common[len(a)][len(b)-1]:
				put("- ", a[0])
				a = a[1:]
			default:
				put("+ ", b[0])
				b = b[1:]
			}
		}
	}
	put("  ", end...)
	return unchangedShortened(lines)
}

// longestCommon has how many lines the last i of a and the last j of b have in
// common, in order.
func longestCommon(a, b []string) [][]int {
	n := make([][]int, len(a)+1)
	for i := range n {
		n[i] = make([]int, len(b)+1)
		for j := 1; i > 0 && j <= len(b); j++ {
			if a[len(a)-i] == b[len(b)-j] {
				n[i][j] = n[i-1][j-1] + 1
			} else {
				n[i][j] = max(n[i-1][j], n[i][j-1])
			}
		}
	}
	return n
}

// unchangedShortened leaves out what is unchanged and far from a change.
func unchangedShortened(lines []string) []string {
	const around = 1
	var short []string
	for i, l := range lines {
		near := slices.ContainsFunc(lines[max(i-around, 0):min(i+around+1, len(lines))], func(s string) bool { return s[0] != ' ' })
		switch {
		case near:
			short = append(short, l)
		case len(short) == 0 || short[len(short)-1] != "  …":
			short = append(short, "  …")
		}
	}
	return short
}
