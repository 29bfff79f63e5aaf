package triage

import (
	"crypto/sha256"
	"encoding/base32"
	"path"
	"strings"
	"unicode/utf8"

	"github.com/monotel/monotel/dlq"
)

// fingerprintVersion is part of what is hashed: with other rules there are other
// groups, and not the same with other members.
const fingerprintVersion = "1"

// Fingerprint names the cause of an entry's latest failure by ten letters and
// digits: its consumer, the types of the error, its text without what differs from
// message to message (see [Normalize]), and where it has a stack the first function
// of the program's own. Without an error the reason stands for it.
func Fingerprint(e *dlq.Entry) string {
	f := e.Failure
	h := sha256.New()
	write := func(s string) {
		h.Write([]byte(s))
		h.Write([]byte{0})
	}
	write(fingerprintVersion)
	write(e.Consumer)
	if len(f.ErrorTypes) > 0 {
		for _, t := range f.ErrorTypes {
			write(t)
		}
	} else {
		write(f.ErrorType)
	}
	write(cause(f))
	write(ownFrame(f.Stack))
	const letters = 10
	return strings.ToLower(base32.StdEncoding.EncodeToString(h.Sum(nil)))[:letters]
}

// cause is the normalised text of a failure.
func cause(f *dlq.Record) string {
	switch {
	case f.Error != "":
		return Normalize(f.Error)
	case f.ReasonText != "":
		return string(f.Reason) + ": " + Normalize(f.ReasonText)
	}
	return string(f.Reason)
}

// ownFrame returns the first function of a panic's stack that is neither of the
// standard library nor of monotel, and the name of its file.
func ownFrame(stack []string) string {
	start := 0
	for i, line := range stack {
		if strings.HasPrefix(line, "panic(") {
			start = i + 2 //nolint:mnd // a function and its place
		}
	}
	for i := start; i+1 < len(stack); i++ {
		function, place := stack[i], strings.TrimSpace(stack[i+1])
		if strings.HasPrefix(function, "\t") || !strings.HasPrefix(stack[i+1], "\t") {
			continue
		}
		if at := strings.LastIndexByte(function, '('); at > 0 {
			function = function[:at]
		}
		file, _, _ := strings.Cut(place, ":")
		pkg := function
		if slash := strings.LastIndexByte(pkg, '/'); slash >= 0 {
			if dot := strings.IndexByte(pkg[slash:], '.'); dot >= 0 {
				pkg = pkg[:slash+dot]
			}
		} else if dot := strings.IndexByte(pkg, '.'); dot >= 0 {
			pkg = pkg[:dot]
		}
		standard := strings.Contains(file, "/src/"+pkg+"/") || path.Dir(file) == pkg && pkg != "main"
		if standard || strings.HasPrefix(pkg, "github.com/monotel/monotel/") {
			continue
		}
		return function + " " + path.Base(file)
	}
	return ""
}

// How much of a text is looked at, and how much of it is kept.
const (
	longestText       = 2 << 10
	longestNormalized = 512
)

