package mono

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/subjects"
)

// planEvent is an event of module "shop".
func planEvent(tb testing.TB, name string, subject ...string) BaseEventDefinition {
	tb.Helper()
	e, err := NewEvent("shop", name, "v1", subject...)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// planReg is a registration as the registry would make it.
func planReg(module string, e BaseEventDefinition, s StreamConfig) *streamRegistration {
	cfg := StreamConsumerConfig{Stream: s}.withDefaults()
	cfg.Consumer.Durable = durableName(module, e)
	return &streamRegistration{
		info: Consumer{Module: module, Event: e, Stream: s.Name, Durable: cfg.Consumer.Durable},
		cfg:  cfg,
	}
}

// planModel does to stream configurations what the server does, as far as the
// planner depends on it. It refuses what the server would refuse.
type planModel map[string]StreamConfig

func newPlanModel(have []StreamConfig) planModel {
	m := make(planModel)
	for _, s := range have {
		m[s.Name] = s
	}
	return m
}

func (m planModel) clone() planModel { return maps.Clone(m) }

func (m planModel) list() []StreamConfig {
	var l []StreamConfig
	for _, name := range slices.Sorted(maps.Keys(m)) {
		l = append(l, m[name])
	}
	return l
}

// errPlanImmutable is the refusal of a change that an App with WithStreamUpdates
// may ask for: "as far as the server allows it".
var errPlanImmutable = errors.New("storage and retention cannot be changed")

func (m planModel) apply(c streamChange) error {
	cfg := c.cfg
	old, exists := m[cfg.Name]
	switch {
	case c.create && exists:
		return fmt.Errorf("create %q: it exists", cfg.Name)
	case !c.create && !exists:
		return fmt.Errorf("update %q: it does not exist", cfg.Name)
	case exists && old.Storage != cfg.Storage,
		exists && old.Retention != cfg.Retention && (old.Retention == WorkQueuePolicy || cfg.Retention == WorkQueuePolicy):
		return fmt.Errorf("update %q: %w", cfg.Name, errPlanImmutable)
	}
	if len(cfg.Subjects) == 0 && len(cfg.Sources) == 0 {
		cfg.Subjects = []string{cfg.Name}
	}
	for i, s := range cfg.Subjects {
		if slices.Contains(cfg.Subjects[:i], s) {
			return fmt.Errorf("%q: subject %q twice", cfg.Name, s)
		}
	}
	for _, o := range m {
		if o.Name == cfg.Name {
			continue
		}
		for _, a := range cfg.Subjects {
			for _, b := range o.Subjects {
				if planOverlap(a, b) {
					return fmt.Errorf("%q: subject %q overlaps with %q of %q", cfg.Name, a, b, o.Name)
				}
			}
		}
	}
	for i, s := range cfg.Sources {
		if slices.ContainsFunc(cfg.Sources[:i], func(o *jetstream.StreamSource) bool { return reflect.DeepEqual(o, s) }) {
			return fmt.Errorf("%q: source %q twice", cfg.Name, s.Name)
		}
	}
	// What the server makes of zero values.
	cfg.MaxMsgs, cfg.MaxMsgsPerSubject, cfg.MaxBytes = planUnlimited(cfg.MaxMsgs), planUnlimited(cfg.MaxMsgsPerSubject), planUnlimited(cfg.MaxBytes)
	cfg.MaxConsumers, cfg.MaxMsgSize = -1, int32(planUnlimited(int64(cfg.MaxMsgSize)))
	cfg.Replicas = max(cfg.Replicas, 1)
	if cfg.Duplicates == 0 {
		cfg.Duplicates = 2 * time.Minute
	}
	cfg.Metadata = maps.Clone(cfg.Metadata)
	if cfg.Metadata == nil {
		cfg.Metadata = make(map[string]string)
	}
	cfg.Metadata["_nats.level"] = "2"
	m[cfg.Name] = cfg
	return nil
}

func (m planModel) applyAll(cs []streamChange) error {
	for _, c := range cs {
		if err := m.apply(c); err != nil {
			return err
		}
	}
	return nil
}

func planUnlimited(n int64) int64 {
	if n == 0 {
		return -1
	}
	return n
}

// planOverlap reports whether some subject matches both patterns.
func planOverlap(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := 0; i < len(as) && i < len(bs); i++ {
		if as[i] == ">" || bs[i] == ">" {
			return true
		}
		if as[i] != "*" && bs[i] != "*" && as[i] != bs[i] {
			return false
		}
	}
	return len(as) == len(bs)
}

// check reports what the registrations do not get from the streams, or get
// twice.
func (m planModel) check(regs []*streamRegistration) error {
	var errs []error
	for _, r := range regs {
		s, ok := m[r.info.Stream]
		if !ok {
			errs = append(errs, fmt.Errorf("stream %q of %q does not exist", r.info.Stream, r.info.Module))
			continue
		}
		for _, src := range s.Sources {
			if _, ok := m[src.Name]; !ok {
				errs = append(errs, fmt.Errorf("stream %q: source %q does not exist", s.Name, src.Name))
			}
		}
		if s.Retention != LimitsPolicy && len(s.Sources) > 0 && len(s.Subjects) == 1 && r.info.Event.Subject == s.Subjects[0] {
			// The consumer of the one subject counts as one of all messages, so
			// what comes from a source would never leave the stream.
			errs = append(errs, fmt.Errorf("stream %q has sources and one subject, %q", s.Name, s.Subjects[0]))
		}
		ways, lossy := m.ways(s, r.info.Event.Subject, len(m))
		if ways != 1 {
			errs = append(errs, fmt.Errorf("stream %q gets subject %q in %d ways", s.Name, r.info.Event.Subject, ways))
		}
		if lossy != "" {
			errs = append(errs, fmt.Errorf("stream %q gets %q from %q, which loses messages", s.Name, r.info.Event.Subject, lossy))
		}
	}
	return errors.Join(errs...)
}

// ways counts how often stream s gets what is published on subject, and finds a
// stream on the way that others cannot read all of it from.
func (m planModel) ways(s StreamConfig, subject string, depth int) (n int, lossy string) {
	if covers(s.Subjects, subject) {
		n++
	}
	if depth == 0 {
		return n, lossy
	}
	for _, src := range s.Sources {
		if src.FilterSubject != "" && !subjects.Covers(src.FilterSubject, subject) {
			continue
		}
		k, l := m.ways(m[src.Name], subject, depth-1)
		n, lossy = n+k, cmp.Or(lossy, l)
		if k > 0 && !fitToOwn(m[src.Name]) {
			lossy = src.Name
		}
	}
	return n, lossy
}

func planChangesText(cs []streamChange) string {
	var b strings.Builder
	for _, c := range cs {
		fmt.Fprintf(&b, "%s\n", planChangeText(c))
	}
	return b.String()
}

func planChangeText(c streamChange) string {
	if c.create {
		return "create " + planStreamText(c.cfg)
	}
	return "update " + planStreamText(c.cfg)
}

// planStreamText shows what of a stream the tables below look at. The spare
// subjects are not of their concern; see planModel.check.
func planStreamText(s StreamConfig) string {
	text := s.Name
	if s.Retention != LimitsPolicy {
		text += " " + strings.ToLower(s.Retention.String())
	}
	if s.Storage == MemoryStorage {
		text += " memory"
	}
	subjects := slices.DeleteFunc(slices.Clone(s.Subjects), func(s string) bool { return strings.HasPrefix(s, dlq.SpareSubject("")) })
	text += " [" + strings.Join(subjects, " ") + "]"
	for _, src := range s.Sources {
		text += " <- " + src.Name + ":" + src.FilterSubject
	}
	return text
}

// planOurs is a stream as an App would have made it.
func planOurs(cfg StreamConfig) StreamConfig { return withStreamDefaults(cfg, streamRoleEvents) }

func planSource(name, subject string) []*jetstream.StreamSource {
	return []*jetstream.StreamSource{{Name: name, FilterSubject: subject}}
}

func TestPlanTopology_streams(t *testing.T) {
	t.Parallel()
	created, paid := planEvent(t, "Created"), planEvent(t, "Paid")
	const c, p = "events.shop.v1.created", "events.shop.v1.paid"
	const fanC = "fanout_shop_created_v1"

	tests := []struct {
		name    string
		regs    []*streamRegistration
		have    []StreamConfig
		updates bool
		want    []string
		fanOuts []string
	}{
		{name: "nothing asked, nothing changed", have: []StreamConfig{{Name: "OTHER", Subjects: []string{c}}}},
		{
			name: "one consumer",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "S"})},
			want: []string{"S [" + c + "]"},
		},
		{
			name: "two consumers of one event in one stream",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "S"}),
				planReg("b", created, StreamConfig{Name: "S"}),
			},
			want: []string{"S [" + c + "]"},
		},
		{
			name: "subjects of several events are united",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "S"}),
				planReg("b", paid, StreamConfig{Name: "S", Retention: WorkQueuePolicy}),
			},
			want: []string{"S workqueue [" + c + " " + p + "]"},
		},
		{
			name: "a further event joins an existing stream",
			regs: []*streamRegistration{planReg("a", paid, StreamConfig{Name: "S"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "S", Subjects: []string{c}})},
			want: []string{"S [" + c + " " + p + "]"},
		},
		{
			name: "subjects that nobody asks for any more stay",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "S", Subjects: []string{p, c}})},
		},
		{
			name: "a wildcard that was asked for takes the event",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "S", Subjects: []string{"events.shop.>"}})},
			want: []string{"S [events.shop.>]"},
		},
		{
			name: "a wildcard of one module serves another one's event",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "S", Subjects: []string{"events.shop.>"}}),
				planReg("b", paid, StreamConfig{Name: "S"}),
			},
			want: []string{"S [events.shop.>]"},
		},
		{
			name: "a limits stream owns, a work queue sources",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Z"}),
			},
			want: []string{"Z [" + c + "]", "Q workqueue [] <- Z:" + c},
		},
		{
			name: "two work queues get a fan-out stream",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue [] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "the fan-out stream of memory streams is in memory",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Storage: MemoryStorage}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: InterestPolicy, Storage: MemoryStorage}),
			},
			want: []string{
				fanC + " memory [" + c + "]",
				"Q1 workqueue memory [] <- " + fanC + ":" + c,
				"Q2 interest memory [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "the fan-out stream is on disk as soon as one target is",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Storage: MemoryStorage}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue memory [] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "only the events that are shared go through a fan-out stream",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("a", paid, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue [" + p + "] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "a limits stream that drops messages is not fit to own",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "L", MaxMsgs: 100}),
				planReg("b", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
			},
			want: []string{
				fanC + " [" + c + "]",
				"L [] <- " + fanC + ":" + c,
				"Q workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "an existing work queue gives up its subject",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{p, c}})},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue [" + p + "] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "the work queue of another process gives up its subject",
			regs: []*streamRegistration{planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{c}})},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue [] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "an existing work queue hands its subject to a limits stream",
			regs: []*streamRegistration{planReg("b", created, StreamConfig{Name: "L"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{c}})},
			want: []string{
				"L [" + c + "]",
				"Q1 workqueue [] <- L:" + c,
			},
		},
		{
			name: "a third stream sources from the fan-out stream that exists",
			regs: []*streamRegistration{planReg("d", created, StreamConfig{Name: "Q3", Retention: WorkQueuePolicy})},
			have: []StreamConfig{
				withStreamDefaults(StreamConfig{Name: fanC, Subjects: []string{c}}, streamRoleFanOut),
				planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Sources: planSource(fanC, c)}),
			},
			want:    []string{"Q3 workqueue [] <- " + fanC + ":" + c},
			fanOuts: []string{fanC},
		},
		{
			name: "a foreign limits stream stays the owner",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy})},
			have: []StreamConfig{{Name: "FOREIGN", Subjects: []string{"events.>"}, MaxMsgs: -1, MaxBytes: -1, MaxMsgsPerSubject: -1}},
			want: []string{"Q workqueue [] <- FOREIGN:" + c},
		},
		{
			name: "cut short after the subject was given up: the server named it after the stream",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{"Q1"}})},
			want: []string{
				fanC + " [" + c + "]",
				"Q1 workqueue [] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "cut short after the fan-out stream was made",
			regs: []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy}),
				planReg("b", created, StreamConfig{Name: "Q2", Retention: WorkQueuePolicy}),
			},
			have: []StreamConfig{
				planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{"Q1"}}),
				withStreamDefaults(StreamConfig{Name: fanC, Subjects: []string{c}}, streamRoleFanOut),
			},
			want: []string{
				"Q1 workqueue [] <- " + fanC + ":" + c,
				"Q2 workqueue [] <- " + fanC + ":" + c,
			},
			fanOuts: []string{fanC},
		},
		{
			name: "cut short, and the second module was taken out again",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "Q1", Retention: WorkQueuePolicy})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q1", Retention: WorkQueuePolicy, Subjects: []string{"Q1"}})},
			want: []string{"Q1 workqueue [" + c + "]"},
		},
		{
			name:    "a setting is changed when that is allowed",
			regs:    []*streamRegistration{planReg("a", created, StreamConfig{Name: "S", MaxMsgs: 7})},
			have:    []StreamConfig{planOurs(StreamConfig{Name: "S", MaxMsgs: 5, Subjects: []string{c}})},
			updates: true,
			want:    []string{"S [" + c + "]"},
		},
		{
			name: "fields left at zero ask for nothing",
			regs: []*streamRegistration{planReg("a", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{{Name: "S", MaxMsgs: 5, MaxAge: time.Hour, Subjects: []string{c}, Replicas: 3, Description: "by hand"}},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			m := newPlanModel(tt.have)
			plan, err := planTopology([]BaseEventDefinition{created, paid}, tt.regs, m.list(), tt.updates)
			if err != nil {
				t.Fatal(err)
			}
			changed := make(map[string]string)
			for _, ch := range plan.changes {
				if err := m.apply(ch); err != nil {
					t.Errorf("the server would refuse: %v", err)
				}
				changed[ch.cfg.Name] = planStreamText(m[ch.cfg.Name])
			}
			got := slices.Sorted(maps.Values(changed))
			if diff := gocmp.Diff(slices.Sorted(slices.Values(tt.want)), got); diff != "" {
				t.Errorf("streams that changed (-want +got):\n%s", diff)
			}
			if diff := gocmp.Diff(tt.fanOuts, plan.fanOuts); diff != "" {
				t.Errorf("fan-outs (-want +got):\n%s", diff)
			}
			if err := m.check(tt.regs); err != nil {
				t.Error(err)
			}
			again, err := planTopology([]BaseEventDefinition{created, paid}, tt.regs, m.list(), tt.updates)
			if err != nil {
				t.Fatalf("plan again: %v", err)
			}
			if len(again.changes) > 0 {
				t.Errorf("a second plan has changes:\n%s", planChangesText(again.changes))
			}
		})
	}
}

