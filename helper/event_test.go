package helper_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

// patience bounds every wait of a test.
const patience = 3 * time.Minute

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}

func receive[T any](t *testing.T, ch <-chan T, what string) T {
	t.Helper()
	deadline := time.NewTimer(patience)
	defer deadline.Stop()
	select {
	case v := <-ch:
		return v
	case <-deadline.C:
		t.Fatalf("waited %v in vain: %s", patience, what)
		panic("unreachable")
	}
}

// wantError checks that err is what callers test for, and that its text says
// what is wrong and where.
func wantError(t *testing.T, err, want error, parts ...string) {
	t.Helper()
	if err == nil || want != nil && !errors.Is(err, want) {
		t.Errorf("got error %v, want one that is %v", err, want)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error %q does not say %q", err, part)
		}
	}
}

// A module emits events and registers consumers.
type module struct {
	emits    []mono.BaseEventDefinition
	register func(r mono.EventRegistry, self mono.Module) error
	bus      mono.EventBus
}

func (m *module) Name() string                           { return "tester" }
func (m *module) Start(context.Context) error            { return nil }
func (m *module) Stop(context.Context) error             { return nil }
func (m *module) SetEventBus(bus mono.EventBus)          { m.bus = bus }
func (m *module) EmitEvents() []mono.BaseEventDefinition { return m.emits }

func (m *module) RegisterEventConsumers(r mono.EventRegistry) error {
	if m.register == nil {
		return nil
	}
	return m.register(r, m)
}

func start(t *testing.T, m *module) *mono.App {
	t.Helper()
	return monotest.AppWith(t, []mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithLogger(slog.New(slog.DiscardHandler))}, m)
}

type invoice struct {
	Number int     `json:"number"`
	Total  float64 `json:"total"`
}

var invoiced = helper.EventDefinition[invoice]("billing", "Invoiced", "v1")

func TestEventDefinition(t *testing.T) {
	t.Parallel()
	want := mono.BaseEventDefinition{ModuleName: "billing", Name: "Invoiced", Version: "v1", Subject: "events.billing.v1.invoiced"}
	if got := invoiced.ToBase(); got != want {
		t.Errorf("ToBase() = %+v, want %+v", got, want)
	}
	want.Subject = "invoices.new"
	if got := helper.EventDefinition[invoice]("billing", "Invoiced", "v1", "invoices.new").ToBase(); got != want {
		t.Errorf("with a subject of its own: %+v, want %+v", got, want)
	}
}

// A definition that cannot work panics where it is made, and says what would.
func TestEventDefinition_panics(t *testing.T) {
	t.Parallel()
	define := func(module, name, version string, subject ...string) func() {
		return func() { helper.EventDefinition[invoice](module, name, version, subject...) }
	}
	tests := []struct {
		name string
		do   func()
		say  []string
	}{
		{"module", define("bil.ling", "Invoiced", "v1"), []string{"helper.EventDefinition", "module name", `"bil.ling"`, "use 1 to 64 ASCII letters, digits"}},
		{"name", define("billing", "In voiced", "v1"), []string{"event name", `"In voiced"`, "use 1 to 64 ASCII letters"}},
		{"version", define("billing", "Invoiced", ""), []string{"version", `""`, "use 1 to 64 ASCII letters"}},
		{"all three", define("", "", ""), []string{"module name", "event name", "version"}},
		{"wildcard", define("billing", "Invoiced", "v1", "invoices.*"), []string{"billing/Invoiced/v1", `"invoices.*"`, "wildcard"}},
		{"empty subject", define("billing", "Invoiced", "v1", ""), []string{"billing/Invoiced/v1", "empty"}},
		{"subject of the server", define("billing", "Invoiced", "v1", "$SYS.x"), []string{`"$SYS.x"`, "belong to the server"}},
		{"two subjects", define("billing", "Invoiced", "v1", "a", "b"), []string{"2 subjects", "at most one"}},
		{"no codec", func() { invoiced.WithCodec(nil) }, []string{"WithCodec(nil)", "billing/Invoiced/v1"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			defer func() {
				text := fmt.Sprint(recover())
				for _, part := range tt.say {
					if !strings.Contains(text, part) {
						t.Errorf("panic %q does not say %q", text, part)
					}
				}
			}()
			tt.do()
		})
	}
}

