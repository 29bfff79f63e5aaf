package mono

import (
	"slices"
	"testing"
)

func TestDeliveryOrder(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		name          string
		sequences     []uint64
		again, behind []uint64
	}{
		{"in order", []uint64{1, 2, 3, 4}, nil, nil},
		{"some go to another instance", []uint64{1, 5, 6, 100, 300}, nil, nil},
		{"one comes late", []uint64{300, 304, 302, 306}, nil, []uint64{302}},
		{"several come late", []uint64{300, 304, 303, 301, 302, 305}, nil, []uint64{303, 301, 302}},
		{"the first comes late", []uint64{304, 302, 303}, nil, []uint64{302, 303}},
		{"the same twice", []uint64{300, 304, 304}, []uint64{304}, nil},
		{"counted again from one that was here", []uint64{300, 301, 302, 301, 302, 303}, []uint64{301}, nil},
		{"counted again from one that was elsewhere", []uint64{300, 302, 301, 302, 303}, []uint64{302}, []uint64{301}},
		{"the late one twice", []uint64{300, 304, 302, 302}, []uint64{302}, []uint64{302}},
		{"counted from the beginning", []uint64{300, 1, 2}, []uint64{1}, nil},
		{"as far as it may be", []uint64{1, 100, 37}, nil, []uint64{37}},
		{"one more", []uint64{1, 100, 36}, []uint64{36}, nil},
		{"after a gap of the whole window", []uint64{36, 100, 37}, nil, []uint64{37}},
		{"the largest", []uint64{1<<64 - 1, 1<<64 - 2, 1<<64 - 1}, []uint64{1<<64 - 1}, []uint64{1<<64 - 2}},
	} {
		var o deliveryOrder
		var again, behind []uint64
		for _, s := range tt.sequences {
			a, b := o.note(s)
			if a {
				again = append(again, s)
			}
			if b {
				behind = append(behind, s)
			}
		}
		if !slices.Equal(again, tt.again) || !slices.Equal(behind, tt.behind) {
			t.Errorf("%s: counted again at %d, out of order %d, want %d and %d", tt.name, again, behind, tt.again, tt.behind)
		}
	}
}
