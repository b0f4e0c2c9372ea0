// Package host is the one doorway to the machine: nothing else in the agent
// opens host files, talks to host sockets or D-Bus, enters namespaces or starts
// host commands. A [View] reads; what writes is kept apart from it.
//
// Three things implement View: [Open] on a live host, [OpenTree] on a directory
// that looks like one (--root DIR), and hosttest on one text file per case.
package host

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"net"
	"time"
)

// Errors a caller can tell apart. Absence of a file is fs.ErrNotExist and lack
// of privilege fs.ErrPermission, as everywhere in Go.
var (
	// ErrNotLive: the question needs a running host, and this is only a tree.
	ErrNotLive = errors.New("not a running host, only a directory tree")
	// ErrNoSystemd: the host has another init; a fact, not a fault.
	ErrNoSystemd = errors.New("systemd is not the init of this host")
	// ErrNotRegular: a device, FIFO or directory stands where a file should.
	ErrNotRegular = errors.New("not a regular file")
	// ErrTooLarge: the file is larger than any sane file of its kind.
	ErrTooLarge = errors.New("larger than the limit")
	// ErrNoReply: a socket, bus or kernel call did not answer in time.
	ErrNoReply = errors.New("no answer in time")
	// ErrNotConfigured: no way to this service was given (no cluster).
	ErrNotConfigured = errors.New("not configured")
)

// Files reads the host's tree. Names are absolute host paths ("/etc/fstab",
// "/proc/1/mountinfo", "/sys/block"); symlinks, absolute ones too, resolve
// inside the host's root and can not leave it.
type Files interface {
	// ReadFile returns a regular file of at most [MaxFile] bytes.
	ReadFile(ctx context.Context, name string) ([]byte, error)
	// ReadFileMax is ReadFile with a limit of the caller's, in bytes.
	ReadFileMax(ctx context.Context, name string, limit int64) ([]byte, error)
	// ReadThrough hands out a regular file of at most limit bytes piece by piece,
	// for what may be too long to be held. A piece is valid during its call. On
	// an error each may be running still, so that nothing it fills must be
	// looked at.
	ReadThrough(ctx context.Context, name string, limit int64, each func(piece []byte)) error
	// Certificates returns the certificates of a PEM file, in DER. Private keys
	// that stand beside them are not kept.
	Certificates(ctx context.Context, name string) ([][]byte, error)
	// ReadAttributes reads several small files below one directory, such as the
	// attributes of a device in sysfs, of at most [MaxAttribute] bytes each. The
	// way to the directory is walked once and not for every file, which there is
	// what reading costs. The result is in the order of names, each with its own
	// error; names are relative, "size" or "device/state".
	ReadAttributes(ctx context.Context, dir string, names ...string) []Attribute
	// ReadDir returns the names in a directory, sorted.
	ReadDir(ctx context.Context, name string) ([]string, error)
	// ReadLink returns the target of a symlink as it is written.
	ReadLink(ctx context.Context, name string) (string, error)
	// ReadLinks is ReadLink for many entries of one directory, by their names
	// in it; the result is in their order.
	ReadLinks(ctx context.Context, dir string, names []string) []Link
	// Stat follows symlinks, Lstat does not follow the last one.
	Stat(ctx context.Context, name string) (FileInfo, error)
	Lstat(ctx context.Context, name string) (FileInfo, error)
	// RealPath resolves every symlink and returns the path inside the root.
	RealPath(ctx context.Context, name string) (string, error)
}

// Attribute is one of the files of [Files.ReadAttributes].
type Attribute struct {
	Data []byte
	Err  error
}

// Link is one of the symlinks of [Files.ReadLinks].
type Link struct {
	Target string
	Err    error
}

// MaxAttribute is more than any attribute in sysfs has, in bytes: a page of the
// largest kind.
const MaxAttribute = 64 << 10

// FileInfo is what stat(2) tells about a file.
type FileInfo struct {
	Mode    fs.FileMode
	Size    int64
	ModTime time.Time
	UID     uint32
	GID     uint32
	Inode   uint64
	// Links counts hard links: of a directory in sysfs, a control group or
	// tmpfs, two and those it has in it.
	Links uint64
	// Dev is the device the file lives on, Rdev the one a device node stands for.
	Dev, Rdev DevNum
}

// DevNum is a device number.
type DevNum struct{ Major, Minor uint32 }

