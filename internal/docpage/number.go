package docpage

import (
	"slices"
	"strconv"
)

// Quantile returns the value below which the part q of vs lies, between two of
// them where it has to. There must be one.
func Quantile(vs []float64, q float64) float64 {
	vs = slices.Sorted(slices.Values(vs))
	at := q * float64(len(vs)-1)
	i := int(at)
	if i == len(vs)-1 {
		return vs[i]
	}
	return vs[i] + (at-float64(i))*(vs[i+1]-vs[i])
}

// Duration shows nanoseconds with three digits.
func Duration(ns float64) string {
	const thousand = 1000
	for _, unit := range []string{"ns", "µs", "ms"} {
		if ns < thousand {
			return Digits(ns) + " " + unit
		}
		ns /= thousand
	}
	return Digits(ns) + " s"
}

// Digits shows a number that is not negative with three digits, or all before the
// point.
func Digits(v float64) string {
	switch {
	case v < 10:
		return strconv.FormatFloat(v, 'f', 2, 64)
	case v < 100:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'f', 0, 64)
}
