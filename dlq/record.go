package dlq

import (
	"bytes"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/nats-io/nats.go"
)

// A Reason says why a message is a dead letter. The list is closed; a reader of
// an older version keeps what it does not know.
type Reason string

// The reasons.
const (
	ReasonTerminated         Reason = "terminated"           // Term or TermWithReason
	ReasonPermanentError     Reason = "permanent_error"      // the handler returned mono.Permanent
	ReasonAttemptsExhausted  Reason = "attempts_exhausted"   // every attempt failed
	ReasonPanic              Reason = "panic"                // the last attempt panicked
	ReasonCrashed            Reason = "crashed"              // every attempt ended without an outcome, as when the process crashes
	ReasonUndecodable        Reason = "undecodable"          // the payload does not decode as the event's type
	ReasonExternalMaxDeliver Reason = "external_max_deliver" // the server gave up for a consumer that is not ours
	ReasonExternalTerminated Reason = "external_terminated"  // a consumer that is not ours terminated it
	ReasonExpired            Reason = "expired"              // it was gone before it could be captured
)

// Reasons lists the reasons.
func Reasons() []Reason {
	return []Reason{
		ReasonTerminated, ReasonPermanentError, ReasonAttemptsExhausted, ReasonPanic, ReasonCrashed, ReasonUndecodable,
		ReasonExternalMaxDeliver, ReasonExternalTerminated, ReasonExpired,
	}
}

// The headers of a record on the wire. Values are text; those that say so are
// JSON, so that nothing in them can break a header. What is zero is left out.
const (
	HeaderVersion           = "Dlq-Version"            // of the format, see FormatVersion
	HeaderID                = "Dlq-Id"                 // see ID
	HeaderReason            = "Dlq-Reason"             // see Reason
	HeaderReasonText        = "Dlq-Reason-Text"        // JSON string: what was said with the reason
	HeaderSubject           = "Dlq-Subject"            // original subject
	HeaderHeaders           = "Dlq-Headers"            // JSON: original headers, see docs/dead-letter-format.md
	HeaderHeadersObject     = "Dlq-Headers-Object"     // name of the object that holds them, if they are too large
	HeaderBody              = "Dlq-Body"               // where the body is, see BodyPlace
	HeaderBodyObject        = "Dlq-Body-Object"        // name of the object that holds it
	HeaderBodySize          = "Dlq-Body-Size"          // in bytes, if the body is not in the record
	HeaderEvent             = "Dlq-Event"              // module, name and version of the event, joined by slashes
	HeaderStream            = "Dlq-Stream"             // the stream that stored the message
	HeaderStreamCreated     = "Dlq-Stream-Created"     // RFC 3339, when that stream was made
	HeaderStreamSequence    = "Dlq-Stream-Sequence"    // its sequence there
	HeaderConsumer          = "Dlq-Consumer"           // durable name of the consumer that gave up
	HeaderConsumerSequence  = "Dlq-Consumer-Sequence"  // of its last delivery
	HeaderDeliveries        = "Dlq-Deliveries"         // how often it was delivered
	HeaderStored            = "Dlq-Stored"             // RFC 3339, when it was stored
	HeaderFirstFailed       = "Dlq-First-Failed"       // RFC 3339, when the first attempt failed, if that is known
	HeaderFailed            = "Dlq-Failed"             // RFC 3339, when it was given up
	HeaderError             = "Dlq-Error"              // JSON string: text of the error
	HeaderErrorType         = "Dlq-Error-Type"         // as in telemetry's error.type
	HeaderErrorTypes        = "Dlq-Error-Types"        // JSON array: Go types of the error and what it wraps
	HeaderStack             = "Dlq-Stack"              // JSON array: lines of the stack of a panic
	HeaderTraceparent       = "Dlq-Traceparent"        // of the failing attempt; the record's own is traceparent
	HeaderOriginTraceparent = "Dlq-Origin-Traceparent" // of the publish
	HeaderApp               = "Dlq-App"
	HeaderAppVersion        = "Dlq-App-Version"
	HeaderModule            = "Dlq-Module"
	HeaderHost              = "Dlq-Host"
)

