// Command vulnreport judges what govulncheck has found in a module:
//
//	govulncheck -format json ./... | go run ./internal/vulnreport
//
// It fails if the module calls a vulnerable function of another module. What it
// calls of the standard library is reported with the release of Go that mends it,
// which is for whoever builds a program to choose. Vulnerabilities that are not
// called are counted.
package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
)

func main() {
	if err := run(os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "vulnreport:", err)
		os.Exit(1)
	}
}

// A message is one of those that govulncheck writes.
type message struct {
	Config *struct {
		GoVersion string `json:"go_version"`
	} `json:"config"`
	OSV *struct {
		ID      string `json:"id"`
		Summary string `json:"summary"`
	} `json:"osv"`
	Finding *struct {
		OSV          string  `json:"osv"`
		FixedVersion string  `json:"fixed_version"`
		Trace        []frame `json:"trace"` // from the vulnerable function to ours
	} `json:"finding"`
}

type frame struct {
	Module   string `json:"module"`
	Version  string `json:"version"`
	Package  string `json:"package"`
	Function string `json:"function"`
	Receiver string `json:"receiver"`
}

func (f frame) String() string {
	name := f.Package + "."
	if f.Receiver != "" {
		name += strings.TrimPrefix(f.Receiver, "*") + "."
	}
	return name + f.Function
}

// A vulnerability is all that was found of one in one module.
type vulnerability struct {
	id, module, version, fixed string

	called, by string // the first of the calls
}

func (v *vulnerability) standard() bool { return v.module == "stdlib" || v.module == "toolchain" }

var errCalled = errors.New("vulnerable functions are called: update these modules")

func run(in io.Reader, out io.Writer) error {
	all, summaries, goVersion, err := read(in)
	if err != nil {
		return fmt.Errorf("read what govulncheck says: %w", err)
	}
	var b strings.Builder
	called, uncalled := 0, 0
	for _, v := range slices.SortedFunc(maps.Values(all), func(a, b *vulnerability) int {
		return cmp.Or(strings.Compare(a.module, b.module), strings.Compare(a.id, b.id))
	}) {
		mended := "nothing mends it yet"
		switch {
		case v.called == "":
			uncalled++
			continue
		case v.standard() && v.fixed != "":
			mended = "Go " + strings.TrimPrefix(v.fixed, "v") + " mends it"
		case v.fixed != "":
			mended = v.fixed + " mends it"
		}
		if v.standard() {
			fmt.Fprintf(&b, "%s, standard library of %s, %s: %s\n", v.id, goVersion, mended, summaries[v.id])
			continue
		}
		called++
		fmt.Fprintf(&b, "%s, %s %s, %s: %s\n    %s, by %s\n", v.id, v.module, v.version, mended, summaries[v.id], v.called, v.by)
	}
	fmt.Fprintf(&b, "%d called in modules, %d not called\n", called, uncalled)
	if _, err := io.WriteString(out, b.String()); err != nil {
		return err
	}
	if called > 0 {
		return errCalled
	}
	return nil
}

// read collects findings by vulnerability and module: there is one for each place
// that is vulnerable.
func read(in io.Reader) (all map[[2]string]*vulnerability, summaries map[string]string, goVersion string, err error) {
	all, summaries = make(map[[2]string]*vulnerability), make(map[string]string)
	scanned := false
	for dec := json.NewDecoder(in); ; {
		var m message
		err := dec.Decode(&m)
		if errors.Is(err, io.EOF) && scanned {
			return all, summaries, goVersion, nil
		}
		if err != nil {
			return nil, nil, "", err
		}
		switch {
		case m.Config != nil:
			scanned, goVersion = true, m.Config.GoVersion
		case m.OSV != nil:
			summaries[m.OSV.ID] = m.OSV.Summary
		case m.Finding != nil && len(m.Finding.Trace) > 0:
			f := m.Finding
			at := f.Trace[0]
			key := [2]string{f.OSV, at.Module}
			if all[key] == nil {
				all[key] = &vulnerability{id: f.OSV, module: at.Module, version: at.Version, fixed: f.FixedVersion}
			}
			if v := all[key]; at.Function != "" && v.called == "" {
				v.called, v.by = at.String(), f.Trace[len(f.Trace)-1].String()
			}
		}
	}
}