func TestPlanTopology_conflicts(t *testing.T) {
	t.Parallel()
	created, paid := planEvent(t, "Created"), planEvent(t, "Paid")
	const c = "events.shop.v1.created"

	tests := []struct {
		name string
		regs []*streamRegistration
		have []StreamConfig
		want []string // each must be in the error
	}{
		{
			name: "two modules contradict each other",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "S", MaxAge: time.Hour}),
				planReg("audit", paid, StreamConfig{Name: "S", MaxAge: 2 * time.Hour}),
			},
			want: []string{`"S"`, `"billing"`, `"audit"`, "MaxAge", "1h0m0s", "2h0m0s"},
		},
		{
			name: "two modules ask for different retentions",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "S", Retention: WorkQueuePolicy}),
				planReg("audit", paid, StreamConfig{Name: "S", Retention: InterestPolicy}),
			},
			want: []string{`"S"`, `"billing"`, `"audit"`, "Retention", "WorkQueue", "Interest"},
		},
		{
			name: "metadata contradicts",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "S", Metadata: map[string]string{"team": "x"}}),
				planReg("audit", paid, StreamConfig{Name: "S", Metadata: map[string]string{"team": "y"}}),
			},
			want: []string{`"S"`, `"billing"`, `"audit"`, `"team"`},
		},
		{
			name: "every contradiction is named at once",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "S", MaxAge: time.Hour, MaxMsgs: 3}),
				planReg("audit", paid, StreamConfig{Name: "S", MaxAge: 2 * time.Hour, MaxMsgs: 4}),
			},
			want: []string{"MaxAge", "MaxMsgs"},
		},
		{
			name: "the stream exists with another value",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S", MaxMsgs: 7})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "S", MaxMsgs: 5, Subjects: []string{c}})},
			want: []string{`"S"`, `"billing"`, "MaxMsgs", "5", "7", "WithStreamUpdates"},
		},
		{
			name: "the stream exists as a work queue, and a module that sets nothing means limits",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "S", Retention: WorkQueuePolicy, Subjects: []string{c}})},
			want: []string{`"S"`, `"billing"`, "Retention", "WorkQueue", "Limits"},
		},
		{
			name: "the stream exists in memory",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "S", Storage: MemoryStorage, Subjects: []string{c}})},
			want: []string{`"S"`, `"billing"`, "Storage", "Memory", "File"},
		},
		{
			name: "the stream exists as a mirror",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{{Name: "S", Mirror: &jetstream.StreamSource{Name: "ORIGIN"}}},
			want: []string{`"S"`, `"billing"`, "mirror", `"ORIGIN"`},
		},
		{
			name: "two consumers of one event in a work queue",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
				planReg("audit", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
			},
			want: []string{`"Q"`, `"billing"`, `"audit"`, "shop/Created/v1"},
		},
		{
			name: "two consumers of one event in a work queue, one module silent about retention",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "Q"}),
				planReg("audit", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
			},
			want: []string{`"Q"`, `"billing"`, `"audit"`},
		},
		{
			name: "a work queue whose consumer skips messages",
			regs: []*streamRegistration{func() *streamRegistration {
				r := planReg("billing", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy})
				r.cfg.Consumer.DeliverPolicy = jetstream.DeliverNewPolicy
				return r
			}()},
			want: []string{`"Q"`, `"billing"`, "DeliverPolicy"},
		},
		{
			name: "a foreign work queue captures the subject",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{{Name: "FOREIGN", Retention: WorkQueuePolicy, Subjects: []string{"events.>"}}},
			want: []string{`"FOREIGN"`, `"S"`, c},
		},
		{
			name: "a foreign work queue has exactly the subject",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{{Name: "FOREIGN", Retention: WorkQueuePolicy, Subjects: []string{c}}},
			want: []string{`"FOREIGN"`, `"S"`, c},
		},
		{
			name: "a foreign limits stream drops messages",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{{Name: "FOREIGN", MaxMsgs: 10, MaxBytes: -1, Subjects: []string{"events.>"}}},
			want: []string{`"FOREIGN"`, `"S"`, c},
		},
		{
			name: "an own work queue has the subject through a wildcard",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "S"})},
			have: []StreamConfig{planOurs(StreamConfig{Name: "Q", Retention: WorkQueuePolicy, Subjects: []string{"events.shop.>"}})},
			want: []string{`"Q"`, `"S"`, c},
		},
		{
			name: "a work queue asks for the subject by a wildcard, another stream wants it too",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy, Subjects: []string{"events.shop.>"}}),
				planReg("audit", created, StreamConfig{Name: "S"}),
			},
			want: []string{`"Q"`, `"S"`, `"billing"`, c},
		},
		{
			// The server refuses the second of the two (10065), when the first
			// may have been made already.
			name: "two modules ask for overlapping wildcards in different streams",
			regs: []*streamRegistration{
				planReg("billing", created, StreamConfig{Name: "A", Subjects: []string{"events.shop.>"}}),
				planReg("audit", paid, StreamConfig{Name: "B", Subjects: []string{"events.*.v1.paid"}}),
			},
			want: []string{`"A"`, `"B"`, "events.shop.>", "events.*.v1.paid"},
		},
		{
			name: "a wildcard that is asked for overlaps with a foreign stream",
			regs: []*streamRegistration{planReg("billing", created, StreamConfig{Name: "A", Subjects: []string{"events.shop.>"}})},
			have: []StreamConfig{{Name: "FOREIGN", Subjects: []string{"events.shop.v1.paid"}}},
			want: []string{`"A"`, `"FOREIGN"`, "events.shop.>", "events.shop.v1.paid"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			for range 20 { // the order of registration must not matter
				regs := slices.Clone(tt.regs)
				rand.Shuffle(len(regs), func(i, j int) { regs[i], regs[j] = regs[j], regs[i] })
				plan, err := planTopology([]BaseEventDefinition{created, paid}, regs, newPlanModel(tt.have).list(), false)
				if !errors.Is(err, ErrStreamConflict) {
					if err == nil {
						t.Fatalf("no error, but a plan:\n%s", planChangesText(plan.changes))
					}
					t.Fatalf("error is %v, want ErrStreamConflict", err)
				}
				for _, w := range tt.want {
					if !strings.Contains(err.Error(), w) {
						t.Fatalf("error %q does not name %s", err, w)
					}
				}
			}
		})
	}
}

