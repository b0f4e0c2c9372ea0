package host

import (
	"bytes"
	"context"
	"encoding/binary"
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// The multicast groups of NETLINK_KOBJECT_UEVENT: the kernel's own events,
	// and the same again from udev when it has made its links.
	kernelUevents, udevUevents = 1, 2
	// ueventBuffer is room for more events than a host with thousands of disks
	// makes within eventPause; the kernel takes memory only for what waits.
	ueventBuffer = 8 << 20
	// ueventMax is more than the 2 KiB of the kernel's buffer (UEVENT_BUFFER_SIZE)
	// and udev's 8 KiB.
	ueventMax = 16 << 10
)

// FollowUevents tells of devices that appear, change or go, by the subsystem:
// "block", "iscsi_session", ... Each is told when the kernel says so, and again
// when udev is done with it.
func (h *Host) FollowUevents(ctx context.Context, subsystems []string, l Listener) error {
	s, err := h.netlink(ctx, unix.NETLINK_KOBJECT_UEVENT, kernelUevents|udevUevents, ueventBuffer, ueventFilter(subsystems))
	if err != nil {
		return err
	}
	defer s.Close()
	l.Listening()
	return s.follow(ctx, l, func(m netlinkMessage) string {
		if subsystem := parseUevent(m.data); m.genuineUevent() && slices.Contains(subsystems, subsystem) {
			return subsystem
		}
		return ""
	})
}

// genuineUevent: from the kernel, or from a udev that is root's.
func (m netlinkMessage) genuineUevent() bool {
	return m.groups == kernelUevents && m.sender == 0 || m.groups == udevUevents && m.sender != 0 && m.uid == 0
}

// parseUevent returns the SUBSYSTEM of a message of the kernel,
// "add@/devices/...\0ACTION=add\0...", or of udev, which has a header before the
// properties (systemd, src/libsystemd/sd-device/device-monitor.c); empty for
// what is neither.
func parseUevent(data []byte) string {
	if bytes.HasPrefix(data, []byte("libudev\x00")) {
		if len(data) < 40 || binary.BigEndian.Uint32(data[8:]) != udevMagic {
			return ""
		}
		at, size := binary.NativeEndian.Uint32(data[16:]), binary.NativeEndian.Uint32(data[20:])
		if uint64(at)+uint64(size) > uint64(len(data)) {
			return ""
		}
		data = data[at:][:size]
	} else if head, rest, ok := bytes.Cut(data, []byte{0}); ok && bytes.Contains(head, []byte("@/")) {
		data = rest
	} else {
		return ""
	}
	for property := range bytes.SplitSeq(data, []byte{0}) {
		if value, ok := bytes.CutPrefix(property, []byte("SUBSYSTEM=")); ok {
			return string(value)
		}
	}
	return ""
}

const udevMagic = 0xfeedcafe

// ueventFilter is a classic BPF program that drops in the kernel what most
// events of a node are: the virtual network cards and the backing devices of
// mounts that come and go with every pod, and of udev's all but the wanted
// subsystems, by the hash udev puts into its header.
func ueventFilter(subsystems []string) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	loadX := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_IND, K: at}
	}
	// equal skips a number of instructions when A is, or is not, the value.
	equal := func(k uint32, yes, no int) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: uint8(yes), Jf: uint8(no), K: k}
	}
	word := func(s string) uint32 { return binary.BigEndian.Uint32([]byte(s)) }
	accept := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 1<<32 - 1}
	drop := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}

	var udev []unix.SockFilter
	udev = append(udev, load(8), equal(udevMagic, 1, 0), accept, load(24))
	for _, s := range subsystems {
		udev = append(udev, equal(murmurHash2(s), 0, 1), accept)
	}
	udev = append(udev, drop)

	// The path stands behind the action and an '@'.
	var kernel []unix.SockFilter
	actions := []struct {
		head string
		path uint32
	}{{"add@", 4}, {"remo", 7}, {"chan", 7}, {"move", 5}, {"onli", 7}, {"offl", 8}, {"bind", 5}, {"unbi", 7}}
	for i, a := range actions {
		// Two instructions an action: the length of its name into X, and on.
		rest := 3*(len(actions)-1-i) + 1
		kernel = append(kernel, equal(word(a.head), 0, 2),
			unix.SockFilter{Code: unix.BPF_LDX | unix.BPF_W | unix.BPF_IMM, K: a.path},
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JA, K: uint32(rest)})
	}
	kernel = append(kernel, accept,
		loadX(0), equal(word("/dev"), 0, 6),
		loadX(8), equal(word("/vir"), 0, 4),
		loadX(16), equal(word("/net"), 1, 0), equal(word("/bdi"), 0, 1),
		drop,
		accept)

	program := []unix.SockFilter{load(0), equal(word("libu"), 0, len(udev))}
	return append(append(program, udev...), kernel...)
}

