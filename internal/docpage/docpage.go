// Package docpage puts what is made from code into pages that are otherwise
// written by people.
package docpage

import (
	"bytes"
	"fmt"
	"os"
	"slices"
)

// A Section is a part of a page that is made. It stands between a line
//
//	<!-- NAME: made by make TARGET, do not edit -->
//
// and the next [End].
type Section struct {
	Name   string
	Target string // of make
	Text   string
}

// End is the line after a section.
const End = "<!-- end of what is made -->\n"

// Begin is the line before the section.
func (s Section) Begin() string {
	return fmt.Sprintf("<!-- %s: made by make %s, do not edit -->\n", s.Name, s.Target)
}

// Update replaces sections of a file, or changes nothing and returns an error
// that names the line that is missing.
func Update(file string, sections ...Section) error {
	page, err := os.ReadFile(file) //nolint:gosec // who runs it names the file
	if err != nil {
		return err
	}
	for _, s := range sections {
		if page, err = s.replace(page); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
	}
	const everybodyReads = 0o644
	return os.WriteFile(file, page, everybodyReads) //nolint:gosec // as above
}

func (s Section) replace(page []byte) ([]byte, error) {
	head, rest, ok := bytes.Cut(page, []byte(s.Begin()))
	if !ok {
		return nil, fmt.Errorf("no line %q", s.Begin())
	}
	_, tail, ok := bytes.Cut(rest, []byte(End))
	if !ok {
		return nil, fmt.Errorf("no line %q after %q", End, s.Begin())
	}
	return slices.Concat(head, []byte(s.Begin()+"\n"+s.Text+"\n"+End), tail), nil
}
