package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The interface of /dev/mapper/control, include/uapi/linux/dm-ioctl.h. Every
// request and reply is one buffer: struct dm_ioctl, then data.
const (
	dmHeader = 312 // sizeof(struct dm_ioctl)
	dmTarget = 40  // sizeof(struct dm_target_spec)

	dmListDevices = 0xc138fd02 // _IOWR(0xfd, 2, struct dm_ioctl)
	dmTableStatus = 0xc138fd0c

	dmReadOnly    = 1 << 0
	dmSuspended   = 1 << 1
	dmStatusTable = 1 << 4 // the table instead of the status
	dmBufferFull  = 1 << 8
	// dmNoFlush keeps a thin pool from committing its metadata, and others from
	// flushing, only because someone asked how they are.
	dmNoFlush = 1 << 11

	dmFirstBuffer = 16 << 10
	dmMaxBuffer   = 4 << 20
)

// DeviceMapper implements [View]. The slice must not be changed. A kernel
// without device-mapper has none: opening its control node would load the
// module.
func (h *Host) DeviceMapper(ctx context.Context) ([]DMDevice, error) {
	devices, _, err := share(ctx, &h.calls, "device-mapper", h.deviceMapper)
	return devices, err
}

func (h *Host) deviceMapper() ([]DMDevice, error) {
	var scratch []byte
	misc, err := h.readFile("/proc/misc", MaxFile, &scratch)
	if err != nil {
		return nil, &fs.PathError{Op: "read", Path: "/proc/misc", Err: err}
	}
	if !bytes.Contains(misc, []byte(" device-mapper\n")) {
		return nil, nil
	}
	const control = "/dev/mapper/control"
	fd, err := h.openControl(control)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: control, Err: err}
	}
	defer unix.Close(fd)
	return listDevices(func(request uint, buf []byte) error {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(request), uintptr(unsafe.Pointer(&buf[0])))
		if errno != 0 {
			return errno
		}
		return nil
	})
}

func (h *Host) openControl(name string) (int, error) {
	fd, err := h.open(name, unix.O_PATH)
	if err != nil {
		return -1, err
	}
	defer unix.Close(fd)
	st, err := fstat(fd)
	if err != nil {
		return -1, err
	}
	if st.Mode&fs.ModeCharDevice == 0 || st.Rdev.Major != 10 { // MISC_MAJOR
		return -1, errors.New("not the device-mapper control node")
	}
	return unix.Open(fdName(fd), unix.O_RDWR|unix.O_CLOEXEC, 0)
}

// dmCall makes one ioctl; the buffer is request and reply.
type dmCall func(request uint, buf []byte) error

// dmClient keeps the buffer between calls: it grows to what the largest device
// needs and stays so.
type dmClient struct {
	call dmCall
	buf  []byte
}

func listDevices(call dmCall) ([]DMDevice, error) {
	c := &dmClient{call: call, buf: make([]byte, dmFirstBuffer)}
	reply, err := c.do(dmListDevices, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("listing the device-mapper devices: %w", err)
	}
	numbers, err := parseDMList(reply)
	if err != nil {
		return nil, fmt.Errorf("listing the device-mapper devices: %w", err)
	}
	devices := make([]DMDevice, 0, len(numbers))
	for _, dev := range numbers {
		d, err := c.device(dev)
		if errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENODEV) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("device-mapper device %d:%d: %w", unix.Major(dev), unix.Minor(dev), err)
		}
		devices = append(devices, d)
	}
	return devices, nil
}

// device asks for table and status of one device, by number, which no rename
// changes. They are two questions: when the table was replaced in between, both
// are asked again.
func (c *dmClient) device(dev uint64) (DMDevice, error) {
	for range 3 {
		reply, err := c.do(dmTableStatus, dev, dmStatusTable)
		if err != nil {
			return DMDevice{}, err
		}
		d, err := parseDMDevice(reply, true)
		if err != nil {
			return DMDevice{}, err
		}
		if reply, err = c.do(dmTableStatus, dev, 0); err != nil {
			return DMDevice{}, err
		}
		s, err := parseDMDevice(reply, false)
		if err != nil {
			return DMDevice{}, err
		}
		if sameTargets(d.Targets, s.Targets) {
			for i := range s.Targets {
				s.Targets[i].Table = d.Targets[i].Table
			}
			return s, nil
		}
	}
	return DMDevice{}, errors.New("its table changes faster than it can be read")
}

func sameTargets(a, b []DMTarget) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].Start != b[i].Start || a[i].Length != b[i].Length || a[i].Type != b[i].Type {
			return false
		}
	}
	return true
}

