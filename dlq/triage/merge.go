package triage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
)

// Patch applies a JSON merge patch (RFC 7396) to a payload. Both must be JSON objects:
// otherwise it is an [ErrInvalid], as a patch of anything else would replace it.
//
// What the patch does not name stays byte for byte: order, spaces, the forms of numbers
// and strings. New members come last. Of a name that is there several times, the last
// counts, and is the only one left if the patch names it.
func Patch(payload, patch []byte) ([]byte, error) {
	if !isObject(patch) {
		return nil, fmt.Errorf("%w: the patch is no JSON object", ErrInvalid)
	}
	if !isObject(payload) {
		return nil, fmt.Errorf("%w: the payload is no JSON object, so there is nothing that a patch applies to", ErrInvalid)
	}
	var compact bytes.Buffer
	if err := json.Compact(&compact, patch); err != nil {
		return nil, fmt.Errorf("%w: the patch is no JSON object", ErrInvalid)
	}
	before, object, after := trimmed(payload)
	return slices.Concat(before, merged(object, compact.Bytes()), after), nil
}

func isObject(data []byte) bool {
	data = bytes.TrimLeft(data, jsonSpace)
	return len(data) > 0 && data[0] == '{' && json.Valid(data)
}

const jsonSpace = " \t\r\n"

// trimmed splits a value from the space around it.
func trimmed(data []byte) (before, value, after []byte) {
	rest := bytes.TrimLeft(data, jsonSpace)
	value = bytes.TrimRight(rest, jsonSpace)
	return data[:len(data)-len(rest)], value, rest[len(value):]
}

// A member is a part of a JSON object, as it is written. Its pieces are those of
// lead "key" colon value trail.
type member struct {
	lead  []byte // space
	raw   []byte // the key with its quotes
	colon []byte // with the space around it
	value []byte
	trail []byte // space

	name string // decoded
	gone bool
}

// members takes a valid object apart. An empty one has no members, and space between
// its braces is lost.
func members(object []byte) []member {
	var all []member
	for i := 1; ; {
		var m member
		m.lead, i = spaceAt(object, i)
		if object[i] == '}' {
			return all
		}
		m.raw, i = valueAt(object, i)
		start := i
		_, i = spaceAt(object, i)
		_, i = spaceAt(object, i+1) // behind the colon
		m.colon = object[start:i]
		m.value, i = valueAt(object, i)
		m.trail, i = spaceAt(object, i)
		_ = json.Unmarshal(m.raw, &m.name) // it is valid
		all = append(all, m)
		if object[i] == '}' {
			return all
		}
		i++ // behind the comma
	}
}

// spaceAt returns the space at i, and where it ends.
func spaceAt(data []byte, i int) (space []byte, end int) {
	end = i
	for end < len(data) && strings.IndexByte(jsonSpace, data[end]) >= 0 {
		end++
	}
	return data[i:end], end
}

// valueAt returns the value at i, of valid JSON, and where it ends.
func valueAt(data []byte, i int) (value []byte, end int) {
	depth := 0
	for end = i; end < len(data); end++ {
		switch data[end] {
		case '"':
			for end++; data[end] != '"'; end++ {
				if data[end] == '\\' {
					end++
				}
			}
			if depth == 0 {
				return data[i : end+1], end + 1
			}
		case '{', '[':
			depth++
		case '}', ']':
			if depth == 0 { // of what a number or word is in
				return data[i:end], end
			}
			depth--
			if depth == 0 {
				return data[i : end+1], end + 1
			}
		case ',', ' ', '\t', '\r', '\n':
			if depth == 0 {
				return data[i:end], end
			}
		}
	}
	return data[i:], len(data)
}