const headerPrefix = "Dlq-"

// FormatVersion is that of the records that this package writes. A reader may
// rely on the headers of a version to keep their meaning; new ones may come.
const FormatVersion = 1

// A BodyPlace says where the original body is.
type BodyPlace string

// The places.
const (
	BodyInline  BodyPlace = ""        // it is the record's
	BodyObject  BodyPlace = "object"  // in the object store, with what else did not fit
	BodyOmitted BodyPlace = "omitted" // not kept, see Config.MetadataOnly
	BodyGone    BodyPlace = "gone"    // its stream did not have it any more
)

// A Record is a dead letter: the original message, and what is known of its
// failure. What is not known is zero.
type Record struct {
	ID         string // see ID
	Reason     Reason
	ReasonText string // what was said with the reason

	Subject       string
	Header        nats.Header
	HeadersObject string // where Header is, if it was too large; then Header is nil
	Data          []byte
	Body          BodyPlace // where Data is
	BodyObject    string    // name of the object
	BodySize      int       // in bytes, also where Data is not here

	Event            string // module/name/version
	Stream           string
	StreamCreated    time.Time
	StreamSequence   uint64
	Consumer         string
	ConsumerSequence uint64
	Deliveries       uint64
	Stored           time.Time
	FirstFailed      time.Time
	Failed           time.Time

	Error      string
	ErrorType  string   // as in telemetry's error.type
	ErrorTypes []string // Go types, outermost first
	Stack      []string // lines

	Traceparent       string // of the failing attempt
	OriginTraceparent string // of the publish

	App, AppVersion, Module, Host string

	// Unknown holds the headers that this version does not know.
	Unknown nats.Header
}

// ID identifies what failed where: the same message of the same consumer has the
// same ID, however often it is captured. A stream that was deleted and made again
// begins its sequences anew, so its time of creation counts.
func ID(stream string, created time.Time, consumer string, sequence uint64) string {
	h := sha256.New()
	var n [8]byte
	for _, s := range []string{stream, consumer} {
		binary.BigEndian.PutUint64(n[:], uint64(len(s)))
		h.Write(n[:])
		h.Write([]byte(s))
	}
	binary.BigEndian.PutUint64(n[:], uint64(created.UnixNano()))
	h.Write(n[:])
	binary.BigEndian.PutUint64(n[:], sequence)
	h.Write(n[:])
	const size = 15 // bytes: 24 characters, and no two alike in this universe's time
	return strings.ToLower(base32.StdEncoding.EncodeToString(h.Sum(nil)[:size]))
}

// NextID returns the ID to use for a message whose own ID is taken by something that
// is not its record, see [ErrIDTaken]. The same ID has the same successor each time.
func NextID(id string) string { return ID("", time.Unix(0, 0), id, 1) }

// HasOwnID reports whether the ID is that of the message that the record names, and
// not another's, which somebody has put there.
func (r *Record) HasOwnID() bool {
	id := ID(r.Stream, r.StreamCreated, r.Consumer, r.StreamSequence)
	for range maxIDs {
		if r.ID == id {
			return true
		}
		id = NextID(id)
	}
	return false
}

