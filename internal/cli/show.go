package cli

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/jsontext"
	"github.com/monotel/monotel/internal/safe"
)

func (c *cli) show() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show a dead letter whole, with its payload and history",
		Long: "Show a dead letter whole, with its payload and history. A beginning of the ID\n" +
			"will do if it is that of one dead letter only. The payload is that of the\n" +
			"latest edit, as a replay would send it.",
		Example: "  monotel dlq show 5d3kq7\n" +
			"  monotel dlq show 5d3kq7 --no-payload --trace-url-template http://localhost:16686/trace/{trace_id}\n" +
			"  monotel dlq show 5d3kq7 --output json | jq .payload",
		Args:              oneArg("ID", fromList),
		ValidArgsFunction: c.completeArgs(c.deadLetterIDs, 1),
	}
	var trace traceURL
	trace.register(cmd, c)
	f := cmd.Flags()
	noPayload := f.Bool("no-payload", false, "leave out the payload, headers and diffs of edits")
	full := f.Bool("full", false, "the whole payload, however long")
	original := f.Bool("original", false, "the payload as it was captured, without edits")
	cmd.MarkFlagsMutuallyExclusive("no-payload", "full")
	cmd.MarkFlagsMutuallyExclusive("no-payload", "original")
	cmd.RunE = c.runs(func(ctx context.Context, args []string) error {
		template, err := trace.template(c)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			e, problem := desk.Get(ctx, args[0])
			if e == nil {
				return c.isGroup(ctx, desk, args[0], problem)
			}
			var current *dlq.Record
			switch {
			case *noPayload:
			case *original || e.Revision == 0:
				current = e.Record
			default:
				if current, err = desk.Current(ctx, e); err != nil {
					return err
				}
			}
			if c.output != outputTable {
				return c.writeJSON(viewWhole(e, current, problem, template))
			}
			return c.printWhole(e, current, problem, template, *full)
		})
	})
	return cmd
}

// isGroup says so if what is no dead letter is the ID of a group.
func (c *cli) isGroup(ctx context.Context, desk *triage.Desk, id string, problem error) error {
	sel := triage.Selection{Groups: []string{id}}
	if !errors.Is(problem, triage.ErrNotFound) || fullGroups(ctx, desk, &sel) != nil {
		return problem
	}
	return fmt.Errorf("%w; it is a group, whose dead letters '%s' lists", problem, c.commandLine("dlq", "ls", "--group", sel.Groups[0]))
}

// A sheet is text with headings, in pieces that are safe already.
type sheet struct {
	c *cli
	b bytes.Buffer
}

const sheetKey = 18 // columns

func (s *sheet) field(key, value string) {
	if value != "" && value != "-" {
		fmt.Fprintf(&s.b, "%s%s\n", s.c.paint(s.c.out, styleHead, fmt.Sprintf("%-*s", sheetKey, key)), safe.Line(value))
	}
}

func (s *sheet) heading(text string) {
	fmt.Fprintf(&s.b, "\n%s\n", s.c.paint(s.c.out, styleHead, safe.Line(text)))
}

// text writes a text of several lines, indented.
func (s *sheet) text(text string) {
	for line := range strings.SplitSeq(strings.TrimRight(safe.Block(text), "\n"), "\n") {
		s.b.WriteString("  " + line + "\n")
	}
}

func (c *cli) printWhole(e *dlq.Entry, current *dlq.Record, problem error, template string, full bool) error {
	s := &sheet{c: c}
	f := latest(e)
	s.field("ID", e.ID)
	s.field("State", string(e.State))
	s.field("Group", triage.Fingerprint(e))
	s.field("Reason", strings.TrimSuffix(string(f.Reason)+": "+f.ReasonText, ": "))
	s.field("Event", e.Event)
	s.field("Subject", e.Subject)
	s.field("Stream", fmt.Sprintf("%s, sequence %d", e.Stream, e.StreamSequence))
	s.field("Consumer", fmt.Sprintf("%s, sequence %d, delivered %s", e.Consumer, e.ConsumerSequence, plural(e.Deliveries, "time")))
	s.field("Stored", c.when(e.Stored))
	s.field("First failed", c.when(e.FirstFailed))
	s.field("Failed", c.when(f.Failed))
	if !e.Changed.IsZero() {
		s.field("Changed", c.when(e.Changed)+" by "+e.Actor)
	}
	if e.Replays > 0 {
		s.field("Replayed", fmt.Sprintf("%s, failed again %s; last by operation %s",
			plural(e.Replays, "time"), plural(e.Failures, "time"), e.Operation))
	}
	s.field("App", strings.TrimSpace(e.App+" "+e.AppVersion))
	s.field("Module", e.Module)
	s.field("Host", e.Host)
	trace := func(key, parent string) {
		if id := traceID(parent); id != "" {
			s.field(key, parent)
			s.field(key+" ID", id)
			s.field(key+" URL", traceLink(template, parent))
		}
	}
	trace("Trace", f.Traceparent)
	trace("Origin trace", e.OriginTraceparent)
	if problem != nil {
		s.field("Incomplete", problem.Error())
	}
	s.failure("Error", f)
	if e.Failures > 0 {
		s.failure("First error", e.Record)
	}
	if current != nil {
		s.headers(current)
		s.payload(current, e.Revision, full)
	}
	if err := c.write(s.b.Bytes()); err != nil {
		return err
	}
	return c.printHistory(e, current != nil)
}

