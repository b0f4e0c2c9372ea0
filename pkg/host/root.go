package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// Root is the host's file tree: /proc/1/root in a pod, / by hand, a directory
// with --root. Every path is resolved by the kernel inside it (openat2(2) with
// RESOLVE_IN_ROOT), because hosts have absolute symlinks such as
// /var/run -> /run, which os.Root refuses and plain opens would resolve in the
// container's own tree.
//
// A read that the kernel does not answer ends with its context and [ErrNoReply];
// see bound.go for what becomes of it.
type Root struct {
	path string
	// base is where the kernel says the tree lies, for RealPath.
	base string
	fd   int
	// legacy is set on kernels without openat2 (< 5.6): the library resolves
	// component by component there, slower and as safe.
	legacy bool
	// Whether /sys and /proc are in memory, and what they are called.
	sysInMemory, procInMemory bool
	sysfs, procfs             bool

	dir *os.File // the same descriptor, for the library

	calls flights
	files filePool
	large largeFiles
	dirs  kept[string]
	kept  keptFiles

	opened atomic.Int64
}

// OpenRoot opens the tree at path.
func OpenRoot(name string) (*Root, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	r := &Root{path: name, fd: fd, dir: os.NewFile(uintptr(fd), name)}
	r.base, _ = fdPath(fd)
	probe, err := openat2(fd, ".", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_IN_ROOT)
	switch {
	case err == nil:
		unix.Close(probe)
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM):
		// EPERM: a container runtime whose seccomp profile predates openat2.
		r.legacy = true
	default:
		r.dir.Close()
		return nil, &fs.PathError{Op: "openat2", Path: name, Err: err}
	}
	r.sysInMemory, r.sysfs = r.memoryOnly("/sys", unix.SYSFS_MAGIC)
	r.procInMemory, r.procfs = r.memoryOnly("/proc", unix.PROC_SUPER_MAGIC)
	return r, nil
}

// Close releases the tree; calls under way end on their own.
func (r *Root) Close() error {
	if !r.files.close() {
		// A call that hangs still resolves names below the descriptor; its
		// number must not become another file's.
		return nil
	}
	r.dirs.closeAll()
	r.kept.closeAll()
	return r.dir.Close()
}

// Opened counts the files that were opened so far: what a pass costs is for the
// most part how many it opens.
func (r *Root) Opened() int64 { return r.opened.Load() }

// Path is where the tree lies for this process.
func (r *Root) Path() string { return r.path }

func openat2(dir int, rel string, flags, resolve uint64) (int, error) {
	how := unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC,
		// Magic links (/proc/PID/exe, /proc/PID/fd/N) lead out of any root.
		Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS,
	}
	if strings.IndexByte(rel, 0) >= 0 {
		return -1, unix.EINVAL
	}
	// unix.Openat2 copies the name to the heap, which for tens of thousands of
	// files a pass was a tenth of all memory.
	var short [256]byte
	name := append(append(short[:0], rel...), 0)
	// EAGAIN: a rename or mount happened while a ".." was being walked.
	for range 8 {
		fd, _, errno := unix.Syscall6(unix.SYS_OPENAT2, uintptr(dir), uintptr(unsafe.Pointer(&name[0])),
			uintptr(unsafe.Pointer(&how)), unix.SizeofOpenHow, 0, 0)
		switch errno {
		case 0:
			return int(fd), nil
		case unix.EAGAIN, unix.EINTR:
			continue
		}
		return -1, errno
	}
	return -1, unix.EAGAIN
}

// open returns a file descriptor; flags must not create anything.
func (r *Root) open(name string, flags int) (int, error) {
	if strings.IndexByte(name, 0) >= 0 {
		return -1, unix.EINVAL
	}
	r.opened.Add(1)
	if r.legacy {
		return r.openLegacy(name, flags)
	}
	rel := strings.TrimLeft(name, "/")
	if rel == "" {
		rel = "."
	}
	return openat2(r.fd, rel, uint64(flags), unix.RESOLVE_IN_ROOT)
}

