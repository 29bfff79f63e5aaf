package mono

// A deliveryOrder tells whether a server counts deliveries again: one that was killed goes
// on from what it has on disk. In a cluster deliveries may also come in another order than
// they were counted in, which means nothing. So a sequence that is behind shows that the
// server counts again only if it was here before, or is far behind.
type deliveryOrder struct {
	last uint64 // highest consumer sequence
	seen uint64 // bit n: last-n was here
}

// maxDisorder is how far behind a delivery may come.
const maxDisorder = 64

// note takes the next delivery. again says that the server counts again, behind that the
// delivery is out of order, or so it seems.
func (o *deliveryOrder) note(sequence uint64) (again, behind bool) {
	if sequence > o.last {
		o.seen = o.seen<<(sequence-o.last) | 1
		o.last = sequence
		return false, false
	}
	back := o.last - sequence
	if back < maxDisorder && o.seen&(1<<back) == 0 {
		o.seen |= 1 << back
		return false, true
	}
	o.last, o.seen = sequence, 1
	return true, false
}
