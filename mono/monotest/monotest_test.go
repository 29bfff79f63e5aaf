package monotest_test

import "testing"

// The example holds.
func Test(t *testing.T) {
	t.Parallel()
	testShop(t)
}