// murmurHash2 is the hash of Austin Appleby's with seed 0, as udev uses it for
// the names of subsystems (systemd, src/basic/MurmurHash2.c).
func murmurHash2(s string) uint32 {
	const m, r = 0x5bd1e995, 24
	h := uint32(len(s))
	for ; len(s) >= 4; s = s[4:] {
		k := binary.LittleEndian.Uint32([]byte(s[:4])) * m
		k ^= k >> r
		h = h*m ^ k*m
	}
	for i := len(s) - 1; i >= 0; i-- {
		h ^= uint32(s[i]) << (8 * i)
	}
	if len(s) > 0 {
		h *= m
	}
	h ^= h >> 13
	h *= m
	return h ^ h>>15
}

// ISCSIErrors is what the events of [Host.FollowISCSI] are called.
const ISCSIErrors = "iscsi"

// FollowISCSI hears what the kernel tells iscsid: lost connections, above all,
// of which there is no uevent (drivers/scsi/scsi_transport_iscsi.c). It is a
// group that anybody may join; iscsid does not notice. fs.ErrNotExist means that
// the kernel's iSCSI is not loaded, which asking for the socket would do.
func (h *Host) FollowISCSI(ctx context.Context, l Listener) error {
	const class = "/sys/class/iscsi_transport"
	if _, err := h.Stat(ctx, class); err != nil {
		return err
	}
	const iscsid, uip = 1, 2
	s, err := h.netlink(ctx, unix.NETLINK_ISCSI, iscsid|uip, 0, nil)
	if err != nil {
		return err
	}
	defer s.Close()
	l.Listening()
	return s.follow(ctx, l, func(m netlinkMessage) string {
		if m.sender != 0 {
			return ""
		}
		return ISCSIErrors
	})
}

// netlinkSocket is a socket that has joined multicast groups.
type netlinkSocket struct{ *eventFile }

type netlinkMessage struct {
	data []byte
	// sender is the port of whoever sent it, 0 for the kernel; groups the one it
	// was sent to, uid the sender's.
	sender, groups, uid uint32
}

// netlink joins groups in the host's network namespace.
func (h *Host) netlink(ctx context.Context, protocol int, groups uint32, buffer int, filter []unix.SockFilter) (*netlinkSocket, error) {
	fd := -1
	open := func() (err error) {
		fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, protocol)
		return os.NewSyscallError("netlink socket", err)
	}
	var err error
	if h.ns.differs(unix.CLONE_NEWNET) {
		err = h.ns.do(unix.CLONE_NEWNET, open)
	} else {
		err = open()
	}
	if err != nil {
		return nil, err
	}
	err = func() error {
		if len(filter) > 0 {
			program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
			if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &program); err != nil {
				return os.NewSyscallError("SO_ATTACH_FILTER", err)
			}
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PASSCRED, 1); err != nil {
			return os.NewSyscallError("SO_PASSCRED", err)
		}
		// Without CAP_NET_ADMIN there is what net.core.rmem_max allows.
		if buffer > 0 && unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, buffer) != nil {
			_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, buffer)
		}
		return os.NewSyscallError("netlink bind", unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups}))
	}()
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	f, err := newEventFile(ctx, fd, "netlink")
	if err != nil {
		return nil, err
	}
	return &netlinkSocket{f}, nil
}

// follow reads until ctx ends; what names a message, "" for one of no interest.
func (s *netlinkSocket) follow(ctx context.Context, l Listener, what func(netlinkMessage) string) error {
	data, oob := make([]byte, ueventMax), make([]byte, unix.CmsgSpace(unix.SizeofUcred))
	var found []string
	for {
		found = found[:0]
		lost := false
		err := s.read(ctx, func(fd int) error {
			for n := 0; n < eventBatch; n++ {
				m, err := receive(fd, data, oob)
				switch {
				case err == unix.ENOBUFS: // the buffer was full, and events were dropped
					lost = true
					continue
				case err == unix.EAGAIN && n > 0:
					return nil
				case err != nil:
					return err
				}
				if name := what(m); name != "" && !slices.Contains(found, name) {
					found = append(found, name)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
		if lost {
			l.Lost()
		}
		for _, name := range found {
			l.Happened(name)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

func receive(fd int, data, oob []byte) (netlinkMessage, error) {
	n, oobn, _, from, err := unix.Recvmsg(fd, data, oob, 0)
	if err != nil {
		return netlinkMessage{}, err
	}
	m := netlinkMessage{data: data[:n], uid: 1<<32 - 1}
	if a, ok := from.(*unix.SockaddrNetlink); ok {
		m.sender, m.groups = a.Pid, a.Groups
	} else {
		m.sender = 1<<32 - 1
	}
	controls, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return m, nil //nolint:nilerr // a message without credentials is nobody's
	}
	for _, c := range controls {
		if cred, err := unix.ParseUnixCredentials(&c); err == nil {
			m.uid = cred.Uid
		}
	}
	return m, nil
}
