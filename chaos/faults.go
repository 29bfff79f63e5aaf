package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// longest is more than a round takes.
const longest = time.Hour

// inject lets each fault begin and end. It returns when everything is published, nothing
// more is handled, and no fault is left.
func (r *round) inject(ctx context.Context) {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	var faults sync.WaitGroup
	var active atomic.Int64
	for i, f := range r.schedule.Faults {
		faults.Go(func() {
			if !r.counters.wait(waiting, f.At, longest) {
				r.result.fault(f, "not reached")
				return
			}
			active.Add(1)
			defer active.Add(-1)
			begin := time.Now()
			r.say("fault %d: %s", i+1, f)
			err := r.apply(ctx, f)
			switch {
			case err != nil:
				r.result.fault(f, "failed: "+err.Error())
				r.say("fault %d: %v", i+1, err)
			default:
				r.result.fault(f, "")
			}
			r.say("fault %d: over after %v", i+1, time.Since(begin).Round(time.Millisecond))
		})
	}
	for _, m := range r.members {
		if strings.HasPrefix(m.name, publisherName) {
			r.awaitPublisher(ctx, m)
		}
	}
	r.quiet(ctx, &active)
	cancel()
	faults.Wait()
}

// awaitPublisher waits until a publisher is through. One that publishes nothing for longer
// than any fault lasts is a finding, and is ended.
func (r *round) awaitPublisher(ctx context.Context, m *member) {
	const still = 3 * time.Minute
	last, since := -1, time.Now()
	for ctx.Err() == nil {
		select {
		case <-m.done:
			return
		default:
		}
		if n := r.counters.get(countAcked); n != last {
			last, since = n, time.Now()
		}
		if time.Since(since) > still {
			r.result.find(finding{Class: "publish_stuck", Detail: fmt.Sprintf("%s: nothing was acknowledged for %v", m.name, still)})
			if err := r.endMember(m); err != nil {
				r.say("%v", err)
			}
			return
		}
		wait(ctx, 100*time.Millisecond)
	}
}

// quiet waits until nothing has begun for a while, and no fault keeps it from that.
func (r *round) quiet(ctx context.Context, active *atomic.Int64) {
	const still = 3 * time.Second
	last, since := -1, time.Now()
	for ctx.Err() == nil && time.Since(since) < still {
		if n := r.counters.get(countBegun); n != last || active.Load() > 0 {
			last, since = n, time.Now()
		}
		wait(ctx, 50*time.Millisecond)
	}
}

// hold waits for the end of a fault.
func (r *round) hold(ctx context.Context, f fault) {
	if f.For > 0 {
		wait(ctx, time.Duration(f.For))
		return
	}
	if f.Until.N > 0 {
		r.counters.wait(ctx, trigger{f.Until.Counter, r.counters.get(f.Until.Counter) + f.Until.N}, faultBound)
	}
}

func (r *round) apply(ctx context.Context, f fault) error {
	switch f.Kind {
	case faultKill, faultTerm, faultStop:
		return r.signalMember(ctx, f)
	case faultCut, faultStall:
		m := r.member(f.Target)
		m.cuts.Lock()
		defer m.cuts.Unlock()
		return r.breakLinks(ctx, f, m.name, m.links)
	case faultKillServer, faultStopServer, faultRoll, faultDisk, faultCutNode, faultStallNode:
		r.servers.mu.Lock() // one at a time: of three nodes, two stay
		defer r.servers.mu.Unlock()
		return r.disturbServers(ctx, f)
	case faultDLQ:
		return r.fillDeadLetters(ctx, f)
	case faultGateway:
		file := r.path("gateway-down")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			return err
		}
		r.hold(ctx, f)
		return os.Remove(file)
	case faultUpgrade:
		return r.upgrade(ctx)
	case faultReplay:
		code, err := r.runTool(ctx, "replay", "--all", "--limit", strconv.Itoa(f.Count), "--yes", "--quiet", "--max-replays", "4")
		if err == nil && code != 0 && code != 3 { //nolint:mnd // 3: some failed again
			r.say("monotel dlq replay: exit code %d", code)
		}
		return err
	case faultKillReplay:
		r.mu.Lock()
		p := r.replaying
		r.mu.Unlock()
		if p != nil {
			p.signal(syscall.SIGKILL)
		}
		return nil
	}
	return fmt.Errorf("unknown fault %q", f.Kind)
}

func (r *round) member(name string) *member {
	if name == "last" {
		name = r.counters.lastBegun(kindFlip)
	}
	for _, m := range r.members {
		if m.name == name {
			return m
		}
	}
	return r.members[0]
}

// tell says that the process is about to get a signal that ends it.
func (m *member) tell() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.told.IsZero() {
		m.told = time.Now()
	}
}

