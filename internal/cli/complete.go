package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
)

const (
	// completionTime is how long a shell waits for suggestions.
	completionTime = 1500 * time.Millisecond
	mostSuggested  = 50
)

// complete registers suggestions for a flag; nil is none, and no files either.
func (c *cli) complete(cmd *cobra.Command, flag string, suggest func(ctx context.Context, begun string) []string) {
	_ = cmd.RegisterFlagCompletionFunc(flag, func(cmd *cobra.Command, _ []string, begun string) ([]string, cobra.ShellCompDirective) {
		if suggest == nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return beginning(suggest(cmd.Context(), begun), begun), cobra.ShellCompDirectiveNoFileComp
	})
}

// completeArgs suggests arguments that are not there yet, up to most of them; 0
// is any number.
func (c *cli) completeArgs(suggest func(ctx context.Context, begun string) []string, most int,
) func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	return func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
		if most > 0 && len(args) >= most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		words := slices.DeleteFunc(suggest(cmd.Context(), begun), func(w string) bool {
			word, _, _ := strings.Cut(w, "\t")
			return slices.Contains(args, word)
		})
		return beginning(words, begun), cobra.ShellCompDirectiveNoFileComp
	}
}

func beginning(words []string, begun string) []string {
	var found []string
	for _, w := range words {
		if strings.HasPrefix(w, begun) && len(found) < mostSuggested {
			found = append(found, w)
		}
	}
	return found
}

// suggestion is a word, and what is said beside it.
func suggestion(word, about string) string { return safe.Line(word) + "\t" + cut(safe.Line(about), 60) }

// peek opens the dead letters for a shell that waits. Whatever goes wrong, there
// is nothing to suggest.
func (c *cli) peek(ctx context.Context, f func(ctx context.Context, desk *triage.Desk) error) {
	ctx, cancel := context.WithTimeout(ctx, completionTime)
	defer cancel()
	c.conn.timeout = min(c.conn.timeout, completionTime)
	_ = c.withDesk(ctx, f)
}

func (c *cli) deadLetterIDs(ctx context.Context, begun string) (words []string) {
	c.peek(ctx, func(ctx context.Context, desk *triage.Desk) error {
		for e, err := range desk.Entries(ctx, triage.Selection{States: dlq.States()}, false) {
			if e == nil {
				if err != nil && ctx.Err() != nil {
					return err
				}
				continue
			}
			if strings.HasPrefix(e.ID, begun) {
				words = append(words, suggestion(e.ID, string(e.State)+" "+e.Consumer+": "+firstLine(latest(e))))
			}
			if len(words) == mostSuggested {
				return nil
			}
		}
		return nil
	})
	return words
}

func (c *cli) groupIDs(ctx context.Context, _ string) (words []string) {
	c.peek(ctx, func(ctx context.Context, desk *triage.Desk) error {
		groups, err := desk.Groups(ctx, triage.Selection{})
		for _, g := range groups {
			words = append(words, suggestion(g.ID, count(g.Count)+" "+g.Consumer+": "+g.Title))
		}
		return err
	})
	return words
}

func (c *cli) operationIDs(ctx context.Context, _ string) (words []string) {
	c.peek(ctx, func(ctx context.Context, desk *triage.Desk) error {
		all, err := desk.Operations(ctx)
		for _, o := range all {
			words = append(words, suggestion(o.ID, status(o)+", "+plural(o.Selected, "dead letter")+", "+c.age(o.Created)))
		}
		return err
	})
	return words
}
