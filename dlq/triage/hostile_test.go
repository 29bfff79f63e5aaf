package triage_test

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
)

// tamper changes what is stored of an operation, as everybody can who may write to the
// bucket.
func (b *bundle) tamper(t testing.TB, id string, change func(op map[string]any)) {
	t.Helper()
	kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
	must(t, err)
	value, err := kv.Get(within(t), "op."+id)
	must(t, err)
	var op map[string]any
	must(t, json.Unmarshal(value.Value(), &op))
	change(op)
	changed, err := json.Marshal(op)
	must(t, err)
	_, err = kv.Put(within(t), "op."+id, changed)
	must(t, err)
}

func in(op map[string]any, name string) map[string]any { return op[name].(map[string]any) }

// victims makes streams that a forged record may be aimed at.
func (b *bundle) victims(t testing.TB) {
	t.Helper()
	for name, subjects := range map[string][]string{"victim": {"victim.>"}, "ours": {"monotel.x.>"}} {
		_, err := b.js.CreateStream(within(t), jetstream.StreamConfig{Name: name, Subjects: subjects})
		must(t, err)
	}
	kv, err := b.js.CreateKeyValue(within(t), jetstream.KeyValueConfig{Bucket: "config"})
	must(t, err)
	_, err = kv.PutString(within(t), "key", "as it was")
	must(t, err)
}

// unharmed checks that nothing has come to the victims.
func (b *bundle) unharmed(t testing.TB) {
	t.Helper()
	for name, want := range map[string]uint64{"victim": 0, "ours": 0, "KV_config": 1, ordersStream: 0} {
		s, err := b.js.Stream(within(t), name)
		if err != nil {
			t.Errorf("stream %s: %v", name, err)
			continue
		}
		if n := s.CachedInfo().State.LastSeq; n != want {
			t.Errorf("stream %s has had %d messages, want %d", name, n, want)
		}
	}
}

// A record names its subject, and whoever forges one names another. Replayed to
// everyone, the first of these deleted a stream with the rights of the operator.
func TestReplay_forgedSubject(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.victims(t)
	for _, subject := range []string{
		"$JS.API.STREAM.DELETE.victim", "$JS.API.STREAM.PURGE.victim", "$KV.config.key", "$O.files.C.x", "$SYS.REQ.SERVER.PING", "$",
		"_INBOX.abc.1", "monotel.x.y", "monotel.replays.orders.reports.a.b", "monotel.dlq.DLQ.orders.billing.x", "monotel.wake.orders.billing",
		"victim.created", "nobody.stores.it", "orders.created.*", ">", "orders..created", ".orders", "orders.", "orders created", strings.Repeat("x.", 600) + "x",
	} {
		ids := b.capture(t, 1, func(r *dlq.Record) { r.Subject = subject })
		p := b.plan(t, triage.Selection{IDs: ids}, triage.Options{Target: triage.TargetEveryone})
		if p.Selected != 0 || len(p.LeftOut) != 1 {
			t.Errorf("%.50q: %d are selected, left out %v", subject, p.Selected, p.LeftOut)
		}
		// A plan that was made for its consumer, and is changed in the bucket.
		p = b.plan(t, triage.Selection{IDs: ids}, triage.Options{})
		b.tamper(t, p.ID, func(op map[string]any) { in(in(op, "plan"), "options")["target"] = triage.TargetEveryone })
		op, err := b.desk.Run(within(t), p.ID, nil)
		must(t, err)
		if op.Claimed != 0 || op.Sent != 0 || len(op.Skipped) != 1 {
			t.Errorf("%.50q: operation %+v", subject, op)
		}
		b.wantState(t, ids[0], dlq.StateOpen)
	}
	b.unharmed(t)
}

