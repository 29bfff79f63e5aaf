// Package screen is the triage screen that "monotel dlq" opens on a terminal:
// groups of dead letters, the entries of a group, one of them in detail, and what
// can be done about them.
//
// It never does what it has not said before and what the operator has not agreed
// to. Everything that comes from the wire goes through package safe before it is
// drawn.
package screen

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	tea "charm.land/bubbletea/v2"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/internal/shell"
)

// A Desk is what the screen needs of a [triage.Desk].
type Desk interface { //nolint:interfacebloat // one method for each thing that can be done about a dead letter
	Stream() string
	Stats(ctx context.Context) (*triage.Stats, error)
	Groups(ctx context.Context, sel triage.Selection) ([]triage.Group, error)
	Entries(ctx context.Context, sel triage.Selection, payload bool) iter.Seq2[*dlq.Entry, error]
	Get(ctx context.Context, id string) (*dlq.Entry, error)
	Current(ctx context.Context, e *dlq.Entry) (*dlq.Record, error)

	DryRun(ctx context.Context, sel triage.Selection, o triage.Options) (*triage.Plan, error)
	StorePlan(ctx context.Context, p *triage.Plan) error
	Run(ctx context.Context, id string, progress func(*triage.Operation)) (*triage.Operation, error)
	Operation(ctx context.Context, id string) (*triage.Operation, error)
	Pause(ctx context.Context, id string) error
	Cancel(ctx context.Context, id string) error

	Edit(ctx context.Context, e *dlq.Entry, rev triage.Revision) error
	Discard(ctx context.Context, e *dlq.Entry, reason string) error
	Archive(ctx context.Context, e *dlq.Entry, reason string) error
	Restore(ctx context.Context, e *dlq.Entry, reason string) error
}

// Options say how the screen runs. The zero value is good.
type Options struct {
	// TraceURLTemplate is where a trace can be looked at: a URL with {trace_id} in
	// it. Without one only the trace's ID is shown.
	TraceURLTemplate string

	// Now is the time that ages are counted from. The default is time.Now.
	Now func() time.Time

	// Input and Output are the terminal. The default is the process's own.
	Input  io.Reader
	Output io.Writer

	// Environ is where VISUAL, EDITOR, TERM and NO_COLOR are looked up. The default
	// is os.Environ.
	Environ []string
}

// Run opens the screen and returns when the operator leaves it, or ctx ends, whose
// cause is then the error. A replay that still runs is paused first; how to go on
// with it is written to the output after the screen has closed.
//
// Run leaves signals to the caller, who ends ctx at them.
func Run(ctx context.Context, desk Desk, opt Options) error {
	if opt.Now == nil {
		opt.Now = time.Now
	}
	if opt.Output == nil {
		opt.Output = os.Stdout
	}
	if opt.Environ == nil {
		opt.Environ = os.Environ()
	}
	inner, cancel := context.WithCancel(ctx)
	defer cancel()
	m := newModel(inner, desk, opt)
	options := []tea.ProgramOption{
		tea.WithOutput(opt.Output), tea.WithEnvironment(environ(opt.Environ)),
		tea.WithWindowSize(defaultWidth, defaultHeight), tea.WithoutSignalHandler(),
	}
	if opt.Input != nil {
		options = append(options, tea.WithInput(opt.Input))
	}
	p := tea.NewProgram(m, options...)
	// tea.WithContext would leave the goroutine that reads the keys behind.
	stop := context.AfterFunc(ctx, p.Quit)
	_, err := p.Run()
	stop()
	cancel()
	m.work.wait()
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return m.leave(err)
}

// leave says what was not brought to its end.
func (m *model) leave(err error) error {
	if err != nil {
		err = fmt.Errorf("triage screen: %w", err)
	}
	if r := m.replay; r != nil {
		status := r.status()
		if r.running { // it was waited for, and what it said has come too late
			status = triage.StatusPaused
		}
		if status == triage.StatusPaused || status == triage.StatusStopped {
			_, _ = fmt.Fprintf(m.opt.Output, "Replay %s is %s. To go on: %s\n", safe.Line(r.id), status,
				shell.Command("monotel dlq ops resume", []string{r.id}))
		}
	}
	if d := m.draft; d != nil {
		if _, statErr := os.Stat(d.path); statErr == nil {
			err = errors.Join(err, d.Keep(), fmt.Errorf("the edit of dead letter %s was not stored; it is kept in %s", safe.Line(d.entry.ID), d.path))
		}
	}
	return err
}

// environ has NO_COLOR so that whatever its value, it counts: the library under us
// wants a boolean.
func environ(env []string) []string {
	if getenv(env, "NO_COLOR") == "" {
		return env
	}
	return append(slices.Clone(env), "NO_COLOR=1")
}

// getenv looks a variable up. The last one of a name counts.
func getenv(env []string, name string) string {
	for _, v := range slices.Backward(env) {
		if value, ok := strings.CutPrefix(v, name+"="); ok {
			return value
		}
	}
	return ""
}

// A works is the work that goes on beside the screen. It is waited for when the
// screen is left, which the library under us does not do.
type works struct {
	mu     sync.Mutex
	closed bool
	group  sync.WaitGroup
}

// cmd makes a command of f. When the screen has been left, it does not begin.
func (w *works) cmd(f func() tea.Msg) tea.Cmd {
	return func() tea.Msg {
		if !w.begin() {
			return nil
		}
		defer w.group.Done()
		return f()
	}
}

func (w *works) begin() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		w.group.Add(1)
	}
	return !w.closed
}

func (w *works) wait() {
	w.mu.Lock()
	w.closed = true
	w.mu.Unlock()
	w.group.Wait()
}
