package cli

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/jsm.go/natscontext"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/monotel/monotel/dlq/triage"
	"github.com/monotel/monotel/internal/safe"
	"github.com/monotel/monotel/internal/shell"
	"github.com/monotel/monotel/telemetry/messaging"
)

// A connection is what the flags say of it.
type connection struct {
	server, context, creds, nkey string
	user, password, passwordFile string
	tlsCA, tlsCert, tlsKey       string
	jsDomain, jsPrefix           string
	stream                       string
	timeout                      time.Duration
	changed                      func(flag string) bool
}

func (o *connection) register(cmd *cobra.Command, f *pflag.FlagSet) {
	o.changed = f.Changed
	f.StringVar(&o.server, "server", "", "`URL` of the server, or several with commas between them (default $NATS_URL, see 'monotel help')")
	f.StringVar(&o.context, "context", "", "`NAME` of a context of the NATS CLI (default $NATS_CONTEXT or the selected one)")
	f.StringVar(&o.creds, "creds", "", "`FILE` with credentials (default $NATS_CREDS)")
	f.StringVar(&o.nkey, "nkey", "", "`FILE` with the seed of an nkey")
	f.StringVar(&o.user, "user", "", "`NAME` of the user (default $NATS_USER)")
	f.StringVar(&o.password, "password", "",
		"`PASSWORD`, which others on this machine can see on the command line: rather use --password-file or $NATS_PASSWORD")
	f.StringVar(&o.passwordFile, "password-file", "", "`FILE` with the password")
	f.StringVar(&o.tlsCA, "tlsca", "", "`FILE` with the certificates of authorities to trust")
	f.StringVar(&o.tlsCert, "tlscert", "", "`FILE` with the certificate of this client")
	f.StringVar(&o.tlsKey, "tlskey", "", "`FILE` with its private key")
	f.StringVar(&o.jsDomain, "js-domain", "", "`NAME` of the JetStream domain that has the dead letters (default: that of the context, else of the server)")
	f.StringVar(&o.jsPrefix, "js-api-prefix", "", "`SUBJECT` that the JetStream API is below, if it is not $JS.API (default: that of the context)")
	f.StringVar(&o.stream, "stream", "DLQ", "`NAME` of the dead-letter stream")
	f.DurationVar(&o.timeout, "timeout", 5*time.Second, "how long to wait for the server to answer at first")
	for _, file := range []string{"creds", "nkey", "password-file", "tlsca", "tlscert", "tlskey"} {
		_ = cmd.MarkPersistentFlagFilename(file) // it exists
	}
	none := func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	for _, text := range []string{"server", "user", "password", "js-domain", "js-api-prefix", "stream", "timeout"} {
		_ = cmd.RegisterFlagCompletionFunc(text, none)
	}
	_ = cmd.RegisterFlagCompletionFunc("context", func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return natscontext.KnownContexts(), cobra.ShellCompDirectiveNoFileComp
	})
}

// validate finds what needs no server to be found.
func (o *connection) validate() error {
	switch {
	case o.timeout <= 0:
		return fmt.Errorf("--timeout %v: want more than 0", o.timeout)
	case o.password != "" && o.passwordFile != "":
		return errors.New("--password and --password-file: want one of them")
	case (o.tlsCert == "") != (o.tlsKey == ""):
		return errors.New("--tlscert and --tlskey: want both or none")
	case o.jsDomain != "" && o.jsPrefix != "":
		return errors.New("--js-domain and --js-api-prefix: want one of them")
	case o.stream == "":
		return errors.New("--stream: want the name of a stream")
	}
	n := 0
	for _, given := range []string{o.creds, o.nkey, o.user} {
		if given != "" {
			n++
		}
	}
	if n > 1 {
		return errors.New("--creds, --nkey and --user: want one of them")
	}
	return nil
}

// A link is a connection to a server, and what the server has refused on it.
type link struct {
	nc     *nats.Conn
	shown  string        // its URLs without credentials
	config triage.Config // the dead letters that are meant

	mu      sync.Mutex
	refused string // "publish to X", the first of them
	tell    context.CancelCauseFunc
}

