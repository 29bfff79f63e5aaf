package main

import (
	"errors"
	"fmt"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/dashboard"
	"github.com/grafana/grafana-foundation-sdk/go/heatmap"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"github.com/grafana/grafana-foundation-sdk/go/stat"
	"github.com/grafana/grafana-foundation-sdk/go/table"
	"github.com/grafana/grafana-foundation-sdk/go/text"
	"github.com/grafana/grafana-foundation-sdk/go/timeseries"
)

// A board is one page of Grafana.
type board struct {
	uid, title, text string
	variables        []variable
	rows             []row
}

type row struct {
	title  string
	panels []panel
}

type kind int

const (
	lines     kind = iota // over time
	stacked               // over time, as parts of a whole
	number                // now
	heat                  // the buckets of a histogram over time
	rows                  // a table of what is now
	traces                // a search in Jaeger; expr is what to search for
	paragraph             // no query; text is shown
)

type panel struct {
	kind     kind
	title    string
	text     string // what it shows, and what is bad; Markdown
	unit     string
	width    uint32  // of 24
	height   uint32  // 0: as high as its kind usually is
	warn     float64 // where it becomes orange; 0: nowhere
	bad      float64 // where it becomes red; 0: nowhere
	lowIsBad bool
	min, max *float64
	to       string // the board that says more; "": none
	queries  []target
}

// A target is a query of a panel.
type target struct {
	expr       string
	legend     string
	exemplars  bool
	mayBeEmpty string // why it returns nothing in a healthy system; empty: it always returns something
	provoked   bool   // it may be empty, and the end-to-end run sees to it that it is not
}

// A variable is a choice above a board: of the values that a label has in what a
// selector finds.
type variable struct {
	name, title, selector, label string
	one                          bool // and not several, or all
	any                          bool // all is also what is not in the list
}

const (
	tag           = "monotel"
	schemaVersion = 39 // Grafana 11's; later versions migrate it
	boardWidth    = 24
	prometheusUID = "${datasource}"
	jaegerUID     = "${jaeger}"
)

func source(kind, uid string) common.DataSourceRef {
	return common.DataSourceRef{Type: new(kind), Uid: new(uid)}
}

// buildBoard makes the JSON of a board, and lists its queries.
func buildBoard(c *catalogue, b board) (file []byte, queries []query, err error) {
	out := dashboard.NewDashboardBuilder(b.title).Uid(b.uid).Description(b.text).Tags([]string{tag}).
		Editable().Refresh("30s").Time("now-1h", "now").Timezone("browser").Tooltip(dashboard.DashboardCursorSyncCrosshair).
		Link(dashboard.NewDashboardLinkBuilder("Boards").Type(dashboard.DashboardLinkTypeDashboards).Tags([]string{tag}).
			IncludeVars(true).KeepTime(true)).
		WithVariable(dashboard.NewDatasourceVariableBuilder("datasource").Label("Prometheus").Type("prometheus")).
		WithVariable(dashboard.NewDatasourceVariableBuilder("jaeger").Label("Jaeger").Type("jaeger"))
	var errs []error
	for _, v := range b.variables {
		got, err := v.build(c)
		if err != nil {
			errs = append(errs, fmt.Errorf("variable %s: %w", v.name, err))
			continue
		}
		out = out.WithVariable(got)
	}
	id := uint32(0)
	for _, r := range b.rows {
		id++
		out = out.WithRow(dashboard.NewRowBuilder(r.title).Id(id))
		width := uint32(0)
		for _, p := range r.panels {
			id++
			got, asked, err := p.build(c, id)
			if err != nil {
				errs = append(errs, fmt.Errorf("%s: %w", p.title, err))
				continue
			}
			for _, q := range asked {
				q.From = b.uid + ": " + p.title
				queries = append(queries, q)
			}
			out, width = out.WithPanel(got), width+p.width
		}
		if width%boardWidth != 0 {
			errs = append(errs, fmt.Errorf("row %q is %d wide, want whole lines of %d", r.title, width, boardWidth))
		}
	}
	made, err := out.Build()
	if err := errors.Join(append(errs, err)...); err != nil {
		return nil, nil, fmt.Errorf("board %s: %w", b.uid, err)
	}
	made.SchemaVersion = schemaVersion
	for i := range made.Links {
		made.Links[i].Placement = nil // and not in a menu
	}
	file, err = toJSON(made)
	return file, queries, err
}

