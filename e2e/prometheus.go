package e2e

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A prometheus asks one by its HTTP API.
type prometheus struct{ url string }

// A sample is a series and its value.
type sample struct {
	labels map[string]string
	value  float64
}

func (s sample) String() string {
	var b strings.Builder
	for i, k := range slices.Sorted(maps.Keys(s.labels)) {
		if i > 0 {
			b.WriteByte(' ')
		}
		fmt.Fprintf(&b, "%s=%q", k, s.labels[k])
	}
	return fmt.Sprintf("{%s} %v", &b, s.value)
}

// query asks for a vector or a scalar.
func (p prometheus) query(ctx context.Context, q string) ([]sample, error) {
	var answer struct {
		Data struct {
			Type   string `json:"resultType"`
			Result []struct {
				Metric map[string]string `json:"metric"`
				Value  [2]any            `json:"value"`
			} `json:"result"`
		} `json:"data"`
	}
	if err := getJSON(ctx, p.url+"/api/v1/query?query="+urlEscape(q), &answer); err != nil {
		return nil, fmt.Errorf("%s: %w", q, err)
	}
	samples := make([]sample, 0, len(answer.Data.Result))
	for _, r := range answer.Data.Result {
		text, _ := r.Value[1].(string)
		v, err := strconv.ParseFloat(text, 64)
		if err != nil {
			return nil, fmt.Errorf("%s: value %q: %w", q, r.Value[1], err)
		}
		samples = append(samples, sample{r.Metric, v})
	}
	return samples, nil
}

// value asks for a vector of one.
func (p prometheus) value(ctx context.Context, q string) (float64, error) {
	samples, err := p.query(ctx, q)
	switch {
	case err != nil:
		return 0, err
	case len(samples) != 1:
		return 0, fmt.Errorf("%s: %d series, want one: %v", q, len(samples), samples)
	}
	return samples[0].value, nil
}

// exemplars returns the trace IDs of those that a selector has.
func (p prometheus) exemplars(ctx context.Context, selector string, since time.Time) ([]string, error) {
	var answer struct {
		Data []struct {
			Exemplars []struct {
				Labels map[string]string `json:"labels"`
			} `json:"exemplars"`
		} `json:"data"`
	}
	address := fmt.Sprintf("%s/api/v1/query_exemplars?query=%s&start=%d&end=%d", p.url, urlEscape(selector), since.Unix(), time.Now().Unix()+1)
	if err := getJSON(ctx, address, &answer); err != nil {
		return nil, err
	}
	var ids []string
	for _, d := range answer.Data {
		for _, e := range d.Exemplars {
			ids = append(ids, e.Labels["trace_id"])
		}
	}
	return ids, nil
}

// alert returns the states of the alerts of that name: "pending", "firing".
func (p prometheus) alert(ctx context.Context, name string) ([]string, error) {
	var answer struct {
		Data struct {
			Alerts []struct {
				Labels map[string]string `json:"labels"`
				State  string            `json:"state"`
			} `json:"alerts"`
		} `json:"data"`
	}
	if err := getJSON(ctx, p.url+"/api/v1/alerts", &answer); err != nil {
		return nil, err
	}
	var states []string
	for _, a := range answer.Data.Alerts {
		if a.Labels["alertname"] == name {
			states = append(states, a.State)
		}
	}
	return states, nil
}

// A rule as Prometheus has loaded it.
type rule struct {
	Name, Query, Type, Health, LastError string
}

func (p prometheus) rules(ctx context.Context) ([]rule, error) {
	var answer struct {
		Data struct {
			Groups []struct {
				Rules []rule `json:"rules"`
			} `json:"groups"`
		} `json:"data"`
	}
	if err := getJSON(ctx, p.url+"/api/v1/rules", &answer); err != nil {
		return nil, err
	}
	var all []rule
	for _, g := range answer.Data.Groups {
		all = append(all, g.Rules...)
	}
	if len(all) == 0 {
		return nil, errors.New("prometheus has loaded no rules")
	}
	return all, nil
}

// targetsDown lists the jobs that could not be scraped.
func (p prometheus) targetsDown(ctx context.Context) ([]string, error) {
	samples, err := p.query(ctx, "up == 0")
	down := make([]string, 0, len(samples))
	for _, s := range samples {
		down = append(down, s.labels["job"])
	}
	return down, err
}
