// Command wget is as much of wget as a health check takes. Official images have one from their base
// system; an image that is made of one binary has none, and the same compose file checks both.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"
	"time"
)

// Docker gives a check a time of its own; this one ends a check that was started by hand.
const timeout = 10 * time.Second

const usage = `usage: wget [-q] --spider URL   exit with 0 if the URL answers with a status of 2xx
       wget [-q] -O- URL       and print what it answers`

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	err := run(ctx, os.Args[1:], os.Stdout)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "wget:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout io.Writer) error {
	var spider, show bool
	var address string
	for _, arg := range args {
		switch {
		case arg == "-q": // there is no progress to be quiet about
		case arg == "--spider":
			spider = true
		case arg == "-O-" || arg == "-qO-":
			show = true
		case strings.HasPrefix(arg, "-") || address != "":
			return fmt.Errorf("%q is not known here\n%s", arg, usage)
		default:
			address = arg
		}
	}
	if address == "" || spider == show {
		return errors.New(usage)
	}
	if !show {
		stdout = io.Discard
	}
	return get(ctx, address, stdout)
}

// get copies the body to w if the status is one of success.
func get(ctx context.Context, address string, w io.Writer) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, http.NoBody) //nolint:gosec // see Do
	if err != nil {
		return err
	}
	// No proxy: what is asked is in the same container.
	client := http.Client{Transport: &http.Transport{}}
	resp, err := client.Do(req) //nolint:gosec // to fetch the address it is given is what it is for
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return fmt.Errorf("%s: %s", address, resp.Status)
	}
	if _, err := io.Copy(w, resp.Body); err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	return nil
}
