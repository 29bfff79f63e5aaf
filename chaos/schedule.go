package main

import (
	"encoding/json"
	"fmt"
	"hash/fnv"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/monotel/monotel/mono"
)

// A schedule is one round: the servers, the messages and the faults. Everything in it
// follows from a seed, and a schedule runs again from its file.
type schedule struct {
	Seed       uint64         `json:"seed"`
	Round      int            `json:"round"`
	Profile    string         `json:"profile"`
	Nodes      int            `json:"nodes"`                // 1, or 3 for a cluster
	Instances  int            `json:"instances"`            // processes that consume
	Publishers int            `json:"publishers,omitempty"` // 0: one
	Messages   int            `json:"messages"`             // of each event and publisher
	Rate       int            `json:"rate"`                 // publishes a second, of each publisher
	Attempts   int            `json:"attempts"`             // MaxAttempts until the upgrade
	Mix        map[string]int `json:"mix"`                  // of 1000 messages, by kind; the others succeed
	Events     []string       `json:"events,omitempty"`     // these alone
	Disk       int            `json:"disk"`                 // MiB of a small file system under the store; 0: none
	Faults     []fault        `json:"faults"`

	// Of a schedule that is kept.
	Fails []string `json:"fails,omitempty"` // classes of findings it was kept for
	OfRun string   `json:"of_run,omitempty"`
	Known string   `json:"known,omitempty"` // why it still fails; empty: it must pass
}

// A fault begins when a counter has reached a number. It ends when another has grown by
// some amount, and after faultBound in any case, as a fault may stop what is counted.
// Stops of a process relative to AckWait last for a time.
type fault struct {
	Kind   string   `json:"kind"`
	Target string   `json:"target,omitempty"` // consumer1, publisher1, node2
	At     trigger  `json:"at"`
	Until  trigger  `json:"until,omitzero"`
	For    duration `json:"for,omitempty"`
	Count  int      `json:"count,omitempty"` // of replays
}

func (f fault) String() string {
	s := f.Kind
	if f.Target != "" {
		s += " " + f.Target
	}
	s += fmt.Sprintf(" at %s", f.At)
	if f.Until.N > 0 {
		s += fmt.Sprintf(" for %s", f.Until)
	}
	if f.For > 0 {
		s += fmt.Sprintf(" for %v", time.Duration(f.For))
	}
	if f.Count > 0 {
		s += fmt.Sprintf(" (%d)", f.Count)
	}
	return s
}

type trigger struct {
	Counter string `json:"counter"`
	N       int    `json:"n"`
}

func (t trigger) String() string { return fmt.Sprintf("%d %s", t.N, t.Counter) }

// A duration is text in JSON.
type duration time.Duration

func (d duration) MarshalText() ([]byte, error) { //nolint:unparam // as encoding.TextMarshaler has it
	return []byte(time.Duration(d).String()), nil
}

func (d *duration) UnmarshalText(b []byte) error {
	v, err := time.ParseDuration(string(b))
	*d = duration(v)
	return err
}

// The counters.
const (
	countAcked    = "acked"    // publishes
	countFailed   = "failed"   // attempts to publish
	countBegun    = "begun"    // handlings; begun:flip are those of messages of that kind
	countReplayed = "replayed" // handlings of replays that have begun
	countCaptured = "captured" // messages of the dead-letter stream
)

// The kinds of faults.
const (
	faultKill       = "kill"        // SIGKILL of a consumer or publisher, which is started again
	faultStop       = "stop"        // SIGSTOP, and SIGCONT after a time
	faultTerm       = "term"        // SIGTERM, and a new process
	faultCut        = "cut"         // the link of a process to the servers is closed
	faultStall      = "stall"       // no byte passes, and nobody is told
	faultKillServer = "kill-server" // SIGKILL
	faultStopServer = "stop-server" // SIGSTOP
	faultRoll       = "roll"        // SIGTERM of the nodes in turn
	faultCutNode    = "cut-node"    // the links between a node and the others
	faultStallNode  = "stall-node"
	faultDisk       = "disk-full"
	faultDLQ        = "dlq-full"
	faultGateway    = "gateway-down" // handlers of that kind give up
	faultUpgrade    = "upgrade"      // modules are renamed and MaxAttempts becomes 5
	faultReplay     = "replay"       // monotel dlq replay
	faultKillReplay = "kill-replay"
)

