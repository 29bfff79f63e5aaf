package mono_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
	"github.com/monotel/monotel/mono/monotest"
)

// A stream that does not fit into the store is refused at Start, with advice, and
// the App starts when it is made smaller.
func TestStore_streamDoesNotFit(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	limits := []struct {
		name    string
		store   embedded.Config
		storage jetstream.StorageType
	}{
		{name: "on disk", store: embedded.Config{MaxStore: 10 << 20}, storage: mono.FileStorage},
		{name: "in memory", store: embedded.Config{MaxMemory: 10 << 20}, storage: mono.MemoryStorage},
	}
	for _, tt := range limits {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			start := func(maxBytes int64) (*mono.App, *tally, error) {
				c := newTally()
				cfg := autoAckPlain("S")
				cfg.Stream.MaxBytes, cfg.Stream.Storage = maxBytes, tt.storage
				store := tt.store
				store.StoreDir = dir
				app := makeApp(t, []mono.Option{mono.WithEmbedded(store)}, emitter("shop", e), durableModule("m", e, cfg, c.handle))
				err := app.Start(within(t))
				return app, c, err
			}
			for _, tooLarge := range []int64{0, 11 << 20} {
				_, _, err := start(tooLarge)
				wantError(t, err, mono.ErrStoreFull, `"S"`, "MaxBytes")
			}
			app, c, err := start(5 << 20)
			if err != nil {
				t.Fatal(err)
			}
			publishAll(t, app.Bus(), e, []string{"x"})
			c.waitFor(t, []string{"x"})
		})
	}
}

// A full stream refuses what is published, by every way to publish, and takes it
// again when its consumer has caught up. Nothing that was taken is lost.
func TestStore_streamIsFull(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	queue := mono.StreamConfig{Name: "S", Retention: mono.WorkQueuePolicy}
	byCount, bySize := queue, queue
	byCount.MaxMsgs, bySize.MaxBytes = 40, 4000
	for name, cfg := range map[string]mono.StreamConfig{"MaxMsgs": byCount, "MaxBytes": bySize} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			handled := newTally()
			release := make(chan struct{})
			app := runApp(t, inFolder(t.TempDir()), emitter("shop", e),
				durableModule("m", e, mono.StreamConsumerConfig{Stream: cfg, AutoAck: true},
					func(ctx context.Context, msgs []*mono.Msg) error {
						select {
						case <-release:
							return handled.handle(ctx, msgs)
						case <-ctx.Done():
							return ctx.Err()
						}
					}))
			var taken []string
			var refused error
			for i := range 1000 {
				p := fmt.Sprintf("n%d", i)
				if _, refused = app.Bus().PublishStream(within(t), &mono.Msg{Subject: e.Subject, Data: []byte(p)}); refused != nil {
					break
				}
				taken = append(taken, p)
			}
			if len(taken) < 20 {
				t.Fatalf("only %d events taken", len(taken))
			}
			wantError(t, refused, mono.ErrStoreFull, e.Subject, "MaxBytes")
			msg := &mono.Msg{Subject: e.Subject, Data: []byte("refused")}
			wantError(t, app.Bus().Publish(within(t), msg), mono.ErrStoreFull)
			f, err := app.Bus().PublishStreamAsync(within(t), msg)
			if err == nil {
				_, err = f.Wait(within(t))
			}
			wantError(t, err, mono.ErrStoreFull)

			close(release)
			handled.waitFor(t, taken)
			settled(t, app, "S", "m_shop_created_v1")
			after := payloads("after", 0, 20)
			publishAll(t, app.Bus(), e, after)
			handled.waitFor(t, after)
			if handled.has("refused") {
				t.Error("a refused event was handled")
			}
		})
	}
}

// The work queue of one module is full because its handler stands still. The
// other module goes on, and nothing is lost for the first one.
func TestStore_oneTargetIsFull(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	release := make(chan struct{})
	still, other := newTally(), newTally()
	small := autoAck("SMALL", mono.WorkQueuePolicy)
	small.Stream.MaxMsgs = 40
	opts := inFolder(t.TempDir())
	modules := []mono.Module{
		emitter("shop", e),
		durableModule("still", e, small, func(ctx context.Context, msgs []*mono.Msg) error {
			select {
			case <-release:
				return still.handle(ctx, msgs)
			case <-ctx.Done():
				return ctx.Err()
			}
		}),
		durableModule("other", e, autoAck("OTHER", mono.WorkQueuePolicy), other.handle),
	}
	app := runApp(t, opts, modules...)
	want := payloads("n", 0, 300)
	publishAll(t, app.Bus(), e, want)
	other.waitFor(t, want)
	if n := streamMsgs(t, app, "SMALL"); n > 40 {
		t.Errorf("the small stream holds %d messages", n)
	}
	// Over a restart of the server, too.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // two of them for the handler to return
	defer cancel()
	if err := app.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	mustStart(t, app)
	close(release)
	still.waitFor(t, want)
	for name, c := range map[string]*tally{"still": still, "other": other} {
		if twice := c.storedTwice(); len(twice) > 0 {
			t.Errorf("module %s got %d events twice", name, len(twice))
		}
	}
}