func TestEvent_Unmarshal(t *testing.T) {
	t.Parallel()
	got, err := invoiced.Unmarshal(&mono.Msg{Data: []byte(`{"number":7,"total":1.5,"later":true}`)})
	if want := (invoice{7, 1.5}); err != nil || got != want {
		t.Errorf("Unmarshal = %+v, %v, want %+v", got, err, want)
	}
	for _, data := range []string{``, `{`, `{"number":"s3cret"}`, `{"number":1}{"number":2}`, `[]`, "\xff"} {
		got, err := invoiced.Unmarshal(&mono.Msg{Data: []byte(data)})
		if got != (invoice{}) {
			t.Errorf("Unmarshal of %q = %+v beside its error", data, got)
		}
		d, ok := errors.AsType[*mono.DecodeError](err)
		if !ok {
			t.Errorf("Unmarshal of %q = %v, want a DecodeError", data, err)
			continue
		}
		if d.Event != "billing/Invoiced/v1" || d.Err == nil || !mono.IsPermanent(err) {
			t.Errorf("Unmarshal of %q: %+v", data, d)
		}
		wantError(t, err, d.Err, "decode event billing/Invoiced/v1")
		if strings.Contains(err.Error(), "s3cret") {
			t.Errorf("error %q tells the payload", err)
		}
	}
	if _, err := invoiced.Unmarshal(&mono.Msg{Data: []byte(`{"number":"x"}`)}); err != nil {
		if _, ok := errors.AsType[*json.UnmarshalTypeError](err); !ok {
			t.Errorf("%v does not carry what the codec returned", err)
		}
	}
}

// Every way to publish sends the same message, with the header.
func TestEvent_publish(t *testing.T) {
	t.Parallel()
	type receipt struct {
		event  invoice
		header string
		data   string
	}
	got := make(chan receipt, 10)
	m := &module{emits: []mono.BaseEventDefinition{invoiced.ToBase()}}
	m.register = func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventStreamConsumer(r, invoiced,
			mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "invoices"}, AutoAck: true},
			func(_ context.Context, events []invoice, msgs []*mono.Msg) error {
				for i, e := range events {
					got <- receipt{e, msgs[i].Header.Get("X-Way"), string(msgs[i].Data)}
				}
				return nil
			}, self)
	}
	start(t, m)

	ctx := within(t)
	ways := []struct {
		name string
		do   func(e invoice, h mono.Header) (uint64, error)
	}{
		{"Publish", func(e invoice, h mono.Header) (uint64, error) { return 1, invoiced.Publish(m.bus, e, h) }},
		{"PublishContext", func(e invoice, h mono.Header) (uint64, error) { return 2, invoiced.PublishContext(ctx, m.bus, e, h) }},
		{"EventStreamPublish", func(e invoice, h mono.Header) (uint64, error) {
			ack, err := invoiced.EventStreamPublish(ctx, m.bus, e, h)
			if err != nil {
				return 0, err
			}
			return ack.Sequence(), nil
		}},
		{"EventStreamPublishAsync", func(e invoice, h mono.Header) (uint64, error) {
			f, err := invoiced.EventStreamPublishAsync(ctx, m.bus, e, h)
			if err != nil {
				return 0, err
			}
			ack, err := f.Wait(ctx)
			if err != nil {
				return 0, err
			}
			return ack.Sequence(), nil
		}},
	}
	for i, way := range ways {
		n := i + 1
		seq, err := way.do(invoice{n, 0.5}, mono.Header{"X-Way": {way.name}})
		if err != nil || seq != uint64(n) {
			t.Errorf("%s stored message %d, %v, want %d", way.name, seq, err, n)
		}
		want := receipt{invoice{n, 0.5}, way.name, fmt.Sprintf(`{"number":%d,"total":0.5}`, n)}
		if r := receive(t, got, way.name); r != want {
			t.Errorf("%s: got %+v, want %+v", way.name, r, want)
		}
	}
}