func (v variable) build(c *catalogue) (*dashboard.QueryVariableBuilder, error) {
	selector, err1 := c.translate(v.selector)
	label, err2 := c.translate(v.label)
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	q, err := c.check(selector)
	err = errors.Join(err, q.checkText("{{"+label+"}}"))
	ask := fmt.Sprintf("label_values(%s, %s)", selector, label)
	out := dashboard.NewQueryVariableBuilder(v.name).Label(v.title).Datasource(source("prometheus", prometheusUID)).
		Query(dashboard.StringOrMap{Map: map[string]any{"query": ask, "refId": "PrometheusVariableQueryEditor-VariableQuery"}}).Definition(ask).
		Refresh(dashboard.VariableRefreshOnTimeRangeChanged).Sort(dashboard.VariableSortAlphabeticalAsc)
	if !v.one {
		all := func(s string) dashboard.StringOrArrayOfString { return dashboard.StringOrArrayOfString{String: &s} }
		out = out.Multi(true).IncludeAll(true).Current(dashboard.VariableOption{Text: all("All"), Value: all("$__all")})
	}
	if v.any {
		out = out.AllValue(".*")
	}
	return out, err
}

// A built panel goes into a dashboard as it is.
type built dashboard.Panel

func (b built) Build() (dashboard.Panel, error) { return dashboard.Panel(b), nil }

func (p panel) build(c *catalogue, id uint32) (made built, queries []query, err error) {
	if p.text == "" {
		return made, nil, errors.New("says nothing about itself")
	}
	var targets []cog.Builder[variants.Dataquery]
	for i, t := range p.queries {
		ref := string(rune('A' + i))
		if p.kind == traces {
			targets, queries = append(targets, search{ref: ref, tags: t.expr}), append(queries, query{Tags: t.expr})
			continue
		}
		got, q, err := t.build(c, p.kind, ref)
		if err != nil {
			return made, nil, err
		}
		targets, queries = append(targets, got), append(queries, q)
	}
	out, err := p.draw(targets)
	if err != nil {
		return made, nil, err
	}
	out.Id, out.Title, out.Description = &id, &p.title, &p.text
	out.GridPos = &dashboard.GridPos{W: p.width, H: p.heightOr()}
	if p.to != "" {
		link, err := dashboard.NewDashboardLinkBuilder("More").Type(dashboard.DashboardLinkTypeLink).
			Url("/d/" + p.to + "?${__url_time_range}&${__all_variables}").Build()
		if err != nil {
			return made, nil, err
		}
		link.Placement = nil // beside the title
		out.Links = append(out.Links, link)
	}
	ref := source("prometheus", prometheusUID)
	switch p.kind {
	case traces:
		ref = source("jaeger", jaegerUID)
	case paragraph:
		out.Description = nil
		return built(out), queries, nil
	default:
	}
	out.Datasource = &ref
	return built(out), queries, nil
}

func (p panel) heightOr() uint32 {
	switch {
	case p.height != 0:
		return p.height
	case p.kind == number:
		return 4
	default:
		return 8
	}
}

func (t target) build(c *catalogue, k kind, ref string) (*prometheus.DataqueryBuilder, query, error) {
	expr, err1 := c.translate(t.expr)
	legend, err2 := c.translate(t.legend)
	if err := errors.Join(err1, err2); err != nil {
		return nil, query{}, err
	}
	q, err := c.check(expr)
	if err := errors.Join(err, q.checkText(legend)); err != nil {
		return nil, query{}, err
	}
	out := prometheus.NewDataqueryBuilder().Expr(expr).LegendFormat(legend).RefId(ref).Datasource(source("prometheus", prometheusUID)).
		EditorMode(prometheus.QueryEditorModeCode)
	switch k {
	case number:
		out = out.Range() // with its course behind it
	case rows:
		out = out.Instant().Format(prometheus.PromQueryFormatTable)
	case heat:
		out = out.Range().Format(prometheus.PromQueryFormatHeatmap)
	default:
		out = out.Range()
	}
	if t.exemplars {
		out = out.Exemplar(true)
	}
	return out, query{Expr: q.expr, Metrics: q.metrics, MayBeEmpty: t.mayBeEmpty, Provoked: t.provoked}, nil
}

// search is a query to Jaeger, which the library has no type for.
type search struct{ ref, tags string }

func (s search) Build() (variants.Dataquery, error) {
	return variants.UnknownDataquery{
		"refId": s.ref, "datasource": source("jaeger", jaegerUID), "queryType": "search",
		"service": "$service", "tags": s.tags, "limit": 20,
	}, nil
}