// A subject of the record's stream is replayed to, and so is one of a stream that it
// copies from.
func TestReplay_everyoneOfSources(t *testing.T) {
	t.Parallel()
	for name, cfg := range map[string]jetstream.StreamConfig{
		"sources": {Sources: []*jetstream.StreamSource{{Name: ordersStream}}},
		"mirror":  {Mirror: &jetstream.StreamSource{Name: ordersStream}},
		"other":   {Subjects: []string{"copy.>"}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			cfg.Name = "copy"
			_, err := b.js.CreateStream(within(t), cfg)
			must(t, err)
			b.capture(t, 1, func(r *dlq.Record) { r.Stream = "copy" })
			p := b.plan(t, triage.Selection{}, triage.Options{Target: triage.TargetEveryone})
			if name == "other" {
				if p.Selected != 0 || len(p.LeftOut) != 1 {
					t.Errorf("%d are selected, left out %v", p.Selected, p.LeftOut)
				}
				return
			}
			if op := b.run(t, p.ID); op.Sent != 1 {
				t.Errorf("operation %+v", op)
			}
			s, err := b.js.Stream(within(t), ordersStream)
			must(t, err)
			if n := s.CachedInfo().State.Msgs; n != 1 {
				t.Errorf("the stream that it copies from has %d messages, want 1", n)
			}
			// The server is not stopped while it sets the copy up.
			tick := time.NewTicker(20 * time.Millisecond)
			defer tick.Stop()
			for copied := uint64(0); copied == 0; <-tick.C {
				s, err := b.js.Stream(within(t), "copy")
				must(t, err)
				copied = s.CachedInfo().State.Msgs
			}
		})
	}
}

// The subject that somebody asks for is stored, and none of the server's or ours.
func TestReplay_forgedTarget(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.victims(t)
	ids := b.capture(t, 1)
	for _, subject := range []string{
		"$JS.API.STREAM.DELETE.victim", "$KV.config.key", "_INBOX.abc", "monotel.x.y", "monotel.replay.orders.billing.a.b", "", "victim.*", "victim.>",
		"victim..x", "victim.", ".victim", "victim x", "victim\tx", "victim.\r\nPUB x", strings.Repeat("x", 2000),
	} {
		target := triage.TargetSubject + subject
		if _, err := b.desk.Plan(within(t), triage.Selection{}, triage.Options{Target: target}); !errors.Is(err, triage.ErrInvalid) {
			t.Errorf("%.50q: %v, want ErrInvalid", subject, err)
		}
		p := b.plan(t, triage.Selection{}, triage.Options{})
		b.tamper(t, p.ID, func(op map[string]any) { in(in(op, "plan"), "options")["target"] = target })
		if _, err := b.desk.Run(within(t), p.ID, nil); !errors.Is(err, triage.ErrUnreadable) || !strings.Contains(err.Error(), p.ID) {
			t.Errorf("%.50q in a stored plan: %v, want ErrUnreadable", subject, err)
		}
		kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
		must(t, err)
		must(t, kv.Purge(within(t), "op."+p.ID))
	}
	p := b.plan(t, triage.Selection{}, triage.Options{})
	b.tamper(t, p.ID, func(op map[string]any) { in(in(op, "plan"), "options")["target"] = "subject=nobody.stores.it" })
	if _, err := b.desk.Run(within(t), p.ID, nil); !errors.Is(err, triage.ErrInvalid) {
		t.Errorf("a subject that nobody stores: %v, want ErrInvalid", err)
	}
	b.wantState(t, ids[0], dlq.StateOpen)
	b.unharmed(t)
}

// Names that the server has not build no subjects, and do not keep others from being
// replayed.
func TestReplay_forgedNames(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.victims(t)
	b.consume(t, billing, nil)
	good := b.capture(t, 1)
	for _, name := range []string{
		"a.b", "a.>", ">", "*", "a*", "a b", "a\tb", "", "a/b", `a\b`, "KV_config", "OBJ_files", "$MQTT_msgs", strings.Repeat("x", 300),
	} {
		b.capture(t, 1, func(r *dlq.Record) { r.Stream = name })
		if !strings.HasPrefix(name, "KV_") && !strings.HasPrefix(name, "OBJ_") && !strings.HasPrefix(name, "$") { // a consumer may be called so
			b.capture(t, 1, func(r *dlq.Record) { r.Consumer = name })
		}
	}
	for _, target := range []string{triage.TargetEveryone, triage.TargetConsumer} {
		p := b.plan(t, triage.Selection{}, triage.Options{Target: target})
		if target == triage.TargetConsumer {
			if p.Selected != 1 || len(p.Problems) > 0 {
				t.Errorf("%d are selected, left out %v, problems %q", p.Selected, p.LeftOut, p.Problems)
			}
			if op := b.run(t, p.ID); op.Resolved != 1 {
				t.Errorf("operation %+v", op)
			}
		}
	}
	b.wantState(t, good[0], dlq.StateResolved)
}

