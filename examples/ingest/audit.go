package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"sync/atomic"

	"github.com/monotel/monotel/mono"
)

const auditName = "audit"

// audit is the module that records the checksum of each payload as it arrived.
// It takes raw messages: what a payload means is nothing to it.
type audit struct {
	families []family
	ledger   *ledger
	handled  atomic.Int64 // by this run
}

func (*audit) Name() string                { return auditName }
func (*audit) Start(context.Context) error { return nil }
func (*audit) Stop(context.Context) error  { return nil }

func (m *audit) RegisterEventConsumers(r mono.EventRegistry) error {
	errs := make([]error, len(m.families))
	for i, f := range m.families {
		errs[i] = r.RegisterEventStreamConsumer(f.event, f.consumerConfig(auditName),
			func(ctx context.Context, msgs []*mono.Msg) error {
				for _, msg := range msgs {
					m.handle(ctx, f, msg)
				}
				return nil
			}, m)
	}
	return errors.Join(errs...)
}

func (m *audit) handle(ctx context.Context, f family, msg *mono.Msg) {
	sum := sha256.Sum256(msg.Data)
	settle(msg, m.ledger.write(ctx, auditName, msg, record{Family: f.name, SHA256: hex.EncodeToString(sum[:])}))
	m.handled.Add(1)
}

// settle acks msg if err is nil, and otherwise has it delivered again. If that
// cannot be sent, the message is delivered again in any case, so there is
// nothing to do about it.
func settle(msg *mono.Msg, err error) {
	_ = msg.Fail(err)
}
