package hosttest

import (
	"context"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"

	"github.com/hosthygiene/agent/pkg/host"
)

// Noting is a host of which it is noted what is looked at by name, found or not.
// What package host reads by itself for its other answers is not.
type Noting struct {
	host.View
	mu    sync.Mutex
	names map[string]bool
	dirs  map[string]bool // of these the entries
}

// Note returns v, with nothing noted yet.
func Note(v host.View) *Noting {
	return &Noting{View: v, names: map[string]bool{}, dirs: map[string]bool{}}
}

// Names returns what was looked at, as clean paths in order.
func (n *Noting) Names() []string {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Sorted(maps.Keys(n.names))
}

// Depends reports whether what stands at a clean path may change what was read.
func (n *Noting) Depends(name string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.dirs[path.Dir(name)] {
		return true
	}
	for at := range n.names {
		if at == name || strings.HasPrefix(at, name+"/") {
			return true
		}
	}
	return false
}

func (n *Noting) note(names ...string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, name := range names {
		n.names[path.Clean(name)] = true
	}
}

// ReadFile implements [host.View], as do the others below.
func (n *Noting) ReadFile(ctx context.Context, name string) ([]byte, error) {
	n.note(name)
	return n.View.ReadFile(ctx, name)
}

func (n *Noting) ReadFileMax(ctx context.Context, name string, limit int64) ([]byte, error) {
	n.note(name)
	return n.View.ReadFileMax(ctx, name, limit)
}

func (n *Noting) ReadThrough(ctx context.Context, name string, limit int64, each func([]byte)) error {
	n.note(name)
	return n.View.ReadThrough(ctx, name, limit, each)
}

func (n *Noting) Certificates(ctx context.Context, name string) ([][]byte, error) {
	n.note(name)
	return n.View.Certificates(ctx, name)
}

func (n *Noting) ReadAttributes(ctx context.Context, dir string, names ...string) []host.Attribute {
	n.note(dir)
	for _, name := range names {
		n.note(dir + "/" + name)
	}
	return n.View.ReadAttributes(ctx, dir, names...)
}

func (n *Noting) ReadDir(ctx context.Context, name string) ([]string, error) {
	n.note(name)
	n.mu.Lock()
	n.dirs[path.Clean(name)] = true
	n.mu.Unlock()
	return n.View.ReadDir(ctx, name)
}

func (n *Noting) ReadLink(ctx context.Context, name string) (string, error) {
	n.note(name)
	return n.View.ReadLink(ctx, name)
}

func (n *Noting) ReadLinks(ctx context.Context, dir string, names []string) []host.Link {
	for _, name := range names {
		n.note(dir + "/" + name)
	}
	return n.View.ReadLinks(ctx, dir, names)
}

func (n *Noting) Stat(ctx context.Context, name string) (host.FileInfo, error) {
	n.note(name)
	return n.View.Stat(ctx, name)
}

func (n *Noting) Lstat(ctx context.Context, name string) (host.FileInfo, error) {
	n.note(name)
	return n.View.Lstat(ctx, name)
}

func (n *Noting) RealPath(ctx context.Context, name string) (string, error) {
	n.note(name)
	return n.View.RealPath(ctx, name)
}
