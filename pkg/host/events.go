package host

import (
	"context"
	"errors"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// The Follow functions tell when something has happened to the host that may
// change an answer of a [View]. Each blocks until its context ends, when it
// returns the context's error, or until the source itself ends. An event is a
// hint to read again and nothing more: none carries what is to be read, many of
// one kind are told as one, and one that is lost costs time and not truth.

// Listener hears what a source tells. Its functions are called one at a time and
// hold the source up while they run. All of them are needed.
type Listener struct {
	// Listening is called once, when all that happens from now on will be told.
	Listening func()
	// Happened names what happened to: a file, a unit, a subsystem; each
	// function says what its events are called.
	Happened func(what string)
	// Lost: events were dropped, so that anything may have happened.
	Lost func()
	// Partly: the source goes on without something of what it was asked for.
	Partly func(err error)
}

// eventPause is how long a source rests after it told something. What happens
// meanwhile waits in the kernel and is told together, so that a thousand events
// a second cost ten wake-ups a second. The first event is told at once, but for
// those of files.
const eventPause = 100 * time.Millisecond

func pause(ctx context.Context) error {
	t := time.NewTimer(eventPause)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// eventFile is a descriptor the runtime's poller waits for: no thread is blocked
// in it.
type eventFile struct {
	*os.File
	raw  syscall.RawConn
	stop func() bool
}

// newEventFile takes a non-blocking descriptor over; the file is closed when ctx
// ends, which ends a read.
func newEventFile(ctx context.Context, fd int, name string) (*eventFile, error) {
	f := os.NewFile(uintptr(fd), name)
	raw, err := f.SyscallConn()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &eventFile{f, raw, context.AfterFunc(ctx, func() { f.Close() })}, nil
}

// Close implements io.Closer.
func (f *eventFile) Close() error {
	f.stop()
	return f.File.Close()
}

// read calls get, and again each time the descriptor may be readable, until it
// returns anything but EAGAIN.
func (f *eventFile) read(ctx context.Context, get func(fd int) error) error {
	var err error
	if end := f.raw.Read(func(fd uintptr) bool {
		for {
			if err = get(int(fd)); err != unix.EINTR {
				return err != unix.EAGAIN
			}
		}
	}); end != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return end
	}
	return err
}

// errEnded is how a source ends that should not.
var errEnded = errors.New("the source of events has ended")
