package cli

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
)

// How often a line is written where there is no terminal.
const lineEvery = 5 * time.Second

// A progress says how far something is: by a bar on a terminal, by lines
// elsewhere, and not at all with --quiet.
type progress struct {
	c    *cli
	what string

	mu      sync.Mutex
	bars    *mpb.Progress // nil without a terminal
	bar     *mpb.Bar
	began   time.Time // when set was called first, with
	from    int       // so many done
	written time.Time
	text    string
}

func (c *cli) progress(what string) *progress { return &progress{c: c, what: what} }

func (p *progress) set(done, total int, text string) {
	if p.c.quiet {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := p.c.now()
	if p.began.IsZero() {
		p.began, p.from, p.written = now, done, now
		if width, ok := p.c.tty(p.c.err); ok {
			p.start(width, total)
		}
	}
	p.text = text
	if seconds := now.Sub(p.began).Seconds(); seconds > 0 && done > p.from {
		rate := float64(done-p.from) / seconds
		p.text = fmt.Sprintf("%.3g/s, %s left", rate, span(time.Duration(float64(total-done)/rate*float64(time.Second))))
		if text != "" {
			p.text += ", " + text
		}
	}
	switch {
	case p.bar != nil:
		p.bar.SetTotal(int64(total), false)
		p.bar.SetCurrent(int64(done))
	case now.Sub(p.written) >= lineEvery:
		p.written = now
		fmt.Fprintf(p.c.err, "%s of %s: %s\n", count(done), plural(total, p.what[:len(p.what)-1]), p.text)
	}
}

func (p *progress) start(width, total int) {
	// The bars' own context: an interrupted replay goes on to say how it ends.
	ctx := context.Background() //nolint:forbidigo // see above
	p.bars = mpb.NewWithContext(ctx, mpb.WithOutput(p.c.err), mpb.WithWidth(min(width, 80)), mpb.WithAutoRefresh())
	p.bar = p.bars.New(int64(total), mpb.BarStyle(), mpb.BarWidth(min(width/3, 30)),
		mpb.PrependDecorators(decor.CountersNoUnit("%d / %d")),
		mpb.AppendDecorators(decor.Percentage(decor.WC{W: 4}), decor.Any(func(decor.Statistics) string {
			p.mu.Lock()
			defer p.mu.Unlock()
			return "  " + p.text
		})))
}

// end leaves the bar as it is last.
func (p *progress) end() {
	if p.bar == nil {
		return
	}
	p.bar.Abort(false)
	p.bars.Wait()
}
