package mono

import (
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/internal/subjects"
)

// withStreamDefaults completes the configuration of a new stream. Every stream
// has a bound: an unlimited one would eat the store of the others.
func withStreamDefaults(cfg StreamConfig, role string) StreamConfig {
	limited := cfg.MaxBytes > 0 || cfg.MaxMsgs > 0 || cfg.MaxMsgsPerSubject > 0
	if cfg.MaxBytes == 0 {
		cfg.MaxBytes = defaultMaxBytes
		if cfg.Storage == MemoryStorage {
			cfg.MaxBytes = defaultMaxBytesMemory
		}
	}
	if cfg.Retention != LimitsPolicy || !limited {
		cfg.Discard = jetstream.DiscardNew
	}
	cfg.Metadata = maps.Clone(cfg.Metadata)
	if cfg.Metadata == nil {
		cfg.Metadata = make(map[string]string, 1)
	}
	cfg.Metadata[streamRoleKey] = role
	return cfg
}

// smallestMsgSize is what each of the streams takes, 0 without a limit.
func smallestMsgSize(all map[string]StreamConfig, streams []string) int32 {
	var least int32
	for _, name := range streams {
		if n := all[name].MaxMsgSize; n > 0 && (least == 0 || n < least) {
			least = n
		}
	}
	return least
}

// fitToOwn reports whether other streams can source from cfg without missing a
// message: whether nothing but age removes one.
func fitToOwn(cfg StreamConfig) bool {
	return cfg.Retention == LimitsPolicy && cfg.MaxMsgsPerSubject <= 0 &&
		(cfg.Discard == jetstream.DiscardNew || cfg.MaxMsgs <= 0 && cfg.MaxBytes <= 0) &&
		(cfg.MaxAge == 0 || cfg.MaxAge >= minOwnerAge)
}

func isOurs(cfg StreamConfig) bool { return cfg.Metadata[streamRoleKey] != "" }

type contradiction struct {
	field      string
	want, have any
}

// neverChanges reports whether the server refuses to change the setting of a
// stream that exists.
func neverChanges(d contradiction) bool {
	switch d.field {
	case "Storage", "PersistMode", "AllowMsgCounter":
		return true
	case "Retention":
		return d.want == WorkQueuePolicy || d.have == WorkQueuePolicy
	}
	return false
}

// contradictions lists the settings in which the asked configuration differs
// from what exists. Fields left at zero ask for nothing, but for Retention and
// Storage, whose zero values mean something.
func contradictions(want, have StreamConfig) []contradiction {
	var all []contradiction
	w, h := reflect.ValueOf(want), reflect.ValueOf(have)
	for i := range w.NumField() {
		field := w.Type().Field(i).Name
		if slices.Contains(fieldsApart, field) || w.Field(i).IsZero() && field != "Retention" && field != "Storage" {
			continue
		}
		if a, b := w.Field(i).Interface(), h.Field(i).Interface(); !reflect.DeepEqual(a, b) {
			all = append(all, contradiction{field, a, b})
		}
	}
	return all
}

func sameStream(a, b StreamConfig) bool {
	sorted := func(s []string) []string { return slices.Sorted(slices.Values(s)) }
	return slices.Equal(sorted(a.Subjects), sorted(b.Subjects)) && len(contradictions(b, a)) == 0 &&
		len(a.Sources) == len(b.Sources) && len(unionSources(a.Sources, b.Sources)) == len(a.Sources)
}

func covers(patterns []string, subject string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return subjects.Covers(p, subject) })
}

func sourcesFrom(cfg StreamConfig, owner, subject string) bool {
	return slices.ContainsFunc(cfg.Sources, func(s *jetstream.StreamSource) bool {
		return s.Name == owner && s.External == nil && (s.FilterSubject == "" || subjects.Covers(s.FilterSubject, subject))
	})
}

func union(a, b []string) []string {
	u := slices.Clone(a)
	for _, s := range b {
		if !slices.Contains(u, s) {
			u = append(u, s)
		}
	}
	return u
}

func without(list []string, s string) []string {
	return slices.DeleteFunc(slices.Clone(list), func(x string) bool { return x == s })
}

// unionSources tells sources apart as the server does. What else they hold, it
// or the client may have written in another way.
func unionSources(a, b []*jetstream.StreamSource) []*jetstream.StreamSource {
	u := slices.Clone(a)
	for _, s := range b {
		if !slices.ContainsFunc(u, func(x *jetstream.StreamSource) bool { return sameSource(x, s) }) {
			u = append(u, s)
		}
	}
	return u
}

func sameSource(a, b *jetstream.StreamSource) bool {
	return a.Name == b.Name && a.FilterSubject == b.FilterSubject && slices.Equal(a.SubjectTransforms, b.SubjectTransforms)
}

func quoted(names []string) string {
	q := make([]string, len(names))
	for i, n := range names {
		q[i] = fmt.Sprintf("%q", n)
	}
	return strings.Join(q, ", ")
}
