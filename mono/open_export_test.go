package mono

import "context"

// PollDeadLetters looks how many dead letters are open, as an App does from time to
// time.
func PollDeadLetters(ctx context.Context, a *App) {
	a.mu.RLock()
	r := a.run
	a.mu.RUnlock()
	r.pollDeadLetters(ctx)
}

// ForgetFailures has the next look come at once, after one that failed.
func ForgetFailures(a *App) (failed int) {
	a.mu.RLock()
	g := a.run.openGauge
	a.mu.RUnlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.next = g.next.Add(-openMostWait)
	return g.failed
}