// connect dials. The environment is asked where neither a flag nor a context has
// the answer.
func (c *cli) connect() (*link, error) {
	o := c.conn
	env := c.env
	if o.context != "" {
		env = func(string) string { return "" }
	}
	if o.creds == "" && o.nkey == "" && o.user == "" {
		if o.creds = env("NATS_CREDS"); o.creds == "" {
			o.user = env("NATS_USER")
		}
	}
	ours := o.creds != "" || o.nkey != "" || o.user != ""
	nctx, err := c.natsContext(ours)
	if err != nil {
		return nil, err
	}
	opts := []nats.Option{nats.Name("monotel"), nats.Timeout(o.timeout)}
	server := o.server
	if nctx != nil {
		if server == "" {
			server = nctx.ServerURL()
		}
		more, err := nctx.NATSOptions()
		if err != nil {
			return nil, usagef("context %q: %w", nctx.Name, err)
		}
		opts = append(opts, more...)
	}
	if server == "" {
		server = env("NATS_URL")
	}
	if server == "" {
		server = nats.DefaultURL
	}
	urls, shown, err := serverURLs(server, ours)
	if err != nil {
		return nil, err
	}
	credentials, err := o.credentials(env)
	if err != nil {
		return nil, err
	}
	l := &link{shown: shown, config: triage.Config{Stream: o.stream, Domain: o.jsDomain, APIPrefix: o.jsPrefix}}
	if nctx != nil && o.jsDomain == "" && o.jsPrefix == "" {
		l.config.Domain, l.config.APIPrefix = nctx.JSDomain(), nctx.JSAPIPrefix()
	}
	l.nc, err = nats.Connect(urls, append(append(opts, credentials...), nats.ErrorHandler(l.onError))...)
	if err != nil {
		return nil, connectError(shown, err)
	}
	return l, nil
}

// natsContext is the NATS CLI's context to use, or nil. bare leaves out its
// credentials.
func (c *cli) natsContext(bare bool) (*natscontext.Context, error) {
	name := c.conn.context
	if name == "" {
		if c.conn.server != "" || c.env("NATS_URL") != "" {
			return nil, nil //nolint:nilnil // there need not be one
		}
		name = c.env("NATS_CONTEXT")
	}
	var store natscontext.Backend = natscontext.NewDefaultFileBackend()
	if dir := c.env("XDG_CONFIG_HOME"); dir != "" {
		store = natscontext.NewFileBackendAt(dir)
	}
	contexts := natscontext.NewRegistry(store)
	ctx := context.Background() //nolint:forbidigo // it reads files
	if name == "" {
		selected, err := contexts.Selected(ctx)
		if err != nil || selected == "" {
			return nil, nil //nolint:nilerr,nilnil // see above
		}
		name = selected
	}
	var without []natscontext.Option
	if bare {
		without = []natscontext.Option{
			natscontext.WithUser(""), natscontext.WithPassword(""), natscontext.WithCreds(""), natscontext.WithNKey(""),
			natscontext.WithToken(""), natscontext.WithUserJWT(""), natscontext.WithUserSeed(""),
		}
	}
	nctx, err := contexts.Load(ctx, name, without...)
	if errors.Is(err, natscontext.ErrNotFound) {
		known, _ := contexts.List(ctx)
		return nil, usagef("no NATS context %q; there %s", name, areNames(known))
	}
	if err != nil {
		return nil, usagef("context %q: it cannot be read; see 'nats context show'", name) // the cause may quote what is in it
	}
	return nctx, nil
}

func areNames(names []string) string {
	if len(names) == 0 {
		return "are none"
	}
	return "are: " + strings.Join(names, ", ")
}

// serverURLs checks a list of servers, and returns it twice: for use, and to be
// shown. bare leaves out the credentials of both.
func serverURLs(list string, bare bool) (use, shown string, err error) {
	var uses, shows []string
	for s := range strings.SplitSeq(list, ",") {
		if s = strings.TrimSpace(s); s == "" {
			continue
		}
		if !strings.Contains(s, "://") {
			s = "nats://" + s
		}
		u, err := safe.ParseURL(s)
		if err != nil || u.Host == "" {
			return "", "", usagef("server %d of the list is no URL such as nats://host:4222; "+
				"special characters of a password are written as %%XX", len(uses)+1)
		}
		shows = append(shows, u.Scheme+"://"+u.Host)
		if bare {
			u.User = nil
		}
		uses = append(uses, u.String())
	}
	if len(uses) == 0 {
		return "", "", usagef("the list of servers is empty")
	}
	return strings.Join(uses, ","), strings.Join(shows, ","), nil
}

