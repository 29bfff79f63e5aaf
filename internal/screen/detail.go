package screen

import (
	"bytes"
	"encoding/hex"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"charm.land/lipgloss/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/jsontext"
	"github.com/monotel/monotel/internal/safe"
)

const (
	shortID = 12 // letters of an ID that tell it from others on the screen

	// maxPayload and maxHex are as much of a payload as is drawn, in bytes.
	maxPayload, maxHex = 64 << 10, 4 << 10

	maxText = 64 << 10 // of an error's text
)

var traceparent = regexp.MustCompile(`^[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}`)

// errorText is how a failure is named on one line.
func errorText(f *dlq.Record) string {
	switch {
	case f.Error != "":
		return f.Error
	case f.ReasonText != "":
		return f.ReasonText
	default:
		return string(f.Reason)
	}
}

// payloadLines are the lines of a payload: indented JSON, text, or a hex dump.
func payloadLines(r *dlq.Record) []string {
	if r == nil {
		return nil
	}
	data := r.Data
	switch {
	case r.Body == dlq.BodyOmitted:
		return []string{"(not kept, " + bytesText(int64(r.BodySize)) + ")"}
	case r.Body == dlq.BodyGone:
		return []string{"(its stream did not have it any more)"}
	case data == nil && r.BodySize > 0:
		return []string{"(could not be read, " + bytesText(int64(r.BodySize)) + ")"}
	case len(data) == 0:
		return []string{"(empty)"}
	}
	var text string
	left := len(data) - min(len(data), maxHex)
	if isText(data) {
		var laidOut []byte
		laidOut, left = jsontext.Indent(data, maxPayload)
		text = safe.Block(string(laidOut))
	} else {
		text = strings.TrimRight(hex.Dump(data[:len(data)-left]), "\n")
	}
	lines := strings.Split(text, "\n")
	if left > 0 {
		lines = append(lines, fmt.Sprintf("(the first %s of %s; all of it: monotel dlq export)",
			bytesText(int64(len(data)-left)), bytesText(int64(len(data)))))
	}
	return lines
}

// isText reports whether there are no more control characters in it than a text
// has.
func isText(data []byte) bool {
	return utf8.Valid(data) && bytes.IndexFunc(data, func(r rune) bool { return r < ' ' && !strings.ContainsRune("\t\n\r\x1b", r) }) < 0
}

// layout breaks the detail into lines.
func (m *model) layout() {
	d := &m.detail
	if d.entry == nil || d.current == nil && d.payload == nil && d.err == nil {
		return
	}
	p := paper{m: m, width: m.width}
	p.entry(d)
	d.view.SetContentLines(p.lines)
}

// A paper is what is written on, with labels on the left.
type paper struct {
	m     *model
	width int
	lines []string
}

const labelWidth = 10

// field writes a safe text beside its label, if there is any.
func (p *paper) field(label, text string) {
	if text == "" {
		return
	}
	label = pad(label, labelWidth)
	for line := range strings.SplitSeq(text, "\n") {
		for _, l := range wrap(line, p.width-labelWidth) {
			p.lines = append(p.lines, p.m.style.faint.Render(label)+l)
			label = pad("", labelWidth)
		}
	}
}

// block writes lines below a heading, which are not to be broken at spaces.
func (p *paper) block(heading string, lines []string) {
	p.lines = append(p.lines, "", p.m.style.title.Render(heading))
	for _, l := range lines {
		p.lines = append(p.lines, hardwrap(l, p.width)...)
	}
}

func (p *paper) entry(d *detailPage) {
	e, m := d.entry, p.m
	f := e.Failure
	if d.err != nil {
		p.lines = append(p.lines, m.styled(m.style.bad, safe.Block(d.err.Error()), p.width)...)
	}
	p.field("id", safe.Line(e.ID))
	p.field("state", m.stateText(e))
	p.field("reason", strings.TrimSuffix(safe.Line(string(f.Reason))+": "+safe.Block(beginning(f.ReasonText, maxText)), ": "))
	p.field("consumer", safe.Line(e.Stream+"/"+e.Consumer))
	p.field("event", safe.Line(e.Event))
	p.field("subject", safe.Line(e.Subject)+fmt.Sprintf(" (sequence %d)", e.StreamSequence))
	p.field("stored", m.when(e.Stored))
	if !e.FirstFailed.IsZero() && !e.FirstFailed.Equal(f.Failed) {
		p.field("first", m.when(e.FirstFailed))
	}
	p.failure(f)
	p.field("origin", m.trace(e.OriginTraceparent))
	if f != e.Record {
		p.lines = append(p.lines, "", m.style.title.Render("the first failure"))
		p.failure(e.Record)
	}
	if d.current != nil {
		p.block("headers", headerLines(d.current))
		p.payload(d)
	}
	p.lines = append(p.lines, "", m.style.title.Render("history"))
	for _, l := range m.history(e) {
		p.lines = append(p.lines, wrap(l, p.width)...)
	}
}

