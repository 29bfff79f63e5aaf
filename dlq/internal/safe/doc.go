// Package safe is a part of the package of the same name that the command uses: the
// libraries import nothing of its folder. The files are copies, which a test of that
// package compares.
package safe
