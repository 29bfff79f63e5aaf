package mono_test

import (
	"strings"
	"testing"

	"github.com/monotel/monotel/mono"
)

func TestNewEvent(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name    string
		give    [3]string // module, name, version
		subject []string
		want    mono.BaseEventDefinition
	}{
		{
			name: "automatic subject", give: [3]string{"order", "OrderCreated", "v1"},
			want: mono.BaseEventDefinition{ModuleName: "order", Name: "OrderCreated", Version: "v1", Subject: "events.order.v1.order-created"},
		},
		{
			name: "own subject", give: [3]string{"order", "OrderCreated", "v1"}, subject: []string{"shop.orders.new"},
			want: mono.BaseEventDefinition{ModuleName: "order", Name: "OrderCreated", Version: "v1", Subject: "shop.orders.new"},
		},
		{
			name: "module and version are taken as they are", give: [3]string{"Order_Desk-2", "Closed", "2024-05"},
			want: mono.BaseEventDefinition{ModuleName: "Order_Desk-2", Name: "Closed", Version: "2024-05", Subject: "events.Order_Desk-2.2024-05.closed"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			got, err := mono.NewEvent(tt.give[0], tt.give[1], tt.give[2], tt.subject...)
			if err != nil || got != tt.want {
				t.Errorf("NewEvent = %+v, %v, want %+v", got, err, tt.want)
			}
		})
	}
}

func TestNewEvent_refuses(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("a", 65)
	tests := []struct {
		name                   string
		module, event, version string
		subject                []string
		want                   error
		say                    []string
	}{
		{
			name: "empty module", module: "", event: "A", version: "v1",
			want: mono.ErrInvalidName, say: []string{`event "/A/v1"`, "module name", `""`, "1 to 64 ASCII letters"},
		},
		{
			name: "module with a dot", module: "a.b", event: "A", version: "v1",
			want: mono.ErrInvalidName, say: []string{"module name", `"a.b"`},
		},
		{name: "module with a space", module: "a b", event: "A", version: "v1", want: mono.ErrInvalidName, say: []string{`"a b"`}},
		{name: "module that is long", module: long, event: "A", version: "v1", want: mono.ErrInvalidName, say: []string{"module name"}},
		{name: "module in another script", module: "zamówienie", event: "A", version: "v1", want: mono.ErrInvalidName, say: []string{"ASCII"}},
		{name: "module that starts with an underscore", module: "_a", event: "A", version: "v1", want: mono.ErrInvalidName},
		{name: "empty name", module: "m", event: "", version: "v1", want: mono.ErrInvalidName, say: []string{"event name"}},
		{name: "name with a wildcard", module: "m", event: "A*", version: "v1", want: mono.ErrInvalidName, say: []string{"event name", `"A*"`}},
		{name: "name that is a wildcard", module: "m", event: ">", version: "v1", want: mono.ErrInvalidName},
		{name: "name with a slash", module: "m", event: "a/b", version: "v1", want: mono.ErrInvalidName},
		{name: "name that starts with a hyphen", module: "m", event: "-a", version: "v1", want: mono.ErrInvalidName},
		{name: "name with a line break", module: "m", event: "a\r\nPUB b", version: "v1", want: mono.ErrInvalidName, say: []string{`"a\r\nPUB b"`}},
		{name: "empty version", module: "m", event: "A", version: "", want: mono.ErrInvalidName, say: []string{"version"}},
		{name: "version with a dot", module: "m", event: "A", version: "1.0", want: mono.ErrInvalidName, say: []string{"version", `"1.0"`}},
		{
			name: "everything at once", module: "a b", event: "", version: "1.0",
			want: mono.ErrInvalidName, say: []string{"module name", "event name", "version"},
		},
		{
			name: "empty subject", module: "m", event: "A", version: "v1", subject: []string{""},
			want: mono.ErrInvalidSubject, say: []string{`event "m/A/v1"`, "it is empty"},
		},
		{
			name: "subject with a wildcard", module: "m", event: "A", version: "v1", subject: []string{"a.*"},
			want: mono.ErrInvalidSubject, say: []string{`"a.*"`, "wildcard"},
		},
		{name: "subject with a tail wildcard", module: "m", event: "A", version: "v1", subject: []string{"a.>"}, want: mono.ErrInvalidSubject},
		{
			name: "subject with an empty token", module: "m", event: "A", version: "v1", subject: []string{"a..b"},
			want: mono.ErrInvalidSubject, say: []string{"empty token"},
		},
		{
			name: "subject with a space", module: "m", event: "A", version: "v1", subject: []string{"a b"},
			want: mono.ErrInvalidSubject, say: []string{"space"},
		},
		{
			name: "subject of the server", module: "m", event: "A", version: "v1", subject: []string{"$JS.API.STREAM.DELETE.x"},
			want: mono.ErrInvalidSubject, say: []string{"belong to the server"},
		},
		{name: "subject of the inboxes", module: "m", event: "A", version: "v1", subject: []string{"_INBOX.a"}, want: mono.ErrInvalidSubject},
		{
			// JSON has no other characters: the stream gets another subject.
			name: "subject that is not UTF-8", module: "m", event: "A", version: "v1", subject: []string{"a.\xff"},
			want: mono.ErrInvalidSubject, say: []string{`"a.\xff"`},
		},
		{
			name: "long subject", module: "m", event: "A", version: "v1", subject: []string{strings.Repeat("long.", 1000) + "x"},
			want: mono.ErrInvalidSubject, say: []string{"event"},
		},
		{
			name: "two subjects", module: "m", event: "A", version: "v1", subject: []string{"a", "b"},
			want: mono.ErrInvalidSubject, say: []string{"2 subjects", "at most one"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			_, err := mono.NewEvent(tt.module, tt.event, tt.version, tt.subject...)
			wantError(t, err, tt.want, tt.say...)
		})
	}
}

func TestBaseEventDefinition_String(t *testing.T) {
	t.Parallel()
	if got, want := OrderCreatedV1.ToBase().String(), "order/OrderCreated/v1"; got != want {
		t.Errorf("String() = %q, want %q", got, want)
	}
}
