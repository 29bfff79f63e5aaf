package mono

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/internal/subjects"
)

// Names on the wire.
const (
	// streamRoleKey marks, in a stream's metadata, the streams that an App made.
	// Only those are rearranged.
	streamRoleKey    = "monotel.role"
	streamRoleEvents = "events" // named by a module
	streamRoleFanOut = "fanout" // made so that several streams get the same event

	fanOutPrefix = "fanout_"
)

const (
	defaultMaxBytes       = 1 << 30   // of a file stream
	defaultMaxBytesMemory = 256 << 20 // of a memory stream
	minOwnerAge           = time.Minute
)

// A streamChange is one request to the server.
type streamChange struct {
	create bool
	cfg    StreamConfig
	why    string
	warn   bool          // touches a stream that no module of this App names
	undo   *StreamConfig // brings the stream back when a later change fails
}

// A topology says which streams there are to be and how to get there.
type topology struct {
	changes []streamChange
	// durable holds the declared subjects that a stream stores: events on them
	// are published through JetStream, whoever asks.
	durable map[string]bool
	fanOuts []string // fan-out streams of this App's events
	sources bool     // streams of this App source from others
}

// asked is what the modules together want of one stream.
type asked struct {
	cfg      StreamConfig
	setBy    map[string]string // which module set a field
	modules  []string
	subjects []string // of the events to be stored in it
}

// planTopology arranges the streams that the registrations ask for, given those
// that the server has. It is a pure function: what cannot be done is refused
// before anything is changed.
//
// Each subject has one owner, the stream that takes it from publishers. When
// several streams want an event, the others source it from the owner, so that
// each gets all of it. The owner is a limits stream: reading one takes nothing
// away from it. Where no stream named by a module is fit to own, a fan-out
// stream is made for the event.
func planTopology(events []BaseEventDefinition, regs []*streamRegistration, have []StreamConfig, allowUpdates bool) (*topology, error) {
	p := &planner{
		events:    events,
		have:      make(map[string]StreamConfig, len(have)),
		asked:     make(map[string]*asked),
		final:     make(map[string]StreamConfig),
		givesUp:   make(map[string][]string),
		whyChange: make(map[string]string),
		updates:   allowUpdates,
	}
	for _, s := range have {
		p.have[s.Name] = s
	}
	p.merge(regs)
	p.checkWorkQueues(regs)
	p.settings()
	p.assignSubjects()
	p.addSpareSubjects()
	p.checkOverlaps()
	if len(p.errs) > 0 {
		return nil, errors.Join(p.errs...)
	}
	return p.result(), nil
}

type planner struct {
	events    []BaseEventDefinition
	have      map[string]StreamConfig
	asked     map[string]*asked
	final     map[string]StreamConfig // streams as they are to be
	givesUp   map[string][]string     // subjects that existing streams lose
	whyChange map[string]string
	updates   bool
	errs      []error

	maxMsgSize int32 // of the streams that the subject being assigned goes to
}

func (p *planner) conflict(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%w: "+format, append([]any{ErrStreamConflict}, args...)...))
}

// fieldsApart are the fields of a StreamConfig that are united, not compared.
var fieldsApart = []string{"Name", "Subjects", "Sources", "Metadata", "Description", "FirstSeq"}

