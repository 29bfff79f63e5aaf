package main

import "syscall"

// diesWithParent has a process killed when the thread that has started it is gone, as
// when this process is killed itself.
func diesWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
}
