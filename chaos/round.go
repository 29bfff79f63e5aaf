package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq/triage"
)

// binaries are the programs of a run.
type binaries struct {
	self, server, monotel string
}

// A round runs one schedule.
type round struct {
	schedule *schedule
	bin      binaries
	dir      string
	say      func(format string, args ...any)

	servers  *servers
	counters *counters
	members  []*member
	tool     []*link // of monotel dlq
	result   *result

	deadLetters sync.Mutex // one change of its limits at a time

	mu           sync.Mutex
	replaying    *process
	disturbances []disturbance
	upgraded     bool
}

// A disturbance is what may explain that a message was handled again.
type disturbance struct {
	Kind    string    `json:"kind"`
	Process string    `json:"process,omitempty"` // a life, such as consumer1.3, or all of a member, consumer1; empty: everybody
	From    time.Time `json:"from"`
	To      time.Time `json:"to"`
}

// of reports whether the disturbance met a process.
func (d *disturbance) of(process string) bool {
	return d.Process == "" || d.Process == process || strings.HasPrefix(process, d.Process+".")
}

// note adds a disturbance that a journal tells of.
func (r *round) note(draft bool, d disturbance) {
	if !draft {
		r.mu.Lock()
		r.disturbances = append(r.disturbances, d)
		r.mu.Unlock()
	}
}

func (r *round) disturbed(kind, process string, from time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.disturbances = append(r.disturbances, disturbance{kind, process, from, time.Now()})
}

// A member is a consumer or a publisher: one process after another.
type member struct {
	name  string
	links []*link // to each node

	stops, cuts sync.Mutex // one at a time: the end of one would end the other

	mu      sync.Mutex
	process *process
	life    int
	told    time.Time // when it was told to end
	ending  bool
	done    chan struct{} // there is no further process
}

func (m *member) current() (name string, p *process) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return fmt.Sprintf("%s.%d", m.name, m.life), m.process
}

func (m *member) addrs() []string {
	all := make([]string, len(m.links))
	for i, k := range m.links {
		all[i] = k.addr()
	}
	return all
}

func (r *round) newLinks(ctx context.Context) ([]*link, error) {
	all := make([]*link, 0, len(r.servers.nodes))
	for _, nd := range r.servers.nodes {
		k, err := newLink(ctx, nd.addr())
		if err != nil {
			return all, err
		}
		all = append(all, k)
	}
	return all, nil
}

const (
	publisherName = "publisher"
	consumerName  = "consumer"
)

// runRound returns an error if the harness itself has failed.
func runRound(ctx context.Context, s *schedule, bin binaries, dir string, say func(string, ...any)) (res *result, err error) {
	r := &round{schedule: s, bin: bin, dir: dir, say: say, result: &result{Schedule: s, Dir: dir}}
	begin := time.Now()
	if err := os.MkdirAll(r.path("journal"), 0o700); err != nil {
		return nil, err
	}
	if err := s.write(r.path("schedule.json")); err != nil {
		return nil, err
	}
	var store *disk
	if s.Disk > 0 {
		if store, err = mountDisk(r.path("disk"), s.Disk); err != nil {
			say("NO FULL DISKS in this round: %v", err)
			r.result.NoDisk = true
		} else {
			defer func() { err = errors.Join(err, store.unmount()) }()
		}
	}
	if r.servers, err = startServers(ctx, bin.server, dir, s.Nodes, store); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, r.servers.stop()) }()
	r.counters = newCounters(r.path("journal"))
	defer r.stopMembers()
	watching, stopWatching := context.WithCancel(ctx)
	var watch sync.WaitGroup
	watch.Go(func() { r.counters.pump(watching) })
	watch.Go(func() { r.watchServers(watching) })
	defer watch.Wait()
	defer stopWatching()
	if err := r.start(ctx); err != nil {
		return nil, err
	}
	r.inject(ctx)
	if err := r.heal(ctx); err != nil {
		return nil, err
	}
	r.drain(ctx)
	r.stopMembers()
	stopWatching() // what has disturbed whom is complete
	watch.Wait()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err := r.counters.err(); err != nil {
		return nil, err
	}
	r.result.Took = time.Since(begin)
	return r.result, r.reconcile(ctx)
}

func (r *round) path(name string) string { return filepath.Join(r.dir, name) }

// start starts the first consumer, which makes the streams, and then the others.
func (r *round) start(ctx context.Context) (err error) {
	if r.tool, err = r.newLinks(ctx); err != nil {
		return err
	}
	for i := range r.schedule.Instances {
		if err := r.addMember(ctx, fmt.Sprintf("%s%d", consumerName, i+1)); err != nil {
			return err
		}
		// Streams are made by one at a time.
		if !r.counters.wait(ctx, trigger{"started", i + 1}, 2*time.Minute) {
			return fmt.Errorf("consumer %d does not start, see %s", i+1, r.dir)
		}
	}
	for i := range max(r.schedule.Publishers, 1) {
		if err := r.addMember(ctx, fmt.Sprintf("%s%d", publisherName, i+1)); err != nil {
			return err
		}
	}
	return nil
}

