package mono_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// The same modules on a NATS cluster: one option changes. Every nats.Option
// works, here credentials and a certificate authority.
func ExampleWithNATS() { //nolint:testableexamples // there is no such cluster
	app, err := mono.New(
		mono.WithNATS("tls://n1.example.com,tls://n2.example.com,tls://n3.example.com",
			nats.UserCredentials("orders.creds"),
			nats.RootCAs("ca.pem"),
		),
		mono.WithLogger(slog.Default()),
	)
	if err != nil {
		panic(err)
	}
	fmt.Println(app.Run(context.Background()))
}

// An embedded server that other processes may connect to. It listens with
// authentication only.
func ExampleWithEmbedded() { //nolint:testableexamples // it runs until it is interrupted
	app, err := mono.New(mono.WithEmbedded(embedded.Config{
		StoreDir: "/var/lib/orders",
		Listen:   "127.0.0.1:4222",
		Users:    []embedded.User{{Name: "ops", Password: os.Getenv("NATS_PASSWORD")}},
	}))
	if err != nil {
		panic(err)
	}
	fmt.Println(app.Run(context.Background()))
}
