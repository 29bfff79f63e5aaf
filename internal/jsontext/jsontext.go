// Package jsontext lays out JSON for people, within bounds, and reads its tokens. The
// text of a payload is hostile: nothing here uses more than a few times its size.
package jsontext

import (
	"bytes"
	"encoding/json"
	"strings"
	"unicode/utf8"
)

// Bounds of [Indent]. Indentation grows with the square of the depth: 20 KB of
// brackets, indented in full, are 200 MB.
const (
	mostIndented  = 64       // levels
	spareIndented = 64 << 10 // bytes of white space, in addition to
	timesIndented = 4        // times the size of the payload
)

// Indent lays out a payload for people: JSON is indented by two spaces for each
// level, anything else stays as it is. Levels below the 64th stay on one line, and
// so does the rest once the indentation is longer than four times the payload and
// 64 KiB more, so the text takes no more than six times the payload and 64 KiB.
//
// The text has at most so many bytes. left is how many bytes of the payload are
// missing from it, 0 if it is whole.
func Indent(data []byte, most int) (text []byte, left int) {
	if !json.Valid(data) {
		text = beginning(data, most)
		return text, len(data) - len(text)
	}
	var b bytes.Buffer
	depth, spaces := 0, 0
	newline := func(level int) {
		if level > mostIndented || spaces > timesIndented*len(data)+spareIndented {
			return
		}
		indent := strings.Repeat("  ", depth)
		spaces += 1 + len(indent)
		b.WriteByte('\n')
		b.WriteString(indent)
	}
	for _, token, rest := NextToken(data); len(token) > 0 && b.Len() <= most; _, token, rest = NextToken(rest) {
		left = len(rest)
		switch token[0] {
		case '{', '[':
			b.Write(token)
			if _, next, after := NextToken(rest); len(next) > 0 && (next[0] == '}' || next[0] == ']') {
				b.Write(next) // an empty one stays on its line
				rest = after
				left = len(rest)
				break
			}
			depth++
			newline(depth)
		case '}', ']':
			depth--
			newline(depth + 1)
			b.Write(token)
		case ',':
			b.Write(token)
			newline(depth)
		case ':':
			b.WriteString(": ")
		default:
			b.Write(token)
		}
	}
	if len(bytes.TrimLeft(data[len(data)-left:], jsonSpace)) == 0 {
		left = 0
	}
	text = beginning(b.Bytes(), most)
	return text, min(left+b.Len()-len(text), len(data))
}

const jsonSpace = " \t\r\n"

// NextToken returns the first token of JSON text, the white space before it and
// the text after it. At the end the token is empty.
func NextToken(data []byte) (space, token, rest []byte) {
	n := len(data) - len(bytes.TrimLeft(data, jsonSpace))
	space, data = data[:n], data[n:]
	if len(data) == 0 {
		return space, nil, nil
	}
	end := 1
	switch data[0] {
	case '{', '}', '[', ']', ',', ':':
	case '"':
		for end < len(data) && data[end] != '"' {
			if data[end] == '\\' {
				end++
			}
			end++
		}
		end = min(end+1, len(data))
	default:
		for end < len(data) && strings.IndexByte(jsonSpace+`{}[],:"`, data[end]) < 0 {
			end++
		}
	}
	return space, data[:end], data[end:]
}

// Nested reports whether JSON text has more than so many levels.
func Nested(data []byte, levels int) bool {
	depth := 0
	for _, token, rest := NextToken(data); len(token) > 0; _, token, rest = NextToken(rest) {
		switch token[0] {
		case '{', '[':
			depth++
			if depth > levels {
				return true
			}
		case '}', ']':
			depth--
		}
	}
	return false
}

// beginning is a text cut to at most so many bytes, between two letters.
func beginning(text []byte, most int) []byte {
	if len(text) <= most {
		return text
	}
	end := most
	for end > 0 && end > most-utf8.UTFMax && !utf8.RuneStart(text[end]) {
		end--
	}
	return text[:end]
}
