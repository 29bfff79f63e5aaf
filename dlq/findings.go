package dlq

import (
	"slices"

	"github.com/monotel/monotel/internal/shell"
)

// A Severity says how soon a [Finding] wants attention.
type Severity string

// The severities, most severe first.
const (
	SeverityCritical Severity = "critical" // messages are lost or stuck already, or will be by what is known
	SeverityWarning  Severity = "warning"  // messages are lost when something else goes wrong
	SeverityNotice   Severity = "notice"   // worth knowing, and perhaps wanted
)

func (s Severity) rank() int {
	return slices.Index([]Severity{SeverityCritical, SeverityWarning, SeverityNotice}, s)
}

// A Finding is one thing that may lose messages or dead letters, or already has.
type Finding struct {
	Severity Severity

	// Check is a stable identifier of what was checked: "zombies",
	// "max_deliver", "backoff", "max_ack_pending", "paused",
	// "stream_without_max_bytes", "discard_old", "max_age", "server_version",
	// "dlq_missing", "dlq_conflict", "dlq_config", "dlq_near_limit",
	// "dlq_objects_near_limit", "dlq_limit_raised", "dlq_max_age",
	// "dlq_not_replicated" or "advisory_stream_missing"; or what was not checked
	// and why not, see Incomplete: "not_permitted" or "unreadable".
	Check string

	Stream   string // empty if it is about no single stream
	Consumer string // empty if it is about no single consumer
	Detail   string // what was found, with numbers
	Remedy   string // what to do
	Count    uint64 // of zombies, of consumers and the like; 0 if nothing is counted
}

// Incomplete reports whether the finding is that something was not checked: only
// without one of these, no finding means that all is well.
func (f *Finding) Incomplete() bool {
	return f.Check == checkNotPermitted || f.Check == checkUnreadable
}

const (
	checkZombies      = "zombies"
	checkNotPermitted = "not_permitted"
	checkUnreadable   = "unreadable"
	checkDLQNearFull  = "dlq_near_limit"

	// The object store of jetstream keeps a bucket in a stream of this name.
	objectStreamPrefix = "OBJ_"
)

// command is a command line of monotel, for a remedy, with names that are quoted
// for a shell.
func (d *doctor) command(args string, names ...string) string {
	if name := d.s.cfg.StreamName(); name != defaultStream {
		args += " --stream " + shell.Quote(name)
	}
	return "`" + shell.Command("monotel dlq "+args, names) + "`"
}

// natsCommand is a command line of the nats command, for a remedy, about a stream
// or a consumer, whose names are quoted for a shell.
func natsCommand(command string, names []string, flags ...string) string {
	return "`" + shell.Command("nats "+command, names, flags...) + "`"
}

func editStream(stream string, flags ...string) string {
	return natsCommand("stream edit", []string{stream}, flags...)
}