// credentials are what the flags and the environment say.
func (o *connection) credentials(env func(string) string) ([]nats.Option, error) {
	var opts []nats.Option
	switch {
	case o.creds != "":
		if _, err := os.Stat(o.creds); err != nil {
			return nil, usagef("credentials: %w", err)
		}
		opts = append(opts, nats.UserCredentials(o.creds))
	case o.nkey != "":
		opt, err := nats.NkeyOptionFromSeed(o.nkey)
		if err != nil {
			return nil, usagef("nkey %q: it cannot be read as the seed of an nkey", o.nkey) // the cause may quote it
		}
		opts = append(opts, opt)
	case o.user != "":
		password := o.password
		if o.passwordFile != "" {
			b, err := os.ReadFile(o.passwordFile)
			if err != nil {
				return nil, usagef("password: %w", err)
			}
			password = strings.TrimRight(string(b), "\r\n")
		}
		if password == "" {
			password = env("NATS_PASSWORD")
		}
		opts = append(opts, nats.UserInfo(o.user, password))
	}
	if o.tlsCA != "" {
		if _, err := os.Stat(o.tlsCA); err != nil {
			return nil, usagef("--tlsca: %w", err)
		}
		opts = append(opts, nats.RootCAs(o.tlsCA))
	}
	if o.tlsCert != "" {
		opts = append(opts, nats.ClientCert(o.tlsCert, o.tlsKey))
	}
	return opts, nil
}

// connectError says what to do. A cause is only given where it holds no URL.
func connectError(shown string, err error) error {
	is := func(targets ...error) bool {
		return slices.ContainsFunc(targets, func(t error) bool { return errors.Is(err, t) })
	}
	var unknown x509.UnknownAuthorityError
	switch {
	case is(nats.ErrNoServers):
		return fmt.Errorf("no NATS server at %s (start one, or set --server, NATS_URL or --context)", shown)
	case is(nats.ErrAuthorization, nats.ErrAuthExpired, nats.ErrAuthRevoked, nats.ErrAccountAuthExpired, nats.ErrNkeysNotSupported):
		return fmt.Errorf("%s refused the credentials (%w); set --creds, --nkey, --user with --password-file, or --context",
			shown, err)
	case errors.As(err, &unknown), is(nats.ErrSecureConnRequired, nats.ErrSecureConnWanted):
		return fmt.Errorf("%s: TLS: %w; set --tlsca, --tlscert and --tlskey, or another server", shown, err)
	}
	if u, ok := errors.AsType[*url.Error](err); ok {
		err = u.Err
	}
	return fmt.Errorf("connect to %s: %w (set --server, NATS_URL or --context)", shown, err)
}

var violation = regexp.MustCompile(`(?i)permissions violation for (publish|subscription) to "([^"]*)"`)

// errRefused is the cause of the end of a request that the server has refused.
var errRefused = errors.New("refused by the server")

// onError keeps what the server refuses: it does not say which request that was,
// and the request itself only times out.
func (l *link) onError(_ *nats.Conn, _ *nats.Subscription, err error) {
	m := violation.FindStringSubmatch(err.Error())
	// Lists are looked through for what to warn of. Who may not make one is told by
	// what does without.
	if len(m) == 0 || strings.Contains(m[2], ".CONSUMER.LIST.") || strings.HasSuffix(m[2], ".STREAM.LIST") {
		return
	}
	verb := "publish"
	if strings.EqualFold(m[1], "subscription") {
		verb = "subscribe"
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refused == "" {
		l.refused = verb + " to " + m[2]
	}
	if l.tell != nil {
		l.tell(errRefused)
	}
}

// watch returns a context that ends when the server refuses something.
func (l *link) watch(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tell = cancel
	if l.refused != "" {
		cancel(errRefused)
	}
	return ctx, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.tell = nil
		cancel(nil)
	}
}

func isTimeout(err error) bool {
	for _, t := range []error{context.DeadlineExceeded, nats.ErrTimeout, nats.ErrNoResponders, jetstream.ErrNoStreamResponse} {
		if errors.Is(err, t) {
			return true
		}
	}
	return false
}

