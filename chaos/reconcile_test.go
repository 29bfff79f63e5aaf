package main

import (
	"slices"
	"testing"
	"time"

	"github.com/monotel/monotel/dlq"
)

// A story is what happened to one message of one consumer, in seconds.
type story struct {
	handlings    []*handling
	record       float64 // when it was captured; 0: it was not
	reason       dlq.Reason
	text         string
	disturbances []disturbance
}

var epoch = time.Unix(1_800_000_000, 0)

func at(seconds float64) time.Time { return epoch.Add(time.Duration(seconds * float64(time.Second))) }

// handled is a handling that took a tenth of a second.
func handled(process string, attempt uint64, from float64, outcome string) *handling {
	h := &handling{outcome: outcome, style: single}
	h.process, h.Time, h.Attempt, h.Max, h.Durable, h.Seq = process, at(from).UnixNano(), attempt, 5, "audit", 1
	if outcome != "" {
		h.end = at(from + 0.1)
		h.returned = outcome
		if outcome != outcomePanic {
			h.returned = outcomeOK
		}
	}
	return h
}

func disturbedAt(kind, process string, from, to float64) disturbance {
	return disturbance{kind, process, at(from), at(to)}
}

// Each rule finds what it is for, and nothing where a repeat is allowed.
func TestLedger(t *testing.T) {
	t.Parallel()
	ids := idsByKind(t)
	for name, tt := range map[string]struct {
		kind  string
		story story
		want  []string
		count string // that is to be 1
	}{
		"handled": {kindOK, story{handlings: []*handling{handled("consumer1.1", 1, 1, outcomeOK)}}, nil, "success"},
		"lost":    {kindOK, story{}, []string{"lost"}, ""},
		"killed in the handler, and lost": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, "")},
				disturbances: []disturbance{disturbedAt(endKill, "consumer1.1", 1.1, 1.1)},
			},
			[]string{"lost"},
			"",
		},
		"repeated for no reason": {
			kindOK,
			story{handlings: []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 3.2, outcomeOK)}},
			[]string{"success_repeated"},
			"",
		},
		"repeated after a kill": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 3.2, outcomeOK)},
				disturbances: []disturbance{disturbedAt(endKill, "consumer1.1", 1.1, 1.2)},
			},
			nil, "repeat:kill",
		},
		"repeated after a kill that was too late for that": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 9, outcomeOK)},
				disturbances: []disturbance{disturbedAt(endKill, "consumer1.1", 5, 5)},
			},
			[]string{"success_repeated"},
			"",
		},
		"repeated after a kill of somebody else": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 3.2, outcomeOK)},
				disturbances: []disturbance{disturbedAt(endKill, "publisher1.1", 1.1, 1.2)},
			},
			[]string{"success_repeated"},
			"",
		},
		"repeated after an orderly stop": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 3.2, outcomeOK)},
				disturbances: []disturbance{disturbedAt(endTerm, "consumer1.1", 1.2, 1.3)},
			},
			[]string{"success_repeated"},
			"",
		},
		"repeated after the server was killed": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 1, 9, outcomeOK)},
				disturbances: []disturbance{disturbedAt(faultKillServer, "", 6, 7)},
			},
			nil, "repeat:server",
		},
		"handled by another while its process was stopped": {
			kindOK,
			story{
				handlings:    []*handling{handled("consumer2.1", 2, 3, outcomeOK), handled("consumer1.1", 1, 6, outcomeOK)},
				disturbances: []disturbance{disturbedAt(faultStop, "consumer1.1", 1, 5.5)},
			},
			nil, "repeat:stop",
		},
		"captured": {
			kindPermanent,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent)},
				record:    1.2, reason: dlq.ReasonPermanentError, text: "own",
			},
			nil, "",
		},
		"held, and handled by another": {
			kindPermanent,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent), handled("consumer2.1", 2, 3, outcomePermanent)},
				record:    3.2, reason: dlq.ReasonPermanentError, text: "own",
			},
			[]string{"held_handled_again"},
			"",
		},
		"held, and handled by another after a stop": {
			kindPermanent,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent), handled("consumer2.1", 2, 30, outcomePermanent)},
				record:    30.2, reason: dlq.ReasonPermanentError, text: "own",
				disturbances: []disturbance{disturbedAt(endTerm, "consumer1.1", 20, 21)},
			},
			nil, "",
		},
		"captured, then handled": {
			kindPermanent,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent), handled("consumer2.1", 1, 5, outcomePermanent)},
				record:    1.2, reason: dlq.ReasonPermanentError, text: "own",
				disturbances: []disturbance{disturbedAt(faultKillServer, "", 1.3, 2)},
			},
			[]string{"captured_handled_again"},
			"",
		},
		"stopped, handled by another, and captured": {
			kindFlip,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent), handled("consumer2.1", 2, 3, outcomeOK)},
				record:    6, reason: dlq.ReasonPermanentError, text: "own",
				disturbances: []disturbance{disturbedAt(faultStop, "consumer1.1", 1, 5.5)},
			},
			[]string{"handled_and_dead"},
			"",
		},
		"given up, handled by another whose ack was lost, and captured": {
			kindFlip,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomePermanent), handled("consumer2.1", 2, 3, outcomeOK)},
				record:    6, reason: dlq.ReasonPermanentError, text: "own",
				disturbances: []disturbance{
					disturbedAt(faultStop, "consumer1.1", 1, 5.5), disturbedAt(endKill, "consumer2.1", 3.1, 3.2),
				},
			},
			nil, "success",
		},
		"its ack was lost, and then it was given up": {
			kindGateway,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomeOK), handled("consumer2.1", 2, 4, outcomePermanent)},
				record:    4.2, reason: dlq.ReasonPermanentError, text: "own",
				disturbances: []disturbance{disturbedAt(endKill, "consumer1.1", 1.1, 1.2)},
			},
			nil, "repeat:kill",
		},
		"dead with the error of another": {
			kindOK, story{record: 1, reason: dlq.ReasonAttemptsExhausted, text: "other"}, []string{"innocent_dead"}, "",
		},
		"given up with the error of another": {
			kindFail, story{record: 1, reason: dlq.ReasonAttemptsExhausted, text: "other"}, []string{"wrong_reason"}, "",
		},
		"crashed without a crash": {
			kindFail,
			story{
				handlings: []*handling{handled("consumer1.1", 1, 1, outcomeError)}, record: 3, reason: dlq.ReasonCrashed,
			},
			[]string{"crashed_without_crash"},
			"",
		},
		"cut short three times": {
			kindOK,
			story{
				handlings: []*handling{
					handled("consumer1.1", 1, 1, ""), handled("consumer1.2", 2, 4, ""), handled("consumer1.3", 3, 7, ""),
				},
				record: 9, reason: dlq.ReasonCrashed,
			},
			nil, "crashed-by-kills",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &round{schedule: testSchedule(), result: &result{}, disturbances: tt.story.disturbances}
			got := reconcileStory(r, ids[tt.kind], &tt.story)
			if !slices.Equal(got, tt.want) {
				t.Errorf("found %v, want %v: %+v", got, tt.want, r.result.Findings)
			}
			if tt.count != "" && r.result.Counts[tt.count] != 1 {
				t.Errorf("%s is %d, want 1: %v", tt.count, r.result.Counts[tt.count], r.result.Counts)
			}
		})
	}
}

