package mono

import (
	"runtime/debug"

	"github.com/monotel/monotel/telemetry/messaging"
)

// errorTypes are the values of the attribute error.type for what callers can
// test for. They are documented names: dashboards and alerts use them.
var errorTypes = []messaging.Sentinel{
	{Err: ErrPayloadTooLarge, Type: "payload_too_large"},
	{Err: ErrStoreFull, Type: "store_full"},
	{Err: ErrNoStream, Type: "no_stream"},
	{Err: ErrDisconnected, Type: "disconnected"},
	{Err: ErrAckTimeout, Type: "ack_timeout"},
	{Err: ErrStopped, Type: "stopped"},
	{Err: ErrNotStarted, Type: "not_started"},
	{Err: ErrInvalidSubject, Type: "invalid_subject"},
	{Err: ErrInvalidHeader, Type: "invalid_header"},
	{Err: ErrInvalidConfig, Type: "invalid_configuration"},
	{Err: errGoexit, Type: "goexit"},
}

// version is that of this module in the running program, if that is known.
func version() string {
	const path = "github.com/monotel/monotel"
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	if info.Main.Path == path {
		return info.Main.Version
	}
	for _, d := range info.Deps {
		if d.Path == path {
			return d.Version
		}
	}
	return ""
}

// openTelemetry makes the App's telemetry at its first start. It outlives the
// run, so that its counts go on with the next one.
func (r *run) openTelemetry() error {
	if r.app.telemetry == nil {
		t, err := messaging.New(r.app.cfg.telemetry)
		if err != nil {
			return err
		}
		r.app.telemetry = t
	}
	r.tel = r.app.telemetry
	r.unmatched.publisher = r.tel.Publisher(messaging.TemplateUnmatched)
	r.inboxes.publisher = r.tel.Publisher(messaging.TemplateInbox)
	return nil
}
