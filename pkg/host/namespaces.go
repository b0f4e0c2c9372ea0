package host

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// namespaces are those of the host's init that differ from ours: all of them in
// a pod, none when the agent is started by hand.
type namespaces struct {
	// entered in this order; the mount namespace last, because our own /proc is
	// out of sight then.
	list []namespace
	// hidden is why init's namespaces could not be seen; they are taken for ours
	// then, as is true for whoever starts the agent by hand.
	hidden error

	mu     sync.Mutex
	idle   map[int]*insider // by the kinds they are in
	closed bool
}

type namespace struct {
	flag int
	name string
	fd   int
}

// namespaceKinds are the namespaces that are entered. The PID and user namespaces are not:
// the pod shares the host's.
func namespaceKinds() []namespace {
	return []namespace{
		{flag: unix.CLONE_NEWCGROUP, name: "cgroup"},
		{flag: unix.CLONE_NEWIPC, name: "ipc"},
		{flag: unix.CLONE_NEWUTS, name: "uts"},
		{flag: unix.CLONE_NEWNET, name: "net"},
		{flag: unix.CLONE_NEWNS, name: "mnt"},
	}
}

// allNamespaces is what a host command runs in.
const allNamespaces = unix.CLONE_NEWCGROUP | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWNET | unix.CLONE_NEWNS

func openNamespaces(pid int) (*namespaces, error) {
	n := &namespaces{}
	for _, k := range namespaceKinds() {
		ours, theirs := "/proc/self/ns/"+k.name, fmt.Sprintf("/proc/%d/ns/%s", pid, k.name)
		var a, b unix.Stat_t
		if err := unix.Stat(ours, &a); errors.Is(err, unix.ENOENT) {
			continue // the kernel is built without this kind
		} else if err != nil {
			n.close()
			return nil, &fs.PathError{Op: "stat", Path: ours, Err: err}
		}
		if err := unix.Stat(theirs, &b); err != nil {
			// EACCES without CAP_SYS_PTRACE, ENOENT under hidepid=2.
			n.close()
			return &namespaces{hidden: &fs.PathError{Op: "stat", Path: theirs, Err: err}}, nil
		}
		if a.Dev == b.Dev && a.Ino == b.Ino {
			continue
		}
		fd, err := unix.Open(theirs, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			n.close()
			return nil, &fs.PathError{Op: "open", Path: theirs, Err: err}
		}
		k.fd = fd
		n.list = append(n.list, k)
	}
	return n, nil
}

func (n *namespaces) close() {
	n.mu.Lock()
	n.closed = true
	for _, in := range n.idle {
		close(in.calls)
	}
	n.idle = nil
	n.mu.Unlock()
	for _, k := range n.list {
		unix.Close(k.fd)
	}
	n.list = nil
}

// differs tells whether init has another namespace of this kind than we have.
func (n *namespaces) differs(flag int) bool {
	for _, k := range n.list {
		if k.flag == flag {
			return true
		}
	}
	return false
}

// insider is a thread in init's namespaces, which serves one caller at a time.
// It is kept: a thread that entered can not go back to the runtime, and for each
// that is thrown away the runtime makes another, which ends the program where the
// host has no PID left for it (runtime/os_linux.go, newosproc).
type insider struct {
	calls chan func() error // closed to end the thread
	done  chan error        // room for one
}

// do runs f on a thread that is in init's namespaces of the given kinds, and
// whose umask, working directory and root are its own; f leaves them as they
// are. Sockets made and processes started by f are the host's; goroutines started
// by f are not inside.
func (n *namespaces) do(kinds int, f func() error) error {
	n.mu.Lock()
	in := n.idle[kinds]
	delete(n.idle, kinds)
	n.mu.Unlock()
	if in == nil {
		in = &insider{calls: make(chan func() error), done: make(chan error, 1)}
		entered := make(chan error, 1)
		go n.onThread(kinds, in, entered, make(chan struct{}))
		if err := <-entered; err != nil {
			return err
		}
	}
	in.calls <- f
	err := <-in.done
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed || n.idle[kinds] != nil {
		close(in.calls)
		return err
	}
	if n.idle == nil {
		n.idle = map[int]*insider{}
	}
	n.idle[kinds] = in
	return err
}

// onThread makes a thread of its own an insider. It ends with its goroutine,
// which never unlocks it.
func (n *namespaces) onThread(kinds int, in *insider, entered chan<- error, pinned chan<- struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread can not be destroyed, and /proc/self/ns is its. While
		// it is held here another goroutine must get another thread.
		elsewhere := make(chan struct{})
		go n.onThread(kinds, in, entered, elsewhere)
		<-elsewhere
		runtime.UnlockOSThread()
		return
	}
	close(pinned)
	_, err := protect(func() (struct{}, error) { return struct{}{}, n.enter(kinds) })
	entered <- err
	if err != nil {
		return
	}
	for f := range in.calls {
		_, err := protect(func() (struct{}, error) { return struct{}{}, f() })
		in.done <- err
	}
}

func (n *namespaces) enter(kinds int) error {
	// setns(2) refuses a mount namespace to a thread that shares its root and
	// working directory with others, as all threads of a Go program do.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare(CLONE_FS): %w", err)
	}
	for _, k := range n.list {
		if k.flag&kinds == 0 {
			continue
		}
		if err := unix.Setns(k.fd, k.flag); err != nil {
			return fmt.Errorf("entering the host's %s namespace: %w", k.name, err)
		}
	}
	return nil
}
