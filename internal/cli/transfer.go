package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/monotel/monotel/dlq/triage"
)

func (c *cli) export() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write dead letters with payloads and history to a file",
		Long: "Write dead letters with payloads and history to a file, as NDJSON: one on each\n" +
			"line. 'import' reads them back, here or elsewhere.",
		Example: "  monotel dlq export --file open.ndjson\n" +
			"  monotel dlq export --group 3f2a --state all | gzip > group.ndjson.gz",
		Args: noArgs,
	}
	var s selection
	s.register(cmd, c, false)
	file := cmd.Flags().StringP("file", "f", "", "`FILE` to write, which must not exist (default: standard output)")
	cmd.RunE = c.runs(func(ctx context.Context, _ []string) error {
		if _, ok := c.tty(c.out); ok && *file == "" {
			return usagef("an export has payloads, which are not for a terminal: use --file, or redirect it")
		}
		sel, err := s.parse(c, nil)
		if err != nil {
			return err
		}
		return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error {
			if err := fullGroups(ctx, desk, &sel); err != nil {
				return err
			}
			n, err := c.exportTo(ctx, desk, sel, *file)
			if err != nil {
				return err
			}
			c.remark("%s exported", plural(n, "dead letter"))
			return nil
		})
	})
	return cmd
}

func (c *cli) exportTo(ctx context.Context, desk *triage.Desk, sel triage.Selection, name string) (n int, err error) {
	if name == "" {
		return desk.Export(ctx, sel, c.out)
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // the user's own file
	if errors.Is(err, os.ErrExist) {
		return 0, usagef("%s exists already: remove it, or choose another name", name)
	}
	if err != nil {
		return 0, usagef("export: %w", err)
	}
	n, err = desk.Export(ctx, sel, f)
	if err = errors.Join(err, f.Close()); err != nil {
		return n, errors.Join(err, os.Remove(name)) // half of it would be taken for the whole
	}
	return n, nil
}

type importedView struct {
	Imported int `json:"imported"`
	Present  int `json:"present"`
}

func (c *cli) imports() *cobra.Command {
	return &cobra.Command{
		Use:   "import FILE",
		Short: "Read exported dead letters back",
		Long: "Read exported dead letters back; - is standard input. What is there already is\n" +
			"left alone, so it does no harm to do it again.",
		Example: "  monotel dlq import open.ndjson\n  gunzip < group.ndjson.gz | monotel dlq import -",
		Args:    oneArg("file", "- is the standard input"),
		RunE: c.runs(func(ctx context.Context, args []string) error {
			if err := c.mayChange(); err != nil {
				return err
			}
			from := c.in
			if args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return usagef("import: %w", err)
				}
				defer f.Close() //nolint:errcheck // it is only read
				from = f
			}
			return c.withDesk(ctx, func(ctx context.Context, desk *triage.Desk) error { return c.importFrom(ctx, desk, from) })
		}),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return nil, cobra.ShellCompDirectiveDefault
		},
	}
}

func (c *cli) importFrom(ctx context.Context, desk *triage.Desk, from io.Reader) error {
	n, err := desk.Import(ctx, from)
	if c.output != outputTable {
		if writeErr := c.writeJSON(importedView(n)); writeErr != nil {
			return errors.Join(err, writeErr)
		}
	} else {
		c.remark("%s imported, %s were there already", count(n.Imported), count(n.Present))
	}
	if err != nil && n.Imported > 0 {
		return partlyf("%w; what came before it is imported", err)
	}
	if err != nil {
		return fmt.Errorf("nothing was imported: %w", err)
	}
	return nil
}
