package host

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// A FollowedFile is a file, or a directory if its name ends in '/', of which the
// entries are meant then. It need not exist.
type FollowedFile struct {
	Name string
	// On says what counts; without it anything does that changes what a reader
	// would see.
	On FileEvent
}

// FileEvent is a kind of event of a file.
type FileEvent uint8

const (
	// FileChanged: it was written, made, replaced, removed, or given another mode
	// or owner.
	FileChanged FileEvent = iota
	// FileWritten: only that something was written to it counts. Readers of an
	// SQLite database, rpm -q among them, make an empty log and remove it again.
	FileWritten
	// FileReleased: somebody closed it who could have written: a lock is free.
	FileReleased
)

const (
	changeEvents = unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO
	// wayEvents tell that a directory on the way to a file is another one.
	wayEvents  = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO
	selfEvents = unix.IN_DELETE_SELF | unix.IN_MOVE_SELF
)

func (e FileEvent) mask() uint32 {
	switch e {
	case FileWritten:
		return unix.IN_MODIFY
	case FileReleased:
		return unix.IN_CLOSE_WRITE
	}
	return changeEvents
}

// FollowFiles tells of changes of files, by their names as they were given. The
// lists of names come by a channel, each in the place of the one before. All
// files share one inotify instance, and a file is watched in its directory, where
// it can be replaced; directories that do not exist are waited for in those above.
//
// Below /proc and /sys only a write(2) by some program is told, as inotify knows
// no other; for that each file is kept open, without access to its content. A
// value the kernel itself changes makes no event, but for the few it notifies of
// (memory.events and pids.events of cgroup v2).
func (h *Host) FollowFiles(ctx context.Context, lists <-chan []FollowedFile, l Listener) error {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("inotify_init1", err)
	}
	f, err := newEventFile(ctx, fd, "inotify")
	if err != nil {
		return err
	}
	defer f.Close()
	w := &fileWatch{host: h, fd: fd, marks: map[int32]*mark{}, listener: l}
	defer w.close()

	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	read := make(chan []byte)
	ended := make(chan error, 1)
	go func() {
		ended <- func() error {
			buf := make([]byte, 64<<10)
			for {
				n := 0
				err := f.read(ctx, func(fd int) (err error) {
					n, err = unix.Read(fd, buf[:len(buf)/2])
					return err
				})
				if err != nil {
					return err
				}
				// Told after the pause and not before it: a file that is written
				// over is first emptied, and who looks at once finds it empty, and
				// what was written a second later.
				if err := pause(ctx); err != nil {
					return err
				}
				err = f.read(ctx, func(fd int) error {
					more, err := unix.Read(fd, buf[n:])
					if err == unix.EAGAIN {
						return nil
					}
					n += max(more, 0)
					return err
				})
				if err != nil {
					return err
				}
				select {
				case read <- slices.Clone(buf[:n]):
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}()
	}()
	listening := false
	for {
		select {
		case files := <-lists:
			w.files = files
			if err := w.place(ctx); err != nil {
				return err
			}
			if !listening {
				listening = true
				l.Listening()
			}
		case events := <-read:
			if err := w.tell(ctx, events); err != nil {
				return err
			}
		case err := <-ended:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// fileWatch is the state of one FollowFiles.
type fileWatch struct {
	host     *Host
	fd       int
	files    []FollowedFile
	marks    map[int32]*mark
	listener Listener
	// partly is what was last told of watches that could not be had.
	partly string
}

// mark is one inode that is watched.
type mark struct {
	// wants are by the name of the entry; "" is any entry, or the inode itself.
	wants map[string][]want
	// pin keeps the inode of a file in memory that has it only while it is used.
	pin  int
	used bool
}

// want is why an entry is looked at.
type want struct {
	name string
	mask uint32
	// way: it lies on the way to the file, so that the watches must be placed
	// anew; the file itself may have changed as well.
	way bool
}

func (w *fileWatch) close() {
	for _, m := range w.marks {
		if m.pin >= 0 {
			unix.Close(m.pin)
		}
	}
}

// place puts every watch where it belongs now and takes the others away.
func (w *fileWatch) place(ctx context.Context) error {
	var failed error
	// Again, because a directory may have appeared before its parent was watched.
	for range 3 {
		before := len(w.marks)
		for _, m := range w.marks {
			m.used, m.wants = false, map[string][]want{}
		}
		failed = nil
		for _, f := range w.files {
			if err := w.placeOne(ctx, f); err != nil && failed == nil {
				failed = fmt.Errorf("%s: %w", f.Name, err)
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
		if len(w.marks) == before {
			break
		}
	}
	for wd, m := range w.marks {
		if !m.used {
			_, _ = unix.InotifyRmWatch(w.fd, uint32(wd)) // gone already, perhaps
			w.drop(wd)
		}
	}
	said := ""
	if failed != nil {
		said = failed.Error()
	}
	if said != w.partly {
		if w.partly = said; failed != nil {
			w.listener.Partly(failed)
		}
	}
	return nil
}

// open does what may hang, where a name leads to a file system that does.
func (w *fileWatch) open(ctx context.Context, name string, flags int) (fd int, ok bool, err error) {
	fd, err = bound(ctx, &w.host.calls, name, func(fd int) { unix.Close(fd) }, func() (int, error) { return w.host.open(name, flags) })
	for _, absent := range []error{fs.ErrNotExist, unix.ENOTDIR, unix.ELOOP, unix.ESRCH, unix.ENODEV} {
		if errors.Is(err, absent) {
			return -1, false, nil
		}
	}
	return fd, err == nil, err
}

func (w *fileWatch) drop(wd int32) {
	if m := w.marks[wd]; m != nil {
		if m.pin >= 0 {
			unix.Close(m.pin)
		}
		delete(w.marks, wd)
	}
}

// placeOne watches a file in its directory, or in the nearest one above that
// exists; and where it is a link, also where that leads.
func (w *fileWatch) placeOne(ctx context.Context, f FollowedFile) error {
	name := path.Clean(f.Name)
	entry, way := name, false
	switch {
	case strings.HasPrefix(name, cgroupMount+"/"):
		// Its directory is made and removed by others, the file in it is not.
		if _, err := w.pin(ctx, name, f); err != nil {
			return err
		}
		entry, way = path.Dir(name), true
	case strings.HasPrefix(name, "/proc/"), strings.HasPrefix(name, "/sys/"):
		// What is not there now is not waited for: nobody would tell.
		_, err := w.pin(ctx, name, f)
		return err
	case strings.HasSuffix(f.Name, "/"):
		if _, err := w.add(ctx, name, "", want{f.Name, f.On.mask(), false}); err != nil {
			return err
		}
		way = true // the directory itself may be removed or replaced
	}
	for ; entry != "/"; entry, way = path.Dir(entry), true {
		mask := f.On.mask()
		if way {
			mask = wayEvents
		}
		switch ok, err := w.add(ctx, path.Dir(entry), path.Base(entry), want{f.Name, mask, way}); {
		case err != nil:
			return err
		case ok && !way:
			return w.placeTarget(ctx, name, f)
		case ok:
			return nil
		}
	}
	return nil
}

// placeTarget follows a link to the file it leads to.
func (w *fileWatch) placeTarget(ctx context.Context, name string, f FollowedFile) error {
	if _, err := w.host.ReadLink(ctx, name); err != nil {
		return nil //nolint:nilerr // no link, or not there: its directory tells when it is
	}
	// With another target other watches are needed.
	if _, err := w.add(ctx, path.Dir(name), path.Base(name), want{f.Name, wayEvents, true}); err != nil {
		return err
	}
	target, err := w.host.RealPath(ctx, name)
	if err != nil {
		return nil //nolint:nilerr // it leads nowhere at present
	}
	_, err = w.add(ctx, path.Dir(target), path.Base(target), want{f.Name, f.On.mask(), false})
	return err
}

// add watches an entry of a directory; ok is false when there is no such
// directory.
func (w *fileWatch) add(ctx context.Context, dir, entry string, why want) (ok bool, err error) {
	fd, ok, err := w.open(ctx, dir, unix.O_PATH|unix.O_DIRECTORY)
	if !ok {
		return false, err
	}
	defer unix.Close(fd)
	// The descriptor's own name can lead nowhere else than the host's root
	// allowed. IN_MASK_ADD, because the inode may be watched for another file.
	wd, err := unix.InotifyAddWatch(w.fd, fdName(fd), why.mask|selfEvents|unix.IN_MASK_ADD|unix.IN_EXCL_UNLINK|unix.IN_ONLYDIR)
	if err != nil {
		return false, watchError(err)
	}
	m := w.mark(int32(wd))
	if !slices.Contains(m.wants[entry], why) {
		m.wants[entry] = append(m.wants[entry], why)
	}
	return true, nil
}

func (w *fileWatch) mark(wd int32) *mark {
	m := w.marks[wd]
	if m == nil {
		m = &mark{pin: -1, wants: map[string][]want{}}
		w.marks[wd] = m
	}
	m.used = true
	return m
}

// pin watches a file of procfs or sysfs itself. Such a file has an inode only
// while it is in use, which the descriptor sees to.
func (w *fileWatch) pin(ctx context.Context, name string, f FollowedFile) (ok bool, err error) {
	fd, ok, err := w.open(ctx, name, unix.O_PATH)
	if !ok {
		return false, err
	}
	wd, err := unix.InotifyAddWatch(w.fd, fdName(fd), unix.IN_MODIFY|unix.IN_MASK_ADD)
	if err != nil {
		unix.Close(fd)
		return false, watchError(err)
	}
	m := w.mark(int32(wd))
	if m.pin >= 0 {
		unix.Close(fd)
	} else {
		m.pin = fd
	}
	m.wants[""] = append(m.wants[""], want{f.Name, unix.IN_MODIFY, false})
	return true, nil
}

func watchError(err error) error {
	if errors.Is(err, unix.ENOSPC) {
		return fmt.Errorf("no inotify watch is left (fs.inotify.max_user_watches): %w", err)
	}
	return os.NewSyscallError("inotify_add_watch", err)
}

// tell passes on what was read from the inotify instance.
func (w *fileWatch) tell(ctx context.Context, events []byte) error {
	changed := map[string]bool{}
	again, lost := false, false
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		size := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(events[12:]))
		if size > len(events) {
			return errEnded
		}
		name := strings.TrimRight(string(events[unix.SizeofInotifyEvent:size]), "\x00")
		events = events[size:]
		m := w.marks[wd]
		switch {
		case mask&unix.IN_Q_OVERFLOW != 0:
			again, lost = true, true
			continue
		case m == nil:
			continue // of a watch that was taken away meanwhile
		case mask&(unix.IN_IGNORED|selfEvents) != 0:
			for _, wants := range m.wants {
				for _, why := range wants {
					changed[why.name] = true
				}
			}
			again = true
			if mask&unix.IN_IGNORED != 0 {
				w.drop(wd)
			}
			continue
		}
		for _, entry := range []string{name, ""} {
			for _, why := range m.wants[entry] {
				if why.mask&mask == 0 {
					continue
				}
				changed[why.name] = true
				again = again || why.way
			}
			if name == "" {
				break
			}
		}
	}
	if again {
		if err := w.place(ctx); err != nil {
			return err
		}
	}
	if lost {
		w.listener.Lost()
	}
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		w.listener.Happened(name)
	}
	return nil
}
