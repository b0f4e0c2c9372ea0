package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// pfKthread is PF_KTHREAD of include/linux/sched.h.
const pfKthread = 0x00200000

// processTable shares one reading of /proc among the probes of one pass.
type processTable struct {
	mu    sync.Mutex // held for a look only, never while reading
	at    time.Time
	procs []Process
	// stale: what was read before this time is not good any more.
	stale time.Time
}

// Forget makes the next question about processes read them anew: something has
// happened since. Nothing else is remembered between two passes that an event
// could make untrue.
func (h *Host) Forget() {
	h.table.mu.Lock()
	h.table.stale = time.Now()
	h.table.mu.Unlock()
}

func (t *processTable) fresh() ([]Process, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.procs, t.procs != nil && time.Since(t.at) < time.Second && !t.at.Before(t.stale)
}

// read returns the table, at most a second old. Who asks while it is being read
// waits for the same reading, as long as his own context allows, unless that was
// begun before [Host.Forget].
func (t *processTable) read(ctx context.Context, r *Root) ([]Process, error) {
	if procs, ok := t.fresh(); ok {
		return procs, nil
	}
	for {
		t.mu.Lock()
		asked := t.stale
		t.mu.Unlock()
		type reading struct {
			procs []Process
			began time.Time
		}
		got, _, err := share(ctx, &r.calls, "the process table of /proc", func() (reading, error) {
			began := time.Now()
			procs, err := r.readProcesses()
			if err == nil {
				t.mu.Lock()
				t.procs, t.at = procs, began
				t.mu.Unlock()
			}
			return reading{procs, began}, err
		})
		if err == nil && got.began.Before(asked) {
			continue
		}
		return got.procs, err
	}
}

// readProcesses lists /proc, in order of PID. A process that ends meanwhile is
// left out. Processes that may not be seen (hidepid) are an error beside those
// that may.
func (r *Root) readProcesses() ([]Process, error) {
	dir, err := r.open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: "/proc", Err: err}
	}
	defer unix.Close(dir)
	var sfs unix.Statfs_t
	procfs := unix.Fstatfs(dir, &sfs) == nil && sfs.Type == unix.PROC_SUPER_MAGIC

	var (
		path  = make([]byte, 0, 32)
		buf   = make([]byte, scratchSize)
		comms = map[string]string{} // most processes share their names with others
	)
	pids, err := readPIDs(dir, buf)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: "/proc", Err: err}
	}
	procs := make([]Process, 0, len(pids))
	hidden := 0
	for _, pid := range pids {
		path = append(strconv.AppendInt(path[:0], int64(pid), 10), "/stat"...)
		data, err := r.readStat(dir, path, procfs, &buf)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
			continue
		case errors.Is(err, fs.ErrPermission):
			hidden++
			continue
		case err != nil:
			return nil, &fs.PathError{Op: "read", Path: "/proc/" + string(path), Err: err}
		}
		p, err := parseProcStat(data, comms)
		if err != nil {
			return nil, fmt.Errorf("/proc/%s: %w", path, err)
		}
		procs = append(procs, p)
	}
	if hidden > 0 {
		return procs, fmt.Errorf("%d processes can not be seen: %w", hidden, fs.ErrPermission)
	}
	return procs, nil
}

// readPIDs lists the processes in an open /proc, in order.
func readPIDs(dir int, buf []byte) ([]int, error) {
	var pids []int
	for {
		n, err := unix.ReadDirent(dir, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n <= 0:
			slices.Sort(pids)
			return pids, nil
		}
		// struct linux_dirent64: inode, offset, record length, type, name.
		for rest := buf[:n]; len(rest) > 19; {
			length := int(binary.NativeEndian.Uint16(rest[16:]))
			if length <= 19 || length > len(rest) {
				return nil, errors.New("a malformed directory entry")
			}
			name := rest[19:length]
			if end := bytes.IndexByte(name, 0); end >= 0 {
				name = name[:end]
			}
			if pid, ok := number(name); ok {
				pids = append(pids, int(pid))
			}
			rest = rest[length:]
		}
	}
}

// readStat reads one /proc/PID/stat below the open /proc. The kernel gives such
// a file in one piece, so that a real procfs needs one read(2) and no stat(2);
// in a copied tree anything may stand under the name.
func (r *Root) readStat(dir int, name []byte, procfs bool, buf *[]byte) ([]byte, error) {
	if !procfs {
		fd, err := r.open("/proc/"+string(name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err != nil {
			return nil, err
		}
		defer unix.Close(fd)
		return fill(fd, 64<<10, buf)
	}
	var fd int
	var err error
	if r.legacy {
		fd, err = unix.Openat(dir, string(name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	} else {
		fd, err = openat2(dir, string(name), unix.O_RDONLY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	}
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Read(fd, (*buf)[:cap(*buf)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		return (*buf)[:n], nil
	}
}

// parseProcStat parses proc_pid_stat(5). The comm in field 2 is the process's
// own choice and may contain spaces, parentheses and newlines, so the fields
// behind it count from the last ')'. Names are taken from comms and added to it.
func parseProcStat(data []byte, comms map[string]string) (Process, error) {
	open, shut := bytes.IndexByte(data, '('), bytes.LastIndexByte(data, ')')
	if open < 1 || shut < open {
		return Process{}, errors.New("no (comm) field")
	}
	pid, ok := number(bytes.TrimSpace(data[:open]))
	if !ok {
		return Process{}, fmt.Errorf("pid %q is no number", data[:open])
	}
	p := Process{PID: int(pid)}
	comm, known := comms[string(data[open+1:shut])]
	if !known {
		comm = string(data[open+1 : shut])
		if comms != nil {
			comms[comm] = comm
		}
	}
	p.Comm = comm

	// The man page counts from 1; state is field 3.
	const state, ppid, flags, threads, starttime = 3, 4, 9, 20, 22
	rest := data[shut+1:]
	for field := state; field <= starttime; field++ {
		for len(rest) > 0 && (rest[0] == ' ' || rest[0] == '\n') {
			rest = rest[1:]
		}
		end := 0
		for end < len(rest) && rest[end] != ' ' && rest[end] != '\n' {
			end++
		}
		word := rest[:end]
		rest = rest[end:]
		if len(word) == 0 {
			return Process{}, fmt.Errorf("%d fields, want at least %d", field-1, starttime)
		}
		if field == state {
			if len(word) != 1 {
				return Process{}, fmt.Errorf("state %q is no letter", word)
			}
			p.State = word[0]
			continue
		}
		if field != ppid && field != flags && field != threads && field != starttime {
			continue
		}
		n, ok := number(word)
		if !ok {
			return Process{}, fmt.Errorf("field %d %q is no number", field, word)
		}
		switch field {
		case ppid:
			p.PPID = int(n)
		case flags:
			p.Kernel = n&pfKthread != 0
		case threads:
			p.Threads = int(n)
		case starttime:
			p.StartTicks = n
		}
	}
	return p, nil
}

// number parses an unsigned decimal below 2^63 without allocating.
func number(word []byte) (n uint64, ok bool) {
	if len(word) == 0 || len(word) > 19 {
		return 0, false
	}
	for _, c := range word {
		if c < '0' || c > '9' {
			return 0, false
		}
		n = n*10 + uint64(c-'0')
	}
	return n, n < 1<<63
}