// merge unites what the registrations ask of each stream.
func (p *planner) merge(regs []*streamRegistration) {
	for _, r := range regs {
		name, want := r.info.Stream, reflect.ValueOf(r.cfg.Stream)
		a := p.asked[name]
		if a == nil {
			a = &asked{setBy: make(map[string]string)}
			a.cfg.Name = name
			p.asked[name] = a
		}
		if !slices.Contains(a.modules, r.info.Module) {
			a.modules = append(a.modules, r.info.Module)
		}
		have := reflect.ValueOf(&a.cfg).Elem()
		for i := range want.NumField() {
			field := want.Type().Field(i).Name
			if slices.Contains(fieldsApart, field) || want.Field(i).IsZero() {
				continue
			}
			if by, set := a.setBy[field]; set && !reflect.DeepEqual(have.Field(i).Interface(), want.Field(i).Interface()) {
				p.conflict("stream %q: module %q asks for %s %v, module %q for %v; make them agree",
					name, by, field, have.Field(i).Interface(), r.info.Module, want.Field(i).Interface())
				continue
			}
			have.Field(i).Set(want.Field(i))
			a.setBy[field] = r.info.Module
		}
		a.cfg.Description = cmp.Or(a.cfg.Description, r.cfg.Stream.Description)
		a.cfg.FirstSeq = max(a.cfg.FirstSeq, r.cfg.Stream.FirstSeq)
		a.cfg.Subjects = union(a.cfg.Subjects, r.cfg.Stream.Subjects)
		a.cfg.Sources = unionSources(a.cfg.Sources, r.cfg.Stream.Sources)
		for k, v := range r.cfg.Stream.Metadata {
			if old, set := a.cfg.Metadata[k]; set && old != v {
				p.conflict("stream %q: modules %s disagree on Metadata[%q]", name, quoted(a.modules), k)
			}
			if a.cfg.Metadata == nil {
				a.cfg.Metadata = make(map[string]string)
			}
			a.cfg.Metadata[k] = v
		}
		a.subjects = union(a.subjects, []string{r.info.Event.Subject})
	}
	// To list the subject of an event that is consumed from the stream is to ask
	// for the event, not to claim the subject against other streams.
	for _, a := range p.asked {
		a.cfg.Subjects = slices.DeleteFunc(a.cfg.Subjects, func(s string) bool { return slices.Contains(a.subjects, s) })
	}
}

// checkWorkQueues finds consumers that a work queue cannot serve: it hands each
// message to one of them only, so the server refuses the second.
func (p *planner) checkWorkQueues(regs []*streamRegistration) {
	type key struct{ stream, subject string }
	first := make(map[key]*streamRegistration)
	for _, r := range regs {
		if p.asked[r.info.Stream].cfg.Retention != WorkQueuePolicy {
			continue
		}
		if r.cfg.Consumer.DeliverPolicy != jetstream.DeliverAllPolicy {
			p.conflict("stream %q of module %q is a work queue: Consumer.DeliverPolicy must be DeliverAllPolicy, since what is skipped would never leave it",
				r.info.Stream, r.info.Module)
		}
		k := key{r.info.Stream, r.info.Event.Subject}
		if o := first[k]; o != nil {
			p.conflict("modules %q and %q both consume event %s from the work queue stream %q, which hands each message to one consumer; "+
				"give each module a stream of its own, and both get every event", o.info.Module, r.info.Module, r.info.Event, r.info.Stream)
			continue
		}
		first[k] = r
	}
}

// settings decides each asked stream's settings, leaving out subjects and
// sources that follow from events.
func (p *planner) settings() {
	for _, name := range slices.Sorted(maps.Keys(p.asked)) {
		a := p.asked[name]
		have, exists := p.have[name]
		if !exists {
			p.final[name] = withStreamDefaults(a.cfg, streamRoleEvents)
			continue
		}
		cfg := have
		if cfg.Mirror != nil {
			p.conflict("stream %q of modules %s exists as a mirror of %q and cannot store events; choose another name",
				name, quoted(a.modules), cfg.Mirror.Name)
			continue
		}
		for _, d := range contradictions(a.cfg, have) {
			if neverChanges(d) {
				p.conflict("stream %q exists with %s %v, which the server never changes, and module %s asks for %v; "+
					"ask for what exists, or choose another name", name, d.field, d.have, p.setBy(a, d.field), d.want)
				continue
			}
			if !p.updates {
				p.conflict("stream %q exists with %s %v, module %s asks for %v; ask for what exists, use WithStreamUpdates to change the stream, or choose another name",
					name, d.field, d.have, p.setBy(a, d.field), d.want)
				continue
			}
			reflect.ValueOf(&cfg).Elem().FieldByName(d.field).Set(reflect.ValueOf(d.want))
			p.because(name, fmt.Sprintf("%s from %v to %v", d.field, d.have, d.want))
		}
		if reader := p.reader(name); reader != "" && fitToOwn(have) && !fitToOwn(cfg) {
			p.conflict("stream %q sources from stream %q, which modules %s want changed so that it removes messages before they are copied; "+
				"leave its settings, or choose another name", reader, name, quoted(a.modules))
			continue
		}
		kept := slices.DeleteFunc(slices.Clone(have.Subjects), func(s string) bool {
			// The server refuses a subject beside a wildcard that covers it.
			return !slices.Contains(a.cfg.Subjects, s) && covers(a.cfg.Subjects, s)
		})
		cfg.Subjects = union(kept, a.cfg.Subjects)
		cfg.Sources = unionSources(have.Sources, a.cfg.Sources)
		if isOurs(have) && !slices.Contains(a.cfg.Subjects, name) {
			// The server gave it its own name as subject when an earlier start
			// was cut short between giving up a subject and naming the source.
			cfg.Subjects = without(cfg.Subjects, name)
		}
		p.final[name] = cfg
	}
}

