package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestSilentServer: a daemon that accepts and says nothing costs the time of the
// context and no more, also when the caller sets no deadline.
func TestSilentServer(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	h := openDir(t, dir)
	read := func(ctx context.Context) error {
		t.Helper()
		c, err := h.Dial(ctx, "unix", "/s")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = c.Read(make([]byte, 1))
		return err
	}
	if err := read(within(t, 50*time.Millisecond)); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("at the deadline: %v", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	time.AfterFunc(50*time.Millisecond, cancel)
	if err := read(ctx); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("when cancelled: %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	dir := t.TempDir()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Net: "unix", Name: filepath.Join(dir, "dead")})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	writeTree(t, dir, map[string]string{"file": ""})
	// A socket outside the tree, and a link to it.
	outside, err := net.Listen("unix", filepath.Join(t.TempDir(), "o"))
	if err != nil {
		t.Fatal(err)
	}
	defer outside.Close()
	if err := os.Symlink(outside.Addr().String(), filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	h := openDir(t, dir)
	for _, tt := range []struct {
		network, address string
		is               error
		says             string
	}{
		{"unix", "/absent", fs.ErrNotExist, "dial unix /absent"},
		{"unix", "/dead", unix.ECONNREFUSED, "dial unix /dead"},
		{"unix", "/out", fs.ErrNotExist, ""},
		{"unix", "/file", nil, "not a socket"},
		{"unix", "relative", nil, "neither an absolute path nor an abstract name"},
		{"unix", "@host-hygiene-nobody", unix.ECONNREFUSED, "@host-hygiene-nobody"},
		{"unixgram", "/absent", fs.ErrNotExist, ""},
		{"unixpacket", "/dead", nil, "unknown network"},
		{"udp", "localhost:323", nil, "localhost"}, // names are not looked up
		{"udp", "127.0.0.1", nil, "127.0.0.1"},
	} {
		c, err := h.Dial(within(t, 5*time.Second), tt.network, tt.address)
		if err == nil {
			c.Close()
			t.Errorf("%s %s: connected", tt.network, tt.address)
			continue
		}
		if tt.is != nil && !errors.Is(err, tt.is) || !strings.Contains(err.Error(), tt.says) || strings.Contains(err.Error(), dir) {
			t.Errorf("%s %s: %v, want %v with %q", tt.network, tt.address, err, tt.is, tt.says)
		}
	}
}

// TestFullBacklog: a daemon that is stopped lets its queue fill; whoever comes
// then is told at once.
func TestFullBacklog(t *testing.T) {
	dir := t.TempDir()
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: filepath.Join(dir, "s")}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	h := openDir(t, dir)
	for range 10 {
		c, err := h.Dial(within(t, time.Minute), "unix", "/s")
		if err == nil {
			defer c.Close()
			continue
		}
		if !errors.Is(err, unix.EAGAIN) {
			t.Errorf("it was waited for: %v", err)
		}
		return
	}
	t.Error("the queue of one never filled")
}

// TestAbstractNameOfAUser: whoever takes an abstract name first has it.
func TestAbstractNameOfAUser(t *testing.T) {
	needsRoot(t)
	h := openDir(t, t.TempDir())
	for uid, ok := range map[int]bool{0: true, 1000: false} {
		name := fmt.Sprintf("@host-hygiene-test-%d-%d", os.Getpid(), uid)
		// The credentials of a server are those it had when it began to listen; only
		// this thread changes its own, and is then thrown away.
		listening := make(chan net.Listener, 1)
		go func() {
			runtime.LockOSThread()
			unix.RawSyscall(unix.SYS_SETRESUID, ^uintptr(0), uintptr(uid), ^uintptr(0))
			l, err := net.Listen("unix", name)
			if err != nil {
				t.Error(err)
			}
			listening <- l
		}()
		l := <-listening
		if l == nil {
			return
		}
		c, err := h.Dial(within(t, 10*time.Second), "unix", name)
		if (err == nil) != ok || !ok && !strings.Contains(err.Error(), "user 1000") {
			t.Errorf("served by user %d: %v", uid, err)
		}
		if err == nil {
			c.Close()
		}
		l.Close()
	}
}