// Permissions are by subject: who may write the dead letters of one consumer does not
// write those of another, whatever the record says.
func TestReplay_misplaced(t *testing.T) {
	t.Parallel()
	b := setup(t)
	from := b.capture(t, 1)[0]
	m, err := b.js.Stream(within(t), "DLQ")
	must(t, err)
	raw, err := m.GetLastMsgForSubject(within(t), "monotel.dlq.DLQ.orders.billing."+from)
	must(t, err)
	for _, tt := range []struct {
		subject string
		header  nats.Header
	}{
		{"x.y." + from, nil},
		{"x.y.abc", nats.Header{dlq.HeaderID: {"abc"}}},
		{"orders.y.abd", nats.Header{dlq.HeaderID: {"abd"}}},
		{"orders.billing.abe", nil},
		{"orders.billing.a.abf", nats.Header{dlq.HeaderID: {"a.abf"}}},
		{"x.y.abg", nats.Header{dlq.HeaderID: {"abg"}, dlq.HeaderStream: {"x"}}},
		{"x.y.abh", nats.Header{dlq.HeaderID: {"abh"}, dlq.HeaderConsumer: {"y"}}},
	} {
		h := maps.Clone(raw.Header)
		maps.Copy(h, tt.header)
		_, err := b.js.PublishMsg(within(t), &nats.Msg{Subject: "monotel.dlq.DLQ." + tt.subject, Header: h, Data: raw.Data})
		must(t, err)
	}
	for _, target := range []string{triage.TargetEveryone, triage.TargetConsumer} {
		p := b.plan(t, triage.Selection{}, triage.Options{Target: target})
		if p.Selected != 1 || len(p.LeftOut) != 1 {
			t.Errorf("to %s: %d are selected, left out %v", target, p.Selected, p.LeftOut)
		}
	}
	// They are listed, with what is wrong.
	wrong := 0
	for e, err := range b.desk.Entries(within(t), triage.Selection{}, false) {
		if e == nil {
			t.Error(err)
		}
		if err != nil {
			wrong++
		}
	}
	if wrong != 7 {
		t.Errorf("%d are said to be wrong, want 7", wrong)
	}
	// A stored selection that has all of them.
	p := b.plan(t, triage.Selection{IDs: []string{from}}, triage.Options{Target: triage.TargetEveryone})
	kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
	must(t, err)
	var items []byte
	for range 8 {
		items = binary.AppendUvarint(items, 1)
		items = append(items, 0, 0)
	}
	_, err = kv.Put(within(t), "sel."+p.ID+".0", items)
	must(t, err)
	b.tamper(t, p.ID, func(op map[string]any) { in(op, "plan")["selected"], in(op, "plan")["upto"] = 8, 8 })
	op, err := b.desk.Run(within(t), p.ID, nil)
	must(t, err)
	if op.Sent != 1 || op.Claimed != 1 || len(op.Skipped) != 1 {
		t.Errorf("operation %+v", op)
	}
}