// merged applies a compact patch to an object. Both are valid, and without space around
// them.
func merged(object, patch []byte) []byte {
	changes := members(patch)
	if len(changes) == 0 {
		return object
	}
	all := members(object)
	last := make(map[string]int, len(all)) // index of what counts, by name
	for i := range all {
		last[all[i].name] = i
	}
	repeats, touched := len(last) < len(all), false
	like := member{colon: []byte(":")} // what is new is laid out like what is there
	var tail []byte
	if n := len(all); n > 0 {
		like, tail = member{lead: all[n-1].lead, colon: all[n-1].colon}, all[n-1].trail
		all[n-1].trail = nil
	}
	for i := range changes {
		c := &changes[i]
		at, there := last[c.name]
		remove := string(c.value) == "null"
		if remove && !there {
			continue
		}
		touched = true
		for j := range all {
			if !repeats {
				break
			}
			all[j].gone = all[j].gone || all[j].name == c.name && j != at
		}
		switch {
		case remove:
			all[at].gone = true
			delete(last, c.name)
		case there:
			all[at].value = applied(all[at].value, c.value)
		default:
			last[c.name] = len(all)
			all = append(all, member{lead: like.lead, raw: c.raw, colon: like.colon, value: applied(nil, c.value), name: c.name})
		}
	}
	if !touched {
		return object
	}
	all = slices.DeleteFunc(all, func(m member) bool { return m.gone })
	if n := len(all); n > 0 {
		all[n-1].trail = tail
	}
	return written(all)
}

// written puts an object together.
func written(all []member) []byte {
	b := []byte{'{'}
	for i := range all {
		m := &all[i]
		if i > 0 {
			b = append(b, ',')
		}
		for _, piece := range [][]byte{m.lead, m.raw, m.colon, m.value, m.trail} {
			b = append(b, piece...)
		}
	}
	return append(b, '}')
}

// applied is what a member's value becomes, nil if there was none.
func applied(value, patch []byte) []byte {
	if patch[0] != '{' {
		return patch
	}
	if len(value) == 0 || value[0] != '{' {
		value = []byte("{}")
	}
	return merged(value, patch)
}

// mergeDiff is the JSON merge patch from one payload to another, or nil if it is
// large or one of them is no JSON object.
func mergeDiff(before, after []byte) json.RawMessage {
	const most = 2 << 10
	if !isObject(before) || !isObject(after) {
		return nil
	}
	_, from, _ := trimmed(before)
	_, to, _ := trimmed(after)
	var diff bytes.Buffer
	if err := json.Compact(&diff, changed(from, to)); err != nil || diff.Len() > most {
		return nil
	}
	// It is stored as a header, which takes no control characters. Only strings have this one.
	return bytes.ReplaceAll(diff.Bytes(), []byte{0x7f}, []byte(`\u007f`))
}

// changed is the merge patch from one object to another.
func changed(from, to []byte) []byte {
	old, now := byName(members(from)), byName(members(to))
	var all []member
	for _, m := range members(to) {
		if now[m.name] == nil { // a name that is there twice was the last
			continue
		}
		is, was := now[m.name], old[m.name]
		delete(now, m.name)
		delete(old, m.name)
		switch {
		case was != nil && sameJSON(was, is):
		case len(was) > 0 && was[0] == '{' && is[0] == '{':
			all = append(all, member{raw: m.raw, colon: []byte(":"), value: changed(was, is)})
		default:
			all = append(all, member{raw: m.raw, colon: []byte(":"), value: is})
		}
	}
	for _, m := range members(from) {
		if old[m.name] != nil {
			delete(old, m.name)
			all = append(all, member{raw: m.raw, colon: []byte(":"), value: []byte("null")})
		}
	}
	return written(all)
}

// byName returns the values of an object by their names.
func byName(all []member) map[string][]byte {
	values := make(map[string][]byte, len(all))
	for i := range all {
		values[all[i].name] = all[i].value
	}
	return values
}

// sameJSON reports whether two values differ in their layout at most.
func sameJSON(a, b []byte) bool {
	var x, y bytes.Buffer
	return bytes.Equal(a, b) || json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}
