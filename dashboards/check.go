package main

import (
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"github.com/prometheus/prometheus/model/labels"
	"github.com/prometheus/prometheus/promql/parser"
)

// variables are what Grafana puts into a query, as for a board that shows all.
var variables = strings.NewReplacer(
	"$__rate_interval", "1m", "$__range", "1h",
	"$job", ".*", "$instance", ".*", "$stream", ".*", "$consumer", ".*",
)

// A checked query is one that names only what exists.
type checked struct {
	expr    string   // without Grafana's variables
	metrics []string // that it reads
	labels  labelSet // of its result
}

// check parses a query whose names are Prometheus's.
func (c *catalogue) check(expr string) (checked, error) {
	out := checked{expr: variables.Replace(expr)}
	e, err := parser.NewParser(parser.Options{}).ParseExpr(out.expr)
	if err != nil {
		return out, fmt.Errorf("%s: %w", expr, err)
	}
	k := checker{catalogue: c, metrics: labelSet{}}
	out.labels = k.result(e)
	if err := errors.Join(k.errs...); err != nil {
		return out, fmt.Errorf("%s: %w", expr, err)
	}
	out.metrics = slices.Sorted(maps.Keys(k.metrics))
	return out, nil
}

// A checker walks a query and knows the labels of what it yields.
type checker struct {
	catalogue *catalogue
	metrics   labelSet
	errs      []error
}

// result is the labels that the result of e may have; nil for a number.
func (k *checker) result(e parser.Expr) labelSet {
	switch e := e.(type) {
	case *parser.VectorSelector:
		return k.selector(e)
	case *parser.MatrixSelector:
		return k.result(e.VectorSelector)
	case *parser.SubqueryExpr:
		return k.result(e.Expr)
	case *parser.ParenExpr:
		return k.result(e.Expr)
	case *parser.UnaryExpr:
		return k.result(e.Expr)
	case *parser.AggregateExpr:
		return k.aggregate(e)
	case *parser.BinaryExpr:
		return k.binary(e)
	case *parser.Call:
		return k.call(e)
	case *parser.NumberLiteral, *parser.StringLiteral:
		return nil
	default:
		k.bad("a %T is more than this knows about", e)
		return nil
	}
}

func (k *checker) bad(format string, args ...any) {
	k.errs = append(k.errs, fmt.Errorf(format, args...))
}

// selector accepts a metric by its name, several by name|name, and all of those
// that the SDK has put series of together.
func (k *checker) selector(e *parser.VectorSelector) labelSet {
	own, names := labelSet{}, []string{e.Name}
	for _, m := range e.LabelMatchers {
		switch {
		case m.Name == overflowLabel:
			own[overflowLabel] = true
		case m.Name == nameLabel && m.Type == labels.MatchRegexp:
			names = strings.Split(m.Value, "|")
		}
	}
	if !own[overflowLabel] {
		for _, name := range names {
			if k.catalogue.series[name] == nil {
				k.bad("there is no metric %q", name)
			}
			k.metrics[name] = true
			maps.Copy(own, k.catalogue.series[name])
		}
	} else {
		maps.Copy(own, setOf("job", "instance", nameLabel))
	}
	for _, m := range e.LabelMatchers {
		if m.Name != nameLabel {
			k.need(own, m.Name)
		}
	}
	return own
}

func (k *checker) need(own labelSet, names ...string) {
	for _, n := range names {
		if !own[n] {
			k.bad("there is no label %q, only %q", n, slices.Sorted(maps.Keys(own)))
		}
	}
}

func (k *checker) aggregate(e *parser.AggregateExpr) labelSet {
	own := k.result(e.Expr)
	k.need(own, e.Grouping...)
	switch {
	case e.Op == parser.TOPK || e.Op == parser.BOTTOMK:
		return own
	case !e.Without:
		return setOf(e.Grouping...)
	default:
		return minus(own, e.Grouping...)
	}
}

func (k *checker) binary(e *parser.BinaryExpr) labelSet {
	left, right := k.result(e.LHS), k.result(e.RHS)
	if left == nil || right == nil || e.VectorMatching == nil {
		if left == nil {
			return right
		}
		return left
	}
	k.need(left, e.VectorMatching.MatchingLabels...)
	k.need(right, e.VectorMatching.MatchingLabels...)
	if !e.VectorMatching.On {
		// Labels that only one side has are never equal.
		ignored := e.VectorMatching.MatchingLabels
		if e.Op != parser.LOR && !maps.Equal(minus(left, ignored...), minus(right, ignored...)) {
			k.bad("%s matches %q with %q", e.Op, slices.Sorted(maps.Keys(left)), slices.Sorted(maps.Keys(right)))
		}
	}
	switch {
	case e.Op == parser.LOR:
		both := maps.Clone(left)
		maps.Copy(both, right)
		return both
	case e.Op == parser.LAND || e.Op == parser.LUNLESS || e.Op.IsComparisonOperator():
		return left
	case e.VectorMatching.On && len(e.VectorMatching.Include) == 0:
		return setOf(e.VectorMatching.MatchingLabels...)
	default:
		return left
	}
}

func (k *checker) call(e *parser.Call) labelSet {
	var own labelSet
	for _, arg := range e.Args {
		if got := k.result(arg); got != nil {
			own = got
		}
	}
	text := func(i int) string {
		s, _ := e.Args[i].(*parser.StringLiteral)
		return s.Val
	}
	switch e.Func.Name {
	case "vector":
		return labelSet{}
	case "histogram_quantile":
		k.need(own, "le")
		return minus(own, "le")
	case "label_replace":
		k.need(own, text(3))
		own = maps.Clone(own)
		own[text(1)] = true
	}
	return own
}

func minus(own labelSet, names ...string) labelSet {
	left := maps.Clone(own)
	for _, n := range names {
		delete(left, n)
	}
	return left
}

// Labels that a legend or an annotation shows.
var shown = regexp.MustCompile(`\{\{ *(?:\$labels\.)?([a-z_]+) *\}\}`)

// checkText says which labels of a text the query's result has not.
func (q checked) checkText(text string) error {
	var errs []error
	for _, m := range shown.FindAllStringSubmatch(text, -1) {
		if !q.labels[m[1]] {
			errs = append(errs, fmt.Errorf("%q shows the label %s, which %s has not", text, m[1], q.expr))
		}
	}
	return errors.Join(errs...)
}
