// Package permissions is for the tests that prove docs/permissions.md: it reads the
// lists of the page, and what a server says of those who use them.
package permissions

import (
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// A List is a block of the page: what a user may publish and subscribe to.
type List struct {
	Text    string // of the block, as it can be copied into the configuration of a server
	Entries []Entry
}

// An Entry is a subject of a list.
type Entry struct {
	Subject   string
	Subscribe bool   // else to publish
	Section   string // the first word of the comment above it, without the colon
}

// Publish returns the subjects to publish to.
func (l *List) Publish() []string { return l.subjects(false) }

// Subscribe returns the subjects to subscribe to.
func (l *List) Subscribe() []string { return l.subjects(true) }

func (l *List) subjects(subscribe bool) []string {
	var subjects []string
	for _, e := range l.Entries {
		if e.Subscribe == subscribe {
			subjects = append(subjects, e.Subject)
		}
	}
	return subjects
}

// Without returns the list without some sections.
func (l *List) Without(sections ...string) *List {
	return &List{Text: l.Text, Entries: slices.DeleteFunc(slices.Clone(l.Entries), func(e Entry) bool {
		return slices.Contains(sections, e.Section)
	})}
}

// WithInbox returns the list with another prefix of answers in place of _INBOX.
func (l *List) WithInbox(prefix string) *List {
	other := l.Without()
	for i, e := range other.Entries {
		if e.Subject == "_INBOX.>" {
			other.Entries[i].Subject = prefix + ".>"
		}
	}
	return other
}

// Repeat adds the entries with some names in their subjects once more, with others:
// names are pairs of one and the other.
func (l *List) Repeat(names ...string) {
	other := make(map[string]string)
	for i := 0; i+1 < len(names); i += 2 {
		other[names[i]], other[names[i]+replays] = names[i+1], names[i+1]+replays
	}
	for _, e := range slices.Clone(l.Entries) {
		tokens := strings.Split(e.Subject, ".")
		for i, token := range tokens {
			if name, ok := other[token]; ok {
				tokens[i] = name
			}
		}
		if subject := strings.Join(tokens, "."); subject != e.Subject {
			e.Subject = subject
			l.Entries = append(l.Entries, e)
		}
	}
}

// replays ends the name of the durable for a consumer's replays.
const replays = "_replay"

// Unused returns what the list could do without: entries of which each allows none of
// the subjects that another one does not allow as well.
func (l *List) Unused(published, subscribed []string) []Entry {
	var unused []Entry
	for i, e := range l.Entries {
		used := published
		if e.Subscribe {
			used = subscribed
		}
		needed := slices.ContainsFunc(used, func(subject string) bool {
			return Matches(e.Subject, subject) && !slices.ContainsFunc(l.Entries, func(other Entry) bool {
				return other != l.Entries[i] && other.Subscribe == e.Subscribe && Matches(other.Subject, subject)
			})
		})
		if !needed {
			unused = append(unused, e)
		}
	}
	return unused
}

// Matches reports whether a pattern has all subjects of another one, or a subject.
func Matches(pattern, subject string) bool {
	p, s := strings.Split(pattern, "."), strings.Split(subject, ".")
	for i, token := range p {
		switch {
		case token == ">":
			return len(s) > i
		case i >= len(s) || s[i] == ">", token != "*" && token != s[i]:
			return false
		}
	}
	return len(p) == len(s)
}

// Read reads the blocks of a page by the name in the comment before each,
// "<!-- permissions: NAME -->".
func Read(file string) (map[string]*List, error) {
	page, err := os.ReadFile(file) //nolint:gosec // a test names the file
	if err != nil {
		return nil, err
	}
	lists := make(map[string]*List)
	var list *List
	inside, subscribe, section := false, false, ""
	for line := range strings.Lines(string(page)) {
		text := strings.TrimSpace(line)
		quoted := strings.Split(text, `"`)
		switch {
		case strings.HasPrefix(text, "<!-- permissions: "):
			list = &List{}
			lists[strings.TrimSuffix(strings.TrimPrefix(text, "<!-- permissions: "), " -->")] = list
			continue
		case strings.HasPrefix(text, "```"):
			if inside {
				list = nil
			}
			inside, section = list != nil && !inside, ""
			continue
		case !inside:
			continue
		case strings.HasPrefix(text, "#"):
			section = strings.TrimSuffix(strings.Fields(text + " _ _")[1], ":")
		case strings.HasPrefix(text, "publish"), strings.HasPrefix(text, "subscribe"):
			subscribe = strings.HasPrefix(text, "subscribe")
		case len(quoted) > 1:
			list.Entries = append(list.Entries, Entry{Subject: quoted[1], Subscribe: subscribe, Section: section})
		}
		list.Text += line
	}
	return lists, nil
}

// A Heard is a logger for a server that traces: it keeps what clients publish and
// subscribe to, and what they are refused.
type Heard struct {
	mu         sync.Mutex
	published  map[string]map[string]bool // by the name of the connection
	subscribed map[string]map[string]bool
	refused    []string
}

var traced = regexp.MustCompile(`:go:([^":]+)[":].*<<- \[(H?PUB|SUB) (\S+)`)

// Tracef takes what a client sends.
func (h *Heard) Tracef(format string, args ...any) {
	m := traced.FindStringSubmatch(fmt.Sprintf(format, args...))
	if m == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.published == nil {
		h.published, h.subscribed = make(map[string]map[string]bool), make(map[string]map[string]bool)
	}
	of := h.published
	if m[2] == "SUB" {
		of = h.subscribed
	}
	if of[m[1]] == nil {
		of[m[1]] = make(map[string]bool)
	}
	of[m[1]][m[3]] = true
}

// Errorf takes what a client is refused.
func (h *Heard) Errorf(format string, args ...any) {
	if text := fmt.Sprintf(format, args...); strings.Contains(text, "Violation") {
		h.mu.Lock()
		defer h.mu.Unlock()
		h.refused = append(h.refused, text)
	}
}

// Noticef is for the server's logger.
func (*Heard) Noticef(string, ...any) {}

// Warnf is for the server's logger.
func (*Heard) Warnf(string, ...any) {}

// Fatalf is for the server's logger.
func (*Heard) Fatalf(string, ...any) {}

// Debugf is for the server's logger.
func (*Heard) Debugf(string, ...any) {}

// Forget forgets what was heard.
func (h *Heard) Forget() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.published, h.subscribed, h.refused = nil, nil, nil
}

// By returns what connections of these names have published and subscribed to.
func (h *Heard) By(names ...string) (published, subscribed []string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, name := range names {
		published = slices.AppendSeq(published, maps.Keys(h.published[name]))
		subscribed = slices.AppendSeq(subscribed, maps.Keys(h.subscribed[name]))
	}
	return published, subscribed
}

// Refused returns what clients were refused.
func (h *Heard) Refused() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.refused)
}
