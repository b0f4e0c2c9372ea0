package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/cyphar/filepath-securejoin/pathrs-lite"
	"golang.org/x/sys/unix"
)

// Root is the host's file tree: /proc/1/root in a pod, / by hand, a directory
// with --root. Every path is resolved by the kernel inside it (openat2(2) with
// RESOLVE_IN_ROOT), because hosts have absolute symlinks such as
// /var/run -> /run, which os.Root refuses and plain opens would resolve in the
// container's own tree.
type Root struct {
	path string
	dir  *os.File
	// legacy is set on kernels without openat2 (< 5.6): the library resolves
	// component by component there, slower and as safe.
	legacy bool
}

// OpenRoot opens the tree at path.
func OpenRoot(name string) (*Root, error) {
	fd, err := unix.Open(name, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	r := &Root{path: name, dir: os.NewFile(uintptr(fd), name)}
	probe, err := r.openat2(".", unix.O_PATH|unix.O_DIRECTORY)
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
	return r, nil
}

// Close releases the tree.
func (r *Root) Close() error { return r.dir.Close() }

// Path is where the tree lies for this process.
func (r *Root) Path() string { return r.path }

func (r *Root) openat2(rel string, flags uint64) (int, error) {
	how := unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC,
		// Magic links (/proc/PID/exe, /proc/PID/fd/N) lead out of any root.
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	// EAGAIN: a rename or mount happened while a ".." was being walked.
	for range 8 {
		fd, err := unix.Openat2(int(r.dir.Fd()), rel, &how)
		if err == nil || (err != unix.EAGAIN && err != unix.EINTR) {
			return fd, err
		}
	}
	return -1, unix.EAGAIN
}

// open returns a file descriptor; flags must not create anything.
func (r *Root) open(ctx context.Context, name string, flags int) (int, error) {
	if err := ctx.Err(); err != nil {
		return -1, err
	}
	trace(ctx, name)
	if strings.IndexByte(name, 0) >= 0 {
		return -1, unix.EINVAL
	}
	if r.legacy {
		return r.openLegacy(name, flags)
	}
	rel := strings.TrimLeft(name, "/")
	if rel == "" {
		rel = "."
	}
	return r.openat2(rel, uint64(flags))
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
	// O_NONBLOCK so that a FIFO planted under the name does not block the open.
	fd, err := r.open(ctx, name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	defer unix.Close(fd)
	data, err := readRegular(fd, limit)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: name, Err: err}
	}
	return data, nil
}

// readRegular reads with plain read(2): os.File would hand the descriptor to
// the poller, and a sysfs attribute that returns EAGAIN would then be polled
// for ever.
func readRegular(fd int, limit int64) ([]byte, error) {
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
	size := int64(512)
	if st.Size > 0 && st.Size != 4096 {
		size = st.Size + 1
	}
	buf := make([]byte, 0, size)
	for {
		if len(buf) == cap(buf) {
			buf = slices.Grow(buf, max(512, len(buf)))
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n == 0:
			return buf, nil
		}
		buf = buf[:len(buf)+n]
		if int64(len(buf)) > limit {
			return nil, fmt.Errorf("more than %d bytes: %w", limit, ErrTooLarge)
		}
	}
}

// ReadDir implements [Files].
func (r *Root) ReadDir(ctx context.Context, name string) ([]string, error) {
	fd, err := r.open(ctx, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK)
	if err != nil {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: err}
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	names, err := f.Readdirnames(-1)
	if err != nil && err != io.EOF {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// ReadLink implements [Files].
func (r *Root) ReadLink(ctx context.Context, name string) (string, error) {
	fd, err := r.open(ctx, name, unix.O_PATH|unix.O_NOFOLLOW)
	if err != nil {
		return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
	}
	defer unix.Close(fd)
	buf := make([]byte, 256)
	for {
		n, err := unix.Readlinkat(fd, "", buf)
		if err == unix.ENOENT { // readlinkat(2): the descriptor is no symlink
			err = unix.EINVAL
		}
		if err != nil {
			return "", &fs.PathError{Op: "readlink", Path: name, Err: err}
		}
		if n < len(buf) {
			return string(buf[:n]), nil
		}
		buf = make([]byte, 2*len(buf))
	}
}

// Stat implements [Files].
func (r *Root) Stat(ctx context.Context, name string) (FileInfo, error) {
	return r.stat(ctx, name, unix.O_PATH)
}

// Lstat implements [Files].
func (r *Root) Lstat(ctx context.Context, name string) (FileInfo, error) {
	return r.stat(ctx, name, unix.O_PATH|unix.O_NOFOLLOW)
}

func (r *Root) stat(ctx context.Context, name string, flags int) (FileInfo, error) {
	fd, err := r.open(ctx, name, flags)
	if err != nil {
		return FileInfo{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return FileInfo{}, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	return FileInfo{
		Mode:    fileMode(st.Mode),
		Size:    st.Size,
		ModTime: time.Unix(st.Mtim.Unix()),
		UID:     st.Uid,
		GID:     st.Gid,
		Inode:   st.Ino,
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

// RealPath implements [Files].
func (r *Root) RealPath(ctx context.Context, name string) (string, error) {
	if _, err := r.Stat(ctx, name); err != nil {
		return "", err
	}
	full, err := securejoin.SecureJoinVFS(r.path, name, rootVFS{ctx, r})
	if err != nil {
		return "", &fs.PathError{Op: "realpath", Path: name, Err: err}
	}
	rel := strings.TrimPrefix(full, strings.TrimRight(r.path, "/"))
	return path.Clean("/" + rel), nil
}

// rootVFS lets the library walk symlinks through the confined tree.
type rootVFS struct {
	ctx context.Context
	r   *Root
}

func (v rootVFS) rel(name string) string {
	return "/" + strings.TrimPrefix(name, strings.TrimRight(v.r.path, "/"))
}

func (v rootVFS) Lstat(name string) (os.FileInfo, error) {
	st, err := v.r.Lstat(v.ctx, v.rel(name))
	if err != nil {
		return nil, err
	}
	return modeInfo{name: path.Base(name), mode: st.Mode}, nil
}

func (v rootVFS) Readlink(name string) (string, error) {
	return v.r.ReadLink(v.ctx, v.rel(name))
}

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
