package helper

import "encoding/json"

// A Codec turns an event's payload into bytes and back. It must be safe for
// concurrent use, and Unmarshal must expect hostile input: whoever may publish
// on the subject writes it.
type Codec interface {
	// Marshal returns v's bytes. v is of the event's type.
	Marshal(v any) ([]byte, error)
	// Unmarshal fills v, a pointer to the event's type.
	Unmarshal(data []byte, v any) error
}

// JSON is the default codec: encoding/json.
var JSON Codec = jsonCodec{}

type jsonCodec struct{}

func (jsonCodec) Marshal(v any) ([]byte, error)      { return json.Marshal(v) }
func (jsonCodec) Unmarshal(data []byte, v any) error { return json.Unmarshal(data, v) }
