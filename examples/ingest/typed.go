package main

import (
	"context"
	"errors"
	"sync/atomic"

	"github.com/monotel/monotel/mono"
)

const typedName = "typed"

// typed is the module that records what each event says. It has a durable
// consumer for each family, which gets values of the family's Go type. A
// payload that does not fit the type is given up by the framework, and missing
// from the totals.
type typed struct {
	families []family
	ledger   *ledger
	handled  atomic.Int64 // by this run
}

func (*typed) Name() string                { return typedName }
func (*typed) Start(context.Context) error { return nil }
func (*typed) Stop(context.Context) error  { return nil }

func (m *typed) RegisterEventConsumers(r mono.EventRegistry) error {
	errs := make([]error, len(m.families))
	for i, f := range m.families {
		errs[i] = f.registerTyped(r, m)
	}
	return errors.Join(errs...)
}

func (m *typed) handle(ctx context.Context, f family, e shape, msg *mono.Msg) {
	settle(msg, m.ledger.write(ctx, typedName, msg, record{Family: f.name, Text: e.describe()}))
	m.handled.Add(1)
}
