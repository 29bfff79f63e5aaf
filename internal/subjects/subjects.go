// Package subjects compares subjects with wildcards.
package subjects

import "strings"

// Covers reports whether pattern matches all that subject, which may be a pattern
// itself, matches.
func Covers(pattern, subject string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, token := range p {
		switch {
		case i >= len(s):
			return false
		case token == ">":
			return true
		case s[i] == ">":
			return false
		case token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// Overlap reports whether there are subjects that match both patterns.
func Overlap(a, b string) bool {
	p, s := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(p), len(s)) {
		switch {
		case p[i] == ">", s[i] == ">":
			return true
		case p[i] != "*" && s[i] != "*" && p[i] != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}
