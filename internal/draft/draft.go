// Package draft has payloads edited in files: by an editor, which is killed at
// times, on machines that others use, too.
//
// A file is in a folder of its own, below monotel/edits in the user's cache folder
// (os.UserCacheDir), which nobody else may read. The process holds a lock file
// there until it removes the folder. [Clean] removes those of processes that have
// ended without doing so, with whatever the editor has left beside the payload.
// What was written and could not be stored is kept: it has no lock file any more,
// and stays until the user removes it.
package draft

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"unicode/utf8"

	"github.com/gofrs/flock"

	"github.com/monotel/monotel/internal/jsontext"
)

// ErrBinary reports a payload that an editor may spoil.
var ErrBinary = errors.New("the payload is binary, which an editor may spoil")

const (
	private  = 0o700
	ownFile  = 0o600
	lockName = "lock"
	edits    = "edits"
)

// A Draft is a payload that is being edited.
type Draft struct {
	before  []byte
	shown   []byte // what the file has at first
	laidOut bool   // which is JSON on lines of its own
	ext     string

	dir  string // of this draft alone; empty without a file
	path string
	lock *flock.Flock
}

// New returns a draft without a file. JSON on one line is laid out for the editor.
// Any other text is edited as it is; what is not text is [ErrBinary].
func New(payload []byte) (*Draft, error) {
	d := &Draft{before: payload, shown: payload, ext: ".txt"}
	if !utf8.Valid(payload) || bytes.IndexByte(payload, 0) >= 0 {
		return nil, ErrBinary
	}
	if !json.Valid(payload) {
		return d, nil
	}
	d.ext = ".json"
	if trimmed := bytes.TrimSpace(payload); bytes.IndexByte(trimmed, '\n') < 0 && (trimmed[0] == '{' || trimmed[0] == '[') {
		d.shown, _ = jsontext.Indent(trimmed, math.MaxInt)
		d.shown, d.laidOut = append(d.shown, '\n'), true
	}
	return d, nil
}

// Create makes the file.
func (d *Draft) Create() (err error) {
	base, err := folder()
	if err != nil {
		return err
	}
	unlock, err := lockAll(base)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unlock()) }()
	if d.dir, err = os.MkdirTemp(base, ""); err != nil {
		return err
	}
	d.lock = flock.New(filepath.Join(d.dir, lockName))
	_, err = d.lock.TryLock()
	d.path = filepath.Join(d.dir, "payload"+d.ext)
	if err = errors.Join(err, os.WriteFile(d.path, d.shown, ownFile)); err != nil {
		return errors.Join(err, d.Remove())
	}
	return nil
}

// lockAll keeps Clean away: a folder whose lock nobody holds is taken for that of a
// process that has ended.
func lockAll(base string) (unlock func() error, err error) {
	all := flock.New(filepath.Join(base, lockName))
	return all.Close, all.Lock()
}

// Path is that of the file, or "" if there is none.
func (d *Draft) Path() string { return d.path }

// Text is what the file has at first.
func (d *Draft) Text() []byte { return d.shown }

// Written returns what the file has now.
func (d *Draft) Written() ([]byte, error) { return os.ReadFile(d.path) }

// Payload returns the payload that a text is, which an editor has written.
//
// What was not edited stays as it was, to the byte. If the file is as it was, so
// is the payload, and so it is if only the white space of JSON has changed. What
// was laid out gets its own white space back. A newline at the end that was not
// there is an editor's, and is removed.
func (d *Draft) Payload(written []byte) []byte {
	switch {
	case bytes.Equal(written, d.shown):
		return d.before
	case d.laidOut && json.Valid(written):
		return restored(d.before, written)
	case sameJSON(d.before, written):
		return d.before
	}
	if !bytes.HasSuffix(d.before, []byte("\n")) {
		if text, ok := bytes.CutSuffix(written, []byte("\n")); ok {
			written = text
			if !bytes.HasSuffix(d.before, []byte("\r")) {
				written = bytes.TrimSuffix(written, []byte("\r"))
			}
		}
	}
	return written
}

func sameJSON(a, b []byte) bool {
	var x, y bytes.Buffer
	return json.Compact(&x, a) == nil && json.Compact(&y, b) == nil && bytes.Equal(x.Bytes(), y.Bytes())
}

// Remove removes the file and everything beside it.
func (d *Draft) Remove() error {
	if d.dir == "" {
		return nil
	}
	err := errors.Join(d.lock.Close(), os.RemoveAll(d.dir))
	d.dir, d.path = "", ""
	return err
}

// Keep leaves the file where it is for good, and removes what is beside it.
func (d *Draft) Keep() error {
	unlock, err := lockAll(filepath.Dir(d.dir))
	if err != nil {
		return err
	}
	errs := []error{d.lock.Close()}
	entries, err := os.ReadDir(d.dir)
	errs = append(errs, err)
	for _, e := range entries {
		if e.Name() != filepath.Base(d.path) {
			errs = append(errs, os.RemoveAll(filepath.Join(d.dir, e.Name())))
		}
	}
	return errors.Join(append(errs, unlock())...)
}

// Clean removes the files of processes that have ended, however they did.
func Clean() error {
	var err error
	for _, home := range homes() {
		err = errors.Join(err, clean(filepath.Join(home, edits)))
	}
	return err
}

func clean(base string) error {
	entries, err := os.ReadDir(base)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	all := flock.New(filepath.Join(base, lockName))
	if ok, err := all.TryLock(); err != nil || !ok { // another process cleans, or makes one
		return err
	}
	var errs []error
	for _, e := range entries {
		if !e.IsDir() {
			continue
		}
		dir := filepath.Join(base, e.Name())
		if _, err := os.Lstat(filepath.Join(dir, lockName)); errors.Is(err, fs.ErrNotExist) {
			_ = os.Remove(dir) // which a kept file prevents
			continue
		}
		lock := flock.New(filepath.Join(dir, lockName))
		ok, err := lock.TryLock()
		errs = append(errs, err, lock.Close())
		if ok {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(append(errs, all.Close())...)
}

// homes are where the files may be: below the user's cache folder, or, where that
// cannot be made, below the folder for temporary files. There root could be given
// a folder that is another user's.
func homes() []string {
	var dirs []string
	if cache, err := os.UserCacheDir(); err == nil {
		dirs = append(dirs, filepath.Join(cache, "monotel"))
	}
	if uid := os.Getuid(); uid != 0 {
		dirs = append(dirs, filepath.Join(os.TempDir(), "monotel-"+strconv.Itoa(uid)))
	}
	return dirs
}

// folder makes a folder for edits that is the user's alone.
func folder() (string, error) {
	errs := []error{errors.New("neither the user's cache folder nor that for temporary files can be used")}
	for _, home := range homes() {
		dir := filepath.Join(home, edits)
		err := os.MkdirAll(dir, private)
		if err == nil {
			err = errors.Join(own(home), own(dir))
		}
		if err == nil {
			return dir, nil
		}
		errs = append(errs, err)
	}
	return "", errors.Join(errs...)
}

// own makes sure that a folder is the user's, and that nobody else may read it.
func own(dir string) error {
	info, err := os.Lstat(dir)
	switch {
	case err != nil:
		return err
	case !info.IsDir():
		return fmt.Errorf("%s is no folder", dir)
	case runtime.GOOS == "windows": // it has no such modes
		return nil
	}
	return os.Chmod(dir, private) // only its owner can
}
