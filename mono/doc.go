// Package mono runs event-driven modules on NATS JetStream.
//
// An [App] holds [Module] values. Modules that emit events declare them and
// publish through the [EventBus]; modules that consume them register handlers
// with the [EventRegistry], over core NATS for what may be lost, or with a
// durable consumer for what may not. Package helper adds types to all that.
//
// Without further options everything runs in one process, on an embedded NATS
// server that opens no port and keeps its streams in data/nats. [WithNATS]
// moves the same program to a server or cluster.
//
// # Delivery
//
// A durable publish that returned nil is stored. A durable consumer gets each
// message at least once, and until it is settled: acked, or given up by a term,
// a permanent error, or too many failed attempts. Handlers should be
// idempotent. See docs/guarantees.md for what is promised and which test shows
// it.
package mono
