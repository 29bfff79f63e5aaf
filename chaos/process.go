package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// A process is one life of a program.
type process struct {
	cmd   *exec.Cmd
	ended chan struct{}
	err   error // when it has ended
}

func startProcess(log, name string, env []string, args ...string) (*process, error) {
	out, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600) //nolint:gosec // of this run
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()        // the process has its own
	p := &process{ended: make(chan struct{})} //
	p.cmd = exec.Command(name, args...)       //nolint:gosec,noctx // ended in an orderly way
	p.cmd.Env = append(os.Environ(), env...)  //
	p.cmd.Stdout, p.cmd.Stderr = out, out     //
	p.cmd.SysProcAttr = diesWithParent()      //
	started := make(chan error, 1)            //
	go func() {
		// What Linux calls the parent is this thread: it stays as long as its child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.ended)
		}
	}()
	return p, <-started
}

// signal does nothing to a process that has ended.
func (p *process) signal(s syscall.Signal) { _ = p.cmd.Process.Signal(s) }

// end sends a signal and waits; what does not end by it is killed.
func (p *process) end(s syscall.Signal, grace time.Duration) error {
	p.signal(s)
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-p.ended:
		return nil
	case <-t.C:
	}
	p.signal(syscall.SIGKILL)
	<-p.ended
	return fmt.Errorf("%s did not end within %v by %v", p.cmd.Path, grace, s)
}

// code is the exit code, or -1 if a signal has ended it.
func (p *process) code() int {
	if exit, ok := errors.AsType[*exec.ExitError](p.err); ok {
		return exit.ExitCode()
	}
	return 0
}
