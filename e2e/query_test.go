package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// A boardQuery is one of a panel or a rule, from dashboards/queries.json.
type boardQuery struct {
	From       string `json:"from"`
	Expr       string `json:"expr"`         // for Prometheus
	Tags       string `json:"tags"`         // or for Jaeger
	MayBeEmpty string `json:"may_be_empty"` // why it may have no data
	Provoked   bool   `json:"provoked"`     // ... but not here
}

// ask returns how much data there is.
func (q boardQuery) ask(ctx context.Context) (int, error) {
	if q.Tags != "" {
		key, value, _ := strings.Cut(q.Tags, "=")
		found, err := jae.search(ctx, "", map[string]string{key: value}, time.Now().Add(-time.Hour))
		return len(found), err
	}
	found, err := prom.query(ctx, q.Expr)
	return len(found), err
}

// Every query of every panel and rule has data while the demo has all kinds of orders.
// Of those that say why they may have none in a healthy system, the alerts have none
// because they do not all fire together; the rest are asked whether they are valid.
func TestQueries(t *testing.T) {
	data, err := os.ReadFile(filepath.Join(root(), "dashboards", "queries.json"))
	if err != nil {
		t.Fatal(err)
	}
	var queries []boardQuery
	if err := json.Unmarshal(data, &queries); err != nil {
		t.Fatal(err)
	}
	if len(queries) < 50 {
		t.Fatalf("there are %d queries", len(queries))
	}
	setLedger(t, "flaky")
	// Without a server publishes fail.
	restarted(t, serviceNATS, sys.stop, func() {
		if o, err := postOrder(t.Context(), "anna"); err == nil {
			t.Errorf("%+v was taken without a NATS server", o)
		}
	})
	for _, service := range []string{serviceEmitter, serviceConsumers} {
		awaitPage(t, sys.url(service)+"/healthz")
	}
	empty := make(map[string]boardQuery)
	for _, q := range queries {
		empty[q.From+"\n"+q.Expr+q.Tags] = q
	}
	ask := func(ctx context.Context) error {
		for key, q := range empty {
			n, err := q.ask(ctx)
			switch {
			case err != nil:
				t.Errorf("%s: %v", q.From, err)
				delete(empty, key)
			case n > 0 || q.MayBeEmpty != "" && !q.Provoked:
				delete(empty, key)
			}
		}
		if len(empty) == 0 {
			return nil
		}
		var left []string
		for _, q := range empty {
			left = append(left, q.From+": "+q.Expr+q.Tags)
		}
		return fmt.Errorf("no data in %d of %d:\n%s", len(left), len(queries), strings.Join(left, "\n"))
	}
	again := 0
	untilFor(t, 6*time.Minute, "every query has data", func(ctx context.Context) error {
		again++
		if again%10 == 1 { // some look at the last minute only
			if err := allKinds(ctx); err != nil {
				return err
			}
		}
		return ask(ctx)
	})

	until(t, "every rule is evaluated", func(ctx context.Context) error {
		rules, err := prom.rules(ctx)
		if err != nil {
			return err
		}
		var errs []error
		for _, r := range rules {
			if r.Health != "ok" {
				errs = append(errs, fmt.Errorf("rule %s is %s: %s", r.Name, r.Health, r.LastError))
			}
		}
		return errors.Join(errs...)
	})
}

// allKinds sends orders that are acked, that are tried again and that are given up,
// and replays some with success and some without.
func allKinds(ctx context.Context) error {
	for _, customer := range []string{"anna", felix, greta, ivan} {
		if _, err := postOrder(ctx, customer); err != nil {
			return err
		}
	}
	// Not with Permanent errors alone: this one is closed for the first attempt only.
	if err := postJSON(ctx, sys.url(serviceConsumers)+"/ledger/break?mode=closed", nil, nil); err != nil {
		return err
	}
	if _, err := postOrder(ctx, "carla"); err != nil {
		return err
	}
	err := poll(ctx, func(ctx context.Context) error {
		dead, err := listDead(ctx, "carla")
		if err == nil && len(dead) == 0 {
			err = errors.New("no order of carla is a dead letter")
		}
		return err
	})
	if err != nil {
		return err
	}
	if err := postJSON(ctx, sys.url(serviceConsumers)+"/ledger/break?mode=flaky", nil, nil); err != nil {
		return err
	}
	_, _, err = sys.monotel(ctx, "dlq", "replay", "--where", `payload.customer_id in ["carla", "ivan"]`, "--yes", "--force", "--reason", "try again", "--quiet")
	if exitCode(err) == exitPartly { // those without an account fail again
		return nil
	}
	return err
}
