package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Refusals of [Changer.SetOOMScore].
var (
	// ErrOtherProcess: the process has ended and its number may be another's.
	ErrOtherProcess = errors.New("the process has ended")
	// ErrProtectedProcess: PID 1, a kernel thread or a pod's process.
	ErrProtectedProcess = errors.New("not a process the agent may change")
)

// SetOOMScore writes oom_score_adj of one process and returns what stood there
// before. The process is held by its /proc directory: once it has ended, every
// access through that directory fails, whoever has its PID then (proc(5)). It
// is known by its start time, and is never PID 1, a kernel thread, or a process
// of a pod, whose score is the kubelet's and the runtime's to set.
func (c *Changer) SetOOMScore(ctx context.Context, pid int, startTicks uint64, score int) (before int, err error) {
	dirName := path.Join("/proc", strconv.Itoa(pid))
	fail := func(err error) (int, error) {
		if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
			err = ErrOtherProcess
		}
		return 0, fmt.Errorf("%s/oom_score_adj: %w", dirName, err)
	}
	if pid <= 1 {
		return fail(ErrProtectedProcess)
	}
	before, err = bound(ctx, &c.h.calls, dirName+"/oom_score_adj", nil, func() (int, error) {
		dir, err := c.h.open(dirName, unix.O_PATH|unix.O_DIRECTORY)
		if err != nil {
			return 0, err
		}
		defer unix.Close(dir)
		if err := mayScore(dir, startTicks); err != nil {
			return 0, err
		}
		text, err := readAt(dir, "oom_score_adj")
		if err != nil {
			return 0, err
		}
		before, err := strconv.Atoi(strings.TrimSpace(text))
		if err != nil {
			return 0, err
		}
		return before, writeAt(dir, "oom_score_adj", strconv.Itoa(score))
	})
	if err != nil {
		return fail(err)
	}
	return before, nil
}

func mayScore(dir int, startTicks uint64) error {
	stat, err := readAt(dir, "stat")
	if err != nil {
		return err
	}
	p, err := parseProcStat([]byte(stat), nil)
	if err != nil {
		return err
	}
	if p.StartTicks != startTicks {
		return ErrOtherProcess
	}
	if p.Kernel {
		return fmt.Errorf("a kernel thread: %w", ErrProtectedProcess)
	}
	cgroup, err := readAt(dir, "cgroup")
	if err != nil {
		return err
	}
	if inPodCgroup(cgroup) {
		return fmt.Errorf("it belongs to a pod: %w", ErrProtectedProcess)
	}
	return nil
}

// inPodCgroup knows the kubelet's slice under both cgroup drivers and under a
// --cgroup-root of its own: "/kubepods.slice/...", "/x/kubepods/...". A cgroup
// that only resembles one costs a refusal, not a pod.
func inPodCgroup(cgroup string) bool {
	for line := range strings.Lines(cgroup) {
		if strings.Contains(line, "kubepods") {
			return true
		}
	}
	return false
}

func readAt(dir int, name string) (string, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	var scratch []byte
	data, err := readRegular(fd, 64<<10, &scratch)
	return string(data), err
}

func writeAt(dir int, name, text string) error {
	fd, err := unix.Openat(dir, name, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	_, err = unix.Write(fd, []byte(text))
	return err
}

// SetSysctl writes a kernel setting, named as in sysctl.d(5), and returns what
// stood there before. The settings of the network, IPC and host name are those of the host's
// namespaces, not of the agent's.
func (c *Changer) SetSysctl(ctx context.Context, key, value string) (before string, err error) {
	name := path.Clean(SysctlPath(key))
	if !strings.HasPrefix(name, sysctlRoot) || strings.Contains(value, "\n") {
		return "", fmt.Errorf("%q is no kernel setting", key)
	}
	return bound(ctx, &c.h.calls, "write "+name, nil, func() (before string, err error) {
		// A file of /proc/sys is that of the namespaces of whoever opens it.
		err = c.h.ns.do(unix.CLONE_NEWNET|unix.CLONE_NEWIPC|unix.CLONE_NEWUTS, func() error {
			var scratch []byte
			old, err := c.h.readFile(name, 64<<10, &scratch)
			if err != nil {
				return &fs.PathError{Op: "read", Path: name, Err: err}
			}
			before = strings.TrimSpace(string(old))
			fd, err := c.h.open(name, unix.O_WRONLY)
			if err == nil {
				_, err = unix.Write(fd, []byte(value))
				unix.Close(fd)
			}
			if err != nil {
				return &fs.PathError{Op: "write", Path: name, Err: err}
			}
			return nil
		})
		return before, err
	})
}

const sysctlRoot = "/proc/sys/"

// SysctlPath is the file of a kernel setting. Where the first separator of its
// name is a dot, dots and slashes change places, so that
// net.ipv4.conf.eth0/100.forwarding is an interface with a dot; where it is a
// slash, all stay (sysctl.d(5)).
func SysctlPath(name string) string {
	i := strings.IndexAny(name, "./")
	if i < 0 || name[i] == '/' {
		return sysctlRoot + name
	}
	return sysctlRoot + strings.Map(func(r rune) rune {
		switch r {
		case '.':
			return '/'
		case '/':
			return '.'
		}
		return r
	}, name)
}
