package host

import (
	"bytes"
	"context"
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
	// Orphaned is the process that holds the lock and will do nothing more with
	// it, 0 when the lock is ours: one that was killed has its files open for as
	// long as a thread of it hangs in the kernel, on a mount whose server is gone.
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
		for err = unix.EINTR; err == unix.EINTR; {
			err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		}
		switch err {
		case nil:
			return &Claim{fd: fd}, nil
		case unix.EWOULDBLOCK:
			pid := h.flockHolder(fd)
			if pid != 0 && h.ended(pid) {
				return &Claim{fd: fd, Orphaned: pid}, nil
			}
			unix.Close(fd)
			return nil, &ClaimedError{dir, pid}
		}
		unix.Close(fd)
		return nil, &fs.PathError{Op: "flock", Path: dir, Err: err}
	})
}

// flockHolder finds in /proc/locks who holds the flock on an open file; 0 when it
// is not there. proc_locks(5) has a line such as
//
//	14: FLOCK  ADVISORY  WRITE 1234 fe:01:264305 0 EOF
//
// and an arrow before FLOCK for those who wait.
func (r *Root) flockHolder(fd int) int {
	st, err := fstat(fd)
	if err != nil {
		return 0
	}
	var scratch []byte
	data, err := r.readFile("/proc/locks", MaxFile, &scratch)
	if err != nil {
		return 0
	}
	// Not by the device as well: Btrfs has one of its own for each subvolume and
	// shows another here.
	return flockHolder(data, st.Inode)
}

func flockHolder(locks []byte, inode uint64) int {
	suffix := []byte(":" + strconv.FormatUint(inode, 10))
	for line := range bytes.Lines(locks) {
		f := bytes.Fields(line)
		if len(f) < 6 || string(f[1]) != "FLOCK" || string(f[3]) != "WRITE" || !bytes.HasSuffix(f[5], suffix) {
			continue
		}
		if pid, err := strconv.Atoi(string(f[4])); err == nil && pid > 0 {
			return pid
		}
	}
	return 0
}

// ended says whether a process has ended but for threads that hang: its first
// thread is a zombie, which nobody can collect before them.
func (r *Root) ended(pid int) bool {
	var scratch []byte
	stat, err := r.readFile(fmt.Sprintf("/proc/%d/stat", pid), MaxFile, &scratch)
	if err != nil {
		return false
	}
	// The name before the state is in brackets and may hold any.
	state := stat[bytes.LastIndexByte(stat, ')')+1:]
	return bytes.HasPrefix(state, []byte(" Z")) || bytes.HasPrefix(state, []byte(" X"))
}
