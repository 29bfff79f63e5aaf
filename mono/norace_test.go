//go:build !race

package mono_test

const raceEnabled = false
