package host

import (
	"context"
	"io"
	"net"
	"time"
)

// Tree is a directory that looks like a host (--root DIR). Files, the process
// table and the operating system are read from it; whatever needs the running
// kernel or its daemons answers [ErrNotLive].
type Tree struct {
	*Root
	table  processTable
	blocks blockTable
	system systemInfo
}

// OpenTree opens the tree at dir.
func OpenTree(dir string) (*Tree, error) {
	r, err := OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	return &Tree{Root: r}, nil
}

var _ View = (*Tree)(nil)

// Processes implements [View].
func (t *Tree) Processes(ctx context.Context) ([]Process, error) { return t.table.read(ctx, t.Root) }

// ProcessesNow implements [View].
func (t *Tree) ProcessesNow(ctx context.Context, pids ...int) ([]Process, error) {
	return t.table.readNow(ctx, t.Root, pids)
}

// BlockDevices implements [View].
func (t *Tree) BlockDevices(ctx context.Context) ([]BlockDevice, error) {
	return t.blocks.read(ctx, t.Root)
}

// OS implements [View].
func (t *Tree) OS(ctx context.Context) (OS, error) { return t.system.read(ctx, t.Root) }

// SystemState implements [View].
func (t *Tree) SystemState(context.Context) (string, error) { return "", ErrNotLive }

// Units implements [View].
func (t *Tree) Units(context.Context, ...string) ([]Unit, error) { return nil, ErrNotLive }

// UnitsMatching implements [View].
func (t *Tree) UnitsMatching(context.Context, ...string) ([]Unit, error) { return nil, ErrNotLive }

// BusProperties implements [View].
func (t *Tree) BusProperties(context.Context, string, string, string) (map[string]any, bool, error) {
	return nil, false, ErrNotLive
}

// Dial implements [View].
func (t *Tree) Dial(context.Context, string, string) (net.Conn, error) { return nil, ErrNotLive }

// Adjtimex implements [View].
func (t *Tree) Adjtimex(context.Context) (Timex, error) { return Timex{}, ErrNotLive }

// PTPOffset implements [View].
func (t *Tree) PTPOffset(context.Context, string) (time.Duration, time.Duration, error) {
	return 0, 0, ErrNotLive
}

// DeviceMapper implements [View].
func (t *Tree) DeviceMapper(context.Context) ([]DMDevice, error) { return nil, ErrNotLive }

// StatMount implements [View].
func (t *Tree) StatMount(context.Context, string) (MountStat, error) { return MountStat{}, ErrNotLive }

// LockHolder implements [View].
func (t *Tree) LockHolder(context.Context, string) (Lock, error) { return Lock{}, ErrNotLive }

// KernelLog implements [View].
func (t *Tree) KernelLog(context.Context) ([]KernelRecord, error) { return nil, ErrNotLive }

// Run implements [View].
func (t *Tree) Run(context.Context, Command) (Output, error) { return Output{}, ErrNotLive }

// KubeletAPI implements [View].
func (t *Tree) KubeletAPI(context.Context, string, func(io.Reader) error) error {
	return ErrNotConfigured
}
