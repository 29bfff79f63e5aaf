package mono_test

import (
	"context"
	"net/url"
	"strings"
	"testing"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
)

// An App turns off the rollups of a dead-letter stream that an earlier version has made,
// and says so once. One that may not do so says that, and starts all the same.
func TestDeadLetters_rollupsOff(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name   string
		edit   func(*jetstream.StreamConfig)
		denied []string
		said   string // "" for nothing
		on     bool   // afterwards
	}{
		{name: "on", said: "rollups of the dead-letter stream turned off"},
		{name: "off", edit: func(c *jetstream.StreamConfig) { c.AllowRollup = false }},
		{
			name: "kept by the server", edit: func(c *jetstream.StreamConfig) { c.AllowMsgTTL, c.SubjectDeleteMarkerTTL = true, 1e9 },
			said: "not turned off", on: true,
		},
		{name: "no permission to update", denied: []string{"$JS.API.STREAM.UPDATE.DLQ"}, said: "not turned off", on: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			account := server.NewAccount("APPS")
			srv, err := server.NewServer(&server.Options{
				Host: "127.0.0.1", Port: -1, NoLog: true, NoSigs: true, JetStream: true, StoreDir: t.TempDir(), Accounts: []*server.Account{account},
				Users: []*server.User{
					{Username: "admin", Password: "pw", Account: account},
					{Username: "app", Password: "pw", Account: account, Permissions: &server.Permissions{
						Publish: &server.SubjectPermission{Deny: tt.denied},
					}},
				},
			})
			if err != nil {
				t.Fatal(err)
			}
			srv.Start()
			t.Cleanup(func() {
				srv.Shutdown()
				srv.WaitForShutdown()
			})
			if !srv.ReadyForConnections(patience) {
				t.Fatal("the server does not start")
			}
			if account, err = srv.LookupAccount("APPS"); err != nil {
				t.Fatal(err)
			}
			if err := account.EnableJetStream(map[string]server.JetStreamAccountLimits{"": {MaxMemory: -1, MaxStore: -1, MaxStreams: -1, MaxConsumers: -1}}, nil); err != nil {
				t.Fatal(err)
			}
			as := func(name string) string {
				u, err := url.Parse(srv.ClientURL())
				if err != nil {
					t.Fatal(err)
				}
				u.User = url.UserPassword(name, "pw")
				return u.String()
			}
			nc, err := nats.Connect(as("admin"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(nc.Close)
			js := jetStreamOf(t, nc)
			cfg := jetstream.StreamConfig{
				Name: "DLQ", Subjects: []string{"monotel.dlq.DLQ.>"}, Discard: jetstream.DiscardNew, AllowDirect: true, AllowRollup: true, MaxBytes: 1 << 20,
			}
			if tt.edit != nil {
				tt.edit(&cfg)
			}
			if _, err := js.CreateStream(within(t), cfg); err != nil {
				t.Fatal(err)
			}
			logs := &logBuffer{}
			for range 2 {
				app := runApp(t, append(onURL(as("app")), mono.WithLogger(logs.logger())), emitter("shop", monotestEvent(t)),
					orders(t, "billing", mono.LimitsPolicy, func(context.Context, []*mono.Msg) error { return nil }))
				if err := app.Stop(within(t)); err != nil {
					t.Fatal(err)
				}
			}
			s, err := js.Stream(within(t), "DLQ")
			if err != nil {
				t.Fatal(err)
			}
			if got := s.CachedInfo().Config; got.AllowRollup != tt.on || got.MaxBytes != 1<<20 {
				t.Errorf("rollups are %v, want %v; max bytes %d", got.AllowRollup, tt.on, got.MaxBytes)
			}
			want := 0
			if tt.said != "" {
				want = 1
			}
			if tt.on { // each App says it
				want = 2
			}
			if n := strings.Count(logs.String(), "rollups of the dead-letter stream"); n != want || !strings.Contains(logs.String(), tt.said) {
				t.Errorf("it is said %d times, want %d times %q:\n%s", n, want, tt.said, logs.String())
			}
		})
	}
}