// Normalize blanks what differs between two errors of the same cause: numbers with
// their units, identifiers, addresses, times, e-mail addresses, URLs, what is in
// quotes, and what follows a "=". Words stay. It looks at the first 2 KiB.
func Normalize(text string) string {
	if len(text) > longestText {
		text = text[:longestText]
	}
	var b strings.Builder
	b.Grow(min(len(text), longestNormalized))
	space, afterEquals := false, false
	for i := 0; i < len(text) && b.Len() < longestNormalized; {
		c := text[i]
		switch {
		case c <= ' ' || c == 0x7f:
			space = b.Len() > 0
			i++
			continue
		case isQuote(c) && (i == 0 || !isWordByte(text[i-1])):
			if end := closingQuote(text[i+1:], c); end >= 0 {
				pad(&b, &space)
				b.WriteString("<text>")
				i += end + 2 //nolint:mnd // both quotes
				afterEquals = false
				continue
			}
		case isTokenByte(c):
			end := i
			for end < len(text) && (isTokenByte(text[end]) || text[end] == ',' && betweenDigits(text, end)) {
				end++
			}
			if strings.Contains(text[i:end], "://") {
				for end < len(text) && text[end] > ' ' && !isQuote(text[end]) && strings.IndexByte("()<>[]{}", text[end]) < 0 {
					end++
				}
			}
			token := strings.TrimRight(text[i:end], ".:-/+,;")
			if token == "" {
				token = text[i:end]
			}
			pad(&b, &space)
			if afterEquals {
				b.WriteString("<value>")
			} else {
				writeToken(&b, token)
			}
			b.WriteString(text[i+len(token) : end])
			i, afterEquals = end, false
			continue
		}
		pad(&b, &space)
		_, size := utf8.DecodeRuneInString(text[i:])
		b.WriteString(text[i : i+size])
		afterEquals = c == '='
		i += size
	}
	return strings.ToValidUTF8(b.String(), "�")
}

func pad(b *strings.Builder, space *bool) {
	if *space {
		b.WriteByte(' ')
		*space = false
	}
}

func isQuote(c byte) bool { return c == '"' || c == '\'' || c == '`' }

// closingQuote finds the end of what is quoted, with Go's and JSON's escapes.
func closingQuote(s string, quote byte) int {
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			if quote != '`' {
				i++
			}
		case quote:
			return i
		}
	}
	return -1
}

func isDigit(c byte) bool  { return '0' <= c && c <= '9' }
func isLower(c byte) bool  { return 'a' <= c && c <= 'z' }
func isUpper(c byte) bool  { return 'A' <= c && c <= 'Z' }
func isLetter(c byte) bool { return isLower(c) || isUpper(c) }
func isHex(c byte) bool    { return isDigit(c) || 'a' <= c && c <= 'f' || 'A' <= c && c <= 'F' }

func isWordByte(c byte) bool { return isLetter(c) || isDigit(c) || c == '_' || c >= utf8.RuneSelf }

func isTokenByte(c byte) bool {
	return isWordByte(c) || strings.IndexByte("-.:/@%+#~", c) >= 0
}

func betweenDigits(s string, i int) bool {
	return i > 0 && i+1 < len(s) && isDigit(s[i-1]) && isDigit(s[i+1])
}

// writeToken writes a run of letters, digits and what joins them.
func writeToken(b *strings.Builder, token string) {
	switch {
	case strings.Contains(token, "://"):
		b.WriteString("<url>")
		return
	case strings.IndexByte(token, '@') > 0 && strings.IndexByte(token, '.') > 0:
		b.WriteString("<email>")
		return
	case isAddress(token):
		b.WriteString("<addr>")
		return
	case isTime(token):
		b.WriteString("<time>")
		return
	case isUUID(token):
		b.WriteString("<id>")
		return
	case isNumber(token):
		b.WriteByte('#')
		return
	}
	for token != "" {
		end := 0
		for end < len(token) && (isLetter(token[end]) || isDigit(token[end]) || token[end] >= utf8.RuneSelf || token[end] == '#') {
			end++
		}
		if end == 0 {
			b.WriteByte(token[0])
			token = token[1:]
			continue
		}
		writePart(b, token[:end])
		token = token[end:]
	}
}

// writePart writes letters and digits that nothing separates.
func writePart(b *strings.Builder, part string) {
	const shortHex, longWord = 8, 22
	changes, digits, hex := 0, 0, true
	for i := range len(part) {
		c := part[i]
		if isDigit(c) {
			digits++
		}
		hex = hex && isHex(c)
		if i > 0 && isDigit(c) != isDigit(part[i-1]) {
			changes++
		}
	}
	switch {
	case digits == len(part), digits > 0 && isDigit(part[0]) && changes == 1 && len(part) < shortHex: // 12, 12ms
		b.WriteByte('#')
	case hex && len(part) >= shortHex, changes > 1, digits > 0 && isDigit(part[0]):
		b.WriteString("<id>")
	case digits > 0: // order7
		b.WriteString(strings.TrimRight(part, "0123456789"))
		b.WriteByte('#')
	case !isWord(part), len(part) >= longWord && isLetter(part[0]):
		b.WriteString("<id>")
	default:
		b.WriteString(part)
	}
}

