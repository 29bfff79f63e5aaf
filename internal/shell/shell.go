// Package shell writes command lines that are suggested to a person, with names that
// come from a server or a message.
package shell

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

var plainWord = regexp.MustCompile(`^[a-zA-Z0-9_./:,@%+-][a-zA-Z0-9_./:,=@%+-]*$`)

// Quote quotes a text as one word for a POSIX shell. Words without special
// characters stay as they are. What a terminal may obey or not show is written as $'\x1b',
// which bash, zsh and ksh read.
func Quote(word string) string {
	switch {
	case plainWord.MatchString(word):
		return word
	case printable(word):
		return "'" + strings.ReplaceAll(word, "'", `'\''`) + "'"
	}
	var b strings.Builder
	for _, r := range []byte(word) {
		switch {
		case r == '\'' || r == '\\':
			b.WriteByte('\\')
			b.WriteByte(r)
		case ' ' <= r && r <= '~':
			b.WriteByte(r)
		default:
			fmt.Fprintf(&b, `\x%02x`, r)
		}
	}
	return "$'" + b.String() + "'"
}

func printable(word string) bool {
	return utf8.ValidString(word) && strings.IndexFunc(word, func(r rune) bool {
		return !unicode.IsPrint(r) || unicode.In(r, unicode.Mn, unicode.Me, unicode.Other_Default_Ignorable_Code_Point)
	}) < 0
}

// Command is a command line to suggest: the command, names that are not ours, such
// as that of a stream, and flags, which are given as they are to stand. Names that
// begin with a hyphen come last, after "--", so that none is taken for a flag.
func Command(command string, names []string, flags ...string) string {
	words := []string{command}
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = Quote(n)
	}
	if slices.ContainsFunc(names, func(n string) bool { return strings.HasPrefix(n, "-") }) {
		words = append(append(words, flags...), "--")
		return strings.Join(append(words, quoted...), " ")
	}
	return strings.Join(append(append(words, quoted...), flags...), " ")
}
