package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/monotel/monotel/dlq"
	"github.com/monotel/monotel/examples/orders/audit"
	"github.com/monotel/monotel/mono"
	"github.com/monotel/monotel/mono/embedded"
)

// setOpen reads what -open says: nothing, or an address to listen on that only
// this machine can reach.
func (o *options) setOpen() error {
	switch o.open {
	case "", "false":
		return nil
	case "true": // -open alone
		o.stay = true
		if o.server == "" {
			o.listen = "127.0.0.1:0" // a free port
		}
		return nil
	}
	host, port, err := net.SplitHostPort(o.open)
	if err != nil {
		return fmt.Errorf("-open is %q, want host:port, such as 127.0.0.1:4222", o.open)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("-open is %q, want a port from 0 to 65535", o.open)
	}
	if host == "" || host == "localhost" {
		host = "127.0.0.1"
	}
	if ip, err := netip.ParseAddr(host); err != nil || !ip.IsLoopback() {
		return fmt.Errorf("-open is %q, want a loopback address, such as 127.0.0.1:4222: the password is not encrypted on its way", o.open)
	}
	o.stay, o.listen = true, net.JoinHostPort(host, port)
	return nil
}

// A door is the embedded server with a port, and the file that lets in who may
// read it.
type door struct {
	server *embedded.Server
	file   string
}

// openDoor starts the server, as an App does by itself where no port is needed.
func openDoor(ctx context.Context, address, dir string, log *slog.Logger) (*door, error) {
	dir, err := filepath.Abs(dir) // the other terminal may be somewhere else
	if err != nil {
		return nil, err
	}
	user := embedded.User{Name: "orders", Password: rand.Text()}
	server, err := embedded.Start(ctx, embedded.Config{
		Name: "orders", StoreDir: dir, Listen: address, Users: []embedded.User{user}, Logger: log,
	})
	if err != nil {
		return nil, err
	}
	d := &door{server: server, file: filepath.Join(dir, "nats.url")}
	u, err := url.Parse(server.URL())
	if err == nil {
		u.User = url.UserPassword(user.Name, user.Password)
		err = writePrivately(d.file, u.String()+"\n")
	}
	if err != nil {
		return nil, errors.Join(err, d.close(ctx))
	}
	return d, nil
}

// writePrivately makes a file that only its owner can read. One that is there, left
// by a run that was killed, may be others' to read, so it is not written into.
func writePrivately(name, text string) error {
	const ownerOnly = 0o600
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) { //nolint:gosec // in the user's folder
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, ownerOnly) //nolint:gosec // in the user's folder
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// option has the App use the server, without the port.
func (d *door) option() mono.Option {
	return mono.WithNATS(d.server.URL(), d.server.ConnectOptions()...)
}

// close is for when the App has stopped.
func (d *door) close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err := os.Remove(d.file) //nolint:gosec // in the user's folder
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	return errors.Join(err, d.server.Stop(ctx))
}

// quote makes a text one word of a shell.
func quote(text string) string {
	if runtime.GOOS == "windows" {
		return "'" + strings.ReplaceAll(text, "'", "''") + "'"
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}

// export is the shell's line that sets NATS_URL.
func export(value string) string {
	if runtime.GOOS == "windows" {
		return "$env:NATS_URL = " + value
	}
	return "export NATS_URL=" + value
}

// connection is the shell's line that connects the commands to the door. It has no
// password in it.
func (d *door) connection() string {
	if runtime.GOOS == "windows" {
		return export("Get-Content " + quote(d.file))
	}
	return export(`"$(cat ` + quote(d.file) + `)"`)
}

// A tour is what to try on dead letters.
type tour struct {
	connect string // a line for the shell, or what to do
	id      string // of a dead letter
}

// anyID stands for the ID of a dead letter in a command.
const anyID = "ID"

// newTour returns the tour through what is at hand. d is nil unless there is a
// door.
func newTour(ctx context.Context, o options, d *door, app *mono.App) tour {
	t := tour{connect: connectLine(o, d), id: anyID}
	if id, err := lastDeadLetter(ctx, app); err == nil {
		t.id = id
	}
	return t
}

// connectLine says how to connect the commands. It has no password in it.
func connectLine(o options, d *door) string {
	switch {
	case d != nil:
		return d.connection()
	case strings.Contains(o.server, "@"): // a password, or a token
		return "set NATS_URL to the URL you gave to -server"
	case o.server != "":
		return export(quote(o.server))
	}
	return ""
}

// idForm is what the ID of a dead letter looks like. Others may have written what is in
// a shared stream.
var idForm = regexp.MustCompile(`^[a-z0-9]{1,64}$`)

// lastDeadLetter returns the ID of an order that was given up, the last one.
func lastDeadLetter(ctx context.Context, app *mono.App) (string, error) {
	const patience = 3 * time.Second
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	js, err := jetstream.New(app.Conn())
	if err != nil {
		return "", err
	}
	name := dlq.Config{}.StreamName()
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return "", err
	}
	// As docs/dead-letter-format.md says.
	msg, err := stream.GetLastMsgForSubject(ctx, "monotel.dlq."+name+"."+audit.Stream+".>")
	if err != nil {
		return "", err
	}
	found := msg.Header.Get(dlq.HeaderID)
	if !idForm.MatchString(found) {
		return "", fmt.Errorf("%q is no ID of a dead letter", found)
	}
	return found, nil
}

// show writes the commands. They come one by one, with a line between them that
// says what they do, so that each can be copied.
func (t tour) show(s *screen) {
	if t.connect != "" {
		s.say("\n  %s", t.connect)
	}
	for _, c := range [][2]string{
		{"groups", "what went wrong, and how often"},
		{"show " + t.id, "one of them: why, when and where it failed, and its traces"},
		{`replay --where "error.contains('ledger does not answer')"`, "has them handled again, once it has shown its plan and you agree"},
	} {
		s.say("\n  go run ./cmd/monotel dlq %s\n        %s", c[0], c[1])
	}
}

// stay keeps the program running when the shop has closed, so that there is time to
// look at what was given up, and somebody there to handle it again.
func stay(ctx context.Context, s *screen, l *ledger, t tour) {
	l.set(repaired)
	s.say(`
The shop is closed, and its ledger repaired: it answers every order now. What was
given up is in the stream %s. Try in another terminal:`, dlq.Config{}.StreamName())
	t.show(s)
	s.say(`
An order that got no answer from the ledger succeeds when it is replayed. One of
%s, who has no account, fails again, and so does what is no order. Ctrl-C ends.
`, ivan)
	<-ctx.Done()
	s.say("\nStopped.")
}

// farewell says how to go on when the program has ended.
func farewell(s *screen, o options, t tour) {
	switch {
	case o.server != "":
		s.say("\nWhat was given up is on your server, in the stream %s. To look at it:", dlq.Config{}.StreamName())
	case o.store != "":
		s.say(`
What was given up is kept in %s. To look at it, run the shop again with -open

  go run ./examples/orders -store %s -open

and, in another terminal, as it says how to connect:`, o.store, quote(o.store))
	default:
		s.say(`
What was given up goes with the temporary folder. To look at it while it is there,
run the shop with -open

  go run ./examples/orders -open

and, in another terminal, as it says how to connect:`)
	}
	t.show(s)
	if o.server != "" {
		s.say("\nIt is a running shop that handles what is replayed. One with -open stays for\nthat, with its ledger repaired.")
	}
}
