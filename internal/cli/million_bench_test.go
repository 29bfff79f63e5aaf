package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/mono/monotest"
)

// millionEnv is how many dead letters the benchmark has; make million has a
// million.
const millionEnv = "MONOTEL_MILLION"

// BenchmarkMillion measures the command, as a process of its own, with many dead
// letters of about 1 KB in the stream: how long it takes, and the most memory that
// it had. The server is in the benchmark's process. Beside it stands how long
// nats.go takes to read the stream from its beginning to its end, headers only.
func BenchmarkMillion(b *testing.B) {
	n := 20_000
	if s := os.Getenv(millionEnv); s != "" {
		var err error
		if n, err = strconv.Atoi(s); err != nil {
			b.Fatal(err)
		}
	}
	exe := filepath.Join(b.TempDir(), "monotel")
	if out, err := exec.CommandContext(b.Context(), "go", "build", "-o", exe, "../../cmd/monotel").CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	server := monotest.Server(b)
	nc := server.Conn()
	js, err := jetstream.New(nc)
	if err != nil {
		b.Fatal(err)
	}
	fillMillion(b, nc, js, n)
	var most float64 // memory of the commands of one benchmark
	monotel := func(b *testing.B, args ...string) (out []byte) {
		b.Helper()
		cmd := exec.CommandContext(b.Context(), exe, append([]string{"dlq"}, args...)...)
		cmd.Env = append(os.Environ(), "NATS_URL="+server.URL())
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		begin := time.Now()
		if err := cmd.Start(); err != nil {
			b.Fatal(err)
		}
		memory := watchMemory(cmd.Process.Pid)
		err := cmd.Wait()
		b.ReportMetric(time.Since(begin).Seconds(), "s") //nolint:forbidigo // a benchmark
		most = max(most, memory())
		b.ReportMetric(most, "MiB")
		if err != nil {
			b.Fatalf("monotel dlq %v: %v\n%s", args, err, stderr.Bytes())
		}
		return stdout.Bytes()
	}
	once := func(name string, f func(b *testing.B)) {
		b.Run(name, func(b *testing.B) {
			most = 0
			for range b.N { // not b.Loop: one run says it, and -benchtime=1x asks for one
				f(b)
			}
			b.ReportMetric(0, "ns/op")
		})
	}
	once("impl=read", func(b *testing.B) {
		begin := time.Now()
		readThrough(b, js, n)
		b.ReportMetric(time.Since(begin).Seconds(), "s") //nolint:forbidigo // a benchmark
		b.ReportMetric(float64(n), "entries")
	})
	once("impl=groups", func(b *testing.B) {
		var groups []struct {
			Count int `json:"count"`
		}
		if err := json.Unmarshal(monotel(b, "groups", "--output", "json"), &groups); err != nil || len(groups) != 3 {
			b.Fatalf("there are %d groups, want 3: %v", len(groups), err)
		}
	})
	once("impl=ls50", func(b *testing.B) { monotel(b, "ls", "--limit", "50") })
	once("impl=where", func(b *testing.B) {
		out := monotel(b, "ls", "--where", `consumer == "billing" && error.contains("order 78 ") && age < duration("9000h")`, "--output", "ndjson")
		if lines := bytes.Count(out, []byte("\n")); lines != 1 {
			b.Fatalf("found %d, want 1", lines)
		}
	})
	once("impl=stats", func(b *testing.B) { monotel(b, "stats") })
	replay := func(b *testing.B, messages int, args ...string) {
		b.Helper()
		var plan struct {
			ID string `json:"plan"`
		}
		out := monotel(b, append([]string{"replay", "--limit", strconv.Itoa(messages), "--all", "--dry-run", "--output", "json"}, args...)...)
		if err := json.Unmarshal(out, &plan); err != nil || plan.ID == "" {
			b.Fatalf("no plan: %v\n%s", err, out)
		}
		monotel(b, "replay", "--plan", plan.ID, "--yes", "--no-wait", "--quiet")
		var op struct {
			Started time.Time `json:"started_at"`
			Ended   time.Time `json:"ended_at"`
			Sent    int       `json:"sent"`
		}
		out = monotel(b, "ops", "show", plan.ID, "--output", "json")
		if err := json.Unmarshal(out, &op); err != nil || op.Sent != messages || op.Ended.IsZero() {
			b.Fatalf("the operation is %+v, %v\n%s", op, err, out)
		}
		b.ReportMetric(float64(messages)/op.Ended.Sub(op.Started).Seconds(), "msg/s")
	}
	once("impl=replay", func(b *testing.B) { replay(b, n/10) })
	for _, rate := range []int{100, 1000, 5000} {
		once("impl=replay"+strconv.Itoa(rate), func(b *testing.B) { replay(b, min(rate*10, n/10), "--rate", strconv.Itoa(rate)+"/s") })
	}
	once("impl=discard", func(b *testing.B) { // last, since it changes what the others read
		const most = 10_000
		monotel(b, "discard", "--all", "--limit", strconv.Itoa(min(most, n/4)), "--yes", "--quiet") //nolint:mnd // of those that are open still
	})
}

