package mono

import (
	"bytes"
	"encoding/json"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// decodePubAck reads the answer to a durable publish. Most come from the stream that
// acknowledged last, whose name needs no other string.
func decodePubAck(m *nats.Msg, last string) (jetstream.PubAck, error) {
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		return jetstream.PubAck{}, jetstream.ErrNoStreamResponse
	}
	if ack, ok := scanPubAck(m.Data, last); ok {
		return ack, nil
	}
	var answer struct {
		jetstream.PubAck
		Error *jetstream.APIError `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return jetstream.PubAck{}, jetstream.ErrInvalidJSAck
	}
	if answer.Error != nil {
		return jetstream.PubAck{}, answer.Error
	}
	if answer.Stream == "" {
		return jetstream.PubAck{}, jetstream.ErrInvalidJSAck
	}
	return answer.PubAck, nil
}

// scanPubAck reads the acknowledgement that servers write for a message that is
// stored, {"stream":"ORDERS","seq":17}, which encoding/json takes many times as
// long for. Everything else is not ok, and for encoding/json.
func scanPubAck(data []byte, last string) (ack jetstream.PubAck, ok bool) {
	rest, ok := bytes.CutPrefix(data, []byte(`{"stream":"`))
	if !ok {
		return ack, false
	}
	end := bytes.IndexByte(rest, '"')
	if end < 1 {
		return ack, false
	}
	name := rest[:end]
	for _, c := range name {
		if c < ' ' || c == '\\' || c > '~' {
			return ack, false
		}
	}
	if rest, ok = bytes.CutPrefix(rest[end:], []byte(`","seq":`)); !ok {
		return ack, false
	}
	digits, ok := bytes.CutSuffix(rest, []byte("}"))
	if !ok || len(digits) == 0 || digits[0] == '0' || len(digits) > maxSafeDigits {
		return ack, false
	}
	for _, c := range digits {
		if c < '0' || c > '9' {
			return ack, false
		}
		ack.Sequence = ack.Sequence*10 + uint64(c-'0')
	}
	if ack.Stream = last; string(name) != last {
		ack.Stream = string(name)
	}
	return ack, true
}
