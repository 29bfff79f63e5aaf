package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/monotel/monotel/mono"
)

func TestLineReader(t *testing.T) {
	t.Parallel()
	// The buffer is smaller than most lines, and the limit than some.
	const text = "one\n\n" + "exactly twenty chars\n" + "more than twenty chars, much more\n" + "last, unterminated"
	r := lineReader{r: bufio.NewReaderSize(strings.NewReader(text), 16), limit: 20}
	var got []string
	for {
		l, err := r.next()
		if errors.Is(err, io.EOF) {
			break
		}
		if errors.Is(err, errLongLine) {
			got = append(got, "too long")
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if at := text[r.offset : int(r.offset)+len(l)]; at != string(l) {
			t.Errorf("line %d is %q, at its offset there is %q", r.number, l, at)
		}
		got = append(got, string(l))
	}
	want := []string{"one", "", "exactly twenty chars", "too long", "last, unterminated"}
	if !slices.Equal(got, want) || r.number != len(want) {
		t.Errorf("got %d lines: %q, want %q", r.number, got, want)
	}
}

func TestInput_manyFamilies(t *testing.T) {
	t.Parallel()
	var b strings.Builder
	for i := range maxFamilies + 2 {
		b.WriteString(`{"event":"e` + strings.Repeat("x", i%50) + string(rune('a'+i/50)) + `","payload":{}}` + "\n")
	}
	in := openTestInput(t, writeFile(t, b.String()))
	if len(in.families) != maxFamilies || in.bad != 2 || in.read != maxFamilies+2 {
		t.Errorf("%d families, %d of %d lines are bad, want %d and 2", len(in.families), in.bad, in.read, maxFamilies)
	}
}

func TestInput_changed(t *testing.T) {
	t.Parallel()
	in := openTestInput(t, events)
	in.lines[0].sum[0]++
	if _, err := in.payload(&in.lines[0]); err == nil {
		t.Error("the line has another payload than before, and no error")
	}
	if _, err := in.payload(&in.lines[1]); err != nil {
		t.Error(err)
	}
}

// Whatever a line holds: if it is taken, its event can be declared, no other
// event has the same subject, and its payload is part of the line.
func FuzzParseLine(f *testing.F) {
	f.Add(`{"event":"issues","action":"opened","payload":{"action":"opened"}}`)
	f.Add(`{"payload": { "a" : [1, 2] } , "event":"branch_protection_rule"}`)
	f.Add(`{"event":"a-b","payload":{}}`)
	f.Add(`{"event":"","payload":null}`)
	f.Add("{\"event\":\"\\u0069ssues\",\"payload\":{\"\\ud800\":\"\xff\"}}")
	f.Fuzz(func(t *testing.T, text string) {
		family, payload, err := parseLine([]byte(text))
		if err != nil {
			return
		}
		e, err := mono.NewEvent(owner, family, version)
		if err != nil {
			t.Error(err)
		}
		if want := "events.github.v1." + strings.ReplaceAll(family, "_", "-"); e.Subject != want {
			t.Errorf("subject %q, want %q", e.Subject, want)
		}
		if !json.Valid(payload) || !strings.Contains(text, string(payload)) {
			t.Errorf("payload %q is not part of %q", payload, text)
		}
	})
}