func (r *Root) openLegacy(name string, flags int) (int, error) {
	if flags&unix.O_NOFOLLOW != 0 {
		parent, err := pathrs.OpenatInRoot(r.dir, path.Dir(path.Clean("/"+name)))
		if err != nil {
			return -1, err
		}
		defer parent.Close()
		return unix.Openat(int(parent.Fd()), path.Base(name), flags|unix.O_CLOEXEC, 0)
	}
	handle, err := pathrs.OpenatInRoot(r.dir, name)
	if err != nil {
		return -1, err
	}
	defer handle.Close()
	if flags&unix.O_PATH != 0 {
		return unix.FcntlInt(handle.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	}
	f, err := pathrs.Reopen(handle, flags)
	if err != nil {
		return -1, err
	}
	defer f.Close()
	return unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
}

// ReadFile implements [Files].
func (r *Root) ReadFile(ctx context.Context, name string) ([]byte, error) {
	return r.ReadFileMax(ctx, name, MaxFile)
}

// ReadFileMax implements [Files].
func (r *Root) ReadFileMax(ctx context.Context, name string, limit int64) ([]byte, error) {
	a := r.ask(ctx, fileCall{op: opRead, name: name, limit: limit})
	return a.data, a.err
}

// ReadThrough implements [Files].
func (r *Root) ReadThrough(ctx context.Context, name string, limit int64, each func(piece []byte)) error {
	return r.askFor(ctx, fileCall{op: opReadThrough, name: name, limit: limit}, nil, each).err
}

// Certificates implements [Files].
func (r *Root) Certificates(ctx context.Context, name string) ([][]byte, error) {
	a := r.ask(ctx, fileCall{op: opCertificates, name: name})
	return a.certs, a.err
}

// ReadAttributes implements [Files].
func (r *Root) ReadAttributes(ctx context.Context, dir string, names ...string) []Attribute {
	a := r.ask(ctx, fileCall{op: opReadAttributes, name: dir}, names...)
	if a.err != nil {
		return failed(names, a.err)
	}
	return a.attrs
}

func failed(names []string, err error) []Attribute {
	all := make([]Attribute, len(names))
	for i := range all {
		all[i].Err = err
	}
	return all
}

// ReadDir implements [Files].
func (r *Root) ReadDir(ctx context.Context, name string) ([]string, error) {
	a := r.ask(ctx, fileCall{op: opReadDir, name: name})
	return a.names, a.err
}

// ReadLink implements [Files].
func (r *Root) ReadLink(ctx context.Context, name string) (string, error) {
	a := r.ask(ctx, fileCall{op: opReadLink, name: name})
	return a.text, a.err
}

// ReadLinks implements [Files].
func (r *Root) ReadLinks(ctx context.Context, dir string, names []string) []Link {
	a := r.ask(ctx, fileCall{op: opReadLinks, name: dir}, names...)
	if a.err != nil {
		return failedLinks(names, a.err)
	}
	return a.links
}

func failedLinks(names []string, err error) []Link {
	all := make([]Link, len(names))
	for i := range all {
		all[i].Err = err
	}
	return all
}

// Stat implements [Files].
func (r *Root) Stat(ctx context.Context, name string) (FileInfo, error) {
	a := r.ask(ctx, fileCall{op: opStat, name: name})
	return a.info, a.err
}

// Lstat implements [Files].
func (r *Root) Lstat(ctx context.Context, name string) (FileInfo, error) {
	a := r.ask(ctx, fileCall{op: opLstat, name: name})
	return a.info, a.err
}

// RealPath implements [Files].
func (r *Root) RealPath(ctx context.Context, name string) (string, error) {
	a := r.ask(ctx, fileCall{op: opRealPath, name: name})
	return a.text, a.err
}

// readFile reads a regular file; scratch is memory to read into, and comes back
// for the next file.
func (r *Root) readFile(name string, limit int64, scratch *[]byte) ([]byte, error) {
	if n := r.large.size(name); n > cap(*scratch) {
		*scratch = make([]byte, 0, n)
	}
	cut := strings.LastIndexByte(name, '/')
	file := fileName{name[:max(cut, 0)], name[cut+1:]}
	if data, ok := r.readKept(file, limit, scratch); ok {
		if len(data) > scratchMax {
			r.large.note(name, len(data))
		}
		return handOver(data, scratch), nil
	}
	// O_NONBLOCK so that a FIFO planted under the name does not block the open.
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	data, err := readRegular(fd, limit, scratch)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r.keep(file, fd)
	if len(data) > scratchMax {
		r.large.note(name, len(data))
	}
	return data, nil
}

// readThrough reads a regular file in pieces of the size of scratch.
func (r *Root) readThrough(name string, limit int64, scratch *[]byte, each func([]byte)) error {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ErrNotRegular
	}
	if cap(*scratch) < scratchSize {
		*scratch = make([]byte, 0, scratchSize)
	}
	buf := (*scratch)[:cap(*scratch)]
	for read := int64(0); ; {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n <= 0:
			return nil
		}
		if read += int64(n); read > limit {
			return fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
		}
		each(buf[:n])
	}
}

