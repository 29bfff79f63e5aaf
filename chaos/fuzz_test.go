package main

import (
	"os"
	"path/filepath"
	"testing"
)

// A schedule that was written can be read, and is the same.
func FuzzReadSchedule(f *testing.F) {
	for _, s := range []string{"{}", `{"seed":1,"faults":[{"kind":"kill","at":"1s","for":"2s"}]}`, `{"faults":[{"at":"-9223372036854775808ns"}]}`, "null"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		file := filepath.Join(t.TempDir(), "schedule")
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := readSchedule(file)
		if err != nil {
			return
		}
		if err := s.write(file); err != nil {
			t.Fatal(err)
		}
		if _, err := readSchedule(file); err != nil {
			t.Errorf("%s is written so that it cannot be read: %v", text, err)
		}
	})
}
