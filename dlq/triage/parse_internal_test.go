package triage

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
)

func FuzzDecodeItems(f *testing.F) {
	f.Add(encodeItems([]item{{1, 2, 0}, {5, 9, 7}}))
	f.Add([]byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x01\x01"))
	f.Add([]byte("\x80"))
	f.Fuzz(func(t *testing.T, b []byte) {
		items, err := decodeItems(b)
		if err != nil || !slices.IsSortedFunc(items, func(a, b item) int {
			if a.sequence > b.sequence || a.last < a.sequence || a.edit > 0 && a.edit < a.sequence {
				return 1
			}
			return 0
		}) {
			return
		}
		again, err := decodeItems(encodeItems(items))
		if err != nil || !slices.Equal(items, again) {
			t.Errorf("%v becomes %v, %v", items, again, err)
		}
	})
}

// An operation in the bucket may be anybody's.
func FuzzStored(f *testing.F) {
	f.Add([]byte(`{"version":1,"plan":{"id":"a","selected":3},"status":"running","want":"paused","counted":{"claimed":2,"skipped":{"x":1}}}`))
	f.Add([]byte(`{"plan":{"selected":-5},"skipped":{"x":-9223372036854775808},"counted":{"claimed":9223372036854775807,"released":-1}}`))
	f.Add([]byte(`{"plan":{"selected":1125899906842624,"canary":[-1]},"cursor":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s := &stored{}
		if json.Unmarshal(data, s) != nil {
			return
		}
		o := s.operation(s.Counted)
		if o.Remaining < 0 || o.InFlight() < 0 {
			t.Errorf("%s: %d remain, %d in flight", data, o.Remaining, o.InFlight())
		}
		opts := s.Plan.Options
		if err := opts.withDefaults(); err == nil && (opts.MaxReplays < 1 || !(opts.Rate >= 0) || opts.Target == "") {
			t.Errorf("%s: options %+v", data, opts)
		}
	})
}

func FuzzIDs(f *testing.F) {
	for _, s := range []string{"", "abc", "20260102-150405-abcde", "a.b", "*", ">", "a b", "\x00", "é"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if (isID(s) || validOperationID(s)) && (s == "" || strings.ContainsAny(s, ".*> \t\r\n$\x00") || strings.ToLower(s) != s) {
			t.Errorf("%q is taken for an ID", s)
		}
	})
}

// The lines of an export come from a file.
func FuzzExportLine(f *testing.F) {
	f.Add([]byte(`{"id":"abc","messages":[{"time":"2026-01-02T03:04:05Z","header":{"Dlq-Version":["1"]},"data":"e30="}],"objects":{"abc.body":"AA=="}}`))
	f.Add([]byte(`{"id":"abc","messages":[{}]}`))
	f.Add([]byte(`{"end":{"count":-1}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var line exportLine
		if json.Unmarshal(data, &line) != nil {
			return
		}
		rec, err := line.record()
		if err != nil {
			return
		}
		if rec.ID != line.ID || !isID(rec.ID) {
			t.Errorf("%s is the line of %q", data, rec.ID)
		}
		for name := range line.Objects {
			if !strings.HasPrefix(name, rec.ID) {
				t.Errorf("%s has object %q", data, name)
			}
		}
	})
}
