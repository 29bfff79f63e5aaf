package telemetry

import (
	"errors"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	otelprometheus "go.opentelemetry.io/otel/exporters/prometheus"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/exemplar"
	"go.opentelemetry.io/otel/sdk/resource"
)

const (
	// cardinalityLimit is for each instrument. The SDK's own, 2000, is less than
	// an App with a thousand consumers has series of settlements.
	cardinalityLimit = 20_000

	// The resolution of native histograms: as many buckets as Prometheus's own
	// clients use, with a factor of 1.09 between them as long as they suffice.
	nativeBuckets  = 160
	nativeMaxScale = 3
)

func (t *Telemetry) startMetrics(cfg *config, res *resource.Resource, pushed sdkmetric.Reader) error {
	for _, c := range []prometheus.Collector{
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	} {
		// A registry of the program's may have them.
		if err := t.registry.Register(c); err != nil && !errors.As(err, new(prometheus.AlreadyRegisteredError)) {
			return fmt.Errorf("WithRegistry: %w", err)
		}
	}
	scraped, err := otelprometheus.New(otelprometheus.WithRegisterer(t.registry), otelprometheus.WithoutScopeInfo())
	if err != nil {
		return fmt.Errorf("WithRegistry: %w", err)
	}
	opts := []sdkmetric.Option{
		sdkmetric.WithResource(res), sdkmetric.WithReader(scraped), sdkmetric.WithCardinalityLimit(cardinalityLimit),
		sdkmetric.WithExemplarFilter(exemplar.TraceBasedFilter),
	}
	if cfg.nativeHistograms {
		opts = append(opts, sdkmetric.WithView(sdkmetric.NewView(
			sdkmetric.Instrument{Kind: sdkmetric.InstrumentKindHistogram},
			sdkmetric.Stream{Aggregation: sdkmetric.AggregationBase2ExponentialHistogram{MaxSize: nativeBuckets, MaxScale: nativeMaxScale}},
		)))
	}
	if pushed != nil {
		opts = append(opts, sdkmetric.WithReader(pushed))
	}
	t.meters = sdkmetric.NewMeterProvider(opts...)
	return nil
}