// A stored operation is checked before anything follows its numbers. One that is
// forged is named, and the others are as usable as before.
func TestOperation_forged(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 3)
	good := b.plan(t, triage.Selection{}, triage.Options{})
	plan := func(name string, v any) func(map[string]any) {
		return func(op map[string]any) { in(op, "plan")[name] = v }
	}
	option := func(name string, v any) func(map[string]any) {
		return func(op map[string]any) { in(in(op, "plan"), "options")[name] = v }
	}
	top := func(name string, v any) func(map[string]any) { return func(op map[string]any) { op[name] = v } }
	count := func(name string, v any) func(map[string]any) {
		return func(op map[string]any) { in(op, "counted")[name] = v }
	}
	long := strings.Repeat("x", 70_000)
	for name, change := range map[string]func(map[string]any){
		"selected negative":          plan("selected", -5),
		"selected 1<<50":             plan("selected", 1<<50),
		"selected 1<<40":             plan("selected", 1<<40),
		"selected more than upto":    plan("selected", 4),
		"selected both":              func(op map[string]any) { in(op, "plan")["selected"], in(op, "plan")["upto"] = 1<<40, 1<<50 },
		"selected a fraction":        plan("selected", 1.5),
		"selected a text":            plan("selected", "3"),
		"upto 0":                     plan("upto", 0),
		"upto largest":               plan("upto", uint64(1<<64-1)),
		"bytes":                      plan("bytes", -1),
		"duration":                   plan("duration", -1),
		"query":                      plan("query", long),
		"actor":                      plan("actor", long),
		"year":                       plan("created", "9999-01-01T00:00:00Z"),
		"no time":                    plan("created", "yesterday"),
		"oldest":                     plan("oldest", "0002-01-01T00:00:00Z"),
		"other ID":                   plan("id", "20260102-150405-abcde"),
		"no ID":                      plan("id", ""),
		"left out":                   plan("left_out", map[string]int{"x": -1}),
		"consumer's count":           plan("consumers", []any{map[string]any{"stream": "orders", "consumer": "billing", "count": -1}}),
		"consumer's name":            plan("consumers", []any{map[string]any{"stream": "a.b", "consumer": "billing"}}),
		"consumer of a bucket":       plan("consumers", []any{map[string]any{"stream": "KV_x", "consumer": "billing"}}),
		"consumer without a name":    plan("consumers", []any{map[string]any{}}),
		"group's count":              plan("groups", []any{map[string]any{"count": -1}}),
		"problems":                   plan("problems", slices.Repeat([]string{""}, 100_001)),
		"target":                     option("target", "nobody"),
		"no target":                  option("target", ""),
		"rate":                       option("rate", -1),
		"rate of none in a lifetime": option("rate", 1e-300),
		"in flight":                  option("max_in_flight", -1),
		"canary":                     option("canary", []int{1 << 40, 1 << 40}),
		"canary negative":            option("canary", []int{-1}),
		"canary of many":             option("canary", slices.Repeat([]int{1}, 100_000)),
		"stop":                       option("stop_if_failing", 2),
		"patch":                      option("patch", []int{1}),
		"replays":                    option("max_replays", -1),
		"cursor negative":            top("cursor", -1),
		"cursor beyond":              top("cursor", 4),
		"version":                    top("version", 2),
		"status":                     top("status", "resting"),
		"no status":                  top("status", ""),
		"want":                       top("want", "done"),
		"runner":                     top("runner", long),
		"why":                        top("why", long),
		"skipped":                    top("skipped", map[string]int{"x": -1}),
		"skipped much":               top("skipped", map[string]int{"x": 1 << 50}),
		"claimed":                    count("claimed", -1),
		"claimed much":               count("claimed", 1<<50),
		"released":                   count("released", -1<<40),
		"counted upto":               count("upto", uint64(1<<63)),
		"counted skipped":            count("skipped", map[string]int{"x": -1 << 40}),
	} {
		p := b.plan(t, triage.Selection{}, triage.Options{})
		b.tamper(t, p.ID, change)
		_, runErr := b.desk.Run(within(t), p.ID, nil)
		_, opErr := b.desk.Operation(within(t), p.ID)
		_, _, triedErr := b.desk.Tried(within(t), p.ID)
		for what, err := range map[string]error{
			"run": runErr, "show": opErr, "tried": triedErr, "pause": b.desk.Pause(within(t), p.ID), "cancel": b.desk.Cancel(within(t), p.ID),
		} {
			if !errors.Is(err, triage.ErrUnreadable) || !strings.Contains(err.Error(), p.ID) || len(err.Error()) > 1000 {
				t.Errorf("%s: %s: %.1000v, want ErrUnreadable of %s", name, what, err, p.ID)
			}
		}
		all, err := b.desk.Operations(within(t))
		if !errors.Is(err, triage.ErrUnreadable) || !strings.Contains(err.Error(), p.ID) {
			t.Errorf("%s: list: %.1000v, want ErrUnreadable of %s", name, err, p.ID)
		}
		if !slices.ContainsFunc(all, func(o *triage.Operation) bool { return o.ID == good.ID }) {
			t.Errorf("%s: the others are not listed", name)
		}
		kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
		must(t, err)
		must(t, kv.Purge(within(t), "op."+p.ID))
	}
	for name, value := range map[string]string{
		"nothing": "", "no JSON": "\x00", "an array": "[]", "null": "null", "deep": strings.Repeat("[", 200_000), "cut": `{"version":1,"plan":{`,
		"a secret": `{"version":"hunter2"}`,
	} {
		kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
		must(t, err)
		_, err = kv.PutString(within(t), "op.forged", value)
		must(t, err)
		if _, err := b.desk.Run(within(t), "forged", nil); !errors.Is(err, triage.ErrUnreadable) || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %.1000v, want ErrUnreadable", name, err)
		}
	}
}

