package mono

import "github.com/nats-io/nats.go"

// AskAgain does what the watchdog does when nothing has come for long, for the App's
// first consumer.
func AskAgain(a *App) { firstPuller(a).silent() }

// Trusts reports whether the App's first consumer trusts what comes, but for what was
// delivered before it asked.
func Trusts(a *App) bool { return !firstPuller(a).asksFirst() }

// Receive has the App's first consumer receive a message from the server.
func Receive(a *App, m *nats.Msg) { firstPuller(a).receive(m) }

func firstPuller(a *App) *puller {
	a.mu.RLock()
	defer a.mu.RUnlock()
	return &a.run.streams[0].pull
}