// Both modules name the event's own subject in their stream, which is natural
// for somebody who knows JetStream and changes nothing about what they want.
func TestPlanTopology_subjectNamedInBothStreams(t *testing.T) {
	t.Parallel()
	created := planEvent(t, "Created")
	const c = "events.shop.v1.created"
	for _, retention := range []jetstream.RetentionPolicy{LimitsPolicy, WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			regs := []*streamRegistration{
				planReg("a", created, StreamConfig{Name: "A", Retention: retention, Subjects: []string{c}}),
				planReg("b", created, StreamConfig{Name: "B", Retention: retention, Subjects: []string{c}}),
			}
			m := make(planModel)
			plan, err := planTopology([]BaseEventDefinition{created}, regs, nil, false)
			if errors.Is(err, ErrStreamConflict) {
				return // a refusal in plain words is fine, too
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, ch := range plan.changes {
				if err := m.apply(ch); err != nil {
					t.Errorf("the server would refuse: %v", err)
				}
			}
			if err := m.check(regs); err != nil {
				t.Error(err)
			}
		})
	}
}

// An event may have the name of a stream as its subject. When such a stream had
// to give it up the server would name it back, so that is refused.
func TestPlanTopology_subjectIsStreamName(t *testing.T) {
	t.Parallel()
	orders := planEvent(t, "Orders", "orders")
	one := []*streamRegistration{planReg("a", orders, StreamConfig{Name: "orders", Retention: WorkQueuePolicy})}
	two := append(slices.Clone(one), planReg("b", orders, StreamConfig{Name: "audit", Retention: WorkQueuePolicy}))
	m := make(planModel)
	for i, regs := range [][]*streamRegistration{one, two} {
		plan, err := planTopology([]BaseEventDefinition{orders}, regs, m.list(), false)
		if i > 0 && errors.Is(err, ErrStreamConflict) {
			return
		}
		if err != nil {
			t.Fatalf("%d streams: %v", i+1, err)
		}
		for _, ch := range plan.changes {
			if err := m.apply(ch); err != nil {
				t.Fatalf("%d streams: the server would refuse: %v\nplan:\n%s", i+1, err, planChangesText(plan.changes))
			}
		}
		if err := m.check(regs); err != nil {
			t.Fatalf("%d streams: %v", i+1, err)
		}
	}
}

