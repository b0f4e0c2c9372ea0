package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strings"

	"golang.org/x/sys/unix"
)

// FileContent is a file with everything that is kept when it is replaced and
// brought back when the change is undone.
type FileContent struct {
	Data []byte
	// Mode are the permission bits.
	Mode     fs.FileMode
	UID, GID uint32
	// Label is the SELinux label; "" where there is none, and for a new file the
	// one the policy gives.
	Label string
}

const (
	selinuxLabel = "security.selinux"
	// tempSuffix ends no name that any of the .d directories reads.
	tempSuffix = ".host-hygiene-tmp"
	// maxChanged is the largest file that is replaced: it must fit a backup.
	maxChanged = 1 << 20
)

// Snapshot reads a file with its mode, owner and label. A symlink in its place
// is an error: replacing it would change another file than the one named.
func (c *Changer) Snapshot(ctx context.Context, name string) (FileContent, error) {
	return bound(ctx, &c.h.calls, "snapshot "+name, nil, func() (FileContent, error) {
		f, err := c.h.snapshot(name)
		if err != nil {
			return f, &fs.PathError{Op: "read", Path: name, Err: err}
		}
		return f, nil
	})
}

func (r *Root) snapshot(name string) (FileContent, error) {
	fd, err := r.open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_NOCTTY)
	if errors.Is(err, unix.ELOOP) {
		return FileContent{}, errors.New("a symbolic link stands there; give the path of the file it leads to")
	}
	if err != nil {
		return FileContent{}, err
	}
	defer unix.Close(fd)
	st, err := fstat(fd)
	if err != nil {
		return FileContent{}, err
	}
	var scratch []byte
	data, err := readRegular(fd, maxChanged, &scratch)
	if err != nil {
		return FileContent{}, err
	}
	label, err := readLabel(fd)
	if err != nil {
		return FileContent{}, fmt.Errorf("its SELinux label: %w", err)
	}
	return FileContent{Data: data, Mode: st.Mode & (fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky), UID: st.UID, GID: st.GID, Label: label}, nil
}

func readLabel(fd int) (string, error) {
	var buf [512]byte
	n, err := unix.Fgetxattr(fd, selinuxLabel, buf[:])
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.EOPNOTSUPP) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	return strings.TrimRight(string(buf[:n]), "\x00"), nil
}

// WriteFile puts a file in place in one step: written beside its name, synced,
// renamed, the directory synced. Whoever reads meanwhile sees the old file or
// the new one, also after a power failure. The directory must exist.
func (c *Changer) WriteFile(ctx context.Context, name string, f FileContent) error {
	return c.writeFile(ctx, name, f, 0)
}

// CreateFile is WriteFile for a file that must not exist; fs.ErrExist otherwise,
// also when somebody else creates it at the same moment.
func (c *Changer) CreateFile(ctx context.Context, name string, f FileContent) error {
	return c.writeFile(ctx, name, f, unix.RENAME_NOREPLACE)
}

func (c *Changer) writeFile(ctx context.Context, name string, f FileContent, rename uint) error {
	return c.change(ctx, "write "+name, func() error {
		dir, base, err := c.parent(name)
		if err != nil {
			return &fs.PathError{Op: "write", Path: name, Err: err}
		}
		defer unix.Close(dir)
		if err := replaceAt(dir, base, f, rename); err != nil {
			return &fs.PathError{Op: "write", Path: name, Err: err}
		}
		return nil
	})
}

// parent opens the directory a file lies in. O_PATH would not allow fsync(2).
func (c *Changer) parent(name string) (dir int, base string, err error) {
	name = path.Clean("/" + name)
	if base = path.Base(name); base == "/" {
		return -1, "", unix.EISDIR
	}
	dir, err = c.h.openForWriting(path.Dir(name))
	return dir, base, err
}

// maxLinks is how many symlinks a way may have, as in path_resolution(7).
const maxLinks = 40

