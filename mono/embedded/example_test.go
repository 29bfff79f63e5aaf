package embedded_test

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono/embedded"
)

// A server of this process alone: without Listen nobody else can connect.
func ExampleStart() {
	dir, err := os.MkdirTemp("", "orders")
	if err != nil {
		panic(err)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()

	server, err := embedded.Start(ctx, embedded.Config{StoreDir: dir})
	if err != nil {
		panic(err)
	}
	defer func() { _ = server.Stop(ctx) }()
	nc, err := nats.Connect(server.URL(), server.ConnectOptions()...)
	if err != nil {
		panic(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		panic(err)
	}
	if _, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}}); err != nil {
		panic(err)
	}
	ack, err := js.Publish(ctx, "orders.created", []byte(`{"id":"A-17"}`))
	if err != nil {
		panic(err)
	}
	fmt.Println("stored as", ack.Sequence, "in", ack.Stream)
	// Output: stored as 1 in ORDERS
}
