package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strconv"

	"golang.org/x/sys/unix"
)

// ClaimedError says that another process holds a [Claim].
type ClaimedError struct {
	Dir string
	// PID is the holder's, 0 when the kernel does not name it.
	PID int
}

func (e *ClaimedError) Error() string {
	if e.PID == 0 {
		return e.Dir + " is claimed by another process"
	}
	return fmt.Sprintf("%s is claimed by process %d", e.Dir, e.PID)
}

// Claim is an exclusive lock on a directory of the host, by which one of several
// agents on it knows that it is the one. It is the kernel's (flock(2)) and ends
// with the process that holds it, however that ends; nothing is written, so that
// it works on a file system that is read-only and leaves nothing behind.
type Claim struct {
	fd int
	// Despite is who holds the lock and can be no agent, empty when the lock is
	// ours. A lock takes no more than the right to read the directory, and must
	// not be a way to silence the agent.
	Despite string
	// Orphaned is the process that Despite tells of, where it has ended: one that
	// was killed has its files open until the kernel has come round to it, and
	// for as long as a thread of it hangs on a mount whose server is gone.
	Orphaned int
}

// NoClaim is a claim on nothing, for who must have one and locks nothing.
func NoClaim() *Claim { return &Claim{fd: -1} }

// Close gives the claim up.
func (c *Claim) Close() error {
	if c.fd < 0 {
		return nil
	}
	return unix.Close(c.fd)
}

// Claim takes the lock on a directory, or fails with a [ClaimedError]. A
// directory that is not there is fs.ErrNotExist.
func (h *Host) Claim(ctx context.Context, dir string) (*Claim, error) {
	return bound(ctx, &h.calls, "claim "+dir, func(c *Claim) { c.Close() }, func() (*Claim, error) {
		fd, err := h.open(dir, unix.O_RDONLY|unix.O_DIRECTORY)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
		}
		var ended int
		var despite string
		for range 2 {
			for err = unix.EINTR; err == unix.EINTR; {
				err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
			}
			switch err {
			case nil:
				return &Claim{fd: fd}, nil
			case unix.EWOULDBLOCK:
				// Who held it a moment ago may have let go since: once more.
				var pid int
				if pid, ended, despite = h.agentAmong(h.flockHolders(fd)); despite == "" {
					unix.Close(fd)
					return nil, &ClaimedError{dir, pid}
				}
			default:
				unix.Close(fd)
				return nil, &fs.PathError{Op: "flock", Path: dir, Err: err}
			}
		}
		return &Claim{fd, despite, ended}, nil
	})
}

// agentAmong returns the first of the holders of a lock that may be an agent, 0
// when none is known; or why none of them is one, and which of them has ended.
func (r *Root) agentAmong(holders []int) (pid, ended int, none string) {
	for _, pid := range holders {
		var scratch []byte
		status, err := r.readFile(fmt.Sprintf("/proc/%d/status", pid), MaxFile, &scratch)
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ESRCH):
			// Left to a child, and an agent's children do not inherit it.
			none = fmt.Sprintf("process %d, which has ended, left its lock to another", pid)
		case err != nil:
			return pid, 0, ""
		default:
			why, zombie := noAgent(pid, status)
			if why == "" {
				return pid, 0, ""
			}
			if none = why; zombie {
				ended = pid
			}
		}
	}
	return 0, ended, none
}

// noAgent says why a process can be no agent, by its proc_pid_status(5): nobody
// but root runs one, and one that was killed while a thread of it hangs in the
// kernel keeps its files open as a zombie that does nothing more. The owner of
// /proc/PID does not count, who is root for any process that asks for it by
// PR_SET_DUMPABLE; nor the effective user ID, for a lock survives the start of a
// program that is set-user-ID.
func noAgent(pid int, status []byte) (why string, zombie bool) {
	for line := range bytes.Lines(status) {
		key, value, _ := bytes.Cut(line, []byte(":"))
		f := bytes.Fields(value)
		if len(f) == 0 {
			continue
		}
		switch string(key) {
		case "State":
			if s := string(f[0]); s == "Z" || s == "X" {
				return fmt.Sprintf("process %d has ended, but for a thread that hangs in the kernel", pid), true
			}
		case "Uid":
			if uid := string(f[0]); uid != "0" {
				return fmt.Sprintf("process %d is of user %s, not root's", pid, uid), false
			}
		}
	}
	return "", false
}

// flockHolders finds in /proc/locks who holds a flock on an open file, shared
// ones included, which keep an exclusive one out as well.
func (r *Root) flockHolders(fd int) []int {
	st, err := fstat(fd)
	if err != nil {
		return nil
	}
	var scratch []byte
	data, err := r.readFile("/proc/locks", MaxFile, &scratch)
	if err != nil {
		return nil
	}
	// Not by the device as well: Btrfs has one of its own for each subvolume and
	// shows another here.
	return flockHolders(data, st.Inode)
}

// flockHolders reads proc_locks(5), lines such as
//
//	14: FLOCK  ADVISORY  WRITE 1234 fe:01:264305 0 EOF
//
// with an arrow before FLOCK for those who wait.
func flockHolders(locks []byte, inode uint64) (pids []int) {
	suffix := []byte(":" + strconv.FormatUint(inode, 10))
	for line := range bytes.Lines(locks) {
		f := bytes.Fields(line)
		if len(f) < 6 || string(f[1]) != "FLOCK" || !bytes.HasSuffix(f[5], suffix) {
			continue
		}
		if pid, err := strconv.Atoi(string(f[4])); err == nil && pid > 0 {
			pids = append(pids, pid)
		}
	}
	return pids
}
