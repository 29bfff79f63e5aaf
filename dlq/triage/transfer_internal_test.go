package triage

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
)

// endless is a line without an end, in pieces as a pipe gives them. It counts.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	const piece = 4 << 10
	p = p[:min(len(p), piece)]
	for i := range p {
		p[i] = 'x'
	}
	e.read += len(p)
	return len(p), nil
}

// A line of 1 GB from a pipe was refused after minutes, as each piece was looked
// through from the beginning.
func TestLineReader_tooLong(t *testing.T) {
	t.Parallel()
	for _, longest := range []int{0, 1, 100, 64 << 10, 64<<10 + 1, 1 << 20, 8 << 20} {
		e := &endless{}
		l := newLineReader(io.MultiReader(strings.NewReader("\n"), e), longest)
		if line, err := l.next(); err != nil || len(line) > 0 {
			t.Errorf("%d bytes: the empty line is %q, %v", longest, line, err)
		}
		if _, err := l.next(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%d bytes: %v, want %v", longest, err, ErrInvalid)
		}
		if most := longest + 128<<10; e.read > most {
			t.Errorf("of at most %d bytes, %d are read, want at most %d", longest, e.read, most)
		}
	}
}

func TestLineReader(t *testing.T) {
	t.Parallel()
	const longest = 100_000
	long := strings.Repeat("y", longest)
	for _, tt := range []struct {
		give string
		want []string
		err  error
	}{
		{"", nil, io.EOF},
		{"a", []string{"a"}, io.EOF},
		{"a\nb\n", []string{"a", "b"}, io.EOF},
		{"\n\nb", []string{"", "", "b"}, io.EOF},
		{long + "\n" + long, []string{long, long}, io.EOF},
		{long + "\n" + long + "y\n", []string{long}, ErrInvalid},
		{long + "yy", nil, ErrInvalid},
	} {
		for name, r := range map[string]io.Reader{
			"whole": strings.NewReader(tt.give), "in bytes": iotest.OneByteReader(strings.NewReader(tt.give)), "end with data": iotest.DataErrReader(strings.NewReader(tt.give)),
		} {
			l := newLineReader(r, longest)
			for i, want := range tt.want {
				if line, err := l.next(); err != nil || string(line) != want {
					t.Errorf("%s: line %d of %.10q… is %.10q…, %v", name, i+1, tt.give, line, err)
				}
			}
			if line, err := l.next(); !errors.Is(err, tt.err) {
				t.Errorf("%s: after %d lines of %.10q… there is %.10q…, %v, want %v", name, len(tt.want), tt.give, line, err, tt.err)
			}
		}
	}
	broken := errors.New("broken")
	l := newLineReader(io.MultiReader(strings.NewReader("a\nhalf"), iotest.ErrReader(broken)), longest)
	if line, err := l.next(); string(line) != "a" || err != nil {
		t.Errorf("%q, %v", line, err)
	}
	if line, err := l.next(); !errors.Is(err, broken) {
		t.Errorf("half a line is %q, %v, want %v", line, err, broken)
	}
}

// What is no export is refused before much of it is read.
func TestImport_noExport(t *testing.T) {
	t.Parallel()
	e := &endless{}
	if _, err := (&Desk{}).Import(t.Context(), e); !errors.Is(err, ErrInvalid) || e.read > 256<<10 {
		t.Errorf("after %d bytes: %v", e.read, err)
	}
}

func FuzzLineReader(f *testing.F) {
	f.Add([]byte("a\nb\r\n\n"), 3)
	f.Fuzz(func(t *testing.T, text []byte, longest int) {
		longest = max(longest, 0)
		l := newLineReader(iotest.HalfReader(bytes.NewReader(text)), longest)
		var got []byte
		for {
			line, err := l.next()
			if err != nil {
				if errors.Is(err, io.EOF) && !bytes.Equal(bytes.TrimSuffix(got, []byte("\n")), bytes.TrimSuffix(text, []byte("\n"))) {
					t.Errorf("%q is read as %q", text, got)
				}
				return
			}
			if len(line) > longest+1 || bytes.ContainsRune(line, '\n') {
				t.Errorf("line %q of %q, longest %d", line, text, longest)
			}
			got = append(append(got, line...), '\n')
		}
	})
}
