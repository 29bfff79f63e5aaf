package main

import (
	"math"
	"strings"
	"testing"
)

func FuzzParseResults(f *testing.F) {
	f.Add("goos: linux\nBenchmarkPublish/transport=inprocess/size=256/lib=raw 1 100 ns/op 2 allocs/op\n")
	f.Add("BenchmarkPublish/transport=loopback/size=99999999999999999999/lib=raw 1 NaN ns/op\n")
	f.Add("Benchmark/=/= 1 2 3\n")
	f.Fuzz(func(t *testing.T, text string) {
		res, err := parseResults(strings.NewReader(text))
		if err != nil {
			return
		}
		for k, vs := range res.values {
			for _, v := range vs {
				if !(math.Abs(v) <= math.MaxFloat64) {
					t.Errorf("%v is %v", k, v)
				}
			}
			if _, ok := res.median(k); !ok {
				t.Errorf("%v has no median", k)
			}
		}
	})
}