// largeFiles remembers how long the few files were that do not fit a worker's
// memory: /proc does not tell in advance how long a mount table is, and growing
// into it step by step costs twice its size each time.
type largeFiles struct {
	mu    sync.Mutex
	sizes map[string]int
}

// size is how much memory to read a file into, 0 when nothing is known.
func (l *largeFiles) size(name string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.sizes[name]
	return n + n/16
}

func (l *largeFiles) note(name string, n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.sizes == nil || len(l.sizes) >= 16 {
		l.sizes = map[string]int{}
	}
	l.sizes[name] = n
}

const (
	// scratchSize holds nearly every file of /proc and /sys in one read.
	scratchSize = 16 << 10
	// sysfsSize is what every attribute claims to have (PAGE_SIZE, 64 KiB on
	// some arm64 kernels, where one more read then finds the end).
	sysfsSize = 4096
	// scratchMax is how much memory a worker keeps between two files.
	scratchMax = 256 << 10
)

// readRegular reads with plain read(2): os.File would hand the descriptor to
// the poller, and a sysfs attribute that returns EAGAIN would then be polled
// for ever.
func readRegular(fd int, limit int64, scratch *[]byte) ([]byte, error) {
	buf, err := fill(fd, limit, scratch)
	if err != nil {
		return nil, err
	}
	return handOver(buf, scratch), nil
}

// handOver gives the caller what was read into memory that is kept for the next
// file.
func handOver(buf []byte, scratch *[]byte) []byte {
	if cap(buf) > scratchMax { // too much to keep: let the caller have it
		*scratch = nil
		return buf
	}
	return append(make([]byte, 0, len(buf)), buf...)
}

// fill reads a regular file into scratch, which grows as needed.
func fill(fd int, limit int64, scratch *[]byte) ([]byte, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, ErrNotRegular
	}
	if st.Size > limit {
		return nil, fmt.Errorf("%d bytes: %w of %d", st.Size, ErrTooLarge, limit)
	}
	// procfs and sysfs report size 0 or 4096 whatever is in the file.
	buf := (*scratch)[:0]
	if want := max(scratchSize, int(st.Size)+1); cap(buf) < want {
		buf = make([]byte, 0, want)
	}
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, len(buf))
		}
		// A sysfs attribute comes whole with the first read and so does a file
		// that fits the buffer; only procfs must be asked whether there is more.
		if st.Size > 0 && (int64(len(buf)) == st.Size || len(buf) > 0 && st.Size == sysfsSize && len(buf) < sysfsSize) {
			*scratch = buf
			return buf, nil
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			*scratch = buf
			return buf, nil
		}
		buf = buf[:len(buf)+n]
		if int64(len(buf)) > limit {
			return nil, fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
		}
	}
}

// readAttributes opens the directory and then the files from there. A symlink on
// the way to a file ("device/state") leads out of the directory, so that its
// target is found from the root and kept for the names that follow.
func (r *Root) readAttributes(dir string, names []string, scratch *[]byte) []Attribute {
	for {
		at, fresh, err := r.dirOf(dir)
		if err != nil {
			return failed(names, &fs.PathError{Op: "open", Path: dir, Err: err})
		}
		all := r.readFrom(at.fd, dir, names, scratch)
		if !fresh && slices.ContainsFunc(all, func(a Attribute) bool { return errors.Is(a.Err, fs.ErrNotExist) }) {
			r.dirs.drop(dir, at)
			continue
		}
		r.dirs.leave(at)
		return all
	}
}

// readFrom reads attributes from an open directory.
func (r *Root) readFrom(at int, dir string, names []string, scratch *[]byte) []Attribute {
	below, parent := -1, ""
	defer func() {
		if below >= 0 {
			unix.Close(below)
		}
	}()
	all := make([]Attribute, len(names))
	for i, name := range names {
		head, base := "", name
		if cut := strings.LastIndexByte(name, '/'); cut >= 0 {
			head, base = name[:cut], name[cut+1:]
		}
		from := at
		var err error
		switch {
		case head == "":
		case parent != head && (i+1 == len(names) || !strings.HasPrefix(names[i+1], head+"/")):
			head, base = "", name // alone in its directory
		default:
			if below < 0 || parent != head {
				if below >= 0 {
					unix.Close(below)
				}
				if below, err = r.openBelow(at, dir, head, unix.O_PATH|unix.O_DIRECTORY); err != nil {
					all[i].Err = &fs.PathError{Op: "read", Path: dir + "/" + name, Err: err}
					below = -1
					continue
				}
				parent = head
			}
			from = below
		}
		all[i].Data, err = r.readBelow(from, dir, head, base, scratch)
		if err != nil {
			all[i].Err = &fs.PathError{Op: "read", Path: dir + "/" + name, Err: err}
		}
	}
	return all
}

