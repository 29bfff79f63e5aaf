package mono_test

import (
	"context"
	"log/slog"
	"os"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// The same modules on a NATS cluster: one option changes. Every nats.Option
// works, here credentials and a certificate authority.
func ExampleWithNATS() {
	app, err := mono.New(
		mono.WithNATS("tls://n1.example.com,tls://n2.example.com,tls://n3.example.com",
			nats.UserCredentials("orders.creds"),
			nats.RootCAs("ca.pem"),
		),
		mono.WithLogger(slog.Default()),
	)
	if err != nil {
		slog.Error("configure", "error", err)
		os.Exit(1)
	}
	if err := app.Run(context.Background()); err != nil {
		slog.Error("run", "error", err)
		os.Exit(1)
	}
}

// An embedded server that other processes may connect to. It listens with
// authentication only.
func ExampleWithEmbedded() {
	app, err := mono.New(mono.WithEmbedded(embedded.Config{
		StoreDir: "/var/lib/orders",
		Listen:   "127.0.0.1:4222",
		Users:    []embedded.User{{Name: "ops", Password: os.Getenv("NATS_PASSWORD")}},
	}))
	if err != nil {
		slog.Error("configure", "error", err)
		os.Exit(1)
	}
	if err := app.Run(context.Background()); err != nil {
		slog.Error("run", "error", err)
		os.Exit(1)
	}
}
