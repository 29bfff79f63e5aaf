//go:build !linux

package main

import "syscall"

// diesWithParent is for Linux.
func diesWithParent() *syscall.SysProcAttr { return &syscall.SysProcAttr{Setpgid: true} }
