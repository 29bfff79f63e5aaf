package helper_test

import (
	"bytes"
	"context"
	"encoding/gob"
	"errors"
	"fmt"
	"testing"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
)

func TestJSON(t *testing.T) {
	t.Parallel()
	data, err := helper.JSON.Marshal(invoice{7, 1.5})
	if want := `{"number":7,"total":1.5}`; err != nil || string(data) != want {
		t.Errorf("Marshal = %s, %v, want %s", data, err, want)
	}
	var got invoice
	if err := helper.JSON.Unmarshal(data, &got); err != nil || got != (invoice{7, 1.5}) {
		t.Errorf("Unmarshal = %+v, %v", got, err)
	}
}

// gobCodec encodes with encoding/gob, each payload by itself.
type gobCodec struct{}

func (gobCodec) Marshal(v any) ([]byte, error) {
	var b bytes.Buffer
	err := gob.NewEncoder(&b).Encode(v)
	return b.Bytes(), err
}

func (gobCodec) Unmarshal(data []byte, v any) error {
	return gob.NewDecoder(bytes.NewReader(data)).Decode(v)
}

// An event with a codec of its own. Whoever consumes it uses this definition,
// and with it the codec.
func ExampleEvent_WithCodec() {
	type Measured struct {
		Sensor  string
		Celsius float64
	}
	measured := helper.EventDefinition[Measured]("weather", "Measured", "v1").WithCodec(gobCodec{})

	data, err := gobCodec{}.Marshal(Measured{Sensor: "roof", Celsius: 21.5})
	if err != nil {
		panic(err)
	}
	event, err := measured.Unmarshal(&mono.Msg{Data: data})
	if err != nil {
		panic(err)
	}
	fmt.Printf("%s: %.1f °C\n", event.Sensor, event.Celsius)

	_, err = measured.Unmarshal(&mono.Msg{Data: []byte(`{"Sensor":"roof"}`)})
	var undecodable *mono.DecodeError
	fmt.Println(errors.As(err, &undecodable), mono.IsPermanent(err))

	// Output:
	// roof: 21.5 °C
	// true true
}

// The codec is the event's, for publishing and for both kinds of handlers; the
// definition that it was made from keeps its own.
func TestEvent_WithCodec(t *testing.T) {
	t.Parallel()
	gobbed := invoiced.WithCodec(gobCodec{})
	if gobbed.ToBase() != invoiced.ToBase() {
		t.Errorf("the codec changes the event: %+v", gobbed.ToBase())
	}
	core, batch := make(chan invoice, 1), make(chan invoice, 1)
	m := &module{emits: []mono.BaseEventDefinition{gobbed.ToBase()}}
	m.register = func(r mono.EventRegistry, self mono.Module) error {
		return errors.Join(
			helper.RegisterTypedEventConsumer(r, gobbed, func(_ context.Context, e invoice, _ *mono.Msg) error {
				core <- e
				return nil
			}, self),
			helper.RegisterTypedEventStreamConsumer(r, gobbed,
				mono.StreamConsumerConfig{Stream: mono.StreamConfig{Name: "invoices"}, AutoAck: true},
				func(_ context.Context, es []invoice, _ []*mono.Msg) error {
					batch <- es[0]
					return nil
				}, self),
		)
	}
	start(t, m)
	want := invoice{7, 1.5}
	if err := gobbed.Publish(m.bus, want, nil); err != nil {
		t.Fatal(err)
	}
	if got := receive(t, core, "the core event"); got != want {
		t.Errorf("the core handler got %+v, want %+v", got, want)
	}
	if got := receive(t, batch, "the stored event"); got != want {
		t.Errorf("the stream handler got %+v, want %+v", got, want)
	}

	r := &recorder{}
	if err := invoiced.Publish(r, want, nil); err != nil || string(r.msg.Data) != `{"number":7,"total":1.5}` {
		t.Errorf("the original event is sent as %q, %v", r.msg.Data, err)
	}
}