// A fan-out stream that is full refuses, in words, at the publisher: it does not
// drop what a target has not copied yet.
func TestStore_fanOutIsFull(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	srv := monotest.Server(t)
	release := make(chan struct{})
	still, other := newTally(), newTally()
	small := autoAck("SMALL", mono.WorkQueuePolicy)
	small.Stream.MaxMsgs = 40
	app := runApp(t, onServer(srv), emitter("shop", e),
		durableModule("still", e, small, func(ctx context.Context, msgs []*mono.Msg) error {
			select {
			case <-release:
				return still.handle(ctx, msgs)
			case <-ctx.Done():
				return ctx.Err()
			}
		}),
		durableModule("other", e, autoAck("OTHER", mono.WorkQueuePolicy), other.handle))
	js := jetStreamOf(t, srv.Conn())
	cfg := streamInfo(t, app, "fanout_shop_created_v1").Config
	cfg.MaxMsgs = 200
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	var taken []string
	var refused error
	for i := range 1000 {
		p := fmt.Sprintf("n%d", i)
		if _, refused = app.Bus().PublishStream(within(t), &mono.Msg{Subject: e.Subject, Data: []byte(p)}); refused != nil {
			break
		}
		taken = append(taken, p)
	}
	wantError(t, refused, mono.ErrStoreFull, e.Subject)
	if len(taken) != 200 {
		t.Errorf("%d events taken, want 200", len(taken))
	}
	other.waitFor(t, taken)
	close(release)
	still.waitFor(t, taken)
}

// tmpfs mounts a small file system that can be filled.
func tmpfs(t *testing.T, size string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if out, err := exec.CommandContext(t.Context(), "mount", "-t", "tmpfs", "-o", "size="+size, "tmpfs", dir).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, the full disk is not tested: a small tmpfs cannot be mounted here: %v: %s", err, out)
	}
	t.Cleanup(func() {
		if out, err := exec.CommandContext(context.Background(), "umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
	return dir
}

// The disk runs full under the embedded server. Publishing ends with an error or
// with its context, never with a promise that is not kept; Health says what is
// wrong; and when there is room again a restart brings everything back.
func TestStore_diskIsFull(t *testing.T) {
	t.Parallel()
	e := defineEvent(t, "Created")
	dir := tmpfs(t, "24m")
	release := make(chan struct{})
	handled := newTally()
	cfg := autoAck("S", mono.WorkQueuePolicy)
	cfg.Stream.MaxBytes = 200 << 20
	// What the server thinks it may use is more than there is.
	store := embedded.Config{StoreDir: dir + "/store", MaxStore: 1 << 30}
	app := makeApp(t, []mono.Option{mono.WithEmbedded(store)}, emitter("shop", e),
		durableModule("m", e, cfg, func(ctx context.Context, msgs []*mono.Msg) error {
			select {
			case <-release:
				for _, m := range msgs {
					m.Data, _, _ = bytes.Cut(m.Data, []byte(" "))
				}
				return handled.handle(ctx, msgs)
			case <-ctx.Done():
				return ctx.Err()
			}
		}))
	mustStart(t, app)
	padding := strings.Repeat("x", 64<<10)
	ballast := dir + "/ballast"
	if out, err := exec.CommandContext(t.Context(), "fallocate", "-l", "12m", ballast).CombinedOutput(); err != nil {
		t.Skipf("SKIPPED, the full disk is not tested: no fallocate: %v: %s", err, out)
	}
	var taken []string
	var failed error
	for i := range 1000 {
		p := fmt.Sprintf("n%d", i)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, failed = app.Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte(p + " " + padding)})
		cancel()
		if failed != nil {
			break
		}
		taken = append(taken, p)
	}
	if failed == nil {
		t.Fatal("64 MiB were stored on 24 MiB")
	}
	t.Logf("after %d events: %v", len(taken), failed)
	if len(taken) < 20 {
		t.Errorf("only %d events taken", len(taken))
	}
	// Others who publish are not left hanging, either.
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if _, err := app.Bus().PublishStream(ctx, &mono.Msg{Subject: e.Subject, Data: []byte("more " + padding)}); err == nil {
				t.Log("a further event was stored")
			}
		})
	}
	wg.Wait()
	eventually(t, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		h := app.Health(ctx)
		return !h.Healthy
	}, "Health says that something is wrong")
	t.Logf("health: %v", app.Health(within(t)).Err())

	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := app.Stop(ctx); err != nil {
		t.Logf("stop: %v", err)
	}
	if err := os.Remove(ballast); err != nil {
		t.Fatal(err)
	}
	close(release)
	mustStart(t, app)
	handled.waitFor(t, taken)
	publishAll(t, app.Bus(), e, []string{"after x"})
	handled.waitFor(t, []string{"after"})
	eventually(t, func() bool { return app.Health(t.Context()).Healthy }, "the App is healthy again")
}