// isWord reports whether letters look like words: a capital is followed by
// capitals or by two small letters at least, as in OrderPlaced and HTTPServer, and
// not as in xQzPw.
func isWord(part string) bool {
	for i := 1; i < len(part); i++ {
		if !isUpper(part[i]) || isUpper(part[i-1]) {
			continue
		}
		small := 0
		for j := i + 1; j < len(part) && (isLower(part[j]) || isUpper(part[j]) && small == 0); j++ {
			small++
		}
		if small < 2 && i+small+1 < len(part) { //nolint:mnd // the last word may be short
			return false
		}
	}
	return true
}

// isAddress reports whether a token is an IP address, with or without a port.
func isAddress(token string) bool {
	token, _, _ = strings.Cut(token, "%") // a zone
	dots, colons := strings.Count(token, "."), strings.Count(token, ":")
	for i := range len(token) {
		if c := token[i]; !isHex(c) && c != '.' && c != ':' {
			return false
		}
	}
	if colons >= 2 { //nolint:mnd // IPv6
		return strings.Contains(token, "::") || colons >= 5
	}
	if dots != 3 { //nolint:mnd // IPv4
		return false
	}
	host, _, _ := strings.Cut(token, ":")
	for part := range strings.SplitSeq(host, ".") {
		if part == "" || len(part) > 3 || strings.Trim(part, "0123456789") != "" {
			return false
		}
	}
	return true
}

// isTime reports whether a token begins as a date does.
func isTime(token string) bool {
	const date = "dddd-dd-dd"
	if len(token) < len(date) {
		return false
	}
	for i := range len(date) {
		if date[i] == 'd' && !isDigit(token[i]) || date[i] != 'd' && token[i] != '-' && token[i] != '/' {
			return false
		}
	}
	return true
}

func isUUID(token string) bool {
	const form = "xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx"
	if len(token) != len(form) {
		return false
	}
	for i := range len(form) {
		if (form[i] == '-') != (token[i] == '-') || form[i] == 'x' && !isHex(token[i]) {
			return false
		}
	}
	return true
}

// isNumber reports whether a token is a number, with a sign, a fraction, an
// exponent, a unit of a few letters, or several of them, as in 1h2m3.5s.
func isNumber(token string) bool {
	token = strings.TrimLeft(token, "+-")
	if rest, ok := strings.CutPrefix(token, "0x"); ok {
		return rest != "" && strings.Trim(rest, "0123456789abcdefABCDEF") == ""
	}
	if token == "" || !isDigit(token[0]) {
		return false
	}
	const longestUnit = 3
	for token != "" {
		end := 0
		for end < len(token) && (isDigit(token[end]) || token[end] == '.' || token[end] == ',') {
			end++
		}
		if end == 0 {
			return false
		}
		token = token[end:]
		end = 0
		for end < len(token) && (isLetter(token[end]) || token[end] == '%' || token[end] >= utf8.RuneSelf) {
			end++
		}
		if unit := token[:end]; end > longestUnit || end > 0 && !units[unit] {
			return false
		}
		if strings.EqualFold(token[:end], "e") {
			token = strings.TrimLeft(token[end:], "+-")
			continue
		}
		token = token[end:]
	}
	return true
}

var units = map[string]bool{
	"e": true, "E": true, "%": true, "ns": true, "µs": true, "us": true, "ms": true, "s": true, "m": true, "h": true, "d": true,
	"B": true, "b": true, "k": true, "kB": true, "KB": true, "MB": true, "GB": true, "TB": true, "KiB": true, "MiB": true, "GiB": true,
	"TiB": true, "K": true, "M": true, "G": true, "T": true,
}
