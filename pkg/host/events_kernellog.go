package host

import (
	"context"
	"io/fs"
	"strings"

	"golang.org/x/sys/unix"
)

// FollowKernelLog tells of new records of the kernel's log that contain one of
// the words, by the word. Who wrote them is left to whoever then reads the log:
// what a process writes there wakes, and is not believed.
func (h *Host) FollowKernelLog(ctx context.Context, words []string, l Listener) error {
	fd, err := h.log.open()
	if err != nil {
		return &fs.PathError{Op: "open", Path: "/dev/kmsg", Err: err}
	}
	f, err := newEventFile(ctx, fd, "/dev/kmsg")
	if err != nil {
		return err
	}
	defer f.Close()
	// Only what is new: what was there is the probes' to read.
	if _, err := unix.Seek(fd, 0, unix.SEEK_END); err != nil {
		return &fs.PathError{Op: "seek", Path: "/dev/kmsg", Err: err}
	}
	l.Listening()
	buf := make([]byte, maxRecord)
	found := make([]bool, len(words))
	for {
		lost := false
		clear(found)
		err := f.read(ctx, func(fd int) error {
			for n := 0; ; n++ {
				size, err := unix.Read(fd, buf)
				switch {
				case err == unix.EPIPE: // overwritten before it was read
					lost = true
					continue
				case err == unix.EAGAIN && n > 0:
					return nil
				case err != nil:
					return err
				case size == 0:
					return errEnded
				}
				r, err := ParseKernelRecord(buf[:size])
				if err != nil {
					lost = true
					continue
				}
				for i, w := range words {
					found[i] = found[i] || strings.Contains(r.Text, w)
				}
				if n >= eventBatch {
					return nil
				}
			}
		})
		if err != nil {
			return err
		}
		if lost {
			l.Lost()
		}
		for i, w := range words {
			if found[i] {
				l.Happened(w)
			}
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// eventBatch is how many records of a storm are read before something is told.
const eventBatch = 4096