// watchMemory looks at the most memory that a process has had, until it has
// ended. What the kernel says of that afterwards includes what its parent had.
func watchMemory(pid int) (mib func() float64) {
	done, most := make(chan struct{}), 0.0
	var watching sync.WaitGroup
	watching.Go(func() {
		tick := time.NewTicker(20 * time.Millisecond) //nolint:mnd // often enough
		defer tick.Stop()
		for {
			if status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)); err == nil {
				_, rest, _ := strings.Cut(string(status), "VmHWM:")
				var kib float64
				if _, err := fmt.Sscan(rest, &kib); err == nil {
					most = max(most, kib/1024) //nolint:mnd // it is in KiB
				}
			}
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	})
	return func() float64 {
		close(done)
		watching.Wait()
		return most
	}
}

// fillMillion stores dead letters of three causes.
func fillMillion(b *testing.B, nc *nats.Conn, js jetstream.JetStream, n int) {
	b.Helper()
	store, err := dlq.NewStore(nc, js, dlq.Config{Stream: jetstream.StreamConfig{MaxBytes: 8 << 30}})
	if err != nil {
		b.Fatal(err)
	}
	if err := store.Provision(b.Context()); err != nil {
		b.Fatal(err)
	}
	created := time.Now().Add(-time.Hour)
	if _, err := js.CreateStream(b.Context(), jetstream.StreamConfig{Name: "ORDERS", Subjects: []string{"orders.>"}, MaxBytes: 8 << 30}); err != nil {
		b.Fatal(err)
	}
	_, err = js.CreateConsumer(b.Context(), "ORDERS", jetstream.ConsumerConfig{Durable: "billing", FilterSubject: "orders.created.v1", AckPolicy: jetstream.AckExplicitPolicy})
	if err != nil {
		b.Fatal(err)
	}
	pad := bytes.Repeat([]byte("x"), 200)
	slots := make(chan error, 1000) //nolint:mnd // as many at a time
	for range cap(slots) {
		slots <- nil
	}
	for i := range n {
		if err := <-slots; err != nil {
			b.Fatal(err)
		}
		r := record(i)
		r.StreamCreated, r.ID, r.Failed = created, dlq.ID("ORDERS", created, "billing", uint64(i)), created.Add(time.Duration(i)*time.Millisecond)
		switch i % 3 {
		case 0:
			r.Error = fmt.Sprintf("charge order %d : dial tcp 10.0.%d.%d:443: connect: connection refused", i, i%200, i%250)
		case 1:
			r.Error = fmt.Sprintf("customer \"No. %d\" has no address", i)
		}
		r.Data = fmt.Appendf(nil, `{"order":%d,"note":%q}`, i, pad)
		go func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), time.Minute)
			defer cancel()
			_, err := store.Capture(ctx, r, nil)
			slots <- err
		}()
	}
	for range cap(slots) {
		if err := <-slots; err != nil {
			b.Fatal(err)
		}
	}
}

func readThrough(b *testing.B, js jetstream.JetStream, n int) {
	b.Helper()
	cons, err := js.OrderedConsumer(b.Context(), "DLQ", jetstream.OrderedConsumerConfig{HeadersOnly: true})
	if err != nil {
		b.Fatal(err)
	}
	all, err := cons.Messages(jetstream.PullMaxMessages(5000)) //nolint:mnd // ten times the default, which is faster
	if err != nil {
		b.Fatal(err)
	}
	defer all.Stop()
	for range n {
		if _, err := all.Next(); err != nil {
			b.Fatal(err)
		}
	}
}