// explain says why a request was not answered.
func (l *link) explain(err error) error {
	if err == nil {
		return nil
	}
	l.mu.Lock()
	refused := l.refused
	l.mu.Unlock()
	_, partly := errors.AsType[partlyError](err)
	switch {
	case refused != "" && partly:
		return partlyf("%w\nThere is no permission to %s at %s: allow it to this user, or connect as another", err, refused, l.shown)
	case refused != "" && (isTimeout(err) || errors.Is(err, errRefused) || errors.Is(err, context.Canceled)):
		return fmt.Errorf("no permission to %s at %s: allow it to this user, or connect as another (%w)", refused, l.shown, err)
	case errors.Is(err, jetstream.ErrJetStreamNotEnabled), errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount),
		errors.Is(err, nats.ErrNoResponders):
		return fmt.Errorf("no JetStream%s at %s, or not for this account: dead letters need it (%w)", l.which(), l.shown, err)
	case errors.Is(err, nats.ErrConnectionClosed), errors.Is(err, jetstream.ErrConnectionClosed), errors.Is(err, nats.ErrDisconnected):
		return fmt.Errorf("lost the connection to %s: %w", l.shown, err)
	}
	return err
}

// which says which JetStream is meant, if it is not the server's own.
func (l *link) which() string {
	switch {
	case l.config.Domain != "":
		return fmt.Sprintf(" of domain %q", l.config.Domain)
	case l.config.APIPrefix != "":
		return fmt.Sprintf(" API with prefix %q", l.config.APIPrefix)
	}
	return ""
}

// withDesk connects, opens the dead letters and closes the connection when f has
// returned. f's context ends when the server refuses something: whatever it is
// for, it would only time out.
func (c *cli) withDesk(ctx context.Context, f func(ctx context.Context, desk *triage.Desk) error) error {
	l, err := c.connect()
	if err != nil {
		return err
	}
	defer l.nc.Close()
	tel, stop, err := c.telemetry(ctx)
	if err != nil {
		return err
	}
	defer stop()
	desk, err := c.open(ctx, l, tel)
	if err != nil {
		return err
	}
	watched, done := l.watch(ctx)
	defer done()
	return l.explain(f(watched, desk))
}

func (c *cli) open(ctx context.Context, l *link, tel *messaging.Telemetry) (*triage.Desk, error) {
	watched, done := l.watch(ctx)
	defer done()
	bounded, cancel := context.WithTimeout(watched, c.conn.timeout)
	defer cancel()
	cfg := l.config
	cfg.Telemetry, cfg.ReadOnly = tel, c.readOnly
	desk, err := triage.Open(bounded, l.nc, cfg)
	switch {
	case err == nil:
		return desk, nil
	case ctx.Err() != nil:
		return nil, err
	case errors.Is(context.Cause(bounded), errRefused):
		return nil, l.explain(fmt.Errorf("%w", errRefused))
	case errors.Is(err, triage.ErrNoDeadLetters):
		return nil, c.noStream(bounded, l)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("no answer of JetStream at %s within %v: %w", l.shown, c.conn.timeout, err)
	}
	return nil, l.explain(err)
}

// noStream names the streams that look as if they were meant.
func (c *cli) noStream(ctx context.Context, l *link) error {
	text := "an App makes it when it starts"
	if js, err := l.config.JetStream(l.nc); err == nil {
		var names []string
		for name := range js.StreamNames(ctx, jetstream.WithStreamListSubject("monotel.dlq.>")).Name() {
			names = append(names, name)
		}
		slices.Sort(names)
		if len(names) > 0 {
			text = "these look like one: " + strings.Join(names, ", ") + "; name it with --stream"
		}
	}
	return fmt.Errorf("%w %q at %s: %s", triage.ErrNoDeadLetters, c.conn.stream, l.shown, text)
}

// commandLine is how to call the command again, with the same connection. It has
// no secrets in it.
func (c *cli) commandLine(args ...string) string {
	words := []string{"monotel"}
	for _, a := range args {
		words = append(words, shell.Quote(a))
	}
	o := c.conn
	_, server, _ := serverURLs(o.server, true)
	for _, f := range []struct{ name, value string }{
		{"server", server},
		{"context", o.context},
		{"creds", absolute(o.creds)},
		{"nkey", absolute(o.nkey)},
		{"user", o.user},
		{"password-file", absolute(o.passwordFile)},
		{"tlsca", absolute(o.tlsCA)},
		{"tlscert", absolute(o.tlsCert)},
		{"tlskey", absolute(o.tlsKey)},
		{"js-domain", o.jsDomain},
		{"js-api-prefix", o.jsPrefix},
		{"stream", o.stream},
	} {
		if f.value != "" && o.changed(f.name) {
			words = append(words, "--"+f.name, shell.Quote(f.value))
		}
	}
	return strings.Join(words, " ")
}

func absolute(path string) string {
	if path == "" {
		return ""
	}
	if abs, err := filepath.Abs(path); err == nil {
		return abs
	}
	return path
}
