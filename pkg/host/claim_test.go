package host

import (
	"bufio"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestClaim(t *testing.T) {
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	ctx := t.Context()
	dir := t.TempDir()

	first, err := h.Claim(ctx, dir)
	if err != nil || first.Orphaned != 0 {
		t.Fatalf("%+v, %v", first, err)
	}
	var held *ClaimedError
	if _, err := h.Claim(ctx, dir); !errors.As(err, &held) || held.PID != os.Getpid() {
		t.Errorf("a second claim: %v, want one that names process %d", err, os.Getpid())
	}
	first.Close()
	again, err := h.Claim(ctx, dir)
	if err != nil {
		t.Fatalf("after it was given up: %v", err)
	}
	again.Close()
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}

	if _, err := h.Claim(ctx, filepath.Join(dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing directory: %v", err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Claim(ctx, file); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("a file: %v", err)
	}
}

// A process that is killed leaves no claim behind, and one of which a thread
// still hangs in the kernel does not keep its successor waiting.
func TestClaimOfTheDead(t *testing.T) {
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	until := func(what string, ok func(*Claim, error) bool) {
		t.Helper()
		dir := t.TempDir()
		p := helper(t, what+" "+dir, nil)
		if what == "claim" {
			var held *ClaimedError
			if _, err := h.Claim(t.Context(), dir); !errors.As(err, &held) || held.PID != p.Pid {
				t.Errorf("while it lives: %v, want one that names process %d", err, p.Pid)
			}
			p.Kill()
		}
		// The kernel takes a moment to end it; nobody waits for how long.
		for {
			c, err := h.Claim(t.Context(), dir)
			if err == nil {
				if !ok(c, err) {
					t.Errorf("%s: %+v", what, c)
				}
				c.Close()
				return
			}
			if t.Context().Err() != nil {
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	until("claim", func(c *Claim, err error) bool { return c.Orphaned == 0 })
	until("remains", func(c *Claim, err error) bool { return c.Orphaned != 0 })
}

// playClaim holds a claim; as remains its first thread ends, as that of a
// process that was killed does, and another does not.
func playClaim(dir string, remains bool) error {
	h, err := Open(Options{})
	if err != nil {
		return err
	}
	if _, err := h.Claim(context.Background(), dir); err != nil {
		return err
	}
	if !remains {
		return ready()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- ready()
	}()
	if unix.Gettid() != os.Getpid() {
		return errors.New("not the first thread")
	}
	unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0)
	return <-done
}

// Whoever may open the directory may lock it, and keeps no agent from its work.
func TestLockOfAStranger(t *testing.T) {
	needsRoot(t)
	h, err := Open(Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { h.Close() })
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	for name, c := range map[string]struct {
		hold func(dir string)
		says string
	}{
		"a user's":         {func(dir string) { helper(t, "flock "+dir, user) }, "of user 12345 holds a lock on it"},
		"shared":           {func(dir string) { helper(t, "flock-shared "+dir, nil) }, "holds a shared lock on it"},
		"shared, a user's": {func(dir string) { helper(t, "flock-shared "+dir, user) }, "holds a shared lock on it"},
		"of a process that has ended": {func(dir string) {
			// flock(1) ends and leaves the lock to the shell it was started by.
			cmd := exec.Command("sh", "-ec", "exec 9<"+dir+"; flock -x 9; echo held; read end")
			cmd.SysProcAttr = user
			out, err := cmd.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := cmd.StdinPipe(); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
			if line, err := bufio.NewReader(out).ReadString('\n'); line != "held\n" {
				t.Fatalf("%q, %v", line, err)
			}
		}, "has left a lock on it to another"},
	} {
		dir := t.TempDir()
		if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(dir), 0o755)); err != nil {
			t.Fatal(err)
		}
		c.hold(dir)
		var held *ClaimedError
		if claim, err := h.Claim(t.Context(), dir); err == nil || errors.As(err, &held) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %+v, %v; want %q", name, claim, err, c.says)
		}
	}
}

// playFlock holds a lock as anybody may who can open a directory.
func playFlock(dir string, how int) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		return err
	}
	return ready()
}

func TestFlockHolder(t *testing.T) {
	locks := []byte(`1: POSIX  ADVISORY  WRITE 101 fe:01:77 0 EOF
2: FLOCK  ADVISORY  READ 102 fe:01:77 0 EOF
3: FLOCK  ADVISORY  WRITE 103 fe:01:177 0 EOF
4: FLOCK  ADVISORY  WRITE 104 fe:01:77 0 EOF
4: -> FLOCK  ADVISORY  WRITE 105 fe:01:77 0 EOF
5: OFDLCK ADVISORY  WRITE -1 fe:01:78 0 EOF
6: FLOCK
`)
	for inode, want := range map[uint64]int{77: 104, 177: 103, 78: 0, 7: 0} {
		if got := flockHolder(locks, inode, "WRITE"); got != want {
			t.Errorf("inode %d is held by %d, want %d", inode, got, want)
		}
	}
	if got := flockHolder(locks, 77, "READ"); got != 102 {
		t.Errorf("inode 77 is shared by %d, want 102", got)
	}
}

func FuzzFlockHolder(f *testing.F) {
	f.Add([]byte("4: FLOCK  ADVISORY  WRITE 104 fe:01:77 0 EOF\n"), uint64(77))
	f.Fuzz(func(t *testing.T, locks []byte, inode uint64) {
		if pid := flockHolder(locks, inode, "WRITE"); pid < 0 {
			t.Errorf("process %d", pid)
		}
	})
}
