package finding

import (
	"slices"
	"testing"
)

// Every action can be allowed by exactly one word, and every word allows one.
func TestKinds(t *testing.T) {
	used := map[string]bool{}
	for i, a := range Actions() {
		kind := Kind(a)
		if !slices.Contains(Kinds(), kind) {
			t.Errorf("%s is of kind %q, which no config can allow", a, kind)
		}
		if slices.Contains(Actions()[:i], a) {
			t.Errorf("%s is listed twice", a)
		}
		used[kind] = true
	}
	for _, k := range Kinds() {
		if !used[k] {
			t.Errorf("%s allows nothing", k)
		}
	}
	if k := Kind("rm -rf"); k != "" {
		t.Errorf("an unknown action is of kind %q", k)
	}
}
