//go:build !linux

package e2e

import "syscall"

// diesWithParent is for Linux.
func diesWithParent() *syscall.SysProcAttr { return nil }
