package mono

import (
	"errors"
	"testing"
)

// Each of the two is allowed; together they ask for room for 82 million
// messages, which the consumer would make at once: 650 MB for its queue alone.
func TestStreamConsumerConfig_boundsWhatIsHeld(t *testing.T) {
	t.Parallel()
	c := StreamConsumerConfig{
		Stream: StreamConfig{Name: "s"}, Concurrency: maxConcurrency, Fetch: FetchConfig{BatchSize: maxBatchSize},
	}
	if err := c.withDefaults().validate(); !errors.Is(err, ErrInvalidConfig) {
		t.Errorf("Concurrency %d with BatchSize %d: %v, want ErrInvalidConfig", c.Concurrency, c.Fetch.BatchSize, err)
	}
}
