package hosttest

import (
	"reflect"
	"slices"
	"testing"

	"github.com/hosthygiene/agent/pkg/host"
)

// Whatever reads a file by its name is noted, found or not.
func TestNoting(t *testing.T) {
	h := Parse(t, "-- tree/etc/fstab --\n")
	ctx := t.Context()
	calls := map[string]func(v host.Files){
		"ReadFile":       func(v host.Files) { v.ReadFile(ctx, "/etc/./x") },
		"ReadFileMax":    func(v host.Files) { v.ReadFileMax(ctx, "/etc/x", 10) },
		"ReadThrough":    func(v host.Files) { v.ReadThrough(ctx, "/etc/x", 10, func([]byte) {}) },
		"Certificates":   func(v host.Files) { v.Certificates(ctx, "/etc/x") },
		"ReadAttributes": func(v host.Files) { v.ReadAttributes(ctx, "/etc", "x") },
		"ReadDir":        func(v host.Files) { v.ReadDir(ctx, "/etc/x") },
		"ReadLink":       func(v host.Files) { v.ReadLink(ctx, "/etc/x") },
		"ReadLinks":      func(v host.Files) { v.ReadLinks(ctx, "/etc", []string{"x"}) },
		"Stat":           func(v host.Files) { v.Stat(ctx, "/etc/x") },
		"Lstat":          func(v host.Files) { v.Lstat(ctx, "/etc/x") },
		"RealPath":       func(v host.Files) { v.RealPath(ctx, "/etc/x") },
	}
	for method := range reflect.TypeFor[host.Files]().Methods() {
		call, ok := calls[method.Name]
		if !ok {
			t.Errorf("%s is not tried", method.Name)
			continue
		}
		n := Note(h)
		call(n)
		if !slices.Contains(n.Names(), "/etc/x") {
			t.Errorf("%s: noted %v", method.Name, n.Names())
		}
	}
	n := Note(h)
	if _, err := n.ReadDir(ctx, "/etc"); err != nil {
		t.Error(err)
	}
	n.Stat(ctx, "/usr/lib/x/")
	for name, want := range map[string]bool{"/etc/l": true, "/etc": true, "/": false, "/usr": true, "/usr/lib/x": true, "/usr/lib/y": false, "/us": false, "/etc/l/m": false} {
		if got := n.Depends(name); got != want {
			t.Errorf("what was read depends on %s: %v", name, got)
		}
	}
}
