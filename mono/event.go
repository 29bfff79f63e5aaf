package mono

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// subjectPrefix is the first token of every automatic subject. It is part of
// the wire contract.
const subjectPrefix = "events"

// A BaseEventDefinition names an event without its Go type. ModuleName, Name
// and Version identify it; Subject is where it is published.
//
// Values usually come from helper.EventDefinition or from [NewEvent], which
// check them; an App checks them again when a module declares them.
type BaseEventDefinition struct {
	ModuleName string // the module, or domain, that owns the event, such as "order"
	Name       string // in CamelCase, such as "OrderCreated"
	Version    string // such as "v1"
	Subject    string // a NATS subject without wildcards, such as "events.order.v1.order-created"
}

// NewEvent returns the definition of an event. Without a subject the event gets
// events.<module>.<version>.<kebab-case name>. The error wraps [ErrInvalidName]
// or [ErrInvalidSubject] and names every problem.
func NewEvent(module, name, version string, subject ...string) (BaseEventDefinition, error) {
	e := BaseEventDefinition{ModuleName: module, Name: name, Version: version}
	switch len(subject) {
	case 0:
		e.Subject = strings.Join([]string{subjectPrefix, module, version, kebab(name)}, ".")
	case 1:
		e.Subject = subject[0]
	default:
		return e, fmt.Errorf("event %s: %w: %d subjects given, want at most one", e, ErrInvalidSubject, len(subject))
	}
	return e, e.validate()
}

// String returns the event's identity as module/name/version.
func (e BaseEventDefinition) String() string {
	return e.ModuleName + "/" + e.Name + "/" + e.Version
}

func (e BaseEventDefinition) validate() error {
	var errs []error
	for _, f := range []struct{ what, value string }{
		{"module name", e.ModuleName}, {"event name", e.Name}, {"version", e.Version},
	} {
		if err := checkName(f.value); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", f.what, err))
		}
	}
	// A subject made from a bad name would only repeat what was said.
	if len(errs) == 0 {
		if err := checkSubject(e.Subject); err != nil {
			errs = append(errs, err)
		} else if reservedSubject(e.Subject) {
			errs = append(errs, fmt.Errorf("%w: %q: subjects that start with \"$\" or \"_INBOX.\" belong to the server", ErrInvalidSubject, e.Subject))
		}
	}
	if len(errs) > 0 {
		return fmt.Errorf("event %q: %w", e.String(), errors.Join(errs...))
	}
	return nil
}

func reservedSubject(s string) bool {
	return strings.HasPrefix(s, "$") || strings.HasPrefix(s, "_INBOX.")
}

const (
	maxNameLen = 64
	// A protocol line, which holds the subject, the reply subject and sizes, may
	// have 4096 bytes; a longer one ends the connection.
	maxSubjectLen = 1024
)

// checkName accepts what is safe inside a subject, a durable name and a file
// name on the server: letters, digits, "_" and "-", starting with a letter or
// digit.
func checkName(s string) error {
	const allowed = "use 1 to 64 ASCII letters, digits, \"_\" or \"-\", starting with a letter or digit"
	if s == "" || len(s) > maxNameLen || s[0] == '_' || s[0] == '-' {
		return fmt.Errorf("%w: %q: %s", ErrInvalidName, s, allowed)
	}
	for i := range len(s) {
		if c := s[i]; !asciiAlnum(c) && c != '_' && c != '-' {
			return fmt.Errorf("%w: %q: %s", ErrInvalidName, s, allowed)
		}
	}
	return nil
}