// A stored selection has what its plan says, each entry once.
func TestOperation_forgedSelection(t *testing.T) {
	t.Parallel()
	b := setup(t)
	b.capture(t, 3)
	triples := func(n ...uint64) (items []byte) {
		for _, k := range n {
			items = binary.AppendUvarint(items, k)
		}
		return items
	}
	for name, items := range map[string][]byte{
		"nothing":            {},
		"cut":                {1, 0},
		"no number":          slices.Repeat([]byte{0xff}, 20),
		"one too few":        triples(1, 0, 0, 1, 0, 0),
		"one too many":       triples(1, 0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0),
		"many too many":      triples(slices.Repeat([]uint64{1, 0, 0}, 10_000)...),
		"one twice":          triples(1, 0, 0, 0, 0, 0, 1, 0, 0),
		"sequence 0":         triples(0, 0, 0, 1, 0, 0, 1, 0, 0),
		"beyond the plan":    triples(1, 0, 0, 1, 0, 0, 9, 0, 0),
		"wrapped around":     triples(1, 0, 0, 1<<64-1, 0, 0, 2, 0, 0),
		"last of the future": triples(1, 1<<63, 0, 1, 0, 0, 1, 0, 0),
		"last wrapped":       triples(1, 0, 0, 1, 1<<64-1, 0, 1, 0, 0),
		"edit after last":    triples(1, 0, 5, 1, 0, 0, 1, 0, 0),
	} {
		p := b.plan(t, triage.Selection{}, triage.Options{})
		kv, err := b.js.KeyValue(within(t), "DLQ_OPERATIONS")
		must(t, err)
		_, err = kv.Put(within(t), fmt.Sprintf("sel.%s.0", p.ID), items)
		must(t, err)
		if op, err := b.desk.Run(within(t), p.ID, nil); err == nil || op.Claimed > 0 {
			t.Errorf("%s: %+v, error %v", name, op, err)
		}
		if _, _, err := b.desk.Tried(within(t), p.ID); err == nil {
			t.Errorf("%s: it is listed", name)
		}
	}
}

// Records choose their consumers and reasons. Stats lists those with the most, and
// counts the others.
func TestStats_many(t *testing.T) {
	t.Parallel()
	name := func(i int) string { return fmt.Sprint("c", i) }
	for what, tt := range map[string]struct {
		n                    int
		change               func(r *dlq.Record, i int)
		consumers, reasons   int
		otherConsumers, open int
		otherReasons         int
	}{
		"few consumers":     {n: 100, change: func(r *dlq.Record, i int) { r.Consumer = name(i) }, consumers: 100, reasons: 1},
		"one too many":      {n: 101, change: func(r *dlq.Record, i int) { r.Consumer = name(i) }, consumers: 100, reasons: 1, otherConsumers: 1, open: 1},
		"many consumers":    {n: 300, change: func(r *dlq.Record, i int) { r.Consumer = name(i) }, consumers: 100, reasons: 1, otherConsumers: 200, open: 200},
		"many streams":      {n: 300, change: func(r *dlq.Record, i int) { r.Stream = name(i) }, consumers: 100, reasons: 1, otherConsumers: 200, open: 200},
		"some with more":    {n: 300, change: func(r *dlq.Record, i int) { r.Consumer = name(min(i, 200)) }, consumers: 100, reasons: 1, otherConsumers: 101, open: 101},
		"many reasons":      {n: 300, change: func(r *dlq.Record, i int) { r.Reason = dlq.Reason(name(i)) }, consumers: 1, reasons: 100, otherReasons: 200},
		"long names":        {n: 3, change: func(r *dlq.Record, i int) { r.Consumer = strings.Repeat("x", 1000) + name(i) }, consumers: 1, reasons: 1},
		"names that escape": {n: 3, change: func(r *dlq.Record, i int) { r.Consumer = "\u001b[31m" + name(i) }, consumers: 3, reasons: 1},
	} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			i := 0
			b.capture(t, tt.n, func(r *dlq.Record) {
				tt.change(r, i)
				i++
			})
			s, err := b.desk.Stats(within(t))
			must(t, err)
			if len(s.Consumers) != tt.consumers || len(s.Reasons) != tt.reasons || s.OtherReasons.Count != tt.otherReasons ||
				s.OtherConsumers != (triage.Others{Count: tt.otherConsumers, Open: tt.open}) {
				t.Errorf("%d consumers and %+v, %d reasons and %+v", len(s.Consumers), s.OtherConsumers, len(s.Reasons), s.OtherReasons)
			}
			sum := s.OtherConsumers.Open
			for _, n := range s.Consumers {
				sum += n
			}
			if sum != tt.n {
				t.Errorf("%d are counted by consumer, want %d", sum, tt.n)
			}
			if what == "some with more" && s.Consumers["orders/c200"] != 100 {
				t.Errorf("the one with the most is left out: %v", s.Consumers)
			}
		})
	}
}

