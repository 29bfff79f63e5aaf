package telemetry_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"time"

	"github.com/monotel/monotel/telemetry"
)

// A program sets up telemetry before anything else and shuts it down last. An
// App started in between finds it by itself.
func ExampleSetup() {
	ctx := context.Background()
	tel, err := telemetry.Setup(ctx,
		telemetry.WithServiceName("orders"),
		telemetry.WithSampleRatio(0.01), // and every retry
	)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer func() {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		_ = tel.Shutdown(ctx) // what could not be sent is lost, and counted
	}()
	slog.SetDefault(slog.New(tel.Handler(slog.NewJSONHandler(os.Stderr, nil))))

	// In a program: http.ListenAndServe("127.0.0.1:9464", mux).
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", tel.MetricsHandler())
	server := httptest.NewServer(mux)
	defer server.Close()

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server.URL+"/metrics", http.NoBody)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	res, err := server.Client().Do(req)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return
	}
	defer func() { _ = res.Body.Close() }()
	page, err := io.ReadAll(res.Body)
	fmt.Println(res.Status, strings.Contains(string(page), "go_goroutines"), err)
	// Output: 200 OK true <nil>
}
