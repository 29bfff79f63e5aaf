package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/monotel/monotel/mono"
)

// printer is the module that prints events as they pass. It listens over core
// NATS: it sees what is published while it runs, and nothing twice. A restart
// prints only what was not stored before.
type printer struct {
	families []family
	w        io.Writer // safe for concurrent use
}

func (*printer) Name() string                { return "printer" }
func (*printer) Start(context.Context) error { return nil }
func (*printer) Stop(context.Context) error  { return nil }

func (m *printer) RegisterEventConsumers(r mono.EventRegistry) error {
	errs := make([]error, len(m.families))
	for i, f := range m.families {
		errs[i] = f.registerPrinter(r, m)
	}
	return errors.Join(errs...)
}

func (m *printer) print(f family, e shape, msg *mono.Msg) error {
	_, err := fmt.Fprintf(m.w, "line %s: %s %s\n", quoteOdd(msg.Header.Get(lineHeader)), f.name, e.describe())
	return err
}
