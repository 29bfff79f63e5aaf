// Package messaging is what a NATS message leaves behind in OpenTelemetry: the
// trace context in its headers, the spans of publishing, processing and
// settling, and the metrics. Package mono uses it; programs configure it
// through mono's options.
//
// It uses the OpenTelemetry API only. Nothing in it changes what happens to a
// message: a provider that does nothing, fails or panics costs a span or a
// count, never a message.
package messaging
