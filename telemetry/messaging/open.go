package messaging

import (
	"time"

	"go.opentelemetry.io/otel/metric"
)

// OpenDeadLetters are those of a consumer that are still to be dealt with.
type OpenDeadLetters struct {
	Consumer string // durable name, or a stand-in
	Count    int
	Oldest   time.Time // when the oldest of them was given up; zero: none is open
}

// openDeadLetters are reported with attributes that are made once.
type openDeadLetters struct {
	OpenDeadLetters

	attrs []metric.ObserveOption
}

// SetOpenDeadLetters keeps what is reported of a dead-letter stream until the next
// call. Nil reports nothing.
func (t *Telemetry) SetOpenDeadLetters(stream string, open []OpenDeadLetters) {
	all := make([]openDeadLetters, len(open))
	for i, d := range open {
		all[i] = openDeadLetters{d, observeOptions(keyStream.String(stream), keyConsumerGroup.String(clean(d.Consumer, maxAttribute)))}
	}
	t.deadLetters.Store(&all)
}

func (t *Telemetry) observeDeadLetters(o metric.Observer) {
	all := t.deadLetters.Load()
	if all == nil {
		return
	}
	for _, d := range *all {
		age := 0.0
		if !d.Oldest.IsZero() {
			age = max(time.Since(d.Oldest).Seconds(), 0)
		}
		o.ObserveInt64(t.instruments.deadLettersOpen, int64(d.Count), d.attrs...)
		o.ObserveFloat64(t.instruments.deadLettersOldestAge, age, d.attrs...)
	}
}