// planWorld makes up registrations and existing streams.
type planWorld struct {
	events []BaseEventDefinition
	regs   []*streamRegistration
	have   planModel
}

func newPlanWorld(tb testing.TB, rng *rand.Rand) planWorld {
	tb.Helper()
	w := planWorld{have: make(planModel)}
	for _, name := range []string{"Created", "Paid", "Sent"} {
		w.events = append(w.events, planEvent(tb, name))
	}
	random := func(name string) StreamConfig {
		s := StreamConfig{Name: name}
		switch rng.IntN(3) {
		case 0:
			s.Retention = WorkQueuePolicy
		case 1:
			s.Retention = InterestPolicy
		}
		if rng.IntN(8) == 0 {
			s.MaxMsgs = 100 // not fit to own
		}
		if rng.IntN(12) == 0 {
			s.MaxAge = []time.Duration{time.Second, time.Hour}[rng.IntN(2)]
		}
		return s
	}
	// Streams of others, and streams of an earlier version of this program.
	for range rng.IntN(4) {
		s := random(fmt.Sprintf("S%d", rng.IntN(5)))
		if rng.IntN(4) == 0 {
			s.Name = "FOREIGN"
		}
		if _, ok := w.have[s.Name]; ok {
			continue
		}
		if rng.IntN(5) == 0 {
			s.Subjects = []string{"events.shop.>"}
		} else {
			for _, e := range w.events {
				if rng.IntN(2) == 0 {
					s.Subjects = append(s.Subjects, e.Subject)
				}
			}
		}
		if rng.IntN(3) > 0 {
			s = withStreamDefaults(s, streamRoleEvents)
		}
		_ = w.have.apply(streamChange{create: true, cfg: s}) // a stream that overlaps is left out
	}
	settings := make(map[string]StreamConfig)
	for i := range 5 {
		s := random(fmt.Sprintf("S%d", i))
		if have, ok := w.have[s.Name]; ok && rng.IntN(10) > 0 {
			s = StreamConfig{Name: s.Name, Retention: have.Retention}
		}
		if rng.IntN(15) == 0 {
			s.Subjects = []string{[]string{"events.shop.>", "events.*.v1.paid", "extra.>"}[rng.IntN(3)]}
		}
		settings[s.Name] = s
	}
	for i := range 1 + rng.IntN(6) {
		s := settings[fmt.Sprintf("S%d", rng.IntN(5))]
		w.regs = append(w.regs, planReg(fmt.Sprintf("m%d", i), w.events[rng.IntN(len(w.events))], s))
	}
	return w
}

