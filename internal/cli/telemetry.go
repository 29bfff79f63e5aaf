package cli

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/telemetry"
	"github.com/monotel/monotel/telemetry/messaging"
)

// tracingVariables say that spans are wanted, and where.
var tracingVariables = []string{"OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER"}

// telemetry sets up traces of replays if the environment asks for them. It is nil
// if not. stop sends what is left, for a few seconds at most: a collector that is
// away must not keep a command from its end.
func (c *cli) telemetry(ctx context.Context) (tel *messaging.Telemetry, stop func(), err error) {
	nothing := func() {}
	if !slices.ContainsFunc(tracingVariables, func(name string) bool { return c.env(name) != "" }) {
		return nil, nothing, nil
	}
	const patience = 3 * time.Second
	setup, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	t, err := telemetry.Setup(setup, telemetry.WithServiceName("monotel"), telemetry.WithoutGlobals())
	if err != nil {
		return nil, nothing, usageError{err}
	}
	stop = func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		defer cancel()
		if err := t.Shutdown(ctx); err != nil {
			fmt.Fprintf(c.err, "warning: traces: %s\n", safe.Block(err.Error()))
		}
	}
	tel, err = messaging.New(messaging.Config{
		TracerProvider: t.TracerProvider(), MeterProvider: t.MeterProvider(), Propagator: t.Propagator(),
	})
	if err != nil {
		stop()
		return nil, nothing, err
	}
	return tel, stop, nil
}