// openForWriting opens a directory as [Root.open] does, but follows a symlink only
// when it is root's or our own: whoever may make links on the way to a file
// could lead what is written to another one, at the moment it is written.
func (r *Root) openForWriting(name string) (int, error) {
	const flags = unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC
	if !r.legacy {
		rel := strings.TrimLeft(name, "/")
		if rel == "" {
			rel = "."
		}
		r.opened.Add(1)
		if fd, err := openat2(r.fd, rel, flags, unix.RESOLVE_BENEATH|unix.RESOLVE_NO_SYMLINKS); err != unix.ELOOP {
			return fd, err
		}
	}
	// The directories from the root down, for "..".
	var open []int
	at := func() int {
		if n := len(open); n > 0 {
			return open[n-1]
		}
		return r.fd
	}
	leave := func(n int) {
		for _, fd := range open[n:] {
			unix.Close(fd)
		}
		open = open[:n]
	}
	defer func() { leave(0) }()
	rest, links := strings.Split(name, "/"), 0
	for len(rest) > 0 {
		part := rest[0]
		rest = rest[1:]
		switch part {
		case "", ".":
			continue
		case "..":
			leave(max(0, len(open)-1))
			continue
		}
		fd, err := unix.Openat(at(), part, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil {
			return -1, err
		}
		open = append(open, fd)
		st, err := fstat(fd)
		if err != nil {
			return -1, err
		}
		if st.Mode.Type() != fs.ModeSymlink {
			continue // what is no directory fails with the next part
		}
		if st.UID != 0 && st.UID != uint32(unix.Geteuid()) {
			return -1, fmt.Errorf("%q on the way there is a symbolic link of user %d's, who could lead it anywhere", part, st.UID)
		}
		if links++; links > maxLinks {
			return -1, unix.ELOOP
		}
		target, err := readlinkat(fd, "")
		if err != nil {
			return -1, err
		}
		leave(len(open) - 1)
		if path.IsAbs(target) {
			leave(0)
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	return unix.Openat(at(), ".", flags, 0)
}

func replaceAt(dir int, base string, f FileContent, rename uint) error {
	var st unix.Stat_t
	if err := unix.Fstatat(dir, base, &st, unix.AT_SYMLINK_NOFOLLOW); err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		return ErrNotRegular
	}
	temp := "." + base + tempSuffix
	// What an agent left that was killed in the middle.
	if err := unix.Unlinkat(dir, temp, 0); err != nil && err != unix.ENOENT {
		return err
	}
	fd, err := unix.Openat(dir, temp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	err = fillTemp(fd, f)
	if cerr := unix.Close(fd); err == nil {
		err = cerr
	}
	if err == nil {
		err = unix.Renameat2(dir, temp, dir, base, rename)
	}
	if err != nil {
		unix.Unlinkat(dir, temp, 0)
		return err
	}
	return unix.Fsync(dir)
}

func fillTemp(fd int, f FileContent) error {
	for data := f.Data; len(data) > 0; {
		n, err := unix.Write(fd, data)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	if err := unix.Fchown(fd, int(f.UID), int(f.GID)); err != nil {
		return err
	}
	// After chown(2), which clears the set-ID bits.
	if err := unix.Fchmod(fd, unixMode(f.Mode)); err != nil {
		return err
	}
	if f.Label != "" {
		if err := unix.Fsetxattr(fd, selinuxLabel, []byte(f.Label+"\x00"), 0); err != nil && !errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("setting the SELinux label: %w", err)
		}
	}
	return unix.Fsync(fd)
}

func unixMode(m fs.FileMode) uint32 {
	mode := uint32(m.Perm())
	for bit, set := range map[fs.FileMode]uint32{fs.ModeSetuid: unix.S_ISUID, fs.ModeSetgid: unix.S_ISGID, fs.ModeSticky: unix.S_ISVTX} {
		if m&bit != 0 {
			mode |= set
		}
	}
	return mode
}

// RemoveFile removes a file; that it is gone already is no error.
func (c *Changer) RemoveFile(ctx context.Context, name string) error { return c.remove(ctx, name, 0) }

// RemoveDir removes a directory that is empty.
func (c *Changer) RemoveDir(ctx context.Context, name string) error {
	return c.remove(ctx, name, unix.AT_REMOVEDIR)
}

func (c *Changer) remove(ctx context.Context, name string, flags int) error {
	return c.change(ctx, "remove "+name, func() error {
		dir, base, err := c.parent(name)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil {
			defer unix.Close(dir)
			if err = unix.Unlinkat(dir, base, flags); err == nil {
				err = unix.Fsync(dir)
			}
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return &fs.PathError{Op: "remove", Path: name, Err: err}
		}
		return nil
	})
}

// MakeDirs makes a directory and what lies above it, mode 0755 or what perm says
// for all of them, and returns those that were not there, outermost first.
func (c *Changer) MakeDirs(ctx context.Context, name string, perm fs.FileMode) ([]string, error) {
	return bound(ctx, &c.h.calls, "mkdir "+name, nil, func() ([]string, error) {
		name = path.Clean("/" + name)
		var made []string
		for i := 1; i <= len(name); i++ {
			if i < len(name) && name[i] != '/' {
				continue
			}
			part := name[:i]
			dir, base, err := c.parent(part)
			if err != nil {
				return made, &fs.PathError{Op: "mkdir", Path: part, Err: err}
			}
			err = unix.Mkdirat(dir, base, uint32(perm.Perm()))
			if err == nil {
				made = append(made, part)
				err = unix.Fsync(dir)
			}
			unix.Close(dir)
			if err != nil && err != unix.EEXIST {
				return made, &fs.PathError{Op: "mkdir", Path: part, Err: err}
			}
		}
		return made, nil
	})
}
