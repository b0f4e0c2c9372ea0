package host

import (
	"hash/maphash"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// kept are descriptors that stay open from pass to pass, by what was opened.
type kept[K comparable] struct {
	mu    sync.Mutex
	open  map[K]*keptFD
	most  int
	swept time.Time
}

type keptFD struct {
	fd    int
	users int
	used  time.Time
	// gone: the last user closes it.
	gone bool
}

// keptUnused is when a descriptor nobody asks for is closed.
const keptUnused = 10 * time.Minute

// take returns what is kept under a key, nil for nothing. It is given back with
// leave or drop.
func (k *kept[K]) take(key K) *keptFD {
	k.mu.Lock()
	defer k.mu.Unlock()
	d := k.open[key]
	if d != nil {
		d.users++
		d.used = time.Now()
	}
	return d
}

// add keeps a descriptor unless there are too many, and takes it: the last who
// leaves one that is not kept closes it. most is how many there may be.
func (k *kept[K]) add(key K, fd, most int) *keptFD {
	d := &keptFD{fd: fd, users: 1, gone: true}
	k.mu.Lock()
	defer k.mu.Unlock()
	k.sweep()
	if k.open[key] == nil && len(k.open) < k.limit(most) {
		if k.open == nil {
			k.open = map[K]*keptFD{}
		}
		d.gone, d.used = false, time.Now()
		k.open[key] = d
	}
	return d
}

// leave gives a descriptor back.
func (k *kept[K]) leave(d *keptFD) {
	k.mu.Lock()
	defer k.mu.Unlock()
	d.users--
	d.close()
}

// drop gives up a descriptor that may be of something that has gone.
func (k *kept[K]) drop(key K, d *keptFD) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open[key] == d {
		delete(k.open, key)
	}
	d.gone = true
	d.users--
	d.close()
}

func (d *keptFD) close() {
	if d.gone && d.users == 0 {
		unix.Close(d.fd)
	}
}

// sweep closes what is not used any more; k.mu is held.
func (k *kept[K]) sweep() {
	if time.Since(k.swept) < keptUnused/2 {
		return
	}
	k.swept = time.Now()
	for key, d := range k.open {
		if time.Since(d.used) > keptUnused {
			delete(k.open, key)
			d.gone = true
			d.close()
		}
	}
}

// limit is how many may be kept: so many, and a quarter of the descriptors this
// process may have at most.
func (k *kept[K]) limit(most int) int {
	if k.most == 0 {
		var l unix.Rlimit
		k.most = most
		if unix.Getrlimit(unix.RLIMIT_NOFILE, &l) == nil {
			k.most = int(min(l.Cur/4, uint64(most)))
		}
	}
	return k.most
}

// closeAll closes what is kept.
func (k *kept[K]) closeAll() {
	k.mu.Lock()
	defer k.mu.Unlock()
	for key, d := range k.open {
		delete(k.open, key)
		d.gone = true
		d.close()
	}
	k.most = -1
}

// maxKeptDirs is enough for the disks and sessions of a host with 2,000.
const maxKeptDirs = 4096

// dirOf opens a directory, or takes it from those kept; fresh is true when it was
// opened now. It is given back with leave. Kept are those of devices in sysfs and
// of processes' namespaces.
//
// The way to an attribute, eight directories long, is half of what reading it
// costs, and on a large host thousands are read in every pass. An O_PATH
// descriptor costs the kernel about a kilobyte and keeps no device or module.
// A directory of a device that has gone is empty, whatever has its name now, so
// that what is not found in a kept directory is looked for again by its name.
func (r *Root) dirOf(name string) (d *keptFD, fresh bool, err error) {
	keep := !r.legacy && (r.sysInMemory && strings.HasPrefix(name, "/sys/devices/") ||
		r.procfs && strings.HasPrefix(name, "/proc/") && strings.HasSuffix(name, "/ns"))
	if keep {
		if d := r.dirs.take(name); d != nil {
			return d, false, nil
		}
	}
	fd, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, false, err
	}
	if !keep {
		return &keptFD{fd: fd, users: 1, gone: true}, true, nil
	}
	return r.dirs.add(name, fd, maxKeptDirs), true, nil
}

// keptFiles are files of procfs, sysfs and control groups that stay open because
// they are read in every pass. The kernel writes them anew for whoever reads them
// from the beginning, so that one pread(2) does what otherwise takes a walk to the
// file, open, fstat, two reads and close. What was opened for a process, a device
// or a control group that has gone answers with an error (ESRCH, ENODEV, ENOENT),
// whatever has its name now, and is then opened by its name again.
type keptFiles struct {
	kept[fileName]
	// seen has what was read once, by a sum of its name, so that what is read no
	// second time is not kept. Two that share a place, one in fifty of 300, make
	// it forget each other and are opened each time.
	seen  [1 << 14]uint16
	seed  maphash.Seed
	began sync.Once
}