// Random registrations on random streams: what is planned the server accepts,
// gives every stream every event exactly once, does not depend on the order of
// registration, needs nothing more when planned again, and heals when it was
// cut short after any change.
func TestPlanTopology_properties(t *testing.T) {
	t.Parallel()
	planned, refused := 0, 0
	for seed := range uint64(4_000) {
		rng := rand.New(rand.NewPCG(seed, 7))
		w := newPlanWorld(t, rng)
		updates := rng.IntN(2) == 0
		plan, err := planTopology(w.events, w.regs, w.have.list(), updates)

		shuffled := slices.Clone(w.regs)
		rng.Shuffle(len(shuffled), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		other, otherErr := planTopology(w.events, shuffled, w.have.list(), updates)
		if (err == nil) != (otherErr == nil) {
			t.Fatalf("seed %d: the order of registration decides:\n%v\n%v", seed, err, otherErr)
		}
		if err != nil {
			refused++
			if !errors.Is(err, ErrStreamConflict) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			continue
		}
		if updates && errors.Is(w.have.clone().applyAll(plan.changes), errPlanImmutable) {
			continue
		}
		planned++
		if a, b := planChangesText(plan.changes), planChangesText(other.changes); a != b {
			t.Fatalf("seed %d: the order of registration changes the plan:\n%s---\n%s", seed, a, b)
		}
		for k := range len(plan.changes) + 1 {
			m := w.have.clone()
			for _, c := range plan.changes[:k] {
				if err := m.apply(c); err != nil {
					t.Fatalf("seed %d: the server would refuse: %v\nstreams:\n%s\nplan:\n%s",
						seed, err, planStreamsText(w.have), planChangesText(plan.changes))
				}
			}
			rest, err := planTopology(w.events, w.regs, m.list(), updates)
			if err != nil {
				t.Fatalf("seed %d: after %d of %d changes: %v\nplan:\n%s", seed, k, len(plan.changes), err, planChangesText(plan.changes))
			}
			if k == len(plan.changes) && len(rest.changes) > 0 {
				t.Fatalf("seed %d: planning again changes more:\n%s\nfirst:\n%s", seed, planChangesText(rest.changes), planChangesText(plan.changes))
			}
			for _, c := range rest.changes {
				if err := m.apply(c); err != nil {
					t.Fatalf("seed %d: after %d changes the server would refuse: %v\nplan:\n%s", seed, k, err, planChangesText(rest.changes))
				}
			}
			if err := m.check(w.regs); err != nil {
				t.Fatalf("seed %d: after %d changes and the rest: %v\nstreams before:\n%s\nplan:\n%s",
					seed, k, err, planStreamsText(w.have), planChangesText(plan.changes))
			}
		}
	}
	t.Logf("%d planned, %d refused", planned, refused)
	if planned < 1000 || refused < 500 {
		t.Errorf("%d planned and %d refused: the random worlds are too much alike", planned, refused)
	}
}

// Two processes with registrations of their own, one after the other on one
// server: the second takes nothing away from the first, and neither finds
// anything to change when it is started again.
func TestPlanTopology_twoApps(t *testing.T) {
	t.Parallel()
	both := 0
	for seed := range uint64(4_000) {
		rng := rand.New(rand.NewPCG(seed, 13))
		w := newPlanWorld(t, rng)
		half := len(w.regs) / 2
		first, second := w.regs[:half], w.regs[half:]
		m := w.have.clone()
		updates := rng.IntN(3) == 0
		apply := func(regs []*streamRegistration) (*topology, error) {
			plan, err := planTopology(w.events, regs, m.list(), updates)
			if err != nil {
				return nil, err
			}
			if err := m.clone().applyAll(plan.changes); errors.Is(err, errPlanImmutable) {
				return nil, err
			}
			for _, c := range plan.changes {
				if err := m.apply(c); err != nil {
					t.Fatalf("seed %d: the server would refuse: %v\nplan:\n%s", seed, err, planChangesText(plan.changes))
				}
			}
			return plan, nil
		}
		if _, err := apply(first); err != nil {
			continue
		}
		between := planStreamsText(m)
		plan, err := apply(second)
		if err != nil {
			if after := planStreamsText(m); after != between {
				t.Fatalf("seed %d: a refused plan changed streams", seed)
			}
			continue
		}
		both++
		if err := m.check(w.regs); err != nil {
			t.Fatalf("seed %d: %v\nbefore:\n%sbetween:\n%splan of the second:\n%s",
				seed, err, planStreamsText(w.have), between, planChangesText(plan.changes))
		}
		for i, regs := range [][]*streamRegistration{first, second, first} {
			plan, err := apply(regs)
			if err != nil {
				t.Fatalf("seed %d: started again: %v", seed, err)
			}
			if len(plan.changes) > 0 {
				t.Fatalf("seed %d: start %d changes:\n%sbefore:\n%sbetween:\n%s", seed, i, planChangesText(plan.changes), planStreamsText(w.have), between)
			}
		}
	}
	t.Logf("%d pairs", both)
	if both < 1000 {
		t.Errorf("only %d pairs were planned", both)
	}
}

func planStreamsText(m planModel) string {
	var cs []streamChange
	for _, s := range m.list() {
		cs = append(cs, streamChange{cfg: s})
	}
	return planChangesText(cs)
}

// The planner changes none of its arguments: the streams that exist are asked
// for once and looked at by others.
func TestPlanTopology_isPure(t *testing.T) {
	t.Parallel()
	for seed := range uint64(500) {
		rng := rand.New(rand.NewPCG(seed, 11))
		w := newPlanWorld(t, rng)
		have := w.have.list()
		before := planStreamsText(w.have)
		var regsBefore []StreamConfig
		for _, r := range w.regs {
			regsBefore = append(regsBefore, r.cfg.Stream)
		}
		for range 2 {
			if _, err := planTopology(w.events, w.regs, have, true); err != nil && !errors.Is(err, ErrStreamConflict) {
				t.Fatal(err)
			}
		}
		if after := planStreamsText(newPlanModel(have)); after != before {
			t.Fatalf("seed %d: streams changed from\n%s to\n%s", seed, before, after)
		}
		for i, r := range w.regs {
			if diff := gocmp.Diff(regsBefore[i], r.cfg.Stream); diff != "" {
				t.Fatalf("seed %d: registration %d changed:\n%s", seed, i, diff)
			}
		}
	}
}

// An owner was deleted, and comes back as a stream that others cannot source
// from. The source that was left would take messages from the work queue, and
// bring the other stream every message twice.
func TestPlanTopology_leftoverSource(t *testing.T) {
	t.Parallel()
	created := planEvent(t, "Created")
	const c = "events.shop.v1.created"
	regs := []*streamRegistration{
		planReg("a", created, StreamConfig{Name: "L", Retention: WorkQueuePolicy}),
		planReg("b", created, StreamConfig{Name: "Q", Retention: WorkQueuePolicy}),
	}
	m := newPlanModel([]StreamConfig{planOurs(StreamConfig{Name: "Q", Retention: WorkQueuePolicy, Sources: planSource("L", c)})})
	plan, err := planTopology([]BaseEventDefinition{created}, regs, m.list(), false)
	if errors.Is(err, ErrStreamConflict) {
		return // in plain words is fine
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := m.applyAll(plan.changes); err != nil {
		t.Fatal(err)
	}
	if err := m.check(regs); err != nil {
		t.Errorf("%v\nplan:\n%s", err, planChangesText(plan.changes))
	}
}