func (p *planner) setBy(a *asked, field string) string {
	if by := a.setBy[field]; by != "" {
		return fmt.Sprintf("%q", by)
	}
	return quoted(a.modules)
}

func (p *planner) because(stream, why string) {
	if p.whyChange[stream] != "" {
		why = p.whyChange[stream] + ", " + why
	}
	p.whyChange[stream] = why
}

// assignSubjects finds an owner for each event and lets the other streams that
// want it source from there.
func (p *planner) assignSubjects() {
	wanted := make(map[string][]string) // subject to streams
	for _, name := range slices.Sorted(maps.Keys(p.asked)) {
		if _, ok := p.final[name]; !ok {
			continue // refused already
		}
		for _, s := range p.asked[name].subjects {
			wanted[s] = append(wanted[s], name)
		}
	}
	for _, subject := range slices.Sorted(maps.Keys(wanted)) {
		p.assign(subject, wanted[subject])
	}
}

func (p *planner) assign(subject string, streams []string) {
	p.maxMsgSize = smallestMsgSize(p.final, streams)
	owner, streams, ok := p.owner(subject, streams)
	if !ok {
		return
	}
	for _, name := range streams {
		cfg := p.withoutStaleSources(p.final[name], owner, subject)
		if name == owner {
			if !covers(cfg.Subjects, subject) {
				cfg.Subjects = union(cfg.Subjects, []string{subject})
				p.because(name, fmt.Sprintf("subject %q added", subject))
			}
		} else if !sourcesFrom(cfg, owner, subject) {
			cfg.Sources = append(slices.Clone(cfg.Sources), eventSource(owner, subject))
			p.because(name, fmt.Sprintf("source %q added for subject %q", owner, subject))
		}
		p.final[name] = cfg
	}
}

// withoutStaleSources drops the sources of subject from streams that were its
// owner before, or are gone: the event would come twice when they are back.
// Sources that a module asks for stay.
func (p *planner) withoutStaleSources(cfg StreamConfig, owner, subject string) StreamConfig {
	if !isOurs(cfg) {
		return cfg
	}
	var wanted []*jetstream.StreamSource
	if a := p.asked[cfg.Name]; a != nil {
		wanted = a.cfg.Sources
	}
	kept := slices.DeleteFunc(slices.Clone(cfg.Sources), func(s *jetstream.StreamSource) bool {
		return s.FilterSubject == subject && (s.Name != owner || cfg.Name == owner) && s.External == nil &&
			!slices.ContainsFunc(wanted, func(w *jetstream.StreamSource) bool { return sameSource(w, s) })
	})
	if len(kept) < len(cfg.Sources) {
		p.because(cfg.Name, fmt.Sprintf("old source of subject %q dropped", subject))
		cfg.Sources = kept
	}
	return cfg
}

// eventSource is how a stream gets an event from its owner: all of it. Without
// the start sequence the server begins at the time of the stream's last message,
// and skips what the owner has taken before that source was set up.
func eventSource(owner, subject string) *jetstream.StreamSource {
	return &jetstream.StreamSource{Name: owner, FilterSubject: subject, OptStartSeq: 1}
}

// owner chooses the stream that takes subject from publishers. It returns the
// streams that get the subject, which may be one more than those that ask.
func (p *planner) owner(subject string, streams []string) (string, []string, bool) {
	// A wildcard that a module asked for leaves no choice.
	for _, name := range slices.Sorted(maps.Keys(p.asked)) {
		if a := p.asked[name]; covers(a.cfg.Subjects, subject) {
			return name, streams, p.mayOwn(subject, streams, name, "Stream.Subjects of module "+quoted(a.modules))
		}
	}
	current := ""
	for name, s := range p.have {
		if covers(s.Subjects, subject) {
			current = name // the server allows only one
			break
		}
	}
	if current != "" {
		cfg, ok := p.final[current]
		if !ok {
			cfg = p.have[current]
		}
		alone := len(streams) == 1 && streams[0] == current
		if alone || p.fitToOwn(cfg) {
			return current, streams, true
		}
		if !slices.Contains(cfg.Subjects, subject) || !isOurs(cfg) || p.isOrigin(current, subject) {
			return current, streams, p.mayOwn(subject, streams, current, "its configuration on the server")
		}
		// It gives the subject up and sources it like the others.
		p.giveUp(current, cfg, subject)
		if !slices.Contains(streams, current) {
			streams = append(slices.Clone(streams), current)
		}
	}
	return p.newOwner(subject, streams), streams, true
}

