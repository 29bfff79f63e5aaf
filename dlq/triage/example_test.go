package triage_test

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/mono/embedded"
)

// Look at what failed, group by group, and at what a replay would send.
func ExampleOpen() {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	nc, stop := exampleDeadLetters(ctx)
	defer stop()

	desk, err := triage.Open(ctx, nc, triage.Config{Actor: "ada@ops"})
	if err != nil {
		panic(err)
	}
	groups, err := desk.Groups(ctx, triage.Selection{})
	if err != nil {
		panic(err)
	}
	for _, g := range groups {
		fmt.Printf("%d of %s: %s\n", g.Count, g.Consumer, g.Title)
	}

	query, err := triage.Compile(`consumer == "billing" && payload.total > 50`)
	if err != nil {
		panic(err)
	}
	plan, err := desk.DryRun(ctx, triage.Selection{Where: query}, triage.Options{Target: triage.TargetEveryone, Rate: 10})
	if err != nil {
		panic(err)
	}
	fmt.Println("a replay would send", plan.Selected)

	for entry, err := range desk.Entries(ctx, triage.Selection{Where: query}, true) {
		if err != nil {
			panic(err)
		}
		if err := desk.Archive(ctx, entry, "the customer was told"); err != nil {
			panic(err)
		}
		fmt.Printf("%s is %s\n", entry.Data, entry.State)
	}
	// Output:
	// 3 of billing: no such customer
	// a replay would send 1
	// {"total":100} is archived
}

// exampleDeadLetters stands for a server with dead letters.
func exampleDeadLetters(ctx context.Context) (nc *nats.Conn, stop func()) {
	dir, err := os.MkdirTemp("", "triage")
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
	js, err := jetstream.New(nc)
	if err != nil {
		panic(err)
	}
	stream, err := js.CreateStream(ctx, jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}})
	if err != nil {
		panic(err)
	}
	if _, err := stream.CreateConsumer(ctx, jetstream.ConsumerConfig{Durable: "billing", FilterSubject: "orders.created"}); err != nil {
		panic(err)
	}
	store, err := dlq.NewStore(nc, js, dlq.Config{})
	if err != nil {
		panic(err)
	}
	if err := store.Provision(ctx); err != nil {
		panic(err)
	}
	created := stream.CachedInfo().Created
	for i, total := range []int{10, 20, 100} {
		ack, err := js.Publish(ctx, "orders.created", fmt.Appendf(nil, `{"total":%d}`, total))
		if err != nil {
			panic(err)
		}
		_, err = store.Capture(ctx, &dlq.Record{
			ID: dlq.ID("ORDERS", created, "billing", ack.Sequence), Reason: dlq.ReasonPermanentError, Error: "no such customer",
			Subject: "orders.created", Data: fmt.Appendf(nil, `{"total":%d}`, total),
			Stream: "ORDERS", StreamCreated: created, StreamSequence: ack.Sequence, Consumer: "billing", Deliveries: 1,
			Failed: created.Add(time.Duration(i) * time.Second),
		}, nil)
		if err != nil {
			panic(err)
		}
	}
	return nc, func() {
		nc.Close()
		_ = server.Stop(ctx)
		_ = os.RemoveAll(dir)
	}
}
