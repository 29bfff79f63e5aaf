package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"time"
)

// What is asked is on this machine: it answers soon, or never.
var client = &http.Client{Timeout: 10 * time.Second}

func urlEscape(s string) string { return url.QueryEscape(s) }

func do(req *http.Request) (io.ReadCloser, error) {
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode/100 == 2 { //nolint:mnd // success
		return resp.Body, nil
	}
	defer resp.Body.Close()
	const most = 1000
	body, _ := io.ReadAll(io.LimitReader(resp.Body, most))
	return nil, &statusError{req.URL.String(), resp.StatusCode, string(bytes.TrimSpace(body))}
}

func get(ctx context.Context, address string) (io.ReadCloser, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, http.NoBody)
	if err != nil {
		return nil, err
	}
	return do(req)
}

func getJSON(ctx context.Context, address string, into any) error {
	body, err := get(ctx, address)
	if err != nil {
		return err
	}
	return decode(address, body, into)
}

func postJSON(ctx context.Context, address string, value, into any) error {
	data, err := json.Marshal(value)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	body, err := do(req)
	if err != nil {
		return err
	}
	return decode(address, body, into)
}

func decode(address string, body io.ReadCloser, into any) error {
	defer body.Close()
	if into == nil {
		return nil
	}
	if err := json.NewDecoder(body).Decode(into); err != nil {
		return fmt.Errorf("%s: %w", address, err)
	}
	return nil
}