func (r *round) addMember(ctx context.Context, name string) error {
	links, err := r.newLinks(ctx)
	if err != nil {
		return err
	}
	m := &member{name: name, links: links, done: make(chan struct{})}
	r.members = append(r.members, m)
	if err := r.startLife(m); err != nil {
		close(m.done)
		return err
	}
	go r.supervise(ctx, m)
	return nil
}

var errEnding = errors.New("the round is over")

func (r *round) startLife(m *member) error {
	r.mu.Lock()
	upgraded := r.upgraded
	r.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ending {
		return errEnding
	}
	m.life++
	life := fmt.Sprintf("%s.%d", m.name, m.life)
	j := job{
		Schedule: *r.schedule, URL: r.servers.url(m.addrs()...), Journal: filepath.Join(r.path("journal"), life+".jsonl"),
		Gateway: r.path("gateway-down"), Upgraded: upgraded, From: r.counters.next(m.name),
	}
	j.Schedule.Faults = nil
	file := r.path(life + ".job")
	if err := j.write(file); err != nil {
		return err
	}
	command := "consume"
	if strings.HasPrefix(m.name, publisherName) {
		command = "publish"
	}
	var err error
	m.told = time.Time{}
	m.process, err = startProcess(r.path(life+".log"), r.bin.self, []string{childVariable + "=1"}, command, file)
	return err
}

// supervise starts a process again when it has ended, as an orchestrator does.
func (r *round) supervise(ctx context.Context, m *member) {
	defer close(m.done)
	for {
		name, p := m.current()
		begin := time.Now()
		<-p.ended
		m.mu.Lock()
		ending, told := m.ending, m.told
		m.mu.Unlock()
		code := p.code()
		kind := r.result.ended(name, code, !told.IsZero(), ending)
		if told.IsZero() {
			told = time.Now()
		}
		r.disturbed(kind, name, told)
		if ending || code == 0 && strings.HasPrefix(m.name, publisherName) {
			return
		}
		if code == exitStart && time.Since(begin) < time.Second { // the servers are away
			wait(ctx, 500*time.Millisecond)
		}
		if err := r.startLife(m); errors.Is(err, errEnding) {
			return
		} else if err != nil {
			r.result.find(finding{Class: "process_ended", Detail: fmt.Sprintf("%s does not start again: %v", m.name, err)})
			return
		}
	}
}

func (r *round) stopMembers() {
	var all sync.WaitGroup
	for _, m := range r.members {
		all.Go(func() {
			if err := r.endMember(m); err != nil {
				r.result.find(finding{Class: "stop_failed", Detail: fmt.Sprintf("%s: %v", m.name, err)})
			}
			for _, k := range m.links {
				k.close()
			}
		})
	}
	all.Wait()
	for _, k := range r.tool {
		k.close()
	}
}

// endMember ends a member for good. It may be called again.
func (r *round) endMember(m *member) error {
	m.mu.Lock()
	if m.ending {
		m.mu.Unlock()
		<-m.done
		return nil
	}
	m.ending, m.told = true, time.Now()
	p := m.process
	m.mu.Unlock()
	p.signal(syscall.SIGCONT)
	err := p.end(syscall.SIGTERM, orderly+10*time.Second)
	<-m.done
	return err
}

// slowServer is a disturbance.
const slowServer = "slow-server"

// watchServers counts dead letters, and notes when servers take long to answer: leases
// may end meanwhile.
func (r *round) watchServers(ctx context.Context) {
	const slow = 400 * time.Millisecond
	for ctx.Err() == nil {
		begin := time.Now()
		n, err := r.captured(ctx)
		if took := time.Since(begin); took > slow || err != nil {
			r.disturbed(slowServer, "", begin)
		}
		if err == nil {
			r.counters.set(countCaptured, n)
		}
		wait(ctx, 20*time.Millisecond)
	}
}

const deadLetters = "DLQ"

func (r *round) captured(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	s, err := r.servers.js.Stream(ctx, deadLetters)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return int(s.CachedInfo().State.Msgs), nil //nolint:gosec // a few thousand
}

// heal waits until the servers are back, and goes on with what operators have begun.
func (r *round) heal(ctx context.Context) error {
	for _, nd := range r.servers.nodes {
		if err := r.servers.ready(ctx, nd); err != nil {
			return fmt.Errorf("%s is not back: %w", nd.name, err)
		}
	}
	return r.resumeOperations(ctx)
}

