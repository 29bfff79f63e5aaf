package dlq_test

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/embedded"
)

// A consumer of another program captures a message that it gives up, and monotel dlq
// shows it. Decode reads what is stored.
func ExampleStore_Capture() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	nc, js, stop := exampleServer(ctx)
	defer stop()

	store, err := dlq.NewStore(nc, js, dlq.Config{})
	if err != nil {
		panic(err)
	}
	if err := store.Provision(ctx); err != nil { // the dead-letter stream
		panic(err)
	}
	created := time.Date(2026, time.November, 1, 0, 0, 0, 0, time.UTC) // of stream ORDERS
	record := &dlq.Record{
		ID:     dlq.ID("ORDERS", created, "billing", 17),
		Reason: dlq.ReasonPermanentError, Error: "no such customer",
		Subject: "orders.created", Data: []byte(`{"id":"A-17"}`),
		Stream: "ORDERS", StreamCreated: created, StreamSequence: 17, Consumer: "billing", Deliveries: 1,
	}
	for range 2 { // a capture may be repeated: it is stored once
		captured, err := store.Capture(ctx, record, nil)
		if err != nil {
			panic(err)
		}
		fmt.Println("captured:", captured)
	}

	stream, err := js.Stream(ctx, dlq.Config{}.StreamName())
	if err != nil {
		panic(err)
	}
	msg, err := stream.GetMsg(ctx, 1)
	if err != nil {
		panic(err)
	}
	stored, err := dlq.Decode(msg.Header, msg.Data)
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s of %s: %s, %s\n", stored.Consumer, stored.Stream, stored.Error, stored.Data)
	// Output:
	// captured: true
	// captured: false
	// billing of ORDERS: no such customer, {"id":"A-17"}
}

// exampleServer stands for the server that is there already.
func exampleServer(ctx context.Context) (nc *nats.Conn, js jetstream.JetStream, stop func()) {
	dir, err := os.MkdirTemp("", "dlq")
	if err != nil {
		panic(err)
	}
	server, err := embedded.Start(ctx, embedded.Config{StoreDir: dir})
	if err != nil {
		panic(err)
	}
	if nc, err = nats.Connect(server.URL(), server.ConnectOptions()...); err != nil {
		panic(err)
	}
	if js, err = jetstream.New(nc); err != nil {
		panic(err)
	}
	return nc, js, func() {
		nc.Close()
		_ = server.Stop(ctx)
		_ = os.RemoveAll(dir)
	}
}
