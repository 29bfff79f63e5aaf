package telemetry

import (
	"errors"
	"strings"
	"testing"
)

// FuzzEnvironment has what others may write into the environment.
func FuzzEnvironment(f *testing.F) {
	f.Add("parentbased_traceidratio", "0.5", "http://u:secret@host:4318", "a=b,c=d%20e", "1")
	f.Add("traceidratio", "NaN", "http://u:secret%zz@host", "authorization: secret", "-1")
	f.Add("", "", "", ",", "99999999999999999999")
	f.Fuzz(func(t *testing.T, sampler, arg, endpoint, headers, size string) {
		for name, value := range map[string]string{
			"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": arg, "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
			"OTEL_EXPORTER_OTLP_HEADERS": headers, "OTEL_BSP_MAX_QUEUE_SIZE": size,
		} {
			if strings.ContainsRune(value, 0) {
				t.Skip("no input: the environment takes no NUL")
			}
			t.Setenv(name, value)
		}
		c := defaultConfig()
		err := c.readEnv()
		if err == nil && (c.sampler == nil || c.propagator == nil || c.queueSize < 1 || c.queueSize > maxQueueSize || c.batchSize < 1 || c.batchSize > c.queueSize) {
			t.Errorf("the configuration is %+v", c)
		}
		if err != nil && !errors.Is(err, ErrInvalidConfig) {
			t.Error(err)
		}
		if err := checkOTLP(); err != nil && strings.Contains(err.Error(), "secret") {
			t.Error(err)
		}
	})
}
