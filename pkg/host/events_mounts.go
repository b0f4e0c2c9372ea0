package host

import (
	"context"
	"io/fs"

	"golang.org/x/sys/unix"
)

// FollowMounts tells of changes of init's mount table: mount, umount, remount and
// changes of propagation (proc_pid_mountinfo(5)). A file system that fails and a
// device that vanishes below one change nothing there.
func (h *Host) FollowMounts(ctx context.Context, l Listener) error {
	const name = "/proc/1/mountinfo"
	// The kernel tells each open file once, whoever polls it (fs/proc_namespace.c,
	// mounts_poll): the runtime's poller takes the news of one file, and the
	// other is asked whether there was any.
	open := func() (int, error) {
		fd, err := h.open(name, unix.O_RDONLY|unix.O_NONBLOCK)
		if err != nil {
			return -1, &fs.PathError{Op: "open", Path: name, Err: err}
		}
		return fd, nil
	}
	asked, err := open()
	if err != nil {
		return err
	}
	defer unix.Close(asked)
	fd, err := open()
	if err != nil {
		return err
	}
	f, err := newEventFile(ctx, fd, name)
	if err != nil {
		return err
	}
	defer f.Close()
	l.Listening()
	for {
		err := f.read(ctx, func(int) error {
			poll := []unix.PollFd{{Fd: int32(asked), Events: unix.POLLPRI}}
			if _, err := unix.Poll(poll, 0); err != nil {
				return err
			}
			if poll[0].Revents&unix.POLLPRI == 0 {
				return unix.EAGAIN
			}
			return nil
		})
		if err != nil {
			return err
		}
		l.Happened(name)
		if err := pause(ctx); err != nil {
			return err
		}
	}
}