func (p panel) draw(targets []cog.Builder[variants.Dataquery]) (dashboard.Panel, error) {
	steps := dashboard.NewThresholdsConfigBuilder().Mode(dashboard.ThresholdsModeAbsolute).Steps(p.steps())
	switch p.kind {
	case paragraph:
		return text.NewPanelBuilder().Mode(text.TextModeMarkdown).Content(p.text).Build()
	case traces: // of several searches one table
		return table.NewPanelBuilder().Targets(targets).
			WithTransformation(dashboard.DataTransformerConfig{Id: "merge", Options: map[string]any{}}).Build()
	case rows:
		return table.NewPanelBuilder().Targets(targets).NoValue("none").
			WithTransformation(dashboard.DataTransformerConfig{
				Id: "organize", Options: map[string]any{"excludeByName": map[string]bool{"Time": true, "Value": true, "__name__": true}},
			}).Build()
	case number:
		out := stat.NewPanelBuilder().Targets(targets).Unit(p.unit).NoValue("none").Thresholds(steps).
			ReduceOptions(common.NewReduceDataOptionsBuilder().Calcs([]string{"lastNotNull"})).
			Orientation(common.VizOrientationAuto).ColorMode(common.BigValueColorModeValue).GraphMode(common.BigValueGraphModeArea)
		if p.min != nil {
			out = out.Min(*p.min)
		}
		if p.max != nil {
			out = out.Max(*p.max)
		}
		return out.Build()
	case heat:
		return heatmap.NewPanelBuilder().Targets(targets).Calculate(false).ExemplarsColor("rgba(255,0,255,0.7)").
			YAxis(heatmap.NewYAxisConfigBuilder().Unit(p.unit)).
			Color(heatmap.NewHeatmapColorOptionsBuilder().Mode(heatmap.HeatmapColorModeScheme).Scheme("Oranges").
				Scale(heatmap.HeatmapColorScaleExponential).Exponent(0.5).Steps(64)).
			Tooltip(heatmap.NewHeatmapTooltipBuilder().Mode(common.TooltipDisplayModeSingle).YHistogram(true)).Build()
	default:
		return p.drawLines(targets, steps)
	}
}

func (p panel) drawLines(
	targets []cog.Builder[variants.Dataquery], steps cog.Builder[dashboard.ThresholdsConfig],
) (dashboard.Panel, error) {
	out := timeseries.NewPanelBuilder().Targets(targets).Unit(p.unit).Thresholds(steps).
		Legend(common.NewVizLegendOptionsBuilder().DisplayMode(common.LegendDisplayModeTable).Placement(common.LegendPlacementBottom).
			ShowLegend(true).Calcs([]string{"lastNotNull", "max"})).
		Tooltip(common.NewVizTooltipOptionsBuilder().Mode(common.TooltipDisplayModeMulti).Sort(common.SortOrderDescending)).
		LineWidth(1).FillOpacity(10).ShowPoints(common.VisibilityModeAuto).AxisSoftMin(0)
	if p.kind == stacked {
		out = out.FillOpacity(40).Stacking(common.NewStackingConfigBuilder().Mode(common.StackingModeNormal))
	}
	if p.warn != 0 || p.bad != 0 {
		out = out.ThresholdsStyle(common.NewGraphThresholdsStyleConfigBuilder().Mode(common.GraphThresholdsStyleModeDashed))
	}
	if p.min != nil {
		out = out.Min(*p.min)
	}
	if p.max != nil {
		out = out.Max(*p.max)
	}
	return out.Build()
}

// steps are the colours, from the lowest value on.
func (p panel) steps() []dashboard.Threshold {
	below, middle, above := "green", "orange", "red"
	first, second := p.warn, p.bad
	if p.lowIsBad {
		below, above = above, below
		first, second = p.bad, p.warn
	}
	out := []dashboard.Threshold{{Color: below}}
	switch {
	case first != 0 && second != 0:
		out = append(out, dashboard.Threshold{Value: &first, Color: middle}, dashboard.Threshold{Value: &second, Color: above})
	case p.bad != 0:
		out = append(out, dashboard.Threshold{Value: &p.bad, Color: above})
	case p.warn != 0 && p.lowIsBad:
		out[0].Color = middle
		out = append(out, dashboard.Threshold{Value: &p.warn, Color: above})
	case p.warn != 0:
		out = append(out, dashboard.Threshold{Value: &p.warn, Color: middle})
	}
	return out
}
