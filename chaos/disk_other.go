//go:build !linux

package main

import "errors"

// A disk is a small file system.
type disk struct{ dir string }

func mountDisk(string, int) (*disk, error) {
	return nil, errors.New("small file systems are mounted on Linux only")
}

func (*disk) unmount() error { return nil }
func (*disk) fill() error    { return nil }
func (*disk) empty() error   { return nil }