func (s *sheet) failure(title string, f *dlq.Record) {
	if text := cmp.Or(f.Error, f.ReasonText); text != "" || len(f.ErrorTypes) > 0 {
		s.heading(title)
		s.text(strings.TrimSpace(text + "\n" + strings.Join(f.ErrorTypes, " → ")))
	}
	if len(f.Stack) > 0 {
		s.heading("Stack of the " + strings.ToLower(title))
		s.text(strings.Join(f.Stack, "\n"))
	}
}

func (s *sheet) headers(r *dlq.Record) {
	if len(r.Header) == 0 {
		return
	}
	s.heading("Headers")
	for _, k := range slices.Sorted(maps.Keys(r.Header)) {
		for _, v := range r.Header[k] {
			s.b.WriteString("  " + safe.Line(k) + ": " + safe.Line(v) + "\n")
		}
	}
}

func (s *sheet) payload(r *dlq.Record, revision int, full bool) {
	title := "Payload, " + size(int64(r.BodySize))
	if revision > 0 {
		title += fmt.Sprintf(" (edited %s)", plural(revision, "time"))
	}
	s.heading(title)
	switch {
	case r.Data == nil && r.Body == dlq.BodyOmitted:
		s.text("It was not kept.")
	case r.Data == nil && r.Body == dlq.BodyGone:
		s.text("Its stream did not have it any more when it was captured.")
	case r.Data == nil && r.Body != dlq.BodyInline:
		s.text("It is in the object store, as " + r.BodyObject + ".")
	case len(r.Data) == 0:
		s.text("It is empty.")
	default:
		text, more := pretty(r.Data, full)
		s.text(text)
		if more > 0 {
			s.text(fmt.Sprintf("… %s more; --full prints all", plural(more, "byte")))
		}
	}
}

// pretty is a payload for people. more is how many bytes of it are left out.
func pretty(data []byte, full bool) (text string, more int) {
	if full {
		return layOut(data, math.MaxInt, math.MaxInt)
	}
	const mostText, mostBytes = 16 << 10, 512
	return layOut(data, mostText, mostBytes)
}

// layOut is pretty with bounds: of the text that is returned, or of the bytes that
// are dumped.
func layOut(data []byte, mostText, mostBytes int) (text string, more int) {
	if isText(data) {
		text, more := jsontext.Indent(data, mostText)
		return string(text), more
	}
	head := data[:min(len(data), mostBytes)]
	return hex.Dump(head), len(data) - len(head)
}

// isText reports whether data reads better as text than as bytes.
func isText(data []byte) bool {
	if !utf8.Valid(data) {
		return false
	}
	odd := 0
	for _, r := range string(data) {
		if unicode.IsControl(r) && r != '\n' && r != '\r' && r != '\t' {
			odd++
		}
	}
	const part = 20
	return odd == 0 || odd*part < len(data) && !bytes.Contains(data, []byte{0})
}

func (c *cli) printHistory(e *dlq.Entry, payload bool) error {
	if len(e.History) == 0 {
		return nil
	}
	if err := c.write([]byte("\n")); err != nil {
		return err
	}
	t := c.table(c.out, "HISTORY", "CHANGE", "STATE", "BY", "OPERATION", "WHAT")
	for _, ch := range e.History {
		var what []string
		if ch.Target != "" {
			what = append(what, "to "+ch.Target)
		}
		if ch.Revision > 0 {
			what = append(what, fmt.Sprintf("revision %d", ch.Revision))
		}
		if ch.Failure != nil {
			what = append(what, firstLine(ch.Failure))
		}
		if ch.Reason != "" {
			what = append(what, ch.Reason)
		}
		if payload && len(ch.Diff) > 0 {
			what = append(what, string(ch.Diff))
		}
		_ = t.row(plain(c.age(ch.Time)), plain(string(ch.Kind)), styled(stateStyle(ch.To()), string(ch.To())), plain(ch.Actor),
			plain(ch.Operation), plain(strings.Join(what, "; ")))
	}
	return t.flush()
}