// View is everything a probe can see of the machine. No method changes it.
type View interface {
	Files

	// OS tells the distribution and how it is managed.
	OS(ctx context.Context) (OS, error)
	// Processes is the host's process table; the probes of one pass share it, see
	// AsOf. Which processes there are is true then; of one that is
	// older than two minutes name, parent, state and threads may be those of up
	// to ten minutes ago. The slice must not be changed.
	Processes(ctx context.Context) ([]Process, error)
	// ProcessesNow reads the processes with these PIDs anew, as far as they
	// still are, in the order given; without PIDs all there are.
	ProcessesNow(ctx context.Context, pids ...int) ([]Process, error)

	// BlockDevices lists /sys/block by name; the probes of one pass share it, see
	// AsOf. The slice must not be changed.
	BlockDevices(ctx context.Context) ([]BlockDevice, error)

	// SystemState is systemd's SystemState property: "running", "degraded",
	// "starting", "stopping", ... ErrNoSystemd where it is not the init.
	SystemState(ctx context.Context) (string, error)
	// Units returns the named units, in that order; a unit that does not exist
	// has Load "not-found". No unit is ever activated.
	Units(ctx context.Context, names ...string) ([]Unit, error)
	// UnitsMatching returns the loaded units that match a glob pattern.
	UnitsMatching(ctx context.Context, patterns ...string) ([]Unit, error)
	// BusProperties returns all properties of one interface of a service on the
	// system bus, as encoding/json would represent them (integers as float64,
	// bytes as numbers). ok is false when nobody owns the name: a service is
	// never started by asking.
	BusProperties(ctx context.Context, dest, object, iface string) (props map[string]any, ok bool, err error)

	// Dial connects in the host's network namespace: "udp" with an IP address
	// and port, "unix" and "unixgram" with a path inside the host's root or an
	// abstract name "@...". A unixgram connection is bound to a client address
	// of its own beside the server's socket, mode 0666, because chronyd answers
	// only such clients (chrony candm.h); Close removes it. Deadlines are those
	// of ctx.
	Dial(ctx context.Context, network, address string) (net.Conn, error)

	// Adjtimex reads the kernel clock's state, adjtimex(2) with modes 0.
	Adjtimex(ctx context.Context) (Timex, error)
	// PTPOffset reads a PTP hardware clock by its device node, e.g.
	// "/dev/ptp0": system time minus PTP time, and the width of the interval
	// in which both were read.
	PTPOffset(ctx context.Context, node string) (offset, uncertainty time.Duration, err error)

	// DeviceMapper lists the device-mapper devices with their tables and
	// status lines, from the ioctl interface of /dev/mapper/control. The slice
	// must not be changed.
	DeviceMapper(ctx context.Context) ([]DMDevice, error)
	// StatMount does what may hang: stat(2) and statfs(2) on a mount point. At most one
	// call per mount point is outstanding; while one hangs, callers get
	// ErrNoReply at once together with the time the hanging call began.
	StatMount(ctx context.Context, mountPoint string) (MountStat, error)
	// LockHolder asks for the holder of a POSIX record lock that conflicts with
	// a write lock on the whole file, without taking it (fcntl(2) F_GETLK).
	LockHolder(ctx context.Context, name string) (Lock, error)
	// KernelLog returns the kernel's own records that are still in its ring
	// buffer, oldest first; what processes wrote there is left out. The slice must
	// not be changed.
	KernelLog(ctx context.Context) ([]KernelRecord, error)

	// Run executes one of the read-only commands listed in commands.go in the
	// host's namespaces and returns its standard output.
	Run(ctx context.Context, c Command) (Output, error)

	// KubeletAPI does GET https://<kubelet>:10250<path> with the agent's own
	// token and hands the answer to read as it comes: what pods wrote into their
	// specifications is in it, and more of it than should be held. It is cut off
	// with an error at [MaxKubeletAnswer]. ErrNotConfigured outside a cluster.
	KubeletAPI(ctx context.Context, path string, read func(io.Reader) error) error
}

// MaxFile is the limit of ReadFile, in bytes.
const MaxFile = 16 << 20

// MaxMountTable is more than a hundred thousand mounts, as many as the kernel lets
// there be (fs.mount-max), take in /proc/PID/mountinfo, in bytes.
const MaxMountTable = 128 << 20

// MaxKubeletAnswer is as much as 250 pods of the largest size the API server
// takes, in bytes.
const MaxKubeletAnswer = 384 << 20

// OSClass is how the host's software is managed.
type OSClass string

// The classes. On anything but mutable, packages are not installed in place.
const (
	Mutable       OSClass = "mutable"
	Transactional OSClass = "transactional"
	OSTree        OSClass = "ostree"
	Image         OSClass = "image"
)