// resumeOperations goes on with replays whose tool was killed.
func (r *round) resumeOperations(ctx context.Context) error {
	var ops []*triage.Operation
	err := until(ctx, time.Minute, func(ctx context.Context) error {
		desk, err := triage.Open(ctx, r.servers.nc, triage.Config{})
		if err != nil {
			return err
		}
		ops, err = desk.Operations(ctx)
		return err
	})
	if err != nil {
		r.say("operations: %v", err)
		return nil
	}
	for _, op := range ops {
		if op.Status == triage.StatusDone || op.Status == triage.StatusCancelled || op.Status == triage.StatusPlanned {
			continue
		}
		err := until(ctx, 2*time.Minute, func(context.Context) error {
			code, err := r.runTool(ctx, "ops", "resume", op.ID)
			if err == nil && code != 0 && code != 3 { //nolint:mnd // 3: some have failed again
				err = fmt.Errorf("exit code %d", code)
			}
			return err
		})
		if err != nil {
			text := fmt.Sprintf("operation %s, which is %s: %v", op.ID, op.Status, err)
			r.result.find(finding{Class: "operation_not_resumed", Detail: text})
		}
	}
	return nil
}

// runTool runs monotel dlq.
func (r *round) runTool(ctx context.Context, args ...string) (code int, err error) {
	addrs := make([]string, len(r.tool))
	for i, k := range r.tool {
		addrs[i] = k.addr()
	}
	env := []string{"NATS_URL=" + r.servers.url(addrs...)}
	p, err := startProcess(r.path("monotel.log"), r.bin.monotel, env, append([]string{"dlq"}, args...)...)
	if err != nil {
		return 0, err
	}
	r.mu.Lock()
	r.replaying = p
	r.mu.Unlock()
	const limit = 40 * time.Second
	t := time.NewTimer(limit)
	defer t.Stop()
	select {
	case <-p.ended:
	case <-t.C:
		err = p.end(syscall.SIGINT, 10*time.Second) // it pauses
	case <-ctx.Done():
		err = p.end(syscall.SIGKILL, time.Second)
	}
	return p.code(), err
}

// A backlog is what is still to be done, by stream and consumer.
type backlog map[string]uint64

func (r *round) backlog(ctx context.Context) (backlog, error) {
	b := backlog{}
	for s := range r.streams(ctx) {
		for _, src := range s.Sources {
			b[s.Config.Name+" sources "+src.Name] = src.Lag
		}
		stream, err := r.servers.js.Stream(ctx, s.Config.Name)
		if err != nil {
			return nil, err
		}
		list := stream.ListConsumers(ctx)
		for c := range list.Info() {
			if c.Config.Durable == "" {
				continue // a reader of the tool
			}
			b[s.Config.Name+"/"+c.Name] = c.NumPending + uint64(c.NumAckPending) //nolint:gosec // it is no less than 0
		}
		if list.Err() != nil {
			return nil, list.Err()
		}
	}
	if len(b) == 0 {
		return nil, errors.New("no consumers")
	}
	return b, nil
}

func (r *round) streams(ctx context.Context) <-chan *jetstream.StreamInfo {
	return r.servers.js.ListStreams(ctx).Info()
}

func (b backlog) sum() (n uint64) {
	for _, v := range b {
		n += v
	}
	return n
}

// drain waits until there is nothing to do. What stays is a finding.
func (r *round) drain(ctx context.Context) {
	const still, most, settled = 100 * time.Second, 6 * time.Minute, 3
	begin, moved := time.Now(), time.Now()
	last, lastBegun, empty := backlog{}, -1, 0
	for ctx.Err() == nil && empty < settled {
		attempt, cancel := context.WithTimeout(ctx, 5*time.Second)
		b, err := r.backlog(attempt)
		cancel()
		begun := r.counters.get(countBegun)
		switch {
		case err != nil:
			empty = 0
		case b.sum() == 0:
			empty++
		default:
			empty = 0
		}
		if err == nil && (b.sum() != last.sum() || begun != lastBegun) {
			last, lastBegun, moved = b, begun, time.Now()
		}
		if time.Since(moved) > still || time.Since(begin) > most {
			r.stuck(ctx, last)
			return
		}
		// What a stream has not yet read from its source is in no backlog.
		if empty == settled && r.incomplete(ctx) {
			empty = 0
		}
		wait(ctx, 200*time.Millisecond)
	}
}

// incomplete reports whether something is still to be handled, as far as that can be read.
func (r *round) incomplete(ctx context.Context) bool {
	l, err := r.readLedger(ctx, true)
	if err != nil {
		r.say("read what was done so far: %v", err)
		return true
	}
	return len(l.missing()) > 0
}

// stuck writes down what the servers say of each consumer.
func (r *round) stuck(ctx context.Context, b backlog) {
	var all []any
	for s := range r.streams(ctx) {
		all = append(all, s)
		stream, err := r.servers.js.Stream(ctx, s.Config.Name)
		if err != nil {
			continue // others may be of use
		}
		for c := range stream.ListConsumers(ctx).Info() {
			all = append(all, c)
		}
	}
	text, err := json.MarshalIndent(all, "", "  ")
	if err == nil {
		err = os.WriteFile(r.path("stuck.json"), text, 0o600)
	}
	if err != nil {
		r.say("stuck.json: %v", err)
	}
	for name, n := range b {
		if n > 0 {
			r.result.find(finding{Class: "stuck", Detail: fmt.Sprintf("%s has %d messages left, see stuck.json", name, n)})
		}
	}
}
