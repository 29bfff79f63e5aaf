package cli

import (
	"context"

	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/screen"
)

// openScreen opens the triage screen. template is where traces can be looked at.
func openScreen(ctx context.Context, c *cli, desk *triage.Desk, template string) error {
	return screen.Run(ctx, desk, screen.Options{TraceURLTemplate: template, Now: c.now, Input: c.in, Output: c.out})
}
