package chart_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/monotel/monotel/bench/chart"
)

type writer interface{ Write(file string) error }

func draw(t *testing.T, c writer) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "chart.svg")
	if err := c.Write(file); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	d := xml.NewDecoder(bytes.NewReader(b))
	for {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatalf("not XML: %v", err)
		}
	}
	return string(b)
}

func TestWrite(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		give writer
		want []string // texts
	}{
		{
			name: "lines", want: []string{"Publish", "publishers (processes)", "messages a second", "R3", "on paper", "10 000"},
			give: chart.Lines{Title: "Publish", X: "publishers (processes)", Y: "messages a second", LogY: true, Series: []chart.Series{
				{Name: "R3", Points: []chart.Point{{1, 900}, {2, 1800}, {8, 7000}}},
				{Name: "on paper", Points: []chart.Point{{1, 1000}, {8, 8000}}, Paper: true},
			}},
		},
		{
			name: "bars", want: []string{"CPU", "µs a message", "publish", "consume", "leader", "followers"},
			give: chart.Bars{Title: "CPU", Y: "µs a message", Groups: []string{"publish", "consume"}, Parts: []chart.Part{
				{Name: "leader", Values: []float64{4, 9}}, {Name: "followers", Values: []float64{8, 3}},
			}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			svg := draw(t, tt.give)
			for _, text := range tt.want {
				if !strings.Contains(svg, ">"+text+"<") {
					t.Errorf("no text %q", text)
				}
			}
			if again := draw(t, tt.give); again != svg {
				t.Error("a second drawing differs")
			}
		})
	}
}

func TestWrite_noPoints(t *testing.T) {
	t.Parallel()
	file := filepath.Join(t.TempDir(), "chart.svg")
	if err := (chart.Lines{Series: []chart.Series{{Name: "empty"}}}).Write(file); err == nil {
		t.Error("no error")
	}
}
