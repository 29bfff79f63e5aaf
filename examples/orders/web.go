package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/monotel/monotel/mono"
)

// A webServer answers HTTP requests at one address.
type webServer struct {
	lis    net.Listener
	server *http.Server
	ended  chan struct{} // nil unless serving; closed when that has ended
	err    error         // why it has ended
}

// listenHTTP takes the address. One without a host is on loopback: whoever can
// reach it can do everything there. Nobody is answered before serve is called.
func listenHTTP(ctx context.Context, address string) (*webServer, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	if host == "" {
		host = "127.0.0.1"
	}
	lis, err := (&net.ListenConfig{}).Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, err
	}
	return &webServer{lis: lis}, nil
}

func (w *webServer) url() string { return "http://" + w.lis.Addr().String() }

// serve answers requests until stop is called. If it ends before, failed is called.
func (w *webServer) serve(h http.Handler, failed func(error)) {
	w.server = &http.Server{
		Handler: h, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 15 * time.Second, WriteTimeout: 30 * time.Second,
	}
	w.ended = make(chan struct{})
	go func() {
		defer close(w.ended)
		if err := w.server.Serve(w.lis); !errors.Is(err, http.ErrServerClosed) {
			w.err = fmt.Errorf("serve HTTP: %w", err)
			failed(w.err)
		}
	}()
}

// stop waits for requests that are under way, for so long.
func (w *webServer) stop(ctx context.Context, patience time.Duration) error {
	if w.ended == nil {
		return w.lis.Close()
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
	defer cancel()
	err := w.server.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, w.server.Close())
	}
	<-w.ended
	return errors.Join(err, w.err)
}

// answer writes a value as JSON.
func answer(w http.ResponseWriter, status int, value any) {
	b, err := json.MarshalIndent(value, "", "  ")
	if err != nil { // none of ours
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = w.Write(append(b, '\n')) // who asked may be gone
}

// refuse answers that a request cannot be done.
func refuse(w http.ResponseWriter, status int, err error) {
	answer(w, status, map[string]string{"error": err.Error()})
}

// A checkup is the answer of /healthz.
type checkup struct {
	Healthy bool    `json:"healthy"`
	Checks  []check `json:"checks"`
}

type check struct {
	Name  string `json:"name"`
	Error string `json:"error,omitempty"`
}

// healthPage says what of the App works, with the status 503 if something does not.
func healthPage(app *mono.App) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		const patience = 3 * time.Second // with a server that does not answer
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		report := app.Health(ctx)
		c := checkup{Healthy: report.Healthy, Checks: make([]check, 0, len(report.Checks))}
		for _, found := range report.Checks {
			text := ""
			if found.Err != nil {
				text = found.Err.Error()
			}
			c.Checks = append(c.Checks, check{found.Name, text})
		}
		status := http.StatusOK
		if !c.Healthy {
			status = http.StatusServiceUnavailable
		}
		answer(w, status, c)
	}
}

// checkHealth asks for a page, and returns an error unless it is there and well. An
// image that holds nothing but this program asks itself so how it is.
func checkHealth(ctx context.Context, url string) error {
	const (
		patience = 5 * time.Second
		most     = 4 << 10 // of what is shown of the page
	)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return err
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}} // and no proxy
	res, err := client.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		page, _ := io.ReadAll(io.LimitReader(res.Body, most)) // the status says enough
		return fmt.Errorf("%s: %s\n%s", url, res.Status, page)
	}
	return nil
}
