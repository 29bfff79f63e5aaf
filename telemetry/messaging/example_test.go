package messaging_test

import (
	"context"
	"fmt"

	"github.com/nats-io/nats.go"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"github.com/monotel/monotel/telemetry/messaging"
)

// A program that publishes with nats.go passes its trace on to consumers in any
// language.
func ExampleCarrier() {
	otel.SetTextMapPropagator(propagation.TraceContext{})
	ctx, span := sdktrace.NewTracerProvider().Tracer("shop").Start(context.Background(), "take order")
	defer span.End()

	msg := nats.NewMsg("events.shop.v1.order-placed")
	otel.GetTextMapPropagator().Inject(ctx, messaging.Carrier(msg.Header))

	for key := range msg.Header {
		fmt.Println(key)
	}
	// Output: traceparent
}
