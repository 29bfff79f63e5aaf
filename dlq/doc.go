// Package dlq keeps messages that could not be handled: it captures each once
// into a dead-letter stream, with what is known of the failure, and loses none.
// Package mono captures what its consumers give up; see mono.WithDeadLetters.
//
// docs/dead-letter-format.md describes the stream for readers in other languages.
package dlq
