package host

import (
	"context"
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// FollowClock tells of each step of the system clock, by whomever: clock_settime,
// adjtimex with ADJ_SETOFFSET, a resume (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET).
// A clock that is slewed does not step.
func (h *Host) FollowClock(ctx context.Context, l Listener) error {
	fd, err := unix.TimerfdCreate(unix.CLOCK_REALTIME, unix.TFD_NONBLOCK|unix.TFD_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("timerfd_create", err)
	}
	f, err := newEventFile(ctx, fd, "the clock")
	if err != nil {
		return err
	}
	defer f.Close()
	arm := func() error {
		// It is only waited for its being cancelled.
		never := unix.ItimerSpec{Value: unix.NsecToTimespec(time.Date(2200, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano())}
		err := unix.TimerfdSettime(fd, unix.TFD_TIMER_ABSTIME|unix.TFD_TIMER_CANCEL_ON_SET, &never, nil)
		return os.NewSyscallError("timerfd_settime", err)
	}
	if err := arm(); err != nil {
		return err
	}
	l.Listening()
	for {
		err := f.read(ctx, func(fd int) error {
			var count [8]byte
			_, err := unix.Read(fd, count[:])
			return err
		})
		if err != nil && !errors.Is(err, unix.ECANCELED) {
			return err
		}
		// Armed before it is told, so that a step that follows is not missed.
		if err := arm(); err != nil && !errors.Is(err, unix.ECANCELED) {
			return err
		}
		l.Happened("the clock")
		if err := pause(ctx); err != nil {
			return err
		}
	}
}
