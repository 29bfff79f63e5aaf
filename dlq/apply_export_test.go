package dlq

// What a full stream's metadata has while its limits are raised.
type (
	Raise  = raise
	Limits = limits
)

// KeyRaised is the name of that.
const KeyRaised = keyRaised
