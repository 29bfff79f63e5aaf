package mono

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Errors to test for with [errors.Is]. Each is wrapped with what was being
// done, to what, and with the cause.
var (
	// ErrInvalidConfig reports an option, a stream consumer configuration or a
	// registration that cannot work. New, Register and Start report every
	// problem they find at once; the text names the value to change.
	ErrInvalidConfig = errors.New("invalid configuration")

	// ErrInvalidName reports a module name, event name or version with
	// characters that are not allowed.
	ErrInvalidName = errors.New("invalid name")

	// ErrInvalidSubject reports a subject that nothing can be published on.
	ErrInvalidSubject = errors.New("invalid subject")

	// ErrInvalidHeader reports a header key or value that would break the
	// message on the wire, such as one with a line break.
	ErrInvalidHeader = errors.New("invalid header")

	// ErrDuplicate reports a module, an event, a subject or a durable consumer
	// that was registered before.
	ErrDuplicate = errors.New("registered twice")

	// ErrUnknownEvent reports a consumer registration for an event that no
	// module emits and [WithEvents] does not declare.
	ErrUnknownEvent = errors.New("unknown event")

	// ErrStreamConflict reports streams that cannot be arranged as asked: two
	// modules that contradict each other, or a stream on the server whose
	// configuration contradicts the asked one. Nothing was changed.
	ErrStreamConflict = errors.New("stream conflict")

	// ErrNoStream reports a durable publish on a subject that no stream stores.
	ErrNoStream = errors.New("no stream stores this subject")

	// ErrStoreFull reports a durable publish or a new stream that was refused
	// because a stream, or the server's store, has reached its limit.
	ErrStoreFull = errors.New("store full")

	// ErrPayloadTooLarge reports a message above the server's max_payload or
	// its stream's MaxMsgSize.
	ErrPayloadTooLarge = errors.New("payload too large")

	// ErrDisconnected reports an asynchronous durable publish that was sent and
	// not acknowledged before the connection was lost. Whether the message is
	// stored is not known: publish it again with the same Nats-Msg-Id header,
	// and the server drops the copy.
	ErrDisconnected = errors.New("connection lost before the acknowledgement")

	// ErrAckTimeout reports an asynchronous durable publish that the server did
	// not acknowledge in time. Whether the message is stored is not known.
	ErrAckTimeout = errors.New("no acknowledgement in time")

	// ErrNotStarted reports a call that needs a started App.
	ErrNotStarted = errors.New("app is not started")

	// ErrAlreadyStarted reports a call that has to come before Start, or a
	// second Start.
	ErrAlreadyStarted = errors.New("app is already started")

	// ErrStopTimeout reports that Stop ran out of time while handlers or
	// modules were still at work. Their messages are delivered again.
	ErrStopTimeout = errors.New("stop ran out of time")

	// ErrStopped is the cause of the contexts that Stop cancels.
	ErrStopped = errors.New("app stopped")

	// ErrAlreadySettled reports a second settlement of one delivery. The first
	// one stands.
	ErrAlreadySettled = errors.New("message is already settled")

	// ErrNotDurable reports a settlement of a message that did not come from a
	// durable consumer. Core NATS keeps nothing, so there is nothing to settle.
	ErrNotDurable = errors.New("message did not come from a stream")
)

// A PanicError is the error of a handler or module that panicked. Like any
// other handler error it is retried and then dead-lettered.
type PanicError struct {
	Value any    // what was passed to panic
	Stack []byte // the stack of the panicking goroutine
}

func (e *PanicError) Error() string { return fmt.Sprintf("panic: %v", e.Value) }

// ErrorType is the value of the attribute error.type in telemetry.
func (e *PanicError) ErrorType() string { return "panic" }

// Unwrap returns the panic's value when that is an error, and nil otherwise.
func (e *PanicError) Unwrap() error {
	err, _ := e.Value.(error)
	return err
}

// A DecodeError reports a payload that does not decode as the type its event
// was defined with. Trying again cannot help, so it is not retried: a message
// that fails with it is dead-lettered alone and the rest of its batch is
// handled. Its text does not repeat the payload; Err's may.
type DecodeError struct {
	Event string // the event, as module/name/version
	Err   error  // what the codec returned
}

// Error says what is wrong and where, not with which value: the errors of
// encoding/json and of other decoders quote the payload.
func (e *DecodeError) Error() string {
	var what string
	if syntax, ok := errors.AsType[*json.SyntaxError](e.Err); ok {
		what = fmt.Sprintf("malformed JSON at byte %d", syntax.Offset)
	} else if typ, ok := errors.AsType[*json.UnmarshalTypeError](e.Err); ok {
		kind, _, _ := strings.Cut(typ.Value, " ")
		what = fmt.Sprintf("JSON %s at byte %d does not fit %v", kind, typ.Offset, typ.Type)
		if typ.Field != "" {
			what += fmt.Sprintf(", field %q", typ.Field)
		}
	} else {
		what = fmt.Sprintf("%T", e.Err)
	}
	return fmt.Sprintf("decode event %s: %s", e.Event, what)
}

// ErrorType is the value of the attribute error.type in telemetry.
func (e *DecodeError) ErrorType() string { return "undecodable" }

// Unwrap returns Err.
func (e *DecodeError) Unwrap() error { return e.Err }

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// Permanent marks err as not worth retrying. A durable consumer's handler that
// returns it gives up on the messages it left unsettled: they are
// dead-lettered at once. Permanent(nil) is nil.
func Permanent(err error) error {
	if err == nil {
		return nil
	}
	return &permanentError{err}
}

// IsPermanent reports whether trying again cannot help: whether err's tree
// holds an error made by [Permanent], or a [DecodeError].
func IsPermanent(err error) bool {
	if _, ok := errors.AsType[*permanentError](err); ok {
		return true
	}
	_, ok := errors.AsType[*DecodeError](err)
	return ok
}

type retryAfterError struct {
	err   error
	delay time.Duration
}

func (e *retryAfterError) Error() string { return e.err.Error() }
func (e *retryAfterError) Unwrap() error { return e.err }

// RetryAfter asks for the next attempt after d instead of the delay that the
// consumer's [RetryPolicy] gives; a d below zero counts as zero. The attempt
// counts like any other: on the last one the message is dead-lettered.
// RetryAfter(nil, d) is nil.
func RetryAfter(err error, d time.Duration) error {
	if err == nil {
		return nil
	}
	return &retryAfterError{err, max(d, 0)}
}
