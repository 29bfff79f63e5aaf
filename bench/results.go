package main

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"strconv"
	"strings"

	"github.com/monotel/monotel/internal/docpage"
)

// results are what was measured, in the order of the rounds.
type results struct {
	config map[string]string
	values map[key][]float64
}

type key struct{ pair, lib, unit string }

func parseResults(in io.Reader) (results, error) {
	res := results{config: make(map[string]string), values: make(map[key][]float64)}
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		line := lines.Text()
		name, ok := strings.CutPrefix(line, "Benchmark")
		if !ok {
			if k, v, ok := strings.Cut(line, ": "); ok {
				res.config[k] = v
			}
			continue
		}
		if err := res.add(strings.Fields(name)); err != nil {
			return res, fmt.Errorf("%q: %w", line, err)
		}
	}
	return res, lines.Err()
}

// add takes the fields of a line: name, count, and pairs of value and unit.
func (r results) add(fields []string) error {
	const nameAndCount = 2
	if len(fields) <= nameAndCount || len(fields)%2 != 0 {
		return fmt.Errorf("%d fields", len(fields))
	}
	c, err := parseCell(fields[0])
	if err != nil {
		return err
	}
	for i := nameAndCount; i < len(fields); i += 2 {
		v, err := strconv.ParseFloat(fields[i], 64)
		if err != nil {
			return err
		}
		if !(math.Abs(v) <= math.MaxFloat64) { // NaN neither; memory may be less than before
			return fmt.Errorf("%s is no measurement", fields[i])
		}
		k := key{c.pair(), c.lib, fields[i+1]}
		r.values[k] = append(r.values[k], v)
	}
	return nil
}

// median returns the middle of a cell's rounds.
func (r results) median(k key) (float64, bool) {
	vs := r.values[k]
	if len(vs) == 0 {
		return 0, false
	}
	return docpage.Quantile(vs, 0.5), true
}

// ratios returns a over b, round by round.
func (r results) ratios(a, b key) []float64 {
	as, bs := r.values[a], r.values[b]
	ratios := make([]float64, min(len(as), len(bs)))
	for i := range ratios {
		ratios[i] = as[i] / bs[i]
	}
	return ratios
}

// rounds is how often a cell was measured, of those that were least often.
func (r results) rounds() int {
	fewest := 0
	for _, vs := range r.values {
		if fewest == 0 || len(vs) < fewest {
			fewest = len(vs)
		}
	}
	return fewest
}