// failure writes how it failed, and where that was seen.
func (p *paper) failure(f *dlq.Record) {
	m := p.m
	deliveries := "1 delivery"
	if f.Deliveries != 1 {
		deliveries = fmt.Sprintf("%d deliveries", f.Deliveries)
	}
	p.field("failed", m.when(f.Failed)+", "+deliveries)
	p.field("app", safe.Line(strings.Join(slices.DeleteFunc([]string{f.App, f.AppVersion, f.Module, f.Host}, func(s string) bool { return s == "" }), " ")))
	p.field("error", safe.Block(beginning(f.Error, maxText)))
	p.field("type", safe.Line(f.ErrorType))
	p.field("chain", safe.Line(strings.Join(f.ErrorTypes, " → ")))
	p.field("trace", m.trace(f.Traceparent))
	if len(f.Stack) > 0 {
		p.block("stack", strings.Split(safe.Block(beginning(strings.Join(f.Stack, "\n"), maxText)), "\n"))
	}
}

func (p *paper) payload(d *detailPage) {
	heading := "payload, " + bytesText(int64(d.current.BodySize))
	if d.entry.Revision > 0 {
		heading += fmt.Sprintf(", as of edit %d", d.entry.Revision)
	}
	if d.hidden {
		p.block(heading, []string{"(hidden; p shows it)"})
		return
	}
	p.block(heading, d.payload)
}

func headerLines(r *dlq.Record) []string {
	if len(r.Header) == 0 {
		return []string{"(none)"}
	}
	var lines []string
	for _, k := range slices.Sorted(maps.Keys(r.Header)) {
		for _, v := range r.Header[k] {
			lines = append(lines, safe.Line(k)+": "+safe.Line(beginning(v, maxLine)))
		}
	}
	return lines
}

func (m *model) stateText(e *dlq.Entry) string {
	text := safe.Line(string(e.State))
	if e.Actor != "" {
		text += " by " + safe.Line(e.Actor)
	}
	if !e.Changed.IsZero() {
		text += ", " + m.when(e.Changed)
	}
	if e.Replays > 0 {
		text += ", replayed " + times(e.Replays)
	}
	if e.Failures > 0 {
		text += ", failed again " + times(e.Failures)
	}
	return text
}

func times(n int) string {
	if n == 1 {
		return "once"
	}
	return count(n) + " times"
}

// trace is the ID of a trace, and where it can be looked at.
func (m *model) trace(parent string) string {
	match := traceparent.FindStringSubmatch(parent)
	if match == nil {
		return safe.Line(parent)
	}
	if m.opt.TraceURLTemplate == "" {
		return match[1]
	}
	return match[1] + "\n" + strings.ReplaceAll(safe.Line(m.opt.TraceURLTemplate), "{trace_id}", match[1])
}

// history has what was done, oldest first.
func (m *model) history(e *dlq.Entry) []string {
	lines := []string{m.when(e.Record.Failed) + " captured"}
	for _, c := range e.History {
		var text strings.Builder
		text.WriteString(m.when(c.Time) + " " + safe.Line(string(c.Kind)))
		if c.Revision > 0 {
			fmt.Fprintf(&text, " (revision %d)", c.Revision)
		}
		for _, part := range []struct{ before, text string }{
			{" by ", c.Actor}, {", operation ", c.Operation}, {" to ", c.Target}, {": ", c.Reason},
		} {
			if part.text != "" {
				text.WriteString(part.before + safe.Line(beginning(part.text, maxLine)))
			}
		}
		if c.Failure != nil {
			text.WriteString(": " + safe.Line(beginning(errorText(c.Failure), maxLine)))
		}
		lines = append(lines, text.String())
		if len(c.Diff) > 0 {
			lines = append(lines, "    "+safe.Line(beginning(string(c.Diff), maxLine)))
		}
	}
	return lines
}

// styled breaks a safe text into lines of one style.
func (m *model) styled(style lipgloss.Style, text string, width int) []string {
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		for _, l := range wrap(line, width) {
			lines = append(lines, style.Render(l))
		}
	}
	return lines
}