// mayOwn checks an owner that cannot be changed.
func (p *planner) mayOwn(subject string, streams []string, owner, because string) bool {
	cfg, ok := p.final[owner]
	if !ok {
		cfg = p.have[owner]
	}
	if (len(streams) > 1 || streams[0] != owner) && !p.fitToOwn(cfg) {
		p.conflict("stream %q takes subject %q because of %s, and it is wanted in %s; other streams cannot read it from there, "+
			"because its retention or its limits remove messages, or its MaxMsgSize is larger than theirs: "+
			"leave the subject out of stream %q, or make that a limits stream that discards new messages",
			owner, subject, because, quoted(streams), owner)
		return false
	}
	return true
}

// reader returns a stream on the server that sources from name, if there is one.
func (p *planner) reader(name string) string {
	for _, other := range slices.Sorted(maps.Keys(p.have)) {
		if slices.ContainsFunc(p.have[other].Sources, func(s *jetstream.StreamSource) bool {
			return s.Name == name && s.External == nil
		}) {
			return other
		}
	}
	return ""
}

// isOrigin reports whether another stream sources the subject from name.
func (p *planner) isOrigin(name, subject string) bool {
	for _, streams := range []map[string]StreamConfig{p.have, p.final} {
		for _, cfg := range streams {
			if cfg.Name != name && sourcesFrom(cfg, name, subject) {
				return true
			}
		}
	}
	return false
}

func (p *planner) giveUp(stream string, cfg StreamConfig, subject string) {
	cfg.Subjects = without(cfg.Subjects, subject)
	p.final[stream] = cfg
	p.givesUp[stream] = append(p.givesUp[stream], subject)
	p.because(stream, fmt.Sprintf("subject %q given up to a new owner", subject))
}

func (p *planner) newOwner(subject string, streams []string) string {
	if len(streams) == 1 {
		return streams[0]
	}
	for _, name := range streams {
		if p.fitToOwn(p.final[name]) {
			return name
		}
	}
	i := slices.IndexFunc(p.events, func(e BaseEventDefinition) bool { return e.Subject == subject })
	e := p.events[i]
	name := fanOutPrefix + strings.Join([]string{e.ModuleName, kebab(e.Name), e.Version}, "_")
	cfg, exists := p.final[name]
	if !exists {
		cfg, exists = p.have[name]
	}
	if !exists {
		cfg = StreamConfig{
			Name:        name,
			Description: "Hands event " + e.String() + " to several streams",
			Storage:     MemoryStorage,
			MaxMsgSize:  p.maxMsgSize,
		}
		for _, s := range streams {
			cfg.Replicas = max(cfg.Replicas, p.final[s].Replicas)
			if p.final[s].Storage == FileStorage {
				cfg.Storage = FileStorage
			}
		}
		cfg = withStreamDefaults(cfg, streamRoleFanOut)
	}
	cfg.Subjects = union(cfg.Subjects, []string{subject})
	p.because(name, fmt.Sprintf("hands subject %q to streams %s", subject, quoted(streams)))
	p.final[name] = cfg
	return name
}

// addSpareSubjects gives a second subject, which nobody uses, to each stream that
// has sources and one subject, not counting those for replays, or subjects for
// replays alone. A consumer of a stream's only subject counts for the server as one
// of all its messages, so that a message from a source would wait for that
// consumer's ack, and never leave a work queue.
func (p *planner) addSpareSubjects() {
	for name, cfg := range p.final {
		own := slices.DeleteFunc(slices.Clone(cfg.Subjects), dlq.IsReplaySubject)
		if cfg.Retention != LimitsPolicy && len(cfg.Sources) > 0 && (len(own) == 1 || len(own) == 0 && len(cfg.Subjects) > 0) {
			cfg.Subjects = union(cfg.Subjects, []string{dlq.SpareSubject(name)})
			p.final[name] = cfg
		}
	}
}