// header returns the headers of the record on the wire, without those that only
// steer its publish.
func (r *Record) header() nats.Header {
	h := make(nats.Header, len(r.Unknown)+32) //nolint:mnd // as many as there are
	text := func(key, value string) {
		if value != "" {
			h[key] = []string{oneLine(value)}
		}
	}
	number := func(key string, n uint64) {
		if n != 0 {
			h[key] = []string{strconv.FormatUint(n, 10)}
		}
	}
	when := func(key string, t time.Time) {
		if !t.IsZero() {
			h[key] = []string{t.UTC().Format(time.RFC3339Nano)}
		}
	}
	maps.Copy(h, r.Unknown)
	number(HeaderVersion, FormatVersion)
	text(HeaderID, r.ID)
	text(HeaderReason, string(r.Reason))
	if r.ReasonText != "" {
		h[HeaderReasonText] = []string{toJSON(r.ReasonText)}
	}
	text(HeaderSubject, r.Subject)
	if len(r.Header) > 0 {
		h[HeaderHeaders] = []string{encodeHeaders(r.Header)}
	}
	text(HeaderHeadersObject, r.HeadersObject)
	text(HeaderBody, string(r.Body))
	text(HeaderBodyObject, r.BodyObject)
	if r.Body != BodyInline {
		number(HeaderBodySize, uint64(max(r.BodySize, 0)))
	}
	text(HeaderEvent, r.Event)
	text(HeaderStream, r.Stream)
	when(HeaderStreamCreated, r.StreamCreated)
	number(HeaderStreamSequence, r.StreamSequence)
	text(HeaderConsumer, r.Consumer)
	number(HeaderConsumerSequence, r.ConsumerSequence)
	number(HeaderDeliveries, r.Deliveries)
	when(HeaderStored, r.Stored)
	when(HeaderFirstFailed, r.FirstFailed)
	when(HeaderFailed, r.Failed)
	if r.Error != "" {
		h[HeaderError] = []string{toJSON(r.Error)}
	}
	text(HeaderErrorType, r.ErrorType)
	if len(r.ErrorTypes) > 0 {
		h[HeaderErrorTypes] = []string{toJSON(r.ErrorTypes)}
	}
	if len(r.Stack) > 0 {
		h[HeaderStack] = []string{toJSON(r.Stack)}
	}
	text(HeaderTraceparent, r.Traceparent)
	text(HeaderOriginTraceparent, r.OriginTraceparent)
	text(HeaderApp, r.App)
	text(HeaderAppVersion, r.AppVersion)
	text(HeaderModule, r.Module)
	text(HeaderHost, r.Host)
	return h
}

// ErrNotARecord reports a message that is no dead letter.
var ErrNotARecord = errors.New("not a dead-letter record")

// Decode reads a record. What cannot be read is left zero and named in the error:
// the record is good for the rest. It is nil, with [ErrNotARecord], if the message
// is no record. The record shares data.
func Decode(h nats.Header, data []byte) (*Record, error) {
	if first(h, HeaderVersion) == "" || oneLine(first(h, HeaderID)) == "" {
		return nil, fmt.Errorf("%w: it lacks %s or %s", ErrNotARecord, HeaderVersion, HeaderID)
	}
	r := &Record{}
	var errs []error
	for key, vs := range h {
		if !strings.HasPrefix(key, headerPrefix) || len(vs) == 0 {
			continue
		}
		v := vs[0]
		known, err := r.set(key, v)
		if v == "" {
			err = nil // as if it was not there
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("header %s is %.100q: %w", key, v, err))
		}
		if !known {
			if r.Unknown == nil {
				r.Unknown = make(nats.Header)
			}
			r.Unknown[key] = slices.Clone(vs)
		}
	}
	if r.Body == BodyInline {
		r.Data, r.BodySize = data, len(data)
	}
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return r, errors.Join(errs...)
}

