package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxRecord is the size of the kernel's own buffer for one record
	// (PRINTK_MESSAGE_MAX and its predecessors); a smaller one gives EINVAL.
	maxRecord = 8192
	// maxLog limits the text kept, in bytes; the newest is kept. The kernel's
	// buffer is 128 KiB to 1 MiB on most hosts.
	maxLog = 2 << 20
	// recordCost is what a record takes beside its text.
	recordCost = 64
)

// kernelLog follows the ring buffer: the descriptor stays open, its position is
// ours alone, and each call reads only what is new.
type kernelLog struct {
	host *Host
	// The rest belongs to the one call that is under way.
	fd      int
	opened  bool
	records []KernelRecord
	size    int
	// foreign keeps what processes wrote as well; for tests, which can not have
	// the kernel say anything.
	foreign bool
}

// KernelLog implements [View]. Where /dev/kmsg is closed to us, the records come
// from syslog(2) and have no sequence numbers. The slice must not be changed.
func (h *Host) KernelLog(ctx context.Context) ([]KernelRecord, error) {
	records, _, err := share(ctx, &h.calls, "the kernel log", func() ([]KernelRecord, error) {
		if err := h.log.follow(); err == nil {
			return h.log.records, nil
		} else if records, sysErr := readSyslog(); sysErr == nil {
			return records, nil
		} else {
			return nil, errors.Join(err, sysErr)
		}
	})
	return records, err
}

func (l *kernelLog) follow() error {
	if !l.opened {
		fd, err := l.open()
		if err != nil {
			return &fs.PathError{Op: "open", Path: "/dev/kmsg", Err: err}
		}
		l.fd, l.opened = fd, true
	}
	buf := make([]byte, maxRecord)
	for {
		n, err := unix.Read(l.fd, buf)
		switch err {
		case nil:
		case unix.EINTR, unix.EPIPE: // EPIPE: overwritten before we read it
			continue
		case unix.EAGAIN:
			return nil
		default:
			return &fs.PathError{Op: "read", Path: "/dev/kmsg", Err: err}
		}
		if n == 0 { // a regular file under the name, in a container
			return nil
		}
		r, err := ParseKernelRecord(buf[:n])
		if err != nil {
			return err
		}
		if r.Facility == 0 || l.foreign {
			l.keep(r)
		}
	}
}

// open opens the device, and nothing else that may have its name. /dev/kmsg of
// the container does as well: there is one buffer.
func (l *kernelLog) open() (int, error) {
	fd, err := l.host.open("/dev/kmsg", unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	st, err := fstat(fd)
	if err != nil {
		return -1, err
	}
	if st.Rdev != (DevNum{1, 11}) || st.Mode&fs.ModeCharDevice == 0 {
		return -1, errors.New("not the kernel log device 1:11")
	}
	return unix.Open(fdName(fd), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
}

// keep appends a record. Callers hold earlier lengths of the slice, so that it
// may grow in place but is copied before its head is dropped.
func (l *kernelLog) keep(r KernelRecord) {
	l.records = append(l.records, r)
	l.size += len(r.Text) + recordCost
	if l.size <= maxLog {
		return
	}
	drop := 0
	for ; l.size > maxLog/2; drop++ {
		l.size -= len(l.records[drop].Text) + recordCost
	}
	l.records = append([]KernelRecord(nil), l.records[drop:]...)
}

func (l *kernelLog) close() {
	if l.opened {
		unix.Close(l.fd)
	}
}

// readSyslog reads the whole buffer by syslog(2), which asks for CAP_SYSLOG only
// when kernel.dmesg_restrict is set.
func readSyslog() ([]KernelRecord, error) {
	size, err := unix.Klogctl(unix.SYSLOG_ACTION_SIZE_BUFFER, nil)
	if err != nil {
		return nil, fmt.Errorf("syslog(2): %w", err)
	}
	buf := make([]byte, min(max(size, 1<<12), 8*maxLog))
	n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, buf)
	if err != nil {
		return nil, fmt.Errorf("syslog(2): %w", err)
	}
	records := slices.DeleteFunc(parseSyslog(buf[:n]), func(r KernelRecord) bool { return r.Facility != 0 })
	return records, nil
}

// parseSyslog parses the lines of syslog(2), "<6>[   12.345678] text", with
// "[T123]" or "[C0]" behind the time under CONFIG_PRINTK_CALLER. Lines without a
// level or time go on with the record before. Unlike /dev/kmsg this gives the
// text as it is: a newline in it, which a file's name can bring in, looks like
// the next record.
func parseSyslog(data []byte) []KernelRecord {
	var records []KernelRecord
	var last KernelRecord
	for line := range bytes.Lines(data) {
		line = bytes.TrimSuffix(line, []byte("\n"))
		r := KernelRecord{Priority: last.Priority, Facility: last.Facility, Time: last.Time}
		if rest, ok := bytes.CutPrefix(line, []byte("<")); ok {
			if level, rest, ok := bytes.Cut(rest, []byte(">")); ok {
				if n, err := strconv.ParseUint(string(level), 10, 16); err == nil {
					r.Priority, r.Facility, line = int(n&7), int(n>>3), rest
				}
			}
		}
		if at, rest, ok := cutTime(line); ok {
			r.Time, line = at, rest
			if caller, rest, ok := bytes.Cut(line, []byte("] ")); ok && len(caller) > 1 && caller[0] == '[' {
				if c := bytes.TrimLeft(caller[1:], " "); len(c) > 1 && (c[0] == 'T' || c[0] == 'C') {
					if _, number := number(c[1:]); number {
						line = rest
					}
				}
			}
			line = bytes.TrimPrefix(line, []byte(" "))
		}
		r.Text = string(line)
		records = append(records, r)
		last = r
	}
	return records
}

// cutTime takes "[   12.345678]" off a line.
func cutTime(line []byte) (time.Duration, []byte, bool) {
	rest, ok := bytes.CutPrefix(line, []byte("["))
	if !ok {
		return 0, nil, false
	}
	stamp, rest, ok := bytes.Cut(rest, []byte("]"))
	if !ok {
		return 0, nil, false
	}
	sec, usec, ok := bytes.Cut(bytes.TrimLeft(stamp, " "), []byte("."))
	if !ok || len(usec) != 6 {
		return 0, nil, false
	}
	s, ok1 := number(sec)
	u, ok2 := number(usec)
	if !ok1 || !ok2 || s > 1<<32 {
		return 0, nil, false
	}
	return time.Duration(s)*time.Second + time.Duration(u)*time.Microsecond, rest, true
}