// The kinds of messages, which say what a handler does.
const (
	kindOK          = "ok"
	kindRetry       = "retry"   // up to three errors, then success
	kindLate        = "late"    // twelve errors, then success
	kindSlow        = "slow"    // success after a time about AckWait
	kindFlip        = "flip"    // works for a while and gives up at the first attempt; success at later ones
	kindGateway     = "gateway" // gives up while the gateway is down, else success
	kindPermanent   = "permanent"
	kindFail        = "fail" // an error each time
	kindPanic       = "panic"
	kindTerm        = "term"
	kindNak         = "nak"
	kindPoison      = "poison" // exits the process
	kindUndecodable = "undecodable"
)

// mixOrder is the order in which weights are added, as that of a map differs.
var mixOrder = []string{
	kindRetry, kindLate, kindSlow, kindFlip, kindGateway, kindPermanent, kindFail, kindPanic, kindTerm, kindNak, kindPoison,
}

// innocent messages are handled with success however they come.
func innocent(kind string) bool { return kind == kindOK || kind == kindRetry || kind == kindSlow }

const (
	ackWait      = 2 * time.Second
	upgraded     = 5 // MaxAttempts after the upgrade
	lateAttempts = 12
	faultBound   = 15 * time.Second
)

// A decision is what the handler does with a message.
type decision struct {
	kind  string
	fails uint64        // this many attempts
	work  time.Duration // how long
}

// random is the same for the same words.
func (s *schedule) random(words ...string) *rand.Rand {
	h := fnv.New64a()
	_, _ = h.Write([]byte(strings.Join(words, "\x00")))                 // it cannot fail
	return rand.New(rand.NewPCG(s.Seed+uint64(s.Round)<<32, h.Sum64())) //nolint:gosec // it is to be repeatable
}

// undecodable is a matter of the payload, and so of all consumers.
func (s *schedule) undecodable(id string) bool {
	return s.random("payload", id).IntN(1000) < s.Mix[kindUndecodable]
}

// decide says what a consumer does with a message, or with its nth replay.
func (s *schedule) decide(id, durable string, replay int) decision {
	if replay == 0 && s.undecodable(id) {
		return decision{kind: kindUndecodable}
	}
	if replay > 0 {
		r := s.random("replay", id, durable, strconv.Itoa(replay))
		switch n := r.IntN(100); {
		case n < 70:
			return decision{kind: kindOK}
		case n < 85:
			return decision{kind: kindRetry, fails: 1 + r.Uint64N(3)}
		case n < 90:
			return decision{kind: kindSlow, work: between(r, ackWait/2, ackWait*3/2)}
		}
		return decision{kind: kindPermanent}
	}
	r := s.random("message", id, durable)
	n := r.IntN(1000)
	for _, kind := range mixOrder {
		if n -= s.Mix[kind]; n >= 0 {
			continue
		}
		d := decision{kind: kind}
		switch kind {
		case kindRetry:
			d.fails = 1 + r.Uint64N(3)
		case kindLate:
			d.fails = lateAttempts
		case kindSlow:
			d.work = between(r, ackWait/2, ackWait*3/2)
		case kindFlip:
			d.work = between(r, ackWait/4, ackWait/2)
		}
		return d
	}
	return decision{kind: kindOK}
}

func between(r *rand.Rand, least, most time.Duration) time.Duration {
	return least + time.Duration(r.Int64N(int64(most-least)))
}

// A style is how a handler settles.
type style int

const (
	single style = iota // one message at a time, AutoAck
	batch               // ten, AutoAck, returns at its first error
	acks                // ten, acked one by one, returns at its first error
)

// A consumer is a durable consumer of each App.
type consumer struct {
	durable   string
	event     string
	stream    string
	retention mono.StreamConfig
	style     style
}