// OS is what os-release(5) and the evidence on the host tell.
type OS struct {
	// ID, VariantID, VersionID and IDLike are the os-release fields; ID is
	// "linux" when absent, as os-release(5) prescribes.
	ID, VariantID, VersionID string
	IDLike                   []string
	Class                    OSClass
	// Why is the evidence for Class, e.g. "/run/ostree-booted exists".
	Why string
	// Kernel is the release, as in uname -r.
	Kernel string
	// Init is the comm of PID 1, e.g. "systemd".
	Init string
	// BootID identifies this boot; BootTime is when it began.
	BootID   string
	BootTime time.Time
}

// Process is one line of the process table, from /proc/PID/stat.
type Process struct {
	PID  int
	PPID int
	// Comm is at most 15 bytes of the process's own choosing: any byte may be
	// in it, and any process may take any name.
	Comm string
	// State is the letter of proc_pid_stat(5): R, S, D, Z, ...
	State   byte
	Threads int
	// StartTicks is field 22, clock ticks since boot; with PID it identifies
	// the process.
	StartTicks uint64
	// Kernel is set for kernel threads (PF_KTHREAD).
	Kernel bool
}

// Unit is a systemd unit, from its properties on the bus.
type Unit struct {
	Name string
	// ID is systemd's own name for the unit. It differs from Name where Name is
	// an alias, as chronyd.service is of chrony.service on Debian: two names
	// with one ID are one unit.
	ID string
	// Load, Active, Sub and FileState are LoadState ("loaded", "not-found",
	// "masked"), ActiveState, SubState and UnitFileState ("enabled", ...).
	Load, Active, Sub, FileState string
	// Job is true while a job (start, stop, restart) is queued for the unit.
	Job bool
	// Result is the Result of a service: "success", "exit-code", "signal", ...
	Result string
	// MainPID is 0 when there is none.
	MainPID int
	// OOMScoreAdjust is the setting of the unit, 0 when unset.
	OOMScoreAdjust int
	// ControlGroup is the path below the cgroup root, e.g.
	// "/system.slice/chrony.service".
	ControlGroup string
	// NRestarts counts automatic restarts.
	NRestarts int
	// ActiveSince and InactiveSince are when the unit last entered and left
	// the active state; zero when never.
	ActiveSince, InactiveSince time.Time
	// LastTrigger is when a timer last started its unit, also before this boot
	// where the timer is persistent; zero when never.
	LastTrigger time.Time
	// FragmentPath is the unit file; What is the device of a mount unit.
	FragmentPath, What, Where string
}

// Running reports whether the unit is active or about to be.
func (u Unit) Running() bool {
	return u.Active == "active" || u.Active == "reloading" || u.Active == "activating"
}

// Timex is the state of the kernel clock, adjtimex(2). Offset is in nanoseconds
// whatever STA_NANO says; the errors are durations.
type Timex struct {
	State              int
	Status             int32
	Offset             time.Duration
	MaxError, EstError time.Duration
}

// DMDevice is one device-mapper device.
type DMDevice struct {
	Name, UUID string
	Dev        DevNum
	Suspended  bool
	ReadOnly   bool
	OpenCount  int
	EventNr    uint32
	Targets    []DMTarget
}

// DMTarget is one line of `dmsetup table` with its counterpart of `dmsetup
// status`.
type DMTarget struct {
	// Start and Length are in 512-byte sectors.
	Start, Length uint64
	Type          string
	Table, Status string
}

// MountStat is the answer of a mount point.
type MountStat struct {
	Dev DevNum
	// Pending is when a call that has not come back was made; set with
	// ErrNoReply.
	Pending time.Time
	// ReadOnly is ST_RDONLY of statvfs(3).
	ReadOnly bool
}

// Lock is the holder of a file lock.
type Lock struct {
	Held bool
	// PID is the holder's; 0 or -1 when the kernel can not name it (another
	// PID namespace, an open-file-description lock).
	PID int
}

// KernelRecord is one record of /dev/kmsg.
type KernelRecord struct {
	// Priority is the syslog level, 0 to 7.
	Priority int
	// Facility is 0 for the kernel. What a process writes to /dev/kmsg gets
	// another one, 1 where it names none or claims to be the kernel
	// (kernel/printk/printk.c, devkmsg_write), so that no text of its can pass for
	// the kernel's.
	Facility int
	// Sequence counts up by one; 0 when the record came from syslog(2), which
	// has none.
	Sequence uint64
	// Time is since boot on the kernel log's clock, which runs up to a second
	// behind CLOCK_MONOTONIC.
	Time time.Duration
	Text string
}

// Output is what a command left behind.
type Output struct {
	Stdout []byte
	// Stderr is kept to 4 KiB, for messages.
	Stderr []byte
	Code   int
}