// A plan warns of records that are not what their stream still has.
func TestPlan_compares(t *testing.T) {
	t.Parallel()
	const body = `{"order":1,"amount":1.5}`
	for name, tt := range map[string]struct {
		change func(*dlq.Record)
		want   bool
	}{
		"as it is":             {func(*dlq.Record) {}, false},
		"trace and server":     {func(r *dlq.Record) { r.Header["traceparent"], r.Header["Nats-Msg-Id"] = []string{"x"}, []string{"y"} }, false},
		"metadata only":        {func(r *dlq.Record) { r.Header, r.Data, r.Body = nil, nil, dlq.BodyOmitted }, false},
		"gone":                 {func(r *dlq.Record) { r.StreamSequence = 2 }, false},
		"of an earlier stream": {func(r *dlq.Record) { r.StreamCreated, r.Data = r.StreamCreated.Add(-1), nil }, false},
		"no sequence":          {func(r *dlq.Record) { r.StreamSequence, r.Data = 0, nil }, false},
		"payload":              {func(r *dlq.Record) { r.Data = []byte(`{"order":1,"amount":9999}`) }, true},
		"one byte of it":       {func(r *dlq.Record) { r.Data = []byte(body + " ") }, true},
		"no payload":           {func(r *dlq.Record) { r.Data = nil }, true},
		"subject":              {func(r *dlq.Record) { r.Subject = "orders.deleted.v1" }, true},
		"a header":             {func(r *dlq.Record) { r.Header["Tenant"] = []string{"red"} }, true},
		"one header more":      {func(r *dlq.Record) { r.Header["Admin"] = []string{"yes"} }, true},
		"one value more":       {func(r *dlq.Record) { r.Header["Tenant"] = []string{"blue", "red"} }, true},
		"no headers":           {func(r *dlq.Record) { r.Header = nil }, true},
		"object of other size": {func(r *dlq.Record) { r.Data, r.Body, r.BodyObject, r.BodySize = nil, dlq.BodyObject, "x", 1 }, true},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b := setup(t)
			s, err := b.js.Stream(within(t), ordersStream)
			must(t, err)
			_, err = b.js.PublishMsg(within(t), &nats.Msg{Subject: ordersSubject, Data: []byte(body), Header: nats.Header{"Tenant": {"blue"}}})
			must(t, err)
			ids := b.capture(t, 1, func(r *dlq.Record) {
				r.Data, r.Header, r.StreamCreated = []byte(body), nats.Header{"Tenant": {"blue"}}, s.CachedInfo().Created
				tt.change(r)
			})
			p := b.plan(t, triage.Selection{}, triage.Options{})
			i := slices.IndexFunc(p.Warnings, func(w string) bool { return strings.Contains(w, "that were compared") })
			if (i >= 0) != tt.want {
				t.Errorf("it warns of %q", p.Warnings)
			}
			if i >= 0 && !strings.HasPrefix(p.Warnings[i], "1 of 1 that were compared differ") || i >= 0 && !strings.Contains(p.Warnings[i], ids[0]) {
				t.Errorf("it warns of %q", p.Warnings[i])
			}
		})
	}
}

// Of many the newest are compared, and the warning says so. An edit is no difference.
func TestPlan_comparesSome(t *testing.T) {
	t.Parallel()
	b := setup(t)
	s, err := b.js.Stream(within(t), ordersStream)
	must(t, err)
	const n = 120
	for range n {
		_, err = b.js.Publish(within(t), ordersSubject, []byte("as it is"))
		must(t, err)
	}
	i := 0
	ids := b.capture(t, n, func(r *dlq.Record) {
		i++
		r.Data, r.Header, r.StreamCreated = []byte("as it is"), nil, s.CachedInfo().Created
		if i <= 10 || i > n-7 { // the first are too old to be compared
			r.Data = []byte("forged")
		}
	})
	must(t, b.desk.Edit(within(t), b.get(t, ids[50]), triage.Revision{Data: []byte("edited")}))
	p := b.plan(t, triage.Selection{}, triage.Options{})
	if !slices.ContainsFunc(p.Warnings, func(w string) bool {
		return strings.HasPrefix(w, "7 of 100 that were compared differ") && strings.HasSuffix(w, "the newest 100 were looked at")
	}) {
		t.Errorf("it warns of %q", p.Warnings)
	}
}
