package draft

import (
	"bytes"
	"strings"

	"github.com/monotel/monotel/internal/jsontext"
)

// A word is a token of JSON with the white space before it. The last one is only
// white space.
type word struct{ space, token []byte }

func words(text []byte) []word {
	var ws []word
	for {
		space, token, rest := jsontext.NextToken(text)
		ws = append(ws, word{space, token})
		if len(token) == 0 {
			return ws
		}
		text = rest
	}
}

// restored returns JSON that was laid out and edited with the white space that it
// had before. If only values are others, that is all of it. Otherwise it is that of
// the text before the first change and after the last one, and between them that
// which is usual in it.
func restored(before, written []byte) []byte {
	was, now := words(before), words(written)
	same := func(a, b word) bool { return bytes.Equal(a.token, b.token) }
	most := min(len(was), len(now))
	head, tail := 0, 0
	for head < most && same(was[head], now[head]) {
		head++
	}
	for tail < most-head && same(was[len(was)-1-tail], now[len(now)-1-tail]) {
		tail++
	}
	usual := make(map[place][]byte)
	for i, w := range was {
		if at := placeOf(was, i); usual[at] == nil {
			usual[at] = append([]byte{}, w.space...)
		}
	}
	afterComma, afterColon := place{before: ','}, place{before: ':'}
	if usual[afterComma] == nil {
		usual[afterComma] = usual[afterColon]
	}
	var b bytes.Buffer
	for i, w := range now {
		switch {
		case i < head, len(was) == len(now), i == head && placeOf(was, i) == placeOf(now, i):
			b.Write(was[i].space)
		case i >= len(now)-tail:
			b.Write(was[len(was)-len(now)+i].space)
		default:
			b.Write(usual[placeOf(now, i)])
		}
		b.Write(w.token)
	}
	return b.Bytes()
}

// A place is what is on both sides of white space, as far as its style depends on
// it.
type place struct{ before, after byte }

func placeOf(ws []word, i int) (p place) {
	kind := func(token []byte) byte {
		if len(token) > 0 && strings.IndexByte("{}[],:", token[0]) >= 0 {
			return token[0]
		}
		return 0 // a value, or the end
	}
	p.after = kind(ws[i].token)
	if i > 0 {
		p.before = kind(ws[i-1].token)
	}
	if p.before != 0 && p.after != '}' && p.after != ']' {
		p.after = 0 // as before any other value
	}
	if p.after != 0 && p.after != '{' && p.after != '[' && p.before != '{' && p.before != '[' {
		p.before = 0 // as after any other value
	}
	return p
}