// checkOverlaps finds wildcards that take subjects of other streams, which the
// server would refuse in the middle of the changes.
func (p *planner) checkOverlaps() {
	streams := maps.Clone(p.have)
	maps.Copy(streams, p.final)
	names := slices.Sorted(maps.Keys(streams))
	for _, wild := range slices.Sorted(maps.Keys(p.asked)) {
		for _, pattern := range streams[wild].Subjects {
			if !strings.ContainsAny(pattern, "*>") {
				continue // each event's subject has one owner
			}
			for _, name := range names {
				for _, s := range streams[name].Subjects {
					if name != wild && subjects.Overlap(pattern, s) {
						p.conflict("stream %q would take subject %q, and stream %q takes %q; the server allows one stream a subject: "+
							"narrow Stream.Subjects of modules %s", wild, pattern, name, s, quoted(p.asked[wild].modules))
					}
				}
			}
		}
	}
}

// result puts the changes in an order in which the server takes each of them,
// and what is likeliest to be refused comes before anything is taken away: new
// streams, without subjects that others still have, interest streams without any;
// then subjects are given up; then they are taken.
func (p *planner) result() *topology {
	t := &topology{durable: make(map[string]bool)}
	contested := slices.Concat(slices.Collect(maps.Values(p.givesUp))...)
	order := p.ownersFirst()
	made := make(map[string]StreamConfig)
	for _, name := range order {
		if _, exists := p.have[name]; exists {
			continue
		}
		cfg := p.final[name]
		cfg.Subjects = slices.DeleteFunc(slices.Clone(cfg.Subjects), func(s string) bool { return slices.Contains(contested, s) })
		if cfg.Retention == InterestPolicy { // it keeps nothing before it has consumers, see apply
			cfg.Subjects, cfg.Sources = []string{dlq.SpareSubject(name)}, nil
		}
		made[name] = cfg
		t.changes = append(t.changes, streamChange{create: true, cfg: cfg, why: p.whyChange[name]})
	}
	for _, name := range slices.Sorted(maps.Keys(p.givesUp)) {
		before := p.have[name]
		cfg := before
		for _, s := range p.givesUp[name] {
			cfg.Subjects = without(cfg.Subjects, s)
		}
		_, named := p.asked[name]
		t.changes = append(t.changes, streamChange{cfg: cfg, why: p.whyChange[name], warn: !named, undo: &before})
		made[name] = cfg
	}
	for _, name := range order {
		cfg := p.final[name]
		before, changed := made[name]
		if !changed {
			before = p.have[name]
		}
		if !sameStream(before, cfg) {
			t.changes = append(t.changes, streamChange{cfg: cfg, why: p.whyChange[name]})
		}
	}
	for name := range p.asked {
		t.sources = t.sources || len(p.final[name].Sources) > 0
	}
	streams := maps.Clone(p.have)
	maps.Copy(streams, p.final)
	for _, e := range p.events {
		for name, s := range streams {
			if !covers(s.Subjects, e.Subject) {
				continue
			}
			t.durable[e.Subject] = true
			if s.Metadata[streamRoleKey] == streamRoleFanOut {
				t.fanOuts = append(t.fanOuts, name)
			}
		}
	}
	slices.Sort(t.fanOuts)
	t.fanOuts = slices.Compact(t.fanOuts)
	return t
}

// ownersFirst sorts the streams so that each comes after those it sources from,
// and otherwise by name.
func (p *planner) ownersFirst() []string {
	var order []string
	state := make(map[string]bool) // true once visited; a cycle is left to the server to refuse
	var visit func(name string)
	visit = func(name string) {
		cfg, ok := p.final[name]
		if !ok || state[name] {
			return
		}
		state[name] = true
		for _, s := range cfg.Sources {
			visit(s.Name)
		}
		order = append(order, name)
	}
	for _, name := range slices.Sorted(maps.Keys(p.final)) {
		visit(name)
	}
	return order
}

// fitToOwn reports whether the streams in question can source from cfg. A source
// stops for ever at a message that is too large for its stream.
func (p *planner) fitToOwn(cfg StreamConfig) bool {
	small := p.maxMsgSize == 0 || cfg.MaxMsgSize > 0 && cfg.MaxMsgSize <= p.maxMsgSize
	return small && fitToOwn(cfg)
}