func asciiAlnum(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// checkSubject accepts a literal NATS subject: tokens of printable characters,
// joined by dots, no wildcard. It runs for every publish and does not allocate
// for a good subject.
func checkSubject(s string) error {
	if s == "" {
		return fmt.Errorf("%w: it is empty", ErrInvalidSubject)
	}
	if len(s) > maxSubjectLen {
		return fmt.Errorf("%w: %d bytes long, want at most %d", ErrInvalidSubject, len(s), maxSubjectLen)
	}
	tokenStart, ascii := 0, true
	for i := range len(s) {
		switch c := s[i]; {
		case c == '.':
			if i == tokenStart {
				return fmt.Errorf("%w: %q: empty token", ErrInvalidSubject, s)
			}
			tokenStart = i + 1
		case c <= ' ' || c == 0x7f:
			return fmt.Errorf("%w: %q: space or control character", ErrInvalidSubject, s)
		case c == '*' || c == '>':
			// NATS takes them as wildcards only when they stand alone, but a
			// publisher that sends "a*" is a mistake waiting to be misread.
			return fmt.Errorf("%w: %q: wildcard; an event is published on one subject", ErrInvalidSubject, s)
		case c >= utf8.RuneSelf:
			ascii = false
		}
	}
	if !ascii && !utf8.ValidString(s) {
		return fmt.Errorf("%w: %q: not UTF-8", ErrInvalidSubject, s)
	}
	if tokenStart == len(s) {
		return fmt.Errorf("%w: %q: empty token", ErrInvalidSubject, s)
	}
	return nil
}

// checkStreamName accepts the stream and durable names that the server does.
func checkStreamName(s string) error {
	if s == "" {
		return fmt.Errorf("%w: it is empty", ErrInvalidName)
	}
	if len(s) > 255 {
		return fmt.Errorf("%w: %d characters long, want at most 255", ErrInvalidName, len(s))
	}
	if i := strings.IndexFunc(s, func(r rune) bool {
		return strings.ContainsRune(".*>/\\", r) || unicode.IsSpace(r) || !unicode.IsPrint(r)
	}); i >= 0 {
		return fmt.Errorf("%w: %q: no space, \".\", \"*\", \">\", \"/\" or \"\\\" allowed", ErrInvalidName, s)
	}
	return nil
}

// checkHeader refuses what would end a header line early. It names the key,
// never the value.
func checkHeader(h Header) error {
	for k, vs := range h {
		if k == "" {
			return fmt.Errorf("%w: empty key", ErrInvalidHeader)
		}
		for i := range len(k) {
			if c := k[i]; !asciiAlnum(c) && strings.IndexByte("!#$%&'*+-.^_`|~", c) < 0 {
				return fmt.Errorf("%w: key %q: use ASCII letters, digits and !#$%%&'*+-.^_`|~", ErrInvalidHeader, k)
			}
		}
		for _, v := range vs {
			if i := strings.IndexFunc(v, func(r rune) bool { return r != '\t' && (r < ' ' || r == 0x7f) }); i >= 0 {
				return fmt.Errorf("%w: value of %q: control character at byte %d", ErrInvalidHeader, k, i)
			}
		}
	}
	return nil
}

// kebab turns a CamelCase event name into a subject token: OrderCreated becomes
// order-created, HTTPServerUp http-server-up. The result is part of the wire
// contract.
func kebab(name string) string {
	runes := []rune(name)
	var b strings.Builder
	for i, r := range runes {
		if r == '_' || r == '-' {
			b.WriteByte('-')
			continue
		}
		if i > 0 && unicode.IsUpper(r) {
			prev := runes[i-1]
			startsWord := !unicode.IsUpper(prev) ||
				i+1 < len(runes) && unicode.IsLower(runes[i+1]) // the S of HTTPServer
			if startsWord && prev != '_' && prev != '-' {
				b.WriteByte('-')
			}
		}
		b.WriteRune(unicode.ToLower(r))
	}
	return b.String()
}

// durableName is the name of the durable consumer through which module reads
// event. It depends on nothing else, so a restart and a second instance find
// the same position. It is part of the wire contract.
func durableName(module string, e BaseEventDefinition) string {
	return strings.Join([]string{module, e.ModuleName, kebab(e.Name), e.Version}, "_")
}
