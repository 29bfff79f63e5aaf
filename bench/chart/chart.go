// Package chart draws what was measured as SVG. The same numbers make the same
// file, and its background is opaque, so that it reads on light and dark pages.
package chart

import (
	"bytes"
	"fmt"
	"image/color"
	"math"
	"os"
	"slices"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// Lines has a line for each series, over a logarithmic axis of what was varied.
type Lines struct {
	Title  string
	X, Y   string // labels with units
	LogY   bool
	Series []Series
}

// A Series is one line.
type Series struct {
	Name   string
	Points []Point
	Paper  bool // calculated, not measured: dashed, in the color of the series before it
}

// A Point is one value.
type Point struct{ X, Y float64 }

// Bars has a bar for each group, made of parts that are stacked.
type Bars struct {
	Title  string
	Y      string // label with unit
	Groups []string
	Parts  []Part
}

// A Part is what one thing adds to each bar.
type Part struct {
	Name   string
	Values []float64
}

const (
	width  = 16 * vg.Centimeter
	height = 10 * vg.Centimeter
)

// palette can be told apart by the color-blind as well.
var palette = []color.Color{
	color.RGBA{R: 0, G: 114, B: 178, A: 255},
	color.RGBA{R: 213, G: 94, B: 0, A: 255},
	color.RGBA{R: 0, G: 158, B: 115, A: 255},
	color.RGBA{R: 204, G: 121, B: 167, A: 255},
	color.RGBA{R: 86, G: 180, B: 233, A: 255},
	color.RGBA{R: 130, G: 130, B: 130, A: 255},
}

var glyphs = []draw.GlyphDrawer{
	draw.CircleGlyph{}, draw.SquareGlyph{}, draw.TriangleGlyph{}, draw.PyramidGlyph{}, draw.RingGlyph{}, draw.BoxGlyph{},
}

// Write draws the chart into a file. A series without points is an error.
func (l Lines) Write(file string) error {
	p := newPlot(l.Title, l.Y)
	p.X.Label.Text = l.X
	p.X.Scale = plot.LogScale{}
	p.Y.Min = 0
	if l.LogY {
		p.Y.Scale = plot.LogScale{}
		p.Y.Tick.Marker = plot.TickerFunc(decades)
		p.Y.Min = math.Inf(1)
	}
	var ticks []plot.Tick
	look := -1
	for _, s := range l.Series {
		if !s.Paper {
			look++
		}
		if len(s.Points) == 0 {
			return fmt.Errorf("%s: series %q has no points", file, s.Name)
		}
		points := make(plotter.XYs, 0, len(s.Points))
		for _, pt := range s.Points {
			if l.LogY && pt.Y <= 0 {
				return fmt.Errorf("%s: series %q: %g is not on a logarithmic axis", file, s.Name, pt.Y)
			}
			points = append(points, plotter.XY(pt))
			ticks = append(ticks, plot.Tick{Value: pt.X, Label: number(pt.X)})
		}
		line, scatter, err := plotter.NewLinePoints(points)
		if err != nil {
			return fmt.Errorf("%s: series %q: %w", file, s.Name, err)
		}
		line.Width = vg.Points(1.5)
		line.Color = palette[max(look, 0)%len(palette)]
		if s.Paper {
			line.Dashes = []vg.Length{vg.Points(4), vg.Points(3)}
			p.Add(line)
			p.Legend.Add(s.Name, line)
			continue
		}
		scatter.Color = line.Color
		scatter.Shape = glyphs[look%len(glyphs)]
		p.Add(line, scatter)
		p.Legend.Add(s.Name, line, scatter)
	}
	slices.SortFunc(ticks, func(a, b plot.Tick) int { return int(a.Value - b.Value) })
	p.X.Tick.Marker = plot.ConstantTicks(slices.CompactFunc(ticks, func(a, b plot.Tick) bool { return a.Value == b.Value }))
	if l.LogY { // whole decades, so that the axis has labels
		p.Y.Min = math.Pow(10, math.Floor(math.Log10(p.Y.Min)))
		p.Y.Max = math.Pow(10, math.Ceil(math.Log10(p.Y.Max)))
	}
	return write(p, file)
}

// Write draws the chart into a file.
func (b Bars) Write(file string) error {
	p := newPlot(b.Title, b.Y)
	p.NominalX(b.Groups...)
	var below *plotter.BarChart
	for i, part := range b.Parts {
		bar, err := plotter.NewBarChart(plotter.Values(part.Values), vg.Points(28))
		if err != nil {
			return fmt.Errorf("%s: part %q: %w", file, part.Name, err)
		}
		bar.Color = palette[i%len(palette)]
		bar.LineStyle.Width = 0
		if below != nil {
			bar.StackOn(below)
		}
		below = bar
		p.Add(bar)
		p.Legend.Add(part.Name, bar)
	}
	p.Y.Min = 0
	return write(p, file)
}

func newPlot(title, y string) *plot.Plot {
	p := plot.New()
	p.BackgroundColor = color.White
	p.Title.Text = title
	p.Title.Padding = vg.Points(8)
	p.Y.Label.Text = y
	p.Y.Tick.Marker = plot.TickerFunc(thousands)
	p.X.Padding, p.Y.Padding = vg.Points(4), vg.Points(4)
	for _, f := range []*font.Font{
		&p.Title.TextStyle.Font, &p.X.Label.TextStyle.Font, &p.Y.Label.TextStyle.Font,
		&p.X.Tick.Label.Font, &p.Y.Tick.Label.Font, &p.Legend.TextStyle.Font,
	} {
		f.Variant, f.Size = "Sans", vg.Points(10)
	}
	p.Title.TextStyle.Font.Size = vg.Points(12)
	p.Legend.Padding = vg.Points(2)
	grid := plotter.NewGrid()
	grid.Vertical.Width = 0
	grid.Horizontal.Color = color.Gray{Y: 225}
	p.Add(grid)
	return p
}

// decades labels the powers of ten.
func decades(least, most float64) []plot.Tick {
	var ticks []plot.Tick
	for v := math.Pow(10, math.Floor(math.Log10(least))); v <= most*1.001; v *= 10 {
		ticks = append(ticks, plot.Tick{Value: v, Label: number(v)})
		for i := 2.0; i < 10 && v*i <= most; i++ {
			ticks = append(ticks, plot.Tick{Value: v * i})
		}
	}
	return ticks
}

func thousands(least, most float64) []plot.Tick {
	ticks := plot.DefaultTicks{}.Ticks(least, most)
	for i := range ticks {
		if ticks[i].Label != "" {
			ticks[i].Label = number(ticks[i].Value)
		}
	}
	return ticks
}

// number groups digits with spaces.
func number(v float64) string {
	s := strconv.FormatFloat(v, 'g', 6, 64)
	if v >= 1000 {
		s = strconv.FormatFloat(v, 'f', 0, 64)
		for i := len(s) - 3; i > 0; i -= 3 {
			s = s[:i] + " " + s[i:]
		}
	}
	return s
}

// write puts the legend beside the plot, where it hides no line, and names fonts that
// are alike, for readers who have not the first.
func write(p *plot.Plot, file string) error {
	legend := p.Legend
	p.Legend = plot.NewLegend()
	canvas := vgsvg.New(width, height)
	all := draw.New(canvas)
	all.SetColor(p.BackgroundColor)
	all.Fill(all.Rectangle.Path())
	legend.ThumbnailWidth = vg.Points(24)
	legend.Top = true
	const margin = 6
	room := legend.Rectangle(all).Size().X + 3*margin
	p.Draw(draw.Crop(all, margin, -room, margin, -margin))
	legend.Draw(draw.Crop(all, 0, -margin, 0, -5*margin))
	var b bytes.Buffer
	if _, err := canvas.WriteTo(&b); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	svg := bytes.ReplaceAll(b.Bytes(), []byte("font-family:Liberation Sans"), []byte("font-family:Liberation Sans,Arial,Helvetica,sans-serif"))
	const everybodyReads = 0o644
	return os.WriteFile(file, svg, everybodyReads)
}
