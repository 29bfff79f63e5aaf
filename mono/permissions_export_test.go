package mono

import "context"

// Sweep does what the janitor of a running App does from time to time.
func Sweep(ctx context.Context, a *App) error {
	a.mu.RLock()
	r := a.run
	a.mu.RUnlock()
	j := &janitor{r: r, targets: make(map[string]map[string]bool)}
	return j.sweep(ctx)
}
