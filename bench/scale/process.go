package scale

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"time"
)

// A child is this program once more, as a node or a worker. It reads JSON from its
// standard input, answers each value with one on its standard output, and ends when
// its input does, so that none outlives this process.
type child struct {
	role string
	cmd  *exec.Cmd
	in   io.WriteCloser
	ask  *json.Encoder
	hear *json.Decoder
}

// startChild starts a process with a specification and waits for its first answer.
func startChild(ctx context.Context, role string, spec, ready any) (*child, error) {
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.CommandContext(ctx, exe, "scale", role) //nolint:gosec // it is ourselves
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	c := &child{role, cmd, in, json.NewEncoder(in), json.NewDecoder(out)}
	if err := c.call(spec, ready); err != nil {
		return nil, errors.Join(err, c.stop())
	}
	return c, nil
}

func (c *child) call(question, answer any) error {
	err := c.ask.Encode(question)
	if err == nil {
		err = c.hear.Decode(answer)
	}
	if err != nil {
		return fmt.Errorf("%s process: %w", c.role, err)
	}
	return nil
}

func (c *child) stop() error {
	if err := errors.Join(c.in.Close(), c.cmd.Wait()); err != nil {
		return fmt.Errorf("%s process: %w", c.role, err)
	}
	return nil
}

// serve is the other side of startChild: it answers until there are no more questions.
func serve[Q any](in *json.Decoder, out io.Writer, answer func(Q) (any, error)) error {
	enc := json.NewEncoder(out)
	for {
		var q Q
		if err := in.Decode(&q); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		a, err := answer(q)
		if err != nil {
			return err
		}
		if err := enc.Encode(a); err != nil {
			return err
		}
	}
}

// A usage is what a process has used of the machine so far.
type usage struct {
	cpu    time.Duration // user and system
	memory int64         // resident, in bytes
}

// usage reads Linux's /proc, which counts CPU in hundredths of a second.
func (c *child) usage() (usage, error) {
	file := "/proc/" + strconv.Itoa(c.cmd.Process.Pid) + "/stat"
	stat, err := os.ReadFile(file) //nolint:gosec // of our own child
	if err != nil {
		return usage{}, err
	}
	// The second field, the name, is in parentheses and may have spaces.
	const user, system, resident = 11, 12, 21 // after the name
	fields := bytes.Fields(stat[bytes.LastIndexByte(stat, ')')+1:])
	if len(fields) <= resident {
		return usage{}, fmt.Errorf("%s: only %d fields", file, len(fields))
	}
	var n [3]int64
	for i, f := range []int{user, system, resident} {
		if n[i], err = strconv.ParseInt(string(fields[f]), 10, 64); err != nil {
			return usage{}, fmt.Errorf("%s: %w", file, err)
		}
	}
	const tick = 10 * time.Millisecond
	return usage{time.Duration(n[0]+n[1]) * tick, n[2] * int64(os.Getpagesize())}, nil
}
