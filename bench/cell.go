package main

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A cell is what one process measures: one library at one work. Its text is the
// name of a Go benchmark, such as
//
//	ConsumeAck/batch=10/concurrency=1/transport=inproc/size=256/lib=raw
type cell struct {
	work      string
	params    []param
	transport string
	size      int // of a payload, in bytes
	lib       string
}

type param struct {
	key   string
	value int
}

const (
	inProcess = "inproc"
	loopback  = "loopback"
)

func (c cell) String() string { return c.pair() + "/lib=" + c.lib }

// pair is the name without the library.
func (c cell) pair() string {
	var b strings.Builder
	b.WriteString(c.work)
	for _, p := range c.params {
		fmt.Fprintf(&b, "/%s=%d", p.key, p.value)
	}
	fmt.Fprintf(&b, "/transport=%s/size=%d", c.transport, c.size)
	return b.String()
}

func (c cell) param(key string) int {
	i := slices.IndexFunc(c.params, func(p param) bool { return p.key == key })
	if i < 0 {
		return 0
	}
	return c.params[i].value
}

// title is how the page names the parameters.
func (c cell) title() string {
	parts := make([]string, 0, len(c.params))
	for _, p := range c.params {
		parts = append(parts, fmt.Sprintf("%s %d", p.key, p.value))
	}
	return strings.Join(parts, ", ")
}

func parseCell(name string) (cell, error) {
	work, rest, _ := strings.Cut(name, "/")
	c := cell{work: work}
	for part := range strings.SplitSeq(rest, "/") {
		key, value, ok := strings.Cut(part, "=")
		if !ok {
			return c, fmt.Errorf("%q: want parts such as size=256, not %q", name, part)
		}
		switch key {
		case "transport":
			c.transport = value
		case "lib":
			c.lib = value
		default:
			n, err := strconv.Atoi(value)
			if err != nil {
				return c, fmt.Errorf("%q: %w", name, err)
			}
			if key == "size" {
				c.size = n
			} else {
				c.params = append(c.params, param{key, n})
			}
		}
	}
	if c.transport != inProcess && c.transport != loopback {
		return c, fmt.Errorf("%q: transport is %q, want %s or %s", name, c.transport, inProcess, loopback)
	}
	if c.size < minSize {
		return c, fmt.Errorf("%q: size is %d, want at least %d", name, c.size, minSize)
	}
	return c, nil
}
