package telemetry

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"

	"github.com/monotel/monotel/telemetry/messaging"
)

// NewSampler returns the sampler of [Setup]. A span whose parent is sampled is,
// and of the traces that begin here the given part. Besides, so that failures are
// seen at any ratio:
//
//   - a trace that begins with a link to a sampled one is sampled;
//   - every delivery of a message after the first is sampled;
//   - dead letters and replays are sampled, also in traces that are not.
func NewSampler(ratio float64) sdktrace.Sampler {
	return sampler{root: sdktrace.TraceIDRatioBased(ratio), parents: true}
}

type sampler struct {
	root    sdktrace.Sampler
	parents bool // follow the parent's decision
}

// The names of operations that are always sampled.
const (
	opDeadLetter = "dead_letter"
	opReplay     = "replay"
)

const keyOperation = attribute.Key("messaging.operation.name")

func (s sampler) ShouldSample(p sdktrace.SamplingParameters) sdktrace.SamplingResult {
	parent := trace.SpanContextFromContext(p.ParentContext)
	for _, a := range p.Attributes {
		switch a.Key {
		case messaging.KeyDeliveryCount:
			if a.Value.AsInt64() > 1 {
				return sampled(parent)
			}
		case keyOperation:
			if v := a.Value.AsString(); v == opDeadLetter || v == opReplay {
				return sampled(parent)
			}
		}
	}
	if s.parents && parent.IsValid() {
		if parent.IsSampled() {
			return sampled(parent)
		}
		return sdktrace.SamplingResult{Decision: sdktrace.Drop, Tracestate: parent.TraceState()}
	}
	for _, l := range p.Links {
		if l.SpanContext.IsSampled() {
			return sampled(parent)
		}
	}
	return s.root.ShouldSample(p)
}

func sampled(parent trace.SpanContext) sdktrace.SamplingResult {
	return sdktrace.SamplingResult{Decision: sdktrace.RecordAndSample, Tracestate: parent.TraceState()}
}

func (s sampler) Description() string {
	if s.parents {
		return fmt.Sprintf("Monotel{parent,links,retries,root:%s}", s.root.Description())
	}
	return fmt.Sprintf("Monotel{links,retries,root:%s}", s.root.Description())
}

// samplerFromEnv is the sampler that the environment asks for, else that of the
// ratio. The environment's always_on, always_off and ratios keep what NewSampler
// adds, except that always_off is always off.
func samplerFromEnv(ratio float64) (sdktrace.Sampler, error) {
	name := strings.ToLower(strings.TrimSpace(os.Getenv("OTEL_TRACES_SAMPLER")))
	arg := strings.TrimSpace(os.Getenv("OTEL_TRACES_SAMPLER_ARG"))
	if name == "" {
		return NewSampler(ratio), nil
	}
	base, parents := strings.CutPrefix(name, "parentbased_")
	switch base {
	case "always_on":
		return sampler{root: sdktrace.AlwaysSample(), parents: parents}, nil
	case "always_off":
		if parents {
			return sdktrace.ParentBased(sdktrace.NeverSample()), nil
		}
		return sdktrace.NeverSample(), nil
	case "traceidratio":
		r := 1.0
		if arg != "" {
			var err error
			if r, err = strconv.ParseFloat(arg, 64); err != nil || !(r >= 0 && r <= 1) {
				return nil, fmt.Errorf("%w: OTEL_TRACES_SAMPLER_ARG is %q, want 0 to 1", ErrInvalidConfig, arg)
			}
		}
		return sampler{root: sdktrace.TraceIDRatioBased(r), parents: parents}, nil
	}
	return nil, fmt.Errorf("%w: OTEL_TRACES_SAMPLER is %q, want always_on, always_off or traceidratio, with or without parentbased_ before it",
		ErrInvalidConfig, name)
}
