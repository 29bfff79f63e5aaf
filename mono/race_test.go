//go:build race

package mono_test

// raceEnabled is for tests that measure: the race detector allocates, and slows
// down what it watches.
const raceEnabled = true
