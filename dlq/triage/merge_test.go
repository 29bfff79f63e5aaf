package triage_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"reflect"
	"strings"
	"testing"

	jsonpatch "github.com/evanphx/json-patch/v5"

	"github.com/monotel/monotel/dlq/triage"
)

// A patch changes what it names, and not a byte more.
func TestPatch(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, give, patch, want string }{
		{"characters of HTML", `{"a":"<b>&","z":1}`, `{"z":2}`, `{"a":"<b>&","z":2}`},
		{"characters of HTML in the patch", `{"z":1}`, `{"z":"<b>&"}`, `{"z":"<b>&"}`},
		{"a new member comes last", `{"a":"<b>&"}`, `{"z":2}`, `{"a":"<b>&","z":2}`},
		{"order", `{"z":1,"a":2,"m":3}`, `{"a":4}`, `{"z":1,"a":4,"m":3}`},
		{"forms of numbers", `{"n":1.0,"e":1E+2,"big":12345678901234567890,"z":1}`, `{"z":1.50}`, `{"n":1.0,"e":1E+2,"big":12345678901234567890,"z":1.50}`},
		{"escapes", `{"a":"\u00e4\/\ud83d","\u0062":1}`, `{"b":2}`, `{"a":"\u00e4\/\ud83d","\u0062":2}`},
		{"escapes in the patch", `{"b":1}`, `{"\u0062":"\u003c"}`, `{"b":"\u003c"}`},
		{"no UTF-8", "{\"a\":\"\xff\",\"z\":1}", `{"z":2}`, "{\"a\":\"\xff\",\"z\":2}"},
		{"space around", " \t{\"a\":1}\r\n", `{"a":2}`, " \t{\"a\":2}\r\n"},
		{"laid out, changed", "{\n  \"a\" : 1,\n  \"b\" : 2\n}\n", `{"a":3}`, "{\n  \"a\" : 3,\n  \"b\" : 2\n}\n"},
		{"laid out, added", "{\n  \"a\": 1,\n  \"b\": 2\n}\n", `{"c":3}`, "{\n  \"a\": 1,\n  \"b\": 2,\n  \"c\": 3\n}\n"},
		{"laid out, first removed", "{\n  \"a\": 1,\n  \"b\": 2\n}\n", `{"a":null}`, "{\n  \"b\": 2\n}\n"},
		{"laid out, last removed", "{\n  \"a\": 1,\n  \"b\": 2\n}\n", `{"b":null}`, "{\n  \"a\": 1\n}\n"},
		{"laid out, last replaced by another", "{\n  \"a\": 1,\n  \"b\": 2\n}", `{"b":null,"c":3}`, "{\n  \"a\": 1,\n  \"c\": 3\n}"},
		{"space before a comma", `{"a":1 ,"b":2 }`, `{"b":3}`, `{"a":1 ,"b":3 }`},
		{"all removed", `{ "a":1, "b":2 }`, `{"a":null,"b":null}`, `{}`},
		{"empty", `{}`, `{"a":1}`, `{"a":1}`},
		{"empty, and stays", `{ }`, `{"a":null}`, `{ }`},
		{"nothing to do", `{"a" :1}`, `{}`, `{"a" :1}`},
		{"nested", `{"a":{"b":"<", "c":[1, 2]},"d":0}`, `{"a":{"c":3}}`, `{"a":{"b":"<", "c":3},"d":0}`},
		{"nested, removed", `{"a":{"b":1,"c":2}}`, `{"a":{"b":null}}`, `{"a":{"c":2}}`},
		{"nested, new", `{"x":1}`, `{"a":{"b":null,"c":{"d":null}}}`, `{"x":1,"a":{"c":{}}}`},
		{"nested over a scalar", `{"a":1}`, `{"a":{"b":null,"c":1}}`, `{"a":{"c":1}}`},
		{"nested over an array", `{"a":[1]}`, `{"a":{"b":1}}`, `{"a":{"b":1}}`},
		{"an array is replaced whole", `{"a":[1,{"b":2}]}`, `{"a":[{"c":null}]}`, `{"a":[{"c":null}]}`},
		{"a string that looks like JSON", `{"a":"},{\"a\":1","b":1}`, `{"b":2}`, `{"a":"},{\"a\":1","b":2}`},
		{"a string that ends with a backslash", `{"a":"\\","b":1}`, `{"b":2}`, `{"a":"\\","b":2}`},
		{"a name twice, untouched", `{"a":1,"a":2,"b":3}`, `{"b":4}`, `{"a":1,"a":2,"b":4}`},
		{"a name twice, changed", `{"a":1,"b":3,"a":2}`, `{"a":4}`, `{"b":3,"a":4}`},
		{"a name twice, removed", `{"a":1,"b":3,"a":2}`, `{"a":null}`, `{"b":3}`},
		{"a name twice in the patch", `{"a":1}`, `{"a":2,"a":3}`, `{"a":3}`},
		{"a name twice in the patch, added", `{}`, `{"a":2,"a":3}`, `{"a":3}`},
		{"added and removed by the patch", `{"b":1}`, `{"a":2,"a":null}`, `{"b":1}`},
		{"an empty name", `{"":1,"a":2}`, `{"":3}`, `{"":3,"a":2}`},
		{"names differ in case", `{"A":1,"a":2}`, `{"a":3}`, `{"A":1,"a":3}`},
		{"words", `{"a":true,"b":false,"c":null,"d":-0}`, `{"b":true}`, `{"a":true,"b":true,"c":null,"d":-0}`},
		{"a patch that is laid out", `{"a":1}`, "{\n  \"b\": {\n    \"c\": [1, 2]\n  }\n}\n", `{"a":1,"b":{"c":[1,2]}}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := triage.Patch([]byte(tt.give), []byte(tt.patch))
			if err != nil || string(got) != tt.want {
				t.Errorf("%s patched with %s is\n%s, error %v, want\n%s", tt.give, tt.patch, got, err, tt.want)
			}
		})
	}
}

// Only an object is patched, and only with an object. The payload is not in the error.
func TestPatch_refused(t *testing.T) {
	t.Parallel()
	for _, tt := range [][2]string{
		{`[1,2]`, `{"b":2}`},
		{`"secret"`, `{"b":2}`},
		{`1`, `{"b":2}`},
		{`null`, `{"b":2}`},
		{`true`, `{"b":2}`},
		{``, `{"b":2}`},
		{`{"secret":`, `{"b":2}`},
		{`{"secret":1} {}`, `{"b":2}`},
		{"\ufeff{}", `{"b":2}`},
		{`secret`, `{"b":2}`},
		{`{}`, `[1]`},
		{`{}`, `null`},
		{`{}`, `"secret"`},
		{`{}`, ``},
		{`{}`, `{"secret"`},
		{strings.Repeat("[", 20_000), `{}`},
		{strings.Repeat(`{"a":`, 20_000) + "1" + strings.Repeat("}", 20_000), `{}`},
	} {
		got, err := triage.Patch([]byte(tt[0]), []byte(tt[1]))
		if !errors.Is(err, triage.ErrInvalid) || got != nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%.50s patched with %s is %s, error %v, want ErrInvalid", tt[0], tt[1], got, err)
		}
	}
}

// What an edit has changed is kept as it was written.
func TestMergeDiff(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ name, before, after, want string }{
		{"changed", `{"a":1,"b":"<b>&"}`, `{"a":2,"b":"<b>&"}`, `{"a":2}`},
		{"characters of HTML", `{"a":1}`, `{"a":"<b>&"}`, `{"a":"<b>&"}`},
		{"a large number", `{"a":12345678901234567890}`, `{"a":12345678901234567891}`, `{"a":12345678901234567891}`},
		{"added and removed", `{"a":1}`, `{"b":1.50}`, `{"b":1.50,"a":null}`},
		{"nested", `{"a":{"b":1,"c":2}}`, `{"a":{"b":1,"c":3}}`, `{"a":{"c":3}}`},
		{"layout", `{"a":{"b":[1,2]}}`, "{\n  \"a\": {\"b\": [1, 2]}\n}\n", `{}`},
		{"a name twice", `{"a":1,"a":2}`, `{"a":2}`, `{}`},
		{"an array", `{"a":[1]}`, `{"a":[1,{"b":"\u003c"}]}`, `{"a":[1,{"b":"\u003c"}]}`},
		{"a control character", `{"a":1}`, "{\"a\":\"\x7f\"}", `{"a":"\u007f"}`},
		{"large", `{"a":1}`, `{"a":"` + strings.Repeat("x", 3000) + `"}`, ``},
		{"no object", `[1]`, `{"a":1}`, ``},
	} {
		if got := triage.MergeDiff([]byte(tt.before), []byte(tt.after)); string(got) != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

// FuzzPatch compares with RFC 7396's algorithm on decoded values and, where that
// package follows it, with json-patch. What the patch does not name stays.
func FuzzPatch(f *testing.F) {
	f.Add(`{"a":"<b>&","z":1}`, `{"z":2}`)
	f.Add("{\n \"a\" : {\"b\":[1,{}]} ,\"a\":1E5}\r\n", `{"a":{"b":null,"c":{"d":null}}}`)
	f.Add(`{"":"\\\"","\u0061":-0.0}`, `{"a":[{"b":null}],"":null}`)
	f.Fuzz(func(t *testing.T, payload, patch string) {
		got, err := triage.Patch([]byte(payload), []byte(patch))
		doc, isDoc := object(payload)
		change, isChange := object(patch)
		if (err == nil) != (isDoc && isChange) {
			t.Fatalf("%q patched with %q: %v", payload, patch, err)
		}
		if err != nil {
			return
		}
		if !json.Valid(got) {
			t.Fatalf("%q patched with %q is %q, which is no JSON", payload, patch, got)
		}
		is := decoded(t, string(got))
		if want := rfc7396(doc, change); !reflect.DeepEqual(is, want) {
			t.Fatalf("%q patched with %q is %q, want %v", payload, patch, got, want)
		}
		if !strings.Contains(patch, "[") && !strings.Contains(payload, `\`) && !strings.Contains(patch, `\`) {
			if other, err := jsonpatch.MergePatch([]byte(payload), []byte(patch)); err == nil && json.Valid(other) {
				if want := decoded(t, string(other)); !reflect.DeepEqual(is, want) {
					t.Fatalf("%q patched with %q is %q, and %q by json-patch", payload, patch, got, other)
				}
			}
		}
		// Each value that is not named is there, as it was written.
		untouched(t, payload, string(got), change)
		// A patch that was applied has nothing more to change.
		if again, err := triage.Patch(got, []byte(patch)); err != nil || !bytes.Equal(again, got) {
			t.Fatalf("%q patched with %q once more is %q, error %v", got, patch, again, err)
		}
		if same, err := triage.Patch([]byte(payload), []byte(`{}`)); err != nil || string(same) != payload {
			t.Fatalf("%q patched with nothing is %q, error %v", payload, same, err)
		}
	})
}

func object(text string) (map[string]any, bool) {
	dec := json.NewDecoder(strings.NewReader(text))
	dec.UseNumber()
	var v map[string]any
	if !json.Valid([]byte(text)) || dec.Decode(&v) != nil || v == nil {
		return nil, false
	}
	return v, true
}

func decoded(t *testing.T, text string) map[string]any {
	t.Helper()
	v, ok := object(text)
	if !ok {
		t.Fatalf("%q is no object", text)
	}
	return v
}

// rfc7396 is MergePatch of the RFC.
func rfc7396(target, patch any) any {
	changes, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	of, _ := target.(map[string]any)
	result := make(map[string]any)
	maps.Copy(result, of)
	for k, v := range changes {
		if v == nil {
			delete(result, k)
		} else {
			result[k] = rfc7396(result[k], v)
		}
	}
	return result
}

// untouched checks the values of an object whose names a patch does not have.
func untouched(t *testing.T, before, after string, patch map[string]any) {
	t.Helper()
	raw := func(text string) (values map[string]json.RawMessage) {
		if err := json.Unmarshal([]byte(text), &values); err != nil {
			t.Fatal(err)
		}
		return values
	}
	was, is := raw(before), raw(after)
	for name, value := range was {
		if _, named := patch[name]; !named && string(is[name]) != string(value) {
			t.Fatalf("%q of %q is %q in %q, and is not named by %v", name, before, is[name], after, patch)
		}
	}
}