// set reads one header. It is a switch since millions are read at a time.
func (r *Record) set(key, v string) (known bool, err error) { //nolint:cyclop // one case a header
	switch key {
	case HeaderVersion:
		if n, convErr := strconv.Atoi(v); convErr != nil || n < 1 {
			err = errors.New("want a number from 1")
		}
	case HeaderID:
		textInto(&r.ID, v)
	case HeaderReason:
		textInto((*string)(&r.Reason), v)
	case HeaderReasonText:
		err = jsonTextInto(&r.ReasonText, v)
	case HeaderSubject:
		textInto(&r.Subject, v)
	case HeaderHeaders:
		r.Header, err = decodeHeaders(v)
	case HeaderHeadersObject:
		textInto(&r.HeadersObject, v)
	case HeaderBody:
		textInto((*string)(&r.Body), v)
	case HeaderBodyObject:
		textInto(&r.BodyObject, v)
	case HeaderBodySize:
		err = sizeInto(&r.BodySize, v)
	case HeaderEvent:
		textInto(&r.Event, v)
	case HeaderStream:
		textInto(&r.Stream, v)
	case HeaderStreamCreated:
		err = timeInto(&r.StreamCreated, v)
	case HeaderStreamSequence:
		err = numberInto(&r.StreamSequence, v)
	case HeaderConsumer:
		textInto(&r.Consumer, v)
	case HeaderConsumerSequence:
		err = numberInto(&r.ConsumerSequence, v)
	case HeaderDeliveries:
		err = numberInto(&r.Deliveries, v)
	case HeaderStored:
		err = timeInto(&r.Stored, v)
	case HeaderFirstFailed:
		err = timeInto(&r.FirstFailed, v)
	case HeaderFailed:
		err = timeInto(&r.Failed, v)
	case HeaderError:
		err = jsonTextInto(&r.Error, v)
	case HeaderErrorType:
		textInto(&r.ErrorType, v)
	case HeaderErrorTypes:
		err = jsonTextsInto(&r.ErrorTypes, v)
	case HeaderStack:
		err = jsonTextsInto(&r.Stack, v)
	case HeaderTraceparent:
		textInto(&r.Traceparent, v)
	case HeaderOriginTraceparent:
		textInto(&r.OriginTraceparent, v)
	case HeaderApp:
		textInto(&r.App, v)
	case HeaderAppVersion:
		textInto(&r.AppVersion, v)
	case HeaderModule:
		textInto(&r.Module, v)
	case HeaderHost:
		textInto(&r.Host, v)
	default:
		return false, nil
	}
	return true, err
}

// first is Get, for headers that no server has seen: a key may lack values.
func first(h nats.Header, key string) string {
	if vs := h[key]; len(vs) > 0 {
		return vs[0]
	}
	return ""
}

// textInto cleans as [Record.header] does, so that what is not written by us can
// be shown, too.
func textInto(to *string, v string) { *to = oneLine(v) }

func numberInto(to *uint64, v string) error {
	n, err := strconv.ParseUint(v, 10, 64)
	if err != nil { // n may be the largest number
		return errors.New("want a number")
	}
	*to = n
	return nil
}

func sizeInto(to *int, v string) error {
	n, err := strconv.Atoi(v)
	if err != nil || n < 0 {
		return errors.New("want a number of bytes")
	}
	*to = n
	return nil
}

func timeInto(to *time.Time, v string) error {
	t, err := time.Parse(time.RFC3339Nano, v)
	t = t.UTC()
	if err != nil || t.Year() < 0 || t.Year() > 9999 { // as another zone may make it
		return errors.New("want a time of RFC 3339")
	}
	*to = t
	return nil
}

// jsonTextInto reads a JSON string. Most have nothing to unescape.
func jsonTextInto(to *string, v string) error {
	if n := len(v); n >= 2 && v[0] == '"' && v[n-1] == '"' && plain(v[1:n-1]) {
		*to = v[1 : n-1]
		return nil
	}
	return jsonInto(to, v)
}