// fileName is a file by its directory and its name in it.
type fileName struct{ dir, base string }

// maxKeptFiles is more than a node with a few disks and sessions is asked for in a
// pass. Each costs the kernel some 5 KiB, which count for the pod: those of the
// large host's disks would take 28 MB.
const maxKeptFiles = 256

// again tells whether a file was asked for before.
func (k *keptFiles) again(name fileName) bool {
	k.began.Do(func() { k.seed = maphash.MakeSeed() })
	sum := maphash.Comparable(k.seed, name)
	at, tag := &k.seen[sum%uint64(len(k.seen))], uint16(sum>>48)|1
	k.mu.Lock()
	defer k.mu.Unlock()
	was := *at == tag
	*at = tag
	return was
}

// mayKeep tells whether a file may stay open: one that the kernel writes anew for
// each reader, for whatever opened it.
func (r *Root) mayKeep(n fileName) bool {
	if r.legacy || strings.Contains(n.dir, "..") || strings.Contains(n.base, "..") {
		return false
	}
	base := n.base[strings.LastIndexByte(n.base, '/')+1:]
	if n.dir == "/sys" || strings.HasPrefix(n.dir, "/sys/") {
		switch {
		case !r.sysfs, strings.HasPrefix(base, "vpd_"), strings.Contains(n.dir, "/md"), strings.Contains(n.base, "md/"):
			return false
		case base == "cgroup.procs", base == "cgroup.threads", base == "tasks":
			return false // not one record; and that of version 1 may be a second old
		}
		return true
	}
	if !r.procfs {
		return false
	}
	if n.dir == "/proc" {
		return base != "mounts" // a link to that of the reader
	}
	if strings.HasPrefix(n.dir, "/proc/sys/") {
		return true
	}
	pid, ok := strings.CutPrefix(n.dir, "/proc/")
	if !ok || pid == "" || strings.Trim(pid, "0123456789") != "" {
		return false
	}
	switch base {
	case "comm", "stat", "status", "cgroup", "oom_score", "oom_score_adj", "cmdline":
		return true
	case "mountinfo":
		// It keeps the mount namespace of whoever it was opened for.
		return pid == "1"
	}
	return false
}

// atOnce tells whether one read gives all of a file of procfs that fits the
// buffer: it is written as one record (single_open of fs/seq_file.c, or no
// seq_file at all). Of others, such as /proc/locks, a read gives as many whole
// records as fit a page.
func (n fileName) atOnce() bool {
	switch n.dir {
	case "/proc":
		switch n.base {
		case "loadavg", "meminfo", "stat", "uptime", "cmdline":
			return true
		}
		return false
	default:
		return n.base != "mountinfo"
	}
}

// readKept reads a file that may be kept into scratch, which grows as needed. ok is
// false when it has to be read by its name.
func (r *Root) readKept(n fileName, limit int64, scratch *[]byte) (data []byte, ok bool) {
	if !r.mayKeep(n) {
		return nil, false
	}
	d := r.kept.take(n)
	if d == nil {
		return nil, false
	}
	data, err := fillAgain(d.fd, n, limit, scratch)
	if err != nil {
		r.kept.drop(n, d)
		return nil, false
	}
	r.kept.leave(d)
	return data, true
}

// keep has a file that was just read stay open, if it is one that may and is
// asked for again and again; otherwise it is closed.
func (r *Root) keep(n fileName, fd int) {
	if !r.mayKeep(n) || !r.kept.again(n) || !writtenAnew(fd) {
		unix.Close(fd)
		return
	}
	r.kept.leave(r.kept.add(n, fd, maxKeptFiles))
}

// writtenAnew tells whether a file is one of the file systems that generate what
// is read: anything may be mounted below /sys and /proc.
func writtenAnew(fd int) bool {
	var st unix.Statfs_t
	if unix.Fstatfs(fd, &st) != nil {
		return false
	}
	switch st.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC:
		return true
	}
	return false
}

// fillAgain reads an open file from its beginning into scratch.
func fillAgain(fd int, n fileName, limit int64, scratch *[]byte) ([]byte, error) {
	buf := (*scratch)[:0]
	if cap(buf) < scratchSize {
		buf = make([]byte, 0, scratchSize)
	}
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf))
		}
		got, err := unix.Pread(fd, buf[len(buf):cap(buf)], int64(len(buf)))
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		}
		first := len(buf) == 0
		buf = buf[:len(buf)+got]
		if int64(len(buf)) > limit {
			return nil, ErrTooLarge
		}
		if got == 0 || first && len(buf) < sysfsSize && n.atOnce() {
			*scratch = buf
			return buf, nil
		}
	}
}
