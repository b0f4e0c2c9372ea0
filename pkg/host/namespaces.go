package host

import (
	"errors"
	"fmt"
	"io/fs"
	"runtime"

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

// do runs f on a thread that is in init's namespaces of the given kinds, and
// whose umask, working directory and root are its own. Sockets made and
// processes started by f are the host's; goroutines started by f are not inside.
// The thread is never used for anything else: its goroutine ends without
// unlocking it, and the runtime then destroys the thread.
func (n *namespaces) do(kinds int, f func() error) error {
	done := make(chan error, 1)
	go n.onThread(kinds, f, done, make(chan struct{}))
	return <-done
}

func (n *namespaces) onThread(kinds int, f func() error, done chan<- error, pinned chan<- struct{}) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		// The main thread can not be destroyed, and /proc/self/ns is its. While
		// it is held here another goroutine must get another thread.
		elsewhere := make(chan struct{})
		go n.onThread(kinds, f, done, elsewhere)
		<-elsewhere
		runtime.UnlockOSThread()
		return
	}
	close(pinned)
	_, err := protect(func() (struct{}, error) {
		if err := n.enter(kinds); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, f()
	})
	done <- err
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