// openBelow opens a file from an open directory where no symlink is in the way,
// and from the root otherwise.
func (r *Root) openBelow(at int, dir, name string, flags int) (int, error) {
	if !r.legacy {
		r.opened.Add(1)
		fd, err := openat2(at, name, uint64(flags), unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS)
		if err != unix.ELOOP && err != unix.EXDEV {
			return fd, err
		}
	}
	return r.open(dir+"/"+name, flags)
}

func (r *Root) readBelow(at int, dir, head, base string, scratch *[]byte) ([]byte, error) {
	if head != "" {
		dir += "/" + head
	}
	file := fileName{dir, base}
	if data, ok := r.readKept(file, MaxAttribute, scratch); ok {
		return handOver(data, scratch), nil
	}
	fd, err := r.openBelow(at, dir, base, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, err
	}
	data, err := readRegular(fd, MaxAttribute, scratch)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	r.keep(file, fd)
	return data, nil
}

func (r *Root) readDir(name string, scratch *[]byte) ([]string, error) {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	names, err := readNames(fd, scratch)
	if err != nil {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// readNames lists an open directory with plain getdents64(2): os.File would
// register the descriptor with the poller first, for more system calls than the
// reading takes.
func readNames(fd int, scratch *[]byte) ([]string, error) {
	var names []string
	err := eachEntry(fd, scratch, func(e dirEntry) { names = append(names, string(e.name)) })
	return names, err
}

// dirEntry is a struct linux_dirent64: kind is DT_DIR and the like. The name is
// valid until the next is read.
type dirEntry struct {
	inode uint64
	kind  byte
	name  []byte
}

// eachEntry hands out the entries of an open directory but "." and "..".
func eachEntry(fd int, scratch *[]byte, each func(dirEntry)) error {
	if cap(*scratch) < scratchSize {
		*scratch = make([]byte, 0, scratchSize)
	}
	buf := (*scratch)[:cap(*scratch)]
	for {
		n, err := unix.ReadDirent(fd, buf)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return err
		case n <= 0:
			return nil
		}
		for e := range dirEntries(buf[:n]) {
			each(e)
		}
	}
}

// dirEntries takes apart what getdents64(2) gave: inode, offset, record length,
// type, name up to a NUL. What is malformed ends it.
func dirEntries(buf []byte) iter.Seq[dirEntry] {
	const head = 19
	return func(yield func(dirEntry) bool) {
		for len(buf) > head {
			length := int(binary.NativeEndian.Uint16(buf[16:]))
			if length <= head || length > len(buf) {
				return
			}
			e := dirEntry{inode: binary.NativeEndian.Uint64(buf), kind: buf[18], name: buf[head:length]}
			if end := bytes.IndexByte(e.name, 0); end >= 0 {
				e.name = e.name[:end]
			}
			buf = buf[length:]
			// Inode 0 is a deleted entry.
			if e.inode == 0 || string(e.name) == "." || string(e.name) == ".." {
				continue
			}
			if !yield(e) {
				return
			}
		}
	}
}

func (r *Root) readLink(name string) (string, error) {
	fd, err := r.open(name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	text, err := readlinkat(fd, "")
	if err == unix.ENOENT { // readlinkat(2): the descriptor is no symlink
		err = unix.EINVAL
	}
	return text, err
}

// readLinks reads the links of a directory. That of a process's namespaces is kept:
// of one that has gone nothing is found in it.
func (r *Root) readLinks(dir string, names []string) []Link {
	for {
		at, fresh, err := r.dirOf(dir)
		if err != nil {
			return failedLinks(names, &fs.PathError{Op: "open", Path: dir, Err: err})
		}
		all := linksFrom(at.fd, dir, names)
		if !fresh && slices.ContainsFunc(all, func(l Link) bool { return l.Err != nil }) {
			r.dirs.drop(dir, at)
			continue
		}
		r.dirs.leave(at)
		return all
	}
}

func linksFrom(at int, dir string, names []string) []Link {
	all := make([]Link, len(names))
	for i, name := range names {
		err := error(unix.EINVAL)
		// Only an entry of the directory itself: a way through others could
		// lead out of the root.
		if name != "" && strings.IndexByte(name, '/') < 0 {
			all[i].Target, err = readlinkat(at, name)
		}
		if err != nil {
			all[i].Err = &fs.PathError{Op: "readlink", Path: dir + "/" + name, Err: err}
		}
	}
	return all
}

func readlinkat(fd int, name string) (string, error) {
	var small [256]byte
	for buf := small[:]; ; buf = make([]byte, 4*len(buf)) {
		n, err := unix.Readlinkat(fd, name, buf)
		if err != nil {
			return "", err
		}
		if n < len(buf) {
			return string(buf[:n]), nil
		}
	}
}

func (r *Root) stat(name string, flags int) (FileInfo, error) {
	fd, err := r.open(name, flags)
	if err != nil {
		return FileInfo{}, err
	}
	defer unix.Close(fd)
	return fstat(fd)
}

func fstat(fd int) (FileInfo, error) {
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return FileInfo{}, err
	}
	return FileInfo{
		Mode:    fileMode(st.Mode),
		Size:    st.Size,
		ModTime: time.Unix(st.Mtim.Unix()),
		UID:     st.Uid,
		GID:     st.Gid,
		Inode:   st.Ino,
		Links:   uint64(st.Nlink),
		Dev:     devNum(uint64(st.Dev)),
		Rdev:    devNum(uint64(st.Rdev)),
	}, nil
}

func devNum(dev uint64) DevNum { return DevNum{unix.Major(dev), unix.Minor(dev)} }

func fileMode(m uint32) fs.FileMode {
	mode := fs.FileMode(m & 0o777)
	switch m & unix.S_IFMT {
	case unix.S_IFDIR:
		mode |= fs.ModeDir
	case unix.S_IFLNK:
		mode |= fs.ModeSymlink
	case unix.S_IFBLK:
		mode |= fs.ModeDevice
	case unix.S_IFCHR:
		mode |= fs.ModeDevice | fs.ModeCharDevice
	case unix.S_IFIFO:
		mode |= fs.ModeNamedPipe
	case unix.S_IFSOCK:
		mode |= fs.ModeSocket
	}
	if m&unix.S_ISUID != 0 {
		mode |= fs.ModeSetuid
	}
	if m&unix.S_ISGID != 0 {
		mode |= fs.ModeSetgid
	}
	if m&unix.S_ISVTX != 0 {
		mode |= fs.ModeSticky
	}
	return mode
}

// fdPath is the path of an open file as the kernel knows it.
func fdPath(fd int) (string, error) {
	return readlinkat(unix.AT_FDCWD, fdName(fd))
}

// fdName names an open file for calls that only take a path.
func fdName(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

func (r *Root) realPath(name string) (string, error) {
	fd, err := r.open(name, unix.O_PATH)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	// One readlink instead of one for each component: the disks probe asks for
	// thousands of links below /sys.
	full, err := fdPath(fd)
	rel, inside := strings.CutPrefix(full, strings.TrimRight(r.base, "/"))
	if err == nil && inside && strings.HasPrefix(rel, "/") && !strings.HasSuffix(rel, " (deleted)") {
		return rel, nil
	}
	if err == nil && full == r.base {
		return "/", nil
	}
	return r.walk(name)
}

// walk resolves name component by component, where the kernel's own idea of the
// path does not help.
func (r *Root) walk(name string) (string, error) {
	full, err := securejoin.SecureJoinVFS(r.path, name, rootVFS{r})
	if err != nil {
		return "", err
	}
	rel := strings.TrimPrefix(full, strings.TrimRight(r.path, "/"))
	return path.Clean("/" + rel), nil
}

// rootVFS lets the library walk symlinks through the confined tree.
type rootVFS struct{ r *Root }

func (v rootVFS) rel(name string) string {
	return "/" + strings.TrimPrefix(name, strings.TrimRight(v.r.path, "/"))
}

func (v rootVFS) Lstat(name string) (os.FileInfo, error) {
	st, err := v.r.stat(v.rel(name), unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return nil, err
	}
	return modeInfo{name: path.Base(name), mode: st.Mode}, nil
}

func (v rootVFS) Readlink(name string) (string, error) { return v.r.readLink(v.rel(name)) }

// modeInfo is as much of os.FileInfo as securejoin looks at.
type modeInfo struct {
	name string
	mode fs.FileMode
}

func (m modeInfo) Name() string       { return m.name }
func (m modeInfo) Size() int64        { return 0 }
func (m modeInfo) Mode() fs.FileMode  { return m.mode }
func (m modeInfo) ModTime() time.Time { return time.Time{} }
func (m modeInfo) IsDir() bool        { return m.mode.IsDir() }
func (m modeInfo) Sys() any           { return nil }