func (r *round) signalMember(ctx context.Context, f fault) error {
	m := r.member(f.Target)
	if f.Kind == faultStop {
		m.stops.Lock()
		defer m.stops.Unlock()
	}
	name, p := m.current()
	switch f.Kind {
	case faultKill:
		m.tell()
		p.signal(syscall.SIGKILL)
	case faultTerm:
		m.tell()
		return p.end(syscall.SIGTERM, orderly+10*time.Second)
	case faultStop:
		begin := time.Now()
		p.signal(syscall.SIGSTOP)
		r.hold(ctx, f)
		p.signal(syscall.SIGCONT)
		r.disturbed(f.Kind, name, begin)
	}
	return nil
}

func (r *round) breakLinks(ctx context.Context, f fault, who string, links []*link) error {
	state := linkCut
	if f.Kind == faultStall || f.Kind == faultStallNode {
		state = linkStalled
	}
	begin := time.Now()
	for _, k := range links {
		k.set(state)
	}
	r.hold(ctx, f)
	for _, k := range links {
		k.set(linkOpen)
	}
	r.disturbed(f.Kind, who, begin)
	return nil
}

func (r *round) disturbServers(ctx context.Context, f fault) error {
	s := r.servers
	nd := s.node(f.Target)
	begin := time.Now()
	if f.Kind == faultCutNode || f.Kind == faultStallNode {
		return r.breakLinks(ctx, f, "", nd.links)
	}
	defer func() { r.disturbed(f.Kind, "", begin) }()
	switch f.Kind {
	case faultKillServer:
		nd.process.signal(syscall.SIGKILL)
		<-nd.process.ended
		r.hold(ctx, f)
		return s.again(ctx, nd)
	case faultStopServer:
		nd.process.signal(syscall.SIGSTOP)
		r.hold(ctx, f)
		nd.process.signal(syscall.SIGCONT)
		return s.ready(ctx, nd)
	case faultRoll:
		for _, nd := range s.nodes {
			if err := nd.process.end(syscall.SIGTERM, 30*time.Second); err != nil {
				return err
			}
			if err := s.again(ctx, nd); err != nil {
				return err
			}
		}
		return nil
	case faultDisk:
		if s.disk == nil {
			return errors.New("there is no small file system")
		}
		if err := s.disk.fill(); err != nil {
			return err
		}
		r.hold(ctx, f)
		if err := s.disk.empty(); err != nil {
			return err
		}
		// What could not write stays frozen until the server starts again.
		if err := nd.process.end(syscall.SIGTERM, 10*time.Second); err != nil {
			r.say("%v", err)
		}
		return s.again(ctx, nd)
	}
	return fmt.Errorf("unknown fault of servers %q", f.Kind)
}

func (s *servers) again(ctx context.Context, nd *node) error {
	if err := s.start(nd); err != nil {
		return err
	}
	return s.ready(ctx, nd)
}

// fillDeadLetters lowers the limits of the dead-letter stream to what it holds.
func (r *round) fillDeadLetters(ctx context.Context, f fault) error {
	r.deadLetters.Lock()
	defer r.deadLetters.Unlock()
	limit := func(set func(msgs *int64, bytes *int64, haveMsgs, haveBytes int64)) error {
		return until(ctx, time.Minute, func(ctx context.Context) error {
			s, err := r.servers.js.Stream(ctx, deadLetters)
			if err != nil {
				return err
			}
			cfg, state := s.CachedInfo().Config, s.CachedInfo().State
			set(&cfg.MaxMsgs, &cfg.MaxBytes, int64(max(state.Msgs, 1)), int64(max(state.Bytes, 1))) //nolint:gosec // small
			_, err = r.servers.js.UpdateStream(ctx, cfg)
			return err
		})
	}
	var was int64
	err := limit(func(msgs, bytes *int64, haveMsgs, haveBytes int64) {
		what, have := msgs, haveMsgs
		if f.Target == "bytes" {
			what, have = bytes, haveBytes
		}
		if was == 0 {
			was = *what
		}
		*what = have
	})
	if err != nil {
		return err
	}
	r.hold(ctx, f)
	return limit(func(msgs, bytes *int64, _, _ int64) {
		if f.Target == "bytes" {
			msgs = bytes
		}
		*msgs = was
	})
}

// upgrade replaces one instance after the other.
func (r *round) upgrade(ctx context.Context) error {
	r.mu.Lock()
	r.upgraded = true
	r.mu.Unlock()
	for _, m := range r.members {
		if !strings.HasPrefix(m.name, consumerName) {
			continue
		}
		_, p := m.current()
		started := r.counters.get("started")
		m.tell()
		if err := p.end(syscall.SIGTERM, orderly+10*time.Second); err != nil {
			return err
		}
		r.counters.wait(ctx, trigger{"started", started + 1}, faultBound)
	}
	return nil
}
