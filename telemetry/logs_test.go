package telemetry_test

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/monotel/monotel/telemetry"
)

func TestHandler(t *testing.T) {
	t.Parallel()
	tel := setup(t, telemetry.WithSpanExporter(fakeExporter{}))
	ctx, span := tel.TracerProvider().Tracer("test").Start(t.Context(), "logged")
	defer span.End()
	traceID, spanID := span.SpanContext().TraceID().String(), span.SpanContext().SpanID().String()
	for _, tt := range []struct {
		name string
		log  func(*slog.Logger)
		want map[string]any
	}{
		{
			name: "plain", log: func(l *slog.Logger) { l.InfoContext(ctx, "m", "a", "b") },
			want: map[string]any{"msg": "m", "a": "b", "trace_id": traceID, "span_id": spanID},
		},
		{
			name: "without a span", log: func(l *slog.Logger) { l.InfoContext(t.Context(), "m") },
			want: map[string]any{"msg": "m"},
		},
		{
			name: "with attributes", log: func(l *slog.Logger) { l.With("x", "y").With().InfoContext(ctx, "m", "a", "b") },
			want: map[string]any{"msg": "m", "x": "y", "a": "b", "trace_id": traceID, "span_id": spanID},
		},
		{
			name: "in groups the IDs stay outside",
			log: func(l *slog.Logger) {
				l.With("x", "y").WithGroup("g").With("u", "v").WithGroup("").WithGroup("h").InfoContext(ctx, "m", "a", "b")
			},
			want: map[string]any{
				"msg": "m", "x": "y", "trace_id": traceID, "span_id": spanID,
				"g": map[string]any{"u": "v", "h": map[string]any{"a": "b"}},
			},
		},
		{
			name: "one group does not leak into another",
			log: func(l *slog.Logger) {
				g := l.WithGroup("g")
				g.With("one", "1")
				g.With("two", "2").InfoContext(ctx, "m")
			},
			want: map[string]any{"msg": "m", "trace_id": traceID, "span_id": spanID, "g": map[string]any{"two": "2"}},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			var buf bytes.Buffer
			tt.log(slog.New(tel.Handler(slog.NewJSONHandler(&buf, nil))))
			var got map[string]any
			if err := json.Unmarshal(buf.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			delete(got, "time")
			delete(got, "level")
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
