package mono_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/monotel/monotel/mono"
)

func TestPermanent(t *testing.T) {
	t.Parallel()
	cause := errors.New("no such order")
	err := fmt.Errorf("bill: %w", mono.Permanent(cause))
	wantError(t, err, cause, "bill: no such order")
	for name, tt := range map[string]struct {
		err  error
		want bool
	}{
		"nil":               {nil, false},
		"plain":             {cause, false},
		"permanent":         {mono.Permanent(cause), true},
		"wrapped":           {err, true},
		"joined":            {errors.Join(cause, err), true},
		"retried permanent": {mono.RetryAfter(err, time.Second), true},
		"retry after":       {mono.RetryAfter(cause, time.Second), false},
		"undecodable":       {fmt.Errorf("handle: %w", &mono.DecodeError{Err: cause}), true},
		"panic":             {&mono.PanicError{Value: "oh no"}, false},
		"panic with one":    {&mono.PanicError{Value: err}, true},
	} {
		if got := mono.IsPermanent(tt.err); got != tt.want {
			t.Errorf("%s: IsPermanent(%v) = %v, want %v", name, tt.err, got, tt.want)
		}
	}
	if mono.Permanent(nil) != nil {
		t.Error("Permanent(nil) is not nil")
	}
}

func TestRetryAfter(t *testing.T) {
	t.Parallel()
	cause := errors.New("busy")
	wantError(t, mono.RetryAfter(cause, time.Second), cause, "busy")
	if mono.RetryAfter(nil, time.Second) != nil {
		t.Error("RetryAfter(nil) is not nil")
	}
}

// The text tells where the payload is wrong, and nothing of the payload, which
// may be anybody's secret and goes to logs and advisories.
func TestDecodeError(t *testing.T) {
	t.Parallel()
	var into struct {
		Items []struct {
			N int `json:"n"`
		} `json:"items"`
	}
	for name, tt := range map[string]struct {
		cause error
		say   string
	}{
		"malformed": {json.Unmarshal([]byte(`{"items":s3cret}`), &into), "decode event order/OrderCreated/v1: malformed JSON at byte 10"},
		"wrong type": {
			json.Unmarshal([]byte(`{"items":[{"n":"s3cret"}]}`), &into),
			`decode event order/OrderCreated/v1: JSON string at byte 23 does not fit int, field "items.n"`,
		},
		"wrong number": {
			json.Unmarshal([]byte(`{"items":[{"n":4711.5}]}`), &into),
			`decode event order/OrderCreated/v1: JSON number at byte 21 does not fit int, field "items.n"`,
		},
		"another codec": {errors.New("s3cret"), "decode event order/OrderCreated/v1: *errors.errorString"},
	} {
		if tt.cause == nil {
			t.Fatalf("%s: it decodes", name)
		}
		err := error(&mono.DecodeError{Event: "order/OrderCreated/v1", Err: tt.cause})
		wantError(t, err, tt.cause)
		if got := err.Error(); got != tt.say {
			t.Errorf("%s: error is %q, want %q", name, got, tt.say)
		}
	}
}
