package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pfKthread is PF_KTHREAD of include/linux/sched.h.
const pfKthread = 0x00200000

// processTable shares one reading of /proc among the probes of one pass, and
// reads of each process only what may have changed since the pass before: on a
// host of ten thousand, opening every /proc/PID/stat was a quarter of a pass.
type processTable struct {
	shared[[]Process]
	mu    sync.Mutex
	procs []Process
	known []knownProcess
	// boot is the time since boot; tests have their own.
	boot func() time.Duration
}

// knownProcess is what tells whether a process read earlier must be read again.
// On a real procfs the number of the inode of /proc/PID, which getdents64(2)
// gives for nothing, belongs to one process: a PID taken again has a new one
// (proc_pid_make_inode of fs/proc/base.c). It does not tell that the process has
// executed another program or has changed otherwise, so that what is young,
// and will still do so, is read in every pass, and all else every few minutes.
// Elsewhere, in a copied tree, the stat file's own inode and times are the sign.
type knownProcess struct {
	pid  int
	sign uint64 // 0 is never the same
	due  time.Duration
}

const (
	// settlesAfter is how old a process is by the time it has executed what it
	// was started for, and has named itself.
	settlesAfter = 2 * time.Minute
	// rereadAfter is when a process is read again at the least, twice that when
	// at the most, so that thousands are not all read in one pass.
	rereadAfter = 5 * time.Minute
	// userHZ is the unit of starttime, the same on every architecture we run on.
	userHZ = 100
)

func (t *processTable) read(ctx context.Context, r *Root) ([]Process, error) {
	return t.get(ctx, &r.calls, "the process table of /proc", func() ([]Process, error) { return t.update(r, false) })
}

// readNow reads the processes with these PIDs anew, all when none is given.
func (t *processTable) readNow(ctx context.Context, r *Root, pids []int) ([]Process, error) {
	if len(pids) == 0 {
		procs, _, err := share(ctx, &r.calls, "all of /proc", func() ([]Process, error) { return t.update(r, true) })
		return procs, err
	}
	procs := make([]Process, 0, len(pids))
	for _, pid := range pids {
		name := "/proc/" + strconv.Itoa(pid) + "/stat"
		data, err := r.ReadFile(ctx, name)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
			continue
		case err != nil:
			return nil, err
		}
		p, err := parseProcStat(data, nil)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		procs = append(procs, p)
	}
	return procs, nil
}

// update reads /proc and remembers what it found.
func (t *processTable) update(r *Root, all bool) ([]Process, error) {
	t.mu.Lock()
	old, known := t.procs, t.known
	t.mu.Unlock()
	if all || len(old) != len(known) {
		old, known = nil, nil
	}
	now := t.sinceBoot()
	procs, known, err := r.readProcesses(old, known, now)
	if err == nil {
		t.mu.Lock()
		t.procs, t.known = procs, known
		t.mu.Unlock()
	}
	return procs, err
}

func (t *processTable) sinceBoot() time.Duration {
	if t.boot != nil {
		return t.boot()
	}
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// readProcesses lists /proc, in order of PID, and reads of those that are in the
// old table, and by its signs have not changed, nothing. A process that ends
// meanwhile is left out. Processes that may not be seen (hidepid) are an error
// beside those that may.
func (r *Root) readProcesses(old []Process, known []knownProcess, now time.Duration) ([]Process, []knownProcess, error) {
	dir, err := r.open("/proc", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, nil, &fs.PathError{Op: "readdir", Path: "/proc", Err: err}
	}
	defer unix.Close(dir)
	var sfs unix.Statfs_t
	procfs := unix.Fstatfs(dir, &sfs) == nil && sfs.Type == unix.PROC_SUPER_MAGIC

	var (
		path  = make([]byte, 0, 32)
		buf   = make([]byte, scratchSize)
		comms = map[string]string{} // most processes share their names with others
	)
	found, err := listProcesses(dir, buf, len(known))
	if err != nil {
		return nil, nil, &fs.PathError{Op: "readdir", Path: "/proc", Err: err}
	}
	procs := make([]Process, 0, len(found))
	hidden, kept := 0, 0
	for _, f := range found {
		path = append(strconv.AppendInt(path[:0], int64(f.pid), 10), "/stat"...)
		for len(known) > 0 && known[0].pid < f.pid {
			old, known = old[1:], known[1:]
		}
		again := len(known) > 0 && known[0].pid == f.pid
		if !procfs && f.sign != 0 && again {
			f.sign = statSign(dir, append(path, 0), unix.AT_SYMLINK_NOFOLLOW)
		}
		if again && known[0].sign == f.sign && f.sign != 0 && now < known[0].due {
			f.due = known[0].due
			procs = append(procs, old[0])
			found[kept] = f
			kept++
			continue
		}
		data, sign, err := r.readStat(dir, path, procfs, &buf)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ESRCH):
			continue
		case errors.Is(err, fs.ErrPermission):
			hidden++
			continue
		case err != nil:
			return nil, nil, &fs.PathError{Op: "read", Path: "/proc/" + string(path), Err: err}
		}
		p, err := parseProcStat(data, comms)
		if err != nil {
			return nil, nil, fmt.Errorf("/proc/%s: %w", path, err)
		}
		if !procfs && f.sign != 0 {
			f.sign = sign
		}
		f.due = dueAgain(p, now, procfs)
		procs = append(procs, p)
		found[kept] = f
		kept++
	}
	if hidden > 0 {
		err = fmt.Errorf("%d processes can not be seen: %w", hidden, fs.ErrPermission)
	}
	return procs, found[:kept], err
}