// do makes a request and returns the reply, header first, valid until the next.
func (c *dmClient) do(request uint, dev uint64, flags uint32) ([]byte, error) {
	for {
		clear(c.buf[:dmHeader])
		le := binary.NativeEndian
		le.PutUint32(c.buf[0:], 4) // version 4.0.0: what every kernel since 2.6 speaks
		le.PutUint32(c.buf[12:], uint32(len(c.buf)))
		le.PutUint32(c.buf[16:], dmHeader)
		le.PutUint32(c.buf[28:], flags|dmNoFlush)
		le.PutUint64(c.buf[40:], dev)
		err := c.call(request, c.buf)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return nil, err
		}
		if le.Uint32(c.buf[28:])&dmBufferFull == 0 {
			return c.buf, nil
		}
		if len(c.buf) >= dmMaxBuffer {
			return nil, fmt.Errorf("the answer: %w of %d bytes", ErrTooLarge, dmMaxBuffer)
		}
		c.buf = make([]byte, 4*len(c.buf))
	}
}

var errDMReply = errors.New("the kernel's answer is malformed")

// dmData is the part of a reply behind the header that the kernel filled.
func dmData(reply []byte) ([]byte, error) {
	if len(reply) < dmHeader {
		return nil, fmt.Errorf("%w: %d bytes", errDMReply, len(reply))
	}
	size, start := binary.NativeEndian.Uint32(reply[12:]), binary.NativeEndian.Uint32(reply[16:])
	if uint64(size) > uint64(len(reply)) || start < dmHeader {
		return nil, fmt.Errorf("%w: data from %d to %d of %d", errDMReply, start, size, len(reply))
	}
	// Without data the size is that of the header less its padding, 305.
	return reply[min(start, size):size], nil
}

// parseDMList reads the answer of DM_LIST_DEVICES: a chain of struct
// dm_name_list, of which the device number is taken.
func parseDMList(reply []byte) ([]uint64, error) {
	data, err := dmData(reply)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for {
		if len(data) < 12 {
			return numbers, nil
		}
		dev, next := binary.NativeEndian.Uint64(data), binary.NativeEndian.Uint32(data[8:])
		if dev == 0 { // "no devices" is one empty entry
			return numbers, nil
		}
		numbers = append(numbers, dev)
		if next == 0 {
			return numbers, nil
		}
		if next < 12 || uint64(next) > uint64(len(data)) {
			return nil, fmt.Errorf("%w: next entry at %d of %d", errDMReply, next, len(data))
		}
		data = data[next:]
	}
}

// parseDMDevice reads the answer of DM_TABLE_STATUS. The parameters of a target
// are its table line or its status line.
func parseDMDevice(reply []byte, table bool) (DMDevice, error) {
	data, err := dmData(reply)
	if err != nil {
		return DMDevice{}, err
	}
	ne := binary.NativeEndian
	flags := ne.Uint32(reply[28:])
	d := DMDevice{
		Name:      cString(reply[48:176]),
		UUID:      cString(reply[176:305]),
		Dev:       devNum(ne.Uint64(reply[40:])),
		Suspended: flags&dmSuspended != 0,
		ReadOnly:  flags&dmReadOnly != 0,
		OpenCount: int(int32(ne.Uint32(reply[24:]))),
		EventNr:   ne.Uint32(reply[32:]),
	}
	count := ne.Uint32(reply[20:])
	if uint64(count)*dmTarget > uint64(len(data)) {
		return DMDevice{}, fmt.Errorf("%w: %d targets in %d bytes", errDMReply, count, len(data))
	}
	// "next" counts from the first target, not from the one before.
	at := uint64(0)
	for range count {
		if at+dmTarget > uint64(len(data)) {
			return DMDevice{}, fmt.Errorf("%w: a target at %d of %d", errDMReply, at, len(data))
		}
		spec, next := data[at:], uint64(ne.Uint32(data[at+20:]))
		t := DMTarget{Start: ne.Uint64(spec), Length: ne.Uint64(spec[8:]), Type: cString(spec[24:40])}
		if params := cString(spec[dmTarget:]); table {
			t.Table = params
		} else {
			t.Status = params
		}
		d.Targets = append(d.Targets, t)
		if next <= at && len(d.Targets) < int(count) {
			return DMDevice{}, fmt.Errorf("%w: next target at %d behind one at %d", errDMReply, next, at)
		}
		at = next
	}
	return d, nil
}

func cString(b []byte) string {
	if end := bytes.IndexByte(b, 0); end >= 0 {
		b = b[:end]
	}
	return string(b)
}
