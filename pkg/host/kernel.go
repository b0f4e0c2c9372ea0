package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Adjtimex implements [View]. The clock belongs to no namespace.
func (h *Host) Adjtimex(ctx context.Context) (Timex, error) {
	tx, _, err := share(ctx, &h.calls, "adjtimex", func() (Timex, error) {
		var raw unix.Timex // modes 0: nothing is set
		state, err := unix.Adjtimex(&raw)
		if err != nil {
			return Timex{}, fmt.Errorf("adjtimex: %w", err)
		}
		offset := time.Duration(raw.Offset)
		if raw.Status&unix.STA_NANO == 0 {
			offset *= time.Microsecond
		}
		return Timex{
			State:    state,
			Status:   raw.Status,
			Offset:   offset,
			MaxError: time.Duration(raw.Maxerror) * time.Microsecond,
			EstError: time.Duration(raw.Esterror) * time.Microsecond,
		}, nil
	})
	return tx, err
}

// ptpReading is the system clock before and after a look at the PTP clock.
type ptpReading struct{ before, ptp, after time.Time }

// PTPOffset implements [View].
func (h *Host) PTPOffset(ctx context.Context, node string) (offset, uncertainty time.Duration, err error) {
	best, _, err := share(ctx, &h.calls, "PTP clock "+node, func() (ptpReading, error) {
		fd, err := h.openPTP(node)
		if err != nil {
			return ptpReading{}, &fs.PathError{Op: "open", Path: node, Err: err}
		}
		defer unix.Close(fd)
		readings, err := readPTP(fd)
		if err != nil {
			return ptpReading{}, fmt.Errorf("%s: %w", node, err)
		}
		return narrowest(readings), nil
	})
	if err != nil {
		return 0, 0, err
	}
	offset, uncertainty = best.offset()
	return offset, uncertainty, nil
}

// openPTP opens a device node only when sysfs says that it is a PTP clock:
// opening another device may do anything.
func (h *Host) openPTP(node string) (int, error) {
	fd, err := h.open(node, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	st, err := fstat(fd)
	if err != nil {
		return -1, err
	}
	if st.Mode.Type() != fs.ModeDevice|fs.ModeCharDevice {
		return -1, errors.New("not a character device")
	}
	real, err := h.realPath(fmt.Sprintf("/sys/dev/char/%d:%d", st.Rdev.Major, st.Rdev.Minor))
	if err != nil || !strings.Contains(real, "/ptp/ptp") {
		return -1, fmt.Errorf("device %d:%d is not a PTP clock", st.Rdev.Major, st.Rdev.Minor)
	}
	return unix.Open(fdName(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
}

// ptpSamples is how often the clocks are compared; the least disturbed
// comparison counts.
const ptpSamples = 5

func readPTP(fd int) ([]ptpReading, error) {
	if ext, err := unix.IoctlPtpSysOffsetExtended(fd, ptpSamples); err == nil {
		var readings []ptpReading
		for _, ts := range ext.Ts[:ptpSamples] {
			at := func(i int) time.Time { return time.Unix(ts[i].Sec, int64(ts[i].Nsec)) }
			readings = append(readings, ptpReading{at(0), at(1), at(2)})
		}
		return readings, nil
	}
	// Drivers without gettimex64: compare from here, a little less exactly.
	var readings []ptpReading
	for range ptpSamples {
		var ts [3]unix.Timespec
		for i, clock := range []int32{unix.CLOCK_REALTIME, unix.FdToClockID(fd), unix.CLOCK_REALTIME} {
			if err := unix.ClockGettime(clock, &ts[i]); err != nil {
				return nil, fmt.Errorf("clock_gettime: %w", err)
			}
		}
		at := func(i int) time.Time { return time.Unix(ts[i].Unix()) }
		readings = append(readings, ptpReading{at(0), at(1), at(2)})
	}
	return readings, nil
}

func narrowest(readings []ptpReading) ptpReading {
	best := readings[0]
	for _, r := range readings[1:] {
		if r.after.Sub(r.before) < best.after.Sub(best.before) {
			best = r
		}
	}
	return best
}

// offset is system time minus PTP time, taking the PTP clock to have been read
// in the middle, and the width of the interval.
func (r ptpReading) offset() (offset, uncertainty time.Duration) {
	uncertainty = r.after.Sub(r.before)
	return r.before.Add(uncertainty / 2).Sub(r.ptp), uncertainty
}

// mountLimit is how long a mount point may take to answer. Local file systems
// take microseconds, network ones milliseconds.
const mountLimit = 2 * time.Second

// StatMount implements [View].
func (h *Host) StatMount(ctx context.Context, mountPoint string) (MountStat, error) {
	ctx, cancel := context.WithTimeout(ctx, mountLimit)
	defer cancel()
	st, since, err := share(ctx, &h.mounts, mountPoint, func() (MountStat, error) {
		// O_PATH does not trigger an automount.
		fd, err := h.open(mountPoint, unix.O_PATH)
		if err != nil {
			return MountStat{}, &fs.PathError{Op: "open", Path: mountPoint, Err: err}
		}
		defer unix.Close(fd)
		info, err := fstat(fd)
		if err != nil {
			return MountStat{}, &fs.PathError{Op: "stat", Path: mountPoint, Err: err}
		}
		var sfs unix.Statfs_t
		if err := unix.Fstatfs(fd, &sfs); err != nil {
			return MountStat{}, &fs.PathError{Op: "statfs", Path: mountPoint, Err: err}
		}
		return MountStat{Dev: info.Dev, ReadOnly: sfs.Flags&unix.ST_RDONLY != 0}, nil
	})
	if errors.Is(err, ErrNoReply) {
		st.Pending = since
	}
	return st, err
}

// LockHolder implements [View]. An open file description lock is told by a PID
// of -1, a holder in another PID namespace by 0; flock(2) locks are another kind
// and hinder no package manager.
func (h *Host) LockHolder(ctx context.Context, name string) (Lock, error) {
	lock, _, err := share(ctx, &h.calls, "lock "+name, func() (Lock, error) {
		fd, err := h.open(name, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY)
		if err != nil {
			return Lock{}, err
		}
		// Closing drops all POSIX locks this process has on the file; it takes
		// none, here or elsewhere.
		defer unix.Close(fd)
		if st, err := fstat(fd); err != nil || !st.Mode.IsRegular() {
			return Lock{}, errors.Join(err, ErrNotRegular)
		}
		l := unix.Flock_t{Type: unix.F_WRLCK}
		if err := unix.FcntlFlock(uintptr(fd), unix.F_GETLK, &l); err != nil {
			return Lock{}, err
		}
		if l.Type == unix.F_UNLCK {
			return Lock{}, nil
		}
		return Lock{Held: true, PID: int(l.Pid)}, nil
	})
	if err != nil {
		return Lock{}, &fs.PathError{Op: "lock", Path: name, Err: err}
	}
	return lock, nil
}
