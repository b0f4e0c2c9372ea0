package host

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"

	"golang.org/x/sys/unix"
)

// While the agent lives in a pod, host commands run in a cgroup beside all pods:
// one of our own rather than a transient unit of systemd, because the child is
// born in it (clone3(2) with CLONE_INTO_CGROUP), its pipes and exit status stay
// ours, and it works without systemd, which leaves top-level cgroups it did not
// make alone, as it does with those of a kubelet under the cgroupfs driver.
const (
	cgroupName  = "host-hygiene"
	cgroupMount = "/sys/fs/cgroup"
	// For all commands together; a query of a package database needs a tenth.
	commandMemory = 512 << 20
	commandPIDs   = 256
)

// cgroupHandle puts one command into the cgroup.
type cgroupHandle struct {
	unified int   // the directory under cgroup v2, -1 without
	legacy  []int // cgroup.procs files under v1
}

func (c *cgroupHandle) close() {
	if c.unified >= 0 {
		unix.Close(c.unified)
	}
	for _, fd := range c.legacy {
		unix.Close(fd)
	}
}

// adopt moves a process that was just started. Version 1 has no birth into a
// cgroup; what the process touched before counts for the pod and is a few pages.
func (c *cgroupHandle) adopt(pid int) error {
	for _, fd := range c.legacy {
		// ESRCH: it has ended already.
		if _, err := unix.Write(fd, []byte(strconv.Itoa(pid))); err != nil && err != unix.ESRCH {
			return fmt.Errorf("moving it to cgroup %s: %w", cgroupName, err)
		}
	}
	return nil
}

// inPod tells whether the agent runs in a container, with PID 1 outside.
func (h *Host) inPod() bool { return h.ns.differs(unix.CLONE_NEWNS) }

// commandCgroup makes the cgroup where it is needed. Started by hand, commands
// run where the agent does.
func (h *Host) commandCgroup() (*cgroupHandle, error) {
	c := &cgroupHandle{unified: -1}
	if !h.inPod() {
		return c, nil
	}
	unified, err := h.isCgroup2(cgroupMount)
	if err != nil {
		return nil, err
	}
	if unified {
		dir := path.Join(cgroupMount, cgroupName)
		if err := h.mkCgroup(cgroupMount); err != nil {
			return nil, err
		}
		h.limit(dir, "memory.max", commandMemory)
		h.limit(dir, "pids.max", commandPIDs)
		if c.unified, err = h.open(dir, unix.O_RDONLY|unix.O_DIRECTORY); err != nil {
			return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
		}
		return c, nil
	}
	for _, controller := range []string{"memory", "pids"} {
		parent := path.Join(cgroupMount, controller)
		dir := path.Join(parent, cgroupName)
		if err := h.mkCgroup(parent); err != nil {
			c.close()
			return nil, err
		}
		h.limit(dir, "memory.limit_in_bytes", commandMemory)
		h.limit(dir, "pids.max", commandPIDs)
		fd, err := h.open(path.Join(dir, "cgroup.procs"), unix.O_WRONLY)
		if err != nil {
			c.close()
			return nil, &fs.PathError{Op: "open", Path: dir + "/cgroup.procs", Err: err}
		}
		c.legacy = append(c.legacy, fd)
	}
	return c, nil
}

func (h *Host) isCgroup2(dir string) (bool, error) {
	fd, err := h.open(dir, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return false, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, &fs.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return st.Type == unix.CGROUP2_SUPER_MAGIC, nil
}

func (h *Host) mkCgroup(parent string) error {
	fd, err := h.open(parent, unix.O_PATH|unix.O_DIRECTORY)
	if err == nil {
		err = unix.Mkdirat(fd, cgroupName, 0o755)
		unix.Close(fd)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return &fs.PathError{Op: "mkdir", Path: path.Join(parent, cgroupName), Err: err}
	}
	return nil
}

// limit writes a limit where the controller is there to take it: being outside
// the pod's is what matters.
func (h *Host) limit(dir, file string, value int) {
	fd, err := h.open(path.Join(dir, file), unix.O_WRONLY)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	unix.Write(fd, []byte(strconv.Itoa(value)))
}

// removeCgroup takes away what commandCgroup made. A cgroup that is in use by
// another agent stays, as the kernel demands.
func (h *Host) removeCgroup() {
	if !h.inPod() {
		return
	}
	for _, parent := range []string{cgroupMount, cgroupMount + "/memory", cgroupMount + "/pids"} {
		if fd, err := h.open(parent, unix.O_PATH|unix.O_DIRECTORY); err == nil {
			unix.Unlinkat(fd, cgroupName, unix.AT_REMOVEDIR)
			unix.Close(fd)
		}
	}
}