func testSchedule() *schedule {
	return &schedule{Seed: 1, Round: 1, Nodes: 1, Events: []string{"Limit"}, Mix: map[string]int{
		kindPermanent: 100, kindFail: 100, kindFlip: 100, kindGateway: 100,
	}}
}

// idsByKind finds a payload of each kind for one consumer.
func idsByKind(t *testing.T) map[string]string {
	t.Helper()
	ids := make(map[string]string)
	for n := range 1000 {
		id := "publisher1-Limit-" + time.Duration(n).String()
		if kind := testSchedule().decide(id, "audit", 0).kind; ids[kind] == "" {
			ids[kind] = id
		}
	}
	return ids
}

// reconcileStory judges a message of one consumer, as if another had handled it well.
func reconcileStory(r *round, id string, s *story) []string {
	here := place{"audit", 1, id}
	l := &ledger{
		r: r, consumers: map[string]consumer{}, acked: map[string]uint64{id: 1}, tried: map[string]time.Time{id: at(0.5)},
		handlings: make(map[place][]*handling), payloads: make(map[string]map[string][]uint64),
		records: make(map[place][]*deadLetter), byID: make(map[string]*deadLetter),
	}
	for _, c := range r.schedule.consumers() {
		if c.durable != here.durable {
			other := handled("consumer1.1", 1, 0.6, outcomeOK)
			l.handlings[place{c.durable, 1, id}] = []*handling{other}
			l.payloads[c.durable] = map[string][]uint64{id: {1}}
		}
	}
	for _, h := range s.handlings {
		h.ID = id
	}
	if len(s.handlings) > 0 {
		l.handlings[here] = s.handlings
		l.payloads[here.durable] = map[string][]uint64{id: {1}}
	}
	if s.record > 0 {
		rec := &dlq.Record{Reason: s.reason, Consumer: here.durable, StreamSequence: 1, Error: s.text}
		if s.text == "own" {
			rec.Error = "broken: " + id + " of audit"
		}
		l.records[here] = []*deadLetter{{Record: rec, id: id, at: at(s.record)}}
	}
	l.checkPublishes()
	if len(s.handlings) > 0 {
		l.checkHandlings(here, s.handlings)
	}
	for here, all := range l.records {
		l.checkRecords(here, all)
	}
	return r.result.classes()
}

// What is published again is stored again only by a stream that removes messages, and
// only if the server was started again in between.
func TestLedger_publishedAgain(t *testing.T) {
	t.Parallel()
	kill := disturbedAt(faultKillServer, "", 2, 3)
	for name, tt := range map[string]struct {
		durable     string
		disturbance disturbance
		want        bool
	}{
		"queue":                  {"bill", kill, true},
		"interest":               {"mail", kill, true},
		"limits":                 {"audit", kill, false},
		"a node after another":   {"bill", disturbedAt(faultRoll, "", 2, 3), true},
		"the server stood still": {"bill", disturbedAt(faultStopServer, "", 2, 3), false},
		"killed before":          {"bill", disturbedAt(faultKillServer, "", 0.1, 0.5), false},
		"killed after":           {"bill", disturbedAt(faultKillServer, "", 5, 6), false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := &ledger{
				r: &round{disturbances: []disturbance{tt.disturbance}},
				handlings: map[place][]*handling{
					{tt.durable, 1, "id"}: {handled("consumer1.1", 1, 1, outcomeOK)},
					{tt.durable, 7, "id"}: {handled("consumer1.1", 1, 4, outcomeOK)},
				},
			}
			all := allConsumers()
			c := &all[slices.IndexFunc(all, func(c consumer) bool { return c.durable == tt.durable })]
			if got := l.publishedAgain(c, "id", []uint64{1, 7}); got != tt.want {
				t.Errorf("it may be stored again: %t, want %t", got, tt.want)
			}
		})
	}
}