// dueAgain is when a process that was just read must be read again.
func dueAgain(p Process, now time.Duration, procfs bool) time.Duration {
	switch {
	case !procfs:
		return 1<<63 - 1 // the sign tells all
	case now-time.Duration(p.StartTicks)*(time.Second/userHZ) < settlesAfter:
		return now
	}
	// Neighbours in number were started together; Fibonacci hashing parts them.
	return now + rereadAfter + time.Duration(uint32(p.PID)*2654435769)*rereadAfter>>32
}

// statSign folds what changes when a file in a tree does; 0 when it can not be
// looked at. The name ends in NUL; flags are those of statx(2).
func statSign(dir int, name []byte, flags uintptr) uint64 {
	var st unix.Statx_t
	_, _, errno := unix.Syscall6(unix.SYS_STATX, uintptr(dir), uintptr(unsafe.Pointer(&name[0])),
		flags, unix.STATX_BASIC_STATS, uintptr(unsafe.Pointer(&st)), 0)
	if errno != 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0
	}
	sum := uint64(14695981039346656037) // FNV-1a, by words
	for _, n := range [...]uint64{st.Ino, st.Size, uint64(st.Mtime.Sec), uint64(st.Mtime.Nsec), uint64(st.Ctime.Sec), uint64(st.Ctime.Nsec)} {
		sum = (sum ^ n) * 1099511628211
	}
	return sum
}

// listProcesses lists the processes in an open /proc, in order.
func listProcesses(dir int, buf []byte, likely int) ([]knownProcess, error) {
	found := make([]knownProcess, 0, likely+likely/16+16)
	inOrder := func(a, b knownProcess) int { return cmp.Compare(a.pid, b.pid) }
	for {
		n, err := unix.ReadDirent(dir, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n <= 0:
			if !slices.IsSortedFunc(found, inOrder) { // procfs counts up
				slices.SortFunc(found, inOrder)
			}
			return found, nil
		}
		for e := range dirEntries(buf[:n]) {
			pid, ok := number(e.name)
			if !ok {
				continue
			}
			p := knownProcess{pid: int(pid), sign: e.inode}
			if e.kind != unix.DT_DIR { // in a tree anything may stand there
				p.sign = 0
			}
			found = append(found, p)
		}
	}
}

// readStat reads one /proc/PID/stat below the open /proc. The kernel gives such
// a file in one piece, so that a real procfs needs one read(2) and no stat(2);
// in a copied tree anything may stand under the name. sign is that of the file in
// a tree.
func (r *Root) readStat(dir int, name []byte, procfs bool, buf *[]byte) (data []byte, sign uint64, err error) {
	if !procfs {
		fd, err := r.open("/proc/"+string(name), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err != nil {
			return nil, 0, err
		}
		defer unix.Close(fd)
		// What is written between this and the reading has another sign.
		sign := statSign(fd, []byte{0}, unix.AT_EMPTY_PATH)
		data, err := fill(fd, 64<<10, buf)
		return data, sign, err
	}
	r.opened.Add(1)
	var fd int
	if r.legacy {
		fd, err = unix.Openat(dir, string(name), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	} else {
		fd, err = openat2(dir, string(name), unix.O_RDONLY, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
	}
	if err != nil {
		return nil, 0, err
	}
	defer unix.Close(fd)
	for {
		n, err := unix.Read(fd, (*buf)[:cap(*buf)])
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, 0, err
		}
		return (*buf)[:n], 0, nil
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
