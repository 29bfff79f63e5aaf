//go:build race

package messaging

// raceEnabled is for tests that measure: the race detector allocates, and slows
// down what it watches.
const raceEnabled = true
