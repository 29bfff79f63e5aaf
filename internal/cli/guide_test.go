package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/monotel/monotel/helper"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/monotest"
)

const guidePage = "../../docs/dead-letters.md"

// TestGuide does what docs/dead-letters.md says, from its first command to its
// last, against an App that fails as the page tells. What the page shows is what
// the commands print, but for what differs from run to run: IDs, times, rates. Run
// it with -update to have the page show what is printed now.
//
// In the page, a block of "console" has commands, each after a "$ ", with their
// output, and a comment "<!-- do: NAME -->" is something that happens in between.
func TestGuide(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile(guidePage)
	if err != nil {
		t.Fatal(err)
	}
	g := newGuide(t)
	var out strings.Builder
	inBlock := false
	lines := strings.SplitAfter(string(page), "\n")
	for i := 0; i < len(lines); i++ {
		line := lines[i]
		out.WriteString(line)
		switch {
		case strings.HasPrefix(line, "<!-- do: "):
			g.do(strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "<!-- do: "), " -->"))
		case strings.HasPrefix(line, "```"):
			inBlock = strings.TrimSpace(line) == "```console"
		case inBlock && strings.HasPrefix(line, "$ "):
			command := strings.TrimPrefix(line, "$ ")
			for strings.HasSuffix(command, "\\\n") {
				i++
				out.WriteString(lines[i])
				command = strings.TrimSuffix(command, "\\\n") + strings.TrimLeft(lines[i], " ")
			}
			var want strings.Builder
			for i+1 < len(lines) && !strings.HasPrefix(lines[i+1], "$ ") && !strings.HasPrefix(lines[i+1], "```") {
				i++
				want.WriteString(lines[i])
			}
			out.WriteString(g.command(strings.TrimSpace(command), want.String()))
		}
	}
	if *update {
		if err := os.WriteFile(guidePage, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// A guide is the world in which the page plays.
type guide struct {
	*bundle
	app     *mono.App
	gateway atomic.Bool       // it answers
	names   map[string]string // what the page calls what is called something else now
	dir     string
}

type guideOrder struct {
	ID       string  `json:"id"`
	Customer string  `json:"customer"`
	Amount   float64 `json:"amount"`
	Address  string  `json:"address"`
}

var guidePlaced = helper.EventDefinition[guideOrder]("shop", "OrderPlaced", "v1")

// shop is the App's module.
type guideShop struct {
	g   *guide
	bus mono.EventBus
}

func (*guideShop) Name() string                    { return "billing" }
func (s *guideShop) SetEventBus(bus mono.EventBus) { s.bus = bus }
func (*guideShop) Start(context.Context) error     { return nil }
func (*guideShop) Stop(context.Context) error      { return nil }

func (*guideShop) EmitEvents() []mono.BaseEventDefinition {
	return []mono.BaseEventDefinition{guidePlaced.ToBase()}
}

func (s *guideShop) RegisterEventConsumers(r mono.EventRegistry) error {
	return helper.RegisterTypedEventStreamConsumer(r, guidePlaced, mono.StreamConsumerConfig{
		Stream:   mono.StreamConfig{Name: "orders"},
		Consumer: mono.ConsumerConfig{Durable: "billing"},
		Retry:    mono.RetryPolicy{MaxAttempts: 1},
		AutoAck:  true,
		Fetch:    mono.FetchConfig{BatchSize: 1},
	}, s.charge, s)
}

func (s *guideShop) charge(_ context.Context, orders []guideOrder, _ []*mono.Msg) error {
	o := orders[0]
	switch {
	case o.Address == "":
		return mono.Permanent(fmt.Errorf("customer %q has no address (order %s)", o.Customer, o.ID))
	case !s.g.gateway.Load():
		return fmt.Errorf("charge order %s: dial tcp 10.0.3.%d:443: connect: connection refused", o.ID, 10+int(o.Amount)%7)
	}
	return nil
}

func newGuide(t *testing.T) *guide {
	t.Helper()
	server := monotest.Server(t)
	g := &guide{bundle: bare(t), names: make(map[string]string), dir: t.TempDir()}
	g.url, g.nc = server.URL(), server.Conn()
	g.env["NATS_URL"] = g.url
	g.env["USER"] = "ann"
	g.app = monotest.AppWith(t, []mono.Option{mono.WithNATS(g.url), mono.WithName("shop")}, &guideShop{g: g})
	return g
}

// do is what happens between two commands.
func (g *guide) do(what string) {
	g.t.Helper()
	switch what {
	case "orders fail":
		for i := range 40 {
			o := guideOrder{ID: fmt.Sprintf("A-%d", 1000+i), Customer: "Ada", Amount: float64(20 + i), Address: "Main Street 1"}
			if i%8 == 3 {
				o.Customer, o.Address = fmt.Sprintf("Customer %d", i), ""
			}
			g.place(o)
		}
		for i := range 3 {
			g.publish(fmt.Sprintf(`{"id":"B-%d","customer":"Grace","amount":"%d,50","address":"Hill Road 2"}`, 2000+i, 10+i))
		}
		g.until(43)
	case "the gateway is back":
		g.gateway.Store(true)
	default:
		g.t.Fatalf("the page says %q, and nobody knows how", what)
	}
}

func (g *guide) place(o guideOrder) {
	g.t.Helper()
	if _, err := guidePlaced.EventStreamPublish(g.t.Context(), g.app.Bus(), o, nil); err != nil {
		g.t.Fatal(err)
	}
}

func (g *guide) publish(data string) {
	g.t.Helper()
	msg := &mono.Msg{Subject: guidePlaced.ToBase().Subject, Data: []byte(data)}
	if _, err := g.app.Bus().PublishStream(g.t.Context(), msg); err != nil {
		g.t.Fatal(err)
	}
}

// until waits until there are so many dead letters.
func (g *guide) until(n uint64) {
	g.t.Helper()
	sub, err := g.nc.SubscribeSync("monotel.dlq.DLQ.>")
	if err != nil {
		g.t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	for deadline := time.Now().Add(patience); ; {
		js, err := g.nc.JetStream()
		if err != nil {
			g.t.Fatal(err)
		}
		info, err := js.StreamInfo("DLQ")
		if err == nil && info.State.Msgs >= n {
			return
		}
		if time.Now().After(deadline) {
			g.t.Fatalf("there are not %d dead letters: %+v, %v", n, info, err)
		}
		if _, err := sub.NextMsg(100 * time.Millisecond); err != nil && !errors.Is(err, nats.ErrTimeout) {
			g.t.Fatal(err)
		}
	}
}

// command runs one and returns what it has printed, under the names of the page.
func (g *guide) command(line, want string) string {
	g.t.Helper()
	if file, ok := strings.CutPrefix(line, "cat "); ok {
		if err := os.WriteFile(filepath.Join(g.dir, file), []byte(want), 0o600); err != nil {
			g.t.Fatal(err)
		}
		return want
	}
	words := shellWords(g.t, line)
	if len(words) == 0 || words[0] != "monotel" {
		g.t.Fatalf("the page has a command that is not monotel's: %s", line)
	}
	wantCode := exitDone
	if code, ok := strings.CutPrefix(lastLine(want), "exit code "); ok {
		if _, err := fmt.Sscan(code, &wantCode); err != nil {
			g.t.Fatal(err)
		}
	}
	for i, word := range words {
		for page, actual := range g.names {
			word = strings.ReplaceAll(word, page, actual)
		}
		if strings.HasSuffix(word, ".json") || strings.HasSuffix(word, ".ndjson") {
			word = filepath.Join(g.dir, word)
		}
		words[i] = word
	}
	var both bytes.Buffer // as a terminal shows them
	ctx, cancel := context.WithTimeout(g.t.Context(), patience)
	defer cancel()
	p := g.process(&both, &both)
	code := run(ctx, words[1:], p)
	got := both.String()
	if code != exitDone {
		got += fmt.Sprintf("exit code %d\n", code)
	}
	g.learn(want, got)
	if *update { // it keeps the names that the page has
		for page, actual := range g.names {
			got = strings.ReplaceAll(got, actual, page)
		}
		return got
	}
	if code != wantCode {
		g.t.Errorf("%s: exit code %d, want %d\n%s", line, code, wantCode, got)
	}
	if a, b := steady(want), steady(got); a != b {
		g.t.Errorf("%s prints\n%s\nand the page says\n%s\ncompared as\n%s\nand\n%s", line, got, want, b, a)
	}
	return got
}

func lastLine(s string) string {
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return lines[len(lines)-1]
}

// shellWords splits a command as a shell does, with single quotes.
func shellWords(t *testing.T, line string) []string {
	t.Helper()
	var words []string
	for rest := strings.TrimSpace(line); rest != ""; rest = strings.TrimLeft(rest, " ") {
		var word strings.Builder
		for rest != "" && rest[0] != ' ' {
			if rest[0] != '\'' {
				word.WriteByte(rest[0])
				rest = rest[1:]
				continue
			}
			quoted, after, ok := strings.Cut(rest[1:], "'")
			if !ok {
				t.Fatalf("a quote is not closed: %s", line)
			}
			word.WriteString(quoted)
			rest = after
		}
		words = append(words, word.String())
	}
	return words
}

// named is what is called otherwise in each run.
var named = regexp.MustCompile(`\b(?:[a-z2-7]{24}|\d{8}-\d{6}-[a-z2-7]{5})\b`)

// learn notes what the page calls what a command has printed: they come in the
// same order.
func (g *guide) learn(want, got string) {
	pages, actual := named.FindAllString(want, -1), named.FindAllString(got, -1)
	for i := range min(len(pages), len(actual)) {
		if _, known := g.names[pages[i]]; !known {
			g.names[pages[i]] = actual[i]
		}
	}
}

var differs = []struct {
	what *regexp.Regexp
	by   string
}{
	{named, "NAME"},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[\d:.]+Z`), "TIME"},
	{regexp.MustCompile(`\b(?:now|\d+[smhd] ago)\b`), "AGO"},
	{regexp.MustCompile(`00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}`), "TRACEPARENT"},
	{regexp.MustCompile(`\b[0-9a-f]{32}\b`), "TRACE"},
	{regexp.MustCompile(`\b[\w.-]+@[\w.-]+\b`), "USER"},
	{regexp.MustCompile(`Host +\S+`), "Host HOST"},
	{regexp.MustCompile(`App +shop.*`), "App shop"},
	{regexp.MustCompile(`10\.0\.3\.\d+`), "ADDRESS"},
	{regexp.MustCompile(`sequence \d+`), "sequence N"},
	{regexp.MustCompile(`[\d.]+ [KM]iB of`), "SIZE of"},
	{regexp.MustCompile(`, [\d.]+%`), ", PART"},
	{regexp.MustCompile(`(?m)^.*\d+/s.*\n`), ""},                                     // progress
	{regexp.MustCompile(`(?m)^(orders +billing +\d+ +)\d( +\d+)$`), "${1}FETCHES$2"}, // one or two at a time
	{regexp.MustCompile(`[ \t]+`), " "},
	{regexp.MustCompile(`(?m) $`), ""},
}

// steady is without what differs from run to run.
func steady(s string) string {
	for _, d := range differs {
		s = d.what.ReplaceAllString(s, d.by)
	}
	lines := strings.Split(strings.TrimRight(s, "\n"), "\n")
	return strings.Join(slices.Clip(lines), "\n")
}
