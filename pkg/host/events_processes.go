package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// FollowProcesses tells when a process of one of the names (their comm) has
// ended, by the name. What starts is not announced, so that the process table is
// looked at again now and then; where systemd is the init, [Host.FollowUnits]
// tells more.
func (h *Host) FollowProcesses(ctx context.Context, comms []string, l Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type key struct {
		pid   int
		start uint64
	}
	followed := map[key]bool{}
	exits := make(chan Process)
	look := func() error {
		procs, err := h.Processes(ctx)
		if err != nil {
			return err
		}
		for _, p := range procs {
			k := key{p.PID, p.StartTicks}
			if p.Kernel || p.State == 'Z' || followed[k] || !slices.Contains(comms, p.Comm) {
				continue
			}
			wait, err := h.awaitExit(ctx, p)
			if err != nil {
				if errors.Is(err, errGone) {
					continue
				}
				return err
			}
			followed[k] = true
			go func() {
				if wait() == nil {
					select {
					case exits <- p:
					case <-ctx.Done():
					}
				}
			}()
		}
		return nil
	}
	if err := look(); err != nil {
		return err
	}
	l.Listening()
	timer := time.NewTimer(lookAgain)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case p := <-exits:
			delete(followed, key{p.PID, p.StartTicks})
			l.Happened(p.Comm)
			timer.Reset(lookSoon) // for the one that is started in its place
		case <-timer.C:
			if err := look(); err != nil {
				return err
			}
			timer.Reset(lookAgain)
		}
	}
}

const (
	lookAgain = time.Minute
	lookSoon  = 2 * time.Second
)

// errGone: the process has ended already.
var errGone = errors.New("the process has ended")

// awaitExit returns a function that blocks until the process ends. The process
// is held by a pidfd and then compared by its start time, so that another one
// under its number is not taken for it.
func (h *Host) awaitExit(ctx context.Context, p Process) (wait func() error, err error) {
	fd, err := unix.PidfdOpen(p.PID, 0)
	if err == unix.ESRCH {
		return nil, errGone
	}
	if err != nil {
		return nil, os.NewSyscallError("pidfd_open", err)
	}
	now, err := h.process(p.PID)
	if err == nil && now.StartTicks != p.StartTicks {
		err = errGone
	}
	if err == nil {
		err = unix.SetNonblock(fd, true)
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	f, err := newEventFile(ctx, fd, fmt.Sprintf("process %d", p.PID))
	if err != nil {
		return nil, err
	}
	return func() error {
		defer f.Close()
		return f.read(ctx, func(fd int) error {
			poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			if n, err := unix.Poll(poll, 0); err != nil {
				return err
			} else if n == 0 {
				return unix.EAGAIN
			}
			return nil
		})
	}, nil
}

// process reads one line of the process table.
func (h *Host) process(pid int) (Process, error) {
	var scratch []byte
	data, err := h.readFile(fmt.Sprintf("/proc/%d/stat", pid), 64<<10, &scratch)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return Process{}, errGone
	}
	if err != nil {
		return Process{}, err
	}
	return parseProcStat(data, nil)
}