// The consumers. Those of Fan name different streams for one event.
func allConsumers() []consumer {
	limits := mono.StreamConfig{Retention: mono.LimitsPolicy}
	interest := mono.StreamConfig{Retention: mono.InterestPolicy}
	queue := mono.StreamConfig{Retention: mono.WorkQueuePolicy}
	return []consumer{
		{"audit", "Limit", "LIMIT", limits, single},
		{"report", "Limit", "LIMIT", limits, batch},
		{"mail", "Interest", "INTEREST", interest, single},
		{"index", "Interest", "INTEREST", interest, acks},
		{"bill", "Queue", "QUEUE", queue, batch},
		{"ship", "Fan", "SHIP", queue, single},
		{"stock", "Fan", "STOCK", queue, acks},
	}
}

func allEvents() []string { return []string{"Limit", "Interest", "Queue", "Fan"} }

func (s *schedule) events() []string {
	if len(s.Events) > 0 {
		return s.Events
	}
	return allEvents()
}

// published is how many messages there are in all.
func (s *schedule) published() int { return s.Messages * len(s.events()) * max(s.Publishers, 1) }

func (s *schedule) consumers() []consumer {
	return slices.DeleteFunc(allConsumers(), func(c consumer) bool { return !slices.Contains(s.events(), c.event) })
}

// replicas of a stream in a cluster: one of them has one.
func replicas(nodes int, stream string) int {
	if nodes == 1 || stream == "QUEUE" {
		return 1
	}
	return nodes
}

func readSchedule(file string) (*schedule, error) {
	b, err := os.ReadFile(file) //nolint:gosec // as asked
	if err != nil {
		return nil, err
	}
	s := &schedule{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	return s, nil
}

func (s *schedule) write(file string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(b, '\n'), 0o600)
}

// with returns the schedule with other faults.
func (s *schedule) with(faults []fault) *schedule {
	c := *s
	c.Faults = slices.Clone(faults)
	return &c
}

// A profile weighs what a round is about.
type profile struct {
	name     string
	attempts int
	mix      map[string]int
	faults   map[string]int // how many of each kind
}

// Every round has some of everything; profiles lean to one side.
func profiles() []profile {
	base := func(more map[string]int) map[string]int {
		m := map[string]int{
			kindRetry: 40, kindSlow: 4, kindFlip: 4, kindGateway: 20, kindPermanent: 20, kindFail: 6, kindPanic: 6, kindTerm: 10,
			kindNak: 6, kindPoison: 1, kindUndecodable: 15,
		}
		maps.Copy(m, more)
		return m
	}
	return []profile{
		{"mixed", 5, base(nil), map[string]int{
			faultKill: 4, faultStop: 3, faultTerm: 2, faultCut: 2, faultStall: 1, faultKillServer: 2, faultStopServer: 1, faultDLQ: 1,
			faultGateway: 1, faultReplay: 3, faultKillReplay: 1,
		}},
		{"full", 5, base(map[string]int{kindPoison: 0, kindPermanent: 60, kindTerm: 30}), map[string]int{
			faultDLQ: 3, faultKill: 2, faultTerm: 1, faultReplay: 4, faultGateway: 1,
		}},
		{"poison", 5, base(map[string]int{kindPoison: 5, kindPanic: 10, kindFail: 10}), map[string]int{
			faultKill: 1, faultTerm: 1, faultReplay: 2, faultGateway: 1,
		}},
		{"upgrade", 20, base(map[string]int{kindLate: 15, kindPoison: 0}), map[string]int{
			faultUpgrade: 1, faultKill: 2, faultStop: 1, faultTerm: 1, faultReplay: 2, faultDLQ: 1, faultGateway: 1,
		}},
		{"servers", 5, base(map[string]int{kindPermanent: 60, kindGateway: 80, kindPoison: 0}), map[string]int{
			faultKillServer: 6, faultStopServer: 1, faultRoll: 1, faultCutNode: 2, faultStallNode: 1, faultDisk: 1, faultReplay: 3,
			faultGateway: 3, faultCut: 1, faultKill: 2,
		}},
		{"stops", 5, base(map[string]int{kindFlip: 20, kindSlow: 10, kindPoison: 0}), map[string]int{
			faultStop: 8, faultStall: 3, faultCut: 3, faultReplay: 2, faultTerm: 1, faultGateway: 1,
		}},
	}
}