// plain reports whether a JSON string has nothing to unescape.
func plain(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c == '"' || c == '\\' || c >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// jsonTextsInto reads a JSON array of strings.
func jsonTextsInto(to *[]string, v string) error {
	if texts, ok := plainTexts(v); ok {
		*to = texts
		return nil
	}
	return jsonInto(to, v)
}

// plainTexts reads an array as we write it, if there is nothing to unescape.
func plainTexts(v string) ([]string, bool) {
	const open, end = `["`, `"]`
	if !strings.HasPrefix(v, open) || !strings.HasSuffix(v, end) || len(v) < len(open)+len(end) {
		return nil, false
	}
	texts := strings.Split(v[len(open):len(v)-len(end)], `","`)
	for _, text := range texts {
		if !plain(text) {
			return nil, false
		}
	}
	return texts, true
}

func jsonInto[T any](to *T, v string) error {
	var read T
	if err := json.Unmarshal([]byte(v), &read); err != nil {
		return err
	}
	*to = read
	return nil
}

// A headerEntry is one value of one original header. Base64 holds what is not
// UTF-8.
type headerEntry struct {
	Key         string `json:"k,omitempty"`
	KeyBase64   []byte `json:"k64,omitempty"`
	Value       string `json:"v,omitempty"`
	ValueBase64 []byte `json:"v64,omitempty"`
}

func encodeHeaders(h nats.Header) string {
	keys := make([]string, 0, len(h))
	for k := range h {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	entries := make([]headerEntry, 0, len(keys))
	for _, k := range keys {
		for _, v := range h[k] {
			var e headerEntry
			if utf8.ValidString(k) {
				e.Key = k
			} else {
				e.KeyBase64 = []byte(k)
			}
			if utf8.ValidString(v) {
				e.Value = v
			} else {
				e.ValueBase64 = []byte(v)
			}
			entries = append(entries, e)
		}
	}
	return toJSON(entries)
}

func decodeHeaders(s string) (nats.Header, error) {
	if h, ok := plainHeaders(s); ok {
		return h, nil
	}
	var entries []headerEntry
	if err := json.Unmarshal([]byte(s), &entries); err != nil {
		return nil, err
	}
	h := make(nats.Header, len(entries))
	for _, e := range entries {
		k, v := e.Key, e.Value
		if len(e.KeyBase64) > 0 {
			k = string(e.KeyBase64)
		}
		if len(e.ValueBase64) > 0 {
			v = string(e.ValueBase64)
		}
		h[k] = append(h[k], v)
	}
	return h, nil
}

// plainHeaders reads headers as we write them, if there is nothing to unescape.
func plainHeaders(s string) (nats.Header, bool) {
	s, ok := strings.CutPrefix(s, `[{"k":"`)
	if !ok {
		return nil, false
	}
	h := make(nats.Header)
	for {
		var k, v string
		if k, s, ok = strings.Cut(s, `"`); !ok || !plain(k) {
			return nil, false
		}
		if s, ok = strings.CutPrefix(s, `,"v":"`); !ok {
			return nil, false
		}
		if v, s, ok = strings.Cut(s, `"`); !ok || !plain(v) {
			return nil, false
		}
		h[k] = append(h[k], v)
		if s == "}]" {
			return h, true
		}
		if s, ok = strings.CutPrefix(s, `},{"k":"`); !ok {
			return nil, false
		}
	}
}

// toJSON never fails for what it is given here: strings, which lose what is not
// UTF-8.
func toJSON(v any) string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(v); err != nil {
		return ""
	}
	return strings.TrimSuffix(b.String(), "\n")
}

// oneLine makes a text fit for a header.
func oneLine(s string) string {
	if plainLine(s) {
		return s
	}
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s))
}

// plainLine reports whether a text is fit as it is. It is most of the time.
func plainLine(s string) bool {
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f {
			return false
		}
	}
	return s == "" || s[0] != ' ' && s[len(s)-1] != ' '
}

// wireSize is the size of a header as the client writes it.
func wireSize(h nats.Header) int {
	n := len("NATS/1.0\r\n\r\n")
	for k, vs := range h {
		for _, v := range vs {
			n += len(k) + len(": ") + len(v) + len("\r\n")
		}
	}
	return n
}
