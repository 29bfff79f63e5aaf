package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/spf13/cobra"

	"github.com/monotel/monotel/mono/embedded"
)

// startServer runs a NATS server on dir: in this process, or in one of its own that
// listens on the loopback interface. It is configured alike for every library.
func startServer(ctx context.Context, transport, dir string) (t target, stop func() error, err error) {
	if transport == loopback {
		return startServerProcess(ctx, dir)
	}
	s, err := embedded.Start(ctx, embedded.Config{StoreDir: dir})
	if err != nil {
		return target{}, nil, err
	}
	return target{"nats://in-process", s.ConnectOptions(), dir}, func() error { return s.Stop(ctx) }, nil
}

const serverUser = "bench"

func startServerProcess(ctx context.Context, dir string) (t target, stop func() error, err error) {
	exe, err := os.Executable()
	if err != nil {
		return target{}, nil, err
	}
	password := rand.Text()
	cmd := exec.CommandContext(ctx, exe, "server", dir) //nolint:gosec // this program
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return target{}, nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return target{}, nil, err
	}
	if err := cmd.Start(); err != nil {
		return target{}, nil, err
	}
	stop = func() error { return errors.Join(in.Close(), cmd.Wait()) }
	if _, err := fmt.Fprintln(in, password); err != nil {
		return target{}, nil, errors.Join(err, stop())
	}
	url, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		return target{}, nil, errors.Join(fmt.Errorf("server process: %w", err), stop())
	}
	return target{strings.TrimSpace(url), []nats.Option{nats.UserInfo(serverUser, password)}, dir}, stop, nil
}

// serverCommand is the server process. It gets its password on standard input,
// says its URL on standard output, and ends with its input.
func serverCommand() *cobra.Command {
	return &cobra.Command{
		Use: "server DIR", Hidden: true, Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, in := cmd.Context(), bufio.NewReader(cmd.InOrStdin())
			password, err := in.ReadString('\n')
			if err != nil {
				return err
			}
			s, err := embedded.Start(ctx, embedded.Config{
				StoreDir: args[0],
				Listen:   "127.0.0.1:0",
				Users:    []embedded.User{{Name: serverUser, Password: strings.TrimSpace(password)}},
			})
			if err != nil {
				return err
			}
			cmd.Println(s.URL())
			_, err = io.Copy(io.Discard, in)
			return err // nobody needs the streams any more: no shutdown
		},
	}
}