// newSchedule makes a round of a run.
func newSchedule(seed uint64, round int, o options) *schedule {
	s := &schedule{Seed: seed, Round: round, Instances: 2, Publishers: 2, Messages: (o.messages + 1) / 2, Rate: o.rate, Nodes: 1}
	r := s.random("schedule")
	all := profiles()
	p := all[(int(seed%1000)+round)%len(all)]
	if i := slices.IndexFunc(all, func(p profile) bool { return p.name == o.profile }); i >= 0 {
		p = all[i]
	}
	s.Profile, s.Attempts, s.Mix = p.name, p.attempts, p.mix
	if s.Rate == 0 {
		s.Rate = []int{15, 30, 100, 200}[r.IntN(4)]
	}
	if o.nodes == 0 && r.IntN(2) == 0 || o.nodes == 3 {
		s.Nodes = 3
	}
	kinds := make([]string, 0, len(p.faults))
	for kind := range p.faults {
		kinds = append(kinds, kind)
	}
	slices.Sort(kinds)
	for _, kind := range kinds {
		for range p.faults[kind] {
			if f, ok := s.newFault(r, kind); ok {
				s.Faults = append(s.Faults, f)
			}
		}
	}
	if slices.ContainsFunc(s.Faults, func(f fault) bool { return f.Kind == faultDisk }) {
		s.Disk = 96
	}
	return s
}

// newFault draws when and whom a fault meets. It reports false if the kind does not
// exist with these servers.
func (s *schedule) newFault(r *rand.Rand, kind string) (fault, bool) {
	published := s.published()
	at := func(from, to int) trigger { // in percent of what is published
		return trigger{countAcked, published * (from + r.IntN(to-from)) / 100}
	}
	some := func(least, most int) trigger { return trigger{countBegun, least + r.IntN(most-least)} }
	f := fault{Kind: kind, At: at(3, 95)}
	worker := fmt.Sprintf("consumer%d", 1+r.IntN(s.Instances))
	process := worker
	if r.IntN(4) == 0 {
		process = fmt.Sprintf("%s%d", publisherName, 1+r.IntN(s.Publishers))
	}
	node := fmt.Sprintf("node%d", 1+r.IntN(s.Nodes))
	switch kind {
	case faultKill:
		f.Target = process
	case faultTerm:
		f.Target = worker
	case faultStop:
		f.Target, f.For = worker, duration(ackWait/4)
		if r.IntN(3) > 0 {
			f.For = duration(2 * ackWait)
		}
		if s.Mix[kindFlip] > 0 && r.IntN(2) == 0 { // while it works on one that it will give up
			f.Target, f.At = "last", trigger{countBegun + ":" + kindFlip, 1 + r.IntN(1+published*s.Mix[kindFlip]/1000)}
			f.For = duration(2 * ackWait)
		}
	case faultCut, faultStall:
		f.Target, f.Until = process, some(20, 200)
	case faultKillServer, faultStopServer:
		f.Target = node
		if r.IntN(2) == 0 { // just after something was captured
			f.At = trigger{countCaptured, 5 + r.IntN(1+published/20)}
		}
		if kind == faultStopServer {
			f.For = duration(ackWait)
		} else if r.IntN(2) == 0 {
			f.Until = trigger{countFailed, 1 + r.IntN(3)}
		}
	case faultRoll:
		if s.Nodes == 1 {
			f.Target = node
		}
	case faultCutNode, faultStallNode:
		f.Target, f.Until = node, some(20, 200)
		return f, s.Nodes > 1
	case faultDisk:
		f.Until = trigger{countFailed, 2 + r.IntN(4)}
		return f, s.Nodes == 1
	case faultDLQ:
		f.At, f.Until = at(5, 80), some(100, 600)
		if r.IntN(2) == 0 {
			f.Target = "bytes"
		}
	case faultGateway:
		f.Until = some(50, 400)
	case faultUpgrade:
		f.At = at(30, 70)
	case faultReplay:
		f.At, f.Count = at(15, 95), 5+r.IntN(40)
	case faultKillReplay:
		f.At = trigger{countReplayed, 1 + r.IntN(10)}
	}
	return f, true
}