func TestEvent_publishRefuses(t *testing.T) {
	t.Parallel()
	m := &module{emits: []mono.BaseEventDefinition{invoiced.ToBase()}}
	start(t, m)
	ctx := within(t)
	ended, cancel := context.WithCancel(ctx)
	cancel()

	ways := func(ctx context.Context, e helper.Event[invoice], bus mono.EventBus, v invoice, h mono.Header) map[string]error {
		_, stream := e.EventStreamPublish(ctx, bus, v, h)
		_, async := e.EventStreamPublishAsync(ctx, bus, v, h)
		return map[string]error{
			"PublishContext": e.PublishContext(ctx, bus, v, h), "EventStreamPublish": stream, "EventStreamPublishAsync": async,
		}
	}
	for name, tt := range map[string]struct {
		errs map[string]error
		want error
		say  []string
	}{
		"no bus": {
			ways(ctx, invoiced, nil, invoice{}, nil), mono.ErrNotStarted,
			[]string{"publish event billing/Invoiced/v1", "event bus is nil", "SetEventBus"},
		},
		"undefined event": {ways(ctx, helper.Event[invoice]{}, m.bus, invoice{}, nil), mono.ErrInvalidConfig, []string{"not defined", "EventDefinition"}},
		"ended context":   {ways(ended, invoiced, m.bus, invoice{}, nil), context.Canceled, []string{"events.billing.v1.invoiced"}},
		"bad header": {
			ways(ctx, invoiced, m.bus, invoice{}, mono.Header{"X": {"\n"}}), mono.ErrInvalidHeader,
			[]string{"events.billing.v1.invoiced", `"X"`},
		},
		"payload that does not encode": {
			ways(ctx, invoiced, m.bus, invoice{Total: math.NaN()}, nil), nil,
			[]string{"publish event billing/Invoiced/v1", "encode helper_test.invoice", "NaN"},
		},
	} {
		for way, err := range tt.errs {
			t.Run(name+" "+way, func(t *testing.T) {
				t.Parallel()
				wantError(t, err, tt.want, tt.say...)
			})
		}
	}
	if err := invoiced.Publish(nil, invoice{}, nil); !errors.Is(err, mono.ErrNotStarted) {
		t.Errorf("Publish without a bus = %v", err)
	}
	_, err := invoiced.EventStreamPublish(ctx, m.bus, invoice{}, nil)
	wantError(t, err, mono.ErrNoStream, "events.billing.v1.invoiced")
	wantError(t, err, jetstream.ErrNoStreamResponse)
}

// A core event that does not decode is reported and its handler not called.
func TestRegisterTypedEventConsumer_undecodable(t *testing.T) {
	t.Parallel()
	got := make(chan invoice, 10)
	reported := make(chan error, 10)
	m := &module{emits: []mono.BaseEventDefinition{invoiced.ToBase()}}
	m.register = func(r mono.EventRegistry, self mono.Module) error {
		return helper.RegisterTypedEventConsumer(r, invoiced, func(_ context.Context, e invoice, _ *mono.Msg) error {
			got <- e
			return nil
		}, self)
	}
	watch := mono.Middleware{Handle: func(_ mono.Consumer, next mono.HandleFunc) mono.HandleFunc {
		return func(ctx context.Context, msgs []*mono.Msg) error {
			err := next(ctx, msgs)
			reported <- err
			return err
		}
	}}
	app := monotest.AppWith(t,
		[]mono.Option{mono.WithStoreDir(t.TempDir()), mono.WithLogger(slog.New(slog.DiscardHandler)), mono.WithMiddleware(watch)}, m)
	for _, data := range []string{"{", `{"number":7}`} {
		if err := app.Bus().Publish(within(t), &mono.Msg{Subject: invoiced.ToBase().Subject, Data: []byte(data)}); err != nil {
			t.Fatal(err)
		}
	}
	if e := receive(t, got, "the good event"); e.Number != 7 {
		t.Errorf("the handler got %+v", e)
	}
	err := receive(t, reported, "the bad event")
	if _, ok := errors.AsType[*mono.DecodeError](err); !ok {
		t.Errorf("the handler's error is %v, want a DecodeError", err)
	}
}

// Payloads may be of any type that the codec knows.
func TestEvent_payloadTypes(t *testing.T) {
	t.Parallel()
	roundTrip(t, "text", "żółw")
	roundTrip(t, "number", 1<<40)
	roundTrip(t, "bytes", [2]byte{0, 255})
	roundTrip(t, "struct", invoice{1, 2})
	roundTrip(t, "nothing", struct{}{})
	roundTrip(t, "time", time.Unix(1_700_000_000, 5).UTC())
	pointer := helper.EventDefinition[*invoice]("billing", "Pointer", "v1")
	if got, err := pointer.Unmarshal(&mono.Msg{Data: []byte(`{"number":7}`)}); err != nil || got == nil || got.Number != 7 {
		t.Errorf("a pointer: %+v, %v", got, err)
	}
	if got, err := pointer.Unmarshal(&mono.Msg{Data: []byte(`{`)}); err == nil || got != nil {
		t.Errorf("a pointer to what does not decode: %+v, %v, want nil and an error", got, err)
	}
}

// A recorder is a bus that keeps what is published.
type recorder struct {
	mono.EventBus
	msg *mono.Msg
}

func (r *recorder) Publish(_ context.Context, msg *mono.Msg) error {
	r.msg = msg
	return nil
}

func roundTrip[T comparable](t *testing.T, name string, v T) {
	t.Helper()
	e := helper.EventDefinition[T]("billing", "Any", "v1")
	r := &recorder{}
	if err := e.Publish(r, v, nil); err != nil {
		t.Errorf("%s: %v", name, err)
		return
	}
	if got, err := e.Unmarshal(r.msg); err != nil || got != v {
		t.Errorf("%s: %v becomes %v, %v", name, v, got, err)
	}
}
