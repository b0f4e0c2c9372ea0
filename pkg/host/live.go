package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// ErrNoHostPID: the agent runs in a container whose PID 1 is the container's
// own, so that nothing here is the host.
var ErrNoHostPID = errors.New("this container has a PID namespace of its own, so the host can not be seen: the pod needs hostPID: true")

// Options say how to reach the host.
type Options struct {
	// Root is where the host's tree lies: "/" when started by hand,
	// "/proc/1/root" in a pod. Empty chooses: /proc/1/root when PID 1 lives in
	// another mount namespace than we do, else "/".
	Root string
	// Kubelet does GET of a path of the kubelet's API. Without it KubeletAPI
	// answers [ErrNotConfigured].
	Kubelet func(ctx context.Context, path string, read func(io.Reader) error) error
	// Observe leaves out what puts something on the host for a moment: commands
	// and the control group they run in, and client sockets with a name. What
	// needs them answers fs.ErrPermission.
	Observe bool

	// init is the process whose namespaces are the host's; 0 means 1. Tests
	// put a process of their own there.
	init int
}

// Host is the running machine. It implements [View]; its methods may be called
// from many goroutines.
type Host struct {
	*Root
	kubelet func(ctx context.Context, path string, read func(io.Reader) error) error
	observe bool
	ns      *namespaces
	table   processTable
	blocks  blockTable
	bus     busLink
	log     kernelLog
	// mounts are counted apart: many dead mounts must not stop the other calls.
	mounts flights

	system systemInfo
}

var _ View = (*Host)(nil)

// Open reaches for the machine this process runs on. [ErrNoHostPID] means that
// it can not be seen from here; a lack of privilege on a path or namespace is
// fs.ErrPermission.
func Open(o Options) (*Host, error) {
	pid := o.init
	if pid == 0 {
		pid = 1
		if os.Getpid() == 1 {
			return nil, ErrNoHostPID
		}
	}
	ns, err := openNamespaces(pid)
	if err != nil {
		return nil, err
	}
	if o.init == 0 && os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		switch {
		case ns.hidden != nil:
			return nil, unprivileged(ns.hidden)
		case !ns.differs(unix.CLONE_NEWNS):
			// shareProcessNamespace: PID 1 is the pause container.
			ns.close()
			return nil, ErrNoHostPID
		}
	}
	root := o.Root
	if root == "" {
		root = "/"
		if ns.differs(unix.CLONE_NEWNS) {
			root = fmt.Sprintf("/proc/%d/root", pid)
		}
	}
	r, err := OpenRoot(root)
	if err != nil {
		ns.close()
		if errors.Is(err, fs.ErrPermission) && strings.HasPrefix(root, "/proc/") {
			err = unprivileged(err)
		}
		return nil, err
	}
	h := &Host{Root: r, kubelet: o.Kubelet, observe: o.Observe, ns: ns}
	h.bus.host, h.bus.patience, h.log.host = h, busPatience, h
	return h, nil
}

// errObserves is why something is not done under [Options.Observe].
var errObserves = fmt.Errorf("not done by an agent that only observes: %w", fs.ErrPermission)

// unprivileged says what a container lacks when PID 1 can not be looked at.
func unprivileged(err error) error {
	return fmt.Errorf("the host can not be reached, because PID 1 may not be looked at from this container (it needs CAP_SYS_PTRACE, and no AppArmor or SELinux confinement): %w", err)
}

// Close gives up the connections to the host's daemons and its tree.
func (h *Host) Close() error {
	h.bus.close()
	if !h.observe {
		h.removeCgroup()
	}
	h.log.close()
	h.ns.close()
	return h.Root.Close()
}

// Processes implements [View].
func (h *Host) Processes(ctx context.Context) ([]Process, error) { return h.table.read(ctx, h.Root) }

// ProcessesNow implements [View].
func (h *Host) ProcessesNow(ctx context.Context, pids ...int) ([]Process, error) {
	return h.table.readNow(ctx, h.Root, pids)
}

// BlockDevices implements [View].
func (h *Host) BlockDevices(ctx context.Context) ([]BlockDevice, error) {
	return h.blocks.read(ctx, h.Root)
}

// OS implements [View].
func (h *Host) OS(ctx context.Context) (OS, error) { return h.system.read(ctx, h.Root) }

// KubeletAPI implements [View].
func (h *Host) KubeletAPI(ctx context.Context, path string, read func(io.Reader) error) error {
	if h.kubelet == nil {
		return ErrNotConfigured
	}
	trace(ctx, "kubelet "+path)
	return h.kubelet(ctx, path, read)
}
